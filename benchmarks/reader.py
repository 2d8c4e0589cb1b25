"""How near reading a slide comes to decoding its tiles, and how far ahead of OpenSlide it is.

python benchmarks/reader.py --size 16384 --rounds 5

Makes a JPEG slide of real tissue, Aperio's way, and reads those 2,048-px blocks of it that are all
tissue in three ways: `raw` decodes their tiles, and does nothing else; `ours` is `SlideView.read`
at the slide's own resolution; `openslide` is `read_region`. The three take turns in every round;
the table holds medians, of the ratios too. Linux only: the process is bound to as many processors
as threads.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import tifffile
from make_slide import write_big_slide

from wsi_pipeline.sources import open_source

BLOCK = 2048
TILE = 256
MPP = 0.25

Corner = tuple[int, int]
Tiles = list[tuple[int, int]]
"""Offset and byte count of each."""


def tissue_blocks(path: Path) -> dict[Corner, Tiles]:
    """Return the blocks in which every tile is tissue, by their (x, y), with their tiles."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        assert page.jpegtables is None  # else `raw` would have to pass them on
        shape = (page.imagelength // TILE, page.imagewidth // TILE)
        extents = np.stack([page.dataoffsets, page.databytecounts], axis=-1).reshape(*shape, 2)
    glass = extents[..., 1].min()
    n = BLOCK // TILE
    blocks = {
        (x * TILE, y * TILE): extents[y : y + n, x : x + n]
        for y in range(0, shape[0], n)
        for x in range(0, shape[1], n)
    }
    return {
        corner: [(int(offset), int(count)) for offset, count in tiles.reshape(-1, 2)]
        for corner, tiles in blocks.items()
        if tiles[..., 1].min() > 2 * glass
    }


def make_raw(path: Path, blocks: dict[Corner, Tiles], threads: int) -> Callable[[], None]:
    """Return what decodes the tiles of the blocks, into one buffer a thread."""
    file_number = os.open(path, os.O_RDONLY)
    tiles = list(itertools.chain.from_iterable(blocks.values()))

    def decode(share: Tiles) -> None:
        memory = np.empty(TILE * TILE * 3 + 32, np.uint8)
        start = (8 - memory.ctypes.data) % 16  # unaligned: libjpeg-turbo is a quarter faster
        buffer = memory[start : start + TILE * TILE * 3].reshape(TILE, TILE, 3)
        for offset, count in share:
            imagecodecs.jpeg_decode(os.pread(file_number, count, offset), out=buffer)

    shares = [tiles[first::threads] for first in range(threads)]
    return lambda: on_threads(threads, decode, shares)


def make_ours(path: Path, blocks: dict[Corner, Tiles], threads: int) -> Callable[[], None]:
    """Return what reads the blocks one after the other; the reader has threads of its own."""
    view = open_source(path).at(MPP)

    def read() -> None:
        for x, y in blocks:
            view.read((y, x), (BLOCK, BLOCK))

    return read


def make_openslide(path: Path, blocks: dict[Corner, Tiles], threads: int) -> Callable[[], None]:
    """Return what reads the blocks with OpenSlide, one handle for all threads."""
    slide = openslide.OpenSlide(path)

    def read(share: list[Corner]) -> None:
        for corner in share:
            slide.read_region(corner, 0, (BLOCK, BLOCK))

    shares = [list(blocks)[first::threads] for first in range(threads)]
    return lambda: on_threads(threads, read, shares)


def on_threads(threads: int, work: Callable[[Any], None], shares: list[Any]) -> None:
    """Do one share on each thread."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, shares))


WAYS = {"raw": make_raw, "ours": make_ours, "openslide": make_openslide}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the reader against its limits.")
    parser.add_argument("--size", type=int, default=16384, help="side of the slide, px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = write_big_slide(Path(folder) / "big.svs", (args.size, args.size), MPP)
        blocks = tissue_blocks(path)
        megapixels = len(blocks) * BLOCK**2 / 1e6
        print(f"{args.size}² px; {len(blocks)} blocks of {BLOCK}², {megapixels:.0f} MP, all tissue")
        print("threads   raw MP/s  ours MP/s  openslide MP/s  ours/raw  ours/openslide")
        for threads in args.threads:
            os.sched_setaffinity(0, cpus[:threads])
            ways = {name: make(path, blocks, threads) for name, make in WAYS.items()}
            speed: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(args.rounds + 1):
                for name, way in ways.items():
                    begun = time.perf_counter()
                    way()
                    if turn:  # the first warms up
                        speed[name].append(megapixels / (time.perf_counter() - begun))
            raw, ours, other = (np.array(speed[name]) for name in WAYS)
            print(
                f"{threads:<9} {np.median(raw):8.0f}  {np.median(ours):9.0f}"
                f"  {np.median(other):14.0f}  {np.median(ours / raw):8.2f}"
                f"  {np.median(ours / other):14.1f}"
            )


if __name__ == "__main__":
    main()
