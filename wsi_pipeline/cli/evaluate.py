"""`wsi-pipeline evaluate`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipeline.cli.options import (
    FILE,
    MPP,
    Command,
    Parsed,
    frame_option,
    heading,
    once,
    wrong_usage,
)
from wsi_pipeline.errors import UsageError
from wsi_pipeline.options import Frame

if TYPE_CHECKING:
    from wsi_pipeline.evaluation.meaning import LabelMap

LARGEST_SIDE = 1 << 20
"""px of a slide's level 0, as for files."""
# As in `evaluation.meaning`, which --help need not import.
LARGEST_VALUE = 65_535
"""Of a mask."""
Facts = dict[str, Any]
"""What is said as JSON, too."""
Meaning = tuple[str, Sequence[int] | None]
"""A class and its mask values; None stands for those that nothing else names."""


def read_size(text: str) -> tuple[int, int]:
    """Return (width, height) in px."""
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if not match or max(size := (int(match[1]), int(match[2]))) > LARGEST_SIDE:
        raise ValueError(f"{text!r} is no size; expected it as 98304x65536")
    return size


def read_meaning(text: str) -> Meaning:
    """Return a class and its mask values."""
    name, equals, listed = (part.strip() for part in text.rpartition("="))
    if (name, listed) == ("Background", "others"):
        return name, None
    values = [v.strip() for v in listed.removesuffix("+").split(",")]
    is_open = listed.endswith("+")
    is_list = all(v.isdecimal() for v in values) and not (is_open and len(values) > 1)
    if not (name and equals and is_list):
        raise ValueError(
            f"{text!r} is no class with its values; expected Tumor=1,20, Tumor=128+ or "
            "Background=others"
        )
    numbers = tuple(map(int, values))
    if max(numbers) > LARGEST_VALUE:
        raise ValueError(f"{text!r}: the values of a mask go to {LARGEST_VALUE}")
    return name, range(numbers[0], LARGEST_VALUE + 1) if is_open else numbers


def read_renaming(text: str) -> tuple[str, str]:
    """Return the old name and the new one."""
    old, equals, new = text.partition("=")
    if not (equals and new.strip()):
        raise ValueError(f"{text!r} is no renaming; expected Invasive=Tumor")
    return old.strip(), new.strip()


MEANING = Parsed("CLASS=VALUE[,VALUE…]", read_meaning)


@click.command(
    cls=Command, epilog="wsi-pipeline evaluate out/slide annotations.geojson --output compared/"
)
@click.argument("prediction", type=click.Path(path_type=Path))
@click.argument("truth", type=click.Path(path_type=Path))
@heading("Output")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for evaluation.json, evaluation.csv and a picture of each slide's disagreement.",
)
@heading("Classes")
@click.option("--classes", help="Classes to judge, separated by commas  [default: all]")
@click.option(
    "--rename",
    "renamed",
    type=Parsed("OLD=NEW", read_renaming),
    multiple=True,
    help="Another name for a class, on either side; =NEW names areas without a class.",
)
@heading("Classes", rare=True)
@click.option(
    "--prediction-values",
    type=MEANING,
    multiple=True,
    help="What values of a prediction's mask mean, where it does not say. 0 is background if "
    "nothing else; Tumor=128+ are all from 128 on, Background=others those without a name.",
)
@click.option("--truth-values", type=MEANING, multiple=True, help="Likewise of a truth's mask.")
@click.option(
    "--ignore",
    "ignored",
    type=click.IntRange(min=0, max=LARGEST_VALUE),
    multiple=True,
    help="A value of the truth's mask that is not judged.",
)
@heading("Input")
@once(
    "--slide",
    type=click.Path(exists=True, path_type=Path),
    help="The slide, or a folder of slides, where no run tells size, resolution and bounds.",
)
@heading("Input", rare=True)
@click.option(
    "--size",
    type=Parsed("WIDTHxHEIGHT", read_size),
    help="The slide's level 0, where no slide is at hand.",
)
@heading("How to compare")
@click.option("--mpp", type=MPP, help="µm per pixel to compare at  [default: the truth's pixels]")
@click.option(
    "--tolerance",
    type=click.IntRange(min=0, max=1024),
    default=2,
    help="px up to which two borders count as one, for boundary F1.",
)
@once("--roi", type=FILE, help="GeoJSON polygons outside of which nothing is judged.")
@frame_option("Whose origin GeoJSON and cut masks have on slides with bounds.")
@click.pass_context
def command(
    ctx: click.Context,
    prediction: Path,
    truth: Path,
    as_json: bool,
    output: Path | None,
    classes: str | None,
    renamed: Iterable[tuple[str, str]],
    prediction_values: Iterable[Meaning],
    truth_values: Iterable[Meaning],
    ignored: tuple[int, ...],
    slide: Path | None,
    size: tuple[int, int] | None,
    mpp: float | None,
    tolerance: int,
    roi: Path | None,
    frame: Frame,
) -> None:
    """How well does PREDICTION agree with TRUTH?

    Either is a mask (PNG, TIFF, OME-TIFF, OME-Zarr), a folder that `segment` wrote for a slide, or
    GeoJSON, such as QuPath's annotations; or both are folders of such, matched by their names.
    Classes are matched by name. docs/evaluation.md tells of the figures.
    """
    from wsi_pipeline.cli.progress import Bars
    from wsi_pipeline.evaluation.evaluate import evaluate

    with wrong_usage(UsageError), Bars(quiet=ctx.obj["quiet"], unit="blocks") as bars:
        figures = evaluate(
            prediction,
            truth,
            output=output,
            slide=slide,
            size=size,
            progress=lambda name, done, total, number, of: bars(
                name if of == 1 else f"{number}/{of} {name}", done, total
            ),
            classes=tuple(name.strip() for name in classes.split(",")) if classes else (),
            prediction_values=_values(prediction_values),
            truth_values=_values(truth_values, ignored),
            renamed=dict(renamed),
            mpp=mpp,
            tolerance_px=tolerance,
            frame=frame,
            roi=roi,
        )
    click.echo(json.dumps(figures, indent=2) if as_json else _table(figures))


def _values(entries: Iterable[Meaning], ignored: Sequence[int] = ()) -> LabelMap:
    from wsi_pipeline.evaluation.meaning import LabelMap

    joined: dict[str, tuple[int, ...]] = {}
    are_others = False
    for name, values in entries:
        # below a threshold all is background
        are_others |= values is None or isinstance(values, range)
        if values is not None:
            joined[name] = (*joined.get(name, ()), *values)
    return LabelMap(classes=joined, ignored=ignored, background=None if are_others else (0,))


def _table(figures: Facts) -> str:
    from wsi_pipeline.evaluation.report import FIGURES, as_rows

    lines = ["\t".join(("slide", "class", *FIGURES))]
    for row in as_rows(figures):
        cells = ["-" if row[name] is None else f"{row[name]:.4f}" for name in FIGURES]
        lines.append("\t".join((row["slide"], row["class"], *cells)))
    return "\n".join(lines)
