"""Which files of DICOM are slices of one series.

Slices belong together by their places, times and pixels; unique identifiers only help, since
anonymisation may have given one to all slices, or each slice another.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset

from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources.radiology.dicom import (
    check_header,
    count_frames,
    is_image_class,
    read_tags,
)

OWN_SERIES = "each slice has a SeriesInstanceUID of its own; by their places they are one volume"


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """Files that belong together.

    Attributes:
        unread: Files that cannot be read and may be slices of it, each with the reason.
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
    the other. Some of the `others`, which do not look like DICOM, may be slices that were damaged.
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
            check_header(header)
            _ = count_frames(header), _kind(header), _place(header)
        except (AttributeError, SourceError, TypeError, ValueError) as error:
            # What others than we say may quote values that are the patient's.
            reason = "its header is damaged: there are no numbers where some should be"
            if isinstance(error, SourceError):
                reason = str(error)
            if is_image_class(header) and not uid:
                lost[path.parent].append((path, reason))
            elif is_image_class(header):
                series = found.setdefault((path.parent, uid), Series())
                series.unread.append((path, reason))
            continue
        found.setdefault((path.parent, uid), Series()).files.append((path, header))
    strange: defaultdict[Path, list[str]] = defaultdict(list)
    for path in others:
        # Named as the slices are, it is one of them that was damaged.
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
    joined: dict[Any, Series] = {}
    for number, series in enumerate(series for series in found.values() if series.files):
        kind = _kind(series.files[0][1])
        is_single = len(series.files) == 1 and kind and count_frames(series.files[0][1]) == 1
        key = (series.folders[0], kind) if is_single else number
        if (into := joined.setdefault(key, series)) is not series:
            _join(into, series)
            into.doubts[:] = dict.fromkeys([OWN_SERIES, *into.doubts])
    return _join_folders(joined.values())


def _pattern(path: Path) -> str:
    """Return what the names of the slices of a series have in common."""
    return re.sub(r"\d+", "0", path.name)


def _join(into: Series, series: Series) -> None:
    """Take all of a series into another, each doubt and unread file once."""
    into.files.extend(series.files)
    into.unread[:] = dict.fromkeys([*into.unread, *series.unread])
    into.doubts[:] = dict.fromkeys([*into.doubts, *series.doubts])


def _join_folders(every: Iterable[Series]) -> list[Series]:
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
