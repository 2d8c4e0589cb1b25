"""Trace the regions of a mask on pixel edges, block by block, and join them exactly.

A region is a 4-connected set of pixels of one class. Its outline is held as *vertices*, each with
its quadrants: which of the four pixels around it belong to the region. Quadrants of pieces of one
region simply add up, so what the cut at a block's border made cancels, and no polygon is ever
united, buffered or snapped. A vertex is a corner where the mixed second difference

    d = above left - above right - below left + below right

of the region's indicator is not zero. Pairing corners along rows and columns gives the rings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import cc3d
import numpy as np
import numpy.typing as npt
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ints = npt.NDArray[np.int64]
AnyInts = npt.NDArray[np.signedinteger[Any]]
Index = tuple[int, ...]
Vertices = npt.NDArray[np.int32]
"""(m, 4): label or region, y, x, quadrants."""

BATCH = 500_000
"""Vertices that are made polygons at a time; a region of more is made at one go."""
STRIP = 256
"""Rows of a block that are worked on at a time."""

ABOVE_LEFT, ABOVE_RIGHT, BELOW_LEFT, BELOW_RIGHT = 1, 2, 4, 8
ABOVE, BELOW, INSIDE = ABOVE_LEFT | ABOVE_RIGHT, BELOW_LEFT | BELOW_RIGHT, 15
DIFFERENCE = np.array([(q & 1) - (q >> 1 & 1) - (q >> 2 & 1) + (q >> 3 & 1) for q in range(16)])
"""The mixed second difference for each set of quadrants."""

PROBABILITY_ONE = 65535
"""Probabilities are summed as whole multiples of 1/65535, so that no order of adding matters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """The pieces of regions within one block; piece i has the label i + 1.

    Attributes:
        value: (n,) class of each piece.
        pixels: (n,) its number of pixels.
        probability: (n,) sum over its pixels of the probability of its class, in 1/65535.
        first: (n, 2) its first pixel in row-major order, (y, x) in mask pixels.
        top: labels of the block's first row; 0 = background.
        bottom: of its last row.
        left: of its first column.
        right: of its last column.
    """

    value: Ints
    pixels: Ints
    probability: Ints
    first: Ints
    top: npt.NDArray[np.int32]
    bottom: npt.NDArray[np.int32]
    left: npt.NDArray[np.int32]
    right: npt.NDArray[np.int32]

    def as_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays by name, for the ledger."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> Self:
        """Return the pieces that `as_arrays` described; other arrays are ignored."""
        return cls(**{f.name: arrays[f.name] for f in fields(cls)})


def trace(
    mask: npt.NDArray[np.uint8], probability: npt.NDArray[np.uint16], origin: tuple[int, int]
) -> tuple[Pieces, Vertices]:
    """Find the pieces of regions in one block; return them and their vertices.

    Works in strips, so that a mask of pure noise needs little more memory than a calm one.

    Args:
        mask: (h, w) class of each pixel; 0 is background.
        probability: (h, w) of that class, in 1/65535.
        origin: (y, x) of the block's first pixel in the mask.

    Returns:
        The pieces, and (m, 4) int32 label, y, x, quadrants: all corners, and all vertices on the
        block's border; y and x in mask pixels.
    """
    found, count = cc3d.connected_components(
        mask, connectivity=4, out_dtype=np.uint32, return_N=True
    )
    labels: Vertices = found.view(np.int32)
    pixels, probabilities = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    first = np.full(count + 1, mask.size)
    for row in range(0, len(labels), STRIP):
        # runs of equal labels in row-major order: far fewer than pixels
        flat = labels[row : row + STRIP].ravel()
        starts = np.flatnonzero(np.diff(flat, prepend=-1))
        label = flat[starts]
        np.add.at(pixels, label, np.diff(starts, append=flat.size))
        sums = np.add.reduceat(probability[row : row + STRIP].ravel(), starts, dtype=np.int64)
        np.add.at(probabilities, label, sums)
        np.minimum.at(first, label, starts + row * mask.shape[1])
    first = first[1:]
    pieces = Pieces(
        value=mask.ravel()[first].astype(np.int64),
        pixels=pixels[1:],
        probability=probabilities[1:],
        first=np.stack(np.divmod(first, mask.shape[1]), axis=1) + np.array(origin),
        top=labels[0].copy(),
        bottom=labels[-1].copy(),
        left=labels[:, 0].copy(),
        right=labels[:, -1].copy(),
    )
    height = len(labels) + 1  # rows of vertices
    strips = [_vertices(labels, row, min(row + STRIP, height)) for row in range(0, height, STRIP)]
    return pieces, np.concatenate(strips) + np.array([0, *origin, 0], np.int32)


