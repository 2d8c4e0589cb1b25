"""`wsi-pipeline diff`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_pipeline.cli.options import OUTLINES, Command, options_of, output_option, wrong_usage
from wsi_pipeline.options import ExportOptions

FOLDER = click.Path(path_type=Path)


@click.command(cls=Command, epilog="wsi-pipeline diff out-a/ out-b/ --output changes/")
@click.argument("run_a", type=FOLDER)
@click.argument("run_b", type=FOLDER)
@output_option
@options_of(ExportOptions(), **{name: OUTLINES[name] for name in ("simplify_um", "min_area_um2")})
@click.pass_context
def command(
    ctx: click.Context,
    run_a: Path,
    run_b: Path,
    output: Path,
    simplify_um: float,
    min_area_um2: float,
) -> None:
    """Where do two runs of one slide differ, by two models, versions or precisions?

    RUN_A and RUN_B: folders of one run each, or two --output of `segment`, whose slides are paired
    by their names. Written are diff.geojson, the changed regions as polygons, largest first, and
    diff.csv, mm² that each class has gained and lost from A to B.

    Exit code 0: equal; 1: different; 3: cannot be compared.
    """
    from wsi_pipeline.cli.progress import Bars
    from wsi_pipeline.errors import UsageError
    from wsi_pipeline.evaluation.diff import diff

    with wrong_usage(UsageError), Bars(quiet=ctx.obj["quiet"], unit="blocks") as bars:
        found = diff(
            run_a,
            run_b,
            output=output,
            simplify_um=simplify_um,
            min_area_um2=min_area_um2,
            progress=bars,
        )
    for difference in found:
        if difference.reason:
            click.echo(f"cannot be compared: {difference.slide}: {difference.reason}", err=True)
        if difference.reason or ctx.obj["quiet"]:
            continue
        size, unit = (difference.pixel_mm2, "mm²") if difference.pixel_mm2 else (1, "px")
        told = ", ".join(
            f"{row['class']} {row['difference_px'] * size:+.6g} {unit}" for row in difference.rows()
        )
        odd = int(difference.pixels.sum() - difference.pixels.trace())
        verdict = f"{odd:,} pixels differ, regions: {difference.regions}" if odd else "equal"
        click.echo(f"{difference.slide}: {verdict}; {told}", err=True)
    is_different = any(not (other.is_equal or other.reason) for other in found)
    ctx.exit(1 if is_different else 3 if any(other.reason for other in found) else 0)
