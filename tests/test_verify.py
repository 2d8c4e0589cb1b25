"""`verify`: a mask held against its hashes, and blocks of it against themselves computed again."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from bundles import lightmuseg_bundle
from click.testing import CliRunner
from conftest import SLIDE_MPP, SLIDE_SIZE
from PIL import Image
from scans import Around, blobs, scan_bundle

from wsi_pipeline import segment, verify
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError, SourceError, StoreError, WsiPipelineError

SIDE = 1024
ROI = (
    '{"type":"Feature","geometry":{"type":"Polygon","coordinates":'
    "[[[100,100],[1500,140],[1800,1400],[60,1300],[100,100]]]}}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory, slide_path):
    """Return slide, ROI, model and finished run of four blocks."""
    home = tmp_path_factory.mktemp("made")
    model = lightmuseg_bundle(home / "model", mpp=0.25, patch_size=256, overlap=32)
    slide = Path(shutil.copy(slide_path, home / "slide.tif"))
    (home / "roi.geojson").write_text(ROI)
    (run,) = segment(
        slide,
        model=model,
        output=home / "out",
        roi=home / "roi.geojson",
        precision="fp32",
        block_size=SIDE,
        outputs=("zarr", "probability"),
    )
    assert run.status == "done"
    return home


@pytest.fixture
def home(tmp_path, made):
    """Return a copy of all that, which paths in `run.json` do not lead to."""
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    record = copy / "out" / "slide" / "run.json"
    record.write_text(record.read_text().replace(str(made), str(copy)))
    return copy


def names(found):
    return {other.block for other in found}


def flip(path, at=0.5, bit=0):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << bit
    # not in place: labels are links to the same file
    path.unlink()
    path.write_bytes(data)


def test_the_same_machine_says_identical(home):
    found = verify(home / "out" / "slide", share=1, seed=5)
    assert found.again == ("00000_00000", "00000_00001", "00001_00000", "00001_00001")
    assert (found.different, found.rounded, found.epsilon) == ((), (), 0)
    one = verify(home / "out" / "slide", share=0.01, seed=5)
    assert len(one.again) == 1
    assert one.again == verify(home / "out" / "slide", share=0.01, seed=5).again
    drawn = {verify(home / "out" / "slide", share=0.01, seed=seed).again for seed in range(4)}
    assert len(drawn) > 1


def test_the_hash_is_of_decoded_pixels_of_each_block(home):
    folder = home / "out" / "slide"
    mask = zarr.open_group(folder / "mask.ome.zarr", mode="r")["0"][:]
    lines = ""
    for y in range(2):
        for x in range(2):
            block = mask[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE]
            digest = hashlib.sha256(block.tobytes()).hexdigest()
            lines += f"{y:05d}_{x:05d} {digest}\n" if block.any() else ""
    told = json.loads((folder / "run.json").read_text())["certificate"]
    assert told["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert told["block_shape"] == [SIDE, SIDE]
    assert told["computed"][0].startswith("fp32 on cpu (")


@pytest.mark.parametrize(("at", "bit"), [(0.1, 7), (0.5, 0), (1, 3)])
def test_one_flipped_bit_in_any_chunk_is_found(home, tmp_path, at, bit):
    folder = home / "out" / "slide"
    chunks = [p for p in (folder / "mask.ome.zarr").rglob("[0-9]") if p.is_file()]
    # level 0 has four chunks, level 1 one of them all; the labels are the same
    assert len(chunks) == 10
    for number, chunk in enumerate(chunks):
        copy = Path(shutil.copytree(folder, tmp_path / str(number) / "slide"))
        relative = chunk.relative_to(folder)
        flip(copy / relative, at, bit)
        *_, level, row, column = relative.parts
        found = names(verify(copy, share=0).different)
        if level == "0":
            assert found == {f"{int(row):05d}_{int(column):05d}"}
        else:
            assert found
            assert "" not in found


def test_a_changed_file_is_found_whatever_decoders_make_of_it(home, tmp_path):
    folder = Path(shutil.copytree(home / "out" / "slide", tmp_path / "slide"))
    assert verify(folder, share=0).different == ()
    for place in ("0", "1", "labels/classes/0", "labels/classes/1"):
        chunk = folder / "mask.ome.zarr" / place / "0" / "0"
        whole = chunk.read_bytes()
        # Not in place: labels are links to the same file.
        chunk.unlink()
        chunk.write_bytes(whole + b"?")
        assert "00000_00000" in names(verify(folder, share=0).different), place
        chunk.write_bytes(whole)


def test_a_chunk_where_all_was_background_is_found(home):
    folder = home / "out" / "slide"
    shutil.rmtree(folder / "mask.ome.zarr" / "labels")
    mask = zarr.open_group(folder / "mask.ome.zarr", mode="r+")["0"]
    told = mask[1300:1310, 1900:1910]
    assert not told.any()
    # of no reduced level
    mask[1301, 1901] = 1
    assert names(verify(folder, share=0).different) == {"00001_00001"}
    # without the ledger it is found all the same, and cannot be named
    shutil.rmtree(folder / ".store")
    assert names(verify(folder, share=0).different) == {""}


def test_what_was_certified_wrongly_comes_out_otherwise(home):
    folder = home / "out" / "slide"
    shutil.rmtree(folder / ".store")
    shutil.rmtree(folder / "mask.ome.zarr" / "labels")
    mask = zarr.open_group(folder / "mask.ome.zarr", mode="r+")
    # three pixels of no reduced level
    row, columns = 701, np.flatnonzero(mask["0"][701, :SIDE])[:3]
    for column in columns:
        mask["0"][row, column] = 0
    pixels, lines = mask["0"][:], ""
    for y, x in np.ndindex(2, 2):
        block = pixels[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE]
        lines += f"{y:05d}_{x:05d} {hashlib.sha256(block.tobytes()).hexdigest()}\n"
    record = json.loads((folder / "run.json").read_text())
    record["certificate"]["sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    (folder / "run.json").write_text(json.dumps(record))
    found = verify(folder, share=1)
    assert [(other.block, other.pixels) for other in found.different] == [("00000_00000", 3)]
    assert 0 < found.different[0].margin <= 1


def test_another_number_format_differs_by_rounding(home, tmp_path):
    folder = home / "out" / "slide"
    found = verify(folder, share=1, precision="bf16")
    segment(
        home / "slide.tif",
        model=home / "model",
        output=tmp_path / "bf16",
        roi=home / "roi.geojson",
        precision="bf16",
        block_size=SIDE,
        outputs=("zarr",),
    )
    one, other = (
        zarr.open_group(path / "mask.ome.zarr", mode="r")["0"][:]
        for path in (folder, tmp_path / "bf16" / "slide")
    )
    assert found.different == ()
    assert sum(block.pixels for block in found.rounded) == np.count_nonzero(one != other) > 0
    assert (
        0 < max(block.margin for block in found.rounded) < found.epsilon == 128 * (2**-24 + 2**-8)
    )
    ran = CliRunner().invoke(group, ["verify", str(folder), "--share", "1", "--precision", "bf16"])
    assert ran.exit_code == 0
    assert "within rounding" in ran.stderr


def test_what_is_gone_or_replaced_cannot_be_verified(home, make_slide):
    folder = home / "out" / "slide"

    def refused(kind, words, **options):
        with pytest.raises(kind, match=words):
            verify(folder, share=1, **options)

    (home / "slide.tif").rename(home / "moved.tif")
    refused(WsiPipelineError, "slide.tif")
    assert verify(folder, slide=home / "moved.tif").different == ()
    pixels = np.random.default_rng(0).integers(0, 255, (*SLIDE_SIZE[::-1], 3), np.uint8)
    other = make_slide(home / "other.tif", pixels, SLIDE_MPP)
    refused(SourceError, "its content differs", slide=other)
    (home / "moved.tif").rename(home / "slide.tif")
    (home / "roi.geojson").write_text(ROI.replace("1500", "1501"))
    refused(StoreError, "ROI file is another")
    (home / "roi.geojson").write_text(ROI)
    (home / "model").rename(home / "old")
    refused(BundleError, "model")
    assert verify(folder, model=home / "old").different == ()
    lightmuseg_bundle(home / "model", mpp=0.25, patch_size=256, overlap=32, seed=1)
    refused(BundleError, "not the model of this run")
    record = json.loads((folder / "run.json").read_text())
    del record["certificate"]
    (folder / "run.json").write_text(json.dumps(record))
    refused(StoreError, "no hashes")
    ran = CliRunner().invoke(group, ["-q", "verify", str(folder)])
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert "no hashes" in ran.stderr


def test_the_command_names_each_block_of_all_runs(home):
    ran = CliRunner().invoke(group, ["verify", str(home / "out"), "--seed", "3"])
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert "identical; 1 of 4 blocks computed again, --seed 3" in ran.stderr
    shutil.copytree(home / "out" / "slide", home / "out" / "other")
    flip(home / "out" / "other" / "mask.ome.zarr" / "0" / "1" / "0")
    ran = CliRunner().invoke(group, ["-q", "verify", str(home / "out")])
    assert ran.exit_code == 1
    assert ran.stdout.split("\t")[:2] == ["other", "00001_00000"]


@pytest.mark.parametrize("modality", ["image", "volume"])
def test_images_and_volumes_are_verified_by_the_same_code(tmp_path, modality):
    values = blobs((75, 61) if modality == "image" else (70, 40, 35))
    if modality == "image":
        model = scan_bundle(
            tmp_path / "model",
            modality=modality,
            resolution="",
            patch_size=(32, 32),
            # as mammograms of either breast: the grid is mirrored
            keys='fit = [75, 61]\norient = "left"',
        )
        source, name = tmp_path / "scan.png", "mask.png"
        Image.fromarray((np.clip(values, 0, 1000) * 0.25).astype(np.uint8)).save(source)
    else:
        nibabel = pytest.importorskip("nibabel")
        model = scan_bundle(tmp_path / "model", program=Around)
        source, name = tmp_path / "scan.nii.gz", "mask.nii.gz"
        nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4)), source)
    options = {} if modality == "image" else {"block_size": 64}
    (run,) = segment(source, model=model, output=tmp_path / "out", **options)
    assert run.status == "done", run.reason
    folder = tmp_path / "out" / "scan"
    found = verify(folder, share=1)
    assert (found.different, found.rounded) == ((), ())
    assert len(found.again) == (1 if modality == "image" else 2)
    if modality == "image":
        with Image.open(folder / name) as picture:
            picture.putpixel((60, 74), (picture.getpixel((60, 74)) + 1) % 3)
            picture.save(folder / name)
        assert names(verify(folder).different) == {"00000_00000"}
    else:
        data = bytearray(gzip.decompress((folder / name).read_bytes()))
        # the last voxel of all, (z, y, x) = (69, 39, 34)
        data[-1] = (data[-1] + 1) % 3
        (folder / name).write_bytes(gzip.compress(bytes(data)))
        assert names(verify(folder).different) == {"00001_00000_00000"}
    flip(folder / name)
    assert verify(folder).different


def test_thresholds_are_decisions_that_rounding_may_turn(home, tmp_path):
    segment(
        home / "slide.tif",
        model=home / "model",
        output=tmp_path / "out",
        precision="fp32",
        mask_mpp=0.5,
        outputs=("zarr",),
        thresholds={"Tumor": 0.7, "Stroma": 0.2},
        min_margin=0.05,
    )
    assert verify(tmp_path / "out" / "slide", share=1).epsilon == 0
    found = verify(tmp_path / "out" / "slide", share=1, precision="bf16")
    assert found.rounded
    assert found.different == ()
    # one that turned at a threshold, and not between classes
    assert max(block.margin for block in found.rounded) < 0.2
