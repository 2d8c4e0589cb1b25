from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import ome_types
import openslide
import pytest
import tifffile
import tiffslide
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export import MaskLike, level_shapes
from wsi_pipeline.export.ome_tiff import write_asap_tiff, write_ome_tiff
from wsi_pipeline.export.ome_zarr import create_mask

CLASSES = (
    ClassInfo(name="Background"),
    ClassInfo(name="Tumor & <stroma>", color=(200, 0, 10)),
    ClassInfo(name="Nécrose µ", color=(1, 2, 255)),
)
MPP = (0.2512, 0.25)  # y, x


class Pattern:
    """A mask that is computed where it is read, so of any size without memory."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        y, x = (np.arange(*part.indices(n)) for part, n in zip(key, self.shape, strict=True))
        return (((y[:, None] // 300 + x // 500) % 3) * (y[:, None] % 2000 < 1500)).astype(np.uint8)


class Dots:
    """As `Pattern`, one pixel in each piece that is read."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        y, x = (len(range(*part.indices(n))) for part, n in zip(key, self.shape, strict=True))
        piece = np.zeros((y, x), np.uint8)
        piece[y // 2, x // 2] = 1
        return piece


def write_ome(path: Path, mask: MaskLike, **options: Any) -> None:
    write_ome_tiff(path, mask, classes=CLASSES, mask_mpp=MPP, name="a slide", **options)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_levels_are_lossless_in_any_crop(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    height, width = (data.draw(st.integers(1, 5000)) for _ in range(2))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    crop = (
        top,
        left,
        data.draw(st.integers(1, height - top)),
        data.draw(st.integers(1, width - left)),
    )
    pattern = Pattern((height, width))
    path = tmp_path_factory.mktemp("t") / "m.ome.tif"
    write_ome(path, pattern, crop=crop)
    pixels = pattern[top : top + crop[2], left : left + crop[3]]
    with tifffile.TiffFile(path) as tiff:
        (series,) = tiff.series
        assert [level.shape for level in series.levels] == level_shapes(pixels.shape)
        for i, level in enumerate(series.levels):
            assert np.array_equal(level.asarray(), pixels[:: 2**i, :: 2**i])


def test_layout_for_qupath(tmp_path: Path) -> None:
    write_ome(tmp_path / "m.ome.tif", Pattern((2500, 4700)))
    with tifffile.TiffFile(tmp_path / "m.ome.tif") as tiff:
        assert tiff.is_bigtiff
        assert tiff.is_ome
        assert len(tiff.pages) == 1  # reduced levels are no pages
        page = tiff.pages[0]
        subpages = page.pages
        assert [p.shape for p in subpages] == level_shapes((2500, 4700))[1:]
        assert [p.subfiletype for p in (page, *subpages)] == [0, 1, 1, 1]
        for p in (page, *subpages):
            assert p.is_tiled
            assert (p.tilelength, p.tilewidth) == (512, 512)
            assert p.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            assert p.dtype == np.uint8


def test_ome_xml_is_valid_and_says_size_and_classes(tmp_path: Path) -> None:
    write_ome(tmp_path / "m.ome.tif", Pattern((700, 1300)))
    with tifffile.TiffFile(tmp_path / "m.ome.tif") as tiff:
        xml = tiff.ome_metadata
    assert xml is not None
    (image,) = ome_types.from_xml(xml, validate=True).images
    pixels = image.pixels
    assert image.name == "a slide"
    assert image.description == "0 = Background, 1 = Tumor & <stroma>, 2 = Nécrose µ"
    assert (pixels.size_x, pixels.size_y, pixels.size_c) == (1300, 700, 1)
    assert (pixels.physical_size_y, pixels.physical_size_x) == MPP
    assert pixels.physical_size_x_unit.value == pixels.physical_size_y_unit.value == "µm"
    (channel,) = pixels.channels
    assert channel.name == image.description
    assert channel.color.as_rgb_tuple() == (200, 0, 10)


def test_each_class_has_its_colour_and_pixels_stay_indices(tmp_path: Path) -> None:
    pattern = Pattern((800, 1100))
    write_ome(tmp_path / "m.ome.tif", pattern)
    with Image.open(tmp_path / "m.ome.tif") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), pattern[:, :])
        colors = np.asarray(image.convert("RGB"))
    for index, info in enumerate(CLASSES):
        seen = np.unique(colors[pattern[:, :] == index], axis=0)
        assert seen.tolist() == [list(info.color or (0, 0, 0))]


