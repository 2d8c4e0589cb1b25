"""From runs and what people have corrected of them, a recipe of the next bundle."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.errors import RecipeError
from wsi_pipeline.report.record import RUN_FILE, find_runs, load_run
from wsi_pipeline.run.finished import source_path
from wsi_pipeline.training.recipe import AugmentSpec, DataSpec, Recipe, SplitSpec, TrainSpec

CORRECTIONS = "corrections"
"""Folder beside those of the runs, with `<slide>.geojson` of what people have corrected."""
REFIT = TrainSpec(steps=60, learning_rate=2e-4, average=0.9, encoder_rate=0.0, checkpoint_every=20)
"""Minutes on a CPU: the decoder alone learns, slowly enough to keep what it knows."""
NOTES = """\
Refitted to areas that were corrected by hand in runs of `{name}`, whose own card tells what it was
trained on, how well it did, and its licences. Nothing was held out: how well this one does
elsewhere is not known."""


def corrected_recipe(folder: Path, name: str) -> tuple[Recipe, Path]:
    """Return the recipe that refits a model to corrections, and where its paths start from.

    Args:
        folder: of one run, or the output folder of several, of one model.
        name: of the new bundle.

    Raises:
        RecipeError: no corrections, runs of several models, or one of no slide.
        BundleError: the model is gone, or another one is there.
    """
    runs = {folder: load_run(folder / RUN_FILE)} if (folder / RUN_FILE).is_file() else {}
    files = {}
    for home, run in (runs or find_runs(folder)).items():
        file = home.parent / CORRECTIONS / f"{home.name}.geojson"
        if file.is_file():
            files[home] = (run, file.absolute())
    if not files:
        raise RecipeError(
            f"{folder}: no run there has a {CORRECTIONS}/<slide>.geojson beside its folder; "
            "workflows/qupath/send_corrections.groovy writes them"
        )
    models = {c["model"]: c["bundle"] for run, _ in files.values() if (c := run.certificate)}
    if len(models) != 1 or any(run.kind != "slide" for run, _ in files.values()):
        raise RecipeError(f"{folder}: corrections are of runs of slides by one and the same model")
    ((digest, place),) = models.items()
    start = load_bundle(place)
    if start.digest != digest:
        raise RecipeError(f"{start.path} is not the model of these runs: its content differs")
    slides = {h: source_path(h, run.slide["path"]).absolute() for h, (run, _) in files.items()}
    root, *others = {Path(slide.anchor) for slide in slides.values()}
    if others:
        raise RecipeError(f"the slides lie on the drives {root} and {others[0]}; expected one")
    data = tuple(
        DataSpec(
            patient=home.name,
            images=glob.escape(slides[home].relative_to(root).as_posix()),
            annotations=str(file),
            classes={info.name: (info.name,) for info in start.classes[1:]},
            background="others",
            frame=run.frame["for"],
            mpp=run.settings["select"]["mpp"],
            icc=run.settings["select"].get("icc", "ignore"),
        )
        for home, (run, file) in files.items()
    )
    side = start.input.patch_size[-1]
    recipe = Recipe(
        bundle=replace(start, name=name),
        train=structs.replace(REFIT, crop=(side, side)),
        augment=AugmentSpec(),
        split=SplitSpec(),
        data=data,
        notes=NOTES.format(name=start.name),
        limits=start.limits,
        start=start,
    )
    return recipe, root
