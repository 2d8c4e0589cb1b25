"""Slide files: which reader takes which, and what is said of those that none takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide

from wsi_pipeline.errors import SourceError, WsiPipelineError, without_secrets
from wsi_pipeline.files.dicomweb import DicomWeb
from wsi_pipeline.files.formats import HEAD, dicom_slides, has_preamble, kind_by_head
from wsi_pipeline.files.ngff import is_ome_zarr, is_zarr_url
from wsi_pipeline.files.paths import check_opens, is_remote
from wsi_pipeline.sources.base import Backend, one_line
from wsi_pipeline.sources.decoded import PictureBackend
from wsi_pipeline.sources.jpeg import dicom_colour_doubts
from wsi_pipeline.sources.ngff_reader import OmeZarrBackend
from wsi_pipeline.sources.openslide_reader import OpenSlideBackend
from wsi_pipeline.sources.tiff_check import check_tiff
from wsi_pipeline.sources.tiff_reader import OtherReader, TiffBackend
from wsi_pipeline.sources.tiff_tiles import tagged_colour_doubts

TIFF_VENDORS = ("aperio", "generic-tiff", None)
"""As OpenSlide names them: where a TIFF's tiles are the slide, not pieces to be put together."""
ROUNDING = 4
"""Grey values by which decoders of one codec differ."""
KINDS = {
    b"\xff\x4f\xff\x51": "JPEG 2000 picture",
    b"\x00\x00\x00\x0c": "JPEG 2000 picture",
    b"Obje": "MetaImage volume",
    b"SIMP": "FITS image",
    b"\x1f\x8b": "file compressed by gzip",
    b"%PDF": "PDF document",
}
"""What is known by its first bytes, and not read."""
NO_SERIES = "has no series; --series is for OME-TIFF and OME-Zarr"

log = logging.getLogger(__name__)


def open_slide_file(path: Path, series: int | None) -> Backend:
    """Open a slide with whichever library reads it right and fastest; return the backend.

    Two libraries open a TIFF where they can, and read the same tile: tiffslide is used where they
    agree, being several times faster, and OpenSlide where they do not.

    Raises:
        SourceError: no library opens the file; the message says what was found.
        UnreachableError: its server does not answer.
    """
    try:
        return _open(path, series)
    except WsiPipelineError as error:
        if not isinstance(error, SourceError) or str(error).startswith(without_secrets(str(path))):
            raise
        raise SourceError(f"{path}: {error}") from error
    except Exception as error:
        # The libraries raise anything on a damaged file.
        raise SourceError(
            f"{path}: cannot be opened, {one_line(error)}; check the file against its original"
        ) from error


def _open(path: Path, series: int | None) -> Backend:
    if not is_remote(path):
        check_opens(path)
        if path.is_dir() and is_ome_zarr(path):
            return OmeZarrBackend(path, series)
        if path.is_dir():
            slides = dicom_slides(filter(has_preamble, sorted(path.iterdir())))
            if len(slides) > 1:
                names = ", ".join(slide.name for slide in slides[:5])
                raise SourceError(f"a folder of {len(slides)} DICOM slides; name one of {names}")
            if not slides:
                raise SourceError(
                    "a folder, not a slide; give a slide file, a folder of one DICOM slide, an "
                    "OME-Zarr, or a patch grid written by `tile`"
                )
            return _open(slides[0], series)
    elif isinstance(path, DicomWeb):
        if series is not None:
            raise SourceError(NO_SERIES)
        # pydicom takes a quarter of a second to load
        from wsi_pipeline.sources.dicomweb_reader import DicomWebBackend

        return DicomWebBackend(path)
    elif is_zarr_url(path):
        return OmeZarrBackend(path, series)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except FileNotFoundError as error:
        raise SourceError("no such file") from error
    except Exception as error:
        # Clients of remote stores raise what they like.
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SourceError(f"cannot be read ({reason})") from error
    if not head:
        raise SourceError("an empty file; copy the slide again")
    kind = kind_by_head(head)
    if kind == "TIFF":
        return _open_tiff(path, series)
    if kind == "zip":
        return OmeZarrBackend(path, series)
    if series is not None:
        raise SourceError(NO_SERIES)
    # A .mrxs begins with a picture of the slide.
    if kind in ("PNG", "JPEG") and path.suffix.lower() != ".mrxs":
        return PictureBackend(path, kind)
    if is_remote(path):
        raise SourceError(
            "neither TIFF nor OME-Zarr nor picture: OpenSlide, which reads the other formats, "
            "wants local files; copy the slide here first"
        )
    reference, refusal = _try_openslide(path)
    if reference is None:
        raise SourceError(_what_is_wrong(path, head, refusal))
    if has_preamble(path):
        reference.doubts += tuple(dicom_colour_doubts(path))
    return reference


