"""The run of a planar image or a volume: a mask in its own geometry, and its lesions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wsi_pipeline.bundle import AXES, Bundle
from wsi_pipeline.errors import StoreError, raised_as
from wsi_pipeline.export import ome_zarr
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.files.locks import writing
from wsi_pipeline.files.paths import name_of, without_secrets
from wsi_pipeline.geometry import PatchGrid, Shape
from wsi_pipeline.options import POLYGONS, Settings, as_plain
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.probability import without_planes
from wsi_pipeline.run.result import (
    BLOCK_SIDE,
    ImageResult,
    Ledger,
    ScanResult,
    VolumeResult,
    without_dicom,
)
from wsi_pipeline.run.source_run import SourceRun
from wsi_pipeline.run.store import CHUNK, RunStore, create_scan_mask
from wsi_pipeline.run.written import WrittenFiles
from wsi_pipeline.sources.pixels import ScanPixels
from wsi_pipeline.sources.radiology.image import Image
from wsi_pipeline.sources.radiology.preprocess import Preparation, Scan, open_scan, prepare

logger = logging.getLogger(__name__)


class ScanRun(SourceRun):
    """The run of a planar image or a volume.

    Attributes:
        prepared: how its pixels become those of the grid, once laid out.
        result: the finished mask.
    """

    source: Scan
    reopened: Scan
    prepared: Preparation
    result: ScanResult
    _result: Callable[..., ImageResult | VolumeResult]

    @staticmethod
    def check(settings: Settings, bundle: Bundle) -> None:
        """Refuse blocks that are not whole chunks of the mask.

        Raises:
            StoreError: not a multiple.
        """
        size, unit = settings.predict.block_size, CHUNK[AXES[bundle.modality]]
        if size and size % unit:
            raise StoreError(f"--block-size {size} is not a multiple of {unit}, the mask's chunk")

    def _open(self, path: Path) -> Scan:
        scan = open_scan(
            path,
            axes=AXES[self.bundle.modality],
            frame=self.settings.select.series,
            time_points=self._time_points,
        )
        self.settings = without_dicom(scan, self.settings)
        return scan

    @property
    def _time_points(self) -> tuple[int, ...] | None:
        """Return which volumes of one place the model sees, or the user chose; None = the only."""
        chosen = self.settings.select.time_point
        return self.bundle.input.time_points or (None if chosen is None else (chosen,))

    def _identity(self) -> dict[str, Any]:
        return {
            "scan": self.source.fingerprint,
            "spacing_mm": self.source.spacing_mm,
            "frame": self.settings.select.series,
            "time_point": self.settings.select.time_point,
        }

    def lay_out(self, store: RunStore, threads: int, *, keep: bool) -> Plan:
        """See `SourceRun`."""
        self.check(self.settings, self.bundle)
        scan, spec, axes = self.source, self.bundle.input, len(self.source.shape)
        self.prepared = prepared = prepare(scan, spec)
        size, overlap = self.settings.predict.block_size, self.settings.predict.overlap
        with raised_as(StoreError, ValueError):
            grid = PatchGrid.cover(
                prepared.shape,
                spec.patch_size,
                spec.overlap if overlap is None else (overlap,) * axes,
                even=bool(spec.convention),
            )
        side, unit = size or BLOCK_SIDE[axes], CHUNK[axes]
        block_shape: Shape = (side,) * axes
        # Tracing wants squares; a volume has fewer voxels along an axis where they are thick.
        if axes > 2:
            sides = (side * min(step, 1.0) for step in prepared.step)
            block_shape = tuple(max(unit, round(n / unit) * unit) for n in sides)
        return Plan(
            pixels=ScanPixels(
                path=scan.path.absolute(),
                frame=self.settings.select.series,
                time_points=self._time_points,
                prepared=prepared,
            ),
            fingerprint=scan.fingerprint,
            bundle_path=self.bundle.path.absolute(),
            model=self.bundle.digest,
            store=store,
            grid=grid,
            downsample=prepared.step,
            mask_shape=scan.shape,
            mask_downsample=(1.0,) * axes,
            block_shape=block_shape,
            is_mirrored=prepared.is_mirrored,
            crop=prepared.crop,
            nearest=prepared.thick_back,
            predict=self.settings.predict,
            threads=threads,
            outlines=bool(POLYGONS & set(self.settings.export.outputs)),
            cell=int("probability" in self.settings.export.outputs),
            unpadded=tuple(
                # The last pixel may be interpolated between two.
                min(n, max(math.ceil(size / step), math.ceil((size - 0.5) / step + 0.5)))
                for size, step, n in zip(scan.shape, prepared.step, prepared.shape, strict=True)
            ),
        )

    def make_mask(self) -> None:
        """See `SourceRun`."""
        plan, store = self.plan, self.plan.store
        logger.info("%s: %d patches", name_of(self.source.path), len(plan.grid))
        try:
            mask = ome_zarr.open_mask(store.mask_path)
        except Exception:
            # It is not there, or damaged in any way.
            store.forget_blocks()
            with writing(store.mask_path), written_beside(store.mask_path) as partial_path:
                create_scan_mask(partial_path, plan.mask_shape)
        else:
            damaged = store.damaged(self.blocks, mask)
            store.forget_blocks({*damaged, *without_planes(plan, self.blocks)})

    def most_mask_files(self, plan: Plan) -> int:
        """See `SourceRun`."""
        metadata, unit, planes = 2, CHUNK[len(plan.mask_shape)], 0
        if plan.cell:
            planes = len(self.bundle.classes) - 1 + 3 * bool(self.bundle.members)
            planes *= ome_zarr.count_files(plan.cells_shape, "0.4")
        return math.prod(-(-n // unit) for n in plan.mask_shape) + metadata + planes // 2

    def _finish(self, ledger: Ledger, files: WrittenFiles, clock: Clock) -> ScanResult:
        """Count the lesions; see `SourceRun`."""
        scan, spacing = self.source, self.source.spacing_mm
        self.result = self._result(
            facts={
                "name": name_of(scan.path),
                "path": without_secrets(str(scan.path)),
                "size": list(reversed(scan.shape)),
                "spacing_mm": list(reversed(spacing)) if spacing else None,
                "backend": scan.backend,
                "fingerprint": scan.fingerprint,
            },
            classes=self.bundle.classes,
            mask=ome_zarr.open_mask(self.plan.store.mask_path),
            scan=self.reopened,
            **self._common(
                ledger,
                pixel=spacing or (1.0,) * len(scan.shape),
                unit="millimeter" if spacing else None,
                ngff="0.4",
            ),
        )
        self.result.lesions  # noqa: B018  # counted here, to be timed by itself
        clock.lap("lesions")
        return self.result

    def _facts(self, ledger: Ledger) -> dict[str, Any]:
        return {
            "settings": {"prepared": as_plain(self.prepared)},
            "patches": len(self.plan.grid),
            "labels": self._labels(ledger),
            "warnings": [],
            **self.result.amounts,
        }

    def _labels(self, ledger: Ledger) -> dict[str, float]:
        """Return the probability of each label: that of the patch where the first is the least.

        So of "no tumor" and "tumor" the patch counts that looks most like tumor.
        """
        found = [arrays["labels"] for arrays in ledger.values() if "labels" in arrays]
        if not found:
            return {}
        patches = np.concatenate(found)
        chosen = patches[np.argmin(patches[:, 0])].tolist()
        return dict(zip(self.bundle.labels, chosen, strict=True))


class ImageRun(ScanRun):
    """The run of a planar image."""

    reopened: Image
    _result = ImageResult

    def _facts(self, ledger: Ledger) -> dict[str, Any]:
        """Tell besides where an image is not as `InputSpec` takes it to be."""
        facts, image, spec = super()._facts(ledger), self.reopened, self.bundle.input
        (black, white), (y, x) = image.value_range, image.spacing_mm or (1.0, 1.0)
        brightest, is_ours = float(image.read((0, 0), image.shape).max()), not spec.convention
        if is_ours and spec.scale == "range" and brightest - black < (white - black) / 4:
            told = (
                f"its brightest value is {brightest:g}, its file's white {white:g}: it is seen dark"
            )
            facts["warnings"].append(told)
        if is_ours and not math.isclose(x, y, rel_tol=0.01):
            facts["warnings"].append(f"its pixels of {x:g} × {y:g} mm are seen as squares")
        return facts


class VolumeRun(ScanRun):
    """The run of a volume."""

    _result = VolumeResult
