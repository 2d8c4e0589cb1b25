"""What on a slide is out of focus, under a pen, folded, a bubble or blood: by pixels alone.

The measures are classical ones, on cells of 16 × 16 px of about 1 µm: how much of the detail is
finest, and what colour and how dense a cell is in optical density, next to the slide's own tissue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsi_pipeline.bundle import ClassInfo

Mask = npt.NDArray[np.bool_]
Plane = npt.NDArray[np.float32]
QUALITIES = (
    ClassInfo(name="Good"),
    ClassInfo(name="out-of-focus", color=(255, 200, 0)),
    ClassInfo(name="pen", color=(0, 160, 255)),
    ClassInfo(name="fold", color=(160, 0, 200)),
    ClassInfo(name="bubble", color=(0, 200, 120)),
    ClassInfo(name="blood", color=(220, 0, 0)),
)
"""What a cell may be, in the order of its values."""
CELL = 16
"""px along a side of a cell."""
BLURRED = -0.8
"""log10 of the energy of details below 2 px over that of 2 to 8 px, below which a cell is blurred.

In focus it is -0.7 or more whatever the stain, blurred by a Gaussian of 2 px -0.85 or less.
"""
FOLDED, FOLDED_DENSE = 1.4, 1.05
"""Densities of the median tissue of a hue, and of its densest twentieth, that two layers exceed."""
HUES, MANY = 16, 500
"""Into how many hues, by red over green, tissue is parted, and least pixels of a thumbnail each."""
ALIEN = 0.05
"""How far from the hues of a slide's tissue lies what is none, however many layers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """How a slide looks: what its cells are held against.

    Attributes:
        cell: mask pixels along a side of a cell.
        glass: red, green and blue of empty glass.
        green: median optical density of its tissue in green light.
        reds: (2, hues) red over green density, ascending, and mean density of double tissue.
        hues: (2, 2) least and most of red and blue over green that its tissue has.
        cool: density in red light over that in green above which it is ink.
        crimson: that in blue light likewise, where there is hardly any in red.
    """

    cell: int
    glass: tuple[float, ...]
    green: float
    reds: npt.NDArray[np.float64]
    hues: npt.NDArray[np.float64]
    cool: float
    crimson: float


def look_of(thumbnail: npt.NDArray[np.uint8], tissue: Mask, cell: int) -> Look:
    """Return how a slide looks by its thumbnail and the tissue on that."""
    # With scikit-image, which nobody needs who writes outputs again.
    from wsi_pipeline.tissue.detect import glass_colour

    glass = glass_colour(thumbnail)
    stained = thumbnail[tissue] if tissue.any() else thumbnail.reshape(-1, 3)
    density = np.log10((glass + 1) / (stained.astype(np.float32) + 1)).clip(0)
    hues = density[:, ::2] / np.maximum(density[:, 1:2], 0.05)
    red, blue = np.percentile(hues, 99, axis=0)
    solid = hues[density[:, 1] >= np.median(density[:, 1])]
    # One layer of stroma is paler than one of tumour: each hue has densities of its own.
    reds, order = [], np.argsort(hues[:, 0], kind="stable")
    for part in np.array_split(order, min(max(len(order) // MANY, 1), HUES)):
        middle, dense = np.percentile(density[part].mean(axis=1), (50, 95))
        reds.append((np.median(hues[part, 0]), max(FOLDED * middle, FOLDED_DENSE * dense)))
    return Look(
        cell=cell,
        glass=tuple(glass.tolist()),
        green=float(np.median(density[:, 1])),
        reds=np.transpose(reds),
        hues=np.percentile(solid, (1, 99), axis=0),
        cool=float(min(red + 0.25, 1)),
        crimson=float(min(blue + 0.1, 0.6)),
    )


def assess(pixels: npt.NDArray[np.uint8], look: Look) -> npt.NDArray[np.uint8]:
    """Find what is wrong with each cell; return indices in `QUALITIES`, (rows, columns).

    Args:
        pixels: uint8 (`CELL` · rows, `CELL` · columns, 3), of about 1 µm.
    """
    values = np.arange(1, 257, dtype=np.float32)
    tables = [np.log10(np.float32(light + 1) / values).clip(0) for light in look.glass]
    planes = [table[pixels[..., channel]] for channel, table in enumerate(tables)]
    grey = (planes[0] + planes[1] + planes[2]) / 3
    red, green, blue = (
        ndimage.median_filter(_means(plane, CELL), 3, mode="nearest") for plane in planes
    )
    # Energies of what is lost in means of 2 × 2 px, and between those and means of 8 × 8.
    twos = _means(grey, 2)
    eights = _means(twos, 4)
    below_two = _means(twos * twos, 4)
    fine = (_means(grey * grey, 8) - below_two).clip(0)
    coarse = (below_two - eights * eights).clip(0)
    # Of no details at all JPEG leaves some 3e-6.
    ratio = np.log10((fine + np.float32(1e-9)) / (coarse + np.float32(3e-6)))
    density = (red + green + blue) / 3
    # A median keeps straight borders where they are.
    blurred = ndimage.median_filter(ratio, 7, mode="nearest") < BLURRED
    blurred = (_means(blurred.astype(np.float32), CELL // 8) > 0.3) & (density > 0.05)
    # Stains take most of the green light, and little of some other.
    least = np.minimum(np.minimum(red, green), blue)
    ink = (red > look.cool * green) & (red > 0.08)
    hues = np.stack([red, blue], axis=-1) / np.maximum(green, 0.05)[..., None]
    double = np.interp(hues[..., 0], *look.reds)
    ink |= least > np.maximum(0.5, 0.9 * double)
    is_red = (red < 0.35 * green) & (green > max(0.5, 1.6 * look.green))
    ink |= is_red & (blue > look.crimson * green)
    # of a slide that has but glass two layers are glass
    folded = ndimage.median_filter(density / np.maximum(double, 0.05), 3, mode="nearest") > 1
    blood = (red < 0.115 * green) & (blue > 0.55 * green) & (green > 0.35)
    # Two layers have the hue of one: what is as dense and has another is ink.
    alien = ((hues < look.hues[0] - ALIEN) | (hues > look.hues[1] + ALIEN)).any(axis=-1)
    ink |= folded & alien & ~blood
    # Ink takes focus and colour from what is below it: the last counts.
    order = {"out-of-focus": blurred, "fold": folded, "blood": blood}
    order |= {"bubble": _bubbles(planes), "pen": ink}
    found, names = np.zeros(density.shape, np.uint8), [quality.name for quality in QUALITIES]
    for name, where in order.items():
        found[where] = names.index(name)
    return found


def _means(plane: Plane, side: int) -> Plane:
    """Return the means of squares of pixels."""
    height, width = plane.shape
    squares = plane.reshape(height // side, side, width // side, side)
    return np.asarray(squares.mean(axis=3).mean(axis=1))


def _bubbles(planes: list[Plane]) -> Mask:
    """Return the cells inside closed rims that are thin and grey."""
    small = np.stack([_means(plane, 4) for plane in planes])
    rim = (small.min(axis=0) > 0.65 * small.max(axis=0)) & (small.max(axis=0) > 0.15)
    rim = ndimage.binary_closing(np.pad(rim, 2), iterations=2)[2:-2, 2:-2]
    inside = ndimage.binary_fill_holes(rim) & ~rim
    labels, count = ndimage.label(inside)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    found = ndimage.binary_dilation((sizes > 20_000 / 16)[labels], iterations=3)
    return _means(found.astype(np.float32), CELL // 4) > 0.5
