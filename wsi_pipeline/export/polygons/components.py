"""The regions of a mask: their pieces are found block by block, and joined across the borders.

A region is a 4-connected set of pixels of one class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import cc3d
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Mask = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int32]
Index = tuple[int, ...]

PROBABILITY_ONE = 65535
"""Probabilities are summed as whole multiples of 1/65535, so that no order of adding matters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """The pieces of regions within one block; piece i has the label i + 1.

    Attributes:
        value: (n,) class of each piece.
        pixels: (n,) its number of pixels.
        probability: (n,) sum over its pixels of the probability of its class, in 1/65535; None
            where the mask alone is known.
        first: (n, 2) its first pixel in row-major order, (y, x) in mask pixels.
        top: labels of the block's first row; 0 = background.
        bottom: of its last row.
        left: of its first column.
        right: of its last column.
    """

    value: Mask
    pixels: Ints
    probability: Ints | None
    first: Labels
    top: Labels
    bottom: Labels
    left: Labels
    right: Labels

    def as_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays by name, for the ledger."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: array for name, array in arrays.items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the pieces that `as_arrays` described; other arrays are ignored."""
        found: dict[str, Any] = {f.name: arrays.get(f.name) for f in fields(cls)}
        return cls(**found)


def label(mask: Mask) -> tuple[Labels, int]:
    """Number the 4-connected pieces of each class; return (h, w) labels, 0 = class 0, and how many.

    The same mask always gives the same labels.
    """
    labels, count = cc3d.connected_components(
        mask, connectivity=4, out_dtype=np.uint32, return_N=True
    )
    return labels.view(np.int32), count


def find_pieces(
    mask: Mask, probability: npt.NDArray[np.uint16] | None, origin: tuple[int, int]
) -> Pieces:
    """Find the pieces of regions in one block; return them.

    Args:
        mask: (h, w) class of each pixel; 0 is background.
        probability: (h, w) of that class, in 1/65535; None = not known.
        origin: (y, x) of the block's first pixel in the mask.
    """
    labels, count = label(mask)
    # Runs of one class along rows: far fewer than pixels. Two neighbours of one class are one
    # piece, so the small integers of the mask tell where runs begin.
    begins = np.ones(mask.shape, bool)
    np.not_equal(mask[:, 1:], mask[:, :-1], out=begins[:, 1:])
    begin = np.flatnonzero(begins)
    of = labels.ravel()[begin]
    pixels = _sums(of, np.diff(begin, append=mask.size), count)
    sums = None
    if probability is not None:
        runs = np.add.reduceat(probability.ravel(), begin, dtype=np.int64)
        sums = _sums(of, runs, count)
    first = np.empty(count + 1, np.int64)
    first[of[::-1]] = begin[::-1]  # of equal indices the last is kept
    first = first[1:]
    y, x = np.divmod(first, mask.shape[1])
    return Pieces(
        value=mask.ravel()[first],
        pixels=pixels,
        probability=sums,
        first=np.stack([y + origin[0], x + origin[1]], axis=1).astype(np.int32),
        top=labels[0].copy(),
        bottom=labels[-1].copy(),
        left=labels[:, 0].copy(),
        right=labels[:, -1].copy(),
    )


def _sums(of: Labels, amounts: Ints, count: int) -> Ints:
    """Return the sum of the amounts of each piece; float64 holds those of a block exactly."""
    return np.bincount(of, amounts, minlength=count + 1)[1:].astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """The regions of a mask, in the order of their first pixels.

    Attributes:
        value: (n,) class.
        pixels: (n,) number of mask pixels.
        probability: (n,) mean probability of the class over the region, in [0, 1]; None where it
            is not known.
        first: (n, 2) first pixel in row-major order, (y, x) in mask pixels.
        numbers: of each block by row and column, (labels + 1,): number of the region, from 1, that
            a label belongs to; 0 = background, or too small.
    """

    value: Mask
    pixels: Ints
    probability: npt.NDArray[np.float64] | None
    first: Labels
    numbers: Mapping[Index, Labels]

    def __len__(self) -> int:
        return len(self.value)


def join(pieces: Mapping[Index, Pieces], *, min_pixels: float = 0) -> Regions:
    """Join the pieces of all blocks to regions; return them.

    Args:
        pieces: of each block that holds anything, by its row and column.
        min_pixels: smaller regions are left out.
    """
    sizes = [len(p.value) for p in pieces.values()]
    offsets = dict(zip(pieces, np.cumsum([0, *sizes]).tolist(), strict=False))
    value, first, amount = (_column(pieces, name) for name in ("value", "first", "pixels"))
    links = _gather([_links(pieces, offsets, value, index) for index in pieces], (0, 2), np.int64)
    graph = coo_array((np.ones(len(links), bool), links.T), shape=(len(value), len(value)))
    count, of = connected_components(graph, directed=False)
    pixels = np.bincount(of, amount, minlength=count)
    order = np.lexsort((first[:, 1], first[:, 0], of))
    heads = order[np.flatnonzero(np.diff(of[order], prepend=-1))]  # each region's first piece
    kept = np.flatnonzero(pixels >= min_pixels)
    kept = kept[np.lexsort((first[heads[kept], 1], first[heads[kept], 0]))]
    number = np.zeros(count, np.int32)
    number[kept] = np.arange(1, len(kept) + 1)
    probability = None
    if all(p.probability is not None for p in pieces.values()):
        sums = np.bincount(of, _column(pieces, "probability"), minlength=count)
        probability = sums[kept] / pixels[kept] / PROBABILITY_ONE
    return Regions(
        value=value[heads[kept]],
        pixels=pixels[kept].astype(np.int64),
        probability=probability,
        first=first[heads[kept]],
        numbers={
            index: np.concatenate([[0], number[of[offsets[index] : offsets[index] + size]]]).astype(
                np.int32
            )
            for index, size in zip(pieces, sizes, strict=True)
        },
    )


def _column(pieces: Mapping[Index, Pieces], name: str) -> npt.NDArray[Any]:
    empty = {"first": ((0, 2), np.int32), "value": ((0,), np.uint8)}.get(name, ((0,), np.int64))
    return _gather([getattr(p, name) for p in pieces.values()], *empty)


def _gather(
    arrays: list[npt.NDArray[Any]], empty: tuple[int, ...], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(empty, dtype)


def _links(
    pieces: Mapping[Index, Pieces], offsets: Mapping[Index, int], value: Mask, index: Index
) -> Ints:
    """Pair the pieces of a block with those of the same class across its lower and right border."""
    row, column = index
    found = []
    for neighbour, side, other in (
        ((row + 1, column), "bottom", "top"),
        ((row, column + 1), "right", "left"),
    ):
        if neighbour in pieces:
            here, there = getattr(pieces[index], side), getattr(pieces[neighbour], other)
            both = (here > 0) & (there > 0)
            pair = np.stack(
                [here[both] - 1 + offsets[index], there[both] - 1 + offsets[neighbour]], axis=1
            )
            found.append(pair[value[pair[:, 0]] == value[pair[:, 1]]])
    return _gather(found, (0, 2), np.int64)
