"""What every reader of stored pixels has in common: the protocol, its errors, its limits."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import SourceError, UnreachableError
from wsi_pipeline.files.dicomweb import DicomWeb
from wsi_pipeline.files.paths import is_remote

if TYPE_CHECKING:
    from hashlib import _Hash

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]
Sizes = tuple[Size, ...]
Downsample = tuple[float, float]
Downsamples = tuple[Downsample, ...]
Alpha = Literal["none", "straight", "premultiplied"]
"""What a fourth sample is: no alpha; one that colours are to be multiplied by; one that they are.
"""

WHITE = 255
"""What is shown where a slide has no pixels, as on empty glass."""
MAX_SIDE = 1 << 20
MAX_PIXELS = 1 << 38
"""Level-0 pixels beyond which a header is not believed: 0.1 µm per pixel over a whole glass slide
is 760,000 × 250,000."""
MAX_PIECE = 1 << 28
"""Bytes that one stored tile or chunk may have when decoded: all of it must fit in memory."""
SAMPLE = 1 << 18
"""Bytes read at the head, the middle and the tail of a file for its fingerprint."""


class Opened:
    """What is given back by `close`, or at the end of a `with`."""

    def close(self) -> None:
        """Give the file back; nothing is to be done where it is closed already."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Backend(Protocol):
    """What reads the stored pixels of one source.

    Attributes:
        size: (width, height) of level 0.
        level_sizes: (width, height) of each stored level.
        level_downsamples: (x, y) level-0 pixels per pixel of each level, as the file says.
        level_tiles: (width, height) of the pieces that each level is stored in.
    """

    name: str
    size: Size
    level_sizes: Sizes
    level_downsamples: Downsamples
    level_tiles: Sizes
    properties: Mapping[str, str]
    doubts: tuple[str, ...]

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3).

        Several threads may call it at once. x, y and the size count in the level's own pixels.
        What cannot be read is tried again on a fresh handle.

        Raises:
            SourceError: the file cannot be read there.
        """
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


@runtime_checkable
class Sparse(Protocol):
    """A backend of which some stored tiles may never have been written.

    Attributes:
        blank: Value of every sample, or of each of the three, that `read_level` returns for such
            a tile.
    """

    blank: int | Pixels

    def holds(self, level: int, column: int, row: int) -> bool:
        """Return whether a stored tile was written."""
        ...


class WrappedBackend:
    """What a backend that gives the pixels of another one in its own way has of that one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.size, self.doubts = backend.name, backend.size, backend.doubts
        self.level_sizes, self.level_tiles = backend.level_sizes, backend.level_tiles
        self.level_downsamples, self.properties = backend.level_downsamples, backend.properties
        self.headers: Sequence[Any] = getattr(backend, "headers", ())
        self.blank: int | Pixels = backend.blank if isinstance(backend, Sparse) else WHITE

    def holds(self, level: int, column: int, row: int) -> bool:
        """Return whether a stored tile was written."""
        sparse = self._backend
        return not isinstance(sparse, Sparse) or sparse.holds(level, column, row)

    def close(self) -> None:
        """Give the file back."""
        self._backend.close()


@contextmanager
def reading(path: Path, level: int, x: int, y: int, width: int, height: int) -> Iterator[None]:
    """Turn what a library raises in the body into a sentence on the rectangle that it reads.

    Raises:
        SourceError: anything was raised: codecs do as they like on damaged files.
        UnreachableError: by the body, or the server of a file does not give it any more.
    """
    try:
        yield
    except UnreachableError:
        raise
    except Exception as error:
        if not _is_served(path):
            raise UnreachableError(
                f"{path} cannot be reached any more: {one_line(error)}; what is done is kept, and "
                "the same command goes on"
            ) from error
        raise SourceError(
            f"{path}: level {level} cannot be read at x {x}, y {y}, {width} × {height} px: "
            f"{one_line(error)}"
        ) from error


