"""`wsi-pipeline segment`."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click
from click.core import ParameterSource

from wsi_pipeline.cli.options import (
    DEVICE,
    MPP,
    OUTLINES,
    Command,
    Figure,
    OutputChoice,
    Parsed,
    heading,
    inputs_argument,
    options_of,
    overwrite_option,
    rule_options,
    select_options,
    some_of,
    work_option,
    wrong_usage,
)
from wsi_pipeline.cli.stop import end, stopping
from wsi_pipeline.errors import UsageError
from wsi_pipeline.options import (
    OUTPUTS,
    Blend,
    Combine,
    ExportOptions,
    Flaw,
    Ngff,
    Output,
    Precision,
    PredictOptions,
    Queue,
    ScheduleOptions,
    SelectOptions,
    Settings,
    Tta,
    as_plain,
    chosen,
    turns,
)

if TYPE_CHECKING:
    from wsi_pipeline.report.record import Run
    from wsi_pipeline.run.estimate import Estimate
    from wsi_pipeline.run.jobs import Job
    from wsi_pipeline.run.main import Batch
    from wsi_pipeline.run.preview import Preview

LINE = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
"""Where options come from that somebody has chosen."""
PREDICT, EXPORT = PredictOptions(), ExportOptions()
ROWS = 40
"""Of the table at the end, at the most."""


def read_shard(text: str) -> tuple[int, int]:
    """Return (i, n): the i-th of n equal shares, counted from 1."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"{text!r} is not of the form I/N, such as 2/8") from None
    if not 1 <= index <= count:
        raise ValueError(f"{text!r}: I must lie between 1 and N")
    return index, count


def read_gpus(text: str) -> tuple[int, ...]:
    """Return the numbers of GPUs, each once."""
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{text!r} is no list of numbers such as 0,2")
    return tuple(dict.fromkeys(map(int, numbers)))


def read_memory(text: str) -> int:
    """Return the bytes of a size with its unit."""
    from wsi_pipeline.schedule.memory import read_size

    if (size := read_size(text)) <= 0:
        raise ValueError(f"{text!r} is no memory at all")
    return size


