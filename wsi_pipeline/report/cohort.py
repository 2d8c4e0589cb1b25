"""cohort.csv: how the figures of all finished runs are spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from wsi_pipeline.files.tables import as_csv
from wsi_pipeline.report.record import Run, write_text
from wsi_pipeline.report.summary import more_columns

PERCENTILES = (5, 25, 50, 75, 95)
ABOUT_SOURCE = ("model", "weights", "spacing_x_mm", "spacing_y_mm", "spacing_z_mm", "depth_px")
"""Columns of the summary that tell nothing of what was found."""


def write_cohort(output_dir: Path, runs: Iterable[Run]) -> None:
    """Write `cohort.csv`, a row for each figure of each model, over the runs that are done."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.status != "done":
            continue
        more = {k: float(v) for k, v in more_columns(run).items() if k not in ABOUT_SOURCE}
        tissue = {"tissue_mm2": run.tissue_mm2} if run.kind == "slide" else {}
        areas = {f"{name}_mm2": area for name, area in run.area_mm2.items()}
        for figure, value in (tissue | areas | more).items():
            found.setdefault((run.model.get("name", ""), figure), []).append(value)
    rows: list[Sequence[object]] = [
        ("model", "figure", "runs", "sum", "mean", "min", *(f"p{p}" for p in PERCENTILES), "max")
    ]
    for (model, figure), values in found.items():
        spread = [sum(values), np.mean(values), min(values)]
        spread += [*np.percentile(values, PERCENTILES), max(values)]
        rows.append((model, figure, len(values), *(round(float(n), 6) for n in spread)))
    write_text(output_dir / "cohort.csv", as_csv(rows))
