"""Which files of a folder are images and volumes, and which of DICOM belong together."""

import gzip
import random

import nibabel
import nrrd
import numpy as np
import pytest
import tifffile
from dicoms import without_preamble, write, write_enhanced, write_series
from imagecodecs import jpeg_encode, png_encode
from pydicom import dcmread
from pydicom.uid import SegmentationStorage, generate_uid

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.formats import kind_of
from wsi_pipeline.sources.radiology.discover import find_images, find_volumes
from wsi_pipeline.sources.radiology.image import open_image
from wsi_pipeline.sources.radiology.volume import open_volume

VOXELS = np.zeros((3, 4, 5), np.int16)
GREY = np.zeros((4, 5), np.uint8)


@pytest.fixture
def mixed(tmp_path):
    """A folder of all kinds, and what a user has beside them."""
    folder = tmp_path / "mixed"
    write_series(folder / "ct", VOXELS)
    write_series(folder / "two", VOXELS)
    write_series(folder / "other", VOXELS)
    for path in (folder / "other").iterdir():
        path.rename(folder / "two" / f"b{path.name}")
    (folder / "other").rmdir()
    write(folder / "two" / "segmentation.dcm", GREY, SOPClassUID=SegmentationStorage)
    nibabel.Nifti1Image(VOXELS, np.eye(4)).to_filename(folder / "brain.nii.gz")
    (folder / "us.png").write_bytes(png_encode(GREY))
    (folder / "damaged.nii").write_bytes(b"damaged")
    (folder / "README.md").write_text("what this is")
    (folder / ".hidden.png").write_bytes(png_encode(GREY))
    (folder / "out").mkdir()
    (folder / "out" / "mask.png").write_bytes(png_encode(GREY))
    return folder


def test_a_folder_gives_one_path_for_each_volume(mixed):
    found = find_volumes([str(mixed)], mixed / "out")
    names = [path.relative_to(mixed).as_posix() for path in found]
    assert names == [
        "brain.nii.gz", "ct", "damaged.nii",
        "two/bslice000", "two/segmentation.dcm", "two/slice000", "us.png",
    ]  # fmt: skip
    opened, refused = [], []
    for path in found:
        try:
            open_volume(path).close()
            opened.append(path.name)
        except SourceError as error:
            refused.append(str(error))
    assert opened == ["brain.nii.gz", "ct", "bslice000", "slice000"]
    for path, says in zip(
        ["damaged.nii", "two/segmentation.dcm", "us.png"],
        ["no volume", "Segmentation", "a planar image"],
        strict=True,
    ):
        (sentence,) = (text for text in refused if text.startswith(f"{mixed / path}: "))
        assert says in sentence


def test_a_folder_gives_each_planar_image(mixed):
    found = find_images([str(mixed)], mixed / "out")
    names = [path.relative_to(mixed).as_posix() for path in found]
    series = [f"{b}slice00{i}" for b in ("b", "") for i in range(3)]
    assert names == [
        "brain.nii.gz", *(f"ct/slice00{i}" for i in range(3)), "damaged.nii",
        *sorted([*(f"two/{name}" for name in series), "two/segmentation.dcm"]), "us.png",
    ]  # fmt: skip
    with pytest.raises(SourceError, match=r"a volume \(NIfTI\)"):
        open_image(mixed / "brain.nii.gz")


def test_a_series_counts_once_however_it_is_named(mixed):
    for named in (["ct"], ["ct/slice001"], ["ct/*"], ["ct/slice002", "ct"]):
        assert find_volumes([str(mixed / name) for name in named], mixed / "out") == [mixed / "ct"]
    (mixed / "list.txt").write_text("ct/slice000\nbrain.nii.gz\n")
    found = find_volumes([str(mixed / "list.txt")], mixed / "out")
    assert found == [mixed / "ct", mixed / "brain.nii.gz"]


def read_all(path):
    with open_volume(path) as volume:
        return volume.read((0, 0, 0), volume.shape)[..., 0]


