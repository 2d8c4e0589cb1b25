"""A plug-in of pydicom: JPEG of more than 8 bits and lossless JPEG, decoded by imagecodecs."""

from __future__ import annotations

import imagecodecs
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import UID, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1

DECODER_DEPENDENCIES: dict[UID, tuple[str, ...]] = {
    JPEGExtended12Bit: ("imagecodecs",),
    JPEGLossless: ("imagecodecs",),
    JPEGLosslessSV1: ("imagecodecs",),
}
"""What pydicom names where a plug-in is missing."""


def is_available(uid: str) -> bool:
    """Return whether a transfer syntax is decoded here."""
    return uid in DECODER_DEPENDENCIES


def decode_frame(source: bytes, runner: DecodeRunner) -> bytes:
    """Return the decoded pixels of one frame as pydicom wants them, little-endian."""
    if runner.transfer_syntax == JPEGExtended12Bit:
        pixels = imagecodecs.jpeg8_decode(source)
    else:
        pixels = imagecodecs.jpegsof3_decode(source)
    runner.set_option("bits_allocated", 8 * pixels.itemsize)
    return pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()
