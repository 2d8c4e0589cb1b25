"""From the records of a benchmark to a table of ratios and a chart of the stages."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparisons import Comparison, Facts, Figure, Job
from measure import machine

Record = Mapping[str, Any]

EXPORTS = ("pyramid", "tiff", "geojson", "overlay")
"""Stages that follow each other after the blocks; all others are summed over threads."""
FLOOR = ("decode_seconds", "forward_seconds")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A comparison with its finished rounds.

    Attributes:
        name: of the comparison.
        comparison: what it is.
        rounds: what each job took, by label.
        code: digest of the code that was measured.
        dates: first and last day.
    """

    name: str
    comparison: Comparison
    rounds: list[Facts]
    code: str
    dates: tuple[str, str]


def job_key(name: str, label: str, job: Job) -> dict[str, Any]:
    """Return what tells the records of one job from all others, as JSON holds it."""
    key: dict[str, Any] = json.loads(json.dumps(asdict(job)))
    return {"comparison": name, "label": label, "job": key}


def finished(comparisons: Mapping[str, Comparison], records: Sequence[Record]) -> list[Result]:
    """Return the comparisons that have whole rounds, each with those of its latest code."""
    results = []
    for name, comparison in comparisons.items():
        keys = {label: job_key(name, label, job) for label, job in comparison.jobs.items()}
        own = [r for r in records if any(key.items() <= r.items() for key in keys.values())]
        own = [r for r in own if r["code"] == own[-1]["code"]]
        turns: dict[int, dict[str, Any]] = {}
        for record in own:
            turns.setdefault(record["round"], {})[record["label"]] = _derived(record["facts"])
        rounds = [turn for turn in turns.values() if turn.keys() == keys.keys()]
        if rounds:
            dates = sorted(record["date"] for record in own)
            results.append(
                Result(
                    name=name,
                    comparison=comparison,
                    rounds=rounds,
                    code=own[-1]["code"],
                    dates=(dates[0], dates[-1]),
                )
            )
    return results


def write_results(
    comparisons: Mapping[str, Comparison], records: Sequence[Record], folder: Path, *, tissue: str
) -> list[Path]:
    """Write what was measured as Markdown, JSON and PNG; return the files.

    Args:
        comparisons: to look for.
        records: of run.py.
        folder: for files named by the day and the machine.
        tissue: what the slides are made of.

    Raises:
        SystemExit: no comparison has a whole round.
    """
    results = finished(comparisons, records)
    if not results:
        raise SystemExit("no comparison has a whole round yet")
    here = machine()
    here |= {"date": max(result.dates[1] for result in results), "tissue": tissue}
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{here['date']}-{slug(here['cpu'])}-{here['cores']}-cores"
    paths = [folder / f"{stem}{suffix}" for suffix in (".md", ".json", ".png")]
    paths[0].write_text("\n".join(_markdown(here, results, paths[2].name)) + "\n", "utf-8")
    plain = {result.name: {"code": result.code, "rounds": result.rounds} for result in results}
    paths[1].write_text(json.dumps({"machine": here, "comparisons": plain}, indent=1), "utf-8")
    chosen = [result for result in results if "floor" in result.comparison.jobs]
    if not chosen:
        return paths[:2]
    draw_stages(chosen[0].rounds, paths[2])
    return paths


def _derived(facts: Mapping[str, Any]) -> dict[str, Any]:
    derived = dict(facts)
    if megapixels := facts.get("tissue_megapixels"):
        derived["seconds_per_tissue_megapixel"] = facts["seconds"] / megapixels
    return derived


def _markdown(here: Mapping[str, Any], results: Sequence[Result], chart: str) -> Iterator[str]:
    yield f"# Benchmark of {here['date']}"
    yield ""
    yield (
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']} GB, {here['system']}; "
        f"Python {here['python']}, PyTorch {here['torch']}, wsi-pipeline {here['wsi-pipeline']}."
    )
    yield (
        "Each time is that of a fresh process, start-up included; figures are medians over the "
        "rounds, ratios are taken within each round. "
        f"Slides at 0.5 µm/px unless it is said, made of {here['tissue']}. "
        "[What it means](../../docs/benchmarks.md)."
    )
    for result in results:
        yield ""
        yield f"## `{result.name}`: {result.comparison.text}"
        yield ""
        yield from _figures(result)
        yield ""
        yield from _times(result)
        if any(job.who == "before" for job in result.comparison.jobs.values()):
            yield ""
            yield from _rates(result)
    if any("floor" in result.comparison.jobs for result in results):
        yield ""
        yield f"![stages]({chart})"


def _figures(result: Result) -> Iterator[str]:
    yield f"| figure | median of {len(result.rounds)} | lowest – highest | wanted | |"
    yield "|---|---|---|---|---|"
    for figure in result.comparison.figures:
        values = [figure.of(facts) for facts in result.rounds]
        middle = statistics.median(values)
        wanted, is_met = _judged(figure, middle)
        spread = f"{_short(min(values))} – {_short(max(values))}"
        yield f"| {figure.text} | **{_short(middle)}** | {spread} | {wanted} | {is_met} |"


