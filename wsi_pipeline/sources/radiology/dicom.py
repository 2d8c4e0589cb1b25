"""DICOM of radiology: what a file says of its values, its pixels' size and their place in space.

Only the attributes named in `TAGS` are read, none of which tells who the patient is; what pydicom
says of others is not passed on.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.config import IGNORE
from pydicom.pixels.decoders.base import (
    JPEGExtended12BitDecoder,
    JPEGLosslessDecoder,
    JPEGLosslessSV1Decoder,
)
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import iter_pixels, pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    VLWholeSlideMicroscopyImageStorage,
)

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.paths import quiet
from wsi_pipeline.sources.base import MAX_PIECE, one_line

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
    "BurnedInAnnotation", "RepresentativeFrameNumber", "InstanceNumber",
    "TemporalPositionIdentifier", "TemporalPositionIndex", "TriggerTime", "DiffusionBValue",
    "EchoTime", "AcquisitionNumber", "AcquisitionDateTime", "AcquisitionTime", "ContentTime",
)  # fmt: skip

TISSUE_REGION, CENTIMETRE = 1, 3
"""Codes of a two-dimensional picture, and of cm, in the regions of ultrasound (PS3.3 C.8.5.5)."""

SAME_SIZE = 1e-3
"""Share by which pixels may differ and count as of one size: what is written is rounded."""

PHOTOMETRIC = (
    "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR",
    "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT",
)  # fmt: skip
"""What pixels are read; all of YBR become RGB."""

NO_IMAGES = (
    "1.2.840.10008.5.1.4.1.1.66.",  # segmentations of all kinds
    "1.2.840.10008.5.1.4.1.1.30",  # parametric maps
    "1.2.840.10008.5.1.4.1.1.481.",  # doses and other objects of radiotherapy
)
"""How the UIDs of kinds begin whose pixels are not values of a picture."""

UID_OF_ENCODING = {
    (True, True): ImplicitVRLittleEndian,
    (False, True): ExplicitVRLittleEndian,
    (False, False): ExplicitVRBigEndian,
}
"""Transfer syntaxes by whether kinds of values are left out, and whether low bytes come first."""

# What pydicom itself, Pillow and pyjpegls do not decode, or not with 12 bits.
for _decoder in (JPEGExtended12BitDecoder, JPEGLosslessDecoder, JPEGLosslessSV1Decoder):
    if "imagecodecs" not in _decoder.available_plugins:
        _decoder.add_plugin(
            "imagecodecs", ("wsi_pipeline.sources.radiology.dicom_jpeg", "decode_frame")
        )

Range = tuple[float, float]
Stored = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Values:
    """What stored numbers mean: `slope` × number + `intercept`, higher is brighter.

    Attributes:
        slope: Negative where the file shows low values bright (MONOCHROME1).
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
    header = read_tags(path)
    try:
        with quiet():
            check_header(header)
    except (TypeError, ValueError) as error:
        # Sizes that are no numbers.
        raise SourceError(f"cannot be read as DICOM ({type(error).__name__})") from None
    return header


def read_tags(path: Path) -> Dataset:
    """Read the attributes of `TAGS` of a DICOM file of any kind; return them.

    Raises:
        SourceError: no DICOM file, or a damaged one.
    """
    if not path.stat().st_size:
        raise SourceError("an empty file; copy it again")
    try:
        with quiet():
            # Scanners and archives of old leave the preamble out.
            header = dcmread(
                _inflated(path), stop_before_pixels=True, specific_tags=list(TAGS), force=True
            )
            # Values are made of bytes when they are first asked for: here, where nothing is told.
            for _ in (*header.file_meta, *header.iterall()):
                pass
            if not header.file_meta and header:
                implicit, little = header.original_encoding
                header.file_meta.TransferSyntaxUID = UID_OF_ENCODING[bool(implicit), bool(little)]
    except SourceError:
        raise
    except Exception as error:
        # pydicom raises anything on damaged files.
        # What it says may quote values that are the patient's.
        raise SourceError(f"cannot be read as DICOM ({type(error).__name__})") from None
    if not header.file_meta:
        raise SourceError("begins without the mark of DICOM; save it again as DICOM")
    return header


