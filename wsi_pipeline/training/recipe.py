"""Training recipes: a TOML file that says how a bundle is trained, checked on reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from wsi_pipeline.bundle import Bundle, Modality, parse_bundle
from wsi_pipeline.errors import BundleError, RecipeError, raised_as
from wsi_pipeline.evaluation.meaning import LARGEST_VALUE, LabelMap
from wsi_pipeline.files.schema import (
    LARGEST,
    Amount,
    Count,
    Index,
    Mpp,
    Positive,
    Record,
    Share,
    as_toml,
    converted,
    read_toml,
)
from wsi_pipeline.options import Frame, Icc

Loss = Literal["ce+dice", "ce", "dice"]
Optimizer = Literal["adamw", "adam"]
Schedule = Literal["one-cycle", "cosine", "polynomial", "constant"]
TrainPrecision = Literal["fp32", "bf16", "fp16"]
Below = Annotated[float, Meta(ge=0, lt=1, description="a number from 0 to below 1")]
Within = Annotated[float, Meta(gt=0, lt=1, description="a number between 0 and 1")]
MaskValue = Annotated[
    int, Meta(ge=0, le=LARGEST_VALUE, description=f"a whole number from 0 to {LARGEST_VALUE}")
]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the images of a modality are like, and what a recipe may say of them.

    Attributes:
        is_stained: Whether red, green and blue show stains, and what is white is glass.
        is_part: Whether an image is a part of a slide, so that its figures alone mean little.
        may_be_folder: Whether an image with a mask may be a folder of files.
        without: Keys of the data that it cannot have.
    """

    is_stained: bool = False
    is_part: bool = False
    may_be_folder: bool = False
    without: tuple[str, ...] = ("annotations", "empty", "mpp")


TRAITS: Mapping[Modality, Traits] = {
    "slide": Traits(is_stained=True, is_part=True, without=()),
    "image": Traits(),
    "volume": Traits(may_be_folder=True),
}


