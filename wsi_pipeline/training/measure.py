"""How well a network does on images of patients it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.blend import Windows, iter_blended_rows
from wsi_pipeline.bundle import Bundle
from wsi_pipeline.grid import PatchGrid, Shape
from wsi_pipeline.training.fit import normalise
from wsi_pipeline.training.samples import IGNORE, Sample


@dataclass(frozen=True, kw_only=True)
class Score:
    """Agreement of one class over all pixels of some images.

    Attributes:
        dice: 2 · overlap / (predicted + true).
        iou: overlap / union.
        share: of the class in the truth.
        everywhere_dice: Dice of the answer "this class everywhere".
    """

    dice: float
    iou: float
    share: float
    everywhere_dice: float


def measure(network: nn.Module, bundle: Bundle, samples: Sequence[Sample]) -> dict[str, Score]:
    """Predict whole images by overlapping patches; return each foreground class's score."""
    count = len(bundle.classes)
    overlap, predicted, true = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
    for sample in samples:
        mask = predict(network, bundle, sample.image)
        known = sample.truth != IGNORE
        truth, mask = sample.truth[known].long(), mask[known].long()
        overlap += torch.bincount(truth[truth == mask], minlength=count)
        predicted += torch.bincount(mask, minlength=count)
        true += torch.bincount(truth, minlength=count)
    pixels = int(true.sum())
    return {
        info.name: _score(int(overlap[i]), int(predicted[i]), int(true[i]), pixels)
        for i, info in enumerate(bundle.classes)
        if i > 0
    }


@torch.inference_mode()
def predict(network: nn.Module, bundle: Bundle, image: Tensor) -> Tensor:
    """Predict one image of any size by the bundle's patches; return its mask.

    Args:
        network: in eval mode.
        bundle: says patch size, overlap and normalisation.
        image: (3, H, W) uint8.

    Returns:
        (H, W) uint8 class index.
    """
    spec = bundle.input
    height, width = image.shape[1:]
    side_y, side_x = spec.patch_size
    beyond = (0, max(0, side_x - width), 0, max(0, side_y - height))
    padded = functional.pad(image[None].float() / 255, beyond, mode="reflect")
    grid = PatchGrid.cover(tuple(padded.shape[2:]), spec.patch_size, spec.overlap)
    windows = Windows(grid, "gaussian", image.device)
    channels = 1 if bundle.activation == "sigmoid" else len(bundle.classes)
    rows = iter_blended_rows(
        _chances(network, bundle, padded, grid),
        (0, 0),
        grid.shape,
        windows=windows,
        patch_rows=side_y,
        channels=channels,
        device=image.device,
    )
    chances = torch.cat([band.clone() for _, band in rows], dim=1)[:, :height, :width]
    found = chances[0] > 0.5 if bundle.activation == "sigmoid" else chances.argmax(0)
    return found.to(torch.uint8)


def _chances(
    network: nn.Module, bundle: Bundle, image: Tensor, grid: PatchGrid
) -> Iterator[tuple[Shape, Tensor]]:
    """Yield origin and probabilities of each patch of an image (1, 3, H, W) in [0, 1]."""
    side_y, side_x = bundle.input.patch_size
    for y, x in grid.origins.tolist():
        patch = normalise(image[:, :, y : y + side_y, x : x + side_x], bundle.input)
        logits = network(patch)[0]
        sigmoid = bundle.activation == "sigmoid"
        yield (y, x), logits.sigmoid() if sigmoid else logits.softmax(0)


def _score(overlap: int, predicted: int, true: int, pixels: int) -> Score:
    union = predicted + true - overlap
    return Score(
        dice=2 * overlap / max(1, predicted + true),
        iou=overlap / max(1, union),
        share=true / max(1, pixels),
        everywhere_dice=2 * true / max(1, pixels + true),
    )
