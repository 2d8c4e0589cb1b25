r"""Simplify arcs, each by itself, such that no two ever cross.

    a---b                 a               The triangle a b c goes, and b with it, unless it is
        |       ==>        \                larger than asked for, or holds a vertex.
        c---d               c---d

Visvalingam & Whyatt, Line generalisation by repeated elimination of points, The Cartographic
Journal 30 (1993): a vertex goes if the triangle that it spans with its neighbours is small. Here
all vertices whose triangle is smaller than both neighbours' go at once, in rounds.

A vertex stays if its triangle, sides included, holds another vertex of the arcs *as they were
given*, but for those of the same arc between the triangle's ends. Whatever crossed the new edge
would have to end in the triangle, or to cross the two edges that the new one takes the place of.
So arcs meet where they met before and nowhere else, and because what becomes of one does not
depend on the others, no order of work matters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from wsi_pipeline.export.polygons.arcs import Arcs, Bools, Ints, Numbers, ranges

LARGEST = 2**30
"""Twice the area of the largest triangle that is told from larger ones, in pixels."""
NEVER = np.iinfo(np.int64).max
"""Key of a vertex that stays."""
VERTICES, TRIANGLES, PAIRS = 500_000, 5_000, 2_000_000
"""Vertices of arcs, triangles, and pairs of a triangle with a vertex near it, that are worked on
at a time, which bounds the memory; arrays of few triangles lie in the processor's cache."""


def simplify(arcs: Arcs, *, tolerance: float, is_loose: Bools | None = None) -> Arcs:
    """Take vertices away from arcs that meet nowhere else than at vertices; return the rest.

    Vertices at which arcs meet stay, and so much between them that no two become one line.

    Args:
        tolerance: root of the largest triangle to cut off, in pixels.
        is_loose: (m,) vertices of parts of arcs that stay only because what comes next is not at
            hand, or is in other hands; None where the arcs are all arcs of a mask, and whole.

    Example:
        An open arc; of its triangles, half a pixel is less than 1², two pixels are not.

        >>> xy = np.array([[0, 0], [4, 0], [4, 1], [5, 1], [5, 9]], np.int32)
        >>> none = np.zeros(1, np.int32)
        >>> arc = Arcs(xy=xy, bounds=np.array([0, 5]), right=none + 1, left=none,
        ...            is_ring=np.array([False]), twice_area=none)
        >>> simplify(arc, tolerance=1).xy.tolist()
        [[0, 0], [4, 0], [5, 1], [5, 9]]
    """
    if len(arcs) == 0:
        return arcs
    grid = _Grid.of(*(np.ascontiguousarray(column) for column in arcs.xy.T))
    sections = _Sections.of(arcs, grid.find_meetings(), is_loose)
    limit = np.int64(min(int(2 * tolerance**2) + 1, LARGEST)) << 32
    full = np.searchsorted(arcs.bounds, np.arange(VERTICES, len(arcs.xy), VERTICES))
    parts = itertools.pairwise(np.unique([0, *full.tolist(), len(arcs)]).tolist())
    left = [_thin(arcs, slice(*part), grid, sections, limit) for part in parts]
    return arcs.keep_vertices(np.concatenate(left))


def _thin(arcs: Arcs, part: slice, grid: _Grid, sections: _Sections, limit: np.int64) -> Bools:
    """Return which vertices of some arcs are left."""
    lines = _Lines.of(arcs, part, grid)
    is_inner, section, spare = sections.of_part(lines, part)
    is_left = np.ones(len(lines.key), bool)
    lines.measure(np.flatnonzero(is_inner))
    small = np.flatnonzero(lines.key < limit)
    while len(small):
        chosen = lines.least_of(small)
        # of a section that cannot spare all of them only the least may go, or none
        wanted = np.bincount(section[chosen], minlength=len(spare))
        is_tight = (wanted > spare)[section[chosen]]
        few = chosen[is_tight]
        few = few[np.lexsort((lines.key[few], section[few]))]
        few = few[np.diff(section[few], prepend=-1) != 0]
        is_over = spare[section[few]] <= 0
        lines.key[few[is_over]] = NEVER
        chosen = np.concatenate([chosen[~is_tight], few[~is_over]])
        gone = chosen[~grid.is_blocked(lines, chosen)]
        lines.key[chosen] = NEVER
        is_left[gone] = False
        spare -= np.bincount(section[gone], minlength=len(spare))
        beside = lines.remove(gone)
        beside = beside[is_inner[beside]]
        lines.measure(beside)
        is_small = np.zeros(len(is_left), bool)
        is_small[small] = is_small[beside] = True
        small = np.flatnonzero(is_small & (lines.key < limit))
    return is_left


