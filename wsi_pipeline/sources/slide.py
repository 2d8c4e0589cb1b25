"""Pixels of slide files: tiffslide and OpenSlide behind one small protocol."""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import imagecodecs
import numpy as np
import numpy.typing as npt
import openslide
import tifffile
import tiffslide

from wsi_pipeline.errors import SourceError

Pixels = npt.NDArray[np.uint8]
Sizes = tuple[tuple[int, int], ...]
Downsamples = tuple[tuple[float, float], ...]
Segment = tuple[int, int, int]
"""Index, left and top of a stored tile or strip."""

WHITE = 255
"""What is shown where a slide has no pixels, as on empty glass."""

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_VENDORS = ("aperio", "generic-tiff", None)
"""As OpenSlide names them: where a TIFF's tiles are the slide, not pieces to be put together."""

JPEG = (6, 7, 34892, 33007)
APERIO_JPEG_2000 = (33003, 33005)

log = logging.getLogger(__name__)
# tifffile logs what it survives; whatever matters reaches the user as a SourceError.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class Backend(Protocol):
    """What reads the stored pixels of one source.

    Attributes:
        name: of the library, for people.
        size: (width, height) of level 0.
        level_sizes: (width, height) of each stored level.
        level_downsamples: (x, y) level-0 pixels per pixel of each level.
        properties: what the file says about itself.
    """

    name: str
    size: tuple[int, int]
    level_sizes: Sizes
    level_downsamples: Downsamples
    properties: Mapping[str, str]

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3).

        Several threads may call it at once. x, y and the size count in the level's own pixels.

        Raises:
            SourceError: the file cannot be read there.
        """
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


def open_slide_file(path: Path) -> Backend:
    """Open a slide with whichever library reads it right and fastest; return the backend.

    Both libraries open a TIFF where they can, and read the same tile: tiffslide is used where
    they agree, being several times faster, and OpenSlide where they do not.

    Raises:
        SourceError: neither library opens the file; the message says what was found.
    """
    head = _read_head(path)
    is_tiff = head[:4] in TIFF_MAGIC
    if is_tiff:
        _check_whole(path)
    reference, refusal = _attempt(OpenSlideBackend, path)
    if is_tiff and openslide.OpenSlide.detect_format(path) in TIFF_VENDORS:
        tiff, reason = _attempt(TiffBackend, path)
        if isinstance(tiff, TiffBackend):
            return tiff if reference is None else _better(tiff, reference)
        refusal = reason
    if reference is not None:
        return reference
    raise SourceError(f"{path}: {_what_is_wrong(path, head, refusal)}")


def _what_is_wrong(path: Path, head: bytes, refusal: str) -> str:
    """Return what a file that no reader opens seems to be, and what to do."""
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        return f"its folder {path.stem} is not there; put it beside the .mrxs file"
    found = "a TIFF that no reader opens" if head[:4] in TIFF_MAGIC else "not a slide"
    return f"{found}, {refusal or f'it starts {head[:4]!r}'}; check the file against its original"


def _attempt(kind: type[Backend], path: Path) -> tuple[Backend | None, str]:
    """Return the opened backend, or None and the reason."""
    try:
        return kind(path), ""  # type: ignore[call-arg]
    except openslide.OpenSlideUnsupportedFormatError:
        return None, ""
    except Exception as error:  # both libraries raise anything on a damaged file
        log.debug("%s does not open %s", kind.name, path, exc_info=True)
        return None, one_line(error)


def one_line(error: BaseException) -> str:
    """Return what a library says, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _read_head(path: Path) -> bytes:
    """Return the first bytes of a file."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise SourceError(
            f"{path}: a folder, not a slide; give a slide file or a patch grid written by `tile`"
        ) from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise SourceError(f"{path}: an empty file; copy the slide again")
    return head


def _check_whole(path: Path) -> None:
    """Refuse a TIFF that goes on beyond the end of the file."""
    found = path.stat().st_size
    if not _has_all_directories(path):
        raise SourceError(
            f"{path}: truncated: a directory lies beyond the {found:,} bytes found; "
            "copy the slide again"
        )
    try:
        with tifffile.TiffFile(path) as file:
            pages = [level.pages[0] for level in file.series[0].levels]
            expected = max((_data_end(page) for page in pages), default=0)
    except Exception:  # not for this check to judge: opening it says why
        log.debug("cannot list the tiles of %s", path, exc_info=True)
        return
    if expected > found:
        raise SourceError(
            f"{path}: truncated: {expected:,} bytes expected, {found:,} found; copy the slide again"
        )


def _has_all_directories(path: Path) -> bool:
    """Return whether the chain of a TIFF's directories stays inside the file."""
    with path.open("rb") as file:
        order = "<" if file.read(2) == b"II" else ">"
        is_big = file.read(2) in (b"+\0", b"\0+")
        if not is_big and path.stat().st_size >= 1 << 32:
            return True  # NDPI stretches the format in its own way
        file.seek(8 if is_big else 4)
        pointer, count, entry_size = ("Q", "Q", 20) if is_big else ("I", "H", 12)
        seen = {0}
        try:
            while (offset := _unpack(file, order + pointer)) not in seen:
                seen.add(offset)
                file.seek(offset)
                file.seek(_unpack(file, order + count) * entry_size, os.SEEK_CUR)
        except (struct.error, OSError, OverflowError):
            return False
    return True


