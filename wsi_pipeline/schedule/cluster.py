"""Run blocks on dask workers: in this process by default, or wherever a dask cluster runs.

Nothing here knows what a block does. A run hands over an *opener*, a picklable callable that each
worker calls once and that returns the work: a callable of one block. It is given what the worker
*keeps* from run to run, such as a loaded model: a dict of things that can be closed.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import platform
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol, TypeVar

import dask
import psutil
from dask.system import CPU_COUNT
from distributed import (
    Client,
    KilledWorker,
    LocalCluster,
    Nanny,
    Scheduler,
    SpecCluster,
    Worker,
    WorkerPlugin,
    as_completed,
    get_worker,
)
from distributed.system import MEMORY_LIMIT
from distributed.versions import VersionMismatchWarning

from wsi_pipeline.errors import ClusterError, WsiPipelineError
from wsi_pipeline.geometry import Block
from wsi_pipeline.options import ScheduleOptions

logger = logging.getLogger(__name__)

M_MMAP_THRESHOLD = -3
"""The number of this option in glibc."""
NEAR = 0.85
"""From this share of the memory limit on, less is in hand at a time."""

IN_PROCESS = {
    "distributed.admin.tick.limit": "1h",  # torch may hold the GIL for long
    "distributed.worker.profile.enabled": False,  # it takes the GIL a hundred times a second
}
"""Dask's configuration where its threads share a process with ours."""
TRIM_EVERY = 4
"""Blocks after which freed memory goes back: it costs page faults, without it peaks add up."""

RETRIES = 2
"""How often a block that failed on a worker elsewhere is tried on another."""

LEAST_IN_FLIGHT = 16
"""Blocks of a slide that a cluster elsewhere has, so that requests are worth their time."""

LOOK_EVERY = 5.0
"""Seconds after which the workers of a cluster are counted again."""

SAME_VERSION = ("wsi-pipeline", "torch", "dask", "distributed")
"""Packages that are to be the same on client and workers."""

UNREACHABLE = (OSError, CancelledError, RuntimeError)
"""What dask raises when the scheduler is gone."""

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


class _Opened:
    """Work that the first block opens, and that is closed when no block is in hand."""

    def __init__(self, opener: Opener[Any], keep: Keep) -> None:
        self._opener = opener
        self._keep = keep
        self._work: Work[Any] | None = None
        self._in_hand = 0
        self._changed = threading.Condition()

    def __call__(self, block: Block) -> Any:
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
        with self._changed:
            self._changed.wait_for(lambda: self._in_hand == 0)
        if self._work is not None:
            self._work.close()


class _Desk:
    """What a worker has before it: the work that it opened, and what it keeps from run to run."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self.keep: Keep = {}
        self._works: dict[str, _Opened | None] = {}
        self._changing = threading.Lock()

    def work(self, name: str, opener: Opener[Any]) -> _Opened:
        self._check()  # those that join later are not asked before
        with self._changing:
            work = self._works.setdefault(name, _Opened(opener, self.keep))
        if work is None:
            raise RuntimeError(f"{name} is over")  # its caller has gone: nobody will read this
        return work

    def close(self, name: str) -> None:
        with self._changing:
            work, self._works[name] = self._works.get(name), None
        if work is not None:
            work.close()

    def clear(self) -> None:
        for name in list(self._works):
            self.close(name)
        for thing in self.keep.values():
            thing.close()
        self.keep.clear()


class _HasDesk(WorkerPlugin):
    """Gives each worker a desk, also one that joins later, and clears it at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._versions = _versions()  # ours, wherever the worker is

    def setup(self, worker: Worker) -> None:
        # not on self: workers of an in-process cluster share the plugin object
        setattr(
            worker,
            self.name,
            _Desk(partial(_check_same, worker.address, _versions(), self._versions)),
        )

    async def teardown(self, worker: Worker) -> None:
        await asyncio.to_thread(worker.__dict__.pop(self.name).clear)


@dataclass(frozen=True)
class _Failure:
    """How a block failed, and on which worker."""

    error: Exception
    worker: str


