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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.formats import HEAD, kind_of
from wsi_pipeline.files.paths import quiet
from wsi_pipeline.geometry import Shape
from wsi_pipeline.sources.base import one_line, sampled_digest
from wsi_pipeline.sources.decoded import DENSEST
from wsi_pipeline.sources.radiology.dicom import decode_frames
from wsi_pipeline.sources.radiology.dicom_series import Stack, choose_times, stack_series
from wsi_pipeline.sources.radiology.discover import series_in, series_of
from wsi_pipeline.sources.radiology.image import as_meant

SHEARED = 1e-3
"""Cosine up to which two axes count as standing at right angles."""

PIECE = 1 << 24
"""Bytes unpacked at once."""

MM_PER_UNIT = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
"""Of NIfTI's codes for units of length: unknown, m, mm and µm."""

NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, "
        "int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
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

NRRD_SPACE = frozenset(["domain", "space", "???", "none"])
"""Kinds of axes that are of space; of the last two nothing is known."""
NRRD_TIMES = frozenset(["time", "list"])
"""Kinds of a last axis whose values are volumes."""
NRRD_UNITS = {
    "": 1.0, "mm": 1.0, "millimeter": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3, "µm": 1e-3,
    "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3, "nm": 1e-6,
}  # fmt: skip
"""Millimetres of what programs write as the unit of space."""

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
            raise SourceError(
                f"{self._path}: cannot be read{place}: {error.strerror or error}"
            ) from error
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
        voxels: what is stored, of each time point that is read.
        window: values that the file wants to be shown, where it says.
        slices: (file, frame) of each DICOM slice in order, of the first time point; empty where it
            is not DICOM.
        can_be_referred_to: whether it is DICOM whose slices have identifiers of their own.
    """

    path: Path
    shape: Shape
    spacing_mm: tuple[float, ...]
    affine: npt.NDArray[np.float64]
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
        """Read a box that lies inside; return (*shape, channels), values as they are meant.

        Args:
            start: (z, y, x) of its first voxel.
            shape: (z, y, x) voxels.

        Raises:
            SourceError: unreadable there, or values that are no numbers.
        """
        return np.stack([voxels.read(start, shape) for voxels in self.voxels], axis=-1)

    def close(self) -> None:
        """Give temporary files back."""
        for voxels in self.voxels:
            voxels.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_volume(path: Path, *, time_points: Sequence[int] | None = None) -> Volume:
    """Open a volume; return it.

    Args:
        path: of a NIfTI or NRRD file, a DICOM file (which stands for its whole series), or a folder
            that holds one DICOM series.
        time_points: which of several in one file or series, from 0, become its channels; None =
            there must be one.

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

        with quiet(), np.errstate(all="ignore"):  # of affines that are refused
            return openers[kind](path, time_points)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from error
    except ImportError as error:
        raise SourceError(
            f'{path}: {kind} needs {error.name}: pip install "wsi-pipeline[radiology]"'
        ) from error
    except Exception as error:  # readers raise anything on damaged files
        raise SourceError(f"{path}: cannot be read as {kind}: {one_line(error)}") from error


def _open_nifti(path: Path, time_points: Sequence[int] | None) -> Volume:
    image = load_nifti(path)
    header, stored = image.header, image.dataobj
    if len(image.shape) < 3 or any(n != 1 for n in image.shape[4:]):
        axes = " × ".join(map(str, image.shape))
        raise SourceError(
            f"{axes} voxels on {len(image.shape)} axes; expected one volume, on three"
        )
    count = int(image.shape[3]) if len(image.shape) > 3 else 1
    chosen, doubts = choose_times(time_points, count, "the fourth axis")
    unit = int(header["xyzt_units"]) & 7
    if unit not in MM_PER_UNIT:
        doubts.append(f"its unit of length, {unit}, is none of NIfTI's; it counts as mm")
    to_mm = MM_PER_UNIT.get(unit, 1.0)
    affine = np.diag([to_mm, to_mm, to_mm, 1.0]) @ image.affine
    voxels = _file_voxels(
        path,
        (image.shape[2], image.shape[1], image.shape[0]),
        stored.dtype,
        offset=int(stored.offset),
        volumes=chosen,
        unpack=gzip.open if _is_gzip(path) else None,
        slope=float(stored.slope),
        intercept=float(stored.inter),
    )
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


def load_nifti(path: Path) -> Any:
    """Open a NIfTI told by its content, whatever its name and compression; return nibabel's image.

    Its voxels are not to be read through it: the file is closed again.

    Raises:
        SourceError: a pair of files.
    """
    import nibabel

    with quiet(), gzip.open(path) if _is_gzip(path) else path.open("rb") as file:
        head = file.read(HEAD)
        if b"ni1\0" in head[344:348]:
            raise SourceError("a NIfTI of two files; save it as one, .nii or .nii.gz")
        file.seek(0)
        kind: Any = nibabel.Nifti2Image if head[4:7] == b"n+2" else nibabel.Nifti1Image
        return kind.from_stream(file)


