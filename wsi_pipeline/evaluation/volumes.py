"""Volumes as class indices: masks of NIfTI and NRRD, DICOM segmentations, runs of volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import EvaluationError, SourceError
from wsi_pipeline.evaluation.confusion import IGNORE, Mask
from wsi_pipeline.evaluation.meaning import LARGEST_VALUE, Values
from wsi_pipeline.files.paths import quiet
from wsi_pipeline.sources.radiology.alignment import turned_onto
from wsi_pipeline.sources.radiology.discover import is_dicom, kind_of
from wsi_pipeline.sources.radiology.volume import open_volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelVolume:
    """A mask of a volume, in memory.

    Attributes:
        path: of the file.
        codes: (z, y, x) values.
        affine: (4, 4), maps (x, y, z, 1) voxel indices to mm in RAS+.
        values: what they mean.
        is_part: whether it may end before its image does, as segmentations of DICOM may.
    """

    path: Path
    codes: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    values: Values
    is_part: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return the classes that the mask may hold."""
        return tuple(self.values.classes)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Return (z, y, x) mm between voxels."""
        return tuple(map(float, np.linalg.norm(self.affine[:3, :3], axis=0)[::-1]))

    def indices(self, indices: Mapping[str, int], onto: LabelVolume) -> Mask:
        """Return the class index of each voxel of another volume, (z, y, x).

        Args:
            indices: class index by name; other classes are background.
            onto: whose axes count.

        Raises:
            EvaluationError: it does not lie where the other does.
        """
        table = np.zeros(LARGEST_VALUE + 1, np.uint8)
        for name, codes in self.values.classes.items():
            table[list(codes)] = indices.get(name, 0)
        table[list(self.values.ignored)] = IGNORE
        try:
            turned = turned_onto(
                table[self.codes], self.affine, onto.codes.shape, onto.affine, is_part=self.is_part
            )
        except SourceError as error:
            raise EvaluationError(f"{self.path} {error}") from error
        return np.ascontiguousarray(turned)


def is_volume(path: Path) -> bool:
    """Return whether a file is a mask of a volume."""
    if is_dicom(path):
        return open_labels(path).is_part
    return path.is_file() and kind_of(path) in ("NIfTI", "NRRD")


def open_labels(path: Path) -> LabelVolume:
    """Read a mask of a volume; return it, with names where the file tells them.

    Raises:
        EvaluationError: no mask, or one that cannot be read.
    """
    try:
        if kind_of(path) == "DICOM":
            return _open_segmentation(path)
        with open_volume(path) as volume:
            codes = volume.read((0, 0, 0), volume.shape)[..., 0]
            affine = volume.affine
    except SourceError as error:
        raise EvaluationError(str(error)) from error
    if (codes != np.floor(codes)).any() or codes.min() < 0 or codes.max() > LARGEST_VALUE:
        raise EvaluationError(
            f"{path} holds values from {codes.min():g} to {codes.max():g}; a mask has whole "
            f"numbers, 0 to {LARGEST_VALUE}"
        )
    return LabelVolume(path=path, codes=codes.astype(np.uint16), affine=affine, values=Values())


def _open_segmentation(path: Path) -> LabelVolume:
    """Read a DICOM segmentation; its segments are classes by their labels.

    One of a planar image has no place in a body: its pixels count as voxels of 1 mm.
    """
    try:
        import highdicom
        from highdicom.seg import segread
    except ImportError as error:
        raise EvaluationError(
            f'{path}: DICOM needs {error.name}: pip install "wsi-pipeline[radiology]"'
        ) from error
    try:
        with quiet():
            found = segread(path)
            classes = {
                str(found.get_segment_description(n).SegmentLabel): (int(n),)
                for n in found.segment_numbers
            }
            if found.get_volume_geometry() is None:
                return LabelVolume(
                    path=path,
                    codes=_planar(found),
                    affine=np.eye(4),
                    values=Values(classes=classes),
                )
            volume = found.get_volume(combine_segments=True)
    except Exception as error:  # highdicom raises anything, and may quote the patient's values
        raise EvaluationError(
            f"{path}: no segmentation of DICOM that can be compared ({type(error).__name__}); "
            "expected segments that do not overlap, on evenly spaced slices"
        ) from None
    assert isinstance(volume, highdicom.Volume)
    # highdicom's voxel indices are (z, y, x), its places LPS
    affine = LPS_TO_RAS @ volume.affine @ np.eye(4)[[2, 1, 0, 3]]
    return LabelVolume(
        path=path,
        codes=np.asarray(volume.array, np.uint16),
        affine=affine,
        values=Values(classes=classes),
        is_part=True,
    )


def _planar(found: Any) -> npt.NDArray[np.uint16]:
    """Return (1, y, x) segment numbers of a segmentation that has no place in a body."""
    codes = np.zeros((1, found.Rows, found.Columns), np.uint16)
    frames = found.pixel_array.reshape(-1, found.Rows, found.Columns)
    for frame, groups in zip(frames, found.PerFrameFunctionalGroupsSequence, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        if codes[0][frame > 0].any():
            raise ValueError("overlapping segments, or several images")
        codes[0][frame > 0] = number
    return codes
