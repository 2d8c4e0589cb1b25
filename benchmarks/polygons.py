"""What polygons of a busy mask take: time, with GDAL's in the same rounds, memory, exactness.

python benchmarks/polygons.py
python benchmarks/polygons.py --size 40960 32768
python benchmarks/polygons.py --mask cells --threads 1

Makes a mask of five classes, and repeats that where more than 8,192² px are asked for; it lies on
disk as OME-Zarr, and is never in memory as a whole. `busy` is smooth noise with finer noise, some
15,000 regions and 2.7 million vertices; `smooth` some 1,000 regions of smoother noise; `cells` some
140,000 round ones, of which none is left out, and which are simplified by a pixel. Then, in turns,
each in a process of its own: `exact` finds regions and builds their polygons; `simplified` does the
same with the default simplification, and writes GeoJSON as a run does; `gdal` is
`rasterio.features.shapes` on the mask in memory, up to 8,192² px. The table holds medians; seconds
are those of the stages, without imports, and with reading the mask.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import Measured, measure
from rasterio.features import rasterize, shapes
from scipy.ndimage import gaussian_filter
from shapely import get_num_coordinates, get_num_interior_rings, is_valid

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.features import FeatureOptions
from wsi_pipeline.export.geojson import write_geojson
from wsi_pipeline.export.ome_zarr import create_mask, open_mask, write_block
from wsi_pipeline.export.polygons.build import map_polygons, polygons
from wsi_pipeline.export.polygons.components import (
    PROBABILITY_ONE,
    BlockComponents,
    find_components,
)
from wsi_pipeline.export.polygons.trace import find_outlines
from wsi_pipeline.geometry import Block, iter_blocks
from wsi_pipeline.options import ExportOptions

CLASSES = (ClassInfo(name="Background"), *(ClassInfo(name=name) for name in "ABCD"))
PERIOD = 8192
BLOCK = 2048
MPP = (0.25, 0.25)
SMALL = PERIOD**2
"""Pixels up to which GDAL is asked too."""


class Noise:
    """Five classes: the highest of five fields of coarse noise with a little fine noise.

    Both are periodic, so that blocks of a mask of any size are made one by one.
    """

    FINE = 2048

    def __init__(self, step: int, fine: float) -> None:
        self._rng, self._step = np.random.default_rng(0), step
        self._coarse = self._fields(PERIOD // step, 3.0)
        self._fine = fine * self._fields(self.FINE, 3.0)

    def _fields(self, side: int, sigma: float) -> npt.NDArray[np.float32]:
        noise = self._rng.standard_normal((len(CLASSES), side, side), dtype=np.float32)
        fields = gaussian_filter(noise, (0, sigma, sigma), mode="wrap")
        return np.asarray(fields / fields.std())

    def block(self, block: Block) -> npt.NDArray[np.uint8]:
        """Return the classes of one block."""
        lines = [np.arange(a, b) for a, b in zip(block.start, block.stop, strict=True)]
        fine = np.ix_(*(line % self.FINE for line in lines))
        best = classes = None
        for value, field in enumerate(self._coarse):
            height = self._fine[value][fine] + _interpolated(field, *lines, self._step)
            if best is None:
                best, classes = height, np.zeros(height.shape, np.uint8)
                continue
            classes[height > best] = value
            np.maximum(best, height, out=best)
        return classes


class Cells:
    """Round cells of four classes that are no circles, one in each square of a periodic lattice."""

    SIDE, MANY = 21, PERIOD // 21

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shape = self.MANY, self.MANY
        self._centre = rng.uniform(9, 12, (2, *shape))
        self._radius, self._share = rng.uniform(6, 10.5, shape), rng.normal(0, 0.12, (2, *shape))
        self._value = rng.integers(1, len(CLASSES), shape, np.uint8) * (rng.random(shape) > 0.04)

    def block(self, block: Block) -> npt.NDArray[np.uint8]:
        """Return the classes of one block."""
        lines = [np.arange(a, b) for a, b in zip(block.start, block.stop, strict=True)]
        at = np.ix_(*(line // self.SIDE % self.MANY for line in lines))
        y, x = np.ix_(*(line % self.SIDE for line in lines))
        y, x = y - self._centre[0][at], x - self._centre[1][at]
        angle = np.arctan2(y, x)
        waves = sum(share[at] * np.cos(n * angle) for n, share in enumerate(self._share, 2))
        return (self._value[at] * (np.hypot(y, x) < self._radius[at] * (1 + waves))).astype(
            np.uint8
        )


MASKS = {"smooth": lambda: Noise(32, 0.01), "busy": lambda: Noise(8, 0.05), "cells": Cells}


def _interpolated(
    field: npt.NDArray[np.float32], y: npt.NDArray[Any], x: npt.NDArray[Any], step: int
) -> npt.NDArray[np.float32]:
    """Return a periodic field between its samples, bilinearly."""
    for axis, line in enumerate((y, x)):
        first, part = np.divmod(line, step)
        low, high = (field.take((first + more) % field.shape[axis], axis=axis) for more in (0, 1))
        weight = np.expand_dims((part / step).astype(np.float32), 1 - axis)
        field = low + weight * (high - low)
    return field


def make_mask(path: Path, shape: tuple[int, int], kind: str) -> None:
    """Write the mask."""
    made = MASKS[kind]()
    mask = create_mask(path, shape, classes=CLASSES, mask_mpp=MPP, name=kind)

    def write(block: Block) -> None:
        write_block(mask, block, made.block(block))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, iter_blocks(shape, (BLOCK, BLOCK))))


class Laps:
    """Seconds of the stages, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        last, self._last = self._last, time.perf_counter()
        self.seconds[stage] = self._last - last


