"""What a run leaves for people and scripts: run.json, summary.csv and report.html."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote_from_bytes

from wsi_pipeline.errors import StoreError
from wsi_pipeline.export.overlay import read_preview
from wsi_pipeline.remote import write_whole

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
MANY_RUNS = 200
"""Above this number of runs the report's pictures are half as wide, so that it still opens."""
SHARED = ("model", "settings", "versions")
"""What of a run is usually the same for all slides and then told once."""
NOT_OF_SLIDES = ("area_px", "volume_ml", "lesions", "labels")
"""Fields that are left out where they are empty."""
LINKED_FILES = (
    "overlay.png",
    "annotations.geojson",
    "mask.ome.tif",
    "mask.asap.tif",
    "mask.png",
    "mask.nii.gz",
    "mask.dcm",
    "run.json",
)
GREY = (128, 128, 128)
Colors = Mapping[tuple[str, str], str]
"""CSS colour of a class, by its name and the unit of its amount."""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Segmentation report</title>
<style>{style}</style>
</head>
<body>
<header><h1>Segmentation report</h1><p>{written}</p></header>
{body}
<footer>Written by wsi_pipeline. For research; not a medical device, not for diagnosis.</footer>
</body>
</html>
"""
STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --dim: #5c6672; --line: #d9dee4;
  --page: #f6f7f9; --card: #fff; --link: #0b5cad; --bad: #b3261e; --odd: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #9aa5b1; --line: #343c47;
  --page: #14181d; --card: #1d232a; --link: #7ab8ff; --bad: #ff8a80; --odd: #e5b25d; } }
body { margin: 0 auto; max-width: 1280px; padding: 24px; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 26px; font-weight: 600; }
h2 { margin: 32px 0 10px; font-size: 18px; font-weight: 600; }
h3 { margin: 0 0 10px; font-size: 15px; font-weight: 600; overflow-wrap: anywhere; }
header p, footer, .totals span { color: var(--dim); }
header p { margin: 2px 0 20px; }
footer { margin-top: 40px; border-top: 1px solid var(--line); padding-top: 12px; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
.totals { display: flex; flex-wrap: wrap; gap: 12px; }
.totals div { background: var(--card); border: 1px solid var(--line); border-left-width: 4px;
  border-radius: 6px; padding: 10px 16px; }
.totals b { display: block; font-size: 20px; font-weight: 600; }
table { width: 100%; border-collapse: collapse; background: var(--card);
  border: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; }
.n { text-align: right; white-space: nowrap; overflow-wrap: normal; }
.bar { display: flex; height: 5px; margin-top: 4px; border-radius: 2px; overflow: hidden;
  background: var(--line); }
.failed h2, .bad { color: var(--bad); }
.failed table { border-left: 4px solid var(--bad); }
.odd, .warning { color: var(--odd); }
em { font-style: normal; font-weight: 400; }
.cards { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 14px; }
article img { display: block; width: 100%; height: 300px; object-fit: contain; background: #fff;
  border-radius: 3px; }
article .bar { height: 8px; margin: 10px 0; }
ul { margin: 0; padding: 0; list-style: none; }
li { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 10px; }
li i { display: inline-block; width: 11px; height: 11px; margin-right: 7px; border-radius: 2px; }
.warning, .files { margin: 8px 0 0; font-size: 13px; overflow-wrap: anywhere; }
.files a { margin-right: 8px; }
details { margin-top: 8px; font-size: 13px; }
summary { color: var(--dim); cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 2px 14px;
  margin: 8px 0 0; font-size: 13px; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One source's finished folder, as `run.json` holds it.

    Attributes:
        status: "done", or "failed" with the reason; "busy", never written down, where another
            process works in the folder.
        reason: one sentence for people; "" where all is well.
        slide: name, path, size (w, h), mpp (x, y), mpp_source, bounds, backend, fingerprint; of a
            slide that could not be opened only the first two.
        model: name and weights_sha256.
        settings: options of the run.
        versions: of the software.
        patches: how many the grid has, were kept as tissue, were predicted.
        seconds: per stage; "total" is wall time.
        area_mm2: per class, from the mask's pixels, in the mask's order.
        colors: (red, green, blue) per class, 0 to 255.
        tissue_mm2: where the model looked, from the thumbnail.
        regions: polygons per class.
        frame: `for` which viewer polygons and TIFF are, and their `offset` (x, y) in level-0 px.
        bad_regions: parts of the slide that could not be read.
        warnings: where the result may differ from what was asked.
        area_px: per class, of an image whose pixels have no known size, in place of `area_mm2`.
        volume_ml: per class, of a volume, likewise.
        lesions: of images and volumes, per class: how many, and the size of each.
        labels: probability of each, where the network classifies.
    """

    status: Literal["done", "failed", "busy"]
    reason: str = ""
    slide: dict[str, Any]
    model: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
    patches: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    area_mm2: dict[str, float] = field(default_factory=dict)
    colors: dict[str, list[int]] = field(default_factory=dict)
    tissue_mm2: float = 0.0
    regions: dict[str, int] = field(default_factory=dict)
    frame: dict[str, Any] = field(default_factory=dict)
    bad_regions: list[Any] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    area_px: dict[str, float] = field(default_factory=dict)
    volume_ml: dict[str, float] = field(default_factory=dict)
    lesions: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, float] = field(default_factory=dict)

    @property
    def amounts(self) -> dict[str, float]:
        """Return how much there is of each class, in `unit`."""
        return self.area_mm2 or self.volume_ml or self.area_px

    @property
    def unit(self) -> str:
        """Return the unit of the amounts, as people write it."""
        return "ml" if self.volume_ml else "px" if self.area_px else "mm²"


