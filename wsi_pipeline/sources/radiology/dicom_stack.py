"""DICOM slices put in order: which are of one time, and whether they make a volume.

A series is refused where its slices are not equally spaced along their normal, one above the other:
a network would see a body that is none.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from wsi_pipeline.errors import SourceError, raised_as
from wsi_pipeline.sources.base import sampled_digest
from wsi_pipeline.sources.radiology.dicom import (
    Values,
    burnt_in,
    count_frames,
    decode_frames,
    groups_of,
    pair,
    part,
    values,
)
from wsi_pipeline.sources.radiology.discover import series_in, series_of
from wsi_pipeline.sources.radiology.volume import Affine, Volume, Voxels, choose_times

UNEVEN = 0.02
"""Share of the spacing by which gaps between slices may differ: positions are rounded."""
ROUNDED = 0.051
"""Millimetres by which slices may lie beside even places: positions with one decimal are."""
CROOKED = 1e-3
"""By which direction cosines may differ: they are rounded, too."""
LEANING = 0.5
"""Pixels by which a slice may lie beside the others before the volume counts as tilted."""
SAME_PLACE = 1e-3
"""Millimetres up to which two slices lie in one place."""

TIMES = (
    ("FrameContentSequence", "TemporalPositionIndex"),
    ("TemporalPositionSequence", "TemporalPositionTimeOffset"),
    ("", "TemporalPositionIdentifier"),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    ("", "TriggerTime"),
    ("MRDiffusionSequence", "DiffusionBValue"),
    ("MREchoSequence", "EffectiveEchoTime"),
    ("", "EchoTime"),
    ("FrameContentSequence", "FrameAcquisitionNumber"),
    ("", "AcquisitionNumber"),
    ("FrameContentSequence", "FrameAcquisitionDateTime"),
    ("", "AcquisitionDateTime"),
    ("", "AcquisitionTime"),
    ("", "ContentTime"),
)
"""Attributes that may tell the time points or contrasts of one series apart, the surest first, each
with the functional group that holds it in enhanced files."""
SURE = frozenset(name for _, name in TIMES[:5])
"""Those that mean nothing but time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slice:
    """One slice: where it is stored, where it lies in the body (LPS, mm), what it means.

    Attributes:
        directions: (2, 3), along a row and down a column.
        spacing: (y, x) mm.
        times: Values of the attributes of `TIMES` that it has.
        number: InstanceNumber, where it is one.
    """

    path: Path
    frame: int
    header: Dataset
    position: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float64]
    spacing: tuple[float, float]
    thickness: float
    values: Values
    times: Mapping[str, float | str]
    number: int | None

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        """Return the direction, (3,), in which the slices of its series follow each other."""
        return np.cross(*self.directions)

    @property
    def place(self) -> float:
        """Return where it lies along its normal, mm."""
        return float(self.position @ self.normal)


