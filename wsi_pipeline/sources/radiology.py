"""Which files of a folder are planar images or volumes, told by what they begin with."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wsi_pipeline.errors import SourceError
from wsi_pipeline.paths import is_ome_zarr, is_remote, named_paths
from wsi_pipeline.store import is_patch_grid

if TYPE_CHECKING:
    from pydicom import Dataset

Kind = Literal["PNG", "JPEG", "TIFF", "DICOM", "NIfTI", "NRRD", ""]

COMPANIONS = frozenset([".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".html", ".pdf", ".toml"])
"""Files that lie beside images and are none: left out of folders without a word."""

HEAD = 352
"""Bytes that tell each kind; those of a NIfTI's header."""


def kind_of(path: Path) -> Kind:
    """Return what a file is by its first bytes; "" for what is not known here.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                head = file.read(HEAD)
            return "NIfTI" if _is_nifti(head) else ""
    except (EOFError, zlib.error):
        return ""
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    if head[128:132] == b"DICM":
        return "DICOM"
    if _is_nifti(head):
        return "NIfTI"
    starts: dict[bytes, Kind] = {
        b"\x89PNG": "PNG",
        b"\xff\xd8\xff": "JPEG",
        b"NRRD": "NRRD",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"II+\0": "TIFF",
        b"MM\0+": "TIFF",
    }
    return next((kind for start, kind in starts.items() if head.startswith(start)), "")


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def find_images(inputs: list[str], output: Path) -> list[Path]:
    """Expand files, folders (recursively), globs and list files; return the paths, each once.

    Of folders all files come back, but hidden ones and texts: what is no planar image is for
    `open_image` to refuse by its name.

    Args:
        inputs: as on the command line.
        output: folder of the runs, in which nothing is looked for.

    Raises:
        SourceError: an input that does not exist.
    """
    return list(dict.fromkeys(_iter_paths(inputs, output)))


def find_volumes(inputs: list[str], output: Path) -> list[Path]:
    """Expand as `find_images`; return one path for each DICOM series, and those of other files.

    A series is named by its folder where it is alone there, else by its first file.

    Raises:
        SourceError: an input that does not exist.
    """
    found: dict[Path, None] = {}
    series: dict[tuple[Path, str], Path] = {}
    alone: dict[Path, bool] = {}
    uid_of = cache(_series_uid)  # reads a header
    for path in find_images(inputs, output):
        uid = uid_of(path)
        if uid is None:
            found[path] = None
            continue
        folder = path.parent
        first = series.setdefault((folder, uid), path)
        if first is not path:
            continue
        if folder not in alone:
            alone[folder] = len({uid_of(p) for p in _iter_dicom(folder)}) == 1
        found[folder if alone[folder] else path] = None
    return list(found)


def series_in(folder: Path) -> dict[str, list[tuple[Path, Dataset]]]:
    """Return paths and headers of the images in a folder, by SeriesInstanceUID.

    What is DICOM but no image, and what cannot be read, is left out.
    """
    from wsi_pipeline.sources.dicom import read_header

    found: dict[str, list[tuple[Path, Dataset]]] = {}
    for path in _iter_dicom(folder):
        try:
            header = read_header(path)
        except SourceError:
            continue
        found.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
    return found


def _series_uid(path: Path) -> str | None:
    """Return the series that a file is a slice of; None where it is none."""
    from wsi_pipeline.sources.dicom import read_header  # takes its time; slides do without

    try:
        if path.is_dir() or kind_of(path) != "DICOM":
            return None
        return str(read_header(path).get("SeriesInstanceUID", ""))
    except SourceError:
        return None


def _iter_dicom(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and kind_of(path) == "DICOM":
            yield path


def _iter_paths(inputs: Iterable[str], output: Path) -> Iterator[Path]:
    for path in (path for text in inputs for path in named_paths(text)):
        if is_remote(path):
            raise SourceError(f"{path}: images and volumes are read from here only; copy it")
        if path.is_dir():
            yield from _iter_folder(path, output.absolute())
        else:
            yield path


def _iter_folder(folder: Path, output: Path) -> Iterator[Path]:
    if is_patch_grid(folder) or is_ome_zarr(folder):
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.absolute() == output or path.name.startswith(".") or path.name == "DICOMDIR":
            continue
        if path.is_dir():
            yield from _iter_folder(path, output)
        elif path.suffix.lower() not in COMPANIONS:
            yield path
