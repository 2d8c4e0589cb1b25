"""Planar images: ultrasound, mammograms, single slices; PNG, JPEG, TIFF and DICOM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.formats import DRIVERS, Kind, kind_of
from wsi_pipeline.geometry import Shape, box_slices
from wsi_pipeline.sources.base import (
    MAX_PIECE,
    Opened,
    check_size,
    one_line,
    sampled_digest,
    turned_doubts,
)
from wsi_pipeline.sources.decoded import DENSEST, opened
from wsi_pipeline.sources.radiology.dicom import (
    burnt_in,
    count_frames,
    planar_spacing,
    read_frame,
    read_header,
)
from wsi_pipeline.sources.tiff_check import check_tiff

SMALL = 1 << 24
"""Decoded bytes up to which a header is believed; blank pages may come to almost nothing."""
FOLLOWS = "pixels and mask follow the order in which it is stored"

SUFFIXES = frozenset(["", ".png", ".jpg", ".jpeg", ".tif", ".tiff"])
"""Of pictures; slides may begin like a picture, too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Image(Opened):
    """An opened planar image; its pixels are in memory.

    Attributes:
        spacing_mm: (y, x) mm between pixels; None where the file does not say.
        value_range: Values of black and white: of the file's window, of its bits, or the least
            and the largest.
        stored: (y, x, channels) pixels as they are stored.
        slope: Factor of stored pixels, to which `intercept` is added.
    """

    path: Path
    spacing_mm: tuple[float, ...] | None
    fingerprint: str
    backend: str
    doubts: tuple[str, ...]
    value_range: tuple[float, float]
    frame: int
    stored: npt.NDArray[Any]
    slope: float = 1.0
    intercept: float = 0.0

    def read(self, start: Shape, shape: Shape) -> npt.NDArray[np.float32]:
        """Read a rectangle (y, x) that lies inside; return (*shape, channels), values as meant."""
        return as_meant(self.stored[box_slices(start, shape)], self.slope, self.intercept)

    def as_rgb(self) -> npt.NDArray[np.uint8]:
        """Return all of it as people see it, uint8 (y, x, 3)."""
        black, white = self.value_range
        values = self.read((0, 0), self.shape) - np.float32(black)
        values *= np.float32(255 / max(white - black, 1e-12))
        pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return np.repeat(pixels, 4 - self.channels, axis=-1)[..., :3]

    @property
    def shape(self) -> Shape:
        """Return (y, x) pixels."""
        return self.stored.shape[:2]

    @property
    def channels(self) -> int:
        """Return 1, or 3 for RGB."""
        return int(self.stored.shape[2])

    @property
    def can_be_referred_to(self) -> bool:
        """Return whether it is DICOM."""
        return self.backend == "pydicom"


def as_meant(stored: npt.NDArray[Any], slope: Any, intercept: Any) -> npt.NDArray[np.float32]:
    """Return slope × stored + intercept, exact until it is rounded to float32."""
    if np.all(slope == 1) and np.all(intercept == 0):
        return np.array(stored, np.float32)
    return np.asarray(stored * np.float64(slope) + intercept, np.float32)


def open_image(path: Path, *, frame: int | None = None) -> Image:
    """Open a planar image: PNG, JPEG, TIFF or DICOM; return it.

    Args:
        frame: Which of several, from 0; None = that which the file names, or the first.

    Raises:
        SourceError: no image, or one that cannot be read.
    """
    if path.is_dir():
        raise SourceError(f"{path}: a folder; expected a planar image")
    kind = kind_of(path)
    if kind != "DICOM" and kind not in DRIVERS:
        what = f"a volume ({kind})" if kind else "no image that is known here"
        raise SourceError(f"{path}: {what}; expected a planar image: PNG, JPEG, TIFF or DICOM")
    if kind == "TIFF":
        check_tiff(path)
    try:
        return _open_dicom(path, frame) if kind == "DICOM" else _open_picture(path, kind, frame)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from error
    except Exception as error:
        # Decoders raise anything on damaged pictures.
        raise SourceError(f"{path}: cannot be decoded as {kind}: {one_line(error)}") from error


def _open_dicom(path: Path, frame: int | None) -> Image:
    header = read_header(path)
    named = int(header.get("RepresentativeFrameNumber") or 1) - 1
    chosen, doubts = _choose(frame, count_frames(header), named)
    spacing, unsure = planar_spacing(header, chosen)
    pixels, meaning = read_frame(path, header, chosen)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    slope, intercept = meaning.slope, meaning.intercept
    return Image(
        path=path,
        fingerprint=_fingerprint(path, chosen),
        backend="pydicom",
        spacing_mm=spacing,
        doubts=(*doubts, *unsure, *burnt_in(header)),
        value_range=meaning.window or meaning.full or _value_range(pixels, slope, intercept),
        frame=chosen,
        stored=pixels,
        slope=slope,
        intercept=intercept,
    )


