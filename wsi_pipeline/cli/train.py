"""`wsi-pipeline train`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_pipeline.cli.options import output_option


@click.command()
@click.argument(
    "recipe_path", metavar="RECIPE.toml", type=click.Path(dir_okay=False, path_type=Path)
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
    metavar="all|none|PATIENT[,PATIENT…]",
    help="Patients to hold out, each in a training of its own, before the one on all.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.pass_context
def command(
    ctx: click.Context,
    recipe_path: Path,
    data_dir: Path | None,
    output: Path,
    folds: str,
    threads: int | None,
) -> None:
    """Train the network of RECIPE.toml, measure it by patient, and write a bundle.

    Every patient is held out in turn and judged by a network that has not seen them; the bundle's
    weights are trained on all and lie in the --output folder. docs/training.md tells of recipes.
    """
    import torch

    from wsi_pipeline.cli.progress import Bars
    from wsi_pipeline.training.recipe import load_recipe
    from wsi_pipeline.training.train import train

    if threads:
        torch.set_num_threads(threads)
    with Bars(quiet=ctx.obj["quiet"], unit="step") as bars:
        scores = train(
            load_recipe(recipe_path),
            data_dir or recipe_path.parent,
            output,
            folds={"all": None, "none": ()}.get(folds, tuple(folds.split(","))),
            progress=bars,
        )
    for patient, classes in scores.items():
        for name, score in classes.items():
            click.echo(f"{patient}\t{name}\tDice {score.dice:.3f}\tIoU {score.iou:.3f}")
