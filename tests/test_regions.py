"""Regions are those of scipy, class by class, with what is counted of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from traced import binary, components_of, masks

from wsi_pipeline.export.polygons.components import BlockComponents, join


def regions_of(mask, probability):
    """Return class, pixels, mean and least probability and first pixel of each, by scipy."""
    found = []
    for value in np.unique(mask[mask > 0]):
        labels, count = ndimage.label(mask == value)
        for i in range(1, count + 1):
            inside = labels == i
            y, x = np.argwhere(inside)[0].tolist()
            of = probability[inside] / 65535
            found.append((y, x, int(value), int(inside.sum()), of.mean(), of.min()))
    return sorted(found)


@settings(max_examples=100, deadline=None)
@given(st.one_of(masks, binary), st.integers(1, 9), hnp.arrays(np.uint16, (14, 14)))
def test_regions_are_those_of_scipy(mask, block_size, noise):
    probability = noise[: mask.shape[0], : mask.shape[1]]
    regions = join(components_of(mask, block_size, probability))
    expected = regions_of(mask, probability)
    first = [(*yx, v) for yx, v in zip(regions.first.tolist(), regions.value.tolist(), strict=True)]
    assert first == [region[:3] for region in expected]
    assert regions.pixels.tolist() == [region[3] for region in expected]
    assert regions.probability == pytest.approx([region[4] for region in expected], abs=1e-12)
    assert regions.least == pytest.approx([region[5] for region in expected], abs=1e-12)


def test_pieces_come_back_from_the_ledger_as_they_were():
    components = components_of(np.ones((5, 7), np.uint8), 8, None)[0, 0]
    arrays = components.as_arrays()
    assert "probability" not in arrays
    again = BlockComponents.from_arrays(arrays | {"predicted": np.array(3)})
    assert again.probability is None
    assert again.pixels.tolist() == [35]


def test_labels_beyond_16_bits_are_kept_apart():
    mask = np.zeros((600, 600), np.uint8)
    mask[::2, ::2] = 1
    assert len(join(components_of(mask, 600, None))) == 90_000
