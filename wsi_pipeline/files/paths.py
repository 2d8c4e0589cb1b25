"""What a path names, here or behind a URL, and what a folder, a pattern or a list holds."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wsi_pipeline.errors import SourceError
from wsi_pipeline.errors import without_secrets as without_secrets
from wsi_pipeline.files.dicomweb import DicomWeb, read_address

logger = logging.getLogger(__name__)

LISTED = ("path", "file", "filename", "file_name", "slide_path", "slide", "image", "name")
"""Headers of the column of paths in a CSV list; the first that occurs counts."""
WORK = ".store"
"""In the folder of a run: what it keeps besides its outputs."""
RESULTS = ("mask", "annotations", "overlay", "run")
"""How the names of what is written there begin, up to their first dot."""
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    # It begins as that of UTF-16 does.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by what a text in them begins with."""

Inputs = str | Path | Iterable[str | Path]
"""One input or several, as on the command line."""


def as_path(text: str | Path, **options: Any) -> Path:
    """Return the path that a text names; a URL gives one of fsspec's, with the same methods.

    The options are those of fsspec's client. `file://` gives the path of a file here, an address
    of DICOMweb one that has little but a name.

    Raises:
        SourceError: a URL that cannot be used here.
    """
    if not isinstance(text, str) or "://" not in text:
        return Path(text) if isinstance(text, str) else text
    # What is behind URLs is a path in all but its type.
    path: Any
    if text.startswith("dicomweb"):
        path = read_address(text)
        return path  # type: ignore[no-any-return]
    try:
        from upath import UPath

        path = UPath(text, **options)
        # The client of this protocol may be missing.
        _ = path.fs
    except (ImportError, ValueError) as error:
        raise SourceError(
            f'{without_secrets(f"{text}: {error}")}; URLs need pip install "wsi-pipeline[remote]"'
        ) from error
    return Path(path.path) if path.protocol in ("file", "local") else path


def as_inputs(inputs: Inputs) -> list[str | Path]:
    """Return inputs as a list: one may come alone."""
    alone = isinstance(inputs, str) or not isinstance(inputs, Iterable)
    return [inputs] if alone else list(inputs)  # type: ignore[list-item, arg-type]


def named_paths(text: str | Path) -> list[Path]:
    """Return what one input of a command line names: a path, those of a list file, or a pattern's.

    `.txt` and `.csv` files name one path or URL a line, paths relative to the file's folder.

    Raises:
        SourceError: it does not exist, or is a list that cannot be read.
    """
    path = as_path(text)
    if is_remote(path):
        return [path]
    if path.suffix.lower() in (".txt", ".csv") and os.path.isfile(path):
        named = []
        for entry in _entries(path):
            letters = in_letters(entry)
            # As it stands, in Latin letters, or as Windows writes it.
            meant = [path.parent / name for name in (entry, letters, letters.replace("\\", "/"))]
            there = next(filter(os.path.exists, meant), meant[1])
            named.append(as_path(entry) if "://" in entry else there)
        return named
    found = [path] if os.path.exists(path) else _matches(str(path))
    if not found:
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            reason = "no such file, folder or pattern"
        except OSError as error:
            reason = f"cannot be looked at ({error.strerror})"
        raise SourceError(f"{text}: {reason}")
    return found


def _entries(path: Path) -> list[str]:
    """Return what a list file names: its lines, or a column of a CSV that has a header for it."""
    lines = [line.strip() for line in io.StringIO(read_text(path), newline=None)]
    lines = [line for line in lines if line]
    if path.suffix.lower() == ".csv" and lines:
        rows = table_rows(path, lines)
        header = [cell.casefold() for cell in rows[0]]
        if named := [name for name in LISTED if name in header]:
            column = header.index(named[0])
            return [row[column] for row in rows[1:] if row[column:] and row[column]]
        lines = [
            line if "://" in line or os.path.exists(path.parent / line) else row[0]
            for line, row in zip(lines, rows, strict=True)
        ]
    # Windows copies paths with quotes around them.
    return [re.sub(r'^"(.*)"$', r"\1", line) for line in lines]


