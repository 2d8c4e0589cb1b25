"""Damaged tiles, hostile headers, giants without tiles: bounded, named, and never silent."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from wsi_pipeline.errors import SourceError
from wsi_pipeline.geometry import Region
from wsi_pipeline.sources import open_source
from wsi_pipeline.sources.brightfield import why_not_brightfield
from wsi_pipeline.sources.openslide_reader import OpenSlideBackend
from wsi_pipeline.sources.radiology.image import open_image
from wsi_pipeline.sources.tiff_reader import FileBytes

Pixels = npt.NDArray[np.uint8]
MakeSlide = Callable[..., Path]
TILE = 256


def destroy(path: Path, tiles: list[int], *, page: int = 0) -> None:
    """Overwrite tiles of a page with zeros."""
    with tifffile.TiffFile(path) as file:
        extents = [
            (file.pages[page].dataoffsets[tile], file.pages[page].databytecounts[tile])
            for tile in tiles
        ]
    with path.open("r+b") as file:
        for offset, count in extents:
            file.seek(offset)
            file.write(bytes(count))


@pytest.fixture
def jpeg(make_big_slide: MakeSlide, tmp_path: Path) -> Path:
    """Return a slide of 8 × 5 tiles whose tile of row 1, column 2 is destroyed at level 0."""
    path = make_big_slide(tmp_path / "a.tif", (2000, 1200), levels=(1, 4))
    shutil.copy(path, tmp_path / "whole.tif")
    destroy(path, [8 + 2])
    return path


BAD = Region(x=512, y=256, width=256, height=256)


@pytest.mark.parametrize("backend", ["tiffslide", "openslide"])
def test_a_bad_tile_is_listed_whole_and_the_rest_read(jpeg: Path, backend: str) -> None:
    with open_source(jpeg) as slide, open_source(jpeg.with_name("whole.tif")) as whole:
        if backend == "openslide":
            slide.pixels.close()
            slide = replace(slide, pixels=OpenSlideBackend(jpeg))
        # the other level is 16 times as coarse, and no good for this view
        for pixels in (slide.pixels, whole.pixels):
            pixels.level_downsamples = ((1.0, 1.0), (16.0, 16.0))
        view, bad = slide.at(0.25), list[Region]()
        found = view.read((0, 0), view.shape, bad=bad)
        assert bad == [BAD]
        expected = whole.at(0.25).read((0, 0), view.shape)
        expected[256:512, 512:768] = 255
        np.testing.assert_array_equal(found, expected)
        bad.clear()
        part = view.read((300, 700), (500, 500), bad=bad)
        assert bad == [BAD]
        np.testing.assert_array_equal(part, expected[300:800, 700:1200])
        bad.clear()
        view.read((512, 0), (600, 600), bad=bad)
        assert bad == []
        with pytest.raises(SourceError, match="level 0 cannot be read at x 700, y 300"):
            view.read((300, 700), (500, 500))
        slide.close()


def test_a_bad_tile_is_computed_from_another_level(jpeg: Path) -> None:
    with open_source(jpeg) as slide, open_source(jpeg.with_name("whole.tif")) as whole:
        for mpp in (0.25, 0.5, 0.6):
            bad = list[Region]()
            view = slide.at(mpp)
            found = view.read((0, 0), view.shape, bad=bad).astype(int)
            expected = whole.at(mpp).read((0, 0), view.shape)
            assert bad == []
            y, x = (round(n / mpp * 0.25) for n in (256, 512))
            side = round(256 / mpp * 0.25)
            inside = (slice(y + 2, y + side - 2), slice(x + 2, x + side - 2))
            means = [pixels[inside].mean(axis=(0, 1)) for pixels in (found, expected)]
            assert abs(means[0] - means[1]).max() < 3  # blurred, but the same tissue
            assert found[inside].std() > 5
            found[y - 2 : y + side + 2, x - 2 : x + side + 2] = 0
            expected[y - 2 : y + side + 2, x - 2 : x + side + 2] = 0
            np.testing.assert_array_equal(found, expected)


def test_a_bad_tile_of_a_coarse_level_is_computed_from_the_fine_one(
    jpeg: Path, tmp_path: Path
) -> None:
    path = tmp_path / "coarse.tif"
    shutil.copy(jpeg.with_name("whole.tif"), path)
    destroy(path, [0], page=1)
    with open_source(path) as slide, open_source(jpeg.with_name("whole.tif")) as whole:
        bad = list[Region]()
        view = slide.at(1.0)
        found = view.read((0, 0), view.shape, bad=bad).astype(int)
        assert bad == []
        exact = whole.pixels.read_level(0, 0, 0, 1024, 1024)
        means = exact.reshape(256, 4, 256, 4, 3).mean(axis=(1, 3))
        assert abs(found[:256, :256] - means).max() <= 1
        thumbnail, _ = slide.thumbnail(300)
        assert abs(thumbnail.astype(int) - whole.thumbnail(300)[0]).mean() < 3


def test_bad_tiles_are_the_same_from_many_threads_and_any_cut(jpeg: Path) -> None:
    with open_source(jpeg) as slide:
        view = slide.at(0.5)
        whole = view.read((0, 0), view.shape, bad=[])
        origins = [(y, x) for y in range(0, 600, 100) for x in range(0, 1000, 100)]

        def read(origin: tuple[int, int]) -> Pixels:
            return view.read(origin, (100, 100), bad=[])

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(read, origins))
        for (y, x), pixels in zip(origins, found, strict=True):
            np.testing.assert_array_equal(pixels, whole[y : y + 100, x : x + 100])


def test_a_missing_file_of_a_mirax_is_listed_not_raised(data_dir: Path) -> None:
    path = data_dir / "wsi" / "mrxs_partial" / "Mirax2-Fluorescence-2.mrxs"
    with open_source(path) as slide:
        bad = list[Region]()
        x, y = 9300, 103000
        found = slide.read(Region(x=x, y=y, width=300, height=300), slide.mpp[0], bad=bad)
        # the files of levels 0 and 1 are missing: what there is comes from level 2, 4 times coarser
        assert bad == []
        assert len(np.unique(found)) > 20


def test_a_handle_that_goes_stale_is_replaced(jpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source(jpeg.with_name("whole.tif")) as slide:
        expected = slide.at(0.25).read((0, 0), (600, 600))
        read, failing = FileBytes.read, slide.pixels._bytes  # type: ignore[attr-defined]

        def stale(self: FileBytes, offset: int, count: int) -> bytes:
            if self is failing:
                raise OSError(116, "Stale file handle")
            return read(self, offset, count)

        monkeypatch.setattr(FileBytes, "read", stale)
        np.testing.assert_array_equal(slide.at(0.25).read((0, 0), (600, 600)), expected)


def test_a_slide_whose_thumbnail_cannot_be_read_is_refused(jpeg: Path) -> None:
    destroy(jpeg, list(range(40)))
    destroy(jpeg, [0, 1], page=1)
    with open_source(jpeg) as slide, pytest.raises(SourceError, match="cannot be read"):
        slide.thumbnail(500)


def test_a_turned_photograph_is_read_as_stored_and_said_to_be_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 20), (200, 100, 150)).save(tmp_path / "a.jpg", exif=exif)
    with open_source(tmp_path / "a.jpg", mpp=1) as slide:
        assert slide.size == (30, 20)
        assert "Orientation tag of 6" in slide.doubts[0]


@pytest.mark.parametrize("orientation", [0, 9])
@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_an_orientation_that_is_none_says_nothing(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    path, exif = tmp_path / f"a.{kind}", Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (30, 20), (200, 100, 150)).save(path, exif=exif)
    with open_source(path, mpp=1) as slide:
        assert slide.properties["tiff.Orientation"] == str(orientation)
        assert slide.doubts == ()
    assert open_image(path).doubts == ()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exif", [b"no data of EXIF", b"II*\0\x08\0\0\0\x05\0"])
def test_damaged_exif_says_nothing(tmp_path: Path, exif: bytes) -> None:
    picture = Image.new("RGB", (30, 20), (200, 100, 150))
    picture.save(tmp_path / "a.jpg", dpi=(72, 72), exif=b"Exif\0\0" + exif)
    with open_source(tmp_path / "a.jpg", mpp=1) as slide:
        assert slide.size == (30, 20)
        assert slide.doubts == ()


# --- headers -----------------------------------------------------------------------------------


def set_tag(path: Path, code: int, value: int, *, index: int = 0) -> None:
    """Change a value of a tag in the first directory, wherever it stands."""
    with tifffile.TiffFile(path, mode="r+") as file:
        tag = file.pages.first.tags[code]
        values = list(tag.value) if isinstance(tag.value, tuple) else [tag.value]
        values[index] = value
        tag.overwrite(values if len(values) > 1 else values[0])


@pytest.mark.parametrize(
    ("dtype", "value", "um"),
    [("f", 20000.0, 0.5), ("I", 20000, 0.5), ("2I", (2, 1, 2, 1), None), ("f", float("nan"), None)],
)
def test_a_resolution_of_any_type_is_read(
    slide_path: Path, tmp_path: Path, dtype: str, value: object, um: float | None
) -> None:
    path = tmp_path / "a.tif"
    shutil.copy(slide_path, path)
    with tifffile.TiffFile(path, mode="r+") as file:
        for page in file.pages:
            assert isinstance(page, tifffile.TiffPage)
            page.tags["ResolutionUnit"].overwrite(3)
            for name in ("XResolution", "YResolution"):
                page.tags[name].overwrite(value, dtype=dtype)
    with open_source(path, mpp=None if um else 1) as slide:
        assert slide.backend == "tiffslide"
        assert slide.mpp == ((um, um) if um else (1, 1))


WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT, OFFSETS, COUNTS = 256, 257, 322, 323, 324, 325


def test_one_tile_that_points_nowhere_is_damage_to_that_tile(
    slide_path: Path, slide_pixels: Pixels, tmp_path: Path
) -> None:
    for code, value in ((OFFSETS, (1 << 32) - 1), (COUNTS, 1 << 31)):
        path = tmp_path / "a.tif"
        shutil.copy(slide_path, path)
        set_tag(path, code, value, index=9)  # row 1, column 1 of 8
        with open_source(path) as slide:
            bad = list[Region]()
            view = slide.at(0.25)
            found = view.read((0, 0), view.shape, bad=bad)
            found[256:512, 256:512] = slide_pixels[256:512, 256:512]
            np.testing.assert_array_equal(found, slide_pixels)
            with pytest.raises(SourceError, match="level 0 cannot be read at x 300, y 300"):
                view.read((300, 300), (10, 10))


@pytest.mark.parametrize(
    ("code", "value", "said"),
    [
        (WIDTH, 1 << 30, "which no slide has"),
        (HEIGHT, 1 << 30, "which no slide has"),
        (WIDTH, 0, "nothing to see"),
        (WIDTH, 1 << 18, "tiles listed"),
        (TILE_WIDTH, 1 << 30, "do not fit in memory"),
        (TILE_WIDTH, 16, "tiles listed"),
    ],
)
def test_impossible_sizes_are_refused(
    slide_path: Path, tmp_path: Path, code: int, value: int, said: str
) -> None:
    path = tmp_path / "a.tif"
    shutil.copy(slide_path, path)
    set_tag(path, code, value)
    with pytest.raises(SourceError, match=said) as error:
        open_source(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_headers_that_fuzzing_found(slide_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffFile(slide_path) as file:
        directory = file.pages.first.offset
        tag = file.pages.first.tags[TILE_WIDTH]
    data = bytearray(slide_path.read_bytes())
    struct.pack_into("<I", data, tag.offset + 4, 2)  # two widths
    path.write_bytes(data)
    with pytest.raises(SourceError, match="cannot be opened"):
        open_source(path)
    strips = tmp_path / "strips.tif"
    tifffile.imwrite(strips, np.zeros((24, 18), np.uint8), rowsperstrip=1)
    set_tag(strips, HEIGHT, 65535)
    with pytest.raises(SourceError, match="24 strips listed where its size makes 65,535"):
        open_source(strips, mpp=1)
    data = bytearray(slide_path.read_bytes())
    (entries,) = struct.unpack_from("<H", data, directory)
    struct.pack_into("<I", data, directory + 2 + 12 * entries, directory)  # the next is itself
    path.write_bytes(data)
    with pytest.raises(SourceError, match="in a circle"):
        open_source(path)
    big = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) + struct.pack("<Q", (1 << 64) - 1)
    path.write_bytes(big + slide_path.read_bytes()[directory:])  # as many entries
    with pytest.raises(SourceError, match="truncated"):
        open_source(path)


def test_a_tile_that_holds_a_huge_picture_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    stream = imagecodecs.jpeg_encode(np.zeros((256, 256, 3), np.uint8))
    start = stream.index(b"\xff\xc0")
    size = struct.pack(">HH", 60000, 60000)
    huge = stream[: start + 5] + size + stream[start + 9 :]
    tifffile.imwrite(
        path,
        iter([stream, huge]),
        shape=(256, 512, 3),
        dtype=np.uint8,
        tile=(256, 256),
        photometric="ycbcr",
        compression="jpeg",
    )
    with open_source(path, mpp=1) as slide:
        assert (slide.at(1).read((0, 0), (256, 256)) == 0).all()
        with pytest.raises(SourceError, match=r"60,000 × 60,000 px|decompression bomb"):
            slide.at(1).read((0, 256), (256, 256))


def test_a_picture_too_large_for_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 300_000, 300_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"cannot hold|decompression bomb"):
        open_source(path, mpp=1)


def test_a_picture_of_16_bits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(np.zeros((30, 40, 3), np.uint16)))
    with pytest.raises(SourceError, match="a PNG of mode RGB, 16 bits; expected RGB or grey, 8"):
        open_source(path, mpp=1)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_truncated_picture_is_no_picture(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-20000])
    with open_source(path, mpp=1) as slide, pytest.raises(SourceError, match="cannot be read at"):
        slide.at(1).read((0, 0), (300, 400))


def test_what_a_slide_names_is_not_opened(tmp_path: Path) -> None:
    secret, path = tmp_path / "secret.ome.tif", tmp_path / "a.ome.tif"
    tifffile.imwrite(secret, np.full((64, 64), 7, np.uint8), metadata={"axes": "YX"})
    with tifffile.TiffFile(secret) as file:
        xml = str(file.ome_metadata)
    uuid, own = (
        xml.split('UUID="')[1].split('"')[0],
        "urn:uuid:00000000-0000-0000-0000-000000000001",
    )
    plane = '<TiffData IFD="0" PlaneCount="1"'
    named = xml.replace(uuid, own).replace(
        f"{plane}/>", f'{plane}><UUID FileName="{secret.name}">{uuid}</UUID></TiffData>'
    )
    assert secret.name in named
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), description=named, metadata=None)
    with tifffile.TiffFile(path) as file:
        assert file.asarray().any()  # tifffile itself goes there
    with open_source(path, mpp=1) as slide:
        assert not slide.at(1).read((0, 0), (64, 64)).any()


# --- giants ------------------------------------------------------------------------------------

PEAK = """
import sys
from peak import peak_bytes
from wsi_pipeline.sources import open_source
slide = open_source(sys.argv[1], mpp=0.25)
before = peak_bytes()
pixels = slide.at(0.25).read((7000, 9000), (300, 200))
print(peak_bytes() - before, pixels.mean())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX")
@pytest.mark.parametrize(
    "kind",
    ["none", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("deflate", "png", "jpg"))],
)
def test_a_giant_without_tiles_is_read_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    tissue = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    pixels = np.tile(tissue, (144, 160, 1))  # 283 MB
    if kind in ("png", "jpg"):
        path = tmp_path / f"a.{kind}"
        options = {"compress_level": 1} if kind == "png" else {"quality": 50}
        Image.fromarray(pixels).save(path, **options)
    else:
        path = tmp_path / "a.tif"
        compression = None if kind == "none" else kind
        tifffile.imwrite(
            path, pixels, rowsperstrip=len(pixels), photometric="rgb", compression=compression
        )
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    used, mean = map(float, ran.stdout.split())
    assert used < 300e6
    assert mean == pytest.approx(pixels[7000:7300, 9000:9200].mean(), abs=1)
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


