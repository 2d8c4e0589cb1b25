"""`wsi-pipeline demo`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from wsi_pipeline.cli.options import Command, once, output_option

MODEL = "lightmuseg-bcss-demo"
SLIDE = Path("wsi") / "svs" / "CMU-1-Small-Region.svs"
"""Within the folder of test data."""


@click.command(cls=Command, epilog="wsi-pipeline demo --output demo-output/")
@output_option
@once("--model", "-m", default=MODEL, help="Another bundle.")
@click.pass_context
def command(ctx: click.Context, output: Path, model: str) -> None:
    """Segment a real image with the demonstration model, and say where the results lie.

    The slide is CMU-1-Small-Region.svs of the folder $WSI_PIPELINE_TEST_DATA where it is there,
    else one made of a histology picture that scikit-image brings.
    """
    from wsi_pipeline.cli.segment import command as segment
    from wsi_pipeline.errors import BundleError
    from wsi_pipeline.files.models import CHECKOUT, named_models

    if model == MODEL and model not in named_models():
        raise BundleError(
            "the demonstration model is a package of its own: pip install wsi-pipeline-models, run "
            "this from a checkout, or name a bundle with --model"
        )
    data = os.environ.get("WSI_PIPELINE_TEST_DATA") or CHECKOUT.parent / "shared" / "data"
    slide = Path(data) / SLIDE
    if not slide.is_file():
        slide = _make_slide(output)
    click.echo(f"segmenting {slide}", err=True)
    line = [str(slide), "--model", model, "--output", str(output)]
    try:
        ctx.invoke(segment, **segment.make_context("segment", line).params)
    finally:
        # After a failure as well: what there is may show why.
        shown = sorted(path for path in (output / slide.stem).glob("*") if path.name[0] != ".")
        for path in [*shown, output / "summary.csv", output / "report.html"]:
            click.echo(str(path))


def _make_slide(output: Path) -> Path:
    """Write a slide made of scikit-image's histology picture, mirrored to four times its size."""
    import numpy as np
    import tifffile
    from skimage.data import immunohistochemistry

    from wsi_pipeline.files.atomic import written_beside

    picture = immunohistochemistry()  # type: ignore[no-untyped-call]
    pixels = np.pad(picture, ((0, 3 * 512), (0, 3 * 512), (0, 0)), mode="symmetric")
    path = output / "demo slide.tif"
    if path.exists():
        return path
    output.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        tifffile.imwrite(
            beside,
            pixels,
            tile=(256, 256),
            photometric="rgb",
            compression="deflate",
            # pixels per cm: 0.5 µm each
            resolution=(20_000, 20_000),
            resolutionunit="CENTIMETER",
        )
    return path
