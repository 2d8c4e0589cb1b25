"""Many sources: while the blocks of one are done, the next is planned and the last written."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.errors import BundleError, ClusterError, WsiPipelineError
from wsi_pipeline.files.locks import make_folder
from wsi_pipeline.files.paths import is_remote
from wsi_pipeline.inference.ensemble import kept_predictor
from wsi_pipeline.inference.patch_queue import use_one_core
from wsi_pipeline.inference.predictor import number_format
from wsi_pipeline.options import Precision, PredictOptions, Settings
from wsi_pipeline.report.record import Run
from wsi_pipeline.run.estimate import memory_check, passes_at_once
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.segment import PreparedRun, failed_run, finish, fitting, prepare
from wsi_pipeline.run.worker import BlockWorker
from wsi_pipeline.schedule.blocks import run_blocks
from wsi_pipeline.schedule.cluster import ask_workers, check_shared, gpu_share, worker_threads
from wsi_pipeline.schedule.memory import cpu_count
from wsi_pipeline.schedule.pace import Pace
from wsi_pipeline.schedule.threads import Threads
from wsi_pipeline.schedule.worker_state import WorkerCache
from wsi_pipeline.sources.shared import KEPT_BYTES

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with patches done and patches in all."""
DEFAULTS = Settings()
Result = TypeVar("Result")
SLIDES_AT_ONCE = 32
"""Whose blocks a cluster elsewhere has at a time: small slides would starve it one by one."""


