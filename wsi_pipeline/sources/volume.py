"""Volumes with spacing and affine: NIfTI, NRRD and DICOM series."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import math
import re
import tempfile
import threading
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from wsi_pipeline.errors import SourceError
from wsi_pipeline.grid import Shape
from wsi_pipeline.paths import quiet
from wsi_pipeline.sources.backend import one_line, sampled_digest
from wsi_pipeline.sources.dicom import decode_frames, read_header
from wsi_pipeline.sources.image import as_meant
from wsi_pipeline.sources.radiology import kind_of, series_in
from wsi_pipeline.sources.series import Stack, stack_series
from wsi_pipeline.sources.spool import DENSEST

SHEARED = 1e-3
"""Cosine up to which two axes count as standing at right angles."""

PIECE = 1 << 24
"""Bytes unpacked at once."""

MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}
"""Of NIfTI's units of length."""

NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(", ")
}
NRRD_SPACES = {
    "right-anterior-superior": "ras",
    "left-anterior-superior": "las",
    "left-posterior-superior": "lps",
}

SLAB = 1 << 25
"""Voxels looked at together for the least and the largest value."""


class Voxels:
    """Stored voxels (z, y, x) in a file, or decoded once into a temporary one.

    They are read, not mapped: pages that a mapping has touched would count as this process's.

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
        """Say where they lie; `decode` writes them to a file, where they are not stored as such.

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
        self._file: BinaryIO | None = None

    def read(self, start: Shape, shape: Shape) -> npt.NDArray[np.float32]:
        """Read a box that lies inside; return (z, y, x), values as they are meant."""
        stored = self._stored(start, shape)
        slope, intercept = (
            v[start[0] : start[0] + shape[0]] if v.ndim else v
            for v in (self._slope, self._intercept)
        )
        values = as_meant(stored, slope, intercept)
        if self.dtype.kind == "f" and not np.isfinite(values).all():
            raise SourceError(f"{self._path}: holds values that are no numbers (NaN or infinite)")
        return values

    def close(self) -> None:
        """Give the file back; a temporary one is gone."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _stored(self, start: Shape, shape: Shape) -> npt.NDArray[Any]:
        """Return the stored voxels of a box, read in whole rows."""
        (z, y, x), (depth, height, width) = start, shape
        stored = np.empty(shape, self.dtype)
        rows = np.empty((height, self.shape[2]), self.dtype)
        try:
            with self._lock:
                file: Any = self._opened()
                for i in range(depth):
                    row = (z + i) * self.shape[1] + y
                    file.seek(self._offset + row * rows.strides[0])
                    if file.readinto(rows.view(np.uint8)) < rows.nbytes:
                        raise SourceError(f"{self._path}: has become shorter while it was read")
                    stored[i] = rows[:, x : x + width]
        except SourceError:
            raise
        except OSError as error:
            place = f" (decoded to {tempfile.gettempdir()})" if self._decode else ""
            raise SourceError(f"{self._path}: cannot be read{place}: {error.strerror}") from error
        return stored

    def _opened(self) -> BinaryIO:
        """Return the file of the voxels, for whoever has the lock."""
        if self._file is not None:
            return self._file
        file: Any
        with ExitStack() as stack:
            if self._decode is None:
                file = stack.enter_context(self._path.open("rb"))
            else:
                file = stack.enter_context(tempfile.TemporaryFile())
                self._decode(file)
            stack.pop_all()
        self._file = file
        return self._file


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
        slices: (file, frame) of each DICOM slice in order; empty where it is not DICOM.
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
    slices: tuple[tuple[Path, int], ...] = ()
    channels: int = 1

    @property
    def dicom(self) -> tuple[Path, ...]:
        """Return the files of a DICOM series in the order of its slices, each once."""
        return tuple(dict.fromkeys(path for path, _ in self.slices))

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
    kind = "DICOM" if path.is_dir() else kind_of(path)
    openers = {"NIfTI": _open_nifti, "NRRD": _open_nrrd, "DICOM": _open_dicom}
    if kind not in openers:
        what = f"a planar image ({kind})" if kind else "no volume that is known here"
        raise SourceError(f"{path}: {what}; expected NIfTI, NRRD or a series of DICOM")
    try:
        import nibabel  # noqa: F401  what is written of a volume of any kind needs it

        with np.errstate(all="ignore"):  # of affines that are refused
            return openers[kind](path)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from error
    except ImportError as error:
        raise SourceError(
            f'{path}: {kind} needs {error.name}: pip install "wsi-pipeline[radiology]"'
        ) from error
    except Exception as error:  # readers raise anything on damaged files
        raise SourceError(f"{path}: cannot be read as {kind}: {one_line(error)}") from error


def _open_nifti(path: Path) -> Volume:
    import nibabel

    with quiet():
        opened = nibabel.load(path)
    if not isinstance(opened, nibabel.Nifti1Image):  # of which Nifti2Image is a child
        raise SourceError("a NIfTI of two files; save it as one, .nii or .nii.gz")
    image: Any = opened
    header, stored = image.header, image.dataobj
    if len(image.shape) < 3 or any(n != 1 for n in image.shape[3:]):
        axes = " × ".join(map(str, image.shape))
        raise SourceError(
            f"{axes} voxels on {len(image.shape)} axes; expected one volume, on three"
        )
    to_mm = MM_PER_UNIT[header.get_xyzt_units()[0]]
    affine = np.diag([to_mm, to_mm, to_mm, 1.0]) @ image.affine
    voxels = _file_voxels(
        path,
        (image.shape[2], image.shape[1], image.shape[0]),
        stored.dtype,
        offset=int(stored.offset),
        unpack=_gunzip if _is_gzip(path) else None,
        slope=float(stored.slope),
        intercept=float(stored.inter),
    )
    doubts = []
    if not header["sform_code"] and not header["qform_code"]:
        doubts.append(
            "it does not say how it lies in the body; its axes count as right, front, top"
        )
    said = np.array([to_mm * float(v) for v in header.get_zooms()[:3]])
    if not np.allclose(said, _lengths(affine), rtol=0.01):
        doubts.append(
            f"its voxels are {_mm(_lengths(affine))} by its affine, {_mm(said)} by its header; "
            "the first count"
        )
    return _volume(path, voxels, affine, "nibabel", doubts)


def _open_nrrd(path: Path) -> Volume:
    import nrrd

    with path.open("rb") as file:
        header = nrrd.read_header(file)
        offset = file.tell()
    if "data file" in header or "datafile" in header:
        raise SourceError("a NRRD whose voxels lie in another file; save it as one")
    sizes = [int(n) for n in header["sizes"]]
    kinds = header.get("kinds", ["domain"] * 3)
    if len(sizes) != 3 or any(kind not in ("domain", "space") for kind in kinds):
        axes = " × ".join(map(str, sizes))
        raise SourceError(f"{axes} values on axes of {', '.join(kinds)}; expected three of space")
    if header.get("line skip") or header.get("byte skip"):
        raise SourceError("a NRRD that skips lines or bytes; save it without")
    affine, doubts = _nrrd_affine(header)
    unpackers = {
        "raw": None,
        "gzip": _gunzip,
        "gz": _gunzip,
        "bzip2": _bunzip,
        "bz2": _bunzip,
    }
    if header["encoding"] not in unpackers:
        raise SourceError(f"voxels stored as {header['encoding']}; expected raw, gzip or bzip2")
    voxels = _file_voxels(
        path,
        (sizes[2], sizes[1], sizes[0]),
        np.dtype((">" if header.get("endian") == "big" else "<") + NRRD_TYPES[header["type"]]),
        offset=offset,
        unpack=unpackers[header["encoding"]],
        packed_from=offset,
    )
    return _volume(path, voxels, affine, "pynrrd", doubts)


def _nrrd_affine(header: Mapping[str, Any]) -> tuple[npt.NDArray[np.float64], list[str]]:
    """Return the affine to RAS+ of a NRRD, and what is doubtful."""
    space = str(header.get("space", "")).lower()
    names = NRRD_SPACES.get(space, space)
    affine, doubts = np.eye(4), []
    if "space directions" in header:
        affine[:3, :3] = np.array(header["space directions"], np.float64).T
    elif "spacings" in header:
        affine[:3, :3] = np.diag(np.array(header["spacings"], np.float64))
    else:
        raise SourceError("does not say how large its voxels are; save it with space directions")
    affine[:3, 3] = header.get("space origin", (0, 0, 0))
    if re.fullmatch("[rl][ap][si]", names) is None:
        doubts.append("it does not say how it lies in the body; its axes count as left, back, top")
        names = "lps"
    signs = [1.0 if name in "ras" else -1.0 for name in names]
    return np.diag([*signs, 1.0]) @ affine, doubts


def _open_dicom(path: Path) -> Volume:
    files, doubts = _series_files(path)
    stack = stack_series(files)
    slopes, intercepts = (
        np.array([getattr(v, name) for v in stack.values]).reshape(-1, 1, 1)
        for name in ("slope", "intercept")
    )
    windows = {v.window for v in stack.values}
    dtype = np.result_type(*{_dtype(header) for _, _, header in stack.slices})
    voxels = Voxels(
        path,
        stack.shape,
        dtype,
        decode=partial(_decode_slices, stack, dtype),
        slope=slopes,
        intercept=intercepts,
    )
    digest = hashlib.sha256()
    for file in dict.fromkeys(file for file, _, _ in stack.slices):
        digest.update(sampled_digest(file).digest())
    return Volume(
        path=path,
        shape=stack.shape,
        spacing_mm=stack.spacing_mm,
        affine=stack.affine,
        fingerprint=digest.hexdigest(),
        backend="pydicom",
        doubts=(*doubts, *stack.doubts),
        voxels=voxels,
        window=windows.pop() if len(windows) == 1 else None,
        slices=tuple((file, frame) for file, frame, _ in stack.slices),
    )


def _series_files(path: Path) -> tuple[list[tuple[Path, Dataset]], list[str]]:
    """Return paths and headers of the series that a path stands for, copies left out."""
    folder = path if path.is_dir() else path.parent
    found = series_in(folder)
    if path.is_dir():
        if len(found) != 1:
            firsts = ", ".join(sorted(files[0][0].name for files in found.values())[:5])
            what = f"name one file of each, as {firsts}" if found else "expected one"
            raise SourceError(f"a folder of {len(found)} DICOM series; {what}")
        (files,) = found.values()
    else:
        named = read_header(path)
        files = [*found.get(str(named.get("SeriesInstanceUID", "")), []), (path, named)]
    # of copies that which was named stays: it comes last
    once = {header.get("SOPInstanceUID", file): (file, header) for file, header in files}
    copies = len({file for file, _ in files}) - len(once)
    said = [f"copies of slices are left out: {copies}"] if copies else []
    return list(once.values()), said


def _dtype(header: Dataset) -> np.dtype[Any]:
    """Return what pydicom decodes the pixels of a file to."""
    kind = "i" if header.get("PixelRepresentation") else "u"
    return np.dtype(f"{kind}{max(1, header.BitsAllocated // 8)}")


def _decode_slices(stack: Stack, dtype: np.dtype[Any], spool: BinaryIO) -> None:
    """Write the stored slices of a series to a file in their order."""
    places = {(path, frame): z for z, (path, frame, _) in enumerate(stack.slices)}
    nbytes = stack.shape[1] * stack.shape[2] * dtype.itemsize

    def take(path: Path, frame: int, stored: npt.NDArray[Any]) -> None:
        spool.seek(places[path, frame] * nbytes)
        spool.write(stored.astype(dtype, copy=False).tobytes())

    for path, header in {path: header for path, _, header in stack.slices}.items():
        try:
            decode_frames(path, header, partial(take, path))
        except SourceError as error:
            raise SourceError(f"{path}: {error}") from error


def _file_voxels(
    path: Path,
    shape: Shape,
    dtype: np.dtype[Any],
    *,
    offset: int,
    unpack: Callable[[BinaryIO], Any] | None,
    packed_from: int = 0,
    slope: float = 1.0,
    intercept: float = 0.0,
) -> Voxels:
    """Return the voxels of a file, as they lie there or, where they are compressed, unpacked once.

    Args:
        path: of the file.
        shape: (z, y, x).
        dtype: as stored.
        offset: bytes before the first voxel, in the file or in what is unpacked.
        unpack: opens a compressed stream.
        packed_from: byte of the file where the stream begins; then no offset counts within.
        slope: factor of stored voxels.
        intercept: what is added to them.
    """
    if min(shape) < 1:
        raise SourceError(f"{' × '.join(map(str, shape[::-1]))} voxels: nothing to see")
    if dtype.kind not in "uif":
        raise SourceError(f"voxels of {dtype}; expected whole or real numbers")
    nbytes, size = math.prod(shape) * dtype.itemsize, path.stat().st_size
    decode = None
    if unpack is None and size < offset + nbytes:
        raise SourceError(
            f"is cut off: {size:,} bytes, of {offset + nbytes:,} that its header says"
        )
    if unpack is not None:
        if nbytes > DENSEST * size:
            raise SourceError(f"its header says {nbytes:,} bytes, which {size:,} cannot hold")
        skip = 0 if packed_from else offset
        decode = partial(_unpack, path, unpack, packed_from, skip, nbytes)
    return Voxels(
        path,
        shape,
        dtype,
        offset=offset if decode is None else 0,
        decode=decode,
        slope=slope,
        intercept=intercept,
    )


def _gunzip(packed: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=packed, mode="rb")


def _bunzip(packed: BinaryIO) -> Any:
    return bz2.BZ2File(packed)


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
                stream.read(skip)
                left = nbytes
                while left and (piece := stream.read(min(left, PIECE))):
                    spool.write(piece)
                    left -= len(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path}: cannot be unpacked: {one_line(error)}") from error
    if left:
        raise SourceError(f"{path}: is cut off: {left:,} of {nbytes:,} bytes are missing")


def _volume(
    path: Path,
    voxels: Voxels,
    affine: npt.NDArray[np.float64],
    backend: str,
    doubts: list[str],
) -> Volume:
    """Return a volume, its affine checked."""
    lengths = _lengths(affine)
    if not np.isfinite(affine).all() or lengths.min() <= 0:
        raise SourceError(f"voxels of {_mm(lengths)}; expected sizes above 0")
    axes = affine[:3, :3] / lengths
    if np.abs(axes.T @ axes - np.eye(3)).max() > SHEARED:
        raise SourceError("its axes do not stand at right angles (sheared); resample it upright")
    return Volume(
        path=path,
        shape=voxels.shape,
        spacing_mm=tuple(map(float, lengths[::-1])),
        affine=affine,
        fingerprint=sampled_digest(path).hexdigest(),
        backend=backend,
        doubts=tuple(doubts),
        voxels=voxels,
    )


def _lengths(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return (x, y, z) mm between voxels."""
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0))


def _mm(lengths: npt.NDArray[np.float64]) -> str:
    return " × ".join(f"{length:.4g}" for length in lengths) + " mm"


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"
