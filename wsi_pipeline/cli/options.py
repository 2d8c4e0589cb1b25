"""Options that several commands share, taken from `wsi_pipeline.options`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, get_args

import click

from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.options import DEVICES, Frame, Icc, SelectOptions, TiffKind

if TYPE_CHECKING:
    from wsi_pipeline.bundle import Bundle

F = TypeVar("F", bound=Callable[..., object])
Param = click.Parameter | None
Context = click.Context | None
"""What click tells a type beside the value, where it calls it."""
ALL = "wsi_pipeline.help_all"
"""Key of a context's notes: all options are to be shown."""
UNNAMED = "Options"
"""Title of those without a heading."""
SELECT = SelectOptions()


@contextmanager
def wrong_usage(kind: type[WsiPipelineError] = WsiPipelineError) -> Iterator[None]:
    """Make what the body refuses wrong usage: no input could be done."""
    try:
        yield
    except kind as error:
        raise click.UsageError(str(error)) from error


class Attributes(TypedDict, total=False):
    """What `once` passes on to click."""

    type: click.ParamType[Any]
    default: object
    show_default: bool
    required: bool
    metavar: str
    help: str


def once(*flags: str, **attributes: Unpack[Attributes]) -> Callable[[F], F]:
    """Return an option of one value that is refused when it is given twice.

    Of several the last would count, and the others would be ignored without a word.
    """

    def only(ctx: click.Context, param: click.Parameter, values: tuple[object, ...]) -> object:
        if len(values) > 1:
            raise click.UsageError(f"{flags[0]} is given {len(values)} times; expected one", ctx)
        return values[0] if values else None

    if "default" in attributes:
        # click wants a list of defaults where an option may come more than once.
        attributes["default"] = (attributes["default"],)
    return click.option(*flags, multiple=True, callback=only, **attributes)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return a decorator that adds several options in this order."""

    def decorate(command: F) -> F:
        # Decorators go on from the last to the first.
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def heading(title: str, *, rare: bool = False) -> Callable[[F], F]:
    """Return a decorator that puts the options declared below it, down to the next, under a title.

    Args:
        rare: they are left to --help-all.
    """

    def decorate(command: F) -> F:
        for param in getattr(command, "__click_params__", ()):
            # Decorators go on from the last to the first: what has a title stands below another.
            vars(param).setdefault("heading", (title, rare))
        return command

    return decorate


class Command(click.Command):
    """A command whose --help has options under headings, and leaves rare ones to --help-all.

    Its epilog is an example, which can be copied.
    """

    def __init__(self, *args: object, **attributes: object) -> None:
        super().__init__(*args, **attributes)  # type: ignore[arg-type]

        def show(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
            if asked:
                ctx.meta[ALL] = True
                click.echo(ctx.get_help())
                ctx.exit()

        rare = sum(_heading(param)[1] for param in self.params)
        said = f"Show {rare} more options." if rare else "The same; all options are here."
        self._all = click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=show,
            help=said,
        )

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, and those of help."""
        return [*super().get_params(ctx), self._all]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, the rare ones of a heading after the others."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for param in sorted(self.get_params(ctx), key=lambda param: _heading(param)[1]):
            title, is_rare = _heading(param)
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record and (ctx.meta.get(ALL) or not is_rare):
                name = re.sub("(INTEGER|FLOAT)( RANGE)?", "NUMBER", record[0])
                # Bounds are told to who leaves them.
                text = re.sub(r"  \[[^]:]*x[<>]=[^]]*\]|; [^][;:]*x[<>]=[^];]*", "", record[1])
                rows.setdefault(title, []).append((name, text))
        # Those that every command has come last.
        rows[UNNAMED] = rows.pop(UNNAMED)
        for title, records in rows.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example in one line."""
        formatter.write(f"\nExample: {self.epilog}\n")


def _heading(param: click.Parameter) -> tuple[str, bool]:
    """Return under what title --help has an option, and whether --help-all alone has."""
    found: tuple[str, bool] = vars(param).get("heading", (UNNAMED, False))
    return found


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


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """What a function makes of a text; its ValueError says what is wrong with that."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: object, param: Param, ctx: Context) -> object:
        """Return what the text means; what is no text is a default."""
        try:
            return self._parse(value) if isinstance(value, str) else value
        except (ValueError, OverflowError) as error:
            self.fail(str(error), param, ctx)


def read_device(text: str) -> str:
    """Return the device's name."""
    # Whether the machine has it is for torch to say, which is not imported for a misspelt word.
    if not re.fullmatch(DEVICES, text):
        raise ValueError(f"{text!r} is none of auto, cpu, cuda, cuda:N, mps")
    return text


def read_tissue(text: str) -> str | Path:
    """Return the word, or the path of an existing file."""
    if text in ("auto", "none"):
        return text
    if not Path(text).is_file():
        raise ValueError(f"{text!r} is neither auto, none nor a file")
    return Path(text)


