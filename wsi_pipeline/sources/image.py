"""Planar images: ultrasound, mammograms, single slices; PNG, JPEG, TIFF and DICOM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import SourceError
from wsi_pipeline.grid import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Image:
    """An opened planar image; its pixels are in memory.

    Attributes:
        path: of the file.
        shape: (y, x) pixels.
        channels: 1, or 3 for RGB.
        spacing_mm: (y, x) mm between pixels; None where the file does not say.
        fingerprint: digest of the content.
        backend: name of the library that read it.
        doubts: sentences that a user should read.
        value_range: values of black and white: of the file's window, of its bits, or the least
            and the largest.
        frame: which of several frames, from 0.
        stored: (y, x, channels) pixels as they are stored.
        slope: factor of stored pixels.
        intercept: what is added to them.
    """

    path: Path
    shape: Shape
    channels: int
    spacing_mm: tuple[float, ...] | None
    fingerprint: str
    backend: str
    doubts: tuple[str, ...]
    value_range: tuple[float, float]
    frame: int
    stored: npt.NDArray[Any]
    slope: float = 1.0
    intercept: float = 0.0

    def read(self, start: Shape, shape: Shape) -> npt.NDArray[np.float32]:
        """Read a rectangle that lies inside; return (*shape, channels), values as they are meant.

        Args:
            start: (y, x) of its first pixel.
            shape: (y, x) pixels.
        """
        return as_meant(self.stored[_slices(start, shape)], self.slope, self.intercept)

    def close(self) -> None:
        """Do nothing: the file is closed already."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_meant(stored: npt.NDArray[Any], slope: Any, intercept: Any) -> npt.NDArray[np.float32]:
    """Return slope × stored + intercept, exact until it is rounded to float32."""
    if np.all(slope == 1) and np.all(intercept == 0):
        return stored.astype(np.float32)
    return (stored * np.float64(slope) + intercept).astype(np.float32)


def open_image(path: Path, *, frame: int | None = None) -> Image:
    """Open a planar image; return it.

    Args:
        path: of a PNG, JPEG, TIFF or DICOM file.
        frame: which of several, from 0; None = that which the file names, or the first.

    Raises:
        SourceError: no image, or one that cannot be read.
    """
    raise SourceError(f"{path}: no image that is read here")


def _slices(start: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
