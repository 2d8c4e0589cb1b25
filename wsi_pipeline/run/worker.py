"""What a worker does with one block: read once, predict, blend, write its mask, trace it.

All but where pixels come from, and what is peculiar to slides, is the same in two dimensions and
in three.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.annotations import rasterise, read_region
from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.errors import BundleError, SourceError
from wsi_pipeline.export.ome_zarr import open_mask, write_block
from wsi_pipeline.export.polygons.components import PROBABILITY_ONE, find_components
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.files.locks import writing
from wsi_pipeline.files.paths import is_remote
from wsi_pipeline.geometry import Block, PatchGrid, Region, Shape, box_slices, iter_blocks
from wsi_pipeline.inference.blend import (
    Windows,
    iter_blended_rows,
    iter_owned,
    iter_sampled_rows,
    sample_positions,
)
from wsi_pipeline.inference.patch_cache import Claim, PatchCache
from wsi_pipeline.inference.predictor import Predictor, use_one_core
from wsi_pipeline.options import MPP_TOLERANCE, PredictOptions
from wsi_pipeline.run.store import RunStore, settle
from wsi_pipeline.schedule.memory import map_large_arrays
from wsi_pipeline.sources import open_source
from wsi_pipeline.sources.radiology.preprocess import Preparation, Scan, open_scan

if TYPE_CHECKING:
    from wsi_pipeline.schedule.worker_state import WorkerCache

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""(*box, C)."""
CACHE_BYTES = 256 * 2**20
"""Predictions of patches that straddle blocks, kept by each worker."""
STAGES = ("read", "predict", "write", "polygons")
"""Whose seconds the ledger holds for each block."""


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """What a worker must know to do any block of a mask, in any number of dimensions.

    Attributes:
        path: of the source.
        fingerprint: of the source, when it was planned.
        bundle_path: folder of the bundle.
        model: digest of the bundle.
        store: the run's working folder.
        grid: the patches to predict.
        mask_shape: pixels along each axis of the mask.
        block_shape: of a block in mask pixels.
        predict: how.
        threads: of the CPU for one worker's forward passes.
        outlines: whether to trace regions for polygons.
    """

    path: Path
    fingerprint: str
    bundle_path: Path
    model: str
    store: RunStore
    grid: PatchGrid
    mask_shape: Shape
    block_shape: Shape
    predict: PredictOptions
    threads: int
    outlines: bool

    @property
    @abstractmethod
    def ratio(self) -> tuple[float, ...]:
        """Return grid pixels per mask pixel along each axis."""

    def seen(self, block: Block) -> Block:
        """Return where a block's mask lies to the grid."""
        return block

    def box(self, block: Block) -> tuple[Shape, Shape]:
        """Return the grid pixels [start, stop) whose probabilities a block's mask needs."""
        low, high, block = [], [], self.seen(block)
        axes = zip(block.start, block.stop, self.ratio, self.grid.shape, strict=True)
        for start, stop, ratio, length in axes:
            floor, fraction = sample_positions(start, stop, ratio=ratio, length=length)
            low.append(int(floor[0]))
            high.append(int(floor[-1]) + (2 if fraction[-1] else 1))
        return tuple(low), tuple(high)

    def blocks(self) -> list[Block]:
        """Return the blocks that some patch touches; all others stay background."""
        every = iter_blocks(self.mask_shape, self.block_shape)
        return [block for block in every if len(self.grid.touching(*self.box(block)))]

    def uses(self) -> npt.NDArray[np.int64]:
        """Return (n,) how many of the blocks that are not done need each patch."""
        count = np.zeros(len(self.grid), np.int64)
        for block in self.store.pending(self.blocks()):
            count[self.grid.touching(*self.box(block))] += 1
        return count


