"""Blend overlapping patch predictions into one field of probabilities, and sample it anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.geometry import PatchGrid, Shape, axis_origins, box_slices, sample_positions
from wsi_pipeline.options import Blend

SIGMA = 1 / 8
"""Width of the Gaussian in patch sizes, as nnU-Net and MONAI have it."""
Pieces = Iterator[tuple[Shape, torch.Tensor]]
"""First pixel and values (C, *part) of one part after the other."""


def axis_windows(
    blend: Blend, *, length: int, patch_size: int, stride: int, even: bool = False
) -> dict[int, torch.Tensor]:
    """Weigh the pixels of the patches along one axis; return a window for each origin.

    A patch's weight at a pixel is the product of its windows along the axes. `crop` gives every
    pixel to the one patch whose middle is nearest, so its windows are 0 or 1 and sum to 1.

    Args:
        length: grid pixels along the axis.
        patch_size: pixels of a patch.
        stride: pixels between origins.
        even: see `axis_origins`; the Gaussian's middle is nnU-Net's pixel then.

    Returns:
        Origin → float32 (patch_size,), each with a value above 0.
    """
    origins = [int(o) for o in axis_origins(length, patch_size, stride, even=even)]
    if blend == "constant":
        return dict.fromkeys(origins, torch.ones(patch_size))
    if blend == "gaussian":
        middle = patch_size // 2 if even else (patch_size - 1) / 2
        position = torch.arange(patch_size, dtype=torch.float64) - middle
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
    """The weights of every patch of a grid, one window an axis.

    Attributes:
        exclusive: whether every pixel takes the prediction of one patch alone, the nearest: asked
            for by `crop`, and so wherever patches do not overlap.
    """

    def __init__(self, grid: PatchGrid, blend: Blend, device: torch.device) -> None:
        self.exclusive = blend == "crop" or grid.stride == grid.patch_size
        kind: Blend = "crop" if self.exclusive else blend
        axes = zip(grid.shape, grid.patch_size, grid.stride, strict=True)
        self._axes = [
            axis_windows(kind, length=n, patch_size=p, stride=s, even=grid.even) for n, p, s in axes
        ]
        self._device = device
        self._weights: dict[tuple[int, ...], torch.Tensor] = {}

    def weight(self, origin: Shape) -> torch.Tensor:
        """Return the weight of the patch at `origin`, float32 (*patch)."""
        windows = [axis[corner] for axis, corner in zip(self._axes, origin, strict=True)]
        # patches share their windows
        key = tuple(id(window) for window in windows)
        if key not in self._weights:
            weight = torch.ones(())
            for window in windows:
                weight = weight[..., None] * window
            self._weights[key] = weight.to(self._device)
        return self._weights[key]

    def owned(self, origin: Shape) -> tuple[slice, ...]:
        """Return the pixels of the patch at `origin` that are its alone, if exclusive."""
        inside = [torch.nonzero(axis[c])[:, 0] for axis, c in zip(self._axes, origin, strict=True)]
        return tuple(slice(int(i[0]), int(i[-1]) + 1) for i in inside)


def iter_owned(
    predictions: Iterable[tuple[Shape, torch.Tensor]],
    start: Shape,
    stop: Shape,
    *,
    windows: Windows,
) -> Pieces:
    """Cut from each prediction what is its alone within a box; yield where that begins, and it.

    Args:
        predictions: origin and (C, *patch) of each patch.
        start: first grid pixel of the box.
        stop: one past the last.
        windows: Those of an exclusive grid.
    """
    for origin, prediction in predictions:
        spans = _spans(start, stop, origin, windows.owned(origin))
        if all(a < b for a, b in spans):
            here = [slice(a - o, b - o) for (a, b), o in zip(spans, origin, strict=True)]
            yield tuple(a for a, _ in spans), prediction[(slice(None), *here)]


def _spans(
    start: Sequence[int], stop: Shape, origin: Shape, inside: Sequence[slice]
) -> list[tuple[int, int]]:
    """Return, axis by axis, which grid pixels of a part of a patch lie in a box."""
    axes = zip(start, stop, origin, inside, strict=True)
    return [(max(a, o + part.start), min(b, o + part.stop)) for a, b, o, part in axes]


class Means:
    """The mean probability of each class in the cells of a box of the grid, added up by parts.

    Args:
        start: first cell.
        stop: one past the last.
        cell: side of a cell in grid pixels.
        shape: grid pixels of the whole grid; cells at its end are smaller.
        classes: all but the background.
    """

    def __init__(self, start: Shape, stop: Shape, *, cell: int, shape: Shape, classes: int) -> None:
        self._start, self._cell = start, cell
        self._low = [a * cell for a in start]
        self._high = tuple(min(b * cell, n) for b, n in zip(stop, shape, strict=True))
        cells = tuple(b - a for a, b in zip(start, stop, strict=True))
        self._sum = np.zeros((classes, *cells), np.float32)

    def add(self, first: Sequence[int], part: torch.Tensor) -> None:
        """Add the probabilities (C, *part) of grid pixels from `first` on, each of them once."""
        inside = [slice(0, n) for n in part.shape[1:]]
        spans = _spans(self._low, self._high, tuple(first), inside)
        if any(a >= b for a, b in spans):
            return
        here = [slice(a - o, b - o) for (a, b), o in zip(spans, first, strict=True)]
        # of several channels the first is the background's
        sums = part[(slice(-len(self._sum), None), *here)].cpu().numpy()
        if self._cell > 1:
            for axis, (a, b) in enumerate(spans, start=1):
                begins = np.unique(np.maximum(np.arange(a, b) // self._cell * self._cell, a)) - a
                sums = np.add.reduceat(sums, begins, axis=axis)
        corner = [a // self._cell - c for (a, _), c in zip(spans, self._start, strict=True)]
        self._sum[(slice(None), *box_slices(corner, sums.shape[1:]))] += sums

    def as_bytes(self) -> npt.NDArray[np.uint8]:
        """Return the means (C, *cells), in 1/255."""
        scaled = self._sum * np.float32(255)
        if self._cell > 1:
            for axis, (low, high) in enumerate(zip(self._low, self._high, strict=True), start=1):
                counts = np.bincount((np.arange(low, high) - low) // self._cell)
                scaled /= counts.reshape(-1, *[1] * (scaled.ndim - axis - 1)).astype(np.float32)
        means: npt.NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
        return means


def iter_blended_rows(
    predictions: Iterable[tuple[Shape, torch.Tensor]],
    start: Shape,
    stop: Shape,
    *,
    windows: Windows,
    patch_rows: int,
    channels: int,
    device: torch.device,
    nothing: float = 1.0,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Blend predictions over a box of the grid; yield its probabilities from the top down.

    Only a band as high as a patch is held, which stays in the processor's cache.

    Args:
        predictions: origin and float32 (C, *patch) of each patch that touches the box, origins
            ascending along the first axis.
        start: first grid pixel of the box.
        stop: one past the last.
        patch_rows: Rows of a patch along the first axis.
        nothing: Of channel 0 where no patch lies, for logits more than for probabilities.

    Yields:
        First grid row, and (C, rows, *rest) in [0, 1]: overwritten once the next is asked for.
        Where no patch lies, channel 0 of several is 1 (background) and a single channel is 0.
    """
    band = _Band(start, stop, windows, patch_rows, channels, device, nothing)
    for origin, prediction in predictions:
        yield from band.finish(origin[0])
        band.add(origin, prediction)
    yield from band.finish(stop[0])


