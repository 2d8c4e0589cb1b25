"""DICOM files that tests make: planar images, films, series and enhanced multi-frame images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    VLWholeSlideMicroscopyImageStorage,
    generate_uid,
)

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
