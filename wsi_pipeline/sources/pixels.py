"""Where a worker gets the pixels of a patch grid from, whatever kind of source they are of."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wsi_pipeline.geometry import Region, Shape
from wsi_pipeline.options import MPP_TOLERANCE
from wsi_pipeline.sources import Slide, SlideView, open_source
from wsi_pipeline.sources.radiology.preprocess import Preparation, Scan, open_scan

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""(*box, C)."""


class GridPixels(Protocol):
    """An opened source, read in the pixels of its patch grid; several threads may read at once."""

    @property
    def fingerprint(self) -> str:
        """Return the digest of the source's content."""

    def read(self, start: Shape, shape: Shape) -> Pixels:
        """Return the pixels of a box that begins at `start`, in grid pixels."""

    def unreadable(self) -> list[Region]:
        """Return what of the boxes read so far could not be read, in level-0 pixels, sorted."""

    def close(self) -> None:
        """Close the source."""


class PixelSource(Protocol):
    """A source that is not open yet; it travels to the workers."""

    @property
    def path(self) -> Path:
        """Return where the source lies."""

    def open(self) -> GridPixels:
        """Open the source on the machine on which this is called; return its pixels.

        Raises:
            SourceError: it cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class SlidePixels:
    """The pixels of a slide, or of a stored grid.

    Attributes:
        path: absolute, or a URL.
        mpp: µm per level-0 pixel where the file does not say.
        series: which image of a file with several.
        grid_mpp: µm per grid pixel.
    """

    path: Path
    mpp: float | None
    series: int | None
    grid_mpp: float

    def open(self) -> GridPixels:
        """Open the slide; return its pixels."""
        slide = open_source(self.path, mpp=self.mpp, series=self.series)
        return _OpenSlide(slide, slide.at(self.grid_mpp, tolerance=MPP_TOLERANCE))


@dataclass(frozen=True)
class _OpenSlide:
    slide: Slide
    view: SlideView
    bad: set[Region] = field(default_factory=set)
    noting: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fingerprint(self) -> str:
        return self.slide.fingerprint

    def read(self, start: Shape, shape: Shape) -> Pixels:
        bad: list[Region] = []
        pixels = self.view.read((start[0], start[1]), (shape[0], shape[1]), bad=bad)
        with self.noting:
            self.bad.update(bad)
        return pixels

    def unreadable(self) -> list[Region]:
        with self.noting:
            return sorted(self.bad, key=lambda r: (r.y, r.x, r.height, r.width))

    def close(self) -> None:
        self.slide.close()


@dataclass(frozen=True, kw_only=True)
class ScanPixels:
    """The pixels of a planar image or a volume, prepared as the model wants to see them.

    Attributes:
        path: absolute.
        frame: which of a planar image with several.
        time_points: which of a volume with several.
        prepared: how its pixels become those of the grid.
    """

    path: Path
    frame: int | None
    time_points: tuple[int, ...] | None
    prepared: Preparation

    def open(self) -> GridPixels:
        """Open the file or series; return its pixels."""
        axes = len(self.prepared.shape)
        scan = open_scan(self.path, axes=axes, frame=self.frame, time_points=self.time_points)
        return _OpenScan(scan, self.prepared)


@dataclass(frozen=True)
class _OpenScan:
    scan: Scan
    prepared: Preparation

    @property
    def fingerprint(self) -> str:
        return self.scan.fingerprint

    def read(self, start: Shape, shape: Shape) -> Pixels:
        return self.prepared.read(self.scan, start, shape)

    def unreadable(self) -> list[Region]:
        return []

    def close(self) -> None:
        self.scan.close()