# --- bright field ------------------------------------------------------------------------------


def test_real_slides_are_told_from_fluorescence(data_dir: Path) -> None:
    said = {
        "ndpi/test3-DAPI-2-_387_.ndpi": "background is dark",
        "mrxs_partial/Mirax2-Fluorescence-2.mrxs": "scanned in fluorescence",
        "large_image/test_orient1.tif": "without any colour",
        "svs/CMU-1-Small-Region.svs": "",
        "wsidicom_tiles/test_tile.png": "",
    }
    for name, reason in said.items():
        with open_source(data_dir / "wsi" / name, mpp=0.5) as slide:
            found = why_not_brightfield(slide.properties, slide.thumbnail(512)[0])
        assert reason in found
        assert bool(reason) == bool(found)
    for name in (
        "bcss/images",
        "he_other/brecahad/images",
        "bcss_tiles/images",
        "he_other/histoqc_pen/images",
    ):
        for path in sorted((data_dir / name).iterdir()):
            with open_source(path, mpp=0.5) as slide:
                assert why_not_brightfield(slide.properties, slide.thumbnail(512)[0]) == ""


def test_black_borders_and_empty_glass_are_no_fluorescence(slide_pixels: Pixels) -> None:
    bordered = np.zeros((4000, 4000, 3), np.uint8)
    bordered[500:1987, 500:2431] = slide_pixels
    assert why_not_brightfield({}, bordered[::8, ::8]) == ""
    assert why_not_brightfield({}, np.full((300, 300, 3), 243, np.uint8)) == ""
    assert "dark" in why_not_brightfield({}, np.zeros((300, 300, 3), np.uint8))
    colors = {"ome-zarr.colors": "0000FF,00FF00,FF0000"}
    assert "shown as 0000FF" in why_not_brightfield(colors, slide_pixels)
