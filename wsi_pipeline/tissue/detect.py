"""Where on a slide there is tissue, and which patches are worth predicting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from wsi_pipeline.annotations import rasterise, read_region
from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.files.formats import DRIVERS, HEAD, kind_by_head
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.sources.decoded import opened

Mask = npt.NDArray[np.bool_]
Plane = npt.NDArray[np.float32]
Edges = npt.NDArray[np.int64]
Boxes = tuple[Edges, Edges, Edges, Edges]

MIN_HUE = 0.12
"""Colourfulness over density: below it a pixel is grey, however dark."""

BEST_MPP = 8.0
"""µm per pixel at which tissue is looked for: nuclei have melted into tissue, its edges have not.

Finer thumbnails are shrunk to about this.
"""

SMOOTH_UM = 5.0
"""Gaussian that takes the noise of sensor and JPEG away before colours are compared."""

CLOSE_UM = 40.0
"""Gaps up to twice this are bridged: the walls of fat cells are a net, not a surface."""

MIN_COLOUR, MAX_COLOUR = 0.012, 0.02
"""Bounds of the colourfulness that tells tissue from glass, in optical density.

Otsu's threshold alone follows the strongest stain and loses the palest tissue.
"""

MIN_AREA_UM2, MAX_HOLE_UM2 = 10_000.0, 50_000.0
"""Smaller pieces are dust; smaller holes are filled."""

BAND_PX = 1 << 23
"""Pixels of a mask image that are held at a time."""


def find_tissue(thumbnail: npt.NDArray[np.uint8], mpp: float) -> Mask:
    """Find stained tissue on a thumbnail; return bool (h, w).

    Stain is coloured and takes light away in proportion to its amount; so in optical density, the
    logarithm of glass over pixel, its hue does not depend on its strength. Tissue is what is more
    colourful than glass there, and neither black nor of a pen's hue. Shadows, scratches, black
    borders and most hairs are grey, and go.

    Args:
        thumbnail: Picture, uint8 (h, w, 3), at 8 to 10 µm per pixel or finer.
        mpp: Size of a pixel in µm.
    """
    (height, width), factor = thumbnail.shape[:2], max(1, round(BEST_MPP / mpp))
    if factor > 1:
        thumbnail, mpp = np.asarray(Image.fromarray(thumbnail).reduce(factor)), mpp * factor
    # optical density, smoothed: log10(glass ÷ pixel) of each colour, 0 for glass
    sigma, planes = SMOOTH_UM / mpp, []
    for channel, glass in enumerate(glass_colour(thumbnail)):
        values = thumbnail[..., channel].astype(np.float32)
        # less than 0.3 px is no smoothing at all
        if sigma >= 0.3:
            values = ndimage.gaussian_filter(values, sigma, mode="nearest")
        density = np.log10(np.float32(float(glass) + 1) / (values + 1))
        planes.append(np.asarray(density.clip(0), dtype=np.float32))
    red, green, blue = planes
    strength = np.maximum(np.maximum(red, green), blue)
    colour = strength - np.minimum(np.minimum(red, green), blue)
    threshold = MAX_COLOUR
    if colour.min() < colour.max():
        otsu = float(threshold_otsu(colour))  # type: ignore[no-untyped-call]
        threshold = min(max(otsu, MIN_COLOUR), MAX_COLOUR)
    is_coloured = (colour > threshold) & (colour > MIN_HUE * strength)
    tissue = is_coloured & ~_is_foreign(red, green, blue, mpp)
    # gaps are closed, edges gain nothing
    if reach := round(CLOSE_UM / mpp):
        padded = np.pad(tissue, reach, mode="edge")
        steps = np.arange(-reach, reach + 1)
        # skimage.morphology has one, too, but loads scipy.spatial.
        disk = steps**2 + steps[:, None] ** 2 <= reach**2
        closed = ndimage.binary_closing(padded, disk)
        tissue = np.asarray(closed[reach:-reach, reach:-reach])
    # Holes first: a piece counts with what it surrounds.
    tissue = ~_large_pieces(~tissue, MAX_HOLE_UM2 / mpp**2)
    tissue = _large_pieces(tissue, MIN_AREA_UM2 / mpp**2)
    return tissue.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width]


def read_tissue(
    path: str | Path,
    size: tuple[int, int],
    shape: tuple[int, int],
    downsample: tuple[float, float],
    *,
    offset: tuple[float, float] = (0.0, 0.0),
) -> Mask:
    """Read tissue that somebody else found; return bool (h, w) at thumbnail scale.

    Args:
        path: polygons as GeoJSON, or a mask image, whose pixels above 0 are tissue and which is
            stretched over the slide.
        size: (width, height) of the slide at level 0.
        shape: (h, w) of the thumbnail.
        downsample: (y, x) level-0 pixels per pixel of the thumbnail.
        offset: (x, y) level-0 pixels of the origin of the polygons' frame.

    Raises:
        AnnotationError: a file that cannot be read, or that does not fit the slide.
    """
    path = Path(path)
    if _is_geojson(path):
        region = read_region(path, offset=offset, size=size)
        # where a pixel's centre decides, an area can be too small to count
        return rasterise(region, shape, downsample=downsample, touched=True)
    with _opened_mask(path) as mask:
        width, height = mask.width, mask.height
        if abs(width - height * size[0] / size[1]) > max(1.0, 0.02 * width):
            raise AnnotationError(
                f"{path}: {width} × {height} px do not fit a slide of {size[0]} × {size[1]} px; "
                "the mask must show the whole slide, its sides in the same proportion"
            )
        # thumbnail pixels in pixels of the mask, (y, x)
        scale = downsample[0] * height / size[1], downsample[1] * width / size[0]
        y, x = (np.arange(n) for n in shape)
        y0, y1 = _outward(y * scale[0], (y + 1) * scale[0], height)
        x0, x1 = _outward(x * scale[1], (x + 1) * scale[1], width)
        found = np.empty(shape, bool)
        # in bands of rows, each of which is decoded once: GDAL would begin a PNG again to go back
        band = max(1, int(BAND_PX / width / scale[0]))
        rows, top = np.empty((0, width), bool), 0
        for first in range(0, shape[0], band):
            part = slice(first, first + band)
            start, stop = int(y0[part][0]), int(y1[part][-1])
            rows = np.concatenate([rows[start - top :], _inside(mask, top + len(rows), stop)])
            top = start
            boxes = y0[part, None] - top, x0[None], y1[part, None] - top, x1[None]
            found[part] = box_sums(rows, boxes) > 0
    return found


def check_tissue(path: Path) -> None:
    """Refuse a file of tissue that fits no slide.

    Raises:
        AnnotationError: it cannot be read, or holds no area.
    """
    if _is_geojson(path):
        read_region(path)
        return
    with _opened_mask(path):
        pass


def _is_geojson(path: Path) -> bool:
    return bool({".json", ".geojson"} & {suffix.lower() for suffix in path.suffixes})


def select_patches(
    tissue: Mask,
    tissue_downsample: tuple[float, float],
    grid: PatchGrid,
    grid_downsample: tuple[float, float],
    *,
    least: float = 0.0,
) -> Mask:
    """Find the patches that hold tissue; return (n,) bool.

    Args:
        tissue: bool (h, w) at thumbnail scale.
        tissue_downsample: (y, x) level-0 pixels per pixel of `tissue`.
        grid_downsample: (y, x) level-0 pixels per grid pixel.
        least: Share of a patch that its tissue exceeds.
    """
    boxes = patch_boxes(grid, grid_downsample, tissue.shape, tissue_downsample)
    y0, x0, y1, x1 = boxes
    return np.asarray(box_sums(tissue, boxes) > least * (y1 - y0) * (x1 - x0))


def patch_boxes(
    grid: PatchGrid,
    grid_downsample: tuple[float, float],
    shape: tuple[int, ...],
    downsample: tuple[float, float],
) -> Boxes:
    """Return y0, x0, y1 and x1 of the thumbnail's pixels that each patch touches.

    Args:
        grid_downsample: (y, x) level-0 pixels per grid pixel.
        shape: (h, w) of the thumbnail.
        downsample: (y, x) level-0 pixels per pixel of it.
    """
    scale = np.array(grid_downsample) / np.array(downsample)
    starts = grid.origins * scale
    stops = (grid.origins + np.array(grid.patch_size)) * scale
    y0, y1 = _outward(starts[:, 0], stops[:, 0], shape[0])
    x0, x1 = _outward(starts[:, 1], stops[:, 1], shape[1])
    return y0, x0, y1, x1


def _outward(
    starts: npt.NDArray[np.float64], stops: npt.NDArray[np.float64], length: int
) -> tuple[Edges, Edges]:
    """Return the first and one past the last whole pixel that each interval touches."""
    first = np.clip(np.floor(starts), 0, length - 1).astype(np.int64)
    last = np.clip(np.ceil(stops), first + 1, length).astype(np.int64)
    return first, last


def box_sums(plane: Mask | npt.NDArray[np.float64], boxes: Boxes) -> npt.NDArray[np.float64]:
    """Return the sum of a plane over each rectangle [y0, y1) × [x0, x1), whole ones exactly."""
    sums = np.zeros((plane.shape[0] + 1, plane.shape[1] + 1))
    np.cumsum(plane, axis=0, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    y0, x0, y1, x1 = boxes
    return np.asarray(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0])


@contextmanager
def _opened_mask(path: Path) -> Iterator[Any]:
    """Yield GDAL's data set of a mask image, whose errors are those of a file that is none."""
    from rasterio.errors import RasterioError

    try:
        with path.open("rb") as file:
            driver = DRIVERS.get(kind_by_head(file.read(HEAD)))
        if driver == "JPEG":
            raise AnnotationError(
                f"{path}: JPEG blurs a mask's edges and its zeros; save the mask as PNG"
            )
        if driver is None:
            raise ValueError("neither PNG nor TIFF")
        with opened(path, driver) as dataset:
            yield dataset
    except (OSError, ValueError, RasterioError) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(
            f"{path}: no mask image ({error}); give a PNG, a TIFF or a GeoJSON file"
        ) from error


