"""What a comparison leaves: a JSON object, a table and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsi_pipeline.evaluation.compare import Comparison
from wsi_pipeline.evaluation.confusion import (
    Tally,
    bootstrap,
    class_figures,
    pooled_figures,
    total,
)
from wsi_pipeline.evaluation.disagreement import with_legend
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import claimed, make_folder, writing

FIGURES = ("dice", "iou", "precision", "recall", "boundary_f1")
SURFACES = ("hd95_mm", "average_distance_mm", "hd95_px", "average_distance_px")
"""Distances of surfaces, in mm where pixels have a size."""
COLUMNS = (
    *("slide", "class", *FIGURES),
    *("truth_px", "prediction_px", "truth_mm2", "prediction_mm2", "truth_ml", "prediction_ml"),
    *SURFACES,
)
ALL_SLIDES, ALL_CLASSES = "all slides", "all classes"


def describe(found: Sequence[Comparison], *, tolerance_px: int) -> dict[str, Any]:
    """Return all figures of a cohort as JSON holds them; null stands for what has no meaning.

    Args:
        found: of each slide.
        tolerance_px: that boundary F1 was counted with.
    """
    classes = found[0].classes
    tallies = [comparison.tally for comparison in found]
    pooled = _scores(total(tallies, len(classes)), classes, areas=_areas(found))
    pooled = _with_surfaces(pooled, found)
    if len(found) > 1:
        by_class, together = bootstrap(tallies)
        for i, name in enumerate(classes):
            if i > 0:
                pooled["classes"][name]["interval_95"] = _ends(by_class, i)
        pooled["together"]["interval_95"] = _ends(together, None)
    return {
        "classes": list(classes),
        "boundary_tolerance_px": tolerance_px,
        "slides": [
            {
                "name": comparison.pairing.name,
                "prediction": str(comparison.pairing.prediction),
                "truth": str(comparison.pairing.truth),
                "size_px": list(reversed(comparison.shape)),
                **_resolution(comparison),
                **_with_surfaces(
                    _scores(comparison.tally, classes, areas=_areas([comparison])), [comparison]
                ),
            }
            for comparison in found
        ],
        "pooled": pooled,
    }


def _ends(intervals: Mapping[str, Any], index: int | None) -> dict[str, list[float | None]]:
    return {
        name: [_number(end if index is None else end[index]) for end in ends]
        for name, ends in intervals.items()
    }


def _resolution(comparison: Comparison) -> dict[str, Any]:
    """Return the size of a pixel in µm, (x, y), or of a voxel in mm, (x, y, z)."""
    size = [*reversed(comparison.spacing_um)] if comparison.spacing_um else None
    if size and len(size) == 3:
        return {"spacing_mm": [s / 1000 for s in size]}
    return {"mpp": size}


Areas = dict[str, npt.NDArray[np.float64]]
"""Confusion weighed by the size of pixels, by its unit."""


def _areas(found: Sequence[Comparison]) -> Areas:
    """Return counts of pixels in mm², or of voxels in ml, where all sizes are known."""
    axes = {len(comparison.spacing_um or ()) for comparison in found}
    if axes not in ({2}, {3}):
        return {}
    name, per_um = ("mm2", 1e-6) if axes == {2} else ("ml", 1e-12)
    weighed = [c.tally.confusion * math.prod(c.spacing_um or ()) * per_um for c in found]
    return {name: np.sum(weighed, axis=0)}


def _with_surfaces(scores: dict[str, Any], found: Sequence[Comparison]) -> dict[str, Any]:
    """Add, to the figures of each class, the distances of its surfaces; return them.

    Of several comparisons they are means of those that have a value.
    """
    unit = "px" if found[0].spacing_um is None else "mm"
    for name, row in scores["classes"].items():
        values = np.array([c.surfaces[name] for c in found if c.surfaces], float).reshape(-1, 2)
        known = values[~np.isnan(values).any(1)]
        ends = known.mean(0).tolist() if len(known) else (math.nan, math.nan)
        for key, value in zip(("hd95", "average_distance"), ends, strict=True):
            row[f"{key}_{unit}"] = _number(value)
    return scores


def _scores(tally: Tally, classes: Sequence[str], *, areas: Areas) -> dict[str, Any]:
    by_class = class_figures(tally.confusion, tally.borders)
    together = pooled_figures(tally.confusion, tally.borders)
    judged = int(tally.confusion.sum())
    rows = {}
    for i, name in enumerate(classes):
        if i > 0:
            rows[name] = {k: _number(v[i]) for k, v in by_class.items()} | _sizes(tally, areas, i)
    return {
        "judged_px": judged,
        "accuracy": _number(np.trace(tally.confusion) / judged if judged else math.nan),
        "classes": rows,
        "together": {k: _number(v) for k, v in together.items()},
        "confusion": tally.confusion.tolist(),
    }


def _sizes(tally: Tally, areas: Areas, index: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for side, axis in (("truth", 1), ("prediction", 0)):
        sizes[f"{side}_px"] = int(tally.confusion.sum(axis)[index])
        if "ml" not in areas:
            sizes[f"{side}_mm2"] = None
        sizes |= {f"{side}_{unit}": float(n.sum(axis)[index]) for unit, n in areas.items()}
    return sizes


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


def as_rows(described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each slide and class, then for all slides together, by `COLUMNS`."""
    parts = [(slide["name"], slide) for slide in described["slides"]]
    if len(parts) > 1:
        parts.append((ALL_SLIDES, described["pooled"]))
    return [
        {"slide": name, "class": label, **row}
        for name, part in parts
        for label, row in [*part["classes"].items(), (ALL_CLASSES, part["together"])]
        if label != ALL_CLASSES or len(part["classes"]) > 1
    ]


def write_evaluation(
    folder: str | Path, found: Sequence[Comparison], described: Mapping[str, Any]
) -> None:
    """Write `evaluation.json`, `evaluation.csv` and a picture of each slide; return nothing.

    Args:
        folder: created where it is missing.
        found: of each slide.
        described: from `describe`.
    """
    folder = Path(folder)
    make_folder(folder)
    buffer = io.StringIO(newline="")
    table = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", restval="")
    table.writeheader()
    table.writerows(as_rows(described))
    texts = {
        "evaluation.json": json.dumps(described, indent=2, allow_nan=False) + "\n",
        "evaluation.csv": buffer.getvalue(),
    }
    with writing(folder):
        for name, text in texts.items():
            with claimed(folder / name), written_beside(folder / name) as partial:
                partial.write_text(text, "utf-8")
        for comparison in found:
            path = folder / f"{comparison.pairing.name}.png"
            with claimed(path), written_beside(path) as partial:
                Image.fromarray(_picture(comparison)).save(partial, "PNG")


def _picture(comparison: Comparison) -> npt.NDArray[np.uint8]:
    shrunk = comparison.shape[-1] / comparison.picture.shape[1]
    um = comparison.spacing_um[-1] * shrunk if comparison.spacing_um else None
    return with_legend(comparison.picture, um=um)