def test_slices_with_series_of_their_own_are_one_volume(tmp_path):
    voxels = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    uids = {z: {"SeriesInstanceUID": generate_uid()} for z in range(3)}
    folder = write_series(tmp_path / "ct", voxels, order=(2, 0, 1), change=uids)
    assert find_volumes([str(tmp_path)], tmp_path / "out") == [folder]
    assert (read_all(folder) == voxels).all()
    assert (read_all(folder / "slice001") == voxels).all()
    assert "SeriesInstanceUID of its own" in open_volume(folder).doubts[0]
    # pictures of another kind beside them are no slices of it
    write_series(tmp_path / "scout", VOXELS[:1], directions=(0, 1, 0, 0, 0, -1))
    (tmp_path / "scout" / "slice000").rename(folder / "scout")
    assert find_volumes([str(folder)], tmp_path / "out") == [folder / "scout", folder / "slice000"]
    assert (read_all(folder / "slice000") == voxels).all()


def test_slices_of_their_own_that_cannot_be_read_are_told_with_the_volume(tmp_path):
    voxels = np.arange(4 * 4 * 5, dtype=np.int16).reshape(4, 4, 5)
    uids = [generate_uid() for _ in voxels]
    change = {z: {"SeriesInstanceUID": uid} for z, uid in enumerate(uids)}
    folder = write_series(tmp_path / "ct", voxels, change=change)
    (folder / "scan.bin").write_bytes(b"no slice")
    volume = open_volume(folder)
    assert "SeriesInstanceUID of its own" in volume.doubts[0]
    assert "files of its folder that are no DICOM are left out: 1 (scan.bin)" in volume.doubts
    damaged = dcmread(folder / "slice002")
    damaged.SOPInstanceUID = generate_uid()
    del damaged.Rows
    damaged.save_as(folder / "again")  # of the series of a slice that is not the first
    with pytest.raises(SourceError, match=r"again beside its slices cannot be read"):
        open_volume(folder)


def test_a_series_in_many_folders_is_one_volume_whatever_lies_between(tmp_path):
    voxels = np.arange(6 * 4 * 5, dtype=np.int16).reshape(6, 4, 5)
    uid = generate_uid()
    whole = write_series(tmp_path / "in" / "f0", voxels, SeriesInstanceUID=uid)
    for z, path in enumerate(sorted(whole.iterdir())[1:], 1):
        (tmp_path / "in" / f"f{z}").mkdir()
        path.rename(tmp_path / "in" / f"f{z}" / path.name)
        (tmp_path / "in" / f"f{z}" / "odd.bin").write_bytes(b"no slice")
    volume = open_volume(tmp_path / "in")
    assert (read_all(tmp_path / "in") == voxels).all()
    assert volume.doubts[0] == "its slices lie in 6 folders"
    assert "no DICOM are left out: 1 (odd.bin)" in volume.doubts[1]


def split_in_two(folder, voxels, uid):
    """Write one series into the folders a and b of a folder."""
    whole = write_series(folder / "a", voxels, SeriesInstanceUID=uid)
    (folder / "b").mkdir()
    for path in sorted(whole.iterdir())[2:]:
        path.rename(folder / "b" / path.name)


def test_a_series_in_two_folders_is_one_volume(tmp_path):
    voxels = np.arange(5 * 4 * 5, dtype=np.int16).reshape(5, 4, 5)
    folder = tmp_path / "patient"
    split_in_two(folder, voxels, uid := generate_uid())
    for inputs in ([folder], [folder / "a", folder / "b"], [folder / "b" / "*", folder / "a"]):
        assert find_volumes([str(p) for p in inputs], tmp_path / "out") == [folder]
    assert (read_all(folder) == voxels).all()
    assert open_volume(folder).doubts == ("its slices lie in 2 folders",)
    # with another beside them it cannot be named: told, and the other is done
    write_series(folder / "c", voxels)
    assert find_volumes([str(folder)], tmp_path / "out") == [folder, folder / "c"]
    with pytest.raises(SourceError, match="one lies in several folders with others beside it"):
        open_volume(folder)
    # a copy of a series, and another patient with the same identifiers, are volumes of their own
    write_series(tmp_path / "more" / "a", voxels, SeriesInstanceUID=uid)
    write_series(tmp_path / "more" / "b", voxels + 1, SeriesInstanceUID=uid)
    found = find_volumes([str(tmp_path / "more")], tmp_path / "out")
    assert found == [tmp_path / "more" / "a", tmp_path / "more" / "b"]
    assert (read_all(found[1]) == voxels + 1).all()


