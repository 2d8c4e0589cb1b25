"""Images and volumes as a network wants to see them: turned, padded, resampled and scaled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from wsi_pipeline.bundle import InputSpec, Interpolation
from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.paths import check_opens
from wsi_pipeline.geometry import Shape
from wsi_pipeline.options import MPP_TOLERANCE
from wsi_pipeline.sources.radiology.image import Image, open_image
from wsi_pipeline.sources.radiology.volume import Volume, open_volume

Scan = Image | Volume
"""What is no slide."""
Pixels = npt.NDArray[np.float32]
Weights: TypeAlias = csr_array
"""(n, m): share of each of m source pixels in each of n grid pixels along an axis."""

SLAB_PX = 1 << 22
"""Source pixels read at a time."""
SAMPLE_PX = 1 << 22
"""Of the source's, from which the threshold between body and background is taken."""
GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Shares of red, green and blue in grey, ITU-R BT.601."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How the pixels of one image or volume become those of a network's grid.

    The frame of the grid is the source, mirrored and padded where the model asks for it.

    Attributes:
        shape: Grid pixels along each axis.
        source_shape: Pixels along each axis, as the file has them.
        padded_shape: The same, padded.
        step: Source pixels per grid pixel along each axis.
        black: Value that becomes 0, or that of each channel.
        white: Value that becomes 1, likewise.
        is_clipped: Whether values beyond those become 0 and 1.
        outside: Value of what lies beyond the source, likewise.
        interpolation: Kernel where the step is not 1.
    """

    shape: Shape
    channels: int
    source_shape: Shape
    padded_shape: Shape
    step: tuple[float, ...]
    is_mirrored: bool
    black: float | tuple[float, ...]
    white: float | tuple[float, ...]
    is_clipped: bool
    outside: float | tuple[float, ...]
    interpolation: Interpolation
    thick_back: ClassVar[int | None] = None

    @property
    def crop(self) -> tuple[Shape, Shape] | None:
        """Return the part of the source that the grid covers; None = all."""
        return None

    def read(self, scan: Scan, start: Shape, shape: Shape) -> Pixels:
        """Read a box of the grid, which may reach beyond; return (*shape, channels), full scale 1.

        Every value depends on its own place alone, never on how the grid is cut.

        Raises:
            SourceError: the file cannot be read.
        """
        low = [max(a, 0) for a in start]
        high = [min(a + n, m) for a, n, m in zip(start, shape, self.shape, strict=True)]
        colours = 1 if self.channels == 1 else scan.channels
        pixels = np.full((*shape, colours), self.outside, np.float32)
        if all(a < b for a, b in zip(low, high, strict=True)):
            inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            (first, stop, weights), *rest = (
                self.weigh(axis, a, b) for axis, (a, b) in enumerate(zip(low, high, strict=True))
            )
            out = pixels[inside]
            rows = out if weights is None else np.empty((stop - first, *out.shape[1:]), np.float32)
            across = math.prod(b - a for a, b, _ in rest)
            for top, bottom in _spans(first, stop, max(1, SLAB_PX // across)):
                begin, end = (top, *(a for a, _, _ in rest)), (bottom, *(b for _, b, _ in rest))
                slab = self.source(scan, begin, end)
                for axis, (_, _, own) in enumerate(rest, start=1):
                    slab = _mixed(slab, axis, own)
                rows[top - first : bottom - first] = slab
            if weights is not None:
                out[...] = _mixed(rows, 0, weights)
            self.cut(out)
        black, white = np.asarray(self.black), np.asarray(self.white)
        pixels -= black.astype(np.float32)
        pixels *= (1 / (white - black)).astype(np.float32)
        if self.is_clipped:
            np.clip(pixels, 0, 1, out=pixels)
        if pixels.shape[-1] == self.channels:
            return pixels
        return np.repeat(pixels, self.channels, axis=-1)

    def weigh(self, axis: int, start: int, stop: int) -> tuple[int, int, Weights | None]:
        """Weigh source pixels for the grid pixels along an axis; return as `axis_weights`."""
        return axis_weights(
            start,
            stop,
            step=self.step[axis],
            length=self.padded_shape[axis],
            interpolation=self.interpolation,
        )

    def cut(self, pixels: Pixels) -> None:
        """Cut off values that resampling has made."""

    def source(self, scan: Scan, start: Shape, stop: Shape) -> Pixels:
        """Return the source's values in a box of the mirrored and padded frame."""
        ends = [min(b, n) for b, n in zip(stop, self.source_shape, strict=True)]
        beyond = [(0, b - max(a, e)) for a, b, e in zip(start, stop, ends, strict=True)]
        if any(a >= e for a, e in zip(start, ends, strict=True)):
            shape = tuple(b - a for a, b in zip(start, stop, strict=True))
            return np.full((*shape, 1), self.outside, np.float32)
        begins = list(start)
        if self.is_mirrored:
            width = self.source_shape[-1]
            begins[-1], ends[-1] = width - ends[-1], width - start[-1]
        shape = tuple(b - a for a, b in zip(begins, ends, strict=True))
        pixels = _with_channels(scan.read(tuple(begins), shape), self.channels)
        if self.is_mirrored:
            pixels = pixels[..., ::-1, :]
        if not np.any(beyond):
            return pixels
        return np.pad(pixels, [*beyond, (0, 0)], constant_values=self.outside)