def _run_block(desk: str, name: str, opener: Opener[Any], block: Block) -> Any:
    # an error goes home as a value, since dask would print its traceback on the way
    worker = get_worker()
    try:
        return getattr(worker, desk).work(name, opener)(block)
    except Exception as error:
        return _Failure(error, worker.address)
    finally:
        if sum(block.index) % TRIM_EVERY == 0:
            _trim_memory()


async def _close_work(desk: str, name: str, dask_worker: Worker) -> None:
    await asyncio.to_thread(getattr(dask_worker, desk).close, name)


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
        f"{used / 1e9:.2f} GB of memory are taken, --max-ram allows {max_ram / 1e9:.2f} GB, and "
        "no block is in hand; raise it"
    )


def _trim_memory() -> None:
    """Give freed memory back: glibc keeps what each thread freed, so that peaks would add up."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def map_large_arrays() -> None:
    """Let arrays above 4 MiB go back when they are freed; those of volumes are such.

    glibc comes to keep what is below 32 MiB, each thread its own, in pieces that fit no other.
    """
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        set_option(M_MMAP_THRESHOLD, 4 << 20)


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
    """Return the bytes that this process can have besides, in its container or job if in one."""
    limit = min(MEMORY_LIMIT, memory_limit_of_job())
    return min(int(psutil.virtual_memory().available), limit - used_memory())


def memory_limit_of_job(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the bytes that the control groups of this process allow, a SLURM job's among them.

    dask asks the topmost group only, whose limit is the container's.

    Args:
        own: file that names the groups of this process.
        root: where groups are folders.
    """
    limits = [sys.maxsize]
    with suppress(OSError):  # no Linux
        for line in own.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if "memory" in controllers.split(","):
                top, file = root / "memory", "memory.limit_in_bytes"
            elif not controllers:  # version 2, which has one tree for all
                top, file = root, "memory.max"
            else:
                continue
            group = top / name.lstrip("/")
            for folder in (group, *group.parents):
                # a group without a limit says "max", and one out of sight has no folder
                with suppress(OSError, ValueError):
                    limits.append(int((folder / file).read_text()))
                if folder == top:
                    break
    return min(limits)


def cpu_count() -> int:
    """Return how many CPUs this process may use: its container or its job may not have all."""
    return int(CPU_COUNT)


def gpu_share(client: Client) -> dict[str, float]:
    """Return what a block takes of the workers that announce GPUs; nothing where none does."""
    shares = [share for share in _ask_workers(client, _gpu_share).values() if share]
    return {"GPU": min(shares)} if shares else {}


def _gpu_share(dask_worker: Worker) -> float:
    return float(dask_worker.state.total_resources.get("GPU", 0) / dask_worker.state.nthreads)


def worker_threads() -> int:
    """Return how many threads dask gives the worker on which this is called."""
    return int(get_worker().state.nthreads)


def is_in_process(client: Client) -> bool:
    """Return whether the workers are threads of this process."""
    return _address(client).startswith("inproc://")


def _address(client: Client) -> str:
    assert client.scheduler is not None  # never None of a client that is not asynchronous
    return str(client.scheduler.address)


@contextmanager
def open_cluster(options: ScheduleOptions) -> Iterator[Client]:
    """Yield a dask client of the cluster that the options ask for.

    Raises:
        ClusterError: the scheduler does not answer, the queue takes no jobs, or workers have
            other versions of this program.
    """
    logging.getLogger("distributed").setLevel(logging.ERROR)
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # we say what it would
    # it tells once more what failed: a job, or a message that dask gave up on as it closed
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with ExitStack() as closing:
        if options.scheduler is not None:
            client = closing.enter_context(_connect(options.scheduler))
        else:
            closing.enter_context(dask.config.set(IN_PROCESS))
            cluster = closing.enter_context(
                _start(options) if options.cluster is None else _start_jobs(options.workers)
            )
            client = closing.enter_context(Client(cluster))
        if not is_in_process(client):
            closing.enter_context(_watched(client))
            _check_versions(client)
        closing.enter_context(_with_desks(client))
        yield client