@dataclass(frozen=True, kw_only=True)
class SlidePlan(Plan):
    """All that a worker must know to do any block of a slide, or of a stored grid.

    Attributes:
        mpp: µm per level-0 pixel where the file does not say.
        series: which image of a file with several.
        grid_mpp: resolution that the model wants.
        downsample: (y, x) level-0 pixels per grid pixel.
        mask_downsample: (y, x) level-0 pixels per mask pixel.
        mask_mpp: (x, y) µm per mask pixel.
        roi: GeoJSON to which the mask is limited.
        roi_offset: (x, y) of its origin in level-0 pixels.
    """

    mpp: float | None
    series: int | None
    grid_mpp: float
    downsample: tuple[float, float]
    mask_downsample: tuple[float, float]
    mask_mpp: tuple[float, float]
    roi: Path | None
    roi_offset: tuple[int, int]

    @property
    def ratio(self) -> tuple[float, ...]:
        """Return (y, x) grid pixels per mask pixel."""
        return tuple(m / g for m, g in zip(self.mask_downsample, self.downsample, strict=True))


@dataclass(frozen=True, kw_only=True)
class ScanPlan(Plan):
    """All that a worker must know to do any block of a planar image or a volume.

    Attributes:
        prepared: how its pixels become those of the grid.
        frame: which of a planar image with several.
        time_points: which of a volume with several.
    """

    prepared: Preparation
    frame: int | None = None
    time_points: tuple[int, ...] | None = None

    @property
    def ratio(self) -> tuple[float, ...]:
        """Return grid pixels per mask pixel along each axis."""
        return tuple(1 / step for step in self.prepared.step)

    def seen(self, block: Block) -> Block:
        """Return where a block's mask lies to the grid, which may be mirrored."""
        if not self.prepared.is_mirrored:
            return block
        width = self.mask_shape[-1]
        start = (*block.start[:-1], width - block.stop[-1])
        return replace(block, start=start, stop=(*block.stop[:-1], width - block.start[-1]))