def _inside(mask: Any, start: int, stop: int) -> Mask:
    """Return where rows of a mask image are above 0 in any of their colours, bool (h, w)."""
    from rasterio.enums import ColorInterp

    if start >= stop:
        return np.empty((0, mask.width), bool)
    bands = mask.read(window=((start, stop), (0, mask.width)))
    if mask.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES":
        bits = int(mask.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8 * bands.itemsize))
        bands = (1 << bits) - 1 - bands
    is_alpha = np.array([colour is ColorInterp.alpha for colour in mask.colorinterp])
    return np.asarray((bands[~is_alpha] > 0).any(axis=0) & (bands[is_alpha] > 0).all(axis=0))


def glass_colour(thumbnail: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the colour of empty glass: of the brightest near-grey pixels, where there are some."""
    red, green, blue = np.moveaxis(thumbnail, 2, 0)
    darkest = np.minimum(np.minimum(red, green), blue)
    brightest = np.maximum(np.maximum(red, green), blue)
    # 254 and 255 are what programs paint where nothing was scanned
    light = thumbnail[(darkest >= 200) & (brightest - darkest <= 30) & (darkest < 254)]
    if len(light) < max(16, 0.002 * darkest.size):
        return np.full(3, 245, dtype=np.float32)
    brightness = light.sum(axis=1, dtype=np.int32)
    top = light[brightness >= np.percentile(brightness, 99) - 3 * 8]
    return np.asarray(np.median(top, axis=0), dtype=np.float32)


def _is_foreign(red: Plane, green: Plane, blue: Plane, mpp: float) -> Mask:
    """Return where black, or the ink of a pen, hides the stain."""
    base = green + np.float32(1e-3)
    # where hardly any red and green light is left there is a black or dark blue pen, a border of
    # the scan, or a fluorescence slide; haematoxylin never takes so much at this scale
    dark = (red > 0.75) & (green > 0.75)
    # no stain takes more red than green light; haematoxylin comes near
    cool = (red > 1.3 * base) & (red > 0.03)
    # a red pen has the hue of blood, but strokes are larger than pools
    crimson = (red < 0.2 * base) & (blue > 0.64 * base) & (green > 0.1)
    labels, count = ndimage.label(crimson)
    surely = np.bincount(labels[(red < 0.16 * base) & (green > 0.35)], minlength=count + 1)
    mostly = surely >= 0.25 * np.bincount(labels.ravel(), minlength=count + 1)
    mostly[0] = False
    strokes = _large_pieces(mostly[labels], 50_000 / mpp**2)
    # where it runs dry it is paler, and has the hue of blood or muscle: what hangs on to a stroke
    reach, paler = round(400 / mpp), (red < 0.3 * base) & (blue > 0.55 * base) & (green > 0.06)
    if reach and strokes.any():
        strokes = ndimage.binary_dilation(strokes, iterations=reach, mask=strokes | paler)
    # an edge half ink and half glass has a hue between, which may be a stain's
    ink = ndimage.binary_dilation(dark | cool | strokes, iterations=max(1, round(16 / mpp)))
    return np.asarray(ink)


def _large_pieces(mask: Mask, min_px: float) -> Mask:
    """Return the mask without connected pieces of fewer pixels."""
    labels, _ = ndimage.label(mask)
    kept = np.bincount(labels.ravel()) >= min_px
    kept[0] = False
    return np.asarray(kept[labels])
