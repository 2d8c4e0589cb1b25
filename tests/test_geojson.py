"""The GeoJSON we write: checklist D1 to D3 of what QuPath takes, with independent readers."""

import csv
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
from skimage.measure import label, regionprops
from traced import outlines_of

from wsi_pipeline.annotations import check_geojson
from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.features import FeatureOptions
from wsi_pipeline.export.geojson import write_geojson
from wsi_pipeline.export.polygons import neighbours
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
    return write_geojson(path, path.with_name("regions.csv"), outlines, chosen)


def table(path):
    """Return the rows of the table beside a GeoJSON file."""
    with path.with_name("regions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
        others = [c.name for c in CLASSES[1:] if c.name != name]
        assert set(measured) == {
            *("Area mm^2", "Length µm", "Holes", "Circularity"),
            *("Mean probability", "Min probability"),
            *(f"Distance to {other} µm" for other in others),
            *(f"Border shared with {other}" for other in others),
        }
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


def test_ids_are_uuids_of_the_namespace_and_the_first_pixel(tmp_path):
    mask, path = np.zeros((40, 60), np.uint8), tmp_path / "a.geojson"
    mask[7:9, 11:20], mask[30:35, 3:9] = 2, 1
    chosen = feature_options(**EXACT)
    write(path, mask, chosen)
    expected = [
        str(uuid.uuid5(uuid.NAMESPACE_OID, f"{chosen.namespace}/{CLASSES[value].name}/{place}/0"))
        for value, place in ((2, "7,11"), (1, "30,3"))
    ]
    assert [feature["id"] for feature in strict(path)["features"]] == expected


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


@pytest.mark.parametrize("simplify", [0.0, 1.5])
def test_a_row_of_the_table_is_what_shapely_and_scikit_image_measure(tmp_path, simplify):
    mask, path = blobs(5, 211)[:197], tmp_path / "a.geojson"
    mask[3:8, 170:190], mask[5, 175:180] = 2, 0
    # (y, x)
    scale, um = (1.5, 2.25), (0.5, 0.2)
    probability = np.random.default_rng(0).integers(20_000, 65_536, mask.shape, np.uint16)
    chosen = feature_options(mpp=um, downsample=scale, simplify_um=simplify)
    write(path, mask, chosen, probability=probability)
    features, rows = strict(path)["features"], table(path)
    assert list(rows[0])[:10] == [
        *("id", "class", "area_um2", "perimeter_um", "centroid_x", "centroid_y", "holes"),
        *("circularity", "probability_mean", "probability_min"),
    ]
    assert [(r["id"], r["class"]) for r in rows] == [
        (f["id"], f["properties"]["classification"]["name"]) for f in features
    ]
    drawn = np.array([shapely.geometry.shape(f["geometry"]) for f in features])
    sized = shapely.transform(drawn, lambda xy: xy * um[::-1])
    names = np.array([r["class"] for r in rows])
    expected = {
        "perimeter_um": shapely.length(sized),
        "centroid_x": shapely.get_x(shapely.centroid(drawn)),
        "centroid_y": shapely.get_y(shapely.centroid(drawn)),
        "holes": [len(p.interiors) for p in drawn],
        "circularity": [
            4 * math.pi * shapely.Polygon(p.exterior).area / p.exterior.length**2 for p in sized
        ],
    }
    for other in (c.name for c in CLASSES[1:]):
        theirs = sized[names == other]
        near = [shapely.distance(p, theirs).min() for p in sized]
        border = shapely.union_all(shapely.boundary(theirs))
        shared = [p.boundary.intersection(border).length / p.length for p in sized]
        own = names == other
        expected[f"distance_um_{other}"] = np.where(own, np.nan, near)
        expected[f"border_share_{other}"] = np.where(own, np.nan, shared)
    for column, values in expected.items():
        found = [float(r[column] or "nan") for r in rows]
        assert found == pytest.approx(list(values), rel=1e-3, abs=5e-3, nan_ok=True), column
    assert {r["holes"] for r in rows} >= {"0", "1"}
    # of the mask itself, region by region in the order of their first pixels
    props = [
        (int(p.coords[0][0]), int(p.coords[0][1]), p)
        for value in (1, 2, 3)
        for p in regionprops(label(mask == value, connectivity=1), probability / 65535)
    ]
    props = [p for *_, p in sorted(props, key=lambda each: each[:2])]
    assert len(props) == len(rows) > 100
    pixel = um[0] * um[1] * scale[0] * scale[1]
    for row, p in zip(rows, props, strict=True):
        assert float(row["area_um2"]) == pytest.approx(p.area * pixel, abs=1e-4)
        assert float(row["probability_mean"]) == pytest.approx(p.intensity_mean, abs=1e-4)
        assert float(row["probability_min"]) == pytest.approx(p.intensity_min, abs=1e-4)
    # and QuPath shows the same under its own names
    names_there = {
        "perimeter_um": "Length µm", "holes": "Holes", "circularity": "Circularity",
        "probability_mean": "Mean probability", "probability_min": "Min probability",
        "distance_um_Stroma": "Distance to Stroma µm",
        "border_share_Tumor": "Border shared with Tumor",
    }  # fmt: skip
    for row, feature in zip(rows, features, strict=True):
        measured = feature["properties"]["measurements"]
        for column, name in names_there.items():
            assert (float(row[column]) if row[column] else None) == measured.get(name)


def test_a_region_far_from_the_next_class_finds_it(tmp_path):
    mask, path = np.zeros((300, 500), np.uint8), tmp_path / "a.geojson"
    # a ring with something of another class within, and a third class far to the right
    mask[50:250, 50:250], mask[60:240, 60:240] = 1, 0
    mask[100:110, 100:110], mask[290, 499] = 2, 3
    write(path, mask, feature_options(mpp=(0.5, 0.25), **EXACT), probability=None)
    found = {
        (row["class"], other): row[f"distance_um_{other}"]
        for row in table(path)
        for other in (c.name for c in CLASSES[1:])
    }
    far = {
        ("Tumor", "Nécrose µ"): 40 * 0.25,
        ("Tumor", "Stroma"): math.hypot(249 * 0.25, 40 * 0.5),
        ("Nécrose µ", "Stroma"): math.hypot(389 * 0.25, 180 * 0.5),
    }
    for (one, other), um in far.items():
        assert float(found[one, other]) == float(found[other, one]) == pytest.approx(um, abs=1e-3)
    assert {found[c.name, c.name] for c in CLASSES[1:]} == {""}


@pytest.mark.parametrize("pieces", [1, 3])
def test_of_many_regions_each_finds_the_nearest_of_each_class(tmp_path, monkeypatch, pieces):
    # Some by the boxes around pieces of borders, what lies by itself by the tree of all.
    monkeypatch.setattr(neighbours, "PIECE", pieces)
    monkeypatch.setattr(neighbours, "VERTICES", 500)
    rng, mask, path = np.random.default_rng(3), np.zeros((600, 411), np.uint8), tmp_path / "a.json"
    for y, x, side, value in zip(
        rng.integers(0, 180, 150), rng.integers(0, 390, 150), rng.integers(1, 9, 150),
        rng.integers(1, 4, 150), strict=True,
    ):  # fmt: skip
        mask[y : y + side, x : x + side] = value
    mask[500:510, 300:330], mask[590:, 5:9] = 1, 2
    write(path, mask, feature_options(mpp=(0.5, 0.25), **EXACT), probability=None)
    rows, um = table(path), np.array([0.25, 0.5])
    drawn = np.array([shapely.geometry.shape(f["geometry"]) for f in strict(path)["features"]])
    sized = shapely.transform(drawn, lambda xy: xy * um)
    names = np.array([row["class"] for row in rows])
    for other in (c.name for c in CLASSES[1:]):
        for name, shape, row in zip(names, sized, rows, strict=True):
            if name != other:
                nearest = shapely.distance(shape, sized[names == other]).min()
                assert float(row[f"distance_um_{other}"]) == pytest.approx(nearest, abs=6e-4)


def test_without_a_pixels_size_the_table_counts_pixels(tmp_path):
    mask, path = np.zeros((20, 30), np.uint8), tmp_path / "a.geojson"
    mask[2:6, 3:13], mask[10:12, 3:13] = 1, 2
    chosen = feature_options(mpp=(1000.0, 1000.0), unit="px^2", **EXACT)
    write(path, mask, chosen)
    first, _ = table(path)
    assert (first["area_px2"], first["perimeter_px"]) == ("40.0", "28.0")
    assert (first["distance_px_Nécrose µ"], first["distance_px_Stroma"]) == ("4.0", "")
    assert strict(path)["features"][0]["properties"]["measurements"]["Length px"] == 28


def test_of_one_class_there_are_no_distances(tmp_path):
    path = tmp_path / "a.geojson"
    classes = (CLASSES[0], ClassInfo(name="=Tumor", color=(200, 0, 0)))
    write(path, np.ones((4, 5), np.uint8), feature_options(classes=classes, **EXACT))
    (row,) = table(path)
    assert len(row) == 10
    # a spreadsheet takes it for no formula
    assert row["class"] == "'=Tumor"


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
        [f["properties"]["measurements"]["Area mm^2"] for f in strict(path)["features"]]
        for path in (exact, simple)
    ]
    assert same[0] == same[1]
    assert exact.stat().st_size > 1.1 * simple.stat().st_size


def test_without_probabilities_that_measurement_is_left_out(tmp_path):
    path = tmp_path / "a.geojson"
    write(path, blobs(3), feature_options(), probability=None)
    for feature in strict(path)["features"]:
        assert not any("probability" in name for name in feature["properties"]["measurements"])
    for row in table(path):
        assert row["probability_mean"] == row["probability_min"] == ""


def test_threads_and_batches_leave_no_trace(tmp_path, monkeypatch):
    outlines, chosen = outlines_of(blobs(2), tolerance=4), feature_options()
    files = []
    for threads, batch in ((1, 10**6), (4, 50)):
        monkeypatch.setattr("wsi_pipeline.export.polygons.build.BATCH", batch)
        path = tmp_path / f"{threads}.geojson"
        write_geojson(path, path.with_suffix(".csv"), outlines, chosen, threads=threads)
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
