"""Reading, burning and mending polygons; the rules of QuPath are in test_check_geojson."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio.features
import shapely
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from shapely import MultiPolygon, Polygon
from shapely.affinity import scale, translate

from wsi_pipeline.annotations import (
    check_feature,
    check_geojson,
    mend_geojson,
    mend_polygon,
    rasterise,
    read_polygons,
    read_region,
    survives_float32,
)
from wsi_pipeline.errors import AnnotationError

Json = Any
FAR = 200_000
SCALES = (1.0, 0.499 / 0.25, 1.9960, 31.7)

with np.errstate(invalid="ignore"):
    NOT_A_POLYGON = Polygon([(0, 0), (np.nan, 1), (1, 1)])

points = st.tuples(st.integers(0, 60), st.integers(0, 60))
rings = st.lists(points, min_size=3, max_size=12)
label_maps = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(0, 3, (9, 11)).astype(np.uint8)
)


def square(x: float, y: float, side: float) -> list[tuple[float, float]]:
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side), (x, y)]


def shoelace(ring: Json) -> float:
    return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring))) / 2


def as_float32(polygon: Polygon) -> Polygon:
    def cast(ring: Any) -> Any:
        return np.asarray(ring.coords, dtype=np.float32).astype(float)

    return Polygon(cast(polygon.exterior), [cast(hole) for hole in polygon.interiors])


def feature(polygon: Polygon) -> Json:
    return {"type": "Feature", "geometry": shapely.geometry.mapping(polygon), "properties": {}}


def parsed(content: Json) -> Json:
    return json.loads(json.dumps(content))


def pixel_edge_polygons(labels: Any) -> list[Polygon]:
    shapes = rasterio.features.shapes(labels, mask=labels > 0, connectivity=4)
    return [shapely.geometry.shape(outline) for outline, _ in shapes]


# QuPath's float32 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "polygon",
    [
        Polygon(square(0, 0, 1)),
        Polygon(square(FAR + 0.25, FAR + 0.75, 10.5)),
        Polygon(square(0, 0, 10), [square(2, 2, 2), square(4, 4, 2)]),
        MultiPolygon([Polygon(square(0, 0, 5)), Polygon(square(5, 5, 5))]),
        Polygon([(0, 0), (5000, 1), (5000, 3000)]),
    ],
)
def test_survives(polygon: Polygon) -> None:
    assert survives_float32(polygon)


@pytest.mark.parametrize(
    "polygon",
    [
        Polygon(),
        Polygon([(0, 0), (10, 10), (10, 0), (0, 10)]),
        Polygon([(0, 0), (5, 5), (9, 9)]),
        Polygon(square(0, 0, 0.05)),
        NOT_A_POLYGON,
        Polygon([(0, 0), (1e39, 1), (1, 1)]),
        Polygon(square(0, 0, 10), [square(0, 2, 2)]),
        # valid and with an area of 10 px², until float32 makes its two long sides one
        Polygon([(FAR, 0), (FAR + 0.001, 0), (FAR + 0.001, 10_000), (FAR, 10_000)]),
        # valid in float32 too, but its waist of 0.004 px closes on the grid of 0.01 px
        Polygon([(0, 0), (5, 4.998), (10, 0), (10, 10), (5, 5.002), (0, 10)]),
    ],
)
def test_does_not_survive(polygon: Polygon) -> None:
    assert not survives_float32(polygon)


@settings(deadline=None)
@given(rings, st.lists(rings, max_size=2), st.sampled_from([0, FAR]), st.sampled_from([1, 50]))
def test_what_survives_is_valid_and_left_alone_by_snapping(
    shell: Json, holes: Json, offset: int, size: int
) -> None:
    polygon = scale(Polygon(shell, holes), size, size, origin=(0, 0))
    polygon = translate(polygon, offset, offset)
    rounded = as_float32(polygon)
    try:
        snapped = shapely.set_precision(rounded, 0.01)
    except shapely.errors.GEOSException:
        snapped = Polygon()
    untouched = (
        rounded.is_valid
        and isinstance(snapped, Polygon)
        and len(snapped.interiors) == len(rounded.interiors)
        and snapped.area == pytest.approx(rounded.area)
        and snapped.area > 0
    )
    assert survives_float32(polygon) == untouched


@settings(max_examples=60, deadline=None)
@given(label_maps, st.sampled_from(SCALES), st.sampled_from([0, FAR]))
def test_pixel_edge_polygons_survive_scaled_and_far_out(
    labels: Any, factor: float, offset: int
) -> None:
    for polygon in pixel_edge_polygons(labels):
        placed = shapely.transform(polygon, lambda xy: np.round(xy * factor + offset, 2))
        assert survives_float32(placed)
        assert check_feature(parsed(feature(placed))) == []


# A lattice point is at least step² / length from an edge: here above what snapping can close.
@settings(deadline=None)
@given(st.lists(points, min_size=3, max_size=15), st.sampled_from([(1, 61), (0.25, 16)]))
def test_random_valid_polygons_far_out_pass_the_check(
    corners: Json, step_and_span: tuple[float, int]
) -> None:
    step, span = step_and_span
    hull = shapely.MultiPoint(np.array(corners) % span * step + FAR).convex_hull
    assume(isinstance(hull, Polygon))
    assert survives_float32(hull)
    assert check_feature(parsed(feature(hull))) == []


@settings(max_examples=200, deadline=None)
@given(
    rings,
    st.lists(rings, max_size=2),
    st.sampled_from(SCALES),
    st.sampled_from([0, FAR, 3_000_000]),
)
@example([(0, 0), (10, 10), (10, 0), (0, 10)], [], 1.0, 0)
def test_mended_polygons_are_what_qupath_keeps(
    shell: Json, holes: Json, factor: float, offset: int
) -> None:
    broken = translate(scale(Polygon(shell, holes), factor, factor, origin=(0, 0)), offset, offset)
    parts = mend_polygon(broken)
    for part in parts:
        assert as_float32(part).is_valid
        assert survives_float32(part)
        assert check_feature(parsed(feature(part))) == []
        for ring in (part.exterior, *part.interiors):
            coordinates = [tuple(xy) for xy in ring.coords]
            assert coordinates[0] == coordinates[-1]
            assert len(set(coordinates)) == len(coordinates) - 1 >= 3
            assert shoelace(coordinates) > 0
            decimals = [repr(v).partition(".")[2] for xy in coordinates for v in xy]
            assert max(map(len, decimals)) <= 2
    for a, b in itertools.combinations(parts, 2):
        assert a.intersection(b).area == 0
    meant = shapely.make_valid(broken, method="structure", keep_collapsed=False)
    slack = 0.5 if offset < 1_000_000 else 1.0  # px that an outline may move far out
    if meant.area > 0:
        assert abs(sum(part.area for part in parts) - meant.area) <= slack * meant.length + 1


def test_mending_a_good_polygon_keeps_it() -> None:
    polygon = Polygon(square(10.25, 20, 30.5), [square(15, 25, 3)])
    (mended,) = mend_polygon(polygon)
    assert mended.equals(polygon)


def test_mending_drops_specks() -> None:
    speck = Polygon(square(50, 50, 0.05))
    holed = Polygon(square(0, 0, 10), [square(5, 5, 0.05)])
    (mended,) = mend_polygon(MultiPolygon([holed, speck]))
    assert mended.equals(Polygon(square(0, 0, 10)))
    assert mend_polygon(speck) == []
    assert mend_polygon(NOT_A_POLYGON) == []
    assert mend_polygon(Polygon()) == []


# Reading -----------------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(content: Json, name: str = "a.geojson") -> Path:
        path = tmp_path / name
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(data)
        return path

    return write


REAL = {
    "qupath05.geojson": {None: 3},
    "histoqc_holed.geojson": {None: 1},
    "wsihandling_qupath_old_array.json": {"Tumor": 1, "Other": 3, "Negative": 1},
    "insitupy_annotations-mixed_types.geojson": {"Stroma": 2},
    "insitupy_annotations-Tumor.geojson": {"Tumor cells": 28},
    "insitupy_demo_points.geojson": {},
    "insitupy_demo_points_without_names.geojson": {},
    "insitupy_demo_regions.geojson": {None: 3},
    "insitupy_test_regions.geojson": {None: 2},
    "luna_test_object_classification.geojson": {"Other": 1},
    "luna_test_cell_detections.geojson": {"Other": 2},
    "luna_123_CMU.annotation.geojson": {"Other": 1, "Tumor": 1},
}
"""Polygons of each class, parts counted one by one."""


@pytest.mark.parametrize("name", REAL)
def test_real_file(name: str, data_dir: Path) -> None:
    path = data_dir / "annotations" / name
    annotations = read_polygons(path)
    names = [annotation.class_name for annotation in annotations]
    assert {name: names.count(name) for name in set(names)} == REAL[name]

    content = json.loads(path.read_bytes())
    features = content.get("features", [content]) if isinstance(content, dict) else content
    expected = 0.0
    n_holes = 0
    for geometry in (f["geometry"] for f in features if "Polygon" in f["geometry"]["type"]):
        parts = geometry["coordinates"]
        for shell, *holes in [parts] if geometry["type"] == "Polygon" else parts:
            expected += shoelace(shell) - sum(map(shoelace, holes))
            n_holes += len(holes)
    assert sum(a.polygon.area for a in annotations) == pytest.approx(expected)
    assert sum(len(a.polygon.interiors) for a in annotations) == n_holes
    assert all(a.polygon.is_valid for a in annotations)


def test_types_without_area_are_left_out_aloud(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_polygons(data_dir / "annotations" / "insitupy_annotations-mixed_types.geojson")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 LineString, 2 MultiPoint, 1 Point" in record.getMessage()


def test_imagescope_is_no_geojson(data_dir: Path) -> None:
    with pytest.raises(AnnotationError, match=r"imagescope\.xml: This is not JSON"):
        read_polygons(data_dir / "annotations" / "wsihandling_imagescope.xml")


BOX = {"type": "Polygon", "coordinates": [square(0, 0, 10), square(2, 2, 4)]}


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"classification": {"name": "Tumor", "color": [200, 0, 0]}}, "Tumor"),
        ({"classification": {"name": " Tumor "}}, "Tumor"),
        ({"classification": {"names": ["Tumor", "Positive"], "color": None}}, "Tumor: Positive"),
        ({"classification": {}}, None),
        ({"classification": None}, None),
        ({"classification": "Stroma"}, "Stroma"),
        ({"label": "Fat", "group": "Other"}, "Fat"),
        ({"label": {"value": "Fat"}, "group": "Other"}, "Fat"),
        ({"group": "Other"}, "Other"),
        ({"name": "not a class"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_class_names(properties: Json, expected: str | None, save: Callable[..., Path]) -> None:
    path = save({"type": "Feature", "geometry": BOX, "properties": properties})
    (annotation,) = read_polygons(path)
    assert annotation.class_name == expected
    assert annotation.polygon.area == 84


def test_geometries_of_all_kinds(save: Callable[..., Path]) -> None:
    multi = {"type": "MultiPolygon", "coordinates": [[square(0, 0, 1)], [square(5, 5, 2)]]}
    everything = {"type": "GeometryCollection", "geometries": [multi, BOX]}
    strings = {"type": "Polygon", "coordinates": [[["0", "0"], ["2", 0], [2, 2.0, 7], [0, 2]]]}
    child = {"type": "Feature", "geometry": strings, "properties": {"label": "c"}}
    parent = {"type": "Feature", "geometry": everything, "properties": {"childObjects": [child]}}
    nothing = {"type": "Feature", "geometry": None, "properties": {}}
    for content in (
        [parent, nothing],
        {"type": "FeatureCollection", "features": [nothing, parent]},
    ):
        annotations = read_polygons(save(content))
        assert [a.polygon.area for a in annotations] == [1, 4, 84, 4]
        assert [a.class_name for a in annotations] == [None, None, None, "c"]


def test_offset_moves_from_the_cropped_frame(save: Callable[..., Path]) -> None:
    (annotation,) = read_polygons(save(BOX), offset=(1000.0, 20_000.5))
    assert annotation.polygon.bounds == (1000, 20_000.5, 1010, 20_010.5)
    assert annotation.polygon.area == 84


def test_crossing_outline_is_mended_aloud(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    bow_tie = {"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}
    annotations = read_polygons(save(bow_tie))
    assert [a.polygon.area for a in annotations] == [25, 25]
    assert "feature 0: mended" in caplog.text


def classified(polygon: Polygon, name: str | None, **plane: int) -> Json:
    geometry = {**shapely.geometry.mapping(polygon), **({"plane": plane} if plane else {})}
    classification = {} if name is None else {"classification": {"name": name}}
    return {"type": "Feature", "geometry": geometry, "properties": classification}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ([], 160_000),
        ([(shapely.box(200, 200, 300, 300), "Ignore*")], 150_000),
        ([(shapely.box(450, 50, 600, 300), "Artefact*")], 150_000),
        ([(shapely.box(0, 0, 600, 600), "Tumor: Necrosis*")], None),
        ([(shapely.box(150, 0, 700, 200), "Region*")], 110_000),
        (
            [(shapely.box(150, 0, 700, 200), "Region*"), (shapely.box(0, 0, 160, 160), "Pen*")],
            108_400,
        ),
    ],
)
def test_what_is_ignored_is_no_part_of_a_region(
    extra: Json, expected: int | None, save: Callable[..., Path]
) -> None:
    drawn = [(shapely.box(100, 100, 500, 500), "Tumor"), *extra]
    path = save([classified(polygon, name) for polygon, name in drawn])
    if expected is None:
        with pytest.raises(AnnotationError, match="no areas but what its ignored ones cover"):
            read_region(path)
        return
    region = read_region(path)
    assert shapely.union_all(region).area == expected
    assert rasterise(region, (700, 800)).sum() == expected


def test_a_region_of_nothing_is_refused(save: Callable[..., Path]) -> None:
    with pytest.raises(AnnotationError, match="holds no areas; expected polygons"):
        read_region(save([]))
    path = save([classified(shapely.box(0, 0, 9, 9), "Ignore*")])
    with pytest.raises(AnnotationError, match=r"no areas but those of Ignore\*"):
        read_region(path)


def test_a_region_beside_the_slide_is_refused(save: Callable[..., Path]) -> None:
    path = save([classified(shapely.box(500, 20, 620, 90), "Tumor")])
    assert len(read_region(path, size=(501, 300))) == 1
    said = r"no area lies on the slide of 500 × 300 px: they span x 500 to 620, y 20 to 90"
    with pytest.raises(AnnotationError, match=said):
        read_region(path, size=(500, 300))
    assert len(read_region(path, offset=(-100, 0), size=(500, 300))) == 1


def test_areas_on_other_planes_are_left_out_aloud(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    first = classified(shapely.box(0, 0, 10, 10), "Tumor", c=-1, z=0, t=0)
    others = [classified(shapely.box(0, 0, 50, 50), "Tumor", c=-1, z=z, t=0) for z in (1, 1, 2)]
    (annotation,) = read_polygons(save([first, *others]))
    assert annotation.polygon.area == 100
    assert "other planes than the first, z 0 and t 0: 2 on z 1, 1 on z 2" in caplog.text
    with pytest.raises(AnnotationError, match=r"other planes .* none is left"):
        read_polygons(save(others))


def test_empty_collection_is_no_error(save: Callable[..., Path]) -> None:
    assert read_polygons(save({"type": "FeatureCollection", "features": []})) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "This is not JSON"),
        (b"{", "This is not JSON"),
        (b"PK\x03\x04", "zip"),
        (b"\x1f\x8b\x08 and so on", "gzip"),
        (b"[" * 100_000, "too deeply"),
        ({"a": 1}, "expected a GeoJSON FeatureCollection"),
        (7, "expected a GeoJSON FeatureCollection"),
        ({"type": "FeatureCollection"}, "no list of features"),
        ([BOX, {"type": "Polygon", "coordinates": [[["x", 0]]]}], "feature 1: .*'x'.*no number"),
        ({"type": "Polygon", "coordinates": [[0, 1, 2]]}, "feature 0: .*no list of two numbers"),
        ({"type": "Polygon", "coordinates": 7}, "feature 0: .*no list"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [float("nan"), 1], [2, 2]]]}, "NaN"),
    ],
)
def test_what_is_no_annotation_is_said(
    content: Json, message: str, save: Callable[..., Path]
) -> None:
    path = save(content)
    with pytest.raises(AnnotationError, match=message) as caught:
        read_polygons(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"cannot read .*none\.geojson"):
        read_polygons(tmp_path / "none.geojson")


# Fuzzing -----------------------------------------------------------------------------------------

WORDS = [
    *("type", "features", "geometry", "coordinates", "properties", "id", "geometries"),
    *("classification", "name", "names", "color", "colorRGB", "measurements", "value"),
    *("objectType", "childObjects", "children", "metadata", "nucleusGeometry", "label"),
    *("FeatureCollection", "Feature", "Polygon", "MultiPolygon", "Point", "LineString"),
    *("GeometryCollection", "MultiPoint", "Tumor", "root", "A:B", "", "\ud800", "#c80000", "NaN"),
]
scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(WORDS)
    | st.sampled_from([0, 1, 5, -1, 300, 2**70, 10**400, 0.5, 1e308, 1e-320, float("nan")])
)
positions = st.lists(st.integers(-3, 3) | scalars, max_size=3)
trees = st.recursive(
    scalars | st.lists(positions, max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5)
    ),
    max_leaves=15,
)


def any_of(*choices: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    """Choose among strategies as wholes; `|` would give those with many branches more weight."""
    return st.sampled_from(choices).flatmap(lambda choice: choice)


closed = rings.map(lambda ring: [*ring, ring[0]])
geometries = any_of(
    st.just(BOX),
    st.fixed_dictionaries(
        {"type": st.just("Polygon"), "coordinates": st.lists(closed, max_size=2)}
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("MultiPolygon"),
            "coordinates": st.lists(st.lists(closed, min_size=1, max_size=2), max_size=2),
        }
    ),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["LineString", "MultiPoint"]),
            "coordinates": st.lists(positions, max_size=4),
        }
    ),
    st.fixed_dictionaries({"type": st.sampled_from(WORDS), "coordinates": trees}),
    trees,
)
classes = st.fixed_dictionaries(
    {"name": any_of(st.sampled_from(WORDS), trees)},
    optional={"color": any_of(st.lists(st.integers(-300, 300)), trees), "colorRGB": scalars},
)
features = st.deferred(
    lambda: st.fixed_dictionaries(
        {"geometry": geometries},
        optional={
            "id": scalars,
            "properties": any_of(properties, properties, trees),
            "nucleusGeometry": geometries,
        },
    )
)
properties = st.fixed_dictionaries(
    {},
    optional={
        "classification": any_of(classes, scalars),
        "measurements": any_of(st.dictionaries(st.sampled_from(WORDS), scalars), trees),
        "metadata": trees,
        "childObjects": st.lists(features, max_size=2),
        "color": trees,
        "objectType": scalars,
        "name": scalars,
        "label": trees,
    },
)
documents = st.fixed_dictionaries(
    {
        "type": st.just("FeatureCollection"),
        "features": st.lists(any_of(features, features, trees), max_size=3),
    }
)
SEED = json.dumps(
    {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "id": "7e2c6a10-52a4-5d1e-9d7b-0c1b6c3a9f12",
                "geometry": BOX,
                "properties": {
                    "classification": {"name": "Tumor", "color": [200, 0, 0]},
                    "measurements": {"Area mm^2": 0.5},
                },
            }
        ],
    }
).encode()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(SEED)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(start + draw(st.integers(0, 20)), len(data))
        data[start:stop] = draw(st.binary(max_size=6))
    return bytes(data)


@pytest.mark.filterwarnings("error")
@example(
    data=b'{"type":"FeatureCollection","features":[{"type":"Feature",'
    b'"geometry":{"type":"Point","coordinates":[1,2]},'
    b'"properties":{"color":[null,null,null,NaN]}}]}'
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.binary() | damaged() | documents.map(lambda tree: json.dumps(tree).encode()))
def test_any_bytes_give_findings_or_an_annotation_error(data: bytes, tmp_path: Path) -> None:
    path, out = tmp_path / "a.geojson", tmp_path / "out.geojson"
    path.write_bytes(data)
    report = check_geojson(path)
    assert all("\n" not in finding.reason for finding in report.findings)
    with contextlib.suppress(AnnotationError):
        read_polygons(path)
    try:
        repairs = mend_geojson(path, out)
    except AnnotationError:
        assert report.is_refused
        return
    assert check_geojson(out).findings == ()
    written = json.loads(out.read_bytes(), parse_constant=pytest.fail)
    dropped = [repair for repair in repairs if repair.action == "dropped"]
    assert len(written["features"]) == report.n_features - len(dropped)
    if not report.findings:
        assert repairs == []


# Burning -----------------------------------------------------------------------------------------


def test_rasterise_pixel_edges_exactly() -> None:
    labels = np.random.default_rng(3).integers(0, 2, (40, 53)).astype(np.uint8)
    burnt = rasterise(pixel_edge_polygons(labels), labels.shape)
    assert burnt.dtype == bool
    np.testing.assert_array_equal(burnt, labels > 0)


@settings(deadline=None)
@given(
    rings,
    rings,
    st.sampled_from([(1.0, 1.0), (1.7, 2.3), (0.4, 0.4), (7.9, 3.1)]),
    st.sampled_from([(0.0, 0.0), (FAR + 0.5, FAR - 7.25)]),
)
def test_rasterise_marks_pixels_whose_centre_is_inside(
    shell: Json, other: Json, downsample: tuple[float, float], origin: tuple[float, float]
) -> None:
    (fy, fx), (y0, x0) = downsample, origin
    shapes = [shapely.make_valid(Polygon(ring)) for ring in (shell, other)]
    area = shapely.unary_union([g for shape in shapes for g in shapely.get_parts(shape)])
    polygons = [
        translate(part, x0 - 5, y0 - 3)
        for shape in (area, shapes[1])
        for part in shapely.get_parts(shape)
        if isinstance(part, Polygon)
    ]
    burnt = rasterise(polygons, (23, 31), origin=origin, downsample=downsample)
    ys, xs = np.mgrid[:23, :31]
    centres = shapely.points(x0 + (xs + 0.5) * fx, y0 + (ys + 0.5) * fy)
    union = shapely.unary_union(polygons)
    inside = shapely.contains_xy(union, shapely.get_x(centres), shapely.get_y(centres))
    outlines = shapely.MultiLineString(
        [ring for p in polygons for ring in (p.exterior, *p.interiors)]
    )
    clear = shapely.distance(outlines, centres) > 1e-6 if polygons else np.ones((23, 31), bool)
    np.testing.assert_array_equal(burnt[clear], inside[clear])


@settings(deadline=None)
@given(rings, st.integers(0, 40), st.integers(0, 40))
def test_rasterised_block_equals_its_part_of_the_whole(ring: Json, y: int, x: int) -> None:
    # Off the lattice, so that no pixel centre lies on an outline.
    polygons = [
        translate(part, 0.137, 0.211)
        for part in shapely.get_parts(shapely.make_valid(Polygon(ring)))
        if isinstance(part, Polygon)
    ]
    whole = rasterise(polygons, (61, 61))
    block = rasterise(polygons, (20, 21), origin=(y, x))
    np.testing.assert_array_equal(block, whole[y : y + 20, x : x + 21][:20, :21])


def test_rasterise_marks_what_is_touched() -> None:
    marked = rasterise([shapely.box(3, 4.5, 6, 8)], (5, 6), downsample=(3, 2), touched=True)
    assert np.argwhere(marked).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    speck = rasterise([shapely.box(7.1, 4.1, 7.2, 4.2)], (5, 6), downsample=(3, 2), touched=True)
    assert np.argwhere(speck).tolist() == [[1, 3]]


def test_threads_rasterise_without_a_warning() -> None:
    ring = shapely.Point(40, 30).buffer(20)
    with ThreadPoolExecutor(8) as pool, warnings.catch_warnings(action="error"):
        found = list(pool.map(lambda _: rasterise([ring], (64, 96)), range(2000)))
    assert all(np.array_equal(found[0], other) for other in found)


def test_rasterise_nothing() -> None:
    assert rasterise([], (3, 4)).shape == (3, 4)
    assert not rasterise([Polygon(square(100, 100, 5))], (3, 4)).any()
    assert rasterise([Polygon(square(0, 0, 5))], (0, 4)).shape == (0, 4)


def test_rasterise_takes_one_downsample_for_both_axes() -> None:
    mask = rasterise([Polygon(square(0, 0, 32))], (4, 4), downsample=16.0)
    assert np.flatnonzero(mask.any(axis=0)).tolist() == [0, 1]
    assert np.flatnonzero(mask.any(axis=1)).tolist() == [0, 1]
