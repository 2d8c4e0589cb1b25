"""From the probabilities of a part of a mask to the class of each pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.export.polygons.components import PROBABILITY_ONE


def every_class(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the probabilities (C, *part) of all classes: a single channel has no background."""
    if len(probabilities) == 1:
        return torch.cat([1 - probabilities, probabilities])
    return probabilities


def best_class(
    probabilities: torch.Tensor, *, with_probability: bool
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """Return the highest probability, in 1/65535, and its class of (C, *part); the first of equals.

    Args:
        with_probability: whether it is wanted; else it is empty.
    """
    if probabilities.device.type == "cuda":
        # of a pixel no more than 3 bytes come down
        highest, position = probabilities.max(0)
        fixed = (highest * PROBABILITY_ONE).round().to(torch.uint16)
        return _fetch(fixed[: None if with_probability else 0]), _fetch(position.to(torch.uint8))
    planes = probabilities.cpu().numpy()
    best, chosen = planes[0].copy(), np.zeros(planes.shape[1:], np.uint8)
    # On a CPU this is many times faster than torch's max over the first axis.
    for index, plane in enumerate(planes[1:], start=1):
        np.maximum(chosen, (plane > best).view(np.uint8) * np.uint8(index), out=chosen)
        np.maximum(best, plane, out=best)
    wanted = best[: None if with_probability else 0]
    return np.rint(wanted * np.float32(PROBABILITY_ONE)).astype(np.uint16), chosen


def _fetch(values: torch.Tensor) -> npt.NDArray[Any]:
    """Bring values from a GPU, through memory that it writes by itself; return them."""
    held = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    held.copy_(values, non_blocking=True)
    # not for passes that other blocks have asked for since
    torch.cuda.current_stream(values.device).record_event().synchronize()
    return held.numpy()
