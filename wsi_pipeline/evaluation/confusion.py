"""Counting agreement of two masks, block by block, and the figures that follow from the counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
"""Of a bootstrap."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tally:
    """Counts of pixels; those of blocks, and of slides, may be added.

    Attributes:
        confusion: (K, K) int64, rows the truth's class, columns the prediction's.
        borders: (K, 4) int64, a class's border pixels: of the prediction, those of them near the
            truth's border, of the truth, those of them near the prediction's.
    """

    confusion: Counts
    borders: Counts

    @classmethod
    def empty(cls, n_classes: int) -> Tally:
        """Return the counts of nothing."""
        return cls(
            confusion=np.zeros((n_classes, n_classes), np.int64),
            borders=np.zeros((n_classes, 4), np.int64),
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            confusion=self.confusion + other.confusion, borders=self.borders + other.borders
        )


def count_block(
    prediction: Mask,
    truth: Mask,
    n_classes: int,
    *,
    core: tuple[slice, slice] = (slice(None), slice(None)),
    tolerance_px: int = 2,
) -> Tally:
    """Count the agreement of two masks; return it.

    Args:
        prediction: (H, W) class index or IGNORE.
        truth: likewise; a pixel that either ignores is not judged.
        n_classes: the background included.
        core: the part to count; around it, `tolerance_px` + 1 pixels are looked at as far as there
            are any, so that borders are the same however a mask is cut.
        tolerance_px: distance up to which two border pixels are the same.
    """
    known = (prediction != IGNORE) & (truth != IGNORE)
    inside = known[core]
    pairs = truth[core][inside].astype(np.int64) * n_classes + prediction[core][inside]
    confusion = np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)
    borders = np.zeros((n_classes, 4), np.int64)
    if tolerance_px >= 0:
        edges = [_edges(np.where(known, side, IGNORE)) for side in (prediction, truth)]
        for index in range(1, n_classes):
            found = (prediction == index) & edges[0]
            true = (truth == index) & edges[1]
            borders[index] = _match(found, true, core, tolerance_px)
    return Tally(confusion=confusion.astype(np.int64), borders=borders)


def _edges(mask: Mask) -> Bools:
    """Return the pixels that touch, by a side, a pixel of another class, ignored ones left out."""
    edges = np.zeros(mask.shape, bool)
    for one, other in (
        (np.s_[:-1, :], np.s_[1:, :]),
        (np.s_[:, :-1], np.s_[:, 1:]),
    ):
        differ = (mask[one] != mask[other]) & (mask[one] != IGNORE) & (mask[other] != IGNORE)
        edges[one] |= differ
        edges[other] |= differ
    return edges


def _match(found: Bools, true: Bools, core: tuple[slice, slice], reach: int) -> list[int]:
    """Return how many pixels of each side there are, and are near one of the other."""
    if not (found[core].any() or true[core].any()):
        return [0, 0, 0, 0]
    near_true, near_found = _grown(true, reach), _grown(found, reach)
    sides = (found, found & near_true, true, true & near_found)
    return [int(np.count_nonzero(side[core])) for side in sides]


def _grown(mask: Bools, reach: int) -> Bools:
    """Return the pixels whose distance from a marked one is at most `reach`."""
    grown = np.zeros_like(mask)
    if not mask.any():
        return grown
    height, width = mask.shape
    steps = range(-reach, reach + 1)
    for dy, dx in itertools.product(steps, steps):
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
        truth: likewise.
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


def class_figures(confusion: Counts, borders: Counts) -> dict[str, Reals]:
    """Return Dice, IoU, precision, recall and boundary F1 of every class, each (…, K) float64.

    What has no meaning is NaN: all but the precision of a class that the truth lacks, and the
    precision of one that is never found.

    Args:
        confusion: (…, K, K), as in `Tally`.
        borders: (…, K, 4), likewise.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    return _figures(
        hits, confusion.sum(-2).astype(np.float64), confusion.sum(-1).astype(np.float64), borders
    )


def pooled_figures(confusion: Counts, borders: Counts) -> dict[str, Reals]:
    """Return the figures of all classes but the background taken together, each (…) float64."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)[..., 1:].sum(-1).astype(np.float64)
    return _figures(
        hits,
        confusion.sum(-2)[..., 1:].sum(-1).astype(np.float64),
        confusion.sum(-1)[..., 1:].sum(-1).astype(np.float64),
        borders[..., 1:, :].sum(-2),
    )


def _figures(hits: Reals, found: Reals, true: Reals, borders: Counts) -> dict[str, Reals]:
    border_precision = _ratio(borders[..., 1], borders[..., 0])
    border_recall = _ratio(borders[..., 3], borders[..., 2])
    both = border_precision + border_recall
    with np.errstate(divide="ignore", invalid="ignore"):
        border_f1 = np.where(both > 0, 2 * border_precision * border_recall / both, both)
    # a border that only one side has is found or met nowhere
    one_sided = (borders[..., 0] > 0) != (borders[..., 2] > 0)
    shown = np.where(true > 0, 1.0, np.nan)
    return {
        "dice": _ratio(2 * hits, found + true) * shown,
        "iou": _ratio(hits, found + true - hits) * shown,
        "precision": _ratio(hits, found),
        "recall": _ratio(hits, true),
        "boundary_f1": np.where(one_sided, 0.0, border_f1) * shown,
    }


def _ratio(part: npt.NDArray[np.generic], whole: npt.NDArray[np.generic]) -> Reals:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(part, whole), dtype=np.float64)


def bootstrap(
    tallies: Sequence[Tally], *, level: float = 0.95, seed: int = 0
) -> tuple[dict[str, Reals], dict[str, Reals]]:
    """Draw slides, or patients, with replacement; return intervals by class, (2, K), and pooled.

    Efron's percentile interval of the figures of the pooled pixels.

    Args:
        tallies: of each slide or patient, two or more.
        level: of confidence.
        seed: of the draws.
    """
    confusion = drawn_anew([t.confusion for t in tallies], seed=seed)
    borders = drawn_anew([t.borders for t in tallies], seed=seed)
    return (
        {k: interval(v, level) for k, v in class_figures(confusion, borders).items()},
        {k: interval(v, level) for k, v in pooled_figures(confusion, borders).items()},
    )


def drawn_anew(counts: Sequence[Counts], *, seed: int = 0) -> Counts:
    """Draw slides, or patients, with replacement; return the sums, (draws, …) int64.

    Args:
        counts: of each, all of one shape.
        seed: of the draws, the same for any counts of as many.
    """
    count = len(counts)
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    return np.asarray(np.tensordot(draws, np.stack(counts), axes=1))


def interval(values: Reals, level: float = 0.95) -> Reals:
    """Return the lower and upper end over the first axis; NaN where no draw has a value.

    Args:
        values: of each draw.
        level: of confidence.
    """
    empty = np.isnan(values).all(axis=0)
    ends = np.nanquantile(np.where(empty, 0.0, values), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(np.where(empty, np.nan, ends))


def total(tallies: Iterable[Tally], n_classes: int) -> Tally:
    """Return the sum of counts."""
    return sum(tallies, start=Tally.empty(n_classes))
