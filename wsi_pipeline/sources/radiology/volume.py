"""Volumes with spacing and affine: NIfTI, NRRD and DICOM series."""

from __future__ import annotations

import gzip
import math
import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.formats import kind_of
from wsi_pipeline.files.paths import quiet
from wsi_pipeline.geometry import Shape
from wsi_pipeline.sources.base import Opened, one_line, sampled_digest
from wsi_pipeline.sources.decoded import DENSEST
from wsi_pipeline.sources.radiology.image import as_meant

SHEARED = 1e-3
"""Cosine up to which two axes count as standing at right angles."""
PIECE = 1 << 24
"""Bytes unpacked at once."""
SLAB = 1 << 25
"""Voxels looked at together for the least and the largest value."""

Affine = npt.NDArray[np.float64]
"""(4, 4), maps (x, y, z, 1) voxel indices to mm to the right, front and top (RAS+)."""


@dataclass(eq=False)
class Voxels:
    """Stored voxels (z, y, x) in a file, or decoded once into a temporary one.

    They are read, not mapped: pages that a mapping has touched would count as this process's.

    Attributes:
        decode: Writer of the voxels to a file, where they are not stored as such.
        slope: Factor of stored voxels, to which `intercept` is added: numbers or (z, 1, 1).
    """

    path: Path
    shape: Shape
    dtype: np.dtype[Any]
    offset: int = 0
    decode: Callable[[BinaryIO], None] | None = None
    slope: npt.ArrayLike = 1.0
    intercept: npt.ArrayLike = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _file: BinaryIO | None = field(default=None, init=False)

    def read(self, start: Shape, shape: Shape) -> npt.NDArray[np.float32]:
        """Read a box that lies inside, in whole rows; return (z, y, x), values as they are meant.

        Raises:
            SourceError: it cannot be read, or holds values that are no numbers.
        """
        (z, y, x), (depth, height, width) = start, shape
        stored = np.empty(shape, self.dtype)
        # Whole rows, so that a slice takes one read of the file.
        rows = np.empty((height, self.shape[2]), self.dtype)
        try:
            with self._lock:
                file = self._open()
                for i in range(depth):
                    row = (z + i) * self.shape[1] + y
                    file.seek(self.offset + row * rows.strides[0])
                    if file.readinto(rows.view(np.uint8)) < rows.nbytes:
                        raise SourceError(f"{self.path}: has become shorter while it was read")
                    stored[i] = rows[:, x : x + width]
        except SourceError:
            raise
        except OSError as error:
            place = f" (decoded to {tempfile.gettempdir()})" if self.decode else ""
            reason = f"{self.path}: cannot be read{place}: {error.strerror or error}"
            raise SourceError(reason) from error
        both = (np.asarray(v, np.float64) for v in (self.slope, self.intercept))
        slope, intercept = (v[z : z + depth] if v.ndim else v for v in both)
        values = as_meant(stored, slope, intercept)
        if self.dtype.kind == "f" and not np.isfinite(values).all():
            raise SourceError(f"{self.path}: holds values that are no numbers (NaN or infinite)")
        return values

    def close(self) -> None:
        """Give the file back; a temporary one is gone."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _open(self) -> Any:
        """Return the file of the voxels, for whoever has the lock."""
        if self._file is None:
            with ExitStack() as closing:
                file: Any
                if self.decode is None:
                    file = closing.enter_context(self.path.open("rb"))
                else:
                    file = closing.enter_context(tempfile.TemporaryFile())
                    self.decode(file)
                closing.pop_all()
                self._file = file
        return self._file


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume(Opened):
    """An opened volume.

    Attributes:
        shape: (z, y, x) voxels; x is the first axis of a NIfTI, the columns of a DICOM slice.
        spacing_mm: (z, y, x) mm between voxels.
        affine: (4, 4), maps (x, y, z, 1) voxel indices to mm to the right, front and top (RAS+).
        voxels: Stored voxels of each time point that is read.
        window: Values that the file wants to be shown, where it says.
        slices: (file, frame) of each DICOM slice in order, of the first time point; empty where it
            is not DICOM.
        can_be_referred_to: Whether it is DICOM whose slices have identifiers of their own.
    """

    path: Path
    shape: Shape
    spacing_mm: tuple[float, ...]
    affine: Affine
    fingerprint: str
    backend: str
    doubts: tuple[str, ...]
    voxels: tuple[Voxels, ...]
    window: tuple[float, float] | None = None
    slices: tuple[tuple[Path, int], ...] = ()
    can_be_referred_to: bool = False

    @property
    def channels(self) -> int:
        """Return how many time points are read."""
        return len(self.voxels)

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
        """Read a box (z, y, x) that lies inside; return (*shape, channels), values as meant.

        Raises:
            SourceError: unreadable there, or values that are no numbers.
        """
        return np.stack([voxels.read(start, shape) for voxels in self.voxels], axis=-1)

    def close(self) -> None:
        """Give temporary files back."""
        for voxels in self.voxels:
            voxels.close()


def open_volume(path: Path, *, time_points: Sequence[int] | None = None) -> Volume:
    """Open a volume; return it.

    Args:
        path: A NIfTI or NRRD file, a DICOM file (which stands for its whole series), or a folder
            that holds one DICOM series.
        time_points: Which of several in one file or series, from 0, become its channels; None =
            there must be one.

    Raises:
        SourceError: no volume, or one that cannot be read.
    """
    kind = "DICOM" if path.is_dir() else kind_of(path)
    if kind not in ("NIfTI", "NRRD", "DICOM"):
        what = f"a planar image ({kind})" if kind else "no volume that is known here"
        raise SourceError(f"{path}: {what}; expected NIfTI, NRRD or a series of DICOM")
    try:
        import nibabel  # noqa: F401  what is written of a volume of any kind needs it

        # Each needs a library of its own.
        if kind == "NIfTI":
            from wsi_pipeline.sources.radiology.nifti_reader import open_nifti as read
        elif kind == "NRRD":
            from wsi_pipeline.sources.radiology.nrrd_reader import open_nrrd as read
        else:
            from wsi_pipeline.sources.radiology.dicom_stack import open_series as read
        # Affines may hold anything before they are refused.
        with quiet(), np.errstate(all="ignore"):
            return read(path, time_points)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from error
    except ImportError as error:
        raise SourceError(
            f'{path}: {kind} needs {error.name}: pip install "wsi-pipeline[radiology]"'
        ) from error
    except Exception as error:
        # Readers raise anything on damaged files.
        raise SourceError(f"{path}: cannot be read as {kind}: {one_line(error)}") from error


def choose_times(
    wanted: Sequence[int] | None, count: int, told_by: str
) -> tuple[Sequence[int], list[str]]:
    """Return which of so many time points are read, and what to say of the others.

    Args:
        wanted: Their numbers, from 0; None = there must be one alone.

    Raises:
        SourceError: none is wanted and there are several, or there is none of that number.
    """
    if wanted is None and count > 1:
        raise SourceError(
            f"{count} time points in one series, told apart by {told_by}; choose one with "
            f"--time-point, 0 to {count - 1}"
        )
    if absent := [number for number in wanted or () if not 0 <= number < count]:
        raise SourceError(f"has {count} time points; there is none of number {absent[0]} (from 0)")
    if wanted is None or count == 1:
        return wanted or (0,), []
    numbers = ", ".join(map(str, wanted))
    return wanted, [f"time point {numbers} of {count} is read (from 0, told apart by {told_by})"]


def volume_of_file(
    path: Path,
    affine: Affine,
    *,
    shape: Shape,
    dtype: np.dtype[Any],
    offset: int,
    volumes: Sequence[int],
    unpack: Callable[[BinaryIO], Any] | None,
    packed_from: int = 0,
    slope: float = 1.0,
    intercept: float = 0.0,
    backend: str,
    doubts: Sequence[str],
) -> Volume:
    """Return the volume of one file, its voxels where they lie or, if compressed, unpacked once.

    Args:
        affine: (4, 4), maps (x, y, z, 1) voxel indices to mm in RAS+.
        offset: Bytes before the first voxel, in the file or in what is unpacked.
        volumes: Which of those that lie one behind the other, from 0.
        unpack: Opener of a compressed stream; None = stored as they are.
        packed_from: Byte of the file where the compressed stream begins.

    Raises:
        SourceError: sizes, values or axes that no volume has, or fewer bytes than it needs.
    """
    if min(shape) < 1:
        raise SourceError(f"{' × '.join(map(str, shape[::-1]))} voxels: nothing to see")
    if dtype.kind not in "uif":
        raise SourceError(f"voxels of {dtype}; expected whole or real numbers")
    nbytes, size = math.prod(shape) * dtype.itemsize, path.stat().st_size
    wanted = nbytes * (max(volumes) + 1)
    if unpack is None and size < offset + wanted:
        raise SourceError(
            f"is cut off: {size:,} bytes, of {offset + wanted:,} that its header says"
        )
    # Before anything is unpacked: a header may promise what would fill the disk.
    if unpack is not None and wanted > DENSEST * size:
        raise SourceError(f"its header says {wanted:,} bytes, which {size:,} cannot hold")
    lengths = voxel_size(affine)
    if not np.isfinite(affine).all() or lengths.min() <= 0:
        raise SourceError(f"voxels of {in_mm(lengths)}; expected sizes above 0")
    axes = affine[:3, :3] / lengths
    if np.abs(axes.T @ axes - np.eye(3)).max() > SHEARED:
        raise SourceError("its axes do not stand at right angles (sheared); resample it upright")
    voxels = []
    for start in (offset + number * nbytes for number in volumes):
        decode = unpack and partial(_unpack, path, unpack, packed_from, start, nbytes)
        begin = 0 if decode else start
        voxels.append(Voxels(path, shape, dtype, begin, decode, slope, intercept))
    return Volume(
        path=path,
        shape=shape,
        spacing_mm=tuple(map(float, lengths[::-1])),
        affine=affine,
        fingerprint=sampled_digest(path).hexdigest(),
        backend=backend,
        doubts=tuple(doubts),
        voxels=tuple(voxels),
    )


def _unpack(
    path: Path,
    unpack: Callable[[BinaryIO], Any],
    packed_from: int,
    skip: int,
    nbytes: int,
    spool: BinaryIO,
) -> None:
    """Write the voxels of a compressed file to another."""
    try:
        with path.open("rb") as packed:
            packed.seek(packed_from)
            with unpack(packed) as stream:
                stream.seek(skip)
                left = nbytes
                while left and (piece := stream.read(min(left, PIECE))):
                    spool.write(piece)
                    left -= len(piece)
                # The checksum stands at the end, behind whatever else there may be.
                stream.read(PIECE)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path}: cannot be unpacked: {one_line(error)}") from error
    if left:
        raise SourceError(f"{path}: is cut off: {left:,} of {nbytes:,} bytes are missing")


def voxel_size(affine: Affine) -> npt.NDArray[np.float64]:
    """Return (x, y, z) mm between voxels."""
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0))


def in_mm(lengths: npt.NDArray[np.float64]) -> str:
    """Return lengths as people write them."""
    return " × ".join(f"{length:.4g}" for length in lengths) + " mm"