def test_what_does_not_exist_is_said(tmp_path):
    with pytest.raises(SourceError, match="no such file, folder or pattern"):
        find_images([str(tmp_path / "none*")], tmp_path / "out")
    with pytest.raises(SourceError, match="copy it"):
        find_volumes(["https://example.org/a.nii"], tmp_path / "out")


def test_kinds_are_told_by_content(tmp_path):
    path = tmp_path / "a"
    for kind, data in {
        "PNG": png_encode(GREY),
        "JPEG": jpeg_encode(GREY),
        "NRRD": b"NRRD0004\n",
        "": b"anything",
    }.items():
        path.write_bytes(data)
        assert kind_of(path) == kind
    tifffile.imwrite(tmp_path / "b", GREY, bigtiff=True)
    assert kind_of(tmp_path / "b") == "TIFF"
    for version in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        version(VOXELS, np.eye(4)).to_filename(tmp_path / "c.nii")
        assert kind_of(tmp_path / "c.nii") == "NIfTI"
    path.write_bytes(gzip.compress((tmp_path / "c.nii").read_bytes()))
    assert kind_of(path) == "NIfTI"
    path.write_bytes(path.read_bytes()[:12])
    assert kind_of(path) == ""
    assert kind_of(write(tmp_path / "d", GREY)) == "DICOM"
    for keep_meta in (True, False):
        bare = without_preamble(write(tmp_path / "d", GREY), keep_meta=keep_meta)
        assert kind_of(bare) == "DICOM"


def damaged(original, path, draw):
    """Write a copy of a file of which a few bytes are changed, lost or cut off."""
    data = bytearray(original.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(min(len(data), draw.choice((400, 1200, len(data)))))
        kind = draw.random()
        if kind < 0.5:
            number = draw.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000))
            data[at : at + 4] = number.to_bytes(4, "little")
        elif kind < 0.8:
            data[at] = draw.randrange(256)
        elif kind < 0.9:
            del data[at : at + draw.randrange(1, 9)]
        else:
            del data[max(1, at) :]
    path.write_bytes(data)


def test_damaged_files_are_refused_or_read(tmp_path, caplog):
    folder = tmp_path / "whole"
    write_series(folder, VOXELS)
    write(folder / "us.dcm", np.zeros((8, 9, 3), np.uint8))
    write_enhanced(folder / "ct.dcm", VOXELS, order=range(3), spacing=(1, 1, 1))
    nibabel.Nifti1Image(VOXELS, np.eye(4)).to_filename(folder / "a.nii")
    nibabel.Nifti1Image(VOXELS.astype(np.float32), np.eye(4)).to_filename(folder / "b.nii.gz")
    nrrd.write(str(folder / "c.nrrd"), VOXELS, {"spacings": [1, 1, 1]})
    (folder / "d.png").write_bytes(png_encode(GREY))
    (folder / "e.jpg").write_bytes(jpeg_encode(GREY))
    tifffile.imwrite(folder / "f.tif", GREY)
    originals = sorted(folder.iterdir())
    refused = 0
    for seed in range(200):
        original = originals[seed % len(originals)]
        path = tmp_path / original.name
        damaged(original, path, random.Random(seed))
        for open_one in (open_image, open_volume):
            try:
                with open_one(path) as scan:
                    scan.read((0,) * len(scan.shape), scan.shape)
                    assert scan.value_range
            except SourceError as error:
                refused += 1
                assert str(error).startswith(str(tmp_path)), error  # noqa: PT017
                assert len(str(error).splitlines()) == 1  # noqa: PT017
        path.unlink()
    assert refused > 200  # each of them at least as the other kind
