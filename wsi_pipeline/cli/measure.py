"""`wsi-pipeline measure`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_pipeline.cli.options import FILE, Command, frame_option
from wsi_pipeline.options import Frame


@click.command(cls=Command, epilog="wsi-pipeline measure out/slide --within annotations.geojson")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--within", type=FILE, required=True, help="GeoJSON of the areas, such as QuPath's annotations."
)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="CSV file to write  [default: stdout]",
)
@frame_option("Whose origin the GeoJSON has on slides with bounds.")
def command(run: Path, within: Path, output: Path | None, frame: Frame) -> None:
    """How much of each class, and of tissue, lies in annotated areas of RUN?

    RUN: the folder of one slide or image. Prints CSV: annotation, class, area_mm2, percent of the
    annotation. What lies in areas of a class such as Ignore* is cut out.
    """
    from wsi_pipeline.evaluation.within import measure
    from wsi_pipeline.files.remote import write_whole
    from wsi_pipeline.files.tables import as_csv

    if output and output.exists():
        raise click.UsageError(f"{output} is there already; name another file, or remove it")
    found = measure(run, within, frame=frame)
    table = as_csv([("annotation", "class", "area_mm2", "percent"), *found])
    if output:
        write_whole(output, table.encode())
    else:
        click.echo(table, nl=False)