class BlockWorker(ABC):
    """A worker's tools for the blocks of one mask: open source, predictor, what is predicted.

    Args:
        plan: of the source.
        keep: what the worker keeps from source to source.
    """

    def __init__(self, plan: Plan, keep: WorkerCache) -> None:
        bundle = load_bundle(plan.bundle_path)
        if bundle.digest != plan.model:
            raise BundleError(
                f"the model in {plan.bundle_path} has been replaced since this command began: "
                "give it again"
            )
        self._plan = plan
        self._stamp = _stamp(plan.path)
        self._classes = len(bundle.classes)
        self._predictor = _kept_predictor(bundle, plan, keep)
        self._windows = Windows(plan.grid, plan.predict.blend, self._predictor.device)
        self._cache = PatchCache(plan.uses(), max_bytes=CACHE_BYTES)

    @abstractmethod
    def close(self) -> None:
        """Close the source; the predictor is kept for the next."""

    @abstractmethod
    def __call__(self, block: Block) -> int:
        """Do one block: read, predict, blend, write its mask and trace it; return new patches."""

    @abstractmethod
    def _fingerprint(self) -> str:
        """Return the fingerprint of what lies at the source's path now."""

    def _check_source(self) -> None:
        """Refuse a source that was replaced before the last pixels were read.

        Raises:
            SourceError: it was.
        """
        stamp = _stamp(self._plan.path)
        if stamp != self._stamp:
            check_fingerprint(self._plan, self._fingerprint())
            self._stamp = stamp

    @abstractmethod
    def _pixels(self, start: Shape, shape: Shape) -> Pixels:
        """Return the source's pixels in a box of the grid."""

    def _predict(
        self, block: Block, clock: Clock, labels: list[torch.Tensor] | None = None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16] | None, npt.NDArray[np.int64]]:
        """Return class and probability of a block's mask pixels, and the patches it took."""
        start, stop = self._plan.box(block)
        wanted = self._plan.grid.touching(start, stop)
        with self._cache.claim(wanted) as claim:
            pixels, corner = self._read(claim.mine)
            region = self._predictor.upload(pixels)
            clock.lap("read")
            self._cache.wait_for_turn(claim)
            clock.skip()
            fresh = self._predictor.predict(
                region,
                self._plan.grid.origins[claim.mine] - corner,
                begun=partial(self._cache.end_turn, claim),
                labels=labels,
            )
            placed = self._placed(wanted, claim, fresh)
            mask, probability = self._classify(self._pieces(placed, block), block)
            clock.lap("predict")
        return mask, probability, claim.mine

    def _placed(
        self, patches: npt.NDArray[np.int64], claim: Claim, fresh: Iterator[torch.Tensor]
    ) -> Iterator[tuple[Shape, torch.Tensor]]:
        """Yield origin and prediction of each patch."""
        for patch in patches:
            yield tuple(self._plan.grid.origins[patch].tolist()), claim.result(patch, fresh)

    def _read(self, patches: npt.NDArray[np.int64]) -> tuple[Pixels, npt.NDArray[np.int64]]:
        """Read the pixels of patches at one go; return them and their first grid pixel."""
        grid = self._plan.grid
        axes = len(grid.shape)
        if len(patches) == 0:
            return np.zeros((0,) * axes + (1,), np.uint8), np.zeros(axes, np.int64)
        origins = grid.origins[patches]
        low, high = origins.min(axis=0), origins.max(axis=0) + np.array(grid.patch_size)
        return self._pixels(tuple(low.tolist()), tuple((high - low).tolist())), low

    def _pieces(
        self, predictions: Iterator[tuple[Shape, torch.Tensor]], block: Block
    ) -> Iterator[tuple[Shape, torch.Tensor]]:
        """Yield the first pixel and the probabilities (C, *part) of parts of a block's mask."""
        plan, seen = self._plan, self._plan.seen(block)
        start, stop = plan.box(block)
        if self._windows.exclusive and all(r == 1.0 for r in plan.ratio):
            for first, part in iter_owned(predictions, start, stop, windows=self._windows):
                yield tuple(a - low for a, low in zip(first, start, strict=True)), part
            return
        bands = iter_blended_rows(
            predictions,
            start,
            stop,
            windows=self._windows,
            patch_rows=plan.grid.patch_size[0],
            channels=self._predictor.channels,
            device=self._predictor.device,
        )
        rows = iter_sampled_rows(
            bands,
            start[1:],
            start=seen.start,
            stop=seen.stop,
            ratio=plan.ratio,
            shape=plan.grid.shape,
        )
        for row, sampled in rows:
            yield (row, *(0 for _ in start[1:])), sampled

    @torch.inference_mode()
    def _classify(
        self, pieces: Iterator[tuple[Shape, torch.Tensor]], block: Block
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16] | None]:
        """Return class and probability (in 1/65535) at each mask pixel of a block."""
        mask = np.zeros(block.shape, np.uint8)
        probability = np.zeros(block.shape, np.uint16) if self._plan.outlines else None
        for first, probabilities in pieces:
            best, chosen = _best(probabilities)
            part = box_slices(first, best.shape)
            mask[part] = chosen
            if probability is not None:
                probability[part] = np.rint(best * PROBABILITY_ONE)
        return mask, probability

    def _enter(
        self,
        block: Block,
        mask: npt.NDArray[np.uint8],
        probability: npt.NDArray[np.uint16] | None,
        clock: Clock,
        arrays: dict[str, npt.NDArray[Any]],
    ) -> None:
        """Trace a block whose mask is written, and enter it in the ledger."""
        self._check_source()
        counts = torch.bincount(torch.from_numpy(mask).flatten(), minlength=self._classes + 1)
        arrays = arrays | {"counts": counts.numpy()}
        if probability is not None:
            pieces = find_components(mask, probability, (block.start[0], block.start[1]))
            arrays |= pieces.as_arrays()
            clock.lap("polygons")
        arrays |= {f"seconds_{stage}": np.array(s) for stage, s in clock.seconds.items()}
        self._plan.store.finish_block(block, arrays)


