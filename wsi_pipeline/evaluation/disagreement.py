"""A small picture of where two masks disagree."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsi_pipeline.evaluation.confusion import IGNORE, Mask
from wsi_pipeline.export.overlay import Color, legend
from wsi_pipeline.geometry import Shape

LONGEST, SMALLEST = 1600, 600
"""Side of the picture at most, px, and what a smaller one is enlarged to, whole times."""
KINDS: tuple[tuple[str, Color], ...] = (
    ("both background", (255, 255, 255)),
    ("both the same class", (150, 190, 150)),
    ("prediction only", (215, 48, 39)),
    ("truth only", (69, 117, 180)),
    ("another class", (240, 170, 40)),
    ("not judged", (215, 215, 215)),
)
"""Of agreement, with their colours; blue and red are told apart by the colour-blind too."""
COLORS = np.array([color for _, color in KINDS], dtype=np.float32)
FILL = 0.6
"""Opacity over the slide, whose tissue stays visible."""


def kinds_of(prediction: Mask, truth: Mask) -> Mask:
    """Return the index in `KINDS` of what each pixel of two masks of one shape is."""
    kind = np.where(prediction == truth, np.uint8(1), np.uint8(4))
    kind[(truth == 0) & (prediction > 0)] = 2
    kind[(prediction == 0) & (truth > 0)] = 3
    kind[(prediction == 0) & (truth == 0)] = 0
    kind[(prediction == IGNORE) | (truth == IGNORE)] = 5
    return kind


class Disagreement:
    """A picture whose pixels mix the colours of what they cover, so that nothing thin is lost."""

    def __init__(self, shape: Shape) -> None:
        self._cell = max(1, math.ceil(max(shape) / LONGEST))
        small = tuple(-(-n // self._cell) for n in shape)
        self._sums = np.zeros((*small, len(COLORS)), np.float32)

    def whole_cells(self, side: int) -> tuple[int, int]:
        """Return the size of a block that is made of whole pixels of the picture."""
        rounded = max(self._cell, side // self._cell * self._cell)
        return rounded, rounded

    def add(self, start: Shape, prediction: Mask, truth: Mask) -> None:
        """Enter a block that begins at a cell, of whole cells but for the ragged edge."""
        kind = kinds_of(prediction, truth)
        rows, columns = (np.arange(n) // self._cell for n in kind.shape)
        height, width = int(rows[-1]) + 1, int(columns[-1]) + 1
        cells = (rows[:, None] * width + columns) * len(COLORS) + kind
        counts = np.bincount(cells.ravel(), minlength=height * width * len(COLORS))
        y, x = (a // self._cell for a in start)
        self._sums[y : y + height, x : x + width] = counts.reshape(height, width, -1)

    def drawn(self, slide: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """Return the picture, uint8 (h, w, 3).

        The slide, uint8 (h, w, 3) of the same part at any size, lies under it; None = white.
        """
        shares = self._sums / self._sums.sum(-1, keepdims=True)
        height, width = shares.shape[:2]
        below, fill = np.full((height, width, 3), 255, np.float32), 1.0
        if slide is not None:
            # In grey, so that no stain makes another colour of what lies over it.
            grey = Image.fromarray(slide).convert("L").convert("RGB")
            small = grey.resize((width, height), Image.Resampling.BOX)
            below, fill = np.asarray(small, np.float32), FILL
        covered = fill * (1 - shares[..., :1])
        mixed = fill * (shares[..., 1:] @ COLORS[1:]) + (1 - covered) * below
        return np.asarray(mixed.round(), dtype=np.uint8)


def with_legend(picture: npt.NDArray[np.uint8], *, um: float | None) -> npt.NDArray[np.uint8]:
    """Return a picture with what its colours mean and a scale bar below, uint8 (h, w, 3).

    The bar is left out where `um`, µm per pixel of the picture along x, is None.
    """
    times = max(1, SMALLEST // max(picture.shape))
    picture = picture.repeat(times, 0).repeat(times, 1)
    entries = [(color, name) for name, color in KINDS[1:]]
    below = legend(entries, max(picture.shape[1], SMALLEST), um=um and um / times)
    space = below.shape[1] - picture.shape[1]
    wide = np.pad(picture, ((0, 0), (0, space), (0, 0)), constant_values=255)
    return np.vstack([wide, below])
