"""`wsi-pipeline demo`."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click

from wsi_pipeline.cli.options import FILE, MPP, Command, once, output_option, read_model

KINDS = {
    "slide": (
        "lightmuseg-bcss-demo",
        "bcss/{}/1008",
        "a region of TCGA-A2-A0D2, breast carcinoma, and its outlines of BCSS (CC0)",
    ),
    "ultrasound": (
        "nmtnet-ultrasound",
        "us/busi/{}/malignant_1",
        "a cancer in ultrasound, and its outline, of BUSI (CC0)",
    ),
    "mammography": (
        "highres-unet-mammography",
        "mammo/cdd_cesm/{}/P116_R_DM_CC",
        "a mammogram of a patient who was kept apart, and its finding, of CDD-CESM (CC BY 4.0)",
    ),
}
"""Model; images and masks in the folder of test data; where these are from."""
MPP_OF_REGION = 0.2363
"""µm per pixel of the region of BCSS, which does not say."""
SEEN = "; the model was trained on that data set, and its card tells how it does on patients unseen"
HE = ((0.56, 0.72, 0.41), (0.22, 0.80, 0.56), (0, 0, 0))
"""Optical density of hematoxylin and eosin in red, green and blue: Macenko's."""


@click.command(cls=Command, epilog="wsi-pipeline demo --output demo-output/")
@click.argument("kind", type=click.Choice(list(KINDS)), default="slide")
@output_option
@once("--slide", "--image", "slide", type=FILE, help="Your own, in place of one for show.")
@click.option("--mpp", type=MPP, help="Its µm per level-0 pixel, where it does not say.")
@once("--model", "-m", help="Another bundle  [default: the one that is shipped]")
@click.pass_context
def command(
    ctx: click.Context,
    kind: str,
    output: Path,
    slide: Path | None,
    mpp: float | None,
    model: str | None,
) -> None:
    """Segment something real with a shipped model, and say where the results lie.

    It is what --slide names; else an image of the folder $WSI_PIPELINE_TEST_DATA, compared with
    its truth; else a picture that scikit-image brings, in colours of H&E, or, of ultrasound and
    mammography, a phantom made on the spot.
    """
    from wsi_pipeline.cli.segment import command as segment
    from wsi_pipeline.errors import BundleError
    from wsi_pipeline.evaluation.evaluate import evaluate
    from wsi_pipeline.evaluation.report import as_rows
    from wsi_pipeline.files.models import named_models
    from wsi_pipeline.run.jobs import plan_jobs

    shipped, stem, origin = KINDS[kind]
    if model is None and shipped not in named_models():
        raise BundleError(
            "the demonstration model is a package of its own: pip install wsi-pipeline-models, run "
            "this from a checkout, or name a bundle with --model"
        )
    bundle = read_model(model or shipped)
    if not bundle.weights_path:
        raise BundleError(
            f"{bundle.name} has no weights: train some (workflows/train), or name a bundle that "
            "has them with --model"
        )
    data = os.environ.get("WSI_PIPELINE_TEST_DATA")
    truth, said = None, "your own"
    found = sorted(Path(data).glob(f"{stem.format('images')}.*")) if data else []
    if slide is None and found and data:
        slide, truth = found[0], Path(data) / f"{stem.format('masks')}.png"
        said = origin + SEEN * (model is None)
        mpp = MPP_OF_REGION if kind == "slide" else None
    elif slide is None and kind == "slide":
        slide = _stain(output / "demo slide.tif")
        said = (
            "glands of the colon, scikit-image's picture, whose brown stain is put into colours of "
            "H&E by computer: no breast cancer, so that next to nothing should be called tumour"
        )
    elif slide is None:
        slide, truth = _phantom(output / f"{kind} phantom.png", bright=kind == "mammography")
        said = "a phantom drawn by computer, with the ellipse in it as truth: no patient"
    click.echo(f"segmenting {slide}: {said}", err=True)
    (job,) = plan_jobs([slide], output)
    given = [str(slide), "--model", model or shipped, "--output", str(output)]
    try:
        given += ["--mpp", str(mpp)] if mpp else []
        ctx.invoke(segment, **segment.make_context("segment", given).params)
        if truth:
            figures = evaluate(
                job.folder, truth, truth_values={bundle.classes[1].name: range(1, 256)}
            )
            for row in as_rows(figures):
                click.echo(f"{row['class']} against the truth: Dice {row['dice']:.3f}", err=True)
    finally:
        # After a failure as well: what there is may show why.
        there = sorted(path for path in job.folder.glob("*") if path.name[0] != ".")
        for path in [*there, output / "summary.csv", output / "report.html"]:
            click.echo(str(path))
    # after `make demo` the program lies in .venv, where no shell looks
    here = shutil.which("wsi-pipeline", path=str(Path(sys.executable).parent))
    program = "wsi-pipeline" if shutil.which("wsi-pipeline") else here or "wsi-pipeline"
    line = [program, "view", str(output)]
    shown = subprocess.list2cmdline(line) if os.name == "nt" else shlex.join(line)
    click.echo(f"look at it: {shown}", err=True)


def _stain(path: Path) -> Path:
    """Write a slide of scikit-image's picture of colon on glass, its brown stain as eosin."""
    import numpy as np
    import tifffile
    from skimage.color import combine_stains, hed_from_rgb, separate_stains
    from skimage.data import immunohistochemistry

    from wsi_pipeline.files.atomic import written_beside

    picture = immunohistochemistry()  # type: ignore[no-untyped-call]
    blue, _, brown = np.moveaxis(separate_stains(picture, hed_from_rgb), -1, 0)
    # Less of them is glass; how much of either makes what eye and network know.
    blue, brown = np.maximum(blue - 0.005, 0), np.maximum(brown - 0.01, 0)
    stains = np.stack([2.5 * blue, 0.45 * brown + 0.25 * blue, 0 * blue], axis=-1)
    pixels = np.round(255 * combine_stains(stains, HE)).astype(np.uint8)
    pixels = np.pad(pixels, ((128, 128), (128, 128), (0, 0)), constant_values=244)
    path.parent.mkdir(parents=True, exist_ok=True)
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


def _phantom(path: Path, *, bright: bool) -> tuple[Path, Path]:
    """Draw tissue of speckle with an ellipse in it; return the files of picture and ellipse."""
    import numpy as np
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    y, x = np.ogrid[:420, :512]
    mask = np.hypot((y - 200) / 62, (x - 250) / 88) < 1
    echo = gaussian_filter(np.where(mask, 3.0 if bright else 0.08, 1.0), 3)
    # Layers as of fat and muscle, and the speckle of many scatterers, which is Rayleigh's.
    echo *= np.exp(6 * gaussian_filter(rng.normal(size=mask.shape), (6, 60), mode="wrap"))
    waves = rng.normal(size=(2, *mask.shape))
    speckle = np.hypot(*(gaussian_filter(wave, (1.2, 2)) for wave in waves))
    shown = np.log1p(20 * echo * speckle / speckle.mean())
    path.parent.mkdir(parents=True, exist_ok=True)
    truth = path.with_name(f"{path.stem} truth.png")
    Image.fromarray(np.round(255 * shown / shown.max()).astype(np.uint8)).save(path)
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(truth)
    return path, truth
