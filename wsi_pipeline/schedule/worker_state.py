"""What a worker holds from block to block: opened work, and what it keeps between runs."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, TypeVar

from wsi_pipeline.errors import ClusterError
from wsi_pipeline.geometry import Block

TRIM_EVERY = 4
"""Blocks after which freed memory goes back: it costs page faults, without it peaks add up."""
SAME_VERSION = ("wsi-pipeline", "torch", "dask", "distributed")
"""Packages that are to be the same on client and workers."""
Result = TypeVar("Result", covariant=True)


class Work(Protocol[Result]):
    """What a worker does with a block, and how it lets go of what it holds."""

    def __call__(self, block: Block) -> Result:
        """Do one block; return what the caller wants to know."""

    def close(self) -> None:
        """Let go of files and memory."""


class Closable(Protocol):
    """What a worker may keep from run to run."""

    def close(self) -> None:
        """Let go of memory and threads."""


WorkerCache = dict[str, Closable]
Opener = Callable[[WorkerCache], Work[Result]]


class OpenedWork:
    """Work that the first block opens, and that is closed when no block is in hand."""

    def __init__(self, opener: Opener[Any], keep: WorkerCache) -> None:
        self._opener = opener
        self._keep = keep
        self._work: Work[Any] | None = None
        self._in_hand, self._is_over = 0, False
        self._changed = threading.Condition()

    def __call__(self, block: Block) -> Any:
        """Do one block, opening the work before the first; return its result."""
        with self._changed:
            if self._is_over:
                raise RuntimeError("it came with the end of its work")
            if self._work is None:
                self._work = self._opener(self._keep)
            self._in_hand += 1
        try:
            return self._work(block)
        finally:
            with self._changed:
                self._in_hand -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Close the work once no block is in hand."""
        with self._changed:
            self._changed.wait_for(lambda: self._in_hand == 0)
            self._is_over = True
        if self._work is not None:
            self._work.close()


class WorkerState:
    """What a worker has before it: the work that it opened, and what it keeps from run to run."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self.keep: WorkerCache = {}
        self._works: dict[str, OpenedWork | None] = {}
        self._changing = threading.Lock()

    def work(self, name: str, opener: Opener[Any]) -> OpenedWork:
        """Return the work of a run, which the first to ask for it brings."""
        # workers that join later have not been asked before
        self._check()
        with self._changing:
            # That of a run that is over stays, as None: no late block is to open it again.
            work = self._works.setdefault(name, OpenedWork(opener, self.keep))
        if work is None:
            # its caller has gone: nobody will read this
            raise RuntimeError(f"{name} is over")
        return work

    def close(self, name: str) -> None:
        """Close the work of a run; blocks of it that still come are refused."""
        with self._changing:
            work, self._works[name] = self._works.get(name), None
        if work is not None:
            work.close()

    def clear(self) -> None:
        """Close all works, and all that is kept."""
        for name in list(self._works):
            self.close(name)
        for thing in self.keep.values():
            thing.close()
        self.keep.clear()


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def versions() -> dict[str, str]:
    """Return the versions of what is to be the same on client and workers."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in SAME_VERSION:
        try:
            # +cpu and +cu130 are builds of one version
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "none"
    return found


def check_same_versions(worker: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Refuse, by a ClusterError, a worker whose programs differ."""
    different = [
        f"{name} {theirs[name]} (here {ours[name]})" for name in ours if theirs[name] != ours[name]
    ]
    if different:
        raise ClusterError(
            f"worker {worker} has {', '.join(different)}; install the same versions on client "
            "and workers"
        )
