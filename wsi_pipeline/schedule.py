"""Run blocks on dask workers: an in-process cluster by default, or a scheduler that runs already.

Nothing here knows what a block does. A run hands over an *opener*, a picklable callable that each
worker calls once and that returns the work: a callable of one block. It is given what the worker
*keeps* from run to run, such as a loaded model: a dict of things that can be closed.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, Protocol, TypeVar

import dask
import psutil
from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker
from distributed.comm.core import CommClosedError
from distributed.system import MEMORY_LIMIT

from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.grid import Block
from wsi_pipeline.options import ScheduleOptions

NEAR = 0.85
"""From this share of the memory limit on, less is in hand at a time."""

TRIM_EVERY = 4
"""Blocks after which freed memory goes back: it costs page faults, without it peaks add up."""

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


Keep = dict[str, Closable]
Opener = Callable[[Keep], Work[Result]]


class _KeepThings(WorkerPlugin):
    """Lets each worker keep things from run to run, and closes them at the end."""

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, worker: Worker) -> None:
        setattr(worker, self.name, {})

    def teardown(self, worker: Worker) -> None:
        for thing in worker.__dict__.pop(self.name).values():
            thing.close()


class _Opened:
    """Opened work that is closed when no block is in hand: it may be reading from the slide."""

    def __init__(self, work: Work[Any]) -> None:
        self._work = work
        self._in_hand = 0
        self._changed = threading.Condition()

    def __call__(self, block: Block) -> Any:
        with self._changed:
            self._in_hand += 1
        try:
            return self._work(block)
        finally:
            with self._changed:
                self._in_hand -= 1
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._in_hand == 0)
        self._work.close()


class _OpenWork(WorkerPlugin):
    """Opens the work on each worker, also on one that joins later, and closes it at the end."""

    def __init__(self, name: str, opener: Opener[Any], keep: str) -> None:
        self.name = name
        self._opener = opener
        self._keep = keep

    def setup(self, worker: Worker) -> None:
        # not on self: workers of an in-process cluster share the plugin object
        opened: Any
        try:
            opened = _Opened(self._opener(getattr(worker, self._keep)))
        except Exception as error:  # goes home with the first block, see _run_block
            opened = error
        setattr(worker, self.name, opened)

    async def teardown(self, worker: Worker) -> None:
        work = worker.__dict__.pop(self.name, None)
        if isinstance(work, _Opened):
            await asyncio.to_thread(work.close)


def _run_block(name: str, block: Block) -> Any:
    # an error goes home as a value, since dask would print its traceback on the way
    work = getattr(get_worker(), name)
    if isinstance(work, Exception):
        return work
    try:
        return work(block)
    except Exception as error:
        return error
    finally:
        if sum(block.index) % TRIM_EVERY == 0:
            _trim_memory()


def _room(in_flight: int, most: int, max_ram: int | None) -> int:
    """Return how many more blocks may be in flight."""
    if max_ram is None or used_memory() < NEAR * max_ram:
        return most - in_flight
    _trim_memory()
    if (used := used_memory()) < NEAR * max_ram:
        return most - in_flight
    if in_flight:
        return 0
    if used < max_ram:
        return 1
    raise WsiPipelineError(
        f"{used / 1e9:.2g} GB of memory are taken with no block in hand, --max-ram allows "
        f"{max_ram / 1e9:.2g} GB; raise it"
    )


def _trim_memory() -> None:
    """Give freed memory back: glibc keeps what each thread freed, so that peaks would add up."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def read_size(text: str) -> int:
    """Return the bytes that a size with a unit means.

    Example:
        >>> read_size("8GB"), read_size("500 MiB")
        (8000000000, 524288000)

    Raises:
        ValueError: it has no unit, or is none.
    """
    if text.strip().isdigit():
        raise ValueError(f"{text!r} has no unit; expected a size such as 8GB")
    return int(dask.utils.parse_bytes(text))


def used_memory() -> int:
    """Return the bytes that this process has in memory."""
    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Return the bytes that this process can have besides, in its container if it is in one."""
    return min(int(psutil.virtual_memory().available), MEMORY_LIMIT - used_memory())


@contextmanager
def open_cluster(options: ScheduleOptions) -> Iterator[Client]:
    """Yield a dask client of the cluster that the options ask for.

    Raises:
        WsiPipelineError: the scheduler does not answer.
    """
    logging.getLogger("distributed").setLevel(logging.ERROR)
    if options.scheduler is not None:
        with _connect(options.scheduler) as client, _keeping(client):
            yield client
        return
    with (
        dask.config.set({"distributed.admin.tick.limit": "1h"}),  # torch may hold the GIL
        LocalCluster(
            n_workers=options.workers,
            threads_per_worker=options.blocks_in_hand,
            processes=False,
            dashboard_address="127.0.0.1:0",  # or dask listens on all addresses, at a fixed port
            worker_dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            memory_limit=0,
        ) as cluster,
        Client(cluster) as client,
        _keeping(client),
    ):
        yield client


@contextmanager
def _keeping(client: Client) -> Iterator[None]:
    name = _keep_name(client)
    client.register_plugin(_KeepThings(name), name=name)
    try:
        yield
    finally:
        with suppress(CommClosedError, TimeoutError, OSError):  # the scheduler may be gone
            client.unregister_worker_plugin(name)


def _keep_name(client: Client) -> str:
    return f"keep_{client.id}"


def _connect(address: str) -> Client:
    by_file = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
    try:
        return Client(**by_file, timeout="10s")
    except (OSError, ValueError) as error:
        raise WsiPipelineError(
            f"no dask scheduler answers at {address}: {error}; is it running?"
        ) from error


def run_blocks(
    client: Client,
    blocks: Iterable[Block],
    opener: Opener[Result],
    *,
    max_ram: int | None = None,
) -> Iterator[Result]:
    """Do every block on some worker; yield the results as they come.

    A few blocks per thread are in flight at once, so the number of blocks costs no memory. A block
    whose worker dies is done again elsewhere.

    Args:
        client: as `open_cluster` yields it.
        blocks: what to do, in the order to start them.
        opener: see the module.
        max_ram: bytes; near this, fewer blocks are in hand of an in-process cluster. None = no
            limit.

    Raises:
        WsiPipelineError: above `max_ram` with nothing left to put off.
        Exception: what the work raised for a block; once the blocks in hand have ended.
    """
    name = f"work_{uuid.uuid4().hex}"
    client.register_plugin(_OpenWork(name, opener, _keep_name(client)), name=name)
    waiting = iter(blocks)
    in_hand = max(sum(client.nthreads().values()), 1)
    in_flight = in_hand if max_ram else 2 * in_hand  # blocks that wait cannot be put off

    def submit(count: int) -> list[Any]:
        batch = list(islice(waiting, count))
        return client.map(_run_block, [name] * len(batch), batch, pure=False) if batch else []

    futures = as_completed(submit(in_flight))
    try:
        for future in futures:
            result = future.result()
            if isinstance(result, Exception):
                raise result
            futures.update(submit(_room(futures.count(), in_flight, max_ram)))
            yield result
    finally:
        client.cancel(list(futures.futures))
        client.unregister_worker_plugin(name)
        _trim_memory()  # what comes next needs none of what an in-process worker held