def some_of(choices: Sequence[str]) -> Parsed:
    """Return the type of a comma-separated list of choices, each taken once."""

    def read(text: str) -> tuple[str, ...]:
        names = dict.fromkeys(text.split(","))
        if odd := [name for name in names if name not in choices]:
            raise ValueError(f"{odd[0]!r} is none of {', '.join(choices)}")
        return tuple(names)

    return Parsed("NAME,NAME", read)


DEVICE = Parsed("DEVICE", read_device)
TISSUE = Parsed("auto|none|FILE", read_tissue)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


class OutputChoice(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A folder, which `exists` here, or behind a URL where that is allowed."""

    def __init__(self, *, url: bool, exists: bool = False) -> None:
        self._url, self._exists = url, exists
        self.name = "DIR|URL" if url else "DIR"

    def convert(self, value: str, param: Param, ctx: Context) -> Path:
        """Return the path; one of fsspec's for a URL."""
        if "://" not in str(value):
            kind = click.Path(exists=self._exists, file_okay=False, path_type=Path)
            return kind.convert(value, param, ctx)
        from wsi_pipeline.files.paths import as_path, without_secrets

        if not self._url:
            self.fail(f"{without_secrets(value)} is a URL; expected a folder here", param, ctx)
        # other machines write there, too
        return as_path(value, use_listings_cache=False)


def read_threshold(text: str) -> tuple[str, float]:
    """Return the name and the probability of `NAME=P`."""
    name, _, number = text.rpartition("=")
    try:
        return name, float(number)
    except ValueError:
        raise ValueError(f"{text!r} is not of the form NAME=P, such as Tumor=0.7") from None


rule_options = together(
    click.option(
        "--threshold",
        "thresholds",
        type=Parsed("NAME=P", read_threshold),
        multiple=True,
        callback=lambda ctx, param, pairs: dict(pairs),
        help="Probability from which on a pixel may get a class.",
    ),
    heading("What to segment", rare=True),
    click.option(
        "--min-margin",
        type=Figure(min=0, max=1),
        default=0.0,
        help="By how much the likeliest class must lead, else background.",
    ),
)


def read_model(location: str, *, fetch: bool = True) -> Bundle:
    """Read what `--model` names, see `load_model`, in a command that is quick; return it."""
    from wsi_pipeline.bundle import load_bundle

    if not location.startswith("nnunet:"):
        return load_bundle(location, fetch=fetch)
    # It loads torch.
    from wsi_pipeline.networks.nnunet_folder import load_model

    return load_model(location)


def frame_option(help: str, default: Frame | None = SELECT.frame) -> Callable[[F], F]:
    """Return the option that says whose origin GeoJSON has."""
    return click.option(
        "--for", "frame", type=click.Choice(get_args(Frame)), default=default, help=help
    )


FLAGS = {"simplify_um": "simplify", "min_area_um2": "min-area"}
"""What options are called that have not the name of their field."""
OUTLINES: Mapping[str, tuple[object, str]] = {
    "tiff": (TiffKind, "asap writes ASAP's kind beside the OME-TIFF."),
    "simplify_um": (
        Figure(min=0),
        "Root of the largest triangle that simplifying an outline may cut off, µm; 0 = exact.",
    ),
    "min_area_um2": (
        Figure(min=0),
        "Regions and holes below this get no polygon, µm²; the mask keeps them.",
    ),
}


def options_of(usual: object, **said: tuple[object, str]) -> Callable[[F], F]:
    """Return a decorator that adds an option for each of some fields of a group of options.

    Args:
        usual: the group, which has the defaults; None = there are none.
        said: type and help of each field; a Literal stands for a choice.
    """
    options = []
    for name, (kind, text) in said.items():
        choices, default = get_args(kind), getattr(usual, name, None)
        kind = click.Choice(choices) if choices else kind
        flag = f"--{FLAGS.get(name, name).replace('_', '-')}"
        # none of several is said in words
        options.append(click.option(flag, name, type=kind, default=default or None, help=text))
    return together(*options)


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
    return together(
        click.option(
            mpp_flag, "mpp", type=MPP, help="µm per level-0 pixel, for slides that do not say."
        ),
        heading("Input", rare=True),
        once(
            "--mpp-table",
            type=FILE,
            help="CSV with the columns slide and mpp: the same for each slide that it names.",
        ),
        series_option,
        options_of(SELECT, icc=(Icc, "apply brings colours to sRGB by the slides' ICC profiles.")),
        heading("What to segment"),
        once("--tissue", type=TISSUE, default=SELECT.tissue, help="Where to look; auto finds it."),
        once("--roi", type=FILE, help="GeoJSON polygons to which the result is limited."),
        heading("Output", rare=True),
        frame_option(
            "Whose origin GeoJSON (read and written) and TIFF have on slides with bounds."
        ),
    )


inputs_argument = click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
output_option = click.option(
    "--output", "-o", required=True, type=OutputChoice(url=False), help="Folder for the results."
)
work_option = click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    help="With a URL as output: folder here for slides in hand  [default: in the user's cache]",
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Start anew instead of going on where it stopped."
)
