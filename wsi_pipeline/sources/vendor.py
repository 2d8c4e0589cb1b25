"""Slides of scanner vendors and DICOM slides, read by OpenSlide."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide

from wsi_pipeline.sources.backend import (
    Pixels,
    Sizes,
    as_rgb,
    check_size,
    snap_downsamples,
    unreadable,
)


class OpenSlideBackend:
    """A slide opened by OpenSlide."""

    name = "openslide"

    CHUNK = 1024
    """Side of the pieces in which levels off the level-0 grid are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(path)
        self.size = self._slide.dimensions
        check_size(self.size)
        self.level_sizes: Sizes = self._slide.level_dimensions
        self._own_downsamples = self._slide.level_downsamples  # a handle that failed tells nothing
        self.level_downsamples = snap_downsamples(self.size, self.level_sizes)
        self.properties: Mapping[str, str] = dict(self._slide.properties)
        self.level_tiles: Sizes = tuple(map(self._tile, range(len(self.level_sizes))))
        self.doubts: tuple[str, ...] = ()

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3)."""
        if self._own_downsamples[level].is_integer():
            return self._read(level, x, y, width, height)
        # OpenSlide takes locations in level-0 pixels. Where those do not fall on the level's own
        # pixels it interpolates, so pieces must not depend on what was asked for.
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        chunk = self.CHUNK
        level_width, level_height = self.level_sizes[level]
        for top in range(y // chunk * chunk, y + height, chunk):
            for left in range(x // chunk * chunk, x + width, chunk):
                size = (min(chunk, level_width - left), min(chunk, level_height - top))
                piece = self._read(level, left, top, *size)
                x0, y0 = max(left, x), max(top, y)
                part = piece[y0 - top : y + height - top, x0 - left : x + width - left]
                pixels[y0 - y :, x0 - x :][: part.shape[0], : part.shape[1]] = part
        return pixels

    def close(self) -> None:
        """Give the file back."""
        self._slide.close()

    def _tile(self, level: int) -> tuple[int, int]:
        """Return (width, height) of a level's tiles; some formats do not say."""
        if not self._own_downsamples[level].is_integer():
            return self.CHUNK, self.CHUNK
        names = (f"openslide.level[{level}].tile-{side}" for side in ("width", "height"))
        width, height = (int(self.properties.get(name, 256)) for name in names)
        return width, height

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        slide = self._slide
        location = (
            round(x * self._own_downsamples[level]),
            round(y * self._own_downsamples[level]),
        )
        try:
            image = slide.read_region(location, level, (width, height))
        except openslide.OpenSlideError:
            try:
                # after an error a handle fails for ever, perhaps through another thread's reading
                fresh = openslide.OpenSlide(self._path)
                image = fresh.read_region(location, level, (width, height))
            except (openslide.OpenSlideError, OSError) as error:
                raise unreadable(self._path, error, level, x, y, width, height) from error
            self._slide = fresh
        return as_rgb(np.asarray(image), "straight")
