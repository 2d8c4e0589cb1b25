"""What a path names: a file here or elsewhere, or a folder that is one slide."""

from __future__ import annotations

import glob
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wsi_pipeline.errors import SourceError

LABEL = "image-label"
"""Marks an OME-Zarr that is a mask, not a slide; of whatever origin."""
MASK = "wsi_pipeline"
"""Attribute of a run's mask, whose labels lie deeper: `classes` are their names by value."""


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


def named_paths(text: str) -> list[Path]:
    """Return what one input of a command line names: a path, those of a list file, or a pattern's.

    `.txt` and `.csv` files name one path or URL a line, paths relative to the file's folder.

    Raises:
        SourceError: it does not exist.
    """
    path = as_path(text)
    if is_remote(path):
        return [path]
    if path.suffix.lower() in (".txt", ".csv") and path.is_file():
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        return [as_path(line if "://" in line else path.parent / line) for line in lines if line]
    found = [path] if path.exists() else list(map(Path, sorted(glob.glob(text, recursive=True))))
    if not found:
        raise SourceError(f"{text}: no such file, folder or pattern")
    return found


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


def without_secrets(text: str) -> str:
    """Return a text whose URLs have lost user, password and all that comes behind a "?" or "#".

    Example:
        >>> without_secrets("https://me:key@host/a.svs?sig=1: no such file")
        'https://host/a.svs: no such file'
    """
    text = re.sub(r"(\w://)[^\s/@]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?#'\"]*)[?#][^\s'\"]*?(?=:?(?:[\s'\"]|$))", r"\1", text)


def is_ome_zarr(path: Path) -> bool:
    """Return whether a folder holds an OME-Zarr image, or several; masks do not count."""
    attributes = zarr_attributes(path)
    ome = attributes.get("ome", attributes)
    if not isinstance(ome, dict) or LABEL in ome or MASK in attributes:
        return False
    return "multiscales" in ome or "bioformats2raw.layout" in ome


def zarr_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of the zarr group in a folder, nothing where there is none."""
    for name in (".zattrs", "zarr.json"):
        try:
            found = json.loads((path / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        found = (
            found.get("attributes") if name == "zarr.json" and isinstance(found, dict) else found
        )
        return found if isinstance(found, dict) else {}
    return {}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's warnings back: they quote values, which may be the patient's."""
    from pydicom.config import disable_value_validation

    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def dicom_slides(paths: Iterable[Path]) -> list[Path]:
    """Choose from DICOM files; return one for each whole-slide image, that of the largest level.

    OpenSlide finds the other levels beside it. Labels, overviews, segmentations and whatever else
    is not a slide are left out; what cannot be read at all is kept, for its reader to say why.
    """
    paths = list(paths)
    if not paths:
        return []  # without an import that takes its time
    from pydicom import dcmread
    from pydicom.uid import VLWholeSlideMicroscopyImageStorage

    damaged: list[Path] = []
    largest: dict[str, tuple[int, Path]] = {}
    for path in paths:
        try:
            with quiet():
                header = dcmread(
                    path,
                    stop_before_pixels=True,
                    specific_tags=[
                        "SOPClassUID", "SeriesInstanceUID", "ImageType",
                        "TotalPixelMatrixColumns", "TotalPixelMatrixRows",
                    ],
                )  # fmt: skip
                if header.SOPClassUID != VLWholeSlideMicroscopyImageStorage:
                    continue
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
