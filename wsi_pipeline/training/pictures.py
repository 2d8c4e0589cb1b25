"""Pictures, images and volumes with their masks, as the network sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pictures
from PIL import UnidentifiedImageError
from torch import Tensor

from wsi_pipeline.bundle import InputSpec
from wsi_pipeline.errors import RecipeError
from wsi_pipeline.evaluation.confusion import IGNORE
from wsi_pipeline.geometry import Shape
from wsi_pipeline.sources.radiology.alignment import turned_onto
from wsi_pipeline.sources.radiology.image import Image
from wsi_pipeline.sources.radiology.preprocess import Preparation, open_scan, prepare
from wsi_pipeline.sources.radiology.volume import Volume, open_volume

Read = tuple[Tensor, Tensor]
"""(C, *shape), uint8 or float32 of full scale 1, and (*shape) uint8 class index."""
Table = npt.NDArray[np.uint8]
UNREADABLE = (OSError, UnidentifiedImageError, Pictures.DecompressionBombError)
"""What Pillow raises on a damaged picture."""


def read_picture(
    path: Path, mask_path: Path, *, table: Table, channels: int, factor: float
) -> Read:
    """Decode a tile of a slide with its mask; return both at the network's resolution.

    Pictures of 8 bits keep their values; others are brought to [0, 1] by their least and largest.

    Args:
        path: of the picture.
        mask_path: of the mask, of the same size.
        table: class index of each mask value.
        channels: that the network sees, 1 or 3.
        factor: pixels of the network per pixel of both, along an axis.

    Raises:
        RecipeError: unreadable, or of different sizes.
    """
    try:
        with Pictures.open(path) as opened:
            image = _pixels(opened, channels)
    except UNREADABLE as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    truth = _class_index(_codes(mask_path), table, mask_path)
    _check_same(truth.shape, tuple(image.shape[1:]), mask_path)
    height, width = (max(1, round(n * factor)) for n in truth.shape)
    return _resized(image, (height, width)), _resized_mask(truth, (height, width))


def _pixels(image: Pictures.Image, channels: int) -> Tensor:
    """Return a picture's values, (channels, H, W)."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        spread = max(float(values.max() - values.min()), 1e-6)
        grey = torch.from_numpy((values - values.min()) / spread)
        return grey.expand(channels, -1, -1).contiguous()
    if channels not in (1, 3):
        raise RecipeError(f"pictures have 1 or 3 channels, the bundle's input has {channels}")
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _one_band(codes: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """Return a mask's values where its picture has them in each of its colours."""
    if codes.ndim == 2:
        return codes
    colours = codes[..., : codes.shape[2] - (codes.shape[2] in (2, 4))]  # without transparency
    if (colours != colours[..., :1]).any():
        raise RecipeError(f"{path} is a picture in colour; expected one value a pixel")
    return np.asarray(colours[..., 0])


def _class_index(codes: npt.NDArray[Any], table: Table, path: Path) -> Table:
    """Return the class index of each pixel of a mask."""
    if codes.dtype.kind not in "biu":
        if (codes != np.floor(codes)).any():
            raise RecipeError(f"{path} holds fractions; expected one whole value a pixel")
        codes = codes.astype(np.int64)
    codes = codes.astype(np.uint8) if codes.dtype == bool else codes
    if codes.size and (codes.min() < 0 or codes.max() >= len(table)):
        raise RecipeError(f"{path} holds {codes.max()}; expected values from 0 to {len(table) - 1}")
    return np.asarray(table[codes])


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a picture at another size, antialiased when reducing."""
    if size == tuple(image.shape[1:]):
        return image.contiguous()
    planes = [
        np.asarray(
            Pictures.fromarray(plane.numpy()).resize(size[::-1], Pictures.Resampling.BICUBIC)
        )
        for plane in image
    ]
    return torch.from_numpy(np.stack(planes))


def _resized_mask(truth: Table, size: tuple[int, int]) -> Tensor:
    if size != truth.shape:
        truth = np.asarray(
            Pictures.fromarray(truth).resize(size[::-1], Pictures.Resampling.NEAREST)
        )
    return torch.from_numpy(np.array(truth))


def read_scan(path: Path, mask_path: Path, *, table: Table, spec: InputSpec) -> Read:
    """Decode a planar image or a volume with its mask; return both as the network sees them.

    The pixels are those that `segment` would show it. What is padded is unknown.

    Args:
        path: of the image or volume.
        mask_path: of the mask, of the same size, or a volume that lies in the same place of the
            body, whatever the order and direction of its axes.
        table: class index of each mask value.
        spec: how the network wants to see it.

    Raises:
        SourceError: unreadable.
        RecipeError: of different sizes, or a mask that is none.
    """
    axes = len(spec.patch_size)
    with open_scan(path, axes=axes, time_points=spec.time_points) as scan:
        codes = _codes(mask_path) if isinstance(scan, Image) else _codes_on(scan, mask_path)
        truth = _class_index(codes, table, mask_path)
        _check_same(truth.shape, scan.shape, mask_path)
        made = prepare(scan, spec)
        pixels = made.read(scan, (0,) * axes, made.shape)
    image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
    return image, torch.from_numpy(_on_grid(truth, made))


def _codes(path: Path) -> npt.NDArray[Any]:
    """Return the values of a picture that is a mask, (y, x)."""
    try:
        with Pictures.open(path) as opened:
            return _one_band(np.asarray(opened), path)
    except UNREADABLE as error:
        raise RecipeError(f"cannot read {path}: {error}") from error


def _codes_on(volume: Volume, path: Path) -> npt.NDArray[Any]:
    """Return the values of a mask, (z, y, x), turned so that it lies on its volume."""
    with open_volume(path) as mask:
        codes = mask.read((0, 0, 0), mask.shape)[..., 0]
        return turned_onto(codes, mask.affine, volume.shape, volume.affine)


def _check_same(mask: Shape, image: Shape, path: Path) -> None:
    """Refuse a mask of another size than its image."""
    if mask != image:
        sides = [" × ".join(map(str, shape[::-1])) for shape in (mask, image)]
        raise RecipeError(f"{path} has {sides[0]} pixels, its image {sides[1]}")


def _on_grid(truth: Table, made: Preparation) -> Table:
    """Return the class index nearest to the centre of each pixel of the network's grid."""
    if made.is_mirrored:
        truth = truth[:, ::-1]
    beyond = [(0, n - m) for n, m in zip(made.padded_shape, truth.shape, strict=True)]
    truth = np.pad(truth, beyond, constant_values=IGNORE)
    nearest = [
        np.minimum((np.arange(n) + 0.5) * step, of - 1).astype(np.intp)
        for n, step, of in zip(made.shape, made.step, made.padded_shape, strict=True)
    ]
    return truth[np.ix_(*nearest)]
