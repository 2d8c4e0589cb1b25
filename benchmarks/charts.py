"""Draw the charts of docs/benchmarks.md from what is in benchmarks/results/: no run is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
MEASURED = "2026-11-28-amd-epyc-2-cores"
OURS, OTHER = "#0b5cad", "#b4b9c0"
COMMITS = {"ours": "5b2c6f4", "ours before": "22ea2ab"}
ROWS = (
    ("engine alone, half tissue, 16,384² px", "null", "ours", "tiatoolbox"),
    ("LightMuSeg, fp32, half tissue, 16,384² px", "lightmuseg-16384", "fp32", "tiatoolbox"),
    ("engine alone, whole slide, 16,384² px", "fast-null", "ours", "fast"),
    ("LightMuSeg, bf16, whole slide, 8,192² px", "fast-lightmuseg", "ours", "fast"),
)
"""Title, comparison, our job of it and the peer's."""
NAMES = {"tiatoolbox": "TIAToolbox 2.1.3", "fast": "FAST 4.18"}
# The same file each time; letters stay letters.
STYLE = {
    "svg.hashsalt": "charts",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
}


def draw_peers(path: Path) -> dict[str, tuple[float, float]]:
    """Draw seconds and peak memory beside the peers'; return ours and theirs by title and unit."""
    comparisons = json.loads((RESULTS / f"{MEASURED}.json").read_text("utf-8"))["comparisons"]
    shown = {}
    chart, panels = plt.subplots(1, 2, figsize=(9.5, 3.1), sharey=True, layout="constrained")
    for panel, key, unit in zip(panels, ("seconds", "peak_gb"), ("s", "GB"), strict=True):
        for row, (title, name, own, peer) in enumerate(reversed(ROWS)):
            rounds: list[Any] = comparisons[name]["rounds"]
            both = [median(one[who][key] for one in rounds) for who in (own, peer)]
            bars = panel.barh((row + 0.2, row - 0.2), both, 0.36, color=(OURS, OTHER))
            names = ("wsi_pipeline", NAMES[peer])
            labels = [f"{value:.3g} {unit}  {who}" for value, who in zip(both, names, strict=True)]
            panel.bar_label(bars, labels, padding=3, fontsize=8)
            shown[f"{title}, {unit}"] = (both[0], both[1])
        panel.set_xlim(0, 1.55 * max(max(v) for k, v in shown.items() if k.endswith(unit)))
        panel.set_xlabel(
            "wall time, start-up included" if unit == "s" else "peak memory of all processes"
        )
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(ROWS)), [row[0] for row in reversed(ROWS)])
    chart.savefig(path, metadata={"Date": None})
    return shown


def draw_stages(path: Path) -> None:
    """Draw how many megapixels of tissue each stage does in a second, now and before."""
    text = (RESULTS / f"{MEASURED}.md").read_text("utf-8")
    text = text.split("## `since`")[1].split("\n## ")[0]
    (header,) = re.findall(r"^\| run \| (read \| .*?) \|$", text, re.M)
    rows = {
        who: [float(cell.replace(",", "")) for cell in cells.split(" | ")]
        for who, cells in re.findall(r"^\| (ours(?: before)?) \| (\d[\d.,| ]*) \|$", text, re.M)
        if cells.count("|") == header.count("|")
    }
    names = header.split(" | ")
    chart, panel = plt.subplots(figsize=(9.5, 3.1), layout="constrained")
    for who, shift, color in (("ours before", -0.2, OTHER), ("ours", 0.2, OURS)):
        places = [place + shift for place in range(len(names))]
        bars = panel.bar(places, rows[who], 0.36, color=color, label=COMMITS[who])
        panel.bar_label(
            bars, [f"{v:,.0f}" if v > 99 else f"{v:.3g}" for v in rows[who]], fontsize=7
        )
    panel.set_yscale("log")
    panel.set_xticks(range(len(names)), names)
    panel.set_ylabel("megapixels a second")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(title="commit", frameon=False)
    chart.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    mpl.use("svg")
    mpl.rcParams.update(STYLE)
    for title, both in draw_peers(IMAGES / "peers.svg").items():
        print(title, *both)
    draw_stages(IMAGES / "stages.svg")
