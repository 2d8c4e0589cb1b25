"""How well a network does on images of patients it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsi_pipeline.blend import Windows
from wsi_pipeline.bundle import Bundle, InputSpec
from wsi_pipeline.evaluation.metrics import IGNORE, Tally, class_figures, count_block
from wsi_pipeline.grid import Block, PatchGrid, Shape, box_slices, iter_blocks
from wsi_pipeline.training.samples import UNLABELLED, Sample

REGION = {2: 1024, 3: 256}
"""Side of what is predicted and counted at once, by the number of axes."""
SAMPLED = (64, 4096, 1 << 16)
"""Pixels of an image whose certainty is kept: at least, at most, and of all images together."""
Said = tuple[tuple[slice, ...], list[float]]
"""Where a patch lies, and the probability that the network gave each label."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Agreement of one class over all pixels of some images.

    Attributes:
        dice: 2 · overlap / (predicted + true).
        iou: overlap / union.
        share: of the class in the truth.
        called: share of what is known that was called the class.
        everywhere_dice: Dice of the answer "this class everywhere".
    """

    dice: float
    iou: float
    share: float
    called: float
    everywhere_dice: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """What was right and wrong in a patient's images; judgements of several may be added.

    Attributes:
        pixels: counts of the mask's.
        labels: (L, L) int64 patches, rows the true label, columns what the network said.
        images: of each, its name and (K, K) counts of its mask's pixels.
        said: (n, 1 + L) of each patch, its true label and the probability of each.
        sampled: (n, 1 + K) of pixels drawn at random, the true class and the logarithm of the
            probability of each.
    """

    pixels: Tally
    labels: npt.NDArray[np.int64]
    images: tuple[tuple[str, npt.NDArray[np.int64]], ...]
    said: npt.NDArray[np.float64]
    sampled: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, bundle: Bundle) -> Judged:
        """Return the judgement of nothing."""
        count = len(bundle.labels)
        return cls(
            pixels=Tally.empty(len(bundle.classes)),
            labels=np.zeros((count, count), np.int64),
            images=(),
            said=np.zeros((0, 1 + count)),
            sampled=np.zeros((0, 1 + len(bundle.classes))),
        )

    def __add__(self, other: Judged) -> Judged:
        return Judged(
            pixels=self.pixels + other.pixels,
            labels=self.labels + other.labels,
            images=self.images + other.images,
            said=np.concatenate([self.said, other.said]),
            sampled=np.concatenate([self.sampled, other.sampled]),
        )


def measure(network: nn.Module, bundle: Bundle, samples: Sequence[Sample]) -> dict[str, Judged]:
    """Predict whole images by overlapping patches; return what was right of each patient.

    Args:
        network: in eval mode.
        bundle: says patch size, overlap and normalisation.
        samples: to judge by; only what is known of them is predicted, region by region.
    """
    judged: dict[str, Judged] = {}
    least, most, together = SAMPLED
    count = min(max(together // max(1, len(samples)), least), most)
    for sample in samples:
        whole = sum(_judged(network, bundle, sample, count), start=Judged.empty(bundle))
        image = replace(whole, images=((sample.name, whole.pixels.confusion),))
        judged[sample.patient] = judged.get(sample.patient, Judged.empty(bundle)) + image
    return judged


def _judged(network: nn.Module, bundle: Bundle, sample: Sample, count: int) -> Iterator[Judged]:
    """Yield what was right in the regions of a sample of which anything is known.

    Args:
        network: as in `measure`.
        bundle: likewise.
        sample: to judge by.
        count: of the pixels whose certainty is kept.
    """
    side = REGION[len(sample.shape)]
    whole = all(n <= 2 * side for n in sample.shape)
    blocks = list(iter_blocks(sample.shape, sample.shape if whole else (side,) * len(sample.shape)))
    for block in blocks:
        if not sample.source.may_know(block.start, block.shape):
            continue
        start, stop = _with_context(block, sample.shape, bundle.input.patch_size)
        image, truth = sample.read(start, tuple(b - a for a, b in zip(start, stop, strict=True)))
        if not bool((truth != IGNORE).any()):
            continue
        inside = tuple(
            slice(a - s, b - s) for a, b, s in zip(block.start, block.stop, start, strict=True)
        )
        said: list[Said] = []
        certain = chances(network, bundle, image, said=said)[(slice(None), *inside)]
        found, known = decided(certain), truth[inside]
        judged, rows = Judged.empty(bundle), []
        for place, of_labels in said:
            # around a region others are looked at, too; they count where they begin
            is_own = all(i.start <= p.start < i.stop for i, p in zip(inside, place, strict=True))
            true = sample.label_of(truth[place])
            if is_own and true != UNLABELLED and bool((truth[place] != IGNORE).any()):
                judged.labels[true, int(np.argmax(of_labels))] += 1
                rows.append([true, *of_labels])
        pixels = count_block(
            found.reshape(len(found), -1).numpy(),
            known.reshape(len(known), -1).numpy(),
            len(bundle.classes),
            tolerance_px=-1,  # borders are not asked for
        )
        yield replace(
            judged,
            pixels=pixels,
            said=np.array(rows).reshape(-1, 1 + len(bundle.labels)),
            sampled=_drawn(certain, known, -(-count // len(blocks)), seed=block.start),
        )


def _drawn(
    certain: Tensor, truth: Tensor, count: int, *, seed: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Return the true class and the logarithm of each class's probability of some known pixels.

    Args:
        certain: (K, *shape) probabilities; K = 1 with sigmoid.
        truth: (*shape) class index, or IGNORE.
        count: of the pixels, at most.
        seed: of the choice.
    """
    places = np.flatnonzero((truth != IGNORE).numpy())
    places = np.random.default_rng(seed).permutation(places)[:count]
    values = certain.flatten(1)[:, places].double()
    values = torch.cat([1 - values, values]) if len(values) == 1 else values
    true = truth.flatten()[places].double()[None]
    return torch.cat([true, values.clamp_min(1e-9).log()]).T.numpy()


