"""GeoJSON geometries turned into shapely ones: by QuPath's rules, or as kindly as possible."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from shapely import LineString, MultiLineString, MultiPoint, MultiPolygon, Point, Polygon
from shapely.geometry.base import BaseGeometry

from wsi_pipeline.errors import AnnotationError

Positions = npt.NDArray[np.float64]
AREAL_TYPES = ("Polygon", "MultiPolygon")

JAVA_NUMBER = re.compile(
    r"\s*[+-]?(NaN|Infinity|(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[fFdD]?)\s*", re.ASCII
)
"""What Java reads as a number where the JSON has a string."""


def java_number(text: str) -> float | None:
    """Return the number that Java reads in a string, or None."""
    return float(text.strip().rstrip("fFdD")) if JAVA_NUMBER.fullmatch(text) else None


def build(geometry: object) -> BaseGeometry:
    """Turn a GeoJSON geometry into a shapely one by QuPath's rules; return it, valid or not.

    Raises:
        AnnotationError: QuPath would refuse it before looking at its shape; the message is a
            sentence.
    """
    if not isinstance(geometry, Mapping):
        raise AnnotationError("The feature has no geometry.")
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        raise AnnotationError("QuPath 0.6 and later take no GeometryCollection.")
    if not isinstance(kind, str) or kind not in _BUILDERS:
        raise AnnotationError(f"{kind!r} is no type of a geometry.")
    coordinates = geometry.get("coordinates")
    if not isinstance(coordinates, list):
        raise AnnotationError(f"The {kind} has no list of coordinates.")
    return _BUILDERS[kind](coordinates)


def build_polygons(geometry: object) -> list[Polygon]:
    """Return the polygons of a geometry, valid or not, with open rings closed.

    Other types give none; a GeometryCollection gives those of its members.

    Raises:
        AnnotationError: its coordinates are no numbers, or not nested as its type wants.
    """
    parts: list[object] = []
    waiting = [geometry]
    while waiting:
        item = waiting.pop()
        if not isinstance(item, Mapping):
            continue
        kind = item.get("type")
        if kind == "Polygon":
            parts.append(item.get("coordinates"))
        elif kind == "MultiPolygon":
            parts.extend(_list(item.get("coordinates"), "MultiPolygon"))
        elif kind == "GeometryCollection":
            waiting.extend(reversed(_list(item.get("geometries"), "geometry")))
    polygons = []
    for part in parts:
        rings = [positions(ring) for ring in _list(part, "Polygon")]
        # Fewer positions have no area, whatever else is there.
        if rings and len(rings[0]) >= 3:
            polygons.append(Polygon(rings[0], [hole for hole in rings[1:] if len(hole) >= 3]))
    return [polygon for polygon in polygons if not polygon.is_empty]


def positions(value: object) -> Positions:
    """Return the positions of a line, ring or MultiPoint as (n, 2) float64, all finite.

    Raises:
        AnnotationError: something else; the message is a sentence.
    """
    items = _list(value, "line of positions")
    try:
        xy = np.array(items, dtype=np.float64)
    # ragged, or not all of them numbers
    except (TypeError, ValueError, OverflowError):
        xy = np.array([_position(item) for item in items])
    if len(xy) == 0:
        return np.empty((0, 2))
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise AnnotationError("A position is no list of two numbers.")
    # QuPath reads a third number of a position, and forgets it.
    xy = xy[:, :2]
    with np.errstate(over="ignore"):
        if not np.isfinite(xy.astype(np.float32)).all():
            raise AnnotationError("A coordinate is NaN or beyond float32.")
    return xy


def _position(item: object) -> tuple[float, float]:
    """Return one position; to QuPath a string with a number in it is a number too."""
    if not isinstance(item, list) or len(item) < 2:
        raise AnnotationError("A position is no list of two numbers.")
    x, y = (_number(part) for part in item[:2])
    return x, y


def _number(value: object) -> float:
    if isinstance(value, str) and (number := java_number(value)) is not None:
        return number
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return float("inf")
    raise AnnotationError(f"A coordinate is {str(value)[:20]!r}, which is no number.")


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise AnnotationError(f"Where a {what} should be there is no list.")
    return value


def _line(coordinates: object) -> LineString:
    xy = positions(coordinates)
    if len(xy) == 1:
        raise AnnotationError("A line has only one position.")
    return LineString(xy)


def _polygon(coordinates: object) -> Polygon:
    rings = [positions(ring) for ring in _list(coordinates, "Polygon")]
    for xy in rings:
        if len(xy) and (xy[0] != xy[-1]).any():
            raise AnnotationError("A ring is not closed: its last position differs from its first.")
        if len(xy) in (1, 2):
            raise AnnotationError(f"A ring has only {len(xy)} positions.")
    shell, *holes = rings or [np.empty((0, 2))]
    if len(shell) == 0 and any(map(len, holes)):
        raise AnnotationError("The polygon has holes in an empty shell.")
    return Polygon(shell, [hole for hole in holes if len(hole)])


_BUILDERS: Mapping[str, Callable[[list[object]], BaseGeometry]] = {
    "Point": lambda coordinates: Point(positions([coordinates])[0]),
    "MultiPoint": lambda coordinates: MultiPoint(positions(coordinates)),
    "LineString": _line,
    "MultiLineString": lambda coordinates: MultiLineString(list(map(_line, coordinates))),
    "Polygon": _polygon,
    "MultiPolygon": lambda coordinates: MultiPolygon(list(map(_polygon, coordinates))),
}
