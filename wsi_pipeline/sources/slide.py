"""A slide: what its file says of it, and views of it at any resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wsi_pipeline.errors import SourceError
from wsi_pipeline.geometry import Region
from wsi_pipeline.options import Frame
from wsi_pipeline.sources.base import Backend, Downsamples, Opened, Pixels, Sizes
from wsi_pipeline.sources.levels import Levels
from wsi_pipeline.sources.view import FINEST, SlideView, ratio_of

WHOLE_TOLERANCE = 1e-3
"""A ratio this close to a whole number is taken as whole: µm per pixel are not known better."""


def frame_offset(bounds: Region | None, frame: Frame) -> tuple[int, int]:
    """Return (x, y) of a viewer's origin in level-0 pixels: QuPath crops slides to their bounds."""
    return (0, 0) if frame == "openslide" or bounds is None else (bounds.x, bounds.y)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slide(Opened):
    """An opened slide; close it, or use it in a `with`.

    Attributes:
        mpp: (x, y) µm per level-0 pixel.
        fingerprint: Hex digest of the content, whatever the file's name and date.
        first_doubts: Those of `doubts` that were known when it was opened.
        stored_mpp: µm per stored pixel where the source is a patch grid, which knows no finer one.
    """

    path: Path
    mpp: tuple[float, float]
    mpp_source: str
    fingerprint: str
    first_doubts: tuple[str, ...] = ()
    stored_mpp: float | None = None
    pixels: Backend
    levels: Levels = field(init=False)

    def __post_init__(self) -> None:
        """Look at the levels whose size does not tell how coarse they are."""
        object.__setattr__(self, "levels", Levels(self.pixels))

    @property
    def doubts(self) -> tuple[str, ...]:
        """Return sentences on what makes its µm per pixel, its picture or its levels doubtful.

        There may be more once a level has been used.
        """
        return (*self.first_doubts, *self.levels.doubts)

    @property
    def backend(self) -> str:
        """Return the name of the library that reads the file."""
        return self.pixels.name

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) of level 0."""
        return self.pixels.size

    @property
    def level_sizes(self) -> Sizes:
        """Return (width, height) of each stored level that shows the slide."""
        return tuple(self.levels.level_sizes[n] for n in self.levels.usable())

    @property
    def level_downsamples(self) -> Downsamples:
        """Return (x, y) level-0 pixels per pixel of each stored level that shows the slide."""
        return tuple(self.levels.level_downsamples[n] for n in self.levels.usable())

    @property
    def properties(self) -> Mapping[str, str]:
        """Return what the file says about itself, in the libraries' words."""
        return self.pixels.properties

    @property
    def bounds(self) -> Region | None:
        """Return the scanned part in level-0 pixels, where the file gives all of it as integers."""
        names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
        try:
            x, y, width, height = (int(self.properties[name]) for name in names)
        except (KeyError, ValueError):
            return None
        return Region(x=x, y=y, width=width, height=height)

    def at(self, mpp: float, *, tolerance: float = 0.0) -> SlideView:
        """Look at the slide at a resolution; return the view.

        It is computed from the coarsest stored level that is fine enough: by the mean of n × n
        pixels where the ratio to that level is whole or nearly so, else by a triangle filter.

        Args:
            tolerance: Relative deviation from `mpp` up to which a whole ratio is preferred.

        Raises:
            SourceError: a patch grid that was stored coarser than `mpp`.
        """
        if not 0 < mpp < math.inf:
            raise ValueError(f"mpp is {mpp}; expected µm per pixel above 0")
        tolerance = max(tolerance, WHOLE_TOLERANCE)
        # (y, x), as arrays are.
        wanted = (mpp / self.mpp[1], mpp / self.mpp[0])
        level = self._level_for(wanted, tolerance)
        dx, dy = self.levels.level_downsamples[level]
        if self.stored_mpp is not None and math.isclose(mpp, self.stored_mpp, rel_tol=1e-6):
            ratio = (1.0, 1.0)
        else:
            ratio = (ratio_of(wanted[0] / dy, tolerance), ratio_of(wanted[1] / dx, tolerance))
        if self.stored_mpp is not None and min(ratio) < 1:
            raise SourceError(
                f"{self.path}: stored at {self.stored_mpp:g} µm/px, {mpp:g} is asked for; "
                f"tile the slide again with --mpp {mpp:g}"
            )
        if min(ratio) < FINEST:
            raise SourceError(
                f"{self.path}: {mpp:g} µm/px is far finer than its {self.mpp[0]:g} µm/px"
            )
        return self._view(level, ratio)

    def read(self, region: Region, mpp: float, *, bad: list[Region] | None = None) -> Pixels:
        """Read a region at a resolution; return uint8 (h, w, 3), the whole pixels that cover it.

        The region may lie outside. `bad` is that of `SlideView.read`.
        """
        view = self.at(mpp)
        fy, fx = view.downsample
        y0, x0 = math.floor(region.y / fy), math.floor(region.x / fx)
        y1 = math.ceil((region.y + region.height) / fy)
        x1 = math.ceil((region.x + region.width) / fx)
        return view.read((y0, x0), (y1 - y0, x1 - x0), bad=bad)

    def thumbnail(self, max_side: int) -> tuple[Pixels, tuple[float, float]]:
        """Shrink the slide; return uint8 (h, w, 3), and (fy, fx) level-0 pixels per pixel of it.

        Neither side exceeds `max_side` px. Stored tiles that cannot be read are taken from another
        level, or white.

        Raises:
            SourceError: half of the slide or more cannot be read.
        """
        factor = max(self.size) / max_side
        level = self._level_for((factor, factor), 0.0)
        whole = max(1, math.ceil(factor / min(self.levels.level_downsamples[level])))
        view = self._view(level, (float(whole), float(whole)))
        bad: list[Region] = []
        pixels = view.read((0, 0), view.shape, bad=bad)
        if 2 * sum(part.width * part.height for part in bad) >= math.prod(self.size):
            # Without a list of bad tiles it says why.
            view.read((0, 0), view.shape)
        return pixels, view.downsample

    def close(self) -> None:
        """Give the file back."""
        self.pixels.close()

    def _level_for(self, wanted: tuple[float, float], tolerance: float) -> int:
        """Return the coarsest level that is not coarser than `wanted` (y, x)."""
        while True:
            downsamples = self.levels.level_downsamples
            fine = [
                level
                for level in self.levels.usable()
                if downsamples[level][1] <= wanted[0] * (1 + tolerance)
                and downsamples[level][0] <= wanted[1] * (1 + tolerance)
            ]
            level = max(fine, key=lambda level: sum(downsamples[level]), default=0)
            # It may turn out to be none, or coarser than its file says.
            if self.levels.check(level) and self.levels.level_downsamples == downsamples:
                return level

    def _view(self, level: int, ratio: tuple[float, float]) -> SlideView:
        dx, dy = self.levels.level_downsamples[level]
        width, height = self.size
        fy, fx = ratio[0] * dy, ratio[1] * dx
        return SlideView(
            shape=(math.ceil(height / fy), math.ceil(width / fx)),
            downsample=(fy, fx),
            level=level,
            ratio=ratio,
            backend=self.levels,
        )
