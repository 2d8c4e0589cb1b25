"""Where a worker gets the pixels of a patch grid from, whatever kind of source they are of."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wsi_pipeline.geometry import Region, Shape
from wsi_pipeline.options import MPP_TOLERANCE, Icc
from wsi_pipeline.sources import Slide, open_source
from wsi_pipeline.sources.shared import open_shared

if TYPE_CHECKING:
    # With all that reads DICOM, for images and volumes alone.
    from wsi_pipeline.sources.radiology.preprocess import Preparation, Scan

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""(*box, C)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GridPixels:
    """An opened source, read in the pixels of its patch grid; several threads may read at once.

    Attributes:
        reader: Reader of a box, by its start and shape; it adds to a list what cannot be read.
    """

    source: Slide | Scan
    reader: Callable[[Shape, Shape, list[Region]], Pixels]
    _bad: set[Region] = field(default_factory=set)
    _noting: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fingerprint(self) -> str:
        """Return the digest of the source's content."""
        return self.source.fingerprint

    def read(self, start: Shape, shape: Shape) -> Pixels:
        """Return the pixels of a box that begins at `start`, in grid pixels."""
        bad: list[Region] = []
        pixels = self.reader(start, shape, bad)
        with self._noting:
            self._bad.update(bad)
        return pixels

    def unreadable(self) -> list[Region]:
        """Return what of the boxes read so far could not be read, in level-0 pixels, sorted."""
        with self._noting:
            return sorted(self._bad, key=lambda r: (r.y, r.x, r.height, r.width))

    def close(self) -> None:
        """Close the source."""
        self.source.close()


@dataclass(frozen=True, kw_only=True)
class SlidePixels:
    """The pixels of a slide, or of a stored grid, that is not open yet; it travels to the workers.

    Attributes:
        path: Absolute path, or a URL.
        mpp: µm per level-0 pixel where the file does not say.
        series: Which image of a file with several.
        icc: Whether its ICC profile is applied.
        grid_mpp: µm per grid pixel.
    """

    path: Path
    mpp: float | None
    series: int | None
    icc: Icc
    grid_mpp: float

    def open(self, *, shared: bool = False) -> GridPixels:
        """Open the slide on the machine on which this is called; return its pixels.

        Args:
            shared: with all in this process who say so.

        Raises:
            SourceError: it cannot be read.
        """
        opener = open_shared if shared else open_source
        slide = opener(self.path, mpp=self.mpp, series=self.series, icc=self.icc)
        view = slide.at(self.grid_mpp, tolerance=MPP_TOLERANCE)

        def read(start: Shape, shape: Shape, bad: list[Region]) -> Pixels:
            return view.read((start[0], start[1]), (shape[0], shape[1]), bad=bad)

        return GridPixels(source=slide, reader=read)


@dataclass(frozen=True, kw_only=True)
class ScanPixels:
    """The pixels of an image or volume that is not open yet; it travels to the workers.

    Attributes:
        path: Absolute path.
        frame: Which of a planar image with several.
        time_points: Which of a volume with several.
        prepared: How its pixels become those of the grid.
    """

    path: Path
    frame: int | None
    time_points: tuple[int, ...] | None
    prepared: Preparation

    def open(self, *, shared: bool = False) -> GridPixels:
        """Open the file or series on the machine on which this is called; return its pixels.

        Args:
            shared: means nothing here.

        Raises:
            SourceError: it cannot be read.
        """
        from wsi_pipeline.sources.radiology.preprocess import open_scan

        axes = len(self.prepared.shape)
        scan = open_scan(self.path, axes=axes, frame=self.frame, time_points=self.time_points)

        def read(start: Shape, shape: Shape, _: list[Region]) -> Pixels:
            return self.prepared.read(scan, start, shape)

        return GridPixels(source=scan, reader=read)


PixelSource = SlidePixels | ScanPixels
