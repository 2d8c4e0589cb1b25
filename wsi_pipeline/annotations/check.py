"""Would QuPath import a GeoJSON file, and would it keep what is written?

The rules were found by running the import of QuPath 0.5.1, 0.6.0 and 0.7.0 on made-up files.
One bad feature makes QuPath refuse the whole file, without saying which one it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import shapely
from shapely import MultiPolygon, Polygon
from shapely.errors import GEOSException
from shapely.geometry.base import BaseGeometry

from wsi_pipeline.annotations.classes import is_number, names_of, rgb_of
from wsi_pipeline.annotations.document import (
    GZIP_MAGIC,
    iter_nested,
    parse_document,
    properties_of,
    read_bytes,
)
from wsi_pipeline.annotations.geometry import (
    as_float32,
    as_qupath,
    count_rings,
    is_kept,
    moved_by_qupath,
    survives_float32,
)
from wsi_pipeline.annotations.shapes import JAVA_NUMBER, build
from wsi_pipeline.colors import QUPATH_COLORS, RGB
from wsi_pipeline.errors import AnnotationError

Severity = Literal["refused", "refused by QuPath 0.5", "changed", "not strict"]
Complaint = tuple[Severity, str]

FILE_NAMES = (".geojson", ".json", ".geojson.gz", ".json.gz")
TYPE_KEYS = ("objectType", "object_type", "type")
"""Properties in which QuPath looks for the type of an object; the first one there counts."""

LEGACY_IDS = (
    "PathAnnotationObject", "PathDetectionObject", "PathCellObject", "PathTileObject",
    "TMACoreObject",
)  # fmt: skip
"""What QuPath 0.2 wrote as id; later ones read it as the type."""

UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
VANISHES = "It has no area above 0.01 px: QuPath makes an empty rectangle at (0, 0) of it."


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that QuPath would not take, or not keep as written.

    Attributes:
        index: place of the feature in the file, from 0; None for the file as a whole.
        id: id of the feature, or of the child it is about; None where it has none.
        severity: "refused": QuPath imports nothing of the file; "refused by QuPath 0.5": so does
            0.5, later ones import it; "changed": imported, but not as written; "not strict":
            QuPath reads it, strict JSON parsers do not.
    """

    index: int | None
    id: str | None
    severity: Severity
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `check_geojson` found.

    Attributes:
        n_features: features in the file, children not counted.
        findings: findings in the file's order, those of the file as a whole first.
    """

    n_features: int
    findings: tuple[Finding, ...]

    @property
    def is_refused(self) -> bool:
        """Return whether QuPath 0.6 and later import nothing of the file."""
        return any(finding.severity == "refused" for finding in self.findings)


def check_geojson(path: str | Path) -> Report:
    """Apply QuPath's rules to a GeoJSON file; return what it would refuse or change.

    Raises:
        AnnotationError: the file cannot be read. What its content lacks is a finding.
    """
    path = Path(path)
    raw = read_bytes(path)
    complaints, is_gzip = list[Complaint](), raw.startswith(GZIP_MAGIC)
    # A zip is refused by its content, in a sentence that says why.
    if not path.name.lower().endswith((*FILE_NAMES, ".zip")):
        reason = f"QuPath takes only files that end in {', '.join(FILE_NAMES)}."
        complaints.append(("refused", reason))
    elif not is_gzip and path.name.lower().endswith(".gz"):
        complaints.append(("refused", "The name ends in .gz, but the content is not gzipped."))
    elif is_gzip and not path.name.lower().endswith(".gz"):
        reason = "The content is gzipped, but the name does not end in .gz."
        complaints.append(("refused", reason))
    features: tuple[object, ...] = ()
    try:
        document = parse_document(raw)
    except AnnotationError as error:
        complaints.append(("refused", str(error)))
    else:
        features = document.features
        complaints += [("not strict", liberty) for liberty in document.liberties]
        complaints += [("changed", loss) for loss in document.losses]
    findings = [Finding(index=None, id=None, severity=s, reason=r) for s, r in complaints]
    findings += [f for i, feature in enumerate(features) for f in check_feature(feature, index=i)]
    findings += _check_colors(features)
    findings.sort(key=lambda finding: -1 if finding.index is None else finding.index)
    return Report(n_features=len(features), findings=tuple(findings))


def check_feature(feature: object, *, index: int = 0) -> list[Finding]:
    """Apply QuPath's rules to one parsed feature and its children; return the findings."""
    return [
        Finding(index=index, id=id_of(item), severity=severity, reason=reason)
        for _, item in iter_nested([feature])
        for severity, reason in _check_one(item)
    ]