def segment_jobs(
    jobs: Sequence[Job],
    bundle: Bundle | Sequence[Bundle],
    *,
    client: Client | Threads,
    settings: Settings = DEFAULTS,
    threads: int | None = None,
    overwrite: bool = False,
    max_ram: int | None = None,
    progress: Callable[[Job, int, int], None] | None = None,
    stage: Callable[[Job, str], None] | None = None,
    stopped: threading.Event | None = None,
) -> Iterator[tuple[Job, Run]]:
    """Segment sources in order; yield each with its run, failed ones too.

    Sources that another process has claimed are looked at again when all others are done.

    Args:
        bundle: the model, or several: each job says which it is for, and those of a source follow
            one another, so that it is read once for all.
        threads: of the CPU for one worker's forward passes; None = all, or as many as dask gives
            a worker elsewhere.
        max_ram: bytes that this process may take; None = no limit.
        progress: told of a job and its patches done, by several threads.
        stage: told of a job and what comes after its patches, by several threads.
        stopped: once it is set, no block is begun.

    Raises:
        CancelledError: it was stopped.
        ClusterError: the cluster is lost, or cannot do the work.
    """
    if not jobs:
        return
    bundles = [bundle] if isinstance(bundle, Bundle) else list(bundle)
    if not isinstance(client, Threads):
        output = jobs[0].folder.parent
        make_folder(output)
        paths = (*(b.path for b in bundles), jobs[0].path)
        local = [p.absolute() for p in paths if not is_remote(p)]
        check_shared(client, output.absolute(), local)
    runner = BatchRunner(client, bundles, settings, threads, overwrite, max_ram, stopped)
    busy: list[Job] = []
    for last_look in (False, True):
        for job, run in runner.segment_all(busy if last_look else jobs, progress, stage):
            if run.status == "busy" and not last_look:
                busy.append(job)
            else:
                yield job, run


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, and how sources are segmented by it here.

    Attributes:
        threads: see `segment_jobs`.
        check: see `memory_check`.
    """

    bundle: Bundle
    settings: Settings
    threads: int | None
    precision: Precision
    check: Callable[[Plan, list[int]], int | None]


class BatchRunner:
    """Takes sources through three steps: prepare, do the blocks, finish; several at once.

    In this process one source is in each step, for the sake of memory:

        prepare    slide 3
        blocks     slide 2   on all workers, for all models side by side
        finish     slide 1

    Workers elsewhere have the blocks of several, those of the first source first. Arguments are
    those of `segment_jobs`.
    """

    def __init__(
        self,
        client: Client | Threads,
        bundles: Sequence[Bundle],
        settings: Settings,
        threads: int | None,
        overwrite: bool,
        max_ram: int | None,
        stopped: threading.Event | None = None,
    ) -> None:
        alone = isinstance(client, Threads)
        self._client, self._overwrite = client, overwrite
        self._models = [ready(client, bundle, settings, threads, max_ram) for bundle in bundles]
        self._max_ram = max_ram if alone else None
        self._resources = dict[str, float]()
        if not isinstance(client, Threads) and settings.predict.device != "cpu":
            self._resources = gpu_share(client)
        self._at_once = 3 if alone else SLIDES_AT_ONCE
        steps = (1, 1, 1) if alone else (cpu_count(), SLIDES_AT_ONCE, cpu_count())
        self._preparing, self._computing, self._finishing = map(threading.Semaphore, steps)
        self._stopped = stopped or threading.Event()

    def segment(
        self,
        jobs: Sequence[Job],
        progress: Callable[[Job, int, int], None] | None = None,
        stage: Callable[[Job, str], None] | None = None,
        *,
        number: int = 0,
    ) -> list[Run | Exception]:
        """Segment one source by each of its jobs' models; return the run of each, or its error.

        Of several sources, those of a low number come first.

        Raises:
            CancelledError: it was stopped.
            ClusterError: the cluster is lost, or cannot do the work.
        """
        # what models take of the memory beside each other, with the tiles that they share
        taken = [KEPT_BYTES] if len(jobs) > 1 else []
        told, tell = progress or (lambda job, done, total: None), stage or (lambda job, text: None)
        with ExitStack() as claims:
            with self._preparing:
                found = [caught(self._prepare, job, taken, number) for job in jobs]
            begun = [one for one in found if isinstance(one, PreparedRun)]
            for one in begun:
                claims.push(one.claim)
            pace = Pace([one.run.plan.store.pending(one.run.blocks) for one in begun])
            do = partial(caught, self._do_blocks, pace=pace, progress=told, number=number)
            with self._computing, ThreadPoolExecutor(len(jobs), "model") as pool:
                done = list(pool.map(do, begun, range(len(begun))))
            with self._finishing:
                ends = [
                    seconds
                    if isinstance(seconds, Exception)
                    else caught(finish, one, seconds, partial(tell, one.job))
                    for one, seconds in zip(begun, done, strict=True)
                ]
        return [ends.pop(0) if isinstance(one, PreparedRun) else one for one in found]

    def segment_all(
        self,
        jobs: Sequence[Job],
        progress: Callable[[Job, int, int], None] | None,
        stage: Callable[[Job, str], None] | None,
    ) -> Iterator[tuple[Job, Run]]:
        """Segment sources, several at once; yield each with its run, in order."""
        groups = [list(group) for _, group in groupby(jobs, attrgetter("path"))]
        with ThreadPoolExecutor(self._at_once, "slide") as pool:
            runs = deque(
                pool.submit(self.segment, group, progress, stage, number=number)
                for number, group in enumerate(groups)
            )
            try:
                for group in groups:
                    # without a time Ctrl-C would not be heard on Windows
                    while not runs[0].done():
                        wait([runs[0]], 0.5)
                    for job, end in zip(group, runs.popleft().result(), strict=True):
                        yield job, self._ended(job, end)
            except BaseException:
                # The caller may have closed the generator, too.
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _prepare(self, job: Job, taken: list[int], number: int) -> Run | PreparedRun:
        model, beside = self._models[job.model], self._beside(job)
        threads = model.threads or cpu_count()

        def begin(predict: PredictOptions) -> None:
            def make(keep: WorkerCache) -> None:
                # as `BlockWorker` does, which is to find it
                use_one_core()
                bundle = load_bundle(model.bundle.path.absolute())
                kept_predictor(bundle, predict, threads, keep, beside)

            # The first source needs the network soon; those behind it find one in use.
            if isinstance(self._client, Threads) and not number:
                self._client.begin(make)

        return prepare(
            job,
            model.bundle,
            settings=model.settings,
            precision=model.precision,
            threads=threads,
            overwrite=self._overwrite,
            check=lambda plan: model.check(plan, taken),
            begin=begin,
        )

    def _beside(self, job: Job) -> list[str]:
        """Return the digests of the other models."""
        return [m.bundle.digest for number, m in enumerate(self._models) if number != job.model]

    def _do_blocks(
        self,
        prepared: PreparedRun,
        place: int,
        *,
        pace: Pace,
        progress: Callable[[Job, int, int], None],
        number: int,
    ) -> float:
        """Do the blocks that are left; return the seconds that it took."""
        start, job, plan = time.perf_counter(), prepared.job, prepared.run.plan
        pending = pace.works[place]
        done = len(plan.grid) - int(np.count_nonzero(plan.uses(pending)))
        progress(job, done, len(plan.grid))
        alone, model = isinstance(self._client, Threads), self._models[job.model]
        beside = self._beside(job)
        try:
            for fresh in run_blocks(
                self._client,
                pace.blocks(place) if alone else pending,
                partial(BlockWorker, plan, kept_bytes=prepared.run.kept_bytes, beside=beside)
                if alone
                else partial(open_elsewhere, plan, model.threads, beside),
                max_ram=self._max_ram,
                # dask does first what has the highest: sources end in their order, and can be
                # written.
                priority=-number,
                resources=self._resources,
            ):
                done = min(done + fresh, len(plan.grid))
                progress(job, done, len(plan.grid))
                if self._stopped.is_set():
                    raise CancelledError
        finally:
            pace.end(place)
        if not alone:
            # Workers that died may have left half-written files.
            plan.store.remove_partials()
        return time.perf_counter() - start

    def _ended(self, job: Job, end: Run | Exception) -> Run:
        """Return the run of a source that has ended, well or not."""
        if isinstance(end, Run):
            return end
        # One bad slide must not end the night. What is not ours is a defect: keep its trace.
        level = logging.DEBUG if isinstance(end, WsiPipelineError) else logging.ERROR
        logger.log(level, "%s failed", job.path, exc_info=end)
        model = self._models[job.model]
        return failed_run(job, model.bundle, model.settings, end)


def caught(do: Callable[..., Result], *args: Any, **options: Any) -> Result | Exception:
    """Do something; return what comes of it, or the error if that is the source's own."""
    try:
        return do(*args, **options)
    except (ClusterError, CancelledError):
        # It is no fault of this source, and the others would fare the same.
        raise
    except Exception as error:
        return error


