"""How well a network does on images of patients it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.evaluation.confusion import IGNORE, Confusion, class_figures, count_block
from wsi_pipeline.geometry import PatchGrid, Shape, box_slices, iter_blocks
from wsi_pipeline.inference.blend import Windows, iter_blended_rows
from wsi_pipeline.inference.predictor import Predictor
from wsi_pipeline.inference.unlike import Familiar
from wsi_pipeline.training.samples import UNLABELLED, Sample

REGION = {2: 1024, 3: 256}
"""Side of what is predicted and counted at once, by the number of axes."""
GPU_BATCH = 4
"""Patches in one pass on a GPU."""
SAMPLED = (64, 4096, 1 << 16)
"""Pixels of an image whose certainty is kept: at least, at most, and of all images together."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Agreement of one class over all pixels of some images.

    Attributes:
        dice: 2 · overlap / (predicted + true); NaN where the truth does not show the class.
        iou: overlap / union; likewise.
        share: Share of the class in the truth.
        called: Share of what is known that was called the class.
        everywhere_dice: Dice of the answer "this class everywhere"; NaN as that.
    """

    dice: float
    iou: float
    share: float
    called: float
    everywhere_dice: float


@dataclass(frozen=True, kw_only=True, eq=False)
class PatientScore:
    """What was right and wrong in a patient's images; scores of several may be added.

    Attributes:
        pixels: Counts of the mask's pixels.
        labels: (L, L) int64 patches, rows the true label, columns the likeliest.
        images: Name and (K, K) counts of its mask's pixels, of each image.
        label_chances: (n, 1 + L) of each patch, its true label and the probability of each.
        pixel_chances: (n, 1 + K) of pixels drawn at random, the true class and the logarithm of the
            probability of each.
        features: (n, C) of what patches look like to the network, of each region.
        distances: (n,) of patches from the tissue that others show, see `Familiar`.
    """

    pixels: Confusion
    labels: npt.NDArray[np.int64]
    images: tuple[tuple[str, npt.NDArray[np.int64]], ...]
    label_chances: npt.NDArray[np.float64]
    pixel_chances: npt.NDArray[np.float64]
    features: tuple[npt.NDArray[np.float32], ...] = ()
    distances: npt.NDArray[np.floating] = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def empty(cls, bundle: Bundle) -> PatientScore:
        """Return the score of nothing."""
        count = len(bundle.labels)
        return cls(
            pixels=Confusion.empty(len(bundle.classes)),
            labels=np.zeros((count, count), np.int64),
            images=(),
            label_chances=np.zeros((0, 1 + count)),
            pixel_chances=np.zeros((0, 1 + len(bundle.classes))),
        )

    def __add__(self, other: PatientScore) -> PatientScore:
        return PatientScore(
            pixels=self.pixels + other.pixels,
            labels=self.labels + other.labels,
            images=self.images + other.images,
            label_chances=np.concatenate([self.label_chances, other.label_chances]),
            pixel_chances=np.concatenate([self.pixel_chances, other.pixel_chances]),
            features=self.features + other.features,
            distances=np.concatenate([self.distances, other.distances]),
        )


def measure(
    network: nn.Module, bundle: Bundle, samples: Sequence[Sample]
) -> dict[str, PatientScore]:
    """Predict images as `segment` does, patch by patch; return what was right of each patient.

    The network is in eval mode. Only what is known of an image is predicted, region by region.
    """
    scores: dict[str, PatientScore] = {}
    least, most, together = SAMPLED
    count = min(max(together // max(1, len(samples)), least), most)
    with closing(open_predictor(network, bundle)) as predictor:
        for sample in samples:
            whole = sum(_regions(predictor, sample, count), start=PatientScore.empty(bundle))
            image = replace(whole, images=((sample.name, whole.pixels.matrix),))
            scores[sample.patient] = scores.get(sample.patient, PatientScore.empty(bundle)) + image
    return scores


def _regions(predictor: Predictor, sample: Sample, count: int) -> Iterator[PatientScore]:
    """Yield what was right in the regions of a sample of which anything is known.

    Args:
        count: Pixels of which the certainty is kept.
    """
    bundle = predictor.bundle
    grid = PatchGrid.cover(sample.shape, bundle.input.patch_size, bundle.input.overlap)
    side = REGION[len(sample.shape)]
    # At one go where it fits: patches over a cut are predicted for both of its sides.
    whole = all(n <= 2 * side for n in sample.shape)
    blocks = list(iter_blocks(sample.shape, sample.shape if whole else (side,) * len(sample.shape)))
    for block in blocks:
        if not sample.source.may_know(block.start, block.shape):
            continue
        touching = np.isin(np.arange(len(grid)), grid.touching(block.start, block.stop))
        patches = grid.keep(touching)
        low = patches.origins.min(0)
        size = np.minimum(patches.origins.max(0) + grid.patch_size, sample.shape) - low
        image, truth = sample.read(tuple(low.tolist()), tuple(size.tolist()))
        if not bool((truth != IGNORE).any()):
            continue
        of_patches, features = list[Tensor](), list[Tensor]()
        certain = chances(
            predictor,
            image,
            grid=patches,
            box=(block.start, block.stop),
            outside=sample.outside,
            labels=of_patches,
            features=features,
        )
        known = truth[box_slices(block.start - low, block.shape)]
        score, rows = PatientScore.empty(bundle), []
        # around a region others are looked at, too; they count where they begin
        begun = (patches.origins >= block.start) & (patches.origins < block.stop)
        own = np.all(begun, axis=1)
        # there are none of networks without labels
        for is_own, origin, of_labels in zip(own, patches.origins, of_patches, strict=False):
            part = truth[box_slices(origin - low, grid.patch_size)]
            true = sample.label_of(part)
            if is_own and true != UNLABELLED and bool((part != IGNORE).any()):
                score.labels[true, int(of_labels.argmax())] += 1
                rows.append([true, *of_labels.tolist()])
        # pixels drawn at random: the true class, the logarithm of the probability of each
        # They are kept until temperatures are fitted: all of a slide would be too many.
        places = np.flatnonzero((known != IGNORE).numpy())
        drawn = np.random.default_rng(block.start).permutation(places)[: -(-count // len(blocks))]
        values = certain.flatten(1)[:, drawn].double()
        values = torch.cat([1 - values, values]) if len(values) == 1 else values
        kept = torch.cat([known.flatten()[drawn].double()[None], values.clamp_min(1e-9).log()])
        yield replace(
            score,
            pixels=count_block(
                decided(certain).numpy(), known.numpy(), len(bundle.classes), tolerance_px=None
            ),
            label_chances=np.array(rows).reshape(-1, 1 + len(bundle.labels)),
            pixel_chances=kept.T.numpy(),
            features=(torch.stack(features).cpu().numpy()[own],) if features else (),
        )


def familiar_of(network: nn.Module, bundle: Bundle, samples: Sequence[Sample]) -> Familiar | None:
    """Return what the tissue of patients who show a class looks like, None where too few do.

    With the others', who are there to show what is none, nearly all would be familiar.
    """
    found = measure(network, bundle, samples).values()
    showing = [s.features for s in found if s.pixels.matrix[1:].any() and s.features]
    return Familiar.of([np.concatenate(features) for features in showing])


def scores_of(confusion: Confusion, bundle: Bundle) -> dict[str, Score]:
    """Return each class's score but the background's."""
    figures = class_figures(confusion)
    found, true = confusion.matrix.sum(0), confusion.matrix.sum(1)
    pixels = max(1, int(true.sum()))
    return {
        info.name: Score(
            dice=float(figures["dice"][i]),
            iou=float(figures["iou"][i]),
            share=int(true[i]) / pixels,
            called=int(found[i]) / pixels,
            everywhere_dice=2 * int(true[i]) / (pixels + int(true[i])) if true[i] else math.nan,
        )
        for i, info in enumerate(bundle.classes)
        if i > 0
    }


def mean_dice(scores: Mapping[str, PatientScore], bundle: Bundle) -> float:
    """Return the mean, over the classes that there are, of the Dice of all pixels; NaN of none."""
    whole = sum(scores.values(), start=PatientScore.empty(bundle)).pixels
    shown = [s.dice for s in scores_of(whole, bundle).values() if s.share > 0]
    return sum(shown) / len(shown) if shown else math.nan


def accuracy(scores: Mapping[str, PatientScore]) -> float:
    """Return the share of all patients' patches that were given the right label, NaN of none."""
    labels = sum(found.labels for found in scores.values())
    return float(np.trace(labels) / np.sum(labels)) if np.any(labels) else math.nan