def id_of(feature: object) -> str | None:
    """Return the id of a feature as text, or None."""
    identity = feature.get("id") if isinstance(feature, Mapping) else None
    return None if _is_no_text(identity) else str(identity)


def _check_one(feature: object) -> Iterator[Complaint]:
    if not isinstance(feature, Mapping):
        yield "refused", f"Where a Feature should be there is {_show(feature)}."
        return
    yield from check_id(feature)
    yield from check_geometry(feature.get("geometry"))
    if "nucleusGeometry" in feature:
        for severity, reason in check_geometry(feature["nucleusGeometry"]):
            yield severity, f"In the nucleus: {reason}"
    if "properties" in feature and not isinstance(feature["properties"], Mapping):
        yield "refused", f"The properties are {_show(feature['properties'])}, not an object."
    properties = properties_of(feature)
    for key, check in PROPERTY_CHECKS.items():
        if key in properties:
            yield from check(properties[key])
    # What has no type QuPath takes for an annotation.
    kind = next((properties[key] for key in TYPE_KEYS if key in properties), "annotation")
    yield from check_type(kind)


def check_id(feature: Mapping[str, object]) -> Iterator[Complaint]:
    """Yield what is wrong with the id beside "type"."""
    if "id" not in feature:
        return
    identity = feature["id"]
    if _is_no_text(identity):
        yield "refused", f"The id is {_show(identity)}; leave it out or give a UUID."
    elif not (isinstance(identity, str) and (UUID.fullmatch(identity) or identity in LEGACY_IDS)):
        yield "changed", f"The id {_show(identity)} is no UUID: QuPath replaces it by a random one."


def check_type(kind: object) -> Iterator[Complaint]:
    """Yield what is wrong with the type of object; an unknown one becomes an annotation."""
    if _is_no_text(kind):
        yield "refused", f"The objectType is {_show(kind)}; leave it out or give a text."
    elif kind == "root":
        yield "refused", "The objectType is root, which only QuPath itself can make."


def check_geometry(geometry: object) -> Iterator[Complaint]:
    """Yield what is wrong with a GeoJSON geometry."""
    try:
        shape = build(geometry)
    except (AnnotationError, GEOSException, ValueError) as error:
        yield "refused", str(error)
        return
    if isinstance(shape, MultiPolygon) and len(shape.geoms) == 1:
        yield (
            "refused by QuPath 0.5",
            "It is a MultiPolygon of one part: write a Polygon, for 0.5 refuses the file.",
        )
    if shape.is_empty:
        yield "changed", VANISHES
        return
    moved = moved_by_qupath(shapely.get_coordinates(shape))
    if moved.any():
        yield (
            "changed",
            f"{moved.sum()} of {len(moved)} positions move: QuPath keeps float32 numbers with "
            "2 decimals.",
        )
    # Lines and points have no rings to mend; what survives needs no second, slower look.
    if not isinstance(shape, Polygon | MultiPolygon) or survives_float32(shape):
        return
    rounded, kept = as_float32(shape), as_qupath(shape)
    if kept is None:
        yield "refused", f"Its outline crosses itself or its parts ({_fault(rounded)})."
    elif kept.is_empty:
        yield "changed", VANISHES
    elif count_rings(kept) != count_rings(rounded):
        yield "changed", f"QuPath turns {_describe(rounded)} into {_describe(kept)}."
    elif not rounded.is_valid:
        yield "changed", f"QuPath mends its outline, or keeps it invalid ({_fault(rounded)})."
    elif not is_kept(rounded, kept):
        yield "changed", f"Its area goes from {rounded.area:.2f} to {kept.area:.2f} px²."