def _start(options: ScheduleOptions) -> SpecCluster:
    """Return a cluster of this process, or of this machine's GPUs."""
    if len(options.gpus) > 1:
        return _start_gpu_workers(options)
    return LocalCluster(
        n_workers=options.workers,
        threads_per_worker=options.blocks_in_hand,
        processes=False,
        dashboard_address="127.0.0.1:0",  # or dask listens on all addresses, at a fixed port
        worker_dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": has_dashboard()},
        memory_limit=0,
    )


def _start_gpu_workers(options: ScheduleOptions) -> SpecCluster:
    """Return a worker process for each GPU, which sees no other: they share no lock of Python's."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # a queue may have set it
    names = {gpu: shown[gpu] if any(shown) else str(gpu) for gpu in options.gpus}
    return SpecCluster(
        scheduler={
            "cls": Scheduler,
            "options": {
                "host": "127.0.0.1",
                "dashboard": has_dashboard(),
                "dashboard_address": "127.0.0.1:0",
            },
        },
        workers={
            gpu: {
                "cls": Nanny,
                "options": {
                    "host": "127.0.0.1",
                    "nthreads": options.blocks_in_hand,
                    "memory_limit": 0,
                    "dashboard_address": "127.0.0.1:0",
                    "env": {"CUDA_VISIBLE_DEVICES": name},
                },
            }
            for gpu, name in names.items()
        },
    )


@contextmanager
def _start_jobs(count: int) -> Iterator[SpecCluster]:
    """Yield a cluster whose workers are jobs of SLURM, as dask's configuration describes them."""
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise ClusterError(
            f'--cluster slurm: {error}; it needs pip install "wsi-pipeline[cluster]"'
        ) from error
    loopback = {"dashboard_address": "127.0.0.1:0"}
    told = dask.config.get("jobqueue.slurm.scheduler-options", None) or {}
    try:
        cluster = SLURMCluster(scheduler_options=loopback | told)
    except (ValueError, OSError) as error:
        raise _no_jobs(error) from error
    with ExitStack() as closing:
        closing.callback(cluster.close)
        try:
            while len(cluster.worker_spec) < count:
                cluster.worker_spec.update(cluster.new_worker_spec())
            cluster.sync(cluster._correct_state)  # submits; scale() would lose the error
        except RuntimeError as error:
            cluster.workers.clear()  # or closing waits for jobs that there are not
            cluster._created.clear()
            raise _no_jobs(error) from error
        yield cluster


def _no_jobs(error: Exception) -> ClusterError:
    reason = " ".join(str(error).rpartition("stderr:")[2].split())
    return ClusterError(
        f"--cluster slurm: {reason}; say in dask's configuration, under jobqueue.slurm, what a "
        "job is: at least cores, memory and walltime"
    )


def has_dashboard() -> bool:
    """Return whether what dask's dashboard needs is installed."""
    return find_spec("bokeh") is not None


def dashboard_link(client: Client) -> str | None:
    """Return the URL of the cluster's dashboard, None where it has none."""
    with _reaching(client):
        has_one = has_dashboard() and "dashboard" in client.scheduler_info()["services"]
        return str(client.dashboard_link) if has_one else None