def _is_served(path: Any) -> bool:
    """Return whether the server of a file, or of a zarr, still gives its first byte.

    What lies here is served, and the client of DICOMweb tells by itself where it is not.
    """
    if not is_remote(path) or isinstance(path, DicomWeb):
        return True
    for name in ("", "/zarr.json", "/.zattrs"):
        # Clients of remote stores raise what they like.
        with suppress(Exception):
            return bool(path.fs.cat_file(f"{path.path}{name}", start=0, end=1))
    return False


def tiles_touching(x: int, y: int, width: int, height: int, tile: Size) -> Iterator[Size]:
    """Yield (left, top) of the tiles of (width, height) that a rectangle touches, row by row.

    Example:
        >>> list(tiles_touching(5, 0, 10, 3, (8, 8)))
        [(0, 0), (8, 0)]
    """
    for top in range(y // tile[1] * tile[1], y + height, tile[1]):
        for left in range(x // tile[0] * tile[0], x + width, tile[0]):
            yield left, top


def part_of(pixels: Pixels, corner: Size, place: Size, size: Size) -> Pixels:
    """Return the view of pixels that a rectangle of (width, height) covers.

    `corner` is the (x, y) of the first pixel, `place` that of the rectangle.
    """
    rows, columns = (
        slice(max(start - first, 0), max(start + length - first, 0))
        for first, start, length in zip(corner[::-1], place[::-1], size[::-1], strict=True)
    )
    return pixels[rows, columns]


def one_line(error: BaseException) -> str:
    """Return what a library says, or what it says lies behind, on one line and not too long."""
    behind = error.__cause__ if "previous exception" in str(error) else None
    text = " ".join(str(behind or error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def check_size(size: Size) -> None:
    """Refuse, by a SourceError, a (width, height) without pixels, or with more than any slide."""
    if min(size) < 1:
        raise SourceError(f"{size[0]} × {size[1]} px: nothing to see")
    if max(size) > MAX_SIDE or math.prod(size) > MAX_PIXELS:
        raise SourceError(f"its header says {size[0]:,} × {size[1]:,} px, which no slide has")


def sampled_digest(path: Path) -> _Hash:
    """Return the SHA-256 object of a file's size, head, middle and tail: cheap for any size."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        # Directories stand at the head or the tail; pixels that differ alone, in the middle.
        for offset in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
            file.seek(offset)
            digest.update(file.read(SAMPLE))
    return digest


def count_cpus() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_turned(orientation: object) -> bool:
    """Return whether a tag Orientation says that a picture is turned or mirrored.

    Some programs write 0, which says nothing.
    """
    return str(orientation) in tuple("2345678")


def turned_doubts(orientation: object, consequence: str) -> list[str]:
    """Return a sentence where a tag Orientation says that a picture is turned or mirrored."""
    if not is_turned(orientation):
        return []
    said = f"its Orientation tag of {orientation} says that the picture is turned or mirrored"
    return [f"{said}; {consequence}"]


def as_rgb(samples: Pixels, alpha: Alpha = "none") -> Pixels:
    """Return (h, w, 3) of uint8 (h, w, 1, 3 or 4); what is transparent becomes white."""
    if samples.shape[2] == 1:
        return np.broadcast_to(samples, (*samples.shape[:2], 3))
    if samples.shape[2] == 3:
        return samples
    weight = samples[..., 3:].astype(np.float32) / WHITE
    if alpha == "none" or weight.min() == 1:
        return samples[..., :3]
    colours = samples[..., :3] * (weight if alpha == "straight" else 1)
    return np.round(np.minimum(colours + WHITE * (1 - weight), WHITE)).astype(np.uint8)


def snap_downsample(size: Size, level_size: Size) -> Downsample:
    """Return the (x, y) downsample of a level, whole where truncated sizes hide a whole number.

    A level of 482 columns under 1,931 was made by 4, not by 4.006: its last columns were dropped.

    Example:
        >>> snap_downsample((1931, 1487), (482, 371)), snap_downsample((1931, 1487), (772, 594))
        ((4.0, 4.0), (2.5012953367875648, 2.5033670033670035))
    """
    ratios = (size[0] / level_size[0], size[1] / level_size[1])
    mean = sum(ratios) / 2
    # A power of two comes first: for levels of a few pixels several whole numbers would do.
    for whole in (2.0 ** round(math.log2(mean)), float(round(mean))):
        if whole and fits_size(size, level_size, (whole, whole)):
            return (whole, whole)
    return ratios


def fits_size(size: Size, level_size: Size, downsample: Downsample, tile: int = 0) -> bool:
    """Return whether a level has the slide's size divided by its downsample, rounded anyhow.

    It may be larger by less than `tile` pixels, as where its tiles are whole.
    """
    beyond = [own - full / f for full, own, f in zip(size, level_size, downsample, strict=True)]
    slack = [max(1.0, own / 100) for own in level_size]
    return all(-s <= b <= max(s, tile - 1) for b, s in zip(beyond, slack, strict=True))


def relative_to_first(spacings: Sequence[Downsample | None]) -> list[Downsample | None]:
    """Return the downsample of each level by the (x, y) spacings that a file states, if it does."""
    first = spacings[0]
    return [own and first and (own[0] / first[0], own[1] / first[1]) for own in spacings]


def stated_downsamples(
    size: Size,
    level_sizes: Sequence[Size],
    level_tiles: Sequence[Size],
    stated: Sequence[Downsample | None],
) -> Downsamples:
    """Return the (x, y) downsample of each level: what the file says, else what the sizes do."""
    found = []
    for level_size, tile, said in zip(level_sizes, level_tiles, stated, strict=True):
        by_size = snap_downsample(size, level_size)
        # Some writers copy the tag of level 0, or write what is no number of pixels.
        if said is not None and not 1.01 <= max(said) <= MAX_SIDE:
            said = None
        if said is not None:
            whole = (float(round(said[0])), float(round(said[1])))
            # Numbers in files are rounded, sometimes to what the sizes come to.
            for better, share in ((by_size, 0.01), (whole, 1e-3)):
                if all(math.isclose(*ab, rel_tol=share) for ab in zip(said, better, strict=True)):
                    said = better
                    break
        found.append(next(iter(possible_downsamples(size, level_size, tile, said)), by_size))
    return tuple(found)


def possible_downsamples(
    size: Size, level_size: Size, tile: Size, stated: Downsample | None = None
) -> list[Downsample]:
    """Return the downsamples that a level may have, the likeliest first; none for another picture.

    The level may have been padded to a multiple of its tiles.
    """
    by_size = snap_downsample(size, level_size)
    low, high = (
        bound(full / max(own + step, 0.5) for full, own in zip(size, level_size, strict=True))
        for bound, step in ((max, 1), (min, -1))
    )
    has_aspect = low <= high
    found: list[Downsample] = []
    if stated is not None and fits_size(size, level_size, stated, max(tile)):
        found += [stated] if has_aspect or math.isclose(*stated, rel_tol=0.01) else []
    found += [by_size] if has_aspect or is_whole(by_size) else []
    # What is padded goes beyond the edge: it was made by more than its size says. By twice of it at
    # most: a smaller picture than that would be found in level 0 by chance.
    first = math.ceil(max(full / own for full, own in zip(size, level_size, strict=True)))
    for wholes in ([2**n for n in range(15) if first <= 2**n < 2 * first], range(first, first + 3)):
        pairs = [(float(n), float(n)) for n in wholes]
        found += [pair for pair in pairs if fits_size(size, level_size, pair, max(tile))]
    return list(dict.fromkeys(found))


def is_whole(downsample: Downsample) -> bool:
    """Return whether a downsample is one whole number."""
    x, y = downsample
    return x == y and x.is_integer()
