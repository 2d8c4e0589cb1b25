"""What is written from a finished mask, one module a format."""

from __future__ import annotations

from typing import Any, Protocol

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