def open_scan(
    path: Path, *, axes: int, frame: int | None = None, time_points: Sequence[int] | None = None
) -> Scan:
    """Open a planar image or a volume; return it.

    Args:
        frame: Which of a planar image with several, from 0; None = that which the file names.
        time_points: Which of a volume with several, from 0; None = there must be one.

    Raises:
        SourceError: it is something else, or cannot be read.
    """
    check_opens(path)
    if axes == 2:
        return open_image(path, frame=frame)
    return open_volume(path, time_points=time_points)


def prepare(scan: Scan, spec: InputSpec) -> Preparation:
    """Find out how an image or volume is brought to what a network wants to see; return it.

    Values of the body are those above the threshold of Zack's triangle, which finds the foot of
    the background's peak (J. Histochem. Cytochem. 25, 741, 1977). The source is read twice in slabs
    at the most.

    Raises:
        SourceError: the file cannot be read, or its colours do not fit the network.
    """
    wanted = (len(spec.time_points),) if spec.time_points else (1, 3)
    if spec.channels not in wanted:
        raise SourceError(
            f"{scan.path} has {scan.channels} channels, the network wants {spec.channels}"
        )
    if spec.convention:
        from wsi_pipeline.sources.radiology.nnunet import prepare_crop

        return prepare_crop(scan, spec)
    padded = (max(scan.shape),) * 2 if spec.pad else scan.shape
    if spec.spacing_mm is None:
        shape = spec.fit or padded
        step = tuple(n / m for n, m in zip(padded, shape, strict=True))
    else:
        # Volumes always say their spacing.
        assert scan.spacing_mm is not None
        step = tuple(
            # Spacings are rounded in files: nearly the same is not resampled, which would blur it.
            1.0 if abs(wanted / own - 1) < MPP_TOLERANCE else wanted / own
            for wanted, own in zip(spec.spacing_mm, scan.spacing_mm, strict=True)
        )
        shape = tuple(max(1, round(n / s)) for n, s in zip(padded, step, strict=True))
    black, white = spec.scale if isinstance(spec.scale, tuple) else (0.0, 1.0)
    outside, is_mirrored = black, False
    if spec.orient is not None or spec.scale in ("minmax", "zscore"):
        body = _measure(scan, spec.channels)
        is_mirrored = spec.orient == "left" and body.is_right
        if spec.scale == "minmax":
            black, white = body.least, body.largest
        elif spec.scale == "zscore":
            black, white = body.mean, body.mean + body.deviation
        outside = body.darkest
    if spec.scale == "range":
        black, white = scan.value_range
        outside = black
    return Preparation(
        shape=shape,
        channels=spec.channels,
        source_shape=scan.shape,
        padded_shape=padded,
        step=step,
        is_mirrored=is_mirrored,
        black=float(black),
        # There may be nothing but one value.
        white=float(white) if white > black else float(black) + 1,
        is_clipped=spec.scale != "zscore",
        outside=float(outside),
        interpolation=spec.interpolation,
    )


@dataclass(frozen=True, kw_only=True)
class _Body:
    """What was measured of a source's values: of all, and of those of the body."""

    darkest: float
    least: float
    largest: float
    mean: float
    deviation: float
    is_right: bool


