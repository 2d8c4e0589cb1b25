"""Networks against each other: one table and one picture of what `train` measured of each.

wsi-pipeline train workflows/train/bcss-compare.toml --data DATA --output lightmuseg
wsi-pipeline train workflows/train/bcss-compare-unet.toml --data DATA --output unet
python benchmarks/compare_training.py workflows/train/bcss-compare.toml=lightmuseg \\
    workflows/train/bcss-compare-unet.toml=unet --output bcss-compare

Each argument is a recipe and the folder that it was trained into. Writes Markdown (each held-out
patient's Dice and IoU, and those of all pixels of the patients who show the class, with intervals
by drawing them anew) and a PNG (loss, and Dice of who is held out together, over the steps, where
the recipe says `watch = true`).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.evaluation.confusion import Confusion, bootstrap
from wsi_pipeline.networks import create
from wsi_pipeline.training.recipe import load_recipe
from wsi_pipeline.training.train import load_held_out
from wsi_pipeline.training.validate import Score, scores_of

Row = dict[str, float]
COLORS = ("#4575b4", "#d73027", "#1a9850", "#984ea3")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What `train` left of a recipe.

    Attributes:
        bundle: that was trained.
        held_out: of each patient, what was right and wrong.
        histories: of each fold's training, by the patients that it did not see.
    """

    bundle: Bundle
    held_out: dict[str, Confusion]
    histories: dict[tuple[str, ...], list[Row]]

    @property
    def label(self) -> str:
        """Return the network and its size."""
        count = sum(p.numel() for p in create(self.bundle).parameters())
        return f"{self.bundle.network} ({count / 1e6:.2f} M)"

    def scores(self, patient: str) -> dict[str, Score]:
        """Return each class's score in one patient."""
        return scores_of(self.held_out[patient], self.bundle)


def read(recipe: Path, folder: Path) -> Trained:
    """Return what was measured by a recipe.

    Raises:
        SystemExit: nothing was.
    """
    held_out, histories = dict[str, Confusion](), {}
    for path in sorted(folder.glob(".training/*/held_out.json")):
        found = {patient: judged.pixels for patient, judged in load_held_out(path).items()}
        held_out |= found
        with (path.parent / "history.csv").open(encoding="utf-8", newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        histories[tuple(sorted(found))] = rows
    if not held_out:
        raise SystemExit(f"{folder}: no held-out patient was measured there; train with --folds")
    return Trained(bundle=load_recipe(recipe).bundle, held_out=held_out, histories=histories)


def markdown(trained: Sequence[Trained]) -> Iterator[str]:
    """Yield the lines of the tables, one for each class."""
    patients = sorted(set.intersection(*(set(t.held_out) for t in trained)))
    for i, info in enumerate(trained[0].bundle.classes[1:], 1):
        columns = [f"{t.label} Dice | IoU" for t in trained]
        yield f"| held-out patient, {info.name} | {' | '.join(columns)} | Dice of “everywhere” |"
        yield "|---|" + "---:|" * (2 * len(trained) + 1)
        rows = {p: [t.scores(p)[info.name] for t in trained] for p in patients}
        for patient, scores in rows.items():
            cells = " | ".join(
                f"{s.dice:.3f} | {s.iou:.3f}"
                if s.share
                else f"not there, called so in {s.called:.3f} |"
                for s in scores
            )
            everywhere = f"{scores[0].everywhere_dice:.3f}" if scores[0].share else ""
            yield f"| {patient} | {cells} | {everywhere} |"
        means = np.nanmean([[(s.dice, s.iou) for s in scores] for scores in rows.values()], axis=0)
        cells = " | ".join(f"**{dice:.3f}** | **{iou:.3f}**" for dice, iou in means)
        shown = [p for p, scores in rows.items() if scores[0].share]
        mean = np.mean([rows[p][0].everywhere_dice for p in shown])
        yield f"| **mean** | {cells} | {mean:.3f} |"
        yield ""
        for t in trained:
            yield f"- {t.label}: {_pooled([t.held_out[p] for p in shown], t.bundle, i)}"
        yield ""


def _pooled(confusions: Sequence[Confusion], bundle: Bundle, index: int) -> str:
    """Return the figures of all pixels together, with intervals where there are two patients."""
    whole = sum(confusions, start=Confusion.empty(len(bundle.classes)))
    score = list(scores_of(whole, bundle).values())[index - 1]
    intervals = bootstrap(confusions)[0] if len(confusions) > 1 else {}
    cells = []
    for name, value in (("Dice", score.dice), ("IoU", score.iou)):
        cells.append(f"{name} {value:.3f}")
        if intervals:
            low, high = intervals[name.lower()][:, index]
            cells[-1] += f" ({low:.3f} to {high:.3f})"
    return f"{', '.join(cells)}; “everywhere”: Dice {score.everywhere_dice:.3f}"


def draw(trained: Sequence[Trained], path: Path) -> None:
    """Draw the loss, and a panel of Dice over steps for each fold; return nothing."""
    from matplotlib.figure import Figure

    folds = sorted(set.intersection(*(set(t.histories) for t in trained)))
    figure = Figure(figsize=(3.2 * (1 + len(folds)), 3.2), layout="constrained")
    loss, *panels = figure.subplots(1, 1 + len(folds))
    loss.set(title="learning", xlabel="step", ylabel="loss")
    for t, color in zip(trained, COLORS, strict=False):
        for fold in folds:
            rows = t.histories[fold]
            loss.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=color, lw=0.8)
    for fold, axes in zip(folds, panels, strict=True):
        axes.set(title=",\n".join(fold) + " held out", xlabel="step", ylabel="Dice", ylim=(0, 1))
        for t, color in zip(trained, COLORS, strict=False):
            looks = [r for r in t.histories[fold] if "held_out_dice" in r]
            steps, dice = [r["step"] for r in looks], [r["held_out_dice"] for r in looks]
            axes.plot(steps, dice, color=color, marker="o", label=t.label)
        everywhere = [s.everywhere_dice for p in fold for s in trained[0].scores(p).values()]
        axes.axhline(np.nanmean(everywhere), color="grey", ls=":", label="everywhere")
    panels[0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read, write, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trained", nargs="+", metavar="RECIPE=FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="of FILE.md and FILE.png")
    arguments = parser.parse_args()
    pairs = [pair.partition("=")[::2] for pair in arguments.trained]
    trained = [read(Path(recipe), Path(folder)) for recipe, folder in pairs]
    text = "\n".join(markdown(trained))
    arguments.output.with_suffix(".md").write_text(text, "utf-8")
    draw(trained, arguments.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
