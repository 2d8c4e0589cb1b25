"""Colours by ICC profiles, against Pillow's ImageCms on whole pictures."""

import dataclasses
import io
import json
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pydicom
import pytest
import tifffile
import zarr
from bundles import classify, pointwise_bundle
from click.testing import CliRunner
from msgspec import structs
from PIL import Image, ImageCms
from test_training import slide_recipe

from wsi_pipeline import open_run, segment, verify
from wsi_pipeline.cli import group
from wsi_pipeline.errors import SourceError
from wsi_pipeline.geometry import Region
from wsi_pipeline.report.record import load_run
from wsi_pipeline.sources import open_source
from wsi_pipeline.sources.shared import open_shared
from wsi_pipeline.training.recipe import load_recipe
from wsi_pipeline.training.samples import load_samples

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def with_primaries(**xyz):
    """Return sRGB's profile with other primaries, in XYZ under D50."""
    data = bytearray(SRGB)
    (tags,) = struct.unpack(">I", data[128:132])
    for at in range(132, 132 + 12 * tags, 12):
        name, offset, _ = struct.unpack(">4sII", data[at : at + 12])
        if (values := xyz.get(name.decode()[0])) and name.endswith(b"XYZ"):
            data[offset + 8 : offset + 20] = struct.pack(">3i", *(round(v * 65536) for v in values))
    return bytes(data)


ADOBE = {
    "r": (0.60974, 0.31111, 0.01947),
    "g": (0.20528, 0.62567, 0.06087),
    "b": (0.14919, 0.06322, 0.74457),
}
WIDE = with_primaries(**ADOBE)
"""Of Adobe RGB's primaries."""
REDDISH = with_primaries(**{**ADOBE, "r": (0.5, 0.25, 0.01)})
"""In which white is none."""
DIM = with_primaries(**{**ADOBE, "g": (0.16, 0.5, 0.05)})
"""In which `classify` sees other classes."""


def by_imagecms(pixels, data=WIDE):
    source = ImageCms.getOpenProfile(io.BytesIO(data))
    target = ImageCms.createProfile("sRGB")
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return np.asarray(ImageCms.profileToProfile(picture, source, target, intent, "RGB"))


def write_tiff(path, pixels, icc, tiles=None):
    """Write two levels, 0.25 µm/px; `tiles` of the second one in place of what they should be."""
    own = {"tile": (128, 128), "photometric": "rgb", "iccprofile": icc, "metadata": None}
    scale = {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}
    small = pixels[: len(pixels) // 2 * 2, : pixels.shape[1] // 2 * 2].astype(np.float32)
    small = (small[::2, ::2] + small[1::2, ::2] + small[::2, 1::2] + small[1::2, 1::2]) / 4
    small = small.round().astype(np.uint8)
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, **own, **scale)
        if tiles is None:
            file.write(small, **own, subfiletype=1)
        else:
            shape = {"shape": small.shape, "dtype": np.uint8}
            file.write(iter(tiles(small)), **own, **shape, subfiletype=1)
    return path


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory, slide_pixels):
    """Return a TIFF of 1931 × 1487 px whose colours are those of another space."""
    return write_tiff(tmp_path_factory.mktemp("icc") / "wide.tif", slide_pixels, WIDE)


def dicom_slide(folder, data_dir):
    path = folder / "a.dcm"
    header = pydicom.dcmread(data_dir / "wsi/dicom/multiframe_camelyon_challenge_image.dcm")
    light = pydicom.Dataset()
    light.ICCProfile = WIDE + bytes(len(WIDE) % 2)
    header.OpticalPathSequence = [light]
    header.save_as(path)
    return path


