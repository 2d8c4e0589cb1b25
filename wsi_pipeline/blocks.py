"""What a worker does with one block: read once, predict, blend, write its mask, trace it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.annotations import rasterise, read_polygons
from wsi_pipeline.blend import Canvas, Windows, iter_sampled_rows, sample_positions
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.export.ome_zarr import open_mask
from wsi_pipeline.export.polygons import PROBABILITY_ONE, trace
from wsi_pipeline.grid import Block, PatchGrid, Shape, iter_blocks
from wsi_pipeline.inference import PatchCache, Predictor
from wsi_pipeline.options import MPP_TOLERANCE, PredictOptions
from wsi_pipeline.sources import open_source
from wsi_pipeline.store import RunStore

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
    """

    slide_path: Path
    slide_mpp: float | None
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
            floor, _ = sample_positions(start, stop, ratio=ratio, length=length)
            low.append(int(floor[0]))
            high.append(min(int(floor[-1]) + 2, length))
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
    """A worker's tools for the blocks of one slide: open slide, predictor, mask."""

    def __init__(self, plan: Plan) -> None:
        bundle = load_bundle(plan.bundle_path)
        options = plan.predict
        self._plan = plan
        self._slide = open_source(plan.slide_path, mpp=plan.slide_mpp)
        self._view = self._slide.at(plan.grid_mpp, tolerance=MPP_TOLERANCE)
        self._predictor = Predictor(
            bundle,
            device=options.device,
            precision=options.precision,
            batch_size=options.batch_size,
            threads=plan.threads,
        )
        self._windows = Windows(plan.grid, options.blend, self._predictor.device)
        self._cache = PatchCache(plan.uses(), max_bytes=CACHE_BYTES)
        self._computing = threading.Lock()
        self._mask = open_mask(plan.store.mask_path)
        self._roi = None
        if plan.roi is not None:
            self._roi = [a.polygon for a in read_polygons(plan.roi, offset=plan.roi_offset)]

    def close(self) -> None:
        """Close the slide, end the threads."""
        self._slide.close()
        self._predictor.close()

    def __call__(self, block: Block) -> int:
        """Do one block: read, predict, blend, write its mask and trace it; return new patches."""
        clock = Clock()
        mask, probability, predicted = self._predict(block, clock)
        if self._roi is not None:
            (y, x), (fy, fx) = block.start, self._plan.mask_downsample
            mask *= rasterise(self._roi, mask.shape, origin=(y * fy, x * fx), downsample=(fy, fx))
        if mask.any():
            self._mask[block.slices] = mask
        clock.lap("write")
        pieces, vertices = trace(mask, probability, (block.start[0], block.start[1]))
        clock.lap("polygons")
        seconds = {f"seconds_{stage}": np.array(s) for stage, s in clock.seconds.items()}
        arrays = pieces.as_arrays() | {"vertices": vertices, "predicted": np.array(predicted)}
        self._plan.store.finish_block(block, arrays | seconds)
        return predicted

    def _predict(
        self, block: Block, clock: Clock
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16], int]:
        """Return class and probability of a block's mask pixels, and how many patches it took."""
        start, stop = self._plan.box(block)
        wanted = self._plan.grid.touching(start, stop)
        with self._cache.claim(wanted) as claim:
            pixels, corner = self._read(claim.mine)
            clock.lap("read")
            wait(claim.others.values())  # before the lock: whoever predicts them needs it
            with self._computing:
                clock.skip()
                canvas = Canvas(start, stop, self._predictor.channels, self._predictor.device)
                fresh = self._predictor.predict(
                    pixels, self._plan.grid.origins[claim.mine] - corner
                )
                for patch in wanted:
                    origin = tuple(self._plan.grid.origins[patch].tolist())
                    canvas.add(origin, claim.result(patch, fresh), self._windows.weight(origin))
                mask, probability = self._classify(canvas.finish(), start, block)
                clock.lap("predict")
        return mask, probability, len(claim.mine)

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
        return self._view.read((y, x), (height, width)), low

    def _classify(
        self, probabilities: torch.Tensor, origin: Shape, block: Block
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
        """Return class and probability (in 1/65535) at each mask pixel of a block."""
        mask = np.empty(block.shape, np.uint8)
        probability = np.empty(block.shape, np.uint16)
        rows = iter_sampled_rows(
            probabilities,
            (origin[0], origin[1]),
            start=(block.start[0], block.start[1]),
            stop=(block.stop[0], block.stop[1]),
            ratio=self._plan.ratio,
            shape=(self._plan.grid.shape[0], self._plan.grid.shape[1]),
        )
        for row, sampled in rows:
            if len(sampled) == 1:
                chosen = sampled[0] > 0.5
                best = torch.where(chosen, sampled[0], 1 - sampled[0])
            else:
                best, chosen = sampled.max(0)
            part = slice(row, row + sampled.shape[1])
            mask[part] = chosen.to(torch.uint8).cpu().numpy()
            probability[part] = (best * PROBABILITY_ONE).round().to(torch.int32).cpu().numpy()
        return mask, probability


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
