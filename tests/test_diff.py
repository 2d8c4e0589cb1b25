"""`diff`: where two runs of one slide differ, held against their pixels, shapely and `evaluate`."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio.features
import zarr
from bundles import lightmuseg_bundle, pointwise_bundle
from click.testing import CliRunner
from scans import blobs, scan_bundle
from shapely.geometry import shape

from wsi_pipeline import diff, evaluate, load_run, segment
from wsi_pipeline.annotations import check_geojson
from wsi_pipeline.cli import group
from wsi_pipeline.errors import UsageError

NAMES = ("Background", "Tumor", "Stroma")
EXACT = {"simplify_um": 0, "min_area_um2": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bounded):
    """Return folders of two models' runs of a slide with bounds, and one of a coarser mask."""
    home = tmp_path_factory.mktemp("runs")
    a = pointwise_bundle(home / "a", mpp=0.25)
    b = lightmuseg_bundle(home / "b", mpp=0.25, patch_size=256, overlap=0)
    options = {"tissue": "none", "precision": "fp32", "outputs": ("zarr",)}
    for name, model, more in (("A", a, {}), ("B", b, {}), ("C", a, {"mask_mpp": 0.5})):
        (run,) = segment(bounded, model=model, output=home / name, **options, **more)
        assert run.status == "done", run.reason
    return home


def mask_of(runs, name):
    return zarr.open_group(runs / name / "bounded" / "mask.ome.zarr", mode="r")["0"][:]


