"""What runs on dask's workers: the state that each is given, and a block as a task.

client                        worker, one state for a client, one thread for a block
run_blocks(blocks, opener) -> run_block: state.work(name, opener) -> the first block opens it
<- result, or Failure: an error goes home as a value
the end, or an error       -> close_work: waits for blocks in hand, then closes the work
the client goes            -> HasState.teardown: closes all works and all that is kept
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from wsi_pipeline.geometry import Block
from wsi_pipeline.schedule.memory import trim_memory
from wsi_pipeline.schedule.worker_state import (
    TRIM_EVERY,
    Opener,
    WorkerState,
    check_same_versions,
    versions,
)


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
    """How a block failed, and on which worker, after how many tries before."""

    error: Exception
    worker: str
    block: Block
    tries: int


def run_block(state: str, name: str, tries: int, opener: Opener[Any], block: Block) -> Any:
    """Do a block on the worker that this is called on; return its result or how it failed."""
    # an error goes home as a value, since dask would print its traceback on the way
    worker = get_worker()
    try:
        return getattr(worker, state).work(name, opener)(block)
    except Exception as error:
        return Failure(error, worker.address, block, tries)
    finally:
        if sum(block.index) % TRIM_EVERY == 0:
            trim_memory()


async def close_work(state: str, name: str, dask_worker: Worker) -> None:
    """Close the work of a run on a worker."""
    await asyncio.to_thread(getattr(dask_worker, state).close, name)