class TrainSpec(Record, frozen=True, kw_only=True):
    """The optimisation.

    Attributes:
        batch_size: Crops that go through the network at once, on each device.
        accumulate: Batches whose gradients make one step.
        crop: Smallest and largest side of a crop, px; each step draws a multiple of what the
            network takes between them.
        balance: Share of crops around a pixel of a class drawn evenly; the others around one drawn
            by area.
        loss: "ce" is cross-entropy, binary with sigmoid; "dice" is soft Dice.
        label_weight: Weight of the loss of labels of whole patches.
        optimizer: "adamw" decouples the decay of weights, "adam" has it in the gradients.
        learning_rate: The highest rate.
        schedule: "one-cycle" warms up, then falls as a cosine; "cosine" falls to a hundredth;
            "polynomial" falls to nothing with the power 0.9.
        warm_up: Share of the steps that the learning rate rises, of one-cycle.
        weight_decay: Decay of kernels; biases and norms have none.
        average: Decay of the moving average of the weights, which is what is kept.
        encoder: File with ImageNet weights, relative to the data folder, or its URL; None = from
            scratch.
        crops: How many of each patient a decoder's frozen encoder is shown, filled up to whole
            batches, and all that is learnt from; None = 256.
        encoder_rate: Learning rate of the encoder, as a share of that of the rest; 0 = it stays as
            it is, its norms as well.
        precision: Number format of the forward pass; weights and their updates stay fp32.
        validate_every: Steps between two looks at the validation patients, where there are any, and
            at the held-out ones, with `split.watch`.
        patience: Looks without a better Dice after which the training ends; 0 = never.
        checkpoint_every: Steps between two checkpoints, from which a killed training goes on.
        seed: Start of all random numbers.
    """

    steps: Count = 1500
    batch_size: Count = 8
    accumulate: Count = 1
    crop: Annotated[tuple[Count, Count], Meta(description="two sides in px, rising")] = (192, 256)
    balance: Share = 0.5
    loss: Loss = "ce+dice"
    label_weight: Amount = 1.0
    optimizer: Optimizer = "adamw"
    learning_rate: Positive = 2e-3
    schedule: Schedule = "one-cycle"
    warm_up: Within = 0.15
    weight_decay: Amount = 0.02
    average: Below = 0.99
    encoder: str | None = None
    crops: Count | None = None
    encoder_rate: Amount = 1.0
    precision: TrainPrecision = "fp32"
    validate_every: Count = 200
    patience: Index = 0
    checkpoint_every: Count = 200
    seed: Index = 42

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with."""
        if self.crop[0] > self.crop[1]:
            raise ValueError(f"crop is {as_toml(self.crop)}; expected two sides in px, rising")


class SplitSpec(Record, frozen=True, kw_only=True):
    """Which patients are held out.

    Attributes:
        folds: Groups of patients, each held out once; 0 = every patient for himself.
        test: Patients, or names of groups, that are kept apart for good: the bundle is trained
            once, without them, and measured by them.
        validation: Share of the patients learnt from, but one at least, that are left out of the
            learning to choose the best weights by and to stop early; 0 = none.
        watch: Whether the held-out patients are judged every `validate_every` steps too, for the
            curve alone: nothing is chosen by it.
    """

    folds: Index = 0
    test: tuple[str, ...] = ()
    validation: Below = 0.0
    watch: bool = False

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.folds == 1:
            raise ValueError("folds is 1; expected 0, or 2 or more")


class AugmentSpec(Record, frozen=True, kw_only=True):
    """How strongly crops are varied; 0 switches a variation off.

    Attributes:
        scale: Largest enlargement and reduction; 1 = none.
        turn: Share of crops that are turned and flipped; the others stay upright.
        rotate: Share of those that are turned by any angle, not only right ones.
        tilt: Largest angle by which those that stay upright lean to either side, degrees.
        mirror: Share of those that are flipped left to right.
        stain: Deviation of the logarithm of each stain's density.
        borrow: Share of crops that take the colours of another of their batch: mean and deviation
            of the optical density of its tissue.
        mixing: Deviation of the mixing of the colour channels' optical densities.
        density: Deviation of the logarithm of the overall optical density.
        tint: Deviation of each channel's optical density of the background.
        contrast: Deviation of the contrast's logarithm.
        blur: Largest standard deviation of a Gaussian blur, px; half of the steps are blurred.
        noise: Largest standard deviation of pixel noise, of 1.
        jpeg: Share of crops that are compressed once more, as JPEG of any quality from 30 to 95.
        glass: Share of crops that get patches of empty glass, which are background.
    """

    scale: Annotated[float, Meta(ge=1, le=LARGEST, description="a number from 1")] = 1.4
    turn: Share = 1.0
    rotate: Share = 0.5
    tilt: Amount = 0.0
    mirror: Share = 0.0
    stain: Amount = 0.35
    borrow: Share = 0.0
    mixing: Amount = 0.1
    density: Amount = 0.3
    tint: Amount = 0.03
    contrast: Amount = 0.15
    blur: Amount = 1.2
    noise: Amount = 0.03
    jpeg: Share = 0.0
    glass: Share = 0.25


class DataSpec(Record, frozen=True, kw_only=True):
    """Images of one patient, or of several, with their masks or annotations.

    Attributes:
        images: Path or glob, relative to the data folder: pictures, volumes, or, with
            `annotations`, slides and patch grids.
        classes: Mask values, or names of annotations, of each class but the background, by the
            class's name.
        patient: Who they are from; decides the splits.
        patients: Regular expression in place of `patient`; what it finds in a file's name, or, if
            it has a slash, in the path from the data folder, is the patient: its first group where
            it has one.
        fold: Name of the group that is held out together; images without one are never held out.
        table: CSV with a row for each image, relative to the data folder.
        columns: Columns of the table, which say what would else be said here: "image" (the file's
            name, or its path from the data folder; "file" if not said), "patient", "label" (in any
            case of its letters), "fold".
        weight: Share of draws of a patient, against 1 of others.
        unlabelled: Words in the column of labels for images of which nothing is to be said.
        masks: Folder or file.
        mask_name: Name of the mask in that folder; `{stem}` is the image's name without suffix,
            `{patient}` the patient, `{folder}` the name of the image's folder.
        annotations: GeoJSON in level-0 pixels in place of `masks`, a folder or file.
        background: Names of annotations that are background: areas of other classes, and what lies
            in no area, are neither learnt nor judged. Of masks the values besides 0 that are
            background. "others" = all that nothing else names, of annotations within the areas of
            Region*. Values without a meaning are refused.
        threshold: Least value of the one class in masks that went through JPEG; those below are
            background.
        empty: Whether the images show no class at all, in place of `masks` and `annotations`.
        frame: Origin of annotations on slides with bounds.
        mpp: µm per pixel of pictures and masks; of a slide, in place of what its file says.
        icc: "apply" brings slides to sRGB by their ICC profiles.
        ignore: Mask values that are neither learnt nor judged.
        label: Label of the whole patch, one of the bundle's; None with labels = whether there is a
            pixel of any class in it.
    """

    images: str
    classes: Annotated[
        dict[str, tuple[MaskValue | str, ...]],
        Meta(description="lists of mask values from 0 to 65535, or of names of annotations"),
    ] = msgspec.field(default_factory=dict)
    patient: str | None = None
    patients: str | None = None
    fold: str | None = None
    table: str | None = None
    columns: dict[str, str] = msgspec.field(default_factory=dict)
    unlabelled: tuple[str, ...] = ()
    weight: Positive = 1.0
    masks: str | None = None
    mask_name: str = "{stem}.png"
    annotations: str | None = None
    background: tuple[MaskValue | str, ...] | Literal["others"] = ()
    threshold: MaskValue | None = None
    empty: bool = False
    frame: Frame = "qupath"
    mpp: Mpp | None = None
    icc: Icc = "ignore"
    ignore: tuple[MaskValue, ...] = ()
    label: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is missing or contradicts itself."""
        where = f"{self.images!r}"
        if unknown := self.columns.keys() - {"image", "patient", "label", "fold"}:
            raise ValueError(f"{where}: columns has {sorted(unknown)}")
        if (self.table is None) != (not self.columns):
            raise ValueError(f"{where}: 'table' and 'columns' come together")
        said = [self.patient, self.patients, self.columns.get("patient")]
        if said.count(None) != 2:
            raise ValueError(
                f"{where}: lacks 'patient' or 'patients', or has both, or columns.patient besides"
            )
        for name in ("label", "fold"):
            if getattr(self, name) is not None and name in self.columns:
                raise ValueError(f"{where}: has {name!r} and columns.{name}")
        if self.unlabelled and "label" not in self.columns:
            raise ValueError(f"{where}: 'unlabelled' is for columns.label")
        if [self.masks is None, self.annotations is None, not self.empty].count(False) != 1:
            raise ValueError(
                f"{where}: lacks 'masks' or 'annotations', or has both, or 'empty' besides"
            )
        if self.icc != "ignore" and self.masks is not None:
            raise ValueError(f"{where}: 'icc' is for slides, with 'annotations' or 'empty'")
        if self.empty == bool(self.classes):
            raise ValueError(f"{where}: lacks 'classes', or has them and 'empty'")
        # mask values, or names of annotations, that are none or mean two things
        kind: type = int if self.annotations is None else str
        background = () if self.background == "others" else self.background
        lists = {**self.classes, "background": background}
        for name, values in lists.items():
            if not all(type(v) is kind for v in values):
                expected = "mask values" if kind is int else "names of annotations"
                raise ValueError(f"{where}: {name} has {list(values)}; expected {expected}")
        given = [v for values in lists.values() for v in values] + [*self.ignore]
        if len(set(given)) != len(given):
            raise ValueError(f"{where}: {', '.join(lists)} and ignore have {given}; the same twice")
        if self.threshold is not None:
            if self.masks is None or len(self.classes) != 1 or self.ignore or self.background:
                raise ValueError(
                    f"{where}: 'threshold' is for masks of one class, without ignore and background"
                )
            if any(int(value) < self.threshold for value in given):
                raise ValueError(
                    f"{where}: classes has {given}, below the threshold {self.threshold}"
                )
        if self.patients is not None:
            try:
                re.compile(self.patients)
            except re.error as error:
                raise ValueError(f"{where}: patients is no regular expression: {error}") from error

    @property
    def values(self) -> LabelMap:
        """Return what the values of its masks mean."""
        if self.threshold is not None:
            of_class = range(self.threshold, LARGEST_VALUE + 1)
            return LabelMap(
                classes=dict.fromkeys(self.classes, of_class), background=range(self.threshold)
            )
        background = None if self.background == "others" else (0, *map(int, self.background))
        classes = {name: tuple(map(int, values)) for name, values in self.classes.items()}
        return LabelMap(classes=classes, ignored=self.ignore, background=background)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a training needs but the data.

    Attributes:
        bundle: What is trained, without weights.
        notes: Where the data come from, for the model card, Markdown.
        limits: What the network is not to be trusted with, for the model card, Markdown.
        notices: Licences of data and of weights begun with, and what they ask to be said, likewise.
        start: Bundle of the same network whose weights the training begins with.
    """

    bundle: Bundle
    train: TrainSpec
    augment: AugmentSpec
    split: SplitSpec
    data: tuple[DataSpec, ...]
    notes: str = ""
    limits: str = ""
    notices: str = ""
    start: Bundle | None = None


class RecipeToml(Record, frozen=True, kw_only=True):
    """What a recipe's file holds, see `Recipe`."""

    bundle: dict[str, Any]
    train: TrainSpec = TrainSpec()
    augment: AugmentSpec = AugmentSpec()
    split: SplitSpec = SplitSpec()
    data: tuple[DataSpec, ...]
    notes: str = ""
    limits: str = ""
    notices: str = ""


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; return it.

    With `extends`, the name of another recipe in the same folder, it says only what differs.

    Raises:
        RecipeError: not a recipe, or one that contradicts itself.
    """
    path = Path(path)
    table = _read(path)
    try:
        found = converted(table, RecipeToml)
        limits = found.limits.strip()
        # What limits the bundle says of itself go before those of its recipe.
        bundle = parse_bundle({"limits": limits, **found.bundle}, path, is_recipe=True)
        for index, entry in enumerate(found.data):
            _check_data(f"data[{index}]: {entry.images!r}", entry, bundle)
        if found.train.crops and not bundle.encoder:
            raise ValueError("train.crops is for a decoder behind a frozen encoder")
        if found.split.folds and any(e.fold or "fold" in e.columns for e in found.data):
            raise ValueError(
                "split.folds deals patients into groups, which the data have of their own"
            )
    except BundleError as error:
        raise RecipeError(str(error)) from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    return Recipe(
        bundle=bundle,
        train=found.train,
        augment=found.augment,
        split=found.split,
        data=found.data,
        notes=found.notes.strip(),
        limits=limits,
        notices=found.notices.strip(),
    )


def _read(path: Path, over: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the table of a recipe, laid over that of the one it extends, where it does."""
    try:
        table = read_toml(path)
    except ValueError as error:
        raise RecipeError(f"{path} {error}") from error
    except OSError as error:
        raise RecipeError(f"no recipe at {path}: {error.strerror}") from error
    if "extends" not in table:
        return table
    name = table.pop("extends")
    wrong = f"{path} extends {name!r}; expected the name of a recipe in the same folder"
    with raised_as(RecipeError, ValueError, wrong):
        base = path.with_name(str(name))
    if base in (path, *over):
        raise RecipeError(f"{path} extends {base.name}, which extends it")
    return _laid_over(_read(base, (path, *over)), table)


