"""summary.csv: a row for each run; cohort.csv: how the figures of all that are done are spread."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from wsi_pipeline.files.tables import as_csv
from wsi_pipeline.report.record import Run, write_text

PERCENTILES = (5, 25, 50, 75, 95)
ABOUT_SOURCE = ("model", "weights", "spacing_x_mm", "spacing_y_mm", "spacing_z_mm", "depth_px")
"""Columns of the summary that tell nothing of what was found."""


def write_summary(output_dir: Path, runs: Mapping[Path, Run]) -> None:
    """Write `summary.csv`, a row for each run."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(r.area_mm2 for r in runs.values())))
    more = list(dict.fromkeys(itertools.chain.from_iterable(map(more_columns, runs.values()))))
    rows: list[Sequence[object]] = [
        [
            *("folder", "slide", "status", "reason", "width_px", "height_px", "mpp_x", "mpp_y"),
            *("patches", "tissue_mm2"),
            *(f"{name}_mm2" for name in names),
            "seconds",
            *more,
        ]
    ]
    for folder, run in runs.items():
        done, own = run.status == "done", more_columns(run)
        # numbers that a failed run lacks are empty
        rows.append(
            [
                os.path.relpath(folder, output_dir),
                run.slide["name"],
                run.status,
                run.reason,
                *run.slide.get("size", ("", ""))[:2],
                *run.slide.get("mpp", ("", "")),
                run.patches.get("kept", ""),
                round(run.tissue_mm2, 6) if done and run.kind == "slide" else "",
                *(round(run.area_mm2[n], 6) if n in run.area_mm2 else "" for n in names),
                run.seconds.get("total", ""),
                *(own.get(name, "") for name in more),
            ]
        )
    write_text(output_dir / "summary.csv", as_csv(rows))


def more_columns(run: Run) -> dict[str, str | float]:
    """Return what a row has behind the columns that all tables have, by its column."""
    found: dict[str, str | float] = {
        "model": run.model.get("name", ""),
        "weights": run.model.get("weights_sha256", ""),
    }
    if run.kind == "slide" and run.tissue_mm2 > 0:
        found |= {
            f"tissue_percent_{name}": round(100 * area / run.tissue_mm2, 4)
            for name, area in run.area_mm2.items()
        }
    found |= {f"regions_{name}": count for name, count in run.regions.items()}
    for name, areas in run.quality_mm2.items():
        found |= {f"{name}_{quality}_mm2": round(n, 6) for quality, n in areas.items()}
    if run.unlike_percent is not None:
        found["unlike_percent"] = round(run.unlike_percent, 2)
    if run.disagreement_percent is not None:
        found["disagreement_percent"] = round(run.disagreement_percent, 4)
    if run.unit == "mm²":
        found |= {f"largest_mm2_{name}": round(area, 6) for name, area in run.largest.items()}
    spacing = run.slide.get("spacing_mm") or ()
    found |= {f"spacing_{axis}_mm": mm for axis, mm in zip("xyz", spacing, strict=False)}
    if run.kind == "volume" and (size := run.slide.get("size")):
        found["depth_px"] = size[-1]
    if run.unit != "mm²":
        found |= {f"{name}_{run.unit}": round(n, 6) for name, n in run.amounts.items()}
    for name, lesions in run.lesions.items():
        found[f"{name}_lesions"] = lesions["count"]
        if lesions["largest_mm"] is not None:
            found[f"{name}_largest_mm"] = round(lesions["largest_mm"], 3)
    return found | {f"probability_{label}": round(p, 6) for label, p in run.labels.items()}


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