class SegmentBlocks(BlockWorker):
    """A worker's tools for the blocks of one slide.

    Args:
        plan: of the slide.
        keep: what the worker keeps from slide to slide.
    """

    _plan: SlidePlan

    def __init__(self, plan: SlidePlan, keep: WorkerCache) -> None:
        super().__init__(plan, keep)
        self._slide = open_source(plan.path, mpp=plan.mpp, series=plan.series)
        check_fingerprint(plan, self._slide.fingerprint)
        self._view = self._slide.at(plan.grid_mpp, tolerance=MPP_TOLERANCE)
        self._bad: set[Region] = set()
        self._noting = threading.Lock()
        self._mask = open_mask(plan.store.mask_path)
        self._roi = None
        if plan.roi is not None:
            self._roi = read_region(plan.roi, offset=plan.roi_offset)

    def close(self) -> None:
        """Close the slide; the predictor is kept for the next."""
        self._slide.close()

    def __call__(self, block: Block) -> int:
        """Do one block: read, predict, blend, write its mask and trace it; return new patches."""
        use_one_core()
        clock = Clock()
        mask, probability, patches = self._predict(block, clock)
        bad = self._mark_unreadable(mask, probability, block)
        if self._roi is not None:
            (y, x), (fy, fx) = block.start, self._plan.mask_downsample
            mask *= rasterise(self._roi, mask.shape, origin=(y * fy, x * fx), downsample=(fy, fx))
        with writing(self._plan.store.mask_path):
            write_block(self._mask, block, mask)
            chunks = settle(self._mask, block)
        clock.lap("write")
        arrays = {
            "chunks": chunks,
            "predicted": np.array(len(patches)),
            "bad": np.array([astuple(region) for region in bad], np.int64).reshape(-1, 4),
        }
        self._enter(block, mask, probability, clock, arrays)
        return len(patches)

    def _fingerprint(self) -> str:
        with open_source(self._plan.path, mpp=self._plan.mpp, series=self._plan.series) as slide:
            return slide.fingerprint

    def _pixels(self, start: Shape, shape: Shape) -> Pixels:
        """Return the slide's pixels in a box of the grid; note what cannot be read."""
        bad: list[Region] = []
        pixels = self._view.read((start[0], start[1]), (shape[0], shape[1]), bad=bad)
        with self._noting:
            self._bad.update(bad)
        return pixels

    def _mark_unreadable(
        self,
        mask: npt.NDArray[np.uint8],
        probability: npt.NDArray[np.uint16] | None,
        block: Block,
    ) -> list[Region]:
        """Give what could not be read its own class, as far as patches cover it; return where.

        Whoever read a patch of the block has done so before the block was predicted.
        """
        plan, found = self._plan, []
        with self._noting:
            bad = sorted(self._bad, key=lambda r: (r.y, r.x, r.height, r.width))
        if not bad:
            return []
        origins = plan.grid.origins[plan.grid.touching(*plan.box(block))]
        scale = np.array(plan.downsample) / plan.mask_downsample  # mask pixels per grid pixel
        for region in bad:
            low = np.array([region.y, region.x]) / plan.mask_downsample
            high = low + np.array([region.height, region.width]) / plan.mask_downsample
            first = np.maximum(np.floor(np.maximum(low, origins * scale)), block.start)
            ends = (origins + np.array(plan.grid.patch_size)) * scale
            last = np.minimum(np.ceil(np.minimum(high, ends)), block.stop)
            parts = np.stack([first, last], axis=1).astype(np.int64)[np.all(first < last, axis=1)]
            for (y0, x0), (y1, x1) in parts - np.array(block.start):
                mask[y0:y1, x0:x1] = self._classes
                if probability is not None:
                    probability[y0:y1, x0:x1] = 0
            if len(parts):
                found.append(region)
        return found


