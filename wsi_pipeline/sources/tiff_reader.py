"""TIFF slides, local or remote, whose stored tiles are decoded on all cores."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tifffile
import tiffslide
from tifffile.tifffile import svs_description_metadata

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.paths import is_remote, name_of
from wsi_pipeline.sources.base import (
    WHITE,
    Downsample,
    Pixels,
    Sizes,
    as_rgb,
    count_cpus,
    is_turned,
    part_of,
    reading,
    snap_downsample,
    stated_downsamples,
    tiles_touching,
)
from wsi_pipeline.sources.decoded import Spool
from wsi_pipeline.sources.jpeg import colour_doubts
from wsi_pipeline.sources.mpp import imagej_mpp, ome_mpp
from wsi_pipeline.sources.tiff_check import decoded_bytes, segment_size
from wsi_pipeline.sources.tiff_tiles import (
    JPEG,
    JPEG_2000,
    OTHERS,
    WEBP,
    alpha_of,
    decode_samples,
    decode_segment,
    stored_colours,
    tagged_colours,
)

GIANT = 1 << 26
"""Decoded bytes of a strip above which a page is decoded once, in order."""
PICTURES = (("MINISBLACK", 1), ("RGB", 3), ("RGB", 4), ("YCBCR", 3))
"""Kinds of pixels that are read, and how many samples each has."""

log = logging.getLogger(__name__)


class OtherReader(SourceError):
    """Not read here, though it may be a slide: it is for OpenSlide to open.

    Attributes:
        size: (width, height) of the slide, where it is known.
    """

    size: tuple[int, int] | None = None
    properties: Mapping[str, str] = MappingProxyType({})


class TiffBackend:
    """A TIFF opened by tiffslide; its tiles are decoded on all cores, each once in a read.

    Attributes:
        is_known_better: Whether OpenSlide is known to show it wrongly.
    """

    name = "tiffslide"
    blank = WHITE

    def __init__(self, path: Path, series: int | None = None) -> None:
        self._path = path
        self._handle = path.open("rb") if is_remote(path) else path
        # A slide must not name what else is opened.
        self._slide = tiffslide.TiffSlide(self._handle, tifffile_options={"_multifile": False})
        try:
            file = self._slide.ts_tifffile
            self._file_size = file.filehandle.size
            kinds = {"NDPI": file.is_ndpi, "SCN": file.is_scn, "BIF": file.is_bif}
            kinds |= {"Philips TIFF": file.is_philips}
            kinds |= {"Trestle TIFF": file.pages.first.software.startswith("MedScan")}
            # Their tiles are pieces that have to be put together.
            for kind in (kind for kind, is_it in kinds.items() if is_it):
                raise OtherReader(f"{kind}, which only OpenSlide reads, and only from a local file")
            chosen = _choose_series(file, series)
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
        self.level_tiles: Sizes = tuple(map(segment_size, self._pages))
        self.level_downsamples = stated_downsamples(
            self.size,
            self.level_sizes,
            self.level_tiles,
            [_stated_downsample(page, self._pages[0]) for page in self._pages],
        )
        # Strips that are too large to be decoded for every read are decoded once, in order.
        self._spools = {
            level: Spool(path, size, driver="GTiff", directory=page.offset, alpha=alpha_of(page))
            for level, (page, size) in enumerate(zip(self._pages, self.level_sizes, strict=True))
            if not page.is_tiled and decoded_bytes(page) > GIANT
        }
        # tifffile moves its own handle as it likes.
        self._bytes = FileBytes(path)
        self.doubts = tuple(self._colour_doubts(self._pages[0]))
        self.is_ome = bool(self._slide.ts_tifffile.is_ome)
        # OpenSlide takes the series of an OME-TIFF for levels of one slide, turns the pixels of
        # each tile by the Orientation tag but not the tiles, and believes tags about colours.
        self.is_known_better = bool(
            self.is_ome or is_turned(self.properties.get("tiff.Orientation")) or self.doubts
        )
        self._threads = ThreadPoolExecutor(max(1, count_cpus() - 1), "decode")

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3)."""
        with reading(self._path, level, x, y, width, height):
            if level in self._spools:
                return self._spools[level].read(x, y, width, height)
            return self._read_segments(self._pages[level], x, y, width, height)

    def holds(self, level: int, column: int, row: int) -> bool:
        """Return whether a tile or strip was written."""
        page = self._pages[level]
        index = row * -(-page.imagewidth // self.level_tiles[level][0]) + column
        # Lists that are too short are damage, of which the reading of a tile will tell.
        at, counts = page.dataoffsets, page.databytecounts
        return index >= min(len(at), len(counts)) or bool(at[index] and counts[index])

    def icc_profile(self) -> bytes:
        """Return the ICC profile of level 0, b"" where there is none."""
        return bytes(self._pages[0].tags.valueof("InterColorProfile") or b"")

    def busy_regions(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield x, y, width and height of a few level-0 tiles, those that took most bytes first."""
        page = self._pages[0]
        width, height = segment_size(page)
        across = -(-page.imagewidth // width)
        for index in self._busiest(page):
            row, column = divmod(index % (across * -(-page.imagelength // height)), across)
            x, y = column * width, row * height
            w, h = min(width, 512, page.imagewidth - x), min(height, 512, page.imagelength - y)
            yield x, y, w, h

    def _colour_doubts(self, page: Any) -> Iterator[str]:
        """Yield what makes the colours of a page doubtful."""
        if page.samplesperpixel == 4 and alpha_of(page) == "none":
            yield (
                "it has a fourth sample and does not say what that means (no alpha, by its tag "
                "ExtraSamples): it is left out"
            )
        for index in self._busiest(page)[:1] if page.compression in JPEG + JPEG_2000 else ():
            # What cannot be read is damage to that tile.
            with suppress(EOFError, OSError, ValueError):
                kind = "tiles" if page.is_tiled else "strips"
                yield from colour_doubts(
                    tagged_colours(page),
                    stored_colours(page, self._data(page, index, self._bytes) or b""),
                    pixels=kind,
                    believed="header" if self._spools else f"word of the {kind}",
                )

    def _busiest(self, page: Any) -> list[int]:
        """Return the indices of a few tiles, those that took most bytes first."""
        ends = np.array(page.dataoffsets) + np.array(page.databytecounts)
        counts = np.where(ends <= self._file_size, page.databytecounts, 0)
        found: list[int] = np.argsort(counts)[: -min(len(counts), 4) - 1 : -1].tolist()
        return found

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
        tile_width, tile_height = segment_size(page)
        across = -(-page.imagewidth // tile_width)
        segments = list(tiles_touching(x, y, width, height, (tile_width, tile_height)))
        # Threads may draw at once from the iterator of a list.
        left = iter(segments)

        def paste(place: tuple[int, int], scratch: Pixels) -> None:
            """Decode the tile or strip at (x, y) into its place."""
            index = place[1] // tile_height * across + place[0] // tile_width
            target = part_of(pixels, (x, y), place, (tile_width, tile_height))
            try:
                tile = self._tile(page, index, scratch, self._bytes)
            except Exception:
                log.debug("%s: tile %d is tried again", self._path, index, exc_info=True)
                with closing(FileBytes(self._path)) as fresh:
                    tile = self._tile(page, index, scratch, fresh)
            part = pixels[:0] if tile is None else part_of(tile, place, (x, y), (width, height))
            part = part[: target.shape[0], : target.shape[1]]
            # A tile may have been left out, or be smaller than it should be.
            if part.shape != target.shape:
                target[:] = WHITE
            target[: part.shape[0], : part.shape[1]] = part

        def work() -> None:
            # libjpeg-turbo writes aligned rows past the cache, from which they are read again at
            # once: where no row begins at a multiple of 16 it is a quarter faster.
            memory = np.empty(tile_height * tile_width * 3 + 32, dtype=np.uint8)
            start = (8 - memory.ctypes.data) % 16
            scratch = memory[start:][: memory.size - 32].reshape(tile_height, tile_width, 3)
            for place in left:
                paste(place, scratch)

        # The calling thread is one of those that work.
        helpers = [self._threads.submit(work) for _ in range(min(count_cpus(), len(segments)) - 1)]
        try:
            work()
        finally:
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        for helper in begun:
            helper.result()
        return pixels

    def _tile(self, page: Any, index: int, scratch: Pixels, file: FileBytes) -> Pixels | None:
        """Return the pixels of a tile or strip, which may lie in `scratch`; None: left out."""
        if page.planarconfig == 1 or page.samplesperpixel == 1:
            data = self._data(page, index, file)
            return None if data is None else decode_segment(page, index, data, scratch)
        planes = []
        for plane in range(page.samplesperpixel):
            index_in_plane = index + plane * (len(page.dataoffsets) // page.samplesperpixel)
            data = self._data(page, index_in_plane, file)
            decoded = None if data is None else decode_samples(page, index_in_plane, data)
            if decoded is None:
                return None
            planes.append(decoded[..., 0])
        return as_rgb(np.stack(planes, axis=-1), alpha_of(page))

    def _data(self, page: Any, index: int, file: FileBytes) -> bytes | None:
        """Return the stored bytes of a tile, None where the scanner left it out."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not offset or not count:
            return None
        if offset + count > self._file_size:
            raise EOFError(f"tile {index} lies beyond the end of the file")
        if count > 4 * decoded_bytes(page) + (1 << 16):
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


def _choose_series(file: tifffile.TiffFile, wanted: int | None) -> Any:
    """Return the series that is the slide: the largest in colours, unless one is wanted.

    A slide that is not read here is chosen too, and refused: not the thumbnail beside it.
    """
    series: Any = file.series
    if wanted is not None:
        if not 0 <= wanted < len(series):
            raise SourceError(f"has series 0 to {len(series) - 1}, not {wanted}; change --series")
        return series[wanted]
    tiled = [s for s in series if s.keyframe.is_tiled]
    if file.is_svs and tiled:
        # Beside a small region the pictures of label and glass are larger.
        series = tiled

    def rank(one: Any) -> tuple[bool, int]:
        page = one.keyframe
        is_grey = page.photometric.name in ("MINISBLACK", "MINISWHITE")
        return page.samplesperpixel >= 3 and not is_grey, page.imagewidth * page.imagelength

    return max(series, key=rank)


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
        # They are read from the file when first asked for, which two threads must not do at once.
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
            return snap_downsample((full.imagewidth, full.imagelength), (width, height))
    return None


def _properties(slide: tiffslide.TiffSlide, page: Any, name: str) -> dict[str, str]:
    """Return what the file says of one picture: tiffslide's words, and the tags in OpenSlide's."""
    file, key = slide.ts_tifffile, page.keyframe
    found: Mapping[str, Any] = {}
    # tiffslide speaks of the first picture, whichever is the slide.
    if page.offset == file.pages.first.offset:
        try:
            found = slide.properties
        except Exception:
            # Asserts and the like, on descriptions of other programs.
            log.debug("tiffslide finds no properties", exc_info=True)
    if not found and page.is_svs:
        found = {f"aperio.{k}": v for k, v in svs_description_metadata(page.description).items()}
    properties = {
        name: str(value)
        for name, value in found.items()
        if value is not None and not name.startswith("tiff.")
    }
    properties["tiff.Compression"] = key.compression.name
    properties["tiff.Photometric"] = key.photometric.name
    resolution: list[float | None] = []
    for axis in "XY":
        value = _resolution(page, axis)
        resolution.append(None if value is None else float(value))
        if value is not None:
            properties[f"tiff.{axis}Resolution"] = repr(float(value))
    unit = page.tags.get("ResolutionUnit")
    # Where the tag is missing, TIFF means inch.
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
