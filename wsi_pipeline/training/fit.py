"""The optimisation: crops in, averaged weights out; killed at any time, it goes on."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import RecipeError, raised_as
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.networks import create
from wsi_pipeline.networks.base import SegmentationNetwork
from wsi_pipeline.networks.decoder import Decoder
from wsi_pipeline.networks.encoders import load_imagenet
from wsi_pipeline.networks.weights import load_state, read_state
from wsi_pipeline.training.augment import augment
from wsi_pipeline.training.crops import Sampler, Survey, random_crop
from wsi_pipeline.training.losses import network_loss
from wsi_pipeline.training.recipe import TRAITS, Recipe, TrainSpec
from wsi_pipeline.training.samples import Sample
from wsi_pipeline.training.state import TrainerState
from wsi_pipeline.training.validate import accuracy, mean_dice, measure

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from wsi_pipeline.training.features import Features

LOG_EVERY = 20
"""Steps between two rows of the history."""
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
LARGEST_GRADIENT = 5.0
"""Norm to which the gradients of a step are clipped."""

Progress = Callable[[int, int, float, float | None], None]
"""Told steps done, steps in all, the loss, and the best validation Dice so far, if any."""
Batch = tuple[Tensor, Tensor, Tensor | None]
"""Normalised images (N, C, *sides), truths (N, *sides), and labels (N,) where there are any."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSet:
    """Images to learn from, and for each where which class is."""

    samples: Sequence[Sample]
    surveys: Sequence[Survey]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A trained network.

    Attributes:
        network: With averaged weights, on the CPU, in eval mode.
        history: A row every few steps: step, loss, learning_rate, validation_dice,
            validation_accuracy of a network that classifies, and held_out_dice.
    """

    network: nn.Module
    history: list[dict[str, float]]


def open_fabric(recipe: Recipe, *, device: str = "auto", devices: int = 1) -> Fabric:
    """Return what puts networks and batches on one device or several, at a precision.

    Lightning's Fabric: gradients of several processes, mixed precision with its scaling, and no
    loop of its own, so that every step can be repeated.

    Args:
        device: "auto", "cpu" or "cuda".
        devices: Number of devices; each is a process that runs the same command.

    Raises:
        RecipeError: it is not installed, there are no such devices, or not at that precision.
    """
    if not find_spec("lightning_fabric"):
        raise RecipeError('no lightning-fabric here: pip install "wsi-pipeline[train]"')
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    wanted = "cuda" if device == "auto" and torch.cuda.is_available() else device
    if wanted == "cuda" and torch.cuda.device_count() < devices:
        raise RecipeError(f"{devices} GPUs are wanted, {torch.cuda.device_count()} are here")
    accelerator = "cpu" if wanted == "auto" else wanted
    if accelerator == "cpu" and recipe.train.precision == "fp16":
        raise RecipeError('train.precision is "fp16", which CPUs do not have; take bf16 or fp32')
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        # some networks hold weights that are never called, as the authors' checkpoints do
        strategy=DDPStrategy(find_unused_parameters=True) if devices > 1 else "auto",
        # not SLURM's tasks, which it would take for its processes
        plugins=[LightningEnvironment()],
        precision=PRECISIONS[recipe.train.precision],  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


def fit(
    recipe: Recipe,
    training_set: TrainingSet,
    *,
    validation: Sequence[Sample] = (),
    watched: Sequence[Sample] = (),
    fabric: Fabric | None = None,
    data_dir: Path | None = None,
    folder: Path | None = None,
    features: Features | None = None,
    crop_threads: int | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train the recipe's network; return it with averaged weights.

    Every step's random numbers follow from the seed and the step alone. So a training that is
    killed goes on from its last checkpoint and ends, on the same machine, with the same weights.

    Args:
        validation: Images of other patients: the weights that do best on them are kept, and the
            training ends when they do no better for long.
        watched: Images of held-out patients, judged as often, for the history alone.
        fabric: From `open_fabric`; None = the CPU.
        data_dir: Where `train.encoder` lies, where the recipe names one.
        folder: For checkpoints; what lies there is gone on from. None = without.
        features: Of a decoder, what its encoder gives of crops.
        crop_threads: How many threads make crops; None = one beside a CPU's network, which needs
            the cores, and all beside a GPU, which is through with a batch before a core makes one.
    """
    spec = recipe.train
    fabric = fabric or open_fabric(recipe, device="cpu")
    torch.manual_seed(spec.seed)
    network = new_network(recipe, data_dir or Path())
    if features and isinstance(network, Decoder):
        network.encoder = features.encoder
    if network.ndim == 2:
        # 15 % faster steps than the default on CPUs with AVX2
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.to(fabric.device)
    mean = get_ema_multi_avg_fn(spec.average)  # type: ignore[no-untyped-call]
    average = AveragedModel(network, multi_avg_fn=mean, use_buffers=True)
    averaged: nn.Module = average.module.eval()
    optimizer, schedule = _optimization(network, spec)
    model, optimizer = fabric.setup(network, optimizer)
    state = TrainerState(
        parts={
            "network": network,
            "average": average,
            "optimizer": optimizer,
            "schedule": schedule,
            # the scale of the loss, where the precision needs one
            "precision": fabric.strategy.precision,
        },
        folder=folder,
        is_writer=fabric.is_global_zero,
    )
    state.load()
    sampler = Sampler(training_set.samples, training_set.surveys, balance=spec.balance)
    size_multiple = network.size_multiple

    def batches(step: int) -> list[Batch]:
        return [
            features.batch(training_set.samples, (step, fabric.global_rank, part))
            if features
            else crop_batch(recipe, sampler, size_multiple, (step, fabric.global_rank, part))
            for part in range(spec.accumulate)
        ]

    threads = crop_threads or (1 if fabric.device.type == "cpu" else None)
    steps = map_in_threads(batches, range(state.step, spec.steps), threads=threads)
    # the next crops are made while the network learns from these
    with closing(steps):
        for parts in steps:
            if spec.patience and state.stale >= spec.patience:
                break
            rate = float(schedule.get_last_lr()[0])
            with raised_as(RecipeError, (RuntimeError, ValueError), "change batch_size or crop"):
                loss = learn(recipe, model, optimizer, parts, state.step, fabric)
            state.losses.append(loss)
            with warnings.catch_warnings():
                # where the scaler leaves out the first step, torch sees none before
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step")
                schedule.step()
            average.update_parameters(network)
            state.step += 1
            is_last = state.step == spec.steps
            is_time = is_last or state.step % spec.validate_every == 0
            is_look = is_time and bool(validation or watched)
            if is_last or is_look or state.step % LOG_EVERY == 0:
                state.log(rate)
            if is_look:
                look(averaged, recipe.bundle, state, validation, watched, fabric)
            if is_last or state.step % spec.checkpoint_every == 0:
                state.save()
            if progress:
                progress(state.step, spec.steps, loss, state.best)
    # Without validation patients the last average is all there is.
    if state.best_weights is not None:
        averaged.load_state_dict(state.best_weights)
    averaged.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Fitted(network=averaged, history=state.history)


