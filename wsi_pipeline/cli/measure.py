"""`wsi-pipeline measure`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_pipeline.cli.options import FILE, FOLDER, Command, frame_option
from wsi_pipeline.options import Frame


@click.command(cls=Command, epilog="wsi-pipeline measure out/slide --within annotations.geojson")
@click.argument("run", type=FOLDER)
@click.option("--within", type=FILE, help="GeoJSON of the areas, such as QuPath's annotations.")
@click.option(
    "--spots", type=FOLDER, help="Folder of Space Ranger's tissue_positions or Xenium's cells."
)
@click.option(
    "--alignment", type=FILE, help="Xenium Explorer's CSV of how the slide lies on the cells."
)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="CSV file to write, of spots .h5ad, too  [default: stdout]",
)
@frame_option("Whose origin the GeoJSON has on slides with bounds.")
def command(
    run: Path,
    within: Path | None,
    spots: Path | None,
    alignment: Path | None,
    output: Path | None,
    frame: Frame,
) -> None:
    """How much of each class lies in annotated areas of RUN, or in spots of transcriptomics?

    RUN: the folder of one slide or image. Prints CSV: annotation, class, area_mm2, percent of the
    annotation, tissue among them. What lies in areas of a class such as Ignore* is cut out. Of
    spots: spot, x, y, pixels, and the share of each class, 0 to 1.
    """
    from wsi_pipeline.evaluation.spots import measure_spots, write_spots
    from wsi_pipeline.evaluation.within import measure
    from wsi_pipeline.files.remote import write_whole
    from wsi_pipeline.files.tables import as_csv

    if (within is None) == (spots is None):
        raise click.UsageError("name one of --within and --spots")
    if within and alignment:
        raise click.UsageError("--alignment is for --spots of Xenium")
    is_anndata = output and output.suffix.lower() == ".h5ad"
    if within and is_anndata:
        raise click.UsageError("only --spots are written as .h5ad; name a CSV file")
    if output and output.exists():
        raise click.UsageError(f"{output} is there already; name another file, or remove it")
    if spots:
        of_spots = measure_spots(run, spots, alignment=alignment)
        if output and is_anndata:
            write_spots(output, of_spots)
            return
        rows = of_spots.astype(object).where(of_spots.notna(), None).itertuples()
        table = as_csv([("spot", *of_spots.columns), *rows])
    elif within:
        found = measure(run, within, frame=frame)
        table = as_csv([("annotation", "class", "area_mm2", "percent"), *found])
    if output:
        write_whole(output, table.encode())
    else:
        click.echo(table, nl=False)
