"""GeoJSON files as they come: gzip or not, BOM or not, collection, array, Feature or geometry."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.errors import AnnotationError

GEOMETRY_TYPES = (
    "Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon",
    "GeometryCollection",
)  # fmt: skip
MOST_PACKED = 64
"""Bytes of JSON for one of gzip: ten are usual."""
LEAST_ROOM = 1 << 26
"""Bytes that any gzip may unpack to."""
GZIP_MAGIC = b"\x1f\x8b"

_STRING_OR_TRAILING_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[\]}])')


@dataclass(frozen=True, kw_only=True)
class Document:
    """The content of a GeoJSON file.

    Attributes:
        features: features as parsed, not yet checked; a bare geometry comes wrapped in a Feature.
        liberties: how the text departs from strict JSON, a sentence each.
        losses: what QuPath drops or garbles outside of features, a sentence each.
    """

    features: tuple[object, ...]
    liberties: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file as stored.

    Raises:
        AnnotationError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror}") from error


def parse_document(raw: bytes) -> Document:
    """Parse the bytes of a GeoJSON file, gzipped or not; return its features.

    Raises:
        AnnotationError: broken gzip or broken JSON; the message is a sentence without the file's
            name.
    """
    if raw.startswith(b"PK\x03\x04"):
        raise AnnotationError(
            "A zip archive must be unpacked first: QuPath loses its bad entries without a word."
        )
    # What a bomb holds is known only once it is unpacked: room is given by its own size.
    data, room = raw, LEAST_ROOM + MOST_PACKED * len(raw)
    if raw.startswith(GZIP_MAGIC):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
                data = packed.read(room + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise AnnotationError(f"The gzip data are damaged or cut off: {error}.") from error
    if len(data) > room:
        raise AnnotationError(
            f"The gzip data unpack to more than {MOST_PACKED} times their size: no coordinates do."
        )
    losses = []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8-sig", errors="replace")
        losses.append(f"Byte {error.start} is not UTF-8: QuPath garbles such letters.")
    root, liberties = _parse_json(text)
    features, skipped = _features_of(root)
    return Document(
        features=tuple(features), liberties=tuple(liberties), losses=(*losses, *skipped)
    )


def _parse_json(text: str) -> tuple[object, list[str]]:
    """Return the parsed JSON and the liberties it takes."""
    constants: dict[str, None] = {}

    def note_constant(token: str) -> float:
        constants[token] = None
        return float(token)

    def parse(source: str) -> object:
        return json.loads(source, parse_constant=note_constant)

    liberties = []
    try:
        try:
            root = parse(text)
        except json.JSONDecodeError:
            # After the strict try only: the search goes through each string of the file.
            repaired = _STRING_OR_TRAILING_COMMA.sub(lambda m: m[0].lstrip(","), text)
            root = parse(repaired if repaired != text else text)
            liberties.append("The JSON has trailing commas.")
    except json.JSONDecodeError as error:
        raise AnnotationError(
            f"This is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError as error:
        raise AnnotationError("The JSON is nested too deeply to be GeoJSON.") from error
    # Python refuses integers of thousands of digits
    except ValueError as error:
        raise AnnotationError(f"A number in the JSON is beyond all bounds: {error}.") from error
    return root, liberties + [f"The JSON has the token {token}." for token in constants]


def _features_of(root: object) -> tuple[list[object], list[str]]:
    """Return the features that QuPath would look at, and what it would skip in silence."""
    features: list[object] = []
    skipped: list[str] = []
    waiting = [root]
    while waiting:
        item = waiting.pop()
        kind = item.get("type") if isinstance(item, Mapping) else None
        if isinstance(item, list):
            waiting.extend(reversed(item))
        elif isinstance(item, Mapping) and kind == "FeatureCollection":
            members = item.get("features")
            if isinstance(members, list):
                features.extend(members)
            else:
                skipped.append("The FeatureCollection has no list of features: nothing is in it.")
        elif kind == "Feature":
            features.append(item)
        elif kind in GEOMETRY_TYPES:
            features.append({"type": "Feature", "geometry": item})
        else:
            what = f"of type {kind!r}" if kind is not None else "without a GeoJSON type"
            skipped.append(f"QuPath skips an element {what}.")
    return features, skipped


def properties_of(feature: object) -> Mapping[str, object]:
    """Return the properties of a feature, empty where it has none."""
    properties = feature.get("properties") if isinstance(feature, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def iter_nested(features: Iterable[object]) -> Iterator[tuple[int, object]]:
    """Yield every feature, each followed by its children, with the index of the outermost one."""
    for index, feature in enumerate(features):
        waiting = [feature]
        while waiting:
            item = waiting.pop()
            yield index, item
            properties = properties_of(item)
            key = "childObjects" if "childObjects" in properties else "children"
            children = properties.get(key)
            waiting.extend(reversed(children) if isinstance(children, list) else ())
