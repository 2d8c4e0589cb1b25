"""Images and volumes as nnU-Net prepares them, read in boxes.

Its DefaultPreprocessor (github.com/MIC-DKFZ/nnUNet) crops to what is not 0, normalises over the
crop, and resamples by cubic splines; along an axis whose pixels are far the longest it takes the
nearest slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.sparse import csr_array

from wsi_pipeline.bundle import InputSpec
from wsi_pipeline.errors import SourceError
from wsi_pipeline.geometry import Shape
from wsi_pipeline.sources.radiology.preprocess import Pixels, Preparation, Scan, Weights, iter_slabs

THICK = 3
"""How many times as long as the shortest side of a pixel a side is whose axis stands apart."""


@dataclass(frozen=True, kw_only=True)
class Cropped(Preparation):
    """See `Preparation`; the frame of the grid is the crop, `black` and `white` of each channel.

    Attributes:
        corner: First source pixel of the crop, whose size is `padded_shape`.
        limits: Values of each channel beyond which all are cut off, before and after resampling.
        thick: Axis that takes the nearest slice; None = none does.
        thick_back: The same, from the grid to the mask.
    """

    corner: Shape
    limits: tuple[tuple[float, ...], tuple[float, ...]]
    thick: int | None
    thick_back: int | None  # type: ignore[misc]

    @property
    def crop(self) -> tuple[Shape, Shape] | None:
        """See `Preparation`."""
        if self.padded_shape == self.source_shape:
            return None
        ends = zip(self.corner, self.padded_shape, strict=True)
        return self.corner, tuple(a + n for a, n in ends)

    def weigh(self, axis: int, start: int, stop: int) -> tuple[int, int, Weights | None]:
        """See `Preparation`."""
        length, count = self.padded_shape[axis], self.shape[axis]
        if length == count:
            return start, stop, None
        rows = spline_weights(length, count, nearest=axis == self.thick)[start:stop]
        low, high = int(rows.indices.min()), int(rows.indices.max()) + 1
        return low, high, rows[:, low:high]

    def source(self, scan: Scan, start: Shape, stop: Shape) -> Pixels:
        """See `Preparation`."""
        begin, end = (
            tuple(a + c for a, c in zip(at, self.corner, strict=True)) for at in (start, stop)
        )
        pixels = super().source(scan, begin, end)
        self.cut(pixels)
        return pixels

    def cut(self, pixels: Pixels) -> None:
        """See `Preparation`."""
        low, high = np.array(self.limits, np.float32)
        np.clip(pixels, low, high, out=pixels)


def prepare_crop(scan: Scan, spec: InputSpec) -> Cropped:
    """Find the crop of an image or volume, and how it is brought to a network; return that.

    Raises:
        SourceError: the file cannot be read, or holds nothing but 0.
    """
    low, high, row = np.array(scan.shape), np.zeros(len(scan.shape), int), 0
    for slab in iter_slabs(scan, spec.channels):
        if len(found := np.argwhere(slab.any(-1))):
            found[:, 0] += row
            low, high = np.minimum(low, found.min(0)), np.maximum(high, found.max(0) + 1)
        row += len(slab)
    if (low >= high).any():
        raise SourceError(f"{scan.path}: all of its values are 0: nothing to see")
    inside = tuple(slice(a, b) for a, b in zip(low[1:], high[1:], strict=True))
    parts, row = [], 0
    for slab in iter_slabs(scan, spec.channels):
        begin, end = max(low[0] - row, 0), max(high[0] - row, 0)
        values = slab[(slice(begin, end), *inside)].reshape(-1, slab.shape[-1]).astype(np.float64)
        if len(values):
            parts.append((len(values), values.mean(0), values.var(0), values.min(0), values.max(0)))
        row += len(slab)
    counts, means, variances, lows, highs = (np.array(p) for p in zip(*parts, strict=True))
    least, largest = lows.min(0), highs.max(0)
    mean = np.average(means, 0, counts)
    variance = np.average(variances + np.square(means - mean), 0, counts)
    deviation = np.maximum(np.sqrt(variance), 1e-8)
    if spec.scale == "zscore":
        black, white = mean, mean + deviation
    elif spec.scale == "minmax":
        black, white = least, np.maximum(largest, least + 1e-8)
    elif isinstance(spec.scale, tuple):
        black, white = (np.full(len(mean), edge) for edge in spec.scale)
        least, largest = (np.clip(edge, *spec.scale) for edge in (least, largest))
    else:
        black, white = np.zeros(len(mean)), np.ones(len(mean))
    size = tuple(int(n) for n in high - low)
    shape, thick, back = size, None, None
    if spec.spacing_mm is not None:
        assert scan.spacing_mm is not None
        own = scan.spacing_mm
        # Along an axis of which a patch sees one slice the slices are taken as they are.
        sides = zip(own, spec.spacing_mm, spec.patch_size, strict=True)
        wanted = [o if p == 1 else w for o, w, p in sides]
        shape = tuple(max(1, round(o / w * n)) for o, w, n in zip(own, wanted, size, strict=True))
        thick, back = thick_axis(own, wanted), thick_axis(wanted, own)
    outside = black + np.array(spec.mean[: len(black)]) * (white - black)
    return Cropped(
        shape=shape,
        channels=spec.channels,
        source_shape=scan.shape,
        padded_shape=size,
        step=tuple(n / m for n, m in zip(size, shape, strict=True)),
        is_mirrored=False,
        black=tuple(black.tolist()),
        white=tuple(white.tolist()),
        is_clipped=False,
        outside=tuple(outside.tolist()),
        interpolation="cubic",
        corner=tuple(int(a) for a in low),
        limits=(tuple(least.tolist()), tuple(largest.tolist())),
        thick=thick,
        thick_back=back,
    )


def thick_axis(spacing: Sequence[float], onto: Sequence[float]) -> int | None:
    """Return the one axis that nnU-Net resamples by itself; None = there is none.

    Example:
        >>> thick_axis((5, 1, 1), (1, 1, 1)), thick_axis((1, 4, 4), (1, 1, 1))
        (0, None)
    """
    for sides in (spacing, onto):
        if max(sides) / min(sides) > THICK:
            longest = [axis for axis, side in enumerate(sides) if side == max(sides)]
            return longest[0] if len(longest) == 1 else None
    return None


@lru_cache(maxsize=8)
def spline_weights(length: int, count: int, *, nearest: bool = False) -> csr_array:
    """Return (count, length) shares of source pixels in grid pixels, by cubic splines.

    They are what `skimage.transform.resize(order=3, mode="edge")` does along an axis, but that
    shares below 1e-7 are left out.
    """
    weights = ndimage.zoom(
        np.eye(length),
        (count / length, 1),
        order=0 if nearest else 3,
        mode="nearest",
        grid_mode=True,
    )
    weights[np.abs(weights) < 1e-7] = 0
    return csr_array((weights / weights.sum(1, keepdims=True)).astype(np.float32))
