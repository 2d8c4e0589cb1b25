"""Three orthogonal slices of a volume with the mask over them, as a picture for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export import MaskLike
from wsi_pipeline.export.lesions import Lesions
from wsi_pipeline.export.overlay import write_overlay
from wsi_pipeline.geometry import Shape, box_slices
from wsi_pipeline.sources.radiology.volume import Volume

SIDE = 480
"""Pixels of the longest side of the volume in the picture."""

SLAB = 1 << 25
"""Voxels looked at together."""

INK = (255, 220, 0)

Reader = Callable[[Shape, Shape], npt.NDArray[Any]]
"""Returns the box of a volume at a start, of a shape."""


class Plane(NamedTuple):
    """A plane through a body, as radiologists look at it.

    Attributes:
        name: what they call it.
        left: side of the body at the left.
        top: side of the body at the top.
        across: axis of the body (0 to the right, 1 to the front, 2 to the top) that it is
            perpendicular to.
        down: axis that its rows follow, one below the other.
        along: axis that its columns follow.
    """

    name: str
    left: str
    top: str
    across: int
    down: int
    along: int


PLANES = (
    Plane("axial", "R", "A", 2, 1, 0),
    Plane("coronal", "R", "S", 1, 2, 0),
    Plane("sagittal", "A", "S", 0, 2, 1),
)


@dataclass(frozen=True, kw_only=True)
class Body:
    """How a volume lies in the body.

    Attributes:
        axes: array axis (z, y, x) next to each axis of the body: right, front, top.
        is_forward: whether the array's axis runs along it, or the other way.
    """

    axes: tuple[int, ...]
    is_forward: tuple[bool, ...]

    @classmethod
    def of(cls, affine: npt.NDArray[np.float64]) -> Self:
        """Return it by what maps (x, y, z, 1) voxel indices to mm in RAS+."""
        import nibabel

        io_orientation: Any = nibabel.orientations.io_orientation
        # Of x, y and z the axis of the body, and the direction.
        turned = io_orientation(affine)
        axes = [2 - int(np.flatnonzero(turned[:, 0] == body)[0]) for body in range(3)]
        return cls(axes=tuple(axes), is_forward=tuple(bool(turned[2 - a, 1] > 0) for a in axes))

    def cut(self, read: Reader, shape: Shape, plane: Plane, at: int) -> npt.NDArray[Any]:
        """Return a slice as radiologists look at it, read a slab at a time.

        Args:
            shape: (z, y, x) of the volume.
            at: Index along the array axis that it is perpendicular to.
        """
        axis, start, size = self.axes[plane.across], [0, 0, 0], list(shape)
        start[axis], size[axis] = at, 1
        step = max(1, SLAB // (shape[1] * shape[2])) if axis else 1
        parts = []
        for z in range(start[0], start[0] + size[0], step):
            depth = min(step, start[0] + size[0] - z)
            parts.append(read((z, *start[1:]), (depth, *size[1:])))
        found = np.concatenate(parts).squeeze(axis)
        if self.axes[plane.down] > self.axes[plane.along]:
            found = found.T
        # The side of the body that a plane has at its left or top is the far end of a forward axis.
        ways = (self.is_forward[plane.down], self.is_forward[plane.along])
        return found[tuple(slice(None, None, -1 if way else 1) for way in ways)]


def write_planes_overlay(
    path: Path,
    volume: Volume,
    mask: MaskLike,
    classes: Sequence[ClassInfo],
    lesions: Sequence[Lesions],
    *,
    notes: Sequence[str] = (),
) -> None:
    """Write a PNG of axial, coronal and sagittal slices through the largest lesion, outlined.

    The patient's right is at the left, the front at the left or the top; without any lesion the
    slices go through the middle of the volume. Proportions are those of the body.

    Args:
        path: file to write; appears when it is complete.
        mask: uint8 (z, y, x) class index.
        classes: in the mask's order; 0 is the background.
        lesions: of the mask, as `count_lesions` finds them.
        notes: that stand before the legend.
    """
    listed = [lesion for own in lesions for lesion in own.largest]
    at = tuple(n // 2 for n in volume.shape)
    if listed:
        largest = max(listed, key=lambda lesion: lesion.pixels)
        at = tuple((a + b - 1) // 2 for a, b in zip(largest.start, largest.stop, strict=True))
    body, window = Body.of(volume.affine), volume.window
    planes, masks = [], []
    for plane in PLANES:
        found = [
            body.cut(read, volume.shape, plane, at[body.axes[plane.across]])
            for read in (volume_reader(volume), mask_reader(mask))
        ]
        size = _size(volume, (body.axes[plane.down], body.axes[plane.along]))
        planes.append(_resized(found[0], size, Image.Resampling.BILINEAR))
        masks.append(_resized(found[1], size, Image.Resampling.NEAREST))
    if window is None:
        shown = np.concatenate([plane.ravel() for plane in planes])
        # By the ends a few bright voxels, as of metal, would leave all others black.
        window = (float(np.percentile(shown, 1)), float(np.percentile(shown, 99.5)))
    low, high = window
    grey = [np.clip((plane - low) / max(high - low, 1e-6) * 255, 0, 255) for plane in planes]
    pictures = [
        _lettered(g.astype(np.uint8), plane.left, plane.top)
        for g, plane in zip(grey, PLANES, strict=True)
    ]
    write_overlay(
        path,
        _side_by_side(pictures),
        _side_by_side([m.astype(np.uint8) for m in masks]),
        classes=classes,
        captions=[_caption(own) for own in lesions],
        notes=notes,
        um=1000 * max(n * mm for n, mm in zip(volume.shape, volume.spacing_mm, strict=True)) / SIDE,
    )


def _caption(own: Lesions) -> str:
    return f"{own.name}: {own.count} lesion{'s' * (own.count != 1)}, {own.size or 0:.2f} ml"


def volume_reader(volume: Volume) -> Reader:
    """Return what reads the values of a volume."""
    return lambda start, shape: volume.read(start, shape)[..., 0]


def mask_reader(mask: MaskLike) -> Reader:
    """Return what reads the class indices of a mask."""
    return lambda start, shape: np.asarray(mask[box_slices(start, shape)], np.float32)


def _size(volume: Volume, axes: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) in pixels of a plane, rows and columns along array axes."""
    lengths = [n * mm for n, mm in zip(volume.shape, volume.spacing_mm, strict=True)]
    height, width = (max(1, round(SIDE * lengths[axis] / max(lengths))) for axis in axes)
    return height, width


def _resized(
    plane: npt.NDArray[np.float32], size: tuple[int, int], how: Image.Resampling
) -> npt.NDArray[np.float32]:
    picture = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(picture.resize(size[::-1], how))


def _lettered(grey: npt.NDArray[np.uint8], left: str, top: str) -> npt.NDArray[np.uint8]:
    """Return a picture in RGB with letters for the sides of the body."""
    picture = Image.fromarray(grey).convert("RGB")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((3, picture.height / 2), left, INK, font, anchor="lm")
    draw.text((picture.width / 2, 2), top, INK, font, anchor="mt")
    return np.asarray(picture)


def _side_by_side(pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Return pictures in one row, centred, on black."""
    height = max(picture.shape[0] for picture in pictures)
    padded = []
    for picture in pictures:
        above = (height - picture.shape[0]) // 2
        below = height - picture.shape[0] - above
        rest = [(0, 0)] * (picture.ndim - 2)
        padded.append(np.pad(picture, [(above, below), (4, 4), *rest]))
    return np.concatenate(padded, axis=1)
