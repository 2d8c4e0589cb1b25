"""The thumbnail with the mask over it, as a picture for people."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.files.atomic import written_beside

FILL = 0.3
"""Opacity of a class inside its outline: the tissue must stay visible."""
TISSUE_COLOR = (70, 70, 90)
TEXT_COLOR, WHITE = (40, 40, 40), (255, 255, 255)
BRIGHT = 150
"""Grey of a class's colour from which on its outline is rimmed black, else white.

Around that is a line of the other of both: one of them stands out from tissue of any colour.
"""
FONT_SIZE, MARGIN = 15, 10
"""Of the legend: height of its letters, and what is around and between its entries, in px."""
PREVIEW, PREVIEW_SIDE = "preview", 640
"""Key of the PNG's text that holds a small JPEG of the pictures, as base64, and its longer side."""

Picture = npt.NDArray[np.uint8]
Color = tuple[int, int, int]
BoolMask = npt.NDArray[np.bool_]


def write_overlay(
    path: Path,
    thumbnail: Picture,
    mask: npt.NDArray[np.uint8],
    *,
    classes: Sequence[ClassInfo],
    tissue: BoolMask | None = None,
    captions: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    um: float | None = None,
) -> None:
    """Write a PNG of the thumbnail under translucent, outlined classes, with a legend below.

    The thumbnail as it is lies beside, of a wide one below. The legend's shares are of the tissue
    (of the picture where no tissue is given) and as coarse as the thumbnail; exact areas are in the
    run's report.

    Args:
        path: File to write; appears when it is complete.
        thumbnail: Picture, uint8 (h, w, 3).
        mask: Class indices, uint8 (h, w), sampled to the thumbnail's size.
        classes: Classes in the mask's order; 0 is the background.
        tissue: Where there is tissue, bool (h, w); drawn as a thin line where given.
        captions: What the legend says of each class but the background, in place of shares.
        notes: What stands before the legend, as the slide's name.
        um: µm per pixel along the rows, for a scale bar; None = no bar.
    """
    axis = int(thumbnail.shape[1] < 1.5 * thumbnail.shape[0])
    picture = _pair(axis, thumbnail, mask, classes, tissue)
    if captions is None:
        pixels = mask.ravel() if tissue is None else mask[tissue]
        shares = 100 * np.bincount(pixels, minlength=len(classes)) / max(pixels.size, 1)
        of = "picture" if tissue is None else "tissue"
        named = zip(classes[1:], shares[1:], strict=True)
        captions = [f"{c.name}: {share:.1f} % of the {of}" for c, share in named]
    colors = [c.color or (0, 0, 0) for c in classes[1:]]
    told: list[tuple[Color, str]] = [(WHITE, note) for note in notes]
    entries = told + list(zip(colors, captions, strict=True))
    if tissue is not None:
        entries.append((TISSUE_COLOR, "edge of the tissue"))
    below = legend(entries, picture.shape[1], um=um)
    # drawn anew: outlines that are made smaller with the picture stand out from nothing
    least = min(1, (PREVIEW_SIDE - MARGIN) / max(1, max(picture.shape) - MARGIN))
    height, width = (max(1, round(n * least)) for n in mask.shape)
    small = Image.fromarray(thumbnail).resize((width, height), reducing_gap=2)
    at = np.ix_(np.arange(height) * len(mask) // height, np.arange(width) * mask.shape[1] // width)
    where = None if tissue is None else tissue[at]
    pair = _pair(axis, np.asarray(small), mask[at], classes, where)
    strip = legend(told, pair.shape[1], um=um and um * mask.shape[1] / width)
    preview = Image.fromarray(np.vstack([pair, strip]))
    info = PngInfo()
    info.add_text(PREVIEW, base64.b64encode(_small_jpeg(preview, PREVIEW_SIDE)).decode())
    with written_beside(path) as beside:
        Image.fromarray(np.vstack([picture, below])).save(beside, format="PNG", pnginfo=info)


def read_preview(path: Path, side: int) -> bytes:
    """Return the small JPEG that an overlay carries, its longer side at most `side` px.

    It has notes and scale bar but no legend of classes, and is there without decoding the PNG: a
    report may show thousands.

    Raises:
        OSError: no such file, or no PNG.
        KeyError: a PNG that was not written here.
    """
    with Image.open(path) as image:
        jpeg = base64.b64decode(image.info[PREVIEW])
    with Image.open(io.BytesIO(jpeg)) as preview:
        return jpeg if max(preview.size) <= side else _small_jpeg(preview, side)


def _small_jpeg(picture: Image.Image, side: int) -> bytes:
    small = picture.copy()
    small.thumbnail((side, side), reducing_gap=2)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def _pair(
    axis: int,
    thumbnail: Picture,
    mask: npt.NDArray[np.uint8],
    classes: Sequence[ClassInfo],
    tissue: BoolMask | None,
) -> Picture:
    """Return the thumbnail as it is drawn on and, along that axis, as it is."""
    between = [(0, MARGIN * (axis == 0)), (0, MARGIN * (axis == 1)), (0, 0)]
    drawn = np.pad(_draw(thumbnail, mask, classes, tissue), between, constant_values=255)
    return np.concatenate([drawn, thumbnail], axis=axis)


def _draw(
    thumbnail: Picture,
    mask: npt.NDArray[np.uint8],
    classes: Sequence[ClassInfo],
    tissue: BoolMask | None,
) -> Picture:
    """Return the thumbnail with fills, outlines and the line around the tissue."""
    # px of an outline, and of each of both rims around it
    width = max(2, round(max(mask.shape) / 800))
    rim = max(1, width // 2)
    colors = np.array([c.color or (0, 0, 0) for c in classes], dtype=np.float32)
    inside = mask > 0
    picture = thumbnail.copy()
    mixed = (1 - FILL) * thumbnail[inside] + FILL * colors[mask[inside]]
    picture[inside] = np.round(mixed).astype(np.uint8)
    if tissue is not None:
        edge = tissue & _outline(tissue, 1)
        picture[ndimage.maximum_filter(edge, 3)] = WHITE
        picture[edge] = TISSUE_COLOR
    bright = colors @ np.array([0.299, 0.587, 0.114], np.float32) > BRIGHT
    edge = inside & _outline(mask, width)
    lines = np.where(edge, mask, 0)
    for wide, light in ((2 * rim, bright), (rim, ~bright)):
        nearby = ndimage.maximum_filter(lines, 2 * wide + 1)
        picture[nearby > 0] = np.where(light, 255, 0).astype(np.uint8)[nearby[nearby > 0], None]
    picture[edge] = colors[mask[edge]].astype(np.uint8)
    return picture


def _outline(labels: npt.NDArray[np.uint8] | BoolMask, width: int) -> BoolMask:
    """Return the pixels within `width` of one of another value, along rows and columns.

    Example:
        >>> _outline(np.array([[0, 0, 1, 1, 1, 0]], np.uint8), 1).astype(int)
        array([[0, 1, 1, 0, 1, 1]])
    """
    edge = np.zeros(labels.shape, bool)
    for step in range(1, width + 1):
        for axis in (0, 1):
            near, far = (np.moveaxis(a, axis, 0) for a in (edge, labels))
            differs = far[step:] != far[:-step]
            near[step:] |= differs
            near[:-step] |= differs
    return edge


def legend(entries: Sequence[tuple[Color, str]], width: int, *, um: float | None = None) -> Picture:
    """Return a white strip with swatches and texts, as many lines as they need; uint8 (h, w, 3).

    Args:
        width: Width of the strip in px.
        um: µm per pixel, for a scale bar at the end; None = no bar.
    """
    font = _font()
    line = FONT_SIZE + MARGIN
    marks = [
        (0 if color == WHITE else FONT_SIZE, FONT_SIZE, color, _fitting(text, width - 4 * MARGIN))
        for color, text in entries
    ]
    if um is not None:
        longest = um * width / 5
        ten = 10 ** math.floor(math.log10(longest))
        length = max(n * ten for n in (1, 2, 5) if n * ten <= longest)
        text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
        marks.append((round(length / um), 4, TEXT_COLOR, text))
    places, x, y = [], MARGIN, MARGIN
    for wide, _, _, text in marks:
        needed = wide + 6 * (wide > 0) + round(font.getlength(text))
        if x > MARGIN and x + needed + MARGIN > width:
            x, y = MARGIN, y + line
        places.append((x, y))
        x += needed + 2 * MARGIN
    strip = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(strip)
    for (wide, high, color, text), (x, y) in zip(marks, places, strict=True):
        top = y + (FONT_SIZE - high) // 2
        if wide:
            draw.rectangle((x, top, x + wide - 1, top + high - 1), fill=color)
        draw.text(
            (x + wide + 6 * (wide > 0), y + FONT_SIZE // 2), text, TEXT_COLOR, font, anchor="lm"
        )
    return np.asarray(strip)


def _fitting(text: str, width: int) -> str:
    r"""Return a text of one line, shortened in the middle until it is at most `width` px long.

    Example:
        >>> _fitting("a\nb.svs", 200), len(_fitting("w" * 99, 50)) < 9
        ('a�b.svs', True)
    """
    text = "".join(letter if letter.isprintable() else "�" for letter in text)
    kept = len(text)
    shorter = text
    while _font().getlength(shorter) > width and kept > 1:
        kept -= 1
        shorter = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return shorter


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font with accents and Greek where the system has one; Pillow's own has neither."""
    for name in ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, FONT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(FONT_SIZE)
