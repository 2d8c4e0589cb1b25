"""The rules of QuPath's import, one test a row of the tables that were found by running it."""

from __future__ import annotations

import gzip
import itertools
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from wsi_pipeline.annotations import Report, check_feature, check_geojson, color_of, mend_geojson
from wsi_pipeline.cli import group
from wsi_pipeline.colors import QUPATH_COLORS
from wsi_pipeline.errors import AnnotationError

ID = "7e2c6a10-52a4-5d1e-9d7b-0c1b6c3a9f12"
BAD_ID = "00000000-0000-4000-8000-00000000000b"

Json = Any


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def polygon(*rings: Json, **members: Json) -> Json:
    return {"type": "Polygon", "coordinates": list(rings), **members}


def multi(*parts: Json) -> Json:
    return {"type": "MultiPolygon", "coordinates": list(parts)}


SQUARE = polygon(square(0, 0, 100))
BOW_TIE = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
GOOD = {
    "type": "Feature",
    "id": ID,
    "geometry": polygon(square(0, 0, 100), square(20, 20, 20)),
    "properties": {
        "objectType": "annotation",
        "name": "Tumor 12",
        "isLocked": True,
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
        "measurements": {"Area mm^2": 0.00239, "Mean probability": 0.93},
        "metadata": {"model": "lightmuseg-demo", "weights_sha256": "ab12"},
    },
}


def shaped(geometry: Json, **members: Json) -> Json:
    return {"type": "Feature", "geometry": geometry, "properties": {}, **members}


def having(**properties: Json) -> Json:
    return {"type": "Feature", "geometry": SQUARE, "properties": properties}


def classed(**classification: Json) -> Json:
    return having(classification=classification)


def without(key: str) -> Json:
    return {name: value for name, value in GOOD.items() if name != key}


def collection(*features: Json) -> Json:
    return {"type": "FeatureCollection", "features": list(features)}


def strict_loads(data: bytes) -> Json:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(data.decode("utf-8", "strict"), parse_constant=refuse)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(content: Json, name: str = "a.geojson") -> Path:
        path = tmp_path / name
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(data)
        return path

    return write


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["check-geojson", *map(str, arguments)])


def severities(report: Report) -> list[str]:
    return [finding.severity for finding in report.findings]


# Containers ------------------------------------------------------------------------------------

GOOD_BYTES = json.dumps(collection(GOOD)).encode()
ACCEPTED_FILES = {
    "FeatureCollection": (GOOD_BYTES, "a.geojson", 1),
    "array of Features": (json.dumps([GOOD, GOOD]).encode(), "a.geojson", 2),
    "one Feature": (json.dumps(GOOD).encode(), "a.geojson", 1),
    "bare geometry": (json.dumps(SQUARE).encode(), "a.geojson", 1),
    "Feature without its type": (json.dumps(collection(without("type"))).encode(), "a.geojson", 1),
    "empty FeatureCollection": (json.dumps(collection()).encode(), "a.geojson", 0),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD_BYTES, "a.geojson", 1),
    "newlines at the end": (GOOD_BYTES + b"\n\r\n\n", "a.geojson", 1),
    "exponents": (GOOD_BYTES.replace(b"100,", b"1e2,"), "a.geojson", 1),
    "numbers as strings": (GOOD_BYTES.replace(b"100,", b'"100",'), "a.geojson", 1),
    ".json": (GOOD_BYTES, "a.json", 1),
    "upper case": (GOOD_BYTES, "A.GEOJSON", 1),
    ".geojson.gz": (gzip.compress(GOOD_BYTES), "a.geojson.gz", 1),
    ".json.gz": (gzip.compress(GOOD_BYTES), "a.json.GZ", 1),
    "multi-member gzip": (
        gzip.compress(GOOD_BYTES[:50]) + gzip.compress(GOOD_BYTES[50:]),
        "a.geojson.gz",
        1,
    ),
}


@pytest.mark.parametrize("case", ACCEPTED_FILES)
def test_container_is_accepted(case: str, save: Callable[..., Path]) -> None:
    data, name, n_features = ACCEPTED_FILES[case]
    report = check_geojson(save(data, name))
    assert report == Report(n_features=n_features, findings=())
    assert run(save(data, name)).exit_code == 0