def picture(name):
    def write(folder, _):
        pixels = np.random.default_rng(1).integers(0, 256, (301, 457, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name, icc_profile=WIDE)
        return folder / name

    return write


@pytest.mark.parametrize(
    "make",
    [dicom_slide, picture("a.png"), picture("a.jpg"), None],
    ids=["dicom", "png", "jpeg", "tiff"],
)
def test_every_pixel_is_as_imagecms_has_it(make, tmp_path, data_dir, wide_path):
    path = make(tmp_path, data_dir) if make else wide_path
    with open_source(path, mpp=0.25) as plain, open_source(path, mpp=0.25, icc="apply") as slide:
        assert slide.fingerprint == plain.fingerprint
        assert slide.doubts == plain.doubts
        for n, (width, height) in enumerate(plain.pixels.level_sizes):
            stored = plain.pixels.read_level(n, 0, 0, width, height)
            found = slide.pixels.read_level(n, 0, 0, width, height)
            assert (found != stored).mean() > 0.1
            assert np.array_equal(found, by_imagecms(stored))


def test_threads_share_a_profile(wide_path, slide_pixels):
    expected = by_imagecms(slide_pixels)
    rng = np.random.default_rng(0)
    corners = rng.integers(0, (1487 - 211, 1931 - 307), (200, 2)).tolist()
    with open_source(wide_path, icc="apply") as slide, ThreadPoolExecutor(8) as pool:

        def is_right(corner):
            (y, x), (height, width) = corner, (211, 307)
            found = slide.read(Region(x=x, y=y, width=width, height=height), 0.25)
            return np.array_equal(found, expected[y : y + height, x : x + width])

        assert all(pool.map(is_right, corners))


def test_a_slide_that_is_shared_is_one_for_each_choice(wide_path, slide_pixels):
    options = {"mpp": None, "series": None}
    with (
        open_shared(wide_path, icc="apply", **options) as slide,
        open_shared(wide_path, icc="apply", **options) as same,
        open_shared(wide_path, icc="ignore", **options) as stored,
    ):
        assert same.pixels is slide.pixels
        box = Region(x=101, y=203, width=777, height=555)
        part = slide_pixels[203:758, 101:878]
        assert np.array_equal(slide.read(box, 0.25), by_imagecms(part))
        assert np.array_equal(stored.read(box, 0.25), part)


@pytest.mark.parametrize(
    ("icc", "said"), [(None, "it has no ICC profile"), (SRGB, "sRGB built-in) is sRGB already")]
)
def test_what_changes_nothing_says_so(icc, said, tmp_path, slide_pixels):
    path = write_tiff(tmp_path / "a.tif", slide_pixels, icc)
    with open_source(path, icc="apply") as slide:
        assert [said in doubt and "--icc apply" in doubt for doubt in slide.doubts] == [True]
        found = slide.read(Region(x=0, y=0, width=1931, height=1487), 0.25)
    assert np.array_equal(found, slide_pixels)
    with open_source(path) as slide:
        assert slide.doubts == ()


@pytest.mark.parametrize(
    ("icc", "said"),
    [(b"no profile" * 40, "damaged"), (WIDE[:200], "damaged"), (LAB, "of Lab colours")],
)
def test_a_profile_that_cannot_be_used_is_refused_where_it_is_wanted(
    icc, said, tmp_path, slide_pixels
):
    path = write_tiff(tmp_path / "a.tif", slide_pixels, icc)
    with open_source(path) as slide:
        found = slide.read(Region(x=0, y=0, width=1931, height=1487), 0.25)
        assert np.array_equal(found, slide_pixels)
    with pytest.raises(SourceError, match=rf"a\.tif: its ICC profile .*{said}.*--icc ignore"):
        open_source(path, icc="apply")
    result = CliRunner().invoke(group, ["info", str(path), "--json"])
    assert said in json.loads(result.stdout)["icc_profile"]["why_not"]
    with pytest.raises(ValueError, match="'srgb'; expected one of ignore, apply"):
        open_source(path, icc="srgb")


def test_info_names_the_profile(wide_path, slide_path, tmp_path, slide_pixels):
    def row(path):
        lines = CliRunner().invoke(group, ["info", str(path)]).stdout.splitlines()
        return [line.split(None, 2)[2] for line in lines if "ICC profile" in line]

    assert row(wide_path) == ["sRGB built-in (not sRGB; --icc apply brings it there)"]
    assert row(slide_path) == []
    assert row(write_tiff(tmp_path / "a.tif", slide_pixels, SRGB)) == ["sRGB built-in (sRGB)"]


def test_a_tile_that_a_level_lacks_is_still_taken_from_a_finer_one(tmp_path, slide_pixels):
    def but_one(small):
        small = np.pad(small, [(0, -n % 128) for n in small.shape[:2]] + [(0, 0)])
        squares = [
            small[y : y + 128, x : x + 128]
            for y in range(0, len(small), 128)
            for x in range(0, small.shape[1], 128)
        ]
        return [b"" if n == 18 else square.tobytes() for n, square in enumerate(squares)]

    whole = write_tiff(tmp_path / "whole.tif", slide_pixels, REDDISH)
    lacking = write_tiff(tmp_path / "lacking.tif", slide_pixels, REDDISH, but_one)
    assert tuple(by_imagecms(np.full((1, 1, 3), 255, np.uint8), REDDISH)[0, 0]) != (255, 255, 255)
    with open_source(whole, icc="apply") as one, open_source(lacking, icc="apply") as other:
        expected, found = (s.at(0.5).read((0, 0), (743, 965)) for s in (one, other))
    assert np.abs(expected.astype(int) - found).max() <= 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory, slide_pixels):
    """Return a folder with a model, and with runs in which the profile was applied, and not."""
    folder = tmp_path_factory.mktemp("runs")
    slide = write_tiff(folder / "wide.tif", slide_pixels, DIM)
    model = pointwise_bundle(folder / "model", mpp=0.25, patch_size=200, overlap=30)
    for icc in ("apply", "ignore"):
        how = {"precision": "fp32", "device": "cpu", "tissue": "none", "icc": icc}
        segment(slide, model=model, output=folder / icc, **how)
    return folder


