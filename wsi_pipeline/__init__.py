"""Folders of whole-slide images in, full-resolution tissue masks and QuPath polygons out.

The names below are the public ones. Each is imported when it is first used, so that importing the
package, and the command line's --help, need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_pipeline.bundle import Bundle, load_bundle
    from wsi_pipeline.errors import (
        AnnotationError,
        BundleError,
        MissingMppError,
        RecipeError,
        SourceError,
        StoreError,
        UsageError,
        WsiPipelineError,
    )
    from wsi_pipeline.evaluation.evaluate import evaluate
    from wsi_pipeline.geometry import PatchGrid
    from wsi_pipeline.options import (
        ExportOptions,
        PredictOptions,
        ScheduleOptions,
        SelectOptions,
        Settings,
    )
    from wsi_pipeline.patch_grid import StoredGrid, open_patch_grid
    from wsi_pipeline.report.record import Run, load_run
    from wsi_pipeline.run.again import export_again
    from wsi_pipeline.run.batch import segment_jobs
    from wsi_pipeline.run.jobs import Job, find_slides, plan_jobs
    from wsi_pipeline.run.main import segment
    from wsi_pipeline.run.opened import FinishedRun, Layer, open_run, open_runs
    from wsi_pipeline.run.tile import tile
    from wsi_pipeline.schedule.cluster import open_cluster
    from wsi_pipeline.sources import Slide, SlideView, open_source
    from wsi_pipeline.training.train import train

__all__ = [
    "AnnotationError",
    "Bundle",
    "BundleError",
    "ExportOptions",
    "FinishedRun",
    "Job",
    "Layer",
    "MissingMppError",
    "PatchGrid",
    "PredictOptions",
    "RecipeError",
    "Run",
    "ScheduleOptions",
    "SelectOptions",
    "Settings",
    "Slide",
    "SlideView",
    "SourceError",
    "StoreError",
    "StoredGrid",
    "UsageError",
    "WsiPipelineError",
    "evaluate",
    "export_again",
    "find_slides",
    "load_bundle",
    "load_run",
    "open_cluster",
    "open_patch_grid",
    "open_run",
    "open_runs",
    "open_source",
    "plan_jobs",
    "segment",
    "segment_jobs",
    "tile",
    "train",
]

if not TYPE_CHECKING:  # type checkers would take any name for one of ours
    _NAMES = {
        "bundle": ("Bundle", "load_bundle"),
        "errors": (
            "AnnotationError", "BundleError", "MissingMppError", "RecipeError", "SourceError",
            "StoreError", "UsageError", "WsiPipelineError",
        ),
        "evaluation.evaluate": ("evaluate",),
        "geometry": ("PatchGrid",),
        "run.jobs": ("Job", "find_slides", "plan_jobs"),
        "options": (
            "ExportOptions", "PredictOptions", "ScheduleOptions", "SelectOptions", "Settings",
        ),
        "run.batch": ("segment_jobs",),
        "run.main": ("segment",),
        "run.opened": ("FinishedRun", "Layer", "open_run", "open_runs"),
        "run.tile": ("tile",),
        "run.again": ("export_again",),
        "report.record": ("Run", "load_run"),
        "schedule.cluster": ("open_cluster",),
        "sources": ("Slide", "SlideView", "open_source"),
        "training.train": ("train",),
        "patch_grid": ("StoredGrid", "open_patch_grid"),
    }  # fmt: skip
    _HOMES = {name: home for home, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        """Import a public name on first use; return what it stands for."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Return the public names, imported or not."""
        return sorted({*globals(), *__all__})
