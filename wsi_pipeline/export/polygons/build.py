"""The outlines of regions as polygons, made from the arcs around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import shapely

from wsi_pipeline.export.polygons.arcs import Arcs, Bools, Ints, Numbers, order_paths, ranges
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.files.threads import map_in_threads

BATCH = 50_000
"""Vertices that are made polygons at a time; a region of more is made at one go."""

Polygons = npt.NDArray[np.object_]
R = TypeVar("R")


def polygons(outlines: Outlines, *, threads: int | None = None) -> Polygons:
    """Build the polygons of all regions; return them in the order of the regions.

    They are in mask pixels, (x, y): pixel (y, x) covers [x, x + 1] × [y, y + 1]. Shells have
    positive signed area and start at the topmost, then leftmost vertex; holes have negative area
    and follow in that order too. Rings touch at vertices at the most, and none touches itself.
    Simplified, neighbours have all vertices of their common border in common.
    """
    built = list(map_polygons(outlines, lambda _, shapes: shapes, threads=threads))
    return np.concatenate(built) if built else np.zeros(0, object)


def map_polygons(
    outlines: Outlines, function: Callable[[slice, Polygons], R], *, threads: int | None = None
) -> Iterator[R]:
    """Build polygons in batches and do something with each; yield the results in order.

    Only few batches are held at a time.

    Args:
        function: takes a slice of regions and their polygons, as `polygons` returns them.
    """
    sides = _Sides.of(outlines)
    return map_in_threads(
        lambda part: function(part, _build(outlines, sides, part)), sides.batches(), threads=threads
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sides:
    """The two sides of each arc, sorted by region, which is on the right hand of its sides.

    Attributes:
        arc: (s,) index of each side's arc.
        is_backward: (s,) whether the arc is walked from its end, for the region on its left hand.
        bounds: (regions + 1,) where the sides of each region begin, and s.
        vertices: (regions + 1,) how many vertices come before each region, and in all.
    """

    arc: Numbers
    is_backward: Bools
    bounds: Ints
    vertices: Ints

    @classmethod
    def of(cls, outlines: Outlines) -> Self:
        """Sort the sides of all arcs but those of the background."""
        arcs, n_regions = outlines.arcs, len(outlines.regions)
        region = np.concatenate([arcs.left, arcs.right])
        order = np.argsort(region, kind="stable").astype(np.int32)
        bounds = np.searchsorted(region[order], np.arange(1, n_regions + 2))
        order, bounds = order[bounds[0] :], bounds - bounds[0]
        arc = order % max(len(arcs), 1)
        before = np.concatenate([[0], np.cumsum(arcs.sizes[arc])])
        return cls(arc=arc, is_backward=order < len(arcs), bounds=bounds, vertices=before[bounds])

    def batches(self) -> Iterator[slice]:
        """Yield slices of regions of at most `BATCH` vertices, or of one region."""
        start = 0
        while start < len(self.bounds) - 1:
            full = np.searchsorted(self.vertices, self.vertices[start] + BATCH, side="right") - 1
            stop = max(int(full), start + 1)
            yield slice(start, stop)
            start = stop

    def rings(self, arcs: Arcs, part: slice) -> tuple[Numbers, Ints, Ints]:
        """Return the vertices of all rings of some regions, where each begins, and its region."""
        used = slice(self.bounds[part.start], self.bounds[part.stop])
        arc, is_backward = self.arc[used], self.is_backward[used]
        region = np.repeat(
            np.arange(part.stop - part.start), np.diff(self.bounds[part.start : part.stop + 1])
        )
        first, last = arcs.bounds[arc], arcs.bounds[arc + 1] - 1
        first, last = np.where(is_backward, last, first), np.where(is_backward, first, last)
        # a region passes each junction once: there the side that begins follows the one that ends
        is_open = np.flatnonzero(~arcs.is_ring[arc])
        x, y = arcs.xy.T
        begins, ends = (
            is_open[np.lexsort((x[v[is_open]], y[v[is_open]], region[is_open]))]
            for v in (first, last)
        )
        following = np.arange(len(arc), dtype=np.int32)
        following[ends] = begins
        order, bounds, _ = order_paths(following)
        # the last vertex of an open side is the first of the next
        sizes = (arcs.sizes[arc] - ~arcs.is_ring[arc])[order]
        step = np.repeat(np.where(is_backward, -1, 1)[order], sizes)
        vertex = np.repeat(first[order], sizes) + step * ranges(np.zeros_like(sizes), sizes)
        ring_bounds = np.concatenate([[0], np.cumsum(sizes)])[bounds]
        return arcs.xy[vertex], ring_bounds, region[order[bounds[:-1]]]


def _build(outlines: Outlines, sides: _Sides, part: slice) -> Polygons:
    """Return the polygons of some regions."""
    xy, bounds, region = sides.rings(outlines.arcs, part)
    if outlines.is_exact:
        # without corners that only others have: junctions on a straight edge of the region
        is_level = xy[:, 1] == xy[_after(bounds), 1]
        turns = np.empty(len(xy), bool)
        turns[_after(bounds)] = is_level
        turns ^= is_level
        xy, bounds = xy[turns], np.concatenate([[0], np.cumsum(turns)])[bounds]
    sizes, first = np.diff(bounds), bounds[:-1]
    x, y = xy.T.astype(np.int64)
    after = _after(bounds)
    is_hole = np.add.reduceat(x * y[after] - x[after] * y, first) < 0
    place = y << 32 | x
    top = np.flatnonzero(place == np.repeat(np.minimum.reduceat(place, first), sizes))
    order = np.lexsort((place[top], is_hole, region))
    first, top, sizes = first[order], top[order], sizes[order]
    # from the top once around, and the top again
    step = ranges(top - first, sizes + 1)
    size = np.repeat(sizes, sizes + 1)
    step -= (step >= size) * size
    coordinates = xy[np.repeat(first, sizes + 1) + step].astype(np.float64)
    ends = np.concatenate([[0], np.cumsum(sizes + 1)])
    rings = np.concatenate([[0], np.cumsum(np.bincount(region, minlength=part.stop - part.start))])
    return shapely.from_ragged_array(shapely.GeometryType.POLYGON, coordinates, (ends, rings))


def _after(bounds: Ints) -> Ints:
    """Return the index of the next vertex in its ring, of each."""
    after = np.arange(1, bounds[-1] + 1)
    after[bounds[1:] - 1] = bounds[:-1]
    return after
