from __future__ import annotations

import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ome_types.model import UnitsLength
from PIL import Image
from skimage.data import immunohistochemistry
from skimage.feature import match_template

from wsi_pipeline.errors import MissingMppError, SourceError
from wsi_pipeline.geometry import PatchGrid, Region
from wsi_pipeline.patch_grid import GridInfo, StoredGrid, write_patch_grid
from wsi_pipeline.sources import Slide, levels, open_source
from wsi_pipeline.sources.base import snap_downsample
from wsi_pipeline.sources.mpp import best_mpp, contradictions, doubts, ome_mpp, read_mpp, um_per
from wsi_pipeline.sources.openslide_reader import OpenSlideBackend
from wsi_pipeline.sources.tiff_reader import FileBytes, TiffBackend
from wsi_pipeline.sources.view import SlideView

Pixels = npt.NDArray[np.uint8]
MakeSlide = Callable[..., Path]

quick = settings(max_examples=40, suppress_health_check=[*HealthCheck])


class ArrayBackend:
    """Levels held in memory, for geometry that no file has."""

    name = "array"

    def __init__(self, size: tuple[int, int], levels: list[Pixels], downsamples: list[float]):
        self.size = size
        self.levels = levels
        self.level_sizes = tuple((p.shape[1], p.shape[0]) for p in levels)
        self.level_downsamples = tuple((d, d) for d in downsamples)
        self.level_tiles = tuple((64, 64) for _ in levels)
        self.properties: dict[str, str] = {}

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        full_width, full_height = self.level_sizes[level]
        assert 0 <= x < x + width <= full_width
        assert 0 <= y < y + height <= full_height
        return self.levels[level][y : y + height, x : x + width]

    def close(self) -> None:
        pass


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def array_slide(pixels: Pixels, mpp: tuple[float, float] = (0.25, 0.25)) -> Slide:
    height, width = pixels.shape[:2]
    backend = ArrayBackend((width, height), [pixels], [1.0])
    return Slide(path=Path("a"), mpp=mpp, mpp_source="test", fingerprint="", pixels=backend)


@pytest.fixture(scope="module", params=["tiffslide", "openslide"])
def slide(request: pytest.FixtureRequest, slide_path: Path) -> Iterator[Slide]:
    """Return the synthetic slide, read by one library and by the other."""
    with open_source(slide_path) as opened:
        assert opened.backend == "tiffslide"
        if request.param == "openslide":
            opened.pixels.close()
            opened = replace(opened, pixels=OpenSlideBackend(slide_path))
            assert opened.backend == "openslide"
        yield opened


def padded(pixels: Pixels, height: int, width: int) -> Pixels:
    """Repeat the last row and column until the array has the wanted size."""
    h, w = pixels.shape[:2]
    return np.pad(pixels, ((0, height - h), (0, width - w), (0, 0)), mode="edge")