def _vertices(labels: npt.NDArray[np.int32], start: int, stop: int) -> Vertices:
    """Return the vertices of the rows [start, stop), the block's first pixel being (0, 0)."""
    height = len(labels)
    rows = labels[max(start - 1, 0) : stop]
    padded = np.pad(rows, ((int(start == 0), int(stop > height)), (1, 1)))
    around = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    above_left, above_right, below_left, below_right = around
    wanted = (above_left != above_right) | (below_left != below_right)
    wanted &= (above_left != below_left) | (above_right != below_right)
    # across the border there may be a corner of another region, which this block cannot see
    wanted[:, 0] = wanted[:, -1] = True
    wanted[0] |= start == 0
    wanted[-1] |= stop > height
    y, x = np.nonzero(wanted)
    label = np.concatenate([neighbour[y, x] for neighbour in around])
    quadrant = np.repeat([ABOVE_LEFT, ABOVE_RIGHT, BELOW_LEFT, BELOW_RIGHT], len(y))
    inside = label > 0
    y, x = np.tile(y, 4)[inside] + start, np.tile(x, 4)[inside]
    return np.stack(_add_up(label[inside], y, x, quadrant[inside]), axis=1).astype(np.int32)


def _add_up(label: AnyInts, y: AnyInts, x: AnyInts, quadrants: AnyInts) -> tuple[AnyInts, ...]:
    """Add the quadrants of equal vertices; return the columns sorted by label, y, x."""
    order = np.lexsort((x, y, label))
    label, y, x, quadrants = label[order], y[order], x[order], quadrants[order]
    new = (np.diff(label) != 0) | (np.diff(y) != 0) | (np.diff(x) != 0)
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])[: len(label)]
    total = np.add.reduceat(quadrants, starts) if len(label) else quadrants
    return label[starts], y[starts], x[starts], total


@dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """All regions of a mask, ordered by their first pixel.

    Attributes:
        value: (n,) class.
        pixels: (n,) number of mask pixels.
        probability: (n,) mean probability of the class over the region, in [0, 1].
        first: (n, 2) first pixel in row-major order, (y, x) in mask pixels.
        vertices: of the pieces, by region, not yet added up.
    """

    value: Ints
    pixels: Ints
    probability: npt.NDArray[np.float64]
    first: Ints
    vertices: Vertices

    def __len__(self) -> int:
        return len(self.value)

    def at_least(self, pixels: float) -> Regions:
        """Return the regions of at least so many pixels, their order kept."""
        keep = self.pixels >= pixels
        renumber = np.cumsum(keep) - 1
        vertices = self.vertices[keep[self.vertices[:, 0]]]
        vertices[:, 0] = renumber[vertices[:, 0]]
        return Regions(
            value=self.value[keep],
            pixels=self.pixels[keep],
            probability=self.probability[keep],
            first=self.first[keep],
            vertices=vertices,
        )


def join(
    pieces: Mapping[Index, Pieces],
    vertices: Callable[[Index], Vertices],
    *,
    min_pixels: float = 0,
) -> Regions:
    """Join the pieces of all blocks to regions; return them.

    Args:
        pieces: of each block that holds anything, by its row and column.
        vertices: gives a block's vertices, as `trace` returned them; asked for one after the other.
        min_pixels: smaller regions are left out, and cost no memory.
    """
    sizes = [len(p.value) for p in pieces.values()]
    offsets = dict(zip(pieces, np.cumsum([0, *sizes]).tolist(), strict=False))
    value, first = _column(pieces, "value"), _column(pieces, "first").reshape(-1, 2)
    links = _gather([_links(pieces, offsets, value, index) for index in pieces], (0, 2))
    shape = (len(value), len(value))
    graph = coo_array((np.ones(len(links), bool), (links[:, 0], links[:, 1])), shape=shape)
    count, region = connected_components(graph, directed=False)
    pixels, probability = (
        np.bincount(region, _column(pieces, name), minlength=count)
        for name in ("pixels", "probability")
    )
    order = np.lexsort((first[:, 1], first[:, 0], region))
    heads = order[np.flatnonzero(np.diff(region[order], prepend=-1))]  # each region's first piece
    kept = np.flatnonzero(pixels >= min_pixels)
    kept = kept[np.lexsort((first[heads[kept], 1], first[heads[kept], 0]))]
    rank = np.full(count, -1, np.int32)
    rank[kept] = np.arange(len(kept))
    return Regions(
        value=value[heads[kept]],
        pixels=pixels[kept].astype(np.int64),
        probability=probability[kept] / pixels[kept] / PROBABILITY_ONE,
        first=first[heads[kept]],
        vertices=_gather(
            [_renumbered(vertices(i), rank[region[offsets[i] : offsets[i] + n]])
             for i, n in zip(pieces, sizes, strict=True)],
            (0, 4),
        ),
    )  # fmt: skip


