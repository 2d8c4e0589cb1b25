"""Pictures and volumes decoded with their masks, brought to what the network wants."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from wsi_pipeline.bundle import InputSpec
from wsi_pipeline.errors import RecipeError

Read = tuple[Tensor, Tensor]
"""(C, *shape), uint8 or float32 in [0, 1], and (*shape) uint8 class index."""
Table = npt.NDArray[np.uint8]


def read_picture(
    path: Path, mask_path: Path, *, table: Table, spec: InputSpec, mpp: float | None
) -> Read:
    """Decode a picture with its mask; return both at the network's resolution.

    Pictures of 8 bits keep their values; others are brought to [0, 1] by their least and largest.

    Args:
        path: of the picture.
        mask_path: of the mask, of the same size.
        table: class index of each mask value.
        spec: says the resolution, `fit` or `mpp`, and the channels.
        mpp: µm per pixel of both, for `mpp`.

    Raises:
        RecipeError: unreadable, or of different sizes.
    """
    try:
        with Image.open(path) as opened:
            image = _pixels(opened, spec.channels)
        with Image.open(mask_path) as opened:
            codes = np.asarray(opened)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise RecipeError(f"cannot read {path} with {mask_path}: {error}") from error
    truth = _class_index(_one_band(codes, mask_path), table, mask_path)
    if truth.shape != image.shape[1:]:
        raise RecipeError(
            f"{mask_path} is {truth.shape[::-1]} px, its image is {tuple(image.shape[:0:-1])}"
        )
    if spec.fit is not None:
        size = (spec.fit[0], spec.fit[1])
    else:
        factor = (mpp or 1.0) / (spec.mpp or 1.0)
        height, width = (max(1, round(n * factor)) for n in truth.shape)
        size = (height, width)
    return _resized(image, size), _resized_mask(truth, size)


def _pixels(image: Image.Image, channels: int) -> Tensor:
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
        np.asarray(Image.fromarray(plane.numpy()).resize(size[::-1], Image.Resampling.BICUBIC))
        for plane in image
    ]
    return torch.from_numpy(np.stack(planes))


def _resized_mask(truth: Table, size: tuple[int, int]) -> Tensor:
    if size != truth.shape:
        truth = np.asarray(Image.fromarray(truth).resize(size[::-1], Image.Resampling.NEAREST))
    return torch.from_numpy(np.array(truth))


def read_volume(
    path: Path, mask_path: Path, *, table: Table, spec: InputSpec, mpp: float | None = None
) -> Read:
    """Decode a NIfTI volume with its mask; return both at the network's spacing.

    Axes become (z, y, x). Values are brought to [0, 1] between the 0.5th and 99.5th percentile, so
    that one bright vessel does not darken the rest.

    Args:
        path: of the volume.
        mask_path: of the mask, of the same size.
        table: class index of each mask value.
        spec: says the spacing.
        mpp: not for volumes.

    Raises:
        RecipeError: unreadable, of another number of axes, or of different sizes.
    """
    if not find_spec("nibabel"):
        raise RecipeError('volumes are read with nibabel: pip install "wsi-pipeline[train]"')
    import nibabel

    try:
        opened: Any = nibabel.load(path)
        mask: Any = nibabel.load(mask_path)
        values, codes = np.asarray(opened.dataobj), np.asarray(mask.dataobj)
        spacing = [float(v) for v in opened.header.get_zooms()[:3]]
    except Exception as error:  # nibabel raises anything on damaged files
        raise RecipeError(f"cannot read {path} with {mask_path}: {error}") from error
    if values.ndim != 3 or values.shape != codes.shape:
        raise RecipeError(
            f"{path} is {values.shape}, {mask_path} is {codes.shape}; expected three equal axes"
        )
    truth = _class_index(codes.T, table, mask_path)
    low, high = np.percentile(values, [0.5, 99.5])
    scaled = np.clip((values.T.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
    size = [
        max(1, round(n * own / wanted))
        for n, own, wanted in zip(
            truth.shape, reversed(spacing), spec.spacing_mm or (1, 1, 1), strict=True
        )
    ]
    image = torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))[None, None]
    mask_tensor = torch.from_numpy(np.ascontiguousarray(truth))[None, None]
    if size != list(truth.shape):
        image = functional.interpolate(image, size=size, mode="trilinear")
        mask_tensor = functional.interpolate(mask_tensor.float(), size=size, mode="nearest-exact")
    return image[0].expand(spec.channels, -1, -1, -1).contiguous(), mask_tensor[0, 0].to(
        torch.uint8
    )
