"""Two sides compared, one slide or a cohort."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.annotations import Annotation, read_region
from wsi_pipeline.errors import EvaluationError, SourceError, StoreError
from wsi_pipeline.evaluation.annotations import AreaReader, Areas
from wsi_pipeline.evaluation.confusion import (
    IGNORE,
    Confusion,
    Mask,
    count_block,
    surface_distances,
)
from wsi_pipeline.evaluation.disagreement import LONGEST, Disagreement
from wsi_pipeline.evaluation.inputs import (
    Reader,
    Side,
    SlideFrame,
    classes_of,
    finished_run,
    open_side,
    reader_of,
    settle_slide,
    warn_of_rule,
)
from wsi_pipeline.evaluation.masks import Pair
from wsi_pipeline.evaluation.meaning import BACKGROUND, LabelMap, settle
from wsi_pipeline.evaluation.volumes import LabelVolume, is_labels, open_labels
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Block, box_slices, iter_blocks
from wsi_pipeline.options import Frame
from wsi_pipeline.patch_grid import open_patch_grid
from wsi_pipeline.report.record import FILES, RUN_FILE
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources import open_source
from wsi_pipeline.sources.slide import frame_offset

logger = logging.getLogger(__name__)

BLOCK = 2048
"""Side of what is read and counted at once, px of the finest of both sides."""
SURFACE_PX = 1 << 24
"""Pixels up to which the distances of surfaces are measured: both masks are held for it."""

Progress = Callable[[str, int, int], None]
"""Told the slide, blocks done and blocks in all."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """How two sides are compared.

    Attributes:
        classes: Those judged; others are background. Empty = all, which both sides must have.
        renamed: New names of classes, on either side; "" names areas without a class.
        mpp: µm per pixel to compare at; None = the truth's pixels, else the prediction's, else
            level 0.
        tolerance_px: Distance up to which pixels of two borders match, in the pixels compared.
        frame: Origin of GeoJSON and of masks of the bounds only, on slides with bounds.
        roi: GeoJSON outside of which nothing is judged.
    """

    classes: tuple[str, ...] = ()
    prediction_values: LabelMap = field(default_factory=LabelMap)
    truth_values: LabelMap = field(default_factory=LabelMap)
    renamed: Mapping[str, str] = field(default_factory=dict)
    mpp: float | None = None
    tolerance_px: int = 2
    frame: Frame = "qupath"
    roi: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """A prediction with the truth of the same slide, each a mask, a run's folder or GeoJSON.

    Attributes:
        slide: The slide itself, where it is given.
        size: (width, height) of its level 0, where the user tells it.
    """

    name: str
    prediction: Path
    truth: Path
    slide: Path | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("prediction", "truth", "slide"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(given))


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What the comparison of one slide found.

    Attributes:
        classes: Names in the order of the counts; 0 is the background.
        shape: Pixels or voxels compared along each axis.
        spacing_um: µm between them along each axis, where it is known.
        surfaces: Distances of each class but the background, from `surface_distances`, in mm where
            pixels have a size, else in pixels; None where there are too many to be taken together.
        picture: uint8 (h, w, 3) of the disagreement, small; of a volume that of the slice with
            the most of it.
    """

    pairing: Pairing
    classes: tuple[str, ...]
    confusion: Confusion
    shape: tuple[int, ...]
    spacing_um: tuple[float, ...] | None
    surfaces: dict[str, tuple[float, float]] | None
    picture: npt.NDArray[np.uint8]


def compare_all(
    pairings: Sequence[Pairing], options: CompareOptions, *, progress: Progress | None = None
) -> list[Comparison]:
    """Compare every pair of a cohort, classes matched by name; return what was found.

    Raises:
        EvaluationError: sides that cannot be compared, a class that one side does not know, or one
            without a pixel in the truth of any slide.
    """
    with ExitStack() as closing:
        opened = [_open(pairing, options, closing) for pairing in pairings]
        classes = _judged_classes(opened, options)
        found = [
            _compare_volumes(pairing, sides, classes)
            if slide is None
            else _compare(pairing, sides, slide, classes, options, progress)
            for pairing, sides, slide in opened
        ]
    for comparison in found:
        matrix = comparison.confusion.matrix
        for i, name in enumerate(classes[1:], 1):
            if (found_px := matrix[:, i].sum()) and not matrix[i].any():
                logger.warning(
                    "%s: the truth has no %s, of which %d pixels are found: it has no Dice, and "
                    "they count in the figures of all taken together",
                    comparison.pairing.name,
                    name,
                    found_px,
                )
    true = sum(c.confusion.matrix.sum(1) for c in found)
    if empty := [name for i, name in enumerate(classes) if i > 0 and true[i] == 0]:
        raise EvaluationError(
            f"the truth has no pixel of {', '.join(empty)} to judge; leave the class out with "
            "--classes, or add slides that have it"
        )
    return found


