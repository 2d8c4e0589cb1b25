"""What is written from a finished mask, one module a format."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from wsi_pipeline.geometry import Shape

T = TypeVar("T")
R = TypeVar("R")

MOST_THREADS = 8
"""Each takes memory, and more gain little: between numpy's steps they wait for Python's lock."""
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


def map_in_threads(
    function: Callable[[T], R], items: Iterable[T], *, threads: int | None = None
) -> Iterator[R]:
    """Do something with each item in threads; yield the results in order, few of them held.

    Args:
        function: what to do.
        items: with what.
        threads: how many; None = as many as there are cores, but `MOST_THREADS` at the most.

    Example:
        >>> list(map_in_threads(abs, [-3, 2, -1], threads=2))
        [3, 2, 1]
    """
    threads = threads or min(os.cpu_count() or 1, MOST_THREADS)
    waiting = deque[Future[R]]()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # where a result was an error
                future.cancel()