def test_layout_for_asap(tmp_path: Path) -> None:
    path, pattern = tmp_path / "m.tif", Pattern((2501, 4700))
    write_asap_tiff(path, pattern, mask_mpp=MPP)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        assert [page.shape for page in tiff.pages] == level_shapes((2501, 4700))
        for i, page in enumerate(tiff.pages):
            text = page.description.lower()
            assert "xml" not in text
            assert "dicom" not in text
            assert page.pages is None  # no SubIFDs
            assert page.is_tiled
            assert page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
            assert page.samplesperpixel == 1
            per_cm = page.get_resolution(tifffile.RESUNIT.CENTIMETER)
            assert per_cm == pytest.approx([1e4 / (mpp * 2**i) for mpp in reversed(MPP)], rel=1e-5)
            assert np.array_equal(page.asarray(), pattern[:: 2**i, :: 2**i])


def test_openslide_and_tiffslide_open_the_one_for_asap(tmp_path: Path) -> None:
    path, pattern = tmp_path / "m.tif", Pattern((3000, 2600))
    write_asap_tiff(path, pattern, mask_mpp=MPP)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((2600, 3000), (1300, 1500), (650, 750))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25, rel=1e-5)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.2512, rel=1e-5)
        region = np.asarray(slide.read_region((500, 100), 0, (900, 700)))
        assert np.array_equal(region[..., 0], pattern[100:800, 500:1400])
    with tiffslide.TiffSlide(path) as slide:
        assert slide.level_count == 3
        assert slide.properties["tiffslide.mpp-x"] == pytest.approx(0.25, rel=1e-5)


def test_a_zarr_mask_streams_into_the_file(tmp_path: Path) -> None:
    pixels = Pattern((2100, 3000))[:, :]
    mask = create_mask(
        tmp_path / "m.zarr", pixels.shape, classes=CLASSES, mask_mpp=MPP, ngff="0.5", name="m"
    )
    mask[:] = pixels
    write_ome(tmp_path / "m.ome.tif", mask, crop=(13, 700, 2001, 1999))
    assert np.array_equal(
        tifffile.imread(tmp_path / "m.ome.tif"), pixels[13 : 13 + 2001, 700 : 700 + 1999]
    )


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_reduced_levels_of_the_mask_give_the_same_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In any crop: those that hold its first pixel are taken, and no others."""
    height, width = (data.draw(st.integers(1100, 5000)) for _ in range(2))
    top, left = (data.draw(st.sampled_from([0, 1, 2, 8, 100, 1024])) for _ in range(2))
    size = (data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    pixels = Pattern((height, width))[:, :]
    levels = [pixels[:: 2**i, :: 2**i] for i in range(len(level_shapes(pixels.shape)))]
    folder = tmp_path_factory.mktemp("t")
    write_ome(folder / "a", pixels, crop=(top, left, *size))
    write_ome(folder / "b", pixels, crop=(top, left, *size), reduced=levels[1:])
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


def test_reduced_levels_are_read_instead_of_the_mask(tmp_path: Path) -> None:
    class Once(Pattern):
        read = 0

        def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
            found = super().__getitem__(key)
            self.read += found.size
            return found

    mask = Once((5000, 4000))
    whole = Pattern(mask.shape)[:, :]
    write_ome(tmp_path / "m.tif", mask, reduced=[whole[::2, ::2], whole[::4, ::4], whole[::8, ::8]])
    assert mask.read == whole.size


def test_background_costs_next_to_nothing(tmp_path: Path) -> None:
    write_ome(tmp_path / "m.ome.tif", np.zeros((8192, 8192), np.uint8))
    n_tiles = 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2
    assert (tmp_path / "m.ome.tif").stat().st_size < n_tiles * 400 + 20_000


@pytest.mark.parametrize("shape", [(4096, 4096), (32768, 16384), (16384, 32768)])
def test_memory_does_not_grow_with_the_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr("wsi_pipeline.files.threads.MOST_THREADS", 4)
    tracemalloc.start()
    write_ome(tmp_path / "m.tif", Dots(shape))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # four threads with a block, padded, and copies of tiles; masks have 537 MB


def test_an_error_on_the_way_leaves_no_file(tmp_path: Path) -> None:
    class Broken(Pattern):
        def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
            if key[0].start >= 2048:
                raise OSError("disk on fire")
            return super().__getitem__(key)

    with pytest.raises(OSError, match="disk on fire"):
        write_ome(tmp_path / "m.ome.tif", Broken((5000, 5000)))
    assert list(tmp_path.iterdir()) == []


def test_names_that_xml_does_not_take(tmp_path: Path) -> None:
    name = 'a"b<c>&\x01\udcff{x}'
    write_ome_tiff(
        tmp_path / "m.ome.tif", Pattern((50, 60)), classes=CLASSES, mask_mpp=MPP, name=name
    )
    with tifffile.TiffFile(tmp_path / "m.ome.tif") as tiff:
        assert tiff.ome_metadata is not None
        ome = ome_types.from_xml(tiff.ome_metadata, validate=True)
    assert ome.images[0].name == "a'b<c>&{x}"


def test_the_same_mask_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_ome(tmp_path / name, Pattern((1500, 1500)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
