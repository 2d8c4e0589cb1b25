"""What is learnt from: images with their truth, left on disk, at the network's resolution."""

from __future__ import annotations

import csv
import hashlib
import itertools
import logging
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import shapely
import torch
from torch import Tensor

from wsi_pipeline.annotations import REGION_CLASS, Annotation
from wsi_pipeline.errors import RecipeError, WsiPipelineError, raised_as
from wsi_pipeline.evaluation.annotations import AreaReader, Areas, load_areas
from wsi_pipeline.evaluation.confusion import IGNORE
from wsi_pipeline.evaluation.inputs import AREA_SUFFIXES
from wsi_pipeline.geometry import Shape, box_slices
from wsi_pipeline.options import MPP_TOLERANCE
from wsi_pipeline.sources import SlideView, open_source
from wsi_pipeline.sources.radiology.discover import is_beside
from wsi_pipeline.sources.slide import frame_offset
from wsi_pipeline.training.pictures import Meaning, Read, read_picture, read_scan
from wsi_pipeline.training.recipe import TRAITS, DataSpec, Recipe

__all__ = ["IGNORE", "UNLABELLED", "Sample", "load_samples"]

logger = logging.getLogger(__name__)

UNLABELLED = -100
"""Index of the label of an image of which nothing is to be said; losses of torch leave it out."""

IN_MEMORY = 2 << 30
"""Bytes of decoded pictures and volumes that are kept, so that the next crop need not decode."""


class Source(Protocol):
    """Pixels and truth of one image, read where they are asked for."""

    @property
    def shape(self) -> Shape:
        """Return the pixels along each axis."""

    def read(self, origin: Shape, shape: Shape) -> Read:
        """Return (C, *shape), uint8 or float32 of full scale 1, and (*shape) uint8 class index."""

    def read_truth(self, origin: Shape, shape: Shape) -> Tensor:
        """Return (*shape) uint8 class index, or IGNORE."""

    def may_know(self, origin: Shape, shape: Shape) -> bool:
        """Return whether the truth of any pixel there may be known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One image with its truth, at the network's resolution.

    Attributes:
        label: Index of what is to be said of the whole, or `UNLABELLED`; None = whether it shows
            any class.
        fold: Name of the group that is held out together, or None.
        weight: How often its patient is drawn, against 1 of others.
        outside: Value of what lies beyond, as `segment` pads images and volumes; None = pixels are
            mirrored, since a tile goes on in its slide.
        digest: Hash of the picture's pixels, or of the slide's file: the same picture under another
            name has the same.
    """

    patient: str
    name: str
    source: Source
    label: int | None = None
    fold: str | None = None
    weight: float = 1.0
    outside: float | None = None
    digest: str = ""

    @property
    def shape(self) -> Shape:
        """Return the pixels along each axis."""
        return self.source.shape

    def read(self, origin: Shape, shape: Shape) -> Read:
        """Read a rectangle that lies inside; return image (C, *shape) and truth (*shape)."""
        return self.source.read(origin, shape)

    def label_of(self, truth: Tensor) -> int:
        """Return what is to be said of a part with that truth: whether it shows any class."""
        if self.label is not None:
            return self.label
        return int(((truth > 0) & (truth != IGNORE)).any())

    def read_all(self) -> Read:
        """Return the whole image and its truth."""
        return self.source.read((0,) * len(self.shape), self.shape)


