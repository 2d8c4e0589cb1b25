"""Polygons burnt into a boolean array."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import shapely
from shapely import MultiPolygon, Polygon

from wsi_pipeline.files.threads import quiet_gdal


def rasterise(
    polygons: Iterable[Polygon | MultiPolygon],
    shape: tuple[int, int],
    *,
    origin: tuple[float, float] = (0.0, 0.0),
    downsample: float | tuple[float, float] = 1.0,
    touched: bool = False,
) -> npt.NDArray[np.bool_]:
    """Mark the pixels whose centre lies in a polygon, holes left out; return bool (h, w).

    Args:
        polygons: Polygons in level-0 pixels, (x, y); may overlap.
        origin: (y, x) of the result's top-left corner in level-0 pixels.
        downsample: level-0 pixels per pixel of the result, one number or (y, x).
        touched: mark each pixel of which a polygon covers a part.

    Example:
        >>> rasterise([shapely.box(1, 0, 3, 1)], (2, 4)).astype(int)
        array([[0, 1, 1, 0],
               [0, 0, 0, 0]])
    """
    # brings GDAL, which would triple the time to import this package
    import rasterio.features

    fy, fx = downsample if isinstance(downsample, tuple) else (downsample, downsample)
    (height, width), (y, x) = shape, origin
    window = shapely.box(x, y, x + width * fx, y + height * fy)
    seen = [polygon for polygon in polygons if polygon.intersects(window) and polygon.area > 0]
    if not seen or height == 0 or width == 0:
        return np.zeros(shape, dtype=bool)
    transform = rasterio.Affine(fx, 0.0, x, 0.0, fy, y)
    with quiet_gdal():
        burnt = rasterio.features.rasterize(
            seen, out_shape=shape, transform=transform, dtype=np.uint8, all_touched=touched
        )
    return np.asarray(burnt, dtype=bool)
