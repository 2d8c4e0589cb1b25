"""Folders that one process claims at a time, and what is said where nothing can be written."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from wsi_pipeline.errors import BusyError, StoreError, WsiPipelineError
from wsi_pipeline.files.atomic import make_folders, sweep

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
GOES_ON = "the same command goes on where this one stopped"
ENOTSUPP = 524
"""The Linux kernel's own "not supported", which some network file systems let through."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, ENOTSUPP}
"""What a file system without locks answers, as NFS does without its lock daemon."""
_told_of_no_locks: set[int] = set()
"""File systems of which a warning said so: once is enough for ten thousand slides."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a failed write in the body into a sentence.

    Raises:
        StoreError: the disk is full, or nothing may be written there.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, WsiPipelineError):
            raise
        raise StoreError(why_not_written(path, error)) from error


def why_not_written(path: Path, error: OSError) -> str:
    """Return the sentence that tells why a path could not be written, and what to do."""
    if error.errno == errno.EDQUOT:
        return f"{path} could not be written: the disk quota is used up; make room: {GOES_ON}"
    if error.errno != errno.ENOSPC:
        return f"cannot write to {path}: {error.strerror or error}"
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    return (
        f"{path} could not be written: the disk is full, {free / 1e6:.1f} MB are free; "
        f"make room: {GOES_ON}"
    )


def make_folder(folder: Path) -> None:
    """Create a folder unless it is there, and make sure that files can be written in it.

    Raises:
        StoreError: they cannot.
    """
    with writing(folder):
        make_folders(folder)
        with TemporaryFile(dir=folder) as probe:
            # A full disk takes an empty file.
            probe.write(b"0")


def claim_folder(folder: Path, *, lock_file: str = LOCK_FILE, timeout: float = 0) -> ExitStack:
    """Claim a folder for this process; return what releases it when it is closed.

    The operating system holds the lock, and drops it when the process dies, however that happens.

    Args:
        folder: Created where it is not there.
        lock_file: Its name in the folder; it is never removed.

    Raises:
        BusyError: another process has claimed it.
        StoreError: the folder cannot be written.
    """
    # One thread begins a slide and another finishes it. A soft lock in place of the system's would
    # outlive a process that was killed.
    lock = FileLock(folder / lock_file, timeout=timeout, thread_local=False, fallback_to_soft=False)
    with writing(folder):
        make_folders((folder / lock_file).parent)
        try:
            lock.acquire()
        except Timeout:
            raise BusyError(f"another process is working in {folder}: left to it") from None
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
                raise
            if (device := folder.stat().st_dev) not in _told_of_no_locks:
                _told_of_no_locks.add(device)
                logger.warning("%s cannot be locked: start no second process on it", folder)
    claim = ExitStack()
    claim.callback(lock.release)
    return claim


@contextmanager
def claimed(target: Path, *, timeout: float = 0) -> Iterator[None]:
    """Claim a file or folder that the body writes; what killed processes left of it goes first.

    It must not lie in a folder that is claimed as a whole.

    Args:
        timeout: Seconds to wait for another process.

    Raises:
        BusyError: another process writes it.
        StoreError: the folder cannot be written.
    """
    lock = target.with_name(f".{target.name}.lock")
    try:
        claim = claim_folder(target.parent, lock_file=lock.name, timeout=timeout)
    except BusyError as error:
        raise BusyError(f"another process is writing {target}") from error
    with claim:
        try:
            sweep(target)
            yield
        finally:
            # Windows keeps what is open.
            with suppress(OSError):
                lock.unlink()
