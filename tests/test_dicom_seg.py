"""DICOM segmentations, read back by highdicom and pydicom."""

import highdicom
import numpy as np
import pytest
from dicoms import PATIENT, make, save, write, write_enhanced, write_series
from pydicom import dcmread
from pydicom.uid import (
    DigitalMammographyXRayImageStorageForPresentation,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import StoreError
from wsi_pipeline.export.dicom_seg import write_dicom_seg
from wsi_pipeline.sources.radiology.image import open_image
from wsi_pipeline.sources.radiology.volume import open_volume

CLASSES = [
    ClassInfo(name="Background"),
    ClassInfo(name="Tumor", color=(200, 0, 0)),
    ClassInfo(name="Dense tissue", color=(0, 120, 240)),
]
RNG = np.random.default_rng(8)
VOXELS = RNG.integers(0, 1000, (6, 14, 15), dtype=np.uint16)
MASK = RNG.integers(0, 3, VOXELS.shape, dtype=np.uint8)
MASK[2] = 0
OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)


def segment(tmp_path, scan, mask):
    """Write the segmentation of an opened image; return it read back."""
    path = tmp_path / "mask.dcm"
    with scan:
        write_dicom_seg(path, mask, scan=scan, classes=CLASSES, model="a model", version="1a2b")
    return highdicom.seg.segread(path)


@pytest.mark.parametrize("directions", [(1, 0, 0, 0, 1, 0), OBLIQUE])
def test_a_series_has_its_geometry_and_its_mask(tmp_path, directions):
    folder = write_series(
        tmp_path / "a", VOXELS, directions=directions, order=list(RNG.permutation(6))
    )
    volume = open_volume(folder)
    found = segment(tmp_path, volume, MASK).get_volume(combine_segments=True)
    swap = np.eye(4)[[2, 1, 0, 3]]  # highdicom's voxel indices are (z, y, x), in LPS
    ours = np.diag([-1.0, -1, 1, 1]) @ volume.affine @ swap
    # highdicom counts slices the other way, and leaves out outer ones without any segment
    back = np.linalg.inv(ours) @ found.affine
    there = np.rint(back @ np.array([[0, 0, 0, 1], [1, 0, 0, 1]]).T).astype(int)[0]
    assert (there[0], there[1]) == (5, 4)
    np.testing.assert_allclose(back @ [0, 0, 0, 1], [5, 0, 0, 1], atol=1e-4)
    assert (found.array[::-1] == MASK).all()


def test_patient_and_sources_are_carried(tmp_path):
    folder = write_series(tmp_path / "a", VOXELS)
    volume = open_volume(folder)
    found = segment(tmp_path, volume, MASK)
    sources = [dcmread(path) for path, _ in volume.slices]
    for name in (*PATIENT, "StudyInstanceUID", "FrameOfReferenceUID"):
        assert found[name].value == sources[0][name].value
    assert found.SeriesInstanceUID != sources[0].SeriesInstanceUID
    (series,) = found.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == sources[0].SeriesInstanceUID
    named = {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence}
    assert named == {source.SOPInstanceUID for source in sources}
    for groups in found.PerFrameFunctionalGroupsSequence:
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        (own,) = (s for s in sources if s.SOPInstanceUID == source.ReferencedSOPInstanceUID)
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(place, own.ImagePositionPatient, atol=1e-4)


def test_each_class_is_a_segment_that_names_the_model(tmp_path):
    found = segment(tmp_path, open_volume(write_series(tmp_path / "a", VOXELS)), MASK)
    assert found.SegmentationType == "BINARY"
    tumor, tissue = found.SegmentSequence
    assert [tumor.SegmentNumber, tissue.SegmentNumber] == [1, 2]
    assert [tumor.SegmentLabel, tissue.SegmentLabel] == ["Tumor", "Dense tissue"]
    code = tumor.SegmentedPropertyTypeCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("108369006", "SCT")
    assert tissue.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99WSIPIPELINE"
    for segment_found in found.SegmentSequence:
        assert segment_found.SegmentAlgorithmType == "AUTOMATIC"
        (algorithm,) = segment_found.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("a model", "1a2b")
    colors = [
        highdicom.color.CIELabColor.from_dicom_value(s.RecommendedDisplayCIELabValue).to_rgb()
        for s in found.SegmentSequence
    ]
    assert np.abs(np.subtract(colors, [c.color for c in CLASSES[1:]])).max() <= 2


