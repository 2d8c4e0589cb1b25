"""Patches of several blocks in passes that are full."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from wsi_pipeline.errors import BundleError
from wsi_pipeline.inference.patch_queue import Answer, PatchQueue


def patch(number: int, kind: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.full((2, 2, 3), number, dtype=kind)


class Passes:
    """A network that gives each patch its first value, and notes what its passes held."""

    def __init__(self, fails: Callable[[torch.Tensor], bool] = lambda _: False) -> None:
        self.held: list[list[int]] = []
        self.fails = fails

    def __call__(self, patches: torch.Tensor) -> Answer:
        if self.fails(patches):
            raise torch.OutOfMemoryError
        self.held.append([int(n) for n in patches[:, 0, 0, 0]])
        return (patches[:, 0, 0, :1].float(),)


@contextmanager
def opened(passes: Passes, batch: int, *, at_a_time: int = 1, is_fixed: bool = False) -> Iterator:
    queue = PatchQueue(
        passes, batch=batch, passes=at_a_time, too_large="{} is too large", is_fixed=is_fixed
    )
    try:
        yield queue
    finally:
        queue.close()


def do_block(queue: PatchQueue, numbers: range) -> list[int]:
    with queue.in_hand():
        futures = [queue.put(patch(n)) for n in numbers]
        return [int(queue.wait(future)[0]) for future in futures]


def test_passes_are_filled_from_all_blocks_in_hand_and_padded_at_the_end_alone(monkeypatch):
    # a machine under load may leave a thread aside for long
    monkeypatch.setattr("wsi_pipeline.inference.patch_queue.PATIENCE", 1.0)
    passes, blocks = Passes(), [range(5 * i + 1, 5 * i + 6) for i in range(9)]
    with opened(passes, 4) as queue, ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(do_block, queue, numbers) for numbers in blocks]
        for numbers, end in zip(blocks, ends, strict=True):
            assert end.result(20) == list(numbers)
    assert len(passes.held) == 12
    assert sorted(itertools.chain(*passes.held)) == [0, 0, 0, *range(1, 46)]


def test_a_block_that_reads_is_waited_for():
    passes, is_waiting = Passes(), threading.Event()

    def late(queue):
        with queue.in_hand():
            is_waiting.wait(10)
            time.sleep(0.3)
            return [int(queue.wait(queue.put(patch(n)))[0]) for n in (7, 8)]

    def early(queue):
        with queue.in_hand():
            futures = [queue.put(patch(n)) for n in (1, 2, 3)]
            is_waiting.set()
            return [int(queue.wait(future)[0]) for future in futures]

    with opened(passes, 4) as queue, ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(late, queue), pool.submit(early, queue)]
        assert [end.result(20) for end in ends] == [[7, 8], [1, 2, 3]]
    assert passes.held[0] == [1, 2, 3, 7] or passes.held[0] == [7, 1, 2, 3]


def test_earlier_blocks_go_first():
    passes, go = Passes(), threading.Event()
    passes.fails = lambda _: not go.wait(10)
    with opened(passes, 2) as queue, queue.in_hand():
        first = [queue.put(patch(n)) for n in (1, 2)]
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(do_block, queue, range(3, 7))
            time.sleep(0.1)
            first += [queue.put(patch(n)) for n in (7, 8)]
            go.set()
            assert [int(queue.wait(future)[0]) for future in first] == [1, 2, 7, 8]
            assert other.result(10) == [3, 4, 5, 6]
    assert passes.held == [[1, 2], [7, 8], [3, 4], [5, 6]]


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_out_of_memory_no_patch_is_lost(at_a_time):
    passes = Passes(lambda patches: len(patches) > 3)
    blocks = [range(7 * i, 7 * i + 7) for i in range(20)]
    with opened(passes, 16, at_a_time=at_a_time) as queue, ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(do_block, queue, numbers) for numbers in blocks]
        assert [end.result(20) for end in ends] == [list(numbers) for numbers in blocks]
        assert queue.batch == 2
    assert {len(held) for held in passes.held} == {2}


def test_what_cannot_be_smaller_is_said():
    for batch, is_fixed in ((4, True), (1, False)):
        passes = Passes(lambda patches: int(patches.max()) > 2)
        with opened(passes, batch, is_fixed=is_fixed) as queue:
            assert do_block(queue, range(3)) == [0, 1, 2]
            with pytest.raises(BundleError, match=f"{batch} is too large"):
                do_block(queue, range(3, 5))
            assert do_block(queue, range(2)) == [0, 1]


def test_nobody_waits_for_a_device_that_has_no_memory_to_give_back(monkeypatch):
    def given_up():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", given_up)
    told = []

    def do():
        try:
            do_block(queue, range(3))
        except RuntimeError as error:
            told.append(str(error))

    with opened(Passes(lambda _: True), 4) as queue:
        # a daemon, since it may wait for ever
        thread = threading.Thread(target=do, daemon=True)
        thread.start()
        thread.join(10)
    assert told == ["CUDA error: an illegal memory access was encountered"]


def test_bytes_and_numbers_do_not_meet_in_a_pass():
    passes = Passes()
    with opened(passes, 4) as queue, queue.in_hand():
        kinds = [torch.uint8, torch.float32, torch.uint8, torch.uint8, torch.float32]
        futures = [queue.put(patch(n, kind)) for n, kind in enumerate(kinds)]
        assert [int(queue.wait(future)[0]) for future in futures] == [0, 1, 2, 3, 4]


def test_who_waits_for_the_patch_of_another_waits_for_its_pass():
    """No block can bring more: all wait, one of them for what another has handed in."""
    passes = Passes()
    with opened(passes, 8) as queue, ThreadPoolExecutor(1) as pool, queue.in_hand():
        own = queue.put(patch(5))

        def other() -> int:
            with queue.in_hand():
                return int(queue.wait(own)[0])

        end = pool.submit(other)
        assert int(queue.wait(own)[0]) == end.result(10) == 5
    assert passes.held == [[5] + [0] * 7]


def test_no_pause_holds_a_block_up_for_ever():
    draw = random.Random(0)

    def do(queue: PatchQueue, number: int, pauses: list[float]) -> list[int]:
        with queue.in_hand():
            futures, found = [], []
            for i, pause in enumerate(pauses):
                time.sleep(pause)
                futures.append(queue.put(patch(number + i)))
                if len(futures) > 3:
                    found.append(int(queue.wait(futures.pop(0))[0]))
            time.sleep(pauses[0])
            return found + [int(queue.wait(future)[0]) for future in futures]

    for at_a_time in (1, 2):
        passes = Passes(lambda patches: len(patches) > 4 and draw.random() < 0.05)
        with opened(passes, 8, at_a_time=at_a_time) as queue, ThreadPoolExecutor(5) as pool:
            ends = {}
            for number in range(0, 200, 10):
                pauses = [draw.choice([0, 0, 0.001, 0.04]) for _ in range(draw.randint(1, 9))]
                ends[number, len(pauses)] = pool.submit(do, queue, number, pauses)
            for (number, count), end in ends.items():
                assert end.result(60) == list(range(number, number + count))
