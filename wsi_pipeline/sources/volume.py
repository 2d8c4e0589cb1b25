"""Volumes with spacing and affine: NIfTI, NRRD and DICOM series."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import SourceError
from wsi_pipeline.grid import Shape
from wsi_pipeline.sources.image import as_meant

SLAB = 1 << 25
"""Voxels looked at together for the least and the largest value."""


class Voxels:
    """Stored voxels (z, y, x) in a file, or decoded once into a temporary one.

    Each reading maps the file anew, so that what was read does not stay in memory.

    Attributes:
        shape: (z, y, x).
        dtype: as stored.
    """

    def __init__(
        self,
        path: Path,
        shape: Shape,
        dtype: npt.DTypeLike,
        *,
        offset: int = 0,
        decode: Callable[[BinaryIO], None] | None = None,
        slope: npt.ArrayLike = 1.0,
        intercept: npt.ArrayLike = 0.0,
    ) -> None:
        """Say where they lie; `decode` writes them to a file, where they cannot be mapped.

        `slope` and `intercept` are numbers, or (z, 1, 1).
        """
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._path = path
        self._offset = offset
        self._decode = decode
        self._slope = np.asarray(slope, np.float64)
        self._intercept = np.asarray(intercept, np.float64)
        self._lock = threading.Lock()
        self._spool: BinaryIO | None = None

    def read(self, start: Shape, shape: Shape) -> npt.NDArray[np.float32]:
        """Read a box that lies inside; return (z, y, x), values as they are meant."""
        box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        source: Any = self._path if self._decode is None else self._decoded()
        stored = np.memmap(source, self.dtype, "r", self._offset, self.shape)[box]
        slope, intercept = (v[box[0]] if v.ndim else v for v in (self._slope, self._intercept))
        values = as_meant(stored, slope, intercept)
        if values.dtype.kind == "f" and self.dtype.kind == "f" and not np.isfinite(values).all():
            raise SourceError(f"{self._path}: holds values that are no numbers (NaN or infinite)")
        return values

    def close(self) -> None:
        """Give the temporary file back."""
        with self._lock:
            if self._spool is not None:
                self._spool.close()
                self._spool = None

    def _decoded(self) -> BinaryIO:
        with self._lock:
            if self._spool is None:
                assert self._decode is not None
                spool = tempfile.TemporaryFile()
                try:
                    self._decode(spool)
                    spool.flush()
                except BaseException:
                    spool.close()
                    raise
                self._spool = spool
            return self._spool


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """An opened volume.

    Attributes:
        path: of the file, or of the folder of a DICOM series.
        shape: (z, y, x) voxels; x is the first axis of a NIfTI, the columns of a DICOM slice.
        spacing_mm: (z, y, x) mm between voxels.
        affine: (4, 4), maps (x, y, z, 1) voxel indices to mm to the right, front and top (RAS+).
        fingerprint: digest of the content.
        backend: name of the library that read it.
        doubts: sentences that a user should read.
        voxels: what is stored.
        window: values that the file wants to be shown, where it says.
        dicom: files of the slices in order; one for all where it has many frames; else empty.
        channels: always 1.
    """

    path: Path
    shape: Shape
    spacing_mm: tuple[float, ...]
    affine: npt.NDArray[np.float64]
    fingerprint: str
    backend: str
    doubts: tuple[str, ...]
    voxels: Voxels
    window: tuple[float, float] | None = None
    dicom: tuple[Path, ...] = ()
    channels: int = 1

    @cached_property
    def value_range(self) -> tuple[float, float]:
        """Return the values of black and white: of the file's window, else least and largest.

        Without a window all voxels are read, some at a time.
        """
        if self.window is not None:
            return self.window
        depth, height, width = self.shape
        step = max(1, SLAB // (height * width))
        ends = []
        for z in range(0, depth, step):
            slab = self.read((z, 0, 0), (min(step, depth - z), height, width))
            ends += [float(slab.min()), float(slab.max())]
        return min(ends), max(ends)

    def read(self, start: Shape, shape: Shape) -> npt.NDArray[np.float32]:
        """Read a box that lies inside; return (*shape, 1), values as they are meant.

        Args:
            start: (z, y, x) of its first voxel.
            shape: (z, y, x) voxels.

        Raises:
            SourceError: unreadable there, or values that are no numbers.
        """
        return self.voxels.read(start, shape)[..., None]

    def close(self) -> None:
        """Give temporary files back."""
        self.voxels.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_volume(path: Path) -> Volume:
    """Open a volume; return it.

    Args:
        path: of a NIfTI or NRRD file, a DICOM file (which stands for its whole series), or a folder
            that holds one DICOM series.

    Raises:
        SourceError: no volume, or one that cannot be read.
    """
    raise SourceError(f"{path}: no volume that is read here")