def _fault(shape: BaseGeometry) -> str:
    what, _, where = shapely.is_valid_reason(shape).rstrip("]").partition("[")
    return f"{what.lower()} at {where}" if where else "too small for its shape"


def _describe(shape: BaseGeometry) -> str:
    parts, holes = count_rings(shape)
    return f"{parts} part{'s' * (parts != 1)} with {holes} hole{'s' * (holes != 1)}"


def check_name(name: object) -> Iterator[Complaint]:
    """Yield what is wrong with an object's name."""
    if _is_no_text(name):
        yield "refused", f"The name is {_show(name)}; leave it out or give a text."


def check_color(color: object) -> Iterator[Complaint]:
    """Yield what is wrong with an object's own colour; other lists than [r, g, b] are ignored."""
    if isinstance(color, list) and len(color) == 3 and not all(map(is_number, color)):
        yield "refused", f"The object's color is {_show(color)}, not three numbers."
    if isinstance(color, str | bool) and not re.fullmatch(r"[+-]?\d+", str(color), re.ASCII):
        yield "refused", f"The object's color is {_show(color)}; write [r, g, b]."


def check_classification(classification: object) -> Iterator[Complaint]:
    """Yield what is wrong with a class."""
    if classification is None or classification == {}:
        return
    if isinstance(classification, str):
        yield from _check_class_name(classification)
    elif not isinstance(classification, Mapping):
        yield "refused", f"The classification is {_show(classification)}, not an object."
    elif "colorRGB" in classification or "parentClass" in classification:
        yield from _check_class_names(classification)
        color = classification.get("colorRGB")
        if color is not None and not is_number(color):
            yield "refused", f"colorRGB is {_show(color)}, not a packed integer."
        elif is_number(color) and int(color) >> 24 & 255 == 0:
            yield "changed", f"colorRGB {color} has no opacity: the class is invisible in QuPath."
    elif not classification.keys() & {"name", "names"}:
        yield "refused", "The classification has no name."
    elif "color" not in classification:
        yield "refused", 'The classification has no color; add "color": [r, g, b].'
    else:
        yield from _check_class_names(classification)
        yield from _check_class_color(classification["color"])


def _check_class_names(classification: Mapping[str, object]) -> Iterator[Complaint]:
    name, names = classification.get("name"), classification.get("names")
    if isinstance(name, list | Mapping) or not isinstance(names, list | None):
        yield "refused", "The class's name is no text, or its names are no list."
        return
    if name is not None:
        yield from _check_class_name(str(name))
    for part in names or ():
        if not isinstance(part, str) or ":" in part:
            yield "refused", f"Among the class's names is {_show(part)}: no text, or with a colon."
        else:
            yield from _check_class_name(part)


def _check_class_name(name: str) -> Iterator[Complaint]:
    # QuPath splits at colons and forgets empty parts at the end; of colons alone nothing is left.
    parts = name.rstrip(":").split(":") if name.strip(":") or not name else []
    if any(not part.strip() or re.search(r"[\r\n]", part.strip()) for part in parts):
        yield "refused", f"The class name {_show(name)} is blank or has a line break."
    elif ":" in name:
        yield "changed", f"The colon in class name {_show(name)} makes QuPath derive a class."
    elif name != name.strip():
        yield "changed", f"The class name {_show(name)} loses the blanks around it."


