"""Blocks of one source done on the workers of a cluster, and their results as they come."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from distributed import Client, KilledWorker, as_completed

from wsi_pipeline.errors import ClusterError, WsiPipelineError
from wsi_pipeline.geometry import Block
from wsi_pipeline.schedule.cluster import is_in_process, lost, reaching, state_name, try_to
from wsi_pipeline.schedule.memory import trim_memory, used_memory
from wsi_pipeline.schedule.worker_state import (
    Failure,
    Opener,
    Result,
    close_work,
    first_line,
    run_block,
)

logger = logging.getLogger(__name__)

NEAR = 0.85
"""From this share of the memory limit on, less is in hand at a time."""
RETRIES = 2
"""How often a block that failed on a worker elsewhere is tried on another."""
LEAST_IN_FLIGHT = 16
"""Blocks of a slide that a cluster elsewhere has, so that requests are worth their time."""
LOOK_EVERY = 5.0
"""Seconds after which the workers of a cluster are counted again."""


def _room(in_flight: int, most: int, max_ram: int | None) -> int:
    """Return how many more blocks may be in flight."""
    if max_ram is None or used_memory() < NEAR * max_ram:
        return most - in_flight
    trim_memory()
    if (used := used_memory()) < NEAR * max_ram:
        return most - in_flight
    if in_flight:
        return 0
    # One at a time may still fit, and more room will not come by waiting.
    if used < max_ram:
        return 1
    raise WsiPipelineError(
        f"{used / 1e9:.2f} GB of memory are taken, --max-ram allows {max_ram / 1e9:.2f} GB, and "
        "no block is in hand; raise it"
    )


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
        blocks: What to do, in the order to start them.
        max_ram: bytes; near this, fewer blocks are in hand of an in-process cluster. None = no
            limit.
        priority: of these blocks over those of other calls: the higher are done first.
        resources: what each block takes of a worker, in dask's sense, as from `gpu_share`.

    Raises:
        WsiPipelineError: above `max_ram` with nothing left to put off.
        ClusterError: the scheduler is lost.
        Exception: what the work raised for a block; once the blocks in hand have ended.
    """
    state, name = state_name(client), f"work_{uuid.uuid4().hex}"
    # What failed in this process would fail again: memory, disk and file are the same.
    retries = 0 if is_in_process(client) else RETRIES
    waiting = iter(blocks)
    # By the keys of futures.
    tries: dict[Any, tuple[Block, int]] = {}
    with reaching(client):
        # a task and no scattered data: it is done again when the worker that has it dies
        opening = client.submit(lambda thing: thing, opener, pure=False, priority=priority)

    def submit(batch: list[Block], number: int = 0, **options: Any) -> list[Any]:
        if not batch:
            return []
        with reaching(client):
            futures = client.map(
                run_block,
                [state] * len(batch),
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

    def again(future: Any, failure: Failure) -> list[Any]:
        block, number = tries[future.key]
        # the worker's fault, and of each next block
        if isinstance(failure.error, ClusterError):
            logger.warning("%s; it is sent away", failure.error)
            with reaching(client):
                client.retire_workers([failure.worker])
            return submit([block], number)
        if number == retries:
            raise failure.error
        logger.warning(
            "block %s failed on worker %s: %s; it is tried again",
            block.name, failure.worker, first_line(failure.error),
        )  # fmt: skip
        with reaching(client):
            others = [worker for worker in client.nthreads() if worker != failure.worker]
        where = {"workers": others, "allow_other_workers": True} if others else {}
        return submit([block], number + 1, **where)

    most, counted = _most_in_flight(client, max_ram), time.monotonic()
    futures = as_completed(submit(list(islice(waiting, most))), loop=client.loop)
    try:
        for batch in futures.batches():
            found = _results(client, batch)
            for future, result in zip(batch, found, strict=True):
                if isinstance(result, Failure):
                    futures.update(again(future, result))
                del tries[future.key]
            if time.monotonic() > counted + LOOK_EVERY:
                most, counted = _most_in_flight(client, max_ram), time.monotonic()
            room = _room(futures.count(), most, max_ram)
            # one request for many, where they can wait
            if room >= (1 if max_ram else most // 2):
                futures.update(submit(list(islice(waiting, room))))
            yield from (result for result in found if not isinstance(result, Failure))
    finally:
        try_to(client, client.cancel, [opening, *futures.futures])
        try_to(client, client.run, close_work, state, name, on_error="ignore")
        # what comes next needs none of what an in-process worker held
        trim_memory()


def _most_in_flight(client: Client, max_ram: int | None) -> int:
    with reaching(client):
        in_hand = max(int(sum(client.nthreads().values())), 1)
    if is_in_process(client):
        # blocks that wait cannot be put off
        return in_hand if max_ram else 2 * in_hand
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
            raise lost(client)
    with reaching(client):
        return list(client.gather(futures))
