"""Blocks done by threads of this process: what most machines need, without a cluster."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import cycle, islice
from typing import Any

from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.geometry import Block
from wsi_pipeline.schedule.memory import trim_memory, used_memory
from wsi_pipeline.schedule.worker_state import TRIM_EVERY, Opener, Result, WorkerCache, WorkerState

NEAR = 0.85
"""From this share of the memory limit on, less is in hand at a time."""


class Threads:
    """Workers that are threads of this process; to be closed.

    Most of the work lets go of Python's lock, and the threads of a worker share what it keeps.

    Attributes:
        workers: how many; each opens work, and keeps things, by itself.
        in_hand: threads of each, and so its blocks at a time.
    """

    def __init__(self, workers: int, in_hand: int) -> None:
        self.workers, self.in_hand = workers, in_hand
        self._states = [WorkerState() for _ in range(workers)]
        self._own, turns = threading.local(), cycle(self._states)
        self._pool = ThreadPoolExecutor(
            workers * in_hand, "blocks", lambda: setattr(self._own, "state", next(turns))
        )

    def close(self) -> None:
        """Wait for the blocks in hand, and let go of all that the workers keep."""
        self._pool.shutdown(cancel_futures=True)
        for state in self._states:
            state.clear()

    def begin(self, make: Callable[[WorkerCache], object]) -> None:
        """Have each worker make what it will keep, beside what comes before its first blocks."""
        for state in self._states:
            # What goes wrong is raised when a block needs it.
            self._pool.submit(make, state.keep)

    def run_blocks(
        self, blocks: Iterable[Block], opener: Opener[Result], max_ram: int | None
    ) -> Iterator[Result]:
        """See `schedule.blocks.run_blocks`."""
        name, waiting = f"work_{uuid.uuid4().hex}", iter(blocks)

        def do(block: Block) -> Any:
            try:
                return self._own.state.work(name, opener)(block)
            finally:
                if sum(block.index) % TRIM_EVERY == 0:
                    trim_memory()

        # With a limit no more than are done at once: blocks that wait cannot be put off.
        most = self.workers * self.in_hand * (1 if max_ram else 2)
        futures = {self._pool.submit(do, block) for block in islice(waiting, most)}
        try:
            while futures:
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                found = [future.result() for future in done]
                room = _room(len(futures), most, max_ram)
                futures |= {self._pool.submit(do, block) for block in islice(waiting, room)}
                yield from found
                # more room will not come by waiting
                if not (room or futures) and next(waiting, None):
                    raise WsiPipelineError(
                        f"{used_memory() / 1e9:.2f} GB of memory are taken, --max-ram allows "
                        f"{(max_ram or 0) / 1e9:.2f} GB, and no block is in hand; raise it"
                    )
        finally:
            for future in futures:
                future.cancel()
            for state in self._states:
                state.close(name)
            # what comes next needs none of what the workers held
            trim_memory()


def _room(in_flight: int, most: int, max_ram: int | None) -> int:
    """Return how many more blocks may be in flight."""
    if max_ram is None or used_memory() < NEAR * max_ram:
        return most - in_flight
    trim_memory()
    if (used := used_memory()) < NEAR * max_ram:
        return most - in_flight
    # one at a time may still fit
    return int(not in_flight and used < max_ram)
