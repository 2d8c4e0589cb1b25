"""Many sources: while the blocks of one are done, the next is planned and the last written."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import BundleError, ClusterError, WsiPipelineError
from wsi_pipeline.files.locks import make_folder
from wsi_pipeline.files.paths import is_remote
from wsi_pipeline.inference.predictor import number_format
from wsi_pipeline.options import Precision, PredictOptions, Settings
from wsi_pipeline.report.record import Run
from wsi_pipeline.run.estimate import memory_check, passes_at_once
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.segment import PreparedRun, Stage, failed_run, finish, fitting, prepare
from wsi_pipeline.run.worker import BlockWorker
from wsi_pipeline.schedule.blocks import run_blocks
from wsi_pipeline.schedule.cluster import ask_workers, check_shared, gpu_share, worker_threads
from wsi_pipeline.schedule.memory import cpu_count
from wsi_pipeline.schedule.threads import Threads
from wsi_pipeline.schedule.worker_state import WorkerCache

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with patches done and patches in all."""
DEFAULTS = Settings()
SLIDES_AT_ONCE = 32
"""Whose blocks a cluster elsewhere has at a time: small slides would starve it one by one."""


def segment_jobs(
    jobs: Sequence[Job],
    bundle: Bundle,
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
    if not isinstance(client, Threads):
        output = jobs[0].folder.parent
        make_folder(output)
        local = [p.absolute() for p in (bundle.path, jobs[0].path) if not is_remote(p)]
        check_shared(client, output.absolute(), local)
    runner = BatchRunner(client, bundle, settings, threads, overwrite, max_ram, stopped)
    busy: list[Job] = []
    for last_look in (False, True):
        for job, run in runner.segment_all(busy if last_look else jobs, progress, stage):
            if run.status == "busy" and not last_look:
                busy.append(job)
            else:
                yield job, run


class BatchRunner:
    """Takes sources through three steps: prepare, do the blocks, finish; several at once.

    In this process one source is in each step, for the sake of memory:

        prepare    slide 3
        blocks     slide 2   on all workers
        finish     slide 1

    Workers elsewhere have the blocks of several, those of the first source first. Arguments are
    those of `segment_jobs`.
    """

    def __init__(
        self,
        client: Client | Threads,
        bundle: Bundle,
        settings: Settings,
        threads: int | None,
        overwrite: bool,
        max_ram: int | None,
        stopped: threading.Event | None = None,
    ) -> None:
        alone = isinstance(client, Threads)
        self._client, self._bundle = client, bundle
        self._settings = fitting(settings, bundle)
        self._threads, self._overwrite = threads, overwrite
        if alone:
            self._threads = passes_at_once(bundle, threads or cpu_count())
        predict = self._settings.predict
        if predict.precision != "auto":
            self._precision: Precision = predict.precision
        elif isinstance(client, Threads):
            self._precision = number_format(predict, bundle)
        else:
            answers = ask_workers(client, number_format_if_any, predict, bundle)
            found = {answer for answer in answers.values() if answer}
            # what all of them have, since one mask is to be of one format
            self._precision = found.pop() if len(found) == 1 else "fp32"
        self._check = memory_check(client, bundle, max_ram)
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
        job: Job,
        progress: Progress | None = None,
        stage: Stage | None = None,
        *,
        number: int = 0,
    ) -> Run:
        """Segment one source; return its run. Of several, those of a low number come first."""
        with self._preparing:
            prepared = prepare(
                job,
                self._bundle,
                settings=self._settings,
                precision=self._precision,
                threads=self._threads or cpu_count(),
                overwrite=self._overwrite,
                check=self._check,
            )
        if isinstance(prepared, Run):
            return prepared
        with prepared.claim:
            with self._computing:
                start = time.perf_counter()
                self._do_blocks(prepared, progress or (lambda done, total: None), number)
                seconds = time.perf_counter() - start
            with self._finishing:
                return finish(prepared, seconds, stage or (lambda text: None))

    def segment_all(
        self,
        jobs: Sequence[Job],
        progress: Callable[[Job, int, int], None] | None,
        stage: Callable[[Job, str], None] | None,
    ) -> Iterator[tuple[Job, Run]]:
        """Segment sources, several at once; yield each with its run, in order."""
        with ThreadPoolExecutor(self._at_once, "slide") as pool:
            runs = deque(
                pool.submit(
                    self.segment,
                    job,
                    partial(progress, job) if progress else None,
                    partial(stage, job) if stage else None,
                    number=number,
                )
                for number, job in enumerate(jobs)
            )
            try:
                for job in jobs:
                    yield job, self._ended(job, runs.popleft())
            except BaseException:
                # The caller may have closed the generator, too.
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _do_blocks(self, prepared: PreparedRun, progress: Progress, number: int) -> None:
        """Do the blocks that are left."""
        plan = prepared.run.plan
        pending = plan.store.pending(prepared.run.blocks)
        done = len(plan.grid) - int(np.count_nonzero(plan.uses(pending)))
        progress(done, len(plan.grid))
        if not pending:
            return
        alone = isinstance(self._client, Threads)
        for fresh in run_blocks(
            self._client,
            pending,
            partial(BlockWorker, plan, kept_bytes=prepared.run.kept_bytes)
            if alone
            else partial(open_elsewhere, plan, self._threads),
            max_ram=self._max_ram,
            # dask does first what has the highest: sources end in their order, and can be written.
            priority=-number,
            resources=self._resources,
        ):
            done = min(done + fresh, len(plan.grid))
            progress(done, len(plan.grid))
            if self._stopped.is_set():
                raise CancelledError
        if not alone:
            # Workers that died may have left half-written files.
            plan.store.remove_partials()

    def _ended(self, job: Job, end: Future[Run]) -> Run:
        """Return the run of a source once it has ended, well or not."""
        try:
            return end.result()
        except (ClusterError, CancelledError):
            # It is no fault of this source, and the others would fare the same.
            raise
        except Exception as error:
            # One bad slide must not end the night. What is not ours is a defect: keep its trace.
            expected = isinstance(error, WsiPipelineError)
            level = logging.DEBUG if expected else logging.ERROR
            logger.log(level, "%s failed", job.path, exc_info=True)
            return failed_run(job, self._bundle, self._settings, error)


def number_format_if_any(predict: PredictOptions, bundle: Bundle) -> Precision | None:
    """Return the number format of a worker, None of one without the device that is asked for."""
    with suppress(BundleError):
        return number_format(predict, bundle)
    return None


def open_elsewhere(plan: Plan, threads: int | None, keep: WorkerCache) -> BlockWorker:
    """Open a source on a worker of another process; return what does its blocks."""
    return BlockWorker(plan, keep, threads=threads or worker_threads())
