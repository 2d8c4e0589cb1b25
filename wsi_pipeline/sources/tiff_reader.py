"""TIFF slides, local or remote, whose stored tiles are decoded on all cores."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
import tiffslide
from PIL import Image
from tifffile.tifffile import svs_description_metadata

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.paths import is_remote, name_of
from wsi_pipeline.sources.base import (
    MAX_PIECE,
    WHITE,
    Alpha,
    Downsample,
    Pixels,
    Sizes,
    as_rgb,
    check_size,
    count_cpus,
    is_turned,
    snap_downsamples,
    stated_downsamples,
    unreadable,
)
from wsi_pipeline.sources.decoded import Spool
from wsi_pipeline.sources.jpeg import (
    colour_doubts,
    from_ycbcr,
    jpeg_2000_colours,
    jpeg_colours,
)
from wsi_pipeline.sources.mpp import imagej_mpp, ome_mpp

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

JPEG = (6, 7, 34892, 33007)
JPEG_2000 = (33003, 33005, 34712)
JPEG_2000_YCBCR = 33003
"""Aperio's, whose number says how colours are stored."""
WEBP = 50001
OTHERS = (1, 5, 8, 32773, 32946, 34925, 34926, 50000)
"""None, LZW, deflate, PackBits, LZMA, ZSTD: their decoders stop where a tile is full."""

GIANT = 1 << 26
"""Decoded bytes of a strip above which a page is decoded once, in order."""

LOST = 0.05
"""Share of a level's tiles beyond the end of the file above which the file counts as truncated."""

PICTURES = (("MINISBLACK", 1), ("RGB", 3), ("RGB", 4), ("YCBCR", 3))
"""Kinds of pixels that are read, and how many samples each has."""

ALPHA: dict[int, Alpha] = {1: "premultiplied", 2: "straight"}
"""What a fourth sample is, by TIFF's tag ExtraSamples."""

Segment = tuple[int, int, int]
"""Index, left and top of a stored tile or strip."""

log = logging.getLogger(__name__)
# tifffile logs what it survives; whatever matters reaches the user as a SourceError.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class OtherReader(SourceError):
    """Not read here, though it may be a slide: it is for OpenSlide to open.

    Attributes:
        size: (width, height) of the slide, where it is known.
        properties: what the file says of it.
    """

    size: tuple[int, int] | None = None
    properties: Mapping[str, str] = MappingProxyType({})


