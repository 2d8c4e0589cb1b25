"""How many µm a pixel has: what each source in a file says, and which is believed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PLAUSIBLE = (0.05, 100.0)
"""µm per pixel of any microscope slide, from ×200 down to a macro photograph."""

MEANINGLESS_DPI = (72, 96, 100, 150, 200, 300, 400, 600, 1200)
"""What programs write into resolution tags that know no better."""

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
    if (tags := _resolution_tags(properties)) is not None:
        found.append(tags)
    return found


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


def _vendor_readings(properties: Mapping[str, str]) -> Iterator[MppReading]:
    names = [("patch-grid.mpp", "patch-grid.mpp-x", "patch-grid.mpp-y")]
    names.append(("aperio.MPP", "aperio.MPP", "aperio.MPP"))
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
    mpp = (unit / x, unit / y)
    dpi = 25400 / mpp[0]
    doubt = _doubt(mpp)
    if any(math.isclose(dpi, usual, rel_tol=0.005) for usual in MEANINGLESS_DPI):
        doubt = f"{dpi:.0f} dpi is what programs write that do not know"
    return MppReading(source="TIFF resolution tags", mpp=mpp, doubt=doubt)


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
