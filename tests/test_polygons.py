"""Outlines are exact, joined over blocks, and the same however the mask was cut."""

import tracemalloc

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.features import rasterize
from rasterio.features import shapes as rasterio_shapes
from scipy import ndimage
from traced import TILE, outlines_of, pieces_of

from wsi_pipeline.errors import StoreError
from wsi_pipeline.export import polygons as polygons_module
from wsi_pipeline.export.outlines import find_outlines, trace_mask
from wsi_pipeline.export.polygons import map_polygons, polygons
from wsi_pipeline.grid import iter_blocks

shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))
masks = shapes.flatmap(lambda s: hnp.arrays(np.uint8, s, elements=st.integers(0, 3)))
binary = shapes.flatmap(lambda s: hnp.arrays(np.uint8, s, elements=st.sampled_from([0, 1, 1, 1])))


def components(mask):
    """Return how many 4-connected regions each class has."""
    return {int(v): ndimage.label(mask == v)[1] for v in np.unique(mask) if v}


def rasterised(polys, values, shape):
    if len(polys) == 0:
        return np.zeros(shape, np.uint8)
    return rasterize(zip(polys, values.tolist(), strict=True), out_shape=shape, dtype=np.uint8)


@settings(max_examples=300, deadline=None)
@given(st.one_of(masks, binary))
def test_outlines_are_exact(mask):
    outlines = outlines_of(mask)
    regions, polys = outlines.regions, polygons(outlines)
    assert shapely.is_valid(polys).all()
    assert (shapely.get_type_id(polys) == shapely.GeometryType.POLYGON).all()
    assert (rasterised(polys, regions.value, mask.shape) == mask).all()
    assert (shapely.area(polys) == regions.pixels).all()
    counts = np.bincount(regions.value, regions.pixels, minlength=4)
    assert (counts[1:] == np.bincount(mask.ravel(), minlength=4)[1:]).all()
    found = {int(v): int((regions.value == v).sum()) for v in np.unique(regions.value)}
    assert found == components(mask)


@settings(max_examples=200, deadline=None)
@given(st.one_of(masks, binary))
def test_holes_are_the_components_of_the_rest(mask):
    """Holes of a region = 4-connected components of what is not it, padded, less the outside."""
    outlines = outlines_of(mask)
    regions = outlines.regions
    for value in set(regions.value.tolist()):
        labels, count = ndimage.label(mask == value)
        expected = sorted(
            ndimage.label(np.pad(labels != i, 1, constant_values=True))[1] - 1
            for i in range(1, count + 1)
        )
        polys = polygons(outlines)[regions.value == value]
        assert sorted(shapely.get_num_interior_rings(polys).tolist()) == expected


@settings(max_examples=150, deadline=None)
@given(st.one_of(masks, binary), st.integers(1, 9), hnp.arrays(np.uint16, (14, 14)))
def test_the_cut_leaves_no_trace(mask, block_size, noise):
    probability = noise[: mask.shape[0], : mask.shape[1]]
    whole = outlines_of(mask, probability=probability)
    cut = outlines_of(mask, block_size, probability, threads=2)
    assert same(polygons(whole), polygons(cut))
    for name in ("value", "pixels", "probability", "first"):
        assert (getattr(whole.regions, name) == getattr(cut.regions, name)).all()


@settings(max_examples=150, deadline=None)
@given(st.one_of(masks, binary))
def test_rings_are_as_the_writer_promises(mask):
    for polygon in polygons(outlines_of(mask)):
        for ring, sign in [(polygon.exterior, 1), *((r, -1) for r in polygon.interiors)]:
            xy = np.array(ring.coords)
            assert (xy[0] == xy[-1]).all()
            assert len({tuple(p) for p in xy[:-1]}) == len(xy) - 1 >= 4
            x, y = xy.T
            area = 0.5 * (x[:-1] * y[1:] - x[1:] * y[:-1]).sum()
            assert sign * area > 0
            steps = np.diff(xy, axis=0)
            assert ((steps != 0).sum(axis=1) == 1).all()  # along pixel edges
            turns = (steps[:-1] != 0) != (steps[1:] != 0)
            assert turns.any(axis=1).all()  # no vertex in the middle of an edge


def test_pixels_that_touch_at_a_corner_are_two_regions():
    assert len(polygons(outlines_of(np.array([[1, 0], [0, 1]], np.uint8)))) == 2


