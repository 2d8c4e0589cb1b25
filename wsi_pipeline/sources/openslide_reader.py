"""Slides of scanner vendors and DICOM slides, read by OpenSlide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openslide
from PIL import Image

from wsi_pipeline.files.formats import has_preamble, slide_header
from wsi_pipeline.files.paths import quiet
from wsi_pipeline.sources.base import (
    WHITE,
    Downsample,
    Pixels,
    Sizes,
    as_rgb,
    check_size,
    part_of,
    reading,
    relative_to_first,
    stated_downsamples,
    tiles_touching,
)

if TYPE_CHECKING:
    from pydicom import Dataset


class OpenSlideBackend:
    """A slide opened by OpenSlide."""

    name = "openslide"
    blank = WHITE

    CHUNK = 1024
    """Side of the pieces in which levels off the level-0 grid are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(path)
        self.size = self._slide.dimensions
        check_size(self.size)
        self.level_sizes: Sizes = self._slide.level_dimensions
        # A handle that failed tells nothing.
        self._own_downsamples = self._slide.level_downsamples
        self.properties: Mapping[str, str] = dict(self._slide.properties)
        # Some formats do not say how large their tiles are.
        width, height = (
            [
                int(self.properties.get(f"openslide.level[{level}].tile-{side}", 256))
                for level in range(len(self.level_sizes))
            ]
            for side in ("width", "height")
        )
        self.level_tiles: Sizes = tuple(zip(width, height, strict=True))
        self.doubts: tuple[str, ...] = ()
        self._is_dicom = self.properties.get("openslide.vendor") == "dicom"
        spacings: dict[tuple[int, int], Downsample] = {}
        if self._is_dicom and len(self.level_sizes) > 1:
            spacings = _spacings(path, self.properties.get("dicom.SeriesInstanceUID", ""))
        stated = relative_to_first([spacings.get(size) for size in self.level_sizes])
        self.level_downsamples = stated_downsamples(
            self.size, self.level_sizes, self.level_tiles, stated
        )

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3)."""
        if self._own_downsamples[level].is_integer():
            return self._read(level, x, y, width, height)
        # OpenSlide takes locations in level-0 pixels. Where those do not fall on the level's own
        # pixels it interpolates, so pieces must not depend on what was asked for.
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        level_width, level_height = self.level_sizes[level]
        for left, top in tiles_touching(x, y, width, height, (self.CHUNK, self.CHUNK)):
            size = (min(self.CHUNK, level_width - left), min(self.CHUNK, level_height - top))
            piece = self._read(level, left, top, *size)
            target = part_of(pixels, (x, y), (left, top), size)
            target[:] = part_of(piece, (left, top), (x, y), (width, height))
        return pixels

    def holds(self, level: int, column: int, row: int) -> bool:
        """Return whether a tile was written; only DICOM has levels that lack what others have."""
        if not self._is_dicom:
            return True
        width, height = self.level_tiles[level]
        full_width, full_height = self.level_sizes[level]
        x = min(column * width + width // 2, full_width - 1)
        y = min(row * height + height // 2, full_height - 1)
        own = self._own_downsamples[level]
        try:
            pixel = self._slide.read_region((round(x * own), round(y * own)), level, (1, 1))
        except openslide.OpenSlideError:
            return True
        return pixel.getpixel((0, 0))[3] > 0  # type: ignore[index]

    def icc_profile(self) -> bytes:
        """Return the ICC profile of the slide, b"" where there is none."""
        # Beside the slide there is nothing that would be decoded for it.
        outside = self._image(0, -1, -1, 1, 1)
        return bytes(outside.info.get("icc_profile") or b"")

    def close(self) -> None:
        """Give the file back."""
        self._slide.close()

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        return as_rgb(np.asarray(self._image(level, x, y, width, height)), "straight")

    def _image(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        own = self._own_downsamples[level]
        location = (round(x * own), round(y * own))
        try:
            return self._slide.read_region(location, level, (width, height))
        except openslide.OpenSlideError:
            # After an error a handle fails for ever, perhaps through another thread's reading.
            with reading(self._path, level, x, y, width, height):
                fresh = openslide.OpenSlide(self._path)
                image = fresh.read_region(location, level, (width, height))
            self._slide = fresh
            return image


def _spacings(path: Path, series: str) -> dict[tuple[int, int], Downsample]:
    """Return (x, y) mm per pixel of the levels of a DICOM slide, by their (width, height).

    Its files, those beside `path`, are those of one SeriesInstanceUID.
    """
    found: dict[tuple[int, int], Downsample] = {}
    for file in filter(has_preamble, path.parent.iterdir()):
        # pydicom raises anything on damaged files.
        with suppress(Exception), quiet():
            header = slide_header(file)
            if header is None or header.SeriesInstanceUID != series:
                continue
            if "VOLUME" in header.ImageType and (spacing := spacing_of(header)):
                found[header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows] = spacing
    return found


def spacing_of(header: Dataset) -> Downsample | None:
    """Return (x, y) mm per pixel of a level, None where its header says nothing of use."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    try:
        if spacing := (shared.get("PixelMeasuresSequence") or [{}])[0].get("PixelSpacing"):
            y, x = map(float, spacing)
        else:
            x = float(header.ImagedVolumeWidth) / header.TotalPixelMatrixColumns
            y = float(header.ImagedVolumeHeight) / header.TotalPixelMatrixRows
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < math.inf and 0 < y < math.inf else None
