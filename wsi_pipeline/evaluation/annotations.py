"""Annotated areas, read as a mask at any resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import shapely
from shapely import Polygon, STRtree

from wsi_pipeline.annotations import (
    IGNORED_CLASS,
    REGION_CLASS,
    Annotation,
    is_ignored,
    rasterise,
    read_polygons,
)
from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.evaluation.confusion import IGNORE, Mask
from wsi_pipeline.evaluation.masks import Pair
from wsi_pipeline.files.threads import quiet_gdal
from wsi_pipeline.geometry import Shape
from wsi_pipeline.report.record import UNREADABLE


@dataclass(frozen=True, kw_only=True, eq=False)
class Areas:
    """Annotated areas of one slide, in level-0 pixels.

    Attributes:
        annotations: Those that have a class of their own.
        ignored: Areas that do not count.
        regions: Areas outside of which nothing counts, where there are any.
    """

    path: Path
    annotations: tuple[Annotation, ...]
    ignored: tuple[Polygon, ...] = ()
    regions: tuple[Polygon, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the classes that occur, sorted."""
        return tuple(sorted({a.class_name for a in self.annotations if a.class_name}))

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Return (min_x, min_y, max_x, max_y) of all areas, zeros where there are none."""
        shapes = [a.polygon for a in self.annotations] + [*self.ignored, *self.regions]
        if not shapes:
            return 0.0, 0.0, 0.0, 0.0
        x0, y0, x1, y1 = shapely.total_bounds(shapes)
        return float(x0), float(y0), float(x1), float(y1)


def load_areas(path: Path, *, offset: Pair = (0.0, 0.0), renamed: Mapping[str, str]) -> Areas:
    """Read a GeoJSON file of annotations; return its areas.

    Args:
        offset: (x, y) added to every position, as in `read_polygons`.
        renamed: New names of classes; "" names areas without a class.

    Raises:
        AnnotationError: not readable, or areas without a class that nothing names.
    """
    found = read_polygons(path, offset=offset)
    annotations, ignored, regions = [], [], []
    nameless = 0
    for area in found:
        name = renamed.get(area.class_name or "", area.class_name)
        if name == REGION_CLASS:
            regions.append(area.polygon)
        elif is_ignored(name) or name == UNREADABLE.name:
            ignored.append(area.polygon)
        elif name is None:
            nameless += 1
        else:
            annotations.append(Annotation(polygon=area.polygon, class_name=name))
    if nameless:
        raise AnnotationError(
            f"{path}: {nameless} of {len(found)} areas have no class; give them one in QuPath, "
            f"{IGNORED_CLASS} where none fits (`evaluate` names them all with --rename =CLASS)"
        )
    return Areas(path=path, annotations=(*annotations,), ignored=(*ignored,), regions=(*regions,))


class AreaReader:
    """Areas as class indices, wherever they are asked for.

    Where areas of several classes overlap the smallest lies on top, as QuPath draws them.

    Args:
        indices: Class index by name; other classes are `others`.
        others: Index of areas whose class is not in `indices`.
        outside: Index of what lies in no area.
    """

    downsample = None

    def __init__(
        self, areas: Areas, indices: Mapping[str, int], *, others: int = 0, outside: int = 0
    ) -> None:
        ordered = sorted(areas.annotations, key=lambda a: -a.polygon.area)
        self._polygons = [a.polygon for a in ordered]
        self._values = [indices.get(a.class_name or "", others) for a in ordered]
        self._tree = STRtree(self._polygons)
        self._areas = areas
        self._outside = outside

    def read(self, origin: Shape, shape: Shape, downsample: Pair) -> Mask:
        """Return the class index at the centre of each pixel, (h, w) uint8.

        Args:
            origin: (y, x) of the first pixel.
            downsample: (y, x) level-0 pixels per pixel.
        """
        # brings GDAL: would triple the time to import this package
        import rasterio.features

        (fy, fx), (height, width) = downsample, shape
        y, x = origin[0] * fy, origin[1] * fx
        seen = [(self._polygons[i], self._values[i]) for i in self._near(origin, shape, downsample)]
        seen = [(polygon, value) for polygon, value in seen if polygon.area > 0]
        mask = np.full((height, width), self._outside, np.uint8)
        if seen:
            transform = rasterio.Affine(fx, 0.0, x, 0.0, fy, y)
            # What comes later in the list lies on top.
            with quiet_gdal():
                rasterio.features.rasterize(seen, out=mask, transform=transform)
        for polygons, is_judged in ((self._areas.regions, True), (self._areas.ignored, False)):
            if polygons:
                marked = rasterise(polygons, mask.shape, origin=(y, x), downsample=downsample)
                mask[marked != is_judged] = IGNORE
        return mask

    def touches(self, origin: Shape, shape: Shape, downsample: Pair) -> bool:
        """Return whether anything may be known of a rectangle, given as in `read`."""
        if self._near(origin, shape, downsample).size:
            return True
        window = _window(origin, shape, downsample)
        return self._outside != IGNORE and any(map(window.intersects, self._areas.regions))

    def _near(self, origin: Shape, shape: Shape, downsample: Pair) -> npt.NDArray[np.int64]:
        """Return the indices of the polygons that share a point with a rectangle, ascending."""
        window = _window(origin, shape, downsample)
        # The tree has an order of its own; areas are drawn in theirs.
        return np.sort(self._tree.query(window, predicate="intersects"))


def _window(origin: Shape, shape: Shape, downsample: Pair) -> Polygon:
    """Return a rectangle, given as in `AreaReader.read`, in level-0 pixels."""
    (y, x), (height, width), (fy, fx) = origin, shape, downsample
    return shapely.box(x * fx, y * fy, (x + width) * fx, (y + height) * fy)
