"""A slide that runs of several models read side by side: opened once, each tile decoded once."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from wsi_pipeline.options import Icc
from wsi_pipeline.sources import Slide, open_source
from wsi_pipeline.sources.base import Backend, Pixels, WrappedBackend, part_of, tiles_touching

KEPT_BYTES = 1 << 29
"""Of decoded tiles of a slide: those of the blocks that are in hand."""
LARGEST = KEPT_BYTES >> 4
"""Bytes of a tile beyond which it is not kept: a whole picture, which its reader keeps."""

Place = tuple[int, int, int]
"""Level, x and y of a tile."""


class KeptTiles(WrappedBackend):
    """A backend that keeps the tiles decoded last, those that were asked for longest ago go first.

    A tile that one thread is decoding is waited for by all others. Errors are not kept.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.users = 0
        self._tiles: OrderedDict[Place, Future[Pixels]] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """See `Backend`."""
        tile = self.level_tiles[level]
        if 3 * math.prod(tile) > LARGEST:
            return self._backend.read_level(level, x, y, width, height)
        found, mine = dict[Place, Future[Pixels]](), list[Place]()
        with self._lock:
            for place in tiles_touching(x, y, width, height, tile):
                key = (level, *place)
                if key not in self._tiles:
                    self._tiles[key] = Future()
                    mine.append(key)
                self._tiles.move_to_end(key)
                found[key] = self._tiles[key]
        try:
            for run in _runs(mine, tile[0]):
                self._decode(run)
        except BaseException as error:
            with self._lock:
                lost = [self._tiles.pop(key) for key in mine if not found[key].done()]
            # Told when nobody can find them any more: each is tried anew by who asks next.
            for future in lost:
                future.set_exception(error)
            raise
        pixels = np.empty((height, width, 3), np.uint8)
        for key, future in found.items():
            corner = key[1:]
            target = part_of(pixels, (x, y), corner, tile)
            target[:] = part_of(future.result(), corner, (x, y), (width, height))
        return pixels

    def close(self) -> None:
        """Give the file back once nobody reads it any more."""
        with _opening:
            self.users -= 1
            if not self.users:
                for key in [key for key, slide in _slides.items() if slide.pixels is self]:
                    del _slides[key]
                super().close()

    def _decode(self, run: list[Place]) -> None:
        """Decode tiles that lie side by side, at one go, and keep them."""
        (level, x, y), (width, height) = run[0], self.level_tiles[run[0][0]]
        full_width, full_height = self.level_sizes[level]
        size = min(len(run) * width, full_width - x), min(height, full_height - y)
        pixels = self._backend.read_level(level, x, y, *size)
        for key in run:
            tile = part_of(pixels, (x, y), key[1:], (width, height)).copy()
            with self._lock:
                self._tiles[key].set_result(tile)
                self._bytes += tile.nbytes
                while self._bytes > KEPT_BYTES:
                    oldest = next(key for key, future in self._tiles.items() if future.done())
                    self._bytes -= self._tiles.pop(oldest).result().nbytes


_slides: dict[tuple[Path, float | None, int | None, Icc], Slide] = {}
_opening = threading.Lock()


def open_shared(path: Path, *, mpp: float | None, series: int | None, icc: Icc) -> Slide:
    """Open a slide, or take it from those that are open in this process; return it, to be closed.

    Raises:
        SourceError: it cannot be read.
    """
    with _opening:
        key = path, mpp, series, icc
        if key not in _slides:
            slide = open_source(path, mpp=mpp, series=series, icc=icc)
            _slides[key] = replace(slide, pixels=KeptTiles(slide.pixels))
        slide = _slides[key]
        assert isinstance(slide.pixels, KeptTiles)
        slide.pixels.users += 1
        return slide


def _runs(places: list[Place], width: int) -> Iterator[list[Place]]:
    """Yield tiles, which come row by row, in runs of those that lie side by side."""
    for _, run in groupby(enumerate(places), lambda n: (n[1][2], n[1][1] - n[0] * width)):
        yield [place for _, place in run]
