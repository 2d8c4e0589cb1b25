"""The run of a slide: tissue on its thumbnail, a mask as OME-Zarr, and what is written from it."""

from __future__ import annotations

import logging
import math
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import SourceError, StoreError
from wsi_pipeline.export import level_shapes, ome_zarr
from wsi_pipeline.files.atomic import sha256_of, sync, written_beside
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.files.locks import writing
from wsi_pipeline.files.paths import name_of, without_secrets
from wsi_pipeline.geometry import PatchGrid, Region
from wsi_pipeline.options import MPP_TOLERANCE, POLYGONS, Settings, as_plain
from wsi_pipeline.patch_grid import StoredGrid, close_patch_grid, open_patch_grid, write_patch_grid
from wsi_pipeline.report.record import UNREADABLE, bounds_facts
from wsi_pipeline.run.facts import headers_of
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.probability import cell_of, without_planes
from wsi_pipeline.run.quality import cell_side, quality_areas
from wsi_pipeline.run.source_run import SourceRun
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.run.written import WrittenFiles
from wsi_pipeline.sources import Slide, open_source, why_not_brightfield
from wsi_pipeline.sources.pixels import SlidePixels
from wsi_pipeline.sources.slide import frame_offset
from wsi_pipeline.tissue.detect import select_patches
from wsi_pipeline.tissue.quality import QUALITIES, look_of
from wsi_pipeline.tissue.select import check_files, plan_grid, why_too_coarse

if TYPE_CHECKING:
    from wsi_pipeline.run.result import Ledger, SlideResult

logger = logging.getLogger(__name__)

LITTLE_TISSUE = 0.005
"""A slide with less tissue than this share gets a warning."""