class ScanBlocks(BlockWorker):
    """A worker's tools for the blocks of one planar image or volume.

    Args:
        plan: of the image or volume.
        keep: what the worker keeps from one to the next.
    """

    _plan: ScanPlan

    def __init__(self, plan: ScanPlan, keep: WorkerCache) -> None:
        super().__init__(plan, keep)
        if len(plan.mask_shape) > 2:
            map_large_arrays()
        self._scan = self._open()
        check_fingerprint(plan, self._scan.fingerprint)
        self._mask = plan.store.open_mask()

    def close(self) -> None:
        """Close the file; the predictor is kept for the next."""
        self._scan.close()

    def __call__(self, block: Block) -> int:
        """Do one block: read, predict, blend, write its mask and trace it; return new patches."""
        use_one_core()
        clock, labels = Clock(), list[torch.Tensor]()
        mask, probability, patches = self._predict(block, clock, labels)
        if self._plan.prepared.is_mirrored:
            mask = np.ascontiguousarray(mask[..., ::-1])
            if probability is not None:
                probability = np.ascontiguousarray(probability[..., ::-1])
        with writing(self._plan.store.mask_path):
            self._mask[block.slices] = mask
            chunks = settle(self._mask, block)
        clock.lap("write")
        arrays: dict[str, npt.NDArray[Any]] = {
            "chunks": chunks,
            "predicted": np.array(len(patches)),
        }
        if labels:
            arrays |= {"labelled": patches, "labels": torch.stack(labels).cpu().numpy()}
        self._enter(block, mask, probability, clock, arrays)
        return len(patches)

    def _open(self) -> Scan:
        plan = self._plan
        return open_scan(
            plan.path,
            axes=len(plan.mask_shape),
            frame=plan.frame,
            time_points=plan.time_points,
        )

    def _fingerprint(self) -> str:
        with self._open() as scan:
            return scan.fingerprint

    def _pixels(self, start: Shape, shape: Shape) -> Pixels:
        return self._plan.prepared.read(self._scan, start, shape)


def check_fingerprint(plan: Plan, fingerprint: str) -> None:
    """Refuse a source that is not the one that was planned; return nothing.

    Args:
        plan: of the source.
        fingerprint: of what lies at its path.

    Raises:
        SourceError: another one.
    """
    if fingerprint != plan.fingerprint:
        raise SourceError(
            f"{plan.path}: its content was replaced while it was segmented; put the first one back "
            "and give the same command again, or start anew with --overwrite"
        )


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what is another where a file or folder of this machine was replaced or written."""
    if is_remote(path):
        return ()
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_blocks(plan: Plan, keep: WorkerCache) -> BlockWorker:
    """Open a source on a worker; return what does its blocks."""
    if isinstance(plan, ScanPlan):
        return ScanBlocks(plan, keep)
    assert isinstance(plan, SlidePlan)
    return SegmentBlocks(plan, keep)


def _best(
    probabilities: torch.Tensor,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Return the highest probability and its class of (C, *part); the first of equals."""
    if len(probabilities) == 1:
        probabilities = torch.cat([1 - probabilities, probabilities])
    if probabilities.device.type != "cpu":
        highest, position = probabilities.max(0)
        return highest.cpu().numpy(), position.to(torch.uint8).cpu().numpy()
    planes = probabilities.numpy()
    best, chosen = planes[0].copy(), np.zeros(planes.shape[1:], np.uint8)
    for index, plane in enumerate(planes[1:], start=1):  # many times faster than max(0)
        np.maximum(chosen, (plane > best).view(np.uint8) * np.uint8(index), out=chosen)
        np.maximum(best, plane, out=best)
    return best, chosen


def _kept_predictor(bundle: Bundle, plan: Plan, keep: WorkerCache) -> Predictor:
    """Return the predictor that a worker made for the last slide, or a new one."""
    options = plan.predict
    key = repr((bundle, bundle.weights_sha256, options.device, options.precision,
                options.batch_size, plan.threads))  # fmt: skip
    predictor = keep.get(key)
    if not isinstance(predictor, Predictor):
        while keep:  # of another model
            keep.popitem()[1].close()
        predictor = keep[key] = Predictor(
            bundle,
            device=options.device,
            precision=options.precision,
            batch_size=options.batch_size,
            threads=plan.threads,
        )
    return predictor