def triangle_weights(n_out: int, n_in: int, ratio: float) -> npt.NDArray[np.float64]:
    """Return (n_out, n_in) weights of a triangle filter of ±max(ratio, 1) about pixel centres."""
    reach = max(ratio, 1.0)
    centre = (np.arange(n_out) + 0.5) * ratio
    first, last = math.floor(-reach) - 1, math.ceil(n_out * ratio + reach) + 1
    at = np.arange(first, last)
    weights = np.clip(1 - abs(at + 0.5 - centre[:, None]) / reach, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    folded = np.zeros((n_out, n_in))
    np.add.at(folded.T, np.clip(at, 0, n_in - 1), weights.T)  # beyond the edge: the last pixel
    return folded


# --- what a view shows -------------------------------------------------------------------------


def test_level_0_is_the_stored_pixels(slide: Slide, slide_pixels: Pixels) -> None:
    view = slide.at(0.25)
    assert view.shape == slide_pixels.shape[:2]
    assert view.downsample == (1.0, 1.0)
    np.testing.assert_array_equal(view.read((0, 0), view.shape), slide_pixels)


def test_a_stored_level_is_shown_as_stored(
    slide: Slide, slide_path: Path, slide_pixels: Pixels
) -> None:
    view = slide.at(1.0)
    stored = tifffile.imread(slide_path, key=1)
    assert stored.shape == (371, 482, 3)  # truncated from 371.75 and 482.75
    assert view.shape == (372, 483)
    assert view.downsample == (4.0, 4.0)
    np.testing.assert_array_equal(view.read((0, 0), view.shape), padded(stored, 372, 483))


@pytest.mark.parametrize("ratio", [2, 3, 7, 40])
def test_a_whole_ratio_is_the_mean_of_squares(ratio: int) -> None:
    pixels = noise(211, 347)
    view = array_slide(pixels).at(0.25 * ratio)
    height, width = -(-211 // ratio), -(-347 // ratio)
    assert view.shape == (height, width)
    squares = padded(pixels, height * ratio, width * ratio)
    mean = squares.reshape(height, ratio, width, ratio, 3).mean(axis=(1, 3))
    # Pillow rounds sums in whole numbers: half of ratio² is cut to one
    assert abs(view.read((0, 0), view.shape) - mean).max() <= 0.51 + 0.5 / ratio**2


@pytest.mark.parametrize("mpp", [0.13, 0.2, 0.33, 0.6, 1.1, 5.3])
def test_other_ratios_are_a_triangle_filter_about_pixel_centres(mpp: float) -> None:
    pixels = noise(211, 347)
    view = array_slide(pixels).at(mpp)
    assert view.downsample[0] == pytest.approx(mpp / 0.25, abs=1 / 8192)
    rows = triangle_weights(view.shape[0], 211, view.downsample[0])
    columns = triangle_weights(view.shape[1], 347, view.downsample[1])
    expected = np.einsum("yh,hwc,xw->yxc", rows, pixels.astype(float), columns, optimize=True)
    # each of the two passes rounds to whole grey values, with weights of 22 bits
    assert abs(view.read((0, 0), view.shape) - expected).max() <= 1.1


def test_a_gradient_keeps_its_place_at_every_resolution() -> None:
    ramp = np.repeat(np.linspace(0, 250, 2001)[None, :, None], 40, axis=0).repeat(3, axis=2)
    slide = array_slide(np.round(ramp).astype(np.uint8))
    for mpp in (0.25, 0.4, 0.5, 0.77, 1.0, 3.1, 10.0):
        view = slide.at(mpp)
        row = view.read((0, 0), (1, view.shape[1]))[0, 2:-2, 0]
        centres = (np.arange(view.shape[1]) + 0.5)[2:-2] * view.downsample[1] - 0.5
        assert abs(row - centres * 250 / 2000).max() < 1.1


@given(
    mpp=st.sampled_from([0.25, 0.5, 0.75, 1.0, 2.0, 10.0, 0.2, 0.13, 0.3, 0.77, 1.3, 3.33]),
    uneven=st.booleans(),
    where=st.tuples(*[st.floats(-0.1, 1.05)] * 2),
    shape=st.tuples(*[st.integers(1, 300)] * 2),
)
@quick
def test_any_way_of_cutting_gives_the_same_pixels(
    slide: Slide,
    whole_views: dict[tuple[str, float, bool], tuple[SlideView, Pixels]],
    mpp: float,
    uneven: bool,
    where: tuple[float, float],
    shape: tuple[int, int],
) -> None:
    key = (slide.backend, mpp, uneven)
    if key not in whole_views:
        view = (replace(slide, mpp=(0.25, 0.31)) if uneven else slide).at(mpp)
        whole_views[key] = (view, view.read((0, 0), view.shape))
    view, whole = whole_views[key]
    origin = tuple(int(part * n) for part, n in zip(where, view.shape, strict=True))
    expected = np.full((*shape, 3), 255, dtype=np.uint8)
    start = [max(0, o) for o in origin]
    stop = [min(o + s, n) for o, s, n in zip(origin, shape, view.shape, strict=True)]
    if start[0] < stop[0] and start[1] < stop[1]:
        expected[
            start[0] - origin[0] : stop[0] - origin[0], start[1] - origin[1] : stop[1] - origin[1]
        ] = whole[start[0] : stop[0], start[1] : stop[1]]
    np.testing.assert_array_equal(view.read((origin[0], origin[1]), shape), expected)


@pytest.fixture(scope="module")
def whole_views() -> dict[tuple[str, float, bool], tuple[SlideView, Pixels]]:
    return {}


@given(ratio=st.floats(0.3, 60), x=st.integers(0, 90_000), width=st.integers(1, 40))
@quick
def test_pixels_far_from_the_origin_are_computed_as_exactly(
    ratio: float, x: int, width: int
) -> None:
    # a slide of 100,000 columns that repeats every 1,000
    tile = noise(3, 1000, seed=1)

    class Repeating(ArrayBackend):
        def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
            return tile[y : y + height, np.arange(x, x + width) % 1000]

    backend = Repeating((100_000, 3), [np.empty((3, 100_000, 3), dtype=np.uint8)], [1.0])
    slide = Slide(path=Path("a"), mpp=(1, 1), mpp_source="", fingerprint="", pixels=backend)
    view = slide.at(ratio)
    x = min(x, view.shape[1] - 1)
    wide = view.read((0, max(0, x - 5000)), (1, 5000 + width))
    np.testing.assert_array_equal(view.read((0, x), (1, width)), wide[:, min(x, 5000) :][:, :width])


def test_outside_is_white(slide: Slide) -> None:
    assert (slide.at(0.5).read((-50, -30), (40, 20)) == 255).all()
    assert (slide.at(0.3).read((10**6, 10**6), (4, 5)) == 255).all()


def test_a_region_is_covered_by_whole_pixels(slide: Slide) -> None:
    found = slide.read(Region(x=101, y=203, width=10, height=7), 0.5)
    np.testing.assert_array_equal(found, slide.at(0.5).read((101, 50), (4, 6)))


def test_a_thumbnail_is_no_larger_than_asked(slide: Slide, slide_pixels: Pixels) -> None:
    thumbnail, (fy, fx) = slide.thumbnail(100)
    assert fy == fx == 20.0
    assert thumbnail.shape == (75, 97, 3)
    mean = padded(slide_pixels, 1500, 1940).reshape(75, 20, 97, 20, 3).mean(axis=(1, 3))
    # computed from the level of 4, whose pixels are rounded and whose last ones are cut off
    assert abs(thumbnail[:-1, :-1] - mean[:-1, :-1]).max() <= 1.01
    small, downsample = slide.thumbnail(5000)
    assert downsample == (1.0, 1.0)
    np.testing.assert_array_equal(small, slide_pixels)


def test_threads_may_read_at_once(slide: Slide) -> None:
    view = slide.at(0.3)
    origins = [(y, x) for y in range(0, 1200, 150) for x in range(0, 1500, 150)]
    whole = view.read((0, 0), view.shape)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda origin: view.read(origin, (150, 150)), origins))
    for (y, x), pixels in zip(origins, found, strict=True):
        inside = whole[y : y + 150, x : x + 150]
        np.testing.assert_array_equal(pixels[: inside.shape[0], : inside.shape[1]], inside)


def test_mpp_within_the_tolerance_takes_the_whole_ratio(slide: Slide) -> None:
    assert slide.at(0.5002).downsample == (2.0, 2.0)
    assert slide.at(0.508, tolerance=0.02).downsample == (2.0, 2.0)
    assert slide.at(0.508).downsample == pytest.approx((2.032, 2.032), abs=1e-4)
    assert slide.at(0.99, tolerance=0.02).level == 1
    assert slide.at(0.99).level == 0


@pytest.mark.parametrize("mpp", [0, -1, math.nan, math.inf])
def test_a_senseless_mpp_is_refused(slide: Slide, slide_path: Path, mpp: float) -> None:
    with pytest.raises(ValueError, match="mpp is"):
        slide.at(mpp)
    with pytest.raises(ValueError, match="mpp is"):
        open_source(slide_path, mpp=mpp)


def test_a_view_far_finer_than_the_slide_is_refused(slide: Slide) -> None:
    with pytest.raises(SourceError, match="far finer"):
        slide.at(0.25 / 100)


@given(
    size=st.tuples(*[st.integers(2000, 200_000)] * 2),
    factor=st.sampled_from([2, 3, 4, 5, 8, 16, 32, 64, 128, 256, 512, 1024]),
    rounding=st.sampled_from([math.floor, round, math.ceil]),
)
@example(size=(2049, 2049), factor=1024, rounding=math.ceil)
@example(size=(3071, 4095), factor=1024, rounding=math.floor)
def test_truncated_levels_keep_their_whole_downsample(
    size: tuple[int, int], factor: int, rounding: Callable[[float], int]
) -> None:
    level = (max(1, rounding(size[0] / factor)), max(1, rounding(size[1] / factor)))
    x, y = snap_downsample(size, level)
    # whatever it is taken for, a level is misplaced by a pixel of its own at most
    assert abs(size[0] / x - level[0]) <= 1
    assert abs(size[1] / y - level[1]) <= 1
    # 3 px may be two and a bit or nearly four: only from 4 on a power of two is the nearest one
    if min(level) >= 4:
        assert (x, y) == (factor, factor)


