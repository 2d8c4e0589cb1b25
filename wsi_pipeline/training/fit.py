"""The optimisation: crops in, averaged weights out; killed at any time, it goes on."""

from __future__ import annotations

import inspect
import logging
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from collections.abc import Generator as Steps
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import writing
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.networks import create
from wsi_pipeline.networks.base import SegmentationNetwork
from wsi_pipeline.networks.encoders import load_imagenet
from wsi_pipeline.training.augment import augment
from wsi_pipeline.training.crops import Sampler, Survey, random_crop
from wsi_pipeline.training.losses import network_loss
from wsi_pipeline.training.recipe import Recipe, TrainSpec
from wsi_pipeline.training.samples import Sample
from wsi_pipeline.training.validate import accuracy, mean_dice, measure

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger(__name__)

LOG_EVERY = 20
"""Steps between two rows of the history."""
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
LARGEST_GRADIENT = 5.0
"""Norm to which the gradients of a step are clipped."""
LAST, BEST = "last.pt", "best.pt"

Progress = Callable[[int, int, float, float | None], None]
"""Told steps done, steps in all, the loss, and the best validation Dice so far, if any."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSet:
    """What is learnt from, looked through once.

    Attributes:
        samples: the images.
        surveys: of each, where which class is.
    """

    samples: Sequence[Sample]
    surveys: Sequence[Survey]


@dataclass(kw_only=True)
class TrainerState:
    """How far a training is; a checkpoint holds it.

    Attributes:
        step: done.
        history: rows of what happened.
        best: validation Dice of the best weights, None before the first look.
        stale: looks since then.
        losses: since the last row.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    stale: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A trained network.

    Attributes:
        network: with averaged weights, on the CPU, in eval mode.
        history: a row every few steps: step, loss, learning_rate, validation_dice,
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
        devices: how many; each is a process that runs the same command.

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
    progress: Progress | None = None,
) -> Fitted:
    """Train the recipe's network; return it with averaged weights.

    Every step's random numbers follow from the seed and the step alone. So a training that is
    killed goes on from its last checkpoint and ends, on the same machine, with the same weights.

    Args:
        fabric: from `open_fabric`; None = the CPU.
        data_dir: where `train.encoder` lies, where the recipe names one.
        folder: for checkpoints; what lies there is gone on from. None = without.
        progress: told after every step.
    """
    spec = recipe.train
    fabric = fabric or open_fabric(recipe, device="cpu")
    torch.manual_seed(spec.seed)
    network = create(recipe.bundle)
    _check_network(network, recipe)
    if spec.encoder:
        _start_from_imagenet(network, spec.encoder, data_dir or Path())
    if network.ndim == 2:  # 15 % faster steps than the default on CPUs with AVX2
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.to(fabric.device)
    mean = get_ema_multi_avg_fn(spec.average)  # type: ignore[no-untyped-call]
    average = AveragedModel(network, multi_avg_fn=mean, use_buffers=True)
    optimizer = _optimizer(network, spec)
    schedule = _schedule(optimizer, spec)
    model, optimizer = fabric.setup(network, optimizer)
    state = State(
        network=network, average=average, optimizer=optimizer, schedule=schedule, fabric=fabric
    )
    at = state.load(folder) if folder else TrainerState()
    sampler = Sampler(training_set.samples, training_set.surveys, balance=spec.balance)
    size_multiple = network.size_multiple

    def batches(step: int) -> list[Batch]:
        return [
            _batch(recipe, sampler, size_multiple, (step, fabric.global_rank, part))
            for part in range(spec.accumulate)
        ]

    steps = cast(
        "Steps[list[Batch]]",
        map_in_threads(batches, range(at.step, spec.steps), threads=_crop_threads(fabric)),
    )
    with closing(steps):  # the next crops are made while the network learns from these
        for parts in steps:
            if spec.patience and at.stale >= spec.patience:
                break
            rate = float(schedule.get_last_lr()[0])
            at.losses.append(learn(recipe, model, optimizer, parts, at.step, fabric))
            with warnings.catch_warnings():
                # where the scaler leaves out the first step, torch sees none before
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step")
                schedule.step()
            average.update_parameters(network)
            at.step += 1
            loss, is_last = at.losses[-1], at.step == spec.steps
            is_due = is_last or at.step % spec.validate_every == 0
            is_look = bool(validation or watched) and is_due
            if is_last or is_look or at.step % LOG_EVERY == 0:
                _log(at, rate)
            if is_look and watched:
                seen = measure(_ready(average), recipe.bundle, watched)
                if not math.isnan(dice := mean_dice(seen, recipe.bundle)):
                    at.history[-1]["held_out_dice"] = dice
            if is_look and validation:
                judged = measure(_ready(average), recipe.bundle, validation)
                if recipe.bundle.labels:
                    at.history[-1]["validation_accuracy"] = accuracy(judged)
                dice = mean_dice(judged, recipe.bundle)
                state.compare(at, float(fabric.broadcast(dice)), folder)
            if folder and (is_last or at.step % spec.checkpoint_every == 0):
                state.save(folder, at)
            if progress:
                progress(at.step, spec.steps, loss, at.best)
    trained = _ready(average)
    if state.best is not None:
        trained.load_state_dict(state.best)
    trained.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Fitted(network=trained, history=at.history)