def read_text(path: Path) -> str:
    """Read a text in UTF-8 or, as its mark tells, UTF-16 or UTF-32; return it.

    Bytes that are no UTF-8 become lone surrogates, as in names of files.

    Raises:
        SourceError: the file cannot be read, or is no text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    encoding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), None)
    try:
        text = raw.decode(encoding) if encoding else raw.decode("utf-8", "surrogateescape")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: cannot be read as {encoding}; save it as UTF-8") from error
    if "\0" in text:
        raise SourceError(f"{path}: no text, it holds zero bytes; save it as UTF-8")
    return text


def in_letters(text: str) -> str:
    """Return a text of `read_text` with what is no UTF-8 taken for Windows's Latin letters."""
    if not re.search("[\udc80-\udcff]", text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def table_rows(path: Path, lines: list[str]) -> list[list[str]]:
    """Return the cells of a CSV's lines, stripped; what separates them is told by the first.

    Raises:
        SourceError: a cell that no name of a file is as long as.
    """
    separator = max(",;\t", key=lines[0].count)
    try:
        # Each line by itself: a quote that is never closed would swallow the rest of the list.
        rows = [next(csv.reader([line], delimiter=separator)) for line in lines]
    except csv.Error as error:
        raise SourceError(f"{path}: no CSV ({error})") from error
    return [[cell.strip() for cell in row] for row in rows]


def _matches(pattern: str) -> list[Path]:
    """Return what a pattern names, sorted; `**` goes into each folder once, in spite of links."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return list(map(Path, sorted(glob.glob(pattern))))
    index = parts.index("**")
    seen: set[str] = set()
    waiting, found = _matches(str(Path(*parts[:index]))), []
    while waiting:
        folder = waiting.pop(0)
        entries = visible_entries(folder, seen) if folder.is_dir() else []
        waiting += [entry for entry in entries or () if os.path.isdir(entry)]
        found += _matches(str(Path(glob.escape(str(folder)), *(parts[index + 1 :] or ("*",)))))
    found = [path for path in found if not ((path.parent / WORK).is_dir() and _is_result(path))]
    return sorted(dict.fromkeys(found))


def visible_entries(folder: Path, seen: set[str]) -> list[Path] | None:
    """Return what a folder holds but hidden entries, sorted, links behind; None if unreadable.

    What a run has written into its folder does not count: it is no input of the next. The folder
    may be that of a DICOM series, too. It is added to the real paths that have been seen: those
    hold nothing more.
    """
    real = os.path.realpath(folder)
    if real in seen:
        return []
    seen.add(real)
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return None
    if (folder / WORK).is_dir():
        entries = [path for path in entries if not _is_result(path)]
    return sorted(entries, key=lambda path: (path.is_symlink(), path))


def _is_result(path: Path) -> bool:
    return path.name.partition(".")[0] in RESULTS


def each_once(paths: Iterable[Path]) -> list[Path]:
    """Return paths without those that lead to the same file or folder as one before.

    The log tells of those that have another name there.
    """
    found: dict[object, Path] = {}
    for path in paths:
        taken = found.setdefault(path if is_remote(path) else _identity(path), path)
        if name_of(taken) != name_of(path):
            logger.warning("%s is %s by another name: taken once", path, taken)
    return list(found.values())


def _identity(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    if status.st_nlink > 1 and stat.S_ISREG(status.st_mode):
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return os.path.realpath(path)


def check_opens(path: Path) -> None:
    """Refuse what would be read for ever or wait to be written to, and folders that are closed.

    Raises:
        SourceError: it is a pipe, a socket or a device, or a folder that cannot be listed.
    """
    if os.path.isdir(path):
        try:
            os.scandir(path).close()
        except OSError as error:
            raise SourceError(f"{path}: cannot be looked into ({error.strerror})") from error
    elif os.path.exists(path) and not os.path.isfile(path):
        raise SourceError(f"{path}: a pipe, socket or device; expected a file or folder")


def is_remote(path: Path) -> bool:
    """Return whether a path lies behind a URL."""
    return not isinstance(path, Path)


def name_of(path: Path) -> str:
    """Return the last part of a path, without what a URL may carry behind it."""
    if not is_remote(path) or isinstance(path, DicomWeb):
        return path.name
    return urlsplit(str(path)).path.rstrip("/").rpartition("/")[2]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and logs of readers back: they quote values, which may be the patient's."""
    from pydicom.config import disable_value_validation

    # That of nibabel writes to stderr by itself.
    for name in ("pydicom", "nibabel.global"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def cache_dir() -> Path:
    """Return the folder of this program in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wsi_pipeline"
