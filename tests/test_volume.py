"""Volumes as they are meant and where they lie, held against nibabel, SimpleITK and highdicom."""

import bz2
import gzip
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import highdicom
import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicoms import make, without_preamble, write, write_enhanced, write_series
from pydicom.uid import RLELossless, generate_uid

from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources.radiology.discover import find_volumes
from wsi_pipeline.sources.radiology.volume import open_volume

RNG = np.random.default_rng(6)
VOXELS = RNG.integers(-1000, 2000, (7, 11, 13), dtype=np.int16)  # (z, y, x)
OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Between LPS and RAS."""


def read_all(path):
    with open_volume(path) as volume:
        values = volume.read((0, 0, 0), volume.shape)
        assert volume.channels == 1
    assert values.dtype == np.float32
    return values[..., 0]


def oblique_affine():
    """Return an affine that is turned about all axes, with three different spacings."""
    a, b = np.deg2rad([20, 35])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag([-0.6, 0.7, 2.5])
    affine[:3, 3] = [12, -34, 56]
    return affine


def write_nifti(path, voxels=VOXELS, affine=None, **header):
    image = nibabel.Nifti1Image(voxels.T, oblique_affine() if affine is None else affine)
    image.header.set_data_dtype(voxels.dtype)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_is_as_nibabel_has_it(tmp_path, suffix):
    path = write_nifti(tmp_path / f"a{suffix}")
    other = nibabel.load(path)
    assert (np.asarray(other.dataobj) == read_all(path).T).all()
    with open_volume(path) as volume:
        assert volume.shape == VOXELS.shape
        np.testing.assert_array_equal(volume.affine, other.affine)
        np.testing.assert_allclose(volume.spacing_mm, other.header.get_zooms()[::-1], rtol=1e-6)
        assert volume.value_range == (VOXELS.min(), VOXELS.max())
        assert volume.doubts == ()
        for _ in range(20):
            start = RNG.integers(0, VOXELS.shape)
            shape = [RNG.integers(1, n - a + 1) for a, n in zip(start, VOXELS.shape, strict=True)]
            box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
            assert (volume.read(tuple(start), tuple(shape))[..., 0] == VOXELS[box]).all()


def test_real_nifti_is_as_nibabel_has_it(data_dir):
    paths = sorted(data_dir.glob("volumes/*/*.nii*"))
    if not paths:
        pytest.skip("no NIfTI in the real data")
    for path in paths:
        other = nibabel.load(path)
        if other.ndim > 3:
            with pytest.raises(SourceError, match=f"{other.shape[3]} time points"):
                open_volume(path)
            for time in range(other.shape[3]):
                with open_volume(path, time_points=[time]) as volume:
                    found = volume.read((0, 0, 0), volume.shape)[..., 0]
                np.testing.assert_allclose(found.T, other.dataobj[..., time], rtol=1e-6)
            continue
        assert (np.asarray(other.dataobj) == read_all(path).T).all()
        np.testing.assert_array_equal(open_volume(path).affine, other.affine)


def test_nibabels_own_files_are_as_it_has_them_or_refused_in_words():
    """Go through the NIfTI that nibabel's wheel holds for its tests."""
    equal, refused = [], {}
    for path in sorted((Path(nibabel.__file__).parent / "tests" / "data").glob("*.nii*")):
        other = nibabel.load(path)
        times = other.shape[3] if other.ndim == 4 else 1
        try:
            with open_volume(path, time_points=range(times)) as volume:
                found = volume.read((0, 0, 0), volume.shape)
                affine = volume.affine
        except SourceError as error:
            refused[path.name] = str(error)
            continue
        expected = np.asarray(other.dataobj).reshape(*other.shape[:3], times)
        np.testing.assert_allclose(found.transpose(2, 1, 0, 3), expected, rtol=1e-6)
        np.testing.assert_array_equal(affine, other.affine)
        equal.append(path.name)
    assert {"anatomical.nii", "functional.nii", "example4d.nii.gz"} <= set(equal)
    assert "are no numbers" in refused.pop("resampled_anat_moved.nii")
    assert "6 axes" in refused.pop("row_major.dconn.nii")  # connectivity, no volume
    assert not refused
    assert len(equal) >= 6


@pytest.mark.parametrize("dtype", ["<u1", ">i2", "<u2", ">i4", "<f4", ">f8"])
def test_every_kind_of_number_is_read(tmp_path, dtype):
    header = nibabel.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(dtype)
    image = nibabel.Nifti1Image(np.abs(VOXELS.T % 100).astype(dtype), np.eye(4), header)
    image.to_filename(tmp_path / "a.nii")
    assert nibabel.load(tmp_path / "a.nii").dataobj.dtype == np.dtype(dtype)
    assert (read_all(tmp_path / "a.nii") == np.abs(VOXELS % 100)).all()