class Cache:
    """Decoded pictures, the ones last used, up to a number of bytes."""

    def __init__(self, limit: int = IN_MEMORY) -> None:
        self._limit = limit
        self._held: OrderedDict[Path, Read] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, load: Callable[[], Read]) -> Read:
        """Return what is held under a path, or load it."""
        with self._lock:
            if path in self._held:
                self._held.move_to_end(path)
                return self._held[path]
        # Decoded outside the lock: no thread waits for another's picture.
        found = load()
        with self._lock:
            self._held[path] = found
            # The last one stays, however large: it is asked for again at once.
            while len(self._held) > 1 and self._limit < sum(
                tensor.nbytes for read in self._held.values() for tensor in read
            ):
                self._held.popitem(last=False)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """A picture or volume that is decoded whole, with its mask, when it is needed."""

    path: Path
    shape: Shape
    load: Callable[[], Read]
    cache: Cache

    def read(self, origin: Shape, shape: Shape) -> Read:
        """Return (C, *shape) and (*shape), as in `Source`."""
        image, truth = self.cache.get(self.path, self.load)
        window = box_slices(origin, shape)
        return image[(slice(None), *window)], truth[window]

    def read_truth(self, origin: Shape, shape: Shape) -> Tensor:
        """Return (*shape) uint8 class index, or IGNORE."""
        return self.read(origin, shape)[1]

    def may_know(self, origin: Shape, shape: Shape) -> bool:
        """Return True: masks tell of every pixel."""
        return True


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotated:
    """A slide, or a patch grid, at the network's resolution, with annotations."""

    view: SlideView
    areas: AreaReader

    @property
    def shape(self) -> Shape:
        """Return (height, width) at the network's resolution."""
        return self.view.shape

    def read(self, origin: Shape, shape: Shape) -> Read:
        """Return (3, *shape) and (*shape), as in `Source`."""
        (y, x), (height, width) = origin, shape
        pixels = np.array(self.view.read((y, x), (height, width)))
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return image, self.read_truth(origin, shape)

    def read_truth(self, origin: Shape, shape: Shape) -> Tensor:
        """Return (*shape) uint8 class index, or IGNORE."""
        return torch.from_numpy(self.areas.read(origin, shape, self.view.downsample))

    def may_know(self, origin: Shape, shape: Shape) -> bool:
        """Return whether any area lies there."""
        return self.areas.touches(origin, shape, self.view.downsample)


def load_samples(recipe: Recipe, data_dir: Path, closing: ExitStack) -> list[Sample]:
    """Open all images of a recipe; return them as samples, slides to be closed by `closing`.

    Pictures are decoded once, to know their size and whether one occurs twice.

    Raises:
        RecipeError: a file that is missing, unreadable or does not match its mask.
    """
    cache = Cache()
    samples: list[Sample] = []
    chosen = [(spec, _images(spec, data_dir, recipe)) for spec in recipe.data]
    names = Counter(image.name for _, images in chosen for image in images)
    owners: dict[Path, tuple[Path, str]] = {}
    for spec, images in chosen:
        rows = _rows(spec, data_dir)
        own = Counter(image.name for image in images)
        if twice := sorted(name for name in own if own[name] > 1 and name in rows):
            raise RecipeError(
                f"the table {spec.table} has one row for {own[twice[0]]} images called {twice[0]}; "
                "name them there by their paths from the data folder"
            )
        for image in images:
            within = image.relative_to(data_dir).as_posix()
            patient, label, fold = _told(image, within, spec, rows, recipe)
            truth = _truth_of(image, patient, spec, data_dir, is_only=len(images) == 1)
            other, owner = owners.setdefault(truth, (image, patient))
            # Images of one patient may share a mask, but of two that are called alike one is wrong.
            if other != image and (other.name == image.name or owner != patient):
                raise RecipeError(
                    f"{truth} would be the truth of {other} and of {image}; tell them apart by "
                    'their folders, as with mask_name = "{folder}/{stem}.png"'
                )
            try:
                source: Source
                if spec.masks is not None:
                    source, outside, digest = _decoded(image, truth, spec, recipe, cache)
                else:
                    outside = None
                    source, digest = _annotated(image, truth, spec, recipe, closing)
            except RecipeError:
                raise
            except (WsiPipelineError, OSError) as error:
                raise RecipeError(f"cannot learn from {image}: {error}") from error
            samples.append(
                Sample(
                    patient=patient,
                    # what several are called does not tell them apart
                    name=image.name if names[image.name] == 1 else within,
                    source=source,
                    label=label,
                    fold=fold,
                    weight=spec.weight,
                    outside=outside,
                    digest=digest,
                )
            )
    return samples