@dataclass(frozen=True, kw_only=True, eq=False)
class _Lines:
    """Some arcs, whose vertices go one by one: the arrays change.

    Attributes:
        offset: number of vertices of the arcs before these.
        arc: (m,) index of each vertex's arc.
        begin: (n,) first vertex of each arc.
        end: (n,) one past the last vertex of each arc.
        before: (m,) the vertex before each; itself at an open end.
        after: (m,) the vertex after each; itself at an open end.
        tie: (m,) what decides between equal triangles: as good as random, since on a staircase all
            are equal, and the same wherever its arc begins.
        key: (m,) twice the triangle's area, and below it `tie`; `NEVER` for those that stay.
    """

    offset: int
    x: Numbers
    y: Numbers
    arc: Numbers
    begin: Numbers
    end: Numbers
    before: Numbers
    after: Numbers
    tie: npt.NDArray[np.uint32]
    key: Ints

    @classmethod
    def of(cls, arcs: Arcs, part: slice, grid: _Grid) -> Self:
        """Return some arcs with nothing taken away yet, all keys being `NEVER`."""
        bounds = arcs.bounds[part.start : part.stop + 1]
        offset, m, is_open = int(bounds[0]), int(bounds[-1] - bounds[0]), ~arcs.is_ring[part]
        x, y = grid.x[offset : offset + m], grid.y[offset : offset + m]
        begin, end = ((ends - offset).astype(np.int32) for ends in (bounds[:-1], bounds[1:]))
        before, after = np.arange(-1, m - 1, dtype=np.int32), np.arange(1, m + 1, dtype=np.int32)
        before[begin] = np.where(is_open, begin, end - 1)
        after[end - 1] = np.where(is_open, end - 1, begin)
        return cls(
            offset=offset,
            x=x,
            y=y,
            arc=np.repeat(np.arange(len(begin), dtype=np.int32), end - begin),
            begin=begin,
            end=end,
            before=before,
            after=after,
            tie=_scatter(x, y),
            key=np.full(m, NEVER),
        )

    def measure(self, v: Ints) -> None:
        """Set the keys of some vertices."""
        a, b = self.before[v], self.after[v]
        area = np.abs(_turn(self.x[v], self.y[v], self.x[a], self.y[a], self.x[b], self.y[b]))
        self.key[v] = np.minimum(area, LARGEST) << 32 | self.tie[v]

    def least_of(self, v: Ints) -> Ints:
        """Return those whose triangle is less than both neighbours'."""
        key = self.key[v]
        # <=: should two neighbours ever be equal, one of them is less
        is_least: Bools = (key < self.key[self.before[v]]) & (key <= self.key[self.after[v]])
        return np.compress(is_least, v)

    def remove(self, v: Ints) -> Ints:
        """Take out vertices, no two of them neighbours; return what lay beside."""
        before, after = self.before[v], self.after[v]
        self.after[before], self.before[after] = after, before
        return np.concatenate([before, after])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Grid:
    """All vertices by square cells, row by row: those in a row of cells are a slice.

    Attributes:
        bits: a cell's side is 2 to the power of it.
        corner: (x, y) of the first cell, in cells.
        width: number of cells in a row.
        order: (m,) vertices, cell by cell, and in each place by place.
        start: (cells + 1,) where each cell begins in `order`.
    """

    x: Numbers
    y: Numbers
    bits: int
    corner: tuple[int, int]
    width: int
    order: Numbers
    start: Ints

    @classmethod
    def of(cls, x: Numbers, y: Numbers) -> Self:
        """Sort vertices into about as many cells as there are vertices."""
        low_x, low_y, high_x, high_y = (int(v) for v in (x.min(), y.min(), x.max(), y.max()))
        area = (high_x - low_x + 1) * (high_y - low_y + 1)
        bits = max((area // len(x)).bit_length() // 2, 2)
        corner = low_x >> bits, low_y >> bits
        width, height = (high_x >> bits) - corner[0] + 1, (high_y >> bits) - corner[1] + 1
        cell = ((y >> bits) - corner[1]).astype(np.int64) * width + ((x >> bits) - corner[0])
        counts = np.bincount(cell, minlength=width * height)
        within = (1 << bits) - 1
        cell = cell << 2 * bits | (y & within) << bits | x & within
        return cls(
            x=x,
            y=y,
            bits=bits,
            corner=corner,
            width=width,
            order=np.argsort(cell).astype(np.int32),
            start=np.concatenate([[0], np.cumsum(counts)]),
        )

    def find_meetings(self) -> Bools:
        """Return (m,) which vertices are at the same place as another."""
        x, y = self.x[self.order], self.y[self.order]
        same = (x[1:] == x[:-1]) & (y[1:] == y[:-1])
        meets = np.zeros(len(x), bool)
        meets[self.order[1:][same]] = meets[self.order[:-1][same]] = True
        return meets

    def is_blocked(self, lines: _Lines, v: Ints) -> Bools:
        """Return whether the triangle of each vertex holds another that must stay outside."""
        blocked = np.zeros(len(v), bool)
        # a triangle of half a pixel holds no whole numbers but its corners
        larger = np.flatnonzero(lines.key[v] >> 32 != 1)
        for start in range(0, len(larger), TRIANGLES):
            part = larger[start : start + TRIANGLES]
            triangles = _Triangles.of(lines, v[part])
            of, first, count = self.rows_near(triangles)
            ends = np.cumsum(count)
            cuts = np.searchsorted(ends, np.arange(PAIRS, int(ends[-1]), PAIRS))
            for begin, stop in itertools.pairwise([0, *cuts.tolist(), len(of)]):
                found = self.order[ranges(first[begin:stop], count[begin:stop])]
                pairs = np.repeat(of[begin:stop], count[begin:stop])
                blocked[part[triangles.holding(pairs, found, self)]] = True
        return blocked

    def rows_near(self, triangles: _Triangles) -> tuple[Ints, Ints, Ints]:
        """Find the rows of cells that triangles touch.

        Returns:
            The triangle of each, and the first and the number of its vertices in `order`.
        """
        top, bottom = triangles.top >> self.bits, triangles.bottom >> self.bits
        rows = bottom - top + 1
        of = np.repeat(np.arange(len(rows)), rows)
        row = ranges(top, rows)
        left, right = triangles.left[of], triangles.right[of]
        # the boxes of long oblique ones hold far too many
        large = np.flatnonzero((rows[of] > 2) & (right - left > 2 << self.bits))
        begin = row[large] << self.bits
        left[large], right[large] = triangles.span(of[large], begin, begin + (1 << self.bits) - 1)
        row = (row - self.corner[1]) * self.width - self.corner[0]
        first = self.start[row + (left >> self.bits)]
        return of, first, self.start[row + (right >> self.bits) + 1] - first


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sections:
    """What of arcs lies between two vertices that stay; rings without any are sections too.

    Attributes:
        is_inner: (m,) vertices that may go.
        of_vertex: (m,) the section of each vertex.
        first: (n + 1,) where the sections of each arc begin.
        spare: (s,) how many of its inner vertices a section need not keep.
    """

    is_inner: Bools
    of_vertex: Numbers
    first: Ints
    spare: Ints

    @classmethod
    def of(cls, arcs: Arcs, meets: Bools, is_loose: Bools | None) -> Self:
        """Part arcs where they meet, end, or are loose."""
        begin, last, is_open = arcs.bounds[:-1], arcs.bounds[1:] - 1, ~arcs.is_ring
        is_junction = meets.copy()
        is_junction[begin[is_open]] = is_junction[last[is_open]] = True
        is_fixed = is_junction
        if is_loose is not None:
            is_junction, is_fixed = is_junction & ~is_loose | meets, is_junction | is_loose
        begins = is_fixed.copy()
        begins[last[is_open]] = False
        begins[begin] = True
        source = np.flatnonzero(begins)
        of_vertex = np.cumsum(begins, dtype=np.int32) - np.int32(1)
        # the last section of a ring goes on over its beginning to the first vertex that stays
        head, tail = of_vertex[begin], of_vertex[last]
        wraps = ~is_fixed[begin] & (head != tail)
        target = np.append(source[1:], 0)
        target[tail] = np.where(arcs.is_ring, source[head + wraps], last)
        renumber = np.arange(len(source), dtype=np.int32)
        renumber[head[wraps]] = tail[wraps]
        of_vertex = renumber[of_vertex]
        keeps = _least(arcs.xy, source, target, is_junction, is_whole=is_loose is None)
        # a ring by itself
        keeps[tail[~is_fixed[begin] & ~wraps]] = 3
        inner = np.bincount(of_vertex[~is_fixed], minlength=len(source))
        first = np.append(head, len(source))
        return cls(is_inner=~is_fixed, of_vertex=of_vertex, first=first, spare=inner - keeps)

    def of_part(self, lines: _Lines, part: slice) -> tuple[Bools, Numbers, Ints]:
        """Return the three for some arcs, whose sections are counted from the first of them."""
        vertices = slice(lines.offset, lines.offset + len(lines.key))
        first, stop = self.first[part.start], self.first[part.stop]
        section = self.of_vertex[vertices] - np.int32(first)
        return self.is_inner[vertices], section, self.spare[first:stop].copy()


def _least(xy: Numbers, source: Ints, target: Ints, is_junction: Bools, *, is_whole: bool) -> Ints:
    """Return how many vertices sections keep between their ends, so that no two become one line.

    Args:
        xy: (m, 2) vertices.
        source: (s,) at which sections begin.
        target: (s,) at which they end.
        is_junction: (m,) vertices that stay for good.
        is_whole: whether all sections of a mask are there.
    """
    ends = np.stack([xy[v, 1].astype(np.int64) << 32 | xy[v, 0] for v in (source, target)])
    keeps = np.where(ends[0] == ends[1], 2, 1)
    keeps[~(is_junction[source] & is_junction[target])] = 0
    if is_whole:
        ends.sort(axis=0)
        order = np.lexsort(ends)
        differs = np.append((np.diff(ends[:, order]) != 0).any(axis=0), True)
        is_alone = differs & np.insert(differs[:-1], 0, True)
        keeps[order[is_alone & (keeps[order] == 1)]] = 0
    return keeps


@dataclass(frozen=True, kw_only=True, eq=False)
class _Triangles:
    """The triangles that some vertices span with their neighbours, and the boxes around them.

    Attributes:
        begin: (n,) first vertex of the arc, counted in all arcs.
        size: (n,) number of vertices of the arc.
        before: (n,) the vertex before, counted in all arcs.
        reach: (n,) steps along the arc from there to the vertex after.
        x: (3, n) columns of the corners: before, vertex, after.
        y: (3, n) rows of the corners.
    """

    begin: Numbers
    size: Numbers
    before: Numbers
    reach: Numbers
    x: Numbers
    y: Numbers
    left: Numbers
    right: Numbers
    top: Numbers
    bottom: Numbers

    @classmethod
    def of(cls, lines: _Lines, v: Ints) -> Self:
        """Return the triangles of vertices as their arcs now are."""
        a, b, arc = lines.before[v], lines.after[v], lines.arc[v]
        x, y = (np.stack([along[a], along[v], along[b]]) for along in (lines.x, lines.y))
        size = lines.end[arc] - lines.begin[arc]
        return cls(
            begin=lines.begin[arc] + np.int32(lines.offset),
            size=size,
            before=a + np.int32(lines.offset),
            reach=(b - a) % size,
            x=x,
            y=y,
            left=x.min(axis=0),
            right=x.max(axis=0),
            top=y.min(axis=0),
            bottom=y.max(axis=0),
        )

    def holding(self, of: Ints, found: Numbers, grid: _Grid) -> Ints:
        """Return which triangles of pairs with vertices hold them, sides included, but must not."""
        # What is between the triangle's ends in the same arc may be in it: as unsigned numbers, in
        # which what comes before is large, that is one comparison, and half of all go by it.
        ahead = np.minimum(self.reach, self.begin + self.size - 1 - self.before)
        other = (found - self.before[of]).view(np.uint32) > ahead.view(np.uint32)[of]
        of, found = of[other], found[other]
        x, y = grid.x[found], grid.y[found]
        near = (x - self.left[of]).view(np.uint32) <= (self.right - self.left).view(np.uint32)[of]
        near &= (y - self.top[of]).view(np.uint32) <= (self.bottom - self.top).view(np.uint32)[of]
        of, found = of[near], found[near]
        # over a ring's beginning
        begin = self.begin[of]
        step = found - self.before[of] + self.size[of]
        other = (found < begin) | (step > self.reach[of])
        of, found = of[other], found[other]
        x, y = grid.x[found], grid.y[found]
        x_of, y_of = self.x[:, of], self.y[:, of]
        ab, bc, ca = (
            _turn(x, y, x_of[i], y_of[i], x_of[j], y_of[j]) for i, j in ((0, 1), (1, 2), (2, 0))
        )
        inside = ((ab >= 0) & (bc >= 0) & (ca >= 0)) | ((ab <= 0) & (bc <= 0) & (ca <= 0))
        # where arcs meet each has a vertex
        for corner in (0, 2):
            inside &= (x != x_of[corner]) | (y != y_of[corner])
        return of[inside]

    def span(self, of: Ints, top: Ints, bottom: Ints) -> tuple[Ints, Ints]:
        """Return the least and the largest x of triangles between two rows, rounded outward."""
        x, y = self.x[:, of], self.y[:, of]
        low, high = np.full(len(top), np.inf), np.full(len(top), -np.inf)
        for i, j in ((0, 1), (1, 2), (2, 0)):
            rise = y[j] - y[i]
            is_near = (np.minimum(y[i], y[j]) <= bottom) & (np.maximum(y[i], y[j]) >= top)
            for row, end in ((top, 0.0), (bottom, 1.0)):
                part = np.divide(row - y[i], rise, out=np.full(len(rise), end), where=rise != 0)
                place = x[i] + part.clip(0, 1) * (x[j] - x[i])
                low = np.where(is_near, np.minimum(low, place), low)
                high = np.where(is_near, np.maximum(high, place), high)
        return np.floor(low).astype(np.int64), np.ceil(high).astype(np.int64)


def _turn(x: Numbers, y: Numbers, x_a: Numbers, y_a: Numbers, x_b: Numbers, y_b: Numbers) -> Ints:
    """Return the cross products of what leads from places to a and to b."""
    return (x_a - x).astype(np.int64) * (y_b - y) - (x_b - x).astype(np.int64) * (y_a - y)


def _scatter(x: Numbers, y: Numbers) -> npt.NDArray[np.uint32]:
    """Return a number for each place, no two within 65,536 pixels the same: MurmurHash3's end."""
    mixed = (y.astype(np.uint32) << np.uint32(16)) ^ x.astype(np.uint32)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> np.uint32(16))