def learn(
    recipe: Recipe, model: Any, optimizer: Any, parts: Sequence[Batch], step: int, fabric: Fabric
) -> float:
    """Do one step of the optimiser; return its loss.

    Raises:
        RecipeError: the loss, or a gradient that no scaling explains, is no number any more.
    """
    spec, total = recipe.train, 0.0
    optimizer.zero_grad()
    for i, (images, truths, labels) in enumerate(parts):
        # what dropout draws follows from the step
        torch.manual_seed(seed_of(spec.seed, step, fabric.global_rank, i))
        images = images.to(fabric.device)
        if images.ndim == 4:
            images = images.to(memory_format=torch.channels_last)
        with fabric.no_backward_sync(model, enabled=i + 1 < len(parts)):
            loss = network_loss(
                model(images),
                truths.to(fabric.device),
                None if labels is None else labels.to(fabric.device),
                recipe.bundle.activation,
                kind=spec.loss,
                label_weight=spec.label_weight,
            ) / len(parts)
            fabric.backward(loss)
        total += float(loss.detach())
    norm = fabric.clip_gradients(
        model, optimizer, max_norm=LARGEST_GRADIENT, error_if_nonfinite=False
    )
    assert norm is not None
    # of fp16 the scaler leaves out a step whose scaled gradients overflow, and halves the scale
    is_scaled = fabric.strategy.precision.precision == PRECISIONS["fp16"]
    if not math.isfinite(total) or not (is_scaled or norm.isfinite()):
        what = f"the loss is {total}" if not math.isfinite(total) else "a gradient is no number"
        raise RecipeError(
            f"step {step + 1}: {what}; lower train.learning_rate ({spec.learning_rate:g}), take "
            f'precision "fp32" ({spec.precision} now), or look for images of odd values'
        )
    optimizer.step()
    return total


def look(
    network: nn.Module,
    bundle: Bundle,
    state: TrainerState,
    validation: Sequence[Sample],
    watched: Sequence[Sample],
    fabric: Fabric,
) -> None:
    """Note how a network does on other patients than it learns from; keep it if it is the best."""
    if watched:
        dice = mean_dice(measure(network, bundle, watched), bundle)
        if not math.isnan(dice):
            state.history[-1]["held_out_dice"] = dice
    if validation:
        scores = measure(network, bundle, validation)
        if bundle.labels:
            state.history[-1]["validation_accuracy"] = accuracy(scores)
        dice = float(fabric.broadcast(mean_dice(scores, bundle)))
        state.compare(dice, network.state_dict())


