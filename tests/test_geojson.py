"""The GeoJSON we write: checklist D1 to D3 of what QuPath takes, with independent readers."""

import json
import math
import uuid

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.features import rasterize
from scipy import ndimage
from traced import outlines_of

from wsi_pipeline.annotations import check_geojson
from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.geojson import FeatureOptions, write_geojson
from wsi_pipeline.geometry import Region

CLASSES = (
    ClassInfo(name="Background"),
    ClassInfo(name="Tumor", color=(200, 0, 0)),
    ClassInfo(name="Nécrose µ", color=(50, 50, 50)),
    ClassInfo(name="Stroma", color=(150, 200, 150)),
)
EXACT = {"simplify_um": 0.0, "min_area_um2": 0.0}


def feature_options(**changes):
    usual = {
        "classes": CLASSES,
        "downsample": (1.0, 1.0),
        "mpp": (0.25, 0.25),
        "crop": None,
        "simplify_um": 1.0,
        "min_area_um2": 0.0,
        "namespace": "slide/model",
        "metadata": {"model": "m", "weights_sha256": "00"},
    }
    return FeatureOptions(**{**usual, **changes})


def write(path, mask, chosen, block_size=64, **options):
    """Trace a mask and write it; return what was written."""
    outlines = outlines_of(
        mask, block_size, tolerance=chosen.tolerance, min_pixels=chosen.min_pixels, **options
    )
    return write_geojson(path, outlines, chosen)


def refuse(token):
    raise ValueError(f"{token} is not strict JSON")


def strict(path):
    raw = path.read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf")
    return json.loads(raw.decode("utf-8"), parse_constant=refuse)


def polygons_of(collection):
    return [shapely.geometry.shape(f["geometry"]) for f in collection["features"]]


def blobs(seed=0, side=220):
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((4, side, side)), (0, 7, 7))
    mask = fields.argmax(0).astype(np.uint8)
    mask[:9, :50] = 1  # on the edge
    mask[60:90, 60:90] = np.indices((30, 30)).sum(0) % 2  # a checkerboard
    mask[120, 10:200] = 2  # a line of one pixel
    return mask


def walk(value):
    yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, dict | list):
            yield from walk(child)
        else:
            yield child


@pytest.fixture(params=["exact", "simplified"])
def written(request, tmp_path):
    mask = blobs()
    chosen = feature_options(**EXACT) if request.param == "exact" else feature_options()
    path = tmp_path / "annotations.geojson"
    summary = write(path, mask, chosen, probability=40000)
    return mask, path, strict(path), summary


def test_the_file_is_what_qupath_wants(written):
    _, _, collection, _ = written
    assert set(collection) == {"type", "features"}
    assert collection["type"] == "FeatureCollection"
    assert all(value is not None for value in walk(collection))
    ids = set()
    for feature in collection["features"]:
        assert set(feature) == {"type", "id", "geometry", "properties"}
        assert feature["type"] == "Feature"
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        ids.add(feature["id"])
        assert feature["geometry"]["type"] == "Polygon"
        properties = feature["properties"]
        assert properties["objectType"] == "annotation"
        assert properties["isLocked"] is True
        assert set(properties) <= {
            "objectType", "name", "isLocked", "classification", "measurements", "metadata",
        }  # fmt: skip
        name, color = properties["classification"]["name"], properties["classification"]["color"]
        assert color == list(next(c.color for c in CLASSES if c.name == name))
        measured = properties["measurements"]
        assert set(measured) == {"Area mm^2", "Mean probability"}
        assert all(math.isfinite(v) and abs(v) <= 16_777_216 for v in measured.values())
        assert measured["Mean probability"] == pytest.approx(40000 / 65535, abs=1e-4)
        assert all(isinstance(v, str) for v in properties["metadata"].values())
    assert len(ids) == len(collection["features"]) > 100


def test_rings_are_sound_in_float32(written):
    _, _, collection, _ = written
    for feature in collection["features"]:
        polygon = shapely.geometry.shape(feature["geometry"])
        for index, ring in enumerate(feature["geometry"]["coordinates"]):
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
            assert len({tuple(p) for p in ring[:-1]}) == len(ring) - 1
            assert all(isinstance(v, int) for point in ring for v in point)
            x, y = np.array(ring, float).T
            area = 0.5 * (x[:-1] * y[1:] - x[1:] * y[:-1]).sum()
            assert area > 0 if index == 0 else area < 0
        single = shapely.transform(polygon, lambda xy: xy.astype(np.float32).astype(float))
        assert single.is_valid
        snapped = shapely.set_precision(single, 0.01)
        assert snapped.geom_type == "Polygon"
        assert snapped.area == pytest.approx(polygon.area, rel=1e-6)
        assert len(snapped.interiors) == len(polygon.interiors)


def test_our_own_check_has_no_complaint(written):
    _, path, _, _ = written
    assert list(check_geojson(path).findings) == []


