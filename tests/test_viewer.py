"""The viewer's server and page: what they show is what lies in the files, and in the same place."""

import asyncio
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import nibabel
import numpy as np
import pytest
import shapely
import tifffile
import torch
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner
from contrast import LEAST, least_contrast
from PIL import Image
from runs import segment_job
from scans import Soft as SoftScan
from scans import blobs, scan_bundle
from shapely.geometry import shape
from tornado.websocket import websocket_connect

from wsi_pipeline import open_run, segment
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.colors import COLORS as COLORS_UNNAMED
from wsi_pipeline.colors import QUPATH_COLORS
from wsi_pipeline.errors import SourceError, StoreError, WsiPipelineError
from wsi_pipeline.export.overlay import read_preview
from wsi_pipeline.options import (
    ExportOptions,
    PredictOptions,
    ScheduleOptions,
    SelectOptions,
    Settings,
)
from wsi_pipeline.report.record import RUN_FILE, Run, write_run_json
from wsi_pipeline.run.jobs import plan_jobs
from wsi_pipeline.schedule.cluster import open_cluster
from wsi_pipeline.sources import open_source
from wsi_pipeline.viewer import serve
from wsi_pipeline.viewer.polygons import load_polygons
from wsi_pipeline.viewer.run_view import TILE, open_shown
from wsi_pipeline.viewer.server import MOST_CONNECTIONS

EVERYWHERE = SelectOptions(tissue="none")
EXACT = ExportOptions(outputs=("zarr", "geojson"), simplify_um=0, min_area_um2=0)
CORNER = (301, 257)
"""Of the bounds of the slide that has some: what its polygons count from."""
COLORS = [(0, 0, 0), (200, 0, 0), (150, 200, 150)]


@pytest.fixture(scope="module")
def output(tmp_path_factory, slide_path, bounded):
    """Return an output folder with a plain slide, and one with bounds and a coarser mask."""
    place = tmp_path_factory.mktemp("viewer")
    plain = Path(shutil.copyfile(slide_path, place / "plain slide.tif"))
    model = load_bundle(pointwise_bundle(place / "model", mpp=0.25))
    with open_cluster(ScheduleOptions()) as client:
        for path, mask_mpp in ((plain, None), (bounded, 0.5)):
            predict = PredictOptions(precision="fp32", device="cpu", mask_mpp=mask_mpp)
            settings = Settings(select=EVERYWHERE, predict=predict, export=EXACT)
            (job,) = plan_jobs([path], place / "out")
            assert segment_job(job, model, client=client, settings=settings).status == "done"
    shutil.copytree(place / "out" / "plain slide", place / "out" / "many")
    write_stars(place / "out" / "many" / "annotations.geojson")
    return place / "out"


def write_stars(path):
    """Write polygons of all sizes, every third with a hole, that lie over one another."""
    random, features = np.random.default_rng(0), []
    for n in range(150):
        angles = np.linspace(0, 2 * np.pi, random.integers(5, 200), endpoint=False)
        radius = random.uniform(0.6, 1, len(angles)) * np.exp(random.uniform(0, 6))
        ring = np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None]
        rings = [ring, ring[::-1] * 0.5][: 2 if n % 3 == 0 else 1]
        middle = random.uniform(0, 1500, 2)
        closed = [np.round(np.concatenate([r, r[:1]]) + middle, 2).tolist() for r in rings]
        properties = {
            "classification": {"name": ("Tumor", "Stroma")[n % 2]},
            "name": f"star {n}",
            "measurements": {"Mean probability": (n * 37 % 150) / 150} if n % 5 else {},
        }
        geometry = {"type": "Polygon", "coordinates": closed}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    document = {"type": "FeatureCollection", "features": features}
    path.write_text(json.dumps(document), "utf-8")


@pytest.fixture(scope="module")
def viewer(output):
    with serve(output) as viewer:
        yield viewer


@pytest.fixture
def folder(tmp_path, output):
    """Return a copy of the run of the plain slide."""
    return Path(shutil.copytree(output / "plain slide", tmp_path / "out" / "plain slide"))