def _unpack(file: BinaryIO, kind: str) -> int:
    """Return the next number of a file."""
    (value,) = struct.unpack(kind, file.read(struct.calcsize(kind)))
    return int(value)


def _data_end(page: Any) -> int:
    """Return one past the last byte of a page's tiles."""
    extents = zip(page.dataoffsets, page.databytecounts, strict=False)
    return max((offset + count for offset, count in extents if count), default=0)


def _better(tiff: TiffBackend, reference: Backend) -> Backend:
    """Return the faster of two backends if both see the same slide, else the reference."""
    if not _agree(tiff, reference):
        log.info("OpenSlide and tiffslide read different pixels; taking OpenSlide's")
        tiff.close()
        return reference
    tiff.properties = {**tiff.properties, **reference.properties}
    reference.close()
    return tiff


def _agree(tiff: TiffBackend, reference: Backend) -> bool:
    """Return whether both read the same picture: the sizes, and the tile with the most in it."""
    if tiff.size != reference.size or len(tiff.level_sizes) < len(reference.level_sizes):
        return False
    region = tiff.busiest_region()
    try:
        expected = reference.read_level(0, *region)
    except SourceError:
        return True
    try:
        found = tiff.read_level(0, *region)
    except SourceError:
        return False
    difference = np.abs(found.astype(np.int16) - expected)
    return int(difference.max()) <= 4  # decoders of one codec differ by rounding only


def snap_downsamples(size: tuple[int, int], level_sizes: Sequence[tuple[int, int]]) -> Downsamples:
    """Return the (x, y) downsample of each level, whole where truncated sizes hide a whole number.

    A level of 482 columns under 1,931 was made by 4, not by 4.006: its last columns were dropped.

    Example:
        >>> snap_downsamples((1931, 1487), [(1931, 1487), (482, 371), (772, 594)])
        ((1.0, 1.0), (4.0, 4.0), (2.5012953367875648, 2.5033670033670035))
    """
    return tuple(_snap(size, level_size) for level_size in level_sizes)


def _snap(size: tuple[int, int], level_size: tuple[int, int]) -> tuple[float, float]:
    ratios = [full / own for full, own in zip(size, level_size, strict=True)]
    mean = sum(ratios) / 2
    # a power of two first: for levels of a few pixels several whole numbers would do
    for whole in (2 ** round(np.log2(mean)), round(mean)):
        pairs = zip(size, level_size, strict=True)
        if all(abs(full / whole - own) <= max(1, own / 100) for full, own in pairs):
            return (float(whole), float(whole))
    return (ratios[0], ratios[1])


