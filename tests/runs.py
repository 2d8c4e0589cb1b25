"""Runs as tests find or write them, made up."""

from __future__ import annotations

from typing import Any

from wsi_pipeline import Bundle, Job, Settings
from wsi_pipeline.report.record import Run
from wsi_pipeline.run.batch import BatchRunner

HOSTILE = "<script>alert('1')</script>&\"{x}.svs"


def done(name: str = "a.svs", **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "kind": "slide",
        "status": "done",
        "slide": {
            "name": name,
            "path": f"/data/{name}",
            "size": [1931, 1487],
            "mpp": (0.25, 0.2512),
            "bounds": None,
        },
        "model": {"name": "m", "weights_sha256": "0f"},
        "settings": {"predict": {"overlap": 128}, "export": {"outputs": ["zarr", "tiff"]}},
        "versions": {"wsi-pipeline": "0.1.0"},
        "patches": {"grid": 48, "kept": 37, "predicted": 37},
        "seconds": {"predict": 3.5, "total": 75.25},
        "area_mm2": {"Tumor": 0.25, "Stroma": 1.5},
        "colors": {"Tumor": [200, 0, 0]},
        "tissue_mm2": 2.0,
        "regions": {"Tumor": 1234, "Stroma": 2},
        "frame": {"for": "qupath", "offset": [0, 0]},
    }
    return Run(**fields | changes)


def failed(name: str = "bad.svs", reason: str = "cut off in the middle of a tile") -> Run:
    slide = {"name": name, "path": f"/data/{name}"}
    return Run(
        kind="slide",
        status="failed",
        reason=reason,
        slide=slide,
        model={},
        settings={},
        versions={},
    )


def segment_job(
    job: Job,
    bundle: Bundle,
    *,
    client: Any,
    settings: Settings | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Any = None,
) -> Run:
    """Segment one source as one of many is, with its error raised; return the run."""
    runner = BatchRunner(client, [bundle], settings or Settings(), threads, overwrite, None)
    told = progress and (lambda job, done, total: progress(done, total))
    (end,) = runner.segment([job], told)
    if isinstance(end, Exception):
        raise end
    return end