class _Band:
    """Sums of weighted predictions over some rows of a box, which move down it."""

    def __init__(
        self,
        start: Shape,
        stop: Shape,
        windows: Windows,
        rows: int,
        channels: int,
        device: torch.device,
        nothing: float,
    ) -> None:
        self._low, self._high, self._windows = list(start), stop, windows
        self._nothing = nothing
        rest = [b - a for a, b in zip(start[1:], stop[1:], strict=True)]
        rows = min(rows, stop[0] - start[0])
        self._sum = torch.empty((channels, rows, *rest), device=device)
        weighted = 0 if windows.exclusive else rows
        self._weight = torch.empty((weighted, *rest), device=device)
        self._clear(0)

    def add(self, origin: Shape, prediction: torch.Tensor) -> None:
        """Add one patch, of which no row is finished but those above the box."""
        inside = tuple(slice(0, n) for n in prediction.shape[1:])
        if self._windows.exclusive:
            inside = self._windows.owned(origin)
        spans = _spans(self._low, self._high, origin, inside)
        if any(a >= b for a, b in spans):
            return
        here = [slice(a - o, b - o) for (a, b), o in zip(spans, origin, strict=True)]
        there = [slice(a - low, b - low) for (a, b), low in zip(spans, self._low, strict=True)]
        patch = prediction[(slice(None), *here)]
        if self._windows.exclusive:
            self._sum[(slice(None), *there)] = patch
            return
        weight = self._windows.weight(origin)[tuple(here)]
        self._sum[(slice(None), *there)] += patch * weight
        self._weight[tuple(there)] += weight

    def finish(self, row: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the rows before `row` that are not yet finished, and move the band to it."""
        while (count := min(row - self._low[0], self._sum.shape[1])) > 0:
            done = self._sum[:, :count]
            if not self._windows.exclusive:
                weight = self._weight[:count]
                bare = weight == 0
                done /= weight.masked_fill_(bare, 1)
                if len(done) > 1:
                    done[0].masked_fill_(bare, self._nothing)
            yield self._low[0], done
            kept = self._sum.shape[1] - count
            for plane in (*self._sum, self._weight):
                # A copy, since the rows lie over those that they move to.
                plane[:kept] = plane[count:].clone()
            self._clear(kept)
            self._low[0] += count

    def _clear(self, first: int) -> None:
        """Set the rows from `first` on to what they are without patches."""
        self._sum[:, first:] = 0
        self._weight[first:] = 0
        if self._windows.exclusive and len(self._sum) > 1:
            self._sum[0, first:] = self._nothing


def iter_sampled_rows(
    bands: Iterable[tuple[int, torch.Tensor]],
    corner: Shape,
    *,
    start: Shape,
    stop: Shape,
    ratio: Sequence[float],
    shape: Shape,
    offset: Sequence[float] = (),
    nearest: int | None = None,
    rows: int = 512,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Interpolate probabilities linearly at the mask's pixels; yield them strip by strip.

    Every value depends on its own mask pixel alone, never on how the mask is cut.

    Args:
        bands: first grid row, and (C, rows, *rest) of that and the following rows, from the top
            down and without gaps, as `iter_blended_rows` yields them.
        corner: First grid pixel of the bands along the other axes.
        start: first mask pixel wanted.
        stop: one past the last.
        ratio: grid pixels per mask pixel along each axis.
        shape: Grid pixels along each axis of the whole grid.
        offset: of the first mask pixel's edge along each axis, grid pixels; none = 0.
        nearest: Axis along which the nearest grid pixel counts; None = none.

    Yields:
        First row of the strip relative to `start`, and (C, rows, *rest).
    """
    if all(r == 1.0 for r in ratio) and not any(offset):
        axes = zip(start[1:], stop[1:], corner, strict=True)
        rest = tuple(slice(a - first, b - first) for a, b, first in axes)
        for first, band in bands:
            begin, end = max(start[0] - first, 0), max(stop[0] - first, 0)
            if begin < min(end, band.shape[1]):
                yield first + begin - start[0], band[(slice(None), slice(begin, end), *rest)]
        return
    places = [
        sample_positions(a, b, ratio=r, length=n, offset=o, nearest=axis == nearest)
        for axis, (a, b, r, n, o) in enumerate(
            zip(start, stop, ratio, shape, offset or [0.0] * len(ratio), strict=True)
        )
    ]
    below = places[0][0] + (places[0][1] > 0)
    done, last, placed = 0, None, list[tuple[torch.Tensor, ...]]()
    for first, band in bands:
        # once for all strips: to bring them to a GPU is to wait for it
        placed = placed or [
            tuple(torch.from_numpy(a).to(band.device) for a in (low, low + (part > 0), part))
            for low, part in places
        ]
        held = band if last is None else torch.cat([last, band], dim=1)
        top = first - (held.shape[1] - band.shape[1])
        # The next band is written over this one, and needs its last row to interpolate from.
        last = held[:, -1:].clone()
        # rows that need none below
        ready = int(np.searchsorted(below, top + held.shape[1]))
        for row in range(done, ready, rows):
            low, high, weight = (a[row : min(row + rows, ready)] for a in placed[0])
            line = _between(held, 1, low - top, high - top, weight)
            for axis, (place, left) in enumerate(zip(placed[1:], corner, strict=True), start=2):
                line = _between(line, axis, place[0] - left, place[1] - left, place[2])
            yield row, line
        done = max(done, ready)


def _between(
    field: torch.Tensor, axis: int, low: torch.Tensor, high: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Interpolate between two places along one axis of (C, *box)."""
    before: tuple[Any, ...] = (slice(None),) * axis
    lower, upper = field[(*before, low)], field[(*before, high)]
    # a + (b - a) * w in single steps: no fused rounding that would depend on the strip
    return lower + (upper - lower) * weight.view(-1, *[1] * (field.ndim - axis - 1))
