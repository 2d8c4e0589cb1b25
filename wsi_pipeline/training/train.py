"""train(): from a recipe to a measured bundle."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from msgspec import structs

from wsi_pipeline.bundle import bundle_table
from wsi_pipeline.errors import RecipeError
from wsi_pipeline.evaluation.confusion import Confusion
from wsi_pipeline.files.atomic import remove, sha256_of
from wsi_pipeline.files.locks import claim_folder
from wsi_pipeline.files.records import read_json
from wsi_pipeline.files.remote import write_whole
from wsi_pipeline.files.schema import converted
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.inference.unlike import load_familiar
from wsi_pipeline.training.bundle_card import WRITTEN, Trained, write_bundle, write_history
from wsi_pipeline.training.cases import CASES, draw_cases, gather_cases
from wsi_pipeline.training.crops import Survey, survey
from wsi_pipeline.training.features import Features
from wsi_pipeline.training.fit import Fitted, TrainingSet, fit, open_fabric
from wsi_pipeline.training.recipe import Recipe, load_recipe
from wsi_pipeline.training.samples import Sample, load_samples
from wsi_pipeline.training.splits import Split, leave_out_validation, plan_splits
from wsi_pipeline.training.validate import (
    PatientScore,
    Score,
    accuracy,
    familiar_of,
    measure,
    scores_of,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int, float, float | None], None]
"""Told what is being trained, steps done, steps in all, loss, best validation Dice so far."""
STATE = ".training"
"""Folder in a bundle's, with what a killed training goes on from."""
KEY = "key.json"
EVERYBODY = "all patients"


def train(
    recipe: Recipe | str | Path,
    data_dir: str | Path | None,
    output: str | Path,
    *,
    folds: Collection[str] | None = None,
    device: str = "auto",
    devices: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[str, Score]]:
    """Measure a recipe by leaving patients out, train it on all, write the bundle; return scores.

    They are held-out patient → class → score. Killed, the same call goes on where it stopped.

    Args:
        recipe: The recipe or its file.
        data_dir: Folder that the recipe's paths start from; None = the folder of its file.
        output: Folder of the bundle.
        folds: Splits to measure by, each in its own training: patients, or the numbers of groups;
            None = all, empty = none. A recipe whose split has a `test` takes no other.
        device: "auto", "cpu" or "cuda".

    Raises:
        RecipeError: data that are missing or do not fit, a leak between the sides of a split, or a
            folder with another training.
        BusyError: another process trains in the folder.
    """
    file, recipe = (None, recipe) if isinstance(recipe, Recipe) else (recipe, load_recipe(recipe))
    if data_dir is None and file is None:
        raise RecipeError("data_dir is None, and the recipe comes from no file; name the folder")
    data_dir, output = Path(data_dir or Path(str(file)).parent), Path(output)
    _check_output(recipe, output, overwrite=overwrite)
    fabric = open_fabric(recipe, device=device, devices=devices)
    with ExitStack() as closing:
        samples = load_samples(recipe, data_dir, closing)
        n_classes = len(recipe.bundle.classes)
        looked = list(map_in_threads(lambda sample: survey(sample, n_classes), samples))
        surveys = dict(zip(samples, looked, strict=True))
        if recipe.start is None:
            # Corrections need not show all that the network knows already.
            _check_classes(recipe, looked)
        splits = (
            []
            if folds is not None and not folds and not recipe.split.test
            else plan_splits(samples, recipe.split, seed=recipe.train.seed, wanted=folds)
        )
        key, state = _key(recipe, samples, looked), output / STATE
        if fabric.is_global_zero:
            closing.enter_context(claim_folder(state))
            encoder = data_dir / (recipe.train.encoder or "")
            digest = sha256_of(encoder) if encoder.is_file() else ""
            _open_state(state, {"key": key, "encoder": digest}, overwrite=overwrite)
        # The other processes wait until the folder is claimed, and empty where it is to be.
        fabric.barrier()
        features = Features(recipe, state / "features") if recipe.bundle.encoder else None
        if features and fabric.is_global_zero:
            features.compute(surveys, fabric.device, progress or (lambda *_: None))
        fabric.barrier()
        training = _Training(recipe, surveys, fabric, data_dir, state, features, progress)
        # The fold kept apart is asked for twice: to be judged, and as the bundle.
        learn_without = lru_cache(maxsize=1)(training.learn_without)
        # Folds before the training on all: temperature and card of the bundle come from them.
        scores: dict[str, PatientScore] = {}
        for split in splits:
            scores |= _held_out(recipe, split, learn_without, state)
        if recipe.split.test:
            (apart,) = splits
            samples, fitted = list(apart.train), learn_without(apart)
        else:
            fitted = training.learn(EVERYBODY, samples)
        if fabric.is_global_zero:
            familiar = (
                # What it looks like to an encoder that stays is known, and of more than this.
                load_familiar(recipe.start)
                if recipe.start and not recipe.train.encoder_rate
                else familiar_of(fitted.network, recipe.bundle, samples)
            )
            trained = Trained(
                samples=samples,
                surveys=[surveys[sample] for sample in samples],
                held_out=scores,
                familiar=familiar,
                fingerprint=key,
            )
            write_bundle(fitted.network, recipe, trained, output)
            write_history(output, fitted.history)
            gather_cases([state / fold_folder(s) / CASES for s in splits], output / CASES)
    return {patient: scores_of(found.pixels, recipe.bundle) for patient, found in scores.items()}


