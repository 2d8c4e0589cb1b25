"""A slide, and how it looks at any resolution: one global phase, whatever way it is cut."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from wsi_pipeline.errors import SourceError
from wsi_pipeline.geometry import Region
from wsi_pipeline.sources.base import (
    MAX_PIECE,
    WHITE,
    Backend,
    Downsamples,
    Pixels,
    Sizes,
    part_of,
    tiles_touching,
)
from wsi_pipeline.sources.levels import Levels

logger = logging.getLogger(__name__)

Lost = dict[Region, None]
"""Stored tiles that cannot be read, each once, in the order in which they were met."""
WHOLE_TOLERANCE = 1e-3
"""A ratio this close to a whole number is taken as whole: µm per pixel are not known better."""
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
        level: Number of the stored level that it is computed from.
        ratio: (y, x) pixels of that level per pixel of the view: whole, or a multiple of 1/4096.
        backend: Reader of the levels.
    """

    shape: tuple[int, int]
    downsample: tuple[float, float]
    level: int
    ratio: tuple[float, float]
    backend: Levels

    def read(
        self,
        origin: tuple[int, int],
        shape: tuple[int, int],
        *,
        bad: list[Region] | None = None,
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
        # one axis after the other: left to itself Pillow orders them by the shape of the piece,
        # and each pass rounds
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
        """Return pixels read at (y, x) of the level, tiles that it lacks computed from finer ones.

        Raises:
            SourceError: a finer level has them, and cannot be read there.
        """
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
            ratio = (_ratio(own_y / dy, 0), _ratio(own_x / dx, 0))
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Slide:
    """An opened slide; close it, or use it in a `with`.

    Attributes:
        mpp: (x, y) µm per level-0 pixel.
        mpp_source: Name of what says so.
        fingerprint: Hex digest of the content, whatever the file's name and date.
        first_doubts: Those of `doubts` that were known when it was opened.
        stored_mpp: µm per stored pixel where the source is a patch grid, which knows no finer one.
        pixels: Reader of the file.
        levels: The same, as far as its levels show what they should.
    """

    path: Path
    mpp: tuple[float, float]
    mpp_source: str
    fingerprint: str
    first_doubts: tuple[str, ...] = ()
    stored_mpp: float | None = None
    pixels: Backend
    levels: Levels = field(init=False)

    def __post_init__(self) -> None:
        """Look at the levels whose size does not tell how coarse they are."""
        object.__setattr__(self, "levels", Levels(self.pixels))

    @property
    def doubts(self) -> tuple[str, ...]:
        """Return sentences on what makes its µm per pixel, its picture or its levels doubtful.

        There may be more once a level has been used.
        """
        return (*self.first_doubts, *self.levels.doubts)

    @property
    def backend(self) -> str:
        """Return the name of the library that reads the file."""
        return self.pixels.name

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) of level 0."""
        return self.pixels.size

    @property
    def level_sizes(self) -> Sizes:
        """Return (width, height) of each stored level that shows the slide."""
        return tuple(self.levels.level_sizes[n] for n in self.levels.usable())

    @property
    def level_downsamples(self) -> Downsamples:
        """Return (x, y) level-0 pixels per pixel of each stored level that shows the slide."""
        return tuple(self.levels.level_downsamples[n] for n in self.levels.usable())

    @property
    def properties(self) -> Mapping[str, str]:
        """Return what the file says about itself, in the libraries' words."""
        return self.pixels.properties

    @property
    def bounds(self) -> Region | None:
        """Return the scanned part in level-0 pixels, where the file gives all of it as integers."""
        names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
        try:
            x, y, width, height = (int(self.properties[name]) for name in names)
        except (KeyError, ValueError):
            return None
        return Region(x=x, y=y, width=width, height=height)

    def at(self, mpp: float, *, tolerance: float = 0.0) -> SlideView:
        """Look at the slide at a resolution; return the view.

        It is computed from the coarsest stored level that is fine enough: by the mean of n × n
        pixels where the ratio to that level is whole or nearly so, else by a triangle filter.

        Args:
            mpp: µm per pixel, along both axes.
            tolerance: Relative deviation from `mpp` up to which a whole ratio is preferred.

        Raises:
            SourceError: a patch grid that was stored coarser than `mpp`.
        """
        if not 0 < mpp < math.inf:
            raise ValueError(f"mpp is {mpp}; expected µm per pixel above 0")
        tolerance = max(tolerance, WHOLE_TOLERANCE)
        # (y, x), as arrays are.
        wanted = (mpp / self.mpp[1], mpp / self.mpp[0])
        level = self._level_for(wanted, tolerance)
        dx, dy = self.levels.level_downsamples[level]
        if self.stored_mpp is not None and math.isclose(mpp, self.stored_mpp, rel_tol=1e-6):
            ratio = (1.0, 1.0)
        else:
            ratio = (_ratio(wanted[0] / dy, tolerance), _ratio(wanted[1] / dx, tolerance))
        if self.stored_mpp is not None and min(ratio) < 1:
            raise SourceError(
                f"{self.path}: stored at {self.stored_mpp:g} µm/px, {mpp:g} is asked for; "
                f"tile the slide again with --mpp {mpp:g}"
            )
        if min(ratio) < FINEST:
            raise SourceError(
                f"{self.path}: {mpp:g} µm/px is far finer than its {self.mpp[0]:g} µm/px"
            )
        return self._view(level, ratio)

    def read(self, region: Region, mpp: float, *, bad: list[Region] | None = None) -> Pixels:
        """Read a region at a resolution; return uint8 (h, w, 3), the whole pixels that cover it.

        The region may lie outside. `bad` is that of `SlideView.read`.
        """
        view = self.at(mpp)
        fy, fx = view.downsample
        y0, x0 = math.floor(region.y / fy), math.floor(region.x / fx)
        y1 = math.ceil((region.y + region.height) / fy)
        x1 = math.ceil((region.x + region.width) / fx)
        return view.read((y0, x0), (y1 - y0, x1 - x0), bad=bad)

    def thumbnail(self, max_side: int) -> tuple[Pixels, tuple[float, float]]:
        """Shrink the slide; return uint8 (h, w, 3), and (fy, fx) level-0 pixels per pixel of it.

        Neither side exceeds `max_side` px. Stored tiles that cannot be read are taken from another
        level, or white.

        Raises:
            SourceError: half of the slide or more cannot be read.
        """
        factor = max(self.size) / max_side
        level = self._level_for((factor, factor), 0.0)
        whole = max(1, math.ceil(factor / min(self.levels.level_downsamples[level])))
        view = self._view(level, (float(whole), float(whole)))
        bad: list[Region] = []
        pixels = view.read((0, 0), view.shape, bad=bad)
        if 2 * sum(part.width * part.height for part in bad) >= math.prod(self.size):
            # Without a list of bad tiles it says why.
            view.read((0, 0), view.shape)
        return pixels, view.downsample

    def close(self) -> None:
        """Give the file back."""
        self.pixels.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _level_for(self, wanted: tuple[float, float], tolerance: float) -> int:
        """Return the coarsest level that is not coarser than `wanted` (y, x)."""
        while True:
            downsamples = self.levels.level_downsamples
            fine = [
                level
                for level in self.levels.usable()
                if downsamples[level][1] <= wanted[0] * (1 + tolerance)
                and downsamples[level][0] <= wanted[1] * (1 + tolerance)
            ]
            level = max(fine, key=lambda level: sum(downsamples[level]), default=0)
            # It may turn out to be none, or coarser than its file says.
            if self.levels.check(level) and self.levels.level_downsamples == downsamples:
                return level

    def _view(self, level: int, ratio: tuple[float, float]) -> SlideView:
        dx, dy = self.levels.level_downsamples[level]
        width, height = self.size
        fy, fx = ratio[0] * dy, ratio[1] * dx
        return SlideView(
            shape=(math.ceil(height / fy), math.ceil(width / fx)),
            downsample=(fy, fx),
            level=level,
            ratio=ratio,
            backend=self.levels,
        )


def _ratio(exact: float, tolerance: float) -> float:
    """Return a whole ratio within `tolerance` of the exact one, else a multiple of 1/4096.

    Example:
        >>> _ratio(2.0004, 0.001), _ratio(2.06, 0.001), _ratio(2.03, 0.02)
        (2.0, 2.06005859375, 2.0)
    """
    whole = round(exact)
    if whole >= 1 and abs(exact / whole - 1) <= tolerance:
        return float(whole)
    return round(exact * STEPS) / STEPS
