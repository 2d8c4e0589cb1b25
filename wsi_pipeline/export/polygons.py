"""Trace the regions of a mask on pixel edges, block by block, and join them exactly.

A region is a 4-connected set of pixels of one class. Its outline is held as *corners*: the vertices
where the mixed second difference of its indicator I,

    d(y, x) = I(above left) - I(above right) - I(below left) + I(below right),

is not zero. d is linear in I, so the corners of a region that lies in many blocks are the sum of
the corners of its pieces: what the cut at a block's border made cancels, and no polygon is ever
united, buffered or snapped. Rings follow from the corners by pairing them along rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        corners: (m, 4) int32 label, y, x, d of every corner, y and x in mask pixels.
        top: labels of the block's first row; 0 = background.
        bottom: of its last row.
        left: of its first column.
        right: of its last column.
    """

    value: Ints
    pixels: Ints
    probability: Ints
    first: Ints
    corners: npt.NDArray[np.int32]
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
) -> Pieces:
    """Find the pieces of regions in one block and their corners; return them.

    Args:
        mask: (h, w) class of each pixel; 0 is background.
        probability: (h, w) of that class, in 1/65535.
        origin: (y, x) of the block's first pixel in the mask.
    """
    labels = cc3d.connected_components(mask, connectivity=4, out_dtype=np.uint32).view(np.int32)
    flat = labels.ravel()
    # runs of equal labels in row-major order: far fewer than pixels
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    label = flat[starts]
    lengths = np.diff(starts, append=flat.size)
    sums = np.add.reduceat(probability.ravel(), starts, dtype=np.int64)
    count = int(label.max()) + 1
    pixels = np.bincount(label, weights=lengths, minlength=count).astype(np.int64)
    probabilities = np.bincount(label, weights=sums, minlength=count).astype(np.int64)
    first = np.full(count, flat.size)
    np.minimum.at(first, label, starts)
    first = first[1:]
    return Pieces(
        value=mask.ravel()[first].astype(np.int64),
        pixels=pixels[1:],
        probability=probabilities[1:],
        first=np.stack(np.divmod(first, mask.shape[1]), axis=1) + np.array(origin),
        corners=_corners(labels, origin),
        top=labels[0].copy(),
        bottom=labels[-1].copy(),
        left=labels[:, 0].copy(),
        right=labels[:, -1].copy(),
    )


def _corners(labels: npt.NDArray[np.int32], origin: tuple[int, int]) -> npt.NDArray[np.int32]:
    padded = np.pad(labels, 1)
    above_left, above_right = padded[:-1, :-1], padded[:-1, 1:]
    below_left, below_right = padded[1:, :-1], padded[1:, 1:]
    straight = (above_left == above_right) & (below_left == below_right)
    straight |= (above_left == below_left) & (above_right == below_right)
    y, x = np.nonzero(~straight)
    parts = []
    for neighbours, sign in (
        (above_left, 1),
        (above_right, -1),
        (below_left, -1),
        (below_right, 1),
    ):
        label = neighbours[y, x]
        at = np.flatnonzero(label)
        parts.append((label[at], y[at], x[at], np.full(len(at), sign)))
    label, y, x, d = (np.concatenate(column) for column in zip(*parts, strict=True))
    corners = np.stack(_add_up(label, y + origin[0], x + origin[1], d), axis=1)
    return corners.astype(np.int32)


def _add_up(label: AnyInts, y: AnyInts, x: AnyInts, d: AnyInts) -> tuple[Ints, Ints, Ints, Ints]:
    """Add the d of equal vertices and drop zeros; return them sorted by label, y, x."""
    order = np.lexsort((x, y, label))
    label, y, x, d = label[order], y[order], x[order], d[order]
    if len(label) == 0:
        return label, y, x, d
    new = (np.diff(label) != 0) | (np.diff(y) != 0) | (np.diff(x) != 0)
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    total = np.add.reduceat(d, starts)
    kept = starts[total != 0]
    return label[kept], y[kept], x[kept], total[total != 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """All regions of a mask, ordered by their first pixel.

    Attributes:
        value: (n,) class.
        pixels: (n,) number of mask pixels.
        probability: (n,) mean probability of the class over the region, in [0, 1].
        first: (n, 2) first pixel in row-major order, (y, x) in mask pixels.
        corners: (m, 4) int32 region, y, x, d; the pieces' corners, not yet added up.
    """

    value: Ints
    pixels: Ints
    probability: npt.NDArray[np.float64]
    first: Ints
    corners: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.value)

    def at_least(self, pixels: float) -> Regions:
        """Return the regions of at least so many pixels, their order kept."""
        keep = self.pixels >= pixels
        renumber = np.cumsum(keep) - 1
        corners = self.corners[keep[self.corners[:, 0]]]
        corners[:, 0] = renumber[corners[:, 0]]
        return Regions(
            value=self.value[keep],
            pixels=self.pixels[keep],
            probability=self.probability[keep],
            first=self.first[keep],
            corners=corners,
        )


