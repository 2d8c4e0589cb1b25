"""How a slide looks at one resolution: one global phase, whatever way it is cut."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image

from wsi_pipeline.errors import SourceError
from wsi_pipeline.geometry import Region
from wsi_pipeline.sources.base import MAX_PIECE, WHITE, Pixels, part_of, tiles_touching
from wsi_pipeline.sources.levels import Levels

logger = logging.getLogger(__name__)

Lost = dict[Region, None]
"""Stored tiles that cannot be read, each once, in the order in which they were met."""
STEPS = 4096
"""Other ratios are multiples of 1/4096, and levels are read in pieces of at most 4,096 px.

So every coordinate fits the 24 bits that Pillow's `resize` computes with: it is exact, and the same
pixel comes out whatever piece it was computed in.
"""
BLURRED = 4
"""A tile that cannot be read is taken from a level up to this much coarser than the view."""
SHIFT = 0.1
"""Pixels by which one computed from another level may be out of place."""
FINEST = 1 / 64
"""No view is finer than this many level pixels per pixel."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideView:
    """A slide at one resolution, computed where it is read.

    Pixel (i, j) covers level-0 pixels [i·fy, (i+1)·fy) × [j·fx, (j+1)·fx), origins at the top left.

    Attributes:
        shape: (height, width) in pixels of the view; the last row and column may cover the edge.
        downsample: (fy, fx) level-0 pixels per pixel of the view, exact.
        ratio: (y, x) pixels of that level per pixel of the view: whole, or a multiple of 1/4096.
    """

    shape: tuple[int, int]
    downsample: tuple[float, float]
    level: int
    ratio: tuple[float, float]
    backend: Levels

    def read(
        self, origin: tuple[int, int], shape: tuple[int, int], *, bad: list[Region] | None = None
    ) -> Pixels:
        """Read a rectangle; return uint8 (h, w, 3), white outside the slide.

        Several threads may read at once. Memory is bounded by the result and about 50 MB.

        Args:
            origin: (y, x) of the first pixel in the view; may lie outside.
            shape: (h, w) in pixels of the view.
            bad: Takes the stored tiles that cannot be read, in level-0 pixels, each whole and each
                once. They are computed from another level where one is fine enough and can be read
                there; the others are added to this list and white in the result. None = raise.

        Raises:
            SourceError: the file cannot be read there, and `bad` is None.
        """
        # Stored pixels need no more room than the result.
        steps = (sys.maxsize if self.ratio == (1.0, 1.0) else _step(ratio) for ratio in self.ratio)
        axes = zip(origin, shape, self.shape, steps, strict=True)
        rows, columns = (list(_pieces(a, a + length, full, step)) for a, length, full, step in axes)
        pieces = [(y0, x0, y1, x1) for y0, y1 in rows for x0, x1 in columns]
        y, x = origin
        # A list of many is slow to search.
        lost = None if bad is None else dict.fromkeys(bad)
        if pieces == [(y, x, y + shape[0], x + shape[1])]:
            pixels = np.require(self._compute(*pieces[0], lost), requirements=["C", "W"])
        else:
            pixels = np.full((*shape, 3), WHITE, dtype=np.uint8)
            for y0, x0, y1, x1 in pieces:
                pixels[y0 - y : y1 - y, x0 - x : x1 - x] = self._compute(y0, x0, y1, x1, lost)
        if bad is not None:
            bad[:] = lost or ()
        return pixels

    def _compute(self, y0: int, x0: int, y1: int, x1: int, bad: Lost | None) -> Pixels:
        """Return the pixels [y0, y1) × [x0, x1), which lie inside the view."""
        ry, rx = self.ratio
        if ry.is_integer() and rx.is_integer():
            ny, nx = int(ry), int(rx)
            stored = self._read_level(y0 * ny, x0 * nx, y1 * ny, x1 * nx, bad)
            if (ny, nx) == (1, 1):
                return stored
            return np.asarray(Image.fromarray(stored).reduce((nx, ny)))
        # Pillow's filter reaches over the box into the margin, so that a cut leaves no trace.
        my, mx = _margin(ry), _margin(rx)
        top, left = math.floor(y0 * ry) - my, math.floor(x0 * rx) - mx
        bottom, right = math.ceil(y1 * ry) + my, math.ceil(x1 * rx) + mx
        image = Image.fromarray(self._read_level(top, left, bottom, right, bad))
        # Left to itself Pillow orders the axes by the shape of the piece, and each pass rounds.
        bilinear = Image.Resampling.BILINEAR
        columns = (x0 * rx - left, 0, x1 * rx - left, image.height)
        image = image.resize((x1 - x0, image.height), bilinear, box=columns)
        rows = (0, y0 * ry - top, image.width, y1 * ry - top)
        return np.asarray(image.resize((image.width, y1 - y0), bilinear, box=rows))

    def _read_level(self, top: int, left: int, bottom: int, right: int, bad: Lost | None) -> Pixels:
        """Return a rectangle of the level, its last pixels repeated beyond its edges."""
        width, height = self.backend.level_sizes[self.level]
        y0, y1 = _clip(top, bottom, height)
        x0, x1 = _clip(left, right, width)
        pixels = self._read_stored(y0, x0, y1, x1, bad)
        before = max(0, y0 - top), max(0, x0 - left)
        after = bottom - top - before[0] - (y1 - y0), right - left - before[1] - (x1 - x0)
        if not any((*before, *after)):
            return pixels
        return np.pad(pixels, ((before[0], after[0]), (before[1], after[1]), (0, 0)), mode="edge")

    def _read_stored(self, y0: int, x0: int, y1: int, x1: int, bad: Lost | None) -> Pixels:
        """Return a rectangle that lies inside the level."""
        try:
            pixels = self.backend.read_level(self.level, x0, y0, x1 - x0, y1 - y0)
            return self._with_gaps_filled(y0, x0, pixels)
        except SourceError as error:
            if bad is None:
                raise
            logger.debug("%s; reading tile by tile", error)
        pixels = np.empty((y1 - y0, x1 - x0, 3), dtype=np.uint8)
        corner, size, stored = (x0, y0), (x1 - x0, y1 - y0), self.backend.level_tiles[self.level]
        for left, top in tiles_touching(*corner, *size, stored):
            target = part_of(pixels, corner, (left, top), stored)
            y, x = max(top, y0), max(left, x0)
            try:
                part = self.backend.read_level(self.level, x, y, *target.shape[1::-1])
                target[:] = self._with_gaps_filled(y, x, part)
            except SourceError as error:
                logger.info("%s", error)
                tile = self._tile_from_others(top, left)
                if tile is not None:
                    target[:] = part_of(tile, (left, top), corner, size)
                    continue
                target[:] = WHITE
                bad.setdefault(self._tile_region(top, left))
        return pixels

    def _with_gaps_filled(self, y: int, x: int, pixels: Pixels) -> Pixels:
        """Return pixels read at (y, x) of the level, with what it lacks taken from finer ones."""
        for left, top in self.backend.gaps(self.level, x, y, pixels):
            if not pixels.flags["W"]:
                pixels = pixels.copy()
            target = part_of(pixels, (x, y), (left, top), self._tile_size(top, left)[::-1])
            finer = next(self._same_from(self.backend.finer(self.level)), None)
            if finer is not None:
                target[:] = finer.read((max(top, y), max(left, x)), target.shape[:2])
        return pixels

    def _tile_size(self, top: int, left: int) -> tuple[int, int]:
        """Return (height, width) of a stored tile, cut off at the edges of the level."""
        width, height = self.backend.level_tiles[self.level]
        full_width, full_height = self.backend.level_sizes[self.level]
        return min(height, full_height - top), min(width, full_width - left)

    def _tile_region(self, top: int, left: int) -> Region:
        """Return where a stored tile lies, in level-0 pixels."""
        height, width = self._tile_size(top, left)
        dx, dy = self.backend.level_downsamples[self.level]
        x, y = math.floor(left * dx), math.floor(top * dy)
        right, bottom = math.ceil((left + width) * dx), math.ceil((top + height) * dy)
        full_width, full_height = self.backend.size
        return Region(
            x=x, y=y, width=min(right, full_width) - x, height=min(bottom, full_height) - y
        )

    def _tile_from_others(self, top: int, left: int) -> Pixels | None:
        """Return a stored tile as another level shows it, None where none can."""
        size = self._tile_size(top, left)
        if math.prod(size) * 3 > MAX_PIECE:
            return None
        downsamples = self.backend.level_downsamples
        own = downsamples[self.level][0]
        limit = max(BLURRED * max(self.downsample), own)
        coarser = [n for n, d in enumerate(downsamples) if own < d[0] and max(d) <= limit]
        coarser.sort(key=lambda n: downsamples[n][0])
        # Finer levels hold all that this one holds; of both kinds the nearest is the best.
        for view in self._same_from([*self.backend.finer(self.level), *coarser]):
            with suppress(SourceError):
                return view.read((top, left), size)
        return None

    def _same_from(self, levels: Iterable[int]) -> Iterator[SlideView]:
        """Yield views that show this one's level by computing it from others, in their order."""
        width, height = self.backend.level_sizes[self.level]
        for level in filter(self.backend.check, levels):
            own_x, own_y = self.backend.level_downsamples[self.level]
            dx, dy = self.backend.level_downsamples[level]
            ratio = (ratio_of(own_y / dy, 0), ratio_of(own_x / dx, 0))
            # Across the whole level no pixel may be a part of one out of place.
            shifts = abs(ratio[0] * dy / own_y - 1) * height, abs(ratio[1] * dx / own_x - 1) * width
            if min(ratio) >= FINEST and max(shifts) < SHIFT:
                yield SlideView(
                    shape=(height, width),
                    downsample=(own_y, own_x),
                    level=level,
                    ratio=ratio,
                    backend=self.backend,
                )


