"""Training recipes: a TOML file that says how a bundle is trained, checked on reading."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipeline.bundle import Bundle, parse_bundle
from wsi_pipeline.errors import BundleError, RecipeError


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The optimisation.

    Attributes:
        steps: of the optimiser.
        batch_size: crops a step.
        crop: smallest and largest side of a crop, px; each step draws a multiple of 32 between.
        learning_rate: the highest; warm-up before, cosine after it.
        warm_up: share of the steps that the learning rate rises.
        weight_decay: AdamW's.
        average: decay of the moving average of the weights, which is what is kept.
        encoder: file with ImageNet weights, relative to the data folder, or its URL; None = from
            scratch.
        seed: of everything random.
    """

    steps: int = 1500
    batch_size: int = 8
    crop: tuple[int, int] = (192, 256)
    learning_rate: float = 2e-3
    warm_up: float = 0.15
    weight_decay: float = 0.02
    average: float = 0.99
    encoder: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with."""
        low, high = self.crop
        if not 32 <= low <= high or low % 32 or high % 32:
            raise ValueError(f"train.crop {self.crop} must be two multiples of 32, rising")
        if self.steps < 1 or self.batch_size < 2:
            raise ValueError("train.steps must be at least 1 and train.batch_size at least 2")
        if not 0 < self.warm_up < 1 or not 0 <= self.average < 1:
            raise ValueError("train.warm_up and train.average must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class AugmentSpec:
    """How strongly crops are varied; 0 switches a variation off.

    Attributes:
        scale: largest enlargement and reduction; 1 = none.
        rotate: share of crops turned by any angle; all are turned by right angles and flipped.
        stain: deviation of the logarithm of each stain's density.
        mixing: deviation of the mixing of the colour channels' optical densities.
        density: deviation of the logarithm of the overall optical density.
        tint: deviation of each channel's optical density of the background.
        contrast: deviation of the contrast's logarithm.
        blur: largest standard deviation of a Gaussian blur, px; half of the steps are blurred.
        noise: largest standard deviation of pixel noise, of 1.
        glass: share of crops that get patches of empty glass, which are background.
    """

    scale: float = 1.4
    rotate: float = 0.5
    stain: float = 0.35
    mixing: float = 0.1
    density: float = 0.3
    tint: float = 0.03
    contrast: float = 0.15
    blur: float = 1.2
    noise: float = 0.03
    glass: float = 0.25

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.scale < 1 or min(vars(self).values()) < 0:
            raise ValueError("augment.scale must be at least 1, the others at least 0")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Images of one patient with their masks.

    Attributes:
        patient: who they are from; decides the splits.
        images: a path or glob, relative to the data folder.
        masks: a folder or file; in a folder a mask has its image's name and ends in .png.
        mpp: µm per pixel of image and mask.
        classes: mask values of each class but the background, by the class's name.
        ignore: mask values that are neither learnt nor judged. All other values are background.
    """

    patient: str
    images: str
    masks: str
    mpp: float
    classes: dict[str, tuple[int, ...]]
    ignore: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a training needs but the data.

    Attributes:
        bundle: what is trained, without weights.
        train: the optimisation.
        augment: the variations.
        data: the images.
        notes: where the data come from, for the model card, Markdown.
        limits: what the network is not to be trusted with, for the model card, Markdown.
    """

    bundle: Bundle
    train: TrainSpec
    augment: AugmentSpec
    data: tuple[DataSpec, ...]
    notes: str = ""
    limits: str = ""


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; return it.

    Raises:
        RecipeError: not a recipe, or one that contradicts itself.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise RecipeError(f"no recipe at {path}: {error.strerror}") from error
    try:
        return _parse(table, path)
    except KeyError as error:
        raise RecipeError(f"{path} lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error


def _parse(table: dict[str, Any], path: Path) -> Recipe:
    unknown = table.keys() - {"bundle", "train", "augment", "data", "notes", "limits"}
    if unknown:
        raise RecipeError(f"{path}: unknown {sorted(unknown)}")
    try:
        bundle = parse_bundle(table["bundle"], path)
    except BundleError as error:
        raise RecipeError(str(error)) from error
    data = tuple(_data(entry) for entry in table["data"])
    names = {c.name for c in bundle.classes[1:]}
    for entry in data:
        if unknown := entry.classes.keys() - names:
            raise RecipeError(
                f"{path}: data of patient {entry.patient} has classes {sorted(unknown)}, "
                f"the bundle has {sorted(names)}"
            )
    return Recipe(
        bundle=bundle,
        train=TrainSpec(**_tuples(table.get("train", {}))),
        augment=AugmentSpec(**table.get("augment", {})),
        data=data,
        notes=str(table.get("notes", "")).strip(),
        limits=str(table.get("limits", "")).strip(),
    )


def _data(entry: dict[str, Any]) -> DataSpec:
    classes = {name: tuple(values) for name, values in entry["classes"].items()}
    spec = DataSpec(**{**_tuples(entry), "classes": classes})
    if not spec.mpp > 0:
        raise ValueError(f"mpp of patient {spec.patient} is {spec.mpp}; expected µm per pixel")
    return spec


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
