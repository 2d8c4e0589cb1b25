"""`wsi-pipeline evaluate`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from wsi_pipeline.cli.options import MPP, once, wrong_usage
from wsi_pipeline.options import Frame, SelectOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wsi_pipeline.evaluation.meaning import Values

LARGEST_SIDE = 1 << 20
"""px of a slide's level 0, as for files."""
LARGEST_VALUE = 65_535
"""Of a mask."""


class SizeChoice(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """Width and height."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return (width, height)."""
        match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", str(value))
        if not match or max(size := (int(match[1]), int(match[2]))) > LARGEST_SIDE:
            self.fail(f"{value!r} is no size; expected it as 98304x65536", param, ctx)
        return size


class MeaningChoice(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A class and its mask values."""

    name = "CLASS=VALUE[,VALUE…]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the class's name and its values, None for those that nothing else names."""
        name, equals, listed = (part.strip() for part in str(value).rpartition("="))
        if (name, listed) == ("Background", "others"):
            return name, None
        values = [v.strip() for v in listed.removesuffix("+").split(",")]
        is_open = listed.endswith("+")
        is_list = all(v.isdecimal() for v in values) and not (is_open and len(values) > 1)
        if not (name and equals and is_list):
            self.fail(
                f"{value!r} is no class with its values; expected Tumor=1,20, Tumor=128+ or "
                "Background=others",
                param,
                ctx,
            )
        numbers = tuple(map(int, values))
        if max(numbers) > LARGEST_VALUE:
            self.fail(f"{value!r}: the values of a mask go to {LARGEST_VALUE}", param, ctx)
        return name, range(numbers[0], LARGEST_VALUE + 1) if is_open else numbers


class RenameChoice(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """An old name and a new one."""

    name = "OLD=NEW"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the old name and the new one."""
        old, equals, new = str(value).partition("=")
        if not (equals and new.strip()):
            self.fail(f"{value!r} is no renaming; expected Invasive=Tumor", param, ctx)
        return old.strip(), new.strip()


@click.command()
@click.argument("prediction", type=click.Path(path_type=Path))
@click.argument("truth", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for evaluation.json, evaluation.csv and a picture of each slide's disagreement.",
)
@click.option("--classes", help="Classes to judge, separated by commas  [default: all]")
@click.option(
    "--rename",
    "renamed",
    type=RenameChoice(),
    multiple=True,
    help="Another name for a class, on either side; =NEW names areas without a class.",
)
@click.option(
    "--prediction-values",
    type=MeaningChoice(),
    multiple=True,
    help="What values of a prediction's mask mean, where it does not say. 0 is background if "
    "nothing else; Tumor=128+ are all from 128 on, Background=others those without a name.",
)
@click.option(
    "--truth-values", type=MeaningChoice(), multiple=True, help="Likewise of a truth's mask."
)
@click.option(
    "--ignore",
    "ignored",
    type=click.IntRange(min=0, max=LARGEST_VALUE),
    multiple=True,
    help="A value of the truth's mask that is not judged.",
)
@once(
    "--slide",
    type=click.Path(exists=True, path_type=Path),
    help="The slide, or a folder of slides, where no run tells size, resolution and bounds.",
)
@click.option("--size", type=SizeChoice(), help="The slide's level 0, where no slide is at hand.")
@click.option(
    "--mpp",
    type=MPP,
    help="µm per pixel to compare at  [default: the truth's pixels]",
)
@click.option(
    "--tolerance",
    type=click.IntRange(min=0, max=1024),
    default=2,
    help="px up to which two borders count as one, for boundary F1.",
)
@once(
    "--roi",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="GeoJSON polygons outside of which nothing is judged.",
)
@click.option(
    "--for",
    "frame",
    type=click.Choice(get_args(Frame)),
    default=SelectOptions().frame,
    help="Whose origin GeoJSON and cut masks have on slides with bounds.",
)
@click.pass_context
def command(
    ctx: click.Context,
    prediction: Path,
    truth: Path,
    as_json: bool,
    output: Path | None,
    classes: str | None,
    renamed: Iterable[tuple[str, str]],
    prediction_values: Iterable[tuple[str, Sequence[int] | None]],
    truth_values: Iterable[tuple[str, Sequence[int] | None]],
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
    from wsi_pipeline.annotations import read_region
    from wsi_pipeline.cli.progress import Bars
    from wsi_pipeline.evaluation.compare import CompareOptions, compare_all, pair_up
    from wsi_pipeline.evaluation.report import describe, write_evaluation

    options = CompareOptions(
        classes=tuple(name.strip() for name in classes.split(",")) if classes else (),
        prediction_values=_values(prediction_values, ()),
        truth_values=_values(truth_values, ignored),
        renamed=dict(renamed),
        mpp=mpp,
        tolerance_px=tolerance,
        frame=frame,
        roi=roi,
    )
    if roi is not None:
        with wrong_usage():
            read_region(roi)
    pairings = pair_up(prediction, truth, slide=slide, size=size)
    numbers = {pairing.name: number for number, pairing in enumerate(pairings, start=1)}
    with Bars(quiet=ctx.obj["quiet"], unit="blocks", of=len(pairings)) as bars:
        found = compare_all(
            pairings,
            options,
            progress=lambda name, done, total: bars(name, done, total, number=numbers[name]),
        )
    described = describe(found, tolerance_px=tolerance)
    if output:
        write_evaluation(output, found, described)
    click.echo(json.dumps(described, indent=2) if as_json else _table(described))


def _values(entries: Iterable[tuple[str, Sequence[int] | None]], ignored: Sequence[int]) -> Values:
    from wsi_pipeline.evaluation.meaning import Values

    joined: dict[str, tuple[int, ...]] = {}
    are_others = False
    for name, values in entries:
        # below a threshold all is background
        are_others |= values is None or isinstance(values, range)
        if values is not None:
            joined[name] = (*joined.get(name, ()), *values)
    return Values(classes=joined, ignored=ignored, background=None if are_others else (0,))


def _table(described: dict[str, Any]) -> str:
    from wsi_pipeline.evaluation.report import FIGURES, as_rows

    lines = ["\t".join(("slide", "class", *FIGURES))]
    for row in as_rows(described):
        cells = ["-" if row[name] is None else f"{row[name]:.4f}" for name in FIGURES]
        lines.append("\t".join((row["slide"], row["class"], *cells)))
    return "\n".join(lines)