def _column(pieces: Mapping[Index, Pieces], name: str) -> Ints:
    return _gather([getattr(p, name) for p in pieces.values()], (0,))


def _gather(arrays: list[npt.NDArray[Any]], empty: tuple[int, ...]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(empty, np.int64)


def _renumbered(vertices: Vertices, region: npt.NDArray[np.int32]) -> Vertices:
    """Return the vertices of regions that are kept, their labels replaced by the regions."""
    owner = region[vertices[:, 0] - 1]
    renumbered = np.column_stack([owner, vertices[:, 1:]])
    return renumbered[owner >= 0]


def _links(
    pieces: Mapping[Index, Pieces], offsets: Mapping[Index, int], value: Ints, index: Index
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
            ).astype(np.int64)
            found.append(np.unique(pair[value[pair[:, 0]] == value[pair[:, 1]]], axis=0))
    return _gather(found, (0, 2))


def polygons(regions: Regions, *, with_nodes: bool = False) -> npt.NDArray[np.object_]:
    """Build the exact outline of each region; return shapely polygons in mask pixels, (x, y).

    Pixel (y, x) covers [x, x + 1] × [y, y + 1]. Shells have positive signed area and start at the
    topmost, then leftmost corner; holes have negative area and follow in that order too. Rings
    touch at points at the most, and none touches itself.

    Args:
        regions: what to outline.
        with_nodes: add a vertex where the corner of another region lies on a straight edge, so
            that neighbours share all vertices of their common border.
    """
    vertices = regions.vertices[np.argsort(regions.vertices[:, 0], kind="stable")]
    parts = [vertices[batch] for batch in _iter_batches(vertices[:, 0])]
    del vertices
    for number, part in enumerate(parts):
        parts[number] = np.stack(_add_up(*part.T), axis=1).astype(np.int32)
    corners = np.zeros(0, np.int64)
    if with_nodes and parts:
        corners = np.concatenate([_place(p[DIFFERENCE[p[:, 3]] != 0]) for p in parts])
        corners = np.unique(corners)
    built = [_build(part, corners) for part in parts]
    return np.concatenate(built) if built else np.zeros(0, object)


def _iter_batches(region: npt.NDArray[np.int32]) -> Iterator[slice]:
    """Yield slices of whole regions, of about `BATCH` vertices each, which bounds the memory."""
    start = 0
    while start < len(region):
        stop = min(start + BATCH, len(region))
        stop = int(np.searchsorted(region, region[stop - 1], side="right"))
        yield slice(start, stop)
        start = stop


def _place(vertices: Vertices) -> Ints:
    """Return one number for each (y, x)."""
    return vertices[:, 1].astype(np.int64) << 32 | vertices[:, 2]


def _build(vertices: Vertices, corners: Ints) -> npt.NDArray[np.object_]:
    """Return the polygons of some whole regions.

    Args:
        vertices: of the regions, sorted and added up.
        corners: places of all regions' corners, sorted; where they lie on an edge, it gets a node.
    """
    region, y, x, quadrants = vertices.T.copy()
    region -= region[0]
    d = DIFFERENCE[quadrants]
    twice = np.repeat(np.arange(len(d)), np.abs(d))  # where two pixels meet diagonally: two corners
    rings = _link(region[twice], y[twice], x[twice], d[twice], np.diff(twice, prepend=-1) == 0)
    parts = [rings.corners()]
    if len(corners):
        node = (d == 0) & (quadrants != INSIDE)
        node[node] = _is_in(_place(vertices[node]), corners)
        level = node & ((quadrants == ABOVE) | (quadrants == BELOW))
        parts.append(rings.place_on_rows(region[level], y[level], x[level]))
        node &= ~level
        parts.append(rings.place_on_columns(region[node], y[node], x[node]))
    ring, step, along, vy, vx = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((along, step, ring))
    return _as_polygons(ring[order], vy[order], vx[order], rings.region, int(region[-1]) + 1)


def _is_in(values: Ints, ordered: Ints) -> npt.NDArray[np.bool_]:
    found = np.searchsorted(ordered, values)
    return np.asarray(ordered[np.minimum(found, len(ordered) - 1)] == values)


def _as_polygons(
    ring: AnyInts, y: AnyInts, x: AnyInts, region_of: AnyInts, count: int
) -> npt.NDArray[np.object_]:
    """Return the polygons of vertices in ring order; rings are sorted by region, shells first."""
    heads = np.flatnonzero(np.diff(ring, prepend=-1))
    offsets = np.concatenate([[0], np.cumsum(np.diff(heads, append=len(ring)) + 1)])
    closed = np.insert(np.arange(len(ring)), np.append(heads[1:], len(ring)), heads)
    coordinates = np.stack([x[closed], y[closed]], axis=1).astype(np.float64)
    owners = region_of[ring[heads]]
    rings_before = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=count))])
    built: npt.NDArray[np.object_] = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON, coordinates, (offsets, rings_before)
    )
    return built


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rings:
    """Corners linked to rings. Edge j runs along a row between the corners 2j (left) and 2j + 1.

    Rings are walked with the region on the right hand, as y points down. A ring's number is its
    topmost, then leftmost edge.

    Attributes:
        y: of each corner.
        x: of each corner.
        rows: sort key of each edge's left corner by region, y, x.
        columns: (n, 2) corners at the upper and lower end of each edge along a column.
        column_keys: sort key of each of them by region, x, y.
        extent: of x and of y, which the keys were made with.
        start: corner at which each edge begins.
        end: corner at which it ends.
        ring: of each edge.
        position: of each edge in its ring.
        region: of each edge.
    """

    y: AnyInts
    x: AnyInts
    rows: Ints
    columns: Ints
    column_keys: Ints
    extent: tuple[int, int]
    start: Ints
    end: Ints
    ring: Ints
    position: Ints
    region: AnyInts

    def _at(
        self, edge: Ints, phase: int, along: AnyInts, y: AnyInts, x: AnyInts
    ) -> tuple[AnyInts, ...]:
        return self.ring[edge], 4 * self.position[edge] + phase, along, y, x

    def corners(self) -> tuple[AnyInts, ...]:
        """Return ring, step, order within the step, y and x of all corners."""
        edge = np.arange(len(self.start))
        ends = np.concatenate([self.start, self.end])
        phase = np.repeat([0, 2], len(edge))
        both = np.concatenate([edge, edge])
        step = 4 * self.position[both] + phase
        return self.ring[both], step, np.zeros_like(both), self.y[ends], self.x[ends]

    def place_on_rows(self, region: AnyInts, y: AnyInts, x: AnyInts) -> tuple[AnyInts, ...]:
        """Return the same of vertices that lie within edges along rows."""
        key = (region.astype(np.int64) * self.extent[1] + y) * self.extent[0] + x
        edge = np.searchsorted(self.rows, key) - 1
        along = np.where(self.start[edge] < self.end[edge], x, -x)
        return self._at(edge, 1, along, y, x)

    def place_on_columns(self, region: AnyInts, y: AnyInts, x: AnyInts) -> tuple[AnyInts, ...]:
        """Return the same of vertices that lie within edges along columns."""
        key = (region.astype(np.int64) * self.extent[0] + x) * self.extent[1] + y
        upper, lower = self.columns[np.searchsorted(self.column_keys, key) - 1].T
        downward = self.end[upper // 2] == upper
        edge = np.where(downward, upper, lower) // 2
        return self._at(edge, 3, np.where(downward, y, -y), y, x)


def _link(
    region: AnyInts, y: AnyInts, x: AnyInts, d: AnyInts, second: npt.NDArray[np.bool_]
) -> _Rings:
    """Pair corners, sorted by region, y, x, along rows and columns; return the rings.

    Args:
        region: of each corner.
        y: of each corner.
        x: of each corner.
        d: of each corner.
        second: whether a corner is the second at its vertex.
    """
    # Where two corners share a vertex, their order within the column is such that what lies
    # outside the region is parted: the region itself is connected elsewhere.
    columns = np.lexsort((np.where(d < 0, second, ~second), y, x, region)).reshape(-1, 2)
    partner = np.empty(len(d), np.int64)
    partner[columns[:, 0]], partner[columns[:, 1]] = columns[:, 1], columns[:, 0]
    left = np.arange(0, len(d), 2)
    rightward = d[left] > 0  # the region lies below this edge
    start, end = left + ~rightward, left + rightward
    ring, position = _order_cycles(partner[end] // 2)
    nx, ny = int(x.max()) + 1, int(y.max()) + 1
    upper = columns[:, 0]
    return _Rings(
        y=y,
        x=x,
        rows=(region[left].astype(np.int64) * ny + y[left]) * nx + x[left],
        columns=columns,
        column_keys=(region[upper].astype(np.int64) * nx + x[upper]) * ny + y[upper],
        extent=(nx, ny),
        start=start,
        end=end,
        ring=ring,
        position=position,
        region=region[left],
    )


def _order_cycles(following: Ints) -> tuple[Ints, Ints]:
    """Split a permutation in cycles; return each element's cycle, by least member, and position.

    Positions come from doubling jumps, in as many rounds as the longest cycle has binary digits.

    Example:
        >>> ring, position = _order_cycles(np.array([2, 1, 3, 0]))
        >>> ring.tolist(), position.tolist()
        ([0, 1, 0, 0], [0, 0, 1, 2])
    """
    count = len(following)
    graph = coo_array((np.ones(count, bool), (np.arange(count), following)), shape=(count, count))
    _, cycle = connected_components(graph, directed=False)
    _, heads = np.unique(cycle, return_index=True)
    ring = heads[cycle]
    before = np.empty(count, np.int64)
    before[following] = np.arange(count)
    before[heads] = heads
    position = (before != np.arange(count)).astype(np.int64)
    position[heads] = 0
    active = np.flatnonzero(before != ring)
    while len(active):
        jump = before[active]
        step, further = position[jump], before[jump]
        position[active] += step
        before[active] = further
        active = active[further != ring[active]]
    return ring, position


def outlines(regions: Regions, *, tolerance: float, min_hole: float) -> npt.NDArray[np.object_]:
    """Build the outlines of regions, simplified together; return polygons in mask pixels, (x, y).

    Neighbours keep their common border: Visvalingam–Whyatt on the edges of the coverage (GEOS
    CoverageSimplifier) takes a vertex while the triangle it spans is smaller than tolerance². All
    vertices that remain are vertices of the exact outline.

    Args:
        regions: what to outline.
        tolerance: root of the largest triangle to cut off, in mask pixels; 0 = exact.
        min_hole: holes below this area are filled, in mask pixels.
    """
    shapes = polygons(regions, with_nodes=tolerance > 0)
    if min_hole > 0 and len(shapes):
        shapes = _without_small_holes(shapes, min_hole)
    if tolerance > 0 and len(shapes):
        shapes = shapely.coverage_simplify(shapes, tolerance)
    return shapes


def _without_small_holes(
    shapes: npt.NDArray[np.object_], min_hole: float
) -> npt.NDArray[np.object_]:
    rings, owner = shapely.get_rings(shapes, return_index=True)
    is_shell = np.diff(owner, prepend=-1) != 0
    area = shapely.area(shapely.polygons(rings))
    keep = is_shell | (area >= min_hole)
    filled: npt.NDArray[np.object_] = shapely.polygons(rings[keep], indices=owner[keep])
    return filled


def iter_parts(polygon: Any, box: Any | None) -> Iterator[Any]:
    """Yield the polygons that remain of one within a box; `None` = all of it."""
    if box is None or box.covers(polygon):
        yield polygon
        return
    clipped = shapely.get_parts(shapely.intersection(polygon, box))
    yield from (part for part in clipped if isinstance(part, shapely.Polygon) and part.area > 0)