def trace(path: Path, threads: int | None) -> dict[tuple[int, ...], BlockComponents]:
    """Find the components of regions as the blocks of a run do, in threads."""
    mask = open_mask(path)
    probability = np.full((BLOCK, BLOCK), PROBABILITY_ONE, np.uint16)

    def find(block: Block) -> tuple[tuple[int, ...], BlockComponents]:
        height, width = block.shape
        pixels = np.asarray(mask[block.slices])
        return block.index, find_components(pixels, probability[:height, :width], block.start)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return dict(pool.map(find, iter_blocks(mask.shape, (BLOCK, BLOCK))))


def exact(path: Path, folder: Path, threads: int | None) -> dict[str, Any]:
    """Build the exact polygons, batch by batch; nothing is kept of one that is done."""
    laps = Laps()
    components = trace(path, threads)
    laps("trace")
    outlines = find_outlines(open_mask(path), components, block_size=BLOCK, threads=threads)
    laps("join")
    vertices = sum(
        map_polygons(
            outlines, lambda _, shapes: int(get_num_coordinates(shapes).sum()), threads=threads
        )
    )
    laps("polygons")
    return {"seconds": laps.seconds, "regions": len(outlines.regions), "vertices": vertices}


def simplified(path: Path, folder: Path, threads: int | None) -> dict[str, Any]:
    """Simplify as a run does by default, and write GeoJSON."""
    options = ExportOptions()
    if path.name == "cells":
        options = replace(options, simplify_um=MPP[0], min_area_um2=0)
    features = FeatureOptions(
        classes=CLASSES,
        downsample=(1.0, 1.0),
        mpp=MPP,
        crop=None,
        simplify_um=options.simplify_um,
        min_area_um2=options.min_area_um2,
        namespace="benchmark",
    )
    laps = Laps()
    components = trace(path, threads)
    laps("trace")
    outlines = find_outlines(
        open_mask(path),
        components,
        block_size=BLOCK,
        tolerance=features.tolerance,
        min_pixels=features.min_pixels,
        threads=threads,
    )
    laps("join, simplify")
    paths = folder / "polygons.geojson", folder / "regions.csv"
    written = write_geojson(*paths, outlines, features, threads=threads)
    laps("polygons, GeoJSON")
    return {"seconds": laps.seconds, "regions": len(outlines.regions), "vertices": written.vertices}


