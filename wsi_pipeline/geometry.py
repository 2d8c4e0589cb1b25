"""Integer geometry of patches and blocks in any number of dimensions; knows no file.

All coordinates are in array order, (y, x) or (z, y, x). A patch grid counts in *grid pixels*: the
pixels of the source at the resolution the network wants. Blocks count in pixels of the mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A rectangle of a slide in level-0 pixels, x to the right and y down."""

    x: int
    y: int
    width: int
    height: int


def axis_origins(
    length: int, patch_size: int, stride: int, *, even: bool = False
) -> npt.NDArray[np.int64]:
    """Place patches along one axis so that every pixel is covered; return their origins.

    The last patch is moved back to end at the edge. An axis shorter than a patch gets one patch
    at 0, which reaches beyond the source; sources pad there.

    Args:
        length: pixels along the axis, at least 1.
        patch_size: pixels of a patch.
        stride: pixels between origins, 1 to `patch_size`.
        even: all are equally far apart, at most by `stride`, and a patch that is longer than the
            axis has it in its middle, as nnU-Net lays them.

    Example:
        >>> axis_origins(1000, 512, 384)
        array([  0, 384, 488])
        >>> axis_origins(1000, 512, 384, even=True)
        array([  0, 244, 488])
        >>> axis_origins(300, 512, 384)
        array([0])
    """
    last = max(length - patch_size, 0)
    if even:
        if length < patch_size:
            return np.array([-((patch_size - length) // 2)], np.int64)
        count = -(-last // stride)
        return np.round(last / max(count, 1) * np.arange(count + 1)).astype(np.int64)
    return np.append(np.arange(0, last, stride, dtype=np.int64), np.int64(last))


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchGrid:
    """All patches of a source, row-major.

    Attributes:
        shape: grid pixels of the whole source.
        patch_size: pixels of a patch.
        stride: pixels between neighbouring origins.
        origins: (n, d) int64, each patch's first corner in grid pixels, ascending.
        even: see `axis_origins`.
    """

    shape: Shape
    patch_size: Shape
    stride: Shape
    origins: npt.NDArray[np.int64]
    even: bool = False

    def __post_init__(self) -> None:
        """Refuse rows that do not ascend, which `touching` counts on."""
        if np.any(np.diff(self.origins[:, 0]) < 0):
            raise ValueError("the patches are not in row-major order")

    @classmethod
    def cover(cls, shape: Shape, patch_size: Shape, overlap: Shape, *, even: bool = False) -> Self:
        """Lay patches over the whole source, ragged edges covered; return the grid.

        Raises:
            ValueError: sizes of unequal length, or an overlap not below the patch size.
        """
        if not len(shape) == len(patch_size) == len(overlap):
            raise ValueError(f"shape {shape}, patch {patch_size}, overlap {overlap}: unequal axes")
        if any(not 0 <= o < p for o, p in zip(overlap, patch_size, strict=True)):
            raise ValueError(
                f"overlap {overlap} px must be at least 0 and below the patch size {patch_size} px"
            )
        stride = tuple(p - o for p, o in zip(patch_size, overlap, strict=True))
        axes = [axis_origins(*a, even=even) for a in zip(shape, patch_size, stride, strict=True)]
        origins = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(shape))
        return cls(shape=shape, patch_size=patch_size, stride=stride, origins=origins, even=even)

    def __len__(self) -> int:
        return len(self.origins)

    def keep(self, selected: npt.NDArray[np.bool_]) -> PatchGrid:
        """Return the grid with only the selected patches; `selected` is (n,) bool."""
        return replace(self, origins=self.origins[selected])

    def touching(self, start: Shape, stop: Shape) -> npt.NDArray[np.int64]:
        """Return the indices, ascending, of patches that share a pixel with [start, stop)."""
        # Rows of patches are found by bisection, so that a slide of many blocks is planned at once.
        rows = self.origins[:, 0]
        first = int(np.searchsorted(rows, start[0] - self.patch_size[0], side="right"))
        last = int(np.searchsorted(rows, stop[0]))
        origins = self.origins[first:last, 1:]
        low, high = np.array(start[1:]) - self.patch_size[1:], np.array(stop[1:])
        return first + np.flatnonzero(np.all((origins > low) & (origins < high), axis=1))


@dataclass(frozen=True, kw_only=True)
class Block:
    """One unit of work: a rectangle of the mask that nobody else writes.

    Attributes:
        index: row and column among the blocks.
        start: first pixel.
        stop: one past the last pixel.
    """

    index: Shape
    start: Shape
    stop: Shape

    @property
    def name(self) -> str:
        """Return the block's name in the ledger, sorting row-major."""
        return "_".join(f"{i:05d}" for i in self.index)

    @property
    def shape(self) -> Shape:
        """Return the block's size in mask pixels."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Return the slices of the mask that the block owns."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))


def box_slices(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the slices of a box of some shape that begins at `start`.

    Example:
        >>> box_slices((2, 5), (3, 4))
        (slice(2, 5, None), slice(5, 9, None))
    """
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


def iter_blocks(shape: Shape, block_size: Shape) -> Iterator[Block]:
    """Yield disjoint blocks that together fill `shape`, row-major; the last of an axis is ragged.

    Example:
        >>> [b.stop for b in iter_blocks((5, 4), (4, 4))]
        [(4, 4), (5, 4)]
    """
    counts = [-(-n // b) for n, b in zip(shape, block_size, strict=True)]
    for index in itertools.product(*map(range, counts)):
        start = tuple(i * b for i, b in zip(index, block_size, strict=True))
        stop = tuple(min(a + b, n) for a, b, n in zip(start, block_size, shape, strict=True))
        yield Block(index=index, start=start, stop=stop)


def clear_outside(values: npt.NDArray[Any], start: Shape, box: tuple[Shape, Shape]) -> None:
    """Make 0 what lies outside a box of the last axes of an array; return nothing.

    Args:
        values: (..., *shape).
        start: where it begins.
        box: first pixel, and one past the last.
    """
    for axis, (first, low, high) in enumerate(zip(start, *box, strict=True), -len(start)):
        along = np.moveaxis(values, axis, 0)
        along[: max(low - first, 0)] = 0
        along[max(high - first, 0) :] = 0


def sample_positions(
    start: int, stop: int, *, ratio: float, length: int, offset: float = 0.0, nearest: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Place mask pixels on the grid along one axis, centre on centre; return floor and fraction.

    Args:
        start: first mask pixel.
        stop: one past the last.
        ratio: grid pixels per mask pixel.
        length: grid pixels along the axis; positions beyond the outermost centres are held there.
        offset: of the first mask pixel's edge, grid pixels.
        nearest: whether positions are those of the nearest grid pixels.

    Example:
        >>> floor, fraction = sample_positions(0, 4, ratio=0.5, length=2)
        >>> floor.tolist(), fraction.tolist()
        ([0, 0, 0, 1], [0.0, 0.25, 0.75, 0.0])
    """
    position = (np.arange(start, stop) + 0.5) * ratio - 0.5 + offset
    position = np.clip(np.floor(position + 0.5) if nearest else position, 0, length - 1)
    floor = np.floor(position).astype(np.int64)
    return floor, (position - floor).astype(np.float32)
