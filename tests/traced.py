"""Small masks, and their outlines, traced in blocks as the pipeline does it."""

from __future__ import annotations

import numpy as np
import shapely
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from wsi_pipeline.export.polygons.components import (
    PROBABILITY_ONE,
    BlockComponents,
    find_components,
)
from wsi_pipeline.export.polygons.trace import Outlines, find_outlines
from wsi_pipeline.geometry import Shape, iter_blocks

TILE = 32

shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))
masks = shapes.flatmap(lambda s: hnp.arrays(np.uint8, s, elements=st.integers(0, 3)))
binary = shapes.flatmap(lambda s: hnp.arrays(np.uint8, s, elements=st.sampled_from([0, 1, 1, 1])))


def blobs(seed: int, classes: int = 4, side: int = 200, sigma: float = 6) -> np.ndarray:
    """Return a square mask of blobs, of about `sigma` pixels."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((classes, side, side)), (0, sigma, sigma))
    return fields.argmax(0).astype(np.uint8)


def same(some: np.ndarray, others: np.ndarray) -> bool:
    """Return whether polygons are the same to the last vertex, in the same order."""
    return len(some) == len(others) and bool((shapely.to_wkb(some) == shapely.to_wkb(others)).all())


def components_of(
    mask: np.ndarray, block_size: int, probability: np.ndarray | int | None = PROBABILITY_ONE
) -> dict[Shape, BlockComponents]:
    """Find the components of regions in the blocks that hold anything; return them."""
    if probability is not None:
        probability = np.broadcast_to(np.asarray(probability, np.uint16), mask.shape)
    return {
        b.index: find_components(
            mask[b.slices].copy(),
            None if probability is None else probability[b.slices].copy(),
            (b.start[0], b.start[1]),
        )
        for b in iter_blocks(mask.shape, (block_size, block_size))
        if mask[b.slices].any()
    }


def outlines_of(
    mask: np.ndarray,
    block_size: int = 64,
    probability: np.ndarray | int | None = PROBABILITY_ONE,
    *,
    tolerance: float = 0,
    min_pixels: float = 0,
    threads: int = 1,
) -> Outlines:
    """Trace a mask in blocks and follow its borders; return the outlines."""
    return find_outlines(
        mask,
        components_of(mask, block_size, probability),
        block_size=block_size,
        tolerance=tolerance,
        min_pixels=min_pixels,
        tile=TILE,
        threads=threads,
    )
