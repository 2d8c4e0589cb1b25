"""Write a GeoJSON file again so that QuPath imports it and keeps what is written."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely
from shapely import MultiPolygon
from shapely.errors import GEOSException
from shapely.geometry.base import BaseGeometry

from wsi_pipeline.annotations.check import (
    FILE_NAMES,
    PROPERTY_CHECKS,
    TYPE_KEYS,
    check_feature,
    check_geometry,
    check_id,
    check_type,
    id_of,
)
from wsi_pipeline.annotations.classes import (
    color_of,
    is_number,
    names_of,
    parse_hex,
    rgb_of,
    unpack,
)
from wsi_pipeline.annotations.document import (
    GEOMETRY_TYPES,
    iter_nested,
    parse_document,
    properties_of,
    read_bytes,
)
from wsi_pipeline.annotations.geometry import mend_polygon, moved_by_qupath
from wsi_pipeline.annotations.shapes import AREAL_TYPES, build, build_polygons, java_number
from wsi_pipeline.colors import QUPATH_COLORS, RGB
from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.files.atomic import sweep, written_beside

Feature = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """One thing that the mended file has otherwise than the original.

    Attributes:
        index: place of the feature in the original, from 0; None for the file as a whole.
    """

    index: int | None
    id: str | None
    action: Literal["changed", "dropped"]
    reason: str


def mend_geojson(path: str | Path, out: str | Path) -> list[Repair]:
    """Write what QuPath can keep of a GeoJSON file to `out`; return what was changed or dropped.

    A feature without complaint is written as it was. The result is strict JSON that
    `check_geojson` has nothing to say about; it appears whole or not at all.

    Args:
        out: Gzipped where the name ends in .gz; an existing file is replaced.

    Raises:
        AnnotationError: `path` cannot be read or holds no JSON, or `out` cannot be written.
    """
    path, out = Path(path), Path(out)
    if not out.name.lower().endswith(FILE_NAMES):
        raise AnnotationError(f"{out}: QuPath takes only files that end in {', '.join(FILE_NAMES)}")
    try:
        document = parse_document(read_bytes(path))
    except AnnotationError as error:
        raise AnnotationError(f"{path} cannot be mended. {error}") from error
    repairs = [
        Repair(index=None, id=None, action="changed", reason=reason)
        for reason in (*document.liberties, *document.losses)
    ]
    colors: dict[str, RGB] = dict(QUPATH_COLORS)
    try:
        sweep(out)
        with written_beside(out) as partial, partial.open("wb") as raw, ExitStack() as stack:
            file: Any = raw
            if out.name.lower().endswith(".gz"):
                # Without name and time, so that the same input gives the same bytes.
                file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
            separator = b'{"type":"FeatureCollection","features":[\n'
            for index, feature in enumerate(document.features):
                mended, repair = _mend_feature(feature, index, colors)
                repairs += [repair] if repair else []
                if mended is not None:
                    file.write(separator + _encode(mended))
                    separator = b",\n"
            file.write(b"\n]}\n" if separator == b",\n" else separator + b"]}\n")
    except OSError as error:
        raise AnnotationError(f"cannot write {out}: {error.strerror}") from error
    except RecursionError as error:
        raise AnnotationError(f"{path} cannot be mended: it is nested too deeply") from error
    return repairs


def _encode(feature: Feature) -> bytes:
    """Return strict JSON in UTF-8; numbers that JSON lacks are left out of foreign members."""

    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    try:
        text = dump(feature)
    except ValueError:
        text = dump(_without_nan(feature))
    # half a surrogate pair has no UTF-8
    return text.encode("utf-8", "replace")


def _without_nan(value: Any) -> Any:
    def is_json(value: object) -> bool:
        return not isinstance(value, float) or is_number(value)

    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items() if is_json(v)}
    if isinstance(value, list):
        # a list keeps its length, which may mean something, as a colour's does
        return [_without_nan(item) if is_json(item) else None for item in value]
    return value


def _mend_feature(
    feature: object, index: int, colors: dict[str, RGB]
) -> tuple[Feature | None, Repair | None]:
    """Return the feature as it is to be written, None to drop it, and what was done to it."""
    reasons = [finding.reason for finding in check_feature(feature, index=index)]
    # a class that was not seen before gets its colour; others may have another one here
    for _, item in iter_nested([feature]):
        classification = properties_of(item).get("classification")
        name, rgb = ": ".join(names_of(classification)), _readable_color(classification)
        settled = colors.setdefault(name, rgb or color_of(name)) if name else None
        if name and rgb is not None and rgb != settled:
            reasons.append(f"QuPath already has another color for class {name!r}, and keeps it.")
    if isinstance(feature, Mapping) and not reasons:
        return {**feature, "type": "Feature"}, None

    def repaired(action: Literal["changed", "dropped"], why: list[str]) -> Repair:
        return Repair(index=index, id=id_of(feature), action=action, reason=" ".join(why))

    mended = _rebuild(feature, str(index), colors)
    if mended is None:
        return None, repaired("dropped", reasons)
    # For one feature that is still wrong QuPath would refuse all of them: it is dropped.
    left = [finding.reason for finding in check_feature(mended, index=index)]
    return (None, repaired("dropped", left)) if left else (mended, repaired("changed", reasons))


def _readable_color(classification: object) -> RGB | None:
    """Return a class's colour as it was meant: also "#rrggbb", packed, or beyond 0–255."""
    color = classification.get("color") if isinstance(classification, Mapping) else None
    if isinstance(color, str):
        return parse_hex(color)
    if isinstance(color, list) and len(color) in (3, 4) and all(map(is_number, color)):
        red, green, blue = (min(max(round(value), 0), 255) for value in color[:3])
        return red, green, blue
    return unpack(int(color)) if is_number(color) else rgb_of(classification)


