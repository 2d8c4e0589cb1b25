"""What a run will take, told before it: memory, time, disk and files. Figures were measured."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.files.paths import name_of
from wsi_pipeline.geometry import Shape
from wsi_pipeline.inference.ensemble import open_predictor
from wsi_pipeline.inference.predictor import choose_device, choose_dtype
from wsi_pipeline.networks import SegmentationNetwork, build, patches_per_pass
from wsi_pipeline.networks.cost import peak_memory
from wsi_pipeline.options import POLYGONS, PredictOptions, Settings
from wsi_pipeline.report.record import files_of
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.previous import refuse_others
from wsi_pipeline.run.segment import fitting, open_source_run
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.run.worker import LEAST_KEPT, MOST_KEPT
from wsi_pipeline.schedule.memory import cpu_count, free_memory, used_memory
from wsi_pipeline.schedule.threads import Threads
from wsi_pipeline.sources.shared import KEPT_BYTES

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

PROCESS_BYTES = 450 * 10**6
"""Python, torch and the libraries that read slides."""
GPU_BYTES = 1200 * 10**6
"""CUDA's own libraries in the main memory."""
OUTPUT_BYTES = 250 * 10**6
"""Pyramid, TIFF and overlay, written while the next slide's blocks are done."""
VERTEX_BYTES = 75
"""Of main memory, for each that is left of an outline."""
PX_PER_VERTEX = 300
"""Mask pixels on tissue for each vertex that is left, on real tissue; busy masks have many more."""
MOST_PLANES = 1024
"""Activations, in planes of a patch, which no network of the package reaches."""
PROGRAM_PLANES = 64
"""Activations of a program, of which none but its input is known, in planes of a patch."""
MASK_PX_BYTES = 16
"""Of a block: class, probability, number of the piece and what finding pieces takes."""
CELL_BYTES = 12
"""Of a class: the sum, its mean, and that rounded."""
GRID_PX_BYTES = {"slide": (9, 2), "image": (6, 1), "volume": (6, 1)}
"""Of a block: its pixels, the tiles that they are cut out of, and their way to the device; and how
many patches further than the block is read, by the model's modality."""
USED_SHARE = 0.8
"""Of the memory that is allowed, beyond which no more predictions are kept for later blocks."""
FREE_SHARE = 0.7
"""Of the free memory, which passes over images and volumes may take."""
DISK_PX_BYTES = 0.02
"""Mask pixel on tissue, compressed, in one format with its pyramid."""
DISK_CELL_BYTES = 0.9
"""Probability of one class at one place on tissue, likewise."""
DISK_VERTEX_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one slide takes.

    Attributes:
        patches: to predict.
        seconds: of prediction; reading goes on beside it.
        memory: bytes of the process at its peak.
        disk: bytes of all files.
        files: at most.
        mask_shape: pixels along each axis of the mask.
    """

    patches: int
    seconds: float
    memory: int
    disk: int
    files: int
    mask_shape: Shape


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """What a model takes.

    Attributes:
        weights: bytes of the weights.
        activations: of one patch in float32.
    """

    weights: float
    activations: float


def estimate(
    job: Job,
    bundle: Bundle,
    *,
    settings: Settings,
    workers: int = 1,
    blocks_in_hand: int = 2,
    threads: int | None = None,
    rate: float,
    model: ModelBytes,
    overwrite: bool = False,
) -> Estimate:
    """Return what a source will take, from its headers and thumbnail; nothing is written.

    Args:
        blocks_in_hand: of each.
        threads: of the CPU for one worker's forward passes; None = all.
        rate: patches per second, of all workers together.

    Raises:
        WsiPipelineError: the source, the model or the folder cannot be used.
    """
    settings = fitting(replace(settings, select=job.select(settings.select)), bundle)
    with open_source_run(job.path, bundle, settings) as run:
        if not overwrite:
            refuse_others(job, run.source.fingerprint, bundle)
        passes = passes_that_fit(model, threads or cpu_count(), free=free_memory())
        plan = run.lay_out(RunStore(folder=job.folder.absolute()), passes, keep=False)
        export, blocks, tissue_px = run.settings.export, len(plan.blocks()), _tissue_px(plan)
        mask_files = run.most_mask_files(plan)
    masks = 1 + ("tiff" in export.outputs) * (1 + (export.tiff == "asap"))
    masks += "dicom" in export.outputs
    disk = tissue_px * DISK_PX_BYTES * masks + blocks * 20_000 + 10_000_000
    disk += tissue_px / PX_PER_VERTEX * DISK_VERTEX_BYTES * len(POLYGONS & set(export.outputs))
    # A patch grid with a thumbnail of 4,096 px, key and lock; and the ledger.
    store = 90 + blocks
    zarrs = len({"zarr", "probability", "spatialdata"} & set(export.outputs))
    single = sum(map(len, files_of(export).values())) - zarrs + 1
    if plan.cell:
        cells = tissue_px * math.prod(plan.ratio) / plan.cell ** len(plan.ratio)
        # What blocks keep of them until they are put together is as large.
        disk += 2 * cells * (len(bundle.classes) - 1) * DISK_CELL_BYTES
        store += blocks
    return Estimate(
        patches=len(plan.grid),
        seconds=len(plan.grid) / rate,
        memory=_peak_memory(
            plan,
            bundle,
            model,
            workers=workers,
            blocks_in_hand=blocks_in_hand,
            allowed=free_memory() + used_memory(),
        )[0],
        disk=int(disk),
        files=mask_files + store + single,
        mask_shape=plan.mask_shape,
    )


def passes_that_fit(model: ModelBytes, threads: int, *, free: int) -> int:
    """Return how many passes at once, each on one core, fit into the memory; 1 at least.

    Args:
        free: bytes.
    """
    return max(1, min(threads, int(FREE_SHARE * free / model.activations)))


def most_model_bytes(bundle: Bundle) -> ModelBytes:
    """Return, at once, what the model certainly does not exceed."""
    parts = [part for one in bundle.members or (bundle,) for part in (one, one.encoder) if part]
    weights = sum(part.weights_path.stat().st_size for part in parts if part.weights_path)
    return ModelBytes(weights=weights, activations=_plane_bytes(bundle) * MOST_PLANES)


def model_bytes(bundle: Bundle) -> ModelBytes:
    """Return what the model takes; it is built for that and run on shapes, in a second or two."""
    if bundle.members:
        each = list(map(model_bytes, bundle.members))
        most = max(one.activations for one in each)
        return ModelBytes(weights=sum(one.weights for one in each), activations=most)
    module = build(bundle).module
    weights = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    size = (bundle.input.channels, *bundle.input.patch_size)
    if isinstance(module, SegmentationNetwork) and not bundle.encoder:
        return ModelBytes(weights=weights, activations=peak_memory(module, size) - weights)
    # Of an ONNX file torch sees none; it is kept beside what its runtime makes of it.
    if bundle.encoder or not weights:
        weights += 2 * len((bundle.encoder or bundle).read_weights())
    return ModelBytes(weights=weights, activations=_plane_bytes(bundle) * PROGRAM_PLANES)


def _plane_bytes(bundle: Bundle) -> int:
    return math.prod(bundle.input.patch_size) * 4


def patches_per_second(bundle: Bundle, predict: PredictOptions, *, threads: int) -> float:
    """Measure how many patches of noise a device predicts in a second; return it.

    Raises:
        BundleError: the model does not run.
    """
    predictor = open_predictor(bundle, predict, threads=threads)
    shape = (*bundle.input.patch_size, bundle.input.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    count = predictor.patches_at_once
    origins = np.zeros((count, len(bundle.input.patch_size)), np.int64)
    try:
        # The first time kernels are chosen and memory is got.
        for _ in range(2):
            start = time.perf_counter()
            region = predictor.upload(pixels)
            for probabilities in predictor.predict(region, origins):
                # A GPU is waited for.
                probabilities.flatten()[0].item()
            seconds = time.perf_counter() - start
    finally:
        predictor.close()
    return count / seconds


def _tissue_px(plan: Plan) -> float:
    """Return how many mask pixels the patches cover, about."""
    covered = len(plan.grid) * math.prod(plan.grid.stride) / math.prod(plan.ratio)
    return min(covered, math.prod(plan.mask_shape))


def _peak_memory(
    plan: Plan,
    bundle: Bundle,
    model: ModelBytes,
    *,
    workers: int,
    blocks_in_hand: int,
    allowed: int,
) -> tuple[int, int]:
    """Return the bytes that the process takes at its peak, about; each worker has a model.

    The second are those that each worker keeps of predictions for later blocks: what these need,
    if as much is left of what is allowed.
    """
    predict, threads = plan.predict, plan.threads
    device = choose_device(predict.device)
    patch, channels = bundle.input.patch_size, len(bundle.classes)
    patch_bytes = channels * math.prod(patch) * 4
    grid_px, reach = GRID_PX_BYTES[bundle.modality]
    block_shape = tuple(min(b, max(plan.mask_shape)) for b in plan.block_shape)
    sides = [b * r + reach * p for b, r, p in zip(block_shape, plan.ratio, patch, strict=True)]
    bands = 2 * patch[0] * math.prod(sides[1:]) * (channels + 1) * 4
    block = math.prod(block_shape) * MASK_PX_BYTES + math.prod(sides) * grid_px
    if plan.cell:
        cells = math.prod(b * r / plan.cell for b, r in zip(block_shape, plan.ratio, strict=True))
        block += cells * (channels - 1) * CELL_BYTES
    total = PROCESS_BYTES + OUTPUT_BYTES + workers * blocks_in_hand * block
    total += _tissue_px(plan) / PX_PER_VERTEX * VERTEX_BYTES
    kept = plan.straddling * (1 if bundle.activation == "sigmoid" else channels) * 4
    if device.type == "cpu":
        dtype, each = choose_dtype(predict.precision, device, bundle), model.activations
        batch = predict.batch_size or patches_per_pass(bundle, dtype)
        if dtype is not torch.float32:
            # They are counted in fp32; the other formats take half.
            each /= 2
        # Finished predictions of each block wait for their turn beside those that are made.
        sides = [b / s + 1 for b, s in zip(sides, plan.grid.stride, strict=True)]
        ahead = min((threads + 1) * batch, math.prod(sides))
        made = (threads * batch + blocks_in_hand * ahead) * patch_bytes
        total += workers * (2 * model.weights + threads * batch * each + made + bands)
        left = int(USED_SHARE * allowed - total) // workers
        kept = min(kept, max(left, LEAST_KEPT), MOST_KEPT)
        total += workers * kept
    else:
        total += GPU_BYTES + workers * model.weights
    return int(total), kept


def beside(one: int, other: int) -> int:
    """Return the bytes of a process in which two models take so much; 0 = there is but one."""
    return one + other - PROCESS_BYTES - OUTPUT_BYTES + KEPT_BYTES if one else other


def memory_check(
    client: Client | Threads, bundle: Bundle, max_ram: int | None
) -> Callable[[Plan, list[int]], int | None]:
    """Return what refuses a source that will take more memory than allowed, or warns of it.

    It is told what other models take beside this one, adds what this one does, and returns how many
    bytes of predictions each worker may keep, None = as workers elsewhere like.
    """
    # Workers elsewhere have limits of their own.
    if not isinstance(client, Threads):
        return lambda plan, taken: None
    workers, in_hand = client.workers, client.in_hand
    lower = "lower --workers, --block-size or --batch-size"
    peak = partial(_peak_memory, bundle=bundle, workers=workers, blocks_in_hand=in_hand)
    most, exact = most_model_bytes(bundle), cache(partial(model_bytes, bundle))

    def check(plan: Plan, taken: list[int]) -> int:
        free, others = free_memory() + used_memory(), sum(taken)
        allowed = min(free, max_ram or free) - others
        needed, kept = peak(plan, model=most, allowed=allowed)
        if needed <= USED_SHARE * allowed:
            # What the model certainly does not exceed is enough to know: no time is lost.
            taken.append(needed - PROCESS_BYTES - OUTPUT_BYTES)
            return kept
        needed, kept = peak(plan, model=exact(), allowed=allowed)
        taken.append(needed - PROCESS_BYTES - OUTPUT_BYTES)
        needed += others
        if max_ram is not None and needed > max_ram:
            raise WsiPipelineError(
                f"about {needed / 1e9:.1f} GB of memory are needed, --max-ram allows "
                f"{max_ram / 1e9:.1f} GB; {lower}"
            )
        if needed > free:
            logger.warning(
                "%s takes about %.1f GB of memory, %.1f GB are free; %s",
                name_of(plan.pixels.path), needed / 1e9, free / 1e9, lower,
            )  # fmt: skip
        return kept

    return check


def passes_at_once(bundle: Bundle, wanted: int) -> int:
    """Return how many forward passes at once, each on one core, fit into the free memory."""
    free = free_memory()
    passes = passes_that_fit(most_model_bytes(bundle), wanted, free=free)
    # What a model really takes costs a second or two to find out.
    return passes if passes == wanted else passes_that_fit(model_bytes(bundle), wanted, free=free)
