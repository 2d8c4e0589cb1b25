"""What is written from a finished mask, one module a format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wsi_pipeline.geometry import Shape

SMALLEST_LEVEL = 1024
"""Reduced levels are added to a mask until its longer side is at most this many pixels."""


class MaskLike(Protocol):
    """A mask to slice: a zarr or numpy array, uint8 (y, x)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (y, x)."""

    def __getitem__(self, key: Any, /) -> Any:
        """Return the pixels of two slices with steps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Pixels of a run that know how large they are; slice it like an array.

    Attributes:
        levels: zarr or numpy arrays, the whole one first, each of which halves the one before.
        mpp: µm per pixel of the first along its last axes, (y, x) or (z, y, x); None = it is not
            known.
    """

    levels: Sequence[MaskLike]
    mpp: tuple[float, ...] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the whole."""
        return self.levels[0].shape

    def __getitem__(self, key: Any, /) -> Any:
        return self.levels[0][key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.levels[0][...], dtype)


def level_shapes(shape: Shape) -> list[Shape]:
    """Halve a size, rounding up, until it is small; return the sizes of all levels.

    Example:
        >>> level_shapes((5000, 300))
        [(5000, 300), (2500, 150), (1250, 75), (625, 38)]
    """
    shapes = [shape]
    while max(shapes[-1]) > SMALLEST_LEVEL:
        shapes.append(tuple(-(-n // 2) for n in shapes[-1]))
    return shapes