def table(folder):
    with (folder / "diff.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def confusion(before, after):
    return np.bincount(before.ravel().astype(int) * 3 + after.ravel(), minlength=9).reshape(3, 3)


def test_a_run_and_itself_are_equal(runs, tmp_path):
    a = str(runs / "A" / "bounded")
    ran = CliRunner().invoke(group, ["-q", "diff", a, a, "-o", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    assert json.loads((tmp_path / "diff.geojson").read_text())["features"] == []
    assert [float(row["difference_mm2"]) for row in table(tmp_path)] == [0, 0]
    assert [int(row["gained_px"]) for row in table(tmp_path)] == [0, 0]


def test_two_models_differ_as_evaluate_counts_it(runs, tmp_path):
    a, b = (runs / name / "bounded" for name in "AB")
    (found,) = diff(a, b, output=tmp_path, **EXACT)
    before, after = mask_of(runs, "A"), mask_of(runs, "B")
    assert found.classes == NAMES
    assert found.pixels.tolist() == confusion(before, after).tolist()
    assert found.pixels.tolist() == evaluate(b, a)["slides"][0]["confusion"]
    pixel = 0.25 * 0.25 * 1e-6
    for index, row in enumerate(table(tmp_path), 1):
        one, other = before == index, after == index
        assert (row["slide"], row["class"]) == ("bounded", NAMES[index])
        assert int(row["gained_px"]) == np.count_nonzero(other & ~one)
        assert int(row["lost_px"]) == np.count_nonzero(one & ~other)
        difference = (int(other.sum()) - int(one.sum())) * pixel
        assert float(row["difference_mm2"]) == pytest.approx(difference, rel=1e-9)
        assert float(row["b_mm2"]) == pytest.approx(other.sum() * pixel, rel=1e-9)


def test_the_polygons_are_what_changed_in_the_frame_of_the_first(runs, tmp_path):
    a, b = (runs / name / "bounded" for name in "AB")
    diff(a, b, output=tmp_path, **EXACT)
    features = json.loads((tmp_path / "diff.geojson").read_text())["features"]
    # as QuPath shows this slide: from (301, 257) on, 1200 × 1000
    x, y = load_run(a).frame["offset"]
    assert (x, y) == (301, 257)
    before, after = (mask_of(runs, name)[y : y + 1000, x : x + 1200] for name in "AB")
    areas, shapes = [], []
    for rank, feature in enumerate(features, 1):
        properties = feature["properties"]
        kind = properties["metadata"]["from"], properties["metadata"]["to"]
        assert properties["classification"]["name"] == " → ".join(kind)
        assert properties["measurements"]["Rank"] == rank
        areas.append(properties["measurements"]["Area mm^2"])
        value = 3 * NAMES.index(kind[0]) + NAMES.index(kind[1])
        shapes.append((shape(feature["geometry"]), value))
    assert areas == sorted(areas, reverse=True)
    changed = before != after
    burnt = rasterio.features.rasterize(shapes, before.shape)
    assert np.array_equal(burnt, np.where(changed, 3 * before + after, 0))
    # and none lies on another
    assert sum(polygon.area for polygon, _ in shapes) == np.count_nonzero(changed)
    assert not check_geojson(tmp_path / "diff.geojson").findings


def test_a_coarser_mask_is_compared_at_the_pixels_of_the_finer(runs, tmp_path):
    a, c = (runs / name / "bounded" for name in "AC")
    fine, coarse = mask_of(runs, "A"), mask_of(runs, "C")
    assert coarse.shape == tuple(-(-n // 2) for n in fine.shape)
    spread = coarse.repeat(2, 0).repeat(2, 1)[: fine.shape[0], : fine.shape[1]]
    (found,) = diff(a, c, output=tmp_path / "there")
    assert found.pixels.tolist() == confusion(fine, spread).tolist()
    assert not found.is_equal
    (back,) = diff(c, a, output=tmp_path / "back")
    assert back.pixels.tolist() == found.pixels.T.tolist()


def test_output_folders_are_paired_by_name_and_each_failure_is_told(runs, tmp_path):
    for name in ("one", "other"):
        shutil.copytree(runs / "A", tmp_path / name)
    a, b, out = tmp_path / "one", tmp_path / "other", tmp_path / "out"

    def exit_code():
        ran = CliRunner().invoke(group, ["diff", str(a), str(b), "-o", str(out)])
        return ran.exit_code, ran.stderr

    assert exit_code()[0] == 0
    # no other side
    shutil.copytree(a / "bounded", a / "lonely")
    code, told = exit_code()
    assert code == 3
    assert "cannot be compared: lonely" in told
    assert "lonely: equal" not in told
    # another slide of the same size
    shutil.rmtree(a / "lonely")
    record = json.loads((b / "bounded" / "run.json").read_text())
    record["slide"]["fingerprint"] = "f" + record["slide"]["fingerprint"][1:]
    (b / "bounded" / "run.json").write_text(json.dumps(record))
    code, told = exit_code()
    assert code == 3
    assert "fingerprint" in told
    # what differs counts more than what cannot be compared
    shutil.copytree(a / "bounded", a / "second")
    shutil.copytree(runs / "B" / "bounded", b / "second")
    assert exit_code()[0] == 1
    assert {row["slide"] for row in table(out)} == {"second"}
    assert json.loads((out / "second" / "diff.geojson").read_text())["features"]
    with pytest.raises(UsageError, match="two runs, or two folders"):
        diff(a, b / "second", output=out)


def test_what_a_person_has_changed_stays(runs, tmp_path):
    a, b = (runs / name / "bounded" for name in "AB")
    diff(a, b, output=tmp_path)
    mine = tmp_path / "diff.geojson"
    first = mine.read_text()
    diff(a, b, output=tmp_path)
    assert mine.read_text() == first
    mine.write_text("{}")
    diff(a, b, output=tmp_path)
    assert mine.read_text() == "{}"
    assert (tmp_path / "diff.new.geojson").read_text() == first


def test_planar_images_without_a_size_are_told_in_pixels(tmp_path):
    from PIL import Image

    source = Path(tmp_path / "scan.png")
    Image.fromarray((blobs((75, 61)) * 0.25).astype(np.uint8)).save(source)
    for name, keys in (("A", "fit = [75, 61]"), ("B", "fit = [40, 33]")):
        model = scan_bundle(
            tmp_path / f"model{name}", modality="image", resolution=keys, patch_size=(32, 32)
        )
        segment(source, model=model, output=tmp_path / name)
    (found,) = diff(tmp_path / "A" / "scan", tmp_path / "B" / "scan", output=tmp_path / "out")
    masks = [np.asarray(Image.open(tmp_path / n / "scan" / "mask.png")) for n in "AB"]
    assert found.pixels.tolist() == confusion(*masks).tolist()
    assert found.pixel_mm2 is None
    assert [row["difference_mm2"] for row in table(tmp_path / "out")] == ["", ""]
    features = json.loads((tmp_path / "out" / "diff.geojson").read_text())["features"]
    areas = sum(feature["properties"]["measurements"]["Area px^2"] for feature in features)
    assert areas == np.count_nonzero(masks[0] != masks[1]) > 0
