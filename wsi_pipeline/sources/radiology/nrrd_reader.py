"""NRRD in one file."""

from __future__ import annotations

import bz2
import gzip
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nrrd
import numpy as np

from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources.radiology.volume import Affine, Volume, choose_times, volume_of_file

TYPES = {
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
ORIENTATIONS = {
    "right-anterior-superior": "ras",
    "left-anterior-superior": "las",
    "left-posterior-superior": "lps",
}
SPACE = frozenset(["domain", "space", "???", "none"])
"""Kinds of axes that are of space; of the last two nothing is known."""
TIMES = frozenset(["time", "list"])
"""Kinds of a last axis whose values are volumes."""
UNITS = {
    "": 1.0, "mm": 1.0, "millimeter": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3, "µm": 1e-3,
    "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3, "nm": 1e-6,
}  # fmt: skip
"""Millimetres of what programs write as the unit of space."""
UNPACKERS: dict[str, Any] = {
    "raw": None,
    **dict.fromkeys(("gzip", "gz"), gzip.open),
    **dict.fromkeys(("bzip2", "bz2"), bz2.open),
}
"""Openers of voxels by their encoding."""


def open_nrrd(path: Path, time_points: Sequence[int] | None) -> Volume:
    """Open a NRRD; return the volume.

    Raises:
        SourceError: one that is not read here.
    """
    with path.open("rb") as file:
        header = nrrd.read_header(file)
        offset = file.tell()
    if "data file" in header or "datafile" in header:
        raise SourceError("a NRRD whose voxels lie in another file; save it as one")
    sizes = [int(n) for n in header["sizes"]]
    kinds = [str(kind) for kind in header.get("kinds", ["domain"] * len(sizes))]
    # An axis of one value is a plane of space only where space would have too few.
    wide = [i for i, kind in enumerate(kinds) if kind in SPACE]
    spatial = wide if len(wide) <= 3 else [i for i in wide if sizes[i] > 1]
    others = [i for i in range(len(sizes)) if i not in spatial and sizes[i] > 1]
    is_last = others == [len(sizes) - 1] and kinds[-1] in (*SPACE, *TIMES)
    if len(spatial) != 3 or (others and not is_last):
        axes = " × ".join(map(str, sizes))
        raise SourceError(f"{axes} values on axes of {', '.join(kinds)}; expected three of space")
    count = sizes[-1] if others else 1
    chosen, doubts = choose_times(time_points, count, "the fourth axis")
    if header.get("line skip") or header.get("byte skip"):
        raise SourceError("a NRRD that skips lines or bytes; save it without")
    affine, more_doubts = _affine(header, spatial)
    if header["encoding"] not in UNPACKERS:
        raise SourceError(f"voxels stored as {header['encoding']}; expected raw, gzip or bzip2")
    unpack = UNPACKERS[header["encoding"]]
    return volume_of_file(
        path,
        affine,
        shape=tuple(sizes[i] for i in reversed(spatial)),
        dtype=np.dtype((">" if header.get("endian") == "big" else "<") + TYPES[header["type"]]),
        offset=0 if unpack else offset,
        volumes=chosen,
        unpack=unpack,
        packed_from=offset,
        backend="pynrrd",
        doubts=[*doubts, *more_doubts],
    )


def _affine(header: Mapping[str, Any], spatial: Sequence[int]) -> tuple[Affine, list[str]]:
    """Return the affine to RAS+ in mm of the axes that are of space, and what is doubtful."""
    space = str(header.get("space", "")).lower()
    names = ORIENTATIONS.get(space, space)
    affine, doubts = np.eye(4), []
    if "space directions" in header:
        affine[:3, :3] = np.array([header["space directions"][i] for i in spatial], np.float64).T
    elif "spacings" in header:
        affine[:3, :3] = np.diag([float(header["spacings"][i]) for i in spatial])
    else:
        raise SourceError("does not say how large its voxels are; save it with space directions")
    affine[:3, 3] = header.get("space origin", (0, 0, 0))
    said = header.get("space units") or filter(None, header.get("units", ()))
    units = list(map(str, said))
    if unknown := set(units) - UNITS.keys():
        raise SourceError(f"lengths in {', '.join(sorted(unknown))}; expected mm, cm, m or um")
    if units:
        to_mm = {UNITS[unit] for unit in units}
        if len(to_mm) > 1:
            raise SourceError(f"lengths in {', '.join(units)}; expected one unit")
        affine[:3] *= to_mm.pop()
    if re.fullmatch("[rl][ap][si]", names) is None:
        doubts.append("it does not say how it lies in the body; its axes count as left, back, top")
        names = "lps"
    signs = [1.0 if name in "ras" else -1.0 for name in names]
    return np.diag([*signs, 1.0]) @ affine, doubts
