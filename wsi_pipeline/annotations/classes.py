"""Names and colours of classes, as QuPath reads them."""

from __future__ import annotations

import colorsys
import re
import sys
import zlib
from collections.abc import Mapping
from typing import TypeGuard

from wsi_pipeline.colors import QUPATH_COLORS, RGB

MAX_FLOAT = sys.float_info.max
IGNORED_CLASS = "Ignore*"
"""QuPath's class for areas that do not count."""
REGION_CLASS = "Region*"
"""QuPath's class for areas of work: where there is any, only what lies in one counts."""


def is_ignored(name: str | None) -> bool:
    """Return whether QuPath ignores a class: its name ends in `*`.

    Example:
        >>> is_ignored("Ignore*"), is_ignored("Tumor")
        (True, False)
    """
    return name is not None and name.endswith("*")


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a JSON value is a number that a double holds; true and false are none."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT
    )


def color_of(name: str) -> RGB:
    """Return QuPath's own colour of a class, or one that depends on the name alone."""
    if name in QUPATH_COLORS:
        return QUPATH_COLORS[name]
    # Python's own hash of a text is another in each process.
    hue = zlib.crc32(name.encode("utf-8", "replace")) / 2**32
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def names_of(classification: object) -> list[str]:
    """Return the names of a class, from the base class down; empty for no class.

    Example:
        >>> names_of({"name": "Tumor: Positive", "color": [200, 0, 0]})
        ['Tumor', 'Positive']
    """
    if isinstance(classification, Mapping):
        names = classification.get("names")
        name = classification.get("name")
        given = names if name is None and isinstance(names, list) else [name]
    else:
        given = [classification]
    parts = (part for name in given if isinstance(name, str) for part in name.split(":"))
    return [re.sub(r"\s*[\r\n]\s*", " ", part.strip()) for part in parts if part.strip()]


def rgb_of(classification: object) -> RGB | None:
    """Return the colour that QuPath finds in a class, or None."""
    if not isinstance(classification, Mapping):
        return None
    packed, color = classification.get("colorRGB"), classification.get("color")
    if is_number(packed):
        return unpack(int(packed))
    if not isinstance(color, list) or not all(map(is_number, color)):
        return None
    if len(color) == 1:
        return unpack(int(color[0]))
    if len(color) not in (3, 4):
        return None
    red, green, blue = (int(value) % 256 for value in color[:3])
    return red, green, blue


def unpack(packed: int) -> RGB:
    """Return red, green, blue of a packed colour.

    Example:
        >>> unpack(-3670016)
        (200, 0, 0)
    """
    return packed >> 16 & 255, packed >> 8 & 255, packed & 255


def parse_hex(text: str) -> RGB | None:
    """Return the colour of "#rrggbb", or None."""
    match = re.fullmatch(r"#?([0-9a-fA-F]{6})", text.strip())
    return unpack(int(match[1], 16)) if match else None
