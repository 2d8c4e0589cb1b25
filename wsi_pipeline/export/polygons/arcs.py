"""The borders between the regions of a mask, on pixel edges, followed block by block.

A *vertex* is a place where a border turns or where borders meet; a *junction* is one where three
or more regions meet (background counts as one). An *arc* is the border between two regions from
junction to junction, or a closed ring. Neighbours have each arc in common, so whatever is done to
an arc leaves no gap and no overlap. Arcs are walked with the region of the higher number on the
right hand, as y points down.

Where two pixels of one region touch at a corner only, its outline turns such that what is not the
region is parted: the region itself is connected elsewhere. So no ring touches itself.

A block owns the vertices on its upper and left border, and needs of its neighbours only the pixels
along these. The *fragments* of an arc are put together along the rows and columns in which they
leave their blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]

UP, DOWN, LEFT, RIGHT = range(4)
"""The pixel edges at a vertex, by the direction in which they leave it."""
OPPOSITE = 1
"""A direction XOR this is the opposite one."""
ABOVE_LEFT, ABOVE_RIGHT, BELOW_LEFT, BELOW_RIGHT = range(4)
"""The pixels around a vertex."""
RIGHT_HAND = np.array([ABOVE_RIGHT, BELOW_LEFT, ABOVE_LEFT, BELOW_RIGHT])
"""The pixel on the right hand of who leaves in each direction, as y points down."""
LEFT_HAND = np.array([ABOVE_LEFT, BELOW_RIGHT, BELOW_LEFT, ABOVE_RIGHT])


@dataclass(frozen=True, kw_only=True, eq=False)
class Arcs:
    """Arcs, or fragments of arcs, as sequences of vertices.

    Attributes:
        xy: (m, 2) vertices, arc by arc, in mask pixels.
        bounds: (n + 1,) where each arc begins, and m.
        right: (n,) number of the region on the right hand.
        left: (n,) number of the region on the left hand, a lower one; 0 = background.
        is_ring: (n,) whether the last vertex is followed by the first.
        twice_area: (n,) sum of the cross products of neighbouring vertices, before any is taken
            away: twice the area of a ring, negative where the ring is a hole's of `right`.
    """

    xy: Numbers
    bounds: Ints
    right: Numbers
    left: Numbers
    is_ring: Bools
    twice_area: Ints

    def __len__(self) -> int:
        return len(self.right)

    @property
    def sizes(self) -> Ints:
        """Return (n,) the number of vertices of each arc."""
        return np.diff(self.bounds)

    def keep_vertices(self, vertices: Bools) -> Arcs:
        """Return the arcs with only those of their (m,) vertices; none may lose its last."""
        before = np.concatenate([[0], np.cumsum(vertices)])
        return replace(self, xy=self.xy[vertices], bounds=before[self.bounds])

    def keep_arcs(self, arcs: Bools) -> Arcs:
        """Return only those (n,) arcs."""
        if arcs.all():
            return self
        return Arcs(
            xy=self.xy[np.repeat(arcs, self.sizes)],
            bounds=np.concatenate([[0], np.cumsum(self.sizes[arcs])]),
            right=self.right[arcs],
            left=self.left[arcs],
            is_ring=self.is_ring[arcs],
            twice_area=self.twice_area[arcs],
        )

    def is_small_hole(self, min_pixels: float) -> Bools:
        """Return (n,) which arcs are holes that are too small, and so hold nothing that is kept."""
        is_hole: Bools = self.is_ring & (self.left == 0) & (self.twice_area < 0)
        return is_hole & (-self.twice_area < 2 * min_pixels)

    def is_at_cut(self, tile: int) -> Bools:
        """Return (m,) which vertices have a neighbour in another tile."""
        x, y = self.xy.T // tile
        tiles = y.astype(np.int64) << 32 | x
        first, last = self.bounds[:-1], self.bounds[1:] - 1
        # between each vertex and the next
        is_cut = np.diff(tiles, append=0) != 0
        is_cut[last] = False
        is_at_cut: Bools = is_cut.copy()
        is_at_cut[1:] |= is_cut[:-1]
        closing = self.is_ring & (tiles[first] != tiles[last])
        is_at_cut[first[closing]] = is_at_cut[last[closing]] = True
        return is_at_cut


@dataclass(frozen=True, kw_only=True, eq=False)
class Ends:
    """Where fragments leave a block; each goes straight on to the next vertex of its line.

    Attributes:
        is_column: (k,) whether the line is a column, not a row.
        line: (k,) x of the column, or y of the row.
        along: (k,) the other coordinate of the fragment's vertex.
        onward: (k,) whether it leaves to the right or down, not to the left or up.
        arc: (k,) index of the fragment.
        is_last: (k,) whether it is the fragment's last vertex, not its first.
    """

    is_column: Bools
    line: Numbers
    along: Numbers
    onward: Bools
    arc: Ints
    is_last: Bools

    def keep_arcs(self, arcs: Bools) -> Ends:
        """Return the ends when only those fragments are left, all that have ends among them."""
        return replace(self, arc=(np.cumsum(arcs) - 1)[self.arc])


def follow_borders(y: Numbers, x: Numbers, around: Numbers) -> tuple[Arcs, Ends]:
    """Follow the borders of regions within one block; return the fragments and their open ends.

    Args:
        y: (n,) of places in row-major order, all vertices among them, in mask pixels.
        x: (n,) of the same.
        around: (4, n) numbers of the regions above left, above right, below left, below right.
    """
    places = _Places.of(y, x, around)
    lines = {direction: places.lines(direction) for direction in (RIGHT, DOWN)}
    following = np.full(len(places.vertex), -1, np.int32)
    for direction, line in lines.items():
        source, target = places.links(direction, *line)
        following[source] = target
    order, bounds, is_ring = order_paths(following)
    arc = np.empty(len(order), np.int32)
    arc[order] = np.repeat(np.arange(len(is_ring), dtype=np.int32), np.diff(bounds))
    ends = [places.open_ends(direction, *line, arc) for direction, line in lines.items()]
    vertex = places.vertex[order]
    xy = np.stack([places.x[vertex], places.y[vertex]], axis=1)
    first, last = bounds[:-1], bounds[1:] - 1
    products = np.zeros(len(xy), np.int64)
    products[:-1] = _cross(xy[:-1], xy[1:])
    products[last] = np.where(is_ring, _cross(xy[last], xy[first]), 0)
    right, left = places.sides(order[first])
    arcs = Arcs(
        xy=xy,
        bounds=bounds,
        right=right,
        left=left,
        is_ring=is_ring,
        twice_area=np.add.reduceat(products, first),
    )
    return arcs, _concatenate(ends)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Places:
    """The vertices of a block in row-major order, and how arcs pass them.

    At a corner an arc makes one *visit*. Where pixels of one region meet diagonally there are two.
    At a junction each pixel edge has a visit of its own, at which an arc begins or ends.

    Attributes:
        y: (n,) row of each vertex.
        x: (n,) column of each vertex.
        around: (4, n) numbers of the regions at the pixels around.
        edge: (4, n) whether a border leaves in each direction.
        visit: (4, n) which visit the pixel edge belongs to, where there is one.
        vertex: (v,) index of the vertex of each visit.
    """

    y: Numbers
    x: Numbers
    around: Numbers
    edge: Bools
    visit: Numbers
    vertex: Ints

    @classmethod
    def of(cls, y: Numbers, x: Numbers, around: Numbers) -> Self:
        """Find the vertices among places, and pair the pixel edges of each."""
        sides = zip(RIGHT_HAND.tolist(), LEFT_HAND.tolist(), strict=True)
        edge = np.stack([around[right] != around[left] for right, left in sides])
        is_vertex = (edge[UP] | edge[DOWN]) & (edge[LEFT] | edge[RIGHT])
        if not is_vertex.all():
            y, x, around, edge = (a.compress(is_vertex, axis=-1) for a in (y, x, around, edge))
        up, down, left, right = edge.astype(np.int32)
        degree = up + down + left + right
        meeting = np.flatnonzero(degree > 2)
        crossing = degree[meeting] == 4
        at = around[:, meeting]
        same, same_other = at[ABOVE_LEFT] == at[BELOW_RIGHT], at[ABOVE_RIGHT] == at[BELOW_LEFT]
        # a region that meets itself goes before background that does
        around_other = crossing & same & ~(same_other & (at[ABOVE_LEFT] == 0))
        around_same = crossing & same_other & ~around_other
        is_junction = ~(around_other | around_same)
        count = np.ones(len(y), np.int32)
        count[meeting] = np.where(is_junction, degree[meeting], 2)
        first = np.cumsum(count, dtype=np.int32) - count
        visit = np.stack([first] * 4)
        visit[np.ix_([DOWN, LEFT], meeting[around_other])] += 1
        visit[np.ix_([DOWN, RIGHT], meeting[around_same])] += 1
        junctions = meeting[is_junction]
        edges = edge[:, junctions]
        visit[:, junctions] += np.cumsum(edges, axis=0, dtype=np.int32) - edges
        return cls(
            y=y,
            x=x,
            around=around,
            edge=edge,
            visit=visit,
            vertex=np.repeat(np.arange(len(y)), count),
        )

    def lines(self, direction: int) -> tuple[Ints, Bools]:
        """Return the vertices by rows (RIGHT) or by columns (DOWN), and which of them begin one."""
        if direction == RIGHT:
            return np.arange(len(self.y)), np.diff(self.y, prepend=-1) != 0
        column = self.x - self.x.min(initial=0)
        # numpy sorts 16 bits by their digits, several times faster than 32
        order = np.argsort(column.astype(np.min_scalar_type(column.max(initial=0))), kind="stable")
        return order, np.diff(column[order], prepend=-1) != 0

    def links(self, direction: int, order: Ints, begins: Bools) -> tuple[Numbers, Numbers]:
        """Return the visits from which and to which arcs go along lines."""
        inner = np.flatnonzero(self.edge[direction, order[:-1]] & ~begins[1:])
        here, there = order[inner], order[inner + 1]
        outgoing = self.is_outgoing(direction, here)
        here, there = self.visit[direction, here], self.visit[direction ^ OPPOSITE, there]
        return np.where(outgoing, here, there), np.where(outgoing, there, here)

    def open_ends(self, direction: int, order: Ints, begins: Bools, arc: Numbers) -> Ends:
        """Return where arcs leave the block along lines; `arc` is (v,) of each visit."""
        back = direction ^ OPPOSITE
        first, last = order[begins], order[np.append(begins, True)[1:]]
        first, last = first[self.edge[back, first]], last[self.edge[direction, last]]
        port = np.repeat([back, direction], [len(first), len(last)])
        vertex = np.concatenate([first, last])
        line, along = (self.y, self.x) if direction == RIGHT else (self.x, self.y)
        return Ends(
            is_column=np.full(len(port), direction == DOWN),
            line=line[vertex],
            along=along[vertex],
            onward=port == direction,
            arc=arc[self.visit[port, vertex]],
            is_last=self.is_outgoing(port, vertex),
        )

    def sides(self, visits: Ints) -> tuple[Numbers, Numbers]:
        """Return the regions on the right and on the left hand of arcs that make these visits."""
        vertex = self.vertex[visits]
        # any of the pixel edges that belong to the visit
        port = ((self.visit[:, vertex] == visits) & self.edge[:, vertex]).argmax(axis=0)
        one, other = self.around[RIGHT_HAND[port], vertex], self.around[LEFT_HAND[port], vertex]
        return np.maximum(one, other), np.minimum(one, other)

    def is_outgoing(self, direction: int | Ints, vertex: Ints) -> Bools:
        """Return whether arcs leave vertices in these directions, or come from there."""
        right, left = RIGHT_HAND[direction], LEFT_HAND[direction]
        outgoing: Bools = self.around[right, vertex] > self.around[left, vertex]
        return outgoing


def order_paths(following: Numbers) -> tuple[Ints, Ints, Bools]:
    """Put the members of paths and rings in a row; return order, bounds, and which are rings.

    Args:
        following: (n,) what follows each member; -1 = nothing.

    Returns:
        (n,) members path by path; (p + 1,) where each path begins, and n; (p,) whether a path is a
        ring, which then begins with its least member.

    Example:
        >>> order, bounds, is_ring = order_paths(np.array([2, -1, 0, 1, 4], np.int32))
        >>> [order[a:b].tolist() for a, b in zip(bounds, bounds[1:])], is_ring.tolist()
        ([[0, 2], [3, 1], [4]], [True, False, True])
    """
    # They take a while to load, and no mask by itself needs them.
    from scipy.sparse.csgraph import connected_components, depth_first_order

    n = len(following)
    if n == 0:
        return np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, bool)
    goes_on = following >= 0
    before = np.full(n, -1, np.int32)
    before[following[goes_on]] = np.flatnonzero(goes_on)
    n_paths, path = connected_components(_graph(goes_on, following[goes_on]), directed=False)
    heads = np.empty(n_paths, np.int32)
    # of equal indices the last is kept: the least
    heads[path[::-1]] = np.arange(n - 1, -1, -1)
    begins = np.flatnonzero(before < 0)
    heads[path[begins]] = begins
    is_ring = before[heads] >= 0
    following = following.copy()
    following[before[heads[is_ring]]] = -1
    # One depth-first search over all, in C: the root of each path leads to its head, and on to the
    # root of the next path.
    goes_on = following >= 0
    roots = np.arange(n, n + n_paths, dtype=np.int32)
    children = np.stack([heads, roots + 1], axis=1).ravel()
    degrees = np.concatenate([goes_on, np.full(n_paths, 2), [0]])
    graph = _graph(degrees, np.concatenate([following[goes_on], children]))
    walk = depth_first_order(graph, n, return_predecessors=False)[:-1]
    is_root = walk >= n
    bounds = np.append(np.flatnonzero(is_root) - np.arange(n_paths), n)
    return walk[~is_root], bounds, is_ring


def _graph(degrees: npt.NDArray[np.generic], neighbours: Numbers) -> csr_array:
    from scipy.sparse import csr_array

    bounds = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int32)
    shape = (len(degrees), len(degrees))
    return csr_array((np.ones(len(neighbours)), neighbours, bounds), shape=shape)


def ranges(first: Ints, counts: Ints) -> Ints:
    """Return whole numbers in a row, so many from each first one on.

    Example:
        >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    shift: Ints = np.repeat(first - (ends - counts), counts)
    return shift + np.arange(len(shift))