# --- the libraries -----------------------------------------------------------------------------


def test_the_real_slide_equals_openslide(cmu_path: Path) -> None:
    reference = openslide.OpenSlide(cmu_path)
    with open_source(cmu_path) as slide:
        assert slide.backend == "tiffslide"
        assert slide.size == reference.dimensions == (2220, 2967)
        assert slide.mpp == (0.499, 0.499)
        assert slide.mpp_source == "aperio.MPP"
        assert slide.bounds is None
        found = slide.at(0.499).read((0, 0), (2967, 2220))
    expected = np.asarray(reference.read_region((0, 0), 0, reference.dimensions))[..., :3]
    np.testing.assert_array_equal(found, expected)


def test_both_libraries_agree_on_every_level(make_big_slide: MakeSlide, tmp_path: Path) -> None:
    path = make_big_slide(tmp_path / "jpeg.tif", (3001, 2003))
    tiff, reference = TiffBackend(path), OpenSlideBackend(path)
    assert tiff.level_sizes == reference.level_sizes == ((3001, 2003), (750, 500), (187, 125))
    assert tiff.level_downsamples == reference.level_downsamples
    width, height = tiff.size
    np.testing.assert_array_equal(
        tiff.read_level(0, 0, 0, width, height), reference.read_level(0, 0, 0, width, height)
    )
    for level, (width, height) in enumerate(tiff.level_sizes[1:], 1):
        # OpenSlide interpolates where a level's size was truncated
        found = tiff.read_level(level, 0, 0, width, height).astype(int)
        assert abs(found - reference.read_level(level, 0, 0, width, height)).mean() < 3
    tiff.close()
    reference.close()


def test_a_read_decodes_each_tile_once_and_left_out_ones_never(tmp_path: Path) -> None:
    class Counting(TiffBackend):
        decoded: list[int]

        def _data(self, page: Any, index: int, file: FileBytes) -> bytes | None:
            data = super()._data(page, index, file)
            if data is not None:
                self.decoded.append(index)
            return data

    path, pixels = tmp_path / "sparse.tif", noise(512, 768)
    squares = [
        pixels[y : y + 128, x : x + 128] for y in range(0, 512, 128) for x in range(0, 768, 128)
    ]
    tiles = [b"" if i == 7 else square.tobytes() for i, square in enumerate(squares)]
    tifffile.imwrite(
        path, iter(tiles), shape=(512, 768, 3), dtype=np.uint8, tile=(128, 128), photometric="rgb"
    )
    backend = Counting(path)
    for corner, size, indices in [
        ((0, 0), (768, 512), [i for i in range(24) if i != 7]),
        ((200, 100), (200, 200), [1, 2, 3, 8, 9, 13, 14, 15]),
        ((130, 130), (10, 10), []),
    ]:
        backend.decoded = []
        backend.read_level(0, *corner, *size)
        assert sorted(backend.decoded) == indices
    backend.close()


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.6])
def test_pixels_belong_to_the_caller(slide: Slide, mpp: float) -> None:
    found = slide.at(mpp).read((10, 20), (100, 150))
    assert found.flags.carray  # contiguous, and may be written to


@given(
    where=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    shape=st.tuples(*[st.integers(1, 900)] * 2),
)
@quick
def test_openslide_levels_off_the_grid_do_not_depend_on_the_cut(
    odd_level: tuple[OpenSlideBackend, Pixels], where: tuple[float, float], shape: tuple[int, int]
) -> None:
    backend, whole = odd_level
    x, y = (int(part * n) for part, n in zip(where, backend.level_sizes[1], strict=True))
    expected = whole[y : y + shape[0], x : x + shape[1]]
    height, width = expected.shape[:2]
    np.testing.assert_array_equal(backend.read_level(1, x, y, width, height), expected)


@pytest.fixture(scope="module")
def odd_level(
    make_slide: MakeSlide, tmp_path_factory: pytest.TempPathFactory
) -> tuple[OpenSlideBackend, Pixels]:
    path = tmp_path_factory.mktemp("odd") / "odd.tif"
    backend = OpenSlideBackend(make_slide(path, noise(2603, 3005), 0.25, levels=(1, 2)))
    assert not openslide.OpenSlide(path).level_downsamples[1].is_integer()
    width, height = backend.level_sizes[1]
    return backend, backend.read_level(1, 0, 0, width, height)


@pytest.mark.parametrize(
    ("compression", "tile"),
    [(None, 256), ("deflate", None), ("lzw", 128), ("zstd", 512), (None, None)],
)
def test_lossless_tiffs_are_read_exactly(
    make_slide: MakeSlide, tmp_path: Path, compression: str | None, tile: int | None
) -> None:
    pixels = noise(701, 903)
    path = make_slide(tmp_path / "a.tif", pixels, 0.5, compression=compression, tile=tile)
    with open_source(path) as slide:
        view = slide.at(0.5)
        np.testing.assert_array_equal(view.read((0, 0), view.shape), pixels)
        np.testing.assert_array_equal(view.read((100, 333), (301, 77)), pixels[100:401, 333:410])


