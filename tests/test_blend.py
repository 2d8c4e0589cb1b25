"""Blending divides by the sum of weights, and sampling does not know how the mask is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.blend import Canvas, Windows, axis_windows, iter_sampled_rows
from wsi_pipeline.grid import PatchGrid

CPU = torch.device("cpu")
blends = st.sampled_from(["gaussian", "constant", "crop"])


@st.composite
def grids(draw):
    patch = tuple(draw(st.integers(2, 20)) for _ in range(2))
    shape = tuple(draw(st.integers(1, 50)) for _ in range(2))
    overlap = tuple(draw(st.integers(0, p - 1)) for p in patch)
    return PatchGrid.cover(shape, patch, overlap)


def blended(grid, blend, predict, channels=1):
    windows = Windows(grid, blend, CPU)
    canvas = Canvas((0, 0), grid.shape, channels, CPU)
    for y, x in grid.origins.tolist():
        canvas.add((y, x), predict(y, x), windows.weight((y, x)))
    return canvas.finish()


@settings(max_examples=60, deadline=None)
@given(grids(), blends, st.sampled_from([1.0, 0.6]))
def test_a_constant_stays_that_constant_everywhere(grid, blend, value):
    """R1: weights divided by the count of patches would leave 0 % to 14 % of it above 0.5."""
    result = blended(grid, blend, lambda y, x: torch.full((1, *grid.patch_size), value))
    assert torch.allclose(result, torch.full_like(result, value), atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(grids(), blends)
def test_what_every_patch_agrees_on_is_kept(grid, blend):
    height, width = (max(n, p) for n, p in zip(grid.shape, grid.patch_size, strict=True))
    truth = torch.rand(1, height, width)
    ph, pw = grid.patch_size
    result = blended(grid, blend, lambda y, x: truth[:, y : y + ph, x : x + pw])
    expected = truth[:, : grid.shape[0], : grid.shape[1]]
    assert torch.allclose(result, expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 20), st.data())
def test_crop_gives_every_pixel_to_the_nearest_patch(length, patch, data):
    stride = data.draw(st.integers(1, patch))
    windows = axis_windows("crop", length=length, patch_size=patch, stride=stride)
    owners = np.zeros(max(length, patch))
    for origin, window in windows.items():
        owners[origin : origin + patch] += window.numpy()
    assert (owners[:length] == 1).all()
    for pixel in range(length):
        owner = next(o for o, w in windows.items() if o <= pixel < o + patch and w[pixel - o])
        distance = {o: abs(o + patch / 2 - pixel - 0.5) for o in windows}
        assert distance[owner] == min(distance.values())


def test_the_gaussian_is_the_published_one():
    """MONAI and nnU-Net: sigma = patch / 8, centred between the middle pixels."""
    window = axis_windows("gaussian", length=512, patch_size=512, stride=512)[0].double()
    position = torch.arange(512, dtype=torch.float64) - 255.5
    assert torch.allclose(window, torch.exp(-(position**2) / (2 * 64.0**2)), rtol=1e-6)
    assert window.min() > 0


def test_where_no_patch_lies_is_background():
    bare = Canvas((0, 0), (2, 2), 1, CPU).finish()
    assert (bare == 0).all()
    classes = Canvas((0, 0), (2, 2), 3, CPU).finish()
    assert classes[:, 0, 0].tolist() == [1, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.2, 3.0),
    st.floats(0.2, 3.0),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 7),
    st.data(),
)
def test_sampling_does_not_depend_on_the_cut(ratio_y, ratio_x, height, width, rows, data):
    mask_shape = int(np.ceil(height / ratio_y)), int(np.ceil(width / ratio_x))
    field = torch.rand(2, height, width)
    options = {"ratio": (ratio_y, ratio_x), "shape": (height, width)}
    whole = torch.cat(
        [s for _, s in iter_sampled_rows(field, (0, 0), start=(0, 0), stop=mask_shape, **options)],
        dim=1,
    )
    start = tuple(data.draw(st.integers(0, n - 1)) for n in mask_shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, mask_shape, strict=True))
    part = torch.cat(
        [
            s
            for _, s in iter_sampled_rows(
                field, (0, 0), start=start, stop=stop, rows=rows, **options
            )
        ],
        dim=1,
    )
    assert torch.equal(part, whole[:, start[0] : stop[0], start[1] : stop[1]])


@pytest.mark.parametrize("factor", [2, 4])
def test_sampling_equals_torch_upsampling_at_whole_factors(factor):
    """Centre on centre is what `interpolate(align_corners=False)` does."""
    field = torch.rand(1, 9, 7)
    rows = iter_sampled_rows(
        field,
        (0, 0),
        start=(0, 0),
        stop=(9 * factor, 7 * factor),
        ratio=(1 / factor, 1 / factor),
        shape=(9, 7),
    )
    ours = torch.cat([strip for _, strip in rows], dim=1)
    theirs = torch.nn.functional.interpolate(
        field[None], scale_factor=factor, mode="bilinear", align_corners=False
    )[0]
    assert torch.allclose(ours, theirs, atol=1e-6)
