"""What a stored tile or strip of a TIFF holds: how its colours are stored, and its pixels."""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from wsi_pipeline.sources.base import Alpha, Pixels, as_rgb
from wsi_pipeline.sources.jpeg import colour_doubts, from_ycbcr, jpeg_2000_colours, jpeg_colours
from wsi_pipeline.sources.tiff_check import segment_size

JPEG = (6, 7, 34892, 33007)
JPEG_2000 = (33003, 33005, 34712)
JPEG_2000_YCBCR = 33003
"""Aperio's, whose number says how colours are stored."""
WEBP = 50001
OTHERS = (1, 5, 8, 32773, 32946, 34925, 34926, 50000)
"""None, LZW, deflate, PackBits, LZMA, ZSTD: their decoders stop where a tile is full."""
ALPHA: dict[int, Alpha] = {1: "premultiplied", 2: "straight"}
"""What a fourth sample is, by TIFF's tag ExtraSamples."""

log = logging.getLogger(__name__)


def decode_segment(page: Any, index: int, data: bytes, scratch: Pixels) -> Pixels | None:
    """Return the pixels of a tile or strip, which may lie in `scratch`; None where it is empty."""
    key = page.keyframe
    stored = stored_colours(page, data) or tagged_colours(page)
    if key.compression in JPEG and key.samplesperpixel == 3:
        # libjpeg guesses YCbCr right.
        colorspace = "RGB" if stored == "RGB" else None
        options = {"tables": page.jpegtables, "header": key.jpegheader, "colorspace": colorspace}
        try:
            pixels: Pixels = imagecodecs.jpeg_decode(
                data, **options, outcolorspace="RGB", out=scratch
            )
        except ValueError:
            # It may be of another size than a tile has.
            _check_stream(page, index, data)
            pixels = imagecodecs.jpeg_decode(data, **options, outcolorspace="RGB")
        return pixels
    decoded = decode_samples(page, index, data)
    if decoded is None:
        return None
    if key.compression in JPEG_2000 and stored == "YCBCR":
        return from_ycbcr(decoded)
    return as_rgb(decoded, alpha_of(page))


def decode_samples(page: Any, index: int, data: bytes) -> Pixels | None:
    """Return the samples of a tile or strip, (h, w, samples), as tifffile decodes them."""
    key = page.keyframe
    if key.compression in (*JPEG, *JPEG_2000, WEBP):
        # These say their own size, and get it, whatever the tile's.
        _check_stream(page, index, data)
    tables = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader}
    decoded = key.decode(data, index, **(tables if key.compression in JPEG else {}))[0]
    return None if decoded is None else decoded[0]


def _check_stream(page: Any, index: int, data: bytes) -> None:
    """Refuse a JPEG, JPEG 2000 or WebP tile that says it is much larger than a tile."""
    with Image.open(io.BytesIO((page.keyframe.jpegheader or b"") + data)) as image:
        if math.prod(image.size) > 4 * math.prod(segment_size(page)):
            raise ValueError(f"tile {index} holds {image.width:,} × {image.height:,} px")


def alpha_of(page: Any) -> Alpha:
    """Return what a page says that its fourth sample is."""
    return ALPHA.get(next(iter(page.extrasamples), 0), "none")


def tagged_colours(page: Any) -> str:
    """Return how a page's tags say that its colours are stored."""
    key = page.keyframe
    if key.compression in (JPEG_2000_YCBCR, 33005):
        return "YCBCR" if key.compression == JPEG_2000_YCBCR else "RGB"
    return str(key.photometric.name)


def stored_colours(page: Any, data: bytes) -> str:
    """Return how a tile or strip itself says that its colours are stored, "" where it does not."""
    key = page.keyframe
    if key.samplesperpixel != 3 or key.planarconfig != 1 or not data:
        return ""
    if key.compression in JPEG:
        return jpeg_colours(data, page.jpegtables)
    return jpeg_2000_colours(data) if key.compression in JPEG_2000 else ""


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
            said, stored = tagged_colours(page), stored_colours(page, data)
    except Exception:
        # Not for this check to judge: OpenSlide has opened it.
        log.debug("cannot look at the tiles of %s", path, exc_info=True)
        return []
    return colour_doubts(said, stored, pixels="tiles", believed="header")
