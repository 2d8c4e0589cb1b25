"""`wsi-pipeline tile`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from wsi_pipeline.cli.options import (
    MPP,
    Command,
    heading,
    inputs_argument,
    output_option,
    overwrite_option,
    select_options,
    wrong_usage,
)
from wsi_pipeline.options import SelectOptions, chosen


@click.command(
    cls=Command, epilog="wsi-pipeline tile slides/ --mpp 0.5 --patch-size 512 --output grids/"
)
@inputs_argument
@heading("Input")
@select_options("--slide-mpp")
@heading("Patches")
@click.option(
    "--mpp", "target_mpp", type=MPP, required=True, help="Resolution to store, µm per pixel."
)
@click.option("--patch-size", type=click.IntRange(min=1), default=512, help="Side of a patch, px.")
@click.option(
    "--overlap", type=click.IntRange(min=0), default=0, help="px between neighbouring patches."
)
@heading("Output")
@output_option
@overwrite_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    inputs: tuple[str, ...],
    target_mpp: float,
    patch_size: int,
    overlap: int,
    output: Path,
    mpp_table: Path | None,
    overwrite: bool,
    **options: object,
) -> None:
    """Write slides as zarr patch grids, OUTPUT/<slide>.zarr, that `segment` and training read.

    A grid that is there already is kept, unless --overwrite is given.
    """
    from wsi_pipeline.cli.progress import Bars
    from wsi_pipeline.errors import MissingMppError, WsiPipelineError
    from wsi_pipeline.files.paths import name_of, without_secrets
    from wsi_pipeline.patch_grid import is_patch_grid
    from wsi_pipeline.run.jobs import (
        SLIDE_SUFFIXES,
        find_slides,
        plan_jobs,
        read_mpp_table,
        why_none,
    )
    from wsi_pipeline.run.tile import tile
    from wsi_pipeline.tissue.select import check_files

    if overlap >= patch_size:
        raise click.UsageError(f"--overlap {overlap} must be below --patch-size {patch_size}")
    with wrong_usage():
        table = read_mpp_table(mpp_table) if mpp_table else None
    slides = find_slides(inputs, output=output)
    if not slides:
        raise click.UsageError(why_none(inputs, "slides", SLIDE_SUFFIXES))
    select = chosen(SelectOptions, options)
    with wrong_usage():
        check_files(select)
    failed = 0
    with Bars(quiet=ctx.obj["quiet"], unit="blocks", of=len(slides)) as bars:
        for number, job in enumerate(plan_jobs(slides, output, table), start=1):
            target = job.folder.with_name(f"{job.folder.name}.zarr")
            if is_patch_grid(target) and not overwrite:
                bars.end(number)
                click.echo(f"{target} is there already; --overwrite writes it anew", err=True)
                continue
            try:
                stored = tile(
                    job.path,
                    target,
                    mpp=target_mpp,
                    patch_size=patch_size,
                    overlap=overlap,
                    select=job.select(select),
                    progress=partial(bars, name_of(job.path), number=number),
                )
            except WsiPipelineError as error:
                bars.end(number)
                reason = str(error).removeprefix(f"{without_secrets(str(job.path))}: ")
                if isinstance(error, MissingMppError):
                    reason = reason.replace("--mpp", "--slide-mpp")
                click.echo(without_secrets(f"failed: {job.path}: {reason}"), err=True)
                failed += 1
                continue
            bars.end(number)
            click.echo(f"done: {target} ({len(stored.patches)} patches)", err=True)
            for doubt in stored.info.doubts:
                click.echo(f"warning: {name_of(job.path)}: {doubt}", err=True)
            if stored.unreadable:
                click.echo(
                    f"{len(stored.unreadable)} parts of {name_of(job.path)} cannot be read: they "
                    "are white in the grid, which names them, and unreadable to segment",
                    err=True,
                )
                failed += 1
    ctx.exit(int(failed > 0))
