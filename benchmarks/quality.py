"""What share of flaws put on real tissue is found, and how much of clean tissue is called bad.

python benchmarks/quality.py DATA

Writes Markdown. DATA has folders of real H&E regions, as `REGIONS` names them. Half of them are
those by which thresholds were chosen. How a slide looks is taken from the clean region, as if it
were part of a slide that is mostly clean; then the flawed region goes through a JPEG of quality
85, and is judged in cells, as a run does, at its own µm per pixel or twice that. What counts as
true: under a pen and in a bubble all, of the others what is tissue (an optical density above 0.05
in a cell).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from wsi_pipeline.run.quality import cell_side
from wsi_pipeline.sources import open_source
from wsi_pipeline.tissue.detect import find_tissue
from wsi_pipeline.tissue.quality import CELL, QUALITIES, Look, assess, look_of

Pixels = npt.NDArray[np.uint8]
Where = npt.NDArray[np.bool_]
Rows = dict[str, dict[str, str]]
NAMES = [quality.name for quality in QUALITIES]
REGIONS = {
    "1008": ("bcss/images/1008.jpg", 0.2365),
    "a0ye": ("bcss_a0ye/images/TCGA-A2-A0YE.png", 1.09),
    "CMU-1": ("wsi/svs/CMU-1-Small-Region.svs", 0.499),
    "brecahad 10011": ("he_other/brecahad/images/10011.jpg", 0.25),
    "brecahad 10013": ("he_other/brecahad/images/10013.jpg", 0.25),
    "1019 *": ("bcss/images/1019.jpg", 0.2489),
    "nbt *": ("he_other/normal_breast_nbt/images/nbt_normal.jpg", 0.25),
    "os1 *": ("he_other/os1/OS-1-detail.ome.tif", 0.2271),
    "brecahad 10012 *": ("he_other/brecahad/images/10012.jpg", 0.25),
    "brecahad 10014 *": ("he_other/brecahad/images/10014.jpg", 0.25),
}
"""Path and µm per pixel; by those with a star nothing was chosen."""
SETS = {
    "bcss_a0sk, 18 tiles *": ("bcss_a0sk/images/*.png", 0.5),
    "bcss_tiles, 3 *": ("bcss_tiles/images/*.png", 0.25),
    "colon, 22 tiles *": ("he_other/negatives_crc/images/*.png", 0.54),
    "lymph nodes, 30 patches *": ("he_other/negatives_pcam/images/*.png", 0.93),
}
"""Small pictures, of which only what is called bad is told."""
INKS = {
    "blue": (0.8, 0.45, 0.1),
    "green": (0.7, 0.25, 0.5),
    "black": (0.8, 0.8, 0.8),
    "red": (0.05, 0.65, 0.5),
}
"""Optical density in red, green and blue light of a stroke through which tissue is seen."""


def read(path: Path, mpp: float) -> Pixels:
    """Return the pixels of a file at µm per pixel."""
    if path.suffix in {".svs", ".tif"}:
        with open_source(path) as slide:
            view = slide.at(mpp)
            return np.asarray(view.read((0, 0), view.shape))
    return np.asarray(Image.open(path).convert("RGB"))


def look(pixels: Pixels, mpp: float) -> Look:
    """Return how a picture looks."""
    factor = max(1, round(8 / mpp))
    thumbnail = np.asarray(Image.fromarray(pixels).reduce(factor))
    return look_of(thumbnail, find_tissue(thumbnail, mpp * factor), cell_side(mpp))


def judged(pixels: Pixels, own: Look) -> npt.NDArray[np.uint8]:
    """Return the cells of a picture, as `run.quality` makes them."""
    rows, columns = (n // own.cell for n in pixels.shape[:2])
    box, size = (0, 0, columns * own.cell, rows * own.cell), (columns * CELL, rows * CELL)
    small = Image.fromarray(pixels).resize(size, Image.Resampling.BOX, box=box)
    return assess(np.asarray(small), own)


def in_cells(plane: npt.NDArray[np.generic], side: int) -> npt.NDArray[np.float64]:
    """Return the means of cells."""
    rows, columns = (n // side for n in plane.shape)
    whole = plane[: rows * side, : columns * side].astype(np.float64)
    return whole.reshape(rows, side, columns, side).mean(axis=(1, 3))


def soft(where: Where, um: float, mpp: float) -> npt.NDArray[np.float32]:
    """Return what lies inside, its border softened, (y, x, 1)."""
    return ndimage.gaussian_filter(where.astype(np.float32), um / mpp)[..., None]


def flaws(pixels: Pixels, mpp: float, own: Look) -> Iterator[tuple[str, str, Pixels, Where]]:
    """Yield what a flaw is called here and there, the flawed picture, and where it is so."""
    height, width = pixels.shape[:2]
    y, x = np.ogrid[:height, :width]
    glass = np.array(own.glass, np.float32)
    inside = ((y / height - 0.5) / 0.35) ** 2 + ((x / width - 0.5) / 0.35) ** 2 < 1
    for sigma in (1, 2, 3, 5, 10):
        planes = [ndimage.gaussian_filter(p.astype(np.float32), sigma / mpp) for p in pixels.T]
        blurry = np.stack(planes).T
        out = np.where(inside[..., None], blurry, pixels)
        yield f"blur, σ {sigma} µm", "out-of-focus", out, inside
    short = min(height, width) * mpp
    off = abs(x - width / 2 - 0.12 * width * np.sin(y * 6 / height)) * mpp
    stroke = off < min(75, short / 6)
    for strength, told in ((1, ""), (0.5, ", half as strong")):
        for name, ink in INKS.items():
            through = 10 ** (-strength * soft(stroke, 3, mpp) * np.array(ink))
            yield f"{name} ink{told}", "pen", pixels * through, stroke
    density = np.log10((glass + 1) / (pixels + 1.0)).clip(0)
    for um in (160, 80, 40):
        band = off < um / 2
        if um < short / 3:
            yield f"fold of {um} µm", "fold", pixels * 10 ** (-soft(band, 2, mpp) * density), band
    if short > 500:
        distance = np.hypot(y - height / 2, x - width / 2) * mpp
        bubble = np.where((distance < 120)[..., None], np.float32(0.9) * glass, pixels)
        bubble[abs(distance - 120) < 6] = 80
        yield "bubble of 240 µm", "bubble", bubble, distance < 120
    pool = 10 ** (-soft(inside, 3, mpp) * (np.array([0.03, 0.45, 0.4]) - density * (1, 1, 1)))
    yield "blood", "blood", pixels * pool, inside


def saved(pixels: npt.NDArray[np.generic]) -> Pixels:
    """Return pixels as scanners save them."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return np.asarray(Image.open(buffer))


