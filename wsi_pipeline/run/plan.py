"""What a worker must know to do any block of a mask, whatever the source is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import SourceError
from wsi_pipeline.geometry import Block, PatchGrid, Shape, iter_blocks, sample_positions
from wsi_pipeline.options import PredictOptions
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources.pixels import PixelSource

if TYPE_CHECKING:
    # With scikit-image, which is not needed to read a plan.
    from wsi_pipeline.tissue.quality import Look


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a worker must know to do any block of a mask, in any number of dimensions.

    Attributes:
        pixels: the source.
        fingerprint: of the source, when it was planned.
        bundle_path: folder of the bundle.
        model: digest of the bundle.
        store: the run's working folder.
        grid: the patches to predict.
        downsample: source pixels per grid pixel along each axis.
        mask_shape: pixels along each axis of the mask.
        mask_downsample: source pixels per mask pixel along each axis.
        block_shape: of a block in mask pixels.
        is_mirrored: whether the grid runs through the last axis in reverse order.
        predict: how.
        roi: GeoJSON to which the mask is limited.
        roi_offset: (x, y) of its origin in source pixels.
        threads: of the CPU for one worker's forward passes.
        outlines: whether to trace regions for polygons.
        cell: side, in grid pixels, of what probabilities are kept of; 0 = they are not kept.
        look: what cells are held against to judge their quality; None = they are not judged.
        unpadded: grid pixels along each axis that lie on the source; none = all.
        crop: first source pixel of the grid, and one past the last; all else of the mask, whose
            pixels are the source's, is background. None = the grid covers the source.
        nearest: axis along which the mask takes the nearest grid pixel; None = it interpolates.
    """

    pixels: PixelSource
    fingerprint: str
    bundle_path: Path
    model: str
    store: RunStore
    grid: PatchGrid
    downsample: tuple[float, ...]
    mask_shape: Shape
    mask_downsample: tuple[float, ...]
    block_shape: Shape
    is_mirrored: bool = False
    predict: PredictOptions
    roi: Path | None = None
    roi_offset: tuple[int, int] = (0, 0)
    threads: int
    outlines: bool
    cell: int = 0
    look: Look | None = None
    unpadded: Shape = ()
    crop: tuple[Shape, Shape] | None = None
    nearest: int | None = None

    @property
    def ratio(self) -> tuple[float, ...]:
        """Return grid pixels per mask pixel along each axis."""
        return tuple(m / g for m, g in zip(self.mask_downsample, self.downsample, strict=True))

    @property
    def offset(self) -> tuple[float, ...]:
        """Return where the mask begins along each axis, in grid pixels."""
        if self.crop is None:
            return (0.0,) * len(self.downsample)
        return tuple(-a / step for a, step in zip(self.crop[0], self.downsample, strict=True))

    def seen(self, block: Block) -> Block:
        """Return where a block's mask lies to the grid, which may be mirrored."""
        if not self.is_mirrored:
            return block
        width = self.mask_shape[-1]
        start = (*block.start[:-1], width - block.stop[-1])
        return replace(block, start=start, stop=(*block.stop[:-1], width - block.start[-1]))

    def box(self, block: Block) -> tuple[Shape, Shape]:
        """Return the grid pixels [start, stop) whose probabilities a block needs."""
        low, high, block = [], [], self.seen(block)
        axes = zip(block.start, block.stop, self.ratio, self.grid.shape, self.offset, strict=True)
        for start, stop, ratio, length, offset in axes:
            floor, fraction = sample_positions(
                start, stop, ratio=ratio, length=length, offset=offset
            )
            low.append(int(floor[0]))
            high.append(int(floor[-1]) + (2 if fraction[-1] else 1))
        if self.cell:
            first, last = self.cells(block)
            low = [min(a, b * self.cell) for a, b in zip(low, first, strict=True)]
            ends = zip(high, last, self.grid.shape, strict=True)
            high = [max(a, min(b * self.cell, n)) for a, b, n in ends]
        return tuple(low), tuple(high)

    @property
    def cells_shape(self) -> Shape:
        """Return how many cells the grid has along each axis, without what is padded."""
        return tuple(-(-n // self.cell) for n in self.unpadded or self.grid.shape)

    def cells(self, block: Block) -> tuple[Shape, Shape]:
        """Return the cells [start, stop) that are a block's alone: their centre lies in its mask.

        Borders of blocks are mask pixels, so that hardly one of them is a border of cells.
        """
        seen, ends = self.seen(block), list[Shape]()
        for corner in (seen.start, seen.stop):
            axes = zip(
                corner, self.mask_shape, self.ratio, self.offset, self.cells_shape, strict=True
            )
            ends.append(
                tuple(
                    count
                    if at == length
                    else min(count, max(0, math.ceil((at * r + o) / self.cell - 0.5)))
                    for at, length, r, o, count in axes
                )
            )
        return ends[0], ends[1]

    @cached_property
    def _needs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the patches of each block in turn, where each one's end, and pixels of each.

        Boxes of blocks are alike along an axis, so that patches find theirs by bisection.
        """
        every = list(iter_blocks(self.mask_shape, self.block_shape))
        patches, numbers = np.arange(len(self.grid)), np.zeros(len(self.grid), np.int64)
        pixels = np.ones(len(self.grid), np.int64)
        axes = zip(self.grid.origins.T, self.grid.patch_size, self._counts, strict=True)
        for axis, (origins, size, count) in enumerate(axes):
            edge = [b for b in every if not any(b.index[:axis] + b.index[axis + 1 :])]
            step = -1 if self.is_mirrored and axis + 1 == len(self._counts) else 1
            low, high = np.array([self.box(b) for b in edge])[::step, :, axis].T
            first = np.searchsorted(high, origins, side="right")
            last = np.searchsorted(low, origins + size)
            if step < 0:
                first, last = count - last, count - first
            touched = (last - first)[patches]
            patches, numbers, pixels = (np.repeat(a, touched) for a in (patches, numbers, pixels))
            turn = np.arange(len(patches)) - np.repeat(np.cumsum(touched) - touched, touched)
            row, origin = first[patches] + turn, origins[patches]
            numbers = numbers * count + row
            pixels *= np.minimum(high[::step][row], origin + size) - np.maximum(
                low[::step][row], origin
            )
        order = np.argsort(numbers, kind="stable")
        ends = np.cumsum(np.bincount(numbers, minlength=len(every)))
        return patches[order], np.append(0, ends), pixels[order]

    @property
    def _counts(self) -> Shape:
        """Return how many blocks there are along each axis."""
        return tuple(-(-n // b) for n, b in zip(self.mask_shape, self.block_shape, strict=True))

    def patches(self, block: Block) -> npt.NDArray[np.int64]:
        """Return the indices, ascending, of the patches that a block's mask needs."""
        patches, ends, _ = self._needs
        number = np.ravel_multi_index(block.index, self._counts)
        return patches[ends[number] : ends[number + 1]]

    def blocks(self) -> list[Block]:
        """Return the blocks that some patch touches; all others stay background."""
        every = iter_blocks(self.mask_shape, self.block_shape)
        return [block for block, n in zip(every, np.diff(self._needs[1]), strict=True) if n]

    def uses(self, blocks: Sequence[Block]) -> npt.NDArray[np.int64]:
        """Return (n,) how many of some blocks need each patch."""
        needed = [self.patches(block) for block in blocks]
        return np.bincount(np.concatenate([[], *needed]).astype(int), minlength=len(self.grid))

    def part(self, patch: int, block: Block) -> tuple[slice, ...]:
        """Return which pixels of a patch lie in the box of a block."""
        start, stop = self.box(block)
        axes = zip(
            self.grid.origins[patch].tolist(), self.grid.patch_size, start, stop, strict=True
        )
        return tuple(slice(max(a - o, 0), min(b - o, size)) for o, size, a, b in axes)

    @cached_property
    def straddling(self) -> int:
        """Return of how many pixels predictions are kept at the most for blocks to come."""
        patches, ends, pixels = self._needs
        count = len(ends) - 1
        numbers = np.repeat(np.arange(count), np.diff(ends))
        made = np.zeros(len(self.grid), np.int64)
        # the first block that needs a patch makes it: written last
        made[patches[::-1]] = numbers[::-1]
        kept, let_go = (np.bincount(at, pixels, count) for at in (made[patches], numbers))
        return int(np.cumsum(kept - let_go).max(initial=0))

    def check_fingerprint(self, fingerprint: str) -> None:
        """Refuse a source that is not the one that was planned; return nothing.

        Raises:
            SourceError: another one.
        """
        if fingerprint != self.fingerprint:
            raise SourceError(
                f"{self.pixels.path}: its content was replaced while it was segmented; put the "
                "first one back and give the same command again, or start anew with --overwrite"
            )
