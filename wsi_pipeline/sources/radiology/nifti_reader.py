"""NIfTI, told by its content."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.formats import HEAD
from wsi_pipeline.files.paths import quiet
from wsi_pipeline.sources.radiology.volume import (
    Volume,
    choose_times,
    in_mm,
    volume_of_file,
    voxel_size,
)

MM_PER_UNIT = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
"""Of NIfTI's codes for units of length: unknown, m, mm and µm."""


def open_nifti(path: Path, time_points: Sequence[int] | None) -> Volume:
    """Open a NIfTI; return the volume.

    Raises:
        SourceError: one that is not read here.
    """
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
    if not header["sform_code"] and not header["qform_code"]:
        doubts.append(
            "it does not say how it lies in the body; its axes count as right, front, top"
        )
    said = np.array([to_mm * float(v) for v in header.get_zooms()[:3]])
    if not np.allclose(said, voxel_size(affine), rtol=0.01):
        doubts.append(
            f"its voxels are {in_mm(voxel_size(affine))} by its affine, {in_mm(said)} by its "
            "header; the first count"
        )
    return volume_of_file(
        path,
        affine,
        shape=tuple(image.shape[2::-1]),
        dtype=stored.dtype,
        offset=int(stored.offset),
        volumes=chosen,
        unpack=gzip.open if _is_gzip(path) else None,
        slope=float(stored.slope),
        intercept=float(stored.inter),
        backend="nibabel",
        doubts=doubts,
    )


def load_nifti(path: Path) -> Any:
    """Open a NIfTI whatever its name and compression; return nibabel's image.

    Its voxels are not to be read through it: the file is closed again.

    Raises:
        SourceError: a pair of files.
    """
    with quiet(), gzip.open(path) if _is_gzip(path) else path.open("rb") as file:
        head = file.read(HEAD)
        if b"ni1\0" in head[344:348]:
            raise SourceError("a NIfTI of two files; save it as one, .nii or .nii.gz")
        file.seek(0)
        kind: Any = nibabel.Nifti2Image if head[4:7] == b"n+2" else nibabel.Nifti1Image
        return kind.from_stream(file)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"