def get(viewer, path, **headers):
    """Return status, headers and body of what is at a path of the server."""
    request = urllib.request.Request(viewer.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def get_json(viewer, path):
    status, _, body = get(viewer, path)
    assert status == 200, body
    return json.loads(body)


def sentence(viewer, path):
    """Return status and text of a refusal."""
    status, headers, body = get(viewer, path)
    assert headers["Content-Type"].startswith("text/plain")
    assert body.count(b"\n") == 1
    assert b"Traceback" not in body
    return status, body.decode().strip()


def mosaic(viewer, run, layer, level, *, query=""):
    """Return a level of a layer, put together from all of its tiles, as RGBA."""
    facts = get_json(viewer, f"runs/{run}")
    width, height = facts[layer if layer in facts else "mask"][level]["size"]
    whole = np.zeros((height, width, 4), np.uint8)
    for row in range(-(-height // TILE)):
        for column in range(-(-width // TILE)):
            status, _, body = get(viewer, f"runs/{run}/{layer}/{level}/{column}/{row}{query}")
            assert status == 200, body
            pixels = np.asarray(Image.open(io.BytesIO(body)).convert("RGBA"))
            place = whole[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            assert place.shape == pixels.shape
            place[:] = pixels
    return whole


PLAIN, BOUNDED = "plain%20slide", "bounded"


def test_tiles_of_the_slide_show_its_pixels_in_their_place(viewer, slide_pixels):
    levels = get_json(viewer, f"runs/{PLAIN}")["slide"]
    assert [level["downsample"] for level in levels] == [[2**n, 2**n] for n in range(len(levels))]
    assert max(levels[-1]["size"]) <= TILE < max(levels[-2]["size"])
    for n in range(len(levels)):
        shown = mosaic(viewer, PLAIN, "slide", n)[..., :3].astype(float)
        side = 2**n
        h, w = slide_pixels.shape[0] // side, slide_pixels.shape[1] // side
        blocks = slide_pixels[: h * side, : w * side].reshape(h, side, w, side, 3)
        expected = blocks.mean(axis=(1, 3))
        shown = shown[:h, :w]
        assert abs(shown - expected).mean() < 4
        dark, wanted = shown[..., 1] < 200, expected[..., 1] < 200
        agreement = {
            (y, x): (np.roll(dark, (y, x), (0, 1)) == wanted).mean()
            for y in (-1, 0, 1)
            for x in (-1, 0, 1)
        }
        assert max(agreement, key=agreement.get) == (0, 0)


def test_the_thumbnail_is_the_slide_made_small(viewer, slide_pixels):
    thumbnail = get_json(viewer, f"runs/{PLAIN}")["thumbnail"]
    picture = Image.open(io.BytesIO(get(viewer, f"runs/{PLAIN}/thumbnail")[2]))
    assert list(picture.size) == thumbnail["size"]
    x, y = (int(d) for d in thumbnail["downsample"])
    assert abs(np.array(picture, float) - slide_pixels[::y, ::x]).mean() < 6


@pytest.mark.parametrize("run", [PLAIN, BOUNDED])
def test_tiles_of_the_mask_are_its_pixels_in_the_colours_of_the_classes(output, viewer, run):
    whole = zarr.open_array(output / run.replace("%20", " ") / "mask.ome.zarr" / "0", mode="r")[:]
    facts = get_json(viewer, f"runs/{run}")
    assert [tuple(of["color"]) for of in facts["classes"]] == COLORS
    colors = np.array([(*color, 255 * bool(i)) for i, color in enumerate(COLORS)], np.uint8)
    assert len(facts["mask"]) == (2 if run == PLAIN else 1)
    for n, level in enumerate(facts["mask"]):
        coarse = 1 if run == PLAIN else 2
        assert level["downsample"] == pytest.approx([coarse * 2**n] * 2)
        expected = colors[whole[:: 2**n, :: 2**n]]
        assert np.array_equal(mosaic(viewer, run, "mask", n), expected)
    without = mosaic(viewer, run, "mask", 0, query="?hide=2")
    assert np.array_equal(without[..., 3] > 0, whole == 1)


def as_kinds(rgba):
    """Return which pixels of a tile are of this run only, of the other only, another class."""
    colors = ((215, 48, 39), (69, 117, 180), (240, 170, 40))
    return [(rgba[..., :3] == color).all(axis=2) & (rgba[..., 3] > 0) for color in colors]


def test_a_run_is_held_against_another_of_its_slide(output, folder):
    """The other lacks one part, has one more, and calls one by another name."""
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    level0 = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
    changed = level0.copy()
    changed[500:600, 300:500], changed[0:90, 0:333] = 0, 2
    changed[610:700, 400:470] = 3 - level0[610:700, 400:470].clip(1, 2)
    for n, level in ((0, changed), (1, changed[::2, ::2])):
        zarr.open_array(other / "mask.ome.zarr" / str(n), mode="r+")[:] = level
    with serve(folder.parent) as viewer:
        runs = get_json(viewer, "runs")
        assert len({run["fingerprint"] for run in runs}) == 1
        for n in (0, 1):
            own, its = (whole[:: 2**n, :: 2**n] for whole in (level0, changed))
            expected = (
                (own > 0) & (its == 0),
                (own == 0) & (its > 0),
                (own != its) & (own * its > 0),
            )
            found = mosaic(viewer, PLAIN, "against/other/differences", n)
            for kind, wanted in zip(as_kinds(found), expected, strict=True):
                assert wanted.any()
                assert np.array_equal(kind, wanted)
            assert np.array_equal(found[..., 3] > 0, own != its)
            shown = mosaic(viewer, PLAIN, "against/other/other", n)
            colors = np.array([(*color, 255 * bool(i)) for i, color in enumerate(COLORS)], np.uint8)
            assert np.array_equal(shown, colors[its])
            itself = mosaic(viewer, PLAIN, f"against/{PLAIN}/differences", n)
            assert not itself[..., 3].any()


def test_a_truth_lies_over_the_run_of_bounds(output, tmp_path):
    """GeoJSON as QuPath writes it, from the corner of the bounds, with a class of its own."""
    square = [[[0, 0], [200, 0], [200, 100], [0, 100], [0, 0]]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": square},
        "properties": {"classification": {"name": "Fat", "color": [1, 2, 3]}},
    }
    truth = tmp_path / "truth.geojson"
    truth.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}), "utf-8")
    with serve(output / "bounded", against=truth) as viewer:
        facts = get_json(viewer, f"runs/{BOUNDED}")
        assert facts["against"] == "truth.geojson"
        shown = mosaic(viewer, BOUNDED, "against//other", 0)[..., 3] > 0
        rows, columns = (np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0))
        # the mask has half of the slide's pixels each way
        box = [columns[0] * 2, columns[-1] * 2 + 2, rows[0] * 2, rows[-1] * 2 + 2]
        assert box == pytest.approx([301, 501, 257, 357], abs=2)
        own = zarr.open_array(output / "bounded" / "mask.ome.zarr" / "0", mode="r")[:] > 0
        only, missed, renamed = as_kinds(mosaic(viewer, BOUNDED, "against//differences", 0))
        for kind, wanted in ((only, own & ~shown), (missed, ~own & shown), (renamed, own & shown)):
            assert np.array_equal(kind, wanted)
    with pytest.raises(StoreError, match="for one run only"):
        serve(output, against=truth)
    truth.write_text("{", "utf-8")
    with pytest.raises(WsiPipelineError, match="This is not JSON"):
        serve(output / "bounded", against=truth)
    other = Path(shutil.copytree(output / "bounded", tmp_path / "other"))
    facts = json.loads((other / RUN_FILE).read_text("utf-8"))
    facts["slide"]["fingerprint"] = "that of another"
    (other / RUN_FILE).write_text(json.dumps(facts), "utf-8")
    with pytest.raises(StoreError, match="is a run of another slide"):
        serve(output / "bounded", against=other)


@pytest.mark.parametrize("mask_mpp", [None, 2.0])
def test_on_pixels_that_are_no_squares_the_mask_lies_on_the_slide(tmp_path, mask_mpp):
    """The picture of the page: where tiles of the mask are red, and where the slide is dark."""
    pixels = np.full((901, 2003, 3), (245, 243, 246), np.uint8)
    pixels[150:450, 400:1600] = 150, 92, 160
    path = tmp_path / "uneven.tif"
    um = (1 / 0.25, 1 / 0.5)  # px per µm, (x, y)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb",
                     resolution=[n * 1e4 for n in um], resolutionunit="CENTIMETER")  # fmt: skip
    predict = PredictOptions(precision="fp32", device="cpu", mask_mpp=mask_mpp)
    model = load_bundle(pointwise_bundle(tmp_path / "model", mpp=0.5))
    (job,) = plan_jobs([path], tmp_path / "out")
    with open_cluster(ScheduleOptions()) as client:
        settings = Settings(select=EVERYWHERE, predict=predict, export=EXACT)
        assert segment_job(job, model, client=client, settings=settings).status == "done"
    with serve(job.folder) as viewer:
        facts = get_json(viewer, "runs/uneven")
        assert facts["mpp"] == pytest.approx([0.25, 0.5])
        for layer in ("slide", "mask"):
            for level in range(len(facts[layer])):
                whole = mosaic(viewer, "uneven", layer, level)
                inside = whole[..., 3] > 0 if layer == "mask" else whole[..., 1] < 170
                rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
                x, y = facts[layer][level]["downsample"]
                box = [columns[0] * x, columns[-1] * x + x, rows[0] * y, rows[-1] * y + y]
                assert box == pytest.approx([400, 1600, 150, 450], abs=max(x, y))


def polygons_of(folder, offset=(0, 0)):
    """Return class, name, measurements and polygon of each feature, the largest first."""
    features = json.loads((folder / "annotations.geojson").read_text("utf-8"))["features"]
    found = [
        (
            f["properties"]["classification"]["name"],
            f["properties"]["name"],
            f["properties"]["measurements"],
            shapely.transform(shape(f["geometry"]), lambda xy: xy + offset),
        )
        for f in features
    ]
    return sorted(found, key=lambda of: -of[3].area)


def lines_of(shown):
    lines = [np.reshape(line, (-1, 2)) for line in shown["lines"]]
    return shapely.MultiLineString([line for line in lines if len(line) > 1])


BOXES = [(-500, -500, 4000, 4000), (400, 300, 350, 420), (700, 700, 3, 900), (1500, 200, 60, 60)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("run", ["many", BOUNDED])
def test_outlines_in_a_box_are_those_of_the_file(output, viewer, run, box):
    x, y, w, h = box
    held = polygons_of(output / run, CORNER if run == BOUNDED else (0, 0))
    window = shapely.box(x, y, x + w, y + h)
    query = f"runs/{run}/polygons?x={x}&y={y}&w={w}&h={h}&downsample="
    found = get_json(viewer, query + "0.01")
    assert (found["more"], found["left_out"]) == (0, 0)
    lengths = {}
    for shown in found["shapes"]:
        name, _, _, polygon = held[shown["id"]]
        assert found["classes"][shown["class"]]["name"] == name
        inside = polygon.boundary.intersection(window).difference(window.boundary)
        lengths[shown["id"]] = lines_of(shown).length
        assert lines_of(shown).length == pytest.approx(inside.length, rel=1e-2, abs=0.1)
        assert lines_of(shown).hausdorff_distance(inside) < 0.1
    within = {
        i: p.boundary.intersection(window).difference(window.boundary).length
        for i, (*_, p) in enumerate(held)
    }
    large = {i for i, length in within.items() if length > 0 and held[i][3].area >= 1e-4}
    assert lengths.keys() == large
    coarse = get_json(viewer, query + "8")
    for shown in coarse["shapes"]:
        polygon = held[shown["id"]][3]
        assert polygon.area >= 64
        near = polygon.boundary.buffer(4 + 1)  # half a pixel of the screen, and rounding
        assert near.covers(lines_of(shown))
    large = {i for i in lengths if held[i][3].area >= 64 and within[i] > 64}
    assert large <= {shown["id"] for shown in coarse["shapes"]}
    n_fine, n_coarse = (
        sum(len(line) for shown in of["shapes"] for line in shown["lines"])
        for of in (found, coarse)
    )
    assert n_coarse < n_fine or run == BOUNDED  # which has four, of few vertices


@pytest.mark.parametrize("run", [PLAIN, BOUNDED])
def test_polygons_lie_on_their_mask(output, viewer, run):
    folder = output / run.replace("%20", " ")
    mask = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
    coarse = 1 if run == PLAIN else 2
    held = polygons_of(folder)
    random = np.random.default_rng(1)
    seen = set()
    for x, y in zip(random.integers(310, 1490, 60), random.integers(260, 1250, 60), strict=True):
        found = get_json(viewer, f"runs/{run}/at?x={x}&y={y}")
        value = int(mask[y // coarse, x // coarse])
        seen.add(value)
        if value == 0:
            assert found is None
            continue
        assert found["class"] == value
        _, title, measurements, polygon = held[found["id"]]
        assert (found["name"], found["area_px"]) == (title, polygon.area)
        assert found["area_mm2"] == measurements["Area mm^2"]
        assert found["probability"] == measurements["Mean probability"]
        hidden = get_json(viewer, f"runs/{run}/at?x={x}&y={y}&hide={value}")
        assert hidden is None or hidden["class"] != value
    assert seen == {0, 1, 2}


def test_only_the_largest_are_shown_where_there_are_too_many(output, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.viewer.polygons.MOST_SHAPES", 5)
    path = output / "many" / "annotations.geojson"
    polygons = load_polygons(path, offset=(0, 0), classes=["Background", "Tumor", "Stroma"])
    everywhere = (-999, -999, 4000, 4000)
    found = polygons.within(everywhere, 3)
    assert [shown["id"] for shown in found["shapes"]] == [0, 1, 2, 3, 4]
    assert found["more"] == sum(p.area >= 9 for *_, p in polygons_of(output / "many")) - 5 > 0
    tumors = polygons.within(everywhere, 3, hidden={2})["shapes"]
    assert [shown["class"] for shown in tumors] == [1] * 5
    monkeypatch.setattr("wsi_pipeline.viewer.polygons.MOST_VERTICES", 10)
    assert [shown["id"] for shown in polygons.within(everywhere, 1)["shapes"]] == [0]
    assert polygons.within((5000, 5000, 10, 10), 1) == {"shapes": [], "more": 0}


def test_regions_are_listed_in_every_order(output, viewer):
    held = polygons_of(output / "many")
    everywhere = {"area": lambda i: -held[i][3].area, "class": lambda i: held[i][0] == "Tumor"}
    for by, key in everywhere.items():
        found, rest = (get_json(viewer, f"runs/many/regions?by={by}&first={n}") for n in (0, 100))
        assert (found["count"], len(found["regions"]), len(rest["regions"])) == (150, 100, 50)
        told = found["regions"] + rest["regions"]
        assert [region["id"] for region in told] == sorted(range(150), key=key)
        for region in told:
            assert region["box"] == pytest.approx(held[region["id"]][3].bounds)
            assert region["area_px"] == pytest.approx(held[region["id"]][3].area)
    up = get_json(viewer, "runs/many/regions?by=area&up=1&first=0&hide=1")
    assert (up["count"], {region["class"] for region in up["regions"]}) == (75, {2})
    areas = [region["area_px"] for region in up["regions"]]
    assert areas == sorted(areas)
    for up in ("", "&up=1"):
        told = []
        for first in (0, 100):
            found = get_json(viewer, f"runs/many/regions?by=probability{up}&first={first}")
            told += [region["probability"] for region in found["regions"]]
        # those without come last
        assert told[120:] == [None] * 30
        assert told[:120] == sorted(told[:120], reverse=not up)
        assert set(told[:120]) == {m["Mean probability"] for *_, m, _ in held if m}


def test_polygons_edited_elsewhere_are_shown_as_well(tmp_path, folder):
    def square(x, side):
        return [[[x, 0], [x + side, 0], [x + side, side], [x, side], [x, 0]]]

    def feature(kind, coordinates, **properties):
        geometry = {"type": kind, "coordinates": coordinates}
        return {"type": "Feature", "geometry": geometry, "properties": properties}

    document = {
        "type": "FeatureCollection",
        "features": [
            feature("MultiPolygon", [square(0, 10), square(100, 20)], classification="Fat"),
            feature("Point", [3, 3], classification={"name": "Tumor"}),
            feature("Polygon", square(200, 30), name="<b>nobody</b>"),
            feature("Polygon", [[["x", 1]]]),
            {"type": "Feature", "geometry": None},
        ],
    }
    (folder / "annotations.geojson").write_text(json.dumps(document, indent=1), "utf-8")
    with serve(folder) as viewer:
        name = quote(folder.name)
        found = get_json(viewer, f"runs/{name}/polygons?x=-5&y=-5&w=999&h=99&downsample=1")
        assert [of["name"] for of in found["classes"][3:]] == ["Fat", "No class"]
        assert found["left_out"] == 1
        assert sorted(shapely.length(lines_of(s)) for s in found["shapes"]) == [40, 80, 120]
        hit = get_json(viewer, f"runs/{name}/at?x=205&y=5")
        assert (hit["name"], hit["area_px"], hit["area_mm2"]) == ("<b>nobody</b>", 900, None)
        (folder / "annotations.geojson").write_text('{"type":"FeatureCollection"', "utf-8")
        os.utime(folder / RUN_FILE, ns=(1, 1))  # as writing again does
        assert sentence(viewer, f"runs/{name}/at?x=205&y=5")[1].count("annotations.geojson") == 1


def raw(viewer, text):
    """Return the status line and headers of the answer to a request as it stands."""
    with socket.create_connection(("127.0.0.1", viewer.server_port), timeout=30) as connection:
        connection.sendall(text.encode("latin-1"))
        with contextlib.closing(http.client.HTTPResponse(connection)) as answer:
            answer.begin()
            return answer.status, answer.headers, answer.read()


def test_foreign_names_are_refused(viewer):
    port = viewer.server_port
    good = [f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"]
    bad = [
        f"evil.example:{port}", f"localhost.evil.example:{port}", "localhost", "127.0.0.1:1",
        f"192.168.1.7:{port}", f"evil@localhost:{port}", f"localhost:{port}/x", "", "[::1", "a b",
    ]  # fmt: skip
    for host in good:
        assert raw(viewer, f"GET {viewer.root}runs HTTP/1.1\r\nHost: {host}\r\n\r\n")[0] == 200
    for host in bad:
        status, _, body = raw(viewer, f"GET {viewer.root}runs HTTP/1.1\r\nHost: {host}\r\n\r\n")
        assert status in (400, 403), host  # 400: that is no host's name at all
        assert viewer.root.encode() not in body
    assert raw(viewer, f"GET {viewer.root}runs HTTP/1.0\r\n\r\n")[0] == 403


def test_who_does_not_know_the_address_sees_nothing(viewer, output):
    host, guess = f"Host: 127.0.0.1:{viewer.server_port}", "A" * (len(viewer.root) - 2)
    roots = ["/", f"/{guess}/", viewer.root.upper(), viewer.root[:-1], f"/\xe9{viewer.root[2:]}"]
    for path in ("", "runs", "main.js", "runs/bounded/slide/0/0/0"):
        for root in roots:
            status, headers, body = raw(viewer, f"GET {root}{path} HTTP/1.1\r\n{host}\r\n\r\n")
            assert (status, headers["Content-Type"]) == (403, "text/plain; charset=utf-8")
            assert viewer.root.encode() not in body
    with serve(output) as other:
        assert other.root != viewer.root


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "FOO"])
def test_other_methods_are_refused(viewer, method):
    host = f"127.0.0.1:{viewer.server_port}"
    request = f"{method} / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 3\r\n\r\nabc"
    status, headers, _ = raw(viewer, request)
    assert (status, headers["Allow"], headers["Connection"]) == (405, "GET, HEAD", "close")


@pytest.mark.parametrize("line", ["GET", "GET / HTTP/9", "GET / x y HTTP/1.1", "\x80\xff /"])
def test_damaged_requests_are_refused(viewer, line):
    with contextlib.suppress(http.client.BadStatusLine):  # as to the oldest browsers, bare
        assert 400 <= raw(viewer, f"{line}\r\n\r\n")[0] < 506


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("nothing", 404),
        ("runs/nothing", 404),
        ("runs/", 404),
        ("../../etc/passwd", 404),
        ("static/../main.js", 404),
        ("%2e%2e/%2e%2e/etc/passwd", 404),
        ("runs/../../../etc/passwd", 404),
        ("runs/%2e%2e%2f%2e%2e%2fetc/", 404),
        ("runs/bounded%2frun.json", 404),
        ("runs/bounded/run.json", 404),
        ("runs/bounded/%00", 404),
        ("runs/bounded/slide/0/0", 400),
        ("runs/bounded/slide/0/0/x", 400),
        ("runs/bounded/slide/0/0/-1", 400),
        ("runs/bounded/slide/0/0/1e3", 400),
        ("runs/bounded/slide/0/0/%D9%A1", 400),
        ("runs/bounded/slide/0/0/99999999999", 400),
        ("runs/bounded/slide/99/0/0", 404),
        ("runs/bounded/slide/0/99/0", 404),
        ("runs/bounded/mask/99/0/0", 404),
        ("runs/bounded/mask/0/0/99", 404),
        ("runs/bounded/mask/0/0/0?hide=x", 400),
        ("runs/bounded/mask/0/0/0?hide=1,", 400),
        ("runs/bounded/at?x=1", 400),
        ("runs/bounded/at?x=1&y=nan", 400),
        ("runs/bounded/at?x=1&y=1&y=2", 400),
        ("runs/bounded/regions?by=name&first=0", 400),
        ("runs/bounded/regions?by=area&first=-1", 400),
        ("runs/bounded/regions?by=area", 400),
        ("runs/nothing/preview", 404),
        ("runs/bounded/preview", 404),  # it has no overlay
        ("runs/bounded/preview/x", 404),
        ("runs/bounded/against//other/0/0/0", 404),
        ("runs/bounded/against/nothing/other/0/0/0", 404),
        ("runs/bounded/against/%2e%2e/other/0/0/0", 404),
        ("runs/bounded/against/bounded/mask/0/0/0", 404),
        ("runs/bounded/against/bounded/other/9/0/0", 404),
        ("runs/bounded/against/bounded/other/0/9/0", 404),
        ("runs/bounded/against/bounded/other/0/0", 400),
        ("runs/bounded/polygons?x=0&y=0&w=0&h=5&downsample=1", 400),
        ("runs/bounded/polygons?x=0&y=0&w=5&h=5&downsample=0", 400),
        ("runs/bounded/polygons?x=0&y=0&w=5&h=5&downsample=inf", 400),
    ],
)
def test_wrong_paths_and_numbers_get_a_sentence(viewer, path, status):
    assert sentence(viewer, path)[0] == status


def test_what_a_browser_may_do_and_keep(viewer):
    status, headers, page = get(viewer, "")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"<script>" not in page
    assert b"http" not in page
    for path in ("main.js", "view.js", "tiles.js", "outlines.js", "style.css", "icon.svg"):
        status, headers, body = get(viewer, path)
        assert (status, headers["Cache-Control"]) == (200, "no-cache")
        assert b"innerHTML" not in body
        again = get(viewer, path, **{"If-None-Match": headers["ETag"]})
        assert (again[0], again[2]) == (304, b"")
    _, headers, body = get(viewer, "runs/bounded/slide/0/0/0")
    assert (headers["Cache-Control"], headers["ETag"]) == ("no-store", None)
    connection = http.client.HTTPConnection("127.0.0.1", viewer.server_port, timeout=30)
    with contextlib.closing(connection):
        connection.request("HEAD", f"{viewer.root}runs/bounded/slide/0/0/0")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
        assert answer.headers["Content-Length"] == str(len(body))
        connection.request("GET", f"{viewer.root}icon.svg")  # over the same connection
        assert connection.getresponse().read().startswith(b"<svg")
    assert get(viewer, "nothing")[1]["Cache-Control"] == "no-store"


def test_a_browser_that_goes_away_is_not_talked_about(viewer, capfd):
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", viewer.server_port)) as connection:
            reset = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            host = f"Host: 127.0.0.1:{viewer.server_port}"
            line = f"GET {viewer.root}runs/bounded/slide/0/0/0 HTTP/1.1\r\n"
            connection.sendall(f"{line}{host}\r\n\r\n{line}{host}\r\n\r\n".encode())
    assert get(viewer, "runs")[0] == 200
    assert capfd.readouterr() == ("", "")


class Soft(torch.nn.Module):
    """Probabilities of all sizes: of the first class where it is dark, of the second in between."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        green = x[:, 1:2] * 255
        return torch.cat([torch.zeros_like(green), (150 - green) / 20, (190 - green) / 60], dim=1)


@pytest.fixture(scope="module")
def soft(tmp_path_factory, slide_path):
    """Return the folder of a run that keeps probabilities, at the mask's resolution."""
    place = tmp_path_factory.mktemp("soft")
    model = load_bundle(pointwise_bundle(place / "model", mpp=0.25, program=Soft))
    predict = PredictOptions(precision="fp32", device="cpu")
    outputs = ("zarr", "geojson", "probability")
    settings = Settings(select=EVERYWHERE, predict=predict, export=replace(EXACT, outputs=outputs))
    (job,) = plan_jobs([slide_path], place / "out")
    with open_cluster(ScheduleOptions()) as client:
        assert segment_job(job, model, client=client, settings=settings).status == "done"
    return job.folder


def cut_at(folder, first, second):
    """Return what thresholds of both classes make of a run's probabilities, class indices."""
    shares = zarr.open_array(folder / "probability.ome.zarr" / "0", mode="r")[:] / 255
    over = shares - np.array([first, second])[:, None, None]
    return np.where(over.max(axis=0) >= 0, over.argmax(axis=0) + 1, 0)


THRESHOLDS = [(0.3, 1), (0.7, 0.25), (0.1, 0.1), (1, 1), (0.45, 0.9)]


@pytest.mark.parametrize(("first", "second"), THRESHOLDS)
def test_thresholds_cut_the_mask_anew(soft, first, second):
    expected, run = cut_at(soft, first, second), quote(soft.name)
    asked = f"t={first},{second}"
    with serve(soft) as viewer:
        facts = get_json(viewer, f"runs/{run}")["probability"]
        assert facts["classes"] == [1, 2]
        assert facts["levels"][0] == {"size": list(expected.shape[::-1]), "downsample": [1, 1]}
        colors = np.array([(*color, 255 * bool(i)) for i, color in enumerate(COLORS)], np.uint8)
        for query, wanted in ((asked, expected), (asked + "&hide=2", expected * (expected == 1))):
            tile = get(viewer, f"runs/{run}/cut/0/1/1?{query}")[2]
            shown = np.asarray(Image.open(io.BytesIO(tile)).convert("RGBA"))
            part = colors[wanted[512:1024, 512:1024]]
            assert np.array_equal(shown[..., 3], part[..., 3])
            assert np.array_equal(shown[shown[..., 3] > 0], part[part[..., 3] > 0])
        found = get_json(viewer, f"runs/{run}/areas?{asked}&exact=1")
        assert found["is_exact"]
        for value in (1, 2):
            mm2 = (expected == value).sum() * 0.25**2 * 1e-6
            assert found["amounts"][str(value)] == pytest.approx(mm2)
        # outlines go along all edges of the pixels of a class, and nowhere else
        x, y, w, h = 305, 299, 700, 600
        box = f"x={x}&y={y}&w={w}&h={h}&downsample=0.01&hide=2&exact=1&{asked}"
        found = get_json(viewer, f"runs/{run}/polygons?{box}")
        assert (found["is_exact"], found["more"]) == (True, 0)
        inside = np.pad(expected == 1, 1)[y + 1 : y + h + 1, x + 1 : x + w + 1]
        edges = sum(np.diff(inside.astype(int), axis=axis).__abs__().sum() for axis in (0, 1))
        assert sum(lines_of(own).length for own in found["shapes"]) == pytest.approx(edges)


def test_a_first_answer_is_coarse_and_says_so(soft, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.viewer.cut.QUICK", 1 << 14)
    # as large as the slide: what a page asks for beyond it does not count
    monkeypatch.setattr("wsi_pipeline.viewer.cut.MOST", 1931 * 1487)
    monkeypatch.setattr("wsi_pipeline.viewer.cut.FINE", 0)
    run, expected = quote(soft.name), (cut_at(soft, 0.3, 1) == 1).sum()
    box = "x=-9&y=-9&w=2500&h=2000&downsample=2"
    with serve(soft) as viewer:
        about = get_json(viewer, f"runs/{run}/areas?t=0.3,1")
        assert not about["is_exact"]
        assert about["amounts"]["1"] == pytest.approx(expected * 0.25**2 * 1e-6, rel=0.1)
        exact = get_json(viewer, f"runs/{run}/areas?t=0.3,1&exact=1")
        # once all is counted, so is every other cut
        assert get_json(viewer, f"runs/{run}/areas?t=0.3,1") == exact
        coarse, fine = (
            get_json(viewer, f"runs/{run}/polygons?{box}&t=0.3,1{how}") for how in ("", "&exact=1")
        )
        assert (coarse["is_exact"], fine["is_exact"]) == (False, True)
        sizes = [sum(map(len, s["lines"])) for s in coarse["shapes"]]
        assert 0 < sum(sizes) < sum(sum(map(len, s["lines"])) for s in fine["shapes"])


def test_probabilities_are_a_layer_with_a_colour_map(soft):
    planes = zarr.open_array(soft / "probability.ome.zarr" / "0", mode="r")
    run = quote(soft.name)
    with serve(soft) as viewer:
        for channel in (0, 1):
            tile = get(viewer, f"runs/{run}/probability/{channel}/0/1/0")[2]
            shown = np.asarray(Image.open(io.BytesIO(tile)))
            assert np.array_equal(shown, planes[channel, :512, 512:1024])
        ends = np.asarray(Image.open(io.BytesIO(tile)).convert("RGBA"))
        assert (ends[shown == 0][:, 3] == 0).all()
        for path, status in (
            ("probability/2/0/0/0", 404), ("probability/0/9/0/0", 404),
            ("probability/0/0/9/9", 404),
            ("probability/x/0/0/0", 400), ("cut/0/0/0", 400), ("cut/0/0/0?t=0.5", 404),
            ("cut/0/0/0?t=2,1", 400), ("cut/0/0/0?t=nan,1", 400), ("areas?t=0.1,0.1,0.1", 404),
        ):  # fmt: skip
            assert sentence(viewer, f"runs/{run}/{path}")[0] == status, path


def test_a_run_without_probabilities_says_so(viewer):
    assert get_json(viewer, f"runs/{PLAIN}")["probability"] is None
    assert sentence(viewer, f"runs/{PLAIN}/areas?t=0.5,0.5")[0] == 404
    assert sentence(viewer, f"runs/{PLAIN}/cut/0/0/0?t=0.5,0.5")[0] == 404


@pytest.mark.slow
def test_the_page_cuts_anew_while_a_slider_moves(soft, tmp_path):
    """The slider of the first class: its amount, its colour on the slide, and back again."""

    async def visit(page):
        still = "document.body.dataset.state == 'still'"
        amounts = "[...document.querySelectorAll('#classes span')].map((s) => s.textContent).join()"
        move = "r.value = {}; r.dispatchEvent(new Event('input'))"
        slider = "const r = document.querySelectorAll('.threshold input')[{}]; "
        await page.until(still)
        before = await page.ask(amounts)
        await page.ask("{" + slider.format(1) + move.format(1) + "}")
        red = []
        for share in (0.1, 0.9):
            await page.ask("{" + slider.format(0) + move.format(share) + "}")
            mm2 = (cut_at(soft, share, 1) == 1).sum() * 0.25**2 * 1e-6
            await page.until(f"{amounts}.startsWith('{float(f'{mm2:.3g}'):g} mm²')")
            await page.until("document.querySelector('#notice').textContent == 'outlines cut anew'")
            await page.until(still)
            picture = await page.picture()
            red.append((picture[..., 0] - picture[..., 1:].max(axis=2) > 40)[:, :800].sum())
            told = await page.ask("document.querySelector('#cut').textContent")
            line = ("export", str(soft), "--threshold", f"Tumor={share:.2f}")
            assert f"{shlex.join(line)} --threshold Stroma=1.00" in told
        assert red[0] > 1.5 * red[1] > 0
        await page.ask("document.querySelector('#cut button').click()")
        await page.until(f"{amounts} == '{before}'")
        await page.until(still)

    with serve(soft) as viewer:
        browse(viewer.url, tmp_path / "browser", visit)


@pytest.fixture(scope="module")
def judged(tmp_path_factory, slide_path):
    """Return the folder of a run whose slide is out of focus on its left, and folded below."""
    place = tmp_path_factory.mktemp("judged")
    segment(
        slide_path, model=pointwise_bundle(place / "model", mpp=0.5), output=place / "out",
        tissue="none", device="cpu", outputs=("zarr", "quality"),
    )  # fmt: skip
    folder = place / "out" / "synthetic slide"
    cells = zarr.open_array(folder / "quality.ome.zarr" / "0", mode="r+")
    drawn = np.zeros(cells.shape, np.uint8)
    drawn[:, :10], drawn[15:, 12:] = 1, 3
    cells[:] = drawn
    return folder


def test_the_quality_of_a_slide_is_a_layer(judged, viewer):
    run, cells = quote(judged.name), np.asarray(open_run(judged).quality)
    with serve(judged) as server:
        facts = get_json(server, f"runs/{run}")
        assert facts["quality"] == [{"size": list(cells.shape[::-1]), "downsample": [64, 64]}]
        colors = {q["name"]: q["color"] for q in facts["flaws"]}
        tile = get(server, f"runs/{run}/quality/0/0/0")[2]
        shown = np.asarray(Image.open(io.BytesIO(tile)).convert("RGBA"))
        assert shown.shape[:2] == cells.shape
        assert (shown[cells == 1] == [*colors["out-of-focus"], 255]).all()
        assert (shown[cells == 3] == [*colors["fold"], 255]).all()
        assert (shown[cells == 0][:, 3] == 0).all()
        for path, status in (("0/1/0", 404), ("9/0/0", 404), ("0/0", 400), ("x/0/0", 400)):
            assert sentence(server, f"runs/{run}/quality/{path}")[0] == status, path
    assert get_json(viewer, f"runs/{PLAIN}")["quality"] == []
    assert sentence(viewer, f"runs/{PLAIN}/quality/0/0/0")[0] == 404


@pytest.mark.slow
def test_the_page_switches_the_quality_on_and_off(judged, tmp_path):
    async def visit(page):
        still = "document.body.dataset.state == 'still'"
        box = "document.querySelector('[aria-label=\"show Quality\"]')"
        mask = "document.querySelector('[aria-label=\"show Mask\"]').click()"
        yellow = []
        await page.until(still)
        await page.ask(mask)
        assert await page.ask(f"!{box}.closest('label').hidden")
        assert "out-of-focus" in await page.ask("document.querySelector('#flaws').innerText")
        opacity = "document.querySelector('[aria-label=\"opacity of Quality\"]')"
        await page.ask(f"{opacity}.value = 1; {opacity}.dispatchEvent(new Event('input'))")
        for _ in range(2):
            picture = (await page.picture())[:, :800].astype(int)
            yellow.append((picture[..., 0] - picture[..., 2] > 200).sum())
            await page.ask(f"{box}.focus(); {box}.click()")
        assert yellow[0] > 10_000 > 100 > yellow[1]

    with serve(judged) as server:
        browse(server.url, tmp_path / "browser", visit)


def move_slide(folder, path):
    facts = json.loads((folder / RUN_FILE).read_text("utf-8"))
    facts["slide"]["path"] = str(path)
    (folder / RUN_FILE).write_text(json.dumps(facts), "utf-8")


def test_without_its_slide_a_run_shows_the_rest(folder, slide_path, tmp_path):
    gone = tmp_path / "gone.tif"
    move_slide(folder, gone)
    name = quote(folder.name)
    with serve(folder) as viewer:
        facts = get_json(viewer, f"runs/{name}")
        assert str(gone) in facts["problems"][0]
        assert "not found" in facts["problems"][0]
        assert (facts["slide"], len(facts["mask"])) == ([], 2)
        assert get(viewer, f"runs/{name}/thumbnail")[0] == 200
        assert get(viewer, f"runs/{name}/mask/0/0/0")[0] == 200
        assert get(viewer, f"runs/{name}/slide/0/0/0")[0] == 404
        shutil.copyfile(slide_path, gone)
        os.utime(folder / RUN_FILE, ns=(1, 1))
        assert get_json(viewer, f"runs/{name}")["problems"] == []
    shutil.rmtree(folder / ".store")
    gone.unlink()
    with serve(folder) as viewer:
        assert get_json(viewer, f"runs/{name}")["thumbnail"] is None
        assert sentence(viewer, f"runs/{name}/thumbnail")[0] == 404
    with serve(folder, slide=slide_path) as viewer:
        assert get_json(viewer, f"runs/{name}")["problems"] == []
        assert get(viewer, f"runs/{name}/slide/0/0/0")[0] == 200


def test_a_path_may_count_from_where_the_output_folder_was_made(folder, slide_path, tmp_path):
    (tmp_path / "slides").mkdir()
    shutil.copyfile(slide_path, tmp_path / "slides" / "a.tif")
    move_slide(folder, Path("slides") / "a.tif")
    with contextlib.closing(open_shown(folder)) as shown:
        assert (shown.slide.path, shown.problems) == (tmp_path / "slides" / "a.tif", ())


def test_another_slide_is_never_shown_under_a_mask(folder, tmp_path, slide_pixels, make_slide):
    other = make_slide(tmp_path / "other.tif", slide_pixels[::-1], 0.25)
    move_slide(folder, other)
    with serve(folder) as viewer:
        facts = get_json(viewer, f"runs/{quote(folder.name)}")
        assert "is not the slide that was segmented" in facts["problems"][0]
        assert facts["slide"] == []
        assert facts["thumbnail"] is not None
    grid = folder / ".store" / "grid.zarr" / "zarr.json"
    meta = json.loads(grid.read_text("utf-8"))
    meta["attributes"]["fingerprint"] = "that of another"
    grid.write_text(json.dumps(meta), "utf-8")
    with contextlib.closing(open_shown(folder)) as shown:
        assert shown.thumbnail is None
    with pytest.raises(SourceError, match="is not the slide that was segmented"):
        serve(folder, slide=other)
    with pytest.raises(StoreError, match="for one run only"):
        serve(folder.parent, slide=other)


def test_what_cannot_be_read_of_a_slide_is_hatched(folder, slide_pixels, make_slide, tmp_path):
    path = make_slide(tmp_path / "damaged.tif", slide_pixels, 0.25, levels=(1,))
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[1], file.pages[0].databytecounts[1]
    with path.open("r+b") as file:  # the tile from (256, 0) to (512, 256)
        file.seek(offset)
        file.write(b"\xff" * count)
    with contextlib.closing(open_shown(folder)) as shown, open_source(path) as slide:
        damaged = replace(shown, views=(slide.at(0.25), slide.at(0.5)))
        for level in (0, 1):
            picture = Image.open(io.BytesIO(damaged.slide_tile(level, 0, 0)))
            side = 256 >> level
            lost = np.asarray(picture.convert("L"))[:side, side : 2 * side]
            assert 0.04 < (lost < 190).mean() < 0.3
            assert (lost > 230).mean() > 0.5
            rest = np.asarray(picture)[side:, : 2 * side].astype(int)
            step = 1 << level
            expected = slide_pixels[256 : 512 * step, :512:step][::step]
            assert abs(rest[: len(expected)][:100] - expected[:100]).mean() < 12


def test_an_output_folder_lists_all_and_says_what_cannot_be_shown(folder, output):
    out = folder.parent
    shutil.copytree(output / "bounded", out / "a näme&=#?%")
    for name in ("damaged", "image", "failed", "no mask", "half", "odd"):
        (out / name).mkdir()
    (out / "damaged" / RUN_FILE).write_text("{", "utf-8")
    (out / "odd" / RUN_FILE).write_text(
        '{"status": "done", "slide": {"name": "x", "path": "y", "fingerprint": 1}, "model": {},'
        ' "settings": [], "versions": {}}',
        "utf-8",
    )
    shutil.copyfile(folder / RUN_FILE, out / "no mask" / RUN_FILE)
    shutil.copytree(folder, out / "half", dirs_exist_ok=True)
    shutil.rmtree(out / "half" / "mask.ome.zarr" / "1")
    common = {"model": {"name": "m"}, "settings": {}, "versions": {}}
    failed = Run(
        kind="slide",
        status="failed",
        reason="no <b>scanner</b>",
        slide={"name": "f", "path": "f.svs"},
        **common,
    )
    facts = {"name": "i", "path": "i.dcm", "spacing_mm": [1, 1]}
    image = Run(kind="image", status="done", slide=facts, **common)
    write_run_json(out / "failed" / RUN_FILE, failed)
    write_run_json(out / "image" / RUN_FILE, image)
    with serve(out) as viewer:
        runs = {run["folder"]: run for run in get_json(viewer, "runs")}
        assert list(runs) == sorted(path.name for path in out.iterdir())
        for name in ("plain slide", "a näme&=#?%"):
            facts = get_json(viewer, f"runs/{runs[name]['id']}")
            assert (runs[name]["status"], facts["problems"]) == ("done", [])
        assert "is not a run of this version" in runs["damaged"]["reason"]
        assert runs["failed"]["reason"] == "no <b>scanner</b>"
        for name in ("damaged", "image", "odd"):
            assert sentence(viewer, f"runs/{name}")[0] == 500
        facts = get_json(viewer, "runs/failed")
        assert (facts["status"], facts["reason"], facts["size"]) == (
            "failed", "no <b>scanner</b>", None,
        )  # fmt: skip
        for name, said in (("no mask", "has no mask.ome.zarr"), ("half", "is damaged")):
            facts = get_json(viewer, f"runs/{quote(name)}")
            assert said in facts["problems"][0]
            assert facts["mask"] == []
        assert "annotations.geojson" in sentence(viewer, "runs/no%20mask/at?x=0&y=0")[1]
        shutil.copytree(folder, out / "later")
        assert get_json(viewer, "runs/later")["problems"] == []
    for name in ("image", "damaged"):
        with pytest.raises(StoreError, match="is not a run of this version"):
            serve(out / name)
    with pytest.raises(StoreError, match="no finished run in"):
        serve(folder / ".store")


def test_slides_that_are_looked_at_in_turn_are_closed_when_nobody_reads(output, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.viewer.server.MOST_OPEN", 1)
    opened, closed = [], []

    def watch(*arguments):
        shown = open_shown(*arguments)
        opened.append(pixels := shown.slide.pixels)
        close = pixels.close
        monkeypatch.setattr(pixels, "close", lambda: (closed.append(pixels), close()))
        return shown

    monkeypatch.setattr("wsi_pipeline.viewer.server.open_shown", watch)
    wrong = []
    with serve(output) as viewer:

        def look(n):
            for i in range(3):
                run = (PLAIN, BOUNDED)[(n + i) % 2]
                answer = get(viewer, f"runs/{run}/slide/0/{i % 3}/{n % 2}")
                if answer[0] != 200:
                    wrong.append(answer)

        threads = [threading.Thread(target=look, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(opened) > 2
        assert set(map(id, closed)) < set(map(id, opened))
    assert sorted(map(id, opened)) == sorted(map(id, closed))


def test_a_taken_port_and_unknown_hosts_are_told(viewer, output):
    with pytest.raises(StoreError, match="give another --port"):
        serve(output, port=viewer.server_port)
    with pytest.raises(StoreError, match="cannot listen on"):
        serve(output, host="256.0.0.1")
    with serve(output, host="0.0.0.0") as everywhere:
        port = everywhere.server_port
        line = f"GET {everywhere.root} HTTP/1.1\r\n"
        assert raw(everywhere, f"{line}Host: 192.168.1.7:{port}\r\n\r\n")[0] == 200
        assert raw(everywhere, f"{line}Host: evil.example:{port}\r\n\r\n")[0] == 403


def test_the_command_serves_until_ctrl_c(output):
    command = [sys.executable, "-m", "wsi_pipeline", "view", str(output), "--no-browser"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    deaf = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # as scripts start theirs with &
    with subprocess.Popen(command, preexec_fn=deaf, **pipes) as process:
        try:
            url = process.stdout.readline().strip()
            with urllib.request.urlopen(f"{url}runs", timeout=30) as answer:
                assert len(json.load(answer)) == 3
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "Ctrl-C ends it.\n")
    result = CliRunner().invoke(group, ["view", str(output), "--slide", str(output)])
    assert result.exit_code == 1
    assert "for one run only" in result.stderr


SWITCHES = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-port=0", "--force-device-scale-factor=1", "about:blank",
]  # fmt: skip


class Page:
    """A page in a browser without a window, by the browser's own protocol."""

    def __init__(self, socket):
        self.socket, self.told = socket, []

    async def call(self, method, **params):
        number = len(self.told)
        await self.socket.write_message(
            json.dumps({"id": number, "method": method, "params": params})
        )
        while True:
            self.told.append(json.loads(await self.socket.read_message()))
            if self.told[-1].get("id") == number and "method" not in self.told[-1]:
                return self.told[-1]["result"]

    async def ask(self, code):
        found = await self.call("Runtime.evaluate", expression=code, returnByValue=True)
        return found["result"].get("value")

    async def until(self, code):
        for _ in range(300):
            if await self.ask(code):
                return
            await asyncio.sleep(0.1)
        pytest.fail(f"never: {code}")

    async def picture(self):
        found = await self.call("Page.captureScreenshot", format="png")
        with Image.open(io.BytesIO(base64.b64decode(found["data"]))) as picture:
            return np.asarray(picture.convert("RGB")).astype(float)

    async def key(self, key):
        for kind in ("keyDown", "keyUp"):
            text = key if kind == "keyDown" and len(key) == 1 else ""
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text)

    async def mouse(self, kind, x, y, **more):
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)


def browse(url, folder, visit):
    """Open a page in a window of 1,280 × 800 px and visit it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no chromium to look at the page with")
    command = [browser, f"--user-data-dir={folder}", *SWITCHES]

    async def go(port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            (tab,) = (tab for tab in json.load(answer) if tab["type"] == "page")
        page = Page(await websocket_connect(tab["webSocketDebuggerUrl"], max_message_size=2**26))
        await page.call("Runtime.enable")
        await page.call("Log.enable")
        await page.call("Emulation.setDeviceMetricsOverride", width=1280, height=800,
                        deviceScaleFactor=1, mobile=False)  # fmt: skip
        await page.call("Page.navigate", url=url)
        await visit(page)
        page.socket.close()
        while await page.socket.read_message() is not None:
            pass
        await asyncio.sleep(0)
        events = ("Runtime.exceptionThrown", "Log.entryAdded")
        assert [of for of in page.told if of.get("method") in events] == []

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if "DevTools listening" in line)
            asyncio.run(go(re.search(r":(\d+)/", line)[1]))
        finally:
            process.terminate()


@pytest.mark.slow
def test_the_page_shows_slide_mask_and_polygons_in_their_place(viewer, tmp_path, slide_pixels):
    async def visit(page):
        still = "document.body.dataset.state == 'still'"
        said = "document.querySelector('{}').textContent"
        await page.until(still)
        assert await page.ask("document.title") == "plain slide.tif"
        assert await page.ask("document.querySelectorAll('#said li').length") == 0
        looks_right(await page.picture(), (200, 210), slide_pixels, opacity=0.4)
        for kind in ("mousePressed", "mouseReleased"):
            await page.mouse(kind, 640 - 205, 500 - 200, button="left", clickCount=1)
        await page.until(said.format("#found") + ".includes('Tumor')")
        assert "0.01" in await page.ask(said.format("#found"))
        # without mask and outlines, twice as large about a point that stays where it is
        await page.ask("document.querySelectorAll('#sliders [type=checkbox]')[1].click()")
        await page.ask("document.querySelectorAll('#sliders [type=checkbox]')[2].click()")
        await page.mouse("mouseMoved", 400, 300)
        await page.mouse("mouseWheel", 400, 300, deltaX=0, deltaY=-300)
        await page.until("location.hash.endsWith('d=0.5')")
        assert await page.ask(said.format("#where")) == "x 605, y 510 px"
        await page.until(still)
        larger = slide_pixels.repeat(2, 0).repeat(2, 1)
        looks_right(await page.picture(), (2 * 605 - 400, 2 * 510 - 300), larger, opacity=0)
        await page.ask("location.hash = location.hash.replace(/run=[^&]*/, 'run=bounded')")
        await page.until("document.title == 'bounded.zarr'")
        await page.until(still)
        await page.until(said.format("#where"))
        await page.until("location.hash.includes('run=bounded')")
        # of this slide: the pointer rests, in the middle is what the address says
        x, y, d = map(float, re.findall(r"[xyd]=([\d.-]+)", await page.ask("location.hash")))
        told = map(int, re.findall(r"-?\d+", await page.ask(said.format("#where"))))
        assert list(told) == pytest.approx([x + (400 - 495) * d, y + (300 - 400) * d], abs=2)
        await page.mouse("mouseMoved", 1200, 300)
        assert await page.ask(said.format("#where")) == ""

    # a level-0 pixel is one of the screen; of 1,280 the slide has the left 990
    browse(f"{viewer.url}#run={PLAIN}&x=700&y=610&d=1", tmp_path / "browser", visit)


@pytest.mark.slow
def test_the_page_leads_by_keys_through_runs_and_regions(output, tmp_path):
    out = Path(shutil.copytree(output, tmp_path / "out"))
    shutil.copytree(out / "plain slide", out / "second")
    mask = zarr.open_array(out / "second" / "mask.ome.zarr" / "0", mode="r+")
    mask[450:500, 450:650] = 0
    held = polygons_of(out / "plain slide")

    async def visit(page):
        still = "document.body.dataset.state == 'still'"
        said = "document.querySelector('{}').textContent"

        async def look():
            x, y, d = re.findall(r"[xyd]=([\d.-]+)", await page.ask("location.hash"))
            return float(x), float(y), float(d)

        await page.until(still)
        assert await page.ask(said.format("#zoom")) == "40×"  # 0.25 µm a pixel
        await page.key("?")
        assert await page.ask("document.querySelector('#keys').open")
        await page.ask("document.querySelector('#keys button').click()")
        # the ruler, from the middle: 100 px to the right, in a view that moves along
        await page.key("r")
        await page.mouse("mousePressed", 300, 300, button="left", clickCount=1)
        await page.mouse("mouseMoved", 330, 340, button="left", buttons=1)
        await page.mouse("mouseReleased", 330, 340, button="left", clickCount=1)
        await page.until("document.querySelector('#ruler').ariaLabel == '12.5 µm'")
        assert (await look())[:2] == (700, 610)  # nothing has moved
        await page.key("r")
        # what this run only has is red over the slide
        await page.until("!document.querySelector('#compare').hidden")
        choose = "s.value = 'second'; s.dispatchEvent(new Event('change'))"
        await page.ask(f"{{const s = document.querySelector('#compare select'); {choose}}}")
        await page.until(still)
        # (700, 610) lies at (495, 400)
        blue = (await page.picture())[..., 2]
        # under the mask the slide is (170, 55, 96), and that under the difference (202, 50, 56)
        assert np.median(blue[245:285, 250:440]) < 75 < np.median(blue[300:340, 440:480])
        await page.key("n")
        await page.until(said.format("#found") + f".includes('{held[0][1]}')")
        await page.key("n")
        await page.until(said.format("#found") + f".includes('{held[1][1]}')")
        x0, y0, x1, y1 = held[1][3].bounds
        await page.until("!location.hash.includes('x=700&')")
        await page.until(still)
        await asyncio.sleep(0.5)
        assert (await look())[:2] == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=1)
        await page.key("p")
        await page.until(said.format("#found") + f".includes('{held[0][1]}')")
        await page.until(still)
        await page.key("h")
        bare = await page.picture()
        await page.key("h")
        assert (abs(bare - await page.picture())[100:700, :800] > 20).any()
        # a click in the middle of the overview leads to the middle of the slide
        at = await page.ask(
            "JSON.stringify(document.querySelector('#map').getBoundingClientRect())"
        )
        at = json.loads(at)
        x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
        await page.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
        await page.mouse("mouseReleased", x, y, button="left", clickCount=1)
        await page.until("/x=9(5|6|7)\\d&y=7(3|4|5)\\d/.test(location.hash)")
        await page.key("]")
        await page.until("location.hash.startsWith('#run=second')")
        await page.key("g")
        await page.until("document.querySelector('#gallery').open")
        assert await page.ask("document.querySelectorAll('#gallery div button').length") == 4

    with serve(out) as viewer:
        browse(f"{viewer.url}#run={PLAIN}&x=700&y=610&d=1", tmp_path / "browser", visit)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [150, 25]
)  # px from polygon to polygon: 24, and too many for thick lines
def test_outlines_stand_out_from_tissue(tmp_path, cmu_path, step):
    slide = Path(shutil.copyfile(cmu_path, tmp_path / "slide.svs"))
    model = load_bundle(pointwise_bundle(tmp_path / "model", mpp=0.5))
    (job,) = plan_jobs([slide], tmp_path / "out")
    settings = Settings(select=EVERYWHERE, predict=PredictOptions(mask_mpp=4), export=EXACT)
    with open_cluster(ScheduleOptions()) as client:
        assert segment_job(job, model, client=client, settings=settings).status == "done"
    colors = [*QUPATH_COLORS.items(), *((f"{color}", color) for color in COLORS_UNNAMED)]
    places = itertools.product(range(700, 1500, step), range(900, 1500, step))
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(shapely.Point(x, y).buffer(0.37 * step)),
            "properties": {"classification": {"name": name, "color": color}},
        }
        for (x, y), (name, color) in zip(places, itertools.cycle(colors), strict=False)
    ]
    told = json.dumps({"type": "FeatureCollection", "features": features})
    (job.folder / "annotations.geojson").write_text(told, "utf-8")
    least = {}

    async def visit(page):
        still = "document.body.dataset.state == 'still'"
        for mask in (False, True):
            shown = []
            for _ in "ab":
                await page.until(still)
                shown.append((await page.picture())[60:740, :800])
                await page.ask("document.querySelectorAll('#sliders [type=checkbox]')[2].click()")
            least[mask] = least_contrast(*shown, reach=6, near=2)
            await page.ask("document.querySelectorAll('#sliders [type=checkbox]')[1].click()")

    with serve(tmp_path / "out") as viewer:
        browse(f"{viewer.url}#run=slide&x=1100&y=1200&d=1", tmp_path / "browser", visit)
    assert min(least.values()) >= LEAST, least


def looks_right(shown, corner, pixels, *, opacity):
    """Hold the page's picture of the slide against its pixels from a corner on, (x, y)."""
    x, y = corner
    shown = shown[60:740, :800]  # without what lies over the slide
    pixels = pixels[y + 60 : y + 740, x : x + 800].astype(float)
    mask = np.digitize(-pixels[..., 1], [-214.5, -149.5])
    colors = np.array([(0, 0, 0), COLORS[2], COLORS[1]], float)[mask]
    alpha = opacity * (mask > 0)[..., None]
    is_near = abs(shown - (1 - alpha) * pixels - alpha * colors).max(axis=2) < 30
    assert is_near.mean() > 0.96  # but for outlines
    assert all(is_near[mask == value].mean() > 0.9 for value in np.unique(mask))
    if opacity:
        assert len(np.unique(mask)) == 3
        assert (abs(shown - COLORS[1]).max(axis=2) < 20).sum() > 500  # outlines


def test_connections_are_bounded(viewer):
    before = threading.active_count()
    with contextlib.ExitStack() as closing:
        for _ in range(3 * MOST_CONNECTIONS):
            closing.enter_context(socket.create_connection(("127.0.0.1", viewer.server_port)))
        time.sleep(0.5)
        assert threading.active_count() - before <= MOST_CONNECTIONS
    for _ in range(50):  # those are gone, and there is room again
        with contextlib.suppress(OSError):
            assert get(viewer, "runs")[0] == 200
            return
        time.sleep(0.2)
    pytest.fail("no answer")


# --- images and volumes


def segment_scan(path, model, output, *, outputs=()):
    """Segment an image or volume; return the folder of its run."""
    predict = PredictOptions(precision="fp32", device="cpu")
    settings = Settings(predict=predict, export=ExportOptions(outputs=outputs))
    (job,) = plan_jobs([path], output)
    with open_cluster(ScheduleOptions()) as client:
        run = segment_job(job, load_bundle(model), client=client, settings=settings)
    assert run.status == "done", run.reason
    return job.folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return the output folder of a grey and of a coloured image of odd sizes."""
    place = tmp_path_factory.mktemp("images")
    grey = (blobs((533, 701)) // 4).astype(np.uint8)
    Image.fromarray(grey).save(place / "grey.png")
    Image.fromarray(np.stack([grey // 2, grey, 255 - grey], -1)[:, :500]).save(place / "rgb.png")
    model = scan_bundle(
        place / "model", modality="image", resolution="fit = [533, 701]", patch_size=(256, 256)
    )
    segment_scan(place / "grey.png", model, place / "out")
    model = scan_bundle(
        place / "rgb model", modality="image", resolution="fit = [533, 500]", patch_size=(256, 256)
    )
    segment_scan(place / "rgb.png", model, place / "out")
    return place / "out"


@pytest.mark.parametrize("name", ["grey", "rgb"])
def test_an_image_is_shown_with_its_mask_and_polygons(images, name):
    grey = [0.299, 0.587, 0.114]  # JPEG keeps colours at half the resolution
    pixels = np.asarray(Image.open(images.parent / f"{name}.png").convert("RGB")) @ grey
    classes = np.asarray(Image.open(images / name / "mask.png"))
    colors = np.array([(0, 0, 0, 0), (200, 200, 0, 255), (200, 0, 0, 255)], np.uint8)
    assert np.bincount(classes.ravel(), minlength=3).min() > 1000
    with serve(images) as viewer:
        assert [run["status"] for run in get_json(viewer, "runs")] == ["done", "done"]
        status, headers, small = get(viewer, f"runs/{name}/preview")
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        assert small == read_preview(images / name / "overlay.png", 320)
        facts = get_json(viewer, f"runs/{name}")
        assert (facts["kind"], facts["problems"], facts["mpp"]) == ("image", [], None)
        assert (facts["size"], facts["unit"]) == ([*classes.shape[::-1]], "px")
        assert [of["amount"] for of in facts["classes"]] == [
            None, (classes == 1).sum(), (classes == 2).sum(),
        ]  # fmt: skip
        sizes = [level["size"] for level in facts["slide"]]
        assert sizes == [list(classes.shape[::-1]), [-(-n // 2) for n in classes.shape[::-1]]]
        h, w = (2 * (n // 2) for n in classes.shape)
        half = pixels[:h, :w].reshape(h // 2, 2, w // 2, 2).mean((1, 3))
        for level, expected in enumerate((pixels, half)):
            shown = mosaic(viewer, name, "slide", level)[..., :3] @ grey
            assert abs(shown[: len(expected), : len(expected[0])] - expected).mean() < 3
        for level in range(len(facts["mask"])):
            expected = colors[classes[:: 2**level, :: 2**level]]
            shown = mosaic(viewer, name, "mask", level)
            assert np.array_equal(shown[..., 3], expected[..., 3])
            assert np.array_equal(shown[shown[..., 3] > 0], expected[shown[..., 3] > 0])
        for x, y in np.random.default_rng(0).integers(0, 500, (40, 2)).tolist():
            found = get_json(viewer, f"runs/{name}/at?x={x}&y={y}")
            assert (found["class"] if found else 0) == classes[y, x]
        box = f"runs/{name}/polygons?x=-9&y=-9&w=800&h=800&downsample=0.1"
        shown = get_json(viewer, box)
        held = polygons_of(images / name)
        assert {s["id"] for s in shown["shapes"]} == set(range(len(held)))
        for own in shown["shapes"]:
            outline = held[own["id"]][3].boundary
            assert lines_of(own).length == pytest.approx(outline.length, rel=0.05)


def test_an_image_that_was_moved_or_replaced_is_told(images, tmp_path):
    folder = Path(shutil.copytree(images / "grey", tmp_path / "out" / "grey"))
    move_slide(folder, tmp_path / "gone.png")
    with serve(folder) as viewer:
        facts = get_json(viewer, "runs/grey")
        assert "the image was not found at" in facts["problems"][0]
        assert (facts["slide"], len(facts["mask"])) == ([], 1)
        assert get(viewer, "runs/grey/mask/0/0/0")[0] == 200
    with serve(folder, slide=images.parent / "grey.png") as viewer:
        assert get_json(viewer, "runs/grey")["problems"] == []
    with pytest.raises(SourceError, match="is not the image that was segmented"):
        serve(folder, slide=images.parent / "rgb.png")
    (folder / "mask.png").unlink()  # what the working folder keeps is the same
    with serve(folder, slide=images.parent / "grey.png") as viewer:
        whole = np.asarray(Image.open(images / "grey" / "mask.png"))
        assert np.array_equal(mosaic(viewer, "grey", "mask", 0)[..., 3] > 0, whole > 0)
    Image.fromarray(np.full((533, 701), 7, np.uint8)).save(folder / "mask.png")
    with serve(folder) as viewer:
        assert "holds the value 7; its classes are 0 to 2" in str(get_json(viewer, "runs/grey"))
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(folder / "mask.png")
    with serve(folder) as viewer:
        assert "has 7 × 5 px, the image 701 × 533" in str(get_json(viewer, "runs/grey"))


AFFINES = {
    "upright": np.diag([0.9, 1.1, 2.5, 1.0]),
    "LPS": np.diag([-0.9, -1.1, 2.5, 1.0]),
    "turned": np.array([[0, 0, -2.5, 80], [0.9, 0, 0, -7], [0, -1.1, 0, 30], [0, 0, 0, 1.0]]),
}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Return the output folder of volumes of one shape, (x, y, z), that lie in all ways."""
    place = tmp_path_factory.mktemp("volumes")
    for name, affine in AFFINES.items():
        spacing = [round(float(mm), 3) for mm in np.linalg.norm(affine[:3, :3], axis=0)][::-1]
        model = scan_bundle(
            place / "model" / name,
            resolution=f"spacing_mm = {spacing}",
            patch_size=(16, 32, 32),
            keys="scale = [0.0, 1024.0]",
        )
        voxels = blobs((19, 43, 37), seed=3).T
        nibabel.save(nibabel.Nifti1Image(voxels, affine), place / f"{name}.nii.gz")
        segment_scan(place / f"{name}.nii.gz", model, place / "out")
    return place / "out"


def planes_of(path):
    """Return each plane's slices as radiologists look at them: by nibabel, from a file."""
    voxels = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)
    seen = voxels[::-1, ::-1, ::-1]  # from the right, the front and the top on
    return {
        "axial": [seen[:, :, i].T for i in range(seen.shape[2])],
        "coronal": [seen[:, i, :].T for i in range(seen.shape[1])],
        "sagittal": [seen[i, :, :].T for i in range(seen.shape[0])],
    }


def slice_of(viewer, run, layer, plane, index, shape):
    status, headers, body = get(viewer, f"runs/{run}/{layer}/{plane}/{index}")
    assert status == 200, body
    assert headers["Cache-Control"] == "no-store"
    return np.frombuffer(body, {"values": "<f4", "classes": "u1"}[layer]).reshape(shape)


@pytest.mark.parametrize("name", AFFINES)
def test_slices_of_a_volume_are_those_of_its_file_as_the_body_lies(volumes, name):
    files = {"values": volumes.parent / f"{name}.nii.gz", "classes": volumes / name / "mask.nii.gz"}
    codes = nibabel.aff2axcodes(AFFINES[name])
    with serve(volumes) as viewer:
        facts = get_json(viewer, f"runs/{name}")
        assert (facts["kind"], facts["problems"]) == ("volume", [])
        assert facts["layers"] == ["values", "classes"]
        ways = {"axial": "IS", "coronal": "PA", "sagittal": "LR"}
        for plane, body in zip(facts["planes"], (2, 1, 0), strict=True):
            own = facts["body"][body]
            assert codes[own["axis"]] in ways[plane["name"]]
            assert own["mm"] == pytest.approx(np.linalg.norm(AFFINES[name][:3, own["axis"]]))
            for layer, path in files.items():
                expected = planes_of(path)[plane["name"]]
                assert len(expected) == own["size"] == (37, 43, 19)[own["axis"]]
                # slices are numbered as in the file, where the first may lie at either end
                if codes[own["axis"]] in "RAS":
                    expected = expected[::-1]
                for index, wanted in enumerate(expected):
                    shown = slice_of(viewer, name, layer, plane["name"], index, wanted.shape)
                    assert np.array_equal(shown, wanted)
        every = json.loads((volumes / name / RUN_FILE).read_text("utf-8"))["lesions"].values()
        lesions = itertools.chain.from_iterable(of["listed"] for of in every)
        largest = max(lesions, key=lambda lesion: lesion["pixels"])
        ends = zip(largest["start"], facts["start"], largest["stop"], strict=True)
        assert all(a <= at < b for a, at, b in ends)
        for path, status in (
            ("values/axial/99", 404), ("values/oblique/0", 404), ("nothing/axial/0", 404),
            ("values/axial/x", 400), ("values/axial", 404), ("slide/0/0/0", 404),
        ):  # fmt: skip
            assert sentence(viewer, f"runs/{name}/{path}")[0] == status


def test_of_several_time_points_the_one_that_was_segmented_is_shown(tmp_path):
    first, second = (blobs((19, 43, 37), seed=seed).T for seed in (1, 2))
    path = tmp_path / "dce.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.stack([first, second], axis=-1), np.eye(4)), path)
    model = scan_bundle(tmp_path / "model", keys="scale = [0.0, 1024.0]")
    settings = Settings(
        select=SelectOptions(time_point=1),
        predict=PredictOptions(precision="fp32", device="cpu"),
        export=ExportOptions(outputs=("nifti",)),
    )
    (job,) = plan_jobs([path], tmp_path / "out")
    with open_cluster(ScheduleOptions()) as client:
        segment_job(job, load_bundle(model), client=client, settings=settings)
    mask = np.asarray(nibabel.load(job.folder / "mask.nii.gz").dataobj)
    (job.folder / "mask.nii.gz").unlink()  # the working folder has it, too
    with serve(job.folder) as viewer:
        assert get_json(viewer, "runs/dce")["problems"] == []
        for layer, wanted in (("values", second), ("classes", mask)):
            shown = slice_of(viewer, "dce", layer, "sagittal", 4, (19, 43))
            assert np.array_equal(shown, wanted[4, ::-1, ::-1].T)


def test_a_corrected_mask_of_a_volume_is_shown_where_it_belongs(volumes, tmp_path):
    folder = Path(shutil.copytree(volumes / "turned", tmp_path / "out" / "turned"))
    mask = nibabel.load(folder / "mask.nii.gz")
    corrected = np.zeros(mask.shape, np.uint8)
    corrected[3:30, 4:9, 11:17] = 2
    other = nibabel.as_closest_canonical(nibabel.Nifti1Image(corrected, mask.affine))
    assert other.shape != mask.shape
    nibabel.save(other, folder / "mask.nii.gz")
    with serve(folder) as viewer:
        facts = get_json(viewer, "runs/turned")
        assert facts["problems"] == []
        for plane, slices in planes_of(folder / "mask.nii.gz").items():
            across = {p["name"]: p["across"] for p in facts["planes"]}[plane]
            if nibabel.aff2axcodes(AFFINES["turned"])[facts["body"][across]["axis"]] in "RAS":
                slices = slices[::-1]
            for index, wanted in enumerate(slices):
                shown = slice_of(viewer, "turned", "classes", plane, index, wanted.shape)
                assert np.array_equal(shown, wanted)
    move_slide(folder, tmp_path / "gone.nii")
    with pytest.raises(StoreError, match="has 19 × 37 × 43 px, the volume 37 × 43 × 19"):
        serve(folder)  # of another shape than the run's: it is not known how it lies
    nibabel.save(nibabel.Nifti1Image(corrected, mask.affine), folder / "mask.nii.gz")
    with serve(folder) as viewer:
        assert get_json(viewer, "runs/turned")["layers"] == ["classes"]
    nibabel.save(nibabel.Nifti1Image(corrected + 5, mask.affine), folder / "mask.nii.gz")
    with serve(folder) as viewer:
        assert "holds the value 5" in sentence(viewer, "runs/turned/classes/axial/0")[1]
    shifted = mask.affine.copy()
    shifted[:3, 3] += 9
    nibabel.save(nibabel.Nifti1Image(corrected, shifted), folder / "mask.nii.gz")
    with serve(folder, slide=volumes.parent / "turned.nii.gz") as viewer:
        assert "does not lie on its image" in str(get_json(viewer, "runs/turned")["problems"])


@pytest.mark.slow
def test_the_page_shows_a_volume_in_the_proportions_of_the_body(volumes, tmp_path):
    """A bright box at the right, the front and the top of a body of 66 × 99 × 120 mm."""
    voxels = np.full((44, 33, 40), 40, np.int16)  # to the left, to the front, to the feet
    voxels[4:10, 23:30, 3:9] = 900
    affine = np.array([[-1.5, 0, 0, 30], [0, 3.0, 0, -7], [0, 0, -3.0, 60], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "box.nii")
    model = scan_bundle(
        tmp_path / "model",
        resolution="spacing_mm = [3.0, 3.0, 1.5]",
        patch_size=(16, 32, 32),
        keys="scale = [0.0, 1024.0]",
    )
    folder = segment_scan(tmp_path / "box.nii", model, tmp_path / "out")
    shutil.copytree(volumes / "LPS", folder.parent / "LPS")
    # along and down each plane: mm of the body, and from where to where the box reaches
    planes = {
        "axial": ((66, 99), (6, 15), (99 - 90, 99 - 69)),
        "coronal": ((66, 120), (6, 15), (9, 27)),
        "sagittal": ((99, 120), (99 - 90, 99 - 69), (9, 27)),
    }

    async def visit(page):
        still = "document.body.dataset.state == 'still'"

        async def boxes(test):
            """Return the size of each plane, and where in it colours pass a test, px."""
            picture, found = await page.picture(), {}
            for name in planes:
                place = f"document.querySelector('.{name} div').getBoundingClientRect().toJSON()"
                at = await page.ask(f"JSON.stringify({place})")
                x, y, w, h = (json.loads(at)[key] for key in ("x", "y", "width", "height"))
                part = picture[round(y) : round(y + h), round(x) : round(x + w)]
                inside = np.argwhere(test(part))
                found[name] = (w, h), inside
            return found

        def holds(found):
            scales = set()
            for name, ((along, down), columns, rows) in planes.items():
                (w, h), inside = found[name]
                scales |= {round(w / along, 2), round(h / down, 2)}
                assert len(inside) > 100, name
                scale = w / along
                (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
                assert [left, right, top, bottom] == pytest.approx(
                    [n * scale for n in (*columns, *rows)],
                    abs=3 * scale,  # a voxel: it is smooth
                )
            assert max(scales) - min(scales) <= 0.01

        await page.until(still)
        assert await page.ask("document.querySelectorAll('#said li').length") == 0
        assert "2 lesions" not in await page.ask("document.querySelector('#classes').textContent")
        await page.ask(
            "document.querySelectorAll('#planes :is(b, i)').forEach((it) => it.remove())"
        )
        red = lambda part: (part[..., 0] > 150) & (part[..., 1] < 210) & (part[..., 2] < 210)  # noqa: E731
        holds(await boxes(lambda part: red(part) & (part[..., 0] - part[..., 2] > 40)))
        bright = "document.querySelectorAll('#classes [type=checkbox]')[1]"
        await page.ask(f"{bright}.click()")
        white = lambda part: part.min(axis=2) > 200  # noqa: E731
        holds(await boxes(white))
        # a level above all values: it is dark, and so it is in a slice beside the box
        level = "const [, l] = document.querySelectorAll('#window input'); l.value = l.max;"
        event = "dispatchEvent(new Event('input', {bubbles: true}))"
        await page.ask(f"{{{level} l.{event}}}")
        assert not any(len(inside) > 50 for _, inside in (await boxes(white)).values())
        await page.ask(f"{{{level.replace('l.max', '450')} l.{event}}}")
        assert all(len(inside) > 100 for _, inside in (await boxes(white)).values())
        slide = "const s = document.querySelector('.axial input'); s.value = 30;"
        await page.ask(f"{{{slide} s.{event}}}")
        await page.until(still)
        await page.until("location.hash.endsWith('at=6,26,30')")
        found = await boxes(white)
        assert len(found["axial"][1]) < 50 < 100 < len(found["coronal"][1])
        # a click leads the others there: the middle of the axial plane
        middle = "document.querySelector('.axial div').getBoundingClientRect().toJSON()"
        at = json.loads(await page.ask(f"JSON.stringify({middle})"))
        x, y = at["x"] + at["width"] * 0.26, at["y"] + at["height"] * 0.51
        for kind in ("mousePressed", "mouseReleased"):
            await page.mouse(kind, x, y, button="left", clickCount=1)
        await page.until("location.hash.endsWith('at=11,16,30')")
        await page.mouse("mouseMoved", x, y)
        told = "document.querySelector('#spot').textContent"
        assert await page.ask(told) == "x 11, y 16, z 30: 40"
        await page.ask("location.hash = 'run=LPS&at=3,4,5'")
        await page.until("document.title == 'LPS.nii.gz'")
        await page.until(still)
        await page.until("location.hash == '#run=LPS&at=3,4,5'")

    with serve(folder.parent) as viewer:
        browse(f"{viewer.url}#run=box", tmp_path / "browser", visit)


@pytest.mark.slow
def test_the_page_goes_from_image_to_image(images, tmp_path):
    output = Path(shutil.copytree(images, tmp_path / "out"))
    shutil.copytree(images / "grey", output / "lost")
    move_slide(output / "lost", tmp_path / "gone.png")

    async def visit(page):
        still = "document.body.dataset.state == 'still'"
        for name in ("grey", "rgb"):
            choose = "const c = document.querySelector('#runs');"
            await page.ask(f"{{{choose} c.value = '{name}'; c.dispatchEvent(new Event('change'))}}")
            await page.until(f"document.title == '{name}.png'")
            await page.until(still)
            await page.until(f"location.hash.startsWith('#run={name}&')")
            if name == "grey":  # outlines of so many would hide the rest
                await page.ask("document.querySelectorAll('#sliders [type=checkbox]')[2].click()")
            assert await page.ask("document.querySelectorAll('#said li').length") == 0
            hash = await page.ask("location.hash")
            x, y, d = map(float, re.findall(r"[xyd]=([\d.-]+)", hash))
            classes = np.asarray(Image.open(images / name / "mask.png"))
            pixels = np.asarray(Image.open(images.parent / f"{name}.png").convert("RGB"))
            rows = np.floor(y + (np.arange(100, 700) - 400) * d).astype(int)
            columns = np.floor(x + (np.arange(250, 750) - 495) * d).astype(int)
            colors = np.array([(0, 0, 0), (200, 200, 0), (200, 0, 0)], float)
            seen = np.ix_(rows, columns)
            alpha = 0.4 * (classes[seen] > 0)[..., None]
            expected = (1 - alpha) * pixels[seen] + alpha * colors[classes[seen]]
            shown = (await page.picture())[100:700, 250:750]
            assert np.median(abs(shown - expected)) < 8
        await page.ask("location.hash = 'run=lost'")
        await page.until("document.querySelector('#said').textContent.includes('was not found')")
        await page.until(still)
        red = (abs(await page.picture() - (233, 153, 153)).max(axis=2) < 25).sum()  # over white
        assert red > 1000

    with serve(output) as viewer:
        browse(viewer.url, tmp_path / "browser", visit)


# --- probabilities of images and volumes


@pytest.fixture(scope="module")
def soft_scans(tmp_path_factory):
    """Return the output folder of an image, mirrored and padded, and a volume, with its spacing."""
    place = tmp_path_factory.mktemp("soft scans")
    grey = blobs((150, 101), seed=2) // 4
    grey[:, :50] //= 2
    Image.fromarray(grey.astype(np.uint8)).save(place / "image.png")
    model = scan_bundle(
        place / "image model", modality="image", resolution="fit = [211, 211]",
        patch_size=(64, 64), program=SoftScan,
        keys='orient = "left"\npad = "square"\ninterpolation = "linear"',
    )  # fmt: skip
    segment_scan(place / "image.png", model, place / "out")
    voxels = nibabel.Nifti1Image(blobs((19, 37, 43)).T, np.diag([0.7, 0.9, 1.5, 1]))
    nibabel.save(voxels, place / "volume.nii.gz")
    model = scan_bundle(
        place / "volume model", program=SoftScan, keys="scale = [0.0, 1024.0]",
        resolution="spacing_mm = [1.0, 1.0, 1.0]",
    )  # fmt: skip
    segment_scan(place / "volume.nii.gz", model, place / "out")
    return place / "out"


def read_at(folder, thresholds):
    """Return probabilities at the mask's pixels in 1/255, and the classes by thresholds."""
    with open_run(folder) as run:
        planes = run.probability.read((0,) * run.mask[:].ndim, run.mask.shape)
    over = planes - np.float32(thresholds).reshape(-1, *[1] * (planes.ndim - 1))
    return planes * 255, np.where(over.max(0) >= 0, over.argmax(0) + 1, 0)


def test_an_image_is_cut_anew_in_its_pixels(soft_scans):
    planes = open_run(soft_scans / "image").probability[:]
    with serve(soft_scans) as viewer:
        facts = get_json(viewer, "runs/image")
        assert facts["probability"]["levels"][0]["size"] == list(planes.shape[:0:-1])
        tile = get(viewer, "runs/image/probability/1/0/0/0")[2]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(tile))), planes[1])
        found = get_json(viewer, "runs/image/areas?t=0.3,0.4&exact=1")["amounts"]
        over = planes / 255 - np.array([0.3, 0.4])[:, None, None]
        cut = np.where(over.max(0) >= 0, over.argmax(0) + 1, 0)
        for value in (1, 2):
            px = (cut == value).sum() * (150 / 211) ** 2
            assert facts["unit"] == "px"
            assert found[str(value)] == pytest.approx(px)
        box = "x=-5&y=-5&w=111&h=160&downsample=0.01&exact=1&hide=2&t=0.3,0.4"
        shown = get_json(viewer, f"runs/image/polygons?{box}")["shapes"]
        inside = np.pad(read_at(soft_scans / "image", (0.3, 0.4))[1] == 1, 1)
        edges = sum(np.diff(inside.astype(int), axis=axis).__abs__().sum() for axis in (0, 1))
        assert sum(lines_of(own).length for own in shown) == pytest.approx(edges)


def test_slices_of_a_volume_are_cut_anew_and_show_probabilities(soft_scans, tmp_path):
    shares, cut = read_at(soft_scans / "volume", (0.3, 0.4))
    assert np.bincount(cut.ravel()).min() > 500
    with serve(soft_scans) as viewer:
        assert get_json(viewer, "runs/volume")["probability"]["classes"] == [1, 2]
        for plane, index, part in (("axial", 7, np.s_[7]), ("sagittal", 20, np.s_[:, :, 20])):
            for layer, expected in (("probability/1", np.rint(shares[1])), ("cut", cut)):
                query = "?t=0.3,0.4" if layer == "cut" else ""
                body = get(viewer, f"runs/volume/{layer}/{plane}/{index}{query}")[2]
                # of this affine all axes of the body run against those of the page
                wanted = expected[part][::-1, ::-1]
                assert np.array_equal(np.frombuffer(body, np.uint8).reshape(wanted.shape), wanted)
        found = get_json(viewer, "runs/volume/areas?t=0.3,0.4&exact=1")["amounts"]
        planes = open_run(soft_scans / "volume").probability[:] / 255
        over = planes - np.array([0.3, 0.4])[:, None, None, None]
        of = np.where(over.max(0) >= 0, over.argmax(0) + 1, 0)
        assert found["2"] == pytest.approx((of == 2).sum() / 1000)
        assert found["2"] == pytest.approx((cut == 2).sum() * 0.7 * 0.9 * 1.5 / 1000, rel=0.1)
        for path, status in (
            ("cut/axial/7", 400), ("cut/axial/7?t=0.3", 404), ("probability/2/axial/7", 404),
            ("probability/axial/7", 400), ("probability/0/axial/99", 404), ("areas?t=0.1", 404),
        ):  # fmt: skip
            assert sentence(viewer, f"runs/volume/{path}")[0] == status, path
    # Without its volume nobody knows how a mask that came back lies to them.
    moved = Path(shutil.copytree(soft_scans / "volume", tmp_path / "volume"))
    record = json.loads((moved / RUN_FILE).read_text("utf-8"))
    record["slide"]["path"] = "gone.nii.gz"
    (moved / RUN_FILE).write_text(json.dumps(record), "utf-8")
    with serve(moved) as viewer:
        assert get_json(viewer, "runs/volume")["probability"] is None


@pytest.mark.slow
def test_the_page_cuts_a_volume_anew_and_shows_how_sure_the_model_was(soft_scans, tmp_path):
    planes = open_run(soft_scans / "volume").probability[:] / 255

    async def visit(page):
        still = "document.body.dataset.state == 'still'"
        amounts = "[...document.querySelectorAll('#classes span')].map((s) => s.textContent).join()"
        await page.until(still)
        before, picture = await page.ask(amounts), await page.picture()
        ranges = "const [a, b] = document.querySelectorAll('.threshold input'); "
        move = "a.value = 0.3; b.value = 0.4; "
        tell = "[a, b].forEach((r) => r.dispatchEvent(new Event('input')))"
        await page.ask("{" + ranges + move + tell + "}")
        over = planes - np.array([0.3, 0.4])[:, None, None, None]
        ml = [((over.argmax(0) == n) & (over.max(0) >= 0)).sum() / 1000 for n in (0, 1)]
        await page.until(f"{amounts} == '{ml[0]:.3g} ml,{ml[1]:.3g} ml'")
        await page.until(still)
        cut = await page.picture()
        assert (cut != picture).any(axis=2).mean() > 0.01
        box = "document.querySelectorAll('#sliders [type=range]')[3]"
        await page.ask(f"{{const r = {box}; r.value = 1; r.dispatchEvent(new Event('input'))}}")
        await page.until(still)
        shown = (await page.picture())[..., :3].astype(int)
        # viridis at its ends: what the mask and the volume have no colour of
        assert (np.abs(shown - (253, 231, 37)).max(2) < 60).sum() > 100
        await page.ask("document.querySelector('#cut button').click()")
        await page.until(f"{amounts} == '{before}'")

    with serve(soft_scans / "volume") as viewer:
        browse(f"{viewer.url}#run=volume", tmp_path, visit)
