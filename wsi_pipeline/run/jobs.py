"""Which slides a command line names, and the folder that each gets."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.dicomweb import DicomWeb, find_series
from wsi_pipeline.files.formats import dicom_slides, has_preamble
from wsi_pipeline.files.ngff import is_damaged_zarr, is_ome_zarr, is_zarr_url
from wsi_pipeline.files.paths import (
    Inputs,
    as_inputs,
    as_path,
    each_once,
    in_letters,
    is_remote,
    name_of,
    named_paths,
    read_text,
    table_rows,
    visible_entries,
)
from wsi_pipeline.options import SelectOptions
from wsi_pipeline.patch_grid import is_patch_grid

logger = logging.getLogger(__name__)

SLIDE_SUFFIXES = frozenset(
    [".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm",
     ".czi"]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One slide, the model for it, and the folder of its run.

    Attributes:
        path: of the slide.
        folder: of the run.
        mpp: µm per level-0 pixel where a table gives them, in place of what the file says.
        target: folder behind a URL to which the run is moved when it is whole; None = it stays.
        model: which of several, from 0.
    """

    path: Path
    folder: Path
    mpp: float | None = None
    target: Path | None = None
    model: int = 0

    def __post_init__(self) -> None:
        for name in ("path", "folder", "target"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_path(given))

    @property
    def home(self) -> Path:
        """Return the folder in which users find the run."""
        return self.target or self.folder

    def of(self, model: int, name: str) -> Job:
        """Return the slide's job for one of several models, in a folder of the model's name."""
        folder = self.folder.parent / name / self.folder.name
        target = self.target and self.target.parent / name / self.target.name
        return replace(self, folder=folder, target=target, model=model)

    def select(self, options: SelectOptions) -> SelectOptions:
        """Return the options for this slide, with its own µm per pixel."""
        return options if self.mpp is None else replace(options, mpp=self.mpp)


def find_slides(inputs: Inputs, *, output: str | Path, linked: bool = False) -> list[Path]:
    """Expand files, folders (recursively), globs and list files; return slide paths, each once.

    A folder gives the files with a slide's suffix, OME-Zarr slides and stored patch grids, and of
    DICOM files, whatever their suffix, one for each slide; a file that is named itself is taken
    whatever its suffix. What cannot be looked into is among them, for its reader to say why.

    Args:
        inputs: as on the command line, see `named_paths`.
        output: folder of the runs, in which no slides are looked for.

    Raises:
        SourceError: an input that does not exist.
    """
    output, seen = as_path(output).absolute(), set[str]()
    paths = (path for text in as_inputs(inputs) for path in named_paths(text))
    found = [slide for path in paths for slide in _iter_slides(path, output, seen)]
    # Links have names of their own, by which truths and predictions may go.
    return list(dict.fromkeys(found)) if linked else each_once(found)


def _iter_slides(path: Path, output: Path, seen: set[str]) -> Iterator[Path]:
    """Yield the slide that a path is, or those in its folder."""
    if is_remote(path):
        yield from _iter_remote(path)
        return
    is_folder = os.path.isdir(path)
    is_slide = not is_folder or _is_folder_slide(path)
    if is_slide:
        yield path
    if is_folder and (not is_slide or is_damaged_zarr(path)):
        yield from _iter_folder(path, output, seen)


def _is_folder_slide(path: Path) -> bool:
    return is_patch_grid(path) or is_ome_zarr(path)


