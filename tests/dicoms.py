"""DICOM files that tests make: planar images, films, series and enhanced multi-frame images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    VLWholeSlideMicroscopyImageStorage,
    generate_uid,
)

UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
PATIENT = {
    "PatientName": "Doe^Jane^Secret",
    "PatientID": "ID-4711-SECRET",
    "PatientBirthDate": "19700101",
    "PatientSex": "F",
    "AccessionNumber": "ACC-SECRET",
    "StudyID": "S1",
    "StudyDate": "20200102",
    "StudyTime": "120000",
    "ReferringPhysicianName": "Who^Doctor",
}


def make(pixels: np.ndarray, **attributes: Any) -> Dataset:
    """Return an image of (y, x), (y, x, 3) or, with NumberOfFrames, (n, y, x[, 3]) pixels."""
    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.SOPClassUID = CTImageStorage
    found.SOPInstanceUID = generate_uid()
    found.StudyInstanceUID = generate_uid()
    found.SeriesInstanceUID = generate_uid()
    found.Modality = "CT"
    colored = pixels.ndim == 3 + ("NumberOfFrames" in attributes)
    found.Rows, found.Columns = pixels.shape[-3:-1] if colored else pixels.shape[-2:]
    found.SamplesPerPixel = 3 if colored else 1
    found.PhotometricInterpretation = "RGB" if colored else "MONOCHROME2"
    if colored:
        found.PlanarConfiguration = 0
    bits = 8 * pixels.itemsize
    found.BitsAllocated, found.BitsStored, found.HighBit = bits, bits, bits - 1
    found.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in {**PATIENT, **attributes}.items():
        setattr(found, name, value)
    found.add_new("PixelData", "OB" if bits == 8 else "OW", pixels.tobytes())
    return found


def save(path: Path, found: Dataset) -> Path:
    """Write an image; return its path."""
    found.save_as(path, enforce_file_format=True)
    return path


def write(path: Path, pixels: np.ndarray, **attributes: Any) -> Path:
    """Write an image; return its path."""
    return save(path, make(pixels, **attributes))


def write_slide(path: Path, pixels: np.ndarray, mpp: tuple[float, float]) -> Path:
    """Write (y, x, 3) pixels as a slide of one level, TILED_FULL; return its path."""
    side, (height, width) = 240, pixels.shape[:2]
    whole = np.pad(pixels, [(0, -height % side), (0, -width % side), (0, 0)])
    frames = whole.reshape(whole.shape[0] // side, side, whole.shape[1] // side, side, 3)
    frames = frames.swapaxes(1, 2).reshape(-1, side, side, 3)
    measures, shared, corner, specimen = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [n / 1000 for n in mpp], 0.004
    shared.PixelMeasuresSequence = [measures]
    optical = Dataset()
    optical.OpticalPathIdentifier = "1"
    corner.XOffsetInSlideCoordinateSystem, corner.YOffsetInSlideCoordinateSystem = 20.5, 41.25
    specimen.SpecimenIdentifier, specimen.SpecimenUID = "S-1", generate_uid()
    return write(
        path,
        frames,
        NumberOfFrames=len(frames),
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        Modality="SM",
        ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        FrameOfReferenceUID=generate_uid(),
        PositionReferenceIndicator="SLIDE_CORNER",
        TotalPixelMatrixColumns=width,
        TotalPixelMatrixRows=height,
        TotalPixelMatrixOriginSequence=[corner],
        ImageOrientationSlide=[0, -1, 0, -1, 0, 0],
        TotalPixelMatrixFocalPlanes=1,
        NumberOfOpticalPaths=1,
        OpticalPathSequence=[optical],
        DimensionOrganizationType="TILED_FULL",
        ContainerIdentifier="C-1",
        SpecimenDescriptionSequence=[specimen],
        ImagedVolumeWidth=width * mpp[1] / 1000,
        ImagedVolumeHeight=height * mpp[0] / 1000,
        ContentDate="20190203",
        ContentTime="101112",
        SharedFunctionalGroupsSequence=[shared],
    )


def write_pyramid(
    folder: Path,
    levels: Sequence[np.ndarray],
    mpp: tuple[float, float],
    *,
    kind: str = "jpeg",
    tile: tuple[int, int] = (176, 240),
    parts: int = 1,
    left_out: Sequence[tuple[int, int, int]] = (),
    **attributes: Any,
) -> list[Path]:
    """Write (y, x, 3) levels as instances of a series, in a folder that is made; return the paths.

    Args:
        mpp: of level 0, (y, x).
        kind: "jpeg", "rgb jpeg", "jpeg 2000" or "raw".
        tile: (height, width) of a frame, even.
        parts: in which each level is cut, a concatenation.
        left_out: level, row and column of frames that are not there: then it is TILED_SPARSE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encode, syntax, colours = {
        "jpeg": (
            lambda tile: imagecodecs.jpeg_encode(tile, level=90, subsampling="422"),
            JPEGBaseline8Bit,
            "YBR_FULL_422",
        ),
        "rgb jpeg": (
            lambda tile: imagecodecs.jpeg_encode(tile, level=90, outcolorspace="RGB"),
            JPEGBaseline8Bit,
            "RGB",
        ),
        "jpeg 2000": (
            lambda tile: imagecodecs.jpeg2k_encode(tile, codecformat="j2k", mct=True),
            JPEG2000Lossless,
            "YBR_RCT",
        ),
        "raw": (np.ndarray.tobytes, ExplicitVRLittleEndian, "RGB"),
    }[kind]
    paths, (high, wide) = [], tile
    for level, pixels in enumerate(levels):
        first = write_slide(folder / f"{level}.dcm", pixels, mpp)
        height, width = pixels.shape[:2]
        whole = np.pad(pixels, [(0, -height % high), (0, -width % wide), (0, 0)], "edge")
        places = [
            (y, x)
            for y in range(0, height, high)
            for x in range(0, width, wide)
            if (level, y // high, x // wide) not in left_out
        ]
        frames = [
            encode(np.ascontiguousarray(whole[y : y + high, x : x + wide])) for y, x in places
        ]
        count = min(parts, len(frames))
        bounds = np.linspace(0, len(frames), count + 1).astype(int).tolist()
        for part, (start, stop) in enumerate(pairwise(bounds)):
            found = dcmread(first)
            found.file_meta.TransferSyntaxUID, found.PhotometricInterpretation = syntax, colours
            common = {} if level or part else {n: found[n].value for n in UIDS}
            attributes = {**common, **attributes}
            sizes = zip(mpp, levels[0].shape[:2], pixels.shape[:2], strict=True)
            spacing = [n / 1000 * round(f / own) for n, f, own in sizes]
            measures = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            measures.PixelSpacing = [round(n, 12) for n in spacing]
            found.NumberOfFrames, found.Rows, found.Columns = stop - start, high, wide
            found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            if count > 1:
                found.ConcatenationUID = generate_uid(entropy_srcs=[str(first), str(level)])
                found.ConcatenationFrameOffsetNumber = start
                found.InConcatenationNumber, found.InConcatenationTotalNumber = part + 1, count
            if left_out:
                found.DimensionOrganizationType = "TILED_SPARSE"
                found.PerFrameFunctionalGroupsSequence = []
                for y, x in places[start:stop]:
                    place, group = Dataset(), Dataset()
                    place.ColumnPositionInTotalImagePixelMatrix = x + 1
                    place.RowPositionInTotalImagePixelMatrix = y + 1
                    group.PlanePositionSlideSequence = [place]
                    found.PerFrameFunctionalGroupsSequence.append(group)
            for name, value in attributes.items():
                setattr(found, name, value)
            data = frames[start:stop]
            found.PixelData = b"".join(data) if kind == "raw" else encapsulate(data)
            paths.append(save(folder / f"{level}-{part}.dcm", found))
        first.unlink()
    return paths


def write_series(
    folder: Path,
    voxels: np.ndarray,
    *,
    spacing: Sequence[float] = (2.5, 0.7, 0.6),
    directions: Sequence[float] = (1, 0, 0, 0, 1, 0),
    origin: Sequence[float] = (-10.0, 20.0, 30.0),
    order: Sequence[int] | None = None,
    change: dict[int, dict[str, Any]] | None = None,
    **attributes: Any,
) -> Path:
    """Write (z, y, x) voxels as a CT series; return its folder.

    Args:
        folder: in which; made.
        voxels: uint16 or int16.
        spacing: (z, y, x) mm.
        directions: along a row, then down a column, LPS.
        origin: of the first slice, LPS.
        order: of the slices in the names of the files; None = as they are.
        change: attributes of single slices, by their index.
        attributes: of all slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.array(directions, float).reshape(2, 3)
    normal = np.cross(row, column)
    common = {
        "SeriesInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
        "PositionReferenceIndicator": None,
        "ImageOrientationPatient": [*row, *column],
        "PixelSpacing": list(spacing[1:]),
        "SliceThickness": spacing[0],
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
    }
    for number, z in enumerate(order or range(len(voxels))):
        place = np.array(origin) + z * spacing[0] * normal
        own = {"ImagePositionPatient": [float(f"{v:.6f}") for v in place], "InstanceNumber": z + 1}
        write(
            folder / f"slice{number:03d}",
            voxels[z],
            **{**common, **own, **attributes, **(change or {}).get(z, {})},
        )
    return folder


def without_preamble(path: Path, *, keep_meta: bool) -> Path:
    """Cut the preamble, and with it perhaps the file meta information, off a file; return it."""
    data = path.read_bytes()
    # (0002,0000) says how long the rest of group 0002 is
    length = 12 + int.from_bytes(data[140:144], "little")
    path.write_bytes(data[132 if keep_meta else 132 + length :])
    return path


def write_enhanced(
    path: Path,
    voxels: np.ndarray,
    *,
    order: Sequence[int],
    spacing: Sequence[float],
    times: int = 1,
) -> Path:
    """Write (z, y, x) voxels as one enhanced CT whose frames are in some order; return its path.

    With `times` the voxels are those of so many volumes in one place, one behind the other.
    """
    found = make(voxels[list(order)], NumberOfFrames=len(voxels))
    found.SOPClassUID = EnhancedCTImageStorage
    found.FrameOfReferenceUID = generate_uid()
    found.PositionReferenceIndicator = None
    found.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    measures, turned, rescaling, shared = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(spacing[1:]), spacing[0]
    turned.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    rescaling.RescaleSlope, rescaling.RescaleIntercept, rescaling.RescaleType = 2, -100, "HU"
    shared.PixelMeasuresSequence = [measures]
    shared.PlaneOrientationSequence = [turned]
    shared.PixelValueTransformationSequence = [rescaling]
    found.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for number, z in enumerate(order):
        place, content, groups = Dataset(), Dataset(), Dataset()
        time, z = divmod(z, len(voxels) // times)
        place.ImagePositionPatient = [-10.0, 20.0, 30.0 + z * spacing[0]]
        content.DimensionIndexValues = [number + 1]
        if times > 1:
            content.TemporalPositionIndex = time + 1
        groups.PlanePositionSequence = [place]
        groups.FrameContentSequence = [content]
        frames.append(groups)
    found.PerFrameFunctionalGroupsSequence = frames
    return save(path, found)