def _step(ratio: float) -> int:
    """Return how many pixels of a view fit a piece of the level."""
    if ratio.is_integer():
        return max(1, STEPS // int(ratio))
    return min(STEPS, int((STEPS - 2 * _margin(ratio) - 2) / ratio))


def _margin(ratio: float) -> int:
    """Return how many pixels of the level Pillow's bilinear filter may want beyond a box."""
    return math.ceil(max(ratio, 1)) + 1


def _pieces(start: int, stop: int, length: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of [start, stop) inside [0, length), cut at the multiples of `step`.

    Example:
        >>> list(_pieces(-3, 9, 8, 4))
        [(0, 4), (4, 8)]
    """
    start, stop = max(start, 0), min(stop, length)
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        yield start, end
        start = end


def _clip(start: int, stop: int, length: int) -> tuple[int, int]:
    """Return the part of [start, stop) inside [0, length), or the pixel nearest to it.

    Example:
        >>> _clip(-2, 5, 4), _clip(4, 6, 4)
        ((0, 4), (3, 4))
    """
    first = min(max(start, 0), length - 1)
    return first, max(min(stop, length), first + 1)


def ratio_of(exact: float, tolerance: float) -> float:
    """Return a whole ratio within `tolerance` of the exact one, else a multiple of 1/4096.

    Example:
        >>> ratio_of(2.0004, 0.001), ratio_of(2.06, 0.001), ratio_of(2.03, 0.02)
        (2.0, 2.06005859375, 2.0)
    """
    whole = round(exact)
    if whole >= 1 and abs(exact / whole - 1) <= tolerance:
        return float(whole)
    return round(exact * STEPS) / STEPS
