"""Images and volumes through the whole job, against nibabel, pydicom and one canvas in memory."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image as Pictures
from pydicom.dataset import FileMetaDataset
from pydicom.uid import DigitalMammographyXRayImageStorageForPresentation as Mammogram
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from runs import segment_job
from scans import Around, Enhanced, Labelled, Soft, blobs, classify, scan_bundle, write_series
from scipy.ndimage import map_coordinates
from scipy.signal.windows import gaussian

from wsi_pipeline import open_run
from wsi_pipeline.annotations.check import check_geojson
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.networks import build
from wsi_pipeline.options import (
    ExportOptions,
    PredictOptions,
    ScheduleOptions,
    SelectOptions,
    Settings,
)
from wsi_pipeline.report.record import load_run
from wsi_pipeline.run import worker as blocks
from wsi_pipeline.run.jobs import plan_jobs
from wsi_pipeline.schedule.cluster import open_cluster

NIFTI = ("nifti",)
FULL = "scale = [0.0, 1024.0]"


def run(path, bundle, output, *, workers=1, outputs=(), **predict):
    options = {"precision": "fp32", "device": "cpu"} | predict
    settings = Settings(predict=PredictOptions(**options), export=ExportOptions(outputs=outputs))
    (job,) = plan_jobs([Path(path)], Path(output))
    with open_cluster(ScheduleOptions(workers=workers)) as client:
        return job.folder, segment_job(
            job, load_bundle(bundle), client=client, settings=settings, threads=workers
        )


def command(*arguments):
    return CliRunner().invoke(group, [str(a) for a in arguments])


def oblique(spacing, seed):
    """Return an affine with these (x, y, z) mm, turned by any angles."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = -12.3, 45.6, 7.8
    return affine


# --- a pointwise network: the same function of what another reader reads


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 3.0)], ids=["oblique", "uneven"])
def test_of_nifti_every_voxel_is_right_and_lies_where_it_lay(tmp_path, spacing):
    stored = blobs((50, 61, 43)).transpose()  # (x, y, z)
    image = nibabel.Nifti1Image(stored, oblique(spacing, 0))
    path = tmp_path / "breast.nii.gz"
    nibabel.save(image, path)
    resolution = f"spacing_mm = {[round(float(v), 3) for v in reversed(spacing)]}"
    bundle = scan_bundle(tmp_path / "model", resolution=resolution, keys=FULL)
    folder, made = run(path, bundle, tmp_path / "out", block_size=64)
    assert made.status == "done", made.reason
    mask = nibabel.load(folder / "mask.nii.gz")
    expected = classify(np.asarray(nibabel.load(path).dataobj) / 1024)
    assert (np.asarray(mask.dataobj) == expected).all()
    assert np.bincount(expected.ravel(), minlength=3).min() > 1000
    assert (mask.affine == nibabel.load(path).affine).all()
    ml = float(np.prod(spacing)) / 1000
    for index, name in ((1, "Grey"), (2, "Bright")):
        assert made.volume_ml[name] == pytest.approx((expected == index).sum() * ml, rel=1e-5)
    assert folder.name == "breast"
    assert (folder / "overlay.png").is_file()
    assert not (folder / "mask.dcm").exists()


def test_of_a_shuffled_series_every_voxel_is_right(tmp_path):
    spacing = (2.5, 0.8, 0.8)
    write_series(tmp_path / "ct", blobs((12, 40, 33)), spacing=spacing, seed=3)
    bundle = scan_bundle(tmp_path / "model", resolution=f"spacing_mm = {list(spacing)}", keys=FULL)
    folder, made = run(tmp_path / "ct", bundle, tmp_path / "out")
    assert made.status == "done", made.reason
    slices = sorted(
        map(pydicom.dcmread, (tmp_path / "ct").iterdir()), key=lambda s: s.ImagePositionPatient[2]
    )
    values = np.stack([s.pixel_array * 2 - 100 for s in slices])
    expected = classify(values / 1024)
    mask = np.asarray(nibabel.load(folder / "mask.nii.gz").dataobj)
    assert (mask.transpose() == expected).all()
    written = pydicom.dcmread(folder / "mask.dcm")
    assert written.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert int(written.pixel_array.sum()) == (expected > 0).sum()