@click.command(
    cls=Command, epilog="wsi-pipeline segment slides/ --model lightmuseg-bcss-demo --output out/"
)
@inputs_argument
@heading("Input")
@select_options()
@heading("Input", rare=True)
@click.option(
    "--any-resolution",
    is_flag=True,
    help="Take slides, too, that are more than 2.5 times as coarse as the model.",
)
@click.option(
    "--time-point",
    type=click.IntRange(min=0),
    help="Which volume of a DICOM series, NIfTI or NRRD with several in one place, from 0.",
)
@heading("Model")
@click.option(
    "--model",
    "-m",
    "models",
    metavar="BUNDLE",
    required=True,
    multiple=True,
    help="Its folder, name or URL; once for each.",
)
@options_of(PREDICT, device=(DEVICE, "auto, cpu, cuda, cuda:N or mps."))
@heading("Model", rare=True)
@click.option(
    "--combine", type=click.Choice(get_args(Combine)), help="Several models as one: their ensemble."
)
@options_of(
    PREDICT,
    overlap=(click.IntRange(min=0), "px between patches  [default: the bundle's]"),
    blend=(Blend, "How overlapping predictions combine."),
    tta=(
        Tta,
        "Predict each patch mirrored (flip: left to right alone), or turned by right angles, too, "
        "and take the mean  [default: the bundle's]",
    ),
)
@heading("What to segment")
@rule_options
@options_of(
    PREDICT,
    skip=(
        some_of(get_args(Flaw)),
        f"Leave out of the mask what is {', '.join(get_args(Flaw))}  [default: nothing]",
    ),
)
@heading("Output")
@click.option(
    "--output",
    "-o",
    required=True,
    type=OutputChoice(url=True),
    help="For the results; s3://… too.",
)
@options_of(
    EXPORT,
    outputs=(some_of(get_args(Output)), f"{', '.join(get_args(Output))}  [default: by modality]"),
)
@options_of(PREDICT, mask_mpp=(MPP, "µm per pixel of the mask  [default: the slide's]"))
@overwrite_option
@click.option("--preview", is_flag=True, help="Estimate areas from a few patches, in seconds.")
@click.option("--dry-run", is_flag=True, help="Say what it would take; do nothing.")
@heading("Output", rare=True)
@work_option
@click.option("--quality", is_flag=True, help="Write quality.ome.zarr and its areas besides, too.")
@options_of(
    EXPORT,
    ngff=(Ngff, "OME-Zarr version."),
    probability_mpp=(
        MPP,
        "µm per pixel of probability.ome.zarr, a whole multiple of the model's  [default: the "
        "model's]",
    ),
    **OUTLINES,
)
@click.option(
    "--max-unreadable",
    type=Figure(min=0, max=100),
    default=100 * EXPORT.max_unreadable,
    callback=lambda ctx, param, percent: percent / 100,
    help="Percent of the patches' area that may be unreadable; a slide with more fails.",
)
@heading("Speed and memory")
@options_of(
    ScheduleOptions(),
    max_ram=(Parsed("SIZE", read_memory), "Memory to take, such as 8GB  [default: all]"),
    threads=(click.IntRange(min=1), "CPUs to keep busy.  [default: all]"),
)
@heading("Speed and memory", rare=True)
@options_of(
    PREDICT,
    precision=(
        Precision,
        "Number format of the forward pass; auto takes the fastest that the device has.",
    ),
    batch_size=(
        click.IntRange(min=1, max=65_536),
        "Patches in a forward pass  [default: by device]",
    ),
    block_size=(
        click.IntRange(min=64),
        "Side of a unit of work, px of the mask  [default: 2048, with --ngff 0.5 4096; 256 in "
        "volumes]",
    ),
)
@options_of(
    ScheduleOptions(),
    workers=(click.IntRange(min=1), "Workers in this process, or jobs of --cluster."),
    gpus=(Parsed("N,N", read_gpus), "This machine's GPUs to use  [default: all]"),
)
@heading("Cluster", rare=True)
@options_of(
    ScheduleOptions(),
    scheduler=(str, "Address or scheduler file of a running dask scheduler."),
    cluster=(Queue, "Queue to which workers are submitted, as dask's configuration says."),
)
@click.option(
    "--shard", type=Parsed("I/N", read_shard), help="Do only the I-th of N shares of the slides."
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    inputs: tuple[str, ...],
    models: tuple[str, ...],
    combine: Combine | None,
    output: Path,
    work: Path | None,
    mpp_table: Path | None,
    shard: tuple[int, int] | None,
    overwrite: bool,
    quality: bool,
    preview: bool,
    dry_run: bool,
    **options: object,
) -> None:
    """Segment slides, or images and volumes: masks, QuPath polygons, overviews.

    INPUT: files, folders, patterns, or a .txt file with one path a line. The same command again
    goes on where it stopped.
    """
    # What is imported stays: to look for garbage in it takes a third of the time, and later more.
    gc.disable()
    from wsi_pipeline.run.main import plan_batch

    gc.freeze()
    gc.enable()
    if preview and dry_run:
        raise click.UsageError("--preview and --dry-run exclude each other")
    options |= {
        "skip": options["skip"] or (),
        "outputs": options["outputs"] or (),
        "gpus": options["gpus"] or (),
    }
    # What was not asked for by name stays, in a finished run, as `export` has left it.
    given = {f.name for f in fields(ExportOptions) if ctx.get_parameter_source(f.name) in LINE}
    export = chosen(ExportOptions, options)
    if quality:
        export = replace(export, outputs=(*(export.outputs or OUTPUTS["slide"]), "quality"))
        given.add("outputs")
    with wrong_usage(UsageError):
        batch = plan_batch(
            inputs,
            model=models,
            combine=combine,
            output=output,
            work=work,
            mpp_table=mpp_table,
            shard=shard,
            overwrite=overwrite,
            settings=Settings(
                named={name: value for name, value in as_plain(export).items() if name in given},
                select=chosen(SelectOptions, options),
                predict=chosen(PredictOptions, options),
                export=export,
            ),
            schedule=chosen(ScheduleOptions, options),
        )
    quiet = ctx.obj["quiet"]
    if dry_run:
        done = _dry_run(batch)
    else:
        done = _preview(batch, quiet=quiet) if preview else _run(batch, quiet=quiet)
    if not done:
        ctx.exit(1)