def _connect(address: str) -> Client:
    by_file = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
    try:
        with warnings.catch_warnings():  # of what differs we say more, and only what matters
            warnings.simplefilter("ignore", VersionMismatchWarning)
            return Client(**by_file)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ClusterError(
            f"no dask scheduler answers at {address}: {_first_line(error)}; is it running?"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def _reaching(client: Client) -> Iterator[None]:
    """Say in a sentence that the scheduler cannot be reached in the body."""
    try:
        yield
    except UNREACHABLE as error:
        raise _lost(client) from error


def _try(client: Client, request: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Ask for what does not matter once the scheduler is gone, and then do not wait for it."""
    if client.status == "running":
        with suppress(*UNREACHABLE):
            request(*args, **options)


def _lost(client: Client) -> ClusterError:
    return ClusterError(
        f"the dask scheduler at {_address(client)} is lost; start it again: the same "
        "command goes on where this one stopped"
    )


@contextmanager
def _watched(client: Client) -> Iterator[None]:
    """Log every worker that is lost."""
    with _reaching(client):
        if not client.nthreads():
            logger.warning("no worker at %s yet: waiting for one", _address(client))
            client.wait_for_workers(1)
        workers = set(client.nthreads())

    def note(event: tuple[float, dict[str, Any]]) -> None:
        _, news = event
        if news.get("action") == "add-worker":
            workers.add(news["worker"])
        if news.get("action") == "remove-worker":
            workers.discard(news["worker"])
            blocks = len(news["processing-tasks"])
            if blocks or not news["expected"]:
                logger.warning(
                    "worker %s is lost: %d of its blocks are done again by %s",
                    news["worker"], blocks, "others" if workers else "the next that comes",
                )  # fmt: skip

    client.subscribe_topic("all", note)
    try:
        yield
    finally:
        client.unsubscribe_topic("all")


def _versions() -> dict[str, str]:
    """Return the versions of what is to be the same on client and workers."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in SAME_VERSION:
        try:
            # +cpu and +cu130 are builds of one version
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _check_versions(client: Client) -> None:
    """Refuse workers whose programs differ from ours.

    Raises:
        ClusterError: one has.
    """
    for worker, theirs in _ask_workers(client, _versions).items():
        _check_same(worker, theirs, _versions())


def _check_same(worker: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    different = [
        f"{name} {theirs[name]} (here {ours[name]})" for name in ours if theirs[name] != ours[name]
    ]
    if different:
        raise ClusterError(
            f"worker {worker} has {', '.join(different)}; install the same versions on client "
            "and workers"
        )


def check_shared(client: Client, folder: Path, paths: Iterable[Path]) -> None:
    """Make sure that all workers see the files of a run under the same paths.

    Args:
        client: as `open_cluster` yields it.
        folder: for outputs, on a file system that all share.
        paths: that must exist as well.

    Raises:
        ClusterError: a worker does not see one.
    """
    # a new file: a folder of the same name may lie on each worker's own disk
    with NamedTemporaryFile(dir=folder, prefix=".shared.", suffix=".partial") as fresh:
        wanted = {fresh.name: str(folder), **{str(path): str(path) for path in paths}}
        for worker, missing in _ask_workers(client, _missing, list(wanted)).items():
            if missing:
                raise ClusterError(
                    f"worker {worker} does not see {wanted[missing[0]]}; slides, model and output "
                    "folder must lie under the same paths on all machines of the cluster"
                )


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


def _ask_workers(client: Client, question: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Return the answers of all workers.

    Raises:
        ClusterError: one cannot answer.
    """
    with _reaching(client):
        answers = client.run(question, *args, on_error="return")
    for worker, answer in answers.items():
        if isinstance(answer, ImportError):
            raise ClusterError(
                f"worker {worker} cannot import wsi_pipeline ({answer}); install it there"
            )
        if isinstance(answer, Exception):
            raise ClusterError(f"worker {worker}: {_first_line(answer)}")
    return dict(answers)


@contextmanager
def _with_desks(client: Client) -> Iterator[None]:
    name = _desk_name(client)
    with _reaching(client):
        client.register_plugin(_HasDesk(name), name=name)
    try:
        yield
    finally:
        _try(client, client.unregister_worker_plugin, name)


def _desk_name(client: Client) -> str:
    return f"desk_{client.id}"


def _same(thing: Any) -> Any:
    return thing


def run_blocks(
    client: Client,
    blocks: Iterable[Block],
    opener: Opener[Result],
    *,
    max_ram: int | None = None,
    priority: int = 0,
    resources: Mapping[str, float] | None = None,
) -> Iterator[Result]:
    """Do every block on some worker; yield the results as they come.

    A few blocks per thread are in flight at once, so the number of blocks costs no memory. A block
    whose worker dies is done again elsewhere, and so is one that fails on a worker elsewhere.
    Several threads may run blocks with one client.

    Args:
        client: as `open_cluster` yields it.
        blocks: what to do, in the order to start them.
        opener: see the module.
        max_ram: bytes; near this, fewer blocks are in hand of an in-process cluster. None = no
            limit.
        priority: of these blocks over those of other calls: the higher are done first.
        resources: what each block takes of a worker, in dask's sense, as from `gpu_share`.

    Raises:
        WsiPipelineError: above `max_ram` with nothing left to put off.
        ClusterError: the scheduler is lost.
        Exception: what the work raised for a block; once the blocks in hand have ended.
    """
    desk, name = _desk_name(client), f"work_{uuid.uuid4().hex}"
    retries = 0 if is_in_process(client) else RETRIES
    waiting = iter(blocks)
    tries: dict[Any, tuple[Block, int]] = {}  # of futures by key
    with _reaching(client):
        # a task and no scattered data: it is done again when the worker that has it dies
        opening = client.submit(_same, opener, pure=False, priority=priority)

    def submit(batch: list[Block], number: int = 0, **options: Any) -> list[Any]:
        if not batch:
            return []
        with _reaching(client):
            futures = client.map(
                _run_block,
                [desk] * len(batch),
                [name] * len(batch),
                [opening] * len(batch),
                batch,
                pure=False,
                priority=priority,
                resources=dict(resources or {}) or None,
                **options,
            )
        tries.update({f.key: (block, number) for f, block in zip(futures, batch, strict=True)})
        return futures

    def again(future: Any, failure: _Failure) -> list[Any]:
        block, number = tries[future.key]
        if isinstance(failure.error, ClusterError):  # the worker's fault, and of each next block
            logger.warning("%s; it is sent away", failure.error)
            with _reaching(client):
                client.retire_workers([failure.worker])
            return submit([block], number)
        if number == retries:
            raise failure.error
        logger.warning(
            "block %s failed on worker %s: %s; it is tried again",
            block.name, failure.worker, _first_line(failure.error),
        )  # fmt: skip
        with _reaching(client):
            others = [worker for worker in client.nthreads() if worker != failure.worker]
        where = {"workers": others, "allow_other_workers": True} if others else {}
        return submit([block], number + 1, **where)

    most, counted = _most_in_flight(client, max_ram), time.monotonic()
    futures = as_completed(submit(list(islice(waiting, most))), loop=client.loop)
    try:
        for batch in futures.batches():
            found = _results(client, batch)
            for future, result in zip(batch, found, strict=True):
                if isinstance(result, _Failure):
                    futures.update(again(future, result))
                del tries[future.key]
            if time.monotonic() > counted + LOOK_EVERY:
                most, counted = _most_in_flight(client, max_ram), time.monotonic()
            room = _room(futures.count(), most, max_ram)
            if room >= (1 if max_ram else most // 2):  # one request for many, where they can wait
                futures.update(submit(list(islice(waiting, room))))
            yield from (result for result in found if not isinstance(result, _Failure))
    finally:
        _end(client, [opening, *futures.futures], desk, name)


def _most_in_flight(client: Client, max_ram: int | None) -> int:
    with _reaching(client):
        in_hand = max(int(sum(client.nthreads().values())), 1)
    if is_in_process(client):
        return in_hand if max_ram else 2 * in_hand  # blocks that wait cannot be put off
    return max(2 * in_hand, LEAST_IN_FLIGHT)


def _results(client: Client, futures: list[Any]) -> list[Any]:
    """Return what came home of blocks; raise what no other try could mend."""
    for future in futures:
        if future.status == "error":
            error = future.exception()
            if isinstance(error, KilledWorker):
                raise WsiPipelineError(
                    f"a block ended {error.allowed_failures + 1} workers, "
                    f"{error.last_worker.address} the last; if they ran out of memory, give them "
                    "more or lower --block-size"
                )
            raise error
        if future.status != "finished":
            raise _lost(client)
    with _reaching(client):
        return list(client.gather(futures))


def _end(client: Client, futures: list[Any], desk: str, name: str) -> None:
    """Let go of what blocks have left, on all workers."""
    _try(client, client.cancel, futures)
    _try(client, client.run, _close_work, desk, name, on_error="ignore")
    _trim_memory()  # what comes next needs none of what an in-process worker held
