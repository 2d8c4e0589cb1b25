"""Polygons as GeoParquet, read back by GeoPandas."""

import json
import sys

import geopandas
import numpy as np
import pandas
import pytest
import tifffile
from bundles import pointwise_bundle
from click.testing import CliRunner
from pyarrow import parquet
from scans import scan_bundle
from shapely.geometry import box, shape

from wsi_pipeline.cli import group
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.report.record import load_run

NAME = "annotations.parquet"


def call(*args, code=0):
    """Run a command; return what it says on the terminal."""
    result = CliRunner().invoke(group, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result.output


def segment(slide, model, output, *more):
    options = ("--model", model, "--output", output, "--device", "cpu", "--precision", "fp32")
    call("segment", slide, *options, *more)
    return output / slide.stem


def uneven_slide(path, um):
    """Write a slide of an odd size with blocks of both classes, of these µm (x, y) per pixel."""
    rng = np.random.default_rng(0)
    pixels = np.full((1037, 1283, 3), (245, 243, 246), np.uint8)
    for value in ((190, 90, 150), (190, 190, 150)):
        for y, x in rng.integers(0, 1000, (25, 2)):
            pixels[y : y + 90, x : x + 130] = value
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb",
        resolution=(1e4 / um[0], 1e4 / um[1]), resolutionunit="CENTIMETER",
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model, and a slide of an odd size with pixels that are no squares."""
    found = tmp_path_factory.mktemp("geoparquet")
    uneven_slide(found / "s.tif", (0.25, 0.5))
    pointwise_bundle(found / "model", mpp=0.5)
    return found


def check_against_the_table(folder):
    """Compare the file with the polygons and measures that are written for QuPath."""
    found = geopandas.read_parquet(folder / NAME)
    features = json.loads((folder / "annotations.geojson").read_text("utf-8"))["features"]
    table = pandas.read_csv(folder / "regions.csv")
    assert found.crs is None
    assert len(found) > 1
    assert list(found.columns) == [*table.columns, "geometry"]
    assert (found.geometry.to_numpy() == [shape(f["geometry"]) for f in features]).all()
    assert found["id"].tolist() == table["id"].tolist()
    assert found["class"].astype(str).tolist() == table["class"].tolist()
    pandas.testing.assert_frame_equal(
        pandas.DataFrame(found)[table.columns[2:]], table[table.columns[2:]], check_dtype=False
    )
    return found


@pytest.mark.parametrize("mask_mpp", [(), ("--mask-mpp", 1.3)])
def test_rows_are_those_of_the_table_with_their_polygons(place, tmp_path, mask_mpp):
    outputs = ("--outputs", "zarr,geojson,geoparquet", "--tissue", "none", *mask_mpp)
    folder = segment(place / "s.tif", place / "model", tmp_path, *outputs)
    found = check_against_the_table(folder)
    assert set(found["class"]) == {"Tumor", "Stroma"}
    part = geopandas.read_parquet(folder / NAME, bbox=(0, 0, 300, 300))
    assert part["id"].tolist() == found[found.intersects(box(0, 0, 300, 300))]["id"].tolist()
    assert 0 < len(part) < len(found)
    told = json.loads(parquet.read_metadata(folder / NAME).metadata[b"wsi_pipeline"])
    run = load_run(folder)
    assert told["um_per_pixel"] == pytest.approx([0.25, 0.5])
    assert told["offset"] == [0, 0]
    assert told["run"] == run.settings["key"]
    assert run.files[NAME] == sha256_of(folder / NAME)
    before = (folder / NAME).read_bytes()
    (folder / NAME).unlink()
    call("export", folder)
    assert (folder / NAME).read_bytes() == before
    call("export", folder, "--simplify", 8)
    assert check_against_the_table(folder).count_coordinates().sum() < sum(
        found.count_coordinates()
    )
    assert "annotations.parquet" in load_run(folder).files


def test_the_frame_is_that_of_the_geojson(place, bounded, tmp_path):
    folder = segment(bounded, place / "model", tmp_path, "--outputs", "zarr,geojson,geoparquet")
    check_against_the_table(folder)
    told = json.loads(parquet.read_metadata(folder / NAME).metadata[b"wsi_pipeline"])
    assert told["offset"] == load_run(folder).frame["offset"] != [0, 0]
    call("export", folder, "--for", "openslide")
    check_against_the_table(folder)
    told = json.loads(parquet.read_metadata(folder / NAME).metadata[b"wsi_pipeline"])
    assert told["offset"] == [0, 0]


def test_a_run_without_other_polygons_has_the_same_and_may_have_none(place, tmp_path):
    more = ("--tissue", "none", "--outputs")
    both = segment(place / "s.tif", place / "model", tmp_path, *more, "zarr,geojson,geoparquet")
    alone = segment(place / "s.tif", place / "model", tmp_path / "o", *more, "zarr,geoparquet")
    names = {path.name for path in alone.iterdir()}
    assert names == {"mask.ome.zarr", NAME, "run.json", ".store"}
    assert (alone / NAME).read_bytes() == (both / NAME).read_bytes()
    call("export", alone, "--min-area", 1e9)
    found = geopandas.read_parquet(alone / NAME)
    assert len(found) == 0
    assert found["area_um2"].dtype == float
    again = segment(
        place / "s.tif",
        place / "model",
        tmp_path / "o",
        *more,
        "zarr",
        "--mask-mpp",
        1,
        "--overwrite",
    )
    assert not (again / NAME).exists()


def test_polygons_of_an_image_are_in_its_pixels(tmp_path):
    pixels = np.zeros((97, 141), np.uint8)
    pixels[10:30, 20:50], pixels[60:90, 100:141] = 180, 180
    tifffile.imwrite(tmp_path / "i.tif", pixels)
    model = scan_bundle(
        tmp_path / "model", modality="image", resolution="fit = [97, 141]", patch_size=(64, 64)
    )
    folder = segment(
        tmp_path / "i.tif", model, tmp_path / "out", "--outputs", "png,geojson,geoparquet"
    )
    found = check_against_the_table(folder)
    assert "area_px2" in found


def test_without_the_package_it_is_said_before_anything_is_done(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    options = ("--model", place / "model", "--output", tmp_path / "out")
    said = call("segment", place / "s.tif", *options, "--outputs", "zarr,geoparquet", code=2)
    assert 'geoparquet needs pyarrow: pip install "wsi-pipeline[geoparquet]"' in said
    assert not (tmp_path / "out").exists()
