"""From a finished mask to the files of a run, each whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.blocks import STAGES, Clock, Plan
from wsi_pipeline.bundle import Bundle
from wsi_pipeline.export import geojson, ome_tiff, ome_zarr, overlay
from wsi_pipeline.export.polygons import Pieces, join
from wsi_pipeline.grid import Block, PatchGrid, Region, Shape
from wsi_pipeline.options import ExportOptions, Output, Settings, as_plain
from wsi_pipeline.report import Run
from wsi_pipeline.sources import Slide
from wsi_pipeline.store import RunStore, StoredGrid

logger = logging.getLogger(__name__)


LITTLE_TISSUE = 0.005


FILES: dict[Output, str] = {
    "zarr": "mask.ome.zarr",
    "tiff": "mask.ome.tif",
    "geojson": "annotations.geojson",
    "overlay": "overlay.png",
}


def write_outputs(
    slide: Slide,
    bundle: Bundle,
    plan: Plan,
    stored: StoredGrid,
    blocks: list[Block],
    settings: Settings,
    key: str,
) -> Run:
    """Finish the mask, write what was asked for; return the run.

    An output that fails is named in the run and costs no other.
    """
    export, store = settings.export, plan.store
    ledger = {b.index: store.load_block(b, leave_out=("vertices",)) for b in blocks}
    by_index = {block.index: block for block in blocks}
    pieces = {index: Pieces.from_arrays(arrays) for index, arrays in ledger.items()}
    clock = Clock()
    mask_path = _finish_mask(store, export)
    clock.lap("pyramid")
    mask = ome_zarr.open_mask(mask_path)
    crop = slide.bounds if export.frame == "qupath" else None
    dialect = _dialect(slide, bundle, plan, settings, crop, key)
    written = geojson.Written(regions={}, vertices=0, dropped=[])
    failures: list[str] = []

    def write(output: Output, work: Callable[[Path], Any]) -> Any:
        path = store.folder / FILES[output]
        if output not in export.outputs:
            return None
        try:
            return work(path)
        except Exception as error:  # the mask is whole: whatever fails here must not cost it
            logger.debug("writing %s failed", path, exc_info=True)
            failures.append(f"{path.name} could not be written: {error}")
            return None
        finally:
            clock.lap(output)

    def write_polygons(path: Path) -> geojson.Written:
        regions = join(
            pieces,
            lambda index: store.load_block(by_index[index])["vertices"],
            min_pixels=dialect.min_pixels,
        )
        return geojson.write_geojson(path, regions, dialect)

    written = write("geojson", write_polygons) or written
    write("tiff", lambda p: _write_tiffs(p, mask, bundle, plan, slide, export, crop))
    write(
        "overlay",
        lambda p: overlay.write_overlay(
            p,
            stored.thumbnail,
            ome_zarr.read_mask(mask_path, stored.tissue.shape),
            classes=bundle.classes,
            tissue=stored.tissue,
        ),
    )
    pixels = np.zeros(len(bundle.classes), np.int64)
    for piece in pieces.values():
        np.add.at(pixels, piece.value, piece.pixels)
    fy, fx = stored.tissue_downsample
    thumbnail_mm2 = fy * slide.mpp[1] * fx * slide.mpp[0] * 1e-6
    predicted = sum(int(a["predicted"]) for a in ledger.values())
    return Run(
        status="failed" if failures else "done",
        reason="; ".join(failures),
        slide=slide_facts(slide),
        model={"name": bundle.name, "weights_sha256": bundle.weights_sha256},
        settings={
            "key": key,
            **{n: as_plain(getattr(settings, n)) for n in ("select", "predict", "export")},
            "grid": as_plain(replace(stored.info, bounds=None)),
        },
        versions=versions(),
        patches={
            "grid": _full_count(plan.grid),
            "kept": len(plan.grid),
            "predicted": predicted,
        },
        seconds=_seconds(ledger, clock),
        area_mm2={
            c.name: float(n * dialect.pixel_mm2)
            for c, n in zip(bundle.classes[1:], pixels[1:], strict=True)
        },
        colors={c.name: list(c.color or ()) for c in bundle.classes[1:]},
        tissue_mm2=float(stored.tissue.sum() * thumbnail_mm2),
        regions=written.regions,
        frame={"for": export.frame, "offset": [crop.x, crop.y] if crop else [0, 0]},
        bad_regions=[],
        warnings=_warnings(stored, written, len(plan.grid)),
    )


def _finish_mask(store: RunStore, export: ExportOptions) -> Path:
    """Add the pyramid and put the mask where users look, if they want it; return its path."""
    if store.mask_path.is_dir():
        ome_zarr.build_pyramid(store.mask_path)
        if "zarr" not in export.outputs:
            return store.mask_path
        if store.finished_mask_path.is_dir():
            shutil.rmtree(store.finished_mask_path)
        os.replace(store.mask_path, store.finished_mask_path)
    return store.finished_mask_path


def _dialect(
    slide: Slide,
    bundle: Bundle,
    plan: Plan,
    settings: Settings,
    crop: Region | None,
    key: str,
) -> geojson.Dialect:
    y, x = plan.mask_downsample
    return geojson.Dialect(
        classes=bundle.classes,
        downsample=(x, y),
        mpp=slide.mpp,
        crop=crop,
        simplify_um=settings.export.simplify_um,
        min_area_um2=settings.export.min_area_um2,
        namespace=f"{slide.fingerprint}/{bundle.weights_sha256}",
        metadata={
            "model": bundle.name,
            "weights_sha256": bundle.weights_sha256,
            "run": key,
            "software": f"wsi_pipeline {version('wsi-pipeline')}",
        },
    )


def _write_tiffs(
    path: Path,
    mask: ome_zarr.MaskArray,
    bundle: Bundle,
    plan: Plan,
    slide: Slide,
    export: ExportOptions,
    crop: Region | None,
) -> None:
    box = None
    if crop is not None:
        y, x = plan.mask_downsample
        top, left = round(crop.y / y), round(crop.x / x)
        height, width = plan.mask_shape
        box = (
            top,
            left,
            min(round(crop.height / y), height - top),
            min(round(crop.width / x), width - left),
        )
    mpp = plan.mask_mpp
    ome_tiff.write_ome_tiff(
        path, mask, classes=bundle.classes, mask_mpp=mpp, crop=box, name=slide.path.stem
    )
    if export.tiff == "asap":
        asap_path = path.with_name("mask.asap.tif")
        ome_tiff.write_asap_tiff(asap_path, mask, mask_mpp=mpp)


def slide_facts(slide: Slide) -> dict[str, Any]:
    """Return what `run.json` says of a slide."""
    return {
        "name": slide.path.name,
        "path": str(slide.path),
        "size": list(slide.size),
        "mpp": list(slide.mpp),
        "mpp_source": slide.mpp_source,
        "bounds": asdict(slide.bounds) if slide.bounds else None,
        "backend": slide.backend,
        "fingerprint": slide.fingerprint,
    }


def versions() -> dict[str, str]:
    """Return the versions of what a mask may depend on."""
    packages = (
        "wsi-pipeline",
        "torch",
        "numpy",
        "zarr",
        "openslide-python",
        "tiffslide",
        "shapely",
    )
    return {name: version(name) for name in packages}


def _full_count(grid: PatchGrid) -> int:
    overlap = tuple(p - s for p, s in zip(grid.patch_size, grid.stride, strict=True))
    return len(PatchGrid.cover(grid.shape, grid.patch_size, overlap))


def _seconds(ledger: dict[Shape, dict[str, npt.NDArray[Any]]], clock: Clock) -> dict[str, float]:
    """Return seconds per stage; those of blocks are summed over threads and interrupted runs."""
    total = {s: sum(float(a.get(f"seconds_{s}", 0)) for a in ledger.values()) for s in STAGES}
    return {name: round(value, 3) for name, value in {**total, **clock.seconds}.items()}


def _warnings(stored: StoredGrid, written: geojson.Written, patches: int) -> list[str]:
    found = list(written.dropped)
    if patches == 0:
        found.append("no tissue found; --tissue none looks everywhere")
    elif stored.tissue.mean() < LITTLE_TISSUE:
        found.append(f"only {stored.tissue.mean():.2%} of the slide was taken for tissue")
    return found
