"""Pixels as networks want them, against Pillow and plain arithmetic."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

from wsi_pipeline.bundle import InputSpec
from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources.radiology import preprocess as prepared
from wsi_pipeline.sources.radiology.preprocess import axis_weights, prepare

PILLOWS = {"linear": Pictures.Resampling.BILINEAR, "cubic": Pictures.Resampling.BICUBIC}


@dataclass
class Scan:
    """Values in memory, with what an opened image or volume offers."""

    pixels: np.ndarray  # (*shape, channels)
    spacing_mm: tuple[float, ...] | None = None
    path: Path = Path("scan")

    @property
    def shape(self):
        return self.pixels.shape[:-1]

    @property
    def channels(self):
        return self.pixels.shape[-1]

    @property
    def value_range(self):
        return float(self.pixels.min()), float(self.pixels.max())

    def read(self, start, shape):
        assert all(0 <= a < a + n <= m for a, n, m in zip(start, shape, self.shape, strict=True))
        box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        return self.pixels[box].astype(np.float32)


def spec(**keys):
    axes = 3 if "spacing_mm" in keys else 2
    return InputSpec(**{"channels": 1, "patch_size": (32,) * axes, "overlap": (0,) * axes} | keys)


def everything(scan, wanted):
    found = prepare(scan, wanted)
    return found.read(scan, (0,) * len(found.shape), found.shape)


def values(*shape, seed=0, channels=1):
    return np.random.default_rng(seed).random((*shape, channels)).astype(np.float32) * 1000


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("fit", [(16, 24), (70, 40), (200, 233)])
def test_fitted_images_are_pillows(interpolation, fit):
    scan = Scan(values(70, 91))
    found = everything(scan, spec(fit=fit, interpolation=interpolation, scale=(0, 1000)))
    picture = Pictures.fromarray(scan.pixels[..., 0]).resize(fit[::-1], PILLOWS[interpolation])
    expected = np.clip(np.asarray(picture) / 1000, 0, 1)
    assert found.shape == (*fit, 1)
    np.testing.assert_allclose(found[..., 0], expected, atol=1e-5)


def test_volumes_are_resampled_along_each_axis():
    scan = Scan(values(11, 30, 17), spacing_mm=(3.0, 0.5, 1.0))
    found = everything(scan, spec(spacing_mm=(1.5, 1.0, 1.0), scale=(0, 1000)))[..., 0]
    assert found.shape == (22, 15, 17)
    for x in range(17):
        plane = Pictures.fromarray(scan.pixels[:, :, x, 0])
        expected = np.asarray(plane.resize((15, 22), Pictures.Resampling.BILINEAR)) / 1000
        np.testing.assert_allclose(found[:, :, x], expected, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_box_is_cut_from_the_whole(data):
    """In any place, also beyond the grid, bit for bit, and however little is read at a time."""
    scan = Scan(values(13, 9, 17), spacing_mm=(1.7, 1.0, 0.6))
    found = prepare(scan, spec(spacing_mm=(1.0, 1.0, 1.0), scale="zscore"))
    margin = 4
    whole = found.read(scan, (-margin,) * 3, tuple(n + 2 * margin for n in found.shape))
    start = tuple(data.draw(st.integers(-margin, n + margin - 1)) for n in found.shape)
    shape = tuple(
        data.draw(st.integers(1, n + margin - a)) for n, a in zip(found.shape, start, strict=True)
    )
    box = tuple(slice(a + margin, a + margin + n) for a, n in zip(start, shape, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "SLAB_PX", data.draw(st.integers(1, 500)))
        assert (found.read(scan, start, shape) == whole[box]).all()


@given(st.integers(1, 50), st.floats(0.05, 20), st.sampled_from(["linear", "cubic"]))
@settings(max_examples=60, deadline=None)
def test_weights_sum_to_one_and_lie_inside(length, step, interpolation):
    count = max(1, round(length / step))
    low, high, weights = axis_weights(
        0, count, step=step, length=length, interpolation=interpolation
    )
    assert 0 <= low < high <= length
    if weights is None:
        assert step == 1
    else:
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)


def test_nothing_is_interpolated_at_native_spacing():
    pixels = values(8, 9, 10)
    found = everything(
        Scan(pixels, spacing_mm=(1.0, 0.999, 1.001)),
        spec(spacing_mm=(1.0, 1.0, 1.0), scale=(0, 1024)),
    )
    assert (found == pixels / np.float32(1024)).all()


def breast(width=40, height=60):
    """Return a bright half ellipse at the right of a dark image, and where it is."""
    y, x = np.ogrid[:height, :width]
    inside = ((y - height / 2) / (height / 2)) ** 2 + ((width - x) / (width / 2)) ** 2 < 1
    shades = np.random.default_rng(0).uniform(400, 900, inside.shape)
    noise = np.random.default_rng(1).uniform(0, 20, inside.shape)
    return np.where(inside, shades, noise).astype(np.float32)[..., None], inside


def test_a_mammogram_is_turned_to_the_left_padded_and_scaled_over_the_breast():
    pixels, inside = breast()
    found = prepare(Scan(pixels), spec(fit=(60, 60), orient="left", pad="square", scale="minmax"))
    assert found.is_mirrored
    assert found.shape == found.padded_shape == (60, 60)
    image = found.read(Scan(pixels), (0, 0), found.shape)[..., 0]
    least, largest = pixels[inside].min(), pixels[inside].max()
    expected = np.clip((pixels[:, ::-1, 0] - least) / (largest - least), 0, 1)
    np.testing.assert_allclose(image[:, :40], expected, atol=1e-5)
    assert (image[:, 40:] == 0).all()
    turned = np.ascontiguousarray(pixels[:, ::-1])
    assert not prepare(Scan(turned), spec(fit=(60, 60), orient="left")).is_mirrored


def test_zscore_is_that_of_the_body_and_air_lies_below():
    body = np.zeros((20, 30, 30), bool)
    body[3:17, 5:25, 5:25] = True
    random = np.random.default_rng(2)
    pixels = np.where(body, random.normal(500, 60, body.shape), random.uniform(0, 15, body.shape))
    scan = Scan(pixels.astype(np.float32)[..., None], spacing_mm=(1.0, 1.0, 1.0))
    wanted = spec(spacing_mm=(1.0, 1.0, 1.0), scale="zscore")
    found = everything(scan, wanted)[..., 0]
    inside = scan.pixels[body]
    np.testing.assert_allclose(
        found[body], ((inside - inside.mean()) / inside.std())[:, 0], atol=1e-3
    )
    beyond = prepare(scan, wanted).read(scan, (-2, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(beyond, found.min(), atol=1e-5)


def test_colours_and_greys_become_each_other():
    grey, colour = values(6, 7), values(6, 7, channels=3)
    as_colour = everything(Scan(grey), spec(fit=(6, 7), channels=3, scale=(0, 1000)))
    assert (as_colour == as_colour[..., :1]).all()
    np.testing.assert_allclose(as_colour[..., :1], grey / 1000, atol=1e-6)
    as_grey = everything(Scan(colour), spec(fit=(6, 7), scale=(0, 1000)))
    np.testing.assert_allclose(as_grey[..., 0], colour @ [0.299, 0.587, 0.114] / 1000, atol=1e-5)
    with pytest.raises(SourceError, match="the network wants 4"):
        prepare(Scan(grey), spec(fit=(6, 7), channels=4))


@pytest.mark.parametrize("scale", ["range", "minmax", "zscore"])
def test_an_image_of_one_value_is_all_zero(scale):
    scan = Scan(np.full((9, 9, 1), 7, np.float32))
    assert (everything(scan, spec(fit=(9, 9), scale=scale)) == 0).all()
