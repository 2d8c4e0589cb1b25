from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import shapely
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from sklearn import metrics as oracle

from wsi_pipeline import evaluate
from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.cli import group
from wsi_pipeline.errors import EvaluationError, UsageError
from wsi_pipeline.evaluation import compare
from wsi_pipeline.evaluation.compare import CompareOptions, Pairing, compare_all
from wsi_pipeline.evaluation.confusion import (
    IGNORE,
    Confusion,
    bootstrap,
    class_figures,
    count_block,
    pooled_figures,
)
from wsi_pipeline.evaluation.disagreement import COLORS
from wsi_pipeline.evaluation.meaning import LabelMap
from wsi_pipeline.evaluation.pairs import pair_up
from wsi_pipeline.evaluation.report import FIGURES
from wsi_pipeline.export.ome_tiff import write_ome_tiff
from wsi_pipeline.export.ome_zarr import create_mask
from wsi_pipeline.report.record import Run, write_run_json

Mask = npt.NDArray[np.uint8]
CLASSES = (
    ClassInfo(name="Background"),
    ClassInfo(name="Tumor", color=(200, 0, 0)),
    ClassInfo(name="Stroma", color=(150, 200, 150)),
)
VALUES = LabelMap(classes={"Tumor": (1,), "Stroma": (2,)})


def random_mask(seed: int, shape: tuple[int, int] = (90, 130), *, classes: int = 3) -> Mask:
    """Return a mask of blobs."""
    noise = np.random.default_rng(seed).normal(size=(classes, *shape))
    return ndimage.gaussian_filter(noise, (0, 5, 5)).argmax(0).astype(np.uint8)


def write_png(path: Path, mask: Mask) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return path


def write_run(
    folder: Path,
    mask: Mask,
    size: tuple[int, int],
    *,
    mpp: float = 0.25,
    bounds: dict[str, int] | None = None,
) -> Path:
    """Write what `segment` leaves of a slide: its run.json and the OME-Zarr."""
    folder.mkdir(parents=True)
    mask_mpp = mpp * size[0] / mask.shape[1]
    pixels = create_mask(
        folder / "mask.ome.zarr",
        mask.shape,
        classes=CLASSES,
        mask_mpp=(mask_mpp, mask_mpp),
        name="mask",
    )
    pixels[:] = mask
    slide = {"name": "a.svs", "size": list(size), "mpp": [mpp, mpp], "bounds": bounds}
    run = Run(kind="slide", status="done", slide=slide, model={}, settings={}, versions={})
    write_run_json(folder / "run.json", run)
    return folder


def write_geojson(path: Path, areas: list[tuple[shapely.Polygon, str | None]]) -> Path:
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(polygon),
            "properties": {"objectType": "annotation"}
            | ({"classification": {"name": name}} if name else {}),
        }
        for polygon, name in areas
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")
    return path


def judge(prediction: Path, truth: Path, **options: Any) -> compare.Comparison:
    size = options.pop("size", None)
    options = {"prediction_values": VALUES, "truth_values": VALUES} | options
    pairing = Pairing(name="a", prediction=prediction, truth=truth, size=size)
    (found,) = compare_all([pairing], CompareOptions(**options))
    return found


def dice_of(found: compare.Comparison, name: str = "Tumor") -> float:
    confusion = found.confusion
    return float(class_figures(confusion)["dice"][found.classes.index(name)])


# -- figures ----------------------------------------------------------------------------------


def check_against_scikit_learn(prediction: Mask, truth: Mask, n_classes: int) -> None:
    confusion = count_block(prediction, truth, n_classes)
    figures = class_figures(confusion)
    labels = list(range(n_classes))
    flat = truth.ravel(), prediction.ravel()
    np.testing.assert_array_equal(confusion.matrix, oracle.confusion_matrix(*flat, labels=labels))
    each = {"labels": labels, "average": None, "zero_division": np.nan}
    precision, recall, dice, _ = oracle.precision_recall_fscore_support(*flat, **each)
    for name, expected in (("precision", precision), ("recall", recall), ("dice", dice)):
        np.testing.assert_allclose(figures[name], expected, rtol=1e-12)
    expected = oracle.jaccard_score(*flat, labels=labels, average=None)
    np.testing.assert_allclose(figures["iou"], expected, rtol=1e-12)
    together = pooled_figures(confusion)
    micro = oracle.f1_score(*flat, labels=labels[1:], average="micro")
    assert together["dice"] == pytest.approx(micro)


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    check_against_scikit_learn(random_mask(seed), random_mask(seed + 10), 3)


def test_figures_of_a_real_mask_are_those_of_scikit_learn(data_dir: Path) -> None:
    path = data_dir / "bcss" / "masks_multiclass" / "1008_gtcodes_aligned.png"
    if not path.is_file():
        pytest.skip("no BCSS mask in the real data")
    codes = np.array(Image.open(path))[::4, ::4]
    truth = np.select([codes == 1, codes == 2], [1, 2], 0).astype(np.uint8)
    check_against_scikit_learn(np.roll(truth, (7, -12), (0, 1)), truth, 3)


