"""Files and folders that appear whole, outlast a power cut, and leave nothing behind if killed."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SYNCED_AT_ONCE = 16
"""Files that the disk is given at a time, so that it may write many at one go."""


def this_process() -> str:
    """Return what marks the files of this process, also on a disk that machines share."""
    # Dots part the marks of a name.
    return f"{socket.gethostname().replace('.', '-')}-{os.getpid()}"


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` that takes its place once the body has ended well.

    By then all of it is on the disk. A folder that is there goes after the new one has come.
    """
    partial = beside(target, "partial")
    try:
        yield partial
        sync_tree(partial)
        if target.is_dir():
            # There is no moment without the whole of one of them: `sweep` puts the old one back.
            old = beside(target, "old")
            os.rename(target, old)
            os.rename(partial, target)
            os.rename(old, partial)
        else:
            os.replace(partial, target)
        sync(target.parent)
    finally:
        remove(partial)


def beside(target: Path, kind: str) -> Path:
    """Return the hidden name by which this process knows something that belongs to `target`."""
    return target.with_name(f".{target.name}.{this_process()}.{kind}")


def sweep(target: Path) -> None:
    """Remove what killed processes left of writing `target`; put back what they had moved aside.

    To be called by who has claimed the target.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        name, _, kind = path.name.rpartition(".")
        if name.rpartition(".")[0] != f".{target.name}":
            continue
        if kind == "old" and not target.exists():
            os.rename(path, target)
        elif kind in ("old", "partial"):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folders(folder: Path) -> None:
    """Create a folder and those above it unless they are there, and have the disk hold them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file, or which entries a folder has; return once it does."""
    is_folder = path.is_dir()
    # Windows syncs folders by itself, and files only that it may write.
    if os.name == "nt" and is_folder:
        return
    try:
        opened = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        # Some network file systems do not sync folders, and none that may not be listed.
        if not is_folder or error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


def sync_all(paths: Iterable[Path]) -> None:
    """Have the disk hold files or folders, several at a time; return once it does."""
    with ThreadPoolExecutor(SYNCED_AT_ONCE, "sync") as pool:
        for _ in pool.map(sync, paths):
            pass


def sync_tree(path: Path) -> None:
    """Have the disk hold a file, or a folder with all that it holds; return once it does."""
    if not path.is_dir():
        sync(path)
        return
    every = [path, *path.rglob("*")]
    sync_all(p for p in every if not p.is_dir())
    sync_all(p for p in every if p.is_dir())


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
