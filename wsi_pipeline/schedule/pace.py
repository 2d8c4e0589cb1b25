"""Blocks of several works on one source, handed out side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from wsi_pipeline.geometry import Block, Shape

ENDED = (1 << 62,)
"""Beyond all blocks."""


class Pace:
    """Hands out the blocks of several works so that none is ahead of another by a place.

    Attributes:
        works: the blocks of each, in the order of their places.
    """

    def __init__(self, works: Sequence[Sequence[Block]]) -> None:
        self.works = works
        self._next: list[Shape] = [blocks[0].index if blocks else ENDED for blocks in works]
        self._changed = threading.Condition()

    def blocks(self, work: int) -> Iterator[Block]:
        """Yield the blocks of one work, each once the others have come as far."""
        for block in self.works[work]:
            with self._changed:
                self._go(work, block.index)
                self._changed.wait_for(lambda at=block.index: at <= min(self._next))  # type: ignore[misc]
            yield block

    def end(self, work: int) -> None:
        """Have nobody wait for a work any more, however it has ended."""
        with self._changed:
            self._go(work, ENDED)

    def _go(self, work: int, to: Shape) -> None:
        self._next[work] = to
        self._changed.notify_all()