def open_series(path: Path, time_points: Sequence[int] | None) -> Volume:
    """Open the series in a folder, or that of a file; return the volume.

    Raises:
        SourceError: slices that make no volume: missing, tilted, of different kinds or times.
    """
    if path.is_dir():
        found = series_in(path)
        if len(found) != 1:
            firsts = ", ".join(sorted(series.files[0][0].name for series in found)[:5])
            what = f"name one file of each, as {firsts}" if found else "expected one"
            if any(len(series.folders) > 1 for series in found):
                what = "one lies in several folders with others beside it: give each its own folder"
            raise SourceError(f"a folder of {len(found)} DICOM series; {what}")
        (series,) = found
    else:
        series = series_of(path)
    if series.unread:
        (first, reason), *more = series.unread
        besides = f", and {len(more)} more" if more else ""
        raise SourceError(
            f"{first.name} beside its slices cannot be read ({reason}){besides}: slices may be "
            "missing; copy them again, or take them out of the folder"
        )
    every = [one for file, header in series.files for one in _slices_of(file, header)]
    _check_alike(every)
    kept, copies = _without_copies(every, path)
    times, told_by = _split_times(kept)
    chosen, doubts = choose_times(time_points, len(times), told_by)
    if copies:
        doubts.append(f"copies of slices are left out: {copies}")
    times = [sorted(time, key=lambda one: one.place) for time in times]
    stacks = [times[number] for number in chosen]
    (spacing, affine, unsure), *others = map(_geometry, stacks)
    for number, stack, (_, other, _) in zip(chosen[1:], stacks[1:], others, strict=True):
        # Time points become channels of one voxel: they must lie over each other.
        if len(stack) != len(stacks[0]) or not np.allclose(other, affine, atol=0.01):
            raise SourceError(f"time point {number} does not lie where the first does; resample it")
    digest = hashlib.sha256()
    for file in dict.fromkeys(one.path for time in times for one in time):
        digest.update(sampled_digest(file).digest())
    uids = {one.path: one.header.get("SOPInstanceUID") for one in stacks[0]}
    is_named = all(uids.values()) and len(set(uids.values())) == len(uids)
    if not is_named:
        series.doubts.append(
            "its slices have no SOPInstanceUID of their own: no DICOM segmentation can refer to "
            "them"
        )
    shape = (len(stacks[0]), int(every[0].header.Rows), int(every[0].header.Columns))
    windows = {one.values.window for stack in stacks for one in stack}
    return Volume(
        path=path,
        shape=shape,
        spacing_mm=spacing,
        affine=affine,
        fingerprint=digest.hexdigest(),
        backend="pydicom",
        doubts=(*series.doubts, *doubts, *unsure),
        voxels=tuple(_stack_voxels(path, stack, shape) for stack in stacks),
        window=windows.pop() if len(windows) == 1 else None,
        slices=tuple((one.path, one.frame) for one in stacks[0]),
        can_be_referred_to=is_named,
    )


def _stack_voxels(path: Path, stack: Sequence[_Slice], shape: tuple[int, int, int]) -> Voxels:
    """Return the voxels of slices in order, decoded once."""
    headers = {one.path: one.header for one in stack}
    # What pydicom decodes the pixels of each file to.
    dtypes = {
        f"{'i' if header.get('PixelRepresentation') else 'u'}{max(1, header.BitsAllocated // 8)}"
        for header in headers.values()
    }
    dtype = np.result_type(*map(np.dtype, dtypes))
    nbytes = shape[1] * shape[2] * dtype.itemsize
    places = {(one.path, one.frame): z for z, one in enumerate(stack)}

    def take(spool: BinaryIO, file: Path, frame: int, stored: npt.NDArray[Any]) -> None:
        # Others are of another time point.
        if (file, frame) in places:
            spool.seek(places[file, frame] * nbytes)
            spool.write(stored.astype(dtype, copy=False).tobytes())

    def decode(spool: BinaryIO) -> None:
        for file, header in headers.items():
            with raised_as(SourceError, SourceError, file):
                decode_frames(file, header, partial(take, spool, file))

    slopes, intercepts = (
        np.array([getattr(one.values, name) for one in stack]).reshape(-1, 1, 1)
        for name in ("slope", "intercept")
    )
    return Voxels(path, shape, dtype, decode=decode, slope=slopes, intercept=intercepts)


