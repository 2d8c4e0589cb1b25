"""Counting agreement of two masks, block by block, and the figures that follow from the counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import KDTree

Mask = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

IGNORE = 255
"""Class index of pixels that are not judged."""
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Confusion:
    """Counts of pixels; those of blocks, and of slides, may be added.

    Attributes:
        matrix: (…, K, K) int64, rows the truth's class, columns the prediction's.
        borders: (…, K, 4) int64, a class's border pixels: of the prediction, those of them near the
            truth's border, of the truth, those of them near the prediction's.
    """

    matrix: Counts
    borders: Counts

    @classmethod
    def of(cls, matrix: Counts) -> Confusion:
        """Return counts without those of borders."""
        return cls(matrix=matrix, borders=np.zeros((*matrix.shape[:-1], 4), np.int64))

    @classmethod
    def empty(cls, n_classes: int) -> Confusion:
        """Return the counts of nothing."""
        return cls.of(np.zeros((n_classes, n_classes), np.int64))

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(matrix=self.matrix + other.matrix, borders=self.borders + other.borders)


def count_block(
    prediction: Mask,
    truth: Mask,
    n_classes: int,
    *,
    core: tuple[slice, ...] = (),
    tolerance_px: int | None = 2,
) -> Confusion:
    """Count the agreement of two masks; return it.

    Args:
        prediction: (H, W) class index or IGNORE, as is `truth`; what either ignores is not judged.
        core: the part to count; around it, `tolerance_px` + 1 pixels are looked at as far as there
            are any, so that borders are the same however a mask is cut.
        tolerance_px: distance up to which two border pixels are the same; None = no borders, of
            masks with any number of axes.
    """
    known = (prediction != IGNORE) & (truth != IGNORE)
    inside = known[core]
    pairs = truth[core][inside].astype(np.int64) * n_classes + prediction[core][inside]
    matrix = np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)
    counted = Confusion.of(matrix.astype(np.int64))
    if tolerance_px is None:
        return counted
    edges = [_edges(np.where(known, side, IGNORE)) for side in (prediction, truth)]
    for index in range(1, n_classes):
        found, true = (prediction == index) & edges[0], (truth == index) & edges[1]
        if found[core].any() or true[core].any():
            near_true, near_found = _grown(true, tolerance_px), _grown(found, tolerance_px)
            sides = (found, found & near_true, true, true & near_found)
            counted.borders[index] = [np.count_nonzero(side[core]) for side in sides]
    return counted


def _edges(mask: Mask) -> Bools:
    """Return the pixels that touch, by a side, a pixel of another class, ignored ones left out."""
    edges = np.zeros(mask.shape, bool)
    for edge, values in ((edges, mask), (edges.T, mask.T)):
        one, other = values[:-1], values[1:]
        differ = (one != other) & (one != IGNORE) & (other != IGNORE)
        edge[:-1] |= differ
        edge[1:] |= differ
    return edges


def _grown(mask: Bools, reach: int) -> Bools:
    """Return the pixels whose distance from a marked one is at most `reach`."""
    grown = np.zeros_like(mask)
    height, width = mask.shape
    steps = range(-reach, reach + 1)
    # for the few pixels of usual reaches sooner than a distance transform
    for dy, dx in itertools.product(steps, steps) if mask.any() else ():
        if dy * dy + dx * dx <= reach * reach:
            target = np.s_[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
            source = np.s_[max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
            grown[target] |= mask[source]
    return grown


def surface_distances(
    prediction: Bools, truth: Bools, spacing: Sequence[float]
) -> tuple[float, float]:
    """Return the 95th percentile and the mean of the distances between two surfaces.

    Of each pixel of one surface the distance to the nearest of the other: the larger of both
    sides' percentiles (HD95), and the mean of all distances of both sides. NaN where a side is
    empty. A surface is made of the pixels of which a neighbour by a side, within the image, is
    none of the mask.

    Args:
        prediction: (H, W) or (D, H, W).
        spacing: between pixels along each axis; the unit is that of the distances.
    """
    both = ndimage.find_objects((prediction | truth).astype(np.uint8))
    if not (prediction.any() and truth.any()):
        return math.nan, math.nan
    # a pixel more on each side: whether it is of the mask decides where the surface is
    box = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in both[0])
    edges = [m[box] & ~ndimage.binary_erosion(m[box], border_value=1) for m in (prediction, truth)]
    if not (edges[0].any() and edges[1].any()):  # a mask of the whole image has none
        return (0.0, 0.0) if (prediction == truth).all() else (math.nan, math.nan)
    # not by a distance transform, which takes 60 bytes for each voxel of a volume
    places = [np.argwhere(edge) * spacing for edge in edges]
    ways = [KDTree(other).query(own)[0] for own, other in (places, places[::-1])]
    return max(float(np.percentile(way, 95)) for way in ways), float(np.concatenate(ways).mean())


def class_figures(confusion: Confusion) -> dict[str, Reals]:
    """Return Dice, IoU, precision, recall and boundary F1 of every class, each (…, K) float64.

    What has no meaning is NaN: all but the precision of a class that the truth lacks, and the
    precision of one that is never found.
    """
    return _figures(_counts(confusion))


def pooled_figures(confusion: Confusion) -> dict[str, Reals]:
    """Return the figures of all classes but the background taken together, each (…) float64."""
    return _figures(_counts(confusion)[..., 1:, :].sum(-2))


def _counts(confusion: Confusion) -> Counts:
    """Return (…, K, 7) pixels that are right, found and true, and those of borders."""
    matrix = confusion.matrix
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    pixels = np.stack([hits, matrix.sum(-2), matrix.sum(-1)], axis=-1)
    return np.concatenate([pixels, confusion.borders], axis=-1)


def _figures(counts: Counts) -> dict[str, Reals]:
    hits, found, true, edge, edge_hits, true_edge, true_edge_hits = np.moveaxis(counts, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        edge_precision, edge_recall = edge_hits / edge, true_edge_hits / true_edge
        both = edge_precision + edge_recall
        edge_f1 = np.where(both > 0, 2 * edge_precision * edge_recall / both, both)
        # a border that only one side has is found or met nowhere
        edge_f1 = np.where((edge > 0) != (true_edge > 0), 0.0, edge_f1)
        shown = np.where(true > 0, 1.0, np.nan)
        return {
            "dice": 2 * hits / (found + true) * shown,
            "iou": hits / (found + true - hits) * shown,
            "precision": hits / found,
            "recall": hits / true,
            "boundary_f1": edge_f1 * shown,
        }


def bootstrap(confusions: Sequence[Confusion]) -> tuple[dict[str, Reals], dict[str, Reals]]:
    """Draw slides, or patients, with replacement; return intervals by class, (2, K), and pooled.

    Efron's percentile interval, of 95 %, of the figures of the pooled pixels.
    """
    drawn = Confusion(
        matrix=drawn_anew([c.matrix for c in confusions]),
        borders=drawn_anew([c.borders for c in confusions]),
    )
    by_class, pooled = class_figures(drawn), pooled_figures(drawn)
    return {k: interval(v) for k, v in by_class.items()}, {
        k: interval(v) for k, v in pooled.items()
    }


def drawn_anew(counts: Sequence[Counts] | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Draw slides, or patients, with replacement; return the sums of their counts, (draws, …).

    The draws are the same for any counts of as many.
    """
    count = len(counts)
    draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=RESAMPLES)
    return np.asarray(np.tensordot(draws, np.asarray(counts), axes=1))


def interval(values: Reals) -> Reals:
    """Return both ends of the middle 95 % over the first axis; NaN where no draw has a value."""
    empty = np.isnan(values).all(axis=0)
    ends = np.nanquantile(np.where(empty, 0.0, values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return np.asarray(np.where(empty, np.nan, ends))
