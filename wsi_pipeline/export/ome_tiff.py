"""The mask as pyramidal TIFF: OME-TIFF for QuPath and Fiji, a plain one for ASAP and OpenSlide.

https://docs.openmicroscopy.org/ome-model/latest/ome-tiff/specification.html
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from tifffile import COMPRESSION, RESUNIT, TiffWriter

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export import MaskLike, level_shapes
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.threads import map_in_threads

TILE = 512
"""Side of a tile, as QuPath itself writes."""
BLOCK = 2048
"""Side of what a thread reads and compresses in one go; only the compressed tiles are kept."""

Crop = tuple[int, int, int, int]
"""(y, x, height, width) in mask pixels."""


def write_ome_tiff(
    path: Path,
    mask: MaskLike,
    *,
    classes: Sequence[ClassInfo],
    mask_mpp: tuple[float, float],
    crop: Crop | None = None,
    name: str,
    reduced: Sequence[MaskLike] = (),
) -> None:
    """Write the mask, or a crop of it, as OME-TIFF with reduced levels in SubIFDs.

    Memory does not grow with the mask. Pixel (i, j) of level n is pixel (i·2ⁿ, j·2ⁿ) of the crop,
    so no level holds a value that level 0 lacks. The classes' colours are a TIFF colour table:
    pixels stay class indices in QuPath, Bio-Formats, tifffile and GDAL.

    Args:
        path: File to write; appears when it is complete.
        mask: Class index of each pixel.
        classes: Classes in the mask's order; 0 is the background.
        mask_mpp: Size (y, x) of a mask pixel in µm.
        crop: The part to write, such as the slide's bounds; None = all.
        name: Name of the image, as viewers show it.
        reduced: The mask's own reduced levels where there are any; level n holds every 2ⁿth pixel.
            They save reading the whole mask for each level.
    """
    height, width = mask.shape
    window = crop or (0, 0, height, width)
    n_levels = len(level_shapes(window[2:]))
    # TIFF's table of colours, (3, 256): classes in theirs, the rest black; 255 becomes 65,535
    colormap = np.zeros((3, 256), np.uint16)
    colormap[:, : len(classes)] = 257 * np.array([c.color or (0, 0, 0) for c in classes]).T
    first = {"subifds": n_levels - 1, "metadata": _ome_metadata(classes, mask_mpp, name)}
    # BigTIFF whatever the size: how large compressed tiles become is known at the end only.
    with written_beside(path) as beside, TiffWriter(beside, bigtiff=True, ome=True) as tiff:
        for level in range(n_levels):
            options = {"colormap": colormap} | (first if level == 0 else {})
            _write_level(tiff, (mask, *reduced), window, level, mask_mpp, **options)


def write_asap_tiff(
    path: Path, mask: MaskLike, *, mask_mpp: tuple[float, float], reduced: Sequence[MaskLike] = ()
) -> None:
    """Write the whole mask as ASAP and OpenSlide want it: levels as pages, no XML, no colours.

    ASAP scales an overlay by its width, so the mask must not be cropped.
    Arguments are those of `write_ome_tiff`.
    """
    height, width = mask.shape
    with written_beside(path) as beside, TiffWriter(beside, bigtiff=True) as tiff:
        for level in range(len(level_shapes(mask.shape))):
            window = (0, 0, height, width)
            _write_level(tiff, (mask, *reduced), window, level, mask_mpp, metadata=None)


def _write_level(
    tiff: TiffWriter,
    masks: Sequence[MaskLike],
    window: Crop,
    level: int,
    mask_mpp: tuple[float, float],
    **options: Any,
) -> None:
    """Stream one level of the pyramid into the file."""
    tiff.write(
        encoded_tiles(masks, window, level, _deflate),
        shape=level_shapes(window[2:])[level],
        dtype=np.uint8,
        tile=(TILE, TILE),
        compression=COMPRESSION.ADOBE_DEFLATE,
        # 1: a reduced version of another page
        subfiletype=1 if level else 0,
        # µm/px to px/cm, x before y
        resolution=tuple(1e4 / (mpp * 2**level) for mpp in reversed(mask_mpp)),
        resolutionunit=RESUNIT.CENTIMETER,
        **options,
    )


def encoded_tiles(
    masks: Sequence[MaskLike],
    window: Crop,
    level: int,
    encode_tile: Callable[[npt.NDArray[np.uint8]], bytes],
) -> Iterator[bytes]:
    """Yield the compressed tiles of a level, row-major, having read it in larger blocks.

    Args:
        masks: the whole one, and its reduced levels as far as there are any.
        window: what is written of the whole one.
        level: number of the level to be made of it.
        encode_tile: compresses `TILE` × `TILE` pixels; called in threads.
    """
    background = encode_tile(np.zeros((TILE, TILE), np.uint8))
    # the most reduced of the levels at hand that has the window's first pixel
    k = max(k for k in range(min(level + 1, len(masks))) if not any(v % 2**k for v in window[:2]))
    first = [v >> k for v in window[:2]]
    last = [-(-(v + length) // 2**k) for v, length in zip(window[:2], window[2:], strict=True)]
    step = 2 ** (level - k)
    tops, lefts = (range(a, b, BLOCK * step) for a, b in zip(first, last, strict=True))

    def encode(corner: tuple[int, int]) -> list[list[bytes]]:
        y, x = (slice(a, min(a + BLOCK * step, b), step) for a, b in zip(corner, last, strict=True))
        pixels = np.asarray(masks[k][y, x])
        n_rows, n_columns = (-(-n // TILE) for n in pixels.shape)
        if not pixels.any():
            return [[background] * n_columns] * n_rows
        pixels = np.pad(pixels, [(0, -n % TILE) for n in pixels.shape])
        rows = pixels.reshape(n_rows, TILE, n_columns, TILE).swapaxes(1, 2)
        return [[encode_tile(t) if t.any() else background for t in row] for row in rows]

    blocks = map_in_threads(encode, itertools.product(tops, lefts))
    for _ in tops:
        for row in zip(*itertools.islice(blocks, len(lefts)), strict=True):
            yield from itertools.chain.from_iterable(row)


def _deflate(tile: npt.NDArray[np.uint8]) -> bytes:
    # libdeflate 1: 0.2 to 0.3 GB/s a core whatever the mask. 5 and 6 make busy masks a third
    # smaller, but noisy ones at a quarter of the speed or less.
    return bytes(imagecodecs.deflate_encode(tile.tobytes(), level=1))


def _ome_metadata(
    classes: Sequence[ClassInfo], mask_mpp: tuple[float, float], name: str
) -> dict[str, Any]:
    """Return what goes into the OME-XML; a channel has one colour, the first class's."""
    name = _xml_text(name)
    meaning = _xml_text(", ".join(f"{i} = {c.name}" for i, c in enumerate(classes)))
    red, green, blue = classes[1].color or (255, 255, 255)
    rgba = np.uint32(red << 24 | green << 16 | blue << 8 | 255)
    return {
        "axes": "YX",
        # tifffile's own would hold the time and the machine's network address
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {meaning} {mask_mpp[::-1]}")),
        "Name": name,
        "Description": meaning,
        "PhysicalSizeX": mask_mpp[1],
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": mask_mpp[0],
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": [meaning], "Color": [int(rgba.view(np.int32))]},
    }


def _xml_text(text: str) -> str:
    """Return the text without what XML does not allow: control characters, undecodable bytes."""
    # older tifffile leave a double quote in an attribute as it is
    return "".join(c for c in text if c.isprintable()).replace('"', "'")