def _inflated(path: Path) -> Path | BytesIO:
    """Return a file whose attributes are stored as they are: unpacked where they are deflated.

    pydicom unpacks deflated files whole, whatever they come to, and decodes no pixels of them.
    """
    with path.open("rb") as file:
        head = file.read(1024)
        if DeflatedExplicitVRLittleEndian.encode() not in head:
            return path
        # (0002,0000) says how long the rest of the file meta information is
        file.seek(144 + int.from_bytes(head[140:144], "little"))
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        data = unpacker.decompress(file.read(MAX_PIECE), MAX_PIECE)
    if unpacker.unconsumed_tail:
        raise SourceError(f"unpacks to more than {MAX_PIECE >> 20} MiB, too much to hold")
    return BytesIO(data)


def check_header(header: Dataset) -> None:
    """Refuse, by a SourceError, what has no pixels that are read here."""
    sop_class = _uid(header.get("SOPClassUID", ""))
    if sop_class == VLWholeSlideMicroscopyImageStorage:
        raise SourceError("a DICOM whole-slide image; segment it with a bundle for slides")
    if "Rows" not in header or "Columns" not in header or "BitsAllocated" not in header:
        raise SourceError(f"a DICOM file without pixels ({_name(sop_class)})")
    if sop_class.startswith(NO_IMAGES):
        raise SourceError(
            f"no image, but DICOM's {_name(sop_class)}; name the image it was made of"
        )
    if header.get("PhotometricInterpretation") not in PHOTOMETRIC:
        raise SourceError("colours of a kind that is not read; expected grey, RGB or YBR")
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


def is_image_class(header: Dataset) -> bool:
    """Return whether a file is by its kind an image of radiology, or too damaged to tell."""
    sop_class = _uid(header.get("SOPClassUID", header.file_meta.get("MediaStorageSOPClassUID", "")))
    if not sop_class:
        return True
    return (
        "Image Storage" in sop_class.name
        and sop_class != VLWholeSlideMicroscopyImageStorage
        and not sop_class.startswith(NO_IMAGES)
    )


def _uid(value: object) -> UID:
    # pydicom's warning of one that is none would quote it.
    return UID(str(value), validation_mode=IGNORE)


def _name(uid: UID) -> str:
    """Return the name of a known UID; a damaged one may hold what lies behind it in the file."""
    return uid.name if uid.name != uid else "of an unknown kind"


def count_frames(header: Dataset) -> int:
    """Return how many frames a file holds."""
    return int(header.get("NumberOfFrames") or 1)


def groups_of(header: Dataset, frame: int) -> list[Dataset]:
    """Return the functional groups of a frame, its own before those that all share."""
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    return [*own[frame : frame + 1], *(header.get("SharedFunctionalGroupsSequence") or [])]


def read_frame(path: Path, header: Dataset, frame: int) -> tuple[Stored, Values]:
    """Decode one frame; return its pixels, (y, x) or RGB (y, x, 3), and what they mean.

    Raises:
        SourceError: its pixels cannot be decoded.
    """
    try:
        with quiet():
            stored = pixel_array(
                _inflated(path), index=frame, transfer_syntax_uid=header.file_meta.TransferSyntaxUID
            )
            if header.PhotometricInterpretation == "PALETTE COLOR":
                bits = header.RedPaletteColorLookupTableDescriptor[2]
                return apply_color_lut(stored, header), Values(full=(0, 2**bits - 1))
            if header.get("ModalityLUTSequence"):
                bits = header.ModalityLUTSequence[0].LUTDescriptor[2]
                return apply_modality_lut(stored, header), values(header, full=(0, 2**bits - 1))
            return stored, values(header, groups_of(header, frame))
    except SourceError:
        raise
    except Exception as error:
        # pydicom and its decoders raise anything on damaged pixels.
        raise _undecodable(header, error) from error


def decode_frames(path: Path, header: Dataset, take: Callable[[int, Stored], None]) -> None:
    """Decode all frames of a file in its order; hand each, (y, x), over with its number.

    Raises:
        SourceError: its pixels cannot be decoded.
    """
    try:
        with quiet():
            syntax = header.file_meta.TransferSyntaxUID
            decoded = iter_pixels(_inflated(path), transfer_syntax_uid=syntax)
            for frame, stored in enumerate(decoded):
                take(frame, stored)
    except OSError:
        # Of the file, or of what takes them.
        raise
    except Exception as error:
        raise _undecodable(header, error) from error


def _undecodable(header: Dataset, error: Exception) -> SourceError:
    syntax = _name(header.file_meta.TransferSyntaxUID)
    # What is quoted may be values, as in `_name`.
    said = re.sub("'[^']*'", "…", one_line(error))
    return SourceError(f"its pixels ({syntax}) cannot be decoded, damaged or cut off: {said}")