def _times(result: Result) -> Iterator[str]:
    yield "| run | slide, px | patches | seconds | of all processors | peak, GB | stages, s |"
    yield "|---|---|---|---|---|---|---|"
    for label, job in result.comparison.jobs.items():
        runs = [facts[label] for facts in result.rounds]
        width, height = job.size
        stages = ", ".join(f"{name} {_short(s)}" for name, s in _stages(runs).items())
        yield (
            f"| {label} | {width:,} × {height:,} | {runs[0].get('patches', '')} "
            f"| {_short(_median(runs, 'seconds'))} | {_short(_median(runs, 'cpu_seconds'))} "
            f"| {_short(_median(runs, 'peak_gb'))} "
            f"| {stages} |"
        )


def _rates(result: Result) -> Iterator[str]:
    """Yield how many tissue megapixels a second of each stage come through, now and before."""
    yield (
        "Megapixels of the slide's tissue a second of each stage: of one thread for those of "
        "blocks, of the whole process for those after them; last, of processor time for all of it."
    )
    yield ""
    stages = ("read", "predict", "write", "polygons", *EXPORTS)
    yield f"| run | {' | '.join(stages)} | everything, a core |"
    yield "|---" * (len(stages) + 2) + "|"
    for label in result.comparison.jobs:
        runs = [facts[label] for facts in result.rounds]
        tissue = _median(runs, "tissue_megapixels")
        seconds = _stages(runs)
        rates = [_short(tissue / seconds[s]) if seconds.get(s) else "" for s in stages]
        yield f"| {label} | {' | '.join(rates)} | {_short(tissue / _median(runs, 'cpu_seconds'))} |"


def _judged(figure: Figure, value: float) -> tuple[str, str]:
    bounds = []
    if figure.low is not None:
        bounds.append(f"≥ {figure.low:g}")
    if figure.high is not None:
        bounds.append(f"≤ {figure.high:g}")
    if not bounds:
        return "", ""
    low = figure.low if figure.low is not None else value
    high = figure.high if figure.high is not None else value
    return ", ".join(bounds), "met" if low <= value <= high else "**missed**"


def _stages(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median seconds of all that a job tells of its inside."""
    named: dict[str, list[float]] = {}
    for run in runs:
        floor = {k.removesuffix("_seconds"): v for k, v in run.items() if k in FLOOR}
        for name, seconds in {**run.get("stages", {}), **run.get("alone", {}), **floor}.items():
            named.setdefault(name, []).append(seconds)
    return {name: statistics.median(values) for name, values in named.items()}


def draw_stages(rounds: Sequence[Facts], path: Path) -> None:
    """Draw the floor, the whole run and its stages, one bar each, to a PNG.

    Args:
        rounds: of the comparison with the floor.
        path: file to write.
    """
    from matplotlib.figure import Figure as Chart  # here: all else runs without it

    ours = _stages([facts["ours"] for facts in rounds])
    floor = _stages([facts["floor"] for facts in rounds])
    job = ours.pop("total")
    whole = _median([facts["ours"] for facts in rounds], "seconds")
    summed = {name: seconds for name, seconds in ours.items() if name not in EXPORTS}
    exports = {name: seconds for name, seconds in ours.items() if name in EXPORTS}
    blocks = job - sum(exports.values())
    bars: list[tuple[str, float, float, str]] = [  # name, left, seconds, colour
        *((f"floor: {name}", 0, seconds, "#9aa5b1") for name, seconds in floor.items()),
        ("process", 0, whole, "#52606d"),
        ("slide", whole - job, job, "#7b8794"),
        ("survey and blocks", whole - job, blocks, "#c9702f"),
        *((f"  {name}", whole - job, seconds, "#e8a33d") for name, seconds in summed.items()),
    ]
    left = whole - job + blocks
    for name, seconds in exports.items():
        bars.append((name, left, seconds, "#b5473c"))
        left += seconds
    chart = Chart(figsize=(9, 0.32 * len(bars) + 1.2), layout="constrained")
    axes = chart.subplots()
    for row, (_, left, seconds, colour) in enumerate(bars):
        axes.barh(row, seconds, left=left, color=colour)
        axes.text(left + seconds, row, f" {_short(seconds)} s", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left + seconds for _, left, seconds, _ in bars))
    axes.set_xlabel("seconds; the stages of blocks overlap, and are summed over threads")
    axes.spines[["top", "right"]].set_visible(False)
    chart.savefig(path, dpi=120)


def _median(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _short(value: float) -> str:
    """Return a number with three significant digits, whole where it is large."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def slug(text: str) -> str:
    """Return a text as it goes into a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