def write_run_json(path: Path, run: Run) -> None:
    """Write a run as strict JSON; the file appears when it is complete."""
    facts = {k: v for k, v in asdict(run).items() if v or k not in NOT_OF_SLIDES}
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
    _write_text(path, text + "\n")


def load_run(path: Path) -> Run:
    """Read a `run.json`; return the run.

    Raises:
        StoreError: the file cannot be read, or holds no run.
    """
    try:
        return Run(**json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is not a run of this version ({error}); remove it or use --overwrite"
        ) from error


def find_runs(output_dir: Path) -> dict[Path, Run]:
    """Return all runs below an output folder by their folder, sorted; unreadable ones are logged.

    So that a summary holds what earlier calls and other machines have done as well.
    """
    runs = {}
    for path in sorted(output_dir.glob(f"*/{RUN_FILE}")):
        try:
            runs[path.parent] = load_run(path)
        except StoreError as error:
            logger.warning("left out of the summary: %s", error)
    return runs


def write_summary(output_dir: Path, runs: Mapping[Path, Run]) -> None:
    """Write `summary.csv`, a row for each run.

    A text that a spreadsheet would take for a formula gets an apostrophe in front; `run.json` has
    it as it is.

    Args:
        output_dir: folder of the file.
        runs: by their folder.
    """
    buffer = io.StringIO(newline="")
    rows = csv.writer(buffer)
    names = list(dict.fromkeys(itertools.chain.from_iterable(r.area_mm2 for r in runs.values())))
    more = list(dict.fromkeys(itertools.chain.from_iterable(map(_more_columns, runs.values()))))
    rows.writerow(
        [
            *("folder", "slide", "status", "reason", "width_px", "height_px", "mpp_x", "mpp_y"),
            *("patches", "tissue_mm2"),
            *(_no_formula(f"{name}_mm2") for name in names),
            "seconds",
            *map(_no_formula, more),
        ]
    )
    rows.writerows(
        _summary_row(output_dir, folder, run, names, more) for folder, run in runs.items()
    )
    _write_text(output_dir / "summary.csv", buffer.getvalue())


def _more_columns(run: Run) -> dict[str, float]:
    """Return what a row has only of images and volumes, by its column."""
    spacing = run.slide.get("spacing_mm") or ()
    found = {f"spacing_{axis}_mm": mm for axis, mm in zip("xyz", spacing, strict=False)}
    if len(size := run.slide.get("size", ())) == 3:
        found["depth_px"] = size[2]
    if run.unit != "mm²":
        found |= {f"{name}_{run.unit}": round(n, 6) for name, n in run.amounts.items()}
    for name, lesions in run.lesions.items():
        found[f"{name}_lesions"] = lesions["count"]
        if lesions["largest_mm"] is not None:
            found[f"{name}_largest_mm"] = round(lesions["largest_mm"], 3)
    return found | {f"probability_{label}": round(p, 6) for label, p in run.labels.items()}


def _summary_row(
    output_dir: Path, folder: Path, run: Run, names: Sequence[str], more: Sequence[str]
) -> list[str | int | float]:
    """Return one row; numbers that a failed run lacks are empty."""
    done, own = run.status == "done", _more_columns(run)
    return [
        _no_formula(os.path.relpath(folder, output_dir)),
        _no_formula(run.slide["name"]),
        run.status,
        _no_formula(run.reason),
        *run.slide.get("size", ("", ""))[:2],
        *run.slide.get("mpp", ("", "")),
        run.patches.get("kept", ""),
        round(run.tissue_mm2, 6) if done and _has_tissue(run) else "",
        *(round(run.area_mm2[name], 6) if name in run.area_mm2 else "" for name in names),
        run.seconds.get("total", ""),
        *(own.get(name, "") for name in more),
    ]


