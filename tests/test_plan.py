"""Which patches each block needs, beside a look at every patch for every block."""

from __future__ import annotations

import math
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_pipeline.geometry import PatchGrid, iter_blocks
from wsi_pipeline.inference.patch_cache import PatchCache
from wsi_pipeline.options import PredictOptions
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources.pixels import SlidePixels


def plan_of(shape, *, patch, overlap, block, ratio=1.0, share=1.0, cell=0, is_mirrored=False):
    """Return a plan of a mask of some shape, with a share of the patches that cover it."""
    axes = len(shape)
    grid = PatchGrid.cover(
        tuple(max(1, round(n * ratio)) for n in shape), (patch,) * axes, (overlap,) * axes
    )
    return Plan(
        pixels=SlidePixels(path=Path("none"), mpp=None, series=None, icc="ignore", grid_mpp=1.0),
        fingerprint="",
        bundle_path=Path("none"),
        model="",
        store=RunStore(folder=Path("none")),
        grid=grid.keep(np.random.default_rng(0).random(len(grid)) < share),
        downsample=(1 / ratio,) * axes,
        mask_shape=shape,
        mask_downsample=(1.0,) * axes,
        block_shape=(block,) * axes,
        is_mirrored=is_mirrored,
        predict=PredictOptions(),
        threads=1,
        outlines=False,
        cell=cell,
    )


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize(
    "plan",
    [
        {"shape": (331, 207), "patch": 32, "overlap": 7, "block": 64},
        {"shape": (331, 207), "patch": 32, "overlap": 0, "block": 64, "ratio": 0.5},
        {"shape": (331, 207), "patch": 48, "overlap": 45, "block": 30, "ratio": 0.37, "cell": 3},
        {
            "shape": (97, 402),
            "patch": 16,
            "overlap": 5,
            "block": 64,
            "ratio": 1.3,
            "is_mirrored": True,
        },
        {"shape": (5, 7), "patch": 16, "overlap": 0, "block": 64},
        {"shape": (21, 50, 44), "patch": 12, "overlap": 4, "block": 16, "is_mirrored": True},
        {"shape": (21, 50, 44), "patch": 12, "overlap": 0, "block": 16, "ratio": 0.8},
    ],
)
def test_a_block_has_the_patches_that_reach_into_its_box(plan, share):
    plan = plan_of(**plan, share=share)
    plan = pickle.loads(pickle.dumps(plan))
    every = list(iter_blocks(plan.mask_shape, plan.block_shape))
    size, uses, found = plan.grid.patch_size, np.zeros(len(plan.grid)), []
    for block in every:
        start, stop = plan.box(block)
        reach = (plan.grid.origins < stop) & (plan.grid.origins + size > start)
        expected = np.flatnonzero(reach.all(axis=1))
        assert plan.patches(block).tolist() == expected.tolist()
        uses[expected] += 1
        found += [block] * (len(expected) > 0)
    assert plan.blocks() == found
    assert plan.uses(found).tolist() == uses.tolist()
    kept, most, first = 0, 0, {}
    for number, block in enumerate(every):
        for patch in plan.patches(block).tolist():
            # what a later block will need, from the first on that needs the patch; and until then
            pixels = math.prod(part.stop - part.start for part in plan.part(patch, block))
            if first.setdefault(patch, number) < number:
                kept -= pixels
            else:
                kept += sum(
                    math.prod(part.stop - part.start for part in plan.part(patch, later))
                    for later in every[number + 1 :]
                    if patch in plan.patches(later)
                )
        most = max(most, kept)
    assert plan.straddling == most
    assert plan.uses([]).tolist() == [0] * len(plan.grid)


def test_a_million_patches_are_planned_once_in_a_second():
    plan = plan_of((184_000, 165_000), patch=256, overlap=64, block=2048)
    begun = time.process_time()
    # by the client to prepare and to begin, by each worker, and for each block
    for _ in range(4):
        blocks = plan.blocks()
        uses = plan.uses(blocks)
        needed = [plan.patches(block) for block in blocks]
    assert time.process_time() - begun < 1
    assert (len(plan.grid), len(blocks)) == (823_880, 7290)
    assert uses.sum() == sum(map(len, needed))


@pytest.mark.parametrize(
    ("ratio", "overlap", "classes"), [(0.5, 0, 5), (1.0, 16, 2)], ids=["sampled", "blended"]
)
def test_a_wide_slide_keeps_what_its_blocks_share(ratio, overlap, classes):
    plan = plan_of((768, 12_544), patch=64, overlap=overlap, block=256, ratio=ratio)
    wanted = {block: plan.patches(block) for block in plan.blocks()}
    need, most, made = plan.straddling * classes * 4, 0, 0
    cache = PatchCache(wanted, plan.part, max_bytes=need)
    for block, patches in wanted.items():
        start, stop = plan.box(block)
        with cache.claim(block, patches) as claim:
            mine, made = claim.mine.tolist(), made + len(claim.mine)
            fresh = (torch.full((classes, 64, 64), float(patch)) for patch in mine)
            for patch in patches.tolist():
                prediction = claim.result(patch, fresh)
                axes = zip(plan.grid.origins[patch].tolist(), start, stop, strict=True)
                inside = tuple(slice(max(a - o, 0), min(b - o, 64)) for o, a, b in axes)
                assert (prediction[(slice(None), *inside)] == patch).all()
            most = max(most, cache._bytes)
    assert made == len(plan.grid)
    assert most == need
