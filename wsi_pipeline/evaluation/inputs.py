"""The two sides of a comparison: masks, runs and annotations, read as classes in one frame."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import EvaluationError, StoreError, raised_as
from wsi_pipeline.evaluation.annotations import AreaReader, Areas, load_areas
from wsi_pipeline.evaluation.confusion import Mask
from wsi_pipeline.evaluation.masks import MaskFile, Pair, open_ome_zarr, open_picture
from wsi_pipeline.evaluation.meaning import LabelMap, Lookup, named, settle
from wsi_pipeline.evaluation.volumes import open_labels
from wsi_pipeline.files.formats import is_dicom
from wsi_pipeline.geometry import Region, Shape, iter_blocks
from wsi_pipeline.options import Frame, Rule
from wsi_pipeline.report.record import FILES, RUN_FILE, Run, load_run
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources.slide import frame_offset

logger = logging.getLogger(__name__)

AREA_SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz")
MASK_SUFFIXES = (".png", ".tif", ".tiff")
PART = 4096
"""Side of what is read at once of a mask that is refused, px."""


@dataclass(frozen=True, kw_only=True)
class SlideFrame:
    """The slide that both sides are of.

    Attributes:
        size: (width, height) of level 0.
        mpp: (x, y) µm per level-0 pixel, where it is known.
        bounds: The slide's content in level-0 pixels, where the file says.
    """

    size: tuple[int, int]
    mpp: Pair | None = None
    bounds: Region | None = None

    @classmethod
    def of_run(cls, run: Run) -> SlideFrame:
        """Return the frame of what was segmented, as its record tells."""
        width, height, bounds = *run.slide["size"], run.slide.get("bounds")
        return cls(
            size=(width, height),
            mpp=run.slide.get("mpp"),
            bounds=Region(**bounds) if bounds else None,
        )


class Reader(Protocol):
    """Class indices, wherever they are asked for."""

    @property
    def downsample(self) -> Pair | None:
        """Return (y, x) level-0 pixels per pixel stored; None for what has no pixels."""

    def read(self, origin: Shape, shape: Shape, downsample: Pair) -> Mask:
        """Return the class index at the centre of each pixel, (h, w) uint8."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How the pixels of a mask lie on the slide.

    Attributes:
        origin: (y, x) of the first pixel's corner, level-0 pixels.
        downsample: (y, x) level-0 pixels per pixel.
    """

    origin: Pair
    downsample: Pair


class MaskReader:
    """A mask as class indices, wherever they are asked for, at any resolution.

    Args:
        indices: Class index by name; other classes are background.
    """

    def __init__(self, mask: MaskFile, placement: Placement, indices: Mapping[str, int]) -> None:
        self._mask = mask
        self.origin = placement.origin
        self.downsample = placement.downsample
        self._lookup = Lookup(mask.path, mask.values, indices)

    def read(self, origin: Shape, shape: Shape, downsample: Pair) -> Mask:
        """Return the class index at the centre of each pixel, background beyond the mask.

        Args:
            origin: (y, x) of the first pixel.
            downsample: (y, x) level-0 pixels per pixel.

        Raises:
            EvaluationError: the mask is damaged, or has values without a meaning.
        """
        length = self._mask.pixels.shape
        axes = zip(origin, shape, downsample, self.origin, self.downsample, length, strict=True)
        (rows, is_row), (columns, is_column) = (_nearest(*axis) for axis in axes)
        result = np.zeros(shape, np.uint8)
        if not (len(rows) and len(columns)):
            return result
        top, left = int(rows[0]), int(columns[0])
        window = slice(top, int(rows[-1]) + 1), slice(left, int(columns[-1]) + 1)
        values = self._mask.read(window)
        if any((np.diff(index) != 1).any() for index in (rows, columns)):
            values = values[np.ix_(rows - top, columns - left)]
        # Read only where a value is refused, to tell how often it occurs.
        whole = (self._mask.read(part.slices) for part in iter_blocks(length, (PART, PART)))
        inside = slice(is_row[0], is_row[-1] + 1), slice(is_column[0], is_column[-1] + 1)
        result[inside] = self._lookup(values, whole)
        return result


def _nearest(
    first: int, count: int, downsample: float, start: float, own: float, length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the mask's pixels along an axis, ascending, and the pixels wanted they stand for."""
    centres = (np.arange(first, first + count) + 0.5) * downsample
    index = np.floor((centres - start) / own).astype(np.int64)
    # the mask's last pixel may end before the slide does, by rounding
    index[index == length] = length - 1
    inside = np.flatnonzero((index >= 0) & (index < length))
    return index[inside], inside


