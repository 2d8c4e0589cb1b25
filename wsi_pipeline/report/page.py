"""report.html: pictures, areas, failures and settings of all runs in one page for people."""

from __future__ import annotations

import base64
import hashlib
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from wsi_pipeline.export.overlay import PREVIEW_SIDE, read_preview
from wsi_pipeline.files.remote import write_whole
from wsi_pipeline.report.record import GREY, OUTPUT_FILES, RUN_FILE, Run

logger = logging.getLogger(__name__)

MANY_RUNS = 200
"""Above this number of runs the report's pictures are half as wide, so that it still opens."""
BARS = 20
"""Of a histogram."""
SHARED = ("model", "settings", "versions")
"""What of a run is usually the same for all slides and then told once."""
LINKED_FILES = (*(name for name in OUTPUT_FILES if not name.endswith(".zarr")), RUN_FILE)


class Column(NamedTuple):
    """A class in the table, in one unit.

    Attributes:
        total: The amount in all runs.
        largest: The largest amount of any class of any run in this unit, for the length of bars.
    """

    name: str
    unit: str
    total: float
    largest: float


class Histogram(NamedTuple):
    """How much there is of a class, over all runs.

    Attributes:
        runs: How many there are.
        spread: Of the runs the 5th percentile, the median, the 95th and the largest, in `unit`.
        bars: Height of each, as a share of the highest, and what it stands for.
    """

    name: str
    unit: str
    runs: int
    spread: list[float]
    bars: list[tuple[float, str]]


class Card(NamedTuple):
    """What the page says of one run beside what `run.json` says.

    Attributes:
        picture: JPEG as base64; "" where there is none.
        links: Relative URL of each file that is there.
        facts: Names and texts that not all runs share.
    """

    run: Run
    anchor: str
    picture: str
    links: dict[str, str]
    facts: list[tuple[str, str]]


