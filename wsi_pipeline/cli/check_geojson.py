"""`wsi-pipeline check-geojson`: would QuPath import this file?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsi_pipeline.cli.options import FILE, Command

if TYPE_CHECKING:
    from wsi_pipeline.annotations import Finding, Repair, Report


@click.command(
    "check-geojson",
    cls=Command,
    epilog="wsi-pipeline check-geojson annotations.geojson --fix mended.geojson",
)
@click.argument("file", type=FILE)
@click.option(
    "--fix",
    "fixed",
    metavar="OUT",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what QuPath can keep of FILE to OUT, and say what was changed or dropped.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@click.pass_context
def command(ctx: click.Context, file: Path, fixed: Path | None, as_json: bool) -> None:
    """Would QuPath import FILE? Name each offending feature, and mend it.

    FILE is GeoJSON: .geojson or .json, gzipped or not. Each line on stdout is the feature's index
    from 0, its id, how bad it is, and why; "-" stands for the file as a whole or a missing id.

    Exit code 1: QuPath would refuse the file (with --fix: would refuse or change OUT).
    """
    from wsi_pipeline.annotations import check_geojson, mend_geojson

    # It may be what somebody has drawn.
    if fixed and fixed.exists():
        raise click.UsageError(f"{fixed} is there already; name another file, or remove it")
    report = check_geojson(file)
    if not as_json:
        for finding in report.findings:
            click.echo(_line(finding, finding.severity))
    click.echo(_summary(file, report), err=True)
    repairs = mend_geojson(file, fixed) if fixed else []
    if as_json:
        told = {
            "file": str(file),
            "features": report.n_features,
            "refused": report.is_refused,
            "findings": [asdict(finding) for finding in report.findings],
            "repairs": [asdict(repair) for repair in repairs],
        }
        click.echo(json.dumps(told, indent=2))
    failed = report.is_refused
    if fixed:
        for repair in repairs:
            click.echo(_line(repair, repair.action), err=True)
        left = check_geojson(fixed)
        click.echo(_summary(fixed, left), err=True)
        failed = bool(left.findings)
    ctx.exit(1 if failed else 0)


def _line(item: Finding | Repair, verdict: str) -> str:
    index = "-" if item.index is None else str(item.index)
    identity = item.id or "-"
    # An id may hold anything, a line break too.
    shown = identity if identity.isprintable() else ascii(identity)
    return "\t".join((index, shown, verdict, item.reason))


def _summary(file: Path, report: Report) -> str:
    count = f"{file}: {report.n_features} feature{'s' * (report.n_features != 1)}"
    if report.is_refused:
        return f"{count}; QuPath refuses the file and imports nothing"
    if not report.n_features:
        return f'{count}; QuPath will say "No objects found"'
    if not report.findings:
        return f"{count}; QuPath imports and keeps all of it"
    return f"{count}; QuPath imports the file, remarks: {len(report.findings)}"
