"""Lesions counted in slabs, held against scipy and all pairs of pixels."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.spatial.distance import pdist

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export import lesions
from wsi_pipeline.export.lesions import count_lesions

CLASSES = [
    ClassInfo(name="Background"),
    ClassInfo(name="Tumor", color=(200, 0, 0)),
    ClassInfo(name="Cyst", color=(0, 0, 200)),
]
SPACING = (2.0, 0.5, 0.75)


def longest(inside, spacing):
    """Return the largest distance between the middles of faces of all pixels."""
    steps = np.concatenate([np.eye(inside.ndim), -np.eye(inside.ndim)]) / 2
    points = np.argwhere(inside)[:, None] + steps
    return pdist(points.reshape(-1, inside.ndim) * spacing).max()


def expected(mask, index, spacing):
    """Return pixels, diameter and box of each lesion of a class, the largest first."""
    labels, n = ndimage.label(mask == index, np.ones((3,) * mask.ndim))
    found = []
    for label, box in zip(range(1, n + 1), ndimage.find_objects(labels), strict=True):
        inside = labels == label
        corners = tuple(s.start for s in box), tuple(s.stop for s in box)
        found.append((int(inside.sum()), longest(inside, spacing), *corners))
    return sorted(found, key=lambda lesion: -lesion[0])


def check(mask, spacing):
    found = count_lesions(mask, CLASSES, spacing)
    assert [own.name for own in found] == ["Tumor", "Cyst"]
    unit = np.prod(spacing) / (1000 if mask.ndim == 3 else 1)
    for index, own in enumerate(found, start=1):
        true = expected(mask, index, spacing)
        assert own.count == len(true)
        assert own.pixels == (mask == index).sum()
        assert own.size == pytest.approx(own.pixels * unit)
        key = [(a.pixels, round(a.diameter_mm, 6), a.start, a.stop) for a in own.largest]
        assert sorted(key) == sorted((n, round(d, 6), a, b) for n, d, a, b in true)
        assert [a.pixels for a in own.largest] == sorted((n for n, *_ in true), reverse=True)
        assert [a.size for a in own.largest] == pytest.approx(
            [a.pixels * unit for a in own.largest]
        )


@settings(deadline=None, max_examples=60)
@given(
    mask=hnp.arrays(
        np.uint8,
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7),
        elements=st.sampled_from([0, 0, 0, 1, 2]),
    ),
    layers=st.integers(1, 7),
)
def test_slabs_make_no_difference(mask, layers):
    whole = lesions.SLAB
    try:
        lesions.SLAB = layers * int(np.prod(mask.shape[1:]))
        check(mask, SPACING[: mask.ndim])
    finally:
        lesions.SLAB = whole


def test_round_ones_have_their_diameter_and_volume():
    z, y, x = np.ogrid[:60, :80, :60]
    mask = ((z - 30) ** 2 + (y - 40) ** 2 + (x - 30) ** 2 <= 24**2).astype(np.uint8)
    (tumor, cyst) = count_lesions(mask, CLASSES, (2.0, 2.0, 2.0))
    assert tumor.count == 1
    assert tumor.size == pytest.approx(4 / 3 * np.pi * 4.8**3, rel=0.02)
    assert tumor.largest[0].diameter_mm == pytest.approx(98, rel=0.01)  # 24 + 1 + 24 pixels
    assert (cyst.count, cyst.size, cyst.largest) == (0, 0, ())


def test_without_spacing_pixels_are_counted():
    mask = np.zeros((5, 9), np.uint8)
    mask[1:3, 2:6] = 1
    tumor = count_lesions(mask, CLASSES, None)[0]
    assert (tumor.count, tumor.pixels, tumor.size) == (1, 8, None)
    assert (tumor.largest[0].diameter_mm, tumor.largest[0].size) == (None, None)


def test_of_very_many_the_largest_are_listed():
    mask = np.zeros((90, 90), np.uint8)
    for number, (y, x) in enumerate(itertools.product(range(0, 90, 5), repeat=2)):
        mask[y, x : x + 1 + number % 4] = 1
    tumor = count_lesions(mask, CLASSES, (1, 1))[0]
    assert tumor.count == 18 * 18
    assert [a.pixels for a in tumor.largest] == [4] * 81 + [3] * 19