def _geometry(stack: Sequence[_Slice]) -> tuple[tuple[float, float, float], Affine, list[str]]:
    """Return (z, y, x) mm between voxels of slices in order, their affine, and what is doubtful.

    Raises:
        SourceError: slices that are not equally spaced, or shifted against each other.
    """
    first, last, normal = stack[0], stack[-1], stack[0].normal
    doubts = burnt_in(first.header)
    step = first.thickness
    if len(stack) > 1:
        step, unsure = _even_step(np.array([one.place for one in stack]))
        doubts += unsure
        moved = np.array([one.position for one in stack]) - first.position
        beside = np.linalg.norm(moved - np.outer(moved @ normal, normal), axis=1).max()
        if beside > LEANING * min(first.spacing):
            raise SourceError(
                f"slices shifted sideways by up to {beside:.2f} mm (a tilted gantry); resample it"
            )
        along = (last.position - first.position) / (len(stack) - 1)
    elif step > 0:
        along = normal * step
        doubts.append("a single slice; its thickness stands for the spacing along z")
    else:
        raise SourceError("a single slice that does not say how thick it is; expected a series")
    (row, column), (y, x) = first.directions, first.spacing
    lps = np.eye(4)
    lps[:3] = np.column_stack([row * x, column * y, along, first.position])
    return (step, y, x), np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps, doubts


def _slices_of(path: Path, header: Dataset) -> Iterator[_Slice]:
    """Yield the slices of a file, one for each frame."""
    frames = count_frames(header)
    if frames > 1 and len(header.get("PerFrameFunctionalGroupsSequence") or []) != frames:
        raise SourceError(
            f"{path.name} holds {frames} frames and does not say where each lies: a film, no volume"
        )
    number = None
    with suppress(TypeError, ValueError):
        number = int(header.get("InstanceNumber"))
    for frame in range(frames):
        parts = groups_of(header, frame)
        position = part(header, parts, "PlanePositionSequence").get("ImagePositionPatient")
        turned = part(header, parts, "PlaneOrientationSequence").get("ImageOrientationPatient")
        measures = part(header, parts, "PixelMeasuresSequence")
        if not position or not turned or not measures.get("PixelSpacing"):
            raise SourceError(
                f"{path.name} does not say where in the body it lies: a planar image, not a volume"
            )
        if not np.isfinite([*position, *turned]).all():
            raise SourceError(f"{path.name} does not say in numbers where in the body it lies")
        said = (measures.get(name) for name in ("SpacingBetweenSlices", "SliceThickness"))
        # Some write it negative, or as what is no number.
        known = [abs(float(mm)) for mm in said if mm and np.isfinite(float(mm))]
        times: dict[str, float | str] = {}
        for group, name in TIMES:
            value = (part(header, parts, group) if group else header).get(name)
            if value not in (None, ""):
                try:
                    times[name] = float(value)
                except (TypeError, ValueError):
                    times[name] = str(value)
        yield _Slice(
            path=path,
            frame=frame,
            header=header,
            position=np.array(position, np.float64),
            directions=np.array(turned, np.float64).reshape(2, 3),
            spacing=pair(measures.PixelSpacing),
            thickness=known[0] if known else 0.0,
            values=values(header, parts),
            times=times,
            number=number,
        )


def _without_copies(slices: Sequence[_Slice], named: Path) -> tuple[list[_Slice], int]:
    """Return slices without those files that are in the place, time and pixels of another.

    Of copies that which was named stays.
    """
    files: defaultdict[Any, list[Path]] = defaultdict(list)
    by_path: defaultdict[Path, list[_Slice]] = defaultdict(list)
    for one in slices:
        by_path[one.path].append(one)
    for path, own in by_path.items():
        where = tuple(tuple(np.round(s.position, 3).tolist()) for s in own)
        files[where, tuple(sorted(own[0].times.items()))].append(path)

    def pixels_of(path: Path) -> bytes:
        digest = hashlib.sha256()

        def take(_: int, stored: npt.NDArray[Any]) -> None:
            digest.update(stored.astype("<i8").tobytes())

        decode_frames(path, by_path[path][0].header, take)
        return digest.digest()

    kept: set[Path] = set()
    for paths in files.values():
        # Files that are alone need not be decoded.
        if len(paths) > 1:
            paths.sort(key=lambda path: path == named)
            paths = list({pixels_of(path): path for path in paths}.values())
        kept.update(paths)
    return [one for one in slices if one.path in kept], len(by_path) - len(kept)


