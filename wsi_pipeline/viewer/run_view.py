"""A finished run of a slide or image as a page asks for it: tiles of its pixels and its mask."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsi_pipeline.errors import SourceError, StoreError
from wsi_pipeline.export import MaskLike
from wsi_pipeline.export.ome_zarr import open_finished
from wsi_pipeline.geometry import Region, box_slices
from wsi_pipeline.patch_grid import open_patch_grid
from wsi_pipeline.report.record import FILES, GREY, RUN_FILE, Run, load_run
from wsi_pipeline.run.finished import of_this_version, open_levels_of, open_scan_of, open_slide_of
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources import Slide, SlideView
from wsi_pipeline.sources.radiology.image import Image as PlanarImage
from wsi_pipeline.tissue.quality import QUALITIES
from wsi_pipeline.viewer.base import ShownRun, told_in
from wsi_pipeline.viewer.cut import COLORS, PALETTE, Cut, Thresholds, open_cut
from wsi_pipeline.viewer.polygons import Polygons, load_polygons
from wsi_pipeline.viewer.volume import ShownVolume, open_shown_volume

TILE = 512
"""Side of a tile in px: a chunk of the mask has four, and a screen a dozen."""
MOST_REDUCED = 16
"""Stored pixels per pixel, each way, up to which tiles are computed; the thumbnail is coarser."""
JPEG_QUALITY = 85
HATCH = 16
"""px between the lines over what cannot be read."""
POLYGONS = "annotations.geojson"

Pixels = npt.NDArray[np.uint8]
Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureView:
    """A level of a picture in memory, to be read as a `SlideView` is.

    Attributes:
        pixels: uint8 (y, x, 3).
        downsample: (y, x) pixels of the picture per pixel.
    """

    pixels: Pixels
    downsample: tuple[float, float]

    @property
    def shape(self) -> Pair:
        """Return (y, x)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def read(self, start: Pair, shape: Pair, *, bad: list[Region] | None = None) -> Pixels:
        """Return a rectangle that lies inside; there is nothing that cannot be read."""
        return self.pixels[box_slices(start, shape)]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownPicture(ShownRun):
    """A finished run of a slide or an image, opened; close it.

    Attributes:
        slide: opened, where it was found.
        views: of the slide or image, each half as fine as the one before.
        thumbnail: uint8 (h, w, 3), where the run keeps one.
        thumbnail_downsample: (y, x) level-0 pixels per pixel of it.
        mask: levels, the whole one first.
        mask_downsample: (y, x) level-0 pixels per pixel of the first.
        quality: levels likewise, where the slide was judged.
        quality_downsample: (y, x) level-0 pixels per pixel of the first.
    """

    slide: Slide | None = None
    views: tuple[SlideView | PictureView, ...] = ()
    thumbnail: Pixels | None = None
    thumbnail_downsample: tuple[float, float] = (1.0, 1.0)
    mask: Sequence[MaskLike] = ()
    mask_downsample: tuple[float, float] = (1.0, 1.0)
    quality: Sequence[MaskLike] = ()
    quality_downsample: tuple[float, float] = (1.0, 1.0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def facts(self) -> dict[str, Any]:
        """Return all that the page has to know before it asks for tiles."""
        return super().facts() | {
            "bounds": self.run.slide.get("bounds"),
            "bad_regions": self.run.bad_regions,
            "tile": TILE,
            "slide": [_level(view.shape, view.downsample) for view in self.views],
            "thumbnail": None
            if self.thumbnail is None
            else _level(self.thumbnail.shape, self.thumbnail_downsample),
            "mask": _levels(self.mask, self.mask_downsample),
            "quality": _levels(self.quality, self.quality_downsample),
            "flaws": [{"name": q.name, "color": q.color} for q in QUALITIES[1:]],
            "polygons": (self.folder / POLYGONS).is_file(),
            "probability": self.cut and self._probability_facts(self.cut),
        }

    def thumbnail_jpeg(self) -> bytes:
        """Return the thumbnail as a JPEG.

        Raises:
            SourceError: none is kept.
        """
        if self.thumbnail is None:
            raise SourceError("this run keeps no thumbnail")
        return _jpeg(self.thumbnail)

    def slide_tile(self, level: int, column: int, row: int) -> bytes:
        """Return a tile of the slide as a JPEG, hatched where the file cannot be read.

        Raises:
            SourceError: there is no such tile.
        """
        if not 0 <= level < len(self.views):
            raise SourceError(f"the slide is shown at {len(self.views)} levels, not at {level}")
        view = self.views[level]
        (y, x), shape = place_of(view.shape, column, row)
        bad: list[Region] = []
        pixels = view.read((y, x), shape, bad=bad)
        for region in bad:
            _hatch(pixels, region, (y, x), view.downsample)
        return _jpeg(pixels)

    def mask_tile(self, level: int, column: int, row: int, *, hidden: frozenset[int]) -> bytes:
        """Return a tile of the mask as a PNG of class indices, in colour, the background clear.

        Args:
            level: 0 = the whole mask.

        Raises:
            SourceError: there is no such tile.
            StoreError: the mask is damaged there.
        """
        if not 0 <= level < len(self.mask):
            raise SourceError(f"the mask has {len(self.mask)} levels, not {level}")
        mask = self.mask[level]
        origin, shape = place_of((mask.shape[0], mask.shape[1]), column, row)
        pixels = self.mask_pixels(level, origin, shape)
        return indexed_png(pixels, list(self.classes.values()), hidden | {0})

    def mask_pixels(self, level: int, origin: Pair, shape: Pair) -> Pixels:
        """Return class indices of a rectangle, (y, x), of a level.

        Raises:
            StoreError: the mask is damaged there.
        """
        try:
            return np.array(self.mask[level][box_slices(origin, shape)], np.uint8)
        except Exception as error:
            # codecs raise anything
            raise StoreError(f"the mask is damaged here ({error}); segment again") from error

    def quality_tile(self, level: int, column: int, row: int) -> bytes:
        """Return a tile of what is wrong with the slide as a PNG, in colour, the rest clear.

        Raises:
            SourceError: there is no such tile.
        """
        if not 0 <= level < len(self.quality):
            raise SourceError(f"the quality has {len(self.quality)} levels, not {level}")
        cells = np.asarray(self.quality[level][:])
        pixels = cells[box_slices(*place_of((cells.shape[0], cells.shape[1]), column, row))]
        return indexed_png(pixels, [q.color or (0, 0, 0) for q in QUALITIES], frozenset([0]))

    @cached_property
    def cut(self) -> Cut | None:
        """Return what cuts the mask anew, where the run keeps probabilities and has a mask."""
        return open_cut(self, self.mask[0].shape, self.mask_downsample) if self.mask else None

    def _probability_facts(self, cut: Cut) -> dict[str, Any]:
        levels = [
            _level(level.shape[1:], [d * 2**n for d in cut.downsample])
            for n, level in enumerate(cut.probability.levels)
        ]
        return {"levels": levels, "classes": cut.values, "colors": COLORS}

    def cut_tile(
        self, level: int, column: int, row: int, *, what: int | Thresholds, hidden: frozenset[int]
    ) -> bytes:
        """Return a tile of the probabilities of a class, or of the mask cut anew, as a PNG.

        Args:
            what: channel of the probabilities, or thresholds of all.

        Raises:
            SourceError: there is no such tile or class, or there are no probabilities.
        """
        if (cut := self.cut) is None or not 0 <= level < len(cut.probability.levels):
            raise SourceError(f"there are no probabilities at level {level}")
        height, width = cut.shape(level)
        start, shape = place_of((height, width), column, row)
        if isinstance(what, int):
            return indexed_png(cut.plane(what, level, start, shape), PALETTE, frozenset([0]))
        stop = (start[0] + shape[0], start[1] + shape[1])
        pixels = cut.mask(level, start, stop, what)
        return indexed_png(pixels, list(self.classes.values()), hidden | {0})

    def polygons(self) -> Polygons:
        """Return the polygons, read when they are first asked for.

        Raises:
            AnnotationError: there are none, or they cannot be read.
        """
        with self._lock:
            return self._polygons

    @cached_property
    def _polygons(self) -> Polygons:
        return load_polygons(
            self.folder / POLYGONS,
            offset=self.run.frame.get("offset", (0, 0)),
            classes=self.classes,
        )


Shown = ShownPicture | ShownVolume


def load_shown(folder: Path) -> Run:
    """Read what a folder says of what was segmented there; return the run.

    Raises:
        StoreError: no run, or one that names nothing.
    """
    run = load_run(folder / RUN_FILE)
    if "path" not in run.slide:
        raise StoreError(f"{folder / RUN_FILE} names no slide; segment the slide again")
    return run


def open_shown(folder: Path, path: Path | None = None) -> Shown:
    """Open a run; return it with what of it can be shown.

    Args:
        path: where the slide, image or volume is now; None = where it was. It must then be the
            right one.

    Raises:
        StoreError: no run, or nothing of it can be shown.
        SourceError: `path` is no slide, image or volume, or another one.
    """
    run = load_shown(folder)
    openers: dict[str, Callable[[Path, Run, Path | None], Shown]] = {
        "slide": _open_slide_run,
        "image": _open_image_run,
        "volume": open_shown_volume,
    }
    with of_this_version(folder):
        return openers[run.kind](folder, run, path)


def _open_slide_run(folder: Path, run: Run, path: Path | None) -> ShownPicture:
    store, problems = RunStore(folder=folder), list[str]()
    found: dict[str, Any] = {}
    with ExitStack() as closing:
        # without a fingerprint it could not be opened when it was to be segmented
        if "fingerprint" in run.slide:
            with told_in(problems, path):
                slide = closing.enter_context(open_slide_of(folder, run, path))
                found |= {"slide": slide, "views": _views(slide)}
            layers: dict[str, Callable[[], tuple[Sequence[MaskLike], Any]]]
            layers = {"mask": partial(open_levels_of, folder, run)}
            if (cells := folder / FILES["quality"]).is_dir():
                layers["quality"] = partial(open_finished, cells)
            for layer, open_layer in layers.items():
                with told_in(problems):
                    levels, mpp = open_layer()
                    downsample = np.asarray(mpp) / run.slide["mpp"][::-1]
                    found |= {layer: levels, f"{layer}_downsample": tuple(downsample.tolist())}
            # a run may have lost its working folder
            with suppress(StoreError):
                stored = open_patch_grid(store.grid_path)
                if stored.info.fingerprint == run.slide["fingerprint"]:
                    downsample = stored.tissue_downsample
                    found |= {"thumbnail": stored.thumbnail, "thumbnail_downsample": downsample}
        files = closing.pop_all()
    return ShownPicture(folder=folder, run=run, closing=files, problems=tuple(problems), **found)


def _open_image_run(folder: Path, run: Run, path: Path | None) -> ShownPicture:
    problems: list[str] = []
    views: list[PictureView] = []
    mask: Sequence[MaskLike] = ()
    with ExitStack() as closing:
        with told_in(problems, path), open_scan_of(folder, run, path) as scan:
            assert isinstance(scan, PlanarImage)
            views.append(PictureView(pixels=scan.as_rgb(), downsample=(1.0, 1.0)))
        while views and max(views[-1].shape) > TILE:
            half = np.asarray(Image.fromarray(views[-1].pixels).reduce(2))
            views.append(PictureView(pixels=half, downsample=(2.0 ** len(views),) * 2))
        with told_in(problems):
            mask, _ = open_levels_of(folder, run)
    return ShownPicture(
        folder=folder,
        run=run,
        closing=closing,
        problems=tuple(problems),
        views=tuple(views),
        mask=mask,
    )


def _views(slide: Slide) -> tuple[SlideView, ...]:
    """Return views of a slide, the finest first, as far as they are quick to compute."""
    views: list[SlideView] = []
    finest = max(slide.stored_mpp or 0, min(slide.mpp))
    while not views or max(views[-1].shape) > TILE:
        view = slide.at(finest * 2 ** len(views))
        if views and max(view.ratio) > MOST_REDUCED:
            break
        views.append(view)
    return tuple(views)


def _levels(levels: Sequence[MaskLike], downsample: Sequence[float]) -> list[dict[str, Any]]:
    return [_level(of.shape, [d * 2**n for d in downsample]) for n, of in enumerate(levels)]


def _level(shape: tuple[int, ...], downsample: Sequence[float]) -> dict[str, Any]:
    """Return what the page knows of a level, (x, y) as everywhere there, from (y, x)."""
    return {"size": [shape[1], shape[0]], "downsample": list(reversed(downsample))}


def place_of(shape: Pair, column: int, row: int) -> tuple[Pair, Pair]:
    """Return origin and shape of a tile, (y, x), cut off at the edges.

    Raises:
        SourceError: it lies outside.
    """
    origin = (row * TILE, column * TILE)
    if not all(0 <= start < n for start, n in zip(origin, shape, strict=True)):
        raise SourceError(f"no tile {column}, {row}: the level has {shape[1]} × {shape[0]} px")
    height, width = (min(TILE, n - start) for start, n in zip(origin, shape, strict=True))
    return origin, (height, width)


def _hatch(pixels: Pixels, region: Region, origin: Pair, downsample: Sequence[float]) -> None:
    """Draw lines over a part of the slide that lies in a tile."""
    starts = (region.y, region.x)
    stops = (region.y + region.height, region.x + region.width)
    rows, columns = (
        slice(max(math.floor(a / f) - o, 0), max(math.ceil(b / f) - o, 0))
        for a, b, f, o in zip(starts, stops, downsample, origin, strict=True)
    )
    y, x = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
    is_line = (y + origin[0] + x + origin[1]) % HATCH < 2
    pixels[rows, columns][is_line[rows, columns]] = GREY


def indexed_png(
    indices: Pixels, colors: Sequence[tuple[int, ...]], hidden: frozenset[int]
) -> bytes:
    """Return a PNG of indices of colours, of which some are clear."""
    picture = Image.fromarray(indices)
    picture.putpalette([value for color in colors for value in color])
    alpha = bytes(0 if n in hidden else 255 for n in range(len(colors)))
    return _encoded(picture, "PNG", transparency=alpha, compress_level=1)


def _jpeg(pixels: Pixels) -> bytes:
    return _encoded(Image.fromarray(pixels), "JPEG", quality=JPEG_QUALITY)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
