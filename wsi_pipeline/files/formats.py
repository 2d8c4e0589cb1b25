"""What a file is by its first bytes, and which files of DICOM are slides."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.paths import check_opens, quiet

if TYPE_CHECKING:
    from pydicom import Dataset

Kind = Literal["PNG", "JPEG", "TIFF", "DICOM", "NIfTI", "NRRD", "gzip", "zip", ""]

STARTS: dict[bytes, Kind] = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    # BigTIFF
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"NRRD": "NRRD",
    b"\x1f\x8b": "gzip",
    b"PK\3\4": "zip",
}
DRIVERS: dict[Kind, str] = {"PNG": "PNG", "JPEG": "JPEG", "TIFF": "GTiff"}
"""GDAL's name of each kind of picture."""

HEAD = 352
"""Bytes that tell each kind; those of a NIfTI's header."""

BARE_ELEMENTS = (0x00, 0x01, 0x05, 0x06, 0x08, 0x12, 0x13, 0x14, 0x16, 0x18)
"""Of group 0008, with which a file of DICOM without preamble may begin."""


def kind_of(path: Path) -> Kind:
    """Return what an image or volume is by its first bytes; "" for what is not known here.

    Raises:
        SourceError: it cannot be read.
    """
    check_opens(path)
    try:
        with path.open("rb") as file:
            kind = kind_by_head(file.read(HEAD))
        if kind == "gzip":
            with gzip.open(path) as file:
                kind = "NIfTI" if kind_by_head(file.read(HEAD)) == "NIfTI" else ""
    except (EOFError, zlib.error):
        return ""
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    # A zip may be an OME-Zarr, which is a slide.
    return "" if kind == "zip" else kind


def kind_by_head(head: bytes) -> Kind:
    """Return what the first bytes of a file tell of its kind, `HEAD` of them at the best."""
    # DICOM leaves its beginning to other formats
    if head[128:132] == b"DICM" or _is_bare_dicom(head):
        return "DICOM"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "NIfTI"
    return next((kind for start, kind in STARTS.items() if head.startswith(start)), "")


def _is_bare_dicom(head: bytes) -> bool:
    """Return whether a file begins with the attributes of DICOM, without preamble and mark."""
    group, element, kind = head[:2], head[2:4], head[4:6]
    if group == b"\x02\0":
        return element in (b"\0\0", b"\1\0") and kind in (b"UL", b"OB")
    # High bytes first.
    if group == b"\0\x08":
        group, element = group[::-1], element[::-1]
    if group != b"\x08\0" or int.from_bytes(element, "little") not in BARE_ELEMENTS:
        return False
    # The kind of a value, or the upper half of its length.
    return kind in (b"UL", b"CS", b"UI", b"DA", b"TM", b"SH") or head[6:8] == b"\0\0"


def is_dicom(path: Path) -> bool:
    """Return whether a path is of a file of DICOM that can be read, with or without preamble."""
    try:
        return path.is_file() and kind_of(path) == "DICOM"
    except SourceError:
        return False


def has_preamble(path: Path) -> bool:
    """Return whether a path is of a DICOM file with preamble, as those of slides are."""
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_dicom_slide(path: Path) -> bool:
    """Return whether a DICOM file is of a slide: a level, or a label, overview or thumbnail of it.

    So is what cannot be read, for its reader to say why.
    """
    try:
        return slide_header(path) is not None
    except Exception:
        # pydicom raises anything on damaged files.
        return True


def slide_header(path: Path) -> Dataset | None:
    """Return what a DICOM file says of the slide that it belongs to, None where it is none.

    Raises:
        Exception: whatever pydicom raises on damaged files.
    """
    # It takes its time.
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage

    with quiet():
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            # pydicom would unpack all of it, whatever it comes to, and no slide's reader can
            if meta.get("MediaStorageSOPClassUID") != VLWholeSlideMicroscopyImageStorage:
                return None
            raise ValueError("a deflated slide")
        header = dcmread(
            path,
            stop_before_pixels=True,
            specific_tags=[
                "SOPClassUID", "SeriesInstanceUID", "ImageType",
                "TotalPixelMatrixColumns", "TotalPixelMatrixRows",
                "SharedFunctionalGroupsSequence", "ImagedVolumeWidth", "ImagedVolumeHeight",
            ],
        )  # fmt: skip
        return header if header.SOPClassUID == VLWholeSlideMicroscopyImageStorage else None


def dicom_slides(paths: Iterable[Path]) -> list[Path]:
    """Choose from DICOM files; return one for each whole-slide image, that of the largest level.

    OpenSlide finds the other levels beside it. Labels, overviews, segmentations and whatever else
    is not a slide are left out; what cannot be read at all is kept, for its reader to say why.
    """
    damaged: list[Path] = []
    largest: dict[str, tuple[int, Path]] = {}
    for path in paths:
        try:
            header = slide_header(path)
            with quiet():
                if header is None or "VOLUME" not in header.ImageType:
                    continue
                area = int(header.TotalPixelMatrixColumns) * int(header.TotalPixelMatrixRows)
                series = str(header.SeriesInstanceUID)
        except Exception:
            # pydicom raises anything on damaged files.
            damaged.append(path)
            continue
        if series not in largest or area > largest[series][0]:
            largest[series] = (area, path)
    return sorted([*damaged, *(path for _, path in largest.values())])