def _open_nrrd(path: Path, time_points: Sequence[int] | None) -> Volume:
    import nrrd

    with path.open("rb") as file:
        header = nrrd.read_header(file)
        offset = file.tell()
    if "data file" in header or "datafile" in header:
        raise SourceError("a NRRD whose voxels lie in another file; save it as one")
    sizes = [int(n) for n in header["sizes"]]
    kinds = [str(kind) for kind in header.get("kinds", ["domain"] * len(sizes))]
    # an axis of one value is a plane of space only where space would have too few
    wide = [i for i, kind in enumerate(kinds) if kind in NRRD_SPACE]
    spatial = wide if len(wide) <= 3 else [i for i in wide if sizes[i] > 1]
    others = [i for i in range(len(sizes)) if i not in spatial and sizes[i] > 1]
    is_last = others == [len(sizes) - 1] and kinds[-1] in (*NRRD_SPACE, *NRRD_TIMES)
    if len(spatial) != 3 or (others and not is_last):
        axes = " × ".join(map(str, sizes))
        raise SourceError(f"{axes} values on axes of {', '.join(kinds)}; expected three of space")
    count = sizes[-1] if others else 1
    chosen, doubts = choose_times(time_points, count, "the fourth axis")
    sizes = [sizes[i] for i in spatial]
    if header.get("line skip") or header.get("byte skip"):
        raise SourceError("a NRRD that skips lines or bytes; save it without")
    affine, more_doubts = _nrrd_affine(header, spatial)
    unpackers: dict[str, Any] = {"raw": None, "gzip": gzip.open, "gz": gzip.open}
    unpackers |= {"bzip2": bz2.open, "bz2": bz2.open}
    if header["encoding"] not in unpackers:
        raise SourceError(f"voxels stored as {header['encoding']}; expected raw, gzip or bzip2")
    voxels = _file_voxels(
        path,
        (sizes[2], sizes[1], sizes[0]),
        np.dtype((">" if header.get("endian") == "big" else "<") + NRRD_TYPES[header["type"]]),
        offset=offset,
        volumes=chosen,
        unpack=unpackers[header["encoding"]],
        packed_from=offset,
    )
    return _volume(path, voxels, affine, "pynrrd", [*doubts, *more_doubts])


def _nrrd_affine(
    header: Mapping[str, Any], spatial: Sequence[int]
) -> tuple[npt.NDArray[np.float64], list[str]]:
    """Return the affine to RAS+ of a NRRD, in mm, and what is doubtful.

    Args:
        header: of the file.
        spatial: which of its axes are those of space.
    """
    space = str(header.get("space", "")).lower()
    names = NRRD_SPACES.get(space, space)
    affine, doubts = np.eye(4), []
    if "space directions" in header:
        affine[:3, :3] = np.array([header["space directions"][i] for i in spatial], np.float64).T
    elif "spacings" in header:
        affine[:3, :3] = np.diag([float(header["spacings"][i]) for i in spatial])
    else:
        raise SourceError("does not say how large its voxels are; save it with space directions")
    affine[:3, 3] = header.get("space origin", (0, 0, 0))
    units = header.get("space units") or [u for u in header.get("units", ()) if u]
    unknown = {str(unit) for unit in units} - NRRD_UNITS.keys()
    if unknown:
        raise SourceError(f"lengths in {', '.join(sorted(unknown))}; expected mm, cm, m or um")
    if units:
        to_mm = {NRRD_UNITS[str(unit)] for unit in units}
        if len(to_mm) > 1:
            raise SourceError(f"lengths in {', '.join(map(str, units))}; expected one unit")
        affine[:3] *= to_mm.pop()
    if re.fullmatch("[rl][ap][si]", names) is None:
        doubts.append("it does not say how it lies in the body; its axes count as left, back, top")
        names = "lps"
    signs = [1.0 if name in "ras" else -1.0 for name in names]
    return np.diag([*signs, 1.0]) @ affine, doubts