@pytest.mark.parametrize("times", [1, 2])
def test_frames_of_an_enhanced_image_are_found_again(tmp_path, times):
    order = (3, 0, 5, 2, 4, 1) if times == 1 else (9, 3, 0, 6, 5, 11, 2, 8, 4, 10, 1, 7)
    voxels = np.concatenate([VOXELS] * times)
    path = tmp_path / "a.dcm"
    write_enhanced(path, voxels, order=order, spacing=(2.5, 0.7, 0.6), times=times)
    found = segment(tmp_path, open_volume(path, time_points=[times - 1]), MASK)
    uid = dcmread(path).SOPInstanceUID
    own = {n: z - 6 * (times - 1) for n, z in enumerate(order, start=1)}  # of the last time
    frames = [n for n, z in own.items() if z >= 0 and MASK[z].any()]
    pixels = found.get_pixels_by_source_frame(uid, frames, combine_segments=True)
    assert (pixels == MASK[[own[n] for n in frames]]).all()
    assert len(frames) == 5


@pytest.mark.parametrize("mask", [MASK[0], np.zeros_like(MASK[0])], ids=["some", "none"])
@pytest.mark.parametrize("kind", ["slice", "mammogram", "film"])
def test_planar_images_have_their_mask(tmp_path, kind, mask):
    about = {
        "FrameOfReferenceUID": generate_uid(),
        "PositionReferenceIndicator": None,
        "ImagePositionPatient": [1, 2, 3],
        "ImageOrientationPatient": [*OBLIQUE],
        "PixelSpacing": [0.7, 0.6],
    }
    if kind == "mammogram":
        about = {
            "SOPClassUID": DigitalMammographyXRayImageStorageForPresentation,
            "ImagerPixelSpacing": [0.1, 0.1],
            "PixelSpacing": [0.1, 0.1],
            "PhotometricInterpretation": "MONOCHROME1",
        }
    if kind == "film":
        about = {"NumberOfFrames": 6, "SOPClassUID": UltrasoundMultiFrameImageStorage}
    path = write(tmp_path / "a.dcm", VOXELS if kind == "film" else VOXELS[0], **about)
    frame = 4 if kind == "film" else None
    found = segment(tmp_path, open_image(path, frame=frame), mask)
    source = dcmread(path)
    if kind == "film":
        pixels = found.get_pixels_by_source_frame(source.SOPInstanceUID, [5], combine_segments=True)
    else:
        pixels = found.get_pixels_by_source_instance([source.SOPInstanceUID], combine_segments=True)
    assert (pixels[0] == mask).all()
    named = found.SourceImageSequence[0].ReferencedSOPClassUID
    assert named == source.SOPClassUID
    assert found.PatientID == PATIENT["PatientID"]


def test_real_images_have_their_mask(tmp_path, data_dir):
    folder = data_dir / "volumes"
    paths = [*folder.glob("*/dx_image.dcm"), *folder.glob("ct_dicom_pydicom/*.dcm")]
    if not paths:
        pytest.skip("no DICOM in the real data")
    for path in paths:
        image = open_image(path)
        mask = (image.stored[..., 0] > np.median(image.stored)).astype(np.uint8)
        found = segment(tmp_path, image, mask)
        source = dcmread(path)
        pixels = found.get_pixels_by_source_instance([source.SOPInstanceUID], combine_segments=True)
        assert (pixels[0] == mask).all()
        assert found.PatientID == source.PatientID


def test_without_what_it_must_name_it_is_refused(tmp_path):
    image = make(VOXELS[0])
    del image.StudyInstanceUID
    path = save(tmp_path / "a.dcm", image)
    with pytest.raises(StoreError, match="without StudyInstanceUID"):
        segment(tmp_path, open_image(path), MASK[0])
    assert not (tmp_path / "mask.dcm").exists()


def test_attributes_that_are_wrong_are_told_without_their_values(tmp_path, caplog, capfd, recwarn):
    caplog.set_level(0)
    path = write(tmp_path / "a.dcm", VOXELS[0], PatientBirthDate="SECRET", StudyTime="SECRET")
    caplog.clear()
    recwarn.clear()
    with pytest.raises(StoreError, match="not as the standard has them") as caught:
        segment(tmp_path, open_image(path), MASK[0])
    told = [str(caught.value), caplog.text, *capfd.readouterr(), *(str(w) for w in recwarn)]
    assert "SECRET" not in " ".join(told)
    assert caught.value.__suppress_context__
    assert not (tmp_path / "mask.dcm").exists()