def _iter_folder(folder: Path, output: Path, seen: set[str]) -> Iterator[Path]:
    entries = visible_entries(folder, seen)
    if entries is None:
        yield folder
        return
    dicom = set(dicom_slides(filter(_may_be_dicom, entries)))
    pictures = [path.name for path in entries if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    # VMS slides are made of pictures.
    if pictures and not any(path.suffix.lower() in (".vms", ".vmu") for path in entries):
        logger.warning(
            "%s: pictures are left out, %s, as slides have some beside them; name those that are "
            "slides",
            folder, ", ".join(pictures[:3]) + ", …" * (len(pictures) > 3),
        )  # fmt: skip
    for path in entries:
        suffix = path.suffix.lower()
        if path.absolute() == output:
            continue
        if os.path.isdir(path):
            # A zarr that is no slide holds chunks by the thousand, and no slides.
            if suffix != ".zarr":
                yield from _iter_slides(path, output, seen)
            elif _is_folder_slide(path):
                yield path
        elif suffix == ".dcm":
            if path in dicom or not os.path.isfile(path):
                yield path
        elif suffix in SLIDE_SUFFIXES or path.name.lower().endswith(".zarr.zip") or path in dicom:
            yield path


def _may_be_dicom(path: Path) -> bool:
    if path.suffix.lower() == ".dcm":
        return os.path.isfile(path)
    return path.suffix.lower() not in SLIDE_SUFFIXES and has_preamble(path)


def _iter_remote(path: Path) -> Iterator[Path]:
    """Yield the slide behind a URL, or those right in the folder or server that it names."""
    if isinstance(path, DicomWeb):
        yield from find_series(path)
        return
    if not str(path).endswith("/") or is_zarr_url(path):
        yield path
        return
    try:
        entries = sorted(path.iterdir(), key=str)
    except Exception as error:
        # Clients of remote stores raise what they like.
        raise SourceError(f"{path}: cannot be listed ({error}); name the slides") from error
    for entry in entries:
        if PurePosixPath(name_of(entry)).suffix.lower() in {*SLIDE_SUFFIXES, ".zarr"}:
            yield entry


def why_none(inputs: Inputs, what: str, suffixes: Collection[str] = ()) -> str:
    """Return that nothing was found, what lies there instead, and what to do.

    Args:
        inputs: Files and folders in which nothing was found.
        what: "slides", "images" or "volumes".
        suffixes: By which such are known in folders; none where their first bytes tell them.
    """
    inputs, seen = as_inputs(inputs), set[str]()
    kinds: Counter[str] = Counter()
    waiting = [path for text in inputs for path in named_paths(text) if not is_remote(path)]
    # Enough to tell what lies there, should it be a whole disk.
    while waiting and kinds.total() < 10_000:
        path = waiting.pop()
        if os.path.isdir(path):
            waiting += visible_entries(path, seen) or []
        else:
            kinds[path.suffix or path.name] += 1
    there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
    text = f"no {what} found in {', '.join(map(str, inputs))}, which holds {there}"
    pictures = [kind for kind in kinds if kind.lower() in (".png", ".jpg", ".jpeg")]
    if not suffixes:
        return text
    if not pictures:
        return f"{text}; of folders files are taken that end in {', '.join(sorted(suffixes))}"
    return (
        f"{text}; pictures are taken as {what} where they are named, as in "
        f"'{inputs[0]}/**/*{pictures[0]}', with their µm per pixel as --mpp"
    )


def read_mpp_table(path: str | Path) -> dict[str, float]:
    """Read a CSV with the columns slide and mpp; return µm per pixel by the slide's file name.

    Args:
        path: of the table; a slide is given by its file name, with or without extension.

    Raises:
        SourceError: the file is no such table.
    """
    path = Path(path)
    lines = in_letters(read_text(path)).splitlines()
    header, *rows = table_rows(path, lines) if lines else [[]]
    columns = [cell.casefold() for cell in header]
    table: dict[str, float] = {}
    for number, row in enumerate(rows, start=2):
        if not any(row):
            continue
        try:
            name, figure = (row[columns.index(column)] for column in ("slide", "mpp"))
            # Spreadsheets of many countries write a comma.
            mpp = float(figure.replace(",", "."))
        except (IndexError, ValueError) as error:
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
    slides: Iterable[str | Path],
    output: str | Path,
    mpp_table: Mapping[str, float] | None = None,
    *,
    target: Path | None = None,
) -> list[Job]:
    """Give each slide a folder of its own; return the jobs.

    The folder is named as the slide without extension; slides that would share it are told apart
    by their extension, then by their folder.

    Args:
        mpp_table: µm per level-0 pixel by file name, with or without extension.
        target: folder behind a URL to which the runs are moved when they are whole.

    Raises:
        SourceError: a table that names none of the slides.
    """
    paths, output = [as_path(slide) for slide in slides], as_path(output)
    chosen = dict[Path, str]()
    for naming in (_stem, _file_name, _long_name):
        names = Counter(_folded(naming(path)) for path in paths)
        alone = {p: n for p in paths if names[_folded(n := naming(p))] == 1}
        taken = set(map(_folded, chosen.values()))
        chosen |= {p: n for p, n in alone.items() if p not in chosen and _folded(n) not in taken}
    table = mpp_table or {}
    mpps = {p: table.get(_file_name(p), table.get(_stem(p))) for p in paths}
    if table and paths and not any(mpps.values()):
        raise SourceError(
            f"the table of µm per pixel names none of the slides, {_file_name(paths[0])}…"
        )
    return [
        Job(path=p, folder=output / name, mpp=mpps[p], target=target / name if target else None)
        for p, name in ((p, chosen.get(p, _long_name(p))) for p in paths)
    ]


def _folded(name: str) -> str:
    """Return the same for names that some file systems take for one: by capitals, or accents."""
    return normalize("NFC", name).casefold()


def _stem(path: Path) -> str:
    stem = PurePosixPath(_file_name(path)).stem
    # These may stand before .zip, .zarr and .gz.
    for suffix in (".zarr", ".ome", ".nii"):
        stem = stem.removesuffix(suffix)
    # "...svs" would be the folder above.
    return stem if stem.strip(".") else _file_name(path)


def _file_name(path: Path) -> str:
    name = name_of(path)
    # A URL may end in "..", which no folder can be called.
    return name if name.strip(".") else "slide"


def _long_name(path: Path) -> str:
    """Return a name that differs wherever the paths do."""
    digest = hashlib.sha256(os.fsencode(str(path.absolute()))).hexdigest()[:8]
    return f"{path.absolute().parent.name}__{_file_name(path)}__{digest}"