def test_holes_that_touch_at_a_corner_stay_two_rings():
    mask = np.ones((4, 4), np.uint8)
    mask[1, 1] = mask[2, 2] = 0
    (polygon,) = polygons(outlines_of(mask))
    assert len(polygon.interiors) == 2


def test_an_island_in_a_hole_is_a_region_of_its_own():
    mask = np.ones((7, 7), np.uint8)
    mask[1:6, 1:6] = 0
    mask[3, 3] = 1
    ring, island = polygons(outlines_of(mask))
    assert len(ring.interiors) == 1
    assert ring.area == 24
    assert island.area == 1


def test_a_disc_with_hole_island_and_spur_keeps_them():
    """R3: a peer gave 88,463 px² for these 58,077, without holes, and 3,926 for the 4,100."""
    y, x = np.mgrid[:400, :400] - 199.5
    radius = np.hypot(y, x)
    disc = ((radius <= 150) & (radius > 70)) | (radius <= 30)
    mask = disc.astype(np.uint8)
    mask[200, 340:390] = 1
    mask[5:50, 5:50] = 2
    mask[50:95, 50:95] = 2
    outlines = outlines_of(mask, 128)
    regions, polys = outlines.regions, polygons(outlines)
    for value in (1, 2):
        assert polys[regions.value == value].shape == (2,)
        assert shapely.area(polys[regions.value == value]).sum() == (mask == value).sum()
    assert shapely.get_num_interior_rings(polys).sum() == 1


def test_objects_one_pixel_apart_across_a_border_stay_two():
    """R2: closing seams by buffers fuses what is near."""
    mask = np.zeros((32, 32), np.uint8)
    mask[4:28, 4:15] = 1
    mask[4:28, 16:28] = 1  # a gap of one column, at the border of 16-px blocks
    assert len(polygons(outlines_of(mask, 16))) == 2


def test_a_region_over_many_blocks_is_one_polygon_without_cuts():
    """R8 and X5."""
    mask = np.zeros((48, 48), np.uint8)
    mask[5:43, 5:43] = 1
    (polygon,) = polygons(outlines_of(mask, 16))
    assert polygon.equals_exact(shapely.box(5, 5, 43, 43).normalize().reverse(), 0) or (
        len(polygon.exterior.coords) == 5 and polygon.equals(shapely.box(5, 5, 43, 43))
    )


def test_moving_a_mask_moves_its_outlines_with_their_holes():
    """R6: with an offset a peer kept the first ring only."""
    mask = np.ones((5, 5), np.uint8)
    mask[2, 2] = 0
    moved = np.zeros((60, 60), np.uint8)
    moved[40:45, 30:35] = mask
    (here,), (there,) = polygons(outlines_of(mask)), polygons(outlines_of(moved, 16))
    shifted = shapely.transform(here, lambda xy: xy + np.array([30, 40]))
    assert shapely.equals_exact(shifted, there)


@pytest.mark.parametrize("offset", np.linspace(0, 200, 8))
@pytest.mark.parametrize("block_size", [17, 64, 400])
def test_a_disc_is_where_it_should_be(offset, block_size):
    """X9: no half-pixel shift, no drift."""
    centre = 60 + offset
    y, x = np.mgrid[:400, :400] + 0.5
    mask = (np.hypot(y - centre, x - 70) <= 40).astype(np.uint8)
    (polygon,) = polygons(outlines_of(mask, block_size))
    ys, xs = np.nonzero(mask)
    assert polygon.centroid.x == pytest.approx(xs.mean() + 0.5, abs=1e-9)
    assert polygon.centroid.y == pytest.approx(ys.mean() + 0.5, abs=1e-9)
    assert polygon.centroid.x == pytest.approx(70, abs=0.3)


def same(some, others):
    """Return whether polygons are the same to the last vertex, in the same order."""
    return len(some) == len(others) and bool((shapely.to_wkb(some) == shapely.to_wkb(others)).all())


@settings(max_examples=100, deadline=None)
@given(st.one_of(masks, binary), st.integers(1, 9))
def test_polygons_are_those_of_gdal(mask, block_size):
    """An independent oracle for holes and classes at once."""
    outlines = outlines_of(mask, block_size)
    found = zip(outlines.regions.value.tolist(), polygons(outlines), strict=True)
    expected = rasterio_shapes(mask, mask=mask > 0, connectivity=4)
    assert sorted((v, normal(shape)) for v, shape in found) == sorted(
        (int(v), normal(shapely.geometry.shape(shape))) for shape, v in expected
    )


