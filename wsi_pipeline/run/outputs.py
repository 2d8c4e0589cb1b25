"""From a finished mask to the files of a run, each whole or not at all."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.bundle import RANDOM_WEIGHTS, Bundle, ClassInfo, bundle_table
from wsi_pipeline.errors import SourceError
from wsi_pipeline.export import MaskLike, geojson, ome_tiff, ome_zarr, overlay
from wsi_pipeline.export.polygons.components import BlockComponents
from wsi_pipeline.export.polygons.trace import find_outlines, trace_mask
from wsi_pipeline.files.atomic import sync
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.files.locks import why_not_written, writing
from wsi_pipeline.files.paths import name_of, without_secrets
from wsi_pipeline.files.records import check
from wsi_pipeline.geometry import Block, PatchGrid, Region, Shape
from wsi_pipeline.options import ExportOptions, Frame, Output, Settings, TiffKind, as_plain
from wsi_pipeline.patch_grid import StoredGrid
from wsi_pipeline.report.record import ASAP_FILE, FILES, UNREADABLE, Run
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.run.worker import STAGES, SlidePlan
from wsi_pipeline.run.written import WrittenFiles
from wsi_pipeline.sources import Slide

logger = logging.getLogger(__name__)


LITTLE_TISSUE = 0.005
"""A slide with less tissue than this share gets a warning."""
NOTHING = geojson.Written(regions={}, vertices=0, dropped=[])
Ledger = dict[Shape, dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run whose blocks are all done, and what its files are written from.

    Attributes:
        slide: still open.
        bundle: the model.
        plan: of the blocks.
        stored: the patch grid, with tissue and thumbnail.
        settings: options.
        key: of the run.
        blocks: those that some patch touched.
        bad: parts of the slide that could not be read, in level-0 pixels.
    """

    slide: Slide
    bundle: Bundle
    plan: SlidePlan
    stored: StoredGrid
    settings: Settings
    key: str
    blocks: list[Block]
    bad: tuple[Region, ...] = ()

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Return the classes of the mask: the bundle's, and one more if something is unreadable."""
        return (*self.bundle.classes, UNREADABLE) if self.bad else self.bundle.classes

    @property
    def crop(self) -> Region | None:
        """Return the part of the slide that the viewer shows, in level-0 pixels; None = all."""
        return self.slide.bounds if self.settings.export.frame == "qupath" else None

    def dialect(self) -> geojson.Dialect:
        """Return how regions become features."""
        y, x = self.plan.mask_downsample
        return geojson.Dialect(
            classes=self.classes,
            downsample=(x, y),
            mpp=self.slide.mpp,
            crop=self.crop,
            simplify_um=self.settings.export.simplify_um,
            min_area_um2=self.settings.export.min_area_um2,
            namespace=f"{self.slide.fingerprint}/{self.bundle.weights_sha256}",
            metadata=made_by(model_facts(self.bundle), self.key),
        )


def model_facts(bundle: Bundle) -> dict[str, Any]:
    """Return what `run.json` says of a model."""
    facts = {
        "name": bundle.name,
        "weights_sha256": bundle.weights_sha256,
        "input": bundle_table(bundle)["input"],
    }
    return facts | ({"limits": bundle.limits} if bundle.limits else {})


def warnings_of(bundle: Bundle) -> list[str]:
    """Return what each run by a model warns of."""
    return [bundle.limits] if stamp_of(model_facts(bundle)) else []


def stamp_of(model: Mapping[str, Any]) -> str:
    """Return what must stand on all that a run's model has made, "" where nothing must."""
    return RANDOM_WEIGHTS if model.get("limits", "").startswith(RANDOM_WEIGHTS) else ""


def made_by(model: Mapping[str, Any], key: str) -> dict[str, str]:
    """Return what each object tells of its origin; `model` and `key` are the run's."""
    return {
        "model": model["name"],
        "weights_sha256": model["weights_sha256"],
        **({"limits": stamp} if (stamp := stamp_of(model)) else {}),
        "run": key,
        "software": f"wsi_pipeline {version('wsi-pipeline')}",
    }


def write_outputs(finished: Finished, files: WrittenFiles) -> Run:
    """Finish the mask, write what was asked for; return the run.

    An output that fails is named in the run and costs no other.

    Args:
        finished: of what.
        files: of the run's folder.

    Raises:
        SourceError: more of the slide is unreadable than the settings allow.
    """
    store = finished.plan.store
    ledger = {b.index: store.load_block(b) for b in finished.blocks}
    finished = replace(finished, bad=_bad_regions(finished, ledger))
    clock = Clock()
    files.tell(store.mask_path.name)
    with writing(store.mask_path):
        mask_path = _finish_mask(store, finished)
    clock.lap("pyramid")
    written: list[geojson.Written] = []
    writers: dict[Output, Callable[[Path], object]] = {
        "geojson": lambda path: written.append(
            write_polygons(
                path,
                ome_zarr.open_mask(mask_path),
                finished.dialect(),
                blocks=finished.blocks,
                side=finished.plan.block_shape[0],
                ledger=ledger,
            )
        ),
        "tiff": lambda path: write_tiffs(
            path,
            mask_path,
            finished.dialect(),
            name=Path(name_of(finished.slide.path)).stem,
            kind=finished.settings.export.tiff,
        ),
        "overlay": lambda path: _write_overlay(path, finished, mask_path),
    }
    failures = write_each(writers, finished.settings.export.outputs, store.folder, files, clock)
    run = _describe(finished, ledger, clock, written[0] if written else NOTHING, failures)
    return files.noted(run)


