"""Write the regions of a mask as QuPath polygons, each checked by QuPath's own rules first."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsi_pipeline.annotations import mend_polygon, survives_float32
from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.polygons import Regions, iter_parts, outlines
from wsi_pipeline.grid import Region
from wsi_pipeline.store import written_beside

logger = logging.getLogger(__name__)

MANY_REGIONS = 10_000
"""From here on regions are detections, which QuPath paints and edits faster than annotations."""
MANY_VERTICES = 1_000_000
"""Above this QuPath takes more than some seconds to import a file."""
BATCH = 2_000
"""Regions that are turned to text at a time."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How regions in mask pixels become features of a slide.

    Attributes:
        classes: in the mask's order.
        downsample: (x, y) level-0 pixels per mask pixel.
        mpp: (x, y) µm per level-0 pixel.
        crop: the part of the slide that the viewer shows, in level-0 pixels; its corner becomes
            the origin. None = the whole slide.
        simplify_um: see `wsi_pipeline.options.ExportOptions`.
        min_area_um2: see there.
        namespace: what makes ids of this slide and model differ from others'.
        metadata: shown with each object.
    """

    classes: tuple[ClassInfo, ...]
    downsample: tuple[float, float]
    mpp: tuple[float, float]
    crop: Region | None
    simplify_um: float
    min_area_um2: float
    namespace: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def mask_mpp(self) -> tuple[float, float]:
        """Return (x, y) µm per mask pixel."""
        return self.downsample[0] * self.mpp[0], self.downsample[1] * self.mpp[1]

    @property
    def min_pixels(self) -> float:
        """Return the smallest area that gets a polygon, in mask pixels."""
        return self.min_area_um2 / (self.pixel_mm2 * 1e6)

    @property
    def pixel_mm2(self) -> float:
        """Return the area of a mask pixel."""
        return self.mask_mpp[0] * self.mask_mpp[1] * 1e-6


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a GeoJSON file holds.

    Attributes:
        regions: features per class name.
        vertices: in all.
        dropped: one sentence for each polygon that could not be written.
    """

    regions: dict[str, int]
    vertices: int
    dropped: list[str]


def write_geojson(path: Path, regions: Regions, dialect: Dialect) -> Written:
    """Write one feature a region, in the order of their first pixels; return what was written.

    Args:
        path: the file, which appears whole or not at all.
        regions: of the mask.
        dialect: how to write them.
    """
    regions = regions.at_least(dialect.min_pixels)
    # areas count in simplification, so on uneven axes their geometric mean does
    tolerance = dialect.simplify_um / (dialect.pixel_mm2 * 1e6) ** 0.5
    shapes = outlines(regions, tolerance=tolerance, min_hole=dialect.min_pixels)
    counts = {c.name: 0 for c in dialect.classes[1:]}
    vertices, dropped = 0, list[str]()
    with written_beside(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        separator = "\n"
        for index, part, polygon in _iter_polygons(shapes, dialect, dropped):
            info = dialect.classes[int(regions.value[index])]
            counts[info.name] += 1
            vertices += shapely.get_num_coordinates(polygon)
            feature = _feature(regions, index, part, polygon, counts[info.name], dialect)
            file.write(separator + json.dumps(feature, ensure_ascii=False, allow_nan=False))
            separator = ",\n"
        file.write("\n]}\n")
    if vertices > MANY_VERTICES:
        logger.warning(
            "%s has %d vertices; QuPath imports it slowly: raise --simplify or --min-area",
            path, vertices,
        )  # fmt: skip
    return Written(regions=counts, vertices=vertices, dropped=dropped)


def _iter_polygons(
    shapes: npt.NDArray[np.object_], dialect: Dialect, dropped: list[str]
) -> Iterator[tuple[int, int, Any]]:
    """Yield region, part and polygon in the viewer's frame, valid in QuPath's precision."""
    crop = dialect.crop
    box = shapely.box(crop.x, crop.y, crop.x + crop.width, crop.y + crop.height) if crop else None
    corner = (crop.x, crop.y) if crop else (0, 0)
    for first in range(0, len(shapes), BATCH):
        placed = shapely.transform(
            shapes[first : first + BATCH], lambda xy: np.round(xy * dialect.downsample, 2)
        )
        for index, whole in enumerate(placed, start=first):
            parts = list(iter_parts(whole, box))
            moved = shapely.transform(parts, lambda xy: np.round(xy - corner, 2)) if crop else parts
            sound = [p for m in moved for p in _sound(m, dropped)]
            for part, polygon in enumerate(sound):
                yield index, part, shapely.orient_polygons(polygon)


def _sound(polygon: Any, dropped: list[str]) -> list[Any]:
    if survives_float32(polygon):
        return [polygon]
    mended = mend_polygon(polygon)
    if not mended:
        x, y = polygon.bounds[:2]
        dropped.append(
            f"a polygon of {polygon.area:.2f} px² at ({x:.2f}, {y:.2f}) left out: invalid"
        )
        logger.warning("%s", dropped[-1])
    return list(mended)


def _feature(
    regions: Regions, index: int, part: int, polygon: Any, number: int, dialect: Dialect
) -> dict[str, Any]:
    info = dialect.classes[int(regions.value[index])]
    y, x = regions.first[index].tolist()
    identity = uuid.uuid5(uuid.NAMESPACE_OID, f"{dialect.namespace}/{info.name}/{y},{x}/{part}")
    many = len(regions) > MANY_REGIONS
    return {
        "type": "Feature",
        "id": str(identity),
        "geometry": {"type": "Polygon", "coordinates": _coordinates(polygon)},
        "properties": {
            "objectType": "detection" if many else "annotation",
            "name": f"{info.name} {number}",
            "isLocked": True,
            "classification": {"name": info.name, "color": list(info.color or (128, 128, 128))},
            "measurements": {
                "Area mm^2": _significant(int(regions.pixels[index]) * dialect.pixel_mm2),
                "Mean probability": round(float(regions.probability[index]), 4),
            },
            "metadata": dict(dialect.metadata),
        },
    }


def _significant(value: float) -> float:
    return float(f"{value:.7g}")  # QuPath keeps float32


def _coordinates(polygon: Any) -> list[list[list[float]]]:
    return [
        [[_number(x), _number(y)] for x, y in ring.coords]
        for ring in (polygon.exterior, *polygon.interiors)
    ]


def _number(value: float) -> float:
    return int(value) if value == int(value) else round(value, 2)