Batch = tuple[Tensor, Tensor, Tensor | None]
"""Normalised images (N, C, *sides), truths (N, *sides), and labels (N,) where there are any."""


@dataclass(kw_only=True, eq=False)
class State:
    """All that changes from step to step, kept in checkpoints.

    Attributes:
        network: that learns.
        average: of its weights.
        optimizer: with its moments.
        schedule: of the learning rate.
        fabric: with the scale of the loss, where the precision needs one.
        best: averaged weights that did best on the validation patients, None before the first look.
    """

    network: nn.Module
    average: AveragedModel
    optimizer: Any
    schedule: lr_scheduler.LRScheduler
    fabric: Fabric
    best: dict[str, Tensor] | None = None

    def _parts(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "precision": self.fabric.strategy.precision,
        }

    def save(self, folder: Path, at: TrainerState) -> None:
        """Write the last checkpoint; it appears when it is complete."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        self._write(folder / LAST, parts | {"progressed": asdict(at)})

    def load(self, folder: Path) -> TrainerState:
        """Go back to the last checkpoint of a folder, where there is one; return how far it is.

        Raises:
            RecipeError: it is damaged.
        """
        if not (folder / LAST).is_file():
            return TrainerState()
        held = _read(folder / LAST)
        for name, part in self._parts().items():
            part.load_state_dict(held[name])
        at = TrainerState(**held["progressed"])
        if at.best is not None:
            self.best = _read(folder / BEST)
        return at

    def compare(self, at: TrainerState, dice: float, folder: Path | None) -> None:
        """Keep the averaged weights if they do better on the validation patients than any before.

        Args:
            at: told of it.
            dice: that they reach; NaN where those patients show no class.
            folder: for the best checkpoint, or None.
        """
        if math.isnan(dice):
            logger.warning("the validation patients show no class: no weights are chosen by them")
            return
        at.history[-1]["validation_dice"] = dice
        if at.best is not None and dice <= at.best:
            at.stale += 1
            return
        at.best, at.stale = dice, 0
        kept = self.average.module.state_dict()
        self.best = {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}
        if folder:
            self._write(folder / BEST, self.best)

    def _write(self, path: Path, held: dict[str, Any]) -> None:
        if self.fabric.is_global_zero:
            with writing(path), written_beside(path) as partial:
                torch.save(held, partial)


def _read(path: Path) -> dict[str, Any]:
    try:
        held: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RecipeError(f"the checkpoint {path} is damaged; train with --overwrite") from error
    return held


def _ready(average: AveragedModel) -> nn.Module:
    module: nn.Module = average.module
    return module.eval()


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
        # of dropout
        torch.manual_seed(_seed(spec.seed, step, fabric.global_rank, i))
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


def _crop_threads(fabric: Fabric) -> int | None:
    """Return how many threads make crops; None = as many as there are cores.

    A GPU is through with a batch several times faster than one core makes the next. On a CPU the
    network needs the cores.
    """
    return 1 if fabric.device.type == "cpu" else None


def _batch(recipe: Recipe, sampler: Sampler, multiple: int, where: tuple[int, ...]) -> Batch:
    """Return the crops of a step, of a process and of a part of it."""
    spec, variation = recipe.train, recipe.augment
    generator = Generator().manual_seed(_seed(spec.seed, *where))
    low, high = (side // multiple for side in spec.crop)
    size = multiple * int(torch.randint(low, high + 1, (), generator=generator))
    images, truths, labels = [], [], []
    for _ in range(spec.batch_size):
        sample, place = sampler.draw(generator)
        image, truth = random_crop(sample, place, size, variation, generator)
        images.append(image)
        truths.append(truth)
        labels.append(sample.label_of(truth))
    wanted = recipe.bundle.input
    stained = recipe.bundle.modality == "slide" and wanted.channels == 3
    batch, truth = augment(
        torch.stack(images),
        torch.stack(truths),
        variation,
        generator,
        stained=stained,
        bounded=wanted.scale != "zscore",
    )
    said = torch.tensor(labels) if recipe.bundle.labels else None
    shape = (-1, *(1,) * (batch.ndim - 2))
    mean, std = (torch.tensor(v).reshape(shape) for v in (wanted.mean, wanted.std))
    return (batch - mean) / std, truth, said


def _seed(*parts: int) -> int:
    """Return a seed that follows from whole numbers and is another for every others."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _log(at: TrainerState, rate: float) -> None:
    """Add a row to the history."""
    row = {"step": at.step, "loss": sum(at.losses) / len(at.losses), "learning_rate": rate}
    at.history.append(row)
    at.losses.clear()
    logger.info("step %d: loss %.3f", at.step, row["loss"])


