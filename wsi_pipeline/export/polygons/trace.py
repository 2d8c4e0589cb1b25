"""From a mask to the arcs of its regions, block by block, in threads.

The mask is never in memory as a whole, only its arcs. They are simplified twice: within tiles, so
that of each block only what is left is held, and then as wholes, where tiles have cut them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import StoreError
from wsi_pipeline.export import MaskLike
from wsi_pipeline.export.polygons.arcs import Arcs, Ends, Numbers, follow_borders, join_fragments
from wsi_pipeline.export.polygons.components import (
    BlockComponents,
    Index,
    Mask,
    Regions,
    find_components,
    join,
    label,
)
from wsi_pipeline.export.polygons.simplify import simplify
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Block, iter_blocks

TILE = 1024
"""Side of the squares within which arcs are simplified first, so that little is held of each."""
STRIP = 256
"""Rows of a block that are searched for vertices at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outlines:
    """The regions of a mask and the borders between them.

    Attributes:
        regions: in the order of their numbers, the first having number 1.
        is_exact: whether the arcs follow pixel edges, or were simplified.
    """

    regions: Regions
    arcs: Arcs
    is_exact: bool


def trace_mask(
    mask: MaskLike,
    blocks: Iterable[Block],
    *,
    sure: Callable[[Block, Mask], npt.NDArray[np.uint16]] | None = None,
    threads: int | None = None,
) -> dict[Index, BlockComponents]:
    """Find the components of blocks of a finished mask; return them by row and column.

    Args:
        mask: class of each pixel.
        sure: returns the probability, in 1/65535, of the classes of a block; None = it is not
            known.
    """

    def trace(block: Block) -> tuple[Index, BlockComponents]:
        pixels, origin = np.asarray(mask[block.slices]), (block.start[0], block.start[1])
        return block.index, find_components(pixels, sure and sure(block, pixels), origin)

    return dict(map_in_threads(trace, blocks, threads=threads))