def test_stored_values_are_scaled(tmp_path):
    image = nibabel.Nifti1Image(VOXELS.T, np.eye(4))
    image.header.set_slope_inter(0.25, -7)
    image.to_filename(tmp_path / "a.nii")
    expected = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj).T
    assert (read_all(tmp_path / "a.nii") == expected.astype(np.float32)).all()
    assert expected.min() < 0


@pytest.mark.parametrize("name", ["scan", "scan.dat", "scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_nifti_is_told_by_its_content(tmp_path, name, is_packed):
    write_nifti(tmp_path / "a.nii")
    data = (tmp_path / "a.nii").read_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if is_packed else data)
    assert (read_all(path) == VOXELS).all()


def test_a_unit_that_nifti_has_not_counts_as_mm(tmp_path):
    path = write_nifti(tmp_path / "a.nii")
    overwrite(path, 123, b"\x07")
    assert open_volume(path).spacing_mm == open_volume(write_nifti(tmp_path / "b.nii")).spacing_mm
    assert "unit of length, 7, is none" in " ".join(open_volume(path).doubts)


def test_a_fourth_axis_of_one_is_none(tmp_path):
    nibabel.Nifti1Image(VOXELS.T[..., None], np.eye(4)).to_filename(tmp_path / "a.nii")
    assert (read_all(tmp_path / "a.nii") == VOXELS).all()


def test_the_unit_of_a_nifti_counts(tmp_path):
    image = nibabel.Nifti1Image(VOXELS.T, np.diag([600.0, 700.0, 2500.0, 1.0]))
    image.header.set_xyzt_units("micron")
    image.to_filename(tmp_path / "a.nii")
    assert open_volume(tmp_path / "a.nii").spacing_mm == pytest.approx((2.5, 0.7, 0.6))


def test_a_nifti_that_contradicts_itself_is_doubted(tmp_path):
    path = write_nifti(tmp_path / "a.nii", pixdim=[1, 9, 9, 9, 0, 0, 0, 0])
    assert "0.6 × 0.7 × 2.5 mm by its affine, 9 × 9 × 9 mm" in open_volume(path).doubts[0]
    image = nibabel.Nifti1Image(VOXELS.T, None)
    image.to_filename(tmp_path / "b.nii")
    assert "does not say how it lies" in open_volume(tmp_path / "b.nii").doubts[0]


def itk_affine(image):
    """Return the affine to RAS+ of an image of SimpleITK."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return FLIP @ affine


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("space", ["left-posterior-superior", "RAS", "left-anterior-superior"])
def test_nrrd_is_as_simpleitk_has_it(tmp_path, encoding, space):
    header = {
        "space": space if space != "RAS" else "right-anterior-superior",
        "space directions": oblique_affine()[:3, :3].T,
        "space origin": [1, 2, 3],
        "encoding": encoding,
    }
    nrrd.write(str(tmp_path / "a.nrrd"), VOXELS.T, header)
    other = SimpleITK.ReadImage(str(tmp_path / "a.nrrd"))
    assert (read_all(tmp_path / "a.nrrd") == SimpleITK.GetArrayFromImage(other)).all()
    volume = open_volume(tmp_path / "a.nrrd")
    np.testing.assert_allclose(volume.affine, itk_affine(other), atol=1e-9)
    assert volume.doubts == ()


def test_nrrd_of_every_kind(tmp_path):
    header = b"NRRD0004\ntype: uint16\ndimension: 3\nsizes: 13 11 7\nendian: big\nencoding: bzip2\n"
    voxels = np.abs(VOXELS).astype(">u2")
    path = tmp_path / "a.nrrd"
    path.write_bytes(header + b"spacings: 0.6 0.7 2.5\n\n" + bz2.compress(voxels.tobytes()))
    assert (read_all(path) == voxels).all()
    volume = open_volume(path)
    assert volume.spacing_mm == (2.5, 0.7, 0.6)
    assert "how it lies" in volume.doubts[0]


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_nrrd_of_large_integers_is_as_simpleitk_has_it(tmp_path, dtype):
    path = tmp_path / "a.nrrd"
    nrrd.write(str(path), np.abs(VOXELS.T).astype(dtype), {"spacings": [0.6, 0.7, 2.5]})
    other = SimpleITK.ReadImage(str(path))
    assert (read_all(path) == SimpleITK.GetArrayFromImage(other)).all()


@pytest.mark.parametrize("kinds", [["???"] * 3, ["none"] * 3, ["space", "domain", "???"]])
def test_nrrd_of_unknown_axes_is_as_simpleitk_has_it(tmp_path, kinds):
    path = tmp_path / "a.nrrd"
    header = {"space": "LPS", "space directions": np.diag([0.6, 0.7, 2.5]), "kinds": kinds}
    nrrd.write(str(path), VOXELS.T, header)
    other = SimpleITK.ReadImage(str(path))
    assert (read_all(path) == SimpleITK.GetArrayFromImage(other)).all()
    np.testing.assert_allclose(open_volume(path).affine, itk_affine(other), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 3])
def test_nrrd_with_an_axis_of_one_value_is_one_volume(tmp_path, axis):
    path = tmp_path / "a.nrrd"
    rows = [[0.6, 0, 0], [0, 0.7, 0], [0, 0, 2.5]]
    rows.insert(axis, [np.nan] * 3)
    kinds = ["domain"] * 3
    kinds.insert(axis, "list")
    header = {"space": "LPS", "space directions": rows, "kinds": kinds}
    nrrd.write(str(path), np.expand_dims(VOXELS.T, axis), header)
    assert (read_all(path) == VOXELS).all()
    assert open_volume(path).spacing_mm == pytest.approx((2.5, 0.7, 0.6))


@pytest.mark.parametrize(("unit", "mm"), [("mm", 1), ("um", 1e-3), ("cm", 10), ("m", 1e3)])
def test_the_unit_of_a_nrrd_counts(tmp_path, unit, mm):
    path = tmp_path / "a.nrrd"
    header = {
        "space": "LPS", "space directions": np.diag([0.6, 0.7, 2.5]), "space units": [unit] * 3,
        "space origin": [1, 2, 3],
    }  # fmt: skip
    nrrd.write(str(path), VOXELS.T, header)
    with open_volume(path) as volume:
        assert volume.spacing_mm == pytest.approx((2.5 * mm, 0.7 * mm, 0.6 * mm))
        np.testing.assert_allclose(volume.affine[:3, 3], [-mm, -2 * mm, 3 * mm])


def test_nrrd_of_an_unknown_unit_is_refused(tmp_path):
    header = {"space": "LPS", "space directions": np.eye(3), "space units": ["furlong"] * 3}
    nrrd.write(str(tmp_path / "a.nrrd"), VOXELS.T, header)
    with pytest.raises(SourceError, match="lengths in furlong; expected mm"):
        open_volume(tmp_path / "a.nrrd")


def test_real_nrrd_and_nifti_are_the_same_volume(data_dir):
    folder = data_dir / "volumes" / "panimg"
    if not folder.is_dir():
        pytest.skip("no NRRD in the real data")
    one, other = (open_volume(folder / f"image10x11x12.{s}") for s in ("nrrd", "nii.gz"))
    with one, other:
        np.testing.assert_allclose(one.affine, other.affine)
        voxels = [v.read((0, 0, 0), v.shape) for v in (one, other)]
    assert (voxels[0] == voxels[1]).all()


def itk_series(folder):
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.mark.parametrize("directions", [(1, 0, 0, 0, 1, 0), OBLIQUE, (0, 1, 0, 0, 0, -1)])
def test_a_shuffled_series_is_as_simpleitk_has_it(tmp_path, directions):
    order = list(RNG.permutation(7))
    folder = write_series(tmp_path / "a", VOXELS, directions=directions, order=order)
    other = itk_series(folder)
    assert (read_all(folder) == SimpleITK.GetArrayFromImage(other)).all()
    assert (read_all(folder) == VOXELS).all()
    with open_volume(folder) as volume:
        np.testing.assert_allclose(volume.affine, itk_affine(other), atol=1e-4)
        assert volume.spacing_mm == pytest.approx((2.5, 0.7, 0.6))
        assert [path.name for path, _ in volume.slices] == [
            f"slice{order.index(z):03d}" for z in range(7)
        ]
        corner = volume.affine @ [0, 0, 0, 1]
        np.testing.assert_allclose(corner, [10, -20, 30, 1])  # of the first slice, in RAS


def test_a_real_series_is_as_simpleitk_has_it(data_dir):
    folder = data_dir / "volumes" / "ct_dicom_tcga_lusc"
    if not folder.is_dir():
        pytest.skip("no CT series in the real data")
    other = itk_series(folder)
    assert (read_all(folder) == SimpleITK.GetArrayFromImage(other)).all()
    with open_volume(folder / "1-43.dcm") as volume:  # one file stands for all
        np.testing.assert_allclose(volume.affine, itk_affine(other), atol=1e-6)
        assert volume.shape == (6, 512, 512)
        assert volume.value_range == (-160, 239)  # its window of 400 at 40


def test_each_slice_has_its_own_slope(tmp_path):
    slopes = {z: {"RescaleSlope": f"{1 + z / 4}", "RescaleIntercept": -z} for z in range(7)}
    folder = write_series(tmp_path, VOXELS, change=slopes)
    z = np.arange(7).reshape(-1, 1, 1)
    assert (read_all(folder) == VOXELS * (1 + z / 4) - z).all()


def test_a_series_of_monochrome1_is_turned(tmp_path):
    folder = write_series(
        tmp_path, np.abs(VOXELS).astype(np.uint16) % 4096, BitsStored=12, HighBit=11,
        PhotometricInterpretation="MONOCHROME1",
    )  # fmt: skip
    assert (read_all(folder) == 4095 - np.abs(VOXELS)).all()


def test_an_enhanced_image_is_as_highdicom_has_it(tmp_path):
    path = write_enhanced(
        tmp_path / "a.dcm", VOXELS, order=(3, 0, 6, 2, 5, 1, 4), spacing=(2.5, 0.7, 0.6)
    )
    other = highdicom.imread(path).get_volume(dtype=np.float32)
    other = other.to_patient_orientation("HPL")  # (z, y, x), as it was written
    assert (read_all(path) == VOXELS * 2.0 - 100).all()
    assert (read_all(path) == other.array).all()
    with open_volume(path) as volume:
        swap = np.eye(4)[[2, 1, 0, 3]]  # highdicom's voxel indices are (z, y, x)
        np.testing.assert_allclose(volume.affine, FLIP @ other.affine @ swap, atol=1e-6)
        assert [frame for _, frame in volume.slices] == [1, 5, 3, 0, 6, 4, 2]
        assert {file for file, _ in volume.slices} == {path}


def test_series_of_one_folder_are_told_apart(tmp_path):
    write_series(tmp_path / "a", VOXELS)
    write_series(tmp_path / "b", VOXELS[:5] + 1)
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "a" / f"b_{path.name}")
    (tmp_path / "a" / "notes.txt").write_text("no DICOM")
    assert (read_all(tmp_path / "a" / "slice003") == VOXELS).all()
    assert (read_all(tmp_path / "a" / "b_slice003") == VOXELS[:5] + 1).all()
    with pytest.raises(SourceError, match="2 DICOM series; name one file of each, as b_slice000, "):
        open_volume(tmp_path / "a")


def test_copies_of_slices_are_left_out_and_it_is_said(tmp_path):
    folder = write_series(tmp_path, VOXELS)
    shutil.copyfile(folder / "slice002", folder / "copy of slice002")
    assert (read_all(folder) == VOXELS).all()
    assert open_volume(folder).doubts == ("copies of slices are left out: 1",)
    # a copy is told by place and pixels, not by its name or how it is stored
    copy = pydicom.dcmread(folder / "slice004")
    copy.SOPInstanceUID = generate_uid()
    copy.compress(RLELossless)
    copy.save_as(folder / "again")
    assert (read_all(folder) == VOXELS).all()
    assert open_volume(folder).doubts == ("copies of slices are left out: 2",)


@pytest.mark.parametrize("uid", ["1.2.3", ""])
def test_slices_with_one_instance_uid_are_all_read(tmp_path, uid):
    folder = write_series(tmp_path, VOXELS, order=[3, 0, 6, 2, 5, 1, 4])
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        slice_.SOPInstanceUID = uid
        slice_.save_as(path)
    assert (read_all(folder) == VOXELS).all()
    assert "no DICOM segmentation can refer to them" in open_volume(folder).doubts[0]


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_a_slice_without_numbers_in_its_header_is_missed(tmp_path, tag):
    folder = write_series(tmp_path, VOXELS)
    last = folder / "slice006"
    with pydicom.dcmread(last) as header:
        text = "\\".join(map(str, header[tag].value)).encode()
    data = last.read_bytes()
    assert text in data
    last.write_bytes(data.replace(text, b"r" + text[1:]))
    with pytest.raises(SourceError, match=r"slice006 beside its slices cannot be read"):
        open_volume(folder)
    with pytest.raises(SourceError, match="its header is damaged"):
        open_volume(last)
    assert find_volumes([str(folder)], tmp_path / "out") == [folder]


@pytest.mark.parametrize("ending", ["empty", "cut", "garbled", "no preamble", "no meta"])
def test_a_slice_that_cannot_be_read_is_missed(tmp_path, ending):
    folder = write_series(tmp_path, VOXELS)
    last = folder / "slice006"
    data = last.read_bytes()
    if ending.startswith("no"):
        without_preamble(last, keep_meta=ending == "no preamble")
        assert (read_all(folder) == VOXELS).all()
        return
    last.write_bytes({"empty": b"", "cut": data[:300], "garbled": bytes(5000)}[ending])
    for path in (folder, folder / "slice001"):
        with pytest.raises(SourceError, match=r"slice006 beside its slices cannot be read"):
            open_volume(path)
    assert find_volumes([str(folder)], tmp_path / "out") == [folder]


@pytest.mark.parametrize("keep_meta", [True, False])
def test_a_series_without_preambles_is_as_simpleitk_has_it(tmp_path, keep_meta):
    folder = write_series(tmp_path, VOXELS)
    expected = SimpleITK.GetArrayFromImage(itk_series(folder))
    for path in folder.iterdir():
        without_preamble(path, keep_meta=keep_meta)
    (single,) = (folder / "slice003",)
    itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(single), imageIO="GDCMImageIO"))
    assert (itk[0] == VOXELS[3]).all()
    assert (read_all(folder) == expected).all()


def test_files_that_are_no_slices_are_left_out_of_a_series(tmp_path):
    folder = write_series(tmp_path, VOXELS)
    for name in ("LICENSE", "Thumbs.db", "desktop.ini", "notes.txt", ".hidden"):
        (folder / name).write_text("no slice")
    assert (read_all(folder) == VOXELS).all()
    assert open_volume(folder).doubts == ()
    (folder / "phantom.bin").write_text("no slice")
    (said,) = open_volume(folder).doubts
    assert said == "files of its folder that are no DICOM are left out: 1 (phantom.bin)"


def with_times(folder, *, tag="TemporalPositionIdentifier", values=(1, 2, 3), shift=0.0, **more):
    """Write three volumes in one place as one series; return its folder."""
    uid = {"SeriesInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid()}
    for time, value in enumerate(values):
        part = write_series(
            folder / f"t{time}", VOXELS + time, origin=(-10, 20, 30 + shift * time),
            **uid, **({tag: value} if tag else {}), **more,
        )  # fmt: skip
        for path in sorted(part.iterdir()):
            if not tag:  # numbered on, as scanners do
                slice_ = pydicom.dcmread(path)
                slice_.InstanceNumber += 100 * time
                slice_.save_as(path)
            path.rename(folder / f"{path.name}_{time}")
        part.rmdir()
    return folder


@pytest.mark.parametrize(
    ("tag", "values", "shift"),
    [
        ("TemporalPositionIdentifier", (1, 2, 3), 0.0),
        ("TemporalPositionIdentifier", (1, 2, 3), 1.25),
        ("AcquisitionNumber", (1, 2, 10), 0.0),
        ("AcquisitionNumber", (1, 2, 10), 1.25),
        ("AcquisitionTime", ("090000.1", "090130.1", "100000"), 1.25),
        ("TriggerTime", (0, 90, 800), 0.0),
        ("EchoTime", (2.3, 4.6, 10.1), 0.0),
        (None, (1, 2, 3), 0.0),
    ],
)
def test_several_times_in_one_series_are_told_and_chosen(tmp_path, tag, values, shift):
    folder = with_times(tmp_path, tag=tag, values=values, shift=shift)
    by = tag or "InstanceNumber"
    with pytest.raises(SourceError, match=f"3 time points .* by {by}; .* --time-point, 0 to 2"):
        open_volume(folder)
    for time in range(3):
        with open_volume(folder, time_points=[time]) as volume:
            assert (volume.read((0, 0, 0), volume.shape)[..., 0] == VOXELS + time).all()
            assert volume.affine[2, 3] == pytest.approx(30 + shift * time)
            assert f"time point {time} of 3 is read" in volume.doubts[0]
    with pytest.raises(SourceError, match="has 3 time points; there is none of number 3"):
        open_volume(folder, time_points=[3])
    if shift:
        with pytest.raises(SourceError, match="time point 2 does not lie where the first does"):
            open_volume(folder, time_points=[0, 2])
        return
    with open_volume(folder, time_points=[2, 0]) as volume:
        both = np.stack([VOXELS + 2, VOXELS], axis=-1)
        assert volume.channels == 2
        assert (volume.read((1, 2, 3), (4, 3, 2)) == both[1:5, 2:5, 3:5]).all()


@pytest.mark.parametrize("tag", ["AcquisitionNumber", "AcquisitionTime", "ContentTime"])
@pytest.mark.parametrize("per", [1, 3])
def test_slices_taken_one_after_the_other_are_one_volume(tmp_path, tag, per):
    change = {z: {tag: f"09000{z // per}"} for z in range(7)}
    assert (read_all(write_series(tmp_path, VOXELS, change=change)) == VOXELS).all()


def test_a_single_slice_is_as_thick_as_it_says_either_way(tmp_path):
    folder = write_series(tmp_path / "a", VOXELS[:1], SpacingBetweenSlices=-2.5)
    assert open_volume(folder).spacing_mm == pytest.approx((2.5, 0.7, 0.6))
    about = {"SpacingBetweenSlices": "77.25", "SliceThickness": "2.5"}
    folder = write_series(tmp_path / "b", VOXELS[:1], **about)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes().replace(b"77.25", b"NaN  "))
    assert open_volume(folder).spacing_mm == pytest.approx((2.5, 0.7, 0.6))


@pytest.mark.parametrize("count", [1, len(VOXELS)])
def test_slices_that_lie_at_no_number_are_refused(tmp_path, count):
    folder = write_series(tmp_path, VOXELS[:count])
    path = min(folder.iterdir())
    data = path.read_bytes()
    assert data.count(b"-10.0\\20.0") == 1
    path.write_bytes(data.replace(b"-10.0\\20.0", b"-10.0\\NaN "))
    with pytest.raises(SourceError, match="does not say in numbers where in the body it lies"):
        open_volume(folder)


def test_positions_that_were_rounded_are_even(tmp_path):
    change = {
        z: {"ImagePositionPatient": [-10, 20, f"{30 + 0.625 * z:.1f}"]} for z in range(len(VOXELS))
    }
    folder = write_series(tmp_path, VOXELS, spacing=(0.625, 0.7, 0.6), change=change)
    assert (read_all(folder) == VOXELS).all()
    with open_volume(folder) as volume:
        assert volume.spacing_mm[0] == pytest.approx(0.625, rel=0.02)
        assert "0.6 to 0.7 mm apart, as positions that were rounded do" in volume.doubts[0]
    (folder / "slice003").unlink()
    with pytest.raises(SourceError, match=r"not equally spaced: between 31\.20 and 32\.50 mm"):
        open_volume(folder)


def test_every_second_slice_taken_first_is_one_volume(tmp_path):
    change = {z: {"AcquisitionNumber": z % 2 + 1} for z in range(7)}
    assert (read_all(write_series(tmp_path, VOXELS, change=change)) == VOXELS).all()


def test_times_of_an_enhanced_image_are_told_and_chosen(tmp_path):
    voxels = np.concatenate([VOXELS, VOXELS + 7])
    path = write_enhanced(
        tmp_path / "a.dcm",
        voxels,
        order=RNG.permutation(14).tolist(),
        spacing=(2.5, 0.7, 0.6),
        times=2,
    )
    with pytest.raises(SourceError, match=r"2 time points .* by TemporalPositionIndex"):
        open_volume(path)
    with open_volume(path, time_points=[1]) as volume:
        found = volume.read((0, 0, 0), volume.shape)[..., 0]
    assert (found == (VOXELS + 7) * 2.0 - 100).all()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd"])
def test_times_of_a_file_with_a_fourth_axis_are_chosen(tmp_path, name):
    four = np.stack([VOXELS, VOXELS + 5, VOXELS - 3]).T  # (x, y, z, t)
    path = tmp_path / name
    if name == "a.nrrd":
        directions = [[0.6, 0, 0], [0, 0.7, 0], [0, 0, 2.5], [np.nan] * 3]
        header = {
            "kinds": ["domain"] * 3 + ["list"], "space": "LPS", "space directions": directions,
            "encoding": "gzip",
        }  # fmt: skip
        nrrd.write(str(path), np.asfortranarray(four), header)
    else:
        nibabel.save(nibabel.Nifti1Image(four, np.diag([0.6, 0.7, 2.5, 1])), path)
    with pytest.raises(SourceError, match=r"3 time points .* by the fourth axis; .* 0 to 2"):
        open_volume(path)
    with open_volume(path, time_points=[2, 1]) as volume:
        assert volume.spacing_mm == pytest.approx((2.5, 0.7, 0.6))
        found = volume.read((0, 0, 0), volume.shape)
    assert (found == np.stack([VOXELS - 3, VOXELS + 5], axis=-1)).all()


def test_the_fingerprint_follows_the_content(tmp_path):
    for name, voxels in {"a": VOXELS, "b": VOXELS, "c": VOXELS + 1}.items():
        write_nifti(tmp_path / f"{name}.nii", voxels)
    a, b, c = (open_volume(tmp_path / f"{name}.nii").fingerprint for name in "abc")
    assert a == b != c


def test_threads_may_read_at_once(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz")
    wrong = []
    with open_volume(path) as volume:

        def read(z):
            found = [volume.read((z, 0, 0), (1, 11, 13))[0, ..., 0] for _ in range(20)]
            wrong.extend(z for slab in found if (slab != VOXELS[z]).any())

        threads = [threading.Thread(target=read, args=(z,)) for z in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def sheared():
    affine = np.diag([1.0, 1, 2, 1])
    affine[0, 2] = 0.3
    return affine


def overwrite(path, offset, data):
    """Change some bytes of a NIfTI's header."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def refused(tmp_path, name):
    """Write one volume that is refused; return its path."""
    path = tmp_path / name
    series = tmp_path / "series"
    at = {z: {"ImagePositionPatient": [-10, 20, 30 + 2.5 * z]} for z in range(7)}
    if name == "missing":
        folder = write_series(series, VOXELS)
        (folder / "slice002").unlink()
        (folder / "slice003").unlink()
        return folder
    if name == "uneven":
        at[4]["ImagePositionPatient"][2] += 0.7
        return write_series(series, VOXELS, change=at)
    if name == "twice":
        at[4]["ImagePositionPatient"] = at[3]["ImagePositionPatient"]
        return write_series(series, VOXELS, change=at)
    if name == "tilted":
        for z in range(7):
            at[z]["ImagePositionPatient"][1] += 0.4 * z
        return write_series(series, VOXELS, change=at)
    if name == "turned":
        return write_series(series, VOXELS, change={3: {"ImageOrientationPatient": [*OBLIQUE]}})
    if name == "bodies":
        return write_series(series, VOXELS, change={3: {"FrameOfReferenceUID": generate_uid()}})
    if name == "sizes":
        folder = write_series(series, VOXELS)
        uid = make(VOXELS[0]).SeriesInstanceUID
        write_series(series, VOXELS, SeriesInstanceUID=uid)
        write_series(tmp_path / "b", VOXELS[:1, :5], SeriesInstanceUID=uid, origin=(0, 0, 0))
        shutil.move(tmp_path / "b" / "slice000", folder / "other")
        return folder
    if name == "cut slice":
        folder = write_series(series, VOXELS)
        (folder / "slice004").write_bytes((folder / "slice004").read_bytes()[:-50])
        return folder
    if name == "colour":
        return write_series(series, RNG.integers(0, 255, (7, 5, 6, 3), dtype=np.uint8))
    if name == "folder":
        series.mkdir()
        return series
    if name == "film.dcm":
        return write(path, VOXELS, NumberOfFrames=7)
    if name == "planar.dcm":
        return write(path, VOXELS[0])
    if name == "cut.nii":
        write_nifti(path)
        path.write_bytes(path.read_bytes()[:-10])
    elif name == "cut.nii.gz":
        write_nifti(path)
        path.write_bytes(path.read_bytes()[:-100])
    elif name == "short.nii.gz":
        write_nifti(path)
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-50]))
    elif name == "bomb.nii.gz":
        write_nifti(tmp_path / "a.nii")
        overwrite(tmp_path / "a.nii", 42, struct.pack("<3h", 30000, 30000, 30000))
        path.write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    elif name == "sheared.nii":
        write_nifti(path, affine=sheared())
    elif name == "flat.nii":
        write_nifti(path, affine=np.eye(4))
        overwrite(path, 280 + 2 * 16, bytes(16))  # the last row of the affine
    elif name == "nan.nii":
        values = VOXELS.astype(np.float32)
        values[3, 4, 5] = np.nan
        write_nifti(path, values)
    elif name == "zero.nii":
        write_nifti(path)
        overwrite(path, 42, struct.pack("<3h", 13, 0, 7))
    elif name == "rgb.nii":
        rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
        nibabel.Nifti1Image(rgb, np.eye(4)).to_filename(path)
    elif name == "plane.nii":
        nibabel.Nifti1Image(VOXELS[0], np.eye(4)).to_filename(path)
    elif name == "detached.nrrd":
        text = "NRRD0004\ntype: short\ndimension: 3\nsizes: 1 1 1\nencoding: raw\nendian: little\n"
        path.write_text(f"{text}data file: /etc/hostname\n\n")
    elif name == "vectors.nrrd":
        nrrd.write(str(path), VOXELS.T, {"kinds": ["vector", "domain", "domain"]})
    elif name == "hex.nrrd":
        nrrd.write(str(path), VOXELS[:1].T, {"encoding": "ascii", "spacings": [1, 1, 1]})
    elif name == "picture.nii":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(400))
    elif name == "damaged.nrrd":
        header = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nspacings: 1 1 1\n"
        packed = bz2.compress(bytes(range(8)))
        path.write_bytes(f"{header}encoding: bzip2\n\n".encode() + packed[:-12] + bytes(12))
    elif name == "text.nii":
        path.write_text("no volume")
    return path


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "missing": r"slices are missing: between 32.50 and 40.00 mm lie 7.50 mm, .* \(2 missing\)",
        "uneven": "not equally spaced: between 37.50 and 40.70 mm lie 3.20 mm, between others 2.50",
        "twice": "of which 1 lie where another does",
        "tilted": "shifted sideways by up to 2.40 mm",
        "turned": r"slices of 2 orientations in one series \(6 and 1 slices\)",
        "bodies": "slices of 2 frames of reference",
        "sizes": "slices of 2 sizes",
        "cut slice": "slice004: its pixels .* damaged or cut off",
        "colour": "slices in colour",
        "folder": "a folder of 0 DICOM series",
        "film.dcm": "7 frames and does not say where each lies",
        "planar.dcm": "a planar image, not a volume",
        "cut.nii": "is cut off: 2,344 bytes, of 2,354",
        "cut.nii.gz": "cannot be unpacked",
        "short.nii.gz": "is cut off: 50 of 2,002 bytes are missing",
        "bomb.nii.gz": "cannot hold",
        "sheared.nii": "right angles",
        "flat.nii": "1 × 1 × 0 mm",
        "nan.nii": "NaN",
        "zero.nii": "nothing to see",
        "rgb.nii": "expected whole or real numbers",
        "plane.nii": "2 axes",
        "detached.nrrd": "lie in another file",
        "vectors.nrrd": "axes of vector, domain, domain",
        "hex.nrrd": "stored as ascii",
        "picture.nii": "a planar image",
        "text.nii": "no volume that is known here",
        "damaged.nrrd": "cannot be read .*: Invalid data stream",
        "absent.nii": "No such file",
    }.items(),
)
def test_what_is_no_volume_is_refused_in_one_sentence(tmp_path, name, says):
    path = refused(tmp_path, name)
    with pytest.raises(SourceError, match=says) as caught:
        read_all(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_the_uneven_series_of_pydicom_is_refused(data_dir):
    folder = data_dir / "volumes" / "ct_dicom_highdicom" / "pydicom_CT2"
    if not folder.is_dir():
        pytest.skip("no uneven series in the real data")
    with pytest.raises(SourceError, match=r"between -99\.48 and 103\.02 mm lie 202\.50 mm"):
        open_volume(folder)


READ_IN_SLABS = """
import sys
from pathlib import Path
from peak import peak_bytes
from wsi_pipeline.sources.radiology.discover import find_volumes
from wsi_pipeline.sources.radiology.volume import open_volume
before = peak_bytes()
with open_volume(Path(sys.argv[1])) as volume:
    depth, height, width = volume.shape
    for z in range(0, depth, 16):
        volume.read((z, 0, 0), (16, height, width))
    for x in range(0, width, 256):  # across the order of storage
        volume.read((0, 0, x), (depth, 16, 256))
print(peak_bytes() - before)
"""


@pytest.mark.parametrize(
    "suffix",
    [
        ".nii",
        pytest.param(".nii.gz", marks=pytest.mark.slow),
        pytest.param("", marks=pytest.mark.slow),
    ],
)
def test_a_gigabyte_is_read_in_slabs(tmp_path, suffix):
    shape = (512, 1024, 1024)
    path = tmp_path / f"a{suffix}"
    if not suffix:
        write_series(path, np.broadcast_to(np.int16(7), shape))
    else:
        header = nibabel.Nifti1Header()
        header.set_data_shape(shape[::-1])
        header.set_data_dtype(np.int16)
        header["vox_offset"] = 352
        with (gzip.open if suffix == ".nii.gz" else open)(path, "wb") as file:
            file.write(header.binaryblock + bytes(4))
            if suffix == ".nii":
                file.truncate(352 + 2 * 2**29)
            else:
                for _ in range(512):
                    file.write(bytes(2 << 20))
    result = subprocess.run(
        [sys.executable, "-c", READ_IN_SLABS, str(path)],
        env={"PYTHONPATH": str(Path(__file__).parent), "PATH": "", "TMPDIR": str(tmp_path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) < 350e6  # slabs of 64 MiB in float32, 32 MiB mapped
    assert not [p for p in tmp_path.iterdir() if p != path]  # no temporary file is left
    shutil.rmtree(tmp_path)  # which pytest would keep for a while


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_packed_voxels_that_do_not_fit_their_checksum_are_refused(
    tmp_path: Path, name: str
) -> None:
    voxels = np.random.default_rng(0).integers(0, 1000, (9, 8, 7)).astype(np.int16)
    path = tmp_path / name
    if name == "a.nrrd":
        header = {"encoding": "gzip", "space": "RAS", "space directions": np.eye(3)}
        nrrd.write(str(path), voxels, header)
    else:
        # stored as it is: what a bit turned over gives can be unpacked
        data = nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes()
        path.write_bytes(gzip.compress(data, compresslevel=0))
    whole = bytearray(path.read_bytes())
    for at in (-8, -40 if name == "a.nii.gz" else -5):  # the checksum, and a voxel
        damaged = whole.copy()
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match="cannot be unpacked"), open_volume(path) as volume:
            volume.read((0, 0, 0), volume.shape)
