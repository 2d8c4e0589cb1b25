"""The regions of a mask, 4-connected sets of pixels of one class: found by blocks, then joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import cc3d
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int32]
Index = tuple[int, ...]

PROBABILITY_ONE = 65535
"""Probabilities are summed as whole multiples of 1/65535, so that no order of adding matters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockComponents:
    """The connected components of a block: parts of regions; component i has the label i + 1.

    Attributes:
        value: (n,) class.
        pixels: (n,) number of pixels.
        probability: (n,) sum of the probability of the class over the pixels, in 1/65535; None
            where the mask alone is known.
        least: (n,) lowest of it, likewise; None in what versions before this kept, too.
        first: (n, 2) first pixel in row-major order, (y, x) in mask pixels.
        top: (width,) labels of the block's first row; 0 = background.
        bottom: (width,) labels of its last row.
        left: (height,) labels of its first column.
        right: (height,) labels of its last column.
    """

    value: Mask
    pixels: Ints
    probability: Ints | None
    least: npt.NDArray[np.uint16] | None
    first: Labels
    top: Labels
    bottom: Labels
    left: Labels
    right: Labels

    def as_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays by name, for the ledger."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the components that `as_arrays` described; other arrays are ignored."""
        found: dict[str, Any] = {f.name: arrays.get(f.name) for f in fields(cls)}
        return cls(**found)


def label(mask: Mask) -> tuple[Labels, int]:
    """Number the 4-connected components of each class; return (h, w) labels, and how many.

    Class 0 has the label 0. The same mask always gives the same labels.
    """
    labels, count = cc3d.connected_components(
        mask, connectivity=4, out_dtype=np.uint32, return_N=True
    )
    return labels.view(np.int32), count


def find_components(
    mask: Mask, probability: npt.NDArray[np.uint16] | None, origin: tuple[int, int]
) -> BlockComponents:
    """Find the connected components of one block; return them.

    Args:
        mask: (h, w) class of each pixel; 0 is background.
        probability: (h, w) of that class, in 1/65535; None = not known.
        origin: (y, x) of the block's first pixel in the mask.
    """
    labels, count = label(mask)
    # Runs of one class along rows: far fewer than pixels. Two neighbours of one class are one
    # component, so the small integers of the mask tell where runs begin.
    begins = np.ones(mask.shape, bool)
    np.not_equal(mask[:, 1:], mask[:, :-1], out=begins[:, 1:])
    begin = np.flatnonzero(begins)
    of = labels.ravel()[begin]

    def sums(amounts: Ints) -> Ints:
        # float64 holds the sums of a block exactly
        return np.bincount(of, amounts, minlength=count + 1)[1:].astype(np.int64)

    first = np.empty(count + 1, np.int64)
    # of equal indices the last is kept
    first[of[::-1]] = begin[::-1]
    first = first[1:]
    # A run is a row long at the most, and what holds its sum is added up faster than int64.
    least, room = None, np.min_scalar_type(PROBABILITY_ONE * mask.shape[1])
    if probability is not None:
        least = np.full(count + 1, PROBABILITY_ONE, np.uint16)
        np.minimum.at(least, of, np.minimum.reduceat(probability.ravel(), begin))
    y, x = np.divmod(first, mask.shape[1])
    return BlockComponents(
        value=mask.ravel()[first],
        pixels=sums(np.diff(begin, append=mask.size)),
        probability=None
        if probability is None
        else sums(np.add.reduceat(probability.ravel(), begin, dtype=room)),
        least=None if least is None else least[1:],
        first=np.stack([y + origin[0], x + origin[1]], axis=1).astype(np.int32),
        top=labels[0].copy(),
        bottom=labels[-1].copy(),
        left=labels[:, 0].copy(),
        right=labels[:, -1].copy(),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """The regions of a mask, in the order of their first pixels.

    Attributes:
        value: (n,) class.
        pixels: (n,) number of mask pixels.
        probability: (n,) mean probability of the class over the region, in [0, 1]; None where it
            is not known.
        least: (n,) lowest probability of the class in it, likewise.
        first: (n, 2) first pixel in row-major order, (y, x) in mask pixels.
        numbers: (labels + 1,) for each block by its row and column: number of the region, from 1,
            that a label belongs to; 0 = background, or too small.
        flaws: (n, flaws) share of its pixels that have each; none where nobody looked.
    """

    value: Mask
    pixels: Ints
    probability: npt.NDArray[np.float64] | None
    least: npt.NDArray[np.float64] | None
    first: Labels
    numbers: Mapping[Index, Labels]
    flaws: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def __len__(self) -> int:
        return len(self.value)


def join(blocks: Mapping[Index, BlockComponents], *, min_pixels: float = 0) -> Regions:
    """Join the components of all blocks to regions; return them.

    Args:
        blocks: components of each block that holds anything, by its row and column.
        min_pixels: smaller regions are left out.
    """
    # They take a while to load, and blocks need none of it.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def column(name: str, empty: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([empty, *(getattr(block, name) for block in blocks.values())])

    value, amount = column("value", np.zeros(0, np.uint8)), column("pixels", np.zeros(0, np.int64))
    first = column("first", np.zeros((0, 2), np.int32))
    sizes = [len(block.value) for block in blocks.values()]
    offsets = dict(zip(blocks, np.cumsum([0, *sizes]).tolist(), strict=False))
    links = [np.zeros((0, 2), np.int64)]
    for (row, col), block in blocks.items():
        for neighbour, side, other in (
            ((row + 1, col), "bottom", "top"),
            ((row, col + 1), "right", "left"),
        ):
            if neighbour in blocks:
                here, there = getattr(block, side), getattr(blocks[neighbour], other)
                both = (here > 0) & (there > 0)
                shift = offsets[row, col] - 1, offsets[neighbour] - 1
                pairs = np.stack([here[both], there[both]], axis=1) + np.array(shift)
                links.append(pairs[value[pairs[:, 0]] == value[pairs[:, 1]]])
    pairs = np.concatenate(links)
    graph = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(len(value), len(value)))
    count, of = connected_components(graph, directed=False)
    pixels = np.bincount(of, amount, minlength=count)
    order = np.lexsort((first[:, 1], first[:, 0], of))
    # the component of each region that has its first pixel
    heads = order[np.flatnonzero(np.diff(of[order], prepend=-1))]
    kept = np.flatnonzero(pixels >= min_pixels)
    kept = kept[np.lexsort((first[heads[kept], 1], first[heads[kept], 0]))]
    number = np.zeros(count, np.int32)
    number[kept] = np.arange(1, len(kept) + 1)
    probability = None
    if all(block.probability is not None for block in blocks.values()):
        sums = np.bincount(of, column("probability", np.zeros(0, np.int64)), minlength=count)
        probability = sums[kept] / pixels[kept] / PROBABILITY_ONE
    least = None
    if all(block.least is not None for block in blocks.values()):
        lowest = np.full(count, PROBABILITY_ONE, np.uint16)
        np.minimum.at(lowest, of, column("least", np.zeros(0, np.uint16)))
        least = lowest[kept] / PROBABILITY_ONE
    return Regions(
        value=value[heads[kept]],
        pixels=pixels[kept].astype(np.int64),
        probability=probability,
        least=least,
        first=first[heads[kept]],
        numbers={
            index: np.append(
                np.int32(0), number[of[offsets[index] : offsets[index] + size]]
            ).astype(np.int32)
            for index, size in zip(blocks, sizes, strict=True)
        },
    )