Opened = tuple[Pairing, tuple[Any, Any], SlideFrame | None]
"""A pair with its sides, on the slide or image that they are of; volumes have no such."""


def _open(pairing: Pairing, options: CompareOptions, closing: ExitStack) -> Opened:
    paths = pairing.prediction, pairing.truth
    values = options.prediction_values, options.truth_values
    volumes = [_volume_of(path) for path in paths]
    if any(volumes):
        found, true = map(_settled, paths, volumes, values, (options, options))
        return pairing, (found, true), None
    known = slide = None
    if pairing.slide:
        with open_source(pairing.slide) as source:
            known = slide = SlideFrame(size=source.size, mpp=source.mpp, bounds=source.bounds)
    sides: dict[int, Side] = {}
    # a side that tells the slide's bounds comes first: GeoJSON of the other may begin there
    for i in (1, 0) if (pairing.truth / RUN_FILE).is_file() else (0, 1):
        sides[i] = open_side(
            paths[i],
            values=values[i],
            renamed=options.renamed,
            slide=known,
            frame=options.frame,
            closing=closing,
        )
        known = known or sides[i].slide
    both = sides[0], sides[1]
    slide = settle_slide(both, slide, pairing.size)
    for side in both:
        if not isinstance(side.content, Areas):
            continue
        # areas that lie mostly outside of the slide are of another, or in µm
        x0, y0, x1, y1 = side.content.extent
        width, height = slide.size
        if x0 >= width or y0 >= height or x1 > 2 * width or y1 > 2 * height:
            raise EvaluationError(
                f"{side.path} has areas from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}), the slide is "
                f"{width} × {height} px: another slide, or not in level-0 pixels"
            )
    return pairing, both, slide


def _volume_of(path: Path) -> LabelVolume | None:
    """Return the mask of a volume that a path stands for; None where it is none."""
    if (path / RUN_FILE).is_file():
        run = finished_run(path)
        if len(run.slide["size"]) != 3:
            return None
        warn_of_rule(path)
        for output in ("nifti", "dicom"):
            if (mask := path / FILES[output]).is_file():
                return replace(open_labels(mask), values=classes_of(run))
        raise EvaluationError(f"{path} holds no mask.nii.gz; segment with --outputs nifti")
    labels = open_labels(path) if is_labels(path) else None
    return None if labels is None or labels.is_planar else labels


def _settled(
    path: Path, labels: LabelVolume | None, values: LabelMap, options: CompareOptions
) -> LabelVolume:
    """Return one side of two volumes with what its values mean."""
    if labels is None:
        raise EvaluationError(f"{path} is no mask of a volume, as the other side is")
    if options.roi or options.mpp:
        raise EvaluationError(f"--{'roi' if options.roi else 'mpp'} is for slides; {path} is none")
    return replace(labels, values=settle(labels.path, labels.values, values, options.renamed))


def _judged_classes(opened: Sequence[Opened], options: CompareOptions) -> tuple[str, ...]:
    """Return the classes to judge, the background first."""
    predicted, true = (
        dict.fromkeys(name for _, sides, _ in opened for name in sides[k].names) for k in (0, 1)
    )

    def listed(names: Mapping[str, None]) -> str:
        return ", ".join(map(repr, names)) or "none"

    for name in options.classes:
        known = {"prediction": predicted, "truth": true}
        if lacking := [who for who, names in known.items() if name not in names]:
            raise EvaluationError(
                f"no {' and no '.join(lacking)} knows the class {name!r}; "
                f"predictions have {listed(predicted)}, truths {listed(true)}"
            )
    classes = options.classes or tuple(n for n in {**true, **predicted} if n != BACKGROUND)
    if not classes or not {*classes} <= predicted.keys() & true.keys():
        raise EvaluationError(
            f"predictions have the classes {listed(predicted)}, truths {listed(true)}: "
            "rename classes with --rename OLD=NEW, or judge only those that --classes names"
        )
    return (BACKGROUND, *classes)


def _compare_volumes(
    pairing: Pairing, sides: tuple[LabelVolume, LabelVolume], classes: tuple[str, ...]
) -> Comparison:
    """Compare two volumes on the grid of the one that is whole, the truth's where both are."""
    prediction, truth = sides
    onto = prediction if truth.is_part and not prediction.is_part else truth
    indices = {name: i for i, name in enumerate(classes) if i > 0}
    found, true = (side.indices(indices, onto.codes.shape, onto.affine) for side in sides)
    differs = (found != true) & (true != IGNORE)
    middle = int(np.argmax(differs.sum((1, 2)))) if differs.any() else len(true) // 2
    picture = Disagreement(true.shape[1:])
    picture.add((0, 0), found[middle], true[middle])
    return Comparison(
        pairing=pairing,
        classes=classes,
        confusion=count_block(found, true, len(classes), tolerance_px=None),
        shape=true.shape,
        spacing_um=tuple(1000 * s for s in onto.spacing_mm),
        surfaces=_surfaces(found, true, classes, onto.spacing_mm),
        picture=picture.drawn(),
    )