@pytest.mark.parametrize("stored", ["RGB", "YCbCr", "contradiction"])
def test_jpeg_2000_is_read_in_the_colours_that_it_has(tmp_path: Path, stored: str) -> None:
    pixels = immunohistochemistry()[:480, :480]
    image = Image.fromarray(pixels)
    planes = np.asarray(image.convert("YCbCr") if stored == "YCbCr" else image)
    tiles = (
        imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(planes[y : y + 240, x : x + 240]),
            codecformat="j2k",
            mct=stored == "contradiction",  # the codec's own way from RGB, and back
        )
        for y in (0, 240)
        for x in (0, 240)
    )
    path = tmp_path / "a.svs"
    tifffile.imwrite(
        path,
        tiles,
        shape=pixels.shape,
        dtype=np.uint8,
        tile=(240, 240),
        photometric="rgb",
        compression=33005 if stored == "RGB" else 33003,  # Aperio's numbers of RGB and YCbCr
        metadata=None,
        description="Aperio Image Library v1.0\r\n480x480 [0,0 480x480]|AppMag = 20|MPP = 0.5",
    )
    with open_source(path) as slide:
        assert slide.backend == "tiffslide"
        found = slide.at(0.5).read((0, 0), (480, 480))
        said = "; ".join(slide.doubts)
    if stored == "contradiction":
        assert "as YCbCr, its tiles that they are RGB" in said
        np.testing.assert_array_equal(found, pixels)
        return
    assert said == ""
    with openslide.OpenSlide(path) as reference:
        expected = np.asarray(reference.read_region((0, 0), 0, (480, 480)))[..., :3]
    assert abs(found.astype(int) - expected).max() <= 1


