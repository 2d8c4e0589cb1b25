"""Masks of images and volumes compared, against SimpleITK, scikit-learn and counts."""

from __future__ import annotations

import itertools
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import highdicom.seg
import nibabel
import nrrd
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
from click.testing import CliRunner
from dicoms import write_series
from PIL import Image
from scans import Labelled, blobs, scan_bundle
from scipy import ndimage
from sklearn.metrics import jaccard_score

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.evaluation.confusion import IGNORE, surface_distances
from wsi_pipeline.evaluation.meaning import LabelMap
from wsi_pipeline.training.pictures import Meaning, read_scan

SPACING = (2.5, 0.7, 0.6)
"""(z, y, x) mm."""
NAMES = ("--truth-values", "Lesion=1", "--truth-values", "Cyst=2")
BOTH = (*NAMES, "--prediction-values", "Lesion=1", "--prediction-values", "Cyst=2")


def evaluate(*arguments: Any) -> dict[str, Any]:
    done = CliRunner().invoke(group, ["evaluate", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*arguments: Any) -> str:
    done = CliRunner().invoke(group, ["evaluate", *map(str, arguments)])
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    return done.stderr


def labels(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.uint8]:
    """Return smooth regions of three values, (z, y, x)."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 3)
    return np.digitize(field, np.quantile(field, (0.7, 0.9))).astype(np.uint8)


def affine_of(spacing: tuple[float, ...] = SPACING) -> npt.NDArray[np.float64]:
    """Return an oblique affine for (x, y, z)."""
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing[::-1]
    affine[:3, 3] = -30, 12, 7
    return affine


def save(path: Path, values: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]) -> Path:
    nibabel.save(nibabel.Nifti1Image(values.T, affine), path)
    return path


def turned(path: Path, codes: tuple[str, ...], target: Path) -> Path:
    """Write a volume again with its axes in another order and direction; return its path."""
    image = nibabel.load(path)
    wanted = nibabel.orientations.axcodes2ornt(codes)
    change = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), wanted)
    nibabel.save(image.as_reoriented(change), target)
    return target


def itk_distances(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_], spacing: Any) -> Any:
    """Return HD95 and the mean distance of two surfaces by SimpleITK's distance maps."""
    images = [SimpleITK.GetImageFromArray(mask.astype(np.uint8)) for mask in (one, other)]
    for image in images:
        image.SetSpacing(tuple(map(float, reversed(spacing))))
    edges = [SimpleITK.LabelContour(image, fullyConnected=False) for image in images]
    ways = []
    for own, to in (edges, edges[::-1]):
        distance = SimpleITK.SignedMaurerDistanceMap(
            to, squaredDistance=False, useImageSpacing=True
        )
        values = np.abs(SimpleITK.GetArrayFromImage(distance))
        ways.append(values[SimpleITK.GetArrayFromImage(own) > 0])
    return max(np.percentile(way, 95) for way in ways), np.concatenate(ways).mean()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(13, 31, 27), (61, 47)])
def test_distances_of_surfaces_are_those_of_simpleitk(seed: int, shape: tuple[int, ...]) -> None:
    one, other = (labels(shape, seed + n) == 1 for n in (0, 10))
    spacing = SPACING[-len(shape) :]
    assert surface_distances(one, other, spacing) == pytest.approx(
        itk_distances(one, other, spacing), rel=1e-5
    )


def test_distances_of_surfaces_take_little_memory() -> None:
    one, other = np.zeros((2, 160, 160, 160), bool)
    one[2, 2, 2] = one[155, 155, 155] = other[2, 2, 5] = other[155, 155, 155] = True
    tracemalloc.start()
    try:
        found = surface_distances(one, other, SPACING)
        assert tracemalloc.get_traced_memory()[1] < 12 * one.size
    finally:
        tracemalloc.stop()
    assert found == pytest.approx((0.95 * 3 * SPACING[2], 3 * SPACING[2] / 2))


def test_a_volume_agrees_with_itself_in_any_axes(tmp_path: Path) -> None:
    truth = save(tmp_path / "t.nii.gz", labels((13, 31, 27), 0), affine_of())
    for number, codes in enumerate(itertools.permutations("RAS")):
        for flips in itertools.product((False, True), repeat=3):
            opposite = dict(zip("RAS", "LPI", strict=True))
            wanted = tuple(opposite[c] if flip else c for c, flip in zip(codes, flips, strict=True))
            if number % 2 and any(flips):  # half of the 48 are enough
                continue
            other = turned(truth, wanted, tmp_path / "p.nii")
            found = evaluate(other, truth, *BOTH)["slides"][0]
            for name in ("Lesion", "Cyst"):
                figures = found["classes"][name]
                assert figures["dice"] == 1.0
                assert figures["hd95_mm"] == figures["average_distance_mm"] == 0.0