def brute_boundary(prediction: Mask, truth: Mask, index: int, reach: int) -> float:
    """Return boundary F1 by distance transforms of borders found by comparing neighbours."""

    def border(mask: Mask) -> npt.NDArray[np.bool_]:
        padded = np.pad(mask, 1, mode="edge")
        shifted = [np.roll(padded, s, a)[1:-1, 1:-1] for s in (1, -1) for a in (0, 1)]
        return (mask == index) & np.any([s != mask for s in shifted], axis=0)

    found, true = border(prediction), border(truth)
    precision = (ndimage.distance_transform_edt(~true)[found] <= reach).mean()
    recall = (ndimage.distance_transform_edt(~found)[true] <= reach).mean()
    return float(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_boundary_f1_is_what_distances_say(reach: int) -> None:
    truth = random_mask(1)
    prediction = np.roll(truth, 2, 1)
    confusion = count_block(prediction, truth, 3, tolerance_px=reach)
    found = class_figures(confusion)["boundary_f1"]
    for index in (1, 2):
        assert found[index] == pytest.approx(brute_boundary(prediction, truth, index, reach))


def test_a_mask_agrees_with_itself_and_not_with_itself_shifted() -> None:
    truth = random_mask(3)
    for shift in (0, 1):
        prediction = np.roll(truth, shift, 0)
        confusion = count_block(prediction, truth, 3, tolerance_px=0)
        for name, values in class_figures(confusion).items():
            assert ((values[1:] == 1) == (shift == 0)).all(), name


def test_what_one_side_lacks_has_no_meaning_or_counts_as_wrong() -> None:
    truth = np.zeros((8, 8), np.uint8)
    truth[2:5, 2:5] = 1
    confusion = count_block(np.zeros_like(truth), truth, 3)
    figures = {k: v.tolist() for k, v in class_figures(confusion).items()}
    assert [figures[k][1] for k in ("dice", "iou", "recall", "boundary_f1")] == [0, 0, 0, 0]
    assert np.isnan(figures["precision"][1])
    assert all(np.isnan(values[2]) for values in figures.values())
    # found where there is none: that nothing of it is right is all that can be said
    confusion = count_block(truth, np.zeros_like(truth), 2)
    figures = {k: v.tolist() for k, v in class_figures(confusion).items()}
    assert figures.pop("precision")[1] == 0
    assert all(np.isnan(values[1]) for values in figures.values())


def test_ignored_pixels_do_not_count() -> None:
    truth, prediction = random_mask(4), random_mask(5)
    ignored = random_mask(6) == 1
    truth[ignored] = IGNORE
    confusion = count_block(prediction, truth, 3)
    expected = oracle.confusion_matrix(truth[~ignored], prediction[~ignored], labels=[0, 1, 2])
    np.testing.assert_array_equal(confusion.matrix, expected)
    prediction[ignored] = 2
    again = count_block(prediction, truth, 3)
    np.testing.assert_array_equal(again.borders, confusion.borders)


def test_an_interval_holds_the_figure_and_shrinks_with_the_number_of_slides() -> None:
    confusions = []
    for seed in range(40):
        truth = random_mask(seed, (40, 40))
        confusions.append(count_block(np.roll(truth, seed % 5, 0), truth, 3))
    widths = []
    for count in (5, 40):
        by_class, _ = bootstrap(confusions[:count])
        whole = sum(confusions[:count], start=Confusion.empty(3))
        dice = class_figures(whole)["dice"]
        low, high = by_class["dice"]
        assert (low < dice).all()
        assert (dice < high).all()
        widths.append((high - low)[1])
    assert widths[1] < 0.6 * widths[0]


# -- frames and files -------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), block=st.integers(3, 60), tolerance=st.integers(0, 4))
def test_figures_do_not_depend_on_the_blocks(seed: int, block: int, tolerance: int) -> None:
    prediction, truth = random_mask(seed), random_mask(seed + 1)
    whole = count_block(prediction, truth, 3, tolerance_px=tolerance)
    parts = Confusion.empty(3)
    height, width = truth.shape
    halo = tolerance + 1
    for y in range(0, height, block):
        for x in range(0, width, block):
            y0, x0 = max(0, y - halo), max(0, x - halo)
            window = np.s_[y0 : y + block + halo, x0 : x + block + halo]
            core = (slice(y - y0, y - y0 + block), slice(x - x0, x - x0 + block))
            parts += count_block(
                prediction[window], truth[window], 3, core=core, tolerance_px=tolerance
            )
    np.testing.assert_array_equal(parts.matrix, whole.matrix)
    np.testing.assert_array_equal(parts.borders, whole.borders)


def write_mask(path: Path, mask: Mask) -> Path:
    if path.suffix == ".png" or path.name == "plain.tif":
        return write_png(path, mask)
    if path.suffix == ".zarr":
        create_mask(path, mask.shape, classes=CLASSES, mask_mpp=(0.5, 0.5), name="m")[:] = mask
        return path
    if path.suffix == "":
        return write_run(path, mask, mask.shape[::-1])
    write_ome_tiff(path, mask, classes=CLASSES, mask_mpp=(0.5, 0.5), name="m")
    return path


@pytest.mark.parametrize("name", ["m.png", "plain.tif", "m.ome.tif", "m.ome.zarr", "run"])
def test_every_kind_of_mask_is_read_by_blocks(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "BLOCK", 37)
    prediction, truth = random_mask(1), random_mask(2)
    values = {} if name in ("m.ome.tif", "m.ome.zarr", "run") else VALUES.classes
    found = judge(
        write_mask(tmp_path / name, prediction),
        write_png(tmp_path / "truth.png", truth),
        prediction_values=LabelMap(classes=values),
    )
    expected = count_block(prediction, truth, 3)
    np.testing.assert_array_equal(found.confusion.matrix, expected.matrix)
    np.testing.assert_array_equal(found.confusion.borders, expected.borders)


@pytest.mark.parametrize("size", [(130, 90), (260, 180), (259, 179)])
def test_a_coarse_mask_lies_on_its_slide(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    coarse = random_mask(1)
    factor = round(width / 130)
    fine = coarse.repeat(factor, 0).repeat(factor, 1)[:height, :width]
    run = write_run(tmp_path / "run", fine, size)
    assert dice_of(judge(write_png(tmp_path / "m.png", coarse), run)) == 1
    assert dice_of(judge(run, write_png(tmp_path / "m.png", coarse))) == 1
    # at another resolution, both sides are sampled at the same places
    found = judge(run, write_png(tmp_path / "m.png", coarse), mpp=0.7)
    assert dice_of(found) == 1
    assert found.shape == (int(np.ceil(height / 2.8)), int(np.ceil(width / 2.8)))


def test_areas_are_judged_in_level_0_pixels(tmp_path: Path) -> None:
    mask = np.zeros((200, 300), np.uint8)
    mask[40:120, 60:200] = 1
    mask[60:80, 100:140] = 0  # a hole
    mask[150:180, 10:40] = 2
    hole = shapely.box(100, 60, 140, 80)
    areas = [
        (shapely.box(60, 40, 200, 120).difference(hole), "Tumor"),
        (shapely.box(10, 150, 40, 180), "Stroma"),
    ]
    truth = write_geojson(tmp_path / "truth.geojson", areas)
    run = write_run(tmp_path / "run", mask, (300, 200))
    for sides in ((run, truth), (truth, run)):
        found = judge(*sides)
        assert np.trace(found.confusion.matrix) == mask.size
    half = write_png(tmp_path / "half.png", mask[::2, ::2])
    assert np.trace(judge(half, truth, size=(300, 200)).confusion.matrix) == mask.size // 4
    moved = [(shapely.affinity.translate(polygon, 1, 0), name) for polygon, name in areas]
    found = judge(run, write_geojson(tmp_path / "moved.geojson", moved))
    # 80 rows of the box and 20 of the hole lose a pixel at one end and gain one at the other
    tumor = found.classes.index("Tumor")
    assert found.confusion.matrix[tumor, tumor] == mask[40:120].astype(bool).sum() - 100
    assert dice_of(found) < 1


def test_the_smallest_area_lies_on_top_and_regions_limit(tmp_path: Path) -> None:
    areas = [
        (shapely.box(10, 10, 20, 20), "Stroma"),
        (shapely.box(0, 0, 60, 60), "Tumor"),
        (shapely.box(0, 0, 80, 40), "Region*"),
        (shapely.box(0, 0, 5, 5), "Ignore*"),
    ]
    truth = write_geojson(tmp_path / "truth.geojson", areas)
    found = judge(write_run(tmp_path / "run", np.ones((90, 100), np.uint8), (100, 90)), truth)
    expected = {"Background": 20 * 40, "Tumor": 60 * 40 - 100 - 25, "Stroma": 100}
    true = dict(zip(found.classes, found.confusion.matrix.sum(1).tolist(), strict=True))
    assert true == expected


@pytest.mark.parametrize("frame", ["qupath", "openslide"])
def test_bounds_move_geojson_and_cut_masks(tmp_path: Path, frame: str) -> None:
    mask = np.zeros((200, 300), np.uint8)
    mask[80:120, 110:190] = 1
    mask[150:170, 110:130] = 2
    bounds = {"x": 100, "y": 60, "width": 150, "height": 120}
    run = write_run(tmp_path / "run", mask, (300, 200), bounds=bounds)
    x, y = (100, 60) if frame == "qupath" else (0, 0)
    areas = [
        (shapely.box(110 - x, 80 - y, 190 - x, 120 - y), "Tumor"),
        (shapely.box(110 - x, 150 - y, 130 - x, 170 - y), "Stroma"),
    ]
    truth = write_geojson(tmp_path / "truth.geojson", areas)
    for sides in ((run, truth), (truth, run)):
        assert dice_of(judge(*sides, frame=frame)) == 1
    cut = write_png(tmp_path / "cut.png", mask[60:180, 100:250])
    if frame == "qupath":
        assert dice_of(judge(cut, run, frame=frame)) == 1
        other = judge(run, truth, frame="openslide")
        assert dice_of(other) < 1
    else:
        with pytest.raises(ValueError, match="150 × 120 px, which is no reduction of 300 × 200"):
            judge(cut, run, frame=frame)


def test_a_roi_limits_what_is_judged(tmp_path: Path) -> None:
    mask = random_mask(1)
    roi = write_geojson(tmp_path / "roi.geojson", [(shapely.box(0, 0, 50, 30), None)])
    truth = mask.copy()
    truth[30:] = 0
    run = write_run(tmp_path / "run", mask, (130, 90))
    found = judge(run, write_png(tmp_path / "truth.png", truth), roi=roi)
    assert found.confusion.matrix.sum() == 50 * 30
    assert dice_of(found) == 1


def test_what_is_ignored_is_not_judged_whatever_its_name(tmp_path: Path) -> None:
    mask = random_mask(1)
    run = write_run(tmp_path / "run", mask, (130, 90))
    truth = write_png(tmp_path / "truth.png", mask)
    drawn = [(shapely.box(0, 0, 60, 40), "Tumor"), (shapely.box(10, 10, 20, 30), "Ignore*")]
    roi = write_geojson(tmp_path / "roi.geojson", drawn)
    assert judge(run, truth, roi=roi).confusion.matrix.sum() == 60 * 40 - 10 * 20
    region = write_geojson(tmp_path / "region.geojson", [(shapely.box(5, 0, 60, 40), "Region*")])
    assert judge(run, truth, roi=region).confusion.matrix.sum() == 55 * 40
    areas = [(shapely.box(0, 0, 130, 90), "Tumor"), (shapely.box(10, 10, 20, 30), "Artefact*")]
    found = judge(run, write_geojson(tmp_path / "truth.geojson", areas), classes=("Tumor",))
    assert found.confusion.matrix.sum() == 130 * 90 - 10 * 20
    away = write_geojson(tmp_path / "away.geojson", [(shapely.box(130, 0, 200, 90), "Tumor")])
    with pytest.raises(ValueError, match="no area lies on the slide of 130 × 90 px"):
        judge(run, truth, roi=away)


def test_values_of_two_kinds_of_masks_are_one_class(tmp_path: Path) -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[5:15], truth[20:25], truth[30:] = 1, 19, 9
    one_bit = Image.fromarray(np.isin(truth, (1, 19))).convert("1")
    one_bit.save(tmp_path / "one_bit.png")
    coloured = np.repeat(np.isin(truth, (1, 19))[..., None] * np.uint8(255), 3, 2)
    found = [
        judge(
            write_png(tmp_path / "rgb.png", coloured),
            truth_path,
            prediction_values=LabelMap(classes={"Tumor": (255,)}),
            truth_values=values,
        )
        for truth_path, values in (
            (tmp_path / "one_bit.png", LabelMap(classes={"Tumor": (1,)})),
            (
                write_png(tmp_path / "codes.png", truth),
                LabelMap(classes={"Tumor": (1, 19)}, ignored=(9,)),
            ),
        )
    ]
    assert [dice_of(f) for f in found] == [1, 1]
    assert [int(f.confusion.matrix.sum()) for f in found] == [1600, 1200]


def test_values_without_a_meaning_are_counted_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "BLOCK", 50)
    monkeypatch.setattr("wsi_pipeline.evaluation.inputs.PART", 37)
    y, x = np.ogrid[:180, :150]
    disc = (y - 90) ** 2 + (x - 70) ** 2 < 60**2
    Image.fromarray(disc * np.uint8(255)).save(tmp_path / "lossy.jpg", quality=75)
    with Image.open(tmp_path / "lossy.jpg") as lossy:
        stored = np.array(lossy)
    truth = write_png(tmp_path / "truth.png", stored)
    exact = write_png(tmp_path / "exact.png", (stored >= 128).astype(np.uint8))
    values, counts = np.unique(stored, return_counts=True)
    strange = (values > 0) & (values < 255)
    sides = [exact, truth, "--prediction-values", "Tumor=1"]
    said = run_evaluate(*sides, "--truth-values", "Tumor=255", code=1)
    assert f"holds values without a meaning: {strange.sum()} (1, " in said
    assert f", {counts[strange].sum():,} of 27,000 pixels" in said
    assert "Background=others, or, of a mask that went through JPEG, Tumor=128+" in said
    found = json.loads(run_evaluate(*sides, "--truth-values", "Tumor=128+", "--json"))
    assert found["slides"][0]["classes"]["Tumor"]["dice"] == 1
    assert found["slides"][0]["classes"]["Tumor"]["truth_px"] == int((stored >= 128).sum())
    others = ("--truth-values", "Tumor=255", "--truth-values", "Background=others")
    found = json.loads(run_evaluate(*sides, *others, "--json"))
    assert found["slides"][0]["classes"]["Tumor"]["truth_px"] == int((stored == 255).sum())


def test_a_mask_of_a_run_holds_no_value_without_a_name(tmp_path: Path) -> None:
    mask = random_mask(1)
    truth = write_png(tmp_path / "truth.png", mask)
    mask[5:7, 3:10] = 9
    run = write_run(tmp_path / "run", mask, (130, 90))
    with pytest.raises(EvaluationError, match=r"1 \(9\), 14 of 11,700 pixels, 0\.12%"):
        judge(run, truth)


def test_what_is_found_where_the_truth_has_none_has_no_dice_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there, mask = np.zeros((2, 40, 50), np.uint8)
    there[5:15, 5:25] = mask[5:15, 5:15] = 1
    clean = np.zeros_like(there)
    strewn = clean.copy()
    strewn[30:32, 7:12] = 1
    for side, masks in (("p", (mask, strewn)), ("t", (there, clean))):
        (tmp_path / side).mkdir()
        for name, values in zip("ab", masks, strict=True):
            write_png(tmp_path / side / f"{name}.png", values)
    names = ("--prediction-values", "Tumor=1", "--truth-values", "Tumor=1")
    sides = (tmp_path / "p", tmp_path / "t", *names)
    found = json.loads(run_evaluate(*sides, "--json"))
    a, b = (slide["classes"]["Tumor"] for slide in found["slides"])
    assert a["dice"] == pytest.approx(200 / 300)
    assert [b[k] for k in ("dice", "iou", "recall", "boundary_f1")] == [None] * 4
    assert (b["precision"], b["prediction_px"], b["truth_px"]) == (0, 10, 0)
    assert found["slides"][1]["together"]["dice"] is None
    assert found["pooled"]["classes"]["Tumor"]["dice"] == pytest.approx(200 / 310)
    assert "b: the truth has no Tumor, of which 10 pixels are found" in caplog.text
    run_evaluate(*sides, "--output", tmp_path / "out")
    with (tmp_path / "out/evaluation.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    assert (rows["b"]["dice"], rows["b"]["prediction_px"]) == ("", "10")
    assert "\nb\tTumor\t-\t-\t" in run_evaluate(*sides)


def test_what_lies_beside_masks_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mask = random_mask(1)
    write_geojson(tmp_path / "far.geojson", [(shapely.box(0, 0, 5, 5), "Tumor")])
    for side in ("p", "t"):
        folder = tmp_path / side
        (folder / "old").mkdir(parents=True)
        for name in "ab":
            write_png(folder / f"{name}.png", mask)
        for name in ("LICENSE", "Thumbs.db", "desktop.ini", "notes.md", ".a.png", "a.jpg"):
            (folder / name).write_bytes(b"nothing")
        (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(64))
        for name in ("dataset.json", "a.json"):
            (folder / name).write_text('{"labels": {"Tumor": 1}}', "utf-8")
    options = ("--json", *("--prediction-values", "Tumor=1", "--prediction-values", "Stroma=2"))
    options += ("--truth-values", "Tumor=1", "--truth-values", "Stroma=2")
    found = json.loads(run_evaluate(tmp_path / "p", tmp_path / "t", *options))
    assert [entry["name"] for entry in found["slides"]] == ["a", "b"]
    assert found["pooled"]["together"]["dice"] == 1
    assert f"{tmp_path / 't'}: no masks, left out: 9 (" in caplog.text
    areas = (tmp_path / "far.geojson").read_text("utf-8")
    (tmp_path / "t/a.json").write_text(areas, "utf-8")  # which is GeoJSON
    said = run_evaluate(tmp_path / "p", tmp_path / "t", *options, code=1)
    assert "a.json and " in said
    assert "have the same name" in said


# -- refusals ---------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path: Path) -> None:
    mask = random_mask(1)
    run = write_run(tmp_path / "run", mask, (130, 90))
    png = write_png(tmp_path / "m.png", mask)
    only_tumor = np.where(mask == 2, 0, mask).astype(np.uint8)
    box = shapely.box(5, 5, 50, 50)
    cases = [
        (write_png(tmp_path / "small.png", mask[:60]), run, {}, "130 × 60 px, which is no red"),
        (png, run, {"prediction_values": LabelMap()}, "does not say what its values mean"),
        (png, run, {"classes": ("Tumour",)}, "knows the class 'Tumour'; predictions have 'Tumor'"),
        (
            png,
            write_geojson(tmp_path / "n.geojson", [(box, "Necrosis")]),
            {"size": (130, 90)},
            "truths 'Necrosis': rename classes",
        ),
        (run, write_png(tmp_path / "tumor.png", only_tumor), {}, "the truth has no pixel of Strom"),
        (png, write_geojson(tmp_path / "t.geojson", [(box, "Tumor")]), {}, "give the slide with"),
        (
            run,
            write_geojson(tmp_path / "nameless.geojson", [(box, None)]),
            {},
            "1 of 1 areas have no class",
        ),
        (
            run,
            write_geojson(tmp_path / "far.geojson", [(shapely.box(0, 0, 900, 900), "Tumor")]),
            {},
            "another slide, or not in level-0 pixels",
        ),
        (run, write_run(tmp_path / "other", mask[:80], (130, 80)), {}, "of slides of 130 × 90 and"),
        (png, write_png(tmp_path / "n.png", mask), {"mpp": 1.0}, "nothing says how large a pixel"),
        (
            png,
            png,
            {"truth_values": LabelMap(classes={"Tumor": (1,)}, ignored=(1,))},
            "are a class and ignored",
        ),
    ]
    colour = np.random.default_rng(0).integers(0, 255, (90, 130, 3), np.uint8)
    cases.append((write_png(tmp_path / "colour.png", colour), run, {}, "a picture in colour"))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    cases.append((tmp_path / "broken.png", run, {}, "cannot be read as a mask"))
    (tmp_path / "words.txt").write_text("x")
    cases.append((tmp_path / "words.txt", run, {}, "is no mask"))
    for prediction, truth, options, message in cases:
        with pytest.raises(ValueError, match=message):
            judge(prediction, truth, **options)


# -- cohorts and the command line -------------------------------------------------------------


def run_evaluate(*args: object, code: int = 0) -> str:
    command = ["-q", "evaluate", *map(str, args)]
    result = CliRunner().invoke(group, command, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_a_cohort_is_judged_slide_by_slide_and_together(tmp_path: Path) -> None:
    masks = {name: (random_mask(i), random_mask(i + 5)) for i, name in enumerate("ab")}
    for name, (prediction, truth) in masks.items():
        write_run(tmp_path / f"out/slide {name}", prediction, (130, 90), mpp=0.5)
        write_png(tmp_path / f"truth/slide {name}.png", truth)
    write_run(tmp_path / "out/without truth", masks["a"][0], (130, 90))
    values = ["--truth-values", "Tumor=1", "--truth-values", "Stroma=2"]
    arguments = [tmp_path / "out", tmp_path / "truth", *values, "-o", tmp_path / "result"]
    described = json.loads(run_evaluate(*arguments, "--json"))
    assert [slide["name"] for slide in described["slides"]] == ["slide a", "slide b"]
    assert described == json.loads((tmp_path / "result/evaluation.json").read_text("utf-8"))
    both = [np.concatenate([m[i].ravel() for m in masks.values()]) for i in (0, 1)]
    tumor = described["pooled"]["classes"]["Tumor"]
    expected = oracle.f1_score(both[1], both[0], labels=[1], average=None)[0]
    assert tumor["dice"] == pytest.approx(expected)
    low, high = tumor["interval_95"]["dice"]
    assert low <= expected <= high
    assert tumor["truth_mm2"] == pytest.approx((both[1] == 1).sum() * 0.25e-6)
    with (tmp_path / "result/evaluation.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["slide"], row["class"]): row for row in rows}
    assert len(found) == len(rows) == 9
    assert float(found["all slides", "Tumor"]["dice"]) == pytest.approx(expected)
    table = run_evaluate(*arguments[:-2]).splitlines()
    assert table[0].split("\t") == ["slide", "class", *FIGURES]
    assert len(table) == 10
    assert sorted(p.name for p in (tmp_path / "result").glob("*.png")) == [
        "slide a.png",
        "slide b.png",
    ]


def test_evaluate_from_python_gives_what_the_command_does(tmp_path: Path) -> None:
    prediction, truth = random_mask(1), random_mask(2)
    run = write_run(tmp_path / "run", prediction, (130, 90), mpp=0.5)
    write_png(tmp_path / "truth.png", truth)
    roi = write_geojson(tmp_path / "roi.geojson", [(shapely.box(0, 0, 50, 30), None)])
    told: list[tuple[str, int, int, int, int]] = []
    figures = evaluate(
        str(run),
        str(tmp_path / "truth.png"),
        output=str(tmp_path / "python"),
        roi=str(roi),
        truth_values={"Tumor": (1,), "Stroma": (2,)},
        progress=lambda *state: told.append(state),
    )
    assert figures["pooled"]["classes"]["Tumor"]["truth_px"] == (truth[:30, :50] == 1).sum()
    assert told[-1][1] == told[-1][2] > 0
    assert {state[3:] for state in told} == {(1, 1)}
    values = ["--truth-values", "Tumor=1", "--truth-values", "Stroma=2", "--roi", roi]
    run_evaluate(run, tmp_path / "truth.png", *values, "-o", tmp_path / "command")
    for name in ("evaluation.json", "evaluation.csv", "run.png"):
        assert (tmp_path / "python" / name).read_bytes() == (
            tmp_path / "command" / name
        ).read_bytes()
    with pytest.raises(UsageError, match=r"no\.geojson"):
        evaluate(run, tmp_path / "truth.png", roi=tmp_path / "no.geojson")
    with pytest.raises(TypeError, match="tolerance"):
        evaluate(run, tmp_path / "truth.png", tolerance=1)


def test_the_picture_shows_where_the_sides_disagree(tmp_path: Path) -> None:
    prediction, truth = np.zeros((2, 40, 60), np.uint8)
    prediction[:, :30] = 1
    truth[:20] = 1
    truth[30:, 50:] = 2
    prediction[30:, 50:] = 2
    found = judge(write_png(tmp_path / "p.png", prediction), write_png(tmp_path / "t.png", truth))
    colours = {tuple(found.picture[y, x]) for y, x in ((5, 5), (35, 55))}
    assert colours == {(150, 190, 150)}
    assert tuple(found.picture[30, 5]) == (215, 48, 39)
    assert tuple(found.picture[5, 50]) == (69, 117, 180)
    assert tuple(found.picture[25, 50]) == (255, 255, 255)


def test_the_slide_lies_under_the_picture(
    tmp_path: Path, slide_path: Path, slide_pixels: npt.NDArray[np.uint8]
) -> None:
    mask = np.zeros(slide_pixels.shape[:2], np.uint8)
    mask[600:800, 400:700] = 1
    sides = [write_png(tmp_path / f"{name}.png", mask) for name in "pt"]
    tumor = LabelMap(classes={"Tumor": (1,)})
    options = CompareOptions(prediction_values=tumor, truth_values=tumor)
    pairing = Pairing(name="a", prediction=sides[0], truth=sides[1], slide=slide_path)
    (found,) = compare_all([pairing], options)
    cells = slide_pixels[:1486, :1930].reshape(743, 2, 965, 2, 3).mean((1, 3))
    inside = np.zeros((743, 965), bool)
    inside[300:400, 200:350] = True
    # in grey, by the weights of ITU-R BT.601, as Pillow has them
    cells = np.repeat(cells @ [[0.299], [0.587], [0.114]], 3, axis=-1)
    cells[inside] = 0.4 * cells[inside] + 0.6 * np.array([150, 190, 150])
    away = np.abs(found.picture[:743, :965] - cells).max(-1)
    assert (away < 8).mean() > 0.99  # but for the edges of shapes: another way of shrinking


def test_the_picture_says_what_its_colours_mean_and_how_large_it_is(tmp_path: Path) -> None:
    mask = random_mask(0)
    height, width = mask.shape
    run = write_run(tmp_path / "run", mask, (4 * width, 4 * height), mpp=0.25)
    truth = write_png(tmp_path / "truth.png", mask)
    run_evaluate(run, truth, "--truth-values", "Tumor=1", "--truth-values", "Stroma=2",
                 "--output", tmp_path / "out")  # fmt: skip
    with Image.open(tmp_path / "out" / "run.png") as file:
        picture = np.asarray(file)
    times = 600 // width
    assert (picture[: times * height : times, : times * width : times][mask == 0] == 255).all()
    below = picture[times * height :]
    for color in COLORS[1:]:
        assert (below == color).all(-1).sum() >= 200  # a swatch
    dark = (below == (40, 40, 40)).all(-1)
    bar = max(sum(run) for row in dark for _, run in itertools.groupby(row))
    assert bar == 20 * times  # 20 µm: 1, 2 or 5 times a power of ten, at most a fifth of the width


@pytest.mark.parametrize("name", ["m.png", "plain.tif", "m.ome.tif", "m.ome.zarr"])
def test_a_damaged_mask_ends_with_a_sentence(tmp_path: Path, name: str) -> None:
    mask = np.random.default_rng(0).integers(0, 3, (300, 400), np.uint8)
    for folder in ("cut", "whole"):
        (tmp_path / folder).mkdir()
    path, whole = (write_mask(tmp_path / folder / name, mask) for folder in ("cut", "whole"))
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.name.isdecimal()]
    chunk = max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)
    data = chunk.read_bytes()
    chunk.write_bytes(data[: len(data) * 2 // 3])
    values = ["--truth-values=Tumor=1", "--prediction-values=Tumor=1"]
    said = run_evaluate(path, whole, *values, code=1)
    assert str(path) in said
    assert said.count("\n") == 1


def test_damaged_names_of_values_end_with_a_sentence(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.ome.tif", random_mask(0))
    path.write_bytes(path.read_bytes().replace(b"<OME ", b"<OM\x00 "))
    said = run_evaluate(path, path, code=1)
    assert said.count("\n") == 1


def test_a_truth_without_prediction_is_refused(tmp_path: Path) -> None:
    for name in ("p/a.png", "t/a.png", "t/b.png"):
        write_png(tmp_path / name, random_mask(0))
    with pytest.raises(ValueError, match=r"no prediction in .* for b of"):
        pair_up(tmp_path / "p", tmp_path / "t", slide=None, size=None)
    said = run_evaluate(tmp_path / "p", tmp_path / "t", code=1)
    assert "Traceback" not in said
    write_png(tmp_path / "p/a.tif", random_mask(0))
    with pytest.raises(ValueError, match=r"a\.png and .*a\.tif have the same name"):
        pair_up(tmp_path / "p", tmp_path / "t", slide=None, size=None)


def test_slides_of_a_cohort_are_found_by_name(tmp_path: Path, slide_path: Path) -> None:
    for name in ("a", "b"):
        write_png(tmp_path / f"p/{name}.png", random_mask(0))
        write_png(tmp_path / f"t/{name}.png", random_mask(0))
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/a.tif").symlink_to(slide_path)
    (tmp_path / "slides/a.csv").write_text("no slide")
    folders = tmp_path / "p", tmp_path / "t"
    with pytest.raises(ValueError, match=r"no slide in .*slides for b of"):
        pair_up(*folders, slide=tmp_path / "slides", size=None)
    (tmp_path / "slides/b.tif").symlink_to(slide_path)
    pairings = pair_up(*folders, slide=tmp_path / "slides", size=None)
    assert [p.slide.name for p in pairings] == ["a.tif", "b.tif"]
    files = tmp_path / "p/b.png", tmp_path / "t/a.png"
    (single,) = pair_up(*files, slide=tmp_path / "slides", size=None)
    assert single.slide.name == "b.tif"
    (single,) = pair_up(*files, slide=tmp_path / "slides/a.tif", size=None)
    assert single.slide.name == "a.tif"


def test_in_a_folder_with_runs_nothing_else_counts(tmp_path: Path) -> None:
    out, truth = tmp_path / "out", tmp_path / "truth"
    for name in ("a", "b"):
        write_run(out / name, random_mask(0), random_mask(0).shape[::-1])
        write_png(truth / f"{name}.png", random_mask(0))
    # a viewer's traces, and people's own files
    (out / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (out / ".zgroup").write_text('{"zarr_format": 2}')
    (out / ".zattrs").write_text("{}")
    write_png(out / "a.png", random_mask(1))
    (out / "notes").mkdir()
    (out / "notes" / "zarr.json").write_text("{")
    pairings = pair_up(out, truth, slide=None, size=None)
    assert [(p.name, p.prediction.name) for p in pairings] == [("a", "a"), ("b", "b")]
    swapped = pair_up(truth, out, slide=None, size=None)
    assert [p.truth.name for p in swapped] == ["a", "b"]
    told = run_evaluate(out, truth, "--truth-values", "Tumor=1", "--truth-values", "Stroma=2")
    assert told.count("1.0000\t1.0000\t1.0000\t1.0000") == 9  # two classes and all: a, b, both


def test_an_empty_zarr_group_around_masks_is_a_folder(tmp_path: Path) -> None:
    write_png(tmp_path / "p/a.png", random_mask(0))
    (tmp_path / "p" / "zarr.json").write_text('{"node_type": "group", "attributes": {}}')
    write_png(tmp_path / "t/a.png", random_mask(0))
    (pairing,) = pair_up(tmp_path / "p", tmp_path / "t", slide=None, size=None)
    assert pairing.prediction.name == "a.png"


@pytest.mark.parametrize(
    "options", [["--rename", "x"], ["--size", "3"], ["--truth-values", "Tumor"]]
)
def test_wrong_options_are_wrong_usage(tmp_path: Path, options: list[str]) -> None:
    path = write_png(tmp_path / "a.png", random_mask(0))
    assert "expected" in run_evaluate(path, path, *options, code=2)


def test_a_slide_tells_resolution_and_size(tmp_path: Path, slide_path: Path) -> None:
    areas = [(shapely.box(100, 100, 800, 700), None), (shapely.box(900, 100, 1300, 900), "Other")]
    truth = write_geojson(tmp_path / "truth.geojson", areas)
    mask = np.zeros((372, 483), np.uint8)  # 1931 × 1487 px by four
    mask[25:175, 25:200] = 7
    png = write_png(tmp_path / "mask.png", mask)
    arguments = [png, truth, "--slide", slide_path, "--prediction-values", "Tumor=7"]
    options = ["--rename", "=Tumor", "--classes", "Tumor", "--mpp", "1.0", "--json"]
    described = json.loads(run_evaluate(*arguments, *options))
    assert described["slides"][0]["size_px"] == [483, 372]
    assert described["pooled"]["classes"]["Tumor"]["dice"] == 1
    assert described["pooled"]["classes"]["Tumor"]["truth_mm2"] == pytest.approx(0.7 * 0.6 / 16)


def test_a_class_is_no_formula_in_the_table(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", random_mask(0, classes=2))
    values = ("--prediction-values", "Tumor=1", "--truth-values", "Tumor=1")
    run_evaluate(path, path, *values, "--rename", "Tumor=+x", "-o", tmp_path / "result")
    with (tmp_path / "result" / "evaluation.csv").open(encoding="utf-8", newline="") as file:
        assert "'+x" in {row["class"] for row in csv.DictReader(file)}
