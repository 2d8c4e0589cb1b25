"""Work in threads, in order; and what threads must not do side by side."""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST_THREADS = 8
"""Each takes memory, and more gain little: between numpy's steps they wait for Python's lock."""
_GDAL = threading.Lock()


def map_in_threads(
    function: Callable[[T], R], items: Iterable[T], *, threads: int | None = None
) -> Generator[R, None, None]:
    """Do something with each item in threads; yield the results in order, few of them held.

    There are as many threads as cores, but `MOST_THREADS` at the most, where nothing is said.

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
                # Enough that no thread waits while one is taken, and few: they may be large.
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Where a result was an error some still wait.
            for future in waiting:
                future.cancel()


@contextmanager
def quiet_gdal() -> Iterator[None]:
    """Keep back that a picture has no place on the globe, one thread at a time; yield nothing.

    Filters of warnings are the process's: two threads would put each other's back.
    """
    from rasterio.errors import NotGeoreferencedWarning

    with _GDAL, warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning):
        yield
