"""What a comparison leaves: a JSON object, a table and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsi_pipeline.evaluation.compare import Comparison
from wsi_pipeline.evaluation.confusion import Confusion, bootstrap, class_figures, pooled_figures
from wsi_pipeline.evaluation.disagreement import with_legend
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import claimed, make_folder, writing
from wsi_pipeline.files.tables import as_csv

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

    `tolerance_px` is what boundary F1 was counted with.
    """
    classes = found[0].classes
    pooled = _scores(found)
    if len(found) > 1:
        by_class, together = bootstrap([comparison.confusion for comparison in found])
        for i, name in enumerate(classes[1:], 1):
            pooled["classes"][name]["interval_95"] = {
                figure: [_number(end) for end in ends[:, i]] for figure, ends in by_class.items()
            }
        pooled["together"]["interval_95"] = {
            figure: [_number(end) for end in ends] for figure, ends in together.items()
        }
    slides = []
    for comparison in found:
        # of a pixel in µm, (x, y), or of a voxel in mm, (x, y, z)
        size = [*reversed(comparison.spacing_um)] if comparison.spacing_um else None
        is_volume = size is not None and len(size) == 3
        slides.append(
            {
                "name": comparison.pairing.name,
                "prediction": str(comparison.pairing.prediction),
                "truth": str(comparison.pairing.truth),
                "size_px": [*reversed(comparison.shape)],
                **({"spacing_mm": [s / 1000 for s in size or ()]} if is_volume else {"mpp": size}),
                **_scores([comparison]),
            }
        )
    return {
        "classes": list(classes),
        "boundary_tolerance_px": tolerance_px,
        "slides": slides,
        "pooled": pooled,
    }


def _scores(found: Sequence[Comparison]) -> dict[str, Any]:
    """Return the figures of comparisons taken together; distances are means of those that are."""
    classes, unit = found[0].classes, "px" if found[0].spacing_um is None else "mm"
    counted = sum((c.confusion for c in found), start=Confusion.empty(len(classes)))
    by_class, together = class_figures(counted), pooled_figures(counted)
    judged = int(counted.matrix.sum())
    sizes = {"px": counted.matrix}
    # in mm², or of voxels in ml, where all sizes are known
    axes = {len(c.spacing_um or ()) for c in found}
    # Pixels of unknown size, areas and volumes do not add up.
    if axes in ({2}, {3}):
        name, per_um = ("mm2", 1e-6) if axes == {2} else ("ml", 1e-12)
        weighed = [c.confusion.matrix * math.prod(c.spacing_um or ()) * per_um for c in found]
        sizes[name] = np.sum(weighed, axis=0)
    rows: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(classes[1:], 1):
        row: dict[str, Any] = {figure: _number(values[i]) for figure, values in by_class.items()}
        for side, axis in (("truth", 1), ("prediction", 0)):
            row |= {f"{side}_px": int(sizes["px"].sum(axis)[i])}
            row |= {} if "ml" in sizes else {f"{side}_mm2": None}
            row |= {f"{side}_{u}": float(n.sum(axis)[i]) for u, n in sizes.items() if u != "px"}
        distances = np.array([c.surfaces[name] for c in found if c.surfaces], float).reshape(-1, 2)
        # Where a side is empty there is no distance, and none is made up for the mean.
        known = distances[~np.isnan(distances).any(1)]
        means = known.mean(0) if len(known) else (math.nan, math.nan)
        for key, value in zip(("hd95", "average_distance"), means, strict=True):
            row[f"{key}_{unit}"] = _number(value)
        rows[name] = row
    return {
        "judged_px": judged,
        "accuracy": _number(np.trace(counted.matrix) / judged if judged else math.nan),
        "classes": rows,
        "together": {figure: _number(value) for figure, value in together.items()},
        "confusion": counted.matrix.tolist(),
    }


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
    """Write `evaluation.json`, `evaluation.csv` and a picture of each slide; return nothing."""
    folder = Path(folder)
    make_folder(folder)
    # Rows hold more than the table has columns for, as intervals.
    rows = [[row.get(column) for column in COLUMNS] for row in as_rows(described)]
    texts = {
        # NaN, which Python would write, is no JSON to others.
        "evaluation.json": json.dumps(described, indent=2, allow_nan=False) + "\n",
        "evaluation.csv": as_csv([COLUMNS, *rows]),
    }
    with writing(folder):
        for name, text in texts.items():
            with claimed(folder / name), written_beside(folder / name) as partial:
                partial.write_text(text, "utf-8")
        for comparison in found:
            path = folder / f"{comparison.pairing.name}.png"
            shrunk = comparison.shape[-1] / comparison.picture.shape[1]
            um = comparison.spacing_um[-1] * shrunk if comparison.spacing_um else None
            with claimed(path), written_beside(path) as partial:
                Image.fromarray(with_legend(comparison.picture, um=um)).save(partial, "PNG")
