"""Pictures, images and volumes with their masks, as the network sees them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pictures
from torch import Tensor

from wsi_pipeline.bundle import InputSpec
from wsi_pipeline.errors import RecipeError
from wsi_pipeline.evaluation.confusion import IGNORE, Mask
from wsi_pipeline.evaluation.masks import read_mask
from wsi_pipeline.evaluation.meaning import LabelMap, Lookup
from wsi_pipeline.evaluation.volumes import open_labels
from wsi_pipeline.files.formats import kind_of
from wsi_pipeline.geometry import Shape
from wsi_pipeline.sources.radiology.image import Image, open_image
from wsi_pipeline.sources.radiology.preprocess import open_scan, prepare

Read = tuple[Tensor, Tensor]
"""(C, *shape), uint8 or float32 of full scale 1, and (*shape) uint8 class index."""
ADVICE = (
    'the recipe must name them in `classes`, `ignore` or `background` (a list, or "others"), or, '
    "of masks that went through JPEG, give a `threshold`"
)


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What the values of masks mean to a network, with its class indices by name."""

    values: LabelMap
    indices: Mapping[str, int]


def read_picture(
    path: Path, mask_path: Path, *, meaning: Meaning, channels: int, factor: float
) -> Read:
    """Decode a tile of a slide with its mask; return both at the network's resolution.

    Pictures of 8 bits keep their values; others are brought to [0, 1] by their least and largest.

    Args:
        channels: Those that the network sees, 1 or 3.
        factor: Pixels of the network per pixel of both, along an axis.

    Raises:
        RecipeError: unreadable, or of different sizes.
        EvaluationError: a mask that is none, or with values without a meaning.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            image = _pixels(path, channels)
    except (OSError, Pictures.DecompressionBombError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    truth = _planar_truth(mask_path, meaning, image.shape[1:])
    height, width = (max(1, round(n * factor)) for n in truth.shape)

    def resized(plane: npt.NDArray[Any], how: Pictures.Resampling) -> npt.NDArray[Any]:
        return np.array(Pictures.fromarray(plane).resize((width, height), how))

    planes = [resized(plane, Pictures.Resampling.BICUBIC) for plane in image]
    mask = resized(truth, Pictures.Resampling.NEAREST)
    return torch.from_numpy(np.stack(planes)), torch.from_numpy(mask)


def _pixels(path: Path, channels: int) -> npt.NDArray[Any]:
    """Return a picture's values, (channels, h, w)."""
    if kind_of(path) == "TIFF":
        # Pillow's reader of TIFF prints what it finds wrong, past all that listens
        stored = open_image(path)
        values = stored.read((0, 0), stored.shape)
        if stored.stored.dtype == np.uint8:
            values = (values * (255 / stored.value_range[1])).astype(np.uint8)
        elif stored.channels != 1:
            raise RecipeError(f"{path}: colours of {stored.stored.dtype}; expected 8 bits")
        picture = Pictures.fromarray(values[..., 0] if stored.channels == 1 else values)
    else:
        picture = Pictures.open(path)
    with picture:
        if picture.mode.startswith("I") or picture.mode == "F":
            values = np.asarray(picture).astype(np.float32)
            spread = np.float32(max(float(values.max() - values.min()), 1e-6))
            return np.stack([(values - values.min()) / spread] * channels)
        if channels not in (1, 3):
            raise RecipeError(f"pictures have 1 or 3 channels, the bundle's input has {channels}")
        pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
    return np.moveaxis(pixels.reshape(*pixels.shape[:2], channels), -1, 0)


def read_scan(path: Path, mask_path: Path, *, meaning: Meaning, spec: InputSpec) -> Read:
    """Decode a planar image or a volume with its mask; return both as the network sees them.

    The pixels are those that `segment` would show it. What is padded is unknown.

    Args:
        mask_path: A mask of the same size, or a volume that lies in the same place of the body,
            whatever the order and direction of its axes.

    Raises:
        SourceError: unreadable.
        RecipeError: of different sizes.
        EvaluationError: a mask that is none, lies elsewhere, or has values without a meaning.
    """
    axes = len(spec.patch_size)
    with open_scan(path, axes=axes, time_points=spec.time_points) as scan:
        if isinstance(scan, Image):
            truth = _planar_truth(mask_path, meaning, scan.shape)
        else:
            labels = replace(open_labels(mask_path), values=meaning.values)
            truth = labels.indices(meaning.indices, scan.shape, scan.affine, advice=ADVICE)
        made = prepare(scan, spec)
        pixels = made.read(scan, (0,) * axes, made.shape)
    if made.is_mirrored:
        truth = truth[:, ::-1]
    beyond = [(0, n - m) for n, m in zip(made.padded_shape, truth.shape, strict=True)]
    truth = np.pad(truth, beyond, constant_values=IGNORE)
    # nearest to the centre of each pixel of the network's grid
    nearest = [
        np.minimum((np.arange(n) + 0.5) * step, of - 1).astype(np.intp)
        for n, step, of in zip(made.shape, made.step, made.padded_shape, strict=True)
    ]
    image = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    return torch.from_numpy(image), torch.from_numpy(truth[np.ix_(*nearest)])


def _planar_truth(path: Path, meaning: Meaning, image: Shape) -> Mask:
    """Return the class index of each pixel of a mask, which is of the size of its image."""
    codes = read_mask(path)
    if codes.shape != image:
        sides = [" × ".join(map(str, shape[::-1])) for shape in (codes.shape, image)]
        raise RecipeError(f"{path} has {sides[0]} pixels, its image {sides[1]}")
    return Lookup(path, meaning.values, meaning.indices, advice=ADVICE)(codes)
