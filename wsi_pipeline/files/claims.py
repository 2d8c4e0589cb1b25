"""Folders behind a URL, each claimed by one machine at a time.

runs/.claims/slide/000001    written only where there is none, and anew while its writer lives
                   000002    of who took over, once that had been silent for long
runs/slide/                  written by who holds the highest
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wsi_pipeline.errors import BusyError, WsiPipelineError
from wsi_pipeline.files.locks import make_folder
from wsi_pipeline.files.remote import reaching, write_whole

logger = logging.getLogger(__name__)

BEAT, SILENCE = 60.0, 1200.0
"""Seconds from sign of life to sign of life, and after how many without one a claim is void.

Clocks that differ by 15 minutes are refused by S3 itself.
"""
TOKEN_FILE = ".claim"
"""In the folder here: what a process writes as its claim, and knows that of a killed one by."""
ALONE = "the store has no conditional writes: give each machine its own slides with --shard I/N"
UNKNOWN = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What stores answer to a condition that they do not know."""
_has_conditions: dict[str, bool] = {}
"""Of a folder of runs: whether its store has them."""


@contextmanager
def claimed_url(target: Path, folder: Path) -> Iterator[None]:
    """Claim a folder behind a URL for the folder here in which it is worked on.

    Raises:
        BusyError: another machine has claimed it.
        StoreError: the URL cannot be read or written.
    """
    make_folder(folder)
    if not (folder / TOKEN_FILE).is_file():
        write_whole(folder / TOKEN_FILE, f"{uuid.uuid4().hex} {socket.gethostname()}".encode())
    mine = (folder / TOKEN_FILE).read_bytes()
    with reaching(target):
        path = _take(target, mine)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            # what a failed beat leads to is found before anything is uploaded
            with suppress(WsiPipelineError), reaching(target):
                if _holder(target)[1] == mine:
                    write_whole(path, mine)

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(WsiPipelineError), reaching(target):
            for number in _numbers(target):
                if number <= int(path.name):
                    path.fs.rm_file(str(path.parent / f"{number:06}"))


def check_claim(target: Path, folder: Path) -> None:
    """Make sure that a folder behind a URL is still claimed for the folder here; return nothing.

    Raises:
        BusyError: it is not: another machine had seen no sign of life for long.
        StoreError: the URL cannot be read.
    """
    with reaching(target):
        if _holder(target)[1] != (folder / TOKEN_FILE).read_bytes():
            raise BusyError(
                f"another machine has taken {target} over, as this one gave no sign of life for "
                f"{SILENCE / 60:.0f} minutes: left to it"
            )


def _take(target: Path, mine: bytes) -> Any:
    """Return the file that is the claim, once it is there."""
    while True:
        number, held, age = _holder(target)
        path: Any = _folder(target) / f"{number:06}"
        if held == mine:
            return path
        if held:
            host = held.decode(errors="replace").partition(" ")[2]
            if age < SILENCE:
                reason = "" if _has_conditions.get(str(target.parent), True) else f"; {ALONE}"
                raise BusyError(f"{host} is working on it: left to it{reason}")
            logger.warning("%s: taken over from %s, silent for %.0f s", target, host, age)
            path = _folder(target) / f"{number + 1:06}"
        try:
            _create(path, mine)
        except FileExistsError:
            # another was faster, or the client has asked twice
            continue
        if (store := str(target.parent)) not in _has_conditions:
            with suppress(FileExistsError):
                _create(path, mine)
                _has_conditions[store] = False
                logger.warning("%s: %s", store, ALONE)
            _has_conditions.setdefault(store, True)
        return path


def _create(path: Any, data: bytes) -> None:
    """Write a file behind a URL where there is none, if the store knows how to."""
    try:
        path.fs.pipe_file(path.path, data, mode="create")
    except (OSError, TypeError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in UNKNOWN:
            raise
        path.fs.pipe_file(path.path, data)


def _folder(target: Path) -> Path:
    return target.parent / ".claims" / target.name


def _holder(target: Path) -> tuple[int, bytes, float]:
    """Return the number of the claim that holds, what it says, and its age in seconds."""
    for number in reversed(_numbers(target)):
        path: Any = _folder(target) / f"{number:06}"
        with suppress(FileNotFoundError):
            return (
                number,
                path.fs.cat_file(path.path),
                time.time() - path.fs.modified(path.path).timestamp(),
            )
    return 1, b"", 0.0


def _numbers(target: Path) -> list[int]:
    """Return the numbers of the claims that lie there, ascending."""
    folder: Any = _folder(target)
    try:
        names = [name.rpartition("/")[2] for name in folder.fs.ls(folder.path, detail=False)]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdecimal())
