"""How far outlines stand out from what is around them, by the contrast ratio of WCAG 2.2."""

import numpy as np
from scipy import ndimage

LEAST = 3.0
"""Of what is no text (success criterion 1.4.11)."""


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Return the relative luminance of sRGB pixels, 0 to 1."""
    share = np.asarray(pixels, float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def least_contrast(picture: np.ndarray, plain: np.ndarray, reach: int, near: int = 1) -> float:
    """Return the contrast of an outline with that pixel beside it from which it stands out least.

    Of a line and its halo the one counts that stands out more, at each pixel along the path.

    Args:
        picture: with outlines, (h, w, 3).
        plain: the same without.
        reach: px that the outline is wide.
        near: px from the outline up to which a pixel is beside it.
    """
    drawn = np.abs(picture.astype(float) - plain).max(axis=2) > 0
    beside = ndimage.binary_dilation(drawn, np.ones((2 * near + 1,) * 2)) & ~drawn
    assert beside.any()
    light, around = luminance(picture), luminance(plain)[beside] + 0.05
    brightest = ndimage.maximum_filter(np.where(drawn, light, -1), 2 * reach + 1)[beside] + 0.05
    darkest = ndimage.minimum_filter(np.where(drawn, light, 2), 2 * reach + 1)[beside] + 0.05
    return float(np.maximum(brightest / around, around / darkest).min())
