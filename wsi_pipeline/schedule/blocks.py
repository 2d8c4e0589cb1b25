"""Blocks of one source done by workers, here or of a cluster, and their results as they come."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from wsi_pipeline.errors import ClusterError, DeviceError, WsiPipelineError
from wsi_pipeline.geometry import Block
from wsi_pipeline.schedule.cluster import lost, reaching, state_name, try_to
from wsi_pipeline.schedule.threads import Threads
from wsi_pipeline.schedule.worker_state import Opener, Result, first_line

if TYPE_CHECKING:
    from distributed import Client

    from wsi_pipeline.schedule.tasks import Failure

logger = logging.getLogger(__name__)

RETRIES = 2
"""How often a block that failed on a worker elsewhere is tried on another."""
LEAST_IN_FLIGHT = 16
"""Blocks of a slide that a cluster elsewhere has, so that requests are worth their time."""
LOOK_EVERY = 5.0
"""Seconds after which the workers of a cluster are counted again."""


def run_blocks(
    client: Client | Threads,
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
        blocks: What to do, in the order to start them.
        max_ram: bytes; near this, fewer blocks are in hand of this process. None = no limit.
        priority: of these blocks over those of other calls, on workers elsewhere: the higher are
            done first.
        resources: what each block takes of a worker, in dask's sense, as from `gpu_share`.

    Raises:
        WsiPipelineError: above `max_ram` with nothing left to put off.
        ClusterError: the scheduler is lost.
        Exception: what the work raised for a block; once the blocks in hand have ended.
    """
    if isinstance(client, Threads):
        # What failed in this process would fail again: memory, disk and file are the same.
        yield from client.run_blocks(blocks, opener, max_ram)
        return
    # dask takes a while to load
    from distributed import as_completed

    from wsi_pipeline.schedule.tasks import Failure, close_work, run_block

    state, name = state_name(client), f"work_{uuid.uuid4().hex}"
    waiting = iter(blocks)
    with reaching(client):
        # a task and no scattered data: it is done again when the worker that has it dies
        opening = client.submit(lambda thing: thing, opener, pure=False, priority=priority)

    def submit(batch: list[Block], tries: int = 0, **where: Any) -> list[Any]:
        if not batch:
            return []
        with reaching(client):
            return client.map(
                partial(run_block, state, name, tries),
                [opening] * len(batch),
                batch,
                pure=False,
                priority=priority,
                resources=dict(resources or {}) or None,
                **where,
            )

    most, counted = _most_in_flight(client), time.monotonic()
    futures = as_completed(submit(list(islice(waiting, most))), loop=client.loop)
    try:
        for batch in futures.batches():
            found = _results(client, batch)
            for failure in found:
                if isinstance(failure, Failure):
                    tries, where = _next_try(client, failure)
                    futures.update(submit([failure.block], tries, **where))
            if time.monotonic() > counted + LOOK_EVERY:
                most, counted = _most_in_flight(client), time.monotonic()
            room = most - futures.count()
            # one request for many
            if room >= most // 2:
                futures.update(submit(list(islice(waiting, room))))
            yield from (result for result in found if not isinstance(result, Failure))
    finally:
        try_to(client, client.cancel, [opening, *futures.futures])
        try_to(client, client.run, close_work, state, name, on_error="ignore")


def _most_in_flight(client: Client) -> int:
    with reaching(client):
        return int(max(2 * sum(client.nthreads().values()), LEAST_IN_FLIGHT))


def _next_try(client: Client, failure: Failure) -> tuple[int, dict[str, Any]]:
    """Return how often a block will have been tried, and where it goes; raise what fails again."""
    is_of_worker = isinstance(failure.error, ClusterError)
    if failure.tries == RETRIES and not is_of_worker:
        raise failure.error
    with reaching(client):
        others = [worker for worker in client.nthreads() if worker != failure.worker]
    if is_of_worker:
        if isinstance(failure.error, DeviceError) and not others:
            raise failure.error
        # Each next block would fail there, too.
        logger.warning("%s; it is sent away", failure.error)
        with reaching(client):
            client.retire_workers([failure.worker])
        return failure.tries, {}
    logger.warning(
        "block %s failed on worker %s: %s; it is tried again",
        failure.block.name, failure.worker, first_line(failure.error),
    )  # fmt: skip
    return failure.tries + 1, {"workers": others, "allow_other_workers": True} if others else {}


def _results(client: Client, futures: list[Any]) -> list[Any]:
    """Return what came home of blocks; raise what no other try could mend."""
    from distributed import KilledWorker

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
            raise lost(client)
    with reaching(client):
        return list(client.gather(futures))