REFUSED_FILES = {
    "truncated": (GOOD_BYTES[:-20], "a.geojson"),
    "a second object after the first": (GOOD_BYTES + b"{}", "a.geojson"),
    "null among the features": (json.dumps(collection(GOOD, None)).encode(), "a.geojson"),
    "plain .gz": (gzip.compress(GOOD_BYTES), "a.gz"),
    ".txt": (GOOD_BYTES, "a.txt"),
    "gzip cut off": (gzip.compress(GOOD_BYTES)[:-9], "a.geojson.gz"),
    ".gz that is none": (GOOD_BYTES, "a.geojson.gz"),
    "gzip without the name": (gzip.compress(GOOD_BYTES), "a.geojson"),
    "zip": (b"PK\x03\x04 and so on", "a.zip"),
    "XML": (b"<?xml version='1.0'?><Annotations/>", "a.geojson"),
    "empty file": (b"", "a.geojson"),
    "deep nesting": (b"[" * 200_000, "a.geojson"),
    "digits without end": (b'{"type":"Feature","id":' + b"9" * 5000 + b"}", "a.geojson"),
    "UTF-16": (GOOD_BYTES.decode().encode("utf-16"), "a.geojson"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_container_is_refused(case: str, save: Callable[..., Path]) -> None:
    path = save(*REFUSED_FILES[case])
    assert check_geojson(path).is_refused
    result = run(path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("data", "severity", "word"),
    [
        (GOOD_BYTES.replace(b"]]]", b"]],]"), "not strict", "trailing commas"),
        (GOOD_BYTES.replace(b"0.93", b"NaN"), "not strict", "NaN"),
        (GOOD_BYTES.replace(b"0.93", b"-Infinity"), "not strict", "-Infinity"),
        (GOOD_BYTES.replace(b"Tumor 12", "Nécrose".encode("latin-1")), "changed", "UTF-8"),
        (json.dumps([GOOD, {"version": 3}]).encode(), "changed", "skips"),
        (json.dumps({"type": "Topology"}).encode(), "changed", "Topology"),
        (json.dumps({"type": "FeatureCollection"}).encode(), "changed", "no list of features"),
    ],
)
def test_container_with_a_remark(
    data: bytes, severity: str, word: str, save: Callable[..., Path]
) -> None:
    report = check_geojson(save(data))
    assert severities(report) == [severity]
    assert word in report.findings[0].reason
    assert report.findings[0].index is None
    assert run(save(data)).exit_code == 0


def test_commas_inside_texts_are_no_trailing_commas(save: Callable[..., Path]) -> None:
    feature = having(name='a ,] b \\" ,}')
    data = json.dumps(collection(feature)).encode()
    assert check_geojson(save(data)).findings == ()
    out = save(b"", "out.geojson")
    mend_geojson(save(data.replace(b"]}}]", b"]}},]")), out)
    assert strict_loads(out.read_bytes())["features"][0]["properties"] == feature["properties"]


# What QuPath refuses -----------------------------------------------------------------------------

OPEN_RING = square(0, 0, 10)[:-1]
REFUSED = {
    "bow-tie": shaped(polygon(BOW_TIE)),
    "bow-tie in a MultiPolygon": shaped(multi([BOW_TIE], [square(50, 50, 9)])),
    "overlapping parts": shaped(multi([square(0, 0, 10)], [square(5, 5, 10)])),
    "hole outside its shell": shaped(polygon(square(0, 0, 10), square(20, 20, 5))),
    "shell not first": shaped(polygon(square(2, 2, 5), square(0, 0, 10))),
    "hole crosses its shell": shaped(polygon(square(0, 0, 10), square(5, 5, 10))),
    "overlapping holes": shaped(polygon(square(0, 0, 20), square(1, 1, 5), square(3, 3, 5))),
    "open ring": shaped(polygon(OPEN_RING)),
    "open hole": shaped(polygon(square(0, 0, 20), [[1, 1], [5, 1], [5, 5]])),
    "NaN": shaped(polygon([[0, 0], [float("nan"), 0], [9, 9], [0, 0]])),
    "beyond float32": shaped(polygon([[0, 0], [1e39, 0], [9, 9], [0, 0]])),
    "null in a position": shaped(polygon([[0, 0], [None, 0], [9, 9], [0, 0]])),
    "word in a position": shaped(polygon([[0, 0], ["far", 0], [9, 9], [0, 0]])),
    "position of one number": shaped(polygon([[0, 0], [9], [9, 9], [0, 0]])),
    "huge integer": shaped(polygon([[0, 0], [10**400, 0], [9, 9], [0, 0]])),
    "null geometry": shaped(None),
    "no geometry": {"type": "Feature", "properties": {}},
    "GeometryCollection": shaped({"type": "GeometryCollection", "geometries": [SQUARE]}),
    "unknown geometry": shaped({"type": "Circle", "coordinates": [0, 0]}),
    "no coordinates": shaped({"type": "Polygon"}),
    "line of one position": shaped({"type": "LineString", "coordinates": [[1, 2]]}),
    "bad nucleus": shaped(SQUARE, nucleusGeometry=polygon(BOW_TIE)),
    "null properties": {"type": "Feature", "geometry": SQUARE, "properties": None},
    "class without color": classed(name="Tumor"),
    "class color packed": classed(name="A", color=-6895466),
    "class color in hex": classed(name="A", color="#c80000"),
    "class color of two": classed(name="A", color=[1, 2]),
    "colorRGB as array": classed(name="A", colorRGB=[1, 2, 3]),
    "blank class": classed(name="  ", color=[1, 2, 3]),
    "line break in class": classed(name="A\nB", color=[1, 2, 3]),
    "colon among names": classed(names=["A:B", "C"], color=[1, 2, 3]),
    "class without name": classed(color=[1, 2, 3]),
    "class as number": having(classification=3),
    "null name": having(name=None),
    "null id": shaped(SQUARE, id=None),
    "null objectType": having(objectType=None),
    "null in measurement list": having(measurements=[{"name": "a", "value": None}]),
    "measurement is a word": having(measurements={"a": "much"}),
    "measurement is a word in a list": having(measurements=[{"name": "a", "value": "much"}]),
    "measurement list without value": having(measurements=[{"name": "a"}]),
    "object color in hex": having(color="#c80000"),
    "root": having(objectType="root"),
    "root by an alias": having(type="root"),
    "bad child": having(childObjects=[shaped(polygon(BOW_TIE))]),
    "null child": having(children=[None]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_index_id_and_reason(case: str, save: Callable[..., Path]) -> None:
    bad = REFUSED[case]
    bad = {"id": BAD_ID, **bad}
    path = save(collection(GOOD, bad))
    report = check_geojson(path)
    assert report.is_refused
    refusals = [finding for finding in report.findings if finding.severity == "refused"]
    assert [finding.index for finding in refusals] == [1]
    assert refusals[0].id in (None, BAD_ID)
    if "id" not in case and "child" not in case:
        assert refusals[0].id == BAD_ID
    assert refusals[0].reason.endswith((".", ".)"))
    assert "\n" not in refusals[0].reason

    result = run(path)
    assert result.exit_code == 1
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert ["1", "refused", refusals[0].reason] in [[a, c, d] for a, _, c, d in lines]
    assert "refuses the file" in result.stderr


# What QuPath keeps -------------------------------------------------------------------------------

KEPT = {
    "winding clockwise": shaped(polygon(square(0, 0, 10)[::-1])),
    "hole wound like its shell": shaped(polygon(square(0, 0, 10), square(2, 2, 2))),
    "holes touch at a point": shaped(polygon(square(0, 0, 10), square(2, 2, 2), square(4, 4, 2))),
    "hole touches its shell at a point": shaped(
        polygon(square(0, 0, 10), [[0, 5], [3, 4], [3, 6], [0, 5]])
    ),
    "island in a hole": shaped(multi([square(0, 0, 10), square(2, 2, 6)], [square(4, 4, 2)])),
    "parts touch at a corner": shaped(multi([square(0, 0, 5)], [square(5, 5, 5)])),
    "Point": shaped({"type": "Point", "coordinates": [1, 2]}),
    "MultiPoint": shaped({"type": "MultiPoint", "coordinates": [[1, 2], [3, 4]]}),
    "LineString": shaped({"type": "LineString", "coordinates": [[1, 2], [3, 4]]}),
    "MultiLineString": shaped(
        {"type": "MultiLineString", "coordinates": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]}
    ),
    "third coordinate": shaped(polygon([[0, 0, 7], [9, 0, 7], [9, 9, 7], [0, 0, 7]])),
    "third coordinate of some": shaped(polygon([[0, 0], [9, 0, 7], [9, 9], [0, 0]])),
    "plane": shaped({**SQUARE, "plane": {"c": -1, "z": 1, "t": 0}}),
    "ellipse": shaped({**SQUARE, "isEllipse": True}),
    "negative": shaped(polygon(square(-500, -7, 100))),
    "collinear": shaped(polygon([[0, 0], [5, 0], [9, 0], [9, 9], [0, 9], [0, 0]])),
    "repeated vertex": shaped(polygon([[0, 0], [9, 0], [9, 0], [9, 9], [0, 9], [0, 0]])),
    **{
        f"objectType {kind}": having(objectType=kind)
        for kind in ("annotation", "detection", "tile", "cell", "tmaCore", "Annotation", "tissue")
    },
    "object_type": having(object_type="detection"),
    "type": having(type="detection"),
    "isLocked": having(isLocked="true"),
    "locked": having(locked=True),
    "name as number": having(name=12),
    "color": having(color=[1, 2, 3]),
    "packed color": having(color=-6895466),
    "color of four": having(color=[1, 2, 3, 4]),
    "children": having(childObjects=[GOOD]),
    "nucleus": {**having(objectType="cell"), "nucleusGeometry": polygon(square(5, 5, 9))},
    "foreign members": shaped(SQUARE, crs={"a": None}, bbox=[0, 0, 1, 1], label="Tumor"),
    "no properties": {"type": "Feature", "geometry": SQUARE},
    "upper-case id": shaped(SQUARE, id=ID.upper()),
    "id of QuPath 0.2": shaped(SQUARE, id="PathAnnotationObject"),
    "integers far out": shaped(polygon(square(299_901, 299_903, 11))),
    "quarters far out": shaped(polygon(square(299_901.25, 299_903.75, 11.5))),
    "two decimals": shaped(polygon(square(10.13, 20.57, 30.29))),
    "derived class": classed(names=["Tumor", "Positive"], color=[1, 2, 3]),
    "class color with alpha": classed(name="A", color=[1, 2, 3, 4]),
    "class color in a list": classed(name="A", color=[-6895466]),
    "class color as whole floats": classed(name="A", color=[1.0, 2.0, 3.0]),
    "class color null": classed(name="A", color=None),
    "class as text": having(classification="Stroma"),
    "class null": having(classification=None),
    "class empty": having(classification={}),
    "class of QuPath 0.2": classed(name="Tumor", colorRGB=-3670016),
    "class with extra keys": classed(name="A", color=[1, 2, 3], scale=[0.5, 0.5]),
    "class in any script": classed(name="Nécrose µ 腫瘍", color=[1, 2, 3]),
    "measurements as list": having(measurements=[{"name": "a", "value": 1.5}]),
    "measurements null": having(measurements=None),
    "measurement words": having(measurements={"a": "NaN", "b": "Infinity", "c": "-inf"}),
    "measurement as text": having(measurements={"a": "1.5e3"}),
    "largest exact measurement": having(measurements={"a": 16_777_216}),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept_without_complaint(case: str, save: Callable[..., Path]) -> None:
    path = save(collection(GOOD, KEPT[case]))
    assert check_geojson(path) == Report(n_features=2, findings=())
    result = run(path)
    assert (result.exit_code, result.stdout) == (0, "")


def test_overlapping_features_are_kept(save: Callable[..., Path]) -> None:
    features = [shaped(polygon(square(0, 0, 10))), shaped(polygon(square(5, 5, 10)))]
    assert check_geojson(save(collection(*features))).findings == ()


def test_members_of_the_collection_are_ignored(save: Callable[..., Path]) -> None:
    content = {**collection(GOOD), "crs": None, "name": "x", "metadata": {"a": [None]}}
    assert check_geojson(save(content)).findings == ()


# What QuPath changes -----------------------------------------------------------------------------

CHANGED = {
    "more than two decimals": shaped(polygon(square(10.123, 20, 30))),
    "two decimals where float32 has none": shaped(polygon(square(4_000_000.13, 0, 30.07))),
    "odd number beyond float32's whole ones": shaped(polygon(square(0, 0, 16_777_217))),
    "point with decimals": shaped({"type": "Point", "coordinates": [1.2345, 2]}),
    "ring touches itself": shaped(
        polygon([[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [1, 2], [1, 1], [0, 1], [0, 0]])
    ),
    "spike": shaped(polygon([[0, 0], [10, 0], [20, 0], [10, 0], [10, 10], [0, 10], [0, 0]])),
    "parts share an edge": shaped(multi([square(0, 0, 10)], [square(10, 0, 10)])),
    "identical parts": shaped(multi([square(0, 0, 10)], [square(0, 0, 10)])),
    "hole shares an edge with the shell": shaped(polygon(square(0, 0, 10), square(0, 2, 2))),
    "holes share an edge": shaped(polygon(square(0, 0, 10), square(1, 1, 2), square(3, 1, 2))),
    "holes cut the interior": shaped(polygon(square(0, 0, 10), [[0, 5], [5, 4], [10, 5], [0, 5]])),
    "island touches its hole": shaped(
        multi([square(0, 0, 10), square(2, 2, 6)], [square(2, 2, 3)])
    ),
    "part inside a part": shaped(multi([square(0, 0, 10)], [square(2, 2, 3)])),
    "zero area": shaped(polygon([[0, 0], [5, 5], [9, 9], [0, 0]])),
    "out and back": shaped(polygon([[0, 0], [5, 5], [0, 0]])),
    "below 0.01 px": shaped(polygon(square(5, 5, 0.004))),
    "empty coordinates": shaped(polygon()),
    "empty ring": shaped(polygon([])),
    "hole equal to its shell": shaped(polygon(square(0, 0, 10), square(0, 0, 10))),
    "hole without area": shaped(polygon(square(0, 0, 10), [[1, 1], [2, 2], [3, 3], [1, 1]])),
    "count beyond float32": having(measurements={"n": 16_777_217}),
    "measurement beyond float32": having(measurements={"n": 1e39}),
    "measurement below float32": having(measurements={"n": 1e-60}),
    "null measurement": having(measurements={"n": None}),
    "true as measurement": having(measurements={"n": True}),
    "nested measurement": having(measurements={"n": {"a": 1}}),
    "nested metadata": having(metadata={"n": {"a": 1}}),
    "null metadata": having(metadata={"n": None}),
    "second color of a class": classed(name="Tumor", color=[1, 2, 3]),
    "colon in the class": classed(name="A:B", color=[1, 2, 3]),
    "colon in the class as text": having(classification="A: B"),
    "blanks around the class": classed(name=" A ", color=[1, 2, 3]),
    "color too large": classed(name="A", color=[300, 0, 0]),
    "color negative": classed(name="A", color=[-5, 0, 0]),
    "color with fraction": classed(name="A", color=[1.5, 0, 0]),
    "invisible colorRGB": classed(name="A", colorRGB=0x97C896),
    "integer id": shaped(SQUARE, id=7),
    "text id": shaped(SQUARE, id="region-17"),
    "id without dashes": shaped(SQUARE, id=ID.replace("-", "")),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_by_qupath(case: str, save: Callable[..., Path]) -> None:
    path = save(collection(GOOD, CHANGED[case]))
    report = check_geojson(path)
    assert {finding.severity for finding in report.findings} == {"changed"}
    assert {finding.index for finding in report.findings} == {1}
    assert run(path).exit_code == 0


def test_only_the_first_color_of_a_class_counts(save: Callable[..., Path]) -> None:
    colors = [[1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6]]
    path = save(collection(*(classed(name="Fat", color=color) for color in colors)))
    (finding,) = check_geojson(path).findings
    assert (finding.index, finding.severity) == (1, "changed")
    assert "(1, 2, 3)" in finding.reason


@pytest.mark.parametrize("rings", [[square(0, 0, 9)], [square(0, 0, 9), square(2, 2, 2)]])
def test_multipolygon_of_one_part_is_refused_by_05(rings: Json, save: Callable[..., Path]) -> None:
    path = save(collection(shaped(multi(rings), id=ID)))
    report = check_geojson(path)
    assert [(f.index, f.id, f.severity) for f in report.findings] == [
        (0, ID, "refused by QuPath 0.5")
    ]
    result = run(path)
    assert result.exit_code == 0
    assert "refused by QuPath 0.5" in result.stdout


def test_check_feature_takes_a_parsed_feature() -> None:
    assert check_feature(GOOD) == []
    (finding,) = check_feature(REFUSED["open ring"], index=9)
    assert (finding.index, finding.severity) == (9, "refused")


# Mending -----------------------------------------------------------------------------------------

FIXABLE = {
    name: feature
    for table in (REFUSED, CHANGED)
    for name, feature in table.items()
    if name
    not in {
        *("NaN", "beyond float32", "null in a position", "word in a position"),
        *("position of one number", "huge integer", "null geometry", "no geometry"),
        *("unknown geometry", "no coordinates", "line of one position"),
        *("zero area", "out and back", "below 0.01 px", "empty coordinates", "empty ring"),
        *("hole equal to its shell", "odd number beyond float32's whole ones"),
    }
}
HOPELESS = {
    name: feature
    for table in (REFUSED, CHANGED)
    for name, feature in table.items()
    if name not in FIXABLE
}


def shoelace(ring: Json) -> float:
    return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring))) / 2


def area(geometry: Json) -> float:
    parts = geometry["coordinates"]
    parts = [parts] if geometry["type"] == "Polygon" else parts
    return sum(shoelace(part[0]) - sum(map(shoelace, part[1:])) for part in parts)


@pytest.mark.parametrize("case", FIXABLE)
def test_fix_mends(case: str, save: Callable[..., Path], tmp_path: Path) -> None:
    path, out = save(collection(GOOD, FIXABLE[case])), tmp_path / "out.geojson"
    result = run(path, "--fix", out)
    assert result.exit_code == 0, result.output
    written = strict_loads(out.read_bytes())
    assert written["features"][0] == GOOD
    assert len(written["features"]) == 2
    assert check_geojson(out).findings == ()
    assert "1\t" in result.stderr
    assert "changed" in result.stderr


@pytest.mark.parametrize("case", HOPELESS)
def test_fix_drops_and_says_so(case: str, save: Callable[..., Path], tmp_path: Path) -> None:
    path, out = save(collection({"id": BAD_ID, **HOPELESS[case]}, GOOD)), tmp_path / "out.geojson"
    result = run(path, "--fix", out)
    assert result.exit_code == 0, result.output
    assert strict_loads(out.read_bytes())["features"] == [GOOD]
    assert f"0\t{BAD_ID}\tdropped\t" in result.stderr


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("bow-tie", 50),
        ("overlapping parts", 175),
        ("hole outside its shell", 125),  # taken for a second part, as which it makes sense
        ("shell not first", 75),
        ("hole crosses its shell", 75),
        ("overlapping holes", 400 - 41),
        ("open ring", 100),
        ("spike", 100),
        ("parts share an edge", 200),
        ("identical parts", 100),
        ("part inside a part", 100),
        ("ring touches itself", 2),
        ("holes share an edge", 92),
        ("GeometryCollection", 10_000),
    ],
)
def test_fix_keeps_the_area_that_was_meant(
    case: str, expected: float, save: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.geojson"
    mend_geojson(save(collection({**REFUSED, **CHANGED}[case])), out)
    (feature,) = strict_loads(out.read_bytes())["features"]
    assert area(feature["geometry"]) == pytest.approx(expected)


def test_fix_keeps_what_is_good_of_a_mended_feature(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    bad = {**GOOD, "geometry": {**polygon(BOW_TIE), "plane": {"c": -1, "z": 2, "t": 0}}}
    out = tmp_path / "out.geojson"
    (repair,) = mend_geojson(save(collection(bad)), out)
    (feature,) = strict_loads(out.read_bytes())["features"]
    assert (repair.index, repair.id, repair.action) == (0, ID, "changed")
    assert {key: feature[key] for key in ("id", "properties")} == {
        "id": ID,
        "properties": GOOD["properties"],
    }
    assert feature["geometry"]["plane"] == {"c": -1, "z": 2, "t": 0}


@pytest.mark.parametrize(
    ("classification", "expected"),
    [
        ({"name": "Tumor"}, {"name": "Tumor", "color": [200, 0, 0]}),
        ({"name": "Stroma", "color": [1, 2, 3]}, {"name": "Stroma", "color": [150, 200, 150]}),
        ({"name": "Fat", "color": "#0a141e"}, {"name": "Fat", "color": [10, 20, 30]}),
        ({"name": "Fat", "color": -16_116_706}, {"name": "Fat", "color": [10, 20, 30]}),
        ({"name": "Fat", "color": [300, -5, 7.4]}, {"name": "Fat", "color": [255, 0, 7]}),
        ({"name": "Fat", "colorRGB": 0x0A141E}, {"name": "Fat", "color": [10, 20, 30]}),
        ({"name": " Fat ", "color": [1, 2, 3]}, {"name": "Fat", "color": [1, 2, 3]}),
        ({"name": "A\nB", "color": [1, 2, 3]}, {"name": "A B", "color": [1, 2, 3]}),
        ({"name": "A: B", "color": [1, 2, 3]}, {"names": ["A", "B"], "color": [1, 2, 3]}),
        ({"name": "Fat"}, {"name": "Fat", "color": list(color_of("Fat"))}),
        ({"name": "  ", "color": [1, 2, 3]}, None),
    ],
)
def test_fix_mends_classes(
    classification: Json, expected: Json, save: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.geojson"
    assert len(mend_geojson(save(collection(classed(**classification))), out)) == 1
    (feature,) = strict_loads(out.read_bytes())["features"]
    assert feature["properties"].get("classification") == expected


def test_fix_reads_an_objects_color_in_hex(save: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.geojson"
    mend_geojson(save(collection(having(color="#0a141e"), having(color="red"))), out)
    written = strict_loads(out.read_bytes())["features"]
    assert [feature["properties"].get("color") for feature in written] == [[10, 20, 30], None]


def test_color_of_is_qupaths_own_or_depends_on_the_name_alone() -> None:
    assert color_of("Necrosis") == (50, 50, 50) == QUPATH_COLORS["Necrosis"]
    assert color_of("Fat") == color_of("Fat") != color_of("Skin")
    assert all(0 <= value <= 255 for name in "abcdefgh" for value in color_of(name))


def test_fix_gives_one_class_one_color(save: Callable[..., Path], tmp_path: Path) -> None:
    colors: list[Json] = [[1, 2, 3], [4, 5, 6], None]
    out = tmp_path / "out.geojson"
    repairs = mend_geojson(
        save(collection(*(classed(name="Fat", color=color) for color in colors))), out
    )
    assert [repair.index for repair in repairs] == [1]
    written = strict_loads(out.read_bytes())["features"]
    assert [f["properties"]["classification"]["color"] for f in written] == [
        [1, 2, 3],
        [1, 2, 3],
        None,
    ]


def test_fix_keeps_measurements_that_are_numbers(save: Callable[..., Path], tmp_path: Path) -> None:
    values = {"a": 1.5, "b": "2.5", "c": "much", "d": None, "e": 16_777_217, "f": 1e39, "g": 7}
    out = tmp_path / "out.geojson"
    mend_geojson(save(collection(having(measurements=values))), out)
    (feature,) = strict_loads(out.read_bytes())["features"]
    kept = feature["properties"]["measurements"]
    assert kept == {"a": 1.5, "b": 2.5, "e": 16_777_216, "g": 7}


def test_fix_gives_the_same_uuid_again(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(collection(shaped(SQUARE, id="region-17"), shaped(SQUARE, id="region-18")))
    ids = []
    for name in ("1.geojson", "2.geojson"):
        mend_geojson(path, tmp_path / name)
        features = strict_loads((tmp_path / name).read_bytes())["features"]
        ids.append([str(uuid.UUID(feature["id"])) for feature in features])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


def test_fix_mends_children(save: Callable[..., Path], tmp_path: Path) -> None:
    child = shaped(polygon(BOW_TIE), id=BAD_ID)
    parent = {**GOOD, "properties": {**GOOD["properties"], "childObjects": [child, None]}}
    out = tmp_path / "out.geojson"
    assert run(save(collection(parent)), "--fix", out).exit_code == 0
    (feature,) = strict_loads(out.read_bytes())["features"]
    (mended,) = feature["properties"]["childObjects"]
    assert mended["id"] == BAD_ID
    assert area(mended["geometry"]) == 50


@pytest.mark.parametrize("case", ACCEPTED_FILES)
def test_fix_of_any_container_writes_a_collection(
    case: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    data, name, n_features = ACCEPTED_FILES[case]
    out = tmp_path / "out.geojson"
    assert mend_geojson(save(data, name), out) == []
    written = strict_loads(out.read_bytes())
    assert written["type"] == "FeatureCollection"
    assert [feature["type"] for feature in written["features"]] == ["Feature"] * n_features
    assert not out.read_bytes().startswith(b"\xef\xbb\xbf")


def test_fix_makes_lenient_json_strict(save: Callable[..., Path], tmp_path: Path) -> None:
    lenient = GOOD_BYTES.replace(b"0.93", b"NaN").replace(b"]]]", b"]],]")
    out = tmp_path / "out.geojson"
    repairs = mend_geojson(save(lenient), out)
    assert [(repair.index, repair.action) for repair in repairs] == [(None, "changed")] * 2
    (feature,) = strict_loads(out.read_bytes())["features"]
    assert feature["properties"]["measurements"] == {"Area mm^2": 0.00239}


def test_fix_of_half_a_surrogate_pair_is_utf8(save: Callable[..., Path], tmp_path: Path) -> None:
    data = json.dumps(collection(having(name="x\ud800"), shaped(SQUARE, id="\udc00\n"))).encode()
    out = tmp_path / "out.geojson"
    result = run(save(data), "--fix", out)
    assert result.exit_code == 0, result.output
    assert len(strict_loads(out.read_bytes())["features"]) == 2


def test_fix_packs_by_the_name(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(collection(GOOD, REFUSED["bow-tie"]))
    mend_geojson(path, tmp_path / "out.geojson")
    mend_geojson(path, tmp_path / "out.geojson.gz")
    packed = gzip.decompress((tmp_path / "out.geojson.gz").read_bytes())
    assert packed == (tmp_path / "out.geojson").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.geojson",
        "out.geojson",
        "out.geojson.gz",
    ]


def test_fix_of_what_is_no_json_leaves_nothing(save: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.geojson"
    with pytest.raises(AnnotationError, match="not JSON"):
        mend_geojson(save(b"{"), out)
    result = run(save(b"{"), "--fix", out)
    assert result.exit_code == 1
    assert "Error: " in result.stderr
    assert "not JSON" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("out", ["out.txt", "missing/out.geojson"])
def test_fix_refuses_a_place_it_cannot_write(
    out: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(AnnotationError):
        mend_geojson(save(collection(GOOD)), tmp_path / out)


@pytest.mark.parametrize("name", ["mine.geojson", "in.geojson"])
def test_fix_writes_over_no_file(name: str, tmp_path: Path) -> None:
    for file in ("mine.geojson", "in.geojson"):
        (tmp_path / file).write_text(json.dumps(collection(REFUSED["open ring"])), "utf-8")
    before = (tmp_path / name).read_bytes()
    result = run(tmp_path / "in.geojson", "--fix", tmp_path / name)
    assert result.exit_code == 2
    assert f"{name} is there already; name another file" in result.stderr
    assert (tmp_path / name).read_bytes() == before


def nested(depth: int) -> bytes:
    before, _, after = json.dumps(having(childObjects=["child"])).partition('"child"')
    innermost = json.dumps(having(classification=3))
    return (before * depth + innermost + after * depth).encode()


def test_fix_reaches_children_of_children(save: Callable[..., Path], tmp_path: Path) -> None:
    path, out = save(nested(50)), tmp_path / "out.geojson"
    assert check_geojson(path).is_refused
    mend_geojson(path, out)
    assert check_geojson(out).findings == ()
    assert b"classification" not in out.read_bytes()


@pytest.mark.parametrize("depth", [200, 300, 400, 100_000])
def test_nesting_without_end_is_no_crash(
    depth: int, save: Callable[..., Path], tmp_path: Path
) -> None:
    path = save(nested(depth))
    assert check_geojson(path).is_refused
    result = run(path, "--fix", tmp_path / "out.geojson")
    assert isinstance(result.exception, SystemExit | None)


# The command -------------------------------------------------------------------------------------


def test_json_output_is_one_object(save: Callable[..., Path], tmp_path: Path) -> None:
    path, out = save(collection(GOOD, {**REFUSED["open ring"], "id": BAD_ID})), tmp_path / "o.json"
    result = run(path, "--json", "--fix", out)
    content = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (content["features"], content["refused"]) == (2, True)
    assert [(f["index"], f["id"], f["severity"]) for f in content["findings"]] == [
        (1, BAD_ID, "refused")
    ]
    assert [(r["index"], r["action"]) for r in content["repairs"]] == [(1, "changed")]


def test_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    assert run(tmp_path / "none.geojson").exit_code == 2
    with pytest.raises(AnnotationError, match="cannot read"):
        check_geojson(tmp_path / "none.geojson")


def test_line_break_in_an_id_keeps_one_line(save: Callable[..., Path]) -> None:
    result = run(save(collection(shaped(SQUARE, id="a\nb"))))
    assert len(result.stdout.splitlines()) == 1


def test_empty_collection_is_said(save: Callable[..., Path]) -> None:
    assert "No objects found" in run(save(collection())).stderr


def test_command_has_help_and_is_documented() -> None:
    result = run("--help")
    assert result.exit_code == 0
    page = (Path(__file__).parents[1] / "docs" / "check-geojson.md").read_text("utf-8")
    for word in ("--fix", "--json", "refused", "changed", "not strict", "refused by QuPath 0.5"):
        assert word in page
        if word.startswith("--"):
            assert word in result.output


# Real files --------------------------------------------------------------------------------------

REAL = {
    "qupath05.geojson": (3, {}),
    "histoqc_holed.geojson": (1, {}),
    "wsihandling_qupath_old_array.json": (3, {"changed": 1}),
    "insitupy_annotations-mixed_types.geojson": (7, {}),
    "insitupy_annotations-Tumor.geojson": (28, {"changed": 28}),
    "insitupy_demo_points.geojson": (1, {}),
    "insitupy_demo_points_without_names.geojson": (1, {}),
    "insitupy_demo_regions.geojson": (3, {}),
    "insitupy_test_regions.geojson": (3, {}),
    "luna_test_object_classification.geojson": (1, {"changed": 1}),
    "luna_test_cell_detections.geojson": (2, {"changed": 1}),
    "luna_123_CMU.annotation.geojson": (2, {}),
}
"""Features (SOURCES.md) and remarks: coordinates of 15 decimals in the Tumor file; colours of
"Other" and "Negative" that are not QuPath's of today in the other three."""


@pytest.mark.parametrize("name", REAL)
def test_real_file(name: str, data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "annotations" / name
    n_features, expected = REAL[name]
    report = check_geojson(path)
    found = severities(report)
    assert report.n_features == n_features
    assert {severity: found.count(severity) for severity in set(found)} == expected
    out = tmp_path / "out.geojson"
    assert run(path, "--fix", out).exit_code == 0
    assert check_geojson(out) == Report(n_features=n_features, findings=())
    before = json.loads(path.read_bytes())
    before = before.get("features", [before]) if isinstance(before, dict) else before
    after = strict_loads(out.read_bytes())["features"]
    for old, new in zip(before, after, strict=True):
        assert new.get("id") == old.get("id")
        assert new["geometry"]["type"] == old["geometry"]["type"]
        measured = old.get("properties", {}).get("measurements")
        assert new.get("properties", {}).get("measurements") == measured


def test_imagescope_is_refused(data_dir: Path) -> None:
    report = check_geojson(data_dir / "annotations" / "wsihandling_imagescope.xml")
    assert report.is_refused
    assert any("not JSON" in finding.reason for finding in report.findings)
