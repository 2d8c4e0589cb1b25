"""`wsi-pipeline train`."""

from __future__ import annotations

import math
from pathlib import Path

import click

from wsi_pipeline.cli.options import FOLDER, Command, output_option, overwrite_option, wrong_usage
from wsi_pipeline.cli.progress import Bars


@click.command(cls=Command, epilog="wsi-pipeline train recipe.toml --data data/ --output my-model/")
@click.argument(
    "recipe_path",
    metavar="[RECIPE.toml]",
    required=False,
    type=click.Path(dir_okay=False, path_type=Path),
)
@click.option(
    "--from-corrections",
    "runs",
    metavar="RUN",
    type=FOLDER,
    help="In place of a recipe: refit the model of this run, or of these, to what was corrected.",
)
@click.option(
    "--data",
    "data_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Folder that the recipe's paths start from.  [default: the recipe's own folder]",
)
@output_option
@click.option(
    "--folds",
    default="all",
    metavar="all|none|NAME[,NAME…]",
    help="Patients or groups to hold out, each in a training of its own, before the one on all.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to train; auto is the GPU where there is one.",
)
@click.option(
    "--devices", type=click.IntRange(min=1), default=1, help="How many, each its own process."
)
@click.option(
    "--threads", type=click.IntRange(min=1, max=4096), help="CPU threads.  [default: all]"
)
@overwrite_option
@click.pass_context
def command(
    ctx: click.Context,
    recipe_path: Path | None,
    runs: Path | None,
    data_dir: Path | None,
    output: Path,
    folds: str,
    device: str,
    devices: int,
    threads: int | None,
    overwrite: bool,
) -> None:
    """Train the network of RECIPE.toml, measure it by patient, and write a bundle.

    Every patient is held out in turn and judged by a network that has not seen them; the bundle's
    weights are trained on all and lie in the --output folder. docs/training.md tells of recipes.
    The same command again goes on where it stopped.
    """
    if (recipe_path is None) == (runs is None) or (runs and data_dir):
        raise click.UsageError("expected RECIPE.toml, with --data or not, or --from-corrections")
    import torch

    from wsi_pipeline.inference.predictor import choose_device
    from wsi_pipeline.training.corrections import corrected_recipe
    from wsi_pipeline.training.recipe import load_recipe
    from wsi_pipeline.training.train import train

    if device == "cuda":
        with wrong_usage():
            choose_device(device)
    if threads:
        torch.set_num_threads(threads)

    def show(name: str, done: int, total: int, loss: float, best: float | None) -> None:
        bars(name, done, total)
        # Features have no loss.
        if not math.isnan(loss):
            bars.tell(name, f"loss={loss:.3f}" + ("" if best is None else f", Dice={best:.3f}"))

    if runs:
        recipe, data_dir = corrected_recipe(runs, output.name)
        folds = "none"
    else:
        assert recipe_path is not None
        recipe, data_dir = load_recipe(recipe_path), data_dir or recipe_path.parent
    with Bars(quiet=ctx.obj["quiet"], unit="steps") as bars:
        scores = train(
            recipe,
            data_dir,
            output,
            folds={"all": None, "none": ()}.get(folds, tuple(folds.split(","))),
            device=device,
            devices=devices,
            overwrite=overwrite,
            progress=show,
        )
    for patient, classes in scores.items():
        for name, score in classes.items():
            figures = f"Dice {score.dice:.3f}\tIoU {score.iou:.3f}"
            nothing = f"Dice -\tIoU -\tnot there, called so in {score.called:.3f}"
            click.echo(f"{patient}\t{name}\t{figures if score.share else nothing}")
