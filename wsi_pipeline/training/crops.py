"""Where to look: patients and classes drawn evenly, then a crop, turned and scaled."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor
from torch.nn import functional

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.geometry import Shape, iter_blocks
from wsi_pipeline.training.recipe import AugmentSpec
from wsi_pipeline.training.samples import IGNORE, Sample

BLOCK_SIDE = {2: 1024, 3: 128}
"""Side of what is looked through at once for places, by the number of axes."""
KEPT = 64
"""Places of each class that are kept of a block."""

Places = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """Where in a sample which class is.

    Attributes:
        counts: (blocks, K) int64 pixels.
        places: Some pixels, (n, d) int32, of each block and class.
        digest: Hash of the truth.
    """

    counts: npt.NDArray[np.int64]
    places: list[list[Places]]
    digest: str

    @property
    def totals(self) -> npt.NDArray[np.int64]:
        """Return (K,) pixels of each class."""
        return np.asarray(self.counts.sum(0))


def survey(sample: Sample, n_classes: int) -> Survey:
    """Look through a sample's truth, block by block; return where which class is."""
    side = BLOCK_SIDE[len(sample.shape)]
    # A block of nothing first, for images of which nothing is known.
    counts, places = [np.zeros(n_classes, np.int64)], [[np.empty((0, 0), np.int32)] * n_classes]
    digest = hashlib.sha256(str(sample.shape).encode())
    for block in iter_blocks(sample.shape, (side,) * len(sample.shape)):
        if not sample.source.may_know(block.start, block.shape):
            continue
        truth = sample.source.read_truth(block.start, block.shape).numpy()
        digest.update(f"{block.name}".encode())
        digest.update(np.ascontiguousarray(truth).tobytes())
        found = np.bincount(truth[truth != IGNORE].ravel(), minlength=n_classes)
        counts.append(found[:n_classes])
        # By the block's place: the same pixels whatever was looked through before.
        rng = np.random.default_rng(block.index)
        places.append([])
        for i in range(n_classes):
            flat = np.flatnonzero(truth == i)
            if len(flat) > KEPT:
                flat = np.sort(rng.choice(flat, KEPT, replace=False))
            # counted from the sample's corner
            some = np.stack(np.unravel_index(flat, truth.shape), 1) + block.start
            places[-1].append(some.astype(np.int32))
    return Survey(counts=np.stack(counts), places=places, digest=digest.hexdigest())


class Sampler:
    """Draws samples, and places in them.

    Args:
        balance: Share of the draws that take a class evenly; the others go by area.

    Raises:
        RecipeError: nothing to draw, as all is unknown.
    """

    def __init__(
        self, samples: Sequence[Sample], surveys: Sequence[Survey], *, balance: float
    ) -> None:
        self._samples = samples
        self._surveys = surveys
        self._balance = balance
        # (samples, K)
        self._totals = np.stack([s.totals for s in surveys])
        self._owners: dict[str, list[int]] = {}
        self._weights = {sample.patient: sample.weight for sample in samples}
        for i, sample in enumerate(samples):
            if self._totals[i].sum():
                self._owners.setdefault(sample.patient, []).append(i)
        if not self._owners:
            raise RecipeError("no pixel of any image has a known class; look at classes and ignore")
        self._classes = np.flatnonzero(self._totals.sum(0)).tolist()

    def draw(self, generator: Generator) -> tuple[Sample, Shape]:
        """Draw a patient, one of its images, and a pixel of it whose class is known."""
        wanted = torch.rand((), generator=generator).item() < self._balance
        chosen = self._classes[_pick(len(self._classes), generator)]
        classes = [chosen] if wanted else self._classes
        amounts = self._totals[:, classes].sum(1)
        # Patients before images: one with many of them must not be most of what is learnt.
        having = [p for p in sorted(self._owners) if amounts[self._owners[p]].sum()]
        shares = np.array([self._weights[p] for p in having])
        # where all weigh the same, as many random numbers as ever
        is_even = bool((shares == shares[0]).all())
        k = _pick(len(having), generator) if is_even else weighted(shares, generator)
        own = self._owners[having[k]]
        i = own[weighted(amounts[own], generator)]
        counts = self._surveys[i].counts[:, classes]
        block = weighted(counts.sum(1), generator)
        index = classes[weighted(counts[block], generator)]
        places = self._surveys[i].places[block][index]
        place = places[_pick(len(places), generator)]
        return self._samples[i], tuple(int(p) for p in place)


def _pick(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def weighted(amounts: npt.NDArray[np.generic], generator: Generator) -> int:
    """Draw an index, each as often as its amount says; return it."""
    weights = torch.from_numpy(amounts.astype(np.float64))
    return int(torch.multinomial(weights, 1, generator=generator))


def random_crop(
    sample: Sample, place: Shape, size: int, spec: AugmentSpec, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Cut a square or cube around a place, turned, flipped and scaled; return it with its truth.

    Turns are about the first axis of a volume. What lies beyond the image is mirrored. The crop has
    (C, *sides) float32 of full scale 1, its truth (*sides) uint8.

    Args:
        place: A pixel that lies somewhere in the crop, array order.
        size: Side of the crop, px.
    """
    axes = len(sample.shape)
    upright, by, any_angle, zoom, mirror, flip_z = torch.rand(6, generator=generator).tolist()
    within = torch.rand(axes, generator=generator).tolist()
    if upright < spec.turn:
        angle = 2 * math.pi * by if any_angle < spec.rotate else math.pi / 2 * int(4 * by)
        is_mirrored, is_upside_down = mirror < 0.5, flip_z < 0.5
    else:
        angle = math.radians(spec.tilt) * (2 * by - 1)
        is_mirrored, is_upside_down = mirror < spec.mirror, False
    # image px per crop px
    step = math.exp((2 * zoom - 1) * math.log(spec.scale))
    reach = size * step / 2
    # inside the image, in its middle where the crop is larger
    centre = [
        float(np.clip(p + 0.5 + (2 * w - 1) * reach, min(reach, n / 2), max(n - reach, n / 2)))
        for p, w, n in zip(place, within, sample.shape, strict=True)
    ]
    # the window holds the crop at any angle; two pixels more for the interpolation
    radius = [reach] * (axes - 2) + [reach * 1.4143] * 2
    start = [max(0, int(c - r) - 2) for c, r in zip(centre, radius, strict=True)]
    stop = [min(n, int(c + r) + 3) for c, r, n in zip(centre, radius, sample.shape, strict=True)]
    # Only the window is read: slides are far larger than crops.
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    image, truth = sample.read(tuple(start), shape)
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    flip = -1.0 if is_mirrored else 1.0
    cosine, sine = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[cosine * flip, -sine], [sine * flip, cosine]])
    steps = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2) * step
    # (x, y), as `grid_sample` has them
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1) @ theta.T
    if axes == 3:
        depth = (-steps if is_upside_down else steps)[:, None, None, None]
        plane = grid.expand(size, -1, -1, -1)
        # (x, y, z)
        grid = torch.cat([plane, depth.expand(-1, size, size, -1)], dim=-1)
    corner = torch.tensor([c - a for c, a in zip(centre, start, strict=True)][::-1])
    extent = torch.tensor(shape[::-1], dtype=torch.float32)
    where = (2 * (grid + corner) / extent - 1)[None].float()
    crop, cut = (
        functional.grid_sample(
            values[None], where, mode=mode, padding_mode="reflection", align_corners=False
        )[0]
        for values, mode in ((image, "bilinear"), (truth[None].float(), "nearest"))
    )
    return crop, cut[0].to(torch.uint8)
