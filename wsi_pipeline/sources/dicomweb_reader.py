"""Slides on a DICOMweb server: what their metadata say, and frames one by one."""

from __future__ import annotations

import hashlib
import io
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.uid import VLWholeSlideMicroscopyImageStorage

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.dicomweb import AT_ONCE, Attribute, Client, DicomWeb, find_series
from wsi_pipeline.files.paths import quiet
from wsi_pipeline.sources.base import (
    MAX_PIECE,
    WHITE,
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
from wsi_pipeline.sources.brightfield import FLUORESCENCE
from wsi_pipeline.sources.jpeg import from_ycbcr, jpeg_2000_colours, jpeg_colours
from wsi_pipeline.sources.mpp import measured
from wsi_pipeline.sources.openslide_reader import spacing_of

PER_FRAME, PLACE, POSITION = "52009230", "0048021A", ("0048021E", "0048021F")
"""Where in DICOM's JSON stands where frames lie, (x, y): pydicom takes long for many."""
KEPT = 1 << 26
"""Bytes of frames that are kept, as they come: neighbouring blocks want them, too."""


class _Level:
    """A level of (width, height), in an instance or the parts of a concatenation, checked."""

    def __init__(self, size: tuple[int, int], parts: list[tuple[Any, list[Any]]]) -> None:
        check_size(size)
        parts.sort(key=lambda part: part[0].get("ConcatenationFrameOffsetNumber") or 0)
        self.size, self.headers = size, [header for header, _ in parts]
        first = self.headers[0]
        self.tile, self._colours = (first.Columns, first.Rows), first.PhotometricInterpretation
        kind = [first.SamplesPerPixel, first.BitsAllocated, first.get("PlanarConfiguration") or 0]
        known = {"RGB": [3, 8, 0], "YBR": [3, 8, 0], "MONOCHROME2": [1, 8, 0]}
        is_known = known.get(self._colours.partition("_")[0]) == kind
        if not is_known or not 0 < math.prod(self.tile) * 3 <= MAX_PIECE:
            found = f"frames of {self.tile[0]} × {self.tile[1]} px, {kind[0]} × {kind[1]} bits"
            raise SourceError(f"{found}, {self._colours}; expected 8-bit RGB that fits in memory")
        counts = [int(header.get("NumberOfFrames") or 1) for header in self.headers]
        self._firsts = [0, *accumulate(counts)][:-1]
        self._across, down = (-(-n // side) for n, side in zip(size, self.tile, strict=True))
        groups = [group for _, frames in parts for group in frames]
        order = first.get("DimensionOrganizationType") or (groups and "TILED_SPARSE")
        self._places: dict[tuple[int, int], int] = {}
        for number, group in enumerate(groups if order == "TILED_SPARSE" else ()):
            spot = group[PLACE]["Value"][0]
            x, y = (int(spot[tag]["Value"][0]) - 1 for tag in POSITION)
            if x % self.tile[0] or y % self.tile[1]:
                raise SourceError(f"a frame at x {x}, y {y}, between tiles of {self.tile} px")
            self._places[x // self.tile[0], y // self.tile[1]] = number
        wanted = len(self._places) if order == "TILED_SPARSE" else self._across * down
        count = first.get("InConcatenationTotalNumber") or len(parts)
        if (sum(counts), count) != (wanted, len(parts)):
            raise SourceError(
                f"{sum(counts)} frames of {size[0]} × {size[1]} px, {wanted} expected, in "
                f"{len(parts)} of {count} instances: parts are missing, or there are focal planes"
            )

    def frame(self, column: int, row: int) -> tuple[str, str] | None:
        """Return a tile's instance and where it lies in that, None where it was not written."""
        index = row * self._across + column
        if self._places and (index := self._places.get((column, row), -1)) < 0:
            return None
        part = bisect_right(self._firsts, index) - 1
        return self.headers[part].SOPInstanceUID, f"frames/{index - self._firsts[part] + 1}"

    def decoded(self, data: bytes) -> Pixels:
        """Return the pixels of a frame, uint8 (h, w, 3).

        How colours are stored is for the frame to say, and for the header where it does not.
        """
        shape = (*self.tile[::-1], self.headers[0].SamplesPerPixel)
        is_jpeg, is_ycbcr = data.startswith(b"\xff\xd8"), self._colours.startswith("YBR_F")
        if not is_jpeg and not data.startswith(b"\xff\x4f") and data[4:8] != b"jP  ":
            # Of YCbCr that a server has unpacked nobody knows whether it has made RGB of it.
            if is_ycbcr or not 0 <= len(data) - math.prod(shape) <= 1:
                raise ValueError(f"{len(data):,} bytes of neither JPEG nor JPEG 2000 nor RGB")
            return as_rgb(np.frombuffer(data, np.uint8, math.prod(shape)).reshape(shape))
        with Image.open(io.BytesIO(data)) as image:
            if image.size != self.tile:
                raise ValueError(f"a frame of {image.size} px; expected {self.tile}")
        if is_jpeg:
            said = {"RGB": "RGB", "MONOCHROME2": None}.get(self._colours, "YCBCR")
            stored = jpeg_colours(data) or said
            return imagecodecs.jpeg_decode(data, colorspace=stored, outcolorspace="RGB")
        samples = imagecodecs.jpeg2k_decode(data).reshape(shape)
        is_stored = is_ycbcr and not jpeg_2000_colours(data)
        return from_ycbcr(samples) if is_stored else as_rgb(samples)


class DicomWebBackend:
    """A series on a server; `headers` are of its level 0, `fingerprint` is of all identifiers."""

    name = "dicomweb"
    blank = WHITE

    def __init__(self, address: DicomWeb) -> None:
        found = find_series(address)
        if len(found) != 1:
            names = ", ".join(map(str, found[:5]))
            raise SourceError(f"{len(found)} series of slides; name one{names and f' of {names}'}")
        self._path: Any = found[0]
        self._client = Client(address)
        with quiet():
            self._levels = _levels(self._client.json(f"{found[0].where}/metadata"))
        self.level_sizes: Sizes = tuple(level.size for level in self._levels)
        self.size = self.level_sizes[0]
        self.level_tiles: Sizes = tuple(level.tile for level in self._levels)
        spacings = [spacing_of(level.headers[0]) for level in self._levels]
        self.level_downsamples = stated_downsamples(
            self.size, self.level_sizes, self.level_tiles, relative_to_first(spacings)
        )
        uids = sorted(header.SOPInstanceUID for each in self._levels for header in each.headers)
        self.fingerprint = hashlib.sha256("\n".join(uids).encode()).hexdigest()
        self.headers = self._levels[0].headers
        self._optics = (self.headers[0].get("OpticalPathSequence") or [Dataset()])[0]
        light = (self._optics.get("IlluminationTypeCodeSequence") or [Dataset()])[0]
        self.properties: Mapping[str, str] = {
            "openslide.vendor": "dicom",
            **measured("DICOMweb", spacings[0] or (), ("mm", "mm")),
            **{n: light.get("CodeValue", "") for n in FLUORESCENCE if n.startswith("dicom.")},
        }
        largest = 3 * max(map(math.prod, self.level_tiles))
        # However badly noise is compressed, and with what stands around it.
        data = partial(self._client.data, most=2 * largest + (1 << 16))
        self._data = lru_cache(max(KEPT // largest, 2 * AT_ONCE))(data)
        self._threads = ThreadPoolExecutor(AT_ONCE, "dicomweb")
        self.doubts: tuple[str, ...] = ()

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3)."""
        own, pixels = self._levels[level], np.full((height, width, 3), WHITE, np.uint8)

        def paste(place: tuple[int, int]) -> None:
            """Put the tile at (x, y) into its place."""
            if frame := own.frame(place[0] // own.tile[0], place[1] // own.tile[1]):
                tile = own.decoded(self._data(self._instance(frame[0]), frame[1]))
                target = part_of(pixels, (x, y), place, own.tile)
                target[:] = part_of(tile, place, (x, y), (width, height))

        with reading(self._path, level, x, y, width, height):
            list(self._threads.map(paste, tiles_touching(x, y, width, height, own.tile)))
        return pixels

    def holds(self, level: int, column: int, row: int) -> bool:
        """Return whether a tile was written."""
        return self._levels[level].frame(column, row) is not None

    def icc_profile(self) -> bytes:
        """Return the ICC profile of level 0, b"" where there is none."""
        found = bytes(self._optics.get("ICCProfile") or b"")
        # Metadata hold the profile, which begins with its length, or its URI.
        if not found or found.startswith(b"\0"):
            return found
        uid = self.headers[0].SOPInstanceUID
        return self._client.data(self._instance(uid), found.decode(), KEPT)

    def close(self) -> None:
        """Give threads back; connections close by themselves."""
        self._threads.shutdown()

    def _instance(self, uid: str) -> str:
        return f"{self._path.where}/instances/{uid}"


def _levels(entries: Sequence[dict[str, Attribute]]) -> list[_Level]:
    """Return the levels that the metadata of a series tell of, the largest first."""
    found: dict[tuple[int, int], list[tuple[Any, list[Any]]]] = {}
    for entry in entries:
        frames: Any = entry.pop(PER_FRAME, {}).get("Value") or []
        # Of what is left out of metadata the URI is kept.
        header = Dataset.from_json(entry, lambda tag, vr, uri: uri.encode())
        is_slide = header.get("SOPClassUID") == VLWholeSlideMicroscopyImageStorage
        if is_slide and "VOLUME" in (header.get("ImageType") or ()):
            size = header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows
            found.setdefault(size, []).append((header, frames))
    if not found:
        raise SourceError("a series without whole-slide images, whose ImageType is VOLUME")
    return [_Level(size, found[size]) for size in sorted(found, key=math.prod, reverse=True)]
