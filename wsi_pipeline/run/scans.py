"""Planar images and volumes: what their runs depend on, how they are cut, what is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pictures

from wsi_pipeline.bundle import AXES, Bundle, ClassInfo
from wsi_pipeline.errors import SourceError, StoreError
from wsi_pipeline.export import MaskLike, geojson, overlay
from wsi_pipeline.export.dicom_seg import write_dicom_seg
from wsi_pipeline.export.lesions import Lesions, count_lesions
from wsi_pipeline.export.nifti import write_nifti
from wsi_pipeline.export.planes import write_planes_overlay
from wsi_pipeline.export.png import write_mask_png
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.files.paths import name_of, without_secrets
from wsi_pipeline.geometry import Block, PatchGrid, Shape
from wsi_pipeline.options import OUTPUTS, Output, Settings, as_plain
from wsi_pipeline.report.record import Run
from wsi_pipeline.run.outputs import (
    NOTHING,
    Ledger,
    made_by,
    model_facts,
    seconds_of,
    stamp_of,
    versions,
    warnings_of,
    write_each,
    write_polygons,
)
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.run.worker import ScanPlan, check_fingerprint
from wsi_pipeline.run.written import WrittenFiles
from wsi_pipeline.sources.radiology.preprocess import Scan, open_scan, prepare
from wsi_pipeline.sources.radiology.volume import Volume

BLOCK_SIDE = {2: 2048, 3: 256}
"""Of a block in grid pixels, by the number of axes, where nothing else is asked for."""
CHUNK = {2: 1024, 3: 64}
"""Side of a chunk of the mask while it grows; blocks are made of whole ones."""
PICTURE_SIDE, SMALLEST_SIDE = 1600, 600
"""Longest side of an overlay, px, and what a smaller image is enlarged to, whole times."""


def open_one(path: Path, bundle: Bundle, settings: Settings) -> Scan:
    """Open an image or volume for a bundle; return it.

    Raises:
        SourceError: it is something else, or cannot be read.
    """
    return open_scan(
        path,
        axes=AXES[bundle.modality],
        frame=settings.select.series,
        time_points=_time_points(bundle, settings),
    )


def _time_points(bundle: Bundle, settings: Settings) -> tuple[int, ...] | None:
    """Return which volumes of one place a bundle sees, or the user has chosen; None = the only."""
    chosen = settings.select.time_point
    return bundle.input.time_points or (None if chosen is None else (chosen,))


def scan_identity(scan: Scan, bundle: Bundle, settings: Settings) -> dict[str, Any]:
    """Return everything that the mask depends on."""
    left_out = ("device", "batch_size")
    return {
        "scan": scan.fingerprint,
        "spacing_mm": scan.spacing_mm,
        "frame": settings.select.series,
        "time_point": settings.select.time_point,
        "model": bundle.digest,
        "predict": {k: v for k, v in asdict(settings.predict).items() if k not in left_out},
        "version": version("wsi-pipeline"),
    }


def fitting_outputs(scan: Scan, settings: Settings) -> Settings:
    """Return the settings without the DICOM segmentation where it could not refer to its input.

    Raises:
        SourceError: it was asked for by name.
    """
    outputs = settings.export.outputs
    if "dicom" not in outputs or scan.can_be_referred_to:
        return settings
    if outputs not in OUTPUTS.values():
        what = "has no identifiers of its own" if scan.backend == "pydicom" else "is no DICOM"
        raise SourceError(
            f"{scan.path} {what}, which a DICOM segmentation must refer to; leave dicom out of "
            "--outputs"
        )
    wanted = tuple(output for output in outputs if output != "dicom")
    return replace(settings, export=replace(settings.export, outputs=wanted))


def plan_scan(
    scan: Scan, bundle: Bundle, store: RunStore, settings: Settings, threads: int
) -> ScanPlan:
    """Lay patches over an image or volume; return the plan for the workers.

    Raises:
        SourceError: it cannot be read, or does not fit the model.
        StoreError: a block size or overlap that cannot be.
    """
    spec, axes = bundle.input, len(scan.shape)
    prepared = prepare(scan, spec)
    overlap = settings.predict.overlap
    try:
        grid = PatchGrid.cover(
            prepared.shape, spec.patch_size, spec.overlap if overlap is None else (overlap,) * axes
        )
    except ValueError as error:
        raise StoreError(str(error)) from error
    return ScanPlan(
        path=scan.path.absolute(),
        fingerprint=scan.fingerprint,
        bundle_path=bundle.path.absolute(),
        model=bundle.digest,
        store=store,
        grid=grid,
        mask_shape=scan.shape,
        block_shape=_block_shape(axes, prepared.step, settings),
        predict=settings.predict,
        threads=threads,
        outlines="geojson" in settings.export.outputs,
        prepared=prepared,
        frame=settings.select.series,
        time_points=_time_points(bundle, settings),
    )


def _block_shape(axes: int, step: tuple[float, ...], settings: Settings) -> Shape:
    """Return whole chunks of the mask: fewer along an axis whose pixels are coarser."""
    unit, size = CHUNK[axes], settings.predict.block_size
    check_block_size(axes, size)
    if axes == 2:  # tracing wants squares
        return (size or BLOCK_SIDE[axes],) * axes
    sides = ((size or BLOCK_SIDE[axes]) * min(s, 1.0) for s in step)
    return tuple(max(unit, round(side / unit) * unit) for side in sides)


def check_block_size(axes: int, size: int | None) -> None:
    """Refuse blocks that are not whole chunks of the mask.

    Args:
        axes: of an image, 2, or a volume, 3.
        size: side of a block in px; None = the usual.

    Raises:
        StoreError: not a multiple.
    """
    if size and size % CHUNK[axes]:
        raise StoreError(
            f"--block-size {size} is not a multiple of {CHUNK[axes]}, the mask's chunk"
        )


def make_mask(plan: ScanPlan) -> None:
    """Create the mask unless an interrupted run has begun one; forget blocks that are damaged."""
    store = plan.store
    try:
        mask = store.open_mask()
    except Exception:  # not there, or damaged in any way
        store.forget_blocks()
        store.create_mask(plan.mask_shape, chunk=CHUNK[len(plan.mask_shape)])
    else:
        store.forget_blocks(store.damaged(plan.blocks(), mask))


def count_chunks(shape: Shape) -> int:
    """Return the largest number of files that a growing mask of this shape can have.

    Example:
        >>> count_chunks((512, 1024, 1024)), count_chunks((3000, 2000))
        (2050, 8)
    """
    return math.prod(-(-n // CHUNK[len(shape)]) for n in shape) + 2  # of metadata


@dataclass(frozen=True, kw_only=True)
class FinishedScan:
    """A run whose blocks are all done, and what its files are written from.

    Attributes:
        scan: closed again.
        bundle: the model.
        plan: of the blocks.
        settings: options.
        key: of the run.
        blocks: all.
    """

    scan: Scan
    bundle: Bundle
    plan: ScanPlan
    settings: Settings
    key: str
    blocks: list[Block]


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """A whole mask of an image or volume, and what its files tell of it.

    Attributes:
        facts: what `run.json` says of the image or volume.
        model: what it says of the model.
        key: of the run.
        classes: of the mask.
        mask: (y, x) or (z, y, x) class indices.
        blocks: all in which the mask was made.
        side: of a block of an image, px.
        ledger: what is known of them, as far as it is true of this mask.
    """

    facts: Mapping[str, Any]
    model: Mapping[str, Any]
    key: str
    classes: tuple[ClassInfo, ...]
    mask: MaskLike
    blocks: list[Block]
    side: int
    ledger: Ledger

    @cached_property
    def lesions(self) -> list[Lesions]:
        """Return the lesions of each class but the background."""
        return count_lesions(self.mask, self.classes, self._spacing_mm)

    @property
    def _spacing_mm(self) -> tuple[float, ...] | None:
        """Return mm between pixels in the order of the mask's axes."""
        spacing = self.facts["spacing_mm"]
        return tuple(reversed(spacing)) if spacing else None

    def amounts(self) -> dict[str, Any]:
        """Return what `run.json` says of how much there is, in the unit that is known."""
        name = "area_px"
        if self._spacing_mm is not None:
            name = "volume_ml" if len(self.mask.shape) == 3 else "area_mm2"
        return {
            name: {f.name: f.pixels if f.size is None else f.size for f in self.lesions},
            "lesions": {f.name: _lesions(f, len(self.mask.shape)) for f in self.lesions},
        }

    def write(
        self,
        wanted: Collection[Output],
        scan: Scan | None,
        folder: Path,
        files: WrittenFiles,
        clock: Clock,
    ) -> tuple[list[str], geojson.Written]:
        """Write files; return a sentence for each that failed, and what polygons were written.

        Args:
            wanted: which.
            scan: opened; masks of images and polygons do without.
            folder: of the run.
            files: of the folder.
            clock: gets a lap for each.
        """
        model, written = self.model, [NOTHING]
        writers: dict[Output, Callable[[Path], object]] = {
            "png": lambda path: write_mask_png(path, self.mask, classes=self.classes),
            "geojson": lambda path: written.append(self._write_polygons(path)),
        }
        if scan is not None:
            writers["dicom"] = lambda path: write_dicom_seg(
                path,
                self.mask,
                scan=scan,
                classes=self.classes,
                model=model["name"],
                version=model["weights_sha256"][:16],
            )
            writers["overlay"] = lambda path: self._write_overlay(path, scan)
        if isinstance(scan, Volume):
            writers["nifti"] = lambda path: write_nifti(path, self.mask, scan)
        return write_each(writers, wanted, folder, files, clock), written[-1]

    def _write_polygons(self, path: Path) -> geojson.Written:
        """Write regions exactly, in pixels."""
        spacing = self._spacing_mm
        dialect = geojson.Dialect(
            classes=self.classes,
            downsample=(1.0, 1.0),
            mpp=(spacing[1] * 1000, spacing[0] * 1000) if spacing else (1000.0, 1000.0),
            crop=None,
            simplify_um=0,
            min_area_um2=0,
            namespace=f"{self.facts['fingerprint']}/{self.model['weights_sha256']}",
            metadata=made_by(self.model, self.key),
            unit="mm^2" if spacing else "px^2",
        )
        return write_polygons(
            path, self.mask, dialect, blocks=self.blocks, side=self.side, ledger=self.ledger
        )

    def _write_overlay(self, path: Path, scan: Scan) -> None:
        note = stamp_of(self.model)
        if isinstance(scan, Volume):
            write_planes_overlay(path, scan, self.mask, self.classes, self.lesions, note=note)
            return
        longest = max(scan.shape)
        share = min(max(SMALLEST_SIDE // longest, 1), PICTURE_SIDE / longest)
        height, width = (max(1, round(n * share)) for n in scan.shape)
        rows, columns = (
            (np.arange(n) * 2 + 1) * m // (2 * n)
            for n, m in zip((height, width), scan.shape, strict=True)
        )
        picture = Pictures.fromarray(scan.as_rgb()).resize((width, height), Pictures.Resampling.BOX)
        overlay.write_overlay(
            path,
            np.asarray(picture),
            self.mask[:, :][np.ix_(rows, columns)],
            classes=self.classes,
            note=note,
        )


def write_scan(finished: FinishedScan, files: WrittenFiles) -> Run:
    """Write what was asked for of an image or volume; return the run.

    An output that fails is named in the run and costs no other.

    Args:
        finished: of what.
        files: of the run's folder.
    """
    plan, settings, bundle = finished.plan, finished.settings, finished.bundle
    clock = Clock()
    result = ScanResult(
        facts=_facts(finished.scan),
        model=model_facts(bundle),
        key=finished.key,
        classes=bundle.classes,
        mask=plan.store.open_mask(),
        blocks=finished.blocks,
        side=plan.block_shape[0],
        ledger={b.index: plan.store.load_block(b) for b in finished.blocks},
    )
    amounts = result.amounts()
    clock.lap("lesions")
    with open_one(plan.path, bundle, settings) as scan:
        check_fingerprint(plan, scan.fingerprint)
        outputs, folder = settings.export.outputs, plan.store.folder
        failures, written = result.write(outputs, scan, folder, files, clock)
    run = Run(
        status="failed" if failures else "done",
        reason="; ".join(failures),
        slide=dict(result.facts),
        model=dict(result.model),
        settings={
            "key": finished.key,
            **settings.as_plain(),
            "prepared": as_plain(plan.prepared),
        },
        versions=versions(),
        patches={
            "grid": len(plan.grid),
            "kept": len(plan.grid),
            "predicted": sum(int(arrays["predicted"]) for arrays in result.ledger.values()),
        },
        seconds=seconds_of(result.ledger, clock),
        colors={c.name: list(c.color or ()) for c in bundle.classes[1:]},
        background=bundle.classes[0].name,
        regions=written.regions,
        labels=_labels(bundle, result.ledger),
        warnings=[*warnings_of(bundle), *finished.scan.doubts],
        **amounts,
    )
    return files.noted(run)


def _lesions(found: Lesions, axes: int) -> dict[str, Any]:
    """Return what `run.json` says of the lesions of a class; corners are (x, y) or (x, y, z)."""
    size = "area_mm2" if axes == 2 else "volume_ml"
    diameters = [lesion.diameter_mm for lesion in found.largest]
    return {
        "count": found.count,
        "largest_mm": max((d for d in diameters if d is not None), default=None),
        "listed": [
            {
                "pixels": lesion.pixels,
                size: lesion.size,
                "diameter_mm": lesion.diameter_mm,
                "start": list(reversed(lesion.start)),
                "stop": list(reversed(lesion.stop)),
            }
            for lesion in found.largest
        ],
    }


def _labels(bundle: Bundle, ledger: Ledger) -> dict[str, float]:
    """Return the probability of each label: that of the patch where the first is least probable.

    So of "no tumor" and "tumor" the patch counts that looks most like tumor.
    """
    found = [arrays["labels"] for arrays in ledger.values() if "labels" in arrays]
    if not found:
        return {}
    patches = np.concatenate(found)
    chosen = patches[np.argmin(patches[:, 0])].tolist()
    return dict(zip(bundle.labels, chosen, strict=True))


def _facts(scan: Scan) -> dict[str, Any]:
    """Return what `run.json` says of an image or volume."""
    spacing = scan.spacing_mm
    return {
        "name": name_of(scan.path),
        "path": without_secrets(str(scan.path)),
        "size": list(reversed(scan.shape)),
        "spacing_mm": list(reversed(spacing)) if spacing else None,
        "backend": scan.backend,
        "fingerprint": scan.fingerprint,
    }
