"""Polygons for regions of interest, tissue and truth, out of whatever GeoJSON people have."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import shapely
from shapely import Polygon
from shapely.affinity import translate

from wsi_pipeline.annotations.classes import REGION_CLASS, is_ignored, is_number
from wsi_pipeline.annotations.document import (
    GEOMETRY_TYPES,
    iter_nested,
    parse_document,
    properties_of,
    read_bytes,
)
from wsi_pipeline.annotations.geometry import mend_polygon
from wsi_pipeline.annotations.shapes import AREAL_TYPES, build_polygons
from wsi_pipeline.errors import AnnotationError, raised_as

logger = logging.getLogger(__name__)

NO_GEOMETRY = "feature without geometry"
BATCH = 200
"""Features that are built together; Python's collector slows down with what larger ones hold."""
OWN_HEAD = b'{"type":"FeatureCollection","features":['
"""First line of the files that this package writes; each feature then has a line."""

Shapes = npt.NDArray[np.object_]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One area drawn or exported by somebody.

    Attributes:
        polygon: valid, with an area, in level-0 pixels, (x, y).
        name: that the object has, "" for none.
        feature: which of the file's features it is of, nested ones counted, from 0.
    """

    polygon: Polygon
    class_name: str | None
    name: str = ""
    feature: int = 0


def read_polygons(
    path: str | Path, *, offset: tuple[float, float] = (0.0, 0.0)
) -> list[Annotation]:
    """Read the areas of a GeoJSON file, a MultiPolygon as one area a part; return them.

    Takes QuPath's dialects of all ages and those of other programs. Points, lines and what lies on
    another plane of a stack than the first are left out, self-crossing outlines are mended; the log
    says so.

    Args:
        offset: (x, y) added to every position: the slide's bounds where the file is in the frame
            of a QuPath that crops to them.

    Raises:
        AnnotationError: the file cannot be read, holds no GeoJSON, or areas of other planes only.
    """
    path = Path(path)
    with raised_as(AnnotationError, AnnotationError, path):
        document = parse_document(read_bytes(path))
    if document.losses and not document.features:
        raise AnnotationError(
            f"{path}: expected a GeoJSON FeatureCollection, Feature or geometry. "
            f"{' '.join(document.losses)}"
        )
    found: list[Annotation] = []
    elsewhere, without_area = Counter[str](), Counter[str]()
    for number, (index, feature) in enumerate(iter_nested(document.features)):
        geometry = feature.get("geometry") if isinstance(feature, Mapping) else None
        kind = geometry.get("type") if isinstance(geometry, Mapping) else NO_GEOMETRY
        if kind not in (*AREAL_TYPES, "GeometryCollection"):
            # a strange word as Python shows it: it may hold what no line of a log can
            without_area[kind if kind in (*GEOMETRY_TYPES, NO_GEOMETRY) else repr(kind)] += 1
        where, told = f"{path}, feature {index}", properties_of(feature)
        name = told.get("name")
        with raised_as(AnnotationError, AnnotationError, where):
            areas = []
            for polygon in build_polygons(geometry):
                areas += [polygon] if polygon.is_valid else mend_polygon(polygon)
                if not polygon.is_valid:
                    logger.warning("%s: mended an outline that crosses or touches itself", where)
        if plane := _plane_of(geometry):
            elsewhere[plane] += len(areas)
        else:
            moved = areas if offset == (0.0, 0.0) else [translate(a, *offset) for a in areas]
            found += [
                Annotation(
                    polygon=polygon,
                    class_name=class_name_of(told),
                    name=name.strip() if isinstance(name, str) else "",
                    feature=number,
                )
                for polygon in moved
            ]
    if planes := +elsewhere:
        counts = ", ".join(f"{count} on {plane}" for plane, count in sorted(planes.items()))
        reason = f"left out areas on other planes than the first, z 0 and t 0: {counts}"
        if not found:
            raise AnnotationError(f"{path}: {reason}; none is left")
        logger.warning("%s: %s", path, reason)
    if without_area:
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(without_area.items()))
        logger.warning("%s: left out %s, which have no area", path, what)
    return found


def iter_polygons(path: Path) -> Iterator[tuple[Shapes, list[Mapping[str, Any]], int]]:
    """Yield polygons as the file has them, the feature of each, and how many features were damaged.

    A MultiPolygon gives several polygons; what has no area gives none.

    Raises:
        AnnotationError: the file cannot be read, or is no GeoJSON.
    """
    features = _iter_features(path)
    while batch := list(itertools.islice(features, BATCH)):
        shapes, owner, n_damaged = _build([feature.get("geometry") for feature in batch])
        yield shapes, [batch[i] for i in owner], n_damaged


def read_region(
    path: str | Path,
    *,
    offset: tuple[float, float] = (0.0, 0.0),
    size: tuple[int, int] | None = None,
) -> list[Polygon]:
    """Read the region that a GeoJSON file stands for; return its polygons, which may overlap.

    It is made of the areas of QuPath's class `Region*` where there are any, else of all areas. What
    lies in an area of another class that ends in `*`, such as `Ignore*`, is cut out.

    Args:
        size: (width, height) of the slide's level 0, for regions that must lie on it.

    Raises:
        AnnotationError: the file cannot be read, or no area is left, or none lies on the slide.
    """
    found = read_polygons(path, offset=offset)
    regions = [a.polygon for a in found if a.class_name == REGION_CLASS]
    inside = regions or [a.polygon for a in found if not is_ignored(a.class_name)]
    if not inside:
        classes = ", ".join(sorted({str(a.class_name) for a in found}))
        raise AnnotationError(
            f"{path} holds no areas{f' but those of {classes}' if found else ''}; "
            "expected polygons around what counts"
        )
    # The name of `Region*` ends in the mark of what is ignored, too.
    ignored = shapely.union_all(
        [a.polygon for a in found if is_ignored(a.class_name) and a.class_name != REGION_CLASS]
    )
    shapely.prepare(ignored)
    left = [p.difference(ignored) if ignored.intersects(p) else p for p in inside]
    # Where areas only touch, cutting leaves lines and points.
    parts = [part for part in shapely.get_parts(left) if isinstance(part, Polygon) and part.area]
    if not parts:
        raise AnnotationError(f"{path} holds no areas but what its ignored ones cover")
    if size is not None:
        on_slide = shapely.area(shapely.intersection(parts, shapely.box(0, 0, *size)))
        if not on_slide.any():
            west, north, east, south = shapely.total_bounds(parts)
            raise AnnotationError(
                f"{path}: no area lies on the slide of {size[0]} × {size[1]} px: they span x "
                f"{west:.0f} to {east:.0f}, y {north:.0f} to {south:.0f}; expected level-0 pixels "
                "of this slide"
            )
    return parts


def _plane_of(geometry: object) -> str:
    """Return the plane of a stack on which QuPath has a geometry, "" for the first."""
    plane = geometry.get("plane") if isinstance(geometry, Mapping) else None
    if not isinstance(plane, Mapping):
        return ""
    axes = {axis: plane.get(axis) for axis in ("z", "t")}
    return ", ".join(f"{axis} {n:g}" for axis, n in axes.items() if is_number(n) and n > 0)


def class_name_of(properties: Mapping[str, object]) -> str | None:
    """Return the class that properties name, in QuPath's words or those of other programs."""
    classification = properties.get("classification")
    if isinstance(classification, Mapping):
        names = classification.get("names")
        derived = ": ".join(map(str, names)) if isinstance(names, list) else None
        candidates = [classification.get("name"), derived]
    else:
        # The Digital Slide Archive has a label, bare or in an object, and a group.
        label = properties.get("label")
        label = label.get("value") if isinstance(label, Mapping) else label
        candidates = [classification, label, properties.get("group")]
    names_given = (name.strip() for name in candidates if isinstance(name, str))
    return next((name for name in names_given if name), None)