def _open_picture(path: Path, kind: Kind, frame: int | None) -> Image:
    directory, chosen, doubts = 0, 0, list[str]()
    if kind == "TIFF":
        with tifffile.TiffFile(path) as tiff:
            every: list[Any] = list(tiff.pages)
            pages = [page for page in every if not page.is_reduced]
            chosen, doubts = _choose(frame, len(pages))
            directory = pages[chosen].offset
            doubts += turned_doubts(pages[chosen].tags.valueof("Orientation", 1), FOLLOWS)
    with opened(path, DRIVERS[kind], directory) as dataset:
        check_size((dataset.width, dataset.height))
        about = {**dataset.tags(ns="IMAGE_STRUCTURE"), **dataset.tags(1, ns="IMAGE_STRUCTURE")}
        _check_picture(path, dataset, about)
        pixels, full, hidden = _pixels(dataset, about)
        turned = dataset.tags().get("EXIF_Orientation", "1")
    if hidden:
        doubts.append("its transparency is left out: what it hides is seen by the network")
    doubts += turned_doubts(turned, FOLLOWS)
    inverted = full is not None and "MINISWHITE" in about
    return Image(
        path=path,
        fingerprint=_fingerprint(path, chosen),
        backend="gdal",
        spacing_mm=None,
        doubts=tuple(doubts),
        value_range=_value_range(pixels, 1.0, 0.0) if full is None else (0.0, full),
        frame=chosen,
        stored=pixels,
        slope=-1.0 if inverted else 1.0,
        intercept=full or 0.0 if inverted else 0.0,
    )


def _fingerprint(path: Path, frame: int) -> str:
    digest = sampled_digest(path)
    digest.update(f"frame {frame}".encode())
    return digest.hexdigest()


def _value_range(stored: npt.NDArray[Any], slope: float, intercept: float) -> tuple[float, float]:
    """Return the least and the largest value of stored pixels."""
    values = as_meant(stored, slope, intercept)
    return float(values.min()), float(values.max())


def _choose(frame: int | None, frames: int, named: int = 0) -> tuple[int, list[str]]:
    """Return the frame to read, and a sentence where there are others."""
    chosen = named if frame is None and named < frames else frame or 0
    if not 0 <= chosen < frames:
        raise SourceError(f"has {frames} frames; there is none of number {chosen} (from 0)")
    return chosen, [f"frame {chosen + 1} of {frames} is read"] if frames > 1 else []


def _check_picture(path: Path, dataset: Any, about: Mapping[str, str]) -> None:
    """Refuse slides, colours that are not RGB, and what does not fit in memory."""
    if path.suffix.lower() not in SUFFIXES:
        raise SourceError("by its name no planar image; a slide needs a bundle for slides")
    if dataset.count > 4:
        raise SourceError(f"{dataset.count} bands; expected grey or RGB")
    space = about.get("SOURCE_COLOR_SPACE", "RGB")
    if space not in ("RGB", "YCbCr"):
        raise SourceError(f"colours as {space}; expected grey or RGB")
    itemsize = dataset.count * np.dtype(dataset.dtypes[0]).itemsize
    decoded, stored = dataset.width * dataset.height * itemsize, path.stat().st_size
    if decoded > max(SMALL, DENSEST * stored):
        raise SourceError(f"its header says {decoded:,} bytes, which {stored:,} cannot hold")
    if decoded > MAX_PIECE:
        raise SourceError(
            f"{dataset.width:,} × {dataset.height:,} px of {itemsize} bytes are more than the "
            f"{MAX_PIECE >> 20} MiB of a planar image; a slide needs a bundle for slides"
        )


def _pixels(dataset: Any, about: Mapping[str, str]) -> tuple[npt.NDArray[Any], float | None, bool]:
    """Return pixels (y, x, 1 or 3), their full scale, and whether a transparency was left out.

    The full scale is None for signed and for real numbers.
    """
    from rasterio.enums import ColorInterp

    pixels = np.moveaxis(dataset.read(), 0, -1)
    if pixels.dtype.kind not in "uif":
        raise SourceError(f"pixels of {pixels.dtype}; expected whole or real numbers")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise SourceError("holds values that are no numbers (NaN or infinite)")
    bits = int(about.get("NBITS", 8 * pixels.itemsize))
    # By a band, or by a value that is transparent.
    hidden = bool((dataset.dataset_mask() < 255).any())
    colors = dataset.colorinterp
    if colors[0] == ColorInterp.palette and "MINISWHITE" not in about:
        table = dataset.colormap(1)
        palette = np.array([table.get(i, (0, 0, 0, 0)) for i in range(max(table) + 1)], np.uint8)
        hidden |= bool((palette[pixels[..., 0], 3] < 255).any())
        pixels, bits = palette[pixels[..., 0], :3], 8
        if (palette[:, :1] == palette[:, :3]).all():
            pixels = pixels[..., :1]
    if colors[-1] == ColorInterp.alpha:
        pixels = pixels[..., :-1]
    if pixels.shape[2] not in (1, 3):
        raise SourceError(f"{pixels.shape[2]} bands; expected grey or RGB")
    return pixels, 2.0**bits - 1 if pixels.dtype.kind == "u" else None, hidden
