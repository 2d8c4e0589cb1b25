"""A trained network out, as a bundle with its card; and how the training went."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import nn

from wsi_pipeline.bundle import bundle_toml
from wsi_pipeline.errors import without_secrets
from wsi_pipeline.evaluation.confusion import (
    Confusion,
    bootstrap,
    class_figures,
    drawn_anew,
    interval,
)
from wsi_pipeline.files.atomic import make_folders, sync, written_beside
from wsi_pipeline.files.locks import writing
from wsi_pipeline.files.models import CARD, MODEL_TOML
from wsi_pipeline.files.remote import write_whole
from wsi_pipeline.files.tables import as_csv
from wsi_pipeline.inference.unlike import Familiar
from wsi_pipeline.networks import create
from wsi_pipeline.networks.bundle_writer import ENCODERS, FEATURES, WEIGHTS, keep_card
from wsi_pipeline.networks.cost import count_macs, count_parameters
from wsi_pipeline.networks.weights import kept_state
from wsi_pipeline.training.calibrate import (
    BINS,
    calibration_error,
    fit_temperature,
    left_out_temperatures,
)
from wsi_pipeline.training.crops import Survey
from wsi_pipeline.training.features import CROPS
from wsi_pipeline.training.recipe import TRAITS, Recipe
from wsi_pipeline.training.samples import Sample
from wsi_pipeline.training.validate import PatientScore, accuracy, scores_of

MANY = 60
"""Patients above which the card does not list them."""
HISTORY, CURVES = "history.csv", "curves.png"
WRITTEN = (MODEL_TOML, CARD, WEIGHTS, FEATURES, *ENCODERS.values(), HISTORY, CURVES)
LOOKS = {"validation_dice": "validation patients", "held_out_dice": "held-out patients"}
"""Columns of the history that hold a Dice, and whose."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What a network was trained on, and what its like do on patients that they have not seen.

    Attributes:
        held_out: What was right of each held-out patient.
        familiar: What the tissue of those who show a class looks like.
        fingerprint: Hash of the recipe and the data.
    """

    samples: Sequence[Sample]
    surveys: Sequence[Survey]
    held_out: Mapping[str, PatientScore] = field(default_factory=dict)
    familiar: Familiar | None = None
    fingerprint: str = ""


def write_bundle(network: nn.Module, recipe: Recipe, trained: Trained, folder: Path) -> None:
    """Write `model.toml`, weights and card of a trained network, an old card aside; return None."""
    make_folders(folder)
    found = list(trained.held_out.values())
    temperature = round(recipe.bundle.temperature * fit_temperature(found), 3)
    bundle = replace(recipe.bundle, temperature=temperature)
    # half precision: half the size, and masks stay the same to a few pixels in a million
    kept = kept_state(network)
    state = {n: half if (half := t.half()).isfinite().all() else t for n, t in kept.items()}
    own = bundle.encoder
    # One that is fetched still is; any other goes along.
    program = ENCODERS[own.network] if own and not own.weights_origin else None
    files = {
        WEIGHTS: save(state),
        **({program: own.read_weights()} if own and program else {}),
        **({FEATURES: trained.familiar.to_bytes()} if trained.familiar else {}),
        CARD: model_card(recipe, trained).encode(),
        # last, and away until then: killed on the way, this is no bundle of old and new parts
        MODEL_TOML: bundle_toml(
            bundle,
            weights=WEIGHTS,
            features=FEATURES if trained.familiar else None,
            encoder=program,
        ).encode(),
    }
    with writing(folder):
        (folder / MODEL_TOML).unlink(missing_ok=True)
        sync(folder)
        keep_card(folder / CARD, folder, files[CARD])
    for name, data in files.items():
        write_whole(folder / name, data)


def write_history(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write a training's history, as in `Fitted`, as CSV; its curves where matplotlib is there."""
    columns = ("step", "loss", "learning_rate", *LOOKS, "validation_accuracy")
    rows = [[row.get(column) for column in columns] for row in history]
    write_whole(folder / HISTORY, as_csv([columns, *rows]).encode())
    if not find_spec("matplotlib"):
        return
    # of the train extra; no window is wanted
    from matplotlib.figure import Figure

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
    with writing(folder), written_beside(folder / CURVES) as partial:
        figure.savefig(partial, format="png", dpi=120)