def test_polygons_of_all_classes_do_not_overlap(written):
    mask, _, collection, _ = written
    shapes = polygons_of(collection)
    union = shapely.union_all(shapes)
    assert union.area == pytest.approx(sum(s.area for s in shapes), rel=1e-12)
    assert union.bounds[0] >= 0
    assert union.bounds[2] <= mask.shape[1]


def test_exact_polygons_give_the_mask_back(tmp_path):
    mask = blobs(1)
    path = tmp_path / "a.geojson"
    summary = write(path, mask, feature_options(**EXACT), 50)
    collection = strict(path)
    value = {c.name: i for i, c in enumerate(CLASSES)}
    burnt = [
        (s, value[f["properties"]["classification"]["name"]])
        for s, f in zip(polygons_of(collection), collection["features"], strict=True)
    ]
    assert (rasterize(burnt, out_shape=mask.shape, dtype=np.uint8) == mask).all()
    for index, info in enumerate(CLASSES[1:], start=1):
        pixels = int((mask == index).sum())
        areas = [s.area for s, v in burnt if v == index]
        assert sum(areas) == pixels
        measured = sum(
            f["properties"]["measurements"]["Area mm^2"]
            for f in collection["features"]
            if f["properties"]["classification"]["name"] == info.name
        )
        assert measured == pytest.approx(pixels * 0.25**2 * 1e-6, rel=1e-6)
        assert summary.regions[info.name] == len(areas) == ndimage.label(mask == index)[1]


@pytest.mark.parametrize("options", [EXACT, {}, {"min_area_um2": 3.0}])
def test_the_bytes_do_not_depend_on_the_blocks(tmp_path, options):
    mask = blobs(2)
    files = []
    for size in (32, 64, 500):
        path = tmp_path / f"{size}.geojson"
        write(path, mask, feature_options(**options), size)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_slide_without_regions_gives_an_empty_collection(tmp_path):
    path = tmp_path / "a.geojson"
    write(path, np.zeros((5, 5), np.uint8), feature_options())
    assert strict(path) == {"type": "FeatureCollection", "features": []}


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.uint8, (12, 12), elements=st.integers(0, 3)),
    st.sampled_from([0.499 / 0.25, 1.9960, 31.7, 1.0]),
    st.sampled_from([0, 200_000]),
    st.sampled_from([0.0, 1.0]),
)
def test_scaled_and_far_away_they_stay_sound(tmp_path_factory, mask, scale, offset, simplify):
    """G7: validity after float32 at any scale and far from the origin."""
    path = tmp_path_factory.mktemp("g7") / "a.geojson"
    crop = Region(x=-offset, y=-offset, width=10**6, height=10**6)
    write(path, mask, feature_options(downsample=(scale, scale), crop=crop, simplify_um=simplify))
    collection = strict(path)
    assert list(check_geojson(path).findings) == []
    for shape in polygons_of(collection):
        single = shapely.transform(shape, lambda xy: xy.astype(np.float32).astype(float))
        assert single.is_valid
    numbers = [v for f in collection["features"] for v in walk(f["geometry"]["coordinates"])]
    assert all(round(v, 2) == v for v in numbers if isinstance(v, int | float))
    for feature, shape in zip(collection["features"], polygons_of(collection), strict=True):
        measured = feature["properties"]["measurements"]["Area mm^2"]
        if simplify == 0:
            assert measured == pytest.approx(shape.area * 0.25**2 * 1e-6, rel=0.01)
    if mask.any() and simplify == 0:
        total = sum(s.area for s in polygons_of(collection))
        assert total == pytest.approx((mask > 0).sum() * scale**2, rel=0.01)


def test_unequal_mpp_counts_in_areas(tmp_path):
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 1
    path = tmp_path / "a.geojson"
    write(path, mask, feature_options(mpp=(0.5, 0.25), downsample=(4.0, 2.0)))
    (feature,) = strict(path)["features"]
    assert feature["properties"]["measurements"]["Area mm^2"] == pytest.approx(100 * 0.5 * 2 * 1e-6)
    assert shapely.geometry.shape(feature["geometry"]).bounds == (10, 20, 30, 60)


def test_pixels_that_are_no_squares_lie_and_count_as_they_are(tmp_path):
    mask = np.zeros((37, 53), np.uint8)
    # rows 5 to 15, columns 11 to 40; and one that the crop cuts on its right
    mask[5:16, 11:41], mask[20:31, 50:53] = 1, 2
    scale, um, path = (1.5, 2.25), (0.5, 0.2), tmp_path / "a.geojson"
    crop = Region(x=21, y=7, width=97, height=61)
    write(path, mask, feature_options(mpp=um, downsample=scale, crop=crop, **EXACT))
    found = [
        (shapely.geometry.shape(f["geometry"]).bounds, f["properties"]["measurements"])
        for f in strict(path)["features"]
    ]
    expected = [
        (11 * 2.25 - 21, 5 * 1.5 - 7, 41 * 2.25 - 21, 16 * 1.5 - 7),
        (50 * 2.25 - 21, 20 * 1.5 - 7, 97, 31 * 1.5 - 7),
    ]
    assert [bounds for bounds, _ in found] == expected
    for (left, top, right, bottom), measured in found:
        mm2 = (right - left) * 0.2 * (bottom - top) * 0.5 * 1e-6
        assert measured["Area mm^2"] == pytest.approx(mm2, rel=1e-6)