def normal(polygon):
    return shapely.to_wkt(shapely.normalize(polygon), rounding_precision=0)


def blobs(seed, classes=4, side=200, sigma=6):
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((classes, side, side)), (0, sigma, sigma))
    return fields.argmax(0).astype(np.uint8)


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
    st.one_of(masks, binary),
    st.sampled_from([0.7, 1.0, 1.5, 2.5, 5.0, 50.0]),
    st.integers(0, 6),
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


def test_all_vertices_that_remain_are_of_the_exact_outline():
    mask = blobs(5)
    exact, simple = (
        {tuple(p) for p in shapely.get_coordinates(polygons(o)).tolist()}
        for o in (outlines_of(mask), outlines_of(mask, tolerance=3))
    )
    assert simple < exact


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


@pytest.mark.parametrize("tolerance", [1.0, 2.0, 4.0])
def test_tiles_leave_no_seam(tolerance):
    """Nothing stays because it lies where two tiles meet."""
    mask = blobs(3, side=512, sigma=8)
    one, many = (
        find_outlines(mask, pieces_of(mask, 512), block_size=512, tolerance=tolerance, tile=tile)
        for tile in (512, 16)
    )
    assert len(many.arcs.xy) < 1.01 * len(one.arcs.xy)


def test_blocks_that_are_not_made_of_whole_tiles_are_refused():
    with pytest.raises(ValueError, match="whole tiles of 32 px"):
        outlines_of(blobs(0), 40, tolerance=1)


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


def test_strips_of_a_tall_mask_leave_no_trace():
    mask = np.random.default_rng(3).integers(0, 3, (1030, 9)).astype(np.uint8)
    outlines = outlines_of(mask, 2000)
    polys = polygons(outlines)
    assert (rasterised(polys, outlines.regions.value, mask.shape) == mask).all()
    assert (shapely.area(polys) == outlines.regions.pixels).all()


@pytest.mark.parametrize("batch", [1, 40, 700])
@pytest.mark.parametrize("tolerance", [0, 2])
def test_batches_leave_no_trace(monkeypatch, batch, tolerance):
    outlines = outlines_of(blobs(4), tolerance=tolerance)
    whole = polygons(outlines)
    monkeypatch.setattr(polygons_module, "BATCH", batch)
    assert same(polygons(outlines), whole)


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
    monkeypatch.setattr("wsi_pipeline.export.simplify.VERTICES", 20_000)
    monkeypatch.setattr("wsi_pipeline.export.polygons.BATCH", 20_000)
    pattern, peaks, left = blobs(0, side=512, sigma=3), [], []
    for width in (1024, 4096):
        mask = Repeated(pattern, (1024, width))
        pieces = trace_mask(mask, iter_blocks(mask.shape, (512, 512)))
        tracemalloc.start()
        outlines = find_outlines(
            mask, pieces, block_size=512, tolerance=tolerance, tile=512, threads=1
        )
        assert sum(map_polygons(outlines, lambda _, shapes: len(shapes), threads=1)) > 1000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        left.append(len(outlines.arcs.xy))
    assert peaks[1] - peaks[0] < limit * (left[1] - left[0])


def test_a_mask_without_regions_gives_none():
    for tolerance in (0, 2):
        assert len(polygons(outlines_of(np.zeros((5, 5), np.uint8), tolerance=tolerance))) == 0


def test_a_finished_mask_is_traced_as_its_blocks_were():
    mask = blobs(8)
    blocks = list(iter_blocks(mask.shape, (64, 64)))
    noted, later = pieces_of(mask, 64), trace_mask(mask, blocks, threads=2)
    assert set(noted) == set(later)
    for index, pieces in later.items():
        assert pieces.probability is None
        for name, array in pieces.as_arrays().items():
            assert (array == getattr(noted[index], name)).all()
    found = find_outlines(mask, {**noted, (0, 0): later[0, 0]}, block_size=64)
    assert found.regions.probability is None  # of some regions it is not known
    assert same(polygons(found), polygons(outlines_of(mask)))


def test_another_mask_than_the_one_traced_is_refused():
    mask = blobs(8)
    pieces = pieces_of(mask, 64)
    with pytest.raises(StoreError, match="--overwrite"):
        find_outlines(np.zeros_like(mask), pieces, block_size=64)
