"""Geometry: every pixel covered, blocks disjoint and complete."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.geometry import PatchGrid, iter_blocks

axis = st.integers(1, 90)


@st.composite
def grids(draw, dimensions=(1, 2, 3)):
    d = draw(st.sampled_from(dimensions))
    shape = tuple(draw(st.integers(1, 60)) for _ in range(d))
    patch = tuple(draw(st.integers(1, 24)) for _ in range(d))
    overlap = tuple(draw(st.integers(0, p - 1)) for p in patch)
    return PatchGrid.cover(shape, patch, overlap)


@settings(deadline=None)  # a volume takes as long as the machine is busy
@given(grids())
def test_every_pixel_is_covered_and_no_patch_lies_outside(grid):
    covered = np.zeros(grid.shape, int)
    for origin in grid.origins:
        covered[tuple(slice(o, o + p) for o, p in zip(origin, grid.patch_size, strict=True))] += 1
    assert covered.min() >= 1
    last = np.maximum(np.array(grid.shape) - grid.patch_size, 0)
    assert (grid.origins >= 0).all()
    assert (grid.origins <= last).all()


@given(grids())
def test_origins_are_unique_and_row_major(grid):
    as_tuples = [tuple(o) for o in grid.origins.tolist()]
    assert as_tuples == sorted(set(as_tuples))


@given(grids(dimensions=(2,)), st.data())
def test_touching_equals_brute_force(grid, data):
    start = tuple(data.draw(st.integers(0, n - 1)) for n in grid.shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, grid.shape, strict=True))
    expected = [
        i
        for i, (y, x) in enumerate(grid.origins)
        if y < stop[0]
        and y + grid.patch_size[0] > start[0]
        and x < stop[1]
        and x + grid.patch_size[1] > start[1]
    ]
    assert grid.touching(start, stop).tolist() == expected


@given(st.tuples(axis, axis), st.tuples(axis, axis))
def test_blocks_are_disjoint_and_complete(shape, size):
    owners = np.zeros(shape, int)
    names = []
    for block in iter_blocks(shape, size):
        assert owners[block.slices].shape == block.shape
        owners[block.slices] += 1
        names.append(block.name)
    assert (owners == 1).all()
    assert names == sorted(set(names))


@pytest.mark.parametrize("overlap", [(4, 0), (-1, 0), (0, 7)])
def test_an_overlap_that_is_not_below_the_patch_is_refused(overlap):
    with pytest.raises(ValueError, match="below the patch size"):
        PatchGrid.cover((10, 10), (4, 4), overlap)


def test_axes_must_be_as_many():
    with pytest.raises(ValueError, match="unequal axes"):
        PatchGrid.cover((10, 10), (4, 4), (1,))