def _open_tiff(path: Path, series: int | None) -> Backend:
    check_tiff(path)
    if is_remote(path):
        return TiffBackend(path, series)
    vendor = openslide.OpenSlide.detect_format(path)
    if vendor not in TIFF_VENDORS:
        if series is not None:
            raise SourceError(NO_SERIES)
        reference, refusal = _try_openslide(path)
        if reference is None:
            raise SourceError(
                f"a TIFF of {vendor}, which OpenSlide alone reads, and does not open: {refusal}; "
                "check the file against its original"
            )
        reference.doubts += tuple(tagged_colour_doubts(path))
        return reference
    size: tuple[int, int] | None = None
    properties: Mapping[str, str] = {}
    try:
        found = TiffBackend(path, series)
    except OtherReader as error:
        size, properties, reason = error.size, error.properties, str(error)
    except SourceError:
        # What was found in the file is no reason to let another library read something else of it.
        raise
    except Exception as error:
        # The libraries raise anything on a damaged file.
        log.debug("tiffslide does not open %s", path, exc_info=True)
        reason = f"a TIFF that no reader opens, {one_line(error)}; check it against its original"
    else:
        reference, _ = _try_openslide(path)
        return found if reference is None else _better(found, reference)
    reference, _ = _try_openslide(path)
    if reference is None or series is not None or size not in (None, reference.size):
        raise SourceError(reason)
    reference.properties = _joined(properties, reference.properties)
    return reference


def _try_openslide(path: Path) -> tuple[OpenSlideBackend | None, str]:
    """Return OpenSlide's backend, or None and why it does not open the file."""
    try:
        return OpenSlideBackend(path), ""
    except openslide.OpenSlideUnsupportedFormatError:
        return None, ""
    except Exception as error:
        # The libraries raise anything on a damaged file.
        log.debug("OpenSlide does not open %s", path, exc_info=True)
        return None, one_line(error)


def _what_is_wrong(path: Path, head: bytes, refusal: str) -> str:
    """Return what a file that no reader opens seems to be, and what to do."""
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        return f"its folder {path.stem} is not there; put it beside the .mrxs file"
    refusal = refusal.replace(f"{path}: ", "")
    if has_preamble(path):
        return (
            f"a DICOM file that is no slide to OpenSlide, {refusal or 'of another kind'}; "
            "expected VL Whole Slide Microscopy, 8 bits, JPEG, JPEG 2000 or uncompressed"
        )
    for magic, kind in KINDS.items():
        if head.startswith(magic):
            return f"a {kind}, which is not read; save the picture as a tiled TIFF"
    found = refusal or "it begins like no kind of slide"
    return f"not a slide, {found}; check the file against its original"


def _better(found: TiffBackend, reference: OpenSlideBackend) -> Backend:
    """Return the faster of two backends if both see the same slide, else the one that is right."""
    is_same = found.size == reference.size
    if is_same:
        found.properties = reference.properties = _joined(found.properties, reference.properties)
    elif not found.is_ome:
        width, height = reference.size
        found.doubts += (
            f"OpenSlide, and QuPath with it, shows another picture of the file, {width} × {height} "
            "px: polygons fit the picture that is read here, not that one",
        )
    if is_same and not found.is_known_better:
        difference = _difference(found, reference)
        if difference is not None and difference > ROUNDING:
            reference.doubts += (
                f"two libraries read its pixels differently, by up to {difference} grey values: "
                "OpenSlide's are taken; look whether the colours are right",
            )
        fewer = len(found.level_sizes) < len(reference.level_sizes)
        if fewer or difference is None or difference > ROUNDING:
            found.close()
            return reference
    reference.close()
    return found


def _joined(found: Mapping[str, str], reference: Mapping[str, str]) -> dict[str, str]:
    """Return what two readers say of a slide.

    OpenSlide, the reference, knows the scanners, but the tags of the first directory only.
    """
    return {**found, **{k: v for k, v in reference.items() if not k.startswith("tiff.")}}


def _difference(found: TiffBackend, reference: Backend) -> int | None:
    """Return by how many grey values two backends differ on a level-0 tile with much in it.

    None where only the reference can read it.
    """
    for region in found.busy_regions():
        try:
            expected = reference.read_level(0, *region)
        except SourceError:
            continue
        try:
            pixels = found.read_level(0, *region)
        except SourceError:
            return None
        return int(np.abs(pixels.astype(np.int16) - expected).max())
    return 0