def decided(certain: Tensor) -> Tensor:
    """Return the likeliest class, (*shape) uint8, of (K, *shape) probabilities; one is a class's.

    Example:
        >>> decided(torch.tensor([[0.2, 0.7]])).tolist()
        [0, 1]
    """
    found = certain[0] > 0.5 if len(certain) == 1 else certain.argmax(0)
    return found.to(torch.uint8)


def open_predictor(network: nn.Module, bundle: Bundle) -> Predictor:
    """Return what predicts as `segment --precision fp32` does, by a network where it lies.

    Close it. In fp32 the figures are the same on all machines.
    """
    device = next(network.parameters(), torch.empty(0)).device
    return Predictor(
        bundle,
        device=str(device),
        precision="fp32",
        # not what fits, which changes with a GPU's free memory, and with it how sums are rounded
        batch_size=None if device.type == "cpu" else GPU_BATCH,
        threads=torch.get_num_threads(),
        network=network,
    )


@torch.inference_mode()
def chances(
    predictor: Predictor,
    image: Tensor,
    *,
    grid: PatchGrid | None = None,
    box: tuple[Shape, Shape] | None = None,
    outside: float | None = None,
    labels: list[Tensor] | None = None,
    features: list[Tensor] | None = None,
) -> Tensor:
    """Predict an image of any size, or a box of one, by overlapping patches; return probabilities.

    They are blended, (K, *box) float32 on the CPU; K = 1 with sigmoid.

    Args:
        image: (C, *shape), uint8 or float32 of full scale 1, from the first pixel of the patches'.
        grid: The patches of the box alone, laid over the whole image; None = over this one.
        box: First pixel and one past the last in the whole image; None = all of this one.
        outside: Value of what lies beyond an image smaller than a patch; None = it is mirrored.
        labels: Gets (L,) probabilities of the labels of each patch in turn, where there are any.
        features: Gets (C,) of what each patch looks like, likewise.
    """
    spec, shape = predictor.bundle.input, tuple(image.shape[1:])
    grid = grid or PatchGrid.cover(shape, spec.patch_size, spec.overlap)
    start, stop = box or ((0,) * len(shape), shape)
    pixels = image.movedim(0, -1).numpy()
    beyond = [(0, max(0, p - n)) for p, n in zip(spec.patch_size, shape, strict=True)] + [(0, 0)]
    if outside is None:
        pixels = np.pad(pixels, beyond, mode="symmetric")
    else:
        pixels = np.pad(pixels, beyond, constant_values=outside)
    region = predictor.upload(np.ascontiguousarray(pixels))
    patches = predictor.predict(
        region, grid.origins - grid.origins.min(0), labels=labels, features=features
    )
    bands = iter_blended_rows(
        zip(map(tuple, grid.origins.tolist()), patches, strict=True),
        start,
        stop,
        windows=Windows(grid, "gaussian", predictor.device),
        patch_rows=spec.patch_size[0],
        channels=predictor.channels,
        device=predictor.device,
    )
    # each band is overwritten by the next
    done = [predictor.activated(band).to("cpu", copy=True) for _, band in bands]
    return torch.cat(done, dim=1)
