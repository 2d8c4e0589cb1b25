"""Options that several commands share, taken from `wsi_pipeline.options`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from wsi_pipeline.options import Frame, SelectOptions

F = TypeVar("F", bound=Callable[..., Any])


class TissueChoice(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """`auto`, `none` or a file."""

    name = "auto|none|FILE"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the word, or the path of an existing file."""
        if value in ("auto", "none"):
            return value
        if not Path(value).is_file():
            self.fail(f"{value!r} is neither auto, none nor a file", param, ctx)
        return Path(value)


series_option = click.option(
    "--series",
    type=click.IntRange(min=0),
    help="Which image of an OME-TIFF or OME-Zarr with several  [default: the largest of RGB]",
)


def select_options(mpp_flag: str = "--mpp") -> Callable[[F], F]:
    """Return a decorator that adds the options of where on a slide to look.

    Args:
        mpp_flag: what the slide's own resolution is called.
    """
    options = (
        click.option(
            mpp_flag,
            "mpp",
            type=click.FloatRange(min=0, min_open=True),
            help="µm per level-0 pixel, for slides that do not say.",
        ),
        click.option(
            "--mpp-table",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="CSV with the columns slide and mpp: the same for each slide that it names.",
        ),
        series_option,
        click.option(
            "--tissue",
            type=TissueChoice(),
            default=SelectOptions().tissue,
            help="Where to look: found on the thumbnail, everywhere, a mask image or GeoJSON.",
        ),
        click.option(
            "--roi",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="GeoJSON polygons to which the result is limited.",
        ),
        click.option(
            "--for",
            "frame",
            type=click.Choice(get_args(Frame)),
            default=SelectOptions().frame,
            help="Whose origin GeoJSON (read and written) and TIFF have on slides with bounds.",
        ),
    )

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


inputs_argument = click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
output_option = click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results.",
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Start anew instead of going on where an earlier run stopped."
)
