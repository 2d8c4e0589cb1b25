"""Series of DICOM slices put in order: where each lies in the body, and whether they make a volume.

A series is refused where its slices are not equally spaced along their normal, one above the other:
a network would see a body that is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources.dicom import Values, burnt_in, count_frames, groups_of, pair, part, values

UNEVEN = 0.02
"""Share of the spacing by which gaps between slices may differ: positions are rounded."""
CROOKED = 1e-3
"""By which direction cosines may differ: they are rounded, too."""
LEANING = 0.5
"""Pixels by which a slice may lie beside the others before the volume counts as tilted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """The slices of a series, in order along their normal.

    Attributes:
        slices: (file, frame, header) of each.
        shape: (z, y, x).
        spacing_mm: (z, y, x) mm between voxels.
        affine: (4, 4), maps (x, y, z, 1) voxel indices to mm in RAS+.
        values: what the numbers of each slice mean.
        doubts: sentences that a user should read.
    """

    slices: tuple[tuple[Path, int, Dataset], ...]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: npt.NDArray[np.float64]
    values: tuple[Values, ...]
    doubts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slice:
    """One slice: where it is stored, where it lies in the body (LPS, mm), what it means."""

    path: Path
    frame: int
    header: Dataset
    position: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float64]  # (2, 3): along a row, down a column
    spacing: tuple[float, float]  # (y, x)
    thickness: float
    values: Values


def stack_series(files: Sequence[tuple[Path, Dataset]]) -> Stack:
    """Put the slices of one series in order; return them as a volume.

    Args:
        files: paths and headers, in any order.

    Raises:
        SourceError: slices that make no volume: missing, tilted, of different kinds.
    """
    slices = [found for path, header in files for found in _slices_of(path, header)]
    _check_alike(slices)
    row, column = slices[0].directions
    normal = np.cross(row, column)
    slices.sort(key=lambda s: float(s.position @ normal))
    doubts = burnt_in(slices[0].header)
    step = slices[0].thickness
    if len(slices) > 1:
        step = _even_step(np.array([s.position @ normal for s in slices]))
        _check_upright(np.array([s.position for s in slices]), normal, slices[0].spacing)
        along = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    elif step > 0:
        along = normal * step
        doubts.append("a single slice; its thickness stands for the spacing along z")
    else:
        raise SourceError("a single slice that does not say how thick it is; expected a series")
    y, x = slices[0].spacing
    lps = np.eye(4)
    lps[:3] = np.column_stack([row * x, column * y, along, slices[0].position])
    return Stack(
        slices=tuple((s.path, s.frame, s.header) for s in slices),
        shape=(len(slices), int(slices[0].header.Rows), int(slices[0].header.Columns)),
        spacing_mm=(step, y, x),
        affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps,
        values=tuple(s.values for s in slices),
        doubts=tuple(doubts),
    )


def _slices_of(path: Path, header: Dataset) -> Iterator[_Slice]:
    """Yield the slices of a file, one for each frame."""
    frames = count_frames(header)
    if frames > 1 and len(header.get("PerFrameFunctionalGroupsSequence") or []) != frames:
        raise SourceError(
            f"{path.name} holds {frames} frames and does not say where each lies: a film, no volume"
        )
    for frame in range(frames):
        parts = groups_of(header, frame)
        position = part(header, parts, "PlanePositionSequence").get("ImagePositionPatient")
        turned = part(header, parts, "PlaneOrientationSequence").get("ImageOrientationPatient")
        measures = part(header, parts, "PixelMeasuresSequence")
        if not position or not turned or not measures.get("PixelSpacing"):
            raise SourceError(
                f"{path.name} does not say where in the body it lies: a planar image, not a volume"
            )
        thickness = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 0
        yield _Slice(
            path=path,
            frame=frame,
            header=header,
            position=np.array(position, np.float64),
            directions=np.array(turned, np.float64).reshape(2, 3),
            spacing=pair(measures.PixelSpacing),
            thickness=float(thickness),
            values=values(header, parts),
        )


def _check_alike(slices: Sequence[_Slice]) -> None:
    """Refuse slices of different sizes, colours, directions or bodies."""
    headers = [s.header for s in slices]
    if headers[0].get("SamplesPerPixel", 1) != 1:
        raise SourceError("slices in colour; expected one value a voxel")
    if any(header.get("ModalityLUTSequence") for header in headers):
        raise SourceError("values through a table (modality LUT); expected slope and intercept")
    kinds: dict[str, list[Any]] = {
        "sizes": [(h.Columns, h.Rows) for h in headers],
        "pixel spacings": [np.allclose(s.spacing, slices[0].spacing, 1e-3) for s in slices],
        "orientations": [
            np.allclose(s.directions, slices[0].directions, atol=CROOKED) for s in slices
        ],
        "frames of reference": [h.get("FrameOfReferenceUID") for h in headers],
    }
    for what, found in kinds.items():
        counts = Counter(found)
        if len(counts) > 1:
            numbers = " and ".join(str(n) for _, n in counts.most_common(3))
            raise SourceError(
                f"slices of {len(counts)} {what} in one series ({numbers} slices); "
                "give each group a folder, and a SeriesInstanceUID, of its own"
            )
    lengths = np.linalg.norm(slices[0].directions, axis=1)
    cosine = slices[0].directions[0] @ slices[0].directions[1]
    if np.abs(lengths - 1).max() > CROOKED or abs(cosine) > CROOKED:
        raise SourceError("rows and columns that do not stand at right angles")


def _even_step(places: npt.NDArray[np.float64]) -> float:
    """Return mm between slices at ascending places along their normal."""
    gaps = np.diff(places)
    step = float(np.median(gaps))
    if (gaps < 1e-3).any():
        doubled = int((gaps < 1e-3).sum())
        raise SourceError(
            f"{len(places)} slices, of which {doubled} lie where another does; a volume of one "
            "time and one kind is expected: give each a SeriesInstanceUID of its own"
        )
    far = int(np.argmax(np.abs(gaps - step)))
    if abs(gaps[far] - step) <= UNEVEN * step:
        return float(places[-1] - places[0]) / len(gaps)
    missing = gaps[far] / step - 1
    where = f"between {places[far]:.2f} and {places[far + 1]:.2f} mm lie {gaps[far]:.2f} mm"
    if missing > 0.5 and abs(missing - round(missing)) <= UNEVEN * (missing + 1):
        raise SourceError(
            f"slices are missing: {where}, between others {step:.2f} ({round(missing)} missing)"
        )
    raise SourceError(f"slices are not equally spaced: {where}, between others {step:.2f}")


def _check_upright(
    positions: npt.NDArray[np.float64],
    normal: npt.NDArray[np.float64],
    spacing: tuple[float, float],
) -> None:
    """Refuse slices that are shifted against each other."""
    moved = positions - positions[0]
    beside = np.linalg.norm(moved - np.outer(moved @ normal, normal), axis=1).max()
    if beside > LEANING * min(spacing):
        raise SourceError(
            f"slices shifted sideways by up to {beside:.2f} mm (a tilted gantry); resample it"
        )
