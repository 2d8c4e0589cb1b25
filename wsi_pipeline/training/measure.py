"""How well a network does on images of patients it has not seen."""

from __future__ import annotations

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
from wsi_pipeline.training.samples import Sample

REGION = {2: 1024, 3: 256}
"""Side of what is predicted and counted at once, by the number of axes."""
Said = tuple[tuple[slice, ...], int]
"""Where a patch lies, and the index of the label that the network gave it."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Agreement of one class over all pixels of some images.

    Attributes:
        dice: 2 · overlap / (predicted + true).
        iou: overlap / union.
        share: of the class in the truth.
        everywhere_dice: Dice of the answer "this class everywhere".
    """

    dice: float
    iou: float
    share: float
    everywhere_dice: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """What was right and wrong in a patient's images; judgements of several may be added.

    Attributes:
        pixels: counts of the mask's.
        labels: (L, L) int64 patches, rows the true label, columns what the network said.
    """

    pixels: Tally
    labels: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, bundle: Bundle) -> Judged:
        """Return the judgement of nothing."""
        count = len(bundle.labels)
        return cls(
            pixels=Tally.empty(len(bundle.classes)), labels=np.zeros((count, count), np.int64)
        )

    def __add__(self, other: Judged) -> Judged:
        return Judged(pixels=self.pixels + other.pixels, labels=self.labels + other.labels)


def measure(network: nn.Module, bundle: Bundle, samples: Sequence[Sample]) -> dict[str, Judged]:
    """Predict whole images by overlapping patches; return what was right of each patient.

    Args:
        network: in eval mode.
        bundle: says patch size, overlap and normalisation.
        samples: to judge by; only what is known of them is predicted, region by region.
    """
    judged: dict[str, Judged] = {}
    for sample in samples:
        judged.setdefault(sample.patient, Judged.empty(bundle))
        for found in _judged(network, bundle, sample):
            judged[sample.patient] += found
    return judged


def _judged(network: nn.Module, bundle: Bundle, sample: Sample) -> Iterator[Judged]:
    """Yield what was right in the regions of a sample of which anything is known."""
    side = REGION[len(sample.shape)]
    whole = all(n <= 2 * side for n in sample.shape)
    blocks = iter_blocks(sample.shape, sample.shape if whole else (side,) * len(sample.shape))
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
        found, known = predict(network, bundle, image, said=said)[inside], truth[inside]
        judged = Judged.empty(bundle)
        for place, label in said:
            # around a region others are looked at, too; they count where they begin
            is_own = all(i.start <= p.start < i.stop for i, p in zip(inside, place, strict=True))
            if is_own and bool((truth[place] != IGNORE).any()):
                judged.labels[sample.label_of(truth[place]), label] += 1
        pixels = count_block(
            found.reshape(len(found), -1).numpy(),
            known.reshape(len(known), -1).numpy(),
            len(bundle.classes),
            tolerance_px=-1,  # borders are not asked for
        )
        yield replace(judged, pixels=pixels)


def _with_context(block: Block, shape: Shape, margin: Shape) -> tuple[Shape, Shape]:
    """Return a region's corners, a patch farther out as far as the image goes."""
    start = tuple(max(0, a - m) for a, m in zip(block.start, margin, strict=True))
    stop = tuple(min(n, b + m) for b, n, m in zip(block.stop, shape, margin, strict=True))
    return start, stop


def scores_of(tally: Tally, bundle: Bundle) -> dict[str, Score]:
    """Return each class's score but the background's; 0 where a figure has no meaning."""
    figures = class_figures(tally.confusion, tally.borders)
    true, pixels = tally.confusion.sum(1), max(1, int(tally.confusion.sum()))
    return {
        info.name: Score(
            dice=_or_nothing(figures["dice"][i]),
            iou=_or_nothing(figures["iou"][i]),
            share=int(true[i]) / pixels,
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
    """Return the share of all patients' patches that were given the right label."""
    labels = sum(found.labels for found in judged.values())
    return float(np.trace(labels) / np.sum(labels))


def _or_nothing(value: float) -> float:
    return 0.0 if value != value else float(value)


@torch.inference_mode()
def predict(
    network: nn.Module, bundle: Bundle, image: Tensor, *, said: list[Said] | None = None
) -> Tensor:
    """Predict one image of any size by the bundle's patches; return its mask.

    Args:
        network: in eval mode.
        bundle: says patch size, overlap and normalisation.
        image: (C, *shape), uint8 or float32 of full scale 1.
        said: gets what the network says of each patch as a whole, where the bundle has labels.

    Returns:
        (*shape) uint8 class index.
    """
    spec, device = bundle.input, next(iter(network.parameters()), image).device
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    shape = tuple(image.shape[1:])
    # what lies beyond a small image is mirrored at its middle, as often as needed
    padded = _padded(image, spec.patch_size)
    grid = PatchGrid.cover(tuple(padded.shape[1:]), spec.patch_size, spec.overlap)
    windows = Windows(grid, "gaussian", device)
    sigmoid = bundle.activation == "sigmoid"
    chances = torch.zeros(1 if sigmoid else len(bundle.classes), *grid.shape)
    weights = torch.zeros(grid.shape)
    for origin in map(tuple, grid.origins.tolist()):
        place = box_slices(origin, spec.patch_size)
        patch = normalise(padded[(slice(None), *place)][None].to(device), spec)
        answer = network(patch)
        if said is not None and bundle.labels:
            said.append((place, int(answer["label"][0].argmax())))
        logits = (answer["mask"] if isinstance(answer, Mapping) else answer)[0].float()
        weight = windows.weight(origin)
        part = (logits.sigmoid() if sigmoid else logits.softmax(0)) * weight
        chances[(slice(None), *place)] += part.cpu()
        weights[place] += weight.cpu()
    chances = (chances / weights)[(slice(None), *map(slice, shape))]
    found = chances[0] > 0.5 if sigmoid else chances.argmax(0)
    return found.to(torch.uint8)


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
