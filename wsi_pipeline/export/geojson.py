"""Write the regions of a mask as QuPath polygons, each checked by QuPath's own rules first."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import shapely

from wsi_pipeline.annotations import mend_polygon, survive_float32
from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.polygons.build import Polygons, map_polygons
from wsi_pipeline.export.polygons.components import Regions
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.geometry import Region

logger = logging.getLogger(__name__)

MANY_REGIONS = 10_000
"""From here on regions are detections, which QuPath paints and edits faster than annotations."""
MANY_VERTICES = 1_000_000
"""Above this QuPath takes more than some seconds to import a file."""
LEFT_OUT = "left out: invalid"
"""How the sentence of a polygon ends that could not be written."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """How regions in mask pixels become features of a slide.

    Attributes:
        classes: classes in the mask's order.
        downsample: level-0 pixels per mask pixel, (y, x).
        mpp: µm per level-0 pixel, (y, x).
        crop: the part of the slide that the viewer shows, in level-0 pixels; its corner becomes
            the origin. None = the whole slide.
        simplify_um: see `wsi_pipeline.options.ExportOptions`.
        min_area_um2: see there.
        namespace: text that makes ids of this slide and model differ from others'.
        metadata: texts that are shown with each object.
        unit: unit of areas; "px^2" where nobody knows how large a pixel is, and `mpp` is 1,000.
    """

    classes: tuple[ClassInfo, ...]
    downsample: tuple[float, float]
    mpp: tuple[float, float]
    crop: Region | None
    simplify_um: float
    min_area_um2: float
    namespace: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    unit: Literal["mm^2", "px^2"] = "mm^2"

    @property
    def mask_mpp(self) -> tuple[float, float]:
        """Return the size of a mask pixel in µm, (y, x)."""
        return self.downsample[0] * self.mpp[0], self.downsample[1] * self.mpp[1]

    @property
    def min_pixels(self) -> float:
        """Return the smallest area that gets a polygon, in mask pixels."""
        return self.min_area_um2 / (self.pixel_mm2 * 1e6)

    @property
    def tolerance(self) -> float:
        """Return the root of the largest triangle to cut off an outline, in mask pixels."""
        # areas count in simplification, so on uneven axes their geometric mean does
        return float(self.simplify_um / (self.pixel_mm2 * 1e6) ** 0.5)

    @property
    def pixel_mm2(self) -> float:
        """Return the area of a mask pixel."""
        return self.mask_mpp[0] * self.mask_mpp[1] * 1e-6


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a GeoJSON file holds.

    Attributes:
        dropped: one sentence for each polygon that could not be written.
    """

    regions: dict[str, int]
    vertices: int
    dropped: list[str]


def write_geojson(
    path: Path, outlines: Outlines, options: FeatureOptions, *, threads: int | None = None
) -> Written:
    """Write one feature a region, in the order of their first pixels; return what was written.

    A region that is cut by the crop, or mended into several polygons, has a feature for each.

    Args:
        outlines: Outlines made with the options' `tolerance` and `min_pixels`.
    """
    value = outlines.regions.value
    # each region's number among those of its class, from 1
    numbers = np.empty(len(value), np.int64)
    for of_class in (np.flatnonzero(value == v) for v in np.unique(value)):
        numbers[of_class] = np.arange(1, len(of_class) + 1)
    make = partial(_make_batch, outlines.regions, numbers, options)
    counts, vertices, dropped = np.zeros(len(options.classes), np.int64), 0, list[str]()
    with written_beside(path) as beside, beside.open("wb") as file:
        file.write(b'{"type":"FeatureCollection","features":[')
        separator = b"\n"
        for features, n_features, n_vertices, sentences in map_polygons(
            outlines, make, threads=threads
        ):
            for feature in features:
                file.write(separator + feature)
                separator = b",\n"
            counts += n_features
            vertices += n_vertices
            dropped += sentences
        file.write(b"\n]}\n")
    if vertices > MANY_VERTICES:
        logger.warning(
            "%s has %d vertices; QuPath imports it slowly: raise --simplify or --min-area",
            path, vertices,
        )  # fmt: skip
    names = (c.name for c in options.classes[1:])
    return Written(
        regions=dict(zip(names, counts[1:].tolist(), strict=True)),
        vertices=vertices,
        dropped=dropped,
    )


def _make_batch(
    regions: Regions,
    numbers: npt.NDArray[np.int64],
    options: FeatureOptions,
    part: slice,
    shapes: Polygons,
) -> tuple[list[bytes], npt.NDArray[np.int64], int, list[str]]:
    """Return features as JSON, how many each class has, their vertices, and what was dropped.

    Args:
        regions: All regions of the mask.
        numbers: Number of each region within its class.
        options: How they become features.
        part: Regions that these are.
        shapes: Polygons of these.
    """
    dropped = list[str]()
    shapes, owner, is_cut = _place(shapes, options)
    shapes, kept = _mend(shapes, dropped)
    shapes, owner, is_cut = shapely.orient_polygons(shapes), owner[kept], is_cut[kept]
    _, first, index, count = np.unique(
        owner, return_index=True, return_inverse=True, return_counts=True
    )
    nth, is_part = np.arange(len(owner)) - first[index], is_cut | (count[index] > 1)
    region = owner + part.start
    area_mm2 = np.where(
        is_part,
        shapely.area(shapes) * options.mpp[1] * options.mpp[0] * 1e-6,
        regions.pixels[region] * options.pixel_mm2,
    )
    columns = (region.tolist(), numbers[region].tolist(), nth.tolist(), area_mm2.tolist())
    features = [
        orjson.dumps(_feature(regions, options, *of), option=orjson.OPT_SERIALIZE_NUMPY)
        for of in zip(*columns, _iter_coordinates(shapes), strict=True)
    ]
    counts = np.bincount(regions.value[region], minlength=len(options.classes))
    return features, counts, int(shapely.get_num_coordinates(shapes).sum()), dropped