def values(header: Dataset, groups: Sequence[Dataset] = (), full: Range | None = None) -> Values:
    """Return what the stored numbers of a file, or of one frame, mean.

    Args:
        groups: Functional groups of the frame, which go before the file.
        full: Range of the output of a modality LUT, applied already.

    Raises:
        SourceError: slope or intercept are no numbers.
    """
    slope, intercept = 1.0, 0.0
    if full is None:
        rescaling = part(header, groups, "PixelValueTransformationSequence")
        slope = float(rescaling.get("RescaleSlope") or 1)
        intercept = float(rescaling.get("RescaleIntercept") or 0)
        if not np.isfinite([slope, intercept]).all():
            raise SourceError("the slope or intercept of its values is no number; save it anew")
    bits = int(header.get("BitsStored") or header.BitsAllocated)
    signed = bool(header.get("PixelRepresentation"))
    stored = full or ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1))
    ends = sorted(slope * end + intercept for end in stored)
    window: Range | None = None
    shown = part(header, groups, "FrameVOILUTSequence")
    # The first window, as PS3.3 C.11.2.1.2 has it.
    said = [shown.get(name) for name in ("WindowCenter", "WindowWidth")]
    # Of what is no number nothing follows.
    with suppress(TypeError, ValueError):
        center, width = (float(np.atleast_1d(v)[0]) for v in said)
        if shown.get("VOILUTFunction", "LINEAR") == "LINEAR":
            center, width = center - 0.5, width - 1
        if 0 < width < np.inf > abs(center):
            window = (center - width / 2, center + width / 2)
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        slope, intercept = -slope, sum(ends) - intercept
        window = window and (sum(ends) - window[1], sum(ends) - window[0])
    return Values(
        slope=slope, intercept=intercept, window=window, full=None if signed else (ends[0], ends[1])
    )


def part(header: Dataset, groups: Sequence[Dataset], name: str) -> Dataset:
    """Return the item of a sequence in the first functional group that has it, or the header."""
    return next((group[name].value[0] for group in groups if group.get(name)), header)


def burnt_in(header: Dataset) -> list[str]:
    """Return a sentence where the file says that writing is part of its picture."""
    if header.get("BurnedInAnnotation") != "YES":
        return []
    return ["it says that annotation is burnt into its pixels: the network sees it, too"]


def planar_spacing(header: Dataset, frame: int) -> tuple[tuple[float, float] | None, list[str]]:
    """Return (y, x) mm between pixels, None where the file does not say, and what is doubtful."""
    # The two-dimensional pictures of ultrasound count where all agree.
    found = [
        (abs(float(region.PhysicalDeltaY)) * 10, abs(float(region.PhysicalDeltaX)) * 10)
        for region in header.get("SequenceOfUltrasoundRegions") or []
        if region.get("RegionSpatialFormat") == TISSUE_REGION
        and region.get("PhysicalUnitsXDirection") == CENTIMETRE
        and region.get("PhysicalUnitsYDirection") == CENTIMETRE
    ]
    if found:
        first = pair(found[0])
        if np.allclose(found, first, rtol=SAME_SIZE):
            return first, []
        return None, [f"its {len(found)} ultrasound regions have pixels of different sizes"]
    measures = part(header, groups_of(header, frame), "PixelMeasuresSequence")
    if measures.get("PixelSpacing"):
        return pair(measures.PixelSpacing), []
    scanned = header.get("NominalScannedPixelSpacing")
    if scanned:
        return pair(scanned), ["its pixel spacing is that of a scanned film, not of the body"]
    if not header.get("ImagerPixelSpacing"):
        return None, []
    y, x = pair(header.ImagerPixelSpacing)
    factor = float(header.get("EstimatedRadiographicMagnificationFactor") or 0)
    if factor > 0:
        return (y / factor, x / factor), [
            f"its pixel spacing is that of the detector, divided by the magnification of {factor:g}"
        ]
    return (y, x), ["its pixel spacing is that of the detector: what it shows is smaller"]


def pair(spacing: Sequence[Any]) -> tuple[float, float]:
    """Return (y, x) mm of a spacing, as numbers.

    Raises:
        SourceError: sizes that no pixel has.
    """
    y, x = (float(v) for v in spacing)
    if not (0 < y < np.inf and 0 < x < np.inf):
        raise SourceError(f"pixels of {y:g} × {x:g} mm; expected sizes above 0")
    return y, x
