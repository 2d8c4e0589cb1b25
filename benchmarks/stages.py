"""What stages of a run take alone: reading, writing the mask, its pyramid, the TIFF.

python benchmarks/stages.py out/slide --model models/lightmuseg-bcss-demo

Takes a finished run with a zarr mask and does each stage again, one after the other, with nothing
else going on. Predicting alone is the floor's forward pass, see floor.py; polygons and reading have
benchmarks of their own. The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from floor import grid_of, timed

from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.export.ome_tiff import write_ome_tiff
from wsi_pipeline.export.ome_zarr import (
    build_pyramid,
    create_mask,
    open_levels,
    open_mask,
    write_block,
)
from wsi_pipeline.geometry import iter_blocks
from wsi_pipeline.options import MPP_TOLERANCE
from wsi_pipeline.report.record import load_run
from wsi_pipeline.sources import open_source

BLOCK = 2048


def read_seconds(slide_path: Path, bundle: Bundle, *, tissue: str | Path, overlap: int) -> float:
    """Return how long it takes to read all that is under a patch, block by block."""
    with open_source(slide_path) as slide:
        grid = grid_of(slide, bundle, overlap=overlap, tissue=tissue)
        view = slide.at(bundle.input.mpp, tolerance=MPP_TOLERANCE)
        blocks = [
            block
            for block in iter_blocks(view.shape, (BLOCK, BLOCK))
            if len(grid.touching(block.start, block.stop))
        ]
        return timed(lambda: [view.read(block.start, block.shape) for block in blocks])


def mask_seconds(mask_path: Path, bundle: Bundle, mpp: tuple[float, float]) -> dict[str, float]:
    """Return how long level 0, the reduced levels and the TIFF of a mask take to write."""
    finished = open_mask(mask_path)
    blocks = list(iter_blocks(finished.shape, (BLOCK, BLOCK)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.ome.zarr"
        common = {"classes": bundle.classes, "mask_mpp": mpp, "name": "benchmark"}
        mask = create_mask(path, finished.shape, **common)
        write = 0.0
        for block in blocks:
            pixels: npt.NDArray[np.uint8] = np.asarray(finished[block.slices])
            write += timed(lambda b=block, p=pixels: write_block(mask, b, p))
        pyramid = timed(lambda: build_pyramid(path, bundle.classes))
        mask, *reduced = open_levels(path)
        tiff = timed(
            lambda: write_ome_tiff(Path(folder) / "mask.ome.tif", mask, reduced=reduced, **common)
        )
    return {"write": write, "pyramid": pyramid, "tiff": tiff}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the stages of a finished run alone.")
    parser.add_argument("run", type=Path, help="folder of one slide's finished run")
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    bundle = load_bundle(args.model)
    run = load_run(args.run / "run.json")
    select, overlap = run.settings["select"], run.settings["predict"]["overlap"]
    tissue = select["tissue"] if select["tissue"] in ("auto", "none") else Path(select["tissue"])
    read = read_seconds(
        Path(run.slide["path"]),
        bundle,
        tissue=tissue,
        overlap=bundle.input.overlap[0] if overlap is None else overlap,
    )
    x, y = run.slide["mpp"]
    alone = mask_seconds(args.run / "mask.ome.zarr", bundle, (y, x))
    print(json.dumps({"alone": {"read": read, **alone}}))


if __name__ == "__main__":
    main()
