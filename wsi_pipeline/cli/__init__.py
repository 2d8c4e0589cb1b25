"""The command line: one module a command, imported when it is called."""

from __future__ import annotations

import copy
import difflib
import importlib
import io
import logging
import sys
import traceback
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from types import TracebackType
from typing import TextIO

import click

from wsi_pipeline.cli.json_log import JsonLines, as_json
from wsi_pipeline.errors import WsiPipelineError, without_secrets

# Their sentences stand here as well: --help must not import what they are told by.
COMMANDS = {
    "segment": "Segment slides: masks, QuPath polygons, reports.",
    "status": "Show how far the slides of an output folder are.",
    "export": "Write again what is made of finished masks, with other settings.",
    "tile": "Write slides as zarr patch grids.",
    "info": "Show what a slide file says about itself.",
    "check-geojson": "Would QuPath import this GeoJSON? Say why not, and mend it.",
    "verify": "Is a mask the one that was computed? Compute a part of it again.",
    "evaluate": "Compare masks, runs or annotations with the truth.",
    "measure": "How much of each class lies in annotated areas of a run.",
    "diff": "Show where two runs of the same slides differ; no truth is needed.",
    "train": "Train a network by a recipe and write a bundle.",
    "models": "Show and check model bundles; import checkpoints, export programs.",
    "view": "Look at slides, images and volumes with their masks and polygons.",
    "demo": "The main job on a real image, in one command.",
}


class OneLine(logging.Formatter):
    """Leaves tracebacks out: they are for the log file."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's first line."""
        # A copy, since other handlers, as that of the log file, want the traceback.
        record = copy.copy(record)
        record.exc_info = record.exc_text = None
        return without_secrets(super().format(record))


class AsJson(OneLine):
    """Makes a JSON object of it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record with its level and logger."""
        return as_json(super().format(record), record.levelname, record.name)


class BesideBars(logging.StreamHandler[TextIO]):
    """Writes to a stream without ending up in the line of a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record on a line of its own, and the bar again below."""
        # there is none before it is imported
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        with tqdm.external_write_mode(self.stream) if tqdm else nullcontext():
            super().emit(record)


class LazyGroup(click.Group):
    """A group whose commands are imported only when called, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"wsi_pipeline.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command by its name; tell which one is meant if it is misspelt."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if close := difflib.get_close_matches(args[0], COMMANDS, 1):
                error.message = f"{error.message} Did you mean {close[0]}?"  # type: ignore[misc]
            raise

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; a package error ends with its message and exit code 1."""
        try:
            return super().invoke(ctx)
        except WsiPipelineError as error:
            raise click.ClickException(str(error)) from error
        except click.ClickException as error:
            error.message = without_secrets(error.message)  # type: ignore[misc]
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.version_option(version("wsi-pipeline"), prog_name="wsi-pipeline")
@click.option("-v", "--verbose", count=True, help="Say more; twice for every block.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors, no progress bar.")
@click.option("--json-log", is_flag=True, help="What goes to stderr as JSON objects, one a line.")
@click.pass_context
def group(ctx: click.Context, verbose: int, quiet: bool, json_log: bool) -> None:
    """Folders of whole-slide images in, full-resolution masks and QuPath polygons out.

    For research. Not a medical device.
    """
    ctx.obj = {"quiet": quiet}
    level = logging.WARNING - 10 * min(verbose, 2)
    handler = BesideBars(sys.stderr)
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    if json_log:
        handler.setFormatter(AsJson("%(message)s"))
        sys.stderr = JsonLines(sys.stderr)
    if not verbose:
        # decoders log much of files that are read, or refused in words, all the same
        own = ("wsi_pipeline", "distributed")
        handler.addFilter(lambda record: record.name.startswith(own))
    logging.basicConfig(level=level, handlers=[handler])


def main() -> None:
    """Run the command line."""
    sys.excepthook = _tell
    # A name may hold what the encoding of a console or a pipe lacks, on Windows most letters.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    # Libraries warn whoever programs with them; PYTHONWARNINGS shows what they say.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    group()


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of what should not happen, for which people ask others for help."""
    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))
