"""Predictions of patches that several blocks need: each is made once.

block A                         block B, on another thread
claim({1, 2, 3}): mine 1, 2, 3  claim({3, 4}): mine 4, of A 3     whole, so none waits in a circle
reads, predicts 1, 2, 3         reads, predicts 4
result(1), (2), (3): B's part   result(3) waits for A's, or gets A's error
of 3 is kept
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.geometry import Block


class Part(NamedTuple):
    """What a block needs of a prediction: where it lies in one of that shape, and its own copy."""

    where: tuple[slice, ...]
    shape: torch.Size
    pixels: torch.Tensor

    def in_place(self) -> torch.Tensor:
        """Return it where it belongs in a whole prediction, which holds anything elsewhere."""
        whole = self.pixels.new_empty(self.shape)
        whole[self.where] = self.pixels
        return whole


BEHIND = 32
"""Blocks by which one lags that another worker has done: it needs no parts here."""
Parts = dict[Block, Future[Part]]
"""What blocks will get of one prediction."""


class PatchCache:
    """Predictions of patches that several blocks need, so that a worker makes each once.

    Args:
        wanted: the patches that each block needs, blocks in the order in which they are done.
        part: tells which slices of a patch's prediction a block needs: no others are kept for it.
        max_bytes: of finished parts to keep; beyond, those wanted last, or no more, go first.
    """

    def __init__(
        self,
        wanted: Mapping[Block, npt.NDArray[np.int64]],
        part: Callable[[int, Block], tuple[slice, ...]],
        *,
        max_bytes: int,
    ) -> None:
        self._blocks, self._part, self._max_bytes = list(wanted), part, max_bytes
        self._numbers = {block: number for number, block in enumerate(self._blocks)}
        patches = np.concatenate([np.zeros(0, np.int64), *wanted.values()])
        owners = np.repeat(np.arange(len(wanted)), [len(some) for some in wanted.values()])
        self._owners = owners[np.argsort(patches, kind="stable")]
        self._ends = np.append(0, np.cumsum(np.bincount(patches)))
        self._is_to_come = np.ones(len(wanted), bool)
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, Block], Future[Part]] = {}
        self._bytes = self._reached = 0

    @contextmanager
    def claim(self, block: Block, patches: npt.NDArray[np.int64]) -> Iterator[Claim]:
        """Yield what one block has to predict itself and what it gets from others.

        Claims are made whole: so a block waits for earlier ones only and none waits in a circle.
        If the body fails, those who wait for it get its error.

        Args:
            patches: indices, ascending, of all that the block needs.
        """
        with self._lock:
            if block in self._numbers:
                self._is_to_come[self._numbers[block]] = False
                self._reached = max(self._reached, self._numbers[block])
            held = {p: self._parts.pop((p, block), None) for p in patches.tolist()}
            others = {p: future for p, future in held.items() if future is not None}
            self._bytes -= sum(f.result().pixels.nbytes for f in others.values() if f.done())
            made = {p: self._for_others(p) for p in held if p not in others}
        mine = np.array([*made], np.int64)
        failure: BaseException = RuntimeError("a block ended without all its predictions")
        try:
            yield Claim(mine=mine, made=made, others=others, keep=self._keep)
        except BaseException as error:
            failure = error
            raise
        finally:
            with self._lock:
                unmade = [(p, one) for p in made for one, f in made[p].items() if not f.done()]
                for key in unmade:
                    self._parts.pop(key, None)
            # Told when nobody can find them any more, so that all who wait read the same error.
            for patch, one in unmade:
                made[patch][one].set_exception(failure)

    def _for_others(self, patch: int) -> Parts:
        """Return, and enter, what blocks that are still to come will get of a prediction."""
        # of a block that was done before, and is lost, nobody may want the last patches
        owners = self._owners[slice(*self._ends.take([patch, patch + 1], mode="clip"))]
        left = [self._blocks[n] for n in owners[self._is_to_come[owners]]]
        # some of them may have their part already, of a prediction that others lost
        made = {block: Future[Part]() for block in left if (patch, block) not in self._parts}
        self._parts |= {(patch, block): future for block, future in made.items()}
        return made

    def _keep(self, patch: int, prediction: torch.Tensor, parts: Parts) -> None:
        """Hand out the parts of a prediction, and keep those that are not claimed yet."""
        for block, future in parts.items():
            # alone, since a view would keep the whole
            where = (slice(None), *self._part(patch, block))
            part = Part(where, prediction.shape, prediction[where].clone())
            with self._lock:
                future.set_result(part)
                if (patch, block) in self._parts:
                    self._bytes += part.pixels.nbytes
        with self._lock:
            while self._bytes > self._max_bytes:
                kept = (key for key, future in self._parts.items() if future.done())
                behind = self._reached - BEHIND
                last = max(kept, key=lambda key: ((n := self._numbers[key[1]]) < behind, n))
                self._bytes -= self._parts.pop(last).result().pixels.nbytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Claim:
    """What a block predicts itself and what it gets from others.

    Attributes:
        mine: (n,) indices of the patches to predict, ascending.
        made: those of them that are not made yet, with what others will get of them.
        others: patches of which another block's prediction gives or gave this one its part, and
            that were not asked for.
        keep: told of each prediction that others may wait for.
    """

    mine: npt.NDArray[np.int64]
    made: dict[int, Parts]
    others: dict[int, Future[Part]]
    keep: Callable[[int, torch.Tensor, Parts], None]

    def result(
        self,
        patch: int,
        fresh: Iterator[torch.Tensor],
        wait: Callable[[Future[Part]], Part] = Future.result,
    ) -> torch.Tensor:
        """Return the prediction of a patch, once, of which the block's part holds.

        Args:
            fresh: yields the predictions of `mine` in order.
            wait: returns what comes of another block's.
        """
        if (future := self.others.pop(patch, None)) is not None:
            return wait(future).in_place()
        prediction = next(fresh)
        self.keep(patch, prediction, self.made[patch])
        del self.made[patch]
        return prediction
