"""The mask of DICOM images as a DICOM segmentation (PS3.3 A.51), written by highdicom.

Patient, study and frame of reference are those of the images, as the standard asks; every frame
names the image that it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.sr.coding import Code
from pydicom.uid import UID, SecondaryCaptureImageStorage, generate_uid

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import StoreError
from wsi_pipeline.export import MaskLike
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.paths import quiet
from wsi_pipeline.sources.radiology.image import Image
from wsi_pipeline.sources.radiology.volume import Volume

MORPHOLOGY = Code("49755003", "SCT", "Morphologically Abnormal Structure")
TISSUE = Code("85756007", "SCT", "Tissue")
KNOWN = {
    "lesion": Code("52988006", "SCT", "Lesion"),
    "mass": Code("4147007", "SCT", "Mass"),
    "tumor": Code("108369006", "SCT", "Neoplasm"),
    "tumour": Code("108369006", "SCT", "Neoplasm"),
    "neoplasm": Code("108369006", "SCT", "Neoplasm"),
}
"""SNOMED CT's codes of classes by their names; others get a code of this package's own scheme."""

SCHEME = "99WSIPIPELINE"
"""Designator of a private coding scheme; such begin with 99 (PS3.16 8.2)."""

NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber",
    "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName", "SliceThickness",
)  # fmt: skip
"""What must be there but need not be known (type 2), and what highdicom asks for."""


def write_dicom_seg(
    path: Path,
    mask: MaskLike,
    *,
    scan: Image | Volume,
    classes: Sequence[ClassInfo],
    model: str,
    version: str,
) -> None:
    """Write class indices as a binary DICOM segmentation, one segment for each foreground class.

    Segment n is class n. Frames without any pixel of a segment are left out, as the standard
    allows.

    Args:
        path: File to write; appears when it is complete.
        mask: Class indices, uint8 (y, x) or (z, y, x), as the scan lies; taken whole.
        classes: Classes in the mask's order; 0 is the background.
        version: What tells its weights from others.

    Raises:
        StoreError: images that lack what a segmentation must name, or that cannot be referred to.
    """
    slices = scan.slices if isinstance(scan, Volume) else ((scan.path, scan.frame),)
    with quiet():
        sources = [_source(file) for file in dict.fromkeys(file for file, _ in slices)]
        if isinstance(scan, Volume):
            for source in sources:
                source.SliceThickness = source.get("SliceThickness") or scan.spacing_mm[0]
        frames = np.asarray(mask[:], np.uint8).reshape(-1, *mask.shape[-2:])
        film, header = None, sources[0]
        is_many = "NumberOfFrames" in header and "SharedFunctionalGroupsSequence" not in header
        if isinstance(scan, Image) and is_many:
            # A film seems to be a single image: highdicom knows of files with many frames only
            # those that say where each frame lies.
            film = UID(header.SOPClassUID)
            header.SOPClassUID = SecondaryCaptureImageStorage
            del header.NumberOfFrames
        else:
            _keep_frames(sources, slices)
        try:
            segmentation = _segmentation(frames, sources, classes, model, version)
            _refer_to_frames(segmentation, film, [frame for _, frame in slices])
            # Pixel measures without a thickness, as X-rays have none, are left out: highdicom reads
            # no such, and the standard asks for them only where no source image is named.
            shared = segmentation.SharedFunctionalGroupsSequence[0]
            measures = shared.get("PixelMeasuresSequence")
            if measures and "SliceThickness" not in measures[0]:
                del shared.PixelMeasuresSequence
        except ImportError as error:
            raise StoreError(
                f'{path}: needs {error.name}: pip install "wsi-pipeline[radiology]"'
            ) from error
        # highdicom raises anything, and may quote values, which may be the patient's
        except Exception as error:
            raise StoreError(
                f"{path}: no segmentation can be written of {scan.path} ({type(error).__name__}); "
                "its DICOM attributes are not as the standard has them"
            ) from None
        with written_beside(path) as beside:
            segmentation.save_as(beside)


def as_text(text: str) -> str:
    r"""Return a text as one value of representation LO: short, and without what parts values.

    Example:
        >>> as_text("Tumor\\Stroma")
        'Tumor/Stroma'
    """
    # Of 64 characters pydicom counts one that makes the bytes even.
    return text.replace("\\", "/")[:63]


def codes_of(found: ClassInfo) -> tuple[Code, Code]:
    """Return what a class is: the code of its category, and its own."""
    if known := KNOWN.get(found.name.lower()):
        return MORPHOLOGY, known
    name = as_text(found.name)
    own = Code(name.upper().replace(" ", "_")[:16], SCHEME, name)
    return TISSUE, own


def _source(path: Path) -> Dataset:
    """Return all that a file says but its pixels."""
    header = dcmread(path, stop_before_pixels=True, force=True)
    if missing := [name for name in NEEDED if not header.get(name)]:
        raise StoreError(f"{path}: without {', '.join(missing)} no segmentation can refer to it")
    for name in MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, None)
    return header


def _refer_to_frames(segmentation: Dataset, film: UID | None, frames: Sequence[int]) -> None:
    """Say which frames of a file, from 0, a segmentation was made of, and of which kind of film."""
    for element in segmentation.iterall():
        if film is not None and element.keyword == "ReferencedSOPClassUID":
            element.value = film
    # segments of one frame share what they say of it
    sources = {
        id(source): source
        for groups in segmentation.PerFrameFunctionalGroupsSequence
        for derivation in groups.get("DerivationImageSequence", ())
        for source in derivation.SourceImageSequence
        if film is not None or "ReferencedFrameNumber" in source
    }
    for source in sources.values():
        source.ReferencedFrameNumber = frames[int(source.get("ReferencedFrameNumber", 1)) - 1] + 1


def _keep_frames(sources: Sequence[Dataset], slices: Sequence[tuple[Path, int]]) -> None:
    """Leave in a file of many frames those of the volume alone, in its order.

    highdicom takes no two frames in one place, as those of several times are.
    """
    if all(int(source.get("NumberOfFrames") or 1) == 1 for source in sources):
        return
    if len(sources) > 1:
        raise StoreError(
            f"{slices[0][0].parent}: slices in {len(sources)} files of many frames; a segmentation "
            "refers to one such file"
        )
    groups = sources[0].PerFrameFunctionalGroupsSequence
    sources[0].PerFrameFunctionalGroupsSequence = [groups[frame] for _, frame in slices]
    sources[0].NumberOfFrames = len(slices)


def _segmentation(
    frames: npt.NDArray[np.uint8],
    sources: Sequence[Dataset],
    classes: Sequence[ClassInfo],
    model: str,
    version: str,
) -> Any:
    """Return the segmentation as highdicom has it."""
    import highdicom
    from highdicom.color import CIELabColor
    from highdicom.seg import Segmentation, SegmentDescription

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=as_text(model),
        family=Code("123110", "DCM", "Artificial Intelligence"),
        version=as_text(version),
    )
    segments = []
    for number, found in enumerate(classes[1:], start=1):
        category, kind = codes_of(found)
        segments.append(
            SegmentDescription(
                segment_number=number,
                segment_label=as_text(found.name),
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type="AUTOMATIC",
                algorithm_identification=algorithm,
                display_color=CIELabColor.from_rgb(*(found.color or (0, 0, 0))),
            )
        )
    return Segmentation(
        source_images=sources,
        pixel_array=frames,
        segmentation_type="BINARY",
        segment_descriptions=segments,
        series_instance_uid=generate_uid(prefix=None),
        series_number=1000,
        series_description=as_text(f"Segmentation: {model}"),
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer="wsi_pipeline",
        manufacturer_model_name="wsi_pipeline",
        software_versions=version_of("wsi-pipeline"),
        device_serial_number="none",
        # one frame at least must be there
        omit_empty_frames=bool(frames.any()),
        content_label="SEGMENTATION",
        content_description=as_text(f"Made by {model}"),
    )