def write_mammogram(path, pixels):
    """Write a MONOCHROME1 mammogram of 12 bits."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = Mammogram, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = pydicom.Dataset()
    header.file_meta = meta
    header.SOPClassUID, header.SOPInstanceUID = Mammogram, meta.MediaStorageSOPInstanceUID
    header.StudyInstanceUID, header.SeriesInstanceUID = generate_uid(), generate_uid()
    header.PatientID = header.PatientName = header.PatientBirthDate = header.PatientSex = ""
    header.StudyDate = header.StudyTime = header.AccessionNumber = header.StudyID = ""
    header.ReferringPhysicianName, header.SeriesNumber, header.InstanceNumber = "", 1, 1
    header.Modality, header.ImageLaterality = "MG", "R"
    header.ImagerPixelSpacing = [0.1, 0.1]
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME1"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.PixelRepresentation = 0
    header.PixelData = pixels.astype("<u2").tobytes()
    header.save_as(path, enforce_file_format=True)


def test_of_a_mammogram_in_monochrome1_every_pixel_is_right(tmp_path):
    """Mirrored, padded and back: the network sees 150 × 150 px."""
    pixels = 4095 - blobs((150, 101)) * 4
    pixels[:, :60] += (4095 - pixels[:, :60]) // 2  # the left half is the darker: stored higher
    write_mammogram(tmp_path / "mg.dcm", pixels)
    bundle = scan_bundle(
        tmp_path / "model",
        modality="image",
        resolution="fit = [150, 150]",
        patch_size=(64, 64),
        keys='scale = "range"\norient = "left"\npad = "square"',
    )
    folder, made = run(tmp_path / "mg.dcm", bundle, tmp_path / "out")
    assert made.status == "done", made.reason
    assert made.settings["prepared"]["is_mirrored"]
    stored = pydicom.dcmread(tmp_path / "mg.dcm").pixel_array
    expected = classify((4095 - stored.astype(int)) / 4095)
    assert np.bincount(expected.ravel(), minlength=3).min() > 200
    with Pictures.open(folder / "mask.png") as mask:
        assert (np.asarray(mask) == expected).all()
    with open_run(folder) as opened:
        layer = opened.probability
        assert (layer[:] == 255 * (expected == np.array([1, 2])[:, None, None])).all()
        assert (layer.read((3, 5), (150, 101)) * 255 == layer[:, 3:, 5:]).all()
        assert (layer.mpp is None) == (made.slide["spacing_mm"] is None)
    assert (pydicom.dcmread(folder / "mask.dcm").pixel_array.sum()) == (expected > 0).sum()
    document = json.loads((folder / "annotations.geojson").read_text("utf-8"))
    found = dict.fromkeys(("Grey", "Bright"), 0.0)
    for feature in document["features"]:
        name = feature["properties"]["classification"]["name"]
        found[name] += feature["properties"]["measurements"]["Area mm^2"]
    if made.slide["spacing_mm"]:
        for name, index in (("Grey", 1), ("Bright", 2)):
            assert found[name] == pytest.approx((expected == index).sum() * 0.01, rel=1e-4)
    assert sum(made.regions.values()) == len(document["features"])


def test_images_whose_bits_are_not_used_or_whose_pixels_are_no_squares_are_told(tmp_path):
    pixels = blobs((70, 41)).astype(float)
    pixels = np.rint(pixels * (4095 / pixels.max())).astype(np.uint16)
    Pictures.fromarray(pixels).save(tmp_path / "a.png")
    Pictures.fromarray(pixels * 16).save(tmp_path / "b.png")
    write_mammogram(tmp_path / "c.dcm", 4095 - pixels)
    header = pydicom.dcmread(tmp_path / "c.dcm")
    header.ImagerPixelSpacing = [0.2, 0.1]
    header.save_as(tmp_path / "c.dcm")
    told = {}
    for scale, name in (
        ("range", "a.png"),
        ("range", "b.png"),
        ("range", "c.dcm"),
        ("minmax", "a.png"),
    ):
        bundle = scan_bundle(
            tmp_path / scale,
            modality="image",
            resolution="fit = [64, 64]",
            patch_size=(64, 64),
            keys=f'scale = "{scale}"',
        )
        _, made = run(tmp_path / name, bundle, tmp_path / f"{scale} {name}")
        told[scale, name] = made.warnings
    # 12 bits as 16 are black to who takes 65535 for white
    dark = "its brightest value is 4095, its file's white 65535: it is seen dark"
    assert told["range", "a.png"] == [dark]
    assert told["range", "b.png"] == told["minmax", "a.png"] == []
    assert told["range", "c.dcm"][1:] == ["its pixels of 0.1 × 0.2 mm are seen as squares"]


# --- blocks, patches and spacing


def one_shot(voxels, spacing, bundle_path):
    """Predict the patches of a whole volume one by one and blend them on one canvas, in float64."""
    bundle = load_bundle(bundle_path)
    wanted, size = bundle.input.spacing_mm, bundle.input.patch_size
    step = [w / s for w, s in zip(wanted, spacing, strict=True)]
    shape = tuple(max(1, round(n / s)) for n, s in zip(voxels.shape, step, strict=True))
    scaled = voxels / 1024
    for axis, (n, s) in enumerate(zip(shape, step, strict=True)):  # as Pillow resizes, in 1-D
        width = max(s, 1.0)
        weights = 1 - np.abs(
            (np.arange(scaled.shape[axis])[None] - ((np.arange(n) + 0.5) * s - 0.5)[:, None])
            / width
        )
        weights = np.clip(weights, 0, None)
        weights /= weights.sum(axis=1, keepdims=True)
        scaled = np.moveaxis(np.tensordot(weights, scaled, (1, axis)), 0, axis)
    padded = [max(n, p) for n, p in zip(shape, size, strict=True)]
    image = np.zeros(padded)
    image[tuple(slice(n) for n in shape)] = scaled
    network = build(bundle).module
    windows = [gaussian(p, p / 8) for p in size]
    weight = np.einsum("i,j,k->ijk", *windows)
    total, weights = np.zeros((3, *padded)), np.zeros(padded)
    for origin in PatchGrid.cover(shape, size, bundle.input.overlap).origins:
        box = tuple(slice(a, a + p) for a, p in zip(origin, size, strict=True))
        with torch.inference_mode():
            inputs = torch.from_numpy(image[box].astype(np.float32))[None, None]
            total[(slice(None), *box)] += network(inputs).softmax(1)[0].numpy() * weight
        weights[box] += weight
    field = (total / weights)[(slice(None), *(slice(n) for n in shape))]
    axes = [(np.arange(n) + 0.5) / s - 0.5 for n, s in zip(voxels.shape, step, strict=True)]
    where = np.meshgrid(*axes, indexing="ij")
    sampled = [map_coordinates(f, where, order=1, mode="nearest") for f in field]
    return np.argmax(sampled, axis=0), field


@pytest.mark.parametrize("kind", ["volume", "image"])
def test_probabilities_lie_on_the_scan_that_is_coarser_mirrored_or_padded(tmp_path, kind):
    """The grid is no whole multiple of the scan: mirrored, it begins beside it."""
    if kind == "volume":
        spacing, finer, path = (1.0, 0.9, 0.7), (1.0, 0.4, 0.55), tmp_path / "v.nii"
        voxels, keys = blobs((9, 31, 43), seed=2), {"resolution": f"spacing_mm = {list(finer)}"}
        affine = np.diag([*spacing[::-1], 1.0])
        nibabel.save(nibabel.Nifti1Image(voxels.T, affine), path)
        full, more = 1024, FULL
    else:
        spacing, finer, path = (1.0, 1.0), (150 / 211,) * 2, tmp_path / "i.png"
        voxels = blobs((150, 101), seed=2) // 4
        voxels[:, :50] //= 2
        Pictures.fromarray(voxels.astype("u1")).save(path)
        full, more = 255, 'orient = "left"\npad = "square"\ninterpolation = "linear"'
        keys = {"resolution": "fit = [211, 211]", "patch_size": (64, 64)}
    bundle = scan_bundle(tmp_path / "model", modality=kind, keys=more, program=Soft, **keys)
    folder, made = run(path, bundle, tmp_path / "out")
    assert made.status == "done", made.reason
    assert made.settings["prepared"]["is_mirrored"] == (kind == "image")
    (multiscale,) = zarr.open_group(folder / "probability.ome.zarr").attrs["multiscales"]
    unit = "millimeter" if kind == "volume" else None
    assert [axis.get("unit") for axis in multiscale["axes"]] == [None, *[unit] * voxels.ndim]
    scale, shift = (
        np.array(t[t["type"]][1:]) for t in multiscale["datasets"][0]["coordinateTransformations"]
    )
    with open_run(folder) as opened:
        layer, mask = opened.probability, opened.mask[:]
    assert layer.mpp == (unit and pytest.approx([1000 * mm for mm in finer]))
    assert layer.classes == ["Grey", "Bright"]
    # What viewers are told is where the values are from.
    axes = [
        (np.arange(n) * own + first) / mm
        for n, own, first, mm in zip(layer.shape[1:], scale, shift, spacing, strict=True)
    ]
    assert all(0 <= a[-1] - n + 1 < 1 for a, n in zip(axes, voxels.shape, strict=True))
    where = np.meshgrid(*axes, indexing="ij")
    values = map_coordinates(voxels / full, where, order=1, mode="nearest")
    expected = Soft()(torch.from_numpy(values)[None, None]).softmax(1)[0, 1:].numpy()
    inside = np.all([(w >= 0) & (w <= n - 1) for w, n in zip(where, mask.shape, strict=True)], 0)
    assert np.abs(layer[:] - 255 * expected)[:, inside].max() < 0.51
    # And at the scan's pixels they say what the mask does, but for what the eight bits blur.
    start = (2, 3, 5)[-mask.ndim :]
    planes = layer.read(start, mask.shape)
    every = np.stack([1 - planes.sum(0), *planes])
    second, first = np.sort(every, axis=0)[1:]
    sure = first - second > 1 / 100
    assert 0.5 < sure.mean() < 1
    assert (every.argmax(0) == mask[tuple(slice(a, None) for a in start)])[sure].all()
    assert (np.bincount(mask.ravel()) > 500).all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.6, 0.8)])
def test_blocks_equal_one_canvas_and_know_no_block_size_or_worker(tmp_path, spacing):
    shape = (70, 90, 80) if spacing[0] == 1 else (25, 100, 90)
    voxels = blobs(shape, seed=5)
    path = tmp_path / "v.nii"
    nibabel.save(nibabel.Nifti1Image(voxels.T, np.diag([*spacing[::-1], 1.0])), path)
    bundle = scan_bundle(tmp_path / "model", keys=FULL, program=Around, overlap=(8, 8, 8))
    expected, field = one_shot(voxels, spacing, bundle)
    assert np.bincount(expected.ravel(), minlength=3).min() > 0.01 * expected.size
    masks, planes = [], []
    for block, workers in ((64, 1), (128, 1), (64, 2)):
        folder, made = run(
            path,
            bundle,
            tmp_path / f"{block} {workers}",
            workers=workers,
            outputs=("nifti", "probability"),
            block_size=block,
        )
        planes.append(open_run(folder).probability[...])
        masks.append(np.asarray(nibabel.load(folder / "mask.nii.gz").dataobj).T)
        if workers == 1:
            assert made.patches["predicted"] == made.patches["kept"]
    assert (masks[0] == expected).mean() >= 0.9999
    assert (masks[0] == masks[1]).all()
    assert (masks[0] == masks[2]).all()
    assert planes[0].shape == field[1:].shape
    assert np.abs(planes[0] - 255 * field[1:]).max() < 0.51
    assert np.ptp(planes[0]) > 200
    assert all((other == planes[0]).all() for other in planes)


def test_the_patch_counts_in_which_the_first_label_is_least_likely(tmp_path):
    voxels = blobs((40, 40, 70), seed=7)
    path = tmp_path / "v.nii"
    nibabel.save(nibabel.Nifti1Image(voxels.T, np.eye(4)), path)
    bundle = scan_bundle(
        tmp_path / "model",
        keys=FULL,
        program=Labelled,
        labels='labels = ["Dark", "Light"]',
        overlap=(0, 0, 0),
    )
    _, made = run(path, bundle, tmp_path / "out", outputs=NIFTI, block_size=64)
    origins = itertools.product((0, 8), (0, 8), (0, 32, 38))
    means = [(voxels[z : z + 32, y : y + 32, x : x + 32] / 1024).mean() for z, y, x in origins]
    expected = 1 / (1 + np.exp(-10 * (max(means) - 0.5)))
    assert made.labels["Light"] == pytest.approx(expected, abs=1e-4)
    assert made.labels["Dark"] == pytest.approx(1 - expected, abs=1e-4)


def test_what_an_interrupted_run_has_done_is_not_done_again(tmp_path, monkeypatch):
    path = tmp_path / "v.nii"
    nibabel.save(nibabel.Nifti1Image(blobs((100, 70, 70)).T, np.eye(4)), path)
    bundle = scan_bundle(tmp_path / "model", keys=FULL, program=Around)
    whole, _ = run(path, bundle, tmp_path / "whole", outputs=NIFTI, block_size=64)
    calls, call = itertools.count(), blocks.BlockWorker.__call__

    def fail_later(self, block):
        if next(calls) >= 3:
            raise OSError("the power is gone")
        return call(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(blocks.BlockWorker, "__call__", fail_later)
        with pytest.raises(OSError, match="power"):
            run(path, bundle, tmp_path / "out", outputs=NIFTI, block_size=64)
    folder = tmp_path / "out" / "v"
    before = {p.name: p.stat().st_mtime_ns for p in (folder / ".store/blocks").iterdir()}
    assert before
    folder, made = run(path, bundle, tmp_path / "out", outputs=NIFTI, block_size=64)
    after = {p.name: p.stat().st_mtime_ns for p in (folder / ".store/blocks").iterdir()}
    assert before.items() < after.items()
    assert (folder / "mask.nii.gz").read_bytes() == (whole / "mask.nii.gz").read_bytes()
    _, again = run(path, bundle, tmp_path / "out", outputs=NIFTI, block_size=64)
    assert again == made


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, slide_path):
    """Return a folder of images, volumes, a slide and texts, and bundles beside it."""
    place = tmp_path_factory.mktemp("mixed")
    inputs = place / "in"
    inputs.mkdir()
    grey = (blobs((90, 120)) // 4).astype(np.uint8)
    Pictures.fromarray(grey).save(inputs / "one.png")
    Pictures.fromarray(np.stack([grey] * 3, axis=-1)[::-1].copy()).save(inputs / "two.png")
    nibabel.save(nibabel.Nifti1Image(blobs((20, 30, 40)).T, np.eye(4)), inputs / "mr.nii.gz")
    (inputs / "slide.svs").write_bytes(slide_path.read_bytes())
    (inputs / "notes.txt").write_text("nothing to see", "utf-8")
    scan_bundle(
        place / "images",
        modality="image",
        resolution="fit = [90, 120]",
        patch_size=(64, 64),
        program=Labelled,
        labels='labels = ["Benign", "Malignant"]',
    )
    scan_bundle(place / "volumes", keys=FULL)
    return place


def test_in_a_mixed_folder_what_does_not_fit_is_refused_by_name(folder, tmp_path):
    result = command(
        "segment",
        folder / "in",
        "--model",
        folder / "images",
        "--output",
        tmp_path,
        "--device",
        "cpu",
    )
    assert result.exit_code == 1
    told = [line for line in result.stderr.splitlines() if "failed: " in line]
    assert {name for name in ("mr.nii.gz", "slide.svs") if any(name in t for t in told)} == {
        "mr.nii.gz",
        "slide.svs",
    }
    assert len(told) == 2
    assert "Traceback" not in result.output
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "one.png": "done",
        "two.png": "done",
        "mr.nii.gz": "failed",
        "slide.svs": "failed",
    }
    with Pictures.open(folder / "in" / "one.png") as picture:
        expected = classify(np.asarray(picture) / 255)
    with Pictures.open(tmp_path / "one" / "mask.png") as mask:
        assert (np.asarray(mask) == expected).all()
    row = rows["one.png"]
    assert int(row["Bright_px"]) == (expected == 2).sum()
    assert (
        int(row["Bright_lesions"]) == load_run(tmp_path / "one/run.json").lesions["Bright"]["count"]
    )
    assert float(row["probability_Malignant"]) + float(row["probability_Benign"]) == pytest.approx(
        1, abs=1e-5
    )
    assert row["tissue_mm2"] == row["mpp_x"] == ""
    report = (tmp_path / "report.html").read_text("utf-8")
    assert "Malignant" in report
    (document,) = (tmp_path / "one").glob("*.geojson")
    assert not check_geojson(document).findings
    features = json.loads(document.read_text("utf-8"))["features"]
    total = sum(f["properties"]["measurements"]["Area px^2"] for f in features)
    assert total == (expected > 0).sum()


def test_a_volume_bundle_takes_the_volume_and_says_what_it_will_take(folder, tmp_path):
    arguments = [
        "segment",
        folder / "in",
        "--model",
        folder / "volumes",
        "--output",
        tmp_path / "o",
    ]
    told = command(*arguments, "--dry-run")
    assert told.exit_code == 1
    (line,) = [t for t in told.stdout.splitlines() if "mr.nii.gz" in t]
    assert "40 × 30 × 20 px mask\t2 patches" in line
    assert not (tmp_path / "o").exists()
    result = command(*arguments, "--device", "cpu")
    assert result.exit_code == 1
    made = load_run(tmp_path / "o" / "mr" / "run.json")
    assert made.status == "done"
    assert made.slide["size"] == [40, 30, 20]
    status = command("status", tmp_path / "o")
    assert "1" in status.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--outputs", "zarr"], "zarr is no output for images, which have png, dicom, geojson"),
        (["--roi", __file__], "--roi is for slides"),
        (["--mpp", "0.5"], "--mpp is for slides"),
        (["--mask-mpp", "0.5"], "--mask-mpp is for slides"),
        (["--simplify", "3"], "--simplify is for slides"),
        (["--for", "qupath"], "--for is for slides"),
        (["--mpp-table", __file__], "--mpp-table is for slides"),
        (["--time-point", "1"], "--time-point is for volumes"),
    ],
)
def test_options_for_slides_are_refused(folder, tmp_path, options, told):
    result = command(
        "segment", folder / "in", "--model", folder / "images", "--output", tmp_path / "o", *options
    )
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "o").exists()


def test_one_of_several_time_points_is_segmented(tmp_path):
    voxels = np.stack([blobs((12, 40, 33), seed) for seed in range(3)])
    for time, own in enumerate(voxels):
        write_series(tmp_path / f"{time}", own, spacing=(2.5, 0.8, 0.8), seed=time)
    (tmp_path / "ct").mkdir()
    uid = generate_uid()
    for time in range(3):
        for path in (tmp_path / f"{time}").iterdir():
            slice_ = pydicom.dcmread(path)
            slice_.SeriesInstanceUID = slice_.FrameOfReferenceUID = uid
            slice_.AcquisitionNumber = time + 1
            slice_.save_as(tmp_path / "ct" / f"{time}_{path.name}")
    bundle = scan_bundle(tmp_path / "model", resolution="spacing_mm = [2.5, 0.8, 0.8]", keys=FULL)
    line = ("segment", tmp_path / "ct", "--model", bundle, "--output", tmp_path / "out")
    refused = command(*line)
    assert refused.exit_code == 1
    assert "3 time points in one series, told apart by AcquisitionNumber" in refused.stderr
    for time in (1, 2):
        done = command(*line, "--time-point", time)
        assert done.exit_code == 0, done.stderr
        assert f"time point {time} of 3 is read" in done.stderr
        mask = np.asarray(nibabel.load(tmp_path / "out" / "ct" / "mask.nii.gz").dataobj)
        assert (classify((voxels[time] * 2.0 - 100) / 1024) == mask.T).all()
    # its segmentation refers to the slices of that time
    written = pydicom.dcmread(tmp_path / "out" / "ct" / "mask.dcm")
    (referred,) = written.ReferencedSeriesSequence
    named = {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence}
    own = {pydicom.dcmread(p).SOPInstanceUID for p in (tmp_path / "ct").glob("2_*")}
    assert named == own


def test_a_bundle_sees_several_time_points_as_channels(tmp_path):
    before, after = blobs((20, 30, 40), 0), blobs((20, 30, 40), 1)
    image = nibabel.Nifti1Image(np.stack([after, 0 * after, before]).T, np.eye(4))
    nibabel.save(image, tmp_path / "dce.nii.gz")
    keys = f"{FULL}\ntime_points = [2, 0]"
    bundle = scan_bundle(tmp_path / "model", keys=keys, channels=2, program=Enhanced)
    folder, made = run(tmp_path / "dce.nii.gz", bundle, tmp_path / "out", block_size=64)
    assert made.status == "done", made.reason
    mask = nibabel.load(folder / "mask.nii.gz")
    more = np.float32(after / np.float32(1024)) - np.float32(before / np.float32(1024))
    assert (classify(more) == np.asarray(mask.dataobj).T).all()
    assert mask.shape == (40, 30, 20)


def test_slices_that_nothing_can_refer_to_get_no_dicom_segmentation(tmp_path):
    write_series(tmp_path / "ct", blobs((6, 20, 33)), spacing=(2.5, 0.8, 0.8), seed=3)
    for path in (tmp_path / "ct").iterdir():
        slice_ = pydicom.dcmread(path)
        slice_.SOPInstanceUID = "1.2.3"
        slice_.save_as(path)
    bundle = scan_bundle(tmp_path / "model", resolution="spacing_mm = [2.5, 0.8, 0.8]", keys=FULL)
    folder, made = run(tmp_path / "ct", bundle, tmp_path / "out")
    assert made.status == "done", made.reason
    assert "no DICOM segmentation can refer to them" in made.warnings[0]
    assert (folder / "mask.nii.gz").is_file()
    assert not (folder / "mask.dcm").exists()
    again = command(
        "segment", tmp_path / "ct", "--model", bundle, "--output", tmp_path / "out2",
        "--outputs", "nifti,dicom",
    )  # fmt: skip
    assert again.exit_code == 1
    assert "has no identifiers of its own" in again.stderr


def test_a_dicom_segmentation_of_what_is_no_dicom_is_refused(folder, tmp_path):
    arguments = ["--model", folder / "images", "--output", tmp_path, "--outputs", "png,dicom"]
    result = command("segment", folder / "in" / "one.png", *arguments)
    assert result.exit_code == 1
    assert "is no DICOM" in result.stderr
    assert load_run(tmp_path / "one" / "run.json").status == "failed"


def test_the_library_refuses_them_too(folder, tmp_path):
    (job,) = plan_jobs([folder / "in" / "one.png"], tmp_path)
    settings = Settings(select=SelectOptions(tissue="none"))
    with (
        open_cluster(ScheduleOptions()) as client,
        pytest.raises(BundleError, match="--tissue is for slides; test-images is for images"),
    ):
        segment_job(job, load_bundle(folder / "images"), client=client, settings=settings)


SCRIPT = """
import sys
from pathlib import Path
from peak import peak_bytes
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.run.jobs import plan_jobs
from wsi_pipeline.options import ExportOptions, PredictOptions, ScheduleOptions, Settings
from runs import segment_job
from wsi_pipeline.schedule.cluster import open_cluster
path, bundle, output = sys.argv[1:]
(job,) = plan_jobs([Path(path)], Path(output))
settings = Settings(predict=PredictOptions(device="cpu", precision="fp32"))
with open_cluster(ScheduleOptions()) as client:
    made = segment_job(job, load_bundle(bundle), client=client, settings=settings, threads=2)
assert made.status == "done", made.reason
print(peak_bytes())
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_volume_of_half_a_gigavoxel_stays_below_three_gigabytes(tmp_path):
    path, shape = tmp_path / "large.nii", (1024, 1024, 512)
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    plane = blobs(shape[:2]).T
    with path.open("wb") as file:
        file.write(header.binaryblock + bytes(4))
        for z in range(shape[2]):
            file.write(np.roll(plane, z, axis=0).tobytes(order="F"))
    bundle = scan_bundle(tmp_path / "model", keys=FULL, patch_size=(128, 128, 128))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, bundle, tmp_path / "out"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3e9
    mask = nibabel.load(tmp_path / "out" / "large" / "mask.nii.gz")
    assert mask.shape == shape
    expected = classify(plane / 1024)
    for z in (0, 255, 511):
        assert (np.asarray(mask.dataobj[..., z]) == np.roll(expected, z, axis=0)).all()