def _run(batch: Batch, *, quiet: bool) -> bool:
    """Segment the slides, and say how each ended; return whether all are whole."""
    from wsi_pipeline.cli.progress import Bars
    from wsi_pipeline.files.locks import GOES_ON
    from wsi_pipeline.files.paths import name_of, without_secrets
    from wsi_pipeline.run.main import run_batch

    numbers = {job.folder: number for number, job in enumerate(batch.jobs, start=1)}

    def tell(job: Job, run: Run) -> None:
        # The next line would be written into the bar.
        bars.end(numbers[job.folder])
        if run.status != "done":
            path = without_secrets(str(job.path))
            click.echo(f"{run.status}: {path}: {run.reason}", err=True)
        elif not quiet:
            facts = [f"{name} {n:.4g} {run.unit}" for name, n in run.amounts.items()]
            facts += [f"{label} {p:.3f}" for label, p in run.labels.items()]
            home = without_secrets(str(job.home))
            click.echo(f"done: {name_of(job.path)} → {home} ({', '.join(facts)})", err=True)
        for warning in run.warnings:
            click.echo(f"warning: {name_of(job.path)}: {warning}", err=True)

    with (
        stopping(batch.tidy, f"stopped: {GOES_ON}"),
        Bars(quiet=quiet, unit="patches", of=len(batch.jobs)) as bars,
    ):
        for bundle in batch.bundles:
            if not quiet and bundle.limits:
                click.echo(f"limits of {bundle.name}: {bundle.limits}", err=True)
        runs = run_batch(
            batch,
            progress=lambda job, done, total: bars(
                name_of(job.path), done, total, number=numbers[job.folder]
            ),
            stage=lambda job, text: bars.tell(name_of(job.path), text, number=numbers[job.folder]),
            ended=tell,
            dashboard=None if quiet else lambda link: click.echo(f"dashboard: {link}", err=True),
            too_large=lambda sentence: end(batch.tidy, f"Error: {sentence}", 1),
        )
    if not quiet and len(runs) > 1:
        click.echo(_table(runs), err=True)
        report = (batch.target or batch.output) / "report.html"
        click.echo(f"report: {without_secrets(str(report))}", err=True)
    return all(run.status == "done" and not run.bad_regions for run in runs)