def test_levels_in_sub_directories_are_found(tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.ome.tif", noise(700, 900)
    options = {"tile": (128, 128), "photometric": "rgb", "compression": "deflate"}
    with tifffile.TiffWriter(path) as file:
        resolution = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
        file.write(pixels, subifds=2, metadata={"axes": "YXS"}, **options, **resolution)
        file.write(pixels[::2, ::2], subfiletype=1, **options)
        file.write(pixels[::4, ::4], subfiletype=1, **options)
    with open_source(path) as slide:
        assert slide.level_downsamples == ((1, 1), (2, 2), (4, 4))
        np.testing.assert_array_equal(slide.at(2.0).read((0, 0), (175, 225)), pixels[::4, ::4])


def test_grey_is_shown_as_grey_and_transparent_as_white(tmp_path: Path) -> None:
    grey, path = noise(300, 400)[..., 0], tmp_path / "a.tif"
    tifffile.imwrite(path, grey, tile=(128, 128), photometric="minisblack")
    with open_source(path, mpp=1) as slide:
        np.testing.assert_array_equal(slide.at(1).read((0, 0), (300, 400))[..., 1], grey)
    rgba = np.dstack([noise(300, 400), np.full((300, 400), 255, np.uint8)])
    rgba[:100, :, 3] = 0
    rgba[100:200, :, 3] = 128
    tifffile.imwrite(path, rgba, tile=(128, 128), photometric="rgb", extrasamples=["unassalpha"])
    with open_source(path, mpp=1) as slide:
        found = slide.at(1).read((0, 0), (300, 400))
    assert (found[:100] == 255).all()
    half = rgba[100:200, :, :3] * (128 / 255) + 255 * (127 / 255)
    assert abs(found[100:200] - half).max() <= 1
    np.testing.assert_array_equal(found[200:], rgba[200:, :, :3])


@pytest.mark.parametrize("tile", [(128, 128), None])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_fourth_sample_is_alpha_only_where_the_file_says_so(
    tmp_path: Path, tile: tuple[int, int] | None, value: int
) -> None:
    pixels, path = noise(300, 400), tmp_path / "a.tif"
    fourth = np.full((300, 400, 1), value, np.uint8)
    stored = np.round(pixels * (value / 255)).astype(np.uint8)  # multiplied already
    for kind, colours in (("assocalpha", stored), ("unassalpha", pixels), ("unspecified", pixels)):
        tifffile.imwrite(
            path,
            np.dstack([colours, fourth]),
            tile=tile,
            photometric="rgb",
            extrasamples=[kind],
            metadata=None,
        )
        with open_source(path, mpp=1) as slide:
            found = slide.at(1).read((0, 0), (300, 400))
            said = "; ".join(slide.doubts)
        if kind == "unspecified":
            assert "fourth sample" in said
            np.testing.assert_array_equal(found, pixels)
        else:
            assert said == ""
            assert abs(found - (pixels * (value / 255) + 255 - value)).max() <= 1.01


def test_tiles_that_were_left_out_are_white(tmp_path: Path) -> None:
    path, pixels = tmp_path / "sparse.tif", noise(512, 512)
    tiles = [pixels[:256, :256].tobytes(), b"", b"", pixels[256:, 256:].tobytes()]
    tifffile.imwrite(
        path, iter(tiles), shape=(512, 512, 3), dtype=np.uint8, tile=(256, 256), photometric="rgb"
    )
    expected = pixels.copy()
    expected[:256, 256:] = expected[256:, :256] = 255
    with open_source(path, mpp=1) as slide:
        np.testing.assert_array_equal(slide.at(1).read((0, 0), (512, 512)), expected)
    reference = OpenSlideBackend(path)
    np.testing.assert_array_equal(reference.read_level(0, 0, 0, 512, 512), expected)
    reference.close()


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_tiff_is_read_as_stored_and_said_to_be_turned(
    data_dir: Path, orientation: int
) -> None:
    path = data_dir / "wsi" / "large_image" / f"test_orient{orientation}.tif"
    with open_source(path, mpp=1) as slide:
        assert slide.size == (120, 180)
        found = slide.at(1).read((0, 0), (180, 120))
        assert f"Orientation tag of {orientation}" in slide.doubts[0]
    np.testing.assert_array_equal(found[..., 0], tifffile.imread(path, key=0))


GREY = {"photometric": "minisblack", "planarconfig": "contig"}
NOT_READ: dict[str, tuple[Pixels | npt.NDArray[np.uint16], dict[str, Any], str]] = {
    "16 bit": (noise(300, 400) * np.uint16(257), {}, "3 samples of uint16, RGB"),
    "stack": (np.stack([noise(300, 400)] * 3), {}, r"3 planes \(axes IYXS\)"),
    "grey and alpha": (noise(300, 400)[..., :2], GREY, "2 samples of uint8, MINISBLACK"),
    "three of grey": (noise(300, 400), GREY, "3 samples of uint8, MINISBLACK"),
    "four of grey": (noise(300, 400).repeat(2, -1)[..., :4], GREY, "4 samples of uint8, MINISB"),
    "palette": (
        noise(300, 400)[..., 0],
        {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
        "1 sample of uint8, PALETTE",
    ),
    "CMYK": (noise(300, 400).repeat(2, -1)[..., :4], {"photometric": "separated"}, "SEPARATED"),
}


@pytest.mark.parametrize("tile", [(128, 128), None])
@pytest.mark.parametrize("name", NOT_READ)
def test_pixels_that_are_not_8_bit_rgb_are_refused(
    tmp_path: Path, name: str, tile: tuple[int, int] | None
) -> None:
    path, (pixels, options, said) = tmp_path / "a.tif", NOT_READ[name]
    options = {"photometric": "rgb", **options}
    tifffile.imwrite(path, pixels, tile=tile, metadata=None, **options)
    with pytest.raises(SourceError, match=f"a.tif: .*{said}.*; expected (one of )?8-bit RGB"):
        open_source(path, mpp=1)


def test_a_stack_in_colours_is_refused_and_no_plane_of_it_shown(
    data_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "ZYXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    planes = np.stack([noise(300, 400)] * 3)
    tifffile.imwrite(path, planes, tile=(128, 128), photometric="rgb", metadata=metadata)
    with pytest.raises(SourceError, match="3 planes"):
        open_source(path)
    with pytest.raises(SourceError, match="2 focal planes"):
        open_source(data_dir / "faults" / "two_focal_planes.svs")


def test_grey_and_colours_stored_in_other_ways_are_left_to_openslide(tmp_path: Path) -> None:
    grey, path = noise(300, 400)[..., 0], tmp_path / "a.ome.tif"
    metadata = {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}
    tifffile.imwrite(
        path, 255 - grey, tile=(128, 128), photometric="miniswhite", ome=True, metadata=metadata
    )
    with open_source(path) as slide:
        assert slide.backend == "openslide"
        assert slide.mpp == (0.5, 0.25)
        assert slide.mpp_source == "OME-XML"
        found = slide.pixels.read_level(0, 0, 0, 400, 300)
    np.testing.assert_array_equal(found, grey[..., None].repeat(3, axis=-1))


def test_names_with_blanks_and_other_alphabets(slide_path: Path, tmp_path: Path) -> None:
    path = shutil.copy(slide_path, tmp_path / "Schnitt № 7 – größer 切片.tif")
    with open_source(path) as slide:
        assert slide.size == (1931, 1487)


def test_bounds_of_a_real_mrxs(data_dir: Path) -> None:
    path = data_dir / "wsi" / "mrxs_partial" / "Mirax2-Fluorescence-2.mrxs"
    with open_source(path) as slide:
        assert slide.backend == "openslide"
        assert slide.bounds == Region(x=9153, y=102664, width=10439, height=7641)
        # level 2 and coarser are there, the files of levels 0 and 1 are not
        view = slide.at(0.3225 * 8)
        origin = (102664 // 8, 9153 // 8)
        whole = view.read(origin, (955, 1304))
        assert len(np.unique(whole)) > 20
        np.testing.assert_array_equal(
            view.read((origin[0] + 111, origin[1] + 222), (333, 444)), whole[111:444, 222:666]
        )
        with pytest.raises(SourceError, match=r"level 0 cannot be read at x 9\d+") as error:
            slide.at(0.3225).read((103000, 9200), (256, 256))
        assert "\n" not in str(error.value)
        np.testing.assert_array_equal(view.read(origin, (100, 100)), whole[:100, :100])


@pytest.mark.parametrize("missing", ["x", "y", "width", "height"])
@pytest.mark.parametrize("value", [None, "12.5", ""])
def test_bounds_need_four_integers(missing: str, value: str | None) -> None:
    slide = array_slide(noise(10, 10))
    properties = {f"openslide.bounds-{n}": str(i) for i, n in enumerate("xy", 3)}
    properties |= {"openslide.bounds-width": "5", "openslide.bounds-height": "6"}
    slide.pixels.properties = properties
    assert slide.bounds == Region(x=3, y=4, width=5, height=6)
    properties.pop(f"openslide.bounds-{missing}")
    if value is not None:
        properties[f"openslide.bounds-{missing}"] = value
    assert slide.bounds is None


# --- µm per pixel ------------------------------------------------------------------------------


def tags(x: float, y: float, unit: str = "centimeter") -> dict[str, str]:
    return {"tiff.XResolution": str(x), "tiff.YResolution": str(y), "tiff.ResolutionUnit": unit}


@pytest.mark.parametrize(
    ("properties", "mpp", "source"),
    [
        (tags(40000, 20000), (0.25, 0.5), "TIFF resolution tags"),
        (tags(50800, 50800, "inch"), (0.5, 0.5), "TIFF resolution tags"),
        ({"aperio.MPP": "0.4990"} | tags(40000, 40000), (0.499, 0.499), "aperio.MPP"),
        (
            {"openslide.vendor": "mirax", "openslide.mpp-x": "0.3", "openslide.mpp-y": "0.31"},
            (0.3, 0.31),
            "openslide.mpp",
        ),
        ({"aperio.MPP": "0"} | tags(40000, 40000), (0.25, 0.25), "TIFF resolution tags"),
    ],
)
def test_mpp_is_taken_from_the_best_source(
    properties: dict[str, str], mpp: tuple[float, float], source: str
) -> None:
    best = best_mpp(read_mpp(properties))
    assert best is not None
    assert best.mpp == pytest.approx(mpp)
    assert best.source == source


@pytest.mark.parametrize("dpi", [72, 96, 150, 300, 600])
@pytest.mark.parametrize("unit", ["inch", "centimeter"])
def test_resolutions_that_programs_invent_are_not_believed(dpi: int, unit: str) -> None:
    value = dpi if unit == "inch" else dpi / 2.54
    readings = read_mpp(tags(value, value, unit))
    assert best_mpp(readings) is None
    assert readings[0].doubt


@pytest.mark.parametrize(
    "properties",
    [
        {},
        tags(0, 0),
        tags(math.nan, 1),
        tags(1e9, 1e9),
        tags(4, 4, "none"),
        {"aperio.MPP": "much"},
        {"aperio.MPP": "-0.5"},
        {"openslide.vendor": "generic-tiff", "openslide.mpp-x": "352", "openslide.mpp-y": "352"},
    ],
)
def test_nothing_is_made_of_senseless_readings(properties: dict[str, str]) -> None:
    assert best_mpp(read_mpp(properties)) is None


def test_sources_that_contradict_each_other_are_found() -> None:
    readings = read_mpp({"aperio.MPP": "0.5"} | tags(40000, 40000))
    assert [r.source for r in contradictions(readings, (0.5, 0.5))] == ["TIFF resolution tags"]
    assert contradictions(read_mpp({"aperio.MPP": "0.25"} | tags(40100, 40000)), (0.25, 0.25)) == []


def test_what_is_doubtful_is_said_in_a_sentence_each() -> None:
    readings = read_mpp({"aperio.MPP": "0.5"} | tags(40000, 40000))
    (said,) = doubts(readings, (0.5, 0.5), "aperio.MPP")
    assert "aperio.MPP says 0.5 × 0.5 µm per pixel, TIFF resolution tags 0.25 × 0.25" in said
    assert doubts(readings, (0.3, 0.3), "--mpp") == []  # the user has decided
    readings = read_mpp(tags(40000, 20000))
    (said,) = doubts(readings, (0.25, 0.5), "TIFF resolution tags")
    assert "not square" in said
    assert doubts(read_mpp(tags(40000, 40100)), (0.25, 0.2494), "TIFF resolution tags") == []


@pytest.mark.parametrize(
    ("attributes", "mpp"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.5"', (0.25, 0.5)),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.25"', (0.25, 0.25)),
        ('PhysicalSizeX="2.5e-4" PhysicalSizeXUnit="mm" PhysicalSizeY="0.25"', (0.25, 0.25)),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1"', None),
        ('PhysicalSizeX="0" PhysicalSizeY="1"', None),
        ("", None),
    ],
)
def test_ome_xml_says_how_large_a_pixel_is(
    attributes: str, mpp: tuple[float, float] | None
) -> None:
    start = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    xml = f"{start}<Image><Pixels {attributes}/></Image></OME>"
    best = best_mpp(read_mpp(ome_mpp(xml, ifd=0, size=(1, 1))))
    assert (best and best.mpp) == (mpp and pytest.approx(mpp))
    assert ome_mpp("<OME", ifd=0, size=(1, 1)) == {}


OWN, OTHER = "urn:uuid:00000000-0000-0000-0000-000000000001", "urn:uuid:2"
HERE = '<TiffData IFD="0" PlaneCount="1"/>'
ELSEWHERE = f'<TiffData IFD="0"><UUID FileName="b.ome.tif">{OTHER}</UUID></TiffData>'
RENAMED = f'<TiffData IFD="0"><UUID FileName="old.ome.tif">{OWN}</UUID></TiffData>'


def write_ome(
    path: Path, *images: tuple[tuple[int, int], float, str], unit: str = "µm", uuid: str = OWN
) -> Path:
    """Write 400 × 300 px and OME-XML of images: their size, µm per pixel, where they lie."""
    described = "".join(
        f'<Image ID="Image:{n}"><Pixels ID="Pixels:{n}" DimensionOrder="XYCZT" Type="uint8" '
        f'SizeX="{size[0]}" SizeY="{size[1]}" SizeZ="1" SizeC="3" SizeT="1" '
        f'PhysicalSizeX="{mpp}" PhysicalSizeXUnit="{unit}" PhysicalSizeY="{mpp}" '
        f'PhysicalSizeYUnit="{unit}"><Channel ID="Channel:{n}:0" SamplesPerPixel="3"/>{where}'
        "</Pixels></Image>"
        for n, (size, mpp, where) in enumerate(images)
    )
    start = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}">'
    tifffile.imwrite(
        path,
        noise(300, 400),
        tile=(128, 128),
        photometric="rgb",
        description=f"{start}{described}</OME>".encode(),
        metadata=None,
    )
    return path


SIZE = (400, 300)


@pytest.mark.parametrize(
    "images",
    [
        [(SIZE, 5, "<MetadataOnly/>"), (SIZE, 0.5, HERE)],
        [(SIZE, 5, ELSEWHERE), (SIZE, 0.5, HERE)],
        [(SIZE, 5, ELSEWHERE), (SIZE, 0.5, RENAMED)],
        [(SIZE, 5, '<TiffData IFD="1"/>'), (SIZE, 0.5, HERE)],
        [(SIZE, 0.5, HERE), (SIZE, 5, '<TiffData IFD="1"/>')],
        [((40, 30), 5, "<TiffData/>"), (SIZE, 0.5, "<TiffData/>")],
        [((40, 30), 5, ""), (SIZE, 0.5, "")],  # libvips does not say where
        [(SIZE, 0.5, "")],
    ],
)
def test_ome_xml_is_that_of_the_picture_whichever_place_it_has(
    tmp_path: Path, images: list[tuple[tuple[int, int], float, str]]
) -> None:
    with open_source(write_ome(tmp_path / "a.ome.tif", *images)) as slide:
        assert slide.mpp == (0.5, 0.5)
        assert slide.mpp_source == "OME-XML"


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([((800, 600), 0.5, HERE)], r"0.5 × 0.5, it describes 800 × 600 px, .* has 400 × 300"),
        ([(SIZE, 5, HERE), (SIZE, 0.5, HERE)], "2 of its images are said to be this picture"),
        ([(SIZE, 5, ELSEWHERE)], "how many µm a pixel has;"),
        ([(SIZE, 5, '<TiffData IFD="x"/>')], "how many µm a pixel has;"),
    ],
)
def test_ome_xml_of_another_picture_is_not_believed(
    tmp_path: Path, images: list[tuple[tuple[int, int], float, str]], said: str
) -> None:
    with pytest.raises(MissingMppError, match=said):
        open_source(write_ome(tmp_path / "a.ome.tif", *images))


# --- units -------------------------------------------------------------------------------------

UM_OF = {
    **{"um": 1, "micron": 1, "µm": 1, "\u03bcm": 1, "\\u00B5m": 1, "Âµm": 1, "microns": 1},
    **{"micrometer": 1, "Micrometre": 1, "nm": 1e-3, "nanometer": 1e-3, "pm": 1e-6, "Å": 1e-4},
    **{"angstrom": 1e-4, "mm": 1e3, "cm": 1e4, "centimeter": 1e4, "dm": 1e5, "m": 1e6, "km": 1e9},
    **{"Mm": 1e12, "in": 25400, "inch": 25400, "inches": 25400, "thou": 25.4, "pt": 25400 / 72},
    **{"ft": 304800, "foot": 304800, "yard": 914400, "mile": 1609.344e6},
}


@pytest.mark.parametrize("unit", UM_OF)
def test_a_pixel_is_as_large_in_every_unit(tmp_path: Path, unit: str) -> None:
    size = 0.5 / UM_OF[unit]
    with open_source(write_ome(tmp_path / "a.ome.tif", (SIZE, size, HERE), unit=unit)) as slide:
        assert slide.mpp == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("unit", [u for u, um in UM_OF.items() if 1e-3 <= um < 1e6])
def test_imagej_says_how_large_a_pixel_is(tmp_path: Path, unit: str) -> None:
    density = UM_OF[unit] / 0.5
    tifffile.imwrite(
        tmp_path / "a.tif",
        noise(300, 400),
        photometric="rgb",
        description=f"ImageJ=1.53a\nimages=1\nunit={unit}\nyunit=nm\n".encode(),
        resolution=(density, 1 / 250),
        resolutionunit="NONE",
        metadata=None,
    )
    with open_source(tmp_path / "a.tif") as slide:
        assert slide.mpp == pytest.approx((0.5, 0.25))
        assert slide.mpp_source == "ImageJ"


def test_what_imagej_keeps_of_other_programs_is_not_believed(tmp_path: Path) -> None:
    options = {"resolution": (1200, 1200), "resolutionunit": "INCH", "metadata": {"unit": "inch"}}
    tifffile.imwrite(tmp_path / "a.tif", noise(300, 400), imagej=True, **options)
    with pytest.raises(MissingMppError, match=r"ImageJ: 21\.1667 × 21\.1667, 1200 dpi is"):
        open_source(tmp_path / "a.tif")


def test_all_units_of_ome_are_known() -> None:
    no_lengths = {"pixel", "reference frame"}
    assert {u.value for u in UnitsLength if um_per(u.value) is None} == no_lengths


@pytest.mark.parametrize("unit", ["furlong", "pixel", ""])
def test_a_unit_that_is_not_known_is_named(tmp_path: Path, unit: str) -> None:
    path = write_ome(tmp_path / "a.ome.tif", (SIZE, 0.5, HERE), unit=unit)
    said = f'OME-XML: 0.5 × 0.5, in "{unit}"' if unit else "OME-XML: 0.5 × 0.5, without a unit"
    with pytest.raises(MissingMppError, match=said):
        open_source(path)


@pytest.mark.parametrize(("code", "density"), [(4, 2000), (5, 2), (2, 50800), (None, 50800)])
def test_resolution_tags_in_every_unit(
    tmp_path: Path, make_slide: MakeSlide, code: int | None, density: int
) -> None:
    path = make_slide(tmp_path / "a.tif", noise(300, 400), 0.25)
    with tifffile.TiffFile(path, mode="r+") as file:
        tags = file.pages.first.tags
        for axis in "XY":
            tags[f"{axis}Resolution"].overwrite((density, 1))
        if code is None:  # inch, as TIFF has it
            file.filehandle.seek(tags["ResolutionUnit"].offset)
            file.filehandle.write(struct.pack("<H", 65000))  # a tag that means nothing
        else:
            tags["ResolutionUnit"].overwrite(code)
    with open_source(path) as slide:
        assert slide.mpp == pytest.approx((0.5, 0.5))


def test_a_picture_says_how_large_a_pixel_is(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(30, 40)).save(path, dpi=(25400 / 0.5, 25400 / 0.5))
    with open_source(path) as slide:
        assert slide.mpp == pytest.approx((0.5, 0.5), rel=1e-4)
        assert slide.mpp_source == "the picture's dots per inch"
    Image.fromarray(noise(30, 40)).save(path, dpi=(72, 72))
    with pytest.raises(MissingMppError, match="72 dpi is what programs write"):
        open_source(path)


def test_a_slide_without_mpp_is_refused_in_one_sentence(
    make_slide: MakeSlide, tmp_path: Path
) -> None:
    path = make_slide(tmp_path / "a.tif", noise(300, 300), None)
    with pytest.raises(MissingMppError, match="--mpp") as error:
        open_source(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with open_source(path, mpp=0.4) as slide:
        assert slide.mpp == (0.4, 0.4)
        assert slide.mpp_source == "--mpp"


def test_an_explicit_mpp_wins(slide_path: Path) -> None:
    with open_source(slide_path) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.25))
        assert slide.mpp_source == "TIFF resolution tags"
    with open_source(slide_path, mpp=0.5) as slide:
        assert slide.mpp == (0.5, 0.5)
        assert slide.at(1.0).downsample == (2.0, 2.0)


