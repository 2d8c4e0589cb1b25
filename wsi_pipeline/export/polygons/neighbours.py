"""How far regions are from those of other classes, and how much of their border these share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import shapely

from wsi_pipeline.export.polygons.arcs import Arcs, Bools, Ints, Numbers, ranges
from wsi_pipeline.export.polygons.build import Polygons
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.files.threads import map_in_threads

Floats = npt.NDArray[np.float64]

PIECE, SUMMED = 32, 16
"""Edges of a border that are looked for as one, since whole borders have wide boxes, which part
badly, and whose lengths are added up first."""
LEAST = 2
"""Pieces in a node of their tree: of one that is entered all are measured, which takes longest."""
BATCH, VERTICES = 50_000, 50_000
"""Arcs, and vertices of arcs, that are looked at a time."""
ROUNDING = 1e-9
"""Share by which a distance that is reckoned in another way may be another."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """What lies around regions, in the order of these.

    Attributes:
        distance: (regions, classes) to the nearest region of each class, from border to border;
            NaN where there is none, and for the class that the region has.
        shared: (regions, classes) share of the border behind which each class lies, in [0, 1].
    """

    distance: Floats
    shared: Floats


def find_neighbours(
    outlines: Outlines, classes: int, pixel: tuple[float, float], *, threads: int | None = None
) -> Neighbours:
    """Measure regions' distances and common borders; return them.

    Args:
        classes: how many there are, background included.
        pixel: size of a mask pixel, (y, x), in whose unit distances are.
    """
    arcs, value = outlines.arcs, np.append(np.uint8(0), outlines.regions.value)
    shared = np.zeros((len(value), classes))
    for start in range(0, len(arcs), BATCH):
        pieces = _Pieces.of(arcs, np.arange(start, min(start + BATCH, len(arcs))), pixel, SUMMED)
        length, (right, left) = pieces.lengths(), pieces.sides
        np.add.at(shared, (right, value[left]), length)
        np.add.at(shared, (left, value[right]), length)
    # What has a common border is no distance away.
    distance = np.where(shared > 0, 0, np.inf)
    for other in np.unique(value[1:]):
        is_other = value == other
        is_far = ~is_other & (distance[:, other] > 0)
        is_far[0] = False
        if is_far.any():
            _find_distances(arcs, is_other, is_far, distance[:, other], pixel, threads)
    distance[np.arange(len(value)), value] = np.inf
    distance[np.isinf(distance)] = np.nan
    shared /= shared.sum(axis=1, keepdims=True).clip(min=np.finfo(float).tiny)
    return Neighbours(distance=distance[1:], shared=shared[1:])


def _find_distances(
    arcs: Arcs,
    is_other: Bools,
    is_far: Bools,
    found: Floats,
    pixel: tuple[float, float],
    threads: int | None,
) -> None:
    """Lower what is found of the distances of far regions from the nearest other one."""
    others = np.concatenate([part.lines() for part in _iter_pieces(arcs, is_other, pixel)])
    lows, highs = np.hsplit(shapely.bounds(others), 2)
    tree = shapely.STRtree(others, node_capacity=LEAST)
    # About as far as one piece is from the next. Whatever is nearer than this is found by boxes.
    reach = float(np.sqrt((highs.max(axis=0) - lows.min(axis=0)).prod() / len(others)))

    def measure_near(pieces: _Pieces) -> None:
        low, high = pieces.boxes()
        piece, other = tree.query(shapely.box(*(low - reach).T, *(high + reach).T))
        if len(piece) == 0:
            return
        apart = np.maximum(low[piece] - highs[other], lows[other] - high[piece]).clip(min=0)
        gap, sides = np.hypot(*apart.T), pieces.sides[:, piece]
        begins = np.flatnonzero(np.diff(pieces.arc[piece], prepend=-1))
        least = np.repeat(np.minimum.reduceat(gap, begins), np.diff(begins, append=len(gap)))
        # The nearest boxes of each arc tell how far at the most the others are worth a look.
        for is_chosen in (gap == least, gap > least):
            within = np.where(is_far[sides], found[sides], 0).max(axis=0)
            chosen = np.flatnonzero(is_chosen & (gap * (1 - ROUNDING) <= within))
            used, index = np.unique(piece[chosen], return_inverse=True)
            length = shapely.distance(pieces.lines(used)[index], others[other[chosen]])
            for region in sides[:, chosen]:
                np.minimum.at(found, region, length)

    def measure_any(pieces: _Pieces) -> None:
        _, length = tree.query_nearest(pieces.lines(), return_distance=True, all_matches=False)
        for region in pieces.sides:
            np.minimum.at(found, region, length)

    for measure in (measure_near, measure_any):
        wanted = _iter_pieces(arcs, is_far & (found > reach * (1 - ROUNDING)), pixel)
        for _ in map_in_threads(measure, wanted, threads=threads):
            pass


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pieces:
    """Pieces of a few edges of arcs.

    Attributes:
        arc: (n,) number of the arc that each is of.
        sides: (2, n) numbers of the regions on the right and on the left hand.
        xy: (m, 2) vertices, piece by piece.
        bounds: (n + 1,) where each piece begins, and m.
    """

    arc: Ints
    sides: Numbers
    xy: Floats
    bounds: Ints

    @classmethod
    def of(cls, arcs: Arcs, chosen: Ints, pixel: tuple[float, float], most: int) -> Self:
        """Part arcs into pieces of some edges at the most."""
        edges = arcs.sizes[chosen] - ~arcs.is_ring[chosen]
        counts = -(-edges // most)
        first = most * ranges(np.zeros_like(counts), counts)
        arc = np.repeat(chosen, counts)
        sizes = np.minimum(np.repeat(edges, counts) - first, most) + 1
        # The last vertex of a ring is followed by its first.
        place = ranges(first, sizes) % np.repeat(arcs.sizes[arc], sizes)
        return cls(
            arc=arc,
            sides=np.stack([arcs.right[arc], arcs.left[arc]]),
            xy=arcs.xy[np.repeat(arcs.bounds[arc], sizes) + place] * np.array(pixel[::-1]),
            bounds=np.append(0, np.cumsum(sizes)),
        )

    def lengths(self) -> Floats:
        """Return (n,) how long each is."""
        x, y = np.diff(self.xy, axis=0, append=0).T
        step = np.sqrt(x * x + y * y)
        step[self.bounds[1:] - 1] = 0
        piece = np.repeat(np.arange(len(self.arc)), np.diff(self.bounds))
        # One by one, as GEOS adds: neither blocks nor machines change a bit of the sum.
        return np.asarray(np.bincount(piece, step), np.float64)

    def boxes(self) -> Floats:
        """Return (2, n, 2) the least and the largest coordinates of each."""
        first = self.bounds[:-1]
        return np.stack([np.minimum.reduceat(self.xy, first), np.maximum.reduceat(self.xy, first)])

    def lines(self, chosen: Ints | slice = slice(None)) -> Polygons:
        """Return some as lines."""
        sizes = np.diff(self.bounds)[chosen]
        xy = self.xy[ranges(self.bounds[:-1][chosen], sizes)]
        bounds = np.append(0, np.cumsum(sizes))
        return shapely.from_ragged_array(shapely.GeometryType.LINESTRING, xy, (bounds,))


def _iter_pieces(arcs: Arcs, regions: Bools, pixel: tuple[float, float]) -> Iterator[_Pieces]:
    """Yield the pieces of the arcs around some regions, some vertices at a time."""
    chosen = np.flatnonzero(regions[arcs.right] | regions[arcs.left])
    full = np.flatnonzero(np.diff(np.cumsum(arcs.sizes[chosen]) // VERTICES)) + 1
    for part in np.split(chosen, full):
        if len(part):
            yield _Pieces.of(arcs, part, pixel, PIECE)
