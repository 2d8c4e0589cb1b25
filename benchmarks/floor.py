"""What a slide costs at the least: decoding its tiles, and one forward pass of its patches.

python benchmarks/floor.py slide.svs --model models/lightmuseg-bcss-demo

Decoding: every stored tile that a patch touches, once, by libjpeg-turbo on all processors into a
buffer that is thrown away. Forward: as many patches as the grid has, resident and normalised, in
the fastest form and number format that a short trial finds; on a CPU one pass a processor.
The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import torch
from reader import Tiles, make_raw

from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.inference.patch_queue import use_one_core
from wsi_pipeline.inference.predictor import choose_device, choose_dtype
from wsi_pipeline.networks import NETWORKS, build
from wsi_pipeline.networks.fold import for_inference
from wsi_pipeline.options import MPP_TOLERANCE, SelectOptions
from wsi_pipeline.sources import Slide, SlideView, open_source
from wsi_pipeline.tissue.select import plan_grid

RESIDENT = 64
"""Different patches that are kept in memory; a pass does not care which it gets."""
TRIAL_SECONDS = 1.0
"""How long each form of the network is tried."""
CORES = len(os.sched_getaffinity(0))
CPU_BATCHES = (1, 4)
GPU_BATCHES = (8, 16, 32, 64)


def grid_of(slide: Slide, bundle: Bundle, *, overlap: int, tissue: Any) -> PatchGrid:
    """Return the patches that a run predicts; `tissue` is "auto", "none" or a mask's path."""
    height, width = bundle.input.patch_size
    stored = plan_grid(
        slide,
        mpp=bundle.input.mpp,
        patch_size=(height, width),
        overlap=(overlap, overlap),
        select=SelectOptions(tissue=tissue),
    )
    return stored.grid