# --- fingerprints ------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    with open_source(path) as slide:
        return slide.fingerprint


def test_a_fingerprint_knows_the_content_only(slide_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other name.tiff"
    shutil.copy(slide_path, copy)
    os.utime(copy, (1, 1))
    assert fingerprint(copy) == fingerprint(slide_path)
    assert len(fingerprint(copy)) == 64


@pytest.mark.parametrize("where", [0.5, 0.98])
def test_a_changed_byte_changes_the_fingerprint(
    slide_path: Path, tmp_path: Path, where: float
) -> None:
    data = bytearray(slide_path.read_bytes())
    data[int(len(data) * where)] ^= 1
    copy = tmp_path / "a.tif"
    copy.write_bytes(data)
    assert fingerprint(copy) != fingerprint(slide_path)


def test_files_beside_the_slide_take_part_in_the_fingerprint(
    data_dir: Path, tmp_path: Path
) -> None:
    source = data_dir / "wsi" / "mrxs_partial"
    shutil.copytree(source, tmp_path / "copy")
    path = tmp_path / "copy" / "Mirax2-Fluorescence-2.mrxs"
    before = fingerprint(source / path.name)
    assert fingerprint(path) == before
    (tmp_path / "copy" / "Mirax2-Fluorescence-2").chmod(0o755)
    (tmp_path / "copy" / "Mirax2-Fluorescence-2" / "run.json").write_bytes(b"of a run beside it")
    assert fingerprint(path) == before
    (tmp_path / "copy" / "Mirax2-Fluorescence-2" / "Data0005.dat").write_bytes(b"found again")
    assert fingerprint(path) != before


# --- what is refused ---------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(SourceError) as error:
        open_source(path, mpp=0.5)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message


def test_files_that_are_no_slides(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    assert "no such file" in refusal(path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    path.write_bytes(np.random.default_rng(3).bytes(5000))
    assert "not a slide" in refusal(path)
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "b.mrxs").write_bytes(b"\xff\xd8\xff\xe0")
    assert "its folder b is not there" in refusal(tmp_path / "b.mrxs")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_that_may_not_be_read(slide_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    shutil.copy(slide_path, path)
    path.chmod(0)
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_tiff_is_named_as_such(slide_path: Path, tmp_path: Path, part: float) -> None:
    data, path = slide_path.read_bytes(), tmp_path / "a.tif"
    path.write_bytes(data[: int(len(data) * part)])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("part", [0.001, 0.3, 0.5, 0.8, 0.95])
def test_a_truncated_svs_is_named_as_such(cmu_path: Path, tmp_path: Path, part: float) -> None:
    data, path = cmu_path.read_bytes(), tmp_path / "a.svs"
    path.write_bytes(data[: int(len(data) * part)])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("library", ["tiffslide", "openslide"])
def test_a_damaged_tile_is_named_and_the_rest_still_read(
    make_big_slide: MakeSlide, tmp_path: Path, library: str
) -> None:
    path = make_big_slide(tmp_path / "a.tif", (1500, 1100), levels=(1,))
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        offset, count = page.dataoffsets[8], page.databytecounts[8]  # tile (1, 2) of 6 columns
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    with open_source(path) as slide:
        if library == "openslide":
            slide.pixels.close()
            slide = replace(slide, pixels=OpenSlideBackend(path))
        view = slide.at(0.25)
        good = view.read((0, 0), (256, 1500))
        with pytest.raises(SourceError, match="level 0 cannot be read at x 500, y 250") as error:
            view.read((250, 500), (300, 300))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        np.testing.assert_array_equal(view.read((0, 0), (256, 1500)), good)
        slide.close()


@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX")
def test_a_flat_slide_has_its_thumbnail_in_little_memory(
    make_big_slide: MakeSlide, tmp_path: Path
) -> None:
    path = make_big_slide(tmp_path / "flat.tif", (12_288, 12_288), levels=(1,))  # 450 MB of RGB
    program = (
        "import sys\n"
        "from peak import peak_bytes\n"
        "from wsi_pipeline.sources import open_source\n"
        "slide = open_source(sys.argv[1])\n"
        "before = peak_bytes()\n"
        "slide.thumbnail(1024)\n"
        "print(peak_bytes() - before)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert int(ran.stdout) < 200e6


# --- stored patch grids ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid_path(slide_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the synthetic slide as a patch grid of 0.6 µm/px, whose ratio is not whole."""
    path = tmp_path_factory.mktemp("grid") / "slide.zarr"
    with open_source(slide_path) as slide:
        view = slide.at(0.6)
        grid = PatchGrid.cover(view.shape, (128, 128), (32, 32))
        thumbnail, downsample = slide.thumbnail(200)
        stored = StoredGrid(
            info=GridInfo(
                source_name=slide_path.name,
                fingerprint=slide.fingerprint,
                size=slide.size,
                mpp=slide.mpp,
                bounds=Region(x=1, y=2, width=300, height=400),
                grid_mpp=0.6,
                downsample=view.downsample,
                shape=view.shape,
                patch_size=(128, 128),
                stride=(96, 96),
            ),
            patches=grid.origins,
            tissue=np.ones(thumbnail.shape[:2], dtype=bool),
            thumbnail=thumbnail,
            tissue_downsample=downsample,
            pixels=None,
        )
        written = write_patch_grid(path, stored, with_pixels=True)
        assert written.pixels is not None
        written.pixels[:500] = view.read((0, 0), (500, view.shape[1]))
        write_patch_grid(path.with_name("empty.zarr"), stored, with_pixels=False)
    return path


def test_a_stored_grid_is_read_like_the_slide_it_came_from(
    grid_path: Path, slide_path: Path
) -> None:
    with open_source(grid_path) as stored, open_source(slide_path) as slide:
        assert stored.backend == "patch grid"
        assert (stored.size, stored.fingerprint) == (slide.size, slide.fingerprint)
        assert stored.mpp == slide.mpp
        assert stored.mpp_source == "patch-grid.mpp"
        assert stored.bounds == Region(x=1, y=2, width=300, height=400)
        view, original = stored.at(0.6), slide.at(0.6)
        assert (view.shape, view.downsample) == (original.shape, original.downsample)
        found = view.read((333, -20), (400, 500))
        np.testing.assert_array_equal(found[:167], original.read((333, -20), (167, 500)))
        assert (found[167:] == 255).all()  # nothing was stored there


def test_a_stored_grid_is_shrunk_but_never_blown_up(grid_path: Path) -> None:
    with open_source(grid_path) as stored:
        full = stored.at(0.6)
        half = stored.at(1.2)
        fy, fx = full.downsample
        assert half.downsample == (2 * fy, 2 * fx)
        pixels = full.read((0, 0), (200, 300)).reshape(100, 2, 150, 2, 3).mean(axis=(1, 3))
        assert abs(half.read((0, 0), (100, 150)) - pixels).max() <= 0.51
        with pytest.raises(SourceError, match=r"stored at 0\.6 µm/px.*--mpp 0\.5"):
            stored.at(0.5)
        thumbnail, downsample = stored.thumbnail(100)
        assert max(thumbnail.shape) <= 100
        assert downsample[0] * thumbnail.shape[0] >= stored.size[1]


def test_to_open_a_slide_needs_little_of_scipy(slide_path: Path) -> None:
    script = (
        "import sys; from wsi_pipeline.sources import open_source\n"
        f"open_source({str(slide_path)!r}, mpp=1).close()\n"
        "sys.exit(', '.join({'scipy.signal', 'scipy.ndimage', 'skimage'} & set(sys.modules)) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_a_part_is_found_again_as_by_scikit_image() -> None:
    picture = np.random.default_rng(0).random((90, 77)) * 255
    for part in (picture[20:70, 11:60], picture[3:30, 40:77] * 0.5 + 9):
        found = levels._match(picture, part)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, match_template(picture, part), atol=1e-12)


def test_a_grid_without_pixels_is_no_source(grid_path: Path) -> None:
    assert "without pixels" in refusal(grid_path.with_name("empty.zarr"))


def test_a_damaged_grid_is_refused(grid_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(grid_path, copy)
    shutil.rmtree(copy / "patches")
    refusal(copy)
    shutil.copytree(grid_path / "patches", copy / "patches")
    chunk = next(path for path in (copy / "pixels" / "c").rglob("0") if path.is_file())
    chunk.write_bytes(b"no chunk")
    with (
        open_source(copy) as stored,
        pytest.raises(SourceError, match="cannot be read at") as error,
    ):
        stored.at(0.6).read((0, 0), (100, 100))
    assert "\n" not in str(error.value)