def test_the_crop_moves_and_clips(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[5:35, 5:35] = 1
    mask[20, :] = 0
    mask[10:30, 18:22] = 0  # clipped below, the two halves' tops fall apart
    whole, cropped = tmp_path / "w.geojson", tmp_path / "c.geojson"
    write(whole, mask, feature_options(**EXACT))
    crop = Region(x=3, y=12, width=30, height=20)
    write(cropped, mask, feature_options(crop=crop, **EXACT))
    box = shapely.box(3, 12, 33, 32)
    expected = shapely.intersection(shapely.union_all(polygons_of(strict(whole))), box)
    found = polygons_of(strict(cropped))
    assert shapely.equals(
        shapely.transform(shapely.union_all(found), lambda xy: xy + np.array([3, 12])), expected
    )
    assert len(found) == len(shapely.get_parts(expected)) > len(strict(whole)["features"])
    assert min(s.bounds[0] for s in found) >= 0
    assert max(s.bounds[3] for s in found) <= 20
    features = strict(cropped)["features"]
    assert len({f["id"] for f in features}) == len({f["properties"]["name"] for f in features})
    assert len({f["id"] for f in features}) == len(features)


def test_each_part_of_a_region_has_its_own_area(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 2:38] = 1
    mask[20:30, 2:10] = mask[20:30, 30:38] = 1  # an arch, of which the crop leaves the feet
    mask[35, 35] = 2
    path = tmp_path / "a.geojson"
    summary = write(
        path, mask, feature_options(crop=Region(x=0, y=22, width=40, height=18), **EXACT)
    )
    features = strict(path)["features"]
    areas = [
        round(f["properties"]["measurements"]["Area mm^2"] / (0.25**2 * 1e-6)) for f in features
    ]
    assert areas == [64, 64, 1]
    assert [f["properties"]["name"] for f in features] == [
        "Tumor 1",
        "Tumor 1, part 2",
        "Nécrose µ 1",
    ]
    assert summary.regions == {"Tumor": 2, "Nécrose µ": 1, "Stroma": 0}


def test_nothing_is_written_where_the_frame_shows_nothing(tmp_path):
    path = tmp_path / "a.geojson"
    summary = write(path, blobs(), feature_options(crop=Region(x=500, y=0, width=40, height=40)))
    assert strict(path)["features"] == []
    assert (summary.vertices, set(summary.regions.values())) == (0, {0})


def test_the_area_of_a_whole_region_is_that_of_the_mask(tmp_path):
    mask = blobs(3)
    exact, simple = tmp_path / "e.geojson", tmp_path / "s.geojson"
    write(exact, mask, feature_options(**EXACT))
    write(simple, mask, feature_options(simplify_um=3 * 0.25))
    same = [
        [f["properties"]["measurements"] for f in strict(path)["features"]]
        for path in (exact, simple)
    ]
    assert same[0] == same[1]
    assert exact.stat().st_size > 1.1 * simple.stat().st_size


def test_without_probabilities_that_measurement_is_left_out(tmp_path):
    path = tmp_path / "a.geojson"
    write(path, blobs(3), feature_options(), probability=None)
    assert {tuple(f["properties"]["measurements"]) for f in strict(path)["features"]} == {
        ("Area mm^2",)
    }


def test_threads_and_batches_leave_no_trace(tmp_path, monkeypatch):
    outlines, chosen = outlines_of(blobs(2), tolerance=4), feature_options()
    files = []
    for threads, batch in ((1, 10**6), (4, 50)):
        monkeypatch.setattr("wsi_pipeline.export.polygons.build.BATCH", batch)
        path = tmp_path / f"{threads}.geojson"
        write_geojson(path, outlines, chosen, threads=threads)
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_many_regions_become_detections(tmp_path):
    mask = np.zeros((250, 250), np.uint8)
    mask[::2, ::2] = 1  # 15,625 regions
    path = tmp_path / "a.geojson"
    write(path, mask, feature_options(**EXACT))
    kinds = {f["properties"]["objectType"] for f in strict(path)["features"]}
    assert kinds == {"detection"}


def test_nothing_is_left_of_a_file_that_failed_half_way(tmp_path):
    broken = feature_options(metadata={"bad": {1}}, **EXACT)  # a set, which JSON does not know
    with pytest.raises(TypeError, match="JSON"):
        write(tmp_path / "a.geojson", blobs(), broken)
    assert list(tmp_path.iterdir()) == []