def ready(
    client: Client | Threads,
    bundle: Bundle,
    settings: Settings,
    threads: int | None,
    max_ram: int | None,
) -> Model:
    """Return how sources are segmented by a model; arguments are those of `segment_jobs`."""
    settings = fitting(settings, bundle)
    predict = settings.predict
    if predict.precision != "auto":
        precision: Precision = predict.precision
    elif isinstance(client, Threads):
        precision = number_format(predict, bundle)
    else:
        answers = ask_workers(client, number_format_if_any, predict, bundle)
        found = {answer for answer in answers.values() if answer}
        # what all of them have, since one mask is to be of one format
        precision = found.pop() if len(found) == 1 else "fp32"
    if isinstance(client, Threads):
        threads = passes_at_once(bundle, threads or cpu_count())
    return Model(
        bundle=bundle,
        settings=settings,
        threads=threads,
        precision=precision,
        check=memory_check(client, bundle, max_ram),
    )


def number_format_if_any(predict: PredictOptions, bundle: Bundle) -> Precision | None:
    """Return the number format of a worker, None of one without the device that is asked for."""
    with suppress(BundleError):
        return number_format(predict, bundle)
    return None


def open_elsewhere(
    plan: Plan, threads: int | None, beside: Collection[str], keep: WorkerCache
) -> BlockWorker:
    """Open a source on a worker of another process; return what does its blocks."""
    return BlockWorker(plan, keep, threads=threads or worker_threads(), beside=beside)
