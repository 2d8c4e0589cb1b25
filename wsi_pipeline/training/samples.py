"""Images and masks in, at the network's resolution; random crops out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor
from torch.nn import functional

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.training.recipe import DataSpec, Recipe

IGNORE = 255
"""Truth of pixels that are neither learnt nor judged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One image with its truth, at the network's resolution.

    Attributes:
        patient: who it is from.
        name: of the file.
        image: (3, H, W) uint8.
        truth: (H, W) uint8 class index, or IGNORE.
    """

    patient: str
    name: str
    image: Tensor
    truth: Tensor


def load_samples(recipe: Recipe, data_dir: Path) -> list[Sample]:
    """Load all images of a recipe, brought to the network's mpp once; return them.

    Args:
        recipe: says which.
        data_dir: the folder that the recipe's paths start from.

    Raises:
        RecipeError: a file that is missing, unreadable or does not match its mask.
    """
    names = [c.name for c in recipe.bundle.classes]
    mpp = recipe.bundle.mpp
    return [
        _load_sample(image, mask, spec, names, mpp)
        for spec in recipe.data
        for image, mask in _pairs(spec, data_dir)
    ]


def _pairs(spec: DataSpec, data_dir: Path) -> list[tuple[Path, Path]]:
    images = sorted(data_dir.glob(spec.images))
    if not images:
        raise RecipeError(f"no image of patient {spec.patient} matches {data_dir / spec.images}")
    masks = data_dir / spec.masks
    pairs = [(i, masks / f"{i.stem}.png" if masks.is_dir() else masks) for i in images]
    if not masks.is_dir() and len(pairs) > 1:
        raise RecipeError(f"{len(pairs)} images match {spec.images}, but {spec.masks} is one mask")
    return pairs


def _load_sample(
    image_path: Path, mask_path: Path, spec: DataSpec, names: Sequence[str], mpp: float
) -> Sample:
    try:
        with Image.open(image_path) as opened:
            image = opened.convert("RGB")
        with Image.open(mask_path) as opened:
            codes = np.asarray(opened)
    except (OSError, UnidentifiedImageError) as error:
        raise RecipeError(f"cannot read {image_path} with {mask_path}: {error}") from error
    if codes.shape != (image.height, image.width):
        raise RecipeError(
            f"{mask_path} is {codes.shape[::-1]} px in {codes.ndim} axes, "
            f"its image is {image.size}; expected one value a pixel"
        )
    truth = Image.fromarray(_class_indices(codes, spec, names))
    factor = spec.mpp / mpp
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)  # antialiased when reducing
        truth = truth.resize(size, Image.Resampling.NEAREST)
    return Sample(
        patient=spec.patient,
        name=image_path.name,
        image=torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(),
        truth=torch.from_numpy(np.array(truth)),
    )


def _class_indices(
    codes: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], spec: DataSpec, names: Sequence[str]
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    table = np.zeros(256, np.uint8)
    for name, values in spec.classes.items():
        table[list(values)] = names.index(name)
    table[list(spec.ignore)] = IGNORE
    return table[codes.astype(np.uint8)]


def draw(samples: Sequence[Sample], generator: Generator) -> Sample:
    """Draw a patient, then one of its images by area; return the image."""
    patients = sorted({s.patient for s in samples})
    patient = patients[int(torch.randint(len(patients), (), generator=generator))]
    own = [s for s in samples if s.patient == patient]
    areas = torch.tensor([float(s.truth.numel()) for s in own])
    return own[int(torch.multinomial(areas, 1, generator=generator))]


def random_crop(
    sample: Sample, size: int, generator: Generator, *, scale: float, rotate: float
) -> tuple[Tensor, Tensor]:
    """Cut a square, turned, flipped and scaled at random; return it with its truth.

    What lies beyond the image is mirrored.

    Args:
        sample: to cut from.
        size: side of the crop, px.
        generator: of the random numbers.
        scale: largest enlargement and reduction.
        rotate: share of crops turned by any angle, not only right ones.

    Returns:
        (3, size, size) float32 in [0, 1] and (size, size) uint8.
    """
    turn, any_angle, zoom, mirror, at_y, at_x = torch.rand(6, generator=generator).tolist()
    angle = 2 * math.pi * turn if any_angle < rotate else math.pi / 2 * int(4 * turn)
    step = math.exp((2 * zoom - 1) * math.log(scale))  # image px per crop px
    reach = size * step / 2
    height, width = sample.truth.shape
    centre = [_place(height, reach, at_y), _place(width, reach, at_x)]
    # the window holds the crop at any angle; two pixels more for the interpolation
    window = [
        slice(max(0, int(c - reach * 1.4143) - 2), min(n, int(c + reach * 1.4143) + 3))
        for c, n in zip(centre, (height, width), strict=True)
    ]
    image = sample.image[:, window[0], window[1]].float() / 255
    truth = sample.truth[window[0], window[1]].float()
    flip = -1.0 if mirror < 0.5 else 1.0
    theta = torch.tensor(
        [[math.cos(angle) * flip, -math.sin(angle)], [math.sin(angle) * flip, math.cos(angle)]]
    )
    steps = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2) * step
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1) @ theta.T  # (x, y)
    corner = torch.tensor([centre[1] - window[1].start, centre[0] - window[0].start])
    extent = torch.tensor([truth.shape[1], truth.shape[0]], dtype=torch.float32)
    where = (2 * (grid + corner) / extent - 1)[None]
    return (
        _sampled(image, where, "bilinear"),
        _sampled(truth[None], where, "nearest")[0].to(torch.uint8),
    )


def _place(length: int, reach: float, at: float) -> float:
    """Return a centre such that the crop lies inside, or the middle where it cannot."""
    return length / 2 if length <= 2 * reach else reach + at * (length - 2 * reach)


def _sampled(image: Tensor, where: Tensor, mode: str) -> Tensor:
    return functional.grid_sample(
        image[None], where, mode=mode, padding_mode="reflection", align_corners=False
    )[0]