def _check_output(recipe: Recipe, output: Path, *, overwrite: bool) -> None:
    """Refuse a folder in which something else lies."""
    there = (name for name in (*WRITTEN, CASES) if (output / name).exists())
    if (found := next(there, None)) and not (overwrite or (output / STATE / KEY).exists()):
        raise RecipeError(f"{output} holds {found}, which was not trained there; name another")
    if recipe.start and output.resolve() == recipe.start.path.resolve():
        raise RecipeError(f"{output} is the bundle to begin with, which stays; name another folder")


class _Training(NamedTuple):
    """What the trainings of a recipe have in common: of each fold, and of all patients."""

    recipe: Recipe
    surveys: Mapping[Sample, Survey]
    fabric: Fabric
    data_dir: Path
    state: Path
    features: Features | None
    progress: Progress | None

    def learn(self, name: str, own: Sequence[Sample], held_out: Sequence[Sample] = ()) -> Fitted:
        """Train by some images, from where an earlier call got to; return the network."""
        train, split = self.recipe.train, self.recipe.split
        learning, validation = leave_out_validation(own, split.validation, seed=train.seed)
        folder = self.state / _folder_name(name)
        folder.mkdir(parents=True, exist_ok=True)
        fitted = fit(
            self.recipe,
            TrainingSet(samples=learning, surveys=[self.surveys[s] for s in learning]),
            validation=validation,
            watched=held_out if split.watch else (),
            fabric=self.fabric,
            data_dir=self.data_dir,
            folder=folder,
            features=self.features,
            progress=partial(self.progress, name) if self.progress else None,
        )
        if self.fabric.is_global_zero:
            write_history(folder, fitted.history)
        return fitted

    def learn_without(self, split: Split) -> Fitted:
        """Train without the patients that a split holds out; return the network."""
        return self.learn(f"without {split.name}", split.train, split.test)


def _held_out(
    recipe: Recipe, split: Split, learn_without: Callable[[Split], Fitted], folder: Path
) -> dict[str, PatientScore]:
    """Return the scores of a split's patients, from an earlier call where it got that far."""
    path = folder / fold_folder(split) / "held_out.json"
    # not measured yet, or in a way that cannot be read
    with suppress(OSError, ValueError):
        return load_held_out(path)
    fitted = learn_without(split)
    scores = measure(fitted.network, recipe.bundle, split.test)
    if familiar := familiar_of(fitted.network, recipe.bundle, split.train):
        scores = {
            patient: replace(found, distances=familiar.distances(np.concatenate(found.features)))
            for patient, found in scores.items()
        }
    draw_cases(fitted.network, recipe.bundle, split.test, scores, path.with_name(CASES))
    for patient, found in scores.items():
        for class_name, score in scores_of(found.pixels, recipe.bundle).items():
            nothing = f"not there, called so in {score.called:.3f}"
            what = f"Dice {score.dice:.3f}" if score.share else nothing
            logger.info("held out %s: %s %s", patient, class_name, what)
    if recipe.bundle.labels:
        logger.info("held out %s: labels of %.1f %% right", split.name, 100 * accuracy(scores))
    held = {
        patient: {
            "pixels": found.pixels.matrix.tolist(),
            "labels": found.labels.tolist(),
            "images": [[name, matrix.tolist()] for name, matrix in found.images],
            "said": found.label_chances.round(5).tolist(),
            # Rounded: there are up to 65,536 of them, each of all classes.
            "sampled": found.pixel_chances.round(3).tolist(),
            "distances": found.distances.astype(float).round(4).tolist(),
        }
        for patient, found in scores.items()
    }
    write_whole(path, json.dumps(held).encode())
    # As kept, which is rounded: a training that goes on has the same temperature and card.
    return load_held_out(path)


