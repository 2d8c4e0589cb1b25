"""Areas from a few patches of many: strata by the thumbnail, a sample, and how sure it makes one.

Stratified random sampling and the combined ratio estimator are those of W. G. Cochran, Sampling
Techniques, 3rd edition, 1977, 5.3 to 5.9 and 6.11, with F. E. Satterthwaite's degrees of freedom.
The interval is that of E. L. Korn and B. I. Graubard, Survey Methodology 24 (1998), 193 to 201:
Clopper and Pearson's for as many patches as a plain sample would need for the same variance. It
lies within what can be, and tells something of a class that was not seen.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

from wsi_pipeline.patch_grid import StoredGrid
from wsi_pipeline.tissue.detect import box_sums, patch_boxes

Table = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

SHARE, LEAST = 0.01, 32
"""Of the patches that are taken, and how many at least."""
PER_STRATUM = 4
"""Fewer tell too little of how much a stratum varies, more are won by finer strata."""
MOST_EFFECTIVE = 8
"""Times the patches of a sample that it may count for: little variance may be seen by chance."""
PLACE = 0.5
"""Weight of where a patch lies beside each thing that is seen of it."""


def look(stored: StoredGrid) -> Table:
    """Describe each patch by its part of the thumbnail and its place; return (n, 6), scaled."""
    density = np.log10(256 / (stored.thumbnail.astype(np.float64) + 1))
    dark = density.mean(axis=2)
    saturated = density.max(axis=2) - density.min(axis=2)
    # Haematoxylin takes more of the red light, eosin of the green.
    blue = density[..., 0] - density[..., 1]
    boxes = patch_boxes(stored.grid, stored.info.downsample, dark.shape, stored.tissue_downsample)
    pixels = box_sums(np.ones_like(dark), boxes)
    planes = (dark, dark**2, saturated, blue)
    mean, square, *colours = (box_sums(plane, boxes) / pixels for plane in planes)
    texture = np.sqrt(np.maximum(square - mean**2, 0))
    seen = np.column_stack([mean, texture, *colours, stored.patches])
    weights = np.array([1, 1, 1, 1, PLACE, PLACE])
    scaled = weights * (seen - seen.mean(axis=0)) / np.maximum(seen.std(axis=0), 1e-9)
    return np.asarray(scaled, np.float64)


def sample_size(patches: int) -> int:
    """Return how many of some patches are taken.

    Example:
        >>> [sample_size(n) for n in (20, 500, 11_900)]
        [20, 32, 119]
    """
    return min(max(LEAST, round(SHARE * patches)), patches)


def stratify(features: Table, count: int) -> Indices:
    """Part patches, again and again along what varies most, into equal strata; return (n,).

    Args:
        features: (n, f), scaled as they matter.
        count: of strata, at most n.
    """
    strata = np.zeros(len(features), np.int64)
    parts = [(np.arange(len(features)), 0, count)]
    while parts:
        members, first, several = parts.pop()
        strata[members] = first
        if several > 1:
            here = features[members]
            ordered = members[np.argsort(here[:, here.var(axis=0).argmax()], kind="stable")]
            half = several // 2
            cut = round(len(members) * half / several)
            parts += [(ordered[:cut], first, half), (ordered[cut:], first + half, several - half)]
    return strata


def draw(strata: Indices, size: int, random: np.random.Generator) -> Indices:
    """Draw from each stratum its share, at random; return the indices, ascending."""
    shuffled = random.permutation(len(strata))
    # Every stratum's first come before every stratum's second, and so on.
    by_stratum = shuffled[np.argsort(strata[shuffled], kind="stable")]
    sizes = np.bincount(strata)
    rank = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn = np.repeat(random.permutation(len(sizes)), sizes)
    return np.sort(by_stratum[np.lexsort((turn, rank))[:size]])


def estimate(areas: Table, strata: Indices, chosen: Indices, whole: float) -> Table:
    """Estimate the area of each class; return (K, 3): the area, and the ends of its 95 % interval.

    Args:
        areas: (s, K) of each class in each chosen patch, background and all else included, so that
            rows sum to what the patch stands for.
        strata: (n,) of all patches.
        chosen: (s,) by `draw`, at least two a stratum unless all are.
        whole: area that all patches stand for.
    """
    seen = areas.sum(axis=0)
    count, every = len(chosen), len(strata)
    if count == every:
        return np.stack([seen, seen, seen], axis=1)
    here = strata[chosen]
    sizes, taken = np.bincount(strata)[:, None], np.bincount(here)[:, None]
    weights, own = (sizes / taken)[here], areas.sum(axis=1, keepdims=True)
    covered = (weights * own).sum()

    def by_stratum(rows: Table) -> Table:
        return np.stack([np.bincount(here, column) for column in rows.T], axis=1)

    # Where no chosen patch stands for anything nothing is known.
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(np.minimum((weights * areas).sum(axis=0) / covered, 1))
        rest = areas - share * own
        spread = by_stratum((rest - (by_stratum(rest) / taken)[here]) ** 2) / (taken - 1)
        parts = sizes * (sizes - taken) * spread / taken / covered**2
        variance = parts.sum(axis=0)
        freedom = variance**2 / (parts**2 / (taken - 1)).sum(axis=0)
        # L. Kish's: patches that stand for little tell little.
        alike = np.nan_to_num(covered**2 / ((weights * own) ** 2).sum())
        most = alike / (1 - count / every)
        effective = np.fmin(share * (1 - share) / variance, MOST_EFFECTIVE * most)
        effective *= (stats.t.ppf(0.975, count - 1) / stats.t.ppf(0.975, freedom)) ** 2
    # Of a class that is nowhere, or everywhere, in the sample its variance tells nothing.
    is_mixed = (seen > 0) & (np.count_nonzero(seen) > 1)
    effective = np.where(is_mixed, effective, most)
    hits = share * effective
    low = whole * np.nan_to_num(stats.beta.ppf(0.025, hits, effective - hits + 1))
    high = whole * np.nan_to_num(stats.beta.ppf(0.975, hits + 1, effective - hits), nan=1.0)
    # What was seen is there.
    low, high = np.maximum(low, seen), np.minimum(high, whole - (seen.sum() - seen))
    return np.stack([np.clip(whole * share, low, high), low, high], axis=1)