def write_each(
    writers: Mapping[Output, Callable[[Path], object]],
    wanted: Collection[Output],
    folder: Path,
    files: WrittenFiles,
    clock: Clock,
) -> list[str]:
    """Write the files that are wanted; return a sentence for each that could not be written.

    Args:
        writers: of each output, in their order.
        wanted: which of them.
        folder: of the run.
        files: of the folder, which give the new ones their places.
        clock: gets a lap for each.
    """
    failures = []
    for output, write in writers.items():
        if output not in wanted:
            continue
        path = folder / FILES[output]
        files.tell(path.name)
        try:
            with files.staged() as stage:
                write(stage / path.name)
        except Exception as error:  # the mask is whole: whatever fails here must not cost it
            logger.debug("writing %s failed", path, exc_info=True)
            failures.append(
                why_not_written(path, error)
                if isinstance(error, OSError)
                else f"{path.name} could not be written: {error}"
            )
        clock.lap(output)
    return failures


def _bad_regions(finished: Finished, ledger: Ledger) -> tuple[Region, ...]:
    """Return what could not be read, in level-0 pixels and reading order, if it is little enough.

    Raises:
        SourceError: it is too much.
    """
    plan, limit = finished.plan, finished.settings.export.max_unreadable
    rows = np.concatenate([arrays["bad"] for arrays in ledger.values()] or [np.zeros((0, 4), int)])
    found = {Region(x=x, y=y, width=w, height=h) for x, y, w, h in rows.tolist()}
    pixels = sum(int(arrays["counts"][-1]) for arrays in ledger.values())
    unreadable = pixels * math.prod(plan.mask_downsample)
    wanted = len(plan.grid) * math.prod(plan.grid.stride) * math.prod(plan.downsample)
    if found and unreadable > limit * wanted:
        raise SourceError(
            f"{finished.slide.path}: {unreadable / wanted:.1%} of what was to be segmented cannot "
            f"be read, at most {limit:.1%} may be; copy the slide anew, or raise --max-unreadable"
        )
    return tuple(sorted(found, key=lambda region: (region.y, region.x)))


def _describe(
    finished: Finished,
    ledger: Ledger,
    clock: Clock,
    written: geojson.Written,
    failures: list[str],
) -> Run:
    """Return what `run.json` says of a run."""
    slide, bundle, stored, plan = finished.slide, finished.bundle, finished.stored, finished.plan
    settings, crop = finished.settings, finished.crop
    (fy, fx), pixel_mm2 = stored.tissue_downsample, finished.dialect().pixel_mm2
    pixels = np.zeros(len(bundle.classes) + 1, np.int64)  # the unreadable ones last
    for arrays in ledger.values():
        pixels += arrays["counts"]
    return Run(
        status="failed" if failures else "done",
        reason="; ".join(failures),
        slide=slide_facts(slide),
        model=model_facts(bundle),
        settings={
            "key": finished.key,
            **settings.as_plain(),
            "grid": as_plain(replace(stored.info, bounds=None)),
        },
        versions=versions(),
        patches={
            "grid": _full_count(plan.grid),
            "kept": len(plan.grid),
            "predicted": sum(int(arrays["predicted"]) for arrays in ledger.values()),
        },
        seconds=seconds_of(ledger, clock),
        area_mm2={
            c.name: float(n * pixel_mm2)
            for c, n in zip(finished.classes[1:], pixels[1:], strict=False)
        },
        colors={c.name: list(c.color or ()) for c in finished.classes[1:]},
        background=finished.classes[0].name,
        tissue_mm2=float(stored.tissue.sum() * fy * slide.mpp[1] * fx * slide.mpp[0] * 1e-6),
        regions=written.regions,
        frame=frame_facts(settings.export.frame, crop),
        bad_regions=[asdict(region) for region in finished.bad],
        warnings=[
            *warnings_of(finished.bundle),
            *finished.slide.doubts,
            *_warnings(finished, written),
        ],
    )


def write_polygons(
    path: Path,
    mask: MaskLike,
    dialect: geojson.Dialect,
    *,
    blocks: Sequence[Block],
    side: int,
    ledger: Ledger,
) -> geojson.Written:
    """Write the regions of a mask in two dimensions; return what was written.

    Args:
        path: of the GeoJSON.
        mask: class of each pixel.
        dialect: how regions become features.
        blocks: those that may hold anything.
        side: of a block, px.
        ledger: what is known of blocks; pieces of the others are looked for in the mask.
    """
    traced = {i: BlockComponents.from_arrays(a) for i, a in ledger.items() if "top" in a}
    rest = [block for block in blocks if block.index not in traced]
    outlines = find_outlines(
        mask,
        {**traced, **trace_mask(mask, rest)},
        block_size=side,
        tolerance=dialect.tolerance,
        min_pixels=dialect.min_pixels,
    )
    return geojson.write_geojson(path, outlines, dialect)