def crop_batch(recipe: Recipe, sampler: Sampler, multiple: int, where: tuple[int, ...]) -> Batch:
    """Return crops and their truths; of a training those of a step, a process, a part of it."""
    spec, variation, wanted = recipe.train, recipe.augment, recipe.bundle.input
    # A generator for each batch: threads that make the next ones must not take turns by chance.
    generator = Generator().manual_seed(seed_of(spec.seed, *where))
    low, high = (side // multiple for side in spec.crop)
    size = multiple * int(torch.randint(low, high + 1, (), generator=generator))
    crops, labels = [], []
    for _ in range(spec.batch_size):
        sample, place = sampler.draw(generator)
        crops.append(random_crop(sample, place, size, variation, generator))
        labels.append(sample.label_of(crops[-1][1]))
    images, truths = map(torch.stack, zip(*crops, strict=True))
    images, truths = augment(
        images,
        truths,
        variation,
        generator,
        stained=TRAITS[recipe.bundle.modality].is_stained and wanted.channels == 3,
        bounded=wanted.scale != "zscore",
    )
    shape = (-1, *(1,) * (images.ndim - 2))
    mean, std = (torch.tensor(v).reshape(shape) for v in (wanted.mean, wanted.std))
    return (images - mean) / std, truths, torch.tensor(labels) if recipe.bundle.labels else None


def seed_of(*parts: int) -> int:
    """Return a seed that follows from whole numbers and is another for every others."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def new_network(recipe: Recipe, data_dir: Path) -> SegmentationNetwork:
    """Return the recipe's network with the weights that it begins with.

    Raises:
        RecipeError: a network that cannot be trained in this way, or has no such weights.
    """
    network = create(recipe.bundle)
    spec, multiple = recipe.train, network.size_multiple
    if any(side % multiple for side in spec.crop):
        raise RecipeError(
            f"train.crop {list(spec.crop)}: {recipe.bundle.network} takes multiples of {multiple}"
        )
    if recipe.bundle.encoder and spec.crop[0] != spec.crop[1]:
        raise RecipeError(
            f"train.crop {list(spec.crop)}: crops of a frozen encoder have one size; write "
            f"[{spec.crop[1]}, {spec.crop[1]}]"
        )
    if recipe.bundle.labels and "labels" not in inspect.signature(type(network)).parameters:
        raise RecipeError(
            f"output.labels {list(recipe.bundle.labels)}: {recipe.bundle.network} does not "
            "classify; write labels = [], and leave `label` out of the data"
        )
    if spec.batch_size < 2 and any(isinstance(m, nn.BatchNorm1d) for m in network.modules()):
        raise RecipeError(
            f"train.batch_size is 1: {recipe.bundle.network} normalises over a batch, of 2 or more"
        )
    encoder = dict(network.named_children()).get("encoder")
    if (start := recipe.start) is not None and start.weights_path is not None:
        state = read_state(start.weights_path, data=start.read_weights())
        load_state(network, state, path=start.weights_path, unused=network.unused)
    if spec.encoder:
        if encoder is None:
            name = type(network).__name__
            raise RecipeError(f"train.encoder: {name} has no encoder for it; leave the key out")
        load_imagenet(encoder, spec.encoder if "://" in spec.encoder else data_dir / spec.encoder)
    if encoder is not None and not spec.encoder_rate:
        # Its norms would follow the crops, and no rate holds these.
        encoder.eval().requires_grad_(False)
    return network


def _optimization(
    network: nn.Module, spec: TrainSpec
) -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler]:
    """Return the optimiser and its schedule: the encoder has a learning rate of its own."""
    groups: list[dict[str, Any]] = [
        {
            "params": [
                p
                for name, p in network.named_parameters()
                if (p.ndim > 1) == is_kernel and name.startswith("encoder.") == is_encoder
            ],
            "lr": spec.learning_rate * (spec.encoder_rate if is_encoder else 1),
            # kernels decay; biases and norms, which have one axis, do not
            "weight_decay": spec.weight_decay if is_kernel else 0.0,
        }
        for is_encoder in (False, True)
        for is_kernel in (True, False)
    ]
    kind = torch.optim.AdamW if spec.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind([group for group in groups if group["params"]])
    if spec.schedule == "one-cycle":
        # Else OneCycleLR would give the encoder the rate of the rest.
        rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer, lr_scheduler.OneCycleLR(
            optimizer, rates, total_steps=spec.steps, pct_start=spec.warm_up
        )
    if spec.schedule == "cosine":
        return optimizer, lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.505 + 0.495 * math.cos(math.pi * step / spec.steps)
        )
    if spec.schedule == "polynomial":
        return optimizer, lr_scheduler.PolynomialLR(optimizer, spec.steps, power=0.9)
    return optimizer, lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
