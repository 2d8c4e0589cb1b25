"""How many µm a pixel has: what each source in a file says, and which is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

PLAUSIBLE = (0.05, 100.0)
"""µm per pixel of any microscope slide, from ×200 down to a macro photograph."""
MEANINGLESS_DPI = (72, 96, 100, 150, 200, 300, 400, 600, 1200)
"""What programs write into resolution tags that know no better."""
UNEVEN = 1.01
"""Ratio of x to y above which pixels are not square."""
PREFIXES = {
    "yotta": ("Y", 24), "zetta": ("Z", 21), "exa": ("E", 18), "peta": ("P", 15),
    "tera": ("T", 12), "giga": ("G", 9), "mega": ("M", 6), "kilo": ("k", 3), "hecto": ("h", 2),
    "deca": ("da", 1), "": ("", 0), "deci": ("d", -1), "centi": ("c", -2), "milli": ("m", -3),
    "micro": ("µ", -6), "nano": ("n", -9), "pico": ("p", -12), "femto": ("f", -15),
    "atto": ("a", -18), "zepto": ("z", -21), "yocto": ("y", -24),
}  # fmt: skip

INCH = 25400.0

UM = {
    **{f"{symbol}m": float(f"1e{power + 6}") for symbol, power in PREFIXES.values()},
    **{f"{name}meter": float(f"1e{power + 6}") for name, (_, power) in PREFIXES.items()},
    **{"um": 1.0, "micron": 1.0, "Å": 1e-4, "\u212b": 1e-4, "angstrom": 1e-4},
    **{"thou": INCH / 1000, "li": INCH / 12, "line": INCH / 12, "in": INCH, "inch": INCH},
    **{"ft": 12 * INCH, "foot": 12 * INCH, "yd": 36 * INCH, "yard": 36 * INCH},
    **{"mi": 63360 * INCH, "mile": 63360 * INCH, "pt": INCH / 72},
    **{"ua": 1.495978707e17, "ly": 9.4607304725808e21, "pc": 3.0856775814913673e22},
    "parsec": 3.0856775814913673e22,
}
"""µm per unit of length, by the symbols of OME-XML, the names of OME-Zarr, and what ImageJ writes.