def _laid_over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a table with the values of another in place of its own, but options of a network."""
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and key != "network_options":
            value = _laid_over(below, value)
        merged[key] = value
    return merged


def _check_data(where: str, entry: DataSpec, bundle: Bundle) -> None:
    """Refuse what the bundle does not know, and what its modality cannot have."""
    names = {c.name for c in bundle.classes[1:]}
    if unknown := entry.classes.keys() - names:
        raise ValueError(f"{where}: has classes {sorted(unknown)}, the bundle has {sorted(names)}")
    for name in TRAITS[bundle.modality].without:
        if getattr(entry, name):
            raise ValueError(f"{where}: {name!r} is for slides, the bundle for {bundle.modality}s")
    if bundle.input.mpp is not None and entry.masks is not None and entry.mpp is None:
        raise ValueError(f"{where}: lacks 'mpp', µm per pixel of pictures and masks")
    if entry.label is not None and entry.label not in bundle.labels:
        raise ValueError(f"{where}: label {entry.label!r} is none of {list(bundle.labels)}")
    if "label" in entry.columns and not bundle.labels:
        raise ValueError(f"{where}: has columns.label, the bundle has no labels")
    has_label = entry.label is not None or "label" in entry.columns
    if not has_label and bundle.labels and len(bundle.labels) != 2:
        raise ValueError(f"{where}: lacks 'label', one of {list(bundle.labels)}")