def join(blocks: Iterable[tuple[tuple[int, ...], Pieces]]) -> Regions:
    """Join the pieces of all blocks to regions; return them.

    Args:
        blocks: row and column of each block that holds anything, and its pieces.
    """
    pieces = dict(blocks)
    offsets = dict(
        zip(pieces, np.cumsum([0, *(len(p.value) for p in pieces.values())]).tolist(), strict=False)
    )
    total = sum(len(p.value) for p in pieces.values())
    value = _gather([p.value for p in pieces.values()], (0,))
    links = _gather([_links(pieces, offsets, value, index) for index in pieces], (0, 2))
    graph = coo_array((np.ones(len(links), bool), (links[:, 0], links[:, 1])), shape=(total, total))
    count, region = connected_components(graph, directed=False)
    first = _gather([p.first for p in pieces.values()], (0, 2))
    order = np.lexsort((first[:, 1], first[:, 0], region))
    heads = order[np.flatnonzero(np.diff(region[order], prepend=-1))]  # each region's first piece
    rank = np.empty(count, np.int64)
    rank[np.lexsort((first[heads, 1], first[heads, 0]))] = np.arange(count)
    region = rank[region]
    heads = heads[np.argsort(rank)]
    sums = [
        np.bincount(
            region, weights=_gather([getattr(p, n) for p in pieces.values()], (0,)), minlength=count
        )
        for n in ("pixels", "probability")
    ]
    corners = _gather([_renumbered(p, offsets[i], region) for i, p in pieces.items()], (0, 4))
    return Regions(
        value=value[heads].astype(np.int64),
        pixels=sums[0].astype(np.int64),
        probability=sums[1] / np.maximum(sums[0], 1) / PROBABILITY_ONE,
        first=first[heads],
        corners=corners.astype(np.int32),
    )


def _gather(arrays: list[npt.NDArray[Any]], empty: tuple[int, ...]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(empty, np.int64)


def _renumbered(pieces: Pieces, offset: int, region: Ints) -> npt.NDArray[np.int32]:
    corners = pieces.corners.copy()
    corners[:, 0] = region[corners[:, 0] - 1 + offset]
    return corners


def _links(
    pieces: dict[tuple[int, ...], Pieces],
    offsets: dict[tuple[int, ...], int],
    value: Ints,
    index: tuple[int, ...],
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


def polygons(regions: Regions) -> npt.NDArray[np.object_]:
    """Build the exact outline of each region; return shapely polygons in mask pixels, (x, y).

    Pixel (y, x) covers [x, x + 1] × [y, y + 1]. Shells have positive signed area and start at the
    topmost, then leftmost corner; holes have negative area and follow in that order too. Rings
    touch at points at the most, and none touches itself.
    """
    if len(regions) == 0:
        return np.zeros(0, object)
    region, y, x, d = _add_up(*regions.corners.T.astype(np.int64))
    twice = np.repeat(np.arange(len(d)), np.abs(d))  # a vertex where two pixels meet diagonally
    region, y, x, d = region[twice], y[twice], x[twice], d[twice]
    second = np.diff(twice, prepend=-1) == 0
    # Rows of corners pair up to horizontal edges, columns to vertical ones. Where both rings pass
    # one vertex, the order within the column is such that what is outside the region is parted.
    columns = np.lexsort((np.where(d < 0, second, ~second), y, x, region))
    partner = np.empty_like(columns)
    partner[columns[0::2]], partner[columns[1::2]] = columns[1::2], columns[0::2]
    left = np.arange(0, len(d), 2)
    rightward = d[left] > 0  # the region lies below this edge
    start, end = left + ~rightward, left + rightward
    ring, position = _order_cycles(partner[end] // 2)
    edges = np.lexsort((position, ring))
    vertices = np.stack([start[edges], end[edges]], axis=1).ravel()
    heads = np.flatnonzero(np.diff(ring[edges], prepend=-1))  # first edge of each ring
    sizes = 2 * np.diff(heads, append=len(edges)) + 1  # vertices with the closing one
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    vertices = np.insert(vertices, np.append(2 * heads[1:], len(vertices)), vertices[2 * heads])
    coordinates = np.stack([x[vertices], y[vertices]], axis=1).astype(np.float64)
    owners = region[start[edges[heads]]]
    per_region = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(regions)))])
    return shapely.from_ragged_array(
        shapely.GeometryType.POLYGON, coordinates, (offsets, per_region)
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
    shapes = polygons(regions)
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