class TiffBackend:
    """A TIFF opened by tiffslide; its tiles are decoded on all cores, each once in a read.

    Attributes:
        is_ome: whether it is an OME-TIFF.
        is_known_better: whether OpenSlide is known to show it wrongly.
    """

    name = "tiffslide"
    blank = WHITE

    def __init__(self, path: Path, series: int | None = None) -> None:
        self._path = path
        self._handle = path.open("rb") if is_remote(path) else path
        # no other files: a slide must not name what else is opened
        self._slide = tiffslide.TiffSlide(self._handle, tifffile_options={"_multifile": False})
        try:
            self._file_size = self._slide.ts_tifffile.filehandle.size
            _check_vendor(self._slide.ts_tifffile)
            chosen = _choose_series(self._slide.ts_tifffile, series)
            page = chosen.keyframe
            self.properties: Mapping[str, str] = _properties(self._slide, page, name_of(path))
            try:
                self._pages = _pages(chosen)
            except OtherReader as error:
                error.size = (page.imagewidth, page.imagelength)
                error.properties = self.properties
                raise
        except BaseException:
            self._close_slide()
            raise
        self.level_sizes: Sizes = tuple((p.imagewidth, p.imagelength) for p in self._pages)
        self.size = self.level_sizes[0]
        self.level_tiles: Sizes = tuple(map(_segment_size, self._pages))
        self.level_downsamples = stated_downsamples(
            self.size,
            self.level_sizes,
            self.level_tiles,
            [_stated_downsample(page, self._pages[0]) for page in self._pages],
        )
        # strips that are too large to be decoded for every read: in order, once
        self._spools = {
            level: Spool(path, size, driver="GTiff", directory=page.offset, alpha=_alpha(page))
            for level, (page, size) in enumerate(zip(self._pages, self.level_sizes, strict=True))
            if not page.is_tiled and _decoded_bytes(page) > GIANT
        }
        self._bytes = FileBytes(path)  # our own: tifffile moves its handle as it likes
        self.doubts = tuple(self._colour_doubts())
        self.is_ome = bool(self._slide.ts_tifffile.is_ome)
        # OpenSlide takes the series of an OME-TIFF for levels of one slide, turns the pixels of
        # each tile by the Orientation tag but not the tiles, and believes tags about colours
        self.is_known_better = bool(
            self.is_ome or is_turned(self.properties.get("tiff.Orientation")) or self.doubts
        )
        self._threads = ThreadPoolExecutor(max(1, count_cpus() - 1), "decode")

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3)."""
        try:
            if level in self._spools:
                return self._spools[level].read(x, y, width, height)
            return self._read_segments(self._pages[level], x, y, width, height)
        except Exception as error:  # codecs raise anything on damaged tiles
            raise unreadable(self._path, error, level, x, y, width, height) from error

    def holds(self, level: int, column: int, row: int) -> bool:
        """Return whether a tile or strip was written."""
        page = self._pages[level]
        index = row * -(-page.imagewidth // self.level_tiles[level][0]) + column
        # lists that are too short are damage, of which the reading of a tile will tell
        at, counts = page.dataoffsets, page.databytecounts
        return index >= min(len(at), len(counts)) or bool(at[index] and counts[index])

    def busy_regions(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield x, y, width and height of a few level-0 tiles, those that took most bytes first."""
        page = self._pages[0]
        width, height = _segment_size(page)
        across = -(-page.imagewidth // width)
        for index in self._busiest(page):
            row, column = divmod(index % (across * -(-page.imagelength // height)), across)
            x, y = column * width, row * height
            yield (
                x,
                y,
                min(width, 512, page.imagewidth - x),
                min(height, 512, page.imagelength - y),
            )

    def _busiest(self, page: Any) -> list[int]:
        """Return the indices of a few tiles, those that took most bytes first."""
        ends = np.array(page.dataoffsets) + np.array(page.databytecounts)
        counts = np.where(ends <= self._file_size, page.databytecounts, 0)
        found: list[int] = np.argsort(counts)[: -min(len(counts), 4) - 1 : -1].tolist()
        return found

    def _colour_doubts(self) -> Iterator[str]:
        """Yield what makes the colours of the picture doubtful."""
        page = self._pages[0]
        if page.samplesperpixel == 4 and _alpha(page) == "none":
            yield (
                "it has a fourth sample and does not say what that means (no alpha, by its tag "
                "ExtraSamples): it is left out"
            )
        if page.compression not in JPEG + JPEG_2000:
            return
        for index in self._busiest(page)[:1]:
            try:
                data = self._data(page, index, self._bytes)
            except (EOFError, OSError, ValueError):
                continue  # damage to that tile
            kind = "tiles" if page.is_tiled else "strips"
            yield from colour_doubts(
                _tagged_colours(page),
                _colours(page, data or b""),
                pixels=kind,
                believed="header" if self._spools else f"word of the {kind}",
            )

    def close(self) -> None:
        """Give the file back."""
        self._threads.shutdown()
        self._bytes.close()
        for spool in self._spools.values():
            spool.close()
        self._close_slide()

    def _close_slide(self) -> None:
        self._slide.close()
        if not isinstance(self._handle, Path):
            self._handle.close()

    def _read_segments(self, page: Any, x: int, y: int, width: int, height: int) -> Pixels:
        """Decode the tiles or strips that a rectangle touches; return the rectangle."""
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        segments = _segments(page, x, y, width, height)
        left = iter(segments)  # of a list: threads may draw from it at once

        def work() -> None:
            scratch = _scratch(page)
            for segment in left:
                self._paste(pixels, (x, y), page, segment, scratch)

        self._share(work, min(count_cpus(), len(segments)))
        return pixels

    def _share(self, work: Callable[[], None], threads: int) -> None:
        """Do some work on several threads, of which the calling one is one."""
        helpers = [self._threads.submit(work) for _ in range(threads - 1)]
        try:
            work()
        finally:
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        for helper in begun:
            helper.result()

    def _paste(
        self,
        pixels: Pixels,
        corner: tuple[int, int],
        page: Any,
        segment: Segment,
        scratch: Pixels,
    ) -> None:
        """Decode one tile or strip into its place in `pixels`, whose corner lies at (x, y)."""
        index, left, top = segment
        width, height = _segment_size(page)
        x0, y0 = max(left, corner[0]), max(top, corner[1])
        target = pixels[y0 - corner[1] : top + height - corner[1], x0 - corner[0] :]
        target = target[:, : left + width - x0]
        try:
            tile = self._tile(page, index, scratch, self._bytes)
        except Exception:
            log.debug("%s: tile %d is tried again", self._path, index, exc_info=True)
            with closing(FileBytes(self._path)) as fresh:
                tile = self._tile(page, index, scratch, fresh)
        if tile is None:
            target[:] = WHITE
            return
        part = tile[y0 - top :, x0 - left :][: target.shape[0], : target.shape[1]]
        if part.shape[:2] != target.shape[:2]:
            target[:] = WHITE
        target[: part.shape[0], : part.shape[1]] = part

    def _tile(self, page: Any, index: int, scratch: Pixels, file: FileBytes) -> Pixels | None:
        """Return the pixels of a tile or strip, which may lie in `scratch`; None: left out."""
        if page.planarconfig == 1 or page.samplesperpixel == 1:
            data = self._data(page, index, file)
            return None if data is None else _decode(page, index, data, scratch)
        planes = []
        for plane in range(page.samplesperpixel):
            index_in_plane = index + plane * (len(page.dataoffsets) // page.samplesperpixel)
            data = self._data(page, index_in_plane, file)
            decoded = None if data is None else _decode_any(page, index_in_plane, data)
            if decoded is None:
                return None
            planes.append(decoded[..., 0])
        return as_rgb(np.stack(planes, axis=-1), _alpha(page))

    def _data(self, page: Any, index: int, file: FileBytes) -> bytes | None:
        """Return the stored bytes of a tile, None where the scanner left it out."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not offset or not count:
            return None
        if offset + count > self._file_size:
            raise EOFError(f"tile {index} lies beyond the end of the file")
        if count > 4 * _decoded_bytes(page) + (1 << 16):
            raise ValueError(f"tile {index} takes {count:,} bytes, which no tile of its size does")
        return file.read(offset, count)


class FileBytes:
    """The bytes of a file, from any thread; of a remote one by requests that run side by side."""

    def __init__(self, path: Path) -> None:
        self._path: Any = path
        self._lock = threading.Lock()
        self._file = None if is_remote(path) else path.open("rb", buffering=0)

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes."""
        if self._file is None:
            fs, name = self._path.fs, self._path.path
            data: bytes = fs.cat_file(name, start=offset, end=offset + count)
        else:
            with self._lock:
                self._file.seek(offset)
                data = self._file.read(count)
        if len(data) != count:
            raise EOFError(f"{len(data):,} bytes found at {offset:,}, {count:,} expected")
        return data

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()


def check_tiff(path: Path) -> None:
    """Refuse a TIFF that goes on beyond the end of the file, or whose sizes are impossible.

    Raises:
        SourceError: what was found, and what to do.
    """
    found = path.stat().st_size
    wrong = "" if is_remote(path) else _what_is_wrong_with_directories(path, found)
    if wrong:
        raise SourceError(f"{path}: {wrong}; copy the slide again")
    try:
        with path.open("rb") as handle, tifffile.TiffFile(handle, _multifile=False) as file:
            pages = [level.pages[0] for series in file.series for level in series.levels]
            expected = max(_truncated_at(page, found) for page in pages)
    except Exception:  # not for this check to judge: opening it says why
        log.debug("cannot list the tiles of %s", path, exc_info=True)
        return
    for page in pages:
        try:
            _check_sizes(page)
        except SourceError as error:
            raise SourceError(f"{path}: {error}; check the file against its original") from error
    if expected > found:
        raise SourceError(
            f"{path}: truncated: {expected:,} bytes expected, {found:,} found; copy the slide again"
        )


def _what_is_wrong_with_directories(path: Path, size: int) -> str:
    """Return how the chain of a TIFF's directories leaves the file or has no end, or ""."""
    with path.open("rb") as file:
        order = "<" if file.read(2) == b"II" else ">"
        is_big = file.read(2) in (b"+\0", b"\0+")
        if not is_big and size >= 1 << 32:
            return ""  # NDPI stretches the format in its own way
        file.seek(8 if is_big else 4)
        pointer, count, entry_size = ("Q", "Q", 20) if is_big else ("I", "H", 12)
        seen = {0}
        try:
            while (offset := _unpack(file, order + pointer)) not in seen:
                seen.add(offset)
                file.seek(offset)
                file.seek(_unpack(file, order + count) * entry_size, os.SEEK_CUR)
        except (struct.error, OSError, OverflowError, ValueError):
            return f"truncated: a directory lies beyond the {size:,} bytes found"
    # tifffile follows a circle for ever
    return "damaged: its directories go round in a circle" if offset else ""


def _unpack(file: BinaryIO, kind: str) -> int:
    """Return the next number of a file."""
    (value,) = struct.unpack(kind, file.read(struct.calcsize(kind)))
    return int(value)


def _truncated_at(page: Any, size: int) -> int:
    """Return how long the file must have been if this page's tiles tell of a cut, else 0.

    A cut goes through the tile that begins last, or takes many; one tile elsewhere that points
    beyond the end is damage to that tile only.
    """
    starts, counts = np.array(page.dataoffsets, np.uint64), np.array(page.databytecounts, np.uint64)
    stored = (starts > 0) & (counts > 0)
    ends = starts + counts
    beyond = stored & (ends > size)
    if not beyond.any():
        return 0
    begun = stored & (starts < size)
    is_cut = begun.any() and beyond[starts == starts[begun].max()].any()
    if is_cut or beyond.sum() > LOST * stored.sum():
        return int(ends.max())
    return 0


def _check_vendor(file: tifffile.TiffFile) -> None:
    """Refuse a TIFF whose pieces only OpenSlide puts together right."""
    kinds = {"NDPI": file.is_ndpi, "SCN": file.is_scn, "BIF": file.is_bif}
    kinds |= {"Philips TIFF": file.is_philips}
    kinds |= {"Trestle TIFF": file.pages.first.software.startswith("MedScan")}
    for kind, found in kinds.items():
        if found:
            raise OtherReader(f"{kind}, which only OpenSlide reads, and only from a local file")


def tagged_colour_doubts(path: Path) -> list[str]:
    """Return a sentence where a TIFF's tags and its tiles differ on colours; OpenSlide reads it."""
    try:
        with tifffile.TiffFile(path, _multifile=False) as file:
            pages: Any = file.pages
            tiled = [page for page in pages if page.is_tiled]
            page = max(tiled, key=lambda page: page.imagewidth * page.imagelength)
            index = int(np.argmax(page.databytecounts))
            file.filehandle.seek(page.dataoffsets[index])
            data = file.filehandle.read(page.databytecounts[index])
            said, stored = _tagged_colours(page), _colours(page, data)
    except Exception:  # not for this check to judge: OpenSlide has opened it
        log.debug("cannot look at the tiles of %s", path, exc_info=True)
        return []
    return colour_doubts(said, stored, pixels="tiles", believed="header")


def _choose_series(file: tifffile.TiffFile, wanted: int | None) -> Any:
    """Return the series that is the slide: the largest in colours, unless one is wanted.

    A slide that is not read here is chosen too, and refused: not the thumbnail beside it.
    """
    series = file.series
    if wanted is not None:
        if not 0 <= wanted < len(series):
            raise SourceError(f"has series 0 to {len(series) - 1}, not {wanted}; change --series")
        return series[wanted]
    tiled = [s for s in series if s.keyframe.is_tiled]
    if file.is_svs and tiled:
        series = tiled  # beside a small region the pictures of label and glass are larger
    return max(
        series,
        key=lambda s: (_is_colour(s.keyframe), s.keyframe.imagewidth * s.keyframe.imagelength),
    )


def _is_colour(page: Any) -> bool:
    return page.samplesperpixel >= 3 and page.photometric.name not in ("MINISBLACK", "MINISWHITE")


def _slide_properties(slide: tiffslide.TiffSlide) -> Mapping[str, Any]:
    """Return what tiffslide finds, nothing where it stumbles."""
    try:
        properties: Mapping[str, Any] = slide.properties
    except Exception:  # asserts and the like, on descriptions of other programs
        log.debug("tiffslide finds no properties", exc_info=True)
        return {}
    return properties


def _pages(series: Any) -> list[Any]:
    """Return tifffile's page of each level, checked."""
    pages: list[Any] = []
    for level in series.levels:
        page = level.pages[0]
        try:
            _check_page(level)
        except SourceError:
            if not pages:
                raise
            log.info("a level of %s is left out", series.name, exc_info=True)
            continue
        # read from the file when first asked for, which two threads must not do at once
        _ = page.dataoffsets, page.databytecounts, page.jpegtables
        _ = page.keyframe.decode, page.keyframe.is_jfif
        pages.append(page)
    return pages


def _check_page(level: Any) -> None:
    """Refuse what is not one plane of 8-bit RGB or grey, or stores its colours in another way."""
    if len(level.pages) != 1:
        planes = "focal planes" if level.kind == "svs" else f"planes (axes {level.axes})"
        raise SourceError(
            f"{len(level.pages)} {planes} of {level.dtype}; expected one of 8-bit RGB or grey"
        )
    if level.pages[0] is None:
        raise SourceError("its pixels lie in another file, which is not looked for")
    key = level.keyframe
    kind = (key.photometric.name, key.samplesperpixel)
    if (
        key.dtype != np.uint8
        or key.bitspersample != 8
        or kind not in (*PICTURES, ("MINISWHITE", 1))
    ):
        raise SourceError(
            f"{key.samplesperpixel} sample{'s' if key.samplesperpixel > 1 else ''} of {key.dtype}, "
            f"{key.photometric.name}; expected 8-bit RGB or grey"
        )
    if key.imagedepth != 1:
        raise SourceError(f"{key.imagedepth} planes in depth; expected one")
    if key.compression not in (*JPEG, *JPEG_2000, WEBP, *OTHERS):
        raise OtherReader(f"compression {key.compression:d} is not read; convert the slide")
    converted = key.compression in JPEG + JPEG_2000 and key.planarconfig == 1
    if kind == ("MINISWHITE", 1) or (kind[0] == "YCBCR" and not converted):
        raise OtherReader(f"pixels that are stored as {kind[0]}; save the slide as RGB or grey")


def _check_sizes(page: Any) -> None:
    """Refuse impossible sizes, and tiles that do not fit in memory."""
    check_size((page.imagewidth, page.imagelength))
    width, height = _segment_size(page)
    if min(width, height) < 1 or (page.is_tiled and _decoded_bytes(page) > MAX_PIECE):
        raise SourceError(f"tiles of {width:,} × {height:,} px, which do not fit in memory")
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    expected = -(-page.imagewidth // width) * -(-page.imagelength // height) * planes
    listed = min(len(page.dataoffsets), len(page.databytecounts))
    if listed < expected:
        kind = "tiles" if page.is_tiled else "strips"
        raise SourceError(f"{listed:,} {kind} listed where its size makes {expected:,}")


def _stated_downsample(page: Any, full: Any) -> Downsample | None:
    """Return the (x, y) downsample of a page by its resolution, or by what Aperio writes of it."""
    units = [p.tags.get("ResolutionUnit") for p in (full, page)]
    is_one_unit = len({unit and unit.value for unit in units}) == 1
    pairs = [(_resolution(full, axis), _resolution(page, axis)) for axis in "XY"]
    x, y = (a / b if a and b else 0 for a, b in pairs)
    if is_one_unit and x and y and max(x, y) > 1.01:
        return float(x), float(y)
    if found := re.search(r"-> *(\d+)x(\d+)", page.description):
        width, height = map(int, found.groups())
        if width and height:
            return snap_downsamples((full.imagewidth, full.imagelength), [(width, height)])[0]
    return None


def _properties(slide: tiffslide.TiffSlide, page: Any, name: str) -> dict[str, str]:
    """Return what the file says of one picture: tiffslide's words, and the tags in OpenSlide's."""
    file, key = slide.ts_tifffile, page.keyframe
    is_first = page.offset == file.pages.first.offset
    # tiffslide speaks of the first picture, whichever is the slide
    found = _slide_properties(slide) if is_first else {}
    if not found and page.is_svs:
        found = {f"aperio.{k}": v for k, v in svs_description_metadata(page.description).items()}
    properties = {
        name: str(value)
        for name, value in found.items()
        if value is not None and not name.startswith("tiff.")
    }
    properties["tiff.Compression"] = key.compression.name
    properties["tiff.Photometric"] = key.photometric.name
    resolution = [
        None if value is None else float(value)
        for value in (_resolution(page, axis) for axis in "XY")
    ]
    properties |= {
        f"tiff.{axis}Resolution": repr(value)
        for axis, value in zip("XY", resolution, strict=True)
        if value is not None
    }
    unit = page.tags.get("ResolutionUnit")
    # where the tag is missing, TIFF means inch
    properties["tiff.ResolutionUnit"] = (
        getattr(unit.value, "name", "none").lower() if unit else "inch"
    )
    if (tag := page.tags.get("Orientation")) is not None:
        properties["tiff.Orientation"] = str(tag.value)
    if page.is_imagej:
        properties |= imagej_mpp(page.imagej_description, resolution)
    if file.is_ome and not page.is_subifd:
        size = (page.imagewidth, page.imagelength)
        properties |= ome_mpp(file.ome_metadata or "", ifd=page.index, size=size, name=name)
    return properties


def _resolution(page: Any, axis: str) -> Fraction | None:
    """Return pixels per unit along an axis, None where no tag says, whatever its type."""
    said = page.tags.valueof(f"{axis}Resolution")
    try:
        value = Fraction(*said) if isinstance(said, tuple) else Fraction(said)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return value if value > 0 else None


def _segment_size(page: Any) -> tuple[int, int]:
    """Return width and height of a page's tiles or strips."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


def _decoded_bytes(page: Any) -> int:
    """Return how large a tile or strip is when decoded."""
    return math.prod(_segment_size(page)) * int(page.samplesperpixel)


def _segments(page: Any, x: int, y: int, width: int, height: int) -> list[Segment]:
    """Return the tiles or strips that a rectangle touches."""
    segment_width, segment_height = _segment_size(page)
    across = -(-page.imagewidth // segment_width)
    return [
        (row * across + column, column * segment_width, row * segment_height)
        for row in range(y // segment_height, -(-(y + height) // segment_height))
        for column in range(x // segment_width, -(-(x + width) // segment_width))
    ]


def _scratch(page: Any) -> Pixels:
    """Return room for a tile, (h, w, 3), at an address that is no multiple of 16.

    libjpeg-turbo writes aligned rows past the cache, from which they are read again at once: on
    such a buffer it is a quarter faster.
    """
    width, height = _segment_size(page)
    memory = np.empty(height * width * 3 + 32, dtype=np.uint8)
    start = (8 - memory.ctypes.data) % 16
    return memory[start : start + height * width * 3].reshape(height, width, 3)


def _alpha(page: Any) -> Alpha:
    """Return what a page says that its fourth sample is."""
    return ALPHA.get(next(iter(page.extrasamples), 0), "none")


def _tagged_colours(page: Any) -> str:
    """Return how a page's tags say that its colours are stored."""
    key = page.keyframe
    if key.compression in (JPEG_2000_YCBCR, 33005):
        return "YCBCR" if key.compression == JPEG_2000_YCBCR else "RGB"
    return str(key.photometric.name)


def _colours(page: Any, data: bytes) -> str:
    """Return how a tile or strip itself says that its colours are stored, "" where it does not."""
    key = page.keyframe
    if key.samplesperpixel != 3 or key.planarconfig != 1 or not data:
        return ""
    if key.compression in JPEG:
        return jpeg_colours(data, page.jpegtables)
    return jpeg_2000_colours(data) if key.compression in JPEG_2000 else ""


def _decode(page: Any, index: int, data: bytes, scratch: Pixels) -> Pixels | None:
    """Return the pixels of a tile or strip, which may lie in `scratch`; None where it is empty."""
    key = page.keyframe
    stored = _colours(page, data) or _tagged_colours(page)
    if key.compression in JPEG and key.samplesperpixel == 3:
        # libjpeg guesses YCbCr right
        colorspace = "RGB" if stored == "RGB" else None
        options = {"tables": page.jpegtables, "header": key.jpegheader, "colorspace": colorspace}
        try:
            pixels: Pixels = imagecodecs.jpeg_decode(
                data, **options, outcolorspace="RGB", out=scratch
            )
        except ValueError:
            # of another size than a tile has
            _check_stream(page, index, data)
            pixels = imagecodecs.jpeg_decode(data, **options, outcolorspace="RGB")
        return pixels
    decoded = _decode_any(page, index, data)
    if decoded is None:
        return None
    if key.compression in JPEG_2000 and stored == "YCBCR":
        return from_ycbcr(decoded)
    return as_rgb(decoded, _alpha(page))


def _check_stream(page: Any, index: int, data: bytes) -> None:
    """Refuse a JPEG, JPEG 2000 or WebP tile that says it is much larger than a tile."""
    with Image.open(io.BytesIO((page.keyframe.jpegheader or b"") + data)) as image:
        if math.prod(image.size) > 4 * math.prod(_segment_size(page)):
            raise ValueError(f"tile {index} holds {image.width:,} × {image.height:,} px")


def _decode_any(page: Any, index: int, data: bytes) -> Pixels | None:
    """Return the samples of a tile or strip, (h, w, samples), as tifffile decodes them."""
    key = page.keyframe
    if key.compression in (*JPEG, *JPEG_2000, WEBP):
        # these say their own size, and get it, whatever the tile's
        _check_stream(page, index, data)
    options = {}
    if key.compression in JPEG:
        options = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader}
    decoded = key.decode(data, index, **options)[0]
    return None if decoded is None else decoded[0]
