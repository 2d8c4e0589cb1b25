"""A trained network out, as a bundle with its card; and how the training went."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import save
from torch import nn

from wsi_pipeline.bundle import bundle_toml
from wsi_pipeline.evaluation.confusion import (
    Confusion,
    bootstrap,
    class_figures,
    drawn_anew,
    interval,
)
from wsi_pipeline.files.atomic import make_folders, sync, written_beside
from wsi_pipeline.files.locks import writing
from wsi_pipeline.networks.weights import kept_state
from wsi_pipeline.training.calibrate import (
    BINS,
    calibration_error,
    fit_temperature,
    left_out_temperatures,
)
from wsi_pipeline.training.crops import Survey
from wsi_pipeline.training.recipe import Recipe
from wsi_pipeline.training.samples import Sample
from wsi_pipeline.training.validate import PatientScore, accuracy, scores_of

WEIGHTS = "model.safetensors"
MANY = 60
"""Patients above which the card does not list them."""
HISTORY, CURVES = "history.csv", "curves.png"
LOOKS = {"validation_dice": "validation patients", "held_out_dice": "held-out patients"}
"""Columns of the history that hold a Dice, and whose."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What a network was trained on, and what its like do on patients that they have not seen.

    Attributes:
        samples: that it was trained on.
        surveys: of each.
        judged: what was right of each held-out patient.
        fingerprint: of the recipe and the data.
    """

    samples: Sequence[Sample]
    surveys: Sequence[Survey]
    judged: Mapping[str, PatientScore] = field(default_factory=dict)
    fingerprint: str = ""


def write_bundle(network: nn.Module, recipe: Recipe, trained: Trained, folder: Path) -> None:
    """Write `model.toml`, weights and model card of a trained network; return nothing.

    Args:
        folder: to write into; made where it is missing, its three files replaced.
    """
    make_folders(folder)
    found = list(trained.judged.values())
    temperature = round(recipe.bundle.temperature * fit_temperature(found), 3)
    bundle = replace(recipe.bundle, temperature=temperature)
    state = {
        # half precision: half the size, and masks stay the same to a few pixels in a million
        name: tensor.half()
        for name, tensor in kept_state(network).items()
    }
    files = {
        WEIGHTS: save(state),
        "README.md": model_card(recipe, trained).encode(),
        # last, and away until then: killed on the way, this is no bundle of old and new parts
        "model.toml": bundle_toml(bundle, weights=WEIGHTS).encode(),
    }
    (folder / "model.toml").unlink(missing_ok=True)
    sync(folder)
    for name, data in files.items():
        with written_beside(folder / name) as partial:
            partial.write_bytes(data)


def write_history(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write a training's history as CSV, and its curves where matplotlib is there.

    Args:
        history: rows of step, loss, learning_rate, and validation_dice, validation_accuracy and
            held_out_dice where they were taken.
    """
    columns = ("step", "loss", "learning_rate", *LOOKS, "validation_accuracy")
    buffer = io.StringIO(newline="")
    table = csv.DictWriter(buffer, columns, restval="")
    table.writeheader()
    table.writerows(history)
    with writing(folder), written_beside(folder / HISTORY) as partial:
        partial.write_text(buffer.getvalue(), "utf-8")
    if find_spec("matplotlib"):
        with writing(folder), written_beside(folder / CURVES) as partial:
            _draw(partial, history)


def _draw(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    from matplotlib.figure import Figure  # of the train extra; no window is wanted

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = ([row[name] for row in history] for name in ("step", "loss"))
    lines = axes.plot(steps, losses, color="#4575b4", label="loss of the training crops")
    axes.set(xlabel="step", ylabel="loss")
    looks = {
        whose: [(row["step"], row[column]) for row in history if column in row]
        for column, whose in LOOKS.items()
    }
    if any(looks.values()):
        right = axes.twinx()
        for (whose, dice), color in zip(looks.items(), ("#d73027", "#1a9850"), strict=True):
            if dice:
                label = f"Dice of {whose}"
                lines += right.plot(*zip(*dice, strict=True), color=color, marker="o", label=label)
        right.set(ylabel="Dice", ylim=(0, 1))
    # of the figure, so that one legend holds the lines of both axes
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False)
    figure.savefig(path, format="png", dpi=120)