class TiffBackend:
    """A TIFF opened by tiffslide; its tiles are decoded on all cores, each once in a read."""

    name = "tiffslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = tiffslide.TiffSlide(path)
        try:
            _check_vendor(self._slide.ts_tifffile)
            properties = self._slide.properties
            self._pages = _pages(self._slide)
        except Exception:
            self._slide.close()
            raise
        self.level_sizes: Sizes = tuple((p.imagewidth, p.imagelength) for p in self._pages)
        self.size = self.level_sizes[0]
        self.level_downsamples = snap_downsamples(self.size, self.level_sizes)
        self.properties: Mapping[str, str] = {
            key: str(value) for key, value in properties.items() if value is not None
        } | _tiff_properties(self._pages[0])
        self._lock = threading.Lock()
        self._file = path.open("rb", buffering=0)  # our own: tifffile moves its handle as it likes
        self._threads = ThreadPoolExecutor(max(1, count_cpus() - 1), "decode")

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3)."""
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        page = self._pages[level]
        segments = _segments(page, x, y, width, height)
        left = iter(segments)  # of a list: threads may draw from it at once

        def work() -> None:
            scratch = _scratch(page)
            for segment in left:
                self._paste(pixels, (x, y), page, segment, scratch)

        try:
            self._share(work, min(count_cpus(), len(segments)))
        except Exception as error:  # codecs raise anything on damaged tiles
            raise unreadable(self._path, error, level, x, y, width, height) from error
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

    def busiest_region(self) -> tuple[int, int, int, int]:
        """Return x, y, width and height of the level-0 tile that took most bytes."""
        page = self._pages[0]
        width, height = _segment_size(page)
        index = int(np.argmax(page.databytecounts))
        row, column = divmod(index, -(-page.imagewidth // width))
        x, y = column * width, row * height
        return (
            x,
            y,
            min(width, 512, page.imagewidth - x),
            min(height, 512, page.imagelength - y),
        )

    def close(self) -> None:
        """Give the file back."""
        self._threads.shutdown()
        self._file.close()
        self._slide.close()

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
        data = self._read_segment(page, index)
        tile = None if data is None else _decode(page, index, data, scratch)
        if tile is None:
            target[:] = WHITE
            return
        part = tile[y0 - top :, x0 - left :][: target.shape[0], : target.shape[1]]
        if part.shape[:2] != target.shape[:2]:
            target[:] = WHITE
        target[: part.shape[0], : part.shape[1]] = part

    def _read_segment(self, page: Any, index: int) -> bytes | None:
        """Return the stored bytes of a tile, None where the scanner left it out."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not offset or not count:
            return None
        with self._lock:
            self._file.seek(offset)
            data = self._file.read(count)
        if len(data) < count:
            raise EOFError(f"the file ends within tile {index}")
        return data


def count_cpus() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_vendor(file: tifffile.TiffFile) -> None:
    """Refuse a TIFF whose pieces only OpenSlide puts together right."""
    kinds = {"NDPI": file.is_ndpi, "SCN": file.is_scn, "BIF": file.is_bif}
    for kind, found in (kinds | {"Philips TIFF": file.is_philips}).items():
        if found:
            raise SourceError(f"{kind} that OpenSlide does not open")


def _pages(slide: tiffslide.TiffSlide) -> list[Any]:
    """Return tifffile's page of each level."""
    series = slide.ts_tifffile.series[slide.properties["tiffslide.series-index"]]
    pages = [level.pages[0] for level in series.levels]
    for page in pages:
        _check_page(page)
        # read from the file when first asked for, which two threads must not do at once
        _ = page.dataoffsets, page.databytecounts, page.jpegtables
        _ = page.keyframe.decode, page.keyframe.is_jfif
    return pages


