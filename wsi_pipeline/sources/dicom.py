"""DICOM of radiology: what a file says of its values, its pixels' size and their place in space.

Only the attributes named in `TAGS` are read, none of which tells who the patient is; what pydicom
says of others is not passed on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, iter_pixels, pixel_array
from pydicom.uid import UID, VLWholeSlideMicroscopyImageStorage

from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources.backend import MAX_PIECE, one_line

TAGS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "BitsAllocated", "BitsStored", "PixelRepresentation",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction",
    "RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
    "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing",
    "EstimatedRadiographicMagnificationFactor", "SequenceOfUltrasoundRegions",
    "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "BurnedInAnnotation", "RepresentativeFrameNumber",
)  # fmt: skip

TISSUE_REGION, CENTIMETRE = 1, 3
"""Codes of a two-dimensional picture, and of cm, in the regions of ultrasound (PS3.3 C.8.5.5)."""

Range = tuple[float, float]
Stored = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Values:
    """What stored numbers mean: `slope` × number + `intercept`, higher is brighter.

    Attributes:
        slope: of the rescaling; negative where the file shows low values bright (MONOCHROME1).
        intercept: of the rescaling.
        window: (low, high) values that the file wants to be shown, where it says.
        full: (low, high) values that its bits can hold; None for signed and for real numbers.
    """

    slope: float = 1.0
    intercept: float = 0.0
    window: Range | None = None
    full: Range | None = None


def read_header(path: Path) -> Dataset:
    """Read what a DICOM file says of its pixels, without them; return it.

    Raises:
        SourceError: no DICOM file, or one without pixels that are read here.
    """
    try:
        with _quiet():
            header = dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
            _check(header)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
    except InvalidDicomError:
        raise SourceError(
            f"{path}: begins without the mark of DICOM; save it again as a DICOM file"
        ) from None
    except Exception as error:  # pydicom raises anything on damaged files
        raise SourceError(f"{path}: cannot be read as DICOM ({type(error).__name__})") from error
    return header


def _check(header: Dataset) -> None:
    sop_class = UID(header.get("SOPClassUID", ""))
    if sop_class == VLWholeSlideMicroscopyImageStorage:
        raise SourceError("a DICOM whole-slide image; segment it with a bundle for slides")
    if "Rows" not in header or "Columns" not in header or "BitsAllocated" not in header:
        raise SourceError(f"a DICOM file without pixels ({sop_class.name or 'of no kind'})")
    if sop_class.name.endswith("Segmentation Storage"):
        raise SourceError("a DICOM segmentation, not an image; name the image it was made of")
    rows, columns = header.Rows, header.Columns
    if min(rows, columns) < 1:
        raise SourceError(f"{columns} × {rows} px: nothing to see")
    if rows * columns * header.get("SamplesPerPixel", 1) * header.BitsAllocated // 8 > MAX_PIECE:
        raise SourceError(f"its header says {columns:,} × {rows:,} px, too many to hold")
    if header.get("SamplesPerPixel", 1) not in (1, 3):
        raise SourceError(f"{header.SamplesPerPixel} samples per pixel; expected 1 or 3")
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise SourceError("does not say how its pixels are stored (no transfer syntax)")


def count_frames(header: Dataset) -> int:
    """Return how many frames a file holds."""
    return int(header.get("NumberOfFrames") or 1)


def read_frame(path: Path, header: Dataset, frame: int) -> tuple[Stored, Values]:
    """Decode one frame; return its pixels, (y, x) or RGB (y, x, 3), and what they mean.

    Raises:
        SourceError: its pixels cannot be decoded.
    """
    try:
        with _quiet():
            stored = pixel_array(path, index=frame)
            if header.PhotometricInterpretation == "PALETTE COLOR":
                return apply_color_lut(stored, header), _palette_values(header)
            if header.get("ModalityLUTSequence"):
                bits = header.ModalityLUTSequence[0].LUTDescriptor[2]
                return apply_modality_lut(stored, header), values(header, full=(0, 2**bits - 1))
            return stored, values(header)
    except SourceError:
        raise
    except Exception as error:  # pydicom and its decoders raise anything on damaged pixels
        raise _undecodable(path, header, error) from error


def iter_frames(path: Path, header: Dataset) -> Iterator[Stored]:
    """Yield the stored frames of a file in its order, (y, x).

    Raises:
        SourceError: its pixels cannot be decoded.
    """
    try:
        with _quiet():
            yield from iter_pixels(path)
    except Exception as error:
        raise _undecodable(path, header, error) from error


def _undecodable(path: Path, header: Dataset, error: Exception) -> SourceError:
    syntax = UID(header.file_meta.TransferSyntaxUID)
    return SourceError(f"{path}: its pixels ({syntax.name}) cannot be decoded: {one_line(error)}")


def values(header: Dataset, groups: Sequence[Dataset] = (), full: Range | None = None) -> Values:
    """Return what the stored numbers of a file, or of one frame, mean.

    Args:
        header: of the file.
        groups: the frame's functional groups, which go before the file.
        full: range of the output of a modality LUT, applied already.
    """
    slope, intercept = 1.0, 0.0
    if full is None:
        rescaling = _part(header, groups, "PixelValueTransformationSequence")
        slope = float(rescaling.get("RescaleSlope") or 1)
        intercept = float(rescaling.get("RescaleIntercept") or 0)
    bits = int(header.get("BitsStored") or header.BitsAllocated)
    signed = bool(header.get("PixelRepresentation"))
    stored = full or ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1))
    ends = sorted(slope * end + intercept for end in stored)
    window = _window(_part(header, groups, "FrameVOILUTSequence"))
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        slope, intercept = -slope, sum(ends) - intercept
        window = window and (sum(ends) - window[1], sum(ends) - window[0])
    return Values(
        slope=slope,
        intercept=intercept,
        window=window,
        full=None if signed else (ends[0], ends[1]),
    )


def _palette_values(header: Dataset) -> Values:
    bits = header.RedPaletteColorLookupTableDescriptor[2]
    return Values(full=(0, 2**bits - 1))


def _part(header: Dataset, groups: Sequence[Dataset], name: str) -> Dataset:
    """Return the item of the first functional group that has one, or the file's own attributes."""
    return next((group[name].value[0] for group in groups if group.get(name)), header)


def _window(item: Dataset) -> Range | None:
    """Return (low, high) of the first window, as PS3.3 C.11.2.1.2 has it."""
    centers, widths = item.get("WindowCenter"), item.get("WindowWidth")
    if centers in (None, "") or widths in (None, ""):
        return None
    center, width = (float(np.atleast_1d(v)[0]) for v in (centers, widths))
    if item.get("VOILUTFunction", "LINEAR") == "LINEAR":
        center, width = center - 0.5, width - 1
    return (center - width / 2, center + width / 2) if width > 0 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's warnings back: they quote values, which may be the patient's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
