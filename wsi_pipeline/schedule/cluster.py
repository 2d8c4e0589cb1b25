"""Run blocks in threads of this process, by default, or on workers wherever a dask cluster runs.

Nothing here knows what a block does. A run hands over an *opener*, a picklable callable that each
worker calls once and that returns the work: a callable of one block. It is given what the worker
*keeps* from run to run, such as a loaded model: a dict of things that can be closed.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from wsi_pipeline.errors import ClusterError
from wsi_pipeline.options import ScheduleOptions
from wsi_pipeline.schedule.threads import Threads
from wsi_pipeline.schedule.worker_state import check_same_versions, first_line, versions

if TYPE_CHECKING:
    # It takes a while to load, and one process needs none of it.
    from distributed import Client, SpecCluster, Worker

logger = logging.getLogger(__name__)


SHARED_WITH_TORCH = {
    # torch may hold the GIL for long
    "distributed.admin.tick.limit": "1h",
    # it takes the GIL a hundred times a second
    "distributed.worker.profile.enabled": False,
}
"""Dask's configuration of workers on this machine, whose threads share a process with ours."""
UNREACHABLE = (OSError, CancelledError, RuntimeError)
"""What dask raises when the scheduler is gone."""


def gpu_share(client: Client) -> dict[str, float]:
    """Return what a block takes of the workers that announce GPUs; nothing where none does."""

    def share(dask_worker: Worker) -> float:
        return float(dask_worker.state.total_resources.get("GPU", 0) / dask_worker.state.nthreads)

    shares = [found for found in ask_workers(client, share).values() if found]
    return {"GPU": min(shares)} if shares else {}


def worker_threads() -> int:
    """Return how many threads dask gives the worker on which this is called."""
    from distributed import get_worker

    return int(get_worker().state.nthreads)


def _address(client: Client) -> str:
    # never None of a client that is not asynchronous
    assert client.scheduler is not None
    return str(client.scheduler.address)


@contextmanager
def open_cluster(options: ScheduleOptions) -> Iterator[Client | Threads]:
    """Yield threads of this process, or a dask client of the cluster that the options ask for.

    Raises:
        ClusterError: the scheduler does not answer, the queue takes no jobs, or workers have
            other versions of this program.
    """
    if options.scheduler is None and options.cluster is None and len(options.gpus) < 2:
        with closing(Threads(options.workers, options.blocks_in_hand)) as threads:
            yield threads
        return
    import dask
    from distributed import Client

    from wsi_pipeline.schedule.tasks import HasState

    logging.getLogger("distributed").setLevel(logging.ERROR)
    # what it would say we say ourselves
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    # it tells once more what failed: a job, or a message that dask gave up on as it closed
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        if options.scheduler is not None:
            client = stack.enter_context(_connect(options.scheduler))
        else:
            stack.enter_context(dask.config.set(SHARED_WITH_TORCH))
            stack.enter_context(_script_not_run_again())
            jobs = options.cluster is not None
            cluster = _start_jobs(options.workers) if jobs else _start_gpu_workers(options)
            client = stack.enter_context(Client(stack.enter_context(cluster)))
        _watch(client)
        stack.callback(client.unsubscribe_topic, "all")
        for worker, theirs in ask_workers(client, versions).items():
            check_same_versions(worker, theirs, versions())
        name = state_name(client)
        with reaching(client):
            client.register_plugin(HasState(name), name=name)
        stack.callback(try_to, client, client.unregister_worker_plugin, name)
        yield client


@contextmanager
def _script_not_run_again() -> Iterator[None]:
    """Keep worker processes of this machine from running the caller's script, guarded or not.

    multiprocessing runs `__main__` again in each process that it spawns, for functions that are
    defined there. Ours are in the package, and a script from standard input is no file at all.
    """
    main = sys.modules["__main__"]
    spec, file = main.__spec__, main.__dict__.get("__file__")
    main.__spec__ = None
    main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _start_gpu_workers(options: ScheduleOptions) -> SpecCluster:
    """Return a worker process for each GPU, which sees no other: they share no lock of Python's."""
    from distributed import Nanny, Scheduler, SpecCluster

    # a queue may have set it
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
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
                    # Dask would pause or end workers by a reckoning of its own.
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
    import dask

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
            # submits; scale() would lose the error
            cluster.sync(cluster._correct_state)
        except RuntimeError as error:
            # or closing waits for jobs that there are not
            cluster.workers.clear()
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


def dashboard_link(client: Client | Threads) -> str | None:
    """Return the URL of the cluster's dashboard, None where it has none."""
    if isinstance(client, Threads):
        return None
    with reaching(client):
        has_one = has_dashboard() and "dashboard" in client.scheduler_info()["services"]
        return str(client.dashboard_link) if has_one else None


def _connect(address: str) -> Client:
    from distributed import Client
    from distributed.versions import VersionMismatchWarning

    by_file = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
    try:
        # of what differs we say more, and only what matters
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VersionMismatchWarning)
            return Client(**by_file)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ClusterError(
            f"no dask scheduler answers at {address}: {first_line(error)}; is it running?"
        ) from error


@contextmanager
def reaching(client: Client) -> Iterator[None]:
    """Say in a sentence that the scheduler cannot be reached in the body."""
    try:
        yield
    except UNREACHABLE as error:
        raise lost(client) from error


def try_to(client: Client, request: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Ask for what does not matter once the scheduler is gone, and then do not wait for it."""
    if client.status == "running":
        with suppress(*UNREACHABLE):
            request(*args, **options)


def lost(client: Client) -> ClusterError:
    """Return the error that says that the scheduler is gone."""
    return ClusterError(
        f"the dask scheduler at {_address(client)} is lost; start it again: the same "
        "command goes on where this one stopped"
    )


def _watch(client: Client) -> None:
    """Log every worker that is lost, until topic "all" is unsubscribed."""
    with reaching(client):
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


def check_shared(client: Client, folder: Path, paths: Iterable[Path]) -> None:
    """Make sure that all workers see the files of a run under the same paths.

    Args:
        folder: Folder of outputs, on a file system that all share.
        paths: what else must be there.

    Raises:
        ClusterError: a worker does not see one.
    """
    # a new file: a folder of the same name may lie on each worker's own disk
    with NamedTemporaryFile(dir=folder, prefix=".shared.", suffix=".partial") as fresh:
        wanted = {fresh.name: str(folder), **{str(path): str(path) for path in paths}}
        missing_of = ask_workers(client, lambda: [p for p in wanted if not os.path.exists(p)])
        for worker, missing in missing_of.items():
            if missing:
                raise ClusterError(
                    f"worker {worker} does not see {wanted[missing[0]]}; slides, model and output "
                    "folder must lie under the same paths on all machines of the cluster"
                )


def ask_workers(client: Client, question: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Return the answers of all workers by their addresses.

    Raises:
        ClusterError: one has none.
    """
    with reaching(client):
        answers = client.run(question, *args, on_error="return")
    for worker, answer in answers.items():
        if isinstance(answer, ImportError):
            raise ClusterError(
                f"worker {worker} cannot import wsi_pipeline ({answer}); install it there"
            )
        if isinstance(answer, Exception):
            raise ClusterError(f"worker {worker}: {first_line(answer)}")
    return dict(answers)


def state_name(client: Client) -> str:
    """Return the attribute of dask's workers under which ours have their state."""
    return f"state_{client.id}"
