"""Which prediction belongs to which truth, and to which slide: by their names."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from wsi_pipeline.annotations.document import parse_document, read_bytes
from wsi_pipeline.errors import AnnotationError, EvaluationError
from wsi_pipeline.evaluation.compare import Pairing
from wsi_pipeline.evaluation.inputs import AREA_SUFFIXES, MASK_SUFFIXES
from wsi_pipeline.evaluation.volumes import is_labels
from wsi_pipeline.files.ngff import ome_of, zarr_attributes
from wsi_pipeline.report.record import RUN_FILE
from wsi_pipeline.run.jobs import find_slides
from wsi_pipeline.sources.radiology.discover import is_beside

logger = logging.getLogger(__name__)


def pair_up(
    prediction: str | Path,
    truth: str | Path,
    *,
    slide: str | Path | None,
    size: tuple[int, int] | None,
) -> list[Pairing]:
    """Match predictions with truths; return the pairs, one where both are single.

    In folders, of masks, runs and GeoJSON or of slides, what has the same name up to its first
    suffix belongs together.

    Args:
        size: (width, height) of level 0, of all.

    Raises:
        EvaluationError: a truth without a prediction or slide, or names that are not clear.
    """
    prediction, truth = Path(prediction), Path(truth)
    slides: dict[str, Path] = {}
    if slide:
        # No folder of runs is to be left out of the search.
        output = Path(slide) / "none"
        slides = {
            _stem(path): path for path in find_slides(Path(slide), output=output, linked=True)
        }
        if not slides:
            raise EvaluationError(f"no slides in {slide}")
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
        Pairing(name=n, prediction=predictions[n], truth=path, slide=slides.get(n), size=size)
        for n, path in truths.items()
    ]


def _is_single(path: Path) -> bool:
    return not path.is_dir() or _is_mask(path)


def _is_mask(path: Path) -> bool:
    """Return whether a file or folder is by its name and first bytes a mask, areas or a run."""
    name = path.name.lower()
    if path.is_dir():
        if (path / RUN_FILE).is_file() or name.endswith(".zarr"):
            return True
        # viewers leave metadata of an empty zarr group in folders above a mask
        ome = ome_of(zarr_attributes(path) or {})
        return isinstance(ome, dict) and "multiscales" in ome
    if name.endswith((".json", ".json.gz")):
        # much else is JSON, too
        with suppress(AnnotationError):
            document = parse_document(read_bytes(path))
            return bool(document.features or not document.losses)
        return False
    if name.endswith((*AREA_SUFFIXES, *MASK_SUFFIXES)):
        return True
    return not is_beside(path) and is_labels(path)


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
        if not _is_mask(path):
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