def _rebuild(feature: object, place: str, colors: Mapping[str, RGB]) -> Feature | None:
    """Return the feature with everything mended that QuPath complains about, or None."""
    if not isinstance(feature, Mapping):
        return None
    if feature.get("type") in GEOMETRY_TYPES:
        feature = {"geometry": feature}
    result: Feature = {**feature, "type": "Feature"}
    geometry = _mend_geometry(feature.get("geometry"))
    if geometry is None:
        return None
    result["geometry"] = geometry
    if "nucleusGeometry" in result:
        _put(result, "nucleusGeometry", _mend_geometry(result["nucleusGeometry"]))
    if any(check_id(feature)):
        identity = id_of(feature)
        # a UUID that the same file always gets
        told = f"{place}/{(identity or '').encode('utf-8', 'replace')!r}"
        _put(result, "id", None if identity is None else str(uuid.uuid5(uuid.NAMESPACE_OID, told)))
    if "properties" in feature:
        result["properties"] = _mend_properties(properties_of(feature), place, colors)
    return result


def _put(target: Feature, key: str, value: object) -> None:
    """Set a member, or take it out where there is no value for it."""
    if value is None:
        del target[key]
    else:
        target[key] = value


def _mend_geometry(geometry: object) -> Feature | None:
    """Return a geometry that QuPath keeps, or None where nothing is left of it."""
    if not isinstance(geometry, Mapping):
        return None
    if not any(check_geometry(geometry)):
        return dict(geometry)
    shape: BaseGeometry
    try:
        if geometry.get("type") in (*AREAL_TYPES, "GeometryCollection"):
            polygons = build_polygons(geometry)
            parts = mend_polygon(polygons[0] if len(polygons) == 1 else MultiPolygon(polygons))
            shape = parts[0] if len(parts) == 1 else MultiPolygon(parts)
        else:
            # with the decimals that QuPath keeps: two, or none far out
            whole = build(geometry)
            shape = shapely.transform(whole, lambda xy: xy.round(2))
            if moved_by_qupath(shapely.get_coordinates(shape)).any():
                shape = shapely.transform(whole, np.round)
    except (AnnotationError, GEOSException, ValueError):
        return None
    if shape.is_empty:
        return None
    foreign = {k: v for k, v in geometry.items() if k not in ("coordinates", "geometries")}
    written = _plain(shapely.geometry.mapping(shape)["coordinates"])
    return {**foreign, "type": shape.geom_type, "coordinates": written}


def _plain(value: Any) -> Any:
    """Return coordinates as lists, whole numbers without a decimal point."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return int(value) if value == int(value) else value


def _mend_properties(
    properties: Mapping[str, Any], place: str, colors: Mapping[str, RGB]
) -> Feature:
    result: Feature = dict(properties)
    for key, mend in _PROPERTY_MENDERS.items():
        if key in result and any(PROPERTY_CHECKS[key](result[key])):
            _put(result, key, mend(result[key]))
    if "classification" in result:
        # in QuPath's own form where it is refused or has a colour of its own
        classification = result["classification"]
        names, rgb = names_of(classification), _readable_color(classification)
        is_settled = rgb is None or rgb == colors.get(": ".join(names))
        if not is_settled or any(PROPERTY_CHECKS["classification"](classification)):
            name = {"name": names[0]} if len(names) == 1 else {"names": names}
            told = {**name, "color": list(colors[": ".join(names)])} if names else None
            _put(result, "classification", told)
    for key in TYPE_KEYS:
        if key in result and any(check_type(result[key])):
            _put(result, key, "annotation" if result[key] == "root" else None)
    for key in ("childObjects", "children"):
        if isinstance(result.get(key), list):
            mended = (_rebuild(c, f"{place}.{i}", colors) for i, c in enumerate(result[key]))
            result[key] = [child for child in mended if child is not None]
    return result


def _mend_measurements(measurements: object) -> dict[str, float]:
    """Return the measurements that are numbers to float32."""
    if isinstance(measurements, list):
        entries = [(e.get("name"), e.get("value")) for e in measurements if isinstance(e, Mapping)]
    else:
        entries = list(measurements.items()) if isinstance(measurements, Mapping) else []
    result = {}
    for name, value in entries:
        value = java_number(value) if isinstance(value, str) else value
        if isinstance(name, str) and is_number(value):
            with np.errstate(over="ignore"):
                # From 2²⁴ on float32 has no longer all whole numbers: what it has is written.
                kept = float(np.float32(value)) if abs(value) >= 2**24 else value
            if is_number(kept) and not any(PROPERTY_CHECKS["measurements"]({name: kept})):
                result[name] = kept
    return result


_PROPERTY_MENDERS: Mapping[str, Callable[[Any], object]] = {
    "name": lambda name: None,
    "color": lambda color: parse_hex(color) if isinstance(color, str) else None,
    "measurements": _mend_measurements,
    # nested values as JSON text
    "metadata": lambda metadata: {
        key: json.dumps(_without_nan(value)) if isinstance(value, list | dict) else value
        for key, value in metadata.items()
        if value is not None
    },
}