def _cross(a: Numbers, b: Numbers) -> Ints:
    """Return the cross products of (n, 2) and (n, 2) places."""
    (x_a, y_a), (x_b, y_b) = a.T.astype(np.int64), b.T
    product: Ints = x_a * y_b - y_a * x_b
    return product


def _concatenate(ends: Sequence[Ends]) -> Ends:
    names = [field.name for field in fields(Ends)]
    return Ends(**{name: np.concatenate([getattr(e, name) for e in ends]) for name in names})


def join_fragments(parts: list[tuple[Arcs, Ends]]) -> Arcs:
    """Put the fragments of all blocks together; return the arcs.

    Args:
        parts: what `follow_borders` returned of each block. The list is emptied on the way, so that
            no vertex is held twice.
    """
    if not parts:
        none = np.zeros(0, np.int32)
        parts = [follow_borders(none, none, np.stack([none] * 4))]
    offsets = np.cumsum([0, *(len(arcs) for arcs, _ in parts)])
    ends = _concatenate(
        [replace(e, arc=e.arc + offset) for (_, e), offset in zip(parts, offsets, strict=False)]
    )
    # an end that goes on to the right or down is the next of its line for one that comes from there
    order = np.lexsort((ends.onward, ends.along, ends.line, ends.is_column))
    one, other = order[0::2], order[1::2]
    source = ends.arc[np.where(ends.is_last[one], one, other)]
    target = ends.arc[np.where(ends.is_last[one], other, one)]
    following = np.full(offsets[-1], -1, np.int32)
    following[source] = target
    order, bounds, is_ring = order_paths(following)
    sizes, is_whole_ring, area, right, left = (
        np.concatenate([getattr(arcs, name) for arcs, _ in parts])
        for name in ("sizes", "is_ring", "twice_area", "right", "left")
    )
    first = np.concatenate([arcs.xy[arcs.bounds[:-1]] for arcs, _ in parts])
    last = np.concatenate([arcs.xy[arcs.bounds[1:] - 1] for arcs, _ in parts])
    area[source] += _cross(last[source], first[target])
    heads = order[bounds[:-1]]
    begins = np.concatenate([[0], np.cumsum(sizes[order])])
    place = np.empty(len(sizes), np.int64)
    place[order] = begins[:-1]
    xy = np.empty((begins[-1], 2), np.int32)
    for offset in offsets[-2::-1]:
        arcs, _ = parts.pop()
        shift = place[offset : offset + len(arcs)] - arcs.bounds[:-1]
        xy[np.arange(len(arcs.xy)) + np.repeat(shift, arcs.sizes)] = arcs.xy
    return Arcs(
        xy=xy,
        bounds=begins[bounds],
        right=right[heads],
        left=left[heads],
        is_ring=is_ring | is_whole_ring[heads],
        twice_area=np.add.reduceat(area[order], bounds[:-1]),
    )
