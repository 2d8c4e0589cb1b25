"""A small picture of where two masks disagree."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from wsi_pipeline.evaluation.metrics import IGNORE, Mask
from wsi_pipeline.grid import Block

LONGEST = 1600
"""Side of the picture at most, px."""
COLORS = np.array(
    [
        (255, 255, 255),  # both say background
        (150, 190, 150),  # both say the same class
        (215, 48, 39),  # the prediction has a class where the truth has none
        (69, 117, 180),  # the truth has a class where the prediction has none
        (240, 170, 40),  # another class
        (215, 215, 215),  # not judged
    ],
    dtype=np.float32,
)
"""Of the kinds of agreement; blue and red are told apart by the colour-blind too."""


class Disagreement:
    """A picture whose pixels mix the colours of what they cover, so that nothing thin is lost.

    Args:
        shape: (h, w) in pixels compared.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._cell = max(1, math.ceil(max(shape) / LONGEST))
        small = tuple(-(-n // self._cell) for n in shape)
        self._sums = np.zeros((*small, len(COLORS)), np.float32)

    def whole_cells(self, side: int) -> tuple[int, int]:
        """Return the size of a block that is made of whole pixels of the picture."""
        rounded = max(self._cell, side // self._cell * self._cell)
        return rounded, rounded

    def add(self, block: Block, prediction: Mask, truth: Mask) -> None:
        """Enter a block, made of whole cells but for the ragged edge."""
        kind = np.where(prediction == truth, np.uint8(1), np.uint8(4))
        kind[(truth == 0) & (prediction > 0)] = 2
        kind[(prediction == 0) & (truth > 0)] = 3
        kind[(prediction == 0) & (truth == 0)] = 0
        kind[(prediction == IGNORE) | (truth == IGNORE)] = 5
        rows, columns = (np.arange(n) // self._cell for n in kind.shape)
        height, width = int(rows[-1]) + 1, int(columns[-1]) + 1
        cells = (rows[:, None] * width + columns) * len(COLORS) + kind
        counts = np.bincount(cells.ravel(), minlength=height * width * len(COLORS))
        y, x = (a // self._cell for a in block.start)
        self._sums[y : y + height, x : x + width] = counts.reshape(height, width, -1)

    def drawn(self) -> npt.NDArray[np.uint8]:
        """Return the picture, uint8 (h, w, 3)."""
        shares = self._sums / self._sums.sum(-1, keepdims=True)
        return np.asarray((shares @ COLORS).round(), dtype=np.uint8)
