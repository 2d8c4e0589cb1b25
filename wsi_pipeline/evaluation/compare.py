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
from wsi_pipeline.annotations.document import parse_document, read_bytes
from wsi_pipeline.errors import AnnotationError, EvaluationError, SourceError, StoreError
from wsi_pipeline.evaluation.annotations import AreaReader, Areas
from wsi_pipeline.evaluation.confusion import IGNORE, Mask, Tally, count_block, surface_distances
from wsi_pipeline.evaluation.disagreement import LONGEST, Disagreement
from wsi_pipeline.evaluation.inputs import (
    AREA_SUFFIXES,
    MASK_SUFFIXES,
    Canvas,
    Pair,
    Side,
    classes_of,
    finished_run,
    open_side,
    reader_of,
    settle_canvas,
)
from wsi_pipeline.evaluation.meaning import BACKGROUND, Values, settle
from wsi_pipeline.evaluation.volumes import LabelVolume, is_labels, open_labels
from wsi_pipeline.files.ngff import ome_of, zarr_attributes
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Block, iter_blocks
from wsi_pipeline.options import Frame
from wsi_pipeline.patch_grid import open_patch_grid
from wsi_pipeline.report.record import FILES, RUN_FILE
from wsi_pipeline.run.jobs import find_slides
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources import open_source
from wsi_pipeline.sources.radiology.discover import is_beside

logger = logging.getLogger(__name__)