def _check_network(network: SegmentationNetwork, recipe: Recipe) -> None:
    spec, multiple = recipe.train, network.size_multiple
    if any(side % multiple for side in spec.crop):
        raise RecipeError(
            f"train.crop {list(spec.crop)}: {recipe.bundle.network} takes multiples of {multiple}"
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


def _start_from_imagenet(network: nn.Module, location: str, data_dir: Path) -> None:
    encoder = dict(network.named_children()).get("encoder")
    if encoder is None:
        name = type(network).__name__
        raise RecipeError(f"train.encoder: {name} has no encoder for it; leave the key out")
    load_imagenet(encoder, location if "://" in location else data_dir / location)


def _optimizer(network: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """Return the optimiser: kernels decay; biases and norms, which have one axis, do not.

    The encoder's have a learning rate of their own.
    """
    encoder = spec.learning_rate * spec.encoder_rate
    groups: list[dict[str, Any]] = [
        {
            "params": [
                p
                for name, p in network.named_parameters()
                if (p.ndim > 1) == is_kernel and name.startswith("encoder.") == is_encoder
            ],
            "lr": encoder if is_encoder else spec.learning_rate,
            "weight_decay": spec.weight_decay if is_kernel else 0.0,
        }
        for is_encoder in (False, True)
        for is_kernel in (True, False)
    ]
    kind = torch.optim.AdamW if spec.optimizer == "adamw" else torch.optim.Adam
    return kind([group for group in groups if group["params"]])


def _schedule(optimizer: torch.optim.Optimizer, spec: TrainSpec) -> lr_scheduler.LRScheduler:
    match spec.schedule:
        case "one-cycle":
            return lr_scheduler.OneCycleLR(
                optimizer,
                [group["lr"] for group in optimizer.param_groups],
                total_steps=spec.steps,
                pct_start=spec.warm_up,
            )
        case "cosine":
            return lr_scheduler.LambdaLR(
                optimizer, lambda step: 0.505 + 0.495 * math.cos(math.pi * step / spec.steps)
            )
        case "polynomial":
            return lr_scheduler.PolynomialLR(optimizer, spec.steps, power=0.9)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