def _surfaces(
    found: Mask, true: Mask, classes: Sequence[str], spacing: Sequence[float]
) -> dict[str, tuple[float, float]]:
    """Return the distances between the surfaces of each class."""
    known = (found != IGNORE) & (true != IGNORE)
    return {
        name: surface_distances((found == i) & known, (true == i) & known, spacing)
        for i, name in enumerate(classes)
        if i > 0
    }


def _compare(
    pairing: Pairing,
    sides: tuple[Side, Side],
    slide: SlideFrame,
    classes: tuple[str, ...],
    options: CompareOptions,
    progress: Progress | None,
) -> Comparison:
    indices = {name: i for i, name in enumerate(classes) if i > 0}
    readers = [reader_of(side, slide, indices, options.frame) for side in sides]
    downsample = _downsample(readers, sides[0], slide, options)
    width, height = slide.size
    shape = math.ceil(height / downsample[0] - 1e-6), math.ceil(width / downsample[1] - 1e-6)
    roi = None
    if options.roi:
        region = read_region(
            options.roi, offset=frame_offset(slide.bounds, options.frame), size=slide.size
        )
        areas = tuple(Annotation(polygon=polygon, class_name=None) for polygon in region)
        roi = AreaReader(Areas(path=options.roi, annotations=areas), {}, others=1)
    halo = options.tolerance_px + 1

    def count(block: Block) -> tuple[Block, Confusion, Mask, Mask]:
        start = tuple(max(0, a - halo) for a in block.start)
        stop = tuple(min(n, b + halo) for b, n in zip(block.stop, shape, strict=True))
        window = start, tuple(b - a for a, b in zip(start, stop, strict=True))
        found, true = (reader.read(*window, downsample) for reader in readers)
        if roi:
            true[roi.read(*window, downsample) == 0] = IGNORE
        core = box_slices([a - s for a, s in zip(block.start, start, strict=True)], block.shape)
        counted = count_block(
            found, true, len(classes), core=core, tolerance_px=options.tolerance_px
        )
        return block, counted, found[core], true[core]

    picture = Disagreement(shape)
    # so that no side is read in larger pieces
    finest = min(min(reader.downsample or downsample) for reader in readers)
    side_px = max(1, int(BLOCK * min(finest, *downsample) / max(downsample)))
    blocks = list(iter_blocks(shape, picture.whole_cells(side_px)))
    confusion = Confusion.empty(len(classes))
    whole = np.empty((2, *shape), np.uint8) if math.prod(shape) <= SURFACE_PX else None
    for done, (block, counted, found, true) in enumerate(map_in_threads(count, blocks), 1):
        confusion += counted
        picture.add(block.start, found, true)
        if whole is not None:
            whole[(slice(None), *block.slices)] = found, true
        if progress:
            progress(pairing.name, done, len(blocks))
    spacing = (slide.mpp[1] * downsample[0], slide.mpp[0] * downsample[1]) if slide.mpp else None
    surfaces = None
    if whole is not None:
        mm = [s / 1000 for s in spacing] if spacing else [1.0, 1.0]
        surfaces = _surfaces(whole[0], whole[1], classes, mm)
    return Comparison(
        pairing=pairing,
        classes=classes,
        confusion=confusion,
        shape=shape,
        spacing_um=spacing,
        surfaces=surfaces,
        picture=picture.drawn(_thumbnail(pairing)),
    )


def _downsample(
    readers: Sequence[Reader], side: Side, slide: SlideFrame, options: CompareOptions
) -> Pair:
    """Return (y, x) level-0 pixels per pixel compared."""
    if options.mpp is None:
        # the truth's pixels, else the prediction's, else level 0
        own = [reader.downsample for reader in readers if reader.downsample]
        return own[-1] if own else (1.0, 1.0)
    if slide.mpp is None:
        raise EvaluationError(
            f"--mpp {options.mpp:g}: nothing says how large a pixel of {side.path} is; "
            "give the slide with --slide"
        )
    return options.mpp / slide.mpp[1], options.mpp / slide.mpp[0]


def _thumbnail(pairing: Pairing) -> npt.NDArray[np.uint8] | None:
    """Return the whole slide, small: as a run keeps it, or of the slide; None where neither is."""
    for path in (pairing.prediction, pairing.truth):
        # what lies under a picture is worth no failure
        with suppress(StoreError):
            return open_patch_grid(RunStore(folder=path).grid_path).thumbnail
    if pairing.slide:
        with suppress(SourceError), open_source(pairing.slide) as slide:
            return slide.thumbnail(LONGEST)[0]
    return None