def tiles_under(path: Path, view: SlideView, grid: PatchGrid) -> Tiles:
    """Return offset and size of each stored tile that a patch touches.

    Raises:
        SystemExit: the level is not made of JPEG tiles.
    """
    with tifffile.TiffFile(path) as file:
        page = file.series[0].levels[view.level].pages[0]
        if page.compression != tifffile.COMPRESSION.JPEG or page.jpegtables is not None:
            raise SystemExit(f"{path}: the floor is known for JPEG tiles without shared tables")
        tile = np.array([page.tilelength, page.tilewidth])
        shape = -(-np.array(page.shape[:2]) // tile)
        wanted = np.zeros(shape, bool)
        for origin in grid.origins * np.array(view.ratio):
            top, left = (origin // tile).astype(int)
            end = np.ceil((origin + np.array(grid.patch_size) * view.ratio) / tile).astype(int)
            wanted[top : end[0], left : end[1]] = True
        chosen = np.flatnonzero(wanted)
        return [(page.dataoffsets[i], page.databytecounts[i]) for i in chosen]


def decode_seconds(path: Path, tiles: Tiles) -> float:
    """Return how long all processors take to decode the tiles."""
    decode = make_raw(path, {(0, 0): tiles}, CORES)
    decode()  # once for the page cache
    return timed(decode)


def read_patches(view: SlideView, grid: PatchGrid) -> npt.NDArray[np.uint8]:
    """Return up to `RESIDENT` patches, evenly taken, uint8 (n, h, w, 3)."""
    height, width = grid.patch_size
    chosen = np.linspace(0, len(grid) - 1, min(RESIDENT, len(grid))).astype(int)
    origins = grid.origins[chosen].tolist()
    return np.stack([view.read((y, x), (height, width)) for y, x in origins])


def forward_seconds(
    bundle: Bundle,
    patches: npt.NDArray[np.uint8],
    count: int,
    device: str,
    *,
    with_compile: bool = False,
) -> tuple[float, str]:
    """Return how long `count` forward passes take at best, and in which form.

    Args:
        bundle: the model.
        patches: uint8 (n, h, w, 3), taken in turn.
        count: of patches to predict.
        device: "auto", "cpu", "cuda" or "cuda:N".
        with_compile: try what torch.compile makes of it, too.
    """
    where = choose_device(device)
    torch.backends.cudnn.benchmark = True
    rates: dict[str, tuple[float, Callable[[int], None]]] = {}
    for name, (module, dtype) in _forms(bundle, where, with_compile).items():
        inputs = _normalised(bundle, patches, where, dtype)
        for batch in CPU_BATCHES if where.type == "cpu" else GPU_BATCHES:
            indices = torch.arange(RESIDENT).split(batch)
            predict = partial(_predict, module, [inputs[i % len(inputs)] for i in indices])
            predict(2 * CORES * batch)  # the first chooses kernels
            trial, seconds = 0, 0.0
            while seconds < TRIAL_SECONDS:
                trial = max(2 * trial, CORES * batch)
                seconds = timed(partial(predict, trial))
            rates[f"{name}, batch {batch}"] = trial / seconds, predict
    best = max(rates, key=lambda name: rates[name][0])
    return timed(partial(rates[best][1], count)), best


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _forms(
    bundle: Bundle, device: torch.device, with_compile: bool
) -> dict[str, tuple[Callable[[torch.Tensor], Any], torch.dtype]]:
    """Return the network in the forms that may be the fastest, with the format of its input."""
    plain, best = build(bundle).module.to(device), choose_dtype("auto", device)
    forms: dict[str, tuple[Callable[[torch.Tensor], Any], torch.dtype]] = {}
    if device.type == "cpu" or bundle.network not in NETWORKS:  # on a GPU there is no doubt
        forms["plain fp32"] = plain, torch.float32
    if bundle.network not in NETWORKS:
        return forms
    for dtype in (best,) if device.type != "cpu" else dict.fromkeys((torch.float32, best)):
        folded = for_inference(plain, device=device, dtype=dtype)
        forms[f"folded {str(dtype).removeprefix('torch.')}"] = folded, dtype
        if with_compile:
            forms[f"compiled {str(dtype).removeprefix('torch.')}"] = torch.compile(folded), dtype
    return forms


def _normalised(
    bundle: Bundle, patches: npt.NDArray[np.uint8], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return the patches as the network wants them, (n, 3, h, w)."""
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (bundle.input.mean, bundle.input.std))
    scaled = (torch.from_numpy(patches).permute(0, 3, 1, 2) / 255 - mean) / std
    return scaled.to(device=device, dtype=dtype)


def _predict(
    module: Callable[[torch.Tensor], Any], batches: Sequence[torch.Tensor], count: int
) -> None:
    """Predict at least `count` patches, the batches in turn, and wait for the end."""
    todo = itertools.islice(itertools.cycle(batches), math.ceil(count / len(batches[0])))

    @torch.inference_mode()
    def forward(patches: torch.Tensor) -> None:
        module(patches)

    if not batches[0].is_cuda:
        with ThreadPoolExecutor(CORES, initializer=use_one_core) as pool:
            list(pool.map(forward, todo))
    else:
        for patches in todo:
            forward(patches)
        torch.cuda.synchronize(batches[0].device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the floor of a slide.")
    parser.add_argument("slide", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--overlap", type=int, default=0, help="px between patches")
    parser.add_argument("--tissue", default="auto", help="auto, none or a mask image")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="try torch.compile, too")
    args = parser.parse_args()
    bundle = load_bundle(args.model)
    tissue = args.tissue if args.tissue in ("auto", "none") else Path(args.tissue)
    with open_source(args.slide) as slide:
        grid = grid_of(slide, bundle, overlap=args.overlap, tissue=tissue)
        view = slide.at(bundle.input.mpp, tolerance=MPP_TOLERANCE)
        tiles = tiles_under(args.slide, view, grid)
        patches = read_patches(view, grid)
    decode = decode_seconds(args.slide, tiles)
    forward, form = forward_seconds(
        bundle, patches, len(grid), args.device, with_compile=args.compile
    )
    facts = {
        "decode_seconds": decode,
        "tiles": len(tiles),
        "forward_seconds": forward,
        "form": form,
        "patches": len(grid),
        "floor_seconds": max(decode, forward),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