def find_outlines(
    mask: MaskLike,
    components: Mapping[Index, BlockComponents],
    *,
    block_size: int,
    tolerance: float = 0,
    min_pixels: float = 0,
    tile: int = TILE,
    threads: int | None = None,
) -> Outlines:
    """Follow the borders of a mask's regions, and simplify them; return the outlines.

    Blocks, threads and their order leave no trace in them.

    Args:
        mask: class of each pixel.
        components: Components of each block that holds anything, by its row and column.
        tolerance: root of the largest triangle to cut off, in mask pixels; 0 = exact. See
            `wsi_pipeline.export.polygons.simplify`.
        min_pixels: smaller regions are left out, and smaller holes filled.
        tile: side of the squares within which arcs are simplified first. What is left depends on
            it a little, so blocks are made of whole ones.

    Raises:
        StoreError: the mask is not the one that the components were found in.
    """
    if tolerance > 0 and block_size % tile and block_size < max(mask.shape):
        raise ValueError(f"a block of {block_size} px is not made of whole tiles of {tile} px")
    components = {index: c for index, c in components.items() if len(c.value)}
    regions = join(components, min_pixels=min_pixels)
    every = iter_blocks((mask.shape[0], mask.shape[1]), (block_size, block_size))
    # a block owns its upper and left border only: what ends at the others is its neighbours'
    steps = [(0, 0), (0, 1), (1, 0), (1, 1)]
    wanted = {(row + y, column + x) for row, column in components for y, x in steps}
    blocks = [block for block in every if block.index in wanted]

    def follow(block: Block) -> tuple[Arcs, Ends]:
        around = _Surroundings.of(block, mask, components, regions)
        arcs, ends = follow_borders(*around.places())
        cut = arcs.is_at_cut(tile)
        # a hole over several tiles may be over several blocks: such are known when all are joined
        kept = ~arcs.is_small_hole(min_pixels) | np.logical_or.reduceat(cut, arcs.bounds[:-1])
        cut = cut[np.repeat(kept, arcs.sizes)]
        arcs, ends = arcs.keep_arcs(kept), ends.keep_arcs(kept)
        if tolerance == 0:
            return arcs, ends
        cut[arcs.bounds[ends.arc + ends.is_last] - ends.is_last] = True
        return simplify(arcs, tolerance=tolerance, is_loose=cut), ends

    arcs = join_fragments(list(map_in_threads(follow, blocks, threads=threads)))
    arcs = arcs.keep_arcs(~arcs.is_small_hole(min_pixels))
    if tolerance > 0:
        arcs = simplify(arcs, tolerance=tolerance)
    return Outlines(regions=regions, arcs=arcs, is_exact=tolerance == 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Surroundings:
    """A block with the pixels along its upper and left border; beyond the mask is background.

    Attributes:
        origin: (y, x) of the first pixel.
        mask: (h, w) class of each pixel.
        labels: (h, w) component of each pixel.
        numbers: (labels + 1,) number of the region of each label.
        above: (w + 1,) numbers of the regions in the row above, from the corner on.
        beside: (h,) numbers of the regions in the column to the left.
        value: (numbers + 1,) class of each region.
        is_last: whether nothing comes below, and to the right.
    """

    origin: tuple[int, int]
    mask: Mask
    labels: Numbers
    numbers: Numbers
    above: Numbers
    beside: Numbers
    value: Mask
    is_last: tuple[bool, bool]

    @classmethod
    def of(
        cls,
        block: Block,
        mask: MaskLike,
        components: Mapping[Index, BlockComponents],
        regions: Regions,
    ) -> Self:
        """Read and label a block."""
        (row, column), (height, width) = block.index, block.shape
        numbers, pixels = np.zeros(1, np.int32), np.zeros((height, width), np.uint8)
        labels = np.zeros(pixels.shape, np.int32)
        if block.index in components:
            numbers, pixels = regions.numbers[block.index], np.asarray(mask[block.slices])
            labels, count = label(pixels)
            if count != len(numbers) - 1:
                raise StoreError(
                    f"the mask has {count} pieces of regions where {len(numbers) - 1} were found "
                    f"before (pixel {block.start}); run again with --overwrite"
                )

        def side(index: Index, name: str, length: int) -> Numbers:
            if index not in components:
                return np.zeros(length, np.int32)
            labels: Numbers = getattr(components[index], name)
            return regions.numbers[index][labels]

        corner = side((row - 1, column - 1), "bottom", 1)[-1:]
        return cls(
            origin=(block.start[0], block.start[1]),
            mask=pixels,
            labels=labels,
            numbers=numbers,
            above=np.concatenate([corner, side((row - 1, column), "bottom", width)]),
            beside=side((row, column - 1), "right", height),
            value=np.concatenate([np.zeros(1, np.uint8), regions.value]),
            is_last=(block.stop[0] == mask.shape[0], block.stop[1] == mask.shape[1]),
        )

    def places(self) -> tuple[Numbers, Numbers, Numbers]:
        """Return y and x of all places that may be vertices, and the (4, n) numbers around."""
        height, width = self.mask.shape
        rows = height + self.is_last[0]
        strips = [self.corners(y, min(y + STRIP, rows)) for y in range(0, rows, STRIP)]
        y, x = (np.concatenate(column) for column in zip(*strips, strict=True))
        around = []
        for at_y, at_x in ((y + dy, x + dx) for dy in (-1, 0) for dx in (-1, 0)):
            place = at_y.astype(np.int64) * width + at_x
            found: Numbers = self.numbers[self.labels.ravel().take(place, mode="clip")]
            found[(at_y == height) | (at_x == width)] = 0
            is_beside = (at_x < 0) & (at_y >= 0) & (at_y < height)
            found[is_beside] = self.beside[at_y[is_beside]]
            is_above = (at_y < 0) & (at_x < width)
            found[is_above] = self.above[at_x[is_above] + 1]
            around.append(found)
        return y + self.origin[0], x + self.origin[1], np.stack(around)

    def corners(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        """Return y and x in some rows where classes meet otherwise than along a straight edge."""
        height, width = self.mask.shape
        pixels = np.zeros((stop - start + 1, width + 1 + self.is_last[1]), np.uint8)
        first, last = max(start - 1, 0), min(stop, height)
        inner = pixels[first - start + 1 : last - start + 1]
        inner[:, 1 : width + 1] = self.mask[first:last]
        inner[:, 0] = self.value[self.beside[first:last]]
        if start == 0:
            pixels[0, : width + 1] = self.value[self.above]
        across, down = pixels[:, 1:] != pixels[:, :-1], pixels[1:] != pixels[:-1]
        wanted = (across[:-1] | across[1:]) & (down[:, :-1] | down[:, 1:])
        y, x = np.divmod(np.flatnonzero(wanted).astype(np.int32), np.int32(wanted.shape[1]))
        return y + np.int32(start), x