def place(mask: MaskFile, slide: SlideFrame, frame: Frame) -> Placement:
    """Find out how a mask lies on its slide: over all of it, or over its bounds; return it.

    Raises:
        EvaluationError: its size fits neither at any resolution.
    """
    height, width = mask.pixels.shape
    parts = [(0, 0, *slide.size)]
    if frame == "qupath" and (b := slide.bounds):
        parts.append((b.x, b.y, b.width, b.height))
    for x, y, full_width, full_height in parts:
        # between which factors one length is reduced to the other, rounded up or down
        spans = [
            (full / (length + 1), full / (length - 1) if length > 1 else math.inf)
            for full, length in ((full_height, height), (full_width, width))
        ]
        # µm first: they tell of a mask that was reduced differently along both axes.
        if mask.mpp and slide.mpp:
            told = mask.mpp[1] / slide.mpp[1], mask.mpp[0] / slide.mpp[0]
            if all(low < f < high for f, (low, high) in zip(told, spans, strict=True)):
                return Placement(origin=(y, x), downsample=told)
        low, high = max(low for low, _ in spans), min(high for _, high in spans)
        if low < high:
            whole = round(full_width / width)
            factor = whole if low < whole < high else min(max(full_width / width, low), high)
            return Placement(origin=(y, x), downsample=(factor, factor))
    wanted = " or ".join(f"{w} × {h}" for *_, w, h in parts)
    raise EvaluationError(
        f"{mask.path} is {width} × {height} px, which is no reduction of {wanted} px: "
        "it is of another slide, or cut; give the slide's own with --slide"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """A prediction or a truth, before it is known which classes are judged.

    Attributes:
        slide: The slide, where this side tells it.
    """

    path: Path
    content: MaskFile | Areas
    slide: SlideFrame | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the classes that it may hold."""
        return self.content.names


def reader_of(side: Side, slide: SlideFrame, indices: Mapping[str, int], frame: Frame) -> Reader:
    """Return what reads a side on a slide.

    Raises:
        EvaluationError: a mask whose size does not fit the slide.
    """
    if isinstance(side.content, Areas):
        return AreaReader(side.content, indices)
    # a run's own mask is of the whole slide in any frame
    placement = place(side.content, slide, "openslide" if side.slide else frame)
    return MaskReader(side.content, placement, indices)


def open_side(
    path: Path,
    *,
    values: LabelMap,
    renamed: Mapping[str, str],
    slide: SlideFrame | None,
    frame: Frame,
    closing: ExitStack,
) -> Side:
    """Open a mask, a run's folder or a GeoJSON file; return it as a side.

    Args:
        values: What a mask's values mean, in place of what the file says.
        renamed: New names of classes; two that get the same name become one.
        slide: The slide, where another file tells it.
        frame: Origin of GeoJSON on slides with bounds.

    Raises:
        EvaluationError: not something to compare, or a mask without names for its values.
        AnnotationError: GeoJSON that cannot be read, or areas without class.
    """
    if not path.exists():
        raise EvaluationError(f"no file or folder {path}")
    if path.name.lower().endswith(AREA_SUFFIXES):
        offset = frame_offset(slide.bounds if slide else None, frame)
        return Side(path=path, content=load_areas(path, offset=offset, renamed=renamed))
    own = None
    if (path / RUN_FILE).is_file():
        mask, own = open_run_mask(path, closing)
        warn_of_rule(path)
    elif path.is_dir():
        mask = open_ome_zarr(path)
    elif path.suffix.lower() in MASK_SUFFIXES:
        mask = open_picture(path, closing)
    elif is_dicom(path):
        # Of a planar image: those of volumes are known before they come here.
        labels = open_labels(path)
        mask = MaskFile(path=path, pixels=labels.codes[0], values=labels.values)
    else:
        raise EvaluationError(
            f"{path} is no mask (PNG, TIFF, OME-Zarr, NIfTI, NRRD, DICOM-SEG), no run's folder and "
            "no GeoJSON"
        )
    settled = settle(mask.path, mask.values, values, renamed)
    return Side(path=path, content=replace(mask, values=settled), slide=own)


def finished_run(folder: Path) -> Run:
    """Return the run that a folder holds.

    Raises:
        EvaluationError: none that is done.
    """
    with raised_as(EvaluationError, StoreError):
        run = load_run(folder / RUN_FILE)
    if run.status != "done":
        raise EvaluationError(f"{folder} holds no finished mask ({run.reason or run.status})")
    return run


def warn_of_rule(folder: Path) -> None:
    """Say of a run that its polygons and areas are not those of the mask that is compared."""
    if rule := load_run(folder / RUN_FILE).rule:
        logger.warning(
            "%s: polygons and areas are by other thresholds than the mask, which is compared; "
            "`export %s --output DIR` makes a run whose mask is by them",
            folder, Rule(**rule),
        )  # fmt: skip


def classes_of(run: Run) -> LabelMap:
    """Return what the values of the mask of an image or volume mean."""
    return named(dict(enumerate(run.colors, start=1)))


def open_run_mask(folder: Path, closing: ExitStack) -> tuple[MaskFile, SlideFrame]:
    """Open the mask of the run of a slide or image; return it, and what it lies on.

    Raises:
        EvaluationError: none that is done, or its mask is not there.
    """
    run = finished_run(folder)
    if run.kind == "slide":
        path = RunStore(folder=folder).kept_mask_path
        if not path.is_dir():
            raise EvaluationError(f"{folder} holds no finished mask; run `segment` again")
        return open_ome_zarr(path), SlideFrame.of_run(run)
    path = folder / FILES["png"]
    if not path.is_file():
        raise EvaluationError(f"{folder} holds no {path.name}; segment with --outputs png")
    mask = open_picture(path, closing)
    spacing = run.slide["spacing_mm"]
    mpp = (1000 * spacing[0], 1000 * spacing[1]) if spacing else None
    slide = SlideFrame(size=mask.pixels.shape[::-1], mpp=mpp)
    return replace(mask, values=classes_of(run), mpp=mpp), slide


def settle_slide(
    sides: Sequence[Side], slide: SlideFrame | None, size: tuple[int, int] | None
) -> SlideFrame:
    """Return the slide that both sides are of, from whatever tells it.

    Args:
        slide: That of the slide's file, where one is given.
        size: (width, height) of level 0, where the user tells it.

    Raises:
        EvaluationError: nothing tells how a mask and areas lie on each other, or two runs are of
            slides of different sizes.
    """
    told = [known for known in (slide, *(s.slide for s in sides)) if known]
    if len({known.size for known in told}) > 1:
        sizes = " and ".join(f"{known.size[0]} × {known.size[1]}" for known in told)
        raise EvaluationError(f"{sides[0].path} and {sides[1].path}: of slides of {sizes} px")
    if told:
        return told[0]
    if size:
        return SlideFrame(size=size)
    masks = [side.content for side in sides if isinstance(side.content, MaskFile)]
    if len(masks) == 2:
        # Nothing else being known, the finer one stands for the slide.
        finest = max(masks, key=lambda mask: mask.pixels.shape)
        return SlideFrame(size=finest.pixels.shape[::-1], mpp=finest.mpp)
    if masks:
        raise EvaluationError(
            f"{masks[0].path} does not tell how large its slide is, and GeoJSON is in the slide's "
            "pixels; give the slide with --slide, or its size with --size"
        )
    # Areas on both sides need no slide: beyond the last of them both are background.
    ends = [side.content.extent for side in sides if isinstance(side.content, Areas)]
    width, height = (max(1, math.ceil(max(e[i] for e in ends))) for i in (2, 3))
    return SlideFrame(size=(width, height))
