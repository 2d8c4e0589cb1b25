"""Results behind a URL: a folder is uploaded when it is whole, and small files are looked at."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from wsi_pipeline.errors import StoreError, WsiPipelineError
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import writing
from wsi_pipeline.files.paths import cache_dir, is_remote, name_of, without_secrets

ZARR_METADATA = frozenset([".zattrs", ".zgroup", ".zarray", ".zmetadata", "zarr.json"])
AT_ONCE = 32
"""Small files that are asked for at a time."""


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Turn whatever the client of a URL raises in the body into a sentence without secrets.

    Of a path here nothing changes.

    Raises:
        StoreError: it cannot be reached, read or written.
    """
    try:
        yield
    except WsiPipelineError:
        raise
    except Exception as error:
        # Clients of remote stores raise what they like.
        if not is_remote(path):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(
            without_secrets(
                f"{path} cannot be used: {reason}; expected a bucket or folder that may be "
                "listed, read and written, and credentials where its own tools look for them"
            )
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, here or behind a URL, that appears when it is complete.

    Raises:
        StoreError: it cannot be written.
    """
    remote: Any = path
    if is_remote(path):
        with reaching(path):
            remote.fs.pipe_file(remote.path, data)
        return
    with writing(path), written_beside(path) as beside:
        beside.write_bytes(data)


def check_listed(path: Path) -> None:
    """Make sure that a file, just written behind a URL, is found in its folder; return nothing.

    Raises:
        StoreError: the folder cannot be listed, as behind `https://`.
    """
    remote: Any = path
    with reaching(path.parent):
        listed = remote.fs.ls(remote.parent.path, detail=False)
        if path.name not in {name.rpartition("/")[2] for name in listed}:
            raise FileNotFoundError(f"{path.name} was written and is not listed")


def work_folder(target: Path) -> Path:
    """Return where the runs of a URL are worked on: always the same, so that work goes on.

    In the user's cache, which outlives a restart of the machine, as temporary folders may not.
    """
    # Neither a new password nor a new signature makes it another place.
    digest = hashlib.sha256(without_secrets(str(target)).encode()).hexdigest()[:12]
    return cache_dir() / "runs" / f"{name_of(target)}-{digest}"


def choose_work(output: Path, work: Path | None) -> Path:
    """Return the folder in which slides are worked on: `output` itself unless that is a URL.

    Args:
        work: What was asked for; None = in the user's cache.

    Raises:
        StoreError: it was, and the output is no URL.
    """
    if is_remote(output):
        return work or work_folder(output)
    if work:
        raise StoreError("--work is for a URL as output; a folder is worked in itself")
    return output


def upload(folder: Path, target: Path, *, last: str, replaced: Collection[str]) -> None:
    """Upload a folder so that nobody takes half of it for a whole; hidden entries stay here.

    First the chunks of its zarrs, then their metadata, then all other files, then `last`.

    Args:
        last: Name of the file that tells that the others are there.
        replaced: Names of files and folders that are removed from there before, with `last`.

    Raises:
        StoreError: that fails.
    """
    files = [
        path.relative_to(folder)
        for entry in folder.iterdir()
        if not entry.name.startswith(".")
        for path in (entry.rglob("*") if entry.is_dir() else [entry])
        if path.is_file()
    ]

    def stage(file: Path) -> int:
        if len(file.parts) > 1:
            return 1 if file.name in ZARR_METADATA else 0
        return 3 if file.name == last else 2

    remote: Any = target
    with reaching(target):
        for name in (last, *replaced):
            old = f"{remote.path}/{name}"
            if remote.fs.exists(old):
                # A slide's name may hold what would be taken for a pattern.
                remote.fs.rm(glob.escape(old), recursive=True)
        for _, group in groupby(sorted(files, key=stage), key=stage):
            names = list(group)
            remote.fs.put(
                [str(folder / name) for name in names],
                [f"{remote.path}/{name.as_posix()}" for name in names],
            )


def fetch(
    target: Path,
    copies: Path,
    *,
    first: str,
    whole: Collection[str] = (),
    named: Collection[str] = (),
) -> bool:
    """Make a folder hold copies of what the folders at a URL hold; return whether it changed.

    What is there already is not fetched again while `first` is the same.

    Args:
        copies: Folder here, created; what it holds besides goes.
        first: Name of the file without which a folder does not count.
        whole: Names of files that are copied as well, where they are.
        named: Names of files of which there will be an empty one, where they are.

    Raises:
        StoreError: the URL cannot be read.
    """
    remote: Any = target
    with reaching(target):
        try:
            entries = remote.fs.ls(remote.path, detail=True)
        except FileNotFoundError:
            entries = []
        names = [
            Path(entry["name"].rstrip("/")).name for entry in entries if entry["type"] != "file"
        ]
        # Hidden ones are left out, and with them any "..".
        names = [name for name in names if not name.startswith(".")]
        with writing(copies):
            copies.mkdir(parents=True, exist_ok=True)
            gone = [path for path in copies.iterdir() if path.is_dir() and path.name not in names]
            for path in gone:
                shutil.rmtree(path)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            changed = pool.map(
                lambda name: _fetch_folder(
                    remote.fs, f"{remote.path}/{name}", copies / name, first, whole, named
                ),
                names,
            )
            return any([*changed, *gone])


def _fetch_folder(
    fs: Any, there: str, copy: Path, first: str, whole: Collection[str], named: Collection[str]
) -> bool:
    """Copy what is wanted of one folder, unless that is here already; return whether it was not."""
    try:
        data = fs.cat_file(f"{there}/{first}")
        if (copy / first).is_file() and (copy / first).read_bytes() == data:
            return False
        modified = fs.modified(f"{there}/{first}").timestamp()
        found = {path.rpartition("/")[2] for path in fs.ls(there, detail=False)}
        others = {name: fs.cat_file(f"{there}/{name}") for name in found.intersection(whole)}
    except FileNotFoundError:
        # Not finished, or uploaded anew at this moment.
        was_here = copy.is_dir()
        shutil.rmtree(copy, ignore_errors=True)
        return was_here
    with writing(copy):
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name in found.intersection(named):
            (copy / name).write_bytes(others.get(name, b""))
        for name, content in others.items():
            (copy / name).write_bytes(content)
        (copy / first).write_bytes(data)
        os.utime(copy / first, (modified, modified))
    return True