def model_card(recipe: Recipe, trained: Trained) -> str:
    """Return the card: what the network is, learnt from, and how well it does; Markdown."""
    bundle = recipe.bundle
    names = ", ".join(c.name for c in bundle.classes[1:])
    patch = " × ".join(map(str, bundle.input.patch_size))
    sections = [
        f"# {bundle.name}",
        f"`{bundle.network}` for {names} {_resolution(recipe)}, in patches of {patch} px.",
        "**For research and demonstration. Not a medical device; not for diagnosis.**",
        "## Training data",
        recipe.notes,
        _data_table(recipe, trained),
        _class_table(recipe, trained),
        f"Fingerprint of recipe and data: `{trained.fingerprint[:16]}`.",
        "## Training",
        _training(recipe),
        "## How well it does",
        _score_table(recipe, trained),
        _image_lines(recipe, trained.judged),
        _label_table(recipe, trained.judged),
        _certainty(recipe, trained.judged),
    ]
    if recipe.limits:
        sections += ["## Limits", recipe.limits]
    return "\n\n".join(filter(None, sections)) + "\n"


def _resolution(recipe: Recipe) -> str:
    spec = recipe.bundle.input
    if spec.mpp is not None:
        return f"at {spec.mpp} µm per pixel"
    if spec.fit is not None:
        return f"in images brought to {spec.fit[0]} × {spec.fit[1]} px"
    return f"in volumes of {' × '.join(f'{s:g}' for s in spec.spacing_mm or ())} mm"


def _training(recipe: Recipe) -> str:
    spec, split = recipe.train, recipe.split
    losses = {"ce": "cross-entropy", "dice": "soft Dice", "ce+dice": "cross-entropy and soft Dice"}
    start = f"from the encoder weights `{spec.encoder}`" if spec.encoder else "from scratch"
    low, high = spec.crop
    sides = f"{low} px" if low == high else f"{low} to {high} px"
    batch = f"{spec.batch_size * spec.accumulate} crops of {sides}"
    chosen = (
        f" {split.validation:.0%} of the patients were left out of the learning to choose the "
        "best weights by."
        if split.validation
        else ""
    )
    return (
        f"{spec.steps:,} steps of {batch}, {start}; {losses[spec.loss]}; {spec.optimizer}, "
        f"learning rate up to {spec.learning_rate:g}, {spec.schedule}; {spec.precision}; moving "
        f"average of the weights; seed {spec.seed}. Colours, geometry and focus are varied at "
        f"random; {spec.balance:.0%} of the crops are drawn evenly over the classes.{chosen}"
    )


def _amount(pixels: int, recipe: Recipe) -> str:
    if recipe.bundle.input.mpp is None:
        return f"{pixels:,} px"
    return f"{pixels * (recipe.bundle.mpp / 1000) ** 2:.2f} mm²"


def _data_table(recipe: Recipe, trained: Trained) -> str:
    """Return a row for each patient, or a sentence where there are many."""
    own: dict[str, list[int]] = {}
    for i, sample in enumerate(trained.samples):
        own.setdefault(sample.patient, []).append(i)
    known = {p: sum(int(trained.surveys[i].totals.sum()) for i in of) for p, of in own.items()}
    if len(own) > MANY:
        total = _amount(sum(known.values()), recipe)
        return f"{len(trained.samples)} images of {len(own)} patients, {total} with known classes."
    rows = ["| patient | images | known |", "|---|---:|---:|"]
    rows += [f"| {p} | {len(own[p])} | {_amount(known[p], recipe)} |" for p in sorted(own)]
    return "\n".join(rows)


def _class_table(recipe: Recipe, trained: Trained) -> str:
    totals = np.stack([found.totals for found in trained.surveys])
    rows = ["| class | patients | known |", "|---|---:|---:|"]
    for i, info in enumerate(recipe.bundle.classes):
        having = {s.patient for s, n in zip(trained.samples, totals[:, i], strict=True) if n}
        amount = _amount(int(totals[:, i].sum()), recipe)
        rows.append(f"| {info.name} | {len(having)} | {amount} |")
    return "\n".join(rows)


