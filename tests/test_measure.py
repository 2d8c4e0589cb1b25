"""How much of each class lies in annotated areas: counted by hand on the mask's pixels."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import shapely
import tifffile
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner

from wsi_pipeline import AnnotationError, measure, open_patch_grid, segment
from wsi_pipeline.cli import group
from wsi_pipeline.errors import EvaluationError

MPP = (0.5, 0.25)
"""(x, y) µm per pixel of the slide."""
PIXEL_MM2 = MPP[0] * MPP[1] * 1e-6
DEFAULTS = {"tissue": "none", "outputs": ("zarr", "geojson"), "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the run of a slide of odd size whose pixels are no squares."""
    folder = tmp_path_factory.mktemp("measured")
    rng = np.random.default_rng(0)
    coarse = rng.choice([100, 180, 240], (13, 17))
    green = np.kron(coarse, np.ones((40, 40), int))[:501, :667]
    pixels = np.stack([np.full_like(green, 220), green, np.full_like(green, 235)], axis=-1)
    tifffile.imwrite(
        folder / "slide.tif",
        pixels.astype(np.uint8),
        tile=(128, 128),
        photometric="rgb",
        resolution=(1e4 / MPP[0], 1e4 / MPP[1]),
        resolutionunit="CENTIMETER",
    )
    model = pointwise_bundle(folder / "model", mpp=0.25, patch_size=128, overlap=0)
    (done,) = segment(folder / "slide.tif", model=model, output=folder / "out", **DEFAULTS)
    assert done.status == "done", done.reason
    return folder / "out" / "slide"


def write_areas(path, areas):
    """Write (polygon, class, name) as QuPath does; return the path."""
    features = []
    for polygon, kind, name in areas:
        properties = {"objectType": "annotation"}
        properties |= {"classification": {"name": kind}} if kind else {}
        properties |= {"name": name} if name else {}
        geometry = shapely.geometry.mapping(polygon)
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")
    return path


def inside(polygon, shape, scale=(1.0, 1.0)):
    """Return the pixels whose centre lies in a polygon, by shapely."""
    y, x = (np.indices(shape) + 0.5) * np.reshape(scale, (2, 1, 1))
    return shapely.contains_xy(polygon, x, y)


def test_areas_are_what_one_counts_in_the_mask(run, tmp_path):
    mask = zarr.open_group(run / "mask.ome.zarr", mode="r")["0"][:]
    tilted = shapely.Polygon([(20.3, 11.7), (431.2, 97.4), (389.9, 455.1), (55.5, 301.3)])
    ring = shapely.box(300, 100, 600, 400).difference(shapely.box(350, 150, 500, 300))
    two = shapely.MultiPolygon([shapely.box(0, 0, 50, 50), shapely.box(600, 450, 667, 501)])
    ignored = shapely.box(100, 100, 400, 200)
    areas = [
        (tilted, "Tumor", "biopsy"),
        (ring, None, None),
        (ignored, "Ignore*", "fold"),
        (two, "Region*", "biopsy"),
    ]
    rows = measure(run, write_areas(tmp_path / "areas.geojson", areas))
    assert [r.annotation for r in rows[::4]] == ["biopsy 0", "1", "biopsy 3"]
    names = ["Background", "Tumor", "Stroma", "tissue"]
    assert [r.class_name for r in rows] == names * 3
    for index, polygon in enumerate((tilted, ring, two)):
        chosen = inside(polygon, mask.shape) & ~inside(ignored, mask.shape)
        # the whole slide was looked at
        counts = [*np.bincount(mask[chosen], minlength=3), chosen.sum()]
        for row, count in zip(rows[4 * index : 4 * index + 4], counts, strict=True):
            assert row.area_mm2 == pytest.approx(count * PIXEL_MM2, abs=1e-9)
            assert row.percent == pytest.approx(100 * count / chosen.sum(), abs=1e-4)
    assert min(r.area_mm2 for r in rows) > 0


def test_polygons_of_the_run_hold_their_own_class(run):
    found = measure(run, run / "annotations.geojson")
    features = json.loads((run / "annotations.geojson").read_text("utf-8"))["features"]
    by_name = {f["properties"]["name"]: f["properties"] for f in features}
    for row in found:
        properties = by_name[row.annotation]
        if row.class_name == properties["classification"]["name"]:
            assert row.percent == 100
            assert row.area_mm2 == pytest.approx(properties["measurements"]["Area mm^2"], rel=1e-6)


