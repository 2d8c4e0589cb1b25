"""Losses between logits and class indices, with ignored pixels left out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from wsi_pipeline.bundle import Activation
from wsi_pipeline.training.samples import IGNORE


def segmentation_loss(logits: Tensor, truth: Tensor, activation: Activation) -> Tensor:
    """Return cross-entropy plus soft Dice, unweighted, a scalar.

    Args:
        logits: (N, K, H, W); K = 1 with sigmoid.
        truth: (N, H, W) uint8 class index, or IGNORE.
        activation: "sigmoid" for one logit, "softmax" for one a class.
    """
    known = (truth != IGNORE).float()
    index = truth.long() * known.long()
    if activation == "sigmoid":
        target = index.float()[:, None]
        entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")[
            :, 0
        ]
        probabilities = logits.sigmoid()
    else:
        target = functional.one_hot(index, logits.shape[1]).movedim(-1, 1).float()
        entropy = functional.cross_entropy(logits, index, reduction="none")
        probabilities = logits.softmax(1)
    mean = (entropy * known).sum() / known.sum().clamp_min(1)
    return mean + soft_dice_loss(probabilities * known[:, None], target * known[:, None])


def soft_dice_loss(probabilities: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Return 1 − soft Dice, averaged over images and classes.

    Args:
        probabilities: (N, K, H, W) in [0, 1].
        target: (N, K, H, W) of 0 and 1.
        smooth: added to both sides, so that an empty class found empty costs nothing.
    """
    axes = (2, 3)
    overlap = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    return torch.mean(1 - (2 * overlap + smooth) / (total + smooth))
