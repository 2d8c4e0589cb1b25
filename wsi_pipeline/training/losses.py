"""Losses between a network's predictions and class indices, with ignored pixels left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from wsi_pipeline.bundle import Activation
from wsi_pipeline.evaluation.confusion import IGNORE
from wsi_pipeline.training.recipe import Loss
from wsi_pipeline.training.samples import UNLABELLED

Predictions = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Logits of the mask; several for deep supervision; or `mask` and `label`."""


def network_loss(
    predictions: Predictions,
    truth: Tensor,
    labels: Tensor | None,
    activation: Activation,
    *,
    kind: Loss = "ce+dice",
    label_weight: float = 1.0,
) -> Tensor:
    """Return the loss of a batch, a scalar: deep supervision sums over its maps, unweighted.

    The mask has the loss of `segmentation_loss`. `labels` are (N,) int64 index of what is to be
    said of the whole patch, or `UNLABELLED`; None = nothing is to be said of any.
    """
    if isinstance(predictions, Mapping):
        loss = segmentation_loss(predictions["mask"], truth, activation, kind=kind)
        if labels is None:
            return loss
        entropy = functional.cross_entropy(predictions["label"].float(), labels, reduction="sum")
        return loss + label_weight * entropy / (labels != UNLABELLED).sum().clamp_min(1)
    maps = [predictions] if isinstance(predictions, Tensor) else predictions
    losses = [segmentation_loss(logits, truth, activation, kind=kind) for logits in maps]
    return torch.stack(losses).sum()


def segmentation_loss(
    logits: Tensor, truth: Tensor, activation: Activation, *, kind: Loss = "ce+dice"
) -> Tensor:
    """Return cross-entropy, soft Dice, or their unweighted sum, a scalar.

    Args:
        logits: (N, K, *sides); K = 1 with sigmoid.
        truth: (N, *sides) uint8 class index, or IGNORE.
        activation: "sigmoid" for one logit, "softmax" for one a class.
    """
    # In fp32 whatever the network computed in: sums over a batch's pixels overflow fp16.
    logits = logits.float()
    known = (truth != IGNORE).float()
    index = truth.long() * known.long()
    if activation == "sigmoid":
        target = index.float()[:, None]
        measured = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        entropy = measured[:, 0]
        probabilities = logits.sigmoid()
    else:
        target = functional.one_hot(index, logits.shape[1]).movedim(-1, 1).float()
        entropy = functional.cross_entropy(logits, index, reduction="none")
        probabilities = logits.softmax(1)
    wanted, parts = kind.split("+"), []
    if "ce" in wanted:
        # A batch may hold no pixel of which anything is known.
        parts.append((entropy * known).sum() / known.sum().clamp_min(1))
    if "dice" in wanted:
        parts.append(soft_dice_loss(probabilities * known[:, None], target * known[:, None]))
    return torch.stack(parts).sum()


def soft_dice_loss(probabilities: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Return 1 − soft Dice, averaged over images and classes.

    Args:
        probabilities: (N, K, *sides) in [0, 1].
        target: (N, K, *sides) of 0 and 1.
    """
    axes = tuple(range(2, target.ndim))
    overlap = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    return torch.mean(1 - (2 * overlap + smooth) / (total + smooth))
