"""The mask of a volume as NIfTI, in the volume's own geometry."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from wsi_pipeline.export import MaskLike
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.sources.radiology.volume import Volume

GEOMETRY = (
    "xyzt_units", "sform_code", "srow_x", "srow_y", "srow_z", "qform_code",
    "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
)  # fmt: skip
"""Fields of a NIfTI's header that say how its voxels lie; the others may tell who it is."""

SLAB = 1 << 26
"""Voxels written at once."""

LEVEL = 4
"""Of compression: masks are mostly runs, higher ones take longer for nothing."""


def write_nifti(path: Path, mask: MaskLike, volume: Volume) -> None:
    """Write class indices as NIfTI, uint8; affine, codes and units are those of the volume.

    Of a NIfTI the fields are copied to the last bit; of other formats the affine is written as
    both sform and qform, with the code of scanner space.

    Args:
        path: File to write, .nii.gz or .nii; appears when it is complete.
        mask: Class indices, uint8 (z, y, x), read in slabs.
    """
    header = _header(volume)
    depth, height, width = volume.shape
    step = max(1, SLAB // (height * width))
    with written_beside(path) as beside, beside.open("wb") as plain:
        # Without name and time, so that the same mask gives the same bytes.
        packed = gzip.GzipFile("", "wb", LEVEL, plain, mtime=0) if path.suffix == ".gz" else None
        file: Any = packed or plain
        file.write(header.binaryblock)
        # no extension
        file.write(bytes(int(header["vox_offset"]) - len(header.binaryblock)))
        for z in range(0, depth, step):
            # (z, y, x) in C order is (x, y, z) in the file's order
            file.write(np.ascontiguousarray(mask[z : z + step, :, :], np.uint8).data)
        if packed is not None:
            packed.close()


def _header(volume: Volume) -> Any:
    """Return the header of a mask that lies where a volume does."""
    import nibabel

    from wsi_pipeline.sources.radiology.nifti_reader import load_nifti

    new: Any = nibabel.Nifti1Header
    shape = volume.shape[::-1]
    if volume.backend == "nibabel":
        source = load_nifti(volume.path)
        header = type(source.header)()
        header.set_data_shape(shape)
        for name in GEOMETRY:
            header[name] = source.header[name]
        # the first is part of the quaternion
        header["pixdim"][:4] = source.header["pixdim"][:4]
    else:
        header = new()
        header.set_data_shape(shape)
        header.set_xyzt_units("mm")
        header.set_zooms(volume.spacing_mm[::-1])
        header.set_sform(volume.affine, "scanner")
        header.set_qform(volume.affine, "scanner")
    header.set_data_dtype(np.uint8)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = len(header.binaryblock) + 4
    return header