def test_figures_of_a_volume_are_those_of_others(tmp_path: Path) -> None:
    one, other = labels((13, 31, 27), 0), labels((13, 31, 27), 5)
    truth = save(tmp_path / "t.nii.gz", one, affine_of())
    prediction = turned(
        save(tmp_path / "a.nii", other, affine_of()), ("S", "L", "P"), tmp_path / "p.nii"
    )
    found = evaluate(prediction, truth, *BOTH)["slides"][0]
    assert found["size_px"] == [27, 31, 13]
    assert found["spacing_mm"] == pytest.approx(SPACING[::-1], rel=1e-4)
    iou = jaccard_score(one.ravel(), other.ravel(), average=None)
    ml = np.prod(SPACING) / 1000
    for index, name in ((1, "Lesion"), (2, "Cyst")):
        figures = found["classes"][name]
        assert figures["iou"] == pytest.approx(iou[index])
        assert figures["truth_ml"] == pytest.approx((one == index).sum() * ml, rel=1e-4)
        assert figures["prediction_ml"] == pytest.approx((other == index).sum() * ml, rel=1e-4)
        expected = itk_distances(other == index, one == index, SPACING)
        distances = figures["hd95_mm"], figures["average_distance_mm"]
        assert distances == pytest.approx(expected, rel=1e-4)


def test_a_volume_shifted_by_a_voxel_agrees_less_or_is_refused(tmp_path: Path) -> None:
    values = labels((13, 31, 27), 0)
    truth = save(tmp_path / "t.nii.gz", values, affine_of())
    shifted = save(tmp_path / "s.nii.gz", np.roll(values, 1, axis=2), affine_of())
    assert evaluate(shifted, truth, *BOTH)["slides"][0]["classes"]["Lesion"]["dice"] < 0.97
    moved = affine_of()
    moved[:3, 3] += moved[:3, 0]
    said = refused(save(tmp_path / "m.nii.gz", values, moved), truth, *BOTH)
    assert (
        "does not lie on its image: the mask has 27 × 31 × 13 voxels of 0.6 × 0.7 × 2.5 mm" in said
    )
    assert "Resample the mask onto the image" in said
    said = refused(save(tmp_path / "c.nii.gz", values, affine_of((2.5, 0.7, 0.7))), truth, *BOTH)
    assert "of 0.7 × 0.7 × 2.5 mm" in said


def test_nrrd_and_nifti_of_one_body_are_compared(tmp_path: Path) -> None:
    values = labels((13, 31, 27), 0)
    truth = save(tmp_path / "t.nii.gz", values, np.diag([*SPACING[::-1], 1.0]))
    header = {"space": "LPS", "space directions": np.diag([-0.6, -0.7, 2.5])}
    nrrd.write(str(tmp_path / "p.nrrd"), values.T, header)
    assert evaluate(tmp_path / "p.nrrd", truth, *BOTH)["pooled"]["classes"]["Cyst"]["dice"] == 1.0
    said = refused(tmp_path / "p.nrrd", truth, *NAMES)
    assert "p.nrrd does not say what its values mean" in said
    Image.fromarray(values[0]).save(tmp_path / "p.png")
    assert "p.png is no mask of a volume" in refused(tmp_path / "p.png", truth, *BOTH)
    nibabel.save(nibabel.Nifti1Image(values.T + np.float32(0.5), np.eye(4)), tmp_path / "f.nii")
    assert "a mask has whole numbers" in refused(tmp_path / "f.nii", truth, *BOTH)


def segment(*arguments: Any) -> None:
    done = CliRunner().invoke(group, ["segment", *map(str, arguments), "--device", "cpu"])
    assert done.exit_code == 0, done.stderr


def test_runs_of_volumes_are_judged(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "a", blobs((9, 40, 33), 0).astype(np.int16), spacing=SPACING)
    write_series(tmp_path / "in" / "b", blobs((9, 40, 33), 1).astype(np.int16), spacing=SPACING)
    keys = "scale = [0.0, 1024.0]"
    bundle = scan_bundle(tmp_path / "m", resolution=f"spacing_mm = {list(SPACING)}", keys=keys)
    out = tmp_path / "out"
    segment(tmp_path / "in", "--model", bundle, "--output", out)
    # with itself, as run, as NIfTI and as DICOM segmentation, whose outer slices may be left out
    for name in ("mask.nii.gz", "mask.dcm", ""):
        values = ("--truth-values", "Grey=1", "--truth-values", "Bright=2") if "nii" in name else ()
        found = evaluate(out / "a", out / "a" / name, *values)["slides"][0]
        assert found["classes"]["Grey"]["dice"] == found["classes"]["Bright"]["dice"] == 1.0
        assert found["accuracy"] == 1.0
    (tmp_path / "truth").mkdir()
    for name in "ab":
        mask = tmp_path / "truth" / f"{name}.nii.gz"
        turned(out / name / "mask.nii.gz", ("I", "R", "P"), mask)
    cohort = evaluate(
        out, tmp_path / "truth", "--truth-values", "Grey=1", "--truth-values", "Bright=2"
    )
    assert [entry["name"] for entry in cohort["slides"]] == ["a", "b"]
    assert cohort["pooled"]["together"]["dice"] == 1.0
    run = json.loads((out / "a" / "run.json").read_text())
    assert cohort["slides"][0]["classes"]["Bright"]["truth_ml"] == pytest.approx(
        run["volume_ml"]["Bright"], rel=1e-4
    )
    other = evaluate(out / "a", out / "b")["slides"][0]["classes"]["Grey"]
    masks = [np.asarray(nibabel.load(out / name / "mask.nii.gz").dataobj).T == 1 for name in "ab"]
    assert (other["hd95_mm"], other["average_distance_mm"]) == pytest.approx(
        itk_distances(masks[0], masks[1], SPACING), rel=1e-4
    )


