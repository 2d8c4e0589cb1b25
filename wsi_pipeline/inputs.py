"""Which slides a command line names, and the folder that each gets."""

from __future__ import annotations

import glob
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.errors import SourceError
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
    """One slide and the folder of its run."""

    path: Path
    folder: Path


def find_slides(inputs: list[str], *, output: Path) -> list[Path]:
    """Expand files, folders (recursively), globs and list files; return slide paths, each once.

    A folder gives the files with a slide's suffix and stored patch grids; a file that is named
    itself is taken whatever its suffix. `.txt` and `.csv` files name one path a line, relative to
    the file's folder.

    Args:
        inputs: as on the command line.
        output: folder of the runs, in which no slides are looked for.

    Raises:
        SourceError: an input that does not exist.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.suffix.lower() in (".txt", ".csv") and path.is_file():
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            found.update(dict.fromkeys(path.parent / line for line in lines if line))
        elif path.is_dir() and not is_patch_grid(path):
            found.update(dict.fromkeys(_iter_folder(path, output.absolute())))
        elif path.exists():
            found[path] = None
        elif matches := sorted(glob.glob(text, recursive=True)):
            found.update(dict.fromkeys(map(Path, matches)))
        else:
            raise SourceError(f"{text}: no such file, folder or pattern")
    return list(found)


def _iter_folder(folder: Path, output: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.absolute() == output or path.name.startswith("."):
            continue
        if path.is_dir():
            if is_patch_grid(path):
                yield path
            elif path.suffix != ".zarr":
                yield from _iter_folder(path, output)
        elif path.suffix.lower() in SLIDE_SUFFIXES:
            yield path


def plan_jobs(slides: list[Path], output: Path) -> list[Job]:
    """Give each slide a folder of its own; return the jobs.

    The folder is named as the slide without extension; slides that would share it are told apart
    by their extension, then by their folder.
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
    return [Job(path=p, folder=output / chosen.get(p, _long_name(p))) for p in slides]


def _stem(path: Path) -> str:
    return path.stem.removesuffix(".ome")


def _file_name(path: Path) -> str:
    return path.name


def _long_name(path: Path) -> str:
    """Return a name that differs wherever the paths do."""
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]
    return f"{path.absolute().parent.name}__{path.name}__{digest}"
