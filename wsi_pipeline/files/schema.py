"""Tables of TOML made into typed records by msgspec; what does not fit is told in a sentence."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

T = TypeVar("T")
LARGEST = 1e9
"""Of real numbers: leaves out the infinite, which TOML has."""
MOST_TOML = 1 << 20
"""Bytes of a file."""
WORDS = {
    "object": "a table",
    "array": "a list",
    "string": "text in quotes",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
}
"""What TOML calls the types of JSON."""
Count = Annotated[int, Meta(ge=1, description="a whole number above 0")]
Index = Annotated[int, Meta(ge=0, description="a whole number from 0")]
Real = Annotated[float, Meta(ge=-LARGEST, le=LARGEST, description="a number")]
Amount = Annotated[float, Meta(ge=0, le=LARGEST, description="a number from 0")]
Positive = Annotated[float, Meta(gt=0, le=LARGEST, description="a number above 0")]
Share = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
Mpp = Annotated[float, Meta(gt=0, le=LARGEST, description="µm per pixel above 0")]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a table holds: a key that it does not have is refused, a misspelt one among them."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a small TOML file; return its table.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or no TOML.
    """
    with path.open("rb") as file:
        data = file.read(MOST_TOML + 1)
    if len(data) > MOST_TOML:
        raise ValueError(f"has more than {MOST_TOML >> 20} MB; expected settings")
    try:
        # Windows writes a mark before the text.
        return tomllib.loads(data.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"is not valid TOML: {error}") from error


def converted(table: Any, kind: type[T]) -> T:
    """Make a record of a table; return it.

    Args:
        kind: Class of the record. What is expected of a value is told by its `Meta(description=…)`.

    Raises:
        ValueError: it lacks something, or has what is unknown or of another kind; says where, what
            was found and what is expected.
    """
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_sentence(error, table, schema_of(kind))) from error


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a record."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(kind)}


def as_toml(value: Any) -> str:
    """Write one value inline.

    Example:
        >>> as_toml([{"name": "Tumor", "color": [200, 0, 0]}, True])
        '[{ name = "Tumor", color = [200, 0, 0] }, true]'
    """
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            # TOML's basic strings escape as JSON's do, and one character besides
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(map(as_toml, value))}]"
        case dict():
            pairs = ", ".join(f"{k} = {as_toml(v)}" for k, v in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
    # What is left of TOML's kinds is a date.
    return str(value)


def _sentence(error: msgspec.ValidationError, table: Any, schema: dict[str, Any]) -> str:
    """Return what is wrong with a table, and where, as people say it.

    msgspec tells where by a path, "… - at `$.input.mpp`", and names neither the value nor choices.
    """
    text, path = str(error), ""
    if match := re.fullmatch(r"(.*) - at (?:`key` in )?`\$\.?([\w.\[\]]*)`", text, re.DOTALL):
        # below a table of any keys it names none of them
        text, path = match[1], match[2].partition("[...]")[0]
    # A record's own check says it best.
    if isinstance(error.__cause__, ValueError):
        return f"{path}: {error.__cause__}" if path else str(error.__cause__)

    def parts_of(node: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the alternatives of a node, and in place of references what they refer to."""
        parts = node.get("anyOf", [node])
        return [schema["$defs"][p["$ref"].rpartition("/")[2]] if "$ref" in p else p for p in parts]

    node = schema
    # A key may be written like a path, and lead nowhere.
    with suppress(LookupError, TypeError):
        for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
            table = table[int(index) if index else key]
            for part in parts_of(node):
                if key in part.get("properties", ()):
                    node = part["properties"][key]
                elif index and part["type"] == "array":
                    items = part.get("prefixItems", [part["items"]])
                    node = items[min(int(index), len(items) - 1)]
    lacking = r"Object (missing required|contains unknown) field `(.*)`"
    if match := re.fullmatch(lacking, text, re.DOTALL):
        name = f"{path}.{match[2]}" if path else match[2]
        if match[1] == "missing required":
            return f"lacks {name}"
        (known,) = (part["properties"] for part in parts_of(node) if "properties" in part)
        near = difflib.get_close_matches(match[2], known, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return f"unknown {name}{meant}; there are {', '.join(known)}"
    shown = as_toml(table)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"{path} is {shown}; expected {_expected(node)}"


def _expected(node: dict[str, Any]) -> str:
    """Return what a node of a JSON Schema asks for, in words."""
    if "description" in node:
        return str(node["description"])
    if "enum" in node:
        choices = ", ".join(map(as_toml, node["enum"]))
        return choices if len(node["enum"]) == 1 else f"one of {choices}"
    if "anyOf" in node:
        return ", or ".join(_expected(n) for n in node["anyOf"] if n.get("type") != "null")
    return WORDS[node.get("type", "object")]


def toml_of(table: Mapping[str, Any]) -> str:
    """Return a table as TOML; those in it come last, under their names."""
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    head = {key: value for key, value in table.items() if key not in tables}
    parts = [("", head), *((f"[{key}]\n", inner) for key, inner in tables.items())]
    return "\n".join(
        above + "".join(f"{key} = {as_toml(value)}\n" for key, value in part.items())
        for above, part in parts
    )


def paragraph(text: str) -> str:
    r"""Return a text of several lines, or a Markdown list, as one paragraph.

    Example:
        >>> paragraph("- Four patients.\n- No glass,\n  no fat.")
        'Four patients. No glass, no fat.'
    """
    return " ".join(re.sub(r"^[-*] ", "", text, flags=re.MULTILINE).split())