def test_truths_of_a_folder_are_laid_on_their_volumes_by_geometry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_series(
            tmp_path / "in" / name, blobs((9, 40, 33), ord(name)).astype(np.int16), spacing=SPACING
        )
    keys = "scale = [0.0, 1024.0]"
    bundle = scan_bundle(tmp_path / "m", resolution=f"spacing_mm = {list(SPACING)}", keys=keys)
    out, truth = tmp_path / "out", tmp_path / "truth"
    segment(tmp_path / "in", "--model", bundle, "--output", out)
    truth.mkdir()
    shutil.copyfile(out / "a" / "mask.dcm", truth / "a.dcm")
    turned(out / "b" / "mask.nii.gz", ("A", "L", "I"), truth / "b.nii.gz")
    # images beside masks, and what else lies in folders
    shutil.copyfile(next((tmp_path / "in" / "a").iterdir()), truth / "scan.dcm")
    for name in ("LICENSE", "Thumbs.db", "desktop.ini", "dataset.json", ".DS_Store"):
        (truth / name).write_bytes(b"{}")
    read = []
    real = highdicom.seg.segread

    def segread(path: Path) -> Any:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr("highdicom.seg.segread", segread)
    values = ("--truth-values", "Grey=1", "--truth-values", "Bright=2")
    found = evaluate(out, truth, *values)
    assert [entry["name"] for entry in found["slides"]] == ["a", "b"]
    assert found["pooled"]["together"]["dice"] == 1.0
    assert read == ["a.dcm"]
    moved = nibabel.load(truth / "b.nii.gz")
    affine = moved.affine.copy()
    affine[:3, 3] += moved.affine[:3, 0] / 2  # half a voxel beside
    nibabel.save(nibabel.Nifti1Image(np.asarray(moved.dataobj), affine), truth / "b.nii.gz")
    said = refused(out, truth, *values)
    assert "does not lie on its image: the mask has" in said
    # training lays a segmentation on its slices by the same rule
    spec = load_bundle(bundle).input
    meaning = Meaning(
        values=LabelMap(classes={"Bright": (2,)}, ignored=(1,)), indices={"Bright": 1}
    )
    _, learnt = read_scan(tmp_path / "in" / "a", truth / "a.dcm", meaning=meaning, spec=spec)
    mask = np.asarray(nibabel.load(out / "a" / "mask.nii.gz").dataobj).T
    np.testing.assert_array_equal(learnt, np.array([0, IGNORE, 1])[mask])


def test_runs_of_images_are_judged(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        grey = (blobs((91, 120), ord(name)) // 4).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / "in" / f"{name}.png")
    bundle = scan_bundle(
        tmp_path / "m", modality="image", resolution="fit = [91, 120]", patch_size=(64, 64),
        program=Labelled, labels='labels = ["Benign", "Malignant"]',
    )  # fmt: skip
    out = tmp_path / "out"
    segment(tmp_path / "in", "--model", bundle, "--output", out)
    (tmp_path / "truth").mkdir()
    masks = {name: np.asarray(Image.open(out / name / "mask.png")) for name in "ab"}
    for name, mask in masks.items():
        Image.fromarray(np.roll(mask, 1, axis=0)).save(tmp_path / "truth" / f"{name}.png")
    values = ("--truth-values", "Grey=1", "--truth-values", "Bright=2")
    assert evaluate(out / "a", out / "a")["pooled"]["together"]["dice"] == 1.0
    found = evaluate(out, tmp_path / "truth", *values)
    for entry, mask in zip(found["slides"], masks.values(), strict=True):
        rolled = np.roll(mask, 1, axis=0)
        iou = jaccard_score(rolled.ravel(), mask.ravel(), average=None)
        assert entry["mpp"] is None
        for index, name in ((1, "Grey"), (2, "Bright")):
            figures = entry["classes"][name]
            assert figures["iou"] == pytest.approx(iou[index])
            expected = itk_distances(mask == index, rolled == index, (1, 1))
            distances = figures["hd95_px"], figures["average_distance_px"]
            assert distances == pytest.approx(expected, rel=1e-5)