def _open_dicom(path: Path, time_points: Sequence[int] | None) -> Volume:
    if path.is_dir():
        found = series_in(path)
        if len(found) != 1:
            firsts = ", ".join(sorted(series.files[0][0].name for series in found)[:5])
            what = f"name one file of each, as {firsts}" if found else "expected one"
            if any(len(series.folders) > 1 for series in found):
                what = "one lies in several folders with others beside it: give each its own folder"
            raise SourceError(f"a folder of {len(found)} DICOM series; {what}")
        (series,) = found
    else:
        series = series_of(path)
    if series.unread:
        (first, reason), *more = series.unread
        besides = f", and {len(more)} more" if more else ""
        raise SourceError(
            f"{first.name} beside its slices cannot be read ({reason}){besides}: slices may be "
            "missing; copy them again, or take them out of the folder"
        )
    stacks = stack_series(series.files, time_points=time_points, named=path)
    stack = stacks[0]
    for number, other in zip(time_points or (), stacks, strict=False):
        if other.shape != stack.shape or not np.allclose(other.affine, stack.affine, atol=0.01):
            raise SourceError(f"time point {number} does not lie where the first does; resample it")
    windows = {v.window for each in stacks for v in each.values}
    digest = hashlib.sha256()
    for file in stack.files:
        digest.update(sampled_digest(file).digest())
    uids = {file: header.get("SOPInstanceUID") for file, _, header in stack.slices}
    is_named = all(uids.values()) and len(set(uids.values())) == len(uids)
    if not is_named:
        series.doubts.append(
            "its slices have no SOPInstanceUID of their own: no DICOM segmentation can refer to "
            "them"
        )
    return Volume(
        path=path,
        shape=stack.shape,
        spacing_mm=stack.spacing_mm,
        affine=stack.affine,
        fingerprint=digest.hexdigest(),
        backend="pydicom",
        doubts=(*series.doubts, *stack.doubts),
        voxels=tuple(_stack_voxels(path, each) for each in stacks),
        window=windows.pop() if len(windows) == 1 else None,
        slices=tuple((file, frame) for file, frame, _ in stack.slices),
        can_be_referred_to=is_named,
    )


def _stack_voxels(path: Path, stack: Stack) -> Voxels:
    """Return the voxels of a series, decoded once."""
    slopes, intercepts = (
        np.array([getattr(v, name) for v in stack.values]).reshape(-1, 1, 1)
        for name in ("slope", "intercept")
    )
    dtype = np.result_type(*{_dtype(header) for _, _, header in stack.slices})
    return Voxels(
        path,
        stack.shape,
        dtype,
        decode=partial(_decode_slices, stack, dtype),
        slope=slopes,
        intercept=intercepts,
    )


def _dtype(header: Dataset) -> np.dtype[Any]:
    """Return what pydicom decodes the pixels of a file to."""
    kind = "i" if header.get("PixelRepresentation") else "u"
    return np.dtype(f"{kind}{max(1, header.BitsAllocated // 8)}")


def _decode_slices(stack: Stack, dtype: np.dtype[Any], spool: BinaryIO) -> None:
    """Write the stored slices of a series to a file in their order."""
    places = {(path, frame): z for z, (path, frame, _) in enumerate(stack.slices)}
    nbytes = stack.shape[1] * stack.shape[2] * dtype.itemsize

    def take(path: Path, frame: int, stored: npt.NDArray[Any]) -> None:
        if (path, frame) not in places:
            return  # of another time point
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
    volumes: Sequence[int],
    unpack: Callable[[BinaryIO], Any] | None,
    packed_from: int = 0,
    slope: float = 1.0,
    intercept: float = 0.0,
) -> tuple[Voxels, ...]:
    """Return voxels of a file, as they lie there or, where they are compressed, unpacked once.

    Args:
        path: of the file.
        shape: (z, y, x).
        dtype: as stored.
        offset: bytes before the first voxel, in the file or in what is unpacked.
        volumes: which of those that lie one behind the other, from 0.
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
    wanted = nbytes * (max(volumes) + 1)
    if unpack is None and size < offset + wanted:
        raise SourceError(
            f"is cut off: {size:,} bytes, of {offset + wanted:,} that its header says"
        )
    if unpack is not None and wanted > DENSEST * size:
        raise SourceError(f"its header says {wanted:,} bytes, which {size:,} cannot hold")
    found = []
    for number in volumes:
        decode, start = None, offset + number * nbytes
        if unpack is not None:
            skip = start - offset if packed_from else start
            decode, start = partial(_unpack, path, unpack, packed_from, skip, nbytes), 0
        found.append(
            Voxels(
                path, shape, dtype, offset=start, decode=decode, slope=slope, intercept=intercept
            )
        )
    return tuple(found)


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
                # the checksum stands at the end, behind whatever else there may be
                stream.read(PIECE)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path}: cannot be unpacked: {one_line(error)}") from error
    if left:
        raise SourceError(f"{path}: is cut off: {left:,} of {nbytes:,} bytes are missing")


def _volume(
    path: Path,
    voxels: tuple[Voxels, ...],
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
        shape=voxels[0].shape,
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
