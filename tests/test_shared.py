"""A slide that several read side by side: the same pixels as from the file, each tile once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from test_sources_broken import destroy

from wsi_pipeline.sources import open_source, shared
from wsi_pipeline.sources.base import tiles_touching
from wsi_pipeline.sources.shared import open_shared


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int, int]]:
    """Return how often each tile is decoded for those who share a slide, as they do so."""
    counts: Counter[tuple[int, int, int]] = Counter()

    def counting(*args: object, **options: object) -> object:
        slide = open_source(*args, **options)
        read, tiles = slide.pixels.read_level, slide.pixels.level_tiles

        def read_level(level: int, *box: int) -> npt.NDArray[np.uint8]:
            counts.update((level, *place) for place in tiles_touching(*box, tiles[level]))
            return read(level, *box)

        slide.pixels.read_level = read_level
        return replace(slide, pixels=slide.pixels)

    monkeypatch.setattr(shared, "open_source", counting)
    return counts


def boxes(slide_size: tuple[int, int], count: int) -> npt.NDArray[np.int64]:
    """Return (n, 4) x, y, width and height of boxes inside a slide, some at its edges."""
    rng = np.random.default_rng(0)
    corner = rng.integers(0, slide_size, (count, 2))
    size = np.minimum(rng.integers(1, 700, (count, 2)), slide_size - corner)
    return np.concatenate([corner, size], axis=1)


def test_every_pixel_is_the_files_and_each_tile_is_decoded_once(
    slide_path: Path, slide_pixels: npt.NDArray[np.uint8], decoded: Counter[tuple[int, int, int]]
) -> None:
    with (
        open_shared(slide_path, mpp=None, series=None, icc="ignore") as one,
        open_shared(slide_path, mpp=None, series=None, icc="ignore") as other,
        ThreadPoolExecutor(4) as pool,
    ):
        assert one.pixels is other.pixels
        decoded.clear()

        def check(box: npt.NDArray[np.int64]) -> bool:
            x, y, width, height = box.tolist()
            slide = one if x % 2 else other
            pixels = slide.pixels.read_level(0, x, y, width, height)
            return np.array_equal(pixels, slide_pixels[y : y + height, x : x + width])

        assert all(pool.map(check, boxes(one.size, 60)))
        assert one.pixels.read_level(0, 0, 0, *one.size).shape == slide_pixels.shape
    assert set(decoded.values()) == {1}


def test_no_more_is_kept_than_may_be(
    slide_path: Path,
    slide_pixels: npt.NDArray[np.uint8],
    decoded: Counter[tuple[int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tile = 3 * 256**2
    monkeypatch.setattr(shared, "KEPT_BYTES", 4 * tile)
    with open_shared(slide_path, mpp=None, series=None, icc="ignore") as slide:
        decoded.clear()
        for row in (0, 0, 256, 0):
            pixels = slide.pixels.read_level(0, 0, row, 1024, 256)
            np.testing.assert_array_equal(pixels, slide_pixels[row : row + 256, :1024])
    # The second row of tiles has pushed out the first.
    assert [decoded[0, 0, row] for row in (0, 256)] == [2, 1]


def test_it_is_closed_with_the_last_who_reads_it(slide_path: Path) -> None:
    one, other = (open_shared(slide_path, mpp=None, series=None, icc="ignore") for _ in range(2))
    one.close()
    assert other.pixels.read_level(0, 0, 0, 5, 5).shape == (5, 5, 3)
    other.close()
    with open_shared(slide_path, mpp=None, series=None, icc="ignore") as third:
        assert third.pixels is not one.pixels


def test_a_bad_tile_costs_no_other(make_big_slide: Callable[..., Path], tmp_path: Path) -> None:
    path = make_big_slide(tmp_path / "slide.tif", (1500, 1100), 0.5, levels=(1,))
    destroy(path, [2])
    with (
        open_source(path) as slide,
        open_shared(path, mpp=None, series=None, icc="ignore") as again,
    ):
        for view in (slide.at(0.5), again.at(0.5)):
            bad = []
            pixels = view.read((0, 0), view.shape, bad=bad)
            if view.backend is slide.levels:
                expected, lost = pixels, bad
        np.testing.assert_array_equal(pixels, expected)
        assert bad == lost
        assert len(bad) == 1