def _split_times(slices: Sequence[_Slice]) -> tuple[list[list[_Slice]], str]:
    """Sort the slices of a series into its time points; return them, and what tells them apart.

    Time points are told by an attribute whose values part the slices into volumes that lie over
    each other; without one, by the numbers of the slices where each place has the same count.
    """
    for _, name in TIMES:
        groups: defaultdict[Any, list[_Slice]] = defaultdict(list)
        for one in slices:
            groups[one.times.get(name)].append(one)
        if len(groups) < 2 or None in groups or len({type(v) for v in groups}) > 1:
            continue
        found = [groups[value] for value in sorted(groups)]
        if all(_lie_over(a, b, name) for a, b in itertools.pairwise(found)):
            return found, name
    ordered = sorted(slices, key=lambda s: (s.place, s.number or 0))
    steps = np.diff([s.place for s in ordered])
    places = np.split(np.arange(len(ordered)), np.flatnonzero(steps > SAME_PLACE) + 1)
    counts, numbers = {len(place) for place in places}, {s.number for s in slices}
    if counts == {1} or len(counts) > 1 or None in numbers or len(numbers) < len(slices):
        return [list(slices)], ""
    return [[ordered[i] for i in time] for time in np.stack(places, axis=1)], "InstanceNumber"


def _lie_over(one: Sequence[_Slice], other: Sequence[_Slice], name: str) -> bool:
    """Return whether two groups of slices are volumes of one place, not parts of one volume."""
    a, b = (np.sort([s.place for s in group]) for group in (one, other))
    common = min(a[-1], b[-1]) - max(a[0], b[0])
    shorter = min(np.ptp(a), np.ptp(b))
    # One of them is a single slice.
    if shorter == 0:
        return bool(np.abs(a[:, None] - b).min() < SAME_PLACE)
    if common <= shorter / 2:
        return False
    gaps = np.diff(np.sort(np.concatenate([a, b])))
    apart = float(np.median(gaps[gaps > SAME_PLACE])) if (gaps > SAME_PLACE).any() else 0.0
    own = float(np.median(np.diff(a)))
    is_interleaved = own > 1.5 * apart > 0 and not (gaps <= SAME_PLACE).any()
    # Every second slice of one volume, as MR takes them, is thinner than its distance to the next.
    thickness = one[0].thickness
    return name in SURE or not is_interleaved or not 0 < thickness < 0.75 * own


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


def _even_step(places: npt.NDArray[np.float64]) -> tuple[float, list[str]]:
    """Return mm between slices at ascending places along their normal, and what is doubtful."""
    gaps = np.diff(places)
    step = float(np.median(gaps))
    if (gaps < SAME_PLACE).any():
        doubled = int((gaps < SAME_PLACE).sum())
        raise SourceError(
            f"{len(places)} slices, of which {doubled} lie where another does; a volume of one "
            "time and one kind is expected: give each a SeriesInstanceUID of its own"
        )
    far = int(np.argmax(np.abs(gaps - step)))
    if abs(gaps[far] - step) <= UNEVEN * step:
        return float(places[-1] - places[0]) / len(gaps), []
    numbers = np.arange(len(places))
    even, start = np.polyfit(numbers, places, 1)
    if np.abs(places - (start + even * numbers)).max() <= min(ROUNDED, even / 5):
        return float(even), [
            f"its slices lie {gaps.min():.4g} to {gaps.max():.4g} mm apart, as positions that were "
            f"rounded do; {even:.4g} mm count"
        ]
    missing = gaps[far] / step - 1
    where = f"between {places[far]:.2f} and {places[far + 1]:.2f} mm lie {gaps[far]:.2f} mm"
    if missing > 0.5 and abs(missing - round(missing)) <= UNEVEN * (missing + 1):
        raise SourceError(
            f"slices are missing: {where}, between others {step:.2f} ({round(missing)} missing)"
        )
    raise SourceError(f"slices are not equally spaced: {where}, between others {step:.2f}")
