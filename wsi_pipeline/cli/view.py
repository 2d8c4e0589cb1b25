"""`wsi-pipeline view`."""

from __future__ import annotations

import signal
import webbrowser
from pathlib import Path

import click

from wsi_pipeline.cli.options import FOLDER, Command


@click.command(cls=Command, epilog="wsi-pipeline view out/")
@click.argument("folder", metavar="RUN_DIR", type=FOLDER)
@click.option(
    "--slide",
    type=click.Path(exists=True, path_type=Path),
    help="Where the slide, image or volume is now, for the folder of one.",
)
@click.option(
    "--against",
    type=click.Path(exists=True, path_type=Path),
    help="A second run, a mask or GeoJSON, to see where they differ; for several an output folder.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0 = a free one.")
@click.option(
    "--host", default="127.0.0.1", help="Address to listen on; nothing is encrypted on the way."
)
@click.option("--no-browser", is_flag=True, help="Print the address only.")
@click.pass_context
def command(
    ctx: click.Context,
    folder: Path,
    slide: Path | None,
    against: Path | None,
    port: int,
    host: str,
    no_browser: bool,
) -> None:
    """Look at slides, images and volumes with their masks and polygons in the browser.

    RUN_DIR: the folder of one run, or the --output of `segment` for all of them. Runs until Ctrl-C.
    """
    from wsi_pipeline.viewer import serve

    # a program that a script has started in the background does not hear Ctrl-C otherwise
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serve(folder, host=host, port=port, slide=slide, against=against) as viewer:
            if not ctx.obj["quiet"]:
                click.echo("Ctrl-C ends it.", err=True)
            click.echo(viewer.url)
            if not no_browser:
                webbrowser.open(viewer.url)
            viewer.wait()
    except KeyboardInterrupt:
        # as it is meant to end
        pass
