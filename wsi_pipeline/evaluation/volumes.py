"""Volumes as class indices: masks of NIfTI and NRRD, DICOM segmentations, runs of volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import EvaluationError, SourceError, raised_as
from wsi_pipeline.evaluation.confusion import Mask
from wsi_pipeline.evaluation.meaning import ADVICE, LabelMap, Lookup
from wsi_pipeline.files.formats import kind_of
from wsi_pipeline.files.paths import quiet
from wsi_pipeline.geometry import Shape
from wsi_pipeline.sources.radiology.alignment import turned_onto
from wsi_pipeline.sources.radiology.dicom import read_tags
from wsi_pipeline.sources.radiology.volume import open_volume

SEGMENTATIONS = "1.2.840.10008.5.1.4.1.1.66."
"""How DICOM's UIDs of segmentations begin."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelVolume:
    """A mask of a volume, in memory.

    Attributes:
        codes: (z, y, x) values.
        affine: (4, 4), maps (x, y, z, 1) voxel indices to mm in RAS+.
        values: What they mean.
        is_part: Whether it may end before its image does, as segmentations of DICOM may.
        is_planar: Whether it is of a planar image, which has no place in a body.
    """

    path: Path
    codes: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    values: LabelMap
    is_part: bool = False
    is_planar: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return the classes that the mask may hold."""
        return tuple(self.values.classes)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Return (z, y, x) mm between voxels."""
        return tuple(map(float, np.linalg.norm(self.affine[:3, :3], axis=0)[::-1]))

    def indices(
        self,
        indices: Mapping[str, int],
        shape: Shape,
        onto: npt.NDArray[np.float64],
        *,
        advice: str = ADVICE,
    ) -> Mask:
        """Return the class index of each voxel of another volume, (z, y, x).

        Args:
            indices: Class index by name; other classes are background.
            shape: (z, y, x) of the other volume.
            onto: (4, 4) affine of the other volume.

        Raises:
            EvaluationError: it lies elsewhere, or holds values without a meaning.
        """
        found = Lookup(self.path, self.values, indices, advice=advice)(self.codes)
        try:
            turned = turned_onto(found, self.affine, shape, onto, is_part=self.is_part)
        except SourceError as error:
            raise EvaluationError(f"{self.path} {error}") from error
        return np.ascontiguousarray(turned)


def is_labels(path: Path) -> bool:
    """Return whether a file is a mask for `open_labels`, by its first bytes and its header."""
    kind = kind_of(path) if path.is_file() else ""
    if kind != "DICOM":
        return kind in ("NIfTI", "NRRD")
    try:
        return str(read_tags(path).get("SOPClassUID", "")).startswith(SEGMENTATIONS)
    except SourceError:
        # whoever opens it says why
        return True


def open_labels(path: Path) -> LabelVolume:
    """Read a mask of a volume; return it, with names where the file tells them.

    Raises:
        EvaluationError: no mask, or one that cannot be read.
    """
    with raised_as(EvaluationError, SourceError):
        if kind_of(path) == "DICOM":
            return _open_segmentation(path)
        with open_volume(path) as volume:
            codes = volume.read((0, 0, 0), volume.shape)[..., 0]
            affine = volume.affine
    return LabelVolume(path=path, codes=codes, affine=affine, values=LabelMap())


def _open_segmentation(path: Path) -> LabelVolume:
    """Read a DICOM segmentation; its segments are classes by their labels.

    One of a planar image has no place in a body: its pixels count as voxels of 1 mm.
    """
    try:
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
            is_planar = found.get_volume_geometry() is None
            if is_planar:
                codes, affine = _planar(found), np.eye(4)
            else:
                volume: Any = found.get_volume(combine_segments=True)
                codes = np.asarray(volume.array, np.uint16)
                # highdicom's voxel indices are (z, y, x), its places LPS
                affine = LPS_TO_RAS @ volume.affine @ np.eye(4)[[2, 1, 0, 3]]
    # highdicom raises anything, and may quote the patient's values
    except Exception as error:
        raise EvaluationError(
            f"{path}: no segmentation of DICOM that can be compared ({type(error).__name__}); "
            "expected segments that do not overlap, on evenly spaced slices"
        ) from None
    return LabelVolume(
        path=path,
        codes=codes,
        affine=affine,
        values=LabelMap(classes=classes),
        is_part=not is_planar,
        is_planar=is_planar,
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
