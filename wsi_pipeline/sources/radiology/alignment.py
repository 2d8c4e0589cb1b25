"""Whether two volumes are of one body, and one turned so that its axes are those of the other."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import SourceError
from wsi_pipeline.geometry import Shape

Affine = npt.NDArray[np.float64]
Voxels = npt.NDArray[Any]

OFF = 0.2
"""Voxels by which a corner may lie beside its place: affines are rounded as they are written."""


def turned_onto(
    voxels: Voxels, affine: Affine, shape: Shape, onto: Affine, *, is_part: bool = False
) -> Voxels:
    """Turn and mirror a mask so that it lies voxel on voxel on an image; return it.

    Nothing is resampled: the grids are the same but for the order and direction of their axes.

    Args:
        voxels: (z, y, x) of the mask.
        affine: (4, 4), maps its (x, y, z, 1) voxel indices to mm in RAS+.
        shape: (z, y, x) of the image.
        onto: (4, 4), likewise of the image.
        is_part: Whether the mask may end before the image does, and is 0 there, as segmentations
            of DICOM whose empty slices are left out.

    Raises:
        SourceError: it lies elsewhere, or is of another resolution; the message says by how much.
    """
    # Voxels of the mask to voxels of the image.
    change = np.linalg.inv(onto) @ affine
    turn = np.rint(change[:3, :3]).astype(int)
    sizes = np.array(voxels.shape[::-1])
    corners = np.array(list(itertools.product(*((0, n - 1) for n in sizes))))
    placed = corners @ change[:3, :3].T + change[:3, 3]
    is_turn = (np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all()
    if not is_turn:
        turn = np.eye(3, dtype=int)
    whole = corners @ turn.T
    # Along each axis of the image the mask begins at a whole voxel.
    start = np.rint((placed - whole).mean(0)).astype(int) + whole.min(0)
    expected = whole - whole.min(0) + start
    extent = np.abs(turn) @ sizes
    room = np.array(shape[::-1])
    fits = (start >= 0).all() and (start + extent <= room).all()
    is_whole = (start == 0).all() and (extent == room).all()
    if not is_turn or np.abs(placed - expected).max() > OFF or not (fits if is_part else is_whole):
        raise SourceError(_difference(affine, voxels.shape, onto, shape))
    order = [int(np.flatnonzero(row)[0]) for row in turn]
    turned = voxels.transpose(2, 1, 0).transpose(order)
    turned = turned[tuple(slice(None, None, int(row.sum())) for row in turn)]
    if not is_whole:
        around = [(int(a), int(m - a - n)) for a, n, m in zip(start, extent, room, strict=True)]
        turned = np.pad(turned, around)
    return turned.transpose(2, 1, 0)


def _difference(affine: Affine, shape: Shape, onto: Affine, wanted: Shape) -> str:
    """Return in what two grids differ."""
    told = []
    for name, own, count in (("mask", affine, shape), ("image", onto, wanted)):
        sizes = " × ".join(f"{n:.4g}" for n in np.linalg.norm(own[:3, :3], axis=0))
        corner = ", ".join(f"{n:.4g}" for n in own[:3, 3])
        along = np.abs(own[:3, :3]).argmax(0)
        turned = "".join("LPIRAS"[i + 3 * (own[i, k] > 0)] for k, i in enumerate(along))
        voxels = " × ".join(map(str, reversed(count)))
        told.append(f"the {name} has {voxels} voxels of {sizes} mm from ({corner}), axes {turned}")
    return f"does not lie on its image: {'; '.join(told)}. Resample the mask onto the image"
