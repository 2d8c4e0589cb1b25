"""How many µm a pixel has: what each source in a file says, and which is believed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

PLAUSIBLE = (0.05, 100.0)
"""µm per pixel of any microscope slide, from ×200 down to a macro photograph."""

MEANINGLESS_DPI = (72, 96, 100, 150, 200, 300, 400, 600, 1200)
"""What programs write into resolution tags that know no better."""

UNEVEN = 1.01
"""Ratio of x to y above which pixels are not square."""

OME_UM = {"Å": 1e-4, "nm": 1e-3, "µm": 1.0, "\u03bcm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
"""µm per unit of length in OME-XML; the sign of micro and the Greek letter look the same."""

UM_PER_UNIT = {"inch": 25400.0, "centimeter": 10000.0}


@dataclass(frozen=True, kw_only=True)
class MppReading:
    """What one source in a file says.

    Attributes:
        source: name of the source.
        mpp: (x, y) µm per level-0 pixel.
        doubt: why it is not believed; "" where it is.
    """

    source: str
    mpp: tuple[float, float]
    doubt: str = ""


def read_mpp(properties: Mapping[str, str]) -> list[MppReading]:
    """Return what every source says, the most trusted first."""
    found = list(_vendor_readings(properties))
    densities = (_resolution_tags(properties), _picture_density(properties))
    return found + [reading for reading in densities if reading is not None]


def best_mpp(readings: list[MppReading]) -> MppReading | None:
    """Return the first reading that can be believed, or None."""
    return next((reading for reading in readings if not reading.doubt), None)


def contradictions(readings: list[MppReading], mpp: tuple[float, float]) -> list[MppReading]:
    """Return the believable readings that differ by more than 1 % from (x, y) µm per pixel."""
    return [
        reading
        for reading in readings
        if not reading.doubt
        and not all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(reading.mpp, mpp, strict=True))
    ]


def doubts(readings: list[MppReading], mpp: tuple[float, float], source: str) -> list[str]:
    """Return sentences on what makes (x, y) µm per pixel doubtful.

    Args:
        readings: what every source says.
        mpp: what counts.
        source: where that comes from.
    """
    found = []
    x, y = mpp
    if not 1 / UNEVEN <= x / y <= UNEVEN:
        found.append(f"a pixel is {x:.4g} × {y:.4g} µm by {source}, not square")
    found += [
        f"{source} says {x:.4g} × {y:.4g} µm per pixel, {other.source} "
        f"{other.mpp[0]:.4g} × {other.mpp[1]:.4g}; if the first is wrong, give --mpp"
        for other in contradictions(readings, mpp)
        if source != "--mpp"
    ]
    return found


def ome_mpp(xml: str, series: int) -> dict[str, str]:
    """Return the properties `ome.mpp-x` and `ome.mpp-y` of one image, where OME-XML has them."""
    try:
        images = ElementTree.fromstring(xml).findall("{*}Image/{*}Pixels")
        pixels = images[series].attrib
    except (ElementTree.ParseError, IndexError):
        return {}
    properties = {}
    for axis in "XY":
        value = _number(pixels.get(f"PhysicalSize{axis}"))
        unit = OME_UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if value is not None and unit is not None:
            properties[f"ome.mpp-{axis.lower()}"] = repr(value * unit)
    return properties


def _vendor_readings(properties: Mapping[str, str]) -> Iterator[MppReading]:
    names = [
        ("patch-grid.mpp", "patch-grid.mpp-x", "patch-grid.mpp-y"),
        ("aperio.MPP", "aperio.MPP", "aperio.MPP"),
        ("OME-XML", "ome.mpp-x", "ome.mpp-y"),
        ("OME-Zarr", "ome-zarr.mpp-x", "ome-zarr.mpp-y"),
    ]
    # for a plain TIFF these are its resolution tags, which are judged as such
    if properties.get("openslide.vendor", "generic-tiff") != "generic-tiff":
        names.append(("openslide.mpp", "openslide.mpp-x", "openslide.mpp-y"))
    for source, x, y in names:
        values = (_number(properties.get(x)), _number(properties.get(y)))
        if values[0] is not None and values[1] is not None:
            mpp = (values[0], values[1])
            yield MppReading(source=source, mpp=mpp, doubt=_doubt(mpp))


def _resolution_tags(properties: Mapping[str, str]) -> MppReading | None:
    unit = UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = (_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
    if unit is None or x is None or y is None:
        return None
    return _by_density("TIFF resolution tags", (unit / x, unit / y))


def _picture_density(properties: Mapping[str, str]) -> MppReading | None:
    x, y = (_number(properties.get(f"picture.mpp-{axis}")) for axis in "xy")
    return None if x is None or y is None else _by_density("the picture's dots per inch", (x, y))


def _by_density(source: str, mpp: tuple[float, float]) -> MppReading:
    """Return a reading of what may have been written by a program that does not know."""
    dpi = 25400 / mpp[0]
    doubt = _doubt(mpp)
    if any(math.isclose(dpi, usual, rel_tol=0.005) for usual in MEANINGLESS_DPI):
        doubt = f"{dpi:.0f} dpi is what programs write that do not know"
    return MppReading(source=source, mpp=mpp, doubt=doubt)


def _number(text: str | None) -> float | None:
    """Return a positive finite number, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def _doubt(mpp: tuple[float, float]) -> str:
    low, high = PLAUSIBLE
    if all(low <= value <= high for value in mpp):
        return ""
    return f"outside {low:g} to {high:g} µm per pixel"
