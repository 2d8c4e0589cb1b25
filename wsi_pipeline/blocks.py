"""What a worker does with one block: read once, predict, blend, write its mask, trace it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.annotations import rasterise, read_polygons
from wsi_pipeline.blend import (
    Windows,
    iter_blended_rows,
    iter_owned,
    iter_sampled_rows,
    sample_positions,
)
from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.export.ome_zarr import open_mask, write_block
from wsi_pipeline.export.regions import PROBABILITY_ONE, find_pieces
from wsi_pipeline.grid import Block, PatchGrid, Region, Shape, iter_blocks
from wsi_pipeline.inference import Claim, PatchCache, Predictor, use_one_core
from wsi_pipeline.options import MPP_TOLERANCE, PredictOptions
from wsi_pipeline.sources import open_source
from wsi_pipeline.store import RunStore, writing

if TYPE_CHECKING:
    from wsi_pipeline.schedule import Keep

CACHE_BYTES = 256 * 2**20
"""Predictions of patches that straddle blocks, kept by each worker."""
STAGES = ("read", "predict", "write", "polygons")
"""Whose seconds the ledger holds for each block."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a worker must know to do any block of a slide.

    Attributes:
        slide_path: of the slide or stored grid.
        slide_mpp: µm per level-0 pixel where the file does not say.
        slide_series: which image of a file with several.
        bundle_path: folder of the bundle.
        store: the run's working folder.
        grid: the patches to predict.
        grid_mpp: resolution that the model wants.
        downsample: (y, x) level-0 pixels per grid pixel.
        mask_shape: (y, x) of the mask.
        mask_downsample: (y, x) level-0 pixels per mask pixel.
        mask_mpp: (x, y) µm per mask pixel.
        block_size: side of a block in mask pixels.
        predict: how.
        roi: GeoJSON to which the mask is limited.
        roi_offset: (x, y) of its origin in level-0 pixels.
        threads: of the CPU for one worker's forward passes.
        outlines: whether to trace regions for polygons.
    """

    slide_path: Path
    slide_mpp: float | None
    slide_series: int | None
    bundle_path: Path
    store: RunStore
    grid: PatchGrid
    grid_mpp: float
    downsample: tuple[float, float]
    mask_shape: tuple[int, int]
    mask_downsample: tuple[float, float]
    mask_mpp: tuple[float, float]
    block_size: int
    predict: PredictOptions
    roi: Path | None
    roi_offset: tuple[int, int]
    threads: int
    outlines: bool

    @property
    def ratio(self) -> tuple[float, float]:
        """Return (y, x) grid pixels per mask pixel."""
        y, x = (m / g for m, g in zip(self.mask_downsample, self.downsample, strict=True))
        return y, x

    def box(self, block: Block) -> tuple[Shape, Shape]:
        """Return the grid pixels [start, stop) whose probabilities a block's mask needs."""
        low, high = [], []
        axes = zip(block.start, block.stop, self.ratio, self.grid.shape, strict=True)
        for start, stop, ratio, length in axes:
            floor, fraction = sample_positions(start, stop, ratio=ratio, length=length)
            low.append(int(floor[0]))
            high.append(int(floor[-1]) + (2 if fraction[-1] else 1))
        return tuple(low), tuple(high)

    def blocks(self) -> list[Block]:
        """Return the blocks that some patch touches; all others stay background."""
        size = (self.block_size, self.block_size)
        every = iter_blocks(self.mask_shape, size)
        return [block for block in every if len(self.grid.touching(*self.box(block)))]

    def uses(self) -> npt.NDArray[np.int64]:
        """Return (n,) how many of the blocks that are not done need each patch."""
        count = np.zeros(len(self.grid), np.int64)
        for block in self.store.pending(self.blocks()):
            count[self.grid.touching(*self.box(block))] += 1
        return count


