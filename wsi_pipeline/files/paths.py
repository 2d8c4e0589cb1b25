"""What a path names: a file here or elsewhere, or a folder that is one slide."""

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
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wsi_pipeline.errors import SourceError
from wsi_pipeline.errors import without_secrets as without_secrets
from wsi_pipeline.files.records import read_json

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)

LABEL = "image-label"
"""Marks an OME-Zarr that is a mask, not a slide; of whatever origin."""
MASK = "wsi_pipeline"
"""Attribute of a run's mask, whose labels lie deeper: `classes` are their names by value."""
LISTED = ("path", "file", "filename", "file_name", "slide_path", "slide", "image", "name")
"""Headers of the column of paths in a CSV list; the first that occurs counts."""
WORK = ".store"
"""In the folder of a run: what it keeps besides its outputs."""
RESULTS = ("mask", "annotations", "overlay", "run")
"""How the names of what is written there begin, up to their first dot."""
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16 does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by what a text in them begins with."""

Inputs = str | Path | Iterable[str | Path]
"""One input or several, as on the command line."""


def as_path(text: str | Path, **options: Any) -> Path:
    """Return the path that a text names; a URL gives one of fsspec's, with the same methods.

    Args:
        text: a path, or a URL; one of a file here, `file://`, gives its path.
        options: for fsspec's client of the URL.

    Raises:
        SourceError: a URL that cannot be used here.
    """
    if not isinstance(text, str) or "://" not in text:
        return Path(text) if isinstance(text, str) else text
    try:
        from upath import UPath

        path = UPath(text, **options)
        _ = path.fs  # the client of this protocol
    except (ImportError, ValueError) as error:
        raise SourceError(
            f'{without_secrets(f"{text}: {error}")}; URLs need pip install "wsi-pipeline[remote]"'
        ) from error
    if path.protocol in ("file", "local"):
        return Path(path.path)
    remote: Any = path  # a path in all but its type
    return remote  # type: ignore[no-any-return]


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
        return [
            as_path(entry) if "://" in entry else _first_there(path.parent, entry)
            for entry in _entries(path)
        ]
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
    return [re.sub(r'^"(.*)"$', r"\1", line) for line in lines]


def _first_there(folder: Path, entry: str) -> Path:
    """Return the path that a line of a list means: as it stands, in Latin letters, or Windows's."""
    letters = in_letters(entry)
    names = entry, letters, letters.replace("\\", "/")
    paths = [folder / name for name in names]
    return next(filter(os.path.exists, paths), paths[1])


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
    may be that of a DICOM series, too.

    Args:
        folder: to be listed.
        seen: real paths of folders that have been listed, which hold nothing more; it is added.
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


def is_zarr_url(path: Path) -> bool:
    """Return whether a URL names a zarr, by its ending: it may be no folder that can be listed."""
    return urlsplit(str(path)).path.rstrip("/").endswith(".zarr")


def name_of(path: Path) -> str:
    """Return the last part of a path, without what a URL may carry behind it."""
    if not is_remote(path):
        return path.name
    return urlsplit(str(path)).path.rstrip("/").rpartition("/")[2]


def is_ome_zarr(path: Path) -> bool:
    """Return whether a folder holds an OME-Zarr image, several, or one whose metadata are damaged.

    Masks do not count.
    """
    attributes = zarr_attributes(path)
    if attributes is None:
        return True
    ome = attributes.get("ome", attributes)
    if not isinstance(ome, dict) or LABEL in ome or MASK in attributes:
        return False
    return "multiscales" in ome or "bioformats2raw.layout" in ome


def is_damaged_zarr(path: Path) -> bool:
    """Return whether a folder holds metadata of zarr that cannot be read."""
    return zarr_attributes(path) is None


def zarr_attributes(path: Path) -> dict[str, Any] | None:
    """Return the attributes of the zarr group in a folder, {} without one, None if damaged."""
    for name in (".zattrs", "zarr.json"):
        try:
            found = read_json(path / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError):
            return None
        found = (
            found.get("attributes") if name == "zarr.json" and isinstance(found, dict) else found
        )
        return found if isinstance(found, dict) else {}
    return {}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's warnings and log back: they quote values, which may be the patient's."""
    from pydicom.config import disable_value_validation, logger

    logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def is_dicom(path: Path) -> bool:
    """Return whether a path is of a DICOM file, whatever its suffix; some have none."""
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_dicom_slide(path: Path) -> bool:
    """Return whether a DICOM file is of a slide: a level, or a label, overview or thumbnail of it.

    So is what cannot be read, for its reader to say why.
    """
    try:
        return slide_header(path) is not None
    except Exception:  # pydicom raises anything on damaged files
        return True


def slide_header(path: Path) -> Dataset | None:
    """Return what a DICOM file says of the slide that it belongs to, None where it is none.

    Raises:
        Exception: whatever pydicom raises on damaged files.
    """
    from pydicom import dcmread  # takes its time
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage

    with quiet():
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            # pydicom would unpack all of it, whatever it comes to, and no slide's reader can
            if meta.get("MediaStorageSOPClassUID") != VLWholeSlideMicroscopyImageStorage:
                return None
            raise ValueError("a deflated slide")
        header = dcmread(
            path,
            stop_before_pixels=True,
            specific_tags=[
                "SOPClassUID", "SeriesInstanceUID", "ImageType",
                "TotalPixelMatrixColumns", "TotalPixelMatrixRows",
                "SharedFunctionalGroupsSequence", "ImagedVolumeWidth", "ImagedVolumeHeight",
            ],
        )  # fmt: skip
        return header if header.SOPClassUID == VLWholeSlideMicroscopyImageStorage else None


def dicom_slides(paths: Iterable[Path]) -> list[Path]:
    """Choose from DICOM files; return one for each whole-slide image, that of the largest level.

    OpenSlide finds the other levels beside it. Labels, overviews, segmentations and whatever else
    is not a slide are left out; what cannot be read at all is kept, for its reader to say why.
    """
    damaged: list[Path] = []
    largest: dict[str, tuple[int, Path]] = {}
    for path in paths:
        try:
            header = slide_header(path)
            if header is None:
                continue
            with quiet():
                if "VOLUME" not in header.ImageType:
                    continue
                area = int(header.TotalPixelMatrixColumns) * int(header.TotalPixelMatrixRows)
                series = str(header.SeriesInstanceUID)
        except Exception:  # pydicom raises anything on damaged files
            damaged.append(path)
            continue
        if series not in largest or area > largest[series][0]:
            largest[series] = (area, path)
    return sorted([*damaged, *(path for _, path in largest.values())])


def cache_dir() -> Path:
    """Return the folder of this program in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wsi_pipeline"
