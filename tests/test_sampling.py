"""Areas from samples: intervals against scipy's and against populations that are known."""

import numpy as np
import pytest
from scipy.stats import binomtest

from wsi_pipeline.tissue.sampling import PER_STRATUM, draw, estimate, sample_size, stratify


def population(count=2000, *, share=0.3, seed=0):
    """Return what is seen of patches, and mm² of three classes in each, tied to it."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 4)) * [1, 0.4, 0.4, 0.4]
    mixed = features[:, 0] + 0.7 * random.normal(size=count)
    inside = np.clip(1.5 * (mixed - np.quantile(mixed, 1 - share)), 0, 1)
    cells = random.uniform(0.5, 1.5, count)
    areas = np.stack([1 - inside, inside * 0.9, inside * 0.1], axis=1) * cells[:, None]
    return features, areas


@pytest.mark.parametrize("size", [32, 120])
@pytest.mark.parametrize("share", [0.3, 0.02])
def test_nineteen_of_twenty_intervals_hold_the_truth(share, size):
    features, areas = population(share=share)
    strata, random = stratify(features, size // PER_STRATUM), np.random.default_rng(1)
    held, found = [], []
    for _ in range(400):
        chosen = draw(strata, size, random)
        found.append(estimate(areas[chosen], strata, chosen, areas.sum()))
        _, low, high = found[-1].T
        held.append((low <= areas.sum(axis=0)) & (areas.sum(axis=0) <= high))
    assert np.mean(held, axis=0).min() > 0.9
    np.testing.assert_allclose(np.mean(found, axis=0)[:, 0], areas.sum(axis=0), rtol=0.1)


def test_strata_by_what_is_seen_make_a_sample_tell_more():
    features, areas = population()
    strata, random = stratify(features, 8), np.random.default_rng(2)
    alone = np.zeros(len(areas), np.int64)
    errors = {}
    for name, labels in {"strata": strata, "plain": alone}.items():
        draws = [draw(labels, 32, random) for _ in range(300)]
        found = [estimate(areas[d], labels, d, areas.sum())[1, 0] for d in draws]
        errors[name] = np.std(found)
    assert errors["strata"] < 0.8 * errors["plain"]


def whole_patches(hits, size):
    """Return (size, 2): patches all of the first class, but for so many of the second."""
    is_hit = (np.arange(size) < hits).astype(float)
    return np.stack([1 - is_hit, is_hit], axis=1)


@pytest.mark.parametrize(("hits", "close"), [(0, 0.001), (12, 0.03), (40, 0.001)])
def test_of_whole_patches_the_interval_is_clopper_and_pearsons(hits, close):
    size = 40
    strata, chosen = np.zeros(100_000, np.int64), np.arange(size)
    mm2, low, high = estimate(whole_patches(hits, size), strata, chosen, 1000.0)[1]
    exact = binomtest(hits, size).proportion_ci(0.95, method="exact")
    assert mm2 == pytest.approx(1000 * hits / size)
    assert low == pytest.approx(1000 * exact.low, rel=close, abs=0.1)
    assert high == pytest.approx(1000 * exact.high, rel=close)


def test_what_was_seen_is_there_and_what_is_left_bounds_the_rest():
    strata, chosen = np.zeros(45, np.int64), np.arange(40)
    mm2, low, high = estimate(whole_patches(0, 40), strata, chosen, 45.0)[1]
    assert (mm2, low) == (0, 0)
    assert 0 < high <= 5
    assert estimate(whole_patches(40, 40), strata, chosen, 45.0)[1, 1] >= 40


def test_patches_that_stand_for_nothing_tell_nothing():
    strata, chosen = np.zeros(1000, np.int64), np.arange(40)
    nothing = np.zeros((40, 2))
    assert estimate(nothing, strata, chosen, 7.0).tolist() == [[0, 0, 7], [0, 0, 7]]
    one = np.vstack([[1.0, 0.0], nothing[1:]])
    assert estimate(one, strata, chosen, 7.0)[1].tolist() == [0, 0, 6]


def test_of_all_patches_the_interval_is_a_point():
    _, areas = population(50)
    found = estimate(areas, np.zeros(50, np.int64), np.arange(50), areas.sum())
    np.testing.assert_allclose(found, areas.sum(axis=0)[:, None].repeat(3, axis=1))


def test_equal_strata_give_each_patch_the_same_chance():
    features, _ = population(203)
    strata = stratify(features, 8)
    assert np.ptp(np.bincount(strata)) <= 1
    random, times = np.random.default_rng(3), np.zeros(203)
    for _ in range(2000):
        chosen = draw(strata, 33, random)
        assert len(np.unique(chosen)) == 33
        assert np.bincount(strata[chosen], minlength=8).min() >= PER_STRATUM
        times[chosen] += 1
    # six standard deviations of a count
    expected = 2000 * 33 / 203
    assert np.abs(times - expected).max() < 6 * np.sqrt(expected)


def test_a_hundredth_is_taken_but_not_too_few():
    assert [sample_size(n) for n in (0, 20, 32, 33, 5000)] == [0, 20, 32, 32, 50]
