"""Whether a slide was seen in bright field and in colour, as the slides of H&E are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wsi_pipeline.sources.base import Pixels

FLUORESCENCE = {
    "mirax.GENERAL.SLIDE_TYPE": "SLIDE_TYPE_FLUORESCENCE",
    "leica.illumination-source": "fluorescence",
    "dicom.OpticalPathSequence[0].IlluminationTypeCodeSequence[0].CodeValue": "111743",
}
"""What scanners write that work in fluorescence; the code is DICOM's epifluorescence."""
DARK, LIGHT = 60, 150
"""Grey values: of a dark background at most, of glass or pale tissue at least."""


def are_rgb(colors: Sequence[str]) -> bool:
    """Return whether channels may be red, green and blue, by the colours that they are shown in.

    The colours are in hexadecimal digits; less than three say nothing.
    """
    shown = tuple(colors[:3])
    return len(shown) < 3 or shown in (("FF0000", "00FF00", "0000FF"), ("FFFFFF",) * 3)


def why_not_brightfield(properties: Mapping[str, str], thumbnail: Pixels) -> str:
    """Return why a slide is not one of colours in bright field; "" where it may be.

    The thumbnail, uint8 (h, w, 3), shows the slide as a whole.
    """
    for name, value in FLUORESCENCE.items():
        if properties.get(name, "").lower() == value.lower():
            return f"scanned in fluorescence, by {name}"
    colors = properties.get("ome-zarr.colors", "").split(",")
    if not are_rgb(colors):
        return f"its channels are shown as {','.join(colors)}, not as red, green and blue"
    brightest, darkest = thumbnail.max(axis=-1), thumbnail.min(axis=-1)
    # Black borders are dark too, but then there is glass or tissue somewhere.
    if (brightest < DARK).mean() > 0.5 and (darkest > LIGHT).mean() < 0.002:
        return "its background is dark, as in fluorescence"
    if int((brightest - darkest).max()) <= 4 and int(brightest.max()) - int(brightest.min()) > 50:
        return "it is grey, without any colour"
    return ""
