"""Regions of a small mask, traced in blocks, as the pipeline does it."""

from __future__ import annotations

import numpy as np

from wsi_pipeline.export.polygons import PROBABILITY_ONE, Regions, join, trace
from wsi_pipeline.grid import iter_blocks


def regions_of(
    mask: np.ndarray,
    block_size: int = 64,
    probability: np.ndarray | int = PROBABILITY_ONE,
    min_pixels: float = 0,
) -> Regions:
    """Trace a mask in blocks and join them; return the regions."""
    level = np.broadcast_to(np.asarray(probability, np.uint16), mask.shape)
    traced = {
        b.index: trace(mask[b.slices].copy(), level[b.slices].copy(), b.start)
        for b in iter_blocks(mask.shape, (block_size, block_size))
        if mask[b.slices].any()
    }
    pieces = {index: pieces for index, (pieces, _) in traced.items()}
    return join(pieces, lambda index: traced[index][1], min_pixels=min_pixels)