class SegmentBlocks:
    """A worker's tools for the blocks of one slide: open slide, predictor, mask.

    Args:
        plan: of the slide.
        keep: what the worker keeps from slide to slide.
    """

    def __init__(self, plan: Plan, keep: Keep) -> None:
        bundle = load_bundle(plan.bundle_path)
        self._plan = plan
        self._classes = len(bundle.classes)
        self._slide = open_source(plan.slide_path, mpp=plan.slide_mpp, series=plan.slide_series)
        self._view = self._slide.at(plan.grid_mpp, tolerance=MPP_TOLERANCE)
        self._predictor = _kept_predictor(bundle, plan, keep)
        self._windows = Windows(plan.grid, plan.predict.blend, self._predictor.device)
        self._cache = PatchCache(plan.uses(), max_bytes=CACHE_BYTES)
        self._bad: set[Region] = set()
        self._noting = threading.Lock()
        self._mask = open_mask(plan.store.mask_path)
        self._roi = None
        if plan.roi is not None:
            self._roi = [a.polygon for a in read_polygons(plan.roi, offset=plan.roi_offset)]

    def close(self) -> None:
        """Close the slide; the predictor is kept for the next."""
        self._slide.close()

    def __call__(self, block: Block) -> int:
        """Do one block: read, predict, blend, write its mask and trace it; return new patches."""
        use_one_core()
        clock = Clock()
        mask, probability, predicted = self._predict(block, clock)
        bad = self._mark_unreadable(mask, probability, block)
        if self._roi is not None:
            (y, x), (fy, fx) = block.start, self._plan.mask_downsample
            mask *= rasterise(self._roi, mask.shape, origin=(y * fy, x * fx), downsample=(fy, fx))
        with writing(self._plan.store.mask_path):
            write_block(self._mask, block, mask)
        clock.lap("write")
        arrays = {
            "predicted": np.array(predicted),
            "counts": torch.bincount(
                torch.from_numpy(mask).flatten(), minlength=self._classes + 1
            ).numpy(),
            "bad": np.array([astuple(region) for region in bad], np.int64).reshape(-1, 4),
        }
        if probability is not None:
            pieces = find_pieces(mask, probability, (block.start[0], block.start[1]))
            arrays |= pieces.as_arrays()
            clock.lap("polygons")
        arrays |= {f"seconds_{stage}": np.array(s) for stage, s in clock.seconds.items()}
        self._plan.store.finish_block(block, arrays)
        return predicted

    def _predict(
        self, block: Block, clock: Clock
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16] | None, int]:
        """Return class and probability of a block's mask pixels, and how many patches it took."""
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
            )
            placed = self._placed(wanted, claim, fresh)
            mask, probability = self._classify(self._pieces(placed, block), block)
            clock.lap("predict")
        return mask, probability, len(claim.mine)

    def _placed(
        self, patches: npt.NDArray[np.int64], claim: Claim, fresh: Iterator[torch.Tensor]
    ) -> Iterator[tuple[Shape, torch.Tensor]]:
        """Yield origin and prediction of each patch."""
        for patch in patches:
            yield tuple(self._plan.grid.origins[patch].tolist()), claim.result(patch, fresh)

    def _read(
        self, patches: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Read the pixels of patches at one go; return them and their first grid pixel."""
        if len(patches) == 0:
            return np.zeros((0, 0, 3), np.uint8), np.zeros(2, np.int64)
        origins = self._plan.grid.origins[patches]
        low, high = origins.min(axis=0), origins.max(axis=0) + np.array(self._plan.grid.patch_size)
        y, x = low.tolist()
        height, width = (high - low).tolist()
        bad: list[Region] = []
        pixels = self._view.read((y, x), (height, width), bad=bad)
        with self._noting:
            self._bad.update(bad)
        return pixels, low

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

    def _pieces(
        self, predictions: Iterator[tuple[Shape, torch.Tensor]], block: Block
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield row, column and probabilities (C, h, w) of parts of a block's mask."""
        plan = self._plan
        start, stop = plan.box(block)
        if self._windows.exclusive and plan.ratio == (1.0, 1.0):
            for (y, x), part in iter_owned(predictions, start, stop, windows=self._windows):
                yield y - start[0], x - start[1], part
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
            start[1],
            start=(block.start[0], block.start[1]),
            stop=(block.stop[0], block.stop[1]),
            ratio=plan.ratio,
            shape=(plan.grid.shape[0], plan.grid.shape[1]),
        )
        for row, sampled in rows:
            yield row, 0, sampled

    @torch.inference_mode()
    def _classify(
        self, pieces: Iterator[tuple[int, int, torch.Tensor]], block: Block
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16] | None]:
        """Return class and probability (in 1/65535) at each mask pixel of a block."""
        mask = np.zeros(block.shape, np.uint8)
        probability = np.zeros(block.shape, np.uint16) if self._plan.outlines else None
        for row, column, probabilities in pieces:
            best, chosen = _best(probabilities)
            part = slice(row, row + best.shape[0]), slice(column, column + best.shape[1])
            mask[part] = chosen
            if probability is not None:
                probability[part] = np.rint(best * PROBABILITY_ONE)
        return mask, probability


def _best(
    probabilities: torch.Tensor,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Return the highest probability and its class of (C, h, w); the first of equals."""
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


def _kept_predictor(bundle: Bundle, plan: Plan, keep: Keep) -> Predictor:
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


class Clock:
    """Seconds spent since the last lap, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap for a stage."""
        last, self._last = self._last, time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._last - last

    def skip(self) -> None:
        """Leave out the time since the last lap."""
        self._last = time.perf_counter()