def _images(spec: DataSpec, data_dir: Path, recipe: Recipe) -> list[Path]:
    """Return the images of an entry: what lies beside images, as notes and thumbnails, is none."""
    # volumes may be folders of slices, slides and patch grids folders of chunks
    are_files = spec.masks is not None and not TRAITS[recipe.bundle.modality].may_be_folder
    wrong = f"images = {spec.images!r}, expected a path or glob from the data folder"
    with raised_as(RecipeError, (NotImplementedError, ValueError, IndexError), wrong):
        found = sorted(data_dir.glob(spec.images))
    images = [p for p in found if not is_beside(p) and (p.is_file() or not are_files)]
    if not images:
        whose = "any patient" if spec.patient is None else f"patient {spec.patient}"
        raise RecipeError(f"no image of {whose} matches {data_dir / spec.images}")
    return images


Rows = Mapping[str, Mapping[str, str]]
"""The rows of a table, by the names of the images, or their paths from the data folder."""


def _rows(spec: DataSpec, data_dir: Path) -> Rows:
    """Return what the table of some images says of each; nothing where there is none.

    Raises:
        RecipeError: it cannot be read, lacks a column, or names an image twice.
    """
    if spec.table is None:
        return {}
    path = data_dir / spec.table
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Blanks around a cell are nobody's: "P1 " would be another patient than "P1".
            lines = [[cell.strip() for cell in line] for line in csv.reader(file, strict=True)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"cannot read the table {path}: {error}; expected CSV, UTF-8") from error
    key, (there, *rest) = spec.columns.get("image", "file"), lines or [[]]
    if odd := sorted(name for name in {key, *spec.columns.values()} if there.count(name) != 1):
        raise RecipeError(f"{path} has no column {odd}, or several; there are {there}")
    if long := [line[0] for line in rest if any(line[len(there) :])]:
        raise RecipeError(
            f"{path}: the row of {long[0]!r} has more cells than columns; quote what has a comma"
        )
    rows = [dict(itertools.zip_longest(there, line, fillvalue="")) for line in rest if any(line)]
    named = {row[key]: row for row in rows}
    if len(named) < len(rows):
        raise RecipeError(f"{path}: column {key!r} names an image twice")
    return named


def _told(
    image: Path, within: str, spec: DataSpec, rows: Rows, recipe: Recipe
) -> tuple[str, int | None, str | None]:
    """Return the patient, label and fold that a recipe, or its table, tells of an image.

    Raises:
        RecipeError: no patient is found, the table has no row for it, or a label that the bundle
            does not have.
    """
    row: Mapping[str, str] = {}
    if spec.table is not None:
        key = within if within in rows else image.name
        if key not in rows:
            raise RecipeError(f"the table {spec.table} has no row for {image.name}")
        row = {what: rows[key][column] for what, column in spec.columns.items()}
    patient = row.get("patient", spec.patient)
    if "patient" in row and not patient:
        raise RecipeError(f"the table {spec.table} has no patient of {image.name}")
    name, labels, label = row.get("label", spec.label), recipe.bundle.labels, None
    if name in spec.unlabelled:
        label = UNLABELLED
    elif name is not None:
        indices = {known.casefold(): i for i, known in enumerate(labels)}
        label = indices.get(name.casefold())
        if label is None:
            raise RecipeError(
                f"the table {spec.table} calls {image.name} {name!r}; the bundle has the "
                f"labels {list(labels)}, the recipe's `unlabelled` {list(spec.unlabelled)}"
            )
    if patient is None and spec.patients is not None:
        text = within if "/" in spec.patients else image.name
        match = re.search(spec.patients, text)
        patient = match and (match[1] if match.re.groups else match[0])
        # A group may be there and find nothing.
        if not patient:
            raise RecipeError(
                f"{image}: {text} has no {spec.patients!r}, which finds the patient (in the path "
                "from the data folder, if it has a slash; else in the file's name)"
            )
    return str(patient), label, row.get("fold", spec.fold) or None


