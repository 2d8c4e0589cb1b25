"""Simplified outlines are valid, share their borders, and are the same however the mask was cut."""

import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from traced import TILE, binary, blobs, components_of, masks, outlines_of, same

from wsi_pipeline.export.polygons.build import polygons
from wsi_pipeline.export.polygons.trace import find_outlines


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [1.0, 3.0, 12.0])
def test_simplified_neighbours_leave_no_gap_and_no_overlap(seed, tolerance):
    mask = blobs(seed) + 1  # no background: the coverage is the whole square
    simple = polygons(outlines_of(mask, 64, tolerance=tolerance))
    assert shapely.is_valid(simple).all()
    assert shapely.coverage_is_valid(simple)
    assert shapely.area(simple).sum() == pytest.approx(shapely.union_all(simple).area)
    union = shapely.coverage_union_all(simple)
    assert shapely.get_num_interior_rings(shapely.get_parts(union)).sum() == 0
    assert union.area > 0.99 * mask.size  # the square's own corners may go


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(masks, binary), st.sampled_from([0.7, 1.0, 1.5, 2.5, 5.0, 50.0]), st.integers(0, 6)
)
def test_simplified_outlines_are_valid_and_apart_whatever_the_mask(mask, tolerance, least):
    """Noise of single pixels, where regions touch themselves and each other at corners."""
    exact = outlines_of(mask, 64, min_pixels=least)
    simple = outlines_of(mask, 64, tolerance=tolerance, min_pixels=least)
    shapes = polygons(simple)
    assert shapely.is_valid(shapes).all()
    assert shapely.coverage_is_valid(shapes)
    assert shapely.union_all(shapes).area == pytest.approx(shapely.area(shapes).sum())
    holes = [shapely.get_num_interior_rings(polygons(o)).tolist() for o in (exact, simple)]
    assert holes[0] == holes[1]


@pytest.mark.parametrize("seed", range(4))
def test_simplification_keeps_areas_and_regions(seed):
    mask = blobs(seed)
    outlines = outlines_of(mask)
    regions, exact = outlines.regions, polygons(outlines)
    simple = polygons(outlines_of(mask, tolerance=2))
    assert len(exact) == len(simple)
    assert (
        shapely.get_num_coordinates(simple).sum() < 0.5 * shapely.get_num_coordinates(exact).sum()
    )
    big = regions.pixels > 1000
    overlap = shapely.area(shapely.intersection(exact[big], simple[big]))
    iou = overlap / (shapely.area(exact[big]) + shapely.area(simple[big]) - overlap)
    assert iou.min() > 0.9
    for value in (1, 2, 3):
        chosen = regions.value == value
        assert shapely.area(simple[chosen]).sum() == pytest.approx(
            regions.pixels[chosen].sum(), rel=0.01
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tolerance", [1.0, 2.0, 4.0])
def test_simplification_is_much_the_same_as_that_of_geos(seed, tolerance):
    """Another implementation of Visvalingam–Whyatt on coverages."""
    mask = blobs(seed, side=400, sigma=8)
    simple = polygons(outlines_of(mask, tolerance=tolerance))
    noded = polygons(outlines_of(mask, tolerance=0.1))  # too little for any triangle
    theirs = shapely.coverage_simplify(noded, tolerance)
    ours, geos = (
        shapely.get_num_coordinates(simple).sum(),
        shapely.get_num_coordinates(theirs).sum(),
    )
    assert 0.85 * geos < ours < 1.15 * geos
    overlap = shapely.area(shapely.intersection(simple, noded)).sum()
    assert overlap > 0.99 * shapely.area(shapely.intersection(theirs, noded)).sum()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 2.0, 6.0]),
    st.sampled_from([0, 1, 12]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1.0, 2.0, 5.0]),
)
def test_simplification_does_not_depend_on_the_cut(seed, tolerance, least, blocks, sigma):
    mask = blobs(seed, side=100, sigma=sigma)
    options = {"tolerance": tolerance, "min_pixels": least}
    one = polygons(outlines_of(mask, 128, **options))
    many = polygons(outlines_of(mask, blocks * TILE, threads=3, **options))
    assert same(one, many)


def test_all_vertices_that_remain_are_of_the_exact_outline():
    mask = blobs(5)
    exact, simple = (
        {tuple(p) for p in shapely.get_coordinates(polygons(o)).tolist()}
        for o in (outlines_of(mask), outlines_of(mask, tolerance=3))
    )
    assert simple < exact


@pytest.mark.parametrize("tolerance", [1.0, 2.0, 4.0])
def test_tiles_leave_no_seam(tolerance):
    """Nothing stays because it lies where two tiles meet."""
    mask = blobs(3, side=512, sigma=8)
    one, many = (
        find_outlines(
            mask, components_of(mask, 512), block_size=512, tolerance=tolerance, tile=tile
        )
        for tile in (512, 16)
    )
    assert len(many.arcs.xy) < 1.01 * len(one.arcs.xy)


def test_blocks_that_are_not_made_of_whole_tiles_are_refused():
    with pytest.raises(ValueError, match="whole tiles of 32 px"):
        outlines_of(blobs(0), 40, tolerance=1)
