"""A trained network out, as a bundle with its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import nn

from wsi_pipeline.bundle import bundle_toml
from wsi_pipeline.networks.weights import kept_state
from wsi_pipeline.store import written_beside
from wsi_pipeline.training.measure import Score
from wsi_pipeline.training.recipe import Recipe
from wsi_pipeline.training.samples import Sample

WEIGHTS = "model.safetensors"
Scores = Mapping[str, Mapping[str, Score]]
"""Held-out patient → class → score."""


def write_bundle(
    network: nn.Module,
    recipe: Recipe,
    samples: Sequence[Sample],
    scores: Scores,
    folder: Path,
) -> None:
    """Write `model.toml`, weights and model card of a trained network; return nothing.

    Args:
        network: trained.
        recipe: by which.
        samples: on which.
        scores: of networks trained likewise without the patient they are judged on.
        folder: to write into; made where it is missing, its three files replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        # half precision: half the size, and masks stay the same to a few pixels in a million
        name: tensor.half()
        for name, tensor in kept_state(network).items()
    }
    with written_beside(folder / WEIGHTS) as partial:
        partial.write_bytes(save(state))
    (folder / "model.toml").write_text(bundle_toml(recipe.bundle, weights=WEIGHTS), "utf-8")
    (folder / "README.md").write_text(model_card(recipe, samples, scores), "utf-8")


def model_card(recipe: Recipe, samples: Sequence[Sample], scores: Scores) -> str:
    """Return the card: what the network is, learnt from, and how well it does; Markdown."""
    bundle, train = recipe.bundle, recipe.train
    names = ", ".join(c.name for c in bundle.classes[1:])
    patch = " × ".join(map(str, bundle.input.patch_size))
    start = f"from the encoder weights `{train.encoder}`" if train.encoder else "from scratch"
    sections = [
        f"# {bundle.name}",
        f"`{bundle.network}` for {names} at {bundle.mpp} µm per pixel, in patches of {patch} px.",
        "**For research and demonstration. Not a medical device; not for diagnosis.**",
        "## Training data",
        recipe.notes,
        _data_table(recipe, samples),
        "## Training",
        f"{train.steps:,} steps of {train.batch_size} crops of {train.crop[0]} to "
        f"{train.crop[1]} px, {start}; cross-entropy and soft Dice; AdamW, learning rate up to "
        f"{train.learning_rate:g}; moving average of the weights; seed {train.seed}. Colours, "
        "geometry, focus and empty glass are varied at random.",
        "## How well it does",
        _score_table(scores),
    ]
    if recipe.limits:
        sections += ["## Limits", recipe.limits]
    return "\n\n".join(filter(None, sections)) + "\n"


def _data_table(recipe: Recipe, samples: Sequence[Sample]) -> str:
    area_mm2 = (recipe.bundle.mpp / 1000) ** 2
    rows = ["| patient | images | area mm² |", "|---|---:|---:|"]
    for patient in sorted({s.patient for s in samples}):
        own = [s.truth.numel() for s in samples if s.patient == patient]
        rows.append(f"| {patient} | {len(own)} | {sum(own) * area_mm2:.2f} |")
    return "\n".join(rows)


def _score_table(scores: Scores) -> str:
    if not scores:
        return "Not measured."
    rows = [
        "Leave one patient out: for each row a network was trained by the same recipe on the "
        "other patients only. Overlapping patches, pixels of a patient pooled. The weights here "
        "are trained on all patients, so no patient of the table is new to them.\n",
        "| held-out patient | class | Dice | IoU | share of class | Dice of “everywhere” |",
        "|---|---|---:|---:|---:|---:|",
    ]
    cells = [(p, c, s) for p, classes in scores.items() for c, s in classes.items()]
    rows += [
        f"| {p} | {c} | {s.dice:.3f} | {s.iou:.3f} | {s.share:.3f} | {s.everywhere_dice:.3f} |"
        for p, c, s in cells
    ]
    for name in dict.fromkeys(c for _, c, _ in cells):
        own = [s for _, c, s in cells if c == name]
        dice, iou, share, everywhere = (
            sum(getattr(s, f) for s in own) / len(own)
            for f in ("dice", "iou", "share", "everywhere_dice")
        )
        rows.append(
            f"| **mean** | {name} | **{dice:.3f}** | **{iou:.3f}** | {share:.3f} "
            f"| {everywhere:.3f} |"
        )
    return "\n".join(rows)