def model_card(recipe: Recipe, trained: Trained) -> str:
    """Return the card: what the network is, learnt from, and how well it does; Markdown."""
    bundle, spec = recipe.bundle, recipe.bundle.input
    names = ", ".join(c.name for c in bundle.classes[1:])
    patch = " × ".join(map(str, spec.patch_size))
    if spec.mpp is not None:
        resolution = f"at {spec.mpp} µm per pixel"
    elif spec.fit is not None:
        resolution = f"in images brought to {spec.fit[0]} × {spec.fit[1]} px"
    else:
        resolution = f"in volumes of {' × '.join(f'{s:g}' for s in spec.spacing_mm or ())} mm"
    sections = [
        f"# {bundle.name}",
        f"`{bundle.network}` for {names} {resolution}, in patches of {patch} px.",
        "**For research and demonstration. Not a medical device; not for diagnosis.**",
        "## Training data",
        recipe.notes,
        *_data_tables(recipe, trained),
        f"Fingerprint of recipe and data: `{trained.fingerprint[:16]}`.",
        "## Training",
        _training(recipe),
        "## How well it does",
        _score_table(recipe, trained) if trained.held_out else "Not measured.",
        _image_lines(recipe, trained.held_out),
        _label_table(recipe, trained.held_out),
        _certainty(list(trained.held_out.values())),
        _unlike(trained.held_out.values()),
        "## Speed",
        _cost(recipe),
        *(("## Limits", recipe.limits) if recipe.limits else ()),
        *(("## Licences and notices", recipe.notices) if recipe.notices else ()),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _training(recipe: Recipe) -> str:
    spec, split = recipe.train, recipe.split
    losses = {"ce": "cross-entropy", "dice": "soft Dice", "ce+dice": "cross-entropy and soft Dice"}
    encoder = without_secrets(spec.encoder or "")
    start = f"from the encoder weights `{encoder}`" if encoder else "from scratch"
    if recipe.start:
        kept = "" if spec.encoder_rate else ", whose encoder stays as it is"
        start = f"from `{recipe.start.name}` ({recipe.start.weights_sha256[:16]}){kept}"
    if own := recipe.bundle.encoder:
        name = str(own.weights_origin.url if own.weights_origin else own.weights_path)
        start += (
            f", behind the frozen encoder `{Path(without_secrets(name)).name}` ({own.network}, "
            f"sha256 `{own.weights_sha256[:16]}`), which saw {spec.crops or CROPS} crops of each "
            "patient once and has learnt nothing here"
        )
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


def _cost(recipe: Recipe) -> str:
    size = (recipe.bundle.input.channels, *recipe.bundle.input.patch_size)
    with torch.device("meta"):
        network = create(recipe.bundle)
    if recipe.bundle.encoder:
        return (
            f"{count_parameters(network):,} parameters behind the encoder, which is not counted. "
            "`wsi-pipeline models check` times a patch."
        )
    return (
        f"{count_parameters(network):,} parameters; {count_macs(network, size) / 1e9:.3f} GMAC a "
        f"patch of {' × '.join(map(str, size))}. `wsi-pipeline models check` times a patch."
    )


def _data_tables(recipe: Recipe, trained: Trained) -> tuple[str, str]:
    """Return a row for each patient, or a sentence where there are many, and one for each class."""

    def amount(pixels: int) -> str:
        if recipe.bundle.input.mpp is None:
            return f"{pixels:,} px"
        return f"{pixels * (recipe.bundle.mpp / 1000) ** 2:.2f} mm²"

    known: dict[str, list[npt.NDArray[np.int64]]] = {}
    for sample, found in zip(trained.samples, trained.surveys, strict=True):
        known.setdefault(sample.patient, []).append(found.totals)
    totals = {patient: np.sum(own, axis=0) for patient, own in known.items()}
    whole = np.sum(list(totals.values()), axis=0)
    patients = ["| patient | images | known |", "|---|---:|---:|"]
    patients += [f"| {p} | {len(known[p])} | {amount(totals[p].sum())} |" for p in sorted(known)]
    if len(known) > MANY:
        patients = [
            f"{len(trained.samples)} images of {len(known)} patients, {amount(whole.sum())} with "
            "known classes."
        ]
    classes = ["| class | patients | known |", "|---|---:|---:|"]
    for i, info in enumerate(recipe.bundle.classes):
        having = sum(bool(own[i]) for own in totals.values())
        classes.append(f"| {info.name} | {having} | {amount(whole[i])} |")
    return "\n".join(patients), "\n".join(classes)


def _ranged(value: float, ends: npt.NDArray[np.float64] | None) -> str:
    """Return a figure with the ends of its interval, where it has one."""
    return f"{value:.3f}" + ("" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})")