def mask_of(folder):
    return np.asarray(zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r"))


def test_a_run_sees_the_same_pixels_everywhere(runs, slide_pixels):
    converted = by_imagecms(slide_pixels, DIM)
    applied, stored = (runs / icc / "wide" for icc in ("apply", "ignore"))
    assert np.array_equal(mask_of(applied), classify(converted))
    assert np.array_equal(mask_of(stored), classify(slide_pixels))
    assert (mask_of(applied) != mask_of(stored)).any()
    run, other = load_run(applied / "run.json"), load_run(stored / "run.json")
    assert run.settings["select"]["icc"] == "apply"
    assert run.settings["key"] != other.settings["key"]
    assert run.slide["fingerprint"] == other.slide["fingerprint"]
    thumbnails = [
        np.asarray(zarr.open_array(f / ".store" / "grid.zarr" / "thumbnail", mode="r"))
        for f in (applied, stored)
    ]
    assert np.abs(thumbnails[0].astype(int) - by_imagecms(thumbnails[1], DIM)).mean() < 1
    for home, pixels in ((applied, converted), (stored, slide_pixels)):
        assert not verify(home).different
        with open_run(home) as opened:
            found = opened.slide.read(Region(x=0, y=0, width=1931, height=1487), 0.25)
        assert np.array_equal(found, pixels)


def test_runs_of_earlier_versions_were_of_stored_colours(runs, tmp_path, slide_pixels):
    home = tmp_path / "wide"
    shutil.copytree(runs / "ignore" / "wide", home)
    said = json.loads((home / "run.json").read_text())
    del said["settings"]["select"]["icc"]
    (home / "run.json").write_text(json.dumps(said))
    assert not verify(home).different
    with open_run(home) as opened:
        found = opened.slide.read(Region(x=0, y=0, width=1931, height=1487), 0.25)
    assert np.array_equal(found, slide_pixels)


def test_a_grid_holds_the_colours_it_was_made_with(wide_path, slide_pixels, tmp_path):
    prints = set()
    for icc, pixels in (("apply", by_imagecms(slide_pixels)), ("ignore", slide_pixels)):
        options = f"--mpp 0.25 --patch-size 200 --tissue none --icc {icc} --output".split()
        done = CliRunner().invoke(group, ["tile", str(wide_path), *options, str(tmp_path / icc)])
        assert done.exit_code == 0, done.output
        grid = zarr.open_group(tmp_path / icc / "wide.zarr", mode="r")
        assert np.array_equal(np.asarray(grid["pixels"]), pixels)
        prints.add(grid.attrs["fingerprint"])
    # so that a run of one does not go on with what was made of the other
    assert len(prints) == 2


def test_training_sees_what_a_run_sees(tmp_path, wide_path, slide_pixels):
    (tmp_path / "slide.tif").symlink_to(wide_path)
    recipe = slide_recipe(tmp_path, "slide.tif")
    digests, mpp = set(), recipe.bundle.mpp
    for icc in ("apply", "ignore"):
        data = structs.replace(recipe.data[0], icc=icc)
        with ExitStack() as closing, open_source(wide_path, icc=icc) as slide:
            one = dataclasses.replace(recipe, data=(data,))
            (sample,) = load_samples(one, tmp_path, closing)
            found = sample.source.read((40, 30), (75, 91))[0]
            expected = slide.at(mpp, tolerance=0.02).read((40, 30), (75, 91))
        assert np.array_equal(np.asarray(found), np.moveaxis(expected, -1, 0))
        digests.add(sample.digest)
    assert len(digests) == 2
    text = (tmp_path / "slide.toml").read_text()
    (tmp_path / "slide.toml").write_text(text + '\nicc = "apply"\n')
    assert load_recipe(tmp_path / "slide.toml").data[0].icc == "apply"
