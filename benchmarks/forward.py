"""How much faster the inference form of a network is than the plain one, on the CPU, in one run.

python benchmarks/forward.py --model models/lightmuseg-bcss-demo --patch 512

Ways over the same real tissue, in turns: the plain network on batches with all threads, as PyTorch
users run it; the plain network, one patch a core; and its inference form, one patch a core, as
`segment` runs it: without and with oneDNN's fused convolutions, in the number formats that bundle
and processor have. Rates are medians over the rounds, CPU times the least.

ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 before it makes the processor an older one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from skimage.data import immunohistochemistry
from torch import nn

from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.inference.patch_queue import use_one_core
from wsi_pipeline.inference.predictor import choose_dtype
from wsi_pipeline.networks import build, fold
from wsi_pipeline.networks.fold import for_inference
from wsi_pipeline.networks.quantise import load_ranges, quantise

CORES = len(os.sched_getaffinity(0))


def tissue(bundle: Bundle, side: int) -> torch.Tensor:
    """Return one normalised patch of real tissue, (1, 3, side, side)."""
    picture = np.tile(immunohistochemistry(), (-(-side // 512), -(-side // 512), 1))
    pixels = torch.from_numpy(picture[:side, :side].copy()).permute(2, 0, 1)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (bundle.input.mean, bundle.input.std))
    return ((pixels / 255 - mean) / std)[None]


def in_batches(network: nn.Module, patch: torch.Tensor, batch: int) -> Callable[[int], None]:
    """Return a function that predicts so many patches in batches, each with all threads."""
    patches = patch.repeat(batch, 1, 1, 1)

    def predict(count: int) -> None:
        torch.set_num_threads(CORES)
        with torch.inference_mode():
            for _ in range(count // batch):
                network(patches)

    return predict


def one_a_core(network: nn.Module, patch: torch.Tensor) -> Callable[[int], None]:
    """Return a function that predicts so many patches, one at a time on each core."""
    pool = ThreadPoolExecutor(CORES, initializer=use_one_core)
    patch = patch.contiguous(memory_format=torch.channels_last)
    patch = patch.to(next(network.parameters()).dtype)

    def one(_: int) -> None:
        with torch.inference_mode():
            network(patch)

    def predict(count: int) -> None:
        list(pool.map(one, range(count)))

    return predict


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a network's forms on the CPU.")
    parser.add_argument("--model", type=Path, default=Path("models/lightmuseg-bcss-demo"))
    parser.add_argument("--patch", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="of the plain network")
    parser.add_argument("--count", type=int, default=16, help="patches a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    bundle = load_bundle(args.model)
    plain, patch = build(bundle).module, tissue(bundle, args.patch)
    best = choose_dtype("auto", torch.device("cpu"))
    dtypes = {"fp32": torch.float32} | ({"bf16": best} if best is not torch.float32 else {})
    can_fuse, fold._can_fuse = fold._can_fuse, lambda _: False
    forms = {f"folded, {name}": for_inference(plain, dtype=d) for name, d in dtypes.items()}
    fold._can_fuse = can_fuse
    forms |= {f"fused, {name}": for_inference(plain, dtype=d) for name, d in dtypes.items()}
    if bundle.int8_path:
        forms["fused, int8"] = for_inference(plain)
        quantise(forms["fused, int8"], load_ranges(bundle))
    ways = {
        f"plain, fp32, batches of {args.batch}": in_batches(plain, patch, args.batch),
        "plain, fp32": one_a_core(plain, patch),
        **{name: one_a_core(form, patch) for name, form in forms.items()},
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    for predict in ways.values():
        predict(2 * args.batch)
    for _ in range(args.rounds):
        for name, predict in ways.items():
            begun, used = time.perf_counter(), time.process_time()
            predict(args.count)
            busy[name].append((time.process_time() - used) / args.count * 1000)
            rates[name].append(args.count / (time.perf_counter() - begun))
    first = statistics.median(next(iter(rates.values())))
    print(f"{bundle.name}, {args.patch} px, {CORES} cores")
    for name, found in rates.items():
        rate = statistics.median(found)
        told = f"{rate:6.2f} patches/s  × {rate / first:.2f}"
        print(f"{name:30s} {told}  {min(busy[name]):6.1f} ms of a core")


if __name__ == "__main__":
    main()