def _score_table(recipe: Recipe, trained: Trained) -> str:
    held_out = trained.held_out
    in_groups = recipe.split.folds or any(s.fold for s in trained.samples)
    how = "Groups of patients left out together" if in_groups else "Leave one patient out"
    by_whom = (
        f"{how}: for each row a network was trained by the same recipe without that patient. The "
        "weights here are trained on all patients, so no patient of the table is new to them."
    )
    if recipe.split.test:
        by_whom = "Patients who were kept apart for good: the weights here have seen none of them."
    lines = [
        f"{by_whom} Overlapping patches, pixels of a patient pooled.\n",
        "| held-out patient | class | Dice | IoU | share of class | called so "
        "| Dice of “everywhere” |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    scores = {p: scores_of(found.pixels, recipe.bundle) for p, found in held_out.items()}
    if len(scores) <= MANY:
        lines += [
            f"| {p} | {c} | {s.dice:.3f} | {s.iou:.3f} | {s.share:.3f} | {s.called:.3f} "
            f"| {s.everywhere_dice:.3f} |"
            if s.share > 0
            else f"| {p} | {c} | | | 0 | {s.called:.3f} | |"
            for p, classes in scores.items()
            for c, s in classes.items()
        ]
    absent = []
    for i, info in enumerate(recipe.bundle.classes[1:], 1):
        matrices = [found.pixels.matrix for found in held_out.values()]
        if without := [matrix for matrix in matrices if not matrix[i].any()]:
            absent += [
                "",
                f"- {len(without)} of {len(held_out)} show no {info.name}, and have no Dice: "
                f"{np.sum(without, (0, 1))[i]:,} of their {np.sum(without):,} px are called so",
            ]
        if own := [s for classes in scores.values() if (s := classes[info.name]).share > 0]:
            dice, iou, share, called, everywhere = (
                sum(getattr(s, f) for s in own) / len(own)
                for f in ("dice", "iou", "share", "called", "everywhere_dice")
            )
            lines.append(
                f"| **mean of {len(own)}** | {info.name} | **{dice:.3f}** | **{iou:.3f}** "
                f"| {share:.3f} | {called:.3f} | {everywhere:.3f} |"
            )
    lines += absent
    showing = [found.pixels for found in held_out.values() if found.pixels.matrix[1:].any()]
    if len(showing) > 1:
        by_class, _ = bootstrap(showing)
        whole = sum(showing, start=Confusion.empty(len(recipe.bundle.classes)))
        who = "all patients" if len(showing) == len(held_out) else "all patients who show a class"
        heading = f"Pixels of {who} together, with 95 % intervals by drawing patients anew:"
        lines += ["", heading, ""]
        for i, (name, score) in enumerate(scores_of(whole, recipe.bundle).items(), 1):
            if score.share:
                dice = _ranged(score.dice, by_class["dice"][:, i])
                iou = _ranged(score.iou, by_class["iou"][:, i])
                everywhere = f"“everywhere”: Dice {score.everywhere_dice:.3f}"
                lines.append(f"- {name}: Dice {dice}, IoU {iou}; {everywhere}")
    return "\n".join(lines)


def _image_lines(recipe: Recipe, held_out: Mapping[str, PatientScore]) -> str:
    """Return the figures image by image, "" for those of which a patient has parts."""
    if TRAITS[recipe.bundle.modality].is_part or not held_out:
        return ""
    each = [np.array([counts for _, counts in found.images]) for found in held_out.values()]
    lines = ["Image by image, with 95 % intervals by drawing patients anew:\n"]
    for i, info in enumerate(recipe.bundle.classes[1:], 1):
        rows = []
        for matrices in each:
            figures, shown = class_figures(Confusion.of(matrices)), matrices[:, i].any(1)
            found = matrices[~shown].sum(1)[:, i] > 0
            of_shown = [figures[name][shown, i].sum() for name in ("dice", "iou")]
            true, pixels = matrices[shown, i].sum(1), matrices[shown].sum((1, 2))
            of_shown.append((2 * true / (pixels + true)).sum())
            rows.append([*of_shown, shown.sum(), found.sum(), len(found)])
        # of each patient: sums of Dice, IoU and Dice of "everywhere" of the images that show the
        # class, how many do, in how many of the others some is found, how many others there are
        sums = np.array(rows, float)
        if sums[:, 3].any():
            dice, iou, all_over = (_mean_with_interval(sums[:, [k, 3]]) for k in range(3))
            lines.append(f"- {info.name}: Dice {dice}, IoU {iou}; “everywhere”: Dice {all_over}")
        if sums[:, 5].any():
            lines.append(
                f"- {sums[:, 5].sum():.0f} images show no {info.name}; in a share of "
                f"{_mean_with_interval(sums[:, 4:])} some is found all the same"
            )
    return "\n".join(lines)


def _mean_with_interval(sums: npt.NDArray[np.float64]) -> str:
    """Return a mean, and its interval by drawing patients anew.

    Args:
        sums: (patients, 2) sum of what is averaged, and how many that are.
    """
    value = sums[:, 0].sum() / sums[:, 1].sum()
    if len(sums) < 2:
        return _ranged(value, None)
    drawn = drawn_anew(sums)
    with np.errstate(invalid="ignore"):
        return _ranged(value, interval(drawn[:, 0] / drawn[:, 1]))


def _label_table(recipe: Recipe, held_out: Mapping[str, PatientScore]) -> str:
    """Return how often labels of whole patches are right, "" where there are none."""
    each = [found.labels for found in held_out.values() if found.labels.any()]
    if not each:
        return ""
    ends = None
    if len(each) > 1:
        sums = drawn_anew(each)
        ends = interval(np.trace(sums, axis1=1, axis2=2) / sums.sum((1, 2)))
    whole, names = np.sum(each, axis=0), recipe.bundle.labels
    commonest = whole.sum(1).max() / whole.sum()
    ranked = ""
    chances = [found.label_chances for found in held_out.values()]
    if len(names) == 2 and whole.any(1).all() and any(map(len, chances)):
        # how often a patch of the second label gets more of it than one of the first
        count = len(chances)
        rows, owner = np.concatenate(chances), np.repeat(np.arange(count), [*map(len, chances)])
        first, second = rows[:, 0] == 0, rows[:, 0] == 1
        above = np.sign(rows[second, 2][:, None] - rows[first, 2]) / 2 + 0.5
        areas = [
            # none of a draw that has one label alone
            float(of_second @ above @ of_first) / (of_second.sum() * of_first.sum() or math.nan)
            for weights in [np.ones(count), *drawn_anew(np.eye(count, dtype=np.int64))]
            for of_first, of_second in [(weights[owner[first]], weights[owner[second]])]
        ]
        area = _ranged(areas[0], interval(np.array(areas[1:])) if count > 1 else None)
        ranked = f" Area under the curve of {names[1]}: {area}."
    return "\n".join(
        [
            f"Labels of whole patches: {_ranged(accuracy(held_out), ends)} are right; if all were "
            f"given the commonest label, {commonest:.3f} would be.{ranked} Patches:\n",
            f"| true label | {' | '.join(f'said {name}' for name in names)} |",
            "|---|" + "---:|" * len(names),
            *(f"| {n} | {' | '.join(map(str, of))} |" for n, of in zip(names, whole, strict=True)),
        ]
    )


def _certainty(found: Sequence[PatientScore]) -> str:
    """Return how far probabilities hold, "" where nothing was held out."""
    if sum(len(f.pixel_chances) > 0 for f in found) < 2:
        return ""
    before = calibration_error(found, [1.0] * len(found))
    after = calibration_error(found, left_out_temperatures(found))
    own = calibration_error(found, [fit_temperature(found)] * len(found))
    return (
        f"Certainty on held-out patients: expected calibration error {before:.3f} as trained, "
        f"{after:.3f} at a temperature that fits other held-out patients, {own:.3f} at that of "
        f"`model.toml`, which fits them all ({BINS} bins; every patient counts alike)."
    )


def _unlike(found: Iterable[PatientScore]) -> str:
    """Return how often patches of held-out patients are unlike the others', "" where unknown."""
    told = [f for f in found if len(f.distances)]
    groups = [[f.distances for f in told if f.pixels.matrix[1:].any() == shows] for shows in (1, 0)]
    if not groups[0]:
        return ""
    shares = [
        _mean_with_interval(np.array([[(own > 1).mean(), 1] for own in group])) if group else ""
        for group in groups
    ]
    lines = [
        f"Unlike the training tissue (`unlike_percent`) is a share of {shares[0]} of the patches "
        "of held-out patients who show a class, by networks that have not seen them: false alarms"
    ]
    if shares[1]:
        like, unlike = (np.concatenate([np.array(own) for own in group]) for group in groups)
        area = (np.sign(unlike[:, None] - like) / 2 + 0.5).mean()
        lines.append(f"of those who show none it is {shares[1]}; area under the curve {area:.3f}")
    return "; ".join(lines) + ". Every patient counts alike in the shares."