def test_the_command_prints_a_table_and_writes_it(run, tmp_path):
    path = write_areas(tmp_path / "a.geojson", [(shapely.box(0, 0, 300, 200), None, "=1+1")])
    done = CliRunner().invoke(group, ["measure", str(run), "--within", str(path)])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert list(rows[0]) == ["annotation", "class", "area_mm2", "percent"]
    assert {r["annotation"] for r in rows} == {"'=1+1"}
    assert sum(float(r["percent"]) for r in rows[:3]) == pytest.approx(100, abs=1e-3)
    table = tmp_path / "table.csv"
    command = ["measure", str(run), "--within", str(path), "-o", str(table)]
    assert CliRunner().invoke(group, command).stdout == ""
    assert table.read_text("utf-8").splitlines() == done.stdout.splitlines()
    again = CliRunner().invoke(group, command)
    assert again.exit_code == 2
    assert "is there already" in again.output


@pytest.mark.parametrize("mask_mpp", [None, 1.0])
def test_frames_tissue_and_coarse_masks(tmp_path, bounded, slide_path, mask_mpp):
    model = pointwise_bundle(tmp_path / "model", mpp=0.25)
    where = {"outputs": ("zarr",), "device": "cpu", "mask_mpp": mask_mpp}
    tissue = write_areas(tmp_path / "t.geojson", [(shapely.box(0, 0, 900, 700), None, None)])
    (done,) = segment(
        bounded, model=model, output=tmp_path / "out", tissue=tissue, frame="qupath", **where
    )
    assert done.status == "done", done.reason
    run = tmp_path / "out" / "bounded"
    mask = zarr.open_group(run / "mask.ome.zarr", mode="r")["0"][:]
    scale = np.array([1487, 1931]) / mask.shape if mask_mpp is None else (4.0, 4.0)
    stored = open_patch_grid(run / ".store" / "grid.zarr")
    y, x = (
        ((np.arange(n) + 0.5) * s / t).astype(int)
        for n, s, t in zip(mask.shape, scale, stored.tissue_downsample, strict=True)
    )
    looked_at = stored.tissue[np.ix_(y, x)]
    box = shapely.box(100.3, 50.3, 1100.3, 600.3)
    path = write_areas(tmp_path / "a.geojson", [(box, None, "a")])
    pixel = scale[0] * scale[1] * 0.25**2 * 1e-6
    for frame, offset in (("qupath", (301, 257)), ("openslide", (0, 0))):
        chosen = inside(shapely.affinity.translate(box, *offset), mask.shape, scale)
        counts = [*np.bincount(mask[chosen], minlength=3), (looked_at & chosen).sum()]
        found = measure(run, path, frame=frame)
        assert [r.area_mm2 for r in found] == pytest.approx([n * pixel for n in counts], abs=1e-9)
        assert 0 < found[-1].percent < 100
    shutil.rmtree(run / ".store")
    assert [r.class_name for r in measure(run, path)] == ["Background", "Tumor", "Stroma"]


def test_what_cannot_be_measured_is_said(run, tmp_path, caplog):
    away = [(shapely.box(5000, 0, 5100, 50), None, "away")]
    path = write_areas(tmp_path / "a.geojson", away)
    with pytest.raises(AnnotationError, match="no annotation lies on the slide of 667 × 501 px"):
        measure(run, path)
    path = write_areas(tmp_path / "a.geojson", [*away, (shapely.box(-5, 0, 9, 9), None, None)])
    found = measure(run, path)
    assert [(r.area_mm2, r.percent) for r in found[:4]] == [(0, None)] * 4
    assert "away lies beyond the slide" in caplog.text
    assert "1 lies beyond the slide" in caplog.text
    assert sum(r.area_mm2 for r in found[4:7]) == pytest.approx(81 * PIXEL_MM2)
    path = write_areas(tmp_path / "a.geojson", [(shapely.box(0, 0, 9, 9), "Ignore*", None)])
    with pytest.raises(AnnotationError, match="holds no areas to measure"):
        measure(run, path)
    with pytest.raises(EvaluationError, match=r"run\.json"):
        measure(tmp_path, path)
    command = ["measure", str(tmp_path), "--within", str(path)]
    assert CliRunner().invoke(group, command).exit_code == 1