def _write_overlay(path: Path, finished: Finished, mask_path: Path) -> None:
    tissue = finished.stored.tissue
    overlay.write_overlay(
        path,
        finished.stored.thumbnail,
        ome_zarr.read_mask(mask_path, tissue.shape),
        classes=finished.classes,
        tissue=tissue,
        note=stamp_of(model_facts(finished.bundle)),
    )


def write_tiffs(
    path: Path, mask_path: Path, dialect: geojson.Dialect, *, name: str, kind: TiffKind
) -> None:
    """Write a mask as OME-TIFF, cropped as the dialect says, and as ASAP's kind where wanted.

    Args:
        path: of the OME-TIFF; ASAP's lies beside it.
        mask_path: of the finished OME-Zarr.
        dialect: says classes, resolution and crop.
        name: of the image.
        kind: "asap" writes both.
    """
    mask, *reduced = ome_zarr.open_levels(mask_path)
    crop, box = dialect.crop, None
    if crop is not None:
        x, y = dialect.downsample
        top, left = round(crop.y / y), round(crop.x / x)
        height, width = (
            min(round(crop.height / y), mask.shape[0] - top),
            min(round(crop.width / x), mask.shape[1] - left),
        )
        box = (top, left, height, width)
    ome_tiff.write_ome_tiff(
        path,
        mask,
        classes=dialect.classes,
        mask_mpp=dialect.mask_mpp,
        crop=box,
        name=name,
        reduced=reduced,
    )
    if kind == "asap":
        asap_path = path.with_name(ASAP_FILE)
        ome_tiff.write_asap_tiff(asap_path, mask, mask_mpp=dialect.mask_mpp, reduced=reduced)


def _finish_mask(store: RunStore, finished: Finished) -> Path:
    """Add the pyramid and put the mask where users look, if they want it; return its path."""
    if store.mask_path.is_dir():
        ome_zarr.build_pyramid(store.mask_path, finished.classes)
        if "zarr" not in finished.settings.export.outputs:
            return store.mask_path
        if store.finished_mask_path.is_dir():
            shutil.rmtree(store.finished_mask_path)
        os.rename(store.mask_path, store.finished_mask_path)
        sync(store.folder)
        sync(store.path)
    return store.finished_mask_path


def frame_facts(frame: Frame, crop: Region | None) -> dict[str, Any]:
    """Return what `run.json` says of the frame of polygons and TIFF."""
    return {"for": frame, "offset": [crop.x, crop.y] if crop else [0, 0]}


def slide_facts(slide: Slide) -> dict[str, Any]:
    """Return what `run.json` says of a slide."""
    return {
        "name": name_of(slide.path),
        "path": without_secrets(str(slide.path)),
        "size": list(slide.size),
        "mpp": list(slide.mpp),
        "mpp_source": slide.mpp_source,
        "bounds": asdict(slide.bounds) if slide.bounds else None,
        "backend": slide.backend,
        "fingerprint": slide.fingerprint,
    }


def options_of(run: Run) -> ExportOptions:
    """Return the options by which a run's outputs were written.

    Raises:
        KeyError, TypeError, ValueError: the run does not say, as those of older versions.
    """
    held = run.settings["export"]
    check(held, ExportOptions, "export")
    return ExportOptions(**{**held, "outputs": tuple(held["outputs"])})


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


def seconds_of(ledger: Ledger, clock: Clock) -> dict[str, float]:
    """Return seconds per stage; those of blocks are summed over threads and interrupted runs."""
    total = {s: sum(float(a.get(f"seconds_{s}", 0)) for a in ledger.values()) for s in STAGES}
    return {name: round(value, 3) for name, value in {**total, **clock.seconds}.items()}


def _warnings(finished: Finished, written: geojson.Written) -> list[str]:
    stored, found = finished.stored, list(written.dropped)
    if finished.bad:
        found.append(
            f"{len(finished.bad)} parts of the slide cannot be read: they have the class "
            f"{UNREADABLE.name}, and run.json says where they are"
        )
    if min(stored.info.downsample) < 1:
        found.append(
            f"the model wants {stored.info.grid_mpp:g} µm/px, the slide has "
            f"{max(stored.info.mpp):g}: its pixels were interpolated"
        )
    if len(finished.plan.grid) == 0:
        where = " in the ROI" if finished.settings.select.roi else ""
        found.append(f"no tissue found{where}; --tissue none looks everywhere")
    elif stored.tissue.mean() < LITTLE_TISSUE:
        found.append(f"only {stored.tissue.mean():.2%} of the slide was taken for tissue")
    return found
