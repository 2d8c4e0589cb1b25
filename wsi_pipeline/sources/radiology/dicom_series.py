"""Series of DICOM slices put in order: which belong together, and whether they make a volume.

Slices belong together by their places, times and pixels; unique identifiers only help, since
anonymisation may have given one to all slices, or each slice another. A series is refused where its
slices are not equally spaced along their normal, one above the other: a network would see a body
that is none.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources.radiology.dicom import (
    Values,
    burnt_in,
    check_header,
    count_frames,
    decode_frames,
    groups_of,
    is_image_class,
    pair,
    part,
    read_tags,
    values,
)

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

OWN_SERIES = "each slice has a SeriesInstanceUID of its own; by their places they are one volume"


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """The slices of a series, in order along their normal.

    Attributes:
        slices: (file, frame, header) of each.
        files: of the series, those of other time points too, each once.
        shape: (z, y, x).
        spacing_mm: (z, y, x) mm between voxels.
        affine: (4, 4), maps (x, y, z, 1) voxel indices to mm in RAS+.
        values: what the numbers of each slice mean.
        doubts: sentences that a user should read.
    """

    slices: tuple[tuple[Path, int, Dataset], ...]
    files: tuple[Path, ...]
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
    times: Mapping[str, float | str]  # by the names in `TIMES`
    number: int | None  # InstanceNumber

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        """Return the direction, (3,), in which the slices of its series follow each other."""
        return np.cross(*self.directions)

    @property
    def place(self) -> float:
        """Return where it lies along its normal, mm."""
        return float(self.position @ self.normal)


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """Files that belong together.

    Attributes:
        files: paths and headers.
        unread: files that cannot be read and may be slices of it, each with the reason.
        doubts: sentences that a user should read.
    """

    files: list[tuple[Path, Dataset]] = field(default_factory=list)
    unread: list[tuple[Path, str]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    @property
    def folders(self) -> list[Path]:
        """Return the folders in which its files lie, each once."""
        return list(dict.fromkeys(path.parent for path, _ in self.files))


def group_series(dicom: Iterable[Path], others: Iterable[Path] = ()) -> list[Series]:
    """Sort files into series; return those of images.

    A series is what one folder has of one SeriesInstanceUID. Single slices of the same kind in one
    folder are joined, and so are the parts of a series in several folders, unless one is a copy of
    the other.

    Args:
        dicom: files that look like DICOM.
        others: files beside them that do not.
    """
    found: dict[tuple[Path, str], Series] = {}
    lost: defaultdict[Path, list[tuple[Path, str]]] = defaultdict(list)
    names: defaultdict[Path, set[str]] = defaultdict(set)
    for path in dicom:
        names[path.parent].add(_pattern(path))
        try:
            header = read_tags(path)
        except SourceError as error:
            lost[path.parent].append((path, str(error)))
            continue
        uid = str(header.get("SeriesInstanceUID", ""))
        try:
            _check_header(header)
        except SourceError as error:
            if is_image_class(header) and not uid:
                lost[path.parent].append((path, str(error)))
            elif is_image_class(header):
                series = found.setdefault((path.parent, uid), Series())
                series.unread.append((path, str(error)))
            continue
        found.setdefault((path.parent, uid), Series()).files.append((path, header))
    strange: defaultdict[Path, list[str]] = defaultdict(list)
    for path in others:
        # named as the slices are, it is one of them that was damaged
        if _pattern(path) in names[path.parent]:
            what = "no DICOM" if path.stat().st_size else "an empty file"
            lost[path.parent].append((path, what))
        else:
            strange[path.parent].append(path.name)
    for (folder, _), series in found.items():
        series.unread.extend(lost[folder])
        if strange[folder]:
            some = ", ".join(strange[folder][:3])
            series.doubts.append(
                f"files of its folder that are no DICOM are left out: {len(strange[folder])} "
                f"({some})"
            )
    whole = [series for series in found.values() if series.files]
    return _join_folders(_join_single_slices(whole))


def _check_header(header: Dataset) -> None:
    """Refuse what has no pixels that are read here, or no numbers where it should have some."""
    try:
        check_header(header)
        count_frames(header)
        _kind(header)
        _place(header)
    except SourceError:
        raise
    except (AttributeError, TypeError, ValueError):
        # without what was said, which may quote values that are the patient's
        sentence = "its header is damaged: there are no numbers where some should be"
        raise SourceError(sentence) from None


def _pattern(path: Path) -> str:
    """Return what the names of the slices of a series have in common."""
    return re.sub(r"\d+", "0", path.name)


def _join_single_slices(every: Iterable[Series]) -> list[Series]:
    """Return the series, those of one slice in one folder and of one kind as one."""
    joined: dict[Any, Series] = {}
    for number, series in enumerate(every):
        kind = _kind(series.files[0][1])
        is_single = len(series.files) == 1 and kind and count_frames(series.files[0][1]) == 1
        key = (series.folders[0], kind) if is_single else number
        if (into := joined.setdefault(key, series)) is not series:
            _join(into, series)
            into.doubts[:] = dict.fromkeys([OWN_SERIES, *into.doubts])
    return list(joined.values())


def _join(into: Series, series: Series) -> None:
    """Take all of a series into another, each doubt and unread file once."""
    into.files.extend(series.files)
    into.unread[:] = dict.fromkeys([*into.unread, *series.unread])
    into.doubts[:] = dict.fromkeys([*into.doubts, *series.doubts])


def _join_folders(every: Sequence[Series]) -> list[Series]:
    """Return the series, those parts of one that lie in several folders joined."""
    joined: list[Series] = []
    alike: defaultdict[Any, list[tuple[Series, set[Any]]]] = defaultdict(list)
    for series in every:
        header = series.files[0][1]
        uid, kind = header.get("SeriesInstanceUID"), _kind(header)
        places = {_place(header) for _, header in series.files}
        for into, taken in alike[uid, kind] if uid and kind else ():
            if not places & taken:
                taken |= places
                _join(into, series)
                break
        else:
            joined.append(series)
            alike[uid, kind].append((series, places))
    for series in joined:
        if len(series.folders) > 1:
            series.doubts.insert(0, f"its slices lie in {len(series.folders)} folders")
    return joined


def _kind(header: Dataset) -> Any:
    """Return what all slices of a volume have in common; None of what does not lie in a body."""
    turned, spacing = header.get("ImageOrientationPatient"), header.get("PixelSpacing")
    if not turned or not spacing or not header.get("ImagePositionPatient"):
        return None
    rounded = tuple(np.round(np.array([*turned, *spacing], np.float64), 3).tolist())
    return (header.get("SOPClassUID"), header.Rows, header.Columns, rounded)


def _place(header: Dataset) -> Any:
    place = np.array(header.get("ImagePositionPatient") or (), np.float64)
    return tuple(np.round(place, 2).tolist())


def stack_series(
    files: Sequence[tuple[Path, Dataset]],
    *,
    time_points: Sequence[int] | None = None,
    named: Path | None = None,
) -> tuple[Stack, ...]:
    """Put the slices of one series in order; return them as volumes, one for each time point.

    Args:
        files: paths and headers, in any order.
        time_points: which of several volumes in one place, from 0; None = there is one.
        named: file that stays where there are copies.

    Raises:
        SourceError: slices that make no volume: missing, tilted, of different kinds or times.
    """
    every = [found for path, header in files for found in _slices_of(path, header)]
    _check_alike(every)
    slices, copies = _without_copies(every, named)
    times, told_by = split_times(slices)
    chosen, doubts = choose_times(time_points, len(times), told_by)
    if copies:
        doubts.append(f"copies of slices are left out: {copies}")
    in_order = [one.path for time in times for one in sorted(time, key=lambda s: s.place)]
    once = tuple(dict.fromkeys(in_order))
    return tuple(_stack(times[number], once, doubts) for number in chosen)


def choose_times(
    wanted: Sequence[int] | None, count: int, told_by: str
) -> tuple[Sequence[int], list[str]]:
    """Return which of so many time points are read, and what to say of the others.

    Args:
        wanted: their numbers, from 0; None = there must be one alone.
        count: of what there is.
        told_by: what tells them apart.

    Raises:
        SourceError: none is wanted and there are several, or there is none of that number.
    """
    if wanted is None and count > 1:
        raise SourceError(
            f"{count} time points in one series, told apart by {told_by}; choose one with "
            f"--time-point, 0 to {count - 1}"
        )
    if absent := [number for number in wanted or () if not 0 <= number < count]:
        raise SourceError(f"has {count} time points; there is none of number {absent[0]} (from 0)")
    if wanted is None or count == 1:
        return wanted or (0,), []
    numbers = ", ".join(map(str, wanted))
    return wanted, [f"time point {numbers} of {count} is read (from 0, told apart by {told_by})"]


def _stack(slices: list[_Slice], files: tuple[Path, ...], doubts: Sequence[str]) -> Stack:
    """Return the slices of one time, of a series in these files, as a volume."""
    slices = sorted(slices, key=lambda s: s.place)
    row, column = slices[0].directions
    normal = slices[0].normal
    said = [*doubts, *burnt_in(slices[0].header)]
    step = slices[0].thickness
    if len(slices) > 1:
        step, unsure = _even_step(np.array([s.place for s in slices]))
        said += unsure
        _check_upright(np.array([s.position for s in slices]), normal, slices[0].spacing)
        along = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    elif step > 0:
        along = normal * step
        said.append("a single slice; its thickness stands for the spacing along z")
    else:
        raise SourceError("a single slice that does not say how thick it is; expected a series")
    y, x = slices[0].spacing
    lps = np.eye(4)
    lps[:3] = np.column_stack([row * x, column * y, along, slices[0].position])
    return Stack(
        slices=tuple((s.path, s.frame, s.header) for s in slices),
        files=files,
        shape=(len(slices), int(slices[0].header.Rows), int(slices[0].header.Columns)),
        spacing_mm=(step, y, x),
        affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps,
        values=tuple(s.values for s in slices),
        doubts=tuple(said),
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
        if not np.isfinite([*position, *turned]).all():
            raise SourceError(f"{path.name} does not say in numbers where in the body it lies")
        said = (measures.get(name) for name in ("SpacingBetweenSlices", "SliceThickness"))
        # some write it negative, or as what is no number
        known = [abs(float(mm)) for mm in said if mm and np.isfinite(float(mm))]
        yield _Slice(
            path=path,
            frame=frame,
            header=header,
            position=np.array(position, np.float64),
            directions=np.array(turned, np.float64).reshape(2, 3),
            spacing=pair(measures.PixelSpacing),
            thickness=known[0] if known else 0.0,
            values=values(header, parts),
            times={
                name: value
                for group, name in TIMES
                if (
                    value := _comparable(
                        (part(header, parts, group) if group else header).get(name)
                    )
                )
                is not None
            },
            number=_whole(header.get("InstanceNumber")),
        )


def _comparable(value: Any) -> float | str | None:
    """Return a value of DICOM as a number where it is one, else as text."""
    if value in (None, ""):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _without_copies(slices: Sequence[_Slice], named: Path | None) -> tuple[list[_Slice], int]:
    """Return slices without those files that are in the place, time and pixels of another."""
    files: defaultdict[Any, list[Path]] = defaultdict(list)
    by_path = defaultdict(list)
    for one in slices:
        by_path[one.path].append(one)
    for path, own in by_path.items():
        where = tuple(tuple(np.round(s.position, 3).tolist()) for s in own)
        files[where, tuple(sorted(own[0].times.items()))].append(path)
    kept = set()
    for paths in files.values():
        if len(paths) == 1:
            kept.add(paths[0])
            continue
        # of copies that which was named stays
        once = {
            _digest(p, by_path[p][0].header): p for p in sorted(paths, key=lambda p: p == named)
        }
        kept.update(once.values())
    left = [one for one in slices if one.path in kept]
    return left, len(by_path) - len(kept)


def _digest(path: Path, header: Dataset) -> bytes:
    """Return the digest of a file's pixels, however they are stored."""
    digest = hashlib.sha256()
    decode_frames(path, header, lambda _, stored: digest.update(stored.astype("<i8").tobytes()))
    return digest.digest()


def split_times(slices: Sequence[_Slice]) -> tuple[list[list[_Slice]], str]:
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
    if shorter == 0:  # a single slice
        return bool(np.abs(a[:, None] - b).min() < SAME_PLACE)
    if common <= shorter / 2:
        return False
    gaps = np.diff(np.sort(np.concatenate([a, b])))
    apart = float(np.median(gaps[gaps > SAME_PLACE])) if (gaps > SAME_PLACE).any() else 0.0
    own = float(np.median(np.diff(a)))
    is_interleaved = own > 1.5 * apart > 0 and not (gaps <= SAME_PLACE).any()
    # every second slice of one volume, as MR takes them, is thinner than its distance to the next
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
