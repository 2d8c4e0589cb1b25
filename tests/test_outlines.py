"""Outlines come from blocks of a mask on disk, whatever was left out, in little memory."""

import tracemalloc

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from traced import binary, blobs, components_of, masks, outlines_of, same

from wsi_pipeline.errors import StoreError
from wsi_pipeline.export.polygons.build import map_polygons, polygons
from wsi_pipeline.export.polygons.trace import find_outlines, trace_mask
from wsi_pipeline.geometry import iter_blocks


def test_small_regions_and_holes_are_left_out_together():
    mask = np.ones((30, 30), np.uint8)
    mask[5:7, 5:7] = 2  # region of 4 px in a hole of 4 px
    mask[15:25, 15:25] = 2
    for block_size in (4, 64):
        big, inner = polygons(outlines_of(mask, block_size, min_pixels=10))
        assert len(big.interiors) == 1
        assert (big.area, inner.area) == (800, 100)


@settings(max_examples=100, deadline=None)
@given(st.one_of(masks, binary), st.integers(1, 9), st.integers(1, 6))
def test_leaving_small_regions_out_is_as_if_they_were_background(mask, block_size, least):
    early = outlines_of(mask, block_size, min_pixels=least)
    everything = outlines_of(mask)
    kept = everything.regions.pixels >= least
    late = [
        shapely.Polygon(p.exterior, [r for r in p.interiors if shapely.Polygon(r).area >= least])
        for p in polygons(everything)[kept]
    ]
    assert same(polygons(early), late)
    assert (early.regions.first == everything.regions.first[kept]).all()


class Repeated:
    """A mask that is computed where it is read, so of any size without memory."""

    def __init__(self, pattern, shape):
        self.pattern, self.shape = pattern, shape

    def __getitem__(self, key):
        lines = zip(key, self.pattern.shape, strict=True)
        return self.pattern[np.ix_(*(np.arange(k.start, k.stop) % n for k, n in lines))]


@pytest.mark.slow
@pytest.mark.parametrize(("tolerance", "limit"), [(0, 35), (2, 90)])
def test_memory_is_some_bytes_for_each_vertex_that_is_left(monkeypatch, tolerance, limit):
    """On noise, with only seven vertices an arc, and three when simplified."""
    monkeypatch.setattr("wsi_pipeline.export.polygons.simplify.VERTICES", 20_000)
    monkeypatch.setattr("wsi_pipeline.export.polygons.build.BATCH", 20_000)
    pattern, peaks, left = blobs(0, side=512, sigma=3), [], []
    for width in (1024, 4096):
        mask = Repeated(pattern, (1024, width))
        components = trace_mask(mask, iter_blocks(mask.shape, (512, 512)))
        tracemalloc.start()
        outlines = find_outlines(
            mask, components, block_size=512, tolerance=tolerance, tile=512, threads=1
        )
        assert sum(map_polygons(outlines, lambda _, shapes: len(shapes), threads=1)) > 1000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        left.append(len(outlines.arcs.xy))
    assert peaks[1] - peaks[0] < limit * (left[1] - left[0])


def test_a_finished_mask_is_traced_as_its_blocks_were():
    mask = blobs(8)
    blocks = list(iter_blocks(mask.shape, (64, 64)))
    noted, later = components_of(mask, 64), trace_mask(mask, blocks, threads=2)
    assert set(noted) == set(later)
    for index, components in later.items():
        assert components.probability is None
        for name, array in components.as_arrays().items():
            assert (array == getattr(noted[index], name)).all()
    found = find_outlines(mask, {**noted, (0, 0): later[0, 0]}, block_size=64)
    assert found.regions.probability is None  # of some regions it is not known
    assert same(polygons(found), polygons(outlines_of(mask)))


def test_another_mask_than_the_one_traced_is_refused():
    mask = blobs(8)
    components = components_of(mask, 64)
    with pytest.raises(StoreError, match="--overwrite"):
        find_outlines(np.zeros_like(mask), components, block_size=64)