def _check_page(page: Any) -> None:
    """Refuse pixels that are not 8-bit RGB or grey, or whose colours would need more than us."""
    key = page.keyframe
    jpeg = key.compression in JPEG + APERIO_JPEG_2000
    photometrics = {"RGB", "MINISBLACK"} | ({"YCBCR"} if jpeg else set())
    if (
        key.dtype != np.uint8
        or key.bitspersample != 8
        or key.samplesperpixel not in (1, 3, 4)
        or (key.samplesperpixel > 1 and key.planarconfig != 1)
        or key.imagedepth != 1
        or key.photometric.name not in photometrics
    ):
        raise SourceError(
            f"{key.samplesperpixel} samples of {key.dtype}, {key.photometric.name}; "
            "expected 8-bit RGB or grey"
        )


def _tiff_properties(page: Any) -> dict[str, str]:
    """Return what the tags say of resolution and compression, in OpenSlide's words."""
    properties = {"tiff.Compression": page.keyframe.compression.name}
    for name in ("XResolution", "YResolution"):
        if (tag := page.tags.get(name)) is not None and tag.value[1]:
            properties[f"tiff.{name}"] = repr(tag.value[0] / tag.value[1])
    if (tag := page.tags.get("ResolutionUnit")) is not None:
        properties["tiff.ResolutionUnit"] = tag.value.name.lower()
    return properties


def _segment_size(page: Any) -> tuple[int, int]:
    """Return width and height of a page's tiles or strips."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


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


def _decode(page: Any, index: int, data: bytes, scratch: Pixels) -> Pixels | None:
    """Return the pixels of a tile or strip, which may lie in `scratch`; None where it is empty."""
    key = page.keyframe
    if key.compression not in JPEG:
        decoded = key.decode(data, index)[0]
    else:
        tables, header = page.jpegtables, key.jpegheader
        if key.samplesperpixel == 3:
            try:
                pixels: Pixels = imagecodecs.jpeg_decode(
                    data,
                    tables=tables,
                    header=header,
                    colorspace="RGB" if key.photometric.name == "RGB" and not key.is_jfif else None,
                    outcolorspace="RGB",
                    out=scratch,
                )
                return pixels
            except ValueError:
                pass  # of another size than a tile has: tifffile knows what that may mean
        decoded = key.decode(data, index, jpegtables=tables, jpegheader=header)[0]
    return None if decoded is None else _rgb(decoded[0])


def _rgb(samples: Pixels) -> Pixels:
    """Return (h, w, 3) of grey, RGB or RGBA samples; what is transparent becomes white."""
    if samples.shape[2] == 1:
        return np.broadcast_to(samples, (*samples.shape[:2], 3))
    if samples.shape[2] == 3:
        return samples
    alpha = samples[..., 3:]
    if alpha.min() == 255:
        return samples[..., :3]
    weight = alpha.astype(np.float32) / 255
    blended = samples[..., :3] * weight + WHITE * (1 - weight)
    return np.round(blended).astype(np.uint8)


class OpenSlideBackend:
    """A slide opened by OpenSlide."""

    name = "openslide"

    CHUNK = 1024
    """Side of the pieces in which levels off the level-0 grid are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(path)
        self.size = self._slide.dimensions
        self.level_sizes: Sizes = self._slide.level_dimensions
        self.level_downsamples = snap_downsamples(self.size, self.level_sizes)
        self.properties: Mapping[str, str] = dict(self._slide.properties)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3)."""
        if self._slide.level_downsamples[level].is_integer():
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

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        slide = self._slide
        downsample = slide.level_downsamples[level]
        location = (round(x * downsample), round(y * downsample))
        try:
            return _rgb(np.asarray(slide.read_region(location, level, (width, height))))
        except openslide.OpenSlideError as error:
            # after an error a handle fails for ever; the old one may still be in use elsewhere
            self._slide = openslide.OpenSlide(self._path)
            raise unreadable(self._path, error, level, x, y, width, height) from error


def unreadable(
    path: Path, error: Exception, level: int, x: int, y: int, width: int, height: int
) -> SourceError:
    """Return the error for a rectangle of a level that cannot be read."""
    return SourceError(
        f"{path}: level {level} cannot be read at x {x}, y {y}, {width} × {height} px: "
        f"{one_line(error)}"
    )
