"""Variations of colour, focus and empty glass, so that few patients teach more than themselves."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional

from wsi_pipeline.training.recipe import AugmentSpec

# optical density of haematoxylin, eosin and DAB in red, green, blue: Ruifrok and Johnston 2001
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
DARKEST = 1 / 255
TISSUE = 0.15
"""Mean optical density from which a pixel is tissue; glass and fat have less."""


def augment(
    images: Tensor,
    truths: Tensor,
    spec: AugmentSpec,
    generator: Generator,
    *,
    stained: bool = True,
    bounded: bool = True,
) -> tuple[Tensor, Tensor]:
    """Vary a batch of crops; return the new images and truths.

    Args:
        images: (N, C, *sides) float32 of full scale 1.
        truths: (N, *sides) uint8 class index.
        stained: Whether they show stains in red, green and blue, and glass.
        bounded: Whether values lie in [0, 1] and are to stay there.
    """
    limits = (0.0, 1.0) if bounded else (-math.inf, math.inf)
    if stained:
        # Glass before colours, so that its white varies with them as a scanner's does.
        images, truths = empty_glass(images, truths, spec.glass, generator)
        images = borrow_colours(images, spec.borrow, generator)
        images = vary_stain(images, spec, generator)
    images = vary_contrast(images, spec.contrast, generator).clamp(*limits)
    if images.ndim == 4:
        images = blur(images, spec.blur, generator)
    level = spec.noise * torch.rand(_one_each(images), generator=generator)
    images = images + level * torch.randn(images.shape, generator=generator)
    images = images.clamp(*limits)
    return (compress(images, spec.jpeg, generator) if bounded else images), truths


def _one_each(images: Tensor) -> tuple[int, ...]:
    """Return the shape of one number for each image."""
    return len(images), *(1,) * (images.ndim - 1)


def borrow_colours(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Give some images the colours of another of them; return the images.

    Where one source has tumours and another has none, its colours must not tell which.
    """
    if share == 0:
        return images
    density = -images.clamp_min(DARKEST).log()
    tissue = (density.mean(1, keepdim=True) > TISSUE).float()
    count = tissue.sum((2, 3), keepdim=True)
    mean = (density * tissue).sum((2, 3), keepdim=True) / count.clamp_min(1)
    spread = (
        ((density - mean) ** 2 * tissue).sum((2, 3), keepdim=True) / count.clamp_min(1)
    ).sqrt()
    lender = torch.randint(len(images), (len(images),), generator=generator)
    wanted = torch.rand(len(images), generator=generator) < share
    # what is nearly all glass or fat has no colours to give or to take
    enough = count.flatten() > 0.05 * tissue[0].numel()
    wanted &= enough & enough[lender]
    gain = (spread[lender] / spread.clamp_min(0.02)).clamp(0.4, 2.5)
    taken = (density - mean) * gain + mean[lender]
    # what is bright stays bright
    taken = torch.where(tissue > 0, taken, density)
    return torch.where(wanted[:, None, None, None], (-taken).exp().clamp(0, 1), images)


def vary_stain(images: Tensor, spec: AugmentSpec, generator: Generator) -> Tensor:
    """Vary amount, hue and mixture of the stains in optical-density space; return the images."""
    count = len(images)
    # (N, 3, H, W), 0 = no stain
    density = -images.clamp_min(DARKEST).log()

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    amounts = torch.diag_embed((spec.stain * normal(3)).exp())
    mixing = torch.eye(3) + spec.mixing * normal(3, 3)
    # rows of STAINS are stains: density = amount @ STAINS, so columns need the transpose
    change = mixing @ STAINS.T @ amounts @ torch.linalg.inv(STAINS.T)
    change = change * (spec.density * normal(1, 1)).exp()
    density = torch.einsum("nij,njhw->nihw", change, density)
    tint = (spec.tint * normal(3, 1, 1)).abs()
    return (-(density + tint)).exp().clamp(0, 1)


def vary_contrast(images: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Stretch or squeeze each image's values about their mean; return the images."""
    factor = (deviation * torch.randn(_one_each(images), generator=generator)).exp()
    mean = images.flatten(1).mean(1).reshape(_one_each(images))
    return (images - mean) * factor + mean


def blur(images: Tensor, largest: float, generator: Generator) -> Tensor:
    """Blur every second batch by a Gaussian of random width; return the images."""
    wanted, share = torch.rand(2, generator=generator).tolist()
    sigma = share * largest
    if wanted < 0.5 or sigma < 0.2:
        return images
    offsets = torch.arange(-4, 5, dtype=torch.float32)
    taps = (-(offsets**2) / (2 * sigma**2)).exp()
    channels = images.shape[1]
    taps = (taps / taps.sum()).expand(channels, 1, 1, -1)
    padded = functional.pad(images, (4, 4, 4, 4), mode="reflect")
    rows = functional.conv2d(padded, taps, groups=channels)
    return functional.conv2d(rows, taps.transpose(2, 3), groups=channels)


def compress(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Pass some images through JPEG of a random quality; return the images.

    Pictures of different sources are compressed differently, which must not tell them apart.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or share == 0:
        return images
    chosen, qualities = torch.rand(2, len(images), generator=generator)
    images = images.clone()
    for i in (chosen < share).nonzero()[:, 0].tolist():
        pixels = (images[i].movedim(0, -1) * 255).round().to(torch.uint8).numpy()
        buffer = io.BytesIO()
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        picture.save(buffer, "JPEG", quality=30 + int(66 * float(qualities[i])))
        with Image.open(buffer) as opened:
            found = np.asarray(opened, np.float32).reshape(pixels.shape) / 255
        images[i] = torch.from_numpy(found).movedim(-1, 0)
    return images


def empty_glass(
    images: Tensor, truths: Tensor, share: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Bleach irregular parts of some crops to glass, which is background; return both.

    Annotated regions hold little empty glass, slides hold much. Some of it keeps thin strands of
    tissue, as fat does.
    """
    images, truths = images.clone(), truths.clone()
    chosen = torch.rand(len(images), generator=generator) < share
    for i in chosen.nonzero()[:, 0].tolist():
        covered, strands, softness, floor = torch.rand(4, generator=generator).tolist()
        relief = _relief(images.shape[2:], 4, generator)
        level = torch.quantile(relief, 1 - min(1.0, 1.25 * covered))
        glass = relief >= level
        clear = torch.sigmoid((relief - level) * (4 + 60 * softness))
        if strands < 0.3:
            clear = clear * (_relief(images.shape[2:], 12, generator).abs() * 5).clamp(0, 1)
        white = 1 - 0.1 * floor
        images[i] = images[i] * (1 - clear) + white * clear
        truths[i][glass] = 0
    return images, truths


def _relief(size: torch.Size, cells: int, generator: Generator) -> Tensor:
    """Return smooth noise of unit deviation with about `cells` hills a side, (H, W)."""
    coarse = torch.randn(1, 1, cells, cells, generator=generator)
    fine = functional.interpolate(coarse, size=list(size), mode="bicubic", align_corners=True)
    return fine[0, 0] / fine.std()