class SlideRun(SourceRun):
    """The run of a slide, or of a stored grid.

    Attributes:
        stored: the patch grid with tissue and thumbnail, once laid out.
        bad: parts of the slide that could not be read, in level-0 pixels.
        result: the finished mask.
    """

    source: Slide
    stored: StoredGrid
    bad: tuple[Region, ...] = ()
    result: SlideResult

    @staticmethod
    def check(settings: Settings, bundle: Bundle) -> None:
        """Refuse options that would fail every slide.

        Raises:
            StoreError: a block size that cannot be.
            AnnotationError: a file of where to look that cannot be read.
        """
        ome_zarr.block_side(settings.predict.block_size, settings.export.ngff)
        check_files(settings.select)

    def _open(self, path: Path) -> Slide:
        select = self.settings.select
        slide = open_source(path, mpp=select.mpp, series=select.series, icc=select.icc)
        reason = why_too_coarse(slide.mpp, self.bundle.mpp)
        if reason and not select.any_resolution:
            slide.close()
            raise SourceError(f"{path}: {reason}; --any-resolution takes it all the same")
        return slide

    def _identity(self) -> dict[str, Any]:
        select = self.settings.select
        files = {
            name: sha256_of(path)
            for name, path in (("tissue", select.tissue), ("roi", select.roi))
            if isinstance(path, Path) and path.is_file()
        }
        # The frame of what is read matters only where something is read.
        where = asdict(select if files else replace(select, frame="qupath"))
        # Slides that are taken either way have one mask, and files are told by their content.
        for name in ("any_resolution", *files):
            del where[name]
        # Older runs, which have none in their key, go on.
        if select.icc == "ignore":
            del where["icc"]
        return {
            "slide": self.source.fingerprint,
            "mpp": self.source.mpp,
            "select": where,
            "files": files,
            "ngff": self.settings.export.ngff,
        }

    def survey(self) -> StoredGrid:
        """Find out where the model is to look; return the patch grid, without pixels.

        Raises:
            SourceError: the slide cannot be read, or does not fit the model.
            AnnotationError: the tissue or ROI file cannot be used.
        """
        spec, overlap = self.bundle.input, self.settings.predict.overlap
        stored = plan_grid(
            self.source,
            mpp=self.bundle.mpp,
            patch_size=(spec.patch_size[0], spec.patch_size[1]),
            overlap=(spec.overlap[0], spec.overlap[1]) if overlap is None else (overlap, overlap),
            select=self.settings.select,
        )
        reason = why_not_brightfield(self.source.properties, stored.thumbnail)
        if spec.channels == 3 and reason:
            raise SourceError(
                f"{self.source.path}: {reason}; {self.bundle.name} is for colour slides in bright "
                "field, as H&E is"
            )
        return stored

    def lay_out(self, store: RunStore, threads: int, *, keep: bool) -> Plan:
        """See `SourceRun`; the survey is found once, and then read from the store."""
        try:
            stored = open_patch_grid(store.grid_path) if keep else self.survey()
        except StoreError:
            with writing(store.grid_path), written_beside(store.grid_path) as partial:
                write_patch_grid(partial, self.survey(), with_pixels=False)
                close_patch_grid(partial)
            stored = open_patch_grid(store.grid_path)
        self.stored = stored
        if keep and (roi := self.settings.select.roi) is not None:
            with writing(store.roi_path), written_beside(store.roi_path) as partial_path:
                shutil.copyfile(roi, partial_path)
        slide, settings = self.source, self.settings
        width, height = slide.size
        downsample, shape = (1.0, 1.0), (height, width)
        if (mask_mpp := settings.predict.mask_mpp) is not None:
            view = slide.at(mask_mpp, tolerance=MPP_TOLERANCE)
            downsample, shape = view.downsample, view.shape
            if min(downsample) < 1:
                raise StoreError(
                    f"--mask-mpp {mask_mpp:g} is finer than the slide's {max(slide.mpp):g} µm/px; "
                    "leave it out for full resolution"
                )
        select = settings.select
        side = ome_zarr.block_side(settings.predict.block_size, settings.export.ngff)
        return Plan(
            pixels=SlidePixels(
                path=slide.path.absolute(),
                mpp=select.mpp,
                series=select.series,
                icc=select.icc,
                grid_mpp=stored.info.grid_mpp,
            ),
            fingerprint=slide.fingerprint,
            bundle_path=self.bundle.path.absolute(),
            model=self.bundle.digest,
            store=store,
            grid=stored.grid,
            downsample=stored.info.downsample,
            mask_shape=shape,
            mask_downsample=downsample,
            block_shape=(side, side),
            predict=settings.predict,
            roi=select.roi.absolute() if select.roi else None,
            roi_offset=frame_offset(slide.bounds, select.frame),
            threads=threads,
            outlines=bool(POLYGONS & set(settings.export.outputs)),
            # Of a classifier one value is of a step, not of a pixel.
            cell=cell_of(
                stored.info.grid_mpp,
                settings.export,
                usual=math.gcd(*stored.grid.stride) if self.bundle.is_patchwise else 1,
            ),
            look=look_of(stored.thumbnail, stored.tissue, cell_side(downsample[0] * slide.mpp[1]))
            if settings.predict.skip or "quality" in settings.export.outputs
            else None,
        )

    def make_mask(self) -> None:
        """See `SourceRun`."""
        plan, store, path = self.plan, self.plan.store, self.plan.store.mask_path
        logger.info(
            "%s: %d patches of %d², %g µm/px", name_of(self.source.path), len(plan.grid),
            plan.grid.patch_size[0], self.stored.info.grid_mpp,
        )  # fmt: skip
        is_moved = not path.is_dir() and bool(store.blocks())
        mask = ome_zarr.open_begun(store.finished_mask_path if is_moved else path)
        if mask is not None:
            damaged = store.damaged(self.blocks, mask)
            damaged += [b for b in without_planes(plan, self.blocks) if b not in damaged]
            held = [b for b in self.blocks if b not in {*damaged, *store.pending(self.blocks)}]
            damaged += [b for b in held if plan.look and "quality" not in store.load_block(b)]
            if damaged and is_moved:
                with writing(path):
                    os.rename(store.finished_mask_path, path)
                    sync(store.path)
                    sync(store.folder)
            store.forget_blocks(damaged)
            return
        store.forget_blocks()
        (fy, fx), (x, y) = plan.mask_downsample, self.source.mpp
        with writing(path), written_beside(path) as partial:
            ome_zarr.create_mask(
                partial,
                plan.mask_shape,
                classes=self.bundle.classes,
                mask_mpp=(fy * y, fx * x),
                ngff=self.settings.export.ngff,
                name=Path(name_of(self.source.path)).stem,
            )

    def most_mask_files(self, plan: Plan) -> int:
        """See `SourceRun`."""
        ngff, planes = self.settings.export.ngff, 0
        if plan.cell:
            planes = len(self.bundle.classes) - 1 + 3 * bool(self.bundle.members)
            planes *= ome_zarr.count_files(plan.cells_shape, ngff)
        # One for each reduced level, and two of what is made of the mask.
        more = 1 + len(level_shapes(plan.mask_shape))
        more *= "dicom" in self.settings.export.outputs
        # Those of probabilities and of SpatialData have no labels, which are half of a mask's; that
        # has some for each column of its table besides.
        pixels = ome_zarr.count_files(plan.mask_shape, ngff)
        is_linked = "spatialdata" in self.settings.export.outputs
        planes += is_linked * (pixels + 200)
        return pixels + planes // 2 + more

    def _finish(self, ledger: Ledger, files: WrittenFiles, clock: Clock) -> SlideResult:
        """Add the pyramid, and put the mask where users look if they want it; see `SourceRun`."""
        from wsi_pipeline.run.result import SlideResult

        # What was just loaded is no part of the pyramid.
        clock.skip()
        store, options = self.plan.store, self.settings.export
        self.bad = self._bad_regions(ledger)
        classes = (*self.bundle.classes, UNREADABLE) if self.bad else self.bundle.classes
        files.tell(store.mask_path.name)
        with writing(store.mask_path):
            if store.mask_path.is_dir():
                ome_zarr.build_pyramid(store.mask_path, classes)
                if "zarr" in options.outputs:
                    shutil.rmtree(store.finished_mask_path, ignore_errors=True)
                    os.rename(store.mask_path, store.finished_mask_path)
                    sync(store.folder)
                    sync(store.path)
        clock.lap("pyramid")
        slide, (y, x) = self.source, self.plan.mask_downsample
        mask_mpp = (y * slide.mpp[1], x * slide.mpp[0])
        is_here = store.mask_path.is_dir()
        mask_path = store.mask_path if is_here else store.finished_mask_path
        self.result = SlideResult(
            facts={
                "name": name_of(slide.path),
                "path": without_secrets(str(slide.path)),
                "size": list(slide.size),
                "mpp": slide.mpp,
                "mpp_source": slide.mpp_source,
                "bounds": bounds_facts(slide.bounds),
                "backend": slide.backend,
                "fingerprint": slide.fingerprint,
            },
            classes=classes,
            mask=ome_zarr.open_mask(mask_path),
            judged=ledger,
            mask_path=mask_path,
            downsample=(y, x),
            folder=store.folder,
            headers=headers_of(slide) if "dicom" in options.outputs else [],
            options=options,
            stored=self.stored,
            **self._common(ledger, pixel=mask_mpp, unit="micrometer", ngff=options.ngff),
        )
        return self.result

    def _judged(self) -> npt.NDArray[np.bool_]:
        """See `SourceRun`: not those that are glass for the most part, whatever the tissue."""
        found, grid = self.stored, self.plan.grid
        return select_patches(
            found.tissue, found.tissue_downsample, grid, found.info.downsample, least=0.5
        )

    def _bad_regions(self, ledger: Ledger) -> tuple[Region, ...]:
        """Return what could not be read, in reading order, if it is little enough.

        Raises:
            SourceError: it is too much.
        """
        plan, limit = self.plan, self.settings.export.max_unreadable
        rows = np.concatenate([a["bad"] for a in ledger.values()] or [np.zeros((0, 4), int)])
        found = {Region(x=x, y=y, width=w, height=h) for x, y, w, h in rows.tolist()}
        pixels = sum(int(arrays["counts"][-1]) for arrays in ledger.values())
        unreadable = pixels * math.prod(plan.mask_downsample)
        wanted = len(plan.grid) * math.prod(plan.grid.stride) * math.prod(plan.downsample)
        if found and unreadable > limit * wanted:
            raise SourceError(
                f"{self.source.path}: {unreadable / wanted:.1%} of what was to be segmented cannot "
                f"be read, at most {limit:.1%} may be; copy the slide anew, or raise "
                "--max-unreadable"
            )
        return tuple(sorted(found, key=lambda region: (region.y, region.x)))

    def _facts(self, ledger: Ledger) -> dict[str, Any]:
        slide, stored, grid = self.source, self.stored, self.plan.grid
        (fy, fx), pixel_mm2 = stored.tissue_downsample, self.result.features.pixel_mm2
        # The unreadable ones are counted last.
        pixels = np.zeros(len(self.bundle.classes) + 1, np.int64)
        crossings = np.zeros((len(pixels), len(QUALITIES)), np.int64)
        for arrays in ledger.values():
            pixels += arrays["counts"]
            crossings += arrays.get("crossed", 0)
        overlap = tuple(p - s for p, s in zip(grid.patch_size, grid.stride, strict=True))
        return {
            "settings": {"grid": as_plain(replace(stored.info, bounds=None))},
            "patches": len(PatchGrid.cover(grid.shape, grid.patch_size, overlap)),
            "area_mm2": {
                c.name: float(n * pixel_mm2)
                for c, n in zip(self.result.classes[1:], pixels[1:], strict=False)
            },
            "quality_mm2": quality_areas(crossings, self.result.classes, pixel_mm2),
            "tissue_mm2": float(stored.tissue.sum() * fy * slide.mpp[1] * fx * slide.mpp[0] * 1e-6),
            "frame": self.result.frame,
            "bad_regions": [asdict(region) for region in self.bad],
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[str]:
        stored, found = self.stored, list[str]()
        if self.bad:
            found.append(
                f"{len(self.bad)} parts of the slide cannot be read: they have the class "
                f"{UNREADABLE.name}, and run.json says where they are"
            )
        if min(stored.info.downsample) < 1:
            found.append(
                f"the model wants {stored.info.grid_mpp:g} µm/px, the slide has "
                f"{max(stored.info.mpp):g}: its pixels were interpolated"
            )
        if len(self.plan.grid) == 0:
            where = " in the ROI" if self.settings.select.roi else ""
            found.append(f"no tissue found{where}; --tissue none looks everywhere")
        elif stored.tissue.mean() < LITTLE_TISSUE:
            found.append(f"only {stored.tissue.mean():.2%} of the slide was taken for tissue")
        return found