def _measure(scan: Scan, channels: int) -> _Body:
    """Look at all values in two passes, a slab at a time."""
    from skimage.filters import threshold_triangle

    every = max(1, math.prod(scan.shape) // SAMPLE_PX)
    sample = np.concatenate([slab.ravel()[::every] for slab in iter_slabs(scan, channels)])
    find: Any = threshold_triangle
    threshold = float(find(sample)) if np.ptp(sample) > 0 else -math.inf
    darkest, least, largest = math.inf, math.inf, -math.inf
    columns = np.zeros(scan.shape[-1])
    count, total, squares = 0, 0.0, 0.0
    # Squares of what is far from 0 would lose digits.
    about = float(sample.mean())
    for slab in iter_slabs(scan, channels):
        darkest = min(darkest, float(slab.min()))
        columns += slab.sum(axis=(*range(slab.ndim - 2), -1), dtype=np.float64)
        body = slab[slab > threshold].astype(np.float64)
        if body.size:
            least, largest = min(least, float(body.min())), max(largest, float(body.max()))
            body -= about
            count, total = count + body.size, total + float(body.sum())
            squares += float(np.square(body).sum())
    mean = total / count
    half = scan.shape[-1] // 2
    return _Body(
        darkest=darkest,
        least=least,
        largest=largest,
        mean=mean + about,
        deviation=max(squares / count - mean**2, 0.0) ** 0.5,
        is_right=bool(columns[-half:].sum() > columns[:half].sum()),
    )


def iter_slabs(scan: Scan, channels: int) -> Iterator[Pixels]:
    """Yield all values, some rows or slices at a time."""
    first, *rest = scan.shape
    for start, stop in _spans(0, first, max(1, SLAB_PX // math.prod(rest))):
        slab = scan.read((start, *(0 for _ in rest)), (stop - start, *rest))
        yield _with_channels(slab, channels)


def _spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut a range.

    Example:
        >>> list(_spans(0, 5, 2))
        [(0, 2), (2, 4), (4, 5)]
    """
    return itertools.pairwise([*range(start, stop, step), stop])


def _with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Return colours as grey where the network sees one channel."""
    if pixels.shape[-1] == 3 and channels == 1:
        # Grey that is stored as colours is the same to the last bit: so copies are recognised.
        if (pixels == pixels[..., :1]).all():
            return pixels[..., :1]
        return (pixels @ GREY)[..., None]
    return pixels


def axis_weights(
    start: int, stop: int, *, step: float, length: int, interpolation: Interpolation
) -> tuple[int, int, Weights | None]:
    """Weigh source pixels for grid pixels along one axis, centre on centre.

    Kernels are as wide as a grid pixel where that is the larger, which keeps what is smaller from
    aliasing, and end at the source's border, as in Pillow's `resize`. Cubic is Keys' with a = -1/2
    (IEEE Trans. ASSP 29, 1153, 1981).

    Args:
        start: First grid pixel.
        stop: One past the last.
        step: Source pixels per grid pixel.
        length: Source pixels along the axis.

    Returns:
        First source pixel, one past the last, and (grid pixels, source pixels) weights whose rows
        sum to 1; None where grid pixels are source pixels.
    """
    if step == 1:
        return start, stop, None
    width, reach = max(step, 1.0), 1 if interpolation == "linear" else 2
    centre = (np.arange(start, stop) + 0.5) * step - 0.5
    taps = np.arange(math.ceil(2 * reach * width) + 1)
    index = np.floor(centre - reach * width).astype(np.int64)[:, None] + taps
    x = np.abs(index - centre[:, None]) / width
    if interpolation == "linear":
        weight = np.clip(1 - x, 0, None)
    else:
        near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = np.where(x < 1, near, np.where(x < 2, far, 0))
    weight[(index < 0) | (index >= length)] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    row, tap = np.nonzero(weight)
    column = index[row, tap]
    low, high = int(column.min()), int(column.max()) + 1
    values = weight[row, tap].astype(np.float32)
    return low, high, csr_array((values, (row, column - low)), shape=(stop - start, high - low))


def _mixed(pixels: Pixels, axis: int, weights: Weights | None) -> Pixels:
    """Return weighted sums along an axis."""
    if weights is None:
        return pixels
    moved = np.moveaxis(pixels, axis, 0)
    mixed = weights @ moved.reshape(len(moved), -1)
    return np.moveaxis(mixed.reshape(-1, *moved.shape[1:]), 0, axis)
