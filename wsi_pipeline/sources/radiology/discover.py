"""Which files of a folder are planar images or volumes, told by what they begin with."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.formats import is_dicom
from wsi_pipeline.files.ngff import is_damaged_zarr, is_ome_zarr
from wsi_pipeline.files.paths import (
    Inputs,
    as_inputs,
    as_path,
    each_once,
    is_remote,
    named_paths,
    visible_entries,
)
from wsi_pipeline.patch_grid import is_patch_grid

if TYPE_CHECKING:
    from wsi_pipeline.sources.radiology.dicom_series import Series

COMPANIONS = frozenset(
    [".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".rst", ".html", ".pdf", ".toml", ".yaml",
     ".yml", ".ini", ".db", ".log", ".cff", ".rtf", ".doc", ".docx", ".xls", ".xlsx", ".lnk",
     ".url", ".md5", ".sha256"]
)  # fmt: skip
"""Files that lie beside images and are none: left out of folders without a word."""
BESIDE = frozenset(
    ["dicomdir", "license", "licence", "readme", "notice", "copying", "version", "changelog",
     "thumbs.db", "desktop.ini", "checksums", "md5sums", "sha256sums"]
)  # fmt: skip
"""Names of such without a suffix that tells, in small letters."""


def find_images(inputs: Inputs, output: str | Path) -> list[Path]:
    """Expand files, folders (recursively), globs and list files; return the paths, each once.

    Of folders all files come back, but hidden ones and texts: what is no planar image is for
    `open_image` to refuse by its name. In the folder of the runs, `output`, nothing is looked for.

    Raises:
        SourceError: an input that does not exist.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for path in (path for text in as_inputs(inputs) for path in named_paths(text)):
        if is_remote(path):
            raise SourceError(f"{path}: images and volumes are read from here only; copy it")
        is_folder = os.path.isdir(path)
        found += _iter_folder(path, as_path(output).absolute(), seen) if is_folder else [path]
    return each_once(found)


def find_volumes(inputs: Inputs, output: str | Path) -> list[Path]:
    """Expand as `find_images`; return one path for each DICOM series, and those of other files.

    A series is named by its folder where it is alone there, else by its first file.

    Raises:
        SourceError: an input that does not exist.
    """
    paths = find_images(inputs, output)
    folders = dict.fromkeys(path.parent for path in paths if is_dicom(path))
    # Of whole folders, whatever was named: a slice that lies beside belongs to its series.
    every = _group(path for folder in folders for path in folder.iterdir())
    series_in_folder = Counter(folder for series in every for folder in series.folders)
    names: dict[Path, Path | None] = {}
    for series in every:
        # What cannot be read beside a series is told with it.
        names |= {path: None for path, _ in series.unread if path not in names}
        (folder, *others), first = series.folders, series.files[0][0]
        if others:
            name = Path(os.path.commonpath([path.absolute() for path in series.folders]))
        else:
            name = folder if series_in_folder[folder] == 1 else first
        names |= {path: name for path, _ in series.files}
    found = dict.fromkeys(names.get(path, path) for path in paths)
    return [path for path in found if path is not None]


def series_in(folder: Path) -> list[Series]:
    """Return the series of DICOM images in a folder, else those of the folders in it."""
    every = _group(folder.rglob("*"))
    return [series for series in every if folder in series.folders] or every


def series_of(path: Path) -> Series:
    """Return the series that a DICOM file is a slice of, as far as its folder holds it.

    Raises:
        SourceError: the file cannot be read, or is no image.
    """
    from wsi_pipeline.sources.radiology.dicom import read_header

    read_header(path)
    for series in _group(path.parent.iterdir()):
        if any(path.samefile(other) for other, _ in series.files):
            return series
    raise SourceError("its header is damaged: it does not say in numbers where in a volume it lies")


def _group(paths: Iterable[Path]) -> list[Series]:
    """Return the series of those files that are no known companions of images."""
    # It takes its time; slides do without.
    from wsi_pipeline.sources.radiology.dicom_series import group_series

    files = [path for path in sorted(paths) if path.is_file() and not is_beside(path)]
    dicom = dict.fromkeys(filter(is_dicom, files))
    return group_series(dicom, [path for path in files if path not in dicom])


def is_beside(path: Path) -> bool:
    """Return whether a file lies beside images and is none, by its name."""
    name = path.name.lower()
    return name.startswith(".") or path.suffix.lower() in COMPANIONS or name in BESIDE


def _iter_folder(folder: Path, output: Path, seen: set[str]) -> Iterator[Path]:
    if is_patch_grid(folder) or (is_ome_zarr(folder) and not is_damaged_zarr(folder)):
        yield folder
        return
    entries = visible_entries(folder, seen)
    if entries is None:
        yield folder
        return
    for path in entries:
        if path.absolute() == output:
            continue
        if os.path.isdir(path):
            yield from _iter_folder(path, output, seen)
        elif not is_beside(path):
            yield path
