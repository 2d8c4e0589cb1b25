"""Which slides a command line names, and the folder that each gets."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from wsi_pipeline.errors import SourceError
from wsi_pipeline.options import SelectOptions
from wsi_pipeline.paths import (
    dicom_slides,
    is_ome_zarr,
    is_remote,
    is_zarr_url,
    name_of,
    named_paths,
)
from wsi_pipeline.store import is_patch_grid

SLIDE_SUFFIXES = frozenset(
    [
        ".svs",
        ".tif",
        ".tiff",
        ".ndpi",
        ".vms",
        ".vmu",
        ".scn",
        ".mrxs",
        ".svslide",
        ".bif",
        ".dcm",
        ".czi",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One slide and the folder of its run.

    Attributes:
        path: of the slide.
        folder: of the run.
        mpp: µm per level-0 pixel where a table gives them, in place of what the file says.
        target: folder behind a URL to which the run is moved when it is whole; None = it stays.
    """

    path: Path
    folder: Path
    mpp: float | None = None
    target: Path | None = None

    @property
    def home(self) -> Path:
        """Return the folder in which users find the run."""
        return self.target or self.folder

    def select(self, options: SelectOptions) -> SelectOptions:
        """Return the options for this slide, with its own µm per pixel."""
        return options if self.mpp is None else replace(options, mpp=self.mpp)


def find_slides(inputs: list[str], *, output: Path) -> list[Path]:
    """Expand files, folders (recursively), globs and list files; return slide paths, each once.

    A folder gives the files with a slide's suffix, OME-Zarr slides and stored patch grids, and of
    DICOM files one for each slide; a file that is named itself is taken whatever its suffix.

    Args:
        inputs: as on the command line, see `named_paths`.
        output: folder of the runs, in which no slides are looked for.

    Raises:
        SourceError: an input that does not exist.
    """
    found: dict[Path, None] = {}
    for path in (path for text in inputs for path in named_paths(text)):
        if is_remote(path):
            found.update(dict.fromkeys(_iter_remote(path)))
        elif path.is_dir() and not _is_folder_slide(path):
            found.update(dict.fromkeys(_iter_folder(path, output.absolute())))
        else:
            found[path] = None
    return list(found)


def _is_folder_slide(path: Path) -> bool:
    return is_patch_grid(path) or is_ome_zarr(path)


def _iter_folder(folder: Path, output: Path) -> Iterator[Path]:
    entries = [
        path
        for path in sorted(folder.iterdir())
        if path.absolute() != output and not path.name.startswith(".")
    ]
    dicom = dicom_slides(p for p in entries if p.suffix.lower() == ".dcm" and p.is_file())
    for path in entries:
        if path.is_dir():
            if _is_folder_slide(path):
                yield path
            elif path.suffix != ".zarr":
                yield from _iter_folder(path, output)
        elif path.suffix.lower() == ".dcm":
            if path in dicom:
                yield path
        elif path.suffix.lower() in SLIDE_SUFFIXES or path.name.lower().endswith(".zarr.zip"):
            yield path


def _iter_remote(path: Path) -> Iterator[Path]:
    """Yield the slide behind a URL, or those right in the folder that it names."""
    if not str(path).endswith("/") or is_zarr_url(path):
        yield path
        return
    try:
        entries = sorted(path.iterdir(), key=str)
    except Exception as error:  # clients of remote stores raise what they like
        raise SourceError(f"{path}: cannot be listed ({error}); name the slides") from error
    for entry in entries:
        if PurePosixPath(name_of(entry)).suffix.lower() in {*SLIDE_SUFFIXES, ".zarr"}:
            yield entry


def read_mpp_table(path: Path) -> dict[str, float]:
    """Read a CSV with the columns slide and mpp; return µm per pixel by the slide's file name.

    Args:
        path: of the table; a slide is given by its file name, with or without extension.

    Raises:
        SourceError: the file is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path}: cannot be read as CSV ({error})") from error
    table: dict[str, float] = {}
    for number, row in enumerate(rows, start=2):
        try:
            name, mpp = str(row["slide"]).strip(), float(row["mpp"])
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(
                f"{path}, line {number}: expected the columns slide and mpp, a name and a number"
            ) from error
        if not 0 < mpp < math.inf or not name:
            raise SourceError(f"{path}, line {number}: {name!r} has {mpp} µm per pixel")
        if table.setdefault(name, mpp) != mpp:
            raise SourceError(f"{path}, line {number}: {name} has {table[name]} and {mpp}")
    if not table:
        raise SourceError(f"{path}: no slides; expected the columns slide and mpp")
    return table


def plan_jobs(
    slides: list[Path],
    output: Path,
    mpp_table: Mapping[str, float] | None = None,
    *,
    target: Path | None = None,
) -> list[Job]:
    """Give each slide a folder of its own; return the jobs.

    The folder is named as the slide without extension; slides that would share it are told apart
    by their extension, then by their folder.

    Args:
        slides: their paths.
        output: folder of the runs.
        mpp_table: µm per level-0 pixel by file name, with or without extension.
        target: folder behind a URL to which the runs are moved when they are whole.

    Raises:
        SourceError: a table that names none of the slides.
    """
    for naming in (_stem, _file_name, _long_name):
        names = Counter(naming(path).casefold() for path in slides)
        folders = {p: naming(p) for p in slides if names[naming(p).casefold()] == 1}
        if naming is _stem:
            chosen = folders
        else:
            taken = {name.casefold() for name in chosen.values()}
            chosen |= {
                p: n for p, n in folders.items() if p not in chosen and n.casefold() not in taken
            }
    table = mpp_table or {}
    mpps = {p: table.get(_file_name(p), table.get(_stem(p))) for p in slides}
    if table and slides and not any(mpps.values()):
        raise SourceError(
            f"the table of µm per pixel names none of the slides, {_file_name(slides[0])}…"
        )
    return [
        Job(path=p, folder=output / name, mpp=mpps[p], target=target / name if target else None)
        for p, name in ((p, chosen.get(p, _long_name(p))) for p in slides)
    ]


def _stem(path: Path) -> str:
    stem = PurePosixPath(_file_name(path)).stem
    for suffix in (".zarr", ".ome", ".nii"):  # before .zip, .zarr and .gz
        stem = stem.removesuffix(suffix)
    return stem


def _file_name(path: Path) -> str:
    name = name_of(path)
    return name if name.strip(".") else "slide"  # a URL may end in ..


def _long_name(path: Path) -> str:
    """Return a name that differs wherever the paths do."""
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]
    return f"{path.absolute().parent.name}__{_file_name(path)}__{digest}"
