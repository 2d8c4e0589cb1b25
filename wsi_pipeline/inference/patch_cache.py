"""Predictions of patches that several blocks need: each is made once, in turn.

block A                         block B, on another thread
claim({1, 2, 3}): mine 1, 2, 3  claim({3, 4}): mine 4, of A 3     claims are made whole, in turn
reads its pixels                reads its pixels                  at the same time
passes of 1, 2, 3 are begun     wait_for_turn                     so none waits in a circle
end_turn                        passes of 4 are begun
result(1), (2), (3): kept       result(3) waits for A's, or gets A's error
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


class PatchCache:
    """Predictions of patches that several blocks need, so that a worker makes each once.

    Args:
        uses: (n,) how many blocks need each patch; the last of them lets its prediction go.
        max_bytes: of finished predictions to keep; beyond, the oldest go first.
    """

    def __init__(self, uses: npt.NDArray[np.int64], *, max_bytes: int) -> None:
        self._uses = uses.copy()
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._futures: dict[int, Future[torch.Tensor]] = {}
        self._bytes = 0
        self._queue: list[Claim] = []
        self._moved = threading.Condition(self._lock)

    @contextmanager
    def claim(self, patches: npt.NDArray[np.int64]) -> Iterator[Claim]:
        """Yield what one block has to predict itself and what it gets from others.

        Claims are made whole and in turn, and passes are to be begun in that order, see
        `wait_for_turn`: so a block waits for earlier ones only and none waits in a circle. If the
        body fails, those who wait for it get its error.

        Args:
            patches: indices, ascending, of all that the block needs.
        """
        with self._lock:
            # Counted down here, not at the end: what no later block needs is not kept for one.
            self._uses[patches] -= 1
            futures = {int(p): self._futures.get(int(p)) for p in patches}
            mine = [p for p, future in futures.items() if future is None]
            made: dict[int, Future[torch.Tensor]] = {p: Future() for p in mine if self._uses[p] > 0}
            self._futures.update(made)
            others = {p: future for p, future in futures.items() if future is not None}
            claim = Claim(mine=np.array(mine, np.int64), made=made, others=others, kept=self._keep)
            self._queue.append(claim)
        failure: BaseException = RuntimeError("a block ended without all its predictions")
        try:
            yield claim
        except BaseException as error:
            failure = error
            raise
        finally:
            self.end_turn(claim)
            with self._lock:
                unmade = [self._futures.pop(patch) for patch in made]
                self._drop()
            # Told when nobody can find them any more, so that all who wait read the same error.
            for future in unmade:
                future.set_exception(failure)

    def wait_for_turn(self, claim: Claim) -> None:
        """Wait until the passes of all earlier claims are begun."""
        with self._moved:
            self._moved.wait_for(lambda: self._queue[0] is claim)
        if len(claim.mine) == 0:
            self.end_turn(claim)

    def end_turn(self, claim: Claim) -> None:
        """Let the next claim begin its passes, unless that was done before."""
        with self._moved:
            if claim in self._queue:
                self._queue.remove(claim)
                self._moved.notify_all()

    def _keep(self, prediction: torch.Tensor) -> None:
        """Count a prediction that others may wait for."""
        with self._lock:
            self._bytes += prediction.nbytes
            # what is needed no more goes with the block
            if self._bytes > self._max_bytes:
                self._drop()

    def _drop(self) -> None:
        """Let go what is needed no more, or too much."""
        for patch, future in list(self._futures.items()):
            if future.done() and (self._uses[patch] <= 0 or self._bytes > self._max_bytes):
                self._bytes -= self._futures.pop(patch).result().nbytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Claim:
    """What a block predicts itself and what it gets from others.

    Attributes:
        mine: (n,) indices of the patches to predict, ascending.
        made: those of them that others may wait for, and that are not made yet.
        others: patches that another block predicts or has predicted, and that were not asked for.
        kept: told of each prediction that others may wait for.
    """

    mine: npt.NDArray[np.int64]
    made: dict[int, Future[torch.Tensor]]
    others: dict[int, Future[torch.Tensor]]
    kept: Callable[[torch.Tensor], None]

    def result(self, patch: int, fresh: Iterator[torch.Tensor]) -> torch.Tensor:
        """Return the prediction of a patch, once; `fresh` yields those of `mine` in order."""
        if (future := self.others.pop(patch, None)) is not None:
            return future.result()
        prediction = next(fresh)
        if (future := self.made.get(patch)) is not None:
            # a view would keep its whole batch
            copy = prediction.clone()
            future.set_result(copy)
            del self.made[patch]
            self.kept(copy)
        return prediction