def _build(geometries: list[Any]) -> tuple[Shapes, list[int], int]:
    """Return polygons, the index of the geometry that each is of, and how many of these fail."""
    with suppress(AttributeError, KeyError, TypeError, ValueError, shapely.GEOSException):
        return _build_alike(geometries), list(range(len(geometries))), 0
    shapes, owner, n_damaged = list[shapely.Polygon](), list[int](), 0
    for i, geometry in enumerate(geometries):
        try:
            parts = build_polygons(geometry)
        except AnnotationError:
            n_damaged += 1
            continue
        shapes += parts
        owner += [i] * len(parts)
    return np.array([*shapes, None], object)[:-1], owner, n_damaged


def _build_alike(geometries: list[Any]) -> Shapes:
    """Return polygons, all in one go, in a fraction of the time.

    Raises:
        Exception: of several kinds, unless all are polygons as RFC 7946 wants them.
    """
    if any(geometry["type"] != "Polygon" for geometry in geometries):
        raise ValueError("not all of them are polygons")
    polygons = [geometry["coordinates"] for geometry in geometries]
    rings = [ring for polygon in polygons for ring in polygon]
    xy = np.array([place for ring in rings for place in ring], np.float64)
    if xy.shape[1:] != (2,) or not np.isfinite(xy).all() or not all(polygons):
        raise ValueError("places are no pairs of numbers")
    ends = (np.cumsum([0, *map(len, rings)]), np.cumsum([0, *map(len, polygons)]))
    return np.asarray(shapely.from_ragged_array(shapely.GeometryType.POLYGON, xy, ends))


def _iter_features(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the features of a file; of those that this package writes, one at a time in memory."""
    try:
        with path.open("rb") as file:
            if file.readline().rstrip() == OWN_HEAD:
                for line in file:
                    if line.startswith(b"{"):
                        yield orjson.loads(line.rstrip(b",\r\n"))
                return
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise AnnotationError(
            f"{path} is damaged: {error}; write it again with `export`"
        ) from error
    with raised_as(AnnotationError, AnnotationError, path):
        features = parse_document(read_bytes(path)).features
    for _, feature in iter_nested(features):
        if isinstance(feature, Mapping):
            yield feature