def _has_tissue(run: Run) -> bool:
    """Return whether a run is, or may be, that of a slide: others have no tissue to look for."""
    return "spacing_mm" not in run.slide


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _write_text(path: Path, text: str) -> None:
    # file names that are no UTF-8 come with lone surrogates, which no encoding takes as they are
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def write_report(output_dir: Path, runs: Mapping[Path, Run]) -> None:
    """Write `report.html`: one file with pictures, areas, failures and settings, no network.

    Args:
        output_dir: folder of the file; its links are relative to here.
        runs: by their folder, in which `overlay.png` is looked for.
    """
    side = 480 if len(runs) <= MANY_RUNS else 240  # px, of a picture's longer side
    facts = [_facts({n: getattr(run, n) for n in SHARED}) for run in runs.values()]
    common = _common(facts)
    colors = _colors(runs.values())
    cards = [
        _card(output_dir, folder, run, side, [f for f in own if f not in common], colors)
        for (folder, run), own in zip(runs.items(), facts, strict=True)
    ]
    sections = [
        _totals(list(runs.values()), colors),
        _failures(runs.values()),
        _section("Slides", _table(output_dir, runs, colors)),
        _section("Pictures", f'<div class="cards">{"".join(cards)}</div>'),
        _section("Model, settings and versions of all slides", _list(common)),
    ]
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = PAGE.format(style=STYLE, written=escape(written), body="\n".join(sections))
    _write_text(output_dir / "report.html", page)


def _totals(runs: Sequence[Run], colors: Colors) -> str:
    """Return the row of figures at the top."""
    done = sum(run.status == "done" for run in runs)
    tissue = math.fsum(run.tissue_mm2 for run in runs)
    what = "slides" if all(map(_has_tissue, runs)) else "images"
    figures = [(f"{what} done", f"{done} of {len(runs)}", "")]
    if what == "slides" or tissue:
        figures.append(("tissue", f"{_mm2(tissue)} mm²", ""))
    for (name, unit), color in colors.items():
        area = math.fsum(run.amounts.get(name, 0.0) for run in runs if run.unit == unit)
        label = f"{name}, {_percent(area, tissue)} of the tissue" if what == "slides" else name
        figures.append((label, f"{_mm2(area)} {unit}", f"border-left-color:{color}"))
    return (
        '<div class="totals">'
        + "".join(
            f'<div style="{style}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
            for label, value, style in figures
        )
        + "</div>"
    )


def _failures(runs: Iterable[Run]) -> str:
    rows = "".join(
        f"<tr><td>{escape(run.slide['name'])}</td><td>{escape(run.reason)}</td></tr>"
        for run in runs
        if run.status == "failed"
    )
    head = "<tr><th>slide</th><th>reason</th></tr>"
    return _section("Failed", f"<table>{head}{rows}</table>", style="failed") if rows else ""


def _table(output_dir: Path, runs: Mapping[Path, Run], colors: Colors) -> str:
    largest = max((a for run in runs.values() for a in run.amounts.values()), default=0.0)
    heads = ["patches", "tissue mm²", *(f"{name} {unit}" for name, unit in colors), "time"]
    head = "".join(f'<th class="n">{escape(text)}</th>' for text in heads)
    rows = [
        f'<tr><td><a href="#{_anchor(output_dir, folder)}">{escape(run.slide["name"])}</a>'
        f'{_badge(run)}</td><td class="n">{run.patches.get("kept", "")}</td>'
        f'<td class="n">{_mm2(run.tissue_mm2) if run.patches and _has_tissue(run) else ""}</td>'
        + "".join(
            _area_cell(run.amounts.get(name) if run.unit == unit else None, color, largest)
            for (name, unit), color in colors.items()
        )
        + f'<td class="n">{_duration(run.seconds.get("total"))}</td></tr>'
        for folder, run in runs.items()
    ]
    return f"<table><tr><th>slide</th>{head}</tr>{''.join(rows)}</table>"


def _area_cell(area: float | None, color: str, largest: float) -> str:
    if area is None:
        return "<td></td>"
    return f'<td class="n">{_mm2(area)}{_bar([(area, color)], largest)}</td>'


