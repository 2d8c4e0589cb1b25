"""What a dask worker holds from block to block: opened work, and what it keeps between runs.

client                        worker, one state for a client, one thread for a block
run_blocks(blocks, opener) -> run_block: state.work(name, opener) -> the first block opens it
<- result, or Failure: an error goes home as a value
the end, or an error       -> close_work: waits for blocks in hand, then closes the work
the client goes            -> HasState.teardown: closes all works and all that is kept
"""

from __future__ import annotations

import asyncio
import platform
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, TypeVar

from distributed import Worker, WorkerPlugin, get_worker

from wsi_pipeline.errors import ClusterError
from wsi_pipeline.geometry import Block
from wsi_pipeline.schedule.memory import trim_memory

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
        self._in_hand = 0
        self._changed = threading.Condition()

    def __call__(self, block: Block) -> Any:
        """Do one block, opening the work before the first; return its result."""
        with self._changed:
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
        if self._work is not None:
            self._work.close()


class WorkerState:
    """What a worker has before it: the work that it opened, and what it keeps from run to run."""

    def __init__(self, check: Callable[[], None]) -> None:
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


class HasState(WorkerPlugin):
    """Gives each worker a state, also one that joins later, and clears it at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        # ours, wherever the worker is
        self.versions = versions()

    def setup(self, worker: Worker) -> None:
        """Give a worker its state."""
        check = partial(check_same_versions, worker.address, versions(), self.versions)
        # not on self: workers of an in-process cluster share the plugin object
        setattr(worker, self.name, WorkerState(check))

    async def teardown(self, worker: Worker) -> None:
        """Close all that a worker holds."""
        await asyncio.to_thread(worker.__dict__.pop(self.name).clear)


@dataclass(frozen=True)
class Failure:
    """How a block failed, and on which worker."""

    error: Exception
    worker: str


def run_block(state: str, name: str, opener: Opener[Any], block: Block) -> Any:
    """Do a block on the worker that this is called on; return its result or how it failed."""
    # an error goes home as a value, since dask would print its traceback on the way
    worker = get_worker()
    try:
        return getattr(worker, state).work(name, opener)(block)
    except Exception as error:
        return Failure(error, worker.address)
    finally:
        if sum(block.index) % TRIM_EVERY == 0:
            trim_memory()


async def close_work(state: str, name: str, dask_worker: Worker) -> None:
    """Close the work of a run on a worker."""
    await asyncio.to_thread(getattr(dask_worker, state).close, name)


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
