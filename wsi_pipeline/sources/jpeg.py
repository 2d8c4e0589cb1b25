"""What a JPEG or JPEG 2000 stream says of its colours, whatever the file around it says."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_pipeline.files.paths import quiet
from wsi_pipeline.sources.base import Pixels

COLOURS = {"RGB": "RGB", "YCBCR": "YCbCr"}
"""How colours are stored, as people write it."""
APP0, APP14, COD, SOS = 0xE0, 0xEE, 0x52, 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG's frame headers; the others of that range are of tables."""

FRAME_HEADER = 1 << 16
"""Bytes of a DICOM frame that hold all that is said before its pixels."""


def jpeg_colours(data: bytes, tables: bytes | None = None) -> str:
    """Return "RGB" or "YCBCR" where a JPEG says so, "" where it does not.

    JFIF is YCbCr; Adobe's marker says which; components may be named R, G, B; colours that are
    stored coarser than the first component are no RGB. In this order, as libjpeg has it.

    `tables` are what the stream shares with others.
    """
    said = ""
    for code, body in (*_markers(tables or b""), *_markers(data)):
        if code == APP0 and body.startswith(b"JFIF\0"):
            return "YCBCR"
        if code == APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            said = "YCBCR" if body[11] else "RGB"
        if code in FRAMES and len(body) >= 15 and body[5] == 3 and not said:
            named, sampled = body[6:15:3], set(body[7:15:3])
            said = "RGB" if named == b"RGB" else "YCBCR" if len(sampled) > 1 else ""
    return said


def _markers(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield code and content of what stands before a JPEG's pixels."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != SOS:
        # A byte that fills a gap.
        if data[at + 1] == 0xFF:
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at + 1], data[at + 4 : at + 2 + length]
        at += 2 + length


def jpeg_2000_colours(data: bytes) -> str:
    """Return "RGB" where a JPEG 2000 stream says that it decodes to that, "" where it does not."""
    if not data.startswith(b"\xff\x4f"):
        # A JP2, whose colours the decoder knows.
        return "RGB"
    transformed = any(code == COD and body[4:5] == b"\1" for code, body in _markers(data))
    return "RGB" if transformed else ""


def from_ycbcr(pixels: Pixels) -> Pixels:
    """Return RGB of (h, w, 3) YCbCr."""
    height, width = pixels.shape[:2]
    return np.asarray(Image.frombytes("YCbCr", (width, height), pixels.tobytes()).convert("RGB"))


def colour_doubts(said: str, stored: str, *, pixels: str, believed: str) -> list[str]:
    """Return a sentence where a file says otherwise of its colours than its JPEG streams do.

    Args:
        said: What the file says, "RGB" or "YCBCR".
        stored: What a stream says; "" where it says nothing.
        pixels: What the streams are called in the file.
        believed: Which of both is.
    """
    if stored in ("", said):
        return []
    return [
        f"its header says that colours are stored as {COLOURS.get(said, said)}, its {pixels} that "
        f"they are {COLOURS[stored]}: the {believed} is taken; look whether the colours are right"
    ]


def dicom_colour_doubts(path: Path) -> list[str]:
    """Return a sentence where a DICOM slide and its first frame differ on its colours.

    OpenSlide, which reads it, believes the header.
    """
    from pydicom import dcmread
    from pydicom.encaps import parse_basic_offsets

    try:
        with quiet(), path.open("rb") as file:
            header = dcmread(
                file, stop_before_pixels=True, specific_tags=["PhotometricInterpretation"]
            )
            if not header.file_meta.TransferSyntaxUID.is_encapsulated:
                return []
            # Before them stand tag, kind and length of the pixels, before the frame tag and length.
            file.seek(12, io.SEEK_CUR)
            parse_basic_offsets(file)
            file.seek(8, io.SEEK_CUR)
            data = file.read(FRAME_HEADER)
            said = "YCBCR" if header.PhotometricInterpretation.startswith("YBR") else "RGB"
    except Exception:
        # pydicom raises anything on damaged files, which OpenSlide has opened.
        return []
    stored = jpeg_colours(data) if data.startswith(b"\xff\xd8") else ""
    return colour_doubts(said, stored, pixels="frames", believed="header")
