"""Blend overlapping patch predictions into one field of probabilities, and sample it anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from wsi_pipeline.grid import PatchGrid, Shape, axis_origins
from wsi_pipeline.options import Blend

SIGMA = 1 / 8
"""Width of the Gaussian in patch sizes, as nnU-Net and MONAI have it."""


def axis_windows(
    blend: Blend, *, length: int, patch_size: int, stride: int
) -> dict[int, torch.Tensor]:
    """Weigh the pixels of the patches along one axis; return a window for each origin.

    A patch's weight at a pixel is the product of its windows along the axes. `crop` gives every
    pixel to the one patch whose middle is nearest, so its windows are 0 or 1 and sum to 1.

    Args:
        blend: how overlapping predictions combine.
        length: grid pixels along the axis.
        patch_size: pixels of a patch.
        stride: pixels between origins.

    Returns:
        Origin → float32 (patch_size,), each with a value above 0.
    """
    origins = [int(o) for o in axis_origins(length, patch_size, stride)]
    if blend == "constant":
        return dict.fromkeys(origins, torch.ones(patch_size))
    if blend == "gaussian":
        position = torch.arange(patch_size, dtype=torch.float64) - (patch_size - 1) / 2
        window = torch.exp(-0.5 * (position / (patch_size * SIGMA)) ** 2).float()
        return dict.fromkeys(origins, window)
    borders = [(a + patch_size + b + 1) // 2 for a, b in itertools.pairwise(origins)]
    starts, stops = [origins[0], *borders], [*borders, origins[-1] + patch_size]
    windows = {}
    for origin, start, stop in zip(origins, starts, stops, strict=True):
        windows[origin] = torch.zeros(patch_size)
        windows[origin][start - origin : stop - origin] = 1
    return windows


class Windows:
    """The weights of every patch of a grid, one window an axis."""

    def __init__(self, grid: PatchGrid, blend: Blend, device: torch.device) -> None:
        axes = zip(grid.shape, grid.patch_size, grid.stride, strict=True)
        self._axes = [
            {
                o: w.to(device)
                for o, w in axis_windows(blend, length=n, patch_size=p, stride=s).items()
            }
            for n, p, s in axes
        ]

    def weight(self, origin: Shape) -> torch.Tensor:
        """Return the weight of the patch at `origin`, float32 (*patch)."""
        weight = torch.ones(())
        for windows, corner in zip(self._axes, origin, strict=True):
            weight = weight.to(windows[corner].device)[..., None] * windows[corner]
        return weight


class Canvas:
    """Sum of weighted predictions over a box of the grid.

    Args:
        start: first grid pixel of the box.
        stop: one past the last.
        channels: of the predictions.
        device: where the sums lie.
    """

    def __init__(self, start: Shape, stop: Shape, channels: int, device: torch.device) -> None:
        shape = [b - a for a, b in zip(start, stop, strict=True)]
        self._start, self._stop = start, stop
        self._sum = torch.zeros((channels, *shape), device=device)
        self._weight = torch.zeros(shape, device=device)

    def add(self, origin: Shape, prediction: torch.Tensor, weight: torch.Tensor) -> None:
        """Add one patch: `prediction` float32 (C, *patch) on the device, `weight` (*patch)."""
        size = weight.shape
        there, here = [], []
        for a, b, o, n in zip(self._start, self._stop, origin, size, strict=True):
            low, high = max(a, o), min(b, o + n)
            if low >= high:
                return
            there.append(slice(low - a, high - a))
            here.append(slice(low - o, high - o))
        weight = weight[tuple(here)]
        self._sum[(slice(None), *there)] += prediction[(slice(None), *here)] * weight
        self._weight[tuple(there)] += weight

    def finish(self) -> torch.Tensor:
        """Divide by the sum of weights; return probabilities (C, *box) in [0, 1], once.

        Where no patch lies, channel 0 of several is 1 (background) and a single channel is 0.
        """
        bare = self._weight == 0
        self._sum /= self._weight.masked_fill_(bare, 1)  # in place: this is a worker's peak
        if len(self._sum) > 1:
            self._sum[0][bare] = 1
        return self._sum


def sample_positions(
    start: int, stop: int, *, ratio: float, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Place mask pixels on the grid along one axis, centre on centre; return floor and fraction.

    Args:
        start: first mask pixel.
        stop: one past the last.
        ratio: grid pixels per mask pixel.
        length: grid pixels along the axis; positions beyond the outermost centres are held there.

    Example:
        >>> floor, fraction = sample_positions(0, 4, ratio=0.5, length=2)
        >>> floor.tolist(), fraction.tolist()
        ([0, 0, 0, 1], [0.0, 0.25, 0.75, 0.0])
    """
    position = (np.arange(start, stop) + 0.5) * ratio - 0.5
    position = np.clip(position, 0, length - 1)
    floor = np.floor(position).astype(np.int64)
    return floor, (position - floor).astype(np.float32)


def iter_sampled_rows(
    probabilities: torch.Tensor,
    origin: tuple[int, int],
    *,
    start: tuple[int, int],
    stop: tuple[int, int],
    ratio: tuple[float, float],
    shape: tuple[int, int],
    rows: int = 512,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Interpolate probabilities bilinearly at the mask's pixels; yield them strip by strip.

    Every value depends on its own mask pixel alone, never on how the mask is cut.

    Args:
        probabilities: (C, h, w) of a box of the grid.
        origin: (y, x) first grid pixel of that box.
        start: (y, x) first mask pixel wanted.
        stop: one past the last.
        ratio: (y, x) grid pixels per mask pixel.
        shape: (y, x) of the whole grid.
        rows: mask rows of a strip, which bounds the memory.

    Yields:
        First row of the strip relative to `start`, and (C, rows, width).
    """
    height, width = stop[0] - start[0], stop[1] - start[1]
    if ratio == (1.0, 1.0):
        dy, dx = start[0] - origin[0], start[1] - origin[1]
        for row in range(0, height, rows):
            end = min(row + rows, height)
            yield row, probabilities[:, dy + row : dy + end, dx : dx + width]
        return
    device = probabilities.device
    x, fx = sample_positions(start[1], stop[1], ratio=ratio[1], length=shape[1])
    x0 = torch.from_numpy(x - origin[1]).to(device)
    x1 = torch.from_numpy(np.minimum(x + 1, shape[1] - 1) - origin[1]).to(device)
    wx = torch.from_numpy(fx).to(device)
    for row in range(0, height, rows):
        end = min(row + rows, height)
        y, fy = sample_positions(start[0] + row, start[0] + end, ratio=ratio[0], length=shape[0])
        y0 = torch.from_numpy(y - origin[0]).to(device)
        y1 = torch.from_numpy(np.minimum(y + 1, shape[0] - 1) - origin[0]).to(device)
        wy = torch.from_numpy(fy).to(device)[:, None]
        # a + (b - a) * w in single steps: no fused rounding that would depend on the strip
        top, bottom = probabilities[:, y0], probabilities[:, y1]
        line = top + (bottom - top) * wy
        left, right = line[:, :, x0], line[:, :, x1]
        yield row, left + (right - left) * wx
