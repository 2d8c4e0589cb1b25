"""`wsi-pipeline verify`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from wsi_pipeline.cli.options import DEVICE, FOLDER, Command, Figure, options_of
from wsi_pipeline.options import Precision


@click.command(cls=Command, epilog="wsi-pipeline verify out/slide --share 0.1")
@click.argument("folder", metavar="RUN_DIR", type=FOLDER)
@click.option(
    "--share", type=Figure(min=0, max=1), default=0.01, help="Of the blocks, to compute again."
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Of the draw  [default: another each time]"
)
@click.option("--model", help="Where the bundle is now  [default: where it was]")
@click.option(
    "--slide",
    type=click.Path(exists=True, path_type=Path),
    help="Where the slide, image or volume is now  [default: where it was]",
)
@options_of(
    None,
    device=(DEVICE, "Where to compute  [default: as the run was told]"),
    precision=(Precision, "Of the forward pass  [default: as the run was told]"),
)
@click.pass_context
def command(
    ctx: click.Context,
    folder: Path,
    share: float,
    seed: int | None,
    model: str | None,
    slide: Path | None,
    device: str | None,
    precision: Precision | None,
) -> None:
    """Is a mask the one that was computed, and does computing it again give the same?

    RUN_DIR: the folder of one run, or the --output of `segment` for all of them. On stdout is a
    line for each block that is different: run, block, pixels, their largest margin, why.

    Exit code 0: identical, or within rounding where device or precision are others; 1: different;
    3: cannot be verified.
    """
    from wsi_pipeline.cli.progress import Bars
    from wsi_pipeline.errors import WsiPipelineError
    from wsi_pipeline.report.record import RUN_FILE, find_runs
    from wsi_pipeline.run.verify import verify

    codes = set[int]()
    runs = [folder] if (folder / RUN_FILE).is_file() else list(find_runs(folder))
    if not runs:
        raise click.UsageError(f"no run in {folder}")
    for path in runs:
        try:
            with Bars(quiet=ctx.obj["quiet"], unit="blocks") as bars:
                found = verify(
                    path,
                    share=share,
                    seed=seed,
                    model=model,
                    slide=slide,
                    device=device,
                    precision=precision,
                    progress=partial(bars, path.name),
                )
        except WsiPipelineError as error:
            click.echo(f"cannot be verified: {path}: {error}", err=True)
            codes.add(3)
            continue
        for other in found.different:
            told = (path.name, other.block or "-", other.pixels, f"{other.margin:.3g}", other.why)
            click.echo("\t".join(map(str, told)))
        verdict = "different" if found.different else "identical"
        if found.rounded and not found.different:
            pixels = sum(other.pixels for other in found.rounded)
            largest = max(other.margin for other in found.rounded)
            verdict = (
                f"identical within rounding: {pixels} pixels differ, of margins up to "
                f"{largest:.3g}, below {found.epsilon:.3g}"
            )
        told_again = f"{len(found.again)} of {found.blocks} blocks computed again"
        if not ctx.obj["quiet"]:
            click.echo(f"{path}: {verdict}; {told_again}, --seed {found.seed}", err=True)
        codes.add(int(bool(found.different)))
    ctx.exit(1 if 1 in codes else max(codes))
