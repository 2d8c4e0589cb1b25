"""Tiles that nothing can decode: marked where they are, and the rest as if nothing had been."""

import json

import numpy as np
import pytest
import tifffile
import zarr
from bundles import classify, pointwise_bundle
from click.testing import CliRunner

from wsi_pipeline.cli import group

TILE = 256
DESTROYED = [(1, 2), (3, 3), (4, 3)]
"""Row and column of the tiles, in the middle and on the border of blocks of 1,024 px."""


def destroy(path, tiles, *, columns):
    """Overwrite stored tiles of the only level with what no decoder takes."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        spans = [(page.dataoffsets[r * columns + c], page.databytecounts[r * columns + c])
                 for r, c in tiles]  # fmt: skip
    with path.open("r+b") as file:
        for offset, size in spans:
            file.seek(offset)
            file.write(b"\xa5" * size)


def area(shape):
    where = np.zeros(shape, bool)
    for row, column in DESTROYED:
        where[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = True
    return where


@pytest.fixture(scope="module")
def broken(tmp_path_factory, make_slide, slide_pixels):
    """A slide without a pyramid of which three tiles are destroyed."""
    path = tmp_path_factory.mktemp("broken") / "slide.tif"
    make_slide(path, slide_pixels, 0.25, levels=(1,))
    destroy(path, DESTROYED, columns=-(-slide_pixels.shape[1] // TILE))
    return path


def segment(slide, tmp_path, *options, overlap=64):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25, patch_size=256, overlap=overlap)
    arguments = ["--model", str(bundle), "--output", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--block-size", "1024", "--tissue", "none", *options]
    result = CliRunner().invoke(group, ["segment", str(slide), *arguments])
    return result, tmp_path / "out" / slide.stem


@pytest.mark.parametrize(("workers", "overlap"), [(1, 64), (2, 64), (1, 0)])
def test_the_destroyed_area_is_marked_and_the_rest_is_right(
    tmp_path, broken, slide_pixels, workers, overlap
):
    result, folder = segment(
        broken, tmp_path, "--max-unreadable", "20", "--workers", str(workers), overlap=overlap
    )
    assert result.exit_code == 1
    assert "cannot be read" in result.output
    assert "Traceback" not in result.output
    mask = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
    where = area(mask.shape)
    assert (mask[where] == 3).all()
    assert (mask[~where] == classify(slide_pixels)[~where]).all()


def test_every_output_names_it(tmp_path, broken):
    _, folder = segment(broken, tmp_path, "--max-unreadable", "20", "--simplify", "0")
    run = json.loads((folder / "run.json").read_text("utf-8"))
    assert run["status"] == "done"
    assert [(r["y"] // TILE, r["x"] // TILE) for r in run["bad_regions"]] == DESTROYED
    assert run["area_mm2"]["Unreadable"] == pytest.approx(3 * (TILE * 0.25e-3) ** 2)
    attributes = json.loads(
        (folder / "mask.ome.zarr" / "labels" / "classes" / ".zattrs").read_text()
    )
    names = {p["label-value"]: p["class"] for p in attributes["image-label"]["properties"]}
    assert names[3] == "Unreadable"
    features = json.loads((folder / "annotations.geojson").read_text("utf-8"))["features"]
    found = [f for f in features if f["properties"]["classification"]["name"] == "Unreadable"]
    assert len(found) == 2  # two of the tiles share an edge
    areas = sorted(f["properties"]["measurements"]["Area mm^2"] for f in found)
    assert areas == pytest.approx([(TILE * 0.25e-3) ** 2, 2 * (TILE * 0.25e-3) ** 2])


def test_a_slide_that_is_mostly_unreadable_fails_and_may_be_allowed_later(tmp_path, broken):
    result, folder = segment(broken, tmp_path, "--max-unreadable", "1")
    assert result.exit_code == 1
    assert "--max-unreadable" in result.output
    assert json.loads((folder / "run.json").read_text("utf-8"))["status"] == "failed"
    result, folder = segment(broken, tmp_path, "--max-unreadable", "20")
    run = json.loads((folder / "run.json").read_text("utf-8"))
    assert run["status"] == "done"
    assert len(run["bad_regions"]) == 3


def test_a_coarser_level_fills_in(tmp_path, make_slide, slide_pixels):
    path = make_slide(tmp_path / "slide.tif", slide_pixels, 0.25, levels=(1, 2))
    destroy(path, DESTROYED, columns=-(-slide_pixels.shape[1] // TILE))
    result, folder = segment(path, tmp_path)
    assert result.exit_code == 0, result.output
    mask = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
    where = area(mask.shape)
    assert (mask[~where] == classify(slide_pixels)[~where]).all()
    assert (mask[where] == classify(slide_pixels)[where]).mean() > 0.95  # edges are blurred


def test_a_grid_of_a_broken_slide_is_written_and_remembers_what_is_lost(
    tmp_path, broken, slide_pixels
):
    arguments = ["--mpp", "0.25", "--patch-size", "256", "--tissue", "none"]
    result = CliRunner().invoke(
        group, ["tile", str(broken), *arguments, "--output", str(tmp_path / "grids")]
    )
    assert result.exit_code == 1
    assert "3 parts of slide.tif cannot be read" in result.output
    grid = tmp_path / "grids" / "slide.zarr"
    pixels = zarr.open_array(grid / "pixels", mode="r")[:]
    where = area(pixels.shape[:2])
    assert (pixels[where] == 255).all()
    assert (pixels[~where] == slide_pixels[~where]).all()
    result, folder = segment(grid, tmp_path, "--max-unreadable", "20")
    assert result.exit_code == 1
    mask = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
    assert (mask[where] == 3).all()
    assert (mask[~where] == classify(slide_pixels)[~where]).all()
