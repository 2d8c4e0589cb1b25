"""Thresholds after the run, against runs made with them, float64 on one canvas, and by hand."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import shapely
import zarr
from bundles import blended_canvas, lightmuseg_bundle
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rasterio.features import rasterize
from scans import Around, blobs, scan_bundle, write_series
from scipy.ndimage import label, map_coordinates

import wsi_pipeline
from wsi_pipeline.cli import group
from wsi_pipeline.errors import StoreError, UsageError
from wsi_pipeline.options import Rule, as_plain
from wsi_pipeline.report.record import load_run, write_run_json
from wsi_pipeline.run.again import export_again
from wsi_pipeline.run.probability import choose
from wsi_pipeline.run.thresholds import copy_ruled
from wsi_pipeline.sources import open_source

MPP = 0.37
RULE = Rule(thresholds={"Tumor": 0.6, "Stroma": 0.45})
ROI = shapely.box(20.5, 31.25, 580.75, 451)


@pytest.fixture(scope="module")
def place(tmp_path_factory, slide_pixels, make_slide):
    """Return a folder with a slide, a model, a ROI, and runs by the usual rule and by `RULE`."""
    folder = tmp_path_factory.mktemp("place")
    make_slide(folder / "slide.tif", slide_pixels[300:821, 400:1041], 0.25)
    lightmuseg_bundle(folder / "model", mpp=MPP, patch_size=128, overlap=24)
    feature = {"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(ROI)}
    (folder / "roi.geojson").write_text(json.dumps(feature), "utf-8")
    for name, options in {
        "usual": {},
        "ruled": {"thresholds": RULE.thresholds},
        "doubtful": {"min_margin": 0.3},
    }.items():
        (run,) = wsi_pipeline.segment(
            folder / "slide.tif", model=folder / "model", output=folder / name, tissue="none",
            roi=folder / "roi.geojson", precision="fp32", device="cpu", block_size=1024,
            simplify_um=0, min_area_um2=0, **options,
        )  # fmt: skip
        assert run.status == "done"
    return folder


@pytest.fixture
def usual(tmp_path, place):
    """Return a copy of the usual run, far from slide, model and ROI."""
    return Path(shutil.copytree(place / "usual" / "slide", tmp_path / "out" / "slide"))


@pytest.fixture(scope="module")
def field(place):
    """Return the probabilities (3, y, x) at level 0, in float64, and where the ROI is."""
    whole = blended_canvas(place / "slide.tif", place / "model", overlap=24)
    with open_source(place / "slide.tif") as slide:
        steps = slide.at(MPP, tolerance=0.02).downsample
    where = [(np.arange(n) + 0.5) / f - 0.5 for n, f in zip((521, 641), steps, strict=True)]
    where = np.meshgrid(*where, indexing="ij")
    full = np.stack([map_coordinates(f, where, order=1, mode="nearest") for f in whole])
    return full, rasterize([ROI], out_shape=full.shape[1:]).astype(bool)


def mask_of(folder):
    return zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]


def burnt(folder, shape=(521, 641), names=("Tumor", "Stroma")):
    """Return the polygons as a mask."""
    features = json.loads((folder / "annotations.geojson").read_text("utf-8"))["features"]
    value = {name: index for index, name in enumerate(names, start=1)}
    shapes = [
        (shapely.geometry.shape(f["geometry"]), value[f["properties"]["classification"]["name"]])
        for f in features
    ]
    return rasterize(shapes, out_shape=shape, dtype=np.uint8)


unit = st.integers(0, 20).map(lambda n: n / 20)


@given(unit, unit, unit, st.none() | unit, st.none() | unit, unit)
def test_a_pixel_gets_its_class_as_the_rule_is_told(a, b, c, first, second, least):
    total = a + b + c or 1
    p = [a / total or 0.001, b / total, c / total]
    scores = []
    for k, threshold in ((1, first), (2, second)):
        if threshold is not None:
            scores.append((np.float32(p[k]) - np.float32(threshold), -k))
        else:
            others = max(x for i, x in enumerate(p) if i != k)
            scores.append((np.float32(p[k]) - np.float32(others), -k))
            # of equals the first is the likeliest
            if p[k] == others and p.index(p[k]) != k:
                scores.pop()
    score, expected = max(scores, default=(-1, 0))
    top, runner = sorted(map(np.float32, p))[:0:-1]
    if score < 0 or top - runner < np.float32(least):
        expected = 0
    planes = np.array(p, np.float32).reshape(3, 1, 1)
    best, chosen = choose(planes, [first, second], least)
    assert chosen[0, 0] == -expected
    assert best[0, 0] == planes[-expected, 0, 0]


def test_the_example_of_the_docs():
    planes = np.array([0.1, 0.5, 0.4], np.float32).reshape(3, 1, 1)
    table = [
        ((None, None), 1),
        ((0.7, None), 0),
        ((0.7, 0.3), 2),
        ((0.3, 0.3), 1),
        ((0.45, None), 1),
    ]
    for thresholds, expected in table:
        assert choose(planes, thresholds, 0)[1][0, 0] == expected
    assert choose(planes, (None, None), 0.2)[1][0, 0] == 0


@pytest.mark.slow
def test_exported_equals_a_run_made_so_but_for_eight_bits(tmp_path, place, usual, field):
    folder = copy_ruled(usual, tmp_path / "new", RULE)
    run = export_again(folder, {})
    made, exported = mask_of(place / "ruled" / "slide"), mask_of(folder)
    full, roi = field
    scores = np.stack([np.zeros(full.shape[1:]), full[1] - 0.6, full[2] - 0.45])
    expected = scores.argmax(0) * roi
    low, *_, high = np.sort(scores, axis=0)[1:]
    gap = high - low
    assert np.bincount(expected.ravel(), minlength=3).min() > 1000
    assert (gap[made != expected] < 1e-4).all()
    odd = made != exported
    assert 0 < odd.mean() < 0.01
    assert gap[odd].max() <= 1 / 255 + 1e-4
    # and all that is written tells of this mask
    assert run.status == "done"
    assert (burnt(folder) == exported).all()
    for index, name in enumerate(("Tumor", "Stroma"), start=1):
        assert run.area_mm2[name] == pytest.approx((exported == index).sum() * 0.0625e-6)
    assert run.settings["predict"]["thresholds"] == RULE.thresholds
    names = {p.name for p in (place / "usual" / "slide").iterdir()}
    assert {p.name for p in folder.iterdir()} == names
    # for other commands it is a run, of which again another can be made
    again = copy_ruled(folder, tmp_path / "third", Rule(min_margin=0.3))
    by_margin = mask_of(place / "doubtful" / "slide")
    assert (mask_of(again) != by_margin).mean() < 0.01
    first, second = np.sort(full, axis=0)[:0:-1]
    sure = first - second > 0.3 + 1 / 255
    assert (by_margin[sure & roi] == full.argmax(0)[sure & roi]).all()
    assert not by_margin[first - second < 0.3 - 1 / 255].any()
    cli = CliRunner(catch_exceptions=False)

    def said(*command, code=0):
        result = cli.invoke(group, list(map(str, command)))
        assert result.exit_code == code, result.output
        return result.output

    assert "done     1" in said("status", tmp_path / "new")
    said("export", tmp_path / "new", "--simplify", 1)
    said("evaluate", folder, place / "ruled" / "slide")
    why = "made its mask, by thresholds, of another run's probabilities; verify that run"
    assert why in said("verify", folder, code=3)
    # what it differs in from the run that it is made of, pixel by pixel
    said("diff", usual, folder, "--output", tmp_path / "diff", code=1)
    rows = csv.DictReader((tmp_path / "diff/diff.csv").read_text("utf-8").splitlines())
    before = mask_of(usual)
    for index, row in enumerate(rows, start=1):
        assert row["class"] == ("Tumor", "Stroma")[index - 1]
        assert int(row["gained_px"]) == ((before != index) & (exported == index)).sum()
        assert int(row["lost_px"]) == ((before == index) & (exported != index)).sum()
    assert index == 2


def test_polygons_alone_by_thresholds_and_back(tmp_path, place, usual, field, caplog):
    before = {p.name: p.read_bytes() for p in usual.iterdir() if p.is_file()}
    mask, old = mask_of(usual), load_run(usual)
    run = export_again(usual, {}, RULE)
    assert (mask_of(usual) == mask).all()
    assert (usual / "mask.ome.tif").read_bytes() == before["mask.ome.tif"]
    expected = mask_of(copy_ruled(usual, tmp_path / "new", RULE))
    assert (burnt(usual) == expected).all()
    assert (expected != mask).mean() > 0.01
    assert run.area_mm2["Tumor"] == pytest.approx((expected == 1).sum() * 0.0625e-6)
    assert run.rule == {"thresholds": RULE.thresholds, "min_margin": 0.0}
    assert run.warnings[-1].endswith("--threshold Tumor=0.6 --threshold Stroma=0.45")
    assert not (usual / ".store" / "ruled.ome.zarr").exists()
    # of which also what lies within areas is measured, and summary and report tell
    areas = place / "roi.geojson"
    for value, row in enumerate(wsi_pipeline.measure(usual, areas)[:3]):
        mm2 = (expected[field[1]] == value).sum() * 0.0625e-6
        assert row.area_mm2 == pytest.approx(mm2, abs=1e-9)
    export_again(tmp_path / "new" / "slide", {})
    of_tree = wsi_pipeline.measure(tmp_path / "new" / "slide", areas)
    assert wsi_pipeline.measure(usual, areas) == of_tree
    (tmp_path / "out" / "summary.csv").touch()
    cli = CliRunner(catch_exceptions=False)
    assert cli.invoke(group, ["export", str(usual), "--threshold", "Tumor=0.5"]).exit_code == 0
    assert cli.invoke(group, ["export", str(usual), *str(RULE).split()]).exit_code == 0
    (row,) = csv.DictReader((tmp_path / "out/summary.csv").read_text("utf-8").splitlines())
    assert float(row["Tumor_mm2"]) == pytest.approx(run.area_mm2["Tumor"], abs=1e-6)
    assert str(RULE) in (tmp_path / "out" / "report.html").read_text("utf-8")
    # evaluate and diff compare the mask, and say so
    assert cli.invoke(group, ["evaluate", str(usual), str(place / "ruled/slide")]).exit_code == 0
    assert "by other thresholds than the mask, which is compared" in caplog.text
    # what is not given stays as it was
    assert export_again(usual, {"min_area_um2": 1.0}).rule == run.rule
    back = export_again(usual, {"min_area_um2": 0.0}, Rule())
    assert replace(back, seconds={}) == replace(old, seconds={})
    (tumour,) = (r for r in wsi_pipeline.measure(usual, areas) if r.class_name == "Tumor")
    assert tumour.area_mm2 == pytest.approx(old.area_mm2["Tumor"], abs=1e-9)
    after = {p.name: p.read_bytes() for p in usual.iterdir() if p.is_file()}
    assert {n for n in after if after[n] != before[n]} == {"run.json"}


def test_what_cannot_be_is_said_in_a_sentence(tmp_path, place, usual):
    cli = CliRunner(catch_exceptions=False)

    def said(*arguments, code=1):
        result = cli.invoke(group, ["export", str(usual), *map(str, arguments)])
        assert result.exit_code == code
        return result.output.replace("\n", " ")

    state = mask_of(usual)
    assert "--threshold Fat: the classes are Tumor, Stroma" in said("--threshold", "Fat=0.5")
    for odd in ("Tumor=1.5", "Tumor=0", "Tumor=nan"):
        assert "expected above 0, and at most 1" in said("--threshold", odd)
    assert "not of the form NAME=P" in said("--threshold", "Tumor", code=2)
    assert "--as-mask excludes" in said("--as-mask", "--min-margin", 0.1, code=2)
    own = usual.parent
    assert "holds this very run; choose another" in said("--min-margin", 0.1, "--output", own)
    other = Path(shutil.copytree(usual, tmp_path / "other" / "slide"))
    run = load_run(other)
    write_run_json(other / "run.json", replace(run, slide={**run.slide, "fingerprint": "another"}))
    assert "holds the run of another slide" in said("--min-margin", 0.1, "--output", other.parent)
    (usual / ".store" / "roi.geojson").rename(tmp_path / "roi.geojson")
    assert "the run's ROI, is lost" in said("--min-margin", 0.1)
    (tmp_path / "roi.geojson").rename(usual / ".store" / "roi.geojson")
    (usual / "probability.ome.zarr" / "0" / ".zarray").write_bytes(b"{")
    assert "probability.ome.zarr is damaged" in said("--min-margin", 0.1)
    shutil.rmtree(usual / "probability.ome.zarr")
    assert "with probability as an output" in said("--min-margin", 0.1)
    assert (mask_of(usual) == state).all()
    assert load_run(usual).status == "done"
    with pytest.raises((UsageError, StoreError), match="the classes are Tumor, Stroma"):
        wsi_pipeline.segment(
            place / "slide.tif", model=place / "model", output=tmp_path / "never",
            thresholds={"Fat": 0.5},
        )  # fmt: skip


SCAN_RULE = Rule(thresholds={"Grey": 0.3, "Bright": 0.5}, min_margin=0.05)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Return a folder with an image and a series, and their runs by the usual rule and another."""
    folder = tmp_path_factory.mktemp("scans")
    Image.fromarray((blobs((141, 203)) // 4).astype(np.uint8)).save(folder / "image.png")
    write_series(folder / "ct", blobs((11, 41, 33)), spacing=(2.5, 0.8, 0.9), seed=3)
    image = {"modality": "image", "resolution": "fit = [97, 131]", "patch_size": (64, 64)}
    volume = {"resolution": "spacing_mm = [2.0, 1.0, 1.0]", "keys": "scale = [0.0, 1024.0]"}
    for name, path, keys in (("images", "image.png", image), ("volumes", "ct", volume)):
        model = scan_bundle(folder / name, program=Around, **keys)
        for output, rule in {"usual": {}, "ruled": as_plain(SCAN_RULE)}.items():
            (run,) = wsi_pipeline.segment(
                folder / path, model=model, output=folder / output, precision="fp32", device="cpu",
                **rule,
            )  # fmt: skip
            assert run.status == "done", run.reason
    return folder


def seen(folder):
    """Return the mask as people see it, (y, x) or (z, y, x)."""
    if (folder / "mask.png").is_file():
        return np.asarray(Image.open(folder / "mask.png"))
    return np.asarray(nibabel.load(folder / "mask.nii.gz").dataobj).T


@pytest.mark.parametrize("name", ["image", "ct"])
def test_images_and_volumes_get_other_thresholds_too(tmp_path, scans, name):
    folder = Path(shutil.copytree(scans / "usual" / name, tmp_path / "out" / name))
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    old, made = load_run(folder), load_run(scans / "ruled" / name)
    usual, expected = seen(folder), seen(scans / "ruled" / name)
    new = copy_ruled(folder, tmp_path / "new", SCAN_RULE)
    run = export_again(new, {})
    assert run.status == "done", run.reason
    assert {p.name for p in new.iterdir()} == {p.name for p in folder.iterdir()}
    found = seen(new)
    # Of 8 bits two in a hundred probabilities are near enough a threshold.
    assert 0 <= (found != expected).mean() < 0.02 < (expected != usual).mean()
    assert (np.bincount(found.ravel()) > 200).all()
    sizes = run.amounts
    for index, of in enumerate(("Grey", "Bright"), start=1):
        count = int((found == index).sum())
        factor = 1 if name == "image" else 2.5 * 0.8 * 0.9 / 1000
        assert sizes[of] == pytest.approx(count * factor)
        structure = np.ones((3,) * found.ndim)
        assert run.lesions[of]["count"] == label(found == index, structure)[1]
    # without a folder of its own the mask stays, and what is its copy
    told = export_again(folder, {}, SCAN_RULE)
    after = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    changed = {"run.json", "overlay.png"} | ({"annotations.geojson"} if name == "image" else set())
    assert {n for n in after if after[n] != before[n]} - {"regions.csv"} == changed
    assert (told.amounts, told.lesions) == (run.amounts, run.lesions)
    assert told.rule == as_plain(SCAN_RULE)
    assert "--threshold Grey=0.3" in told.warnings[-1]
    if name == "image":
        (folder / "annotations.geojson").rename(new / "annotations.geojson")
        assert (burnt(new, found.shape, ("Grey", "Bright")) == found).all()
    else:
        (folder / "mask.dcm").unlink()
        export_again(folder, {})
        segments = pydicom.dcmread(folder / "mask.dcm").pixel_array
        assert segments.sum() == (usual > 0).sum()
    back = export_again(folder, {}, Rule())
    assert replace(back, seconds={}, files={}) == replace(old, seconds={}, files={})
    assert made.rule == {}
    assert made.settings["predict"]["thresholds"] == SCAN_RULE.thresholds


def test_a_run_without_probabilities_says_how_to_get_them(tmp_path, scans):
    folder = Path(shutil.copytree(scans / "usual" / "image", tmp_path / "image"))
    shutil.rmtree(folder / "probability.ome.zarr")
    with pytest.raises(StoreError, match="segment again, with probability as an output"):
        export_again(folder, {}, SCAN_RULE)
    assert load_run(folder).status == "done"