def _score_table(recipe: Recipe, trained: Trained) -> str:
    judged = trained.judged
    if not judged:
        return "Not measured."
    in_groups = recipe.split.folds or any(s.fold for s in trained.samples)
    how = "Groups of patients left out together" if in_groups else "Leave one patient out"
    rows = [
        f"{how}: for each row a network was trained by the same recipe without that patient. "
        "Overlapping patches, pixels of a patient pooled. The weights here are trained on all "
        "patients, so no patient of the table is new to them.\n",
        "| held-out patient | class | Dice | IoU | share of class | called so "
        "| Dice of “everywhere” |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    scores = {patient: scores_of(found.pixels, recipe.bundle) for patient, found in judged.items()}
    cells = [(p, c, s) for p, classes in scores.items() for c, s in classes.items()]
    if len(scores) <= MANY:
        rows += [
            f"| {p} | {c} | {s.dice:.3f} | {s.iou:.3f} | {s.share:.3f} | {s.called:.3f} "
            f"| {s.everywhere_dice:.3f} |"
            if s.share > 0
            else f"| {p} | {c} | | | 0 | {s.called:.3f} | |"
            for p, c, s in cells
        ]
    absent = []
    for i, name in enumerate(dict.fromkeys(c for _, c, _ in cells), 1):
        without = [f.pixels.matrix for f in judged.values() if not f.pixels.matrix[i].any()]
        if without:
            called, known = (int(n) for n in (np.sum(without, (0, 1))[i], np.sum(without)))
            absent += [
                "",
                f"- {len(without)} of {len(judged)} show no {name}, and have no Dice: {called:,} "
                f"of their {known:,} px are called so",
            ]
        own = [s for _, c, s in cells if c == name and s.share > 0]
        if not own:
            continue
        dice, iou, share, called, everywhere = (
            sum(getattr(s, f) for s in own) / len(own)
            for f in ("dice", "iou", "share", "called", "everywhere_dice")
        )
        rows.append(
            f"| **mean of {len(own)}** | {name} | **{dice:.3f}** | **{iou:.3f}** | {share:.3f} "
            f"| {called:.3f} | {everywhere:.3f} |"
        )
    return "\n".join([*rows, *absent, *_intervals(recipe, judged)])


def _intervals(recipe: Recipe, judged: Mapping[str, PatientScore]) -> list[str]:
    """Return a line for each class: the figures of all pixels together, and how sure they are."""
    showing = [found.pixels for found in judged.values() if found.pixels.matrix[1:].any()]
    if len(showing) < 2:
        return []
    by_class, _ = bootstrap(showing)
    whole = sum(showing, start=Confusion.empty(len(recipe.bundle.classes)))
    who = "all patients" if len(showing) == len(judged) else "all patients who show a class"
    lines = [
        "",
        f"Pixels of {who} together, with 95 % intervals by drawing patients anew:",
        "",
    ]
    for i, (name, score) in enumerate(scores_of(whole, recipe.bundle).items(), 1):
        if not score.share:
            continue
        dice, iou = by_class["dice"][:, i], by_class["iou"][:, i]
        lines.append(
            f"- {name}: Dice {score.dice:.3f} ({dice[0]:.3f} to {dice[1]:.3f}), "
            f"IoU {score.iou:.3f} ({iou[0]:.3f} to {iou[1]:.3f})"
        )
    return lines


def _image_lines(recipe: Recipe, judged: Mapping[str, PatientScore]) -> str:
    """Return the figures image by image, "" for slides, of which a patient has parts."""
    if recipe.bundle.modality == "slide" or not judged:
        return ""
    each = [np.array([counts for _, counts in found.images]) for found in judged.values()]
    lines = ["Image by image, with 95 % intervals by drawing patients anew:\n"]
    for i, info in enumerate(recipe.bundle.classes[1:], 1):
        figures = [class_figures(Confusion.of(c)) for c in each]
        # (patients, 3): sums of Dice and IoU of images that show the class, and how many do
        sums = [
            np.array(
                [f[name][c[:, i].any(1), i].sum() for name in ("dice", "iou")]
                + [c[:, i].any(1).sum()]
            )
            for f, c in zip(figures, each, strict=True)
        ]
        if np.sum(sums, axis=0)[2]:
            dice, iou = (_mean_with_interval(np.stack(sums)[:, [k, 2]]) for k in (0, 1))
            lines.append(f"- {info.name}: Dice {dice}, IoU {iou}")
        # images without the class, those of them with any pixel called it
        clean = [
            np.array([(c[~c[:, i].any(1)].sum(1)[:, i] > 0).sum(), (~c[:, i].any(1)).sum()])
            for c in each
        ]
        if np.sum(clean, axis=0)[1]:
            lines.append(
                f"- {np.sum(clean, axis=0)[1]} images show no {info.name}; in a share of "
                f"{_mean_with_interval(np.stack(clean))} some is found all the same"
            )
    return "\n".join(lines)


def _mean_with_interval(sums: npt.NDArray[Any]) -> str:
    """Return a mean, and its interval by drawing patients anew.

    Args:
        sums: (patients, 2) sum of what is averaged, and how many that are.
    """
    value = sums[:, 0].sum() / sums[:, 1].sum()
    if len(sums) < 2:
        return f"{value:.3f}"
    drawn = drawn_anew(list(sums))
    with np.errstate(invalid="ignore"):
        low, high = interval(drawn[:, 0] / drawn[:, 1])
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _certainty(recipe: Recipe, judged: Mapping[str, PatientScore]) -> str:
    """Return how far probabilities hold, "" where nothing was held out."""
    found = list(judged.values())
    if sum(len(f.sampled) > 0 for f in found) < 2:
        return ""
    before = calibration_error(found, [1.0] * len(found))
    after = calibration_error(found, left_out_temperatures(found))
    own = calibration_error(found, [fit_temperature(found)] * len(found))
    return (
        f"Certainty on held-out patients: expected calibration error {before:.3f} as trained, "
        f"{after:.3f} at a temperature that fits other held-out patients, {own:.3f} at that of "
        f"`model.toml`, which fits them all ({BINS} bins; every patient counts alike)."
    )


def _label_table(recipe: Recipe, judged: Mapping[str, PatientScore]) -> str:
    """Return how often what was said of a whole patch is right, "" where nothing is said."""
    whole = sum(judged.values(), start=PatientScore.empty(recipe.bundle)).labels
    if not whole.any():
        return ""
    right = f"{accuracy(judged):.3f}"
    each = [found.labels for found in judged.values() if found.labels.any()]
    if len(each) > 1:
        sums = drawn_anew(each)
        low, high = interval(np.trace(sums, axis1=1, axis2=2) / sums.sum((1, 2)))
        right += f" ({low:.3f} to {high:.3f})"
    commonest = whole.sum(1).max() / whole.sum()
    names = recipe.bundle.labels
    ranked = ""
    if len(names) == 2 and any(len(found.said) for found in judged.values()):
        ranked = f" Area under the curve of {names[1]}: {_area_under_curve(judged)}."
    return "\n".join(
        [
            f"Labels of whole patches: {right} are right; if all were given the commonest label, "
            f"{commonest:.3f} would be.{ranked} Patches:\n",
            f"| true label | {' | '.join(f'said {name}' for name in names)} |",
            "|---|" + "---:|" * len(names),
            *(f"| {n} | {' | '.join(map(str, of))} |" for n, of in zip(names, whole, strict=True)),
        ]
    )


def _area_under_curve(judged: Mapping[str, PatientScore]) -> str:
    """Return how often a patch of the second label gets more of it than one of the first."""
    said = [found.said for found in judged.values()]
    rows, owner = np.concatenate(said), np.repeat(np.arange(len(said)), [len(s) for s in said])
    first, second = rows[:, 0] == 0, rows[:, 0] == 1
    above = np.sign(rows[second, 2][:, None] - rows[first, 2]) / 2 + 0.5
    draws = drawn_anew(list(np.eye(len(said), dtype=np.int64)))
    areas = [
        float(of_second @ above @ of_first) / max(1, of_second.sum() * of_first.sum())
        for w in [np.ones(len(said)), *draws]
        for of_first, of_second in [(w[owner[first]], w[owner[second]])]
    ]
    if len(said) < 2:
        return f"{areas[0]:.3f}"
    low, high = interval(np.array(areas[1:]))
    return f"{areas[0]:.3f} ({low:.3f} to {high:.3f})"
