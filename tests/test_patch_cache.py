"""Predictions that blocks share, under random delays and failures."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from wsi_pipeline.geometry import Block
from wsi_pipeline.inference.patch_cache import PatchCache

PATCHES, BLOCKS, THREADS = 12, 8, 4


class Broken(Exception):
    """What a network or a file raises."""


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Let threads change places at almost any instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def wanted_by(draw: random.Random) -> list[np.ndarray]:
    sizes = [draw.randint(0, 5) for _ in range(BLOCKS)]
    return [np.array(sorted(draw.sample(range(PATCHES), n)), np.int64) for n in sizes]


def block(number: int) -> Block:
    return Block(index=(number,), start=(number,), stop=(number + 1,))


def cache_of(blocks: list[np.ndarray], *, max_bytes: int) -> PatchCache:
    wanted = {block(number): patches for number, patches in enumerate(blocks)}
    return PatchCache(wanted, lambda *_: (slice(0, 1),), max_bytes=max_bytes)


def do_block(
    cache: PatchCache, number: int, wanted: np.ndarray, pauses: Iterator[float], breaks: int | None
) -> list[int]:
    """Do what a worker does with a block, and break at its n-th prediction; return what it got."""

    def fresh() -> Iterator[torch.Tensor]:
        for number, patch in enumerate(claim.mine):
            time.sleep(next(pauses))
            if number == breaks:
                raise Broken(f"patch {patch}")
            yield torch.tensor([[int(patch)]])

    with cache.claim(block(number), wanted) as claim:
        time.sleep(next(pauses))
        predictions = fresh()
        return [int(claim.result(patch, predictions)) for patch in wanted]


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("seed", range(10))
def test_who_waits_for_a_prediction_gets_it_or_the_error_that_broke_it(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        blocks = wanted_by(draw)
        cache = cache_of(blocks, max_bytes=draw.choice([0, 24, 10_000]))
        breaks = {draw.randrange(BLOCKS): draw.randrange(3)} if draw.random() < 0.7 else {}
        pauses = iter([draw.choice([0, 0, 1e-6, 2e-4]) for _ in range(1000)])
        with ThreadPoolExecutor(THREADS) as pool:
            ends = [
                pool.submit(do_block, cache, number, wanted, pauses, breaks.get(number))
                for number, wanted in enumerate(blocks)
            ]
            for wanted, end in zip(blocks, ends, strict=True):
                error = end.exception(timeout=20)
                if error is None:
                    assert end.result() == wanted.tolist()
                else:
                    assert isinstance(error, Broken), repr(error)
                    assert breaks
        assert threading.active_count() < 20


def test_a_prediction_is_made_once_and_let_go_after_its_last_use() -> None:
    first, second = np.array([0, 1]), np.array([1, 2])
    cache = cache_of([first, second], max_bytes=10_000)
    pauses = iter([0.0] * 100)
    assert do_block(cache, 0, first, pauses, None) == [0, 1]
    with cache.claim(block(1), second) as claim:
        assert claim.mine.tolist() == [2]
        fresh = iter([torch.tensor([[2]])])
        assert [int(claim.result(patch, fresh)) for patch in second] == [1, 2]
    with cache.claim(block(0), first) as claim:
        assert claim.mine.tolist() == [0, 1]


def test_a_block_that_was_done_and_lost_is_predicted_again() -> None:
    """A worker that comes later does not have it among those that it waits for."""
    for wanted, needed in (([], [3, 7]), ([np.array([0, 1])], [1, 2, 9])):
        cache = cache_of(wanted, max_bytes=10_000)
        pauses = iter([0.0] * 10)
        assert do_block(cache, len(wanted) + 5, np.array(needed), pauses, None) == needed
        assert cache._bytes == 8 * (1 in needed)


def test_what_other_workers_have_done_does_not_fill_the_cache() -> None:
    """Every block shares patches with the next two; another worker does every third one."""
    blocks, made = [np.array([n, n + 1, n + 2]) for n in range(400)], list[int]()
    # all that there is, and what the blocks of some rows need
    for room in (10_000, 80):
        cache = cache_of(blocks, max_bytes=8 * room)
        made.append(0)
        for number in (n for n in range(len(blocks)) if n % 3):
            with cache.claim(block(number), blocks[number]) as claim:
                made[-1] += len(claim.mine)
                fresh = (torch.tensor([[int(patch)]]) for patch in claim.mine)
                for patch in blocks[number]:
                    claim.result(patch, fresh)
        assert cache._bytes <= 8 * room
    assert made[0] == made[1]
