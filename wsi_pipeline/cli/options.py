"""Options that several commands share, taken from `wsi_pipeline.options`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.options import DEVICES, Frame, Output, SelectOptions

F = TypeVar("F", bound=Callable[..., Any])
Param = click.Parameter | None
Context = click.Context | None
"""What click tells a type beside the value, where it calls it."""


@contextmanager
def wrong_usage(kind: type[WsiPipelineError] = WsiPipelineError) -> Iterator[None]:
    """Make what the body refuses wrong usage: no input could be done."""
    try:
        yield
    except kind as error:
        raise click.UsageError(str(error)) from error


def once(*flags: str, **attributes: Any) -> Callable[[F], F]:
    """Return an option of one value that is refused when it is given twice.

    Of several the last would count, and the others would be ignored without a word.
    """

    def only(ctx: click.Context, param: click.Parameter, values: tuple[Any, ...]) -> Any:
        if len(values) > 1:
            raise click.UsageError(f"{flags[0]} is given {len(values)} times; expected one", ctx)
        return values[0] if values else None

    if "default" in attributes:
        attributes["default"] = (attributes["default"],)
    return click.option(*flags, multiple=True, callback=only, **attributes)


class InSections(click.Command):
    """A command whose --help lists its options in sections.

    Args:
        sections: names of parameters by the title of their section; others come last.
    """

    def __init__(
        self, *args: object, sections: Mapping[str, Sequence[str]], **attributes: object
    ) -> None:
        super().__init__(*args, **attributes)  # type: ignore[arg-type]
        self._sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        options = (p for p in self.get_params(ctx) if isinstance(p, click.Option))
        records = {option.name: option.get_help_record(ctx) for option in options}
        for title, names in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([row for name in names if (row := records.pop(name))])
        with formatter.section("Options"):
            formatter.write_dl(list(filter(None, records.values())))


class Figure(click.FloatRange):
    """A number between bounds; NaN, which no bound keeps out, and infinity are none."""

    def convert(self, value: float, param: Param, ctx: Context) -> float:
        """Return the number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number to reckon with", param, ctx)
        return number


MPP = Figure(min=1e-4, max=1000)
"""µm per pixel: whatever a microscope, a camera or an overview has."""


class DeviceChoice(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """Where to compute."""

    name = "auto|cpu|cuda|cuda:N"

    def convert(self, value: str, param: Param, ctx: Context) -> str:
        """Return the device's name."""
        if not re.fullmatch(DEVICES, str(value)):
            self.fail(f"{value!r} is none of {self.name.replace('|', ', ')}", param, ctx)
        return str(value)


class TissueChoice(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """`auto`, `none` or a file."""

    name = "auto|none|FILE"

    def convert(self, value: str, param: Param, ctx: Context) -> Any:
        """Return the word, or the path of an existing file."""
        if value in ("auto", "none"):
            return value
        if not Path(value).is_file():
            self.fail(f"{value!r} is neither auto, none nor a file", param, ctx)
        return Path(value)


class OutputChoice(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A folder, here or, where that is allowed, behind a URL.

    Args:
        url: whether it is.
        exists: whether a folder here must be there.
    """

    def __init__(self, *, url: bool, exists: bool = False) -> None:
        self._url, self._exists = url, exists
        self.name = "DIR|URL" if url else "DIR"

    def convert(self, value: str, param: Param, ctx: Context) -> Path:
        """Return the path; one of fsspec's for a URL."""
        if "://" not in str(value):
            kind = click.Path(exists=self._exists, file_okay=False, path_type=Path)
            folder: Path = kind.convert(value, param, ctx)
            return folder
        from wsi_pipeline.files.paths import as_path, without_secrets

        if not self._url:
            self.fail(f"{without_secrets(value)} is a URL; expected a folder here", param, ctx)
        # other machines write there, too
        return as_path(value, use_listings_cache=False)


class OutputsChoice(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A comma-separated list of outputs."""

    def __init__(self, choices: Sequence[Output]) -> None:
        self._choices = choices
        self.name = ",".join(choices)

    def convert(self, value: str, param: Param, ctx: Context) -> tuple[Output, ...]:
        """Return the outputs, each once."""
        names: Any = value if isinstance(value, tuple) else str(value).split(",")
        for name in names:
            if name not in self._choices:
                self.fail(f"{name!r} is none of {', '.join(self._choices)}", param, ctx)
        return tuple(dict.fromkeys(names))


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
            type=MPP,
            help="µm per level-0 pixel, for slides that do not say.",
        ),
        once(
            "--mpp-table",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="CSV with the columns slide and mpp: the same for each slide that it names.",
        ),
        series_option,
        once(
            "--tissue",
            type=TissueChoice(),
            default=SelectOptions().tissue,
            help="Where to look: found on the thumbnail, everywhere, a mask image or GeoJSON.",
        ),
        once(
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
    type=OutputChoice(url=False),
    help="Folder for the results.",
)
work_option = click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    help="With a URL as output: folder here for slides in hand  [default: in the user's cache]",
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Start anew instead of going on where an earlier run stopped."
)
