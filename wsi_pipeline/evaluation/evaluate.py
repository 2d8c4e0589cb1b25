"""evaluate(): masks, runs or annotations held against the truth, as the command does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsi_pipeline.annotations import read_region
from wsi_pipeline.errors import AnnotationError, UsageError, raised_as
from wsi_pipeline.evaluation.compare import CompareOptions, compare_all
from wsi_pipeline.evaluation.meaning import LabelMap
from wsi_pipeline.evaluation.pairs import pair_up
from wsi_pipeline.evaluation.report import describe, write_evaluation


def evaluate(
    prediction: str | Path,
    truth: str | Path,
    *,
    output: str | Path | None = None,
    slide: str | Path | None = None,
    size: tuple[int, int] | None = None,
    progress: Callable[[str, int, int, int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compare predictions with the truth as the command does; return all figures, as JSON has them.

    Args:
        prediction: A mask, a run's folder or GeoJSON; or a folder of such, as is `truth`: they are
            matched by name.
        output: Folder for evaluation.json, evaluation.csv and a picture of each slide's
            disagreement; None = nothing is written.
        slide: The slide, or a folder of slides, where no run tells size, resolution and bounds.
        size: (width, height) in px of the slide's level 0, where no slide is at hand.
        progress: Told the slide, its blocks done and in all, its number from 1 and how many slides
            there are.
        options: Fields of `CompareOptions` by name, such as `classes`, `mpp` or `roi`; what mask
            values mean is a mapping such as `truth_values={"Tumor": (1, 20)}`, too.

    Raises:
        UsageError: the region cannot be read.
        WsiPipelineError: the sides cannot be read or compared, or the output cannot be written.
        TypeError: an option that there is not.
    """
    if (roi := options.get("roi")) is not None:
        options["roi"] = Path(roi)
        with raised_as(UsageError, AnnotationError):
            # A bad file is told of before the first slide is read, which may take hours.
            read_region(options["roi"])
    for name in ("prediction_values", "truth_values"):
        if (given := options.get(name)) is not None and not isinstance(given, LabelMap):
            options[name] = LabelMap(classes=given)
    settled = CompareOptions(**options)
    pairings = pair_up(prediction, truth, slide=slide, size=size)
    numbers = {pairing.name: number for number, pairing in enumerate(pairings, start=1)}

    def told(name: str, done: int, total: int) -> None:
        if progress:
            progress(name, done, total, numbers[name], len(pairings))

    found = compare_all(pairings, settled, progress=told)
    figures = describe(found, tolerance_px=settled.tolerance_px)
    if output is not None:
        write_evaluation(output, found, figures)
    return figures
