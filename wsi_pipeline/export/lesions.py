"""How many lesions a mask holds and how large they are, counted in slabs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import cc3d
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import cdist

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export import MaskLike
from wsi_pipeline.geometry import Shape, box_slices

Ints = npt.NDArray[np.int64]

SLAB = 1 << 24
"""Pixels labelled at once."""

MM3_PER_ML = 1000

LISTED = 100
"""Lesions of a class that are listed one by one, the largest; all are counted."""


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """One connected piece of a class.

    Attributes:
        size: mm2 of a planar image, ml of a volume; None without spacing.
        diameter_mm: the longest straight line from edge to edge of it; None without spacing.
        start: first corner of the box, array order.
        stop: one past the last corner.
    """

    pixels: int
    size: float | None
    diameter_mm: float | None
    start: Shape
    stop: Shape


@dataclass(frozen=True, kw_only=True)
class Lesions:
    """The lesions of one class.

    Attributes:
        pixels: pixels or voxels of all together.
        size: mm2 or ml of all together; None without spacing.
        largest: the largest lesions, the largest first; at most `LISTED`.
    """

    name: str
    count: int
    pixels: int
    size: float | None
    largest: tuple[Lesion, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pieces:
    """What the slabs of a mask hold: one row for each connected piece of each slab.

    Attributes:
        classes: (n,) class index.
        pixels: (n,) number of pixels.
        start: (n, d) first corner of the box.
        stop: (n, d) one past the last corner.
        slab: (n,) number of the slab; ascending.
        lesion: (n,) number of the lesion that the piece is part of.
    """

    classes: npt.NDArray[np.uint8]
    pixels: Ints
    start: Ints
    stop: Ints
    slab: Ints
    lesion: Ints

    @classmethod
    def of(cls, mask: MaskLike) -> Self:
        """Label a mask slab by slab; return its pieces, joined to lesions where they touch."""
        dims = len(mask.shape)
        parts, pairs = [], [np.empty((0, 2), np.int64)]
        before: tuple[npt.NDArray[np.uint8], Ints] | None = None
        known = 0
        for number, (begin, slab) in enumerate(_slabs(mask)):
            labels, n = _labelled(slab)
            found = cc3d.statistics(labels, no_slice_conversion=True)
            boxes = np.asarray(found["bounding_boxes"], np.int64).reshape(-1, dims, 2)[1 : n + 1]
            start, stop = boxes[..., 0], boxes[..., 1] + 1
            start[:, 0] += begin
            stop[:, 0] += begin
            kinds = np.zeros(n + 1, np.uint8)
            inside = np.flatnonzero(slab)
            kinds[labels.ravel()[inside]] = slab.ravel()[inside]
            counts = np.asarray(found["voxel_counts"], np.int64)[1 : n + 1]
            parts.append((kinds[1:], counts, start, stop, np.full(n, number)))
            # rows of the pieces in the outer layers
            rows = labels[[0, -1]].astype(np.int64) + (known - 1)
            if before is not None:
                pairs.append(_touching(*before, slab[0], rows[0]))
            before = (slab[-1].copy(), rows[1])
            known += n
        classes, pixels, starts, stops, slabs = (
            np.concatenate(p) for p in zip(*parts, strict=True)
        )
        a, b = np.concatenate(pairs).T
        graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(known, known))
        return cls(
            classes=classes,
            pixels=pixels,
            start=starts,
            stop=stops,
            slab=slabs,
            lesion=connected_components(graph, directed=False)[1].astype(np.int64),
        )

    def diameters(
        self, mask: MaskLike, lesions: Ints, spacing_mm: Sequence[float]
    ) -> dict[int, float]:
        """Return the longest line in each of some lesions, in mm, from edge to edge."""
        points: dict[int, list[Ints]] = {int(lesion): [] for lesion in lesions}
        rows = np.flatnonzero(np.isin(self.lesion, lesions))
        for number, (begin, slab) in enumerate(_slabs(mask)):
            own = rows[self.slab[rows] == number]
            # Labelled again, to the same numbers: labels of all slabs would take much memory.
            labels = _labelled(slab)[0] if len(own) else slab
            # the piece of the slab's label 1
            first = np.searchsorted(self.slab, number)
            for row in own:
                corner = self.start[row].copy()
                corner[0] -= begin
                extent = self.stop[row] - self.start[row]
                box = box_slices(corner, extent)
                ends = _row_ends(labels[box] == row - first + 1) + self.start[row]
                points[int(self.lesion[row])].append(_outermost(ends))
        return {lesion: _longest(np.concatenate(own), spacing_mm) for lesion, own in points.items()}


def count_lesions(
    mask: MaskLike, classes: Sequence[ClassInfo], spacing_mm: Sequence[float] | None
) -> list[Lesions]:
    """Count the connected pieces of each class; return them for all classes but the background.

    Pixels that touch in a corner belong to one lesion; polygons part them, as regions of slides.

    Args:
        mask: uint8 (y, x) or (z, y, x) class index.
        classes: Classes in the mask's order; 0 is the background.
        spacing_mm: mm between pixels along each axis; None where nobody knows.
    """
    pieces = _Pieces.of(mask)
    first = np.unique(pieces.lesion, return_index=True)[1]
    pixels = np.zeros(len(first), np.int64)
    np.add.at(pixels, pieces.lesion, pieces.pixels)
    start, stop = pieces.start[first], pieces.stop[first]
    np.minimum.at(start, pieces.lesion, pieces.start)
    np.maximum.at(stop, pieces.lesion, pieces.stop)
    by_class = [np.flatnonzero(pieces.classes[first] == i) for i in range(len(classes))]
    listed = [own[np.argsort(-pixels[own], kind="stable")][:LISTED] for own in by_class]
    diameters = {}
    if spacing_mm is not None:
        diameters = pieces.diameters(mask, np.concatenate(listed[1:]), spacing_mm)

    def size(count: int) -> float | None:
        if spacing_mm is None:
            return None
        return count * math.prod(spacing_mm) / (1 if len(spacing_mm) == 2 else MM3_PER_ML)

    return [
        Lesions(
            name=classes[i].name,
            count=len(by_class[i]),
            pixels=int(pixels[by_class[i]].sum()),
            size=size(int(pixels[by_class[i]].sum())),
            largest=tuple(
                Lesion(
                    pixels=int(pixels[lesion]),
                    size=size(int(pixels[lesion])),
                    diameter_mm=diameters.get(int(lesion)),
                    start=tuple(map(int, start[lesion])),
                    stop=tuple(map(int, stop[lesion])),
                )
                for lesion in listed[i]
            ),
        )
        for i in range(1, len(classes))
    ]


def _slabs(mask: MaskLike) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield where each part of a mask along its first axis begins, and the part."""
    step = max(1, SLAB // math.prod(mask.shape[1:]))
    for begin in range(0, mask.shape[0], step):
        yield begin, np.ascontiguousarray(mask[begin : begin + step], np.uint8)


def _labelled(slab: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[Any], int]:
    """Return the connected pieces of each class of a slab, from 1, and how many there are."""
    labels, n = cc3d.connected_components(
        slab, connectivity=8 if slab.ndim == 2 else 26, return_N=True
    )
    return labels, int(n)


def _touching(
    mask: npt.NDArray[np.uint8], rows: Ints, next_mask: npt.NDArray[np.uint8], next_rows: Ints
) -> Ints:
    """Return (n, 2) pairs of pieces of one class that touch between two neighbouring layers.

    Args:
        mask: Class indices of the last layer of a slab.
        rows: Rows of its pieces.
        next_mask: Class indices of the first layer of the next slab.
        next_rows: Rows of its pieces.
    """

    def cut(shifts: Iterable[int]) -> tuple[slice, ...]:
        sizes = zip(shifts, mask.shape, strict=True)
        return tuple(slice(max(s, 0), n + min(s, 0)) for s, n in sizes)

    found = []
    for shifts in itertools.product((-1, 0, 1), repeat=mask.ndim):
        near, far = cut(shifts), cut(-s for s in shifts)
        same = (mask[near] == next_mask[far]) & (mask[near] > 0)
        # Two in one number, since numpy finds unique numbers much faster than unique rows.
        both = rows[near][same] << 32 | next_rows[far][same]
        # mostly runs of one pair
        found.append(np.unique(both[np.diff(both, prepend=-1) != 0]))
    pairs = np.unique(np.concatenate(found))
    return np.column_stack([pairs >> 32, pairs & 0xFFFFFFFF])


def _row_ends(inside: npt.NDArray[np.bool_]) -> Ints:
    """Return (n, d) indices of the first and the last pixel of each row that has any.

    Example:
        >>> _row_ends(np.array([[False, True, True], [False, False, False]])).tolist()
        [[0, 1], [0, 2]]
    """
    rows = np.argwhere(inside.any(axis=-1))
    filled = inside[tuple(rows.T)]
    first = filled.argmax(axis=1)
    last = filled.shape[1] - 1 - filled[:, ::-1].argmax(axis=1)
    return np.concatenate([np.column_stack([rows, first]), np.column_stack([rows, last])])


def _outermost(points: Ints) -> Ints:
    """Return the corners of the convex hull; more where points lie in a plane or a line.

    Of the points on one line along an axis only the ends can be corners.

    Example:
        >>> _outermost(np.argwhere(np.ones((9, 9, 9)))).tolist()[::7]
        [[0, 0, 0], [8, 8, 8]]
    """
    for axis in range(points.shape[1]):
        lines = np.delete(points, axis, axis=1)
        order = np.lexsort((points[:, axis], *lines.T[::-1]))
        differs = (lines[order][1:] != lines[order][:-1]).any(axis=1)
        points = points[order][np.append(True, differs) | np.append(differs, True)]
    try:
        return np.asarray(points[np.sort(ConvexHull(points).vertices)])
    # flat, or fewer than a hull needs
    except (QhullError, ValueError):
        return points


def _longest(pixels: Ints, spacing_mm: Sequence[float]) -> float:
    """Return the longest distance between the middles of the faces of some pixels, in mm.

    Example:
        >>> _longest(np.array([[0, 0], [0, 9]]), (1.0, 1.0))  # ten pixels in a row
        10.0
    """
    spacing = np.array(spacing_mm)
    centers = _outermost(pixels) * spacing
    parts = np.array_split(centers, -(-len(centers) // 1000))
    between = max(float(cdist(part, centers).max()) for part in parts)
    longest = 0.0
    # from middle to face it is half a pixel, at both ends
    for part in parts:
        a, b = np.nonzero(cdist(part, centers) >= between - spacing.max())
        apart = np.abs(part[a] - centers[b])
        for i, j in itertools.combinations_with_replacement(range(len(spacing)), 2):
            reach = np.zeros(len(spacing))
            reach[i] += spacing[i] / 2
            reach[j] += spacing[j] / 2
            longest = max(longest, float(np.linalg.norm(apart + reach, axis=1).max(initial=0)))
    return longest
