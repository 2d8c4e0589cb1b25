"""Pictures of held-out cases: the best, the median and the worst."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.evaluation.confusion import IGNORE, Confusion, class_figures
from wsi_pipeline.evaluation.disagreement import Disagreement
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import writing
from wsi_pipeline.training.samples import Sample
from wsi_pipeline.training.validate import PatientScore, chances, decided, open_predictor

CASES = "cases"
"""Folder of the pictures."""
LARGEST = 2048
"""Side of an image from which it is not drawn."""


def draw_cases(
    network: nn.Module,
    bundle: Bundle,
    samples: Sequence[Sample],
    scores: Mapping[str, PatientScore],
    folder: Path,
) -> None:
    """Draw the best, median and worst of some held-out images that show a class; return nothing.

    Left the image, right where the masks agree (green), what is missed (blue) and what is found
    too much (red), of a volume in one slice. Names begin with the Dice.
    The network has not seen them; large images are left out.
    """
    matrices = {(p, name): m for p, found in scores.items() for name, m in found.images}
    ranked = []
    for i, sample in enumerate(samples):
        matrix = matrices[sample.patient, sample.name]
        # Of an image without any class there is no Dice to rank it by.
        if max(sample.shape[-2:]) < LARGEST and matrix[1:].any():
            # mean over the classes that the image shows
            ranked.append((float(np.nanmean(class_figures(Confusion.of(matrix))["dice"][1:])), i))
    ranked.sort()
    folder.mkdir(exist_ok=True)
    with closing(open_predictor(network, bundle)) as predictor:
        for dice, i in dict.fromkeys(ranked[k] for k in _three(len(ranked))):
            sample = samples[i]
            image, truth = sample.read_all()
            found = decided(chances(predictor, image, outside=sample.outside))
            if truth.ndim == 3:
                # the slice that shows most
                k = int(((truth > 0) & (truth != IGNORE)).flatten(1).sum(1).argmax())
                image, truth, found = image[:, k], truth[k], found[k]
            values = image.float()
            low, high = values.min(), values.max()
            shown = ((values - low) / (high - low).clamp_min(1e-6) * 255).byte()
            shown = shown if len(shown) == 3 else shown[:1].expand(3, -1, -1)
            picture = Disagreement(truth.shape)
            picture.add((0, 0), found.numpy(), truth.numpy())
            # it is smaller where the image is large
            height, width = truth.shape
            right = np.asarray(Image.fromarray(picture.drawn()).resize((width, height)))
            both = Image.fromarray(np.hstack([shown.movedim(0, -1).numpy(), right]))
            name = sample.name.replace("/", " ")
            with writing(folder), written_beside(folder / f"{dice:.3f} {name}.png") as partial:
                both.save(partial, "PNG")


def gather_cases(folders: Sequence[Path], output: Path) -> None:
    """Copy the best, median and worst of the pictures of several folds; return nothing."""
    found = sorted((p for folder in folders for p in folder.glob("*.png")), key=lambda p: p.name)
    # Its own alone: what else lies there is somebody's.
    for path in output.glob("* [01].??? *.png"):
        path.unlink()
    for k, name in zip(_three(len(found)), ("worst", "median", "best"), strict=False):
        with writing(output):
            output.mkdir(exist_ok=True)
            shutil.copyfile(found[k], output / f"{name} {found[k].name}")


def _three(count: int) -> tuple[int, ...]:
    """Return the places of the first, the middle and the last of a row."""
    return (0, count // 2, count - 1) if count else ()
