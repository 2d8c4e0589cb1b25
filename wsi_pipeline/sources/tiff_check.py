"""Whether a TIFF is whole: its directories, its sizes and where its tiles lie."""

from __future__ import annotations

import logging
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.paths import is_remote
from wsi_pipeline.sources.base import MAX_PIECE, check_size

LOST = 0.05
"""Share of a level's tiles beyond the end of the file above which the file counts as truncated."""

log = logging.getLogger(__name__)
# tifffile logs what it survives; whatever matters reaches the user as a SourceError.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def check_tiff(path: Path) -> None:
    """Refuse, by a SourceError, a TIFF that is cut off, or whose sizes are impossible."""
    found = path.stat().st_size
    wrong = "" if is_remote(path) else _what_is_wrong_with_directories(path, found)
    if wrong:
        raise SourceError(f"{path}: {wrong}; copy the slide again")
    try:
        with path.open("rb") as handle, tifffile.TiffFile(handle, _multifile=False) as file:
            levels = (level for series in file.series for level in series.levels)
            pages: list[Any] = [level.pages[0] for level in levels]
            expected = max(_truncated_at(page, found) for page in pages)
    except Exception:
        # Not for this check to judge: opening it says why.
        log.debug("cannot list the tiles of %s", path, exc_info=True)
        return
    for page in pages:
        try:
            check_size((page.imagewidth, page.imagelength))
            width, height = segment_size(page)
            if min(width, height) < 1 or (page.is_tiled and decoded_bytes(page) > MAX_PIECE):
                raise SourceError(f"tiles of {width:,} × {height:,} px, which do not fit in memory")
            planes = page.samplesperpixel if page.planarconfig == 2 else 1
            wanted = -(-page.imagewidth // width) * -(-page.imagelength // height) * planes
            listed = min(len(page.dataoffsets), len(page.databytecounts))
            if listed < wanted:
                kind = "tiles" if page.is_tiled else "strips"
                raise SourceError(f"{listed:,} {kind} listed where its size makes {wanted:,}")
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
        # NDPI stretches the format in its own way.
        if not is_big and size >= 1 << 32:
            return ""

        def number(kind: str) -> int:
            (value,) = struct.unpack(order + kind, file.read(struct.calcsize(order + kind)))
            return int(value)

        file.seek(8 if is_big else 4)
        pointer, count, entry_size = ("Q", "Q", 20) if is_big else ("I", "H", 12)
        seen = {0}
        try:
            while (offset := number(pointer)) not in seen:
                seen.add(offset)
                file.seek(offset)
                file.seek(number(count) * entry_size, os.SEEK_CUR)
        except (struct.error, OSError, OverflowError, ValueError):
            return f"truncated: a directory lies beyond the {size:,} bytes found"
    # tifffile follows a circle for ever.
    return "damaged: its directories go round in a circle" if offset else ""


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
    return int(ends.max()) if is_cut or beyond.sum() > LOST * stored.sum() else 0


def segment_size(page: Any) -> tuple[int, int]:
    """Return (width, height) of the tiles or strips of tifffile's page."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


def decoded_bytes(page: Any) -> int:
    """Return how large a tile or strip is when decoded."""
    return math.prod(segment_size(page)) * int(page.samplesperpixel)
