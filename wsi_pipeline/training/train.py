"""train(): from a recipe to a measured bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.training.fit import fit
from wsi_pipeline.training.measure import Score, measure
from wsi_pipeline.training.recipe import Recipe
from wsi_pipeline.training.samples import Sample, load_samples
from wsi_pipeline.training.splits import Split, leave_one_patient_out
from wsi_pipeline.training.write import write_bundle

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told what is being trained, steps done and steps in all."""


def train(
    recipe: Recipe,
    data_dir: Path,
    output: Path,
    *,
    folds: Collection[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Score]]:
    """Measure a recipe by leaving patients out, train it on all, write the bundle; return scores.

    Args:
        recipe: what and how to train.
        data_dir: the folder that the recipe's paths start from.
        output: the bundle's folder.
        folds: patients to hold out, each in its own training; None = every patient, empty = none.
        progress: told after every step.

    Returns:
        Held-out patient → class → score.

    Raises:
        RecipeError: data that are missing or do not fit, or a leak between the sides of a split.
    """
    samples = load_samples(recipe, data_dir)
    scores = {}
    for split in _splits(samples, folds):
        told = _named(f"without {split.name}", progress)
        network = fit(recipe, split.train, data_dir=data_dir, progress=told)
        scores[split.name] = measure(network, recipe.bundle, split.test)
        for name, score in scores[split.name].items():
            logger.info("held out %s: %s Dice %.3f", split.name, name, score.dice)
    told = _named("all patients", progress)
    network = fit(recipe, samples, data_dir=data_dir, progress=told)
    write_bundle(network, recipe, samples, scores, output)
    return scores


def _splits(samples: Sequence[Sample], folds: Collection[str] | None) -> list[Split]:
    if folds is not None and not folds:
        return []
    splits = leave_one_patient_out(samples)
    if unknown := set(folds or ()) - {s.name for s in splits}:
        raise RecipeError(
            f"no patient {sorted(unknown)} to hold out; there are {[s.name for s in splits]}"
        )
    return [s for s in splits if folds is None or s.name in folds]


def _named(name: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    return partial(progress, name) if progress else None
