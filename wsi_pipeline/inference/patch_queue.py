"""One queue of patches for a device: its passes are filled from all blocks in hand.

block A, on its thread                B, on another          passes
in_hand                               in_hand                of 4, always full: a patch is rounded
put(1), put(2), put(3)                reads its pixels       differently in another batch
wait(1): B may bring more             put(4), put(5)         1, 2, 3, 4
wait(2)                               wait(5): no one else   5 and three empty ones
                                      can bring any
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from wsi_pipeline.errors import BundleError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Answer = tuple[torch.Tensor, ...]
"""Of one patch, or a row each of several."""
PATIENCE = 0.03
"""Seconds in which a thread that has ended its block begins the next."""


class Predicted(Future[Answer]):
    """What comes of a patch, and how long its share of the passes took."""

    seconds = 0.0


Entry = tuple[int, int, torch.Tensor, Predicted]
"""Turn of the block, number of the patch, its pixels, and what comes of them."""


def use_one_core() -> None:
    """Let torch in the calling thread use no others: work runs side by side as it is."""
    # OpenMP counts for each thread; idle ones of a team would spin
    torch.set_num_threads(1)


class PatchQueue:
    """Patches on their way through the passes of a device, those of earlier blocks first.

    Args:
        run: predicts (batch, *patch, C) in one pass; returns tensors with a row for each.
        batch: patches of a pass; out of memory it is halved.
        passes: at a time.
        too_large: what to say when one patch at a time, or a fixed batch, is too much.
        is_fixed: whether no smaller batch will do.
    """

    def __init__(
        self,
        run: Callable[[torch.Tensor], Answer],
        *,
        batch: int,
        passes: int,
        too_large: str,
        is_fixed: bool,
    ) -> None:
        self._run, self._too_large, self.is_fixed = run, too_large, is_fixed
        self.batch, self._passes = batch, passes
        self._pool = ThreadPoolExecutor(passes, "predict", initializer=use_one_core)
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._entries: list[Entry] = []
        # passes that were asked for, and of these not yet begun
        self._going = self._asked = 0
        # blocks, and threads of theirs that wait
        self._in_hand = self._waiting = 0
        self._moved = 0.0
        self._own = threading.local()

    @contextmanager
    def in_hand(self) -> Iterator[None]:
        """Have passes wait, in the body, for patches that this thread may still bring."""
        if hasattr(self._own, "turn"):
            yield
            return
        self._own.turn, self._own.seconds = next(self._numbers), 0.0
        self._count(in_hand=1)
        try:
            yield
        finally:
            self._own.__dict__.clear()
            self._count(in_hand=-1)

    @property
    def seconds(self) -> float:
        """Return the time of passes for the block in hand, less what it has waited for them."""
        return float(self._own.seconds)

    def put(self, patch: torch.Tensor) -> Predicted:
        """Hand in a patch (*patch, C); return its prediction, to be waited for by `wait`."""
        future, number = Predicted(), next(self._numbers)
        with self._lock:
            turn = getattr(self._own, "turn", number)
            heapq.heappush(self._entries, (turn, number, patch, future))
            self._ask()
        return future

    def wait(self, future: Future[T]) -> T:
        """Return what comes of a patch here, or of one that another block has handed in."""
        begun = time.perf_counter()
        self._count(waiting=1)
        try:
            while not wait([future], PATIENCE).done:
                with self._lock:
                    is_still = time.monotonic() - self._moved > PATIENCE and not self._going
                    if is_still and self._waiting >= self._in_hand:
                        self._ask(to_all=True)
        finally:
            self._count(waiting=-1)
        if hasattr(self._own, "seconds"):
            self._own.seconds += begun - time.perf_counter() + getattr(future, "seconds", 0.0)
        return future.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _count(self, *, in_hand: int = 0, waiting: int = 0) -> None:
        with self._lock:
            self._in_hand += in_hand
            self._waiting += waiting
            self._moved = time.monotonic()

    def _ask(self, *, to_all: bool = False) -> None:
        """Ask for as many passes as there are full batches, or for all patches."""
        wanted = (len(self._entries) + (self.batch - 1 if to_all else 0)) // self.batch
        for _ in range(wanted - self._asked):
            self._asked += 1
            self._going += 1
            self._pool.submit(self._pass)

    def _pass(self) -> None:
        """Predict the patches whose turn it is."""
        with self._lock:
            self._asked -= 1
            batch, taken = self.batch, list[Entry]()
            # scans may give bytes or numbers, which one tensor cannot hold
            while self._entries and len(taken) < batch:
                if taken and self._entries[0][2].dtype != taken[0][2].dtype:
                    break
                entry = heapq.heappop(self._entries)
                if not entry[3].cancelled():
                    taken.append(entry)
        try:
            if taken:
                self._answer(taken, batch)
        except BaseException as error:
            for *_, future in taken:
                future.set_exception(error)
        finally:
            with self._lock:
                self._going -= 1
                self._moved = time.monotonic()

    @torch.inference_mode()
    def _answer(self, taken: list[Entry], batch: int) -> None:
        patches = [patch for _, _, patch, _ in taken]
        patches += [torch.zeros_like(patches[0])] * (batch - len(taken))
        begun, rows = time.perf_counter(), list[Answer]()
        error: BaseException | None = None
        try:
            parts = self._run(torch.stack(patches))
            # a row of several would keep them all
            for row in range(len(taken)):
                rows.append(tuple(p[row].clone() if batch > 1 else p[row] for p in parts))
        except torch.OutOfMemoryError:
            if batch > 1 and not self.is_fixed:
                torch.cuda.empty_cache()
                with self._lock:
                    # a pass beside this one may have halved it already
                    self.batch = min(self.batch, batch // 2)
                    logger.warning("out of memory: going on with %d patches at a time", self.batch)
                    for entry in taken:
                        heapq.heappush(self._entries, entry)
                    self._ask()
                return
            error = BundleError(self._too_large.format(batch))
        except BaseException as other:
            error = other
        seconds = (time.perf_counter() - begun) / len(taken) / self._passes
        for number, (*_, future) in enumerate(taken):
            if future.set_running_or_notify_cancel():
                future.seconds = seconds
                if error:
                    future.set_exception(error)
                else:
                    future.set_result(rows[number])