def _truth_of(image: Path, patient: str, spec: DataSpec, data_dir: Path, *, is_only: bool) -> Path:
    """Return an image's mask or annotations, or itself where it shows no class."""
    if spec.empty:
        return image
    path = data_dir / (spec.masks or spec.annotations or "")
    if not path.is_dir():
        if not is_only:
            raise RecipeError(f"several images match {spec.images}, but {path} is no folder")
        return path
    if spec.annotations is None:
        told = {"stem": stem(image), "patient": patient, "folder": image.parent.name}
        wrong = (
            f"mask_name {spec.mask_name!r}, expected one with {{stem}}, {{patient}} or {{folder}}"
        )
        with raised_as(RecipeError, (KeyError, IndexError, ValueError), wrong):
            return path / spec.mask_name.format(**told)
    places = itertools.product(
        (path / image.parent.name, path), AREA_SUFFIXES, (stem(image), image.name)
    )
    for place, suffix, name in places:
        if (found := place / f"{name}{suffix}").is_file():
            return found
    raise RecipeError(f"{path} has no {stem(image)}.geojson, the annotations of {image}")


def stem(path: Path) -> str:
    """Return a file's name without its suffix, or suffixes where the last is gzip's.

    Example:
        >>> stem(Path("MAMA_001.nii.gz")), stem(Path("TCGA-A1.2.png"))
        ('MAMA_001', 'TCGA-A1.2')
    """
    return Path(path.stem).stem if path.suffix == ".gz" else path.stem


def _decoded(
    image: Path, mask: Path, spec: DataSpec, recipe: Recipe, cache: Cache
) -> tuple[Decoded, float | None, str]:
    """Return a picture or volume, the value of what lies beyond it, and its digest."""
    wanted = recipe.bundle.input
    meaning = Meaning(values=spec.values, indices=_indices(recipe))

    def load() -> Read:
        if spec.mpp is None:
            return read_scan(image, mask, meaning=meaning, spec=wanted)
        factor = spec.mpp / recipe.bundle.mpp
        return read_picture(image, mask, meaning=meaning, channels=wanted.channels, factor=factor)

    pixels, truth = cache.get(image, load)
    source = Decoded(path=image, shape=tuple(truth.shape), load=load, cache=cache)
    digest = hashlib.sha256(np.ascontiguousarray(pixels.numpy()).tobytes()).hexdigest()
    if spec.mpp is not None:
        return source, None, digest
    return source, float(pixels.min()) if wanted.scale == "zscore" else 0.0, digest


def _annotated(
    path: Path, annotations: Path, spec: DataSpec, recipe: Recipe, closing: ExitStack
) -> tuple[Annotated, str]:
    """Return a slide or patch grid with its annotations, and its digest."""
    slide = closing.enter_context(open_source(path, mpp=spec.mpp, icc=spec.icc))
    rest_is_background = spec.background == "others"
    named = () if rest_is_background else map(str, spec.background)
    indices, of_class = dict.fromkeys(named, 0), _indices(recipe)
    for name, given in spec.classes.items():
        indices |= dict.fromkeys(map(str, given), of_class[name])
    if spec.empty:
        # An area of background over all of it: from here on it is a slide like any other.
        indices = {(nothing := recipe.bundle.classes[0].name): 0}
        area = Annotation(polygon=shapely.box(0, 0, *slide.size), class_name=nothing)
        areas = Areas(path=path, annotations=(area,))
    else:
        offset = frame_offset(slide.bounds, spec.frame)
        areas = load_areas(annotations, offset=offset, renamed={})
    if rest_is_background and not areas.regions:
        raise RecipeError(
            f"{annotations} has no area of {REGION_CLASS}, in which all that is not drawn is "
            "background; draw one around what was looked at"
        )
    if not (rest_is_background or indices.keys() & set(areas.names)):
        raise RecipeError(
            f"{annotations} has areas of {list(areas.names)}, "
            f"the recipe looks for {sorted(indices)}"
        )
    if unnamed := sorted({*areas.names} - {*indices}):
        logger.warning("%s has areas of %s, which the recipe does not name", annotations, unnamed)
    view = slide.at(recipe.bundle.mpp, tolerance=MPP_TOLERANCE)
    others = 0 if rest_is_background else IGNORE
    reader = AreaReader(areas, indices, others=others, outside=0 if spec.empty else others)
    colours = "" if spec.icc == "ignore" else f" {spec.icc}"
    return Annotated(view=view, areas=reader), slide.fingerprint + colours


def _indices(recipe: Recipe) -> dict[str, int]:
    return {info.name: i for i, info in enumerate(recipe.bundle.classes)}
