"""`wsi-pipeline status`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from wsi_pipeline.cli.options import Command, OutputChoice, work_option, wrong_usage
from wsi_pipeline.cli.progress import duration


@click.command(cls=Command, epilog="wsi-pipeline status out/")
@click.argument("folder", metavar="DIR", type=OutputChoice(url=True, exists=True))
@work_option
@click.option("--json", "as_json", is_flag=True, help="As JSON, with the folder of every slide.")
def command(folder: Path, work: Path | None, as_json: bool) -> None:
    """Show how far the slides of an output folder are.

    DIR: the --output of `segment`, whichever machines are working on it. Of a URL only those slides
    count as running on which this machine works.
    """
    from wsi_pipeline.files.remote import choose_work
    from wsi_pipeline.run.status import read_status

    with wrong_usage():
        work = choose_work(folder, work)
    status = read_status(folder, work)
    if as_json:
        click.echo(json.dumps(asdict(status), indent=2))
        return
    at_work = ", ".join(f"{name} ({blocks} blocks)" for name, blocks in status.running.items())
    click.echo(f"done     {len(status.done)}")
    click.echo(f"running  {len(status.running)}{at_work and '  ' + at_work}")
    click.echo(f"failed   {len(status.failed)}")
    click.echo(f"waiting  {len(status.waiting)}")
    if status.patches:
        share = status.patches_done / status.patches
        click.echo(f"patches  {status.patches_done:,} of about {status.patches:,} ({share:.0%})")
    if status.slides_per_hour is not None:
        click.echo(f"rate     {status.slides_per_hour:.3g} slides/h")
    if status.seconds_left is not None:
        click.echo(f"left     about {duration(status.seconds_left)}")
    for name, reason in status.failed.items():
        click.echo(f"failed: {name}: {reason}")