def gdal(path: Path, folder: Path, threads: int | None) -> dict[str, Any]:
    """Let GDAL find the polygons, and rasterio hand them out."""
    mask = np.asarray(open_mask(path)[:])
    laps = Laps()
    found = list(shapes(mask, mask=mask > 0, connectivity=4))
    laps("polygons")
    vertices = sum(len(ring) for shape, _ in found for ring in shape["coordinates"])
    return {"seconds": laps.seconds, "regions": len(found), "vertices": vertices}


def check(path: Path, folder: Path, threads: int | None) -> dict[str, Any]:
    """Burn the exact polygons back, and compare with the mask; count holes as GDAL has them."""
    mask = np.asarray(open_mask(path)[:])
    outlines = find_outlines(mask, trace(path, threads), block_size=BLOCK)
    ours = polygons(outlines)
    burnt = rasterize(
        zip(ours, outlines.regions.value.tolist(), strict=True),
        out_shape=mask.shape,
        dtype=np.uint8,
    )
    theirs = [len(s["coordinates"]) - 1 for s, _ in shapes(mask, mask=mask > 0, connectivity=4)]
    return {
        "pixels that differ": int((burnt != mask).sum()),
        "holes": [int(get_num_interior_rings(ours).sum()), sum(theirs)],
        "valid": bool(is_valid(ours).all()),
    }


JOBS = {"exact": exact, "simplified": simplified, "gdal": gdal, "check": check}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure polygons of a busy mask.")
    parser.add_argument("--size", type=int, nargs=2, default=(PERIOD, PERIOD), help="(w, h), px")
    parser.add_argument("--mask", choices=MASKS, default="busy")
    parser.add_argument("--threads", type=int, help="as many as cores if left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", nargs=2, metavar=("NAME", "MASK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.job:
            print(json.dumps(JOBS[args.job[0]](Path(args.job[1]), Path(folder), args.threads)))
            return
        path = Path(folder) / args.mask
        make_mask(path, (args.size[1], args.size[0]), args.mask)
        print(f"{args.size[0]} × {args.size[1]} px on {os.cpu_count()} cores", flush=True)
        names = ["exact", "simplified"]
        if args.size[0] * args.size[1] <= SMALL:
            names.append("gdal")
            print(f"exact polygons: {run('check', path, args.threads).said}", flush=True)
        rounds = [
            {name: run(name, path, args.threads) for name in names} for _ in range(args.rounds)
        ]
        for line in table(names, rounds):
            print(line)


def run(job: str, path: Path, threads: int | None) -> Measured:
    """Run one job in a process of its own."""
    command = [sys.executable, __file__, "--job", job, str(path)]
    command += ["--threads", str(threads)] if threads else []
    return measure(command, path.with_name("log"))


def table(names: list[str], rounds: list[dict[str, Measured]]) -> Iterator[str]:
    """Yield the lines of the results, medians over the rounds."""
    median = statistics.median
    for name in names:
        said = [measured[name].said for measured in rounds]
        stages = {s: median(each["seconds"][s] for each in said) for s in said[0]["seconds"]}
        total = [sum(each["seconds"].values()) for each in said]
        of_stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
        yield (
            f"{name:<11} {median(total):6.2f} s ({of_stages}); "
            f"processor {median(m[name].cpu_seconds for m in rounds):.2f} s with imports; "
            f"peak {median(m[name].peak_gb for m in rounds):.2f} GB; "
            f"{said[0]['regions']:,} regions, {said[0]['vertices']:,} vertices"
        )
    if "gdal" in names:
        for name in names[:-1]:
            ratios = [
                sum(measured["gdal"].said["seconds"].values())
                / sum(measured[name].said["seconds"].values())
                for measured in rounds
            ]
            yield f"gdal / {name}: {median(ratios):.1f} ({min(ratios):.1f} – {max(ratios):.1f})"


if __name__ == "__main__":
    main()
