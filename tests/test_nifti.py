"""Masks as NIfTI, read back by nibabel."""

import gzip

import nibabel
import numpy as np
import pytest
from dicoms import write_series

from wsi_pipeline.export import nifti
from wsi_pipeline.export.nifti import write_nifti
from wsi_pipeline.sources.radiology.volume import open_volume

RNG = np.random.default_rng(9)
MASK = RNG.integers(0, 3, (7, 11, 13), dtype=np.uint8)
VOXELS = RNG.integers(0, 999, MASK.shape, dtype=np.int16)


def oblique():
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(RNG.normal(size=(3, 3)))[0] @ np.diag([0.6, 0.7, 2.5])
    affine[:3, 3] = [12, -34, 56]
    return affine


def source_nifti(path, *, version=nibabel.Nifti1Image, affine=None, codes=(1, 1), unit="mm"):
    image = version(VOXELS.T, oblique() if affine is None else affine)
    image.set_sform(image.affine, codes[0])
    image.set_qform(image.affine, codes[1])
    image.header.set_xyzt_units(unit)
    image.header["descrip"] = b"SECRET"
    image.header.set_slope_inter(2, 5)
    image.to_filename(path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    "about",
    [
        {},
        {"codes": (2, 0)},
        {"codes": (0, 1)},
        {"codes": (0, 0)},
        {"unit": "micron"},
        {"version": nibabel.Nifti2Image},
        {"affine": np.diag([-1.0, 2, 3, 1])},
    ],
)
def test_the_geometry_is_that_of_the_source(tmp_path, suffix, about):
    source = nibabel.load(source_nifti(tmp_path / "a.nii", **about))
    with open_volume(tmp_path / "a.nii") as volume:
        write_nifti(tmp_path / f"mask{suffix}", MASK, volume)
    found = nibabel.load(tmp_path / f"mask{suffix}")
    assert type(found) is type(source)
    assert found.get_data_dtype() == np.uint8
    assert (np.asarray(found.dataobj).T == MASK).all()
    assert np.asarray(found.dataobj).dtype == np.uint8
    np.testing.assert_array_equal(found.affine, source.affine)
    for which in ("sform", "qform"):
        ours, theirs = (getattr(i.header, f"get_{which}")(coded=True) for i in (found, source))
        assert ours[1] == theirs[1]
        if ours[0] is not None:
            np.testing.assert_array_equal(ours[0], theirs[0])
    assert found.header.get_xyzt_units() == source.header.get_xyzt_units()
    assert found.header.get_zooms() == source.header.get_zooms()
    assert b"SECRET" not in gzip_or_not(tmp_path / f"mask{suffix}")


def gzip_or_not(path):
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def test_slabs_make_no_difference(tmp_path, monkeypatch):
    source_nifti(tmp_path / "a.nii")
    with open_volume(tmp_path / "a.nii") as volume:
        write_nifti(tmp_path / "one.nii.gz", MASK, volume)
        monkeypatch.setattr(nifti, "SLAB", 2 * 11 * 13)
        write_nifti(tmp_path / "many.nii.gz", MASK, volume)
    one, many = (gzip_or_not(tmp_path / f"{name}.nii.gz") for name in ("one", "many"))
    assert one == many


def test_a_dicom_series_has_its_affine(tmp_path):
    directions = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)
    folder = write_series(tmp_path / "a", VOXELS, directions=directions)
    with open_volume(folder) as volume:
        write_nifti(tmp_path / "mask.nii.gz", MASK, volume)
        found = nibabel.load(tmp_path / "mask.nii.gz")
        np.testing.assert_allclose(found.affine, volume.affine, atol=1e-4)
        np.testing.assert_allclose(found.header.get_qform(), volume.affine, atol=1e-4)
    assert found.header.get_xyzt_units()[0] == "mm"
    assert (np.asarray(found.dataobj).T == MASK).all()


def test_the_real_ones_keep_their_geometry(tmp_path, data_dir):
    path = data_dir / "volumes" / "nibabel" / "anatomical.nii"
    if not path.is_file():
        pytest.skip("no NIfTI in the real data")
    source = nibabel.load(path)
    with open_volume(path) as volume:
        mask = (volume.read((0, 0, 0), volume.shape)[..., 0] > 9000).astype(np.uint8)
        write_nifti(tmp_path / "mask.nii.gz", mask, volume)
    found = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(found.affine, source.affine)
    assert (np.asarray(found.dataobj) == (np.asarray(source.dataobj) > 9000)).all()