def _place(
    shapes: Polygons, options: FeatureOptions
) -> tuple[Polygons, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Put polygons into the viewer's frame; return what it shows of them.

    Returns:
        Polygons; the index of the shape that each comes from, ascending; whether that was cut.
    """
    owner, is_cut = np.arange(len(shapes)), np.zeros(len(shapes), bool)
    # GeoJSON has x before y
    scale, corner = np.array(options.downsample[::-1]), np.zeros(2)
    if (crop := options.crop) is not None:
        corner, size = np.array([crop.x, crop.y], float), np.array([crop.width, crop.height])
        low, high = corner / scale, (corner + size) / scale
        bounds = shapely.bounds(shapes)
        is_cut = (bounds[:, :2] < low).any(axis=1) | (bounds[:, 2:] > high).any(axis=1)
        seen = shapely.intersection(shapes[is_cut], shapely.box(*low, *high))
        parts, index = shapely.get_parts(seen, return_index=True)
        is_areal = shapely.area(parts) > 0
        owner = np.concatenate([owner[~is_cut], owner[is_cut][index[is_areal]]])
        order = np.argsort(owner, kind="stable")
        shapes = np.concatenate([shapes[~is_cut], parts[is_areal]])[order]
        owner = owner[order]
    # + 0.0 makes -0.0 0
    placed = shapely.transform(shapes, lambda xy: np.round(xy * scale - corner, 2) + 0.0)
    return placed, owner, is_cut[owner]


def _mend(shapes: Polygons, dropped: list[str]) -> tuple[Polygons, npt.NDArray[np.int64]]:
    """Mend polygons that QuPath would not take; return all, and the index of what each was.

    One sentence for each that cannot be mended is added to `dropped`.
    """
    sound = survive_float32(shapes)
    if sound.all():
        return shapes, np.arange(len(shapes))
    parts = [
        [shape] if is_sound else mend_polygon(shape)
        for is_sound, shape in zip(sound.tolist(), shapes, strict=True)
    ]
    for shape in shapes[[not of_shape for of_shape in parts]]:
        x, y = shape.bounds[:2]
        dropped.append(f"a polygon of {shape.area:.2f} px² at ({x:.2f}, {y:.2f}) {LEFT_OUT}")
        logger.warning("%s", dropped[-1])
    mended = np.array([part for of_shape in parts for part in of_shape], object)
    return mended, np.repeat(np.arange(len(parts)), [len(of_shape) for of_shape in parts])


def _feature(
    regions: Regions,
    options: FeatureOptions,
    region: int,
    number: int,
    nth: int,
    area_mm2: float,
    coordinates: list[npt.NDArray[Any]],
) -> dict[str, Any]:
    """Return the feature of the nth polygon of a region, which is that number in its class."""
    info = options.classes[int(regions.value[region])]
    y, x = regions.first[region].tolist()
    identity = uuid.uuid5(uuid.NAMESPACE_OID, f"{options.namespace}/{info.name}/{y},{x}/{nth}")
    # QuPath keeps float32
    measurements = {f"Area {options.unit}": float(f"{area_mm2:.7g}")}
    if regions.probability is not None:
        measurements["Mean probability"] = round(float(regions.probability[region]), 4)
    return {
        "type": "Feature",
        "id": str(identity),
        "geometry": {"type": "Polygon", "coordinates": coordinates},
        "properties": {
            "objectType": "detection" if len(regions) > MANY_REGIONS else "annotation",
            "name": f"{info.name} {number}" + (f", part {nth + 1}" if nth else ""),
            "isLocked": True,
            "classification": {"name": info.name, "color": list(info.color or (128, 128, 128))},
            "measurements": measurements,
            "metadata": dict(options.metadata),
        },
    }


def _iter_coordinates(shapes: Polygons) -> Iterator[list[npt.NDArray[Any]]]:
    """Yield the rings of each polygon, (n, 2), whole numbers as such."""
    if len(shapes) == 0:
        return
    _, xy, (rings, polygons) = shapely.to_ragged_array(shapes)
    for first, stop in itertools.pairwise(polygons.tolist()):
        of_rings = rings[first : stop + 1]
        places = xy[of_rings[0] : of_rings[-1]]
        is_whole = (places == np.rint(places)).all()
        points = places.astype(np.int64) if is_whole else places
        yield [points[a:b] for a, b in itertools.pairwise((of_rings - of_rings[0]).tolist())]