BLOCK = 2048
"""Side of what is read and counted at once, px of the finest of both sides."""
SURFACE_PX = 1 << 24
"""Pixels up to which the distances of surfaces are measured: both masks are held for it."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """How two sides are compared.

    Attributes:
        classes: to judge; others are background. Empty = all, which both sides must have.
        prediction_values: what the values of a prediction's mask mean.
        truth_values: likewise of the truth, with values that are not judged.
        renamed: new names of classes, on either side; "" names areas without a class.
        mpp: µm per pixel to compare at; None = the truth's pixels, else the prediction's, else
            level 0.
        tolerance_px: distance up to which pixels of two borders match, in the pixels compared.
        frame: origin of GeoJSON and of masks of the bounds only, on slides with bounds.
        roi: GeoJSON outside of which nothing is judged.
    """

    classes: tuple[str, ...] = ()
    prediction_values: Values = field(default_factory=Values)
    truth_values: Values = field(default_factory=Values)
    renamed: Mapping[str, str] = field(default_factory=dict)
    mpp: float | None = None
    tolerance_px: int = 2
    frame: Frame = "qupath"
    roi: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """A prediction with the truth of the same slide.

    Attributes:
        name: of the slide.
        prediction: a mask, a run's folder or GeoJSON.
        truth: likewise.
        slide: the slide itself, where it is given.
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
        pairing: what was compared.
        classes: names in the order of the counts; 0 is the background.
        tally: the counts.
        shape: pixels or voxels compared along each axis.
        spacing_um: µm between them along each axis, where it is known.
        surfaces: of each class but the background, from `surface_distances`, in mm where pixels
            have a size, else in pixels; None where there are too many to be taken together.
        picture: uint8 (h, w, 3) of the disagreement, small; of a volume that of the slice with
            the most of it.
    """

    pairing: Pairing
    classes: tuple[str, ...]
    tally: Tally
    shape: tuple[int, ...]
    spacing_um: tuple[float, ...] | None
    surfaces: dict[str, tuple[float, float]] | None
    picture: npt.NDArray[np.uint8]


def compare_all(
    pairings: Sequence[Pairing],
    options: CompareOptions,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Comparison]:
    """Compare every pair, classes matched by name; return what was found.

    Args:
        pairings: of one cohort, judged by the same classes.
        options: how.
        progress: told the slide, blocks done and blocks in all.

    Raises:
        EvaluationError: sides that cannot be compared, a class that one side does not know, or one
            without a pixel in the truth of any slide.
    """
    with ExitStack() as closing:
        opened = [_open(pairing, options, closing) for pairing in pairings]
        classes = _judged(opened, options)
        found = [
            _compare_volumes(pairing, sides, classes, options)
            if canvas is None
            else _compare(pairing, sides, canvas, classes, options, progress)
            for pairing, sides, canvas in opened
        ]
    for comparison in found:
        confusion = comparison.tally.confusion
        for name, true_px, found_px in zip(
            classes[1:], confusion.sum(1)[1:], confusion.sum(0)[1:], strict=True
        ):
            if found_px and not true_px:
                logger.warning(
                    "%s: the truth has no %s, of which %d pixels are found: it has no Dice, and "
                    "they count in the figures of all taken together",
                    comparison.pairing.name,
                    name,
                    found_px,
                )
    true = sum(c.tally.confusion.sum(1) for c in found)
    if empty := [name for i, name in enumerate(classes) if i > 0 and true[i] == 0]:
        raise EvaluationError(
            f"the truth has no pixel of {', '.join(empty)} to judge; leave the class out with "
            "--classes, or add slides that have it"
        )
    return found


Opened = tuple[Pairing, tuple[Any, Any], Canvas | None]
"""A pair with its sides, on the slide or image that they are of; volumes have no such."""


def _open(pairing: Pairing, options: CompareOptions, closing: ExitStack) -> Opened:
    values = options.prediction_values, options.truth_values
    paths = pairing.prediction, pairing.truth
    of_volumes = [_volume_of(path) for path in paths]
    if any(of_volumes):
        found, true = (
            _settled(path, labels, given, options)
            for path, labels, given in zip(paths, of_volumes, values, strict=True)
        )
        return pairing, (found, true), None
    slide = None
    if pairing.slide:
        with open_source(pairing.slide) as source:
            slide = Canvas.of(source)

    def opened(path: Path, values: Values, canvas: Canvas | None) -> Side:
        return open_side(
            path,
            values=values,
            renamed=options.renamed,
            canvas=canvas,
            frame=options.frame,
            closing=closing,
        )

    # a side that tells the slide's bounds comes first: GeoJSON of the other may begin there
    if (pairing.truth / RUN_FILE).is_file():
        truth = opened(pairing.truth, options.truth_values, slide)
        prediction = opened(pairing.prediction, options.prediction_values, slide or truth.canvas)
    else:
        prediction = opened(pairing.prediction, options.prediction_values, slide)
        truth = opened(pairing.truth, options.truth_values, slide or prediction.canvas)
    sides = prediction, truth
    canvas = settle_canvas(sides, slide, pairing.size)
    for side in sides:
        _check_extent(side, canvas)
    return pairing, sides, canvas


def _volume_of(path: Path) -> LabelVolume | None:
    """Return the mask of a volume that a path stands for; None where it is none."""
    if (path / RUN_FILE).is_file():
        run = finished_run(path)
        if len(run.slide["size"]) != 3:
            return None
        for output in ("nifti", "dicom"):
            if (mask := path / FILES[output]).is_file():
                return replace(open_labels(mask), values=classes_of(run))
        raise EvaluationError(f"{path} holds no mask.nii.gz; segment with --outputs nifti")
    labels = open_labels(path) if is_labels(path) else None
    return None if labels is None or labels.is_planar else labels


def _settled(
    path: Path, labels: LabelVolume | None, values: Values, options: CompareOptions
) -> LabelVolume:
    """Return one side of two volumes with what its values mean."""
    if labels is None:
        raise EvaluationError(f"{path} is no mask of a volume, as the other side is")
    if options.roi or options.mpp:
        raise EvaluationError(f"--{'roi' if options.roi else 'mpp'} is for slides; {path} is none")
    return replace(labels, values=settle(labels.path, labels.values, values, options.renamed))


def _compare_volumes(
    pairing: Pairing,
    sides: tuple[LabelVolume, LabelVolume],
    classes: tuple[str, ...],
    options: CompareOptions,
) -> Comparison:
    """Compare two volumes on the grid of the one that is whole, the truth's where both are."""
    prediction, truth = sides
    onto = prediction if truth.is_part and not prediction.is_part else truth
    indices = {name: i for i, name in enumerate(classes) if i > 0}
    found, true = (side.indices(indices, onto.codes.shape, onto.affine) for side in sides)
    tally = count_block(found, true, len(classes), tolerance_px=-1)
    differs = (found != true) & (true != IGNORE)
    middle = int(np.argmax(differs.sum((1, 2)))) if differs.any() else len(true) // 2
    picture = Disagreement((true.shape[1], true.shape[2]))
    (whole,) = iter_blocks(true.shape[1:], true.shape[1:])
    picture.add(whole, found[middle], true[middle])
    return Comparison(
        pairing=pairing,
        classes=classes,
        tally=tally,
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


def _check_extent(side: Side, canvas: Canvas) -> None:
    """Refuse areas that lie mostly outside of the slide: they are of another, or in µm."""
    if not isinstance(side.content, Areas):
        return
    x0, y0, x1, y1 = side.content.extent
    width, height = canvas.size
    if x0 >= width or y0 >= height or x1 > 2 * width or y1 > 2 * height:
        raise EvaluationError(
            f"{side.path} has areas from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}), the slide is "
            f"{width} × {height} px: another slide, or not in level-0 pixels"
        )


def _judged(opened: Sequence[Opened], options: CompareOptions) -> tuple[str, ...]:
    """Return the classes to judge, the background first."""
    known: list[dict[str, None]] = [{}, {}]
    for _, sides, _ in opened:
        for names, side in zip(known, sides, strict=True):
            names.update(dict.fromkeys(side.names))
    predicted, true = known
    for name in options.classes:
        lacking = [
            w for w, names in (("prediction", predicted), ("truth", true)) if name not in names
        ]
        if lacking:
            raise EvaluationError(
                f"no {' and no '.join(lacking)} knows the class {name!r}; "
                f"predictions have {_listed(predicted)}, truths {_listed(true)}"
            )
    classes = options.classes or tuple(n for n in {**true, **predicted} if n != BACKGROUND)
    odd = [n for n in classes if n not in predicted or n not in true]
    if odd or not classes:
        raise EvaluationError(
            f"predictions have the classes {_listed(predicted)}, truths {_listed(true)}: "
            "rename classes with --rename OLD=NEW, or judge only those that --classes names"
        )
    return (BACKGROUND, *classes)


def _listed(names: Mapping[str, None]) -> str:
    return ", ".join(repr(n) for n in names) or "none"


def _compare(
    pairing: Pairing,
    sides: tuple[Side, Side],
    canvas: Canvas,
    classes: tuple[str, ...],
    options: CompareOptions,
    progress: Callable[[str, int, int], None] | None,
) -> Comparison:
    indices = {name: i for i, name in enumerate(classes) if i > 0}
    prediction, truth = (reader_of(side, canvas, indices, options.frame) for side in sides)
    downsample = _downsample(sides, canvas, options)
    width, height = canvas.size
    shape = math.ceil(height / downsample[0] - 1e-6), math.ceil(width / downsample[1] - 1e-6)
    roi = _roi(options, canvas)
    picture = Disagreement(shape)
    halo = options.tolerance_px + 1

    def count(block: Block) -> tuple[Block, Tally, Mask, Mask]:
        start = tuple(max(0, a - halo) for a in block.start)
        stop = tuple(min(n, b + halo) for b, n in zip(block.stop, shape, strict=True))
        window = (start[0], start[1]), (stop[0] - start[0], stop[1] - start[1])
        found, true = (side.read(*window, downsample) for side in (prediction, truth))
        if roi:
            true[roi.read(*window, downsample) == 0] = IGNORE
        y, x = (slice(a - s, b - s) for a, b, s in zip(block.start, block.stop, start, strict=True))
        tally = count_block(
            found, true, len(classes), core=(y, x), tolerance_px=options.tolerance_px
        )
        return block, tally, found[y, x], true[y, x]

    blocks = list(
        iter_blocks(shape, picture.whole_cells(_block_side(sides, canvas, downsample, options)))
    )
    tally = Tally.empty(len(classes))
    whole = np.empty((2, *shape), np.uint8) if math.prod(shape) <= SURFACE_PX else None
    for done, (block, counted, found, true) in enumerate(map_in_threads(count, blocks), 1):
        tally += counted
        picture.add(block, found, true)
        if whole is not None:
            whole[(slice(None), *block.slices)] = found, true
        if progress:
            progress(pairing.name, done, len(blocks))
    fy, fx = downsample
    spacing = (canvas.mpp[1] * fy, canvas.mpp[0] * fx) if canvas.mpp else None
    surfaces = None
    if whole is not None:
        mm = [s / 1000 for s in spacing] if spacing else [1.0, 1.0]
        surfaces = _surfaces(whole[0], whole[1], classes, mm)
    return Comparison(
        pairing=pairing,
        classes=classes,
        tally=tally,
        shape=shape,
        spacing_um=spacing,
        surfaces=surfaces,
        picture=picture.drawn(_thumbnail(pairing)),
    )


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


def _downsample(sides: tuple[Side, Side], canvas: Canvas, options: CompareOptions) -> Pair:
    """Return (y, x) level-0 pixels per pixel compared."""
    if options.mpp is not None:
        if canvas.mpp is None:
            raise EvaluationError(
                f"--mpp {options.mpp:g}: nothing says how large a pixel of {sides[0].path} is; "
                "give the slide with --slide"
            )
        return options.mpp / canvas.mpp[1], options.mpp / canvas.mpp[0]
    own = [side.downsample(canvas, options.frame) for side in reversed(sides)]
    return next(filter(None, own), (1.0, 1.0))


def _block_side(
    sides: tuple[Side, Side], canvas: Canvas, downsample: Pair, options: CompareOptions
) -> int:
    """Return how many pixels are compared at once, so that no side is read in larger pieces."""
    own = [side.downsample(canvas, options.frame) or downsample for side in sides]
    return max(1, int(BLOCK * min(map(min, [*own, downsample])) / max(downsample)))


def _roi(options: CompareOptions, canvas: Canvas) -> AreaReader | None:
    if options.roi is None:
        return None
    region = read_region(options.roi, offset=canvas.offset(options.frame), size=canvas.size)
    areas = tuple(Annotation(polygon=polygon, class_name=None) for polygon in region)
    return AreaReader(Areas(path=options.roi, annotations=areas), {}, others=1)


def pair_up(
    prediction: str | Path,
    truth: str | Path,
    *,
    slide: str | Path | None,
    size: tuple[int, int] | None,
) -> list[Pairing]:
    """Match predictions with truths; return the pairs, one where both are single.

    In folders, what has the same name up to its first suffix belongs together.

    Args:
        prediction: a mask, run or GeoJSON, or a folder of such.
        truth: likewise.
        slide: the slide, or a folder of slides.
        size: (width, height) of level 0, of all.

    Raises:
        EvaluationError: a truth without a prediction or slide, or names that are not clear.
    """
    prediction, truth = Path(prediction), Path(truth)
    slides = _slides(Path(slide)) if slide else {}
    if _is_single(prediction) and _is_single(truth):
        name = _stem(prediction)
        if len(slides) > 1 and name not in slides:
            raise EvaluationError(f"no slide {name} in {slide}; name one of {', '.join(slides)}")
        own = slides.get(name, next(iter(slides.values()), None))
        return [Pairing(name=name, prediction=prediction, truth=truth, slide=own, size=size)]
    if _is_single(prediction) or _is_single(truth):
        raise EvaluationError(
            f"{prediction} and {truth}: give two files (or runs), or two folders of such"
        )
    predictions, truths = _members(prediction), _members(truth)
    if lacking := sorted(truths.keys() - predictions.keys()):
        raise EvaluationError(
            f"no prediction in {prediction} for {', '.join(lacking)} of {truth}; there are "
            f"{', '.join(predictions) or 'none'}"
        )
    if not truths:
        raise EvaluationError(f"no masks, runs or GeoJSON files in {truth}")
    if more := sorted(predictions.keys() - truths.keys()):
        logger.warning("no truth in %s for %s: not judged", truth, ", ".join(more))
    if slide and (lacking := sorted(truths.keys() - slides.keys())):
        raise EvaluationError(f"no slide in {slide} for {', '.join(lacking)} of {truth}")
    return [
        Pairing(
            name=name,
            prediction=predictions[name],
            truth=path,
            slide=slides.get(name),
            size=size,
        )
        for name, path in truths.items()
    ]


def _is_single(path: Path) -> bool:
    return not path.is_dir() or _is_mask_folder(path)


def _is_mask_folder(path: Path) -> bool:
    if (path / RUN_FILE).is_file() or path.name.lower().endswith(".zarr"):
        return True
    # viewers leave metadata of an empty zarr group in folders above a mask
    attributes = zarr_attributes(path) or {}
    ome = ome_of(attributes)
    return isinstance(ome, dict) and "multiscales" in ome


def _slides(path: Path) -> dict[str, Path]:
    """Return a slide, or those of a folder, by name without suffix."""
    found = {_stem(slide): slide for slide in find_slides(path, output=path / "none", linked=True)}
    if not found:
        raise EvaluationError(f"no slides in {path}")
    return found


def _members(folder: Path) -> dict[str, Path]:
    """Return what a folder holds, masks, runs and GeoJSON, by name without suffixes.

    Of one that holds runs nothing but those: what else lies in the output of `segment` is no mask.
    """
    runs = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{RUN_FILE}"))}
    if runs:
        return runs
    found: dict[str, Path] = {}
    left_out = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not (_is_mask_folder(path) if path.is_dir() else _is_mask(path)):
            left_out.append(path.name)
            continue
        name = _stem(path)
        if name in found:
            raise EvaluationError(f"{found[name]} and {path} have the same name; keep one of them")
        found[name] = path
    if left_out:
        some = ", ".join(left_out[:3]) + ", …" * (len(left_out) > 3)
        logger.warning("%s: no masks, left out: %d (%s)", folder, len(left_out), some)
    return found


def _is_mask(path: Path) -> bool:
    """Return whether a file is by its name and first bytes a mask, or areas."""
    name = path.name.lower()
    if name.endswith((".json", ".json.gz")):
        # much else is JSON, too
        with suppress(AnnotationError):
            document = parse_document(read_bytes(path))
            return bool(document.features or not document.losses)
        return False
    if name.endswith((*AREA_SUFFIXES, *MASK_SUFFIXES)):
        return True
    return not is_beside(path) and is_labels(path)


def _stem(path: Path) -> str:
    """Return a name without the suffixes of files; a run's folder has none.

    Example:
        >>> _stem(Path("a.b/TCGA-1.2.ome.tif"))
        'TCGA-1.2'
    """
    name = path.name or path.resolve().name
    if (path / RUN_FILE).is_file():
        return name
    lower = name.lower()
    for suffix in (*AREA_SUFFIXES, ".nii.gz", ".ome.tiff", ".ome.tif", ".ome.zarr", ".zarr"):
        if lower.endswith(suffix):
            return name[: -len(suffix)]
    return Path(name).stem
