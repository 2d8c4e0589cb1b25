"""`wsi-pipeline export`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

import click

from wsi_pipeline.cli.options import (
    FILE,
    FOLDER,
    OUTLINES,
    Command,
    OutputChoice,
    frame_option,
    options_of,
    rule_options,
    some_of,
    wrong_usage,
)
from wsi_pipeline.options import Output, Rule


@click.command(cls=Command, epilog="wsi-pipeline export out/ --simplify 2 --min-area 500")
@click.argument("folders", metavar="RUN_DIR...", nargs=-1, required=True, type=FOLDER)
@options_of(
    None,
    outputs=(
        some_of([output for output in get_args(Output) if output not in ("zarr", "probability")]),
        "To write besides those that are there.",
    ),
    **OUTLINES,
)
@rule_options
@click.option(
    "--as-mask", is_flag=True, help="Make polygons, tables and overview of the mask itself again."
)
@click.option(
    "--output",
    "-o",
    type=OutputChoice(url=False),
    help="Folder for whole new runs, with masks by these thresholds.",
)
@click.option(
    "--corrections",
    type=FILE,
    help="GeoJSON of what was corrected in areas of Region*, for a new run with --output.",
)
@click.option(
    "--qupath-project",
    type=click.Path(path_type=Path),
    help="New folder for a QuPath project of the slides, with their polygons.",
)
@click.option(
    "--store", metavar="URL", help="Send their DICOM to a server, as dicomweb://HOST/dicom-web."
)
@frame_option("Whose origin polygons and TIFF have on slides with bounds.", default=None)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    folders: tuple[Path, ...],
    thresholds: dict[str, float],
    min_margin: float,
    as_mask: bool,
    output: Path | None,
    corrections: Path | None,
    qupath_project: Path | None,
    store: str | None,
    **options: object,
) -> None:
    """Write what is made of finished masks again, with other settings.

    RUN_DIR: the folder of one slide, image or volume, or the --output of `segment` for all of them
    but those that failed. What is not given stays as it was. The model is not needed, nor are
    slides, but for DICOM those that OpenSlide reads; overlays, NIfTI and DICOM segmentations need
    the image or volume where it was.
    """
    from wsi_pipeline.errors import StoreError, WsiPipelineError
    from wsi_pipeline.files.dicomweb import Client, read_address
    from wsi_pipeline.report.record import FILES, MASKS, RUN_FILE, Run, find_runs
    from wsi_pipeline.run.again import export_again
    from wsi_pipeline.run.overview import Overview
    from wsi_pipeline.run.thresholds import copy_ruled

    rule = Rule(thresholds=thresholds, min_margin=min_margin)
    if as_mask and (rule or output):
        raise click.UsageError("--as-mask excludes --threshold, --min-margin and --output")
    if corrections and (output is None or len(folders) > 1):
        raise click.UsageError("--corrections is of one run, and needs --output for the new one")
    with wrong_usage():
        server = Client(read_address(store)) if store else None
    changes = {name: value for name, value in options.items() if value is not None}
    # with where it lies in the folder that was named: one of several models has a folder there
    runs = dict[Path, Path]()
    for folder in folders:
        if (folder / RUN_FILE).is_file():
            runs[folder] = Path()
            continue
        for path, run in find_runs(folder).items():
            if run.status == "done" or any((path / FILES[o]).exists() for o in MASKS):
                runs[path] = path.relative_to(folder).parent
            else:
                # it never had a mask, of which `segment` has told
                click.echo(f"left out: {path} has no mask: {run.reason}", err=True)
    if not runs:
        raise click.UsageError(f"no finished run in {', '.join(map(str, folders))}")
    is_whole, written, sent = True, dict[Path, Run](), Counter[bool]()
    for folder, within in runs.items():
        try:
            if output:
                folder = copy_ruled(folder, output / within, rule, corrections)
            run = export_again(folder, changes, rule if as_mask or (rule and not output) else None)
            if server:
                files = sorted(name for name in run.files if name.endswith(".dcm"))
                sent.update(server.send(folder / name) for name in files)
                if not files:
                    raise StoreError("no DICOM to send: --outputs dicom writes it")
        except WsiPipelineError as error:
            click.echo(f"failed: {folder}: {error}", err=True)
            is_whole = False
            continue
        written[folder] = run
        for warning in run.warnings:
            click.echo(f"warning: {folder.name}: {warning}", err=True)
        if run.status != "done":
            click.echo(f"failed: {folder}: {run.reason}", err=True)
            is_whole = False
        elif not ctx.obj["quiet"]:
            lesions = [f"{name} {found['count']} lesions" for name, found in run.lesions.items()]
            regions = [f"{name} {n} regions" for name, n in run.regions.items()]
            found = ", ".join(lesions or regions)
            click.echo(f"done: {folder} ({found})", err=True)
    if server and not ctx.obj["quiet"]:
        click.echo(f"stored: {sent[True]} files of DICOM, {sent[False]} were there", err=True)
    # Summary and report tell of all runs in a folder, of those that were left alone, too.
    if output and output.is_dir():
        Overview(output).write()
    # Above the folder of one of several models is theirs.
    for parent in dict.fromkeys(parent for folder in runs for parent in folder.parents[:2]):
        if not output and (parent / "summary.csv").is_file():
            Overview(parent).write()
    # Of why there is nothing to write people have been told.
    if qupath_project and written:
        from wsi_pipeline.run.qupath import write_qupath_project

        write_qupath_project(qupath_project, written)
    ctx.exit(int(not is_whole))
