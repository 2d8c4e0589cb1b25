"""Blending divides by the sum of weights, and sampling does not know how the mask is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.inference.blend import (
    Windows,
    axis_windows,
    iter_blended_rows,
    iter_owned,
    iter_sampled_rows,
)

CPU = torch.device("cpu")
blends = st.sampled_from(["gaussian", "constant", "crop"])


@st.composite
def grids(draw):
    patch = tuple(draw(st.integers(2, 20)) for _ in range(2))
    shape = tuple(draw(st.integers(1, 50)) for _ in range(2))
    overlap = tuple(draw(st.integers(0, p - 1)) for p in patch)
    return PatchGrid.cover(shape, patch, overlap)


def blended(grid, blend, predict, channels=1):
    predictions = (((y, x), predict(y, x)) for y, x in grid.origins.tolist())
    rows = iter_blended_rows(
        predictions,
        (0, 0),
        grid.shape,
        windows=Windows(grid, blend, CPU),
        patch_rows=grid.patch_size[0],
        channels=channels,
        device=CPU,
    )
    return torch.cat([band.clone() for _, band in rows], dim=1)


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


@pytest.mark.parametrize("blend", ["gaussian", "crop"])
def test_where_no_patch_lies_is_background(blend):
    grid = PatchGrid.cover((40, 10), (10, 10), (2, 2))
    kept = grid.keep(np.array([True, False, False, False, True]))
    alone = blended(kept, blend, lambda y, x: torch.ones(1, 10, 10))
    among = blended(
        kept, blend, lambda y, x: torch.tensor([0.0, 0, 1])[:, None, None].expand(3, 10, 10), 3
    )
    inside = torch.zeros(40, 10, dtype=torch.bool)
    first, last = (9, 32) if blend == "crop" else (10, 30)  # origins are 0, 8, 16, 24 and 30
    inside[:first] = inside[last:] = True
    assert (alone[0] == inside).all()
    assert (among.argmax(0) == 2 * inside).all()
    assert (among[0] == ~inside).all()


@settings(max_examples=60, deadline=None)
@given(grids(), st.sampled_from(["crop", "gaussian"]), st.data())
def test_what_is_owned_is_what_blending_shows(grid, blend, data):
    """In any box, and with patches missing."""
    windows = Windows(grid, blend, CPU)
    if not windows.exclusive:
        return
    keep = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(grid), max_size=len(grid))), bool
    )
    some = grid.keep(keep)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in grid.shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, grid.shape, strict=True))
    truth = {tuple(o): torch.rand(1, *grid.patch_size) for o in some.origins.tolist()}
    expected = blended(some, blend, lambda y, x: truth[y, x])
    found = torch.zeros_like(expected)
    for (y, x), part in iter_owned(truth.items(), start, stop, windows=windows):
        assert start[0] <= y < stop[0]
        assert start[1] <= x < stop[1]
        found[:, y : y + part.shape[1], x : x + part.shape[2]] = part
    box = (slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))
    assert torch.equal(found[box], expected[box])


def cut(field, data):
    """Return the field in bands of any height, as blending yields it."""
    row, bands = 0, []
    while row < field.shape[1]:
        stop = row + data.draw(st.integers(1, field.shape[1] - row))
        bands.append((row, field[:, row:stop]))
        row = stop
    return bands


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
        [
            s
            for _, s in iter_sampled_rows(
                [(0, field)], (0,), start=(0, 0), stop=mask_shape, **options
            )
        ],
        dim=1,
    )
    start = tuple(data.draw(st.integers(0, n - 1)) for n in mask_shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, mask_shape, strict=True))
    part = torch.cat(
        [
            s
            for _, s in iter_sampled_rows(
                cut(field, data), (0,), start=start, stop=stop, rows=rows, **options
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
        [(0, field)],
        (0,),
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