A line is a twelfth of an inch, as in OME's schema.
"""

MEASURED = {"OME-XML": "ome", "OME-Zarr": "ome-zarr", "ImageJ": "imagej", "DICOMweb": "dicomweb"}
"""Sources that give a size and its unit, and how their properties begin."""


@dataclass(frozen=True, kw_only=True)
class MppReading:
    """What one source in a file says.

    Attributes:
        mpp: (x, y) µm per level-0 pixel.
        doubt: Reason why it is not believed; "" where it is.
    """

    source: str
    mpp: tuple[float, float]
    doubt: str = ""


def read_mpp(properties: Mapping[str, str]) -> list[MppReading]:
    """Return what every source says, the most trusted first."""
    names = [
        ("patch-grid.mpp", "patch-grid.mpp-x", "patch-grid.mpp-y"),
        ("aperio.MPP", "aperio.MPP", "aperio.MPP"),
        *((source, f"{name}.mpp-x", f"{name}.mpp-y") for source, name in MEASURED.items()),
    ]
    # For a plain TIFF these are its resolution tags, which are judged as such.
    if properties.get("openslide.vendor", "generic-tiff") != "generic-tiff":
        names.append(("openslide.mpp", "openslide.mpp-x", "openslide.mpp-y"))
    found = [
        # ImageJ keeps what other programs wrote.
        _reading(source, mpp, may_be_dpi=source == "ImageJ")
        for source, x, y in names
        if (mpp := _pair(properties, x, y))
    ]
    for source, name in MEASURED.items():
        if mpp := _pair(properties, f"{name}.said-x", f"{name}.said-y"):
            doubt = properties.get(f"{name}.doubt", "")
            found.append(MppReading(source=source, mpp=mpp, doubt=doubt))
    unit = um_per(properties.get("tiff.ResolutionUnit", ""))
    density = _pair(properties, "tiff.XResolution", "tiff.YResolution")
    if unit and density:
        mpp = unit / density[0], unit / density[1]
        found.append(_reading("TIFF resolution tags", mpp, may_be_dpi=True))
    if mpp := _pair(properties, "picture.mpp-x", "picture.mpp-y"):
        found.append(_reading("the picture's dots per inch", mpp, may_be_dpi=True))
    return found


def _reading(source: str, mpp: tuple[float, float], *, may_be_dpi: bool) -> MppReading:
    """Return a reading with what speaks against it; some programs write dpi and do not know."""
    low, high = PLAUSIBLE
    doubt = ""
    if not all(low <= value <= high for value in mpp):
        doubt = f"outside {low:g} to {high:g} µm per pixel"
    dpi = INCH / mpp[0]
    if may_be_dpi and any(math.isclose(dpi, usual, rel_tol=0.005) for usual in MEANINGLESS_DPI):
        doubt = f"{dpi:.0f} dpi is what programs write that do not know"
    return MppReading(source=source, mpp=mpp, doubt=doubt)


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
    """Return sentences on what makes (x, y) µm per pixel doubtful, which come from a source."""
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


def um_per(unit: str) -> float | None:
    """Return µm per unit of length, None for what is no unit that is known.

    Example:
        >>> um_per("micron"), um_per("mm"), um_per("Micrometers"), um_per("pixel")
        (1.0, 1000.0, 1.0, None)
    """
    # As ImageJ escapes it, as UTF-8 looks that was read as Latin-1, and the Greek letter.
    for written in ("\\u00b5", "\\u00B5", "\u00c2\u00b5", "\u03bc"):
        unit = unit.replace(written, "µ")
    unit = unit.strip()
    # Capitals count: Mm is not mm.
    if unit in UM:
        return UM[unit]
    name = unit.lower().replace("metre", "meter")
    return UM.get({"feet": "foot", "inches": "inch"}.get(name, name.removesuffix("s")))


def measured(
    source: str, sizes: Sequence[object], units: Sequence[object], doubt: str = ""
) -> dict[str, str]:
    """Return the properties that hold a pixel's size, for `read_mpp`; {} where there is none.

    Args:
        source: One of `MEASURED`.
        sizes: (x, y) of a pixel.
        units: (x, y) unit of length of each.
        doubt: Reason why it is not believed; a unit that is not known is one, too.
    """
    numbers = [_number(str(size)) for size in sizes]
    if None in numbers:
        return {}
    scales = [um_per(str(unit)) for unit in units]
    if None in scales:
        names = " × ".join(dict.fromkeys(f'"{unit}"' for unit in units))
        doubt = f"in {names}, which is no unit of length" if any(units) else "without a unit"
    name, kind = MEASURED[source], "said" if doubt else "mpp"
    found = {
        f"{name}.{kind}-{axis}": repr(number * (scale or 1.0))
        for axis, number, scale in zip("xy", numbers, scales, strict=True)
        if number is not None
    }
    return found | ({f"{name}.doubt": doubt} if doubt else {})


def ome_mpp(xml: str, *, ifd: int, size: tuple[int, int], name: str = "") -> dict[str, str]:
    """Return the properties that say how large a pixel is, for one picture of an OME-TIFF.

    Which `<Image>` describes it is told by its `TiffData`, not by its place in the list: images
    may lie in other files, or have no pixels at all.

    Args:
        ifd: Index of the picture's directory in the file, from 0.
        size: (width, height) of the picture.
    """
    uuid: str | None = None

    def holds(data: ElementTree.Element) -> bool:
        """Return whether a `TiffData` says that the directory of this file is among its planes."""
        other = data.find("{*}UUID")
        if other is not None and other.text != uuid and other.get("FileName") != name:
            return False
        first = int(data.get("IFD", 0))
        count = data.get("PlaneCount", data.get("NumPlanes", "1" if "IFD" in data.attrib else ""))
        return first <= ifd < (first + int(count) if count else math.inf)

    try:
        root = ElementTree.fromstring(xml)
        images, uuid = root.findall("{*}Image/{*}Pixels"), root.get("UUID")
        found = [pixels for pixels in images if any(map(holds, pixels.findall("{*}TiffData")))]
    except (ElementTree.ParseError, ValueError):
        return {}
    if not found:
        # Some programs do not write where the pixels are.
        elsewhere = ("TiffData", "BinData", "MetadataOnly")
        found = [p for p in images if all(p.find(f"{{*}}{tag}") is None for tag in elsewhere)]
    width, height = map(str, size)
    fitting = [
        pixels
        for pixels in found
        if (pixels.get("SizeX", width), pixels.get("SizeY", height)) == (width, height)
    ]
    if not found or (len(found) > 1 and not fitting):
        return {}
    readings = [
        measured(
            "OME-XML",
            [pixels.get(f"PhysicalSize{axis}") for axis in "XY"],
            [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "XY"],
            ""
            if fitting
            else f"it describes {pixels.get('SizeX')} × {pixels.get('SizeY')} px, "
            f"the picture has {size[0]} × {size[1]}",
        )
        for pixels in fitting or found
    ]
    first = readings[0]
    if all(other == first for other in readings):
        return first
    return {
        **{key.replace("mpp", "said"): value for key, value in first.items()},
        "ome.doubt": f"{len(readings)} of its images are said to be this picture, and differ",
    }


def imagej_mpp(description: str, resolution: Sequence[float | None]) -> dict[str, str]:
    """Return the properties that say how large a pixel is, for a TIFF that ImageJ wrote.

    Args:
        description: ImageJ's lines of name=value.
        resolution: (x, y) pixels per unit, by the TIFF's tags, whatever unit these name.
    """
    lines = (line.partition("=") for line in description.splitlines())
    said = {name.strip(): value.strip() for name, _, value in lines}
    if "unit" not in said or not all(resolution):
        return {}
    units = (said["unit"], said.get("yunit", said["unit"]))
    return measured("ImageJ", [1 / pixels for pixels in resolution if pixels], units)


def _pair(properties: Mapping[str, str], x: str, y: str) -> tuple[float, float] | None:
    """Return two properties as positive finite numbers, None where one is none."""
    found = _number(properties.get(x)), _number(properties.get(y))
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _number(text: str | None) -> float | None:
    """Return a positive finite number, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