def write_report(output_dir: Path, runs: Mapping[Path, Run]) -> None:
    """Write `report.html`: one file with pictures, areas, failures and settings, no network.

    Args:
        output_dir: folder of the file; its links are relative to here.
        runs: by their folder, in which `overlay.png` is looked for.
    """
    # px, of a picture's longer side
    side = PREVIEW_SIDE if len(runs) <= MANY_RUNS else PREVIEW_SIDE // 2
    # a failed run has a card only where there is something to see: its reason stands at the top
    shown = {folder for folder, run in runs.items() if run.status == "done" or run.amounts}
    shared = {folder: _facts({n: getattr(run, n) for n in SHARED}) for folder, run in runs.items()}
    common = _common([shared[folder] for folder in shown or runs])
    cards = [
        Card(
            run=run,
            anchor=f"run-{number}",
            picture=_picture(folder, side) if folder in shown else "",
            links={
                name: quote_from_bytes(
                    os.fsencode((folder / name).relative_to(output_dir).as_posix())
                )
                for name in dict.fromkeys((*LINKED_FILES, *run.files))
                # of a run behind a URL not every file has a copy in the folder
                if name in run.files or (folder / name).exists()
            },
            facts=_facts({n: getattr(run, n) for n in ("slide", "patches", "seconds", "frame")})
            + [fact for fact in shared[folder] if fact not in common],
        )
        for number, (folder, run) in enumerate(runs.items())
    ]
    environment = Environment(
        loader=PackageLoader("wsi_pipeline.report", ""),
        # names, reasons and whatever else a run.json holds are text, never markup
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    named = {name: color for run in runs.values() for name, color in run.colors.items()}
    colors = {
        name: "rgb({},{},{})".format(*map(int, named.get(name) or GREY))
        for run in runs.values()
        for name in run.amounts
    }
    environment.filters |= {
        "amount": _amount,
        "count_of": lambda n, what: f"{n:,} {what}{'s' * (n != 1)}",
        "duration": _duration,
        "share": lambda part, whole: f"{100 * part / whole:.1f} %" if whole > 0 else "–",
    }
    script = environment.get_template("sort.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tables = {"summary.csv": "the figures as a table", "cohort.csv": "how they are spread"}
    columns = _columns(runs.values())
    # what could not be opened may be anything
    kinds = {run.kind for run in runs.values() if "size" in run.slide}
    slides = any(run.kind == "slide" for folder, run in runs.items() if folder in shown)
    page = environment.get_template("page.html.j2").render(
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        tables={name: text for name, text in tables.items() if (output_dir / name).exists()},
        kind=kinds.pop() if len(kinds) == 1 else "file",
        done=sum(run.status == "done" for run in runs.values()),
        runs=len(runs),
        limits=dict.fromkeys(
            (run.model.get("name", ""), run.model["limits"])
            for run in runs.values()
            if "limits" in run.model
        ),
        tissue=math.fsum(run.tissue_mm2 for run in runs.values()) if slides else None,
        columns=columns,
        spreads=_histograms(columns, [run for run in runs.values() if run.status == "done"]),
        script=script,
        script_hash=f"sha256-{digest}",
        colors=colors,
        labels=list(dict.fromkeys(label for run in runs.values() for label in run.labels)),
        failed=[card for card in cards if card.run.status == "failed"],
        cards=[card for folder, card in zip(runs, cards, strict=True) if folder in shown],
        common=common,
        side=side,
    )
    # file names that are no UTF-8 come with lone surrogates, which no encoding takes as they are
    write_whole(output_dir / "report.html", page.encode("utf-8", "backslashreplace"))


def _columns(runs: Iterable[Run]) -> list[Column]:
    """Return the classes of all runs, once for each unit."""
    amounts: dict[str, list[tuple[str, float]]] = {}
    for run in runs:
        amounts.setdefault(run.unit, []).extend(run.amounts.items())
    return [
        Column(
            name=name,
            unit=unit,
            total=math.fsum(amount for other, amount in found if other == name),
            largest=max(amount for _, amount in found),
        )
        for unit, found in amounts.items()
        for name in dict.fromkeys(name for name, _ in found)
    ]


def _histograms(columns: Iterable[Column], runs: Sequence[Run]) -> list[Histogram]:
    """Return a histogram of each class that several runs have, of slides in % of the tissue."""
    found = []
    for name, unit, *_ in columns:
        known = [run for run in runs if run.unit == unit and name in run.amounts]
        values, shown = np.array([run.amounts[name] for run in known]), unit
        if all(run.kind == "slide" and run.tissue_mm2 > 0 for run in known):
            values, shown = 100 * values / [run.tissue_mm2 for run in known], "% of tissue"
        if len(known) > 1 and values.max() > 0:
            counts, edges = np.histogram(values, BARS, (0, values.max()))
            bars = [
                (n / counts.max(), f"{_amount(a)} to {_amount(b)} {shown}: {n}")
                for n, a, b in zip(counts.tolist(), edges, edges[1:], strict=False)
            ]
            spread = np.percentile(values, (5, 50, 95, 100)).tolist()
            found.append(Histogram(name, shown, len(known), spread, bars))
    return found


def _facts(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested mappings; return names and texts.

    Example:
        >>> _facts({"model": {"name": "m"}, "size": [3, 4], "bounds": None})
        [('model name', 'm'), ('size', '3, 4'), ('bounds', '–')]
    """
    found = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _facts(value, f"{prefix}{key} ")
        else:
            several = isinstance(value, list | tuple)
            text = ", ".join(map(str, value)) if several else "–" if value is None else str(value)
            found.append((f"{prefix}{key}", text))
    return found


def _common(facts: Iterable[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return what no run contradicts; a failed run may say less than the others.

    Example:
        >>> _common([[("a", "1"), ("b", "2")], [("a", "1"), ("b", "3")], [("a", "1")]])
        [('a', '1')]
    """
    every = dict.fromkeys(itertools.chain.from_iterable(facts))
    values = Counter(name for name, _ in every)
    return [fact for fact in every if values[fact[0]] == 1]


def _picture(folder: Path, side: int) -> str:
    """Return a run's overlay, small, as base64; "" where there is none."""
    try:
        return base64.b64encode(read_preview(folder / "overlay.png", side)).decode()
    except (OSError, KeyError, ValueError) as error:
        logger.debug("no picture of %s: %s", folder, error)
        return ""


def _amount(area: float) -> str:
    """Return an area with about three digits.

    Example:
        >>> [_amount(a) for a in (0, 0.00123, 0.5, 12.345, 1234.5)]
        ['0', '0.0012', '0.50', '12.3', '1,234']
    """
    if area == 0:
        return "0"
    digits = 0 if area >= 1000 else 1 if area >= 10 else 2 if area >= 0.1 else 4
    return f"{area:,.{digits}f}"


def _duration(seconds: float | None) -> str:
    """Return seconds for people.

    Example:
        >>> [_duration(s) for s in (None, 3.21, 75, 7260)]
        ['', '3.2 s', '1 min 15 s', '2 h 1 min']
    """
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