def _table(runs: Sequence[Run]) -> str:
    """Return how each slide ended, a line each, failures first."""
    rows = sorted(runs, key=lambda run: run.status == "done")
    several = len({run.model["name"] for run in runs}) > 1
    classes = dict.fromkeys(f"{name} {run.unit}" for run in rows for name in run.amounts)
    lines = [["slide", "status", *classes, "minutes", "warnings"]]
    for run in rows[:ROWS]:
        found = {f"{name} {run.unit}": f"{n:.4g}" for name, n in run.amounts.items()}
        minutes = f"{run.seconds.get('total', 0) / 60:.1f}"
        amounts = (found.get(name, "-") for name in classes)
        name = run.slide["name"] + f" by {run.model['name']}" * several
        lines.append([name, run.status, *amounts, minutes, str(len(run.warnings))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    if rest := rows[ROWS:]:
        table.append(f"and {len(rest)} more, all in summary.csv")
    return "\n".join(table)


def _preview(batch: Batch, *, quiet: bool) -> bool:
    """Say what a few patches tell of each slide, a line a class; return whether all could be."""
    from wsi_pipeline.cli.progress import Bars
    from wsi_pipeline.files.paths import name_of, without_secrets
    from wsi_pipeline.run.preview import preview_batch

    def tell(job: Job, found: Preview) -> None:
        bars.close()
        if found.reason:
            path = without_secrets(str(job.path))
            click.echo(f"failed: {path}: {found.reason}", err=True)
        slide = f"{name_of(job.path)}: " if len(batch.jobs) > 1 else ""
        for name, (mm2, low, high) in found.areas.items():
            click.echo(
                f"{slide}{name} {mm2:.3g} mm² (95 %: {low:.3g}–{high:.3g}) from {found.patches:,} "
                f"of {found.of:,} patches, {found.seconds:.0f} s"
            )

    with (
        stopping(batch.tidy, "stopped"),
        Bars(quiet=quiet, unit="patches") as bars,
        wrong_usage(UsageError),
    ):
        found = preview_batch(
            batch,
            progress=lambda job, done, of: bars(name_of(job.path), done, of),
            ended=tell,
            too_large=lambda sentence: end(batch.tidy, f"Error: {sentence}", 1),
        )
    return not any(one.reason for one in found)


def _dry_run(batch: Batch) -> bool:
    """Say what a run would take, a line for each slide and one for all; return whether it could."""
    from wsi_pipeline.errors import WsiPipelineError
    from wsi_pipeline.files.paths import without_secrets
    from wsi_pipeline.run.estimate import beside, estimate, model_bytes, patches_per_second
    from wsi_pipeline.schedule.memory import cpu_count

    # Once for all slides: they are the model's and the machine's.
    predict, found = batch.settings.predict, []
    cpus = batch.schedule.threads or cpu_count()
    rates = [patches_per_second(b, predict, threads=cpus) for b in batch.bundles]
    models, memory = list(map(model_bytes, batch.bundles)), dict[Path, int]()
    for job in batch.jobs:
        try:
            one = estimate(
                job,
                batch.bundles[job.model],
                settings=batch.settings,
                workers=batch.schedule.workers,
                blocks_in_hand=batch.schedule.blocks_in_hand,
                threads=batch.threads,
                rate=rates[job.model],
                model=models[job.model],
                overwrite=batch.overwrite,
            )
        except WsiPipelineError as error:
            click.echo(without_secrets(f"{job.path}\twould fail: {error}"))
            continue
        found.append(one)
        memory[job.path] = beside(memory.get(job.path, 0), one.memory)
        size = " × ".join(map(str, reversed(one.mask_shape)))
        path, home = without_secrets(str(job.path)), without_secrets(str(job.home))
        click.echo(f"{path}\t{size} px mask\t{_needs(one)}\t→ {home}")
    if len(batch.jobs) > 1 and found:
        total = replace(
            found[0],
            patches=sum(e.patches for e in found),
            seconds=sum(e.seconds for e in found),
            # Given back after each slide, so that the largest tells of all.
            memory=max(memory.values()),
            disk=sum(e.disk for e in found),
            files=sum(e.files for e in found),
        )
        home = without_secrets(str(batch.target or batch.output))
        count = f"total of {len(memory)} {batch.bundle.modality}s"
        click.echo(f"{count}\t\t{_needs(total)}\t→ {home}")
    for bundle, rate in zip(batch.bundles, rates, strict=True):
        shown = len(turns(tta := predict.tta or bundle.tta, bundle.input.patch_size))
        often = f", each predicted {shown} times (--tta {tta})" if shown > 1 else ""
        whose = f" by {bundle.name}" if len(rates) > 1 else ""
        click.echo(f"estimated from {rate:.3g} patches/s of this machine{whose}{often}", err=True)
    return len(found) == len(batch.jobs)


def _needs(estimate: Estimate) -> str:
    return (
        f"{estimate.patches} patches\tabout {estimate.seconds / 60:.1f} min\t"
        f"{estimate.memory / 1e9:.1f} GB memory\t{estimate.disk / 1e9:.2f} GB disk\t"
        f"at most {estimate.files} files"
    )