def _card(
    output_dir: Path,
    folder: Path,
    run: Run,
    side: int,
    own_facts: list[tuple[str, str]],
    colors: Colors,
) -> str:
    """Return picture, areas, warnings, files and facts of one run."""
    shares = [(area, colors[name, run.unit]) for name, area in run.amounts.items()]
    areas = "".join(
        f'<li><span><i style="background:{colors[name, run.unit]}"></i>{escape(name)}</span>'
        f"<span>{_mm2(area)} {run.unit} · {_detail(run, name)}</span></li>"
        for name, area in run.amounts.items()
    )
    areas += "".join(
        f"<li><span>{escape(label)}</span><span>probability {p:.3f}</span></li>"
        for label, p in run.labels.items()
    )
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in run.warnings)
    reason = f'<p class="warning">{escape(run.reason)}</p>' if run.reason else ""
    links = " ".join(
        f'<a href="{_link(output_dir, folder / name)}">{name}</a>'
        for name in LINKED_FILES
        if (folder / name).exists()
    )
    own = _facts({n: getattr(run, n) for n in ("slide", "patches", "seconds", "frame")})
    return (
        f'<article id="{_anchor(output_dir, folder)}">'
        f"<h3>{escape(run.slide['name'])}{_badge(run)}</h3>"
        f'<a href="{_link(output_dir, folder / "overlay.png")}">{_image(folder, side)}</a>'
        f"{_bar(shares, run.tissue_mm2) if shares and _has_tissue(run) else ''}"
        f"<ul>{areas}</ul>{reason}{warnings}"
        f'<p class="files">{links}</p>'
        f"<details><summary>more</summary>{_list(own + own_facts)}</details></article>"
    )


def _detail(run: Run, name: str) -> str:
    """Return what a card tells of a class beside its area."""
    if _has_tissue(run):
        share = _percent(run.area_mm2[name], run.tissue_mm2)
        return f"{share} · {run.regions.get(name, 0):,} regions"
    lesions = run.lesions[name]
    count, largest = lesions["count"], lesions["largest_mm"]
    return f"{count:,} lesions" + (f", the largest {largest:.1f} mm" if largest else "")


def _section(title: str, content: str, style: str = "") -> str:
    return f'<section class="{style}"><h2>{title}</h2>{content}</section>'


def _list(facts: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    return f"<dl>{items}</dl>"


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


def _bar(parts: Iterable[tuple[float, str]], whole: float) -> str:
    """Return a small bar of coloured parts, each as long as its share of the whole."""
    inner = "".join(
        f'<i style="width:{100 * min(part / whole, 1):.2f}%;background:{color}"></i>'
        for part, color in parts
        if whole > 0
    )
    return f'<span class="bar">{inner}</span>'


def _badge(run: Run) -> str:
    if run.status == "failed":
        return ' <em class="bad">failed</em>'
    return ' <em class="odd">warning</em>' if run.warnings or run.bad_regions else ""


def _image(folder: Path, side: int) -> str:
    """Return a run's overlay as an element with the picture in it, or "" where there is none."""
    try:
        jpeg = base64.b64encode(read_preview(folder / "overlay.png", side)).decode()
    except (OSError, KeyError) as error:
        logger.debug("no picture of %s: %s", folder, error)
        return ""
    return f'<img src="data:image/jpeg;base64,{jpeg}" alt="slide with mask" loading="lazy">'


def _colors(runs: Iterable[Run]) -> Colors:
    """Return the CSS colour of each class in each unit; grey where the run does not say."""
    runs = list(runs)
    known = {name: color for run in runs for name, color in run.colors.items()}
    return {
        (name, unit): "rgb({},{},{})".format(*map(int, known.get(name) or GREY))
        for name, unit in dict.fromkeys((name, run.unit) for run in runs for name in run.amounts)
    }


def _link(output_dir: Path, path: Path) -> str:
    return quote_from_bytes(os.fsencode(os.path.relpath(path, output_dir)))


def _anchor(output_dir: Path, folder: Path) -> str:
    return "run-" + _link(output_dir, folder).replace("%", "-")


def _mm2(area: float) -> str:
    """Return an area with about three digits.

    Example:
        >>> [_mm2(a) for a in (0, 0.00123, 0.5, 12.345, 1234.5)]
        ['0', '0.0012', '0.50', '12.3', '1,234']
    """
    if area == 0:
        return "0"
    digits = 0 if area >= 1000 else 1 if area >= 10 else 2 if area >= 0.1 else 4
    return f"{area:,.{digits}f}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "–"


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
