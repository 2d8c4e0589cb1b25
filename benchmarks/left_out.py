"""What else can be told of left-out images: lesions found, mirrored predictions, parts of a set.

python benchmarks/left_out.py workflows/train/cdd-cesm.toml trained --data DATA --only _DM_

Takes a recipe and the folder that `train` wrote: every fold that is through is judged anew by its
own weights, on the images it has not seen. Writes Markdown: Dice image by image and pooled, and of
the lesions (4-connected pieces of the truth) the share found at one false finding an image. A
finding is a piece of what is likelier than not, of so many pixels at least that there is one false
one an image; it is right where it shares a tenth of the union with a lesion.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import nn

from wsi_pipeline.evaluation.confusion import IGNORE
from wsi_pipeline.networks import create
from wsi_pipeline.training.recipe import Recipe, load_recipe
from wsi_pipeline.training.samples import Sample, load_samples
from wsi_pipeline.training.splits import plan_splits
from wsi_pipeline.training.state import LAST
from wsi_pipeline.training.train import STATE, fold_folder
from wsi_pipeline.training.validate import chances, open_predictor

AREAS = np.unique(np.logspace(0, 4, 33).astype(int))
LEAST_OVERLAP = 0.1
"""Intersection over union from which a finding is right."""


def left_out(recipe: Recipe, folder: Path, data_dir: Path) -> Iterator[tuple[nn.Module, Sample]]:
    """Yield each left-out image with the network that has not seen it."""
    with ExitStack() as closing:
        samples = load_samples(recipe, data_dir, closing)
        for split in plan_splits(samples, recipe.split, seed=recipe.train.seed):
            path = folder / STATE / fold_folder(split) / LAST
            if not path.is_file():
                continue
            held = torch.load(path, weights_only=True)
            if held["progressed"]["step"] < recipe.train.steps:
                continue
            network = create(recipe.bundle)
            network.load_state_dict(
                {
                    name.removeprefix("module."): tensor
                    for name, tensor in held["average"].items()
                    if name.startswith("module.")
                }
            )
            for sample in split.test:
                yield network.eval(), sample


def found_at(
    chance: npt.NDArray[np.float32], truth: npt.NDArray[np.uint8], area: int
) -> tuple[int, int, int]:
    """Return how many lesions there are, how many of them are found, and the false findings.

    Findings of fewer than `area` px do not count.
    """
    lesions, n_lesions = ndimage.label((truth > 0) & (truth != IGNORE))
    findings, n_findings = ndimage.label((chance > 0.5) & (truth != IGNORE))
    shared = np.zeros((n_lesions + 1, n_findings + 1), np.int64)
    np.add.at(shared, (lesions.ravel(), findings.ravel()), 1)
    union = shared.sum(1)[:, None] + shared.sum(0)[None] - shared
    right = (shared / np.maximum(union, 1))[1:, 1:] >= LEAST_OVERLAP
    right = right[:, shared.sum(0)[1:] >= area]
    return n_lesions, int(right.any(1).sum()), int((~right.any(0)).sum())


def main() -> None:
    """Judge and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path, help="that it was trained into")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="images whose name this expression finds")
    parser.add_argument("--mirrored", action="store_true", help="as with --tta mirror")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    recipe = load_recipe(given.recipe)
    if len(recipe.bundle.classes) != 2:
        parser.error(f"{recipe.bundle.name} has several classes; lesions are of one")
    dices, counts, sums = list[float](), list[list[tuple[int, int, int]]](), np.zeros(2)
    for network, sample in left_out(recipe, given.folder, given.data):
        if not re.search(given.only, sample.name):
            continue
        image, known = sample.read_all()
        bundle = replace(recipe.bundle, tta="mirror") if given.mirrored else recipe.bundle
        with closing(open_predictor(network, bundle)) as predictor:
            certain = chances(predictor, image, outside=sample.outside)
        chance, truth = certain[-1].numpy(), known.numpy()
        found, true = (chance > 0.5) & (truth != IGNORE), (truth > 0) & (truth != IGNORE)
        parts = np.array([2 * (found & true).sum(), found.sum() + true.sum()])
        sums += parts
        if true.any():
            dices.append(parts[0] / parts[1])
        counts.append([found_at(chance, truth, area) for area in AREAS])
    if not counts:
        parser.error(f"no fold of {given.folder} is through, or no image is named so")
    lesions, hits, false = np.moveaxis(np.array(counts).sum(0), -1, 0)
    each = false / len(counts)
    print(f"- {len(counts)} images: Dice {np.mean(dices):.3f} an image that shows any, ", end="")
    print(f"{sums[0] / sums[1]:.3f} of all pixels")
    allowed = np.flatnonzero(each <= 1)
    if len(allowed):
        best = allowed[hits[allowed].argmax()]
        print(
            f"- {hits[best]} of {lesions[best]} lesions found, {hits[best] / lesions[best]:.3f}, "
            f"at {each[best]:.2f} false findings an image (of {AREAS[best]} px and more)"
        )


if __name__ == "__main__":
    main()