def _with_context(block: Block, shape: Shape, margin: Shape) -> tuple[Shape, Shape]:
    """Return a region's corners, a patch farther out as far as the image goes."""
    start = tuple(max(0, a - m) for a, m in zip(block.start, margin, strict=True))
    stop = tuple(min(n, b + m) for b, n, m in zip(block.stop, shape, margin, strict=True))
    return start, stop


def scores_of(tally: Tally, bundle: Bundle) -> dict[str, Score]:
    """Return each class's score but the background's; 0 where a figure has no meaning."""
    figures = class_figures(tally.confusion, tally.borders)
    found, true = tally.confusion.sum(0), tally.confusion.sum(1)
    pixels = max(1, int(true.sum()))
    return {
        info.name: Score(
            dice=_or_nothing(figures["dice"][i]),
            iou=_or_nothing(figures["iou"][i]),
            share=int(true[i]) / pixels,
            called=int(found[i]) / pixels,
            everywhere_dice=2 * int(true[i]) / (pixels + int(true[i])),
        )
        for i, info in enumerate(bundle.classes)
        if i > 0
    }


def mean_dice(judged: Mapping[str, Judged], bundle: Bundle) -> float:
    """Return the mean over the classes of the Dice of all patients' pixels together."""
    scores = scores_of(sum(judged.values(), start=Judged.empty(bundle)).pixels, bundle)
    return sum(s.dice for s in scores.values()) / len(scores)


def accuracy(judged: Mapping[str, Judged]) -> float:
    """Return the share of all patients' patches that were given the right label, NaN of none."""
    labels = sum(found.labels for found in judged.values())
    return float(np.trace(labels) / np.sum(labels)) if np.any(labels) else math.nan


def _or_nothing(value: float) -> float:
    return 0.0 if value != value else float(value)


def predict(network: nn.Module, bundle: Bundle, image: Tensor) -> Tensor:
    """Predict one image as `chances` does; return its mask, (*shape) uint8 class index."""
    return decided(chances(network, bundle, image))


def decided(certain: Tensor) -> Tensor:
    """Return the likeliest class, (*shape) uint8, of (K, *shape) probabilities; one is a class's.

    Example:
        >>> decided(torch.tensor([[0.2, 0.7]])).tolist()
        [0, 1]
    """
    found = certain[0] > 0.5 if len(certain) == 1 else certain.argmax(0)
    return found.to(torch.uint8)


@torch.inference_mode()
def chances(
    network: nn.Module, bundle: Bundle, image: Tensor, *, said: list[Said] | None = None
) -> Tensor:
    """Predict one image of any size by the bundle's patches; return its probabilities.

    Args:
        network: in eval mode.
        bundle: says patch size, overlap and normalisation.
        image: (C, *shape), uint8 or float32 of full scale 1.
        said: gets what the network says of each patch as a whole, where the bundle has labels.

    Returns:
        (K, *shape) float32; K = 1 with sigmoid.
    """
    spec, device = bundle.input, next(iter(network.parameters()), image).device
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    shape = tuple(image.shape[1:])
    # what lies beyond a small image is mirrored at its middle, as often as needed
    padded = _padded(image, spec.patch_size)
    grid = PatchGrid.cover(tuple(padded.shape[1:]), spec.patch_size, spec.overlap)
    windows = Windows(grid, "gaussian", device)
    sigmoid = bundle.activation == "sigmoid"
    total = torch.zeros(1 if sigmoid else len(bundle.classes), *grid.shape)
    weights = torch.zeros(grid.shape)
    for origin in map(tuple, grid.origins.tolist()):
        place = box_slices(origin, spec.patch_size)
        patch = normalise(padded[(slice(None), *place)][None].to(device), spec)
        answer = network(patch)
        if said is not None and bundle.labels:
            said.append((place, answer["label"][0].float().softmax(0).tolist()))
        logits = (answer["mask"] if isinstance(answer, Mapping) else answer)[0].float()
        logits = logits / bundle.temperature
        weight = windows.weight(origin)
        part = (logits.sigmoid() if sigmoid else logits.softmax(0)) * weight
        total[(slice(None), *place)] += part.cpu()
        weights[place] += weight.cpu()
    return (total / weights)[(slice(None), *map(slice, shape))]


def _padded(image: Tensor, least: Shape) -> Tensor:
    """Return an image at least as large as a patch."""
    for axis, side in enumerate(least, 1):
        length = image.shape[axis]
        if length < side:
            there_and_back = torch.cat([torch.arange(length), torch.arange(length).flip(0)])
            image = image.index_select(axis, there_and_back[torch.arange(side) % (2 * length)])
    return image


def normalise(images: Tensor, spec: InputSpec) -> Tensor:
    """Return images of full scale 1, (N, C, *sides), less the mean and over the deviation."""
    shape = (-1, *(1,) * (images.ndim - 2))
    mean = torch.tensor(spec.mean, device=images.device).reshape(shape)
    return (images - mean) / torch.tensor(spec.std, device=images.device).reshape(shape)
