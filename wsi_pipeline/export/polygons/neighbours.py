"""How far regions are from those of other classes, and how much of their border these share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import shapely

from wsi_pipeline.export.polygons.arcs import Arcs, Ints, ranges
from wsi_pipeline.export.polygons.build import Polygons
from wsi_pipeline.export.polygons.trace import Outlines

PIECE = 16
"""Edges of a border that are looked for as one: whole borders have wide boxes, which part badly."""
BATCH = 50_000
"""Arcs that are looked at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """What lies around regions, in the order of these.

    Attributes:
        distance: (regions, classes) to the nearest region of each class, from border to border;
            NaN where there is none, and for the class that the region has.
        shared: (regions, classes) share of the border behind which each class lies, in [0, 1].
    """

    distance: npt.NDArray[np.float64]
    shared: npt.NDArray[np.float64]


def find_neighbours(outlines: Outlines, classes: int, pixel: tuple[float, float]) -> Neighbours:
    """Measure regions' distances and common borders; return them.

    Args:
        classes: how many there are, background included.
        pixel: size of a mask pixel, (y, x), in whose unit distances are.
    """
    arcs, value = outlines.arcs, np.append(np.uint8(0), outlines.regions.value)
    shared = np.zeros((len(value), classes))
    for arc, lines in _iter_pieces(arcs, np.arange(len(arcs)), pixel):
        length, right, left = shapely.length(lines), arcs.right[arc], arcs.left[arc]
        np.add.at(shared, (right, value[left]), length)
        np.add.at(shared, (left, value[right]), length)
    # What has a common border is no distance away.
    distance = np.where(shared > 0, 0, np.inf)
    for other in np.unique(value[1:]):
        is_other, is_far = value == other, distance[:, other] > 0
        is_far[0] = False
        is_far &= ~is_other
        wanted = np.flatnonzero(is_far[arcs.right] | is_far[arcs.left])
        if len(wanted) == 0:
            continue
        around = np.flatnonzero(is_other[arcs.right] | is_other[arcs.left])
        tree = shapely.STRtree(
            np.concatenate([lines for _, lines in _iter_pieces(arcs, around, pixel)])
        )
        for arc, lines in _iter_pieces(arcs, wanted, pixel):
            _, found = tree.query_nearest(lines, return_distance=True, all_matches=False)
            for region in (arcs.right[arc], arcs.left[arc]):
                np.minimum.at(distance, (region, other), found)
    distance[np.arange(len(value)), value] = np.inf
    distance[np.isinf(distance)] = np.nan
    shared /= shared.sum(axis=1, keepdims=True).clip(min=np.finfo(float).tiny)
    return Neighbours(distance=distance[1:], shared=shared[1:])


def _iter_pieces(
    arcs: Arcs, chosen: Ints, pixel: tuple[float, float]
) -> Iterator[tuple[Ints, Polygons]]:
    """Yield the arc of each piece, and the pieces of a few edges as lines, of some arcs."""
    for start in range(0, len(chosen), BATCH):
        arc = chosen[start : start + BATCH]
        edges = arcs.sizes[arc] - ~arcs.is_ring[arc]
        counts = -(-edges // PIECE)
        first = PIECE * ranges(np.zeros_like(counts), counts)
        arc = np.repeat(arc, counts)
        sizes = np.minimum(np.repeat(edges, counts) - first, PIECE) + 1
        # The last vertex of a ring is followed by its first.
        place = ranges(first, sizes) % np.repeat(arcs.sizes[arc], sizes)
        xy = arcs.xy[np.repeat(arcs.bounds[arc], sizes) + place] * np.array(pixel[::-1])
        ends = np.append(0, np.cumsum(sizes))
        yield arc, shapely.from_ragged_array(shapely.GeometryType.LINESTRING, xy, (ends,))