def table(rows: Rows, columns: list[str], first: str) -> None:
    """Print rows as Markdown."""
    print(f"| {first} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells.get(c, '') for c in columns)} |")
    print()


def clean(found: list[npt.NDArray[np.uint8]]) -> dict[str, str]:
    """Return percents of cells by quality, and of all that are bad."""
    every = np.concatenate([f.ravel() for f in found])
    shares = {n: (every == i).mean() for i, n in enumerate(NAMES)} | {"all": (every > 0).mean()}
    told = {n: f"{100 * s:.1f}" if s else "0" for n, s in shares.items()}
    return {"cells": f"{every.size:,}", **told}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data: Path = parser.parse_args().data
    ratios: Rows = {}
    dices: Rows = {}
    bad: Rows = {}
    for region, (name, mpp) in REGIONS.items():
        pixels = read(data / name, mpp)
        if mpp < 0.4:
            pixels, mpp = np.asarray(Image.fromarray(pixels).reduce(2)), 2 * mpp
        own = look(pixels, mpp)
        bad[region] = clean([judged(pixels, own)])
        stain = np.log10((np.array(own.glass) + 1) / (pixels + 1.0)).clip(0).mean(axis=2)
        is_tissue = in_cells(stain, own.cell) > 0.05
        for flaw, called, flawed, where in flaws(pixels, mpp, own):
            share = in_cells(where, own.cell)
            truth = share if called in {"pen", "bubble"} else share * is_tissue
            found = judged(saved(flawed), own) == NAMES.index(called)
            ratios.setdefault(flaw, {})[region] = f"{found.sum() / truth.sum():.2f}"
            dice = 2 * (found * truth).sum() / (found.sum() + truth.sum())
            dices.setdefault(flaw, {})[region] = f"{dice:.2f}"
    for region, (pattern, mpp) in SETS.items():
        found = []
        for path in sorted(data.glob(pattern)):
            pixels = read(path, mpp)
            found.append(judged(pixels, look(pixels, mpp)))
        bad[region] = clean(found)
    for title, rows in (("Area found ÷ true area", ratios), ("Dice of cells", dices)):
        print(f"## {title}\n")
        table(rows, [*REGIONS], "")
    print("## Percent of cells called bad as the pictures are\n")
    table(bad, ["cells", "all", *NAMES[1:]], "")


if __name__ == "__main__":
    main()
