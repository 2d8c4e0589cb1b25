"""A patch grid written by `tile`, read like any slide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from wsi_pipeline.errors import SourceError
from wsi_pipeline.patch_grid import GridInfo, open_patch_grid
from wsi_pipeline.sources.base import Downsamples, Pixels, Sizes, reading

PIECE = 256
"""Side of what is marked as unreadable at the least, in stored pixels."""


class StoredBackend:
    """The pixels of a patch grid: one level, at the grid's own downsample."""

    name = "patch grid"

    def __init__(self, path: Path) -> None:
        stored = open_patch_grid(path)
        if stored.pixels is None:
            raise SourceError(f"{path}: a patch grid without pixels; write one with `tile`")
        self._path = path
        self._pixels = stored.pixels
        self.info: GridInfo = stored.info
        self.size = stored.info.size
        height, width = stored.info.shape
        self.level_sizes: Sizes = ((width, height),)
        self.level_tiles: Sizes = ((PIECE, PIECE),)
        y, x = stored.info.downsample
        self.level_downsamples: Downsamples = ((x, y),)
        self._unreadable = [
            (r.x / x, r.y / y, (r.x + r.width) / x, (r.y + r.height) / y) for r in stored.unreadable
        ]
        self.doubts = stored.info.doubts
        properties = {
            "patch-grid.source-name": stored.info.source_name,
            "patch-grid.mpp-x": repr(stored.info.mpp[0]),
            "patch-grid.mpp-y": repr(stored.info.mpp[1]),
        }
        if stored.info.bounds is not None:
            bounds = asdict(stored.info.bounds).items()
            properties |= {f"openslide.bounds-{name}": str(value) for name, value in bounds}
        self.properties: Mapping[str, str] = properties

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle of the canvas; return uint8 (height, width, 3)."""
        with reading(self._path, level, x, y, width, height):
            if any(
                left < x + width and x < right and top < y + height and y < bottom
                for left, top, right, bottom in self._unreadable
            ):
                raise OSError("so it was in the slide that `tile` read")
            return np.asarray(self._pixels[y : y + height, x : x + width], dtype=np.uint8)

    def close(self) -> None:
        """Do nothing: chunks are opened one by one."""