def _check_class_color(color: object) -> Iterator[Complaint]:
    if color is None:
        return
    if not isinstance(color, list) or not all(map(is_number, color)):
        yield "refused", f"The class's color is {_show(color)}; write [r, g, b]."
    # One number alone is a packed colour to QuPath.
    elif len(color) not in (0, 1, 3, 4):
        yield "refused", f"The class's color has {len(color)} numbers; write [r, g, b]."
    elif any(value != int(value) for value in color) or (
        len(color) > 1 and any(not 0 <= value <= 255 for value in color)
    ):
        yield "changed", f"The class's color {_show(color)} is not whole numbers in 0–255."


def check_measurements(measurements: object) -> Iterator[Complaint]:
    """Yield what is wrong with measurements, as an object or as a list of {name, value}."""
    if isinstance(measurements, Mapping):
        for name, value in measurements.items():
            yield from _check_measurement(name, value, words=("nan", "inf", "-inf"))
    elif isinstance(measurements, list):
        for entry in measurements:
            if not isinstance(entry, Mapping) or _is_no_text(entry.get("name")):
                yield "refused", f"A measurement is {_show(entry)}, without name and value."
            elif not isinstance(entry.get("value"), str | int | float) or isinstance(
                entry["value"], bool
            ):
                yield "refused", f"Measurement {_show(entry['name'])} has no number as value."
            else:
                yield from _check_measurement(str(entry["name"]), entry["value"])


def _check_measurement(
    name: str, value: object, *, words: tuple[str, ...] = ()
) -> Iterator[Complaint]:
    if isinstance(value, str):
        if value.lower() not in words and not JAVA_NUMBER.fullmatch(value):
            yield "refused", f"Measurement {_show(name)} is {_show(value)}, which is no number."
    elif isinstance(value, bool) or not isinstance(value, int | float):
        yield "changed", f"Measurement {_show(name)} is {_show(value)}: QuPath leaves it out."
    else:
        with np.errstate(over="ignore"):
            kept = float(np.float32(value)) if is_number(value) else None
        # what is not finite stays so; other numbers may lose whole units, or all of it
        if (
            isinstance(value, int)
            if kept is None
            else abs(kept - value) >= 0.5 or kept == 0 != value
        ):
            reason = f"Measurement {_show(name)} is {_show(value)}, beyond what float32 holds."
            yield "changed", reason


def check_metadata(metadata: object) -> Iterator[Complaint]:
    """Yield what QuPath leaves out of the metadata."""
    if isinstance(metadata, Mapping):
        for key, value in metadata.items():
            if value is None or isinstance(value, list | Mapping):
                yield "changed", f"Metadata {_show(key)} is {_show(value)}: QuPath leaves it out."


PROPERTY_CHECKS: Mapping[str, Callable[[object], Iterator[Complaint]]] = {
    "name": check_name,
    "color": check_color,
    "classification": check_classification,
    "measurements": check_measurements,
    "metadata": check_metadata,
}


def _check_colors(features: Iterable[object]) -> Iterator[Finding]:
    """Yield, once a class and colour, where QuPath keeps a colour that it saw before."""
    # QuPath begins with classes of its own, and gives a class one colour for all its objects.
    known: dict[str, RGB] = dict(QUPATH_COLORS)
    told: set[tuple[str, RGB]] = set()
    for index, feature in iter_nested(features):
        classification = properties_of(feature).get("classification")
        name, rgb = ": ".join(names_of(classification)), rgb_of(classification)
        if name and rgb and rgb != known.setdefault(name, rgb) and (name, rgb) not in told:
            told.add((name, rgb))
            reason = (
                f"QuPath already has color {known[name]} for class {_show(name)}, and keeps it."
            )
            yield Finding(index=index, id=id_of(feature), severity="changed", reason=reason)


def _is_no_text(value: object) -> bool:
    """Return whether a JSON value cannot be read as a text; numbers can."""
    return value is None or isinstance(value, list | Mapping)


def _show(value: object) -> str:
    """Return a JSON value for a sentence: one line, not too long, and not nested."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list) and not (len(value) <= 4 and all(map(is_number, value))):
        return "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
