"""What polygons of a busy mask take: time, with GDAL's in the same rounds, memory, exactness.

python benchmarks/polygons.py
python benchmarks/polygons.py --size 40960 32768

Makes a mask of five classes out of smooth noise, some 15,000 regions and 2.7 million vertices in
8,192² px, and repeats that where more is asked for; it lies on disk as OME-Zarr, and is never in
memory as a whole. Then, in turns, each in a process of its own: `exact` finds regions and builds
their polygons; `simplified` does the same with the default simplification, and writes GeoJSON as a
run does; `gdal` is `rasterio.features.shapes` on the mask in memory, up to 8,192² px. The table
holds medians; seconds are those of the stages, without imports, and with reading the mask.
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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import Measured, measure
from rasterio.features import rasterize, shapes
from scipy.ndimage import gaussian_filter
from shapely import get_num_coordinates, get_num_interior_rings, is_valid

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.geojson import FeatureOptions, write_geojson
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

    COARSE, FINE = 8, 2048

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._coarse = self._fields(PERIOD // self.COARSE, 3.0)
        self._fine = 0.05 * self._fields(self.FINE, 3.0)

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
            height = self._fine[value][fine] + _interpolated(field, *lines, self.COARSE)
            if best is None:
                best, classes = height, np.zeros(height.shape, np.uint8)
                continue
            classes[height > best] = value
            np.maximum(best, height, out=best)
        return classes


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


def make_mask(path: Path, shape: tuple[int, int]) -> None:
    """Write the mask."""
    noise = Noise()
    mask = create_mask(path, shape, classes=CLASSES, mask_mpp=MPP, name="noise")

    def write(block: Block) -> None:
        write_block(mask, block, noise.block(block))

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


def trace(path: Path) -> dict[tuple[int, ...], BlockComponents]:
    """Find the components of regions as the blocks of a run do, in threads."""
    mask = open_mask(path)
    probability = np.full((BLOCK, BLOCK), PROBABILITY_ONE, np.uint16)

    def find(block: Block) -> tuple[tuple[int, ...], BlockComponents]:
        height, width = block.shape
        pixels = np.asarray(mask[block.slices])
        return block.index, find_components(pixels, probability[:height, :width], block.start)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(find, iter_blocks(mask.shape, (BLOCK, BLOCK))))


def exact(path: Path, folder: Path) -> dict[str, Any]:
    """Build the exact polygons, batch by batch; nothing is kept of one that is done."""
    laps = Laps()
    components = trace(path)
    laps("trace")
    outlines = find_outlines(open_mask(path), components, block_size=BLOCK)
    laps("join")
    counts = map_polygons(outlines, lambda _, shapes: int(get_num_coordinates(shapes).sum()))
    vertices = sum(counts)
    laps("polygons")
    return {"seconds": laps.seconds, "regions": len(outlines.regions), "vertices": vertices}


def simplified(path: Path, folder: Path) -> dict[str, Any]:
    """Simplify as a run does by default, and write GeoJSON."""
    options = ExportOptions()
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
    components = trace(path)
    laps("trace")
    outlines = find_outlines(
        open_mask(path),
        components,
        block_size=BLOCK,
        tolerance=features.tolerance,
        min_pixels=features.min_pixels,
    )
    laps("join, simplify")
    written = write_geojson(folder / "polygons.geojson", folder / "regions.csv", outlines, features)
    laps("polygons, GeoJSON")
    return {"seconds": laps.seconds, "regions": len(outlines.regions), "vertices": written.vertices}


def gdal(path: Path, folder: Path) -> dict[str, Any]:
    """Let GDAL find the polygons, and rasterio hand them out."""
    mask = np.asarray(open_mask(path)[:])
    laps = Laps()
    found = list(shapes(mask, mask=mask > 0, connectivity=4))
    laps("polygons")
    vertices = sum(len(ring) for shape, _ in found for ring in shape["coordinates"])
    return {"seconds": laps.seconds, "regions": len(found), "vertices": vertices}


def check(path: Path, folder: Path) -> dict[str, Any]:
    """Burn the exact polygons back, and compare with the mask; count holes as GDAL has them."""
    mask = np.asarray(open_mask(path)[:])
    outlines = find_outlines(mask, trace(path), block_size=BLOCK)
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", nargs=2, metavar=("NAME", "MASK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.job:
            print(json.dumps(JOBS[args.job[0]](Path(args.job[1]), Path(folder))))
            return
        path = Path(folder) / "mask.ome.zarr"
        make_mask(path, (args.size[1], args.size[0]))
        print(f"{args.size[0]} × {args.size[1]} px on {os.cpu_count()} cores", flush=True)
        names = ["exact", "simplified"]
        if args.size[0] * args.size[1] <= SMALL:
            names.append("gdal")
            print(f"exact polygons: {run('check', path).said}", flush=True)
        rounds = [{name: run(name, path) for name in names} for _ in range(args.rounds)]
        for line in table(names, rounds):
            print(line)


def run(job: str, path: Path) -> Measured:
    """Run one job in a process of its own."""
    command = [sys.executable, __file__, "--job", job, str(path)]
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