def fold_folder(split: Split) -> str:
    """Return the name of a split's folder in `STATE`."""
    return _folder_name(f"without {split.name}")


class _HeldOut(TypedDict):
    """What `held_out.json` keeps of a patient: the fields of `PatientScore`, chances as said."""

    pixels: list[list[int]]
    labels: list[list[int]]
    images: list[tuple[str, list[Any]]]
    said: list[Any]
    sampled: list[Any]
    distances: NotRequired[list[float]]


def load_held_out(path: Path) -> dict[str, PatientScore]:
    """Read the `held_out.json` of a fold; return what was right and wrong of each patient.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    scores = {}
    for patient, held in converted(read_json(path), dict[str, _HeldOut]).items():
        matrix, labels = np.array(held["pixels"]), np.array(held["labels"], np.int64)
        scores[patient] = PatientScore(
            pixels=Confusion.of(matrix),
            labels=labels,
            images=tuple((name, np.array(counts)) for name, counts in held["images"]),
            label_chances=np.array(held["said"], float).reshape(-1, 1 + len(labels)),
            pixel_chances=np.array(held["sampled"], float).reshape(-1, 1 + len(matrix)),
            distances=np.array(held.get("distances", ()), float),
        )
    return scores


def _check_classes(recipe: Recipe, surveys: Sequence[Survey]) -> None:
    """Refuse a class of which there is nothing to learn."""
    totals = np.sum([found.totals for found in surveys], axis=0)
    names = [info.name for info in recipe.bundle.classes]
    if empty := [name for name, total in zip(names, totals, strict=True) if total == 0]:
        raise RecipeError(
            f"no pixel of any image is {', '.join(empty)}; look at the recipe's classes, or leave "
            "the class out of the bundle"
        )


def _key(recipe: Recipe, samples: Sequence[Sample], surveys: Sequence[Survey]) -> str:
    """Return a digest of all that the weights depend on."""
    settings = [structs.asdict(part) for part in (recipe.train, recipe.augment, recipe.split)]
    # Who is kept apart is in the name of the state's folder.
    del settings[-1]["test"]
    if recipe.train.crops is None:
        # Of trainings from before there were any it is as it was.
        del settings[0]["crops"]
    data = [
        (s.patient, s.fold, s.name, s.label, s.digest, found.digest)
        for s, found in zip(samples, surveys, strict=True)
    ]
    table = bundle_table(replace(recipe.bundle, limits=""))
    # Only where there are any: trainings that were begun before recipes had weights go on.
    weights = [(s.patient, s.weight) for s in samples if s.weight != 1]
    start = recipe.start.digest if recipe.start else ""
    encoder = recipe.bundle.encoder.weights_sha256 if recipe.bundle.encoder else ""
    also = filter(None, [weights, start, encoder])
    text = json.dumps([table, settings, data, *also], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _open_state(folder: Path, key: Mapping[str, str], *, overwrite: bool) -> None:
    """Make the folder ready for the training of a key, emptied if that is asked for."""
    path = folder / KEY
    for parent in (folder.parent, *folder.glob("**")):
        # of processes that were killed
        for partial_file in parent.glob(".*.partial"):
            remove(partial_file)
    if overwrite:
        for part in folder.iterdir():
            if part.is_dir():
                shutil.rmtree(part)
    elif path.exists():
        try:
            found = converted(read_json(path), dict[str, str])
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path} is damaged ({error}); use --overwrite") from error
        # Trainings that were begun before encoders were told apart go on.
        if any(value and found.get(name, value) not in ("", value) for name, value in key.items()):
            raise RecipeError(
                f"{folder.parent} holds a training by another recipe, or on other data; "
                "choose another --output, or --overwrite"
            )
    write_whole(path, json.dumps(key).encode())


def _folder_name(name: str) -> str:
    """Return a name of letters that no other split has."""
    # Two names may come to the same letters; the digest tells them apart.
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return f"{kept[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
