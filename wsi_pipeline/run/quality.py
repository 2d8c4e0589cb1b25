"""The quality of a run's slide: judged by blocks, counted by classes, written as a layer.

A cell is a square of mask pixels whose side is a power of two, so that each is one block's alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import StoreError
from wsi_pipeline.export import ome_zarr
from wsi_pipeline.export.polygons.components import Labels, label
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import writing
from wsi_pipeline.geometry import Block, Shape, iter_blocks
from wsi_pipeline.report.record import FILES
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.tissue.quality import CELL, QUALITIES, assess

if TYPE_CHECKING:
    # It imports this module.
    from wsi_pipeline.run.result import SlideResult

Cells = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]
FLAWS = [quality.name for quality in QUALITIES[1:]]
AROUND = 4
"""Cells beside a block that its own are compared with."""


def _reach(plan: Plan, block: Block) -> tuple[Indices, Indices, npt.NDArray[np.float64]]:
    """Return the first cell to judge for a block, (y, x), one past the last, and grid px of one.

    They are those under its patches, whoever predicts them: what is found depends on nothing else.
    """
    side = plan.look.cell if plan.look else 1
    size, origins = np.array(plan.ratio) * side, plan.grid.origins[plan.patches(block)]
    ends = np.minimum((origins + np.array(plan.grid.patch_size)).max(axis=0), plan.grid.shape)
    low = np.ceil(origins.min(axis=0) / size), np.array(block.start) // side - AROUND
    high = np.floor(ends / size), -(-np.array(block.stop) // side) + AROUND
    first, last = np.maximum(*low).astype(int), np.minimum(*high).astype(int)
    return first, np.maximum(first, last), size


def judged_box(plan: Plan, block: Block) -> Indices:
    """Return the corners in grid pixels, (n, axes), of what a block is judged by; n is 2 or 0."""
    if plan.look is None or not len(plan.patches(block)):
        return np.zeros((0, len(plan.grid.shape)), np.int64)
    first, last, size = _reach(plan, block)
    return np.array([np.floor(first * size), np.ceil(last * size)], np.int64)


def judge(plan: Plan, block: Block, pixels: npt.NDArray[Any], corner: Indices) -> Cells:
    """Return what is wrong with each cell of a block, an index in `QUALITIES`; (0, 0) if not asked.

    Args:
        pixels: of at least `judged_box`.
        corner: their first grid pixel, (y, x).
    """
    if plan.look is None:
        return np.zeros((0, 0), np.uint8)
    start = np.array(block.start) // plan.look.cell
    found = np.zeros([-(-n // plan.look.cell) for n in block.shape], np.uint8)
    if not len(plan.patches(block)):
        return found
    first, last, size = _reach(plan, block)
    if not (first < last).all():
        return found
    (y0, x0), (y1, x1) = first * size - corner, last * size - corner
    height, width = pixels.shape[:2]
    box = (float(x0), float(y0), min(float(x1), width), min(float(y1), height))
    rows, columns = ((last - first) * CELL).tolist()
    picture = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BOX, box=box)
    judged = assess(np.asarray(picture), plan.look)
    if (size / CELL * np.minimum(plan.downsample, 1) < 0.95).any():
        # Pixels that are spread over several have no fine details, and tell nothing of focus.
        judged[judged == 1] = 0
    there = [
        slice(max(a, 0), max(a + n, 0)) for a, n in zip(start - first, found.shape, strict=True)
    ]
    part = judged[tuple(there)]
    y, x = np.maximum(first - start, 0)
    found[y : y + part.shape[0], x : x + part.shape[1]] = part
    return found


def spread(cells: Cells, side: int, shape: Shape) -> Cells:
    """Return the cell of each mask pixel, (y, x)."""
    return cells.repeat(side, axis=0).repeat(side, axis=1)[: shape[0], : shape[1]]


def leave_out(mask: Cells, cells: Cells, side: int, skip: Collection[str]) -> None:
    """Make background of a block's mask where its cells are to be skipped; return nothing."""
    values = [i for i, quality in enumerate(QUALITIES) if quality.name in skip]
    if (is_out := np.isin(cells, values)).any():
        mask[spread(is_out.view(np.uint8), side, mask.shape) > 0] = 0


def crossed(mask: Cells | Labels, cells: Cells, side: int, classes: int) -> Indices:
    """Return how many pixels there are of each class and quality, (classes, qualities).

    Those in good cells are not counted.
    """
    counts = np.zeros((classes, len(QUALITIES)), np.int64)
    if cells.any():
        every = spread(cells, side, mask.shape)
        for value in np.unique(cells[cells > 0]):
            counts[:, value] = np.bincount(mask[every == value], minlength=classes)
    return counts


def quality_areas(
    counts: Indices, classes: Sequence[ClassInfo], mm2: float
) -> dict[str, dict[str, float]]:
    """Return mm² by class and quality, without those that are not there.

    Args:
        mm2: of a mask pixel.
    """
    found = {
        c.name: {q.name: float(n * mm2) for q, n in zip(QUALITIES, row, strict=True) if n}
        for c, row in zip(classes, counts, strict=False)
    }
    return {name: areas for name, areas in found.items() if areas}


def write_quality(result: SlideResult) -> None:
    """Write the cells of all blocks as a label image, OME-Zarr in the mask's frame; return nothing.

    Raises:
        StoreError: the run has not judged them.
    """
    mask_mpp, target = result.features.mask_mpp, result.folder / FILES["quality"]
    side = cell_side(mask_mpp[0])
    cells = np.zeros([-(-n // side) for n in result.mask.shape], np.uint8)
    for index, arrays in result.judged.items():
        if "quality" not in arrays:
            raise StoreError("the run has not judged it; segment again with --quality")
        part, (y, x) = arrays["quality"], (n * result.side // side for n in index)
        cells[y : y + part.shape[0], x : x + part.shape[1]] = part
    with writing(target), written_beside(target) as folder:
        array = ome_zarr.create_mask(
            folder,
            cells.shape,
            classes=QUALITIES,
            mask_mpp=(mask_mpp[0] * side, mask_mpp[1] * side),
            ngff=result.options.ngff,
            name="quality",
        )
        for block in iter_blocks(cells.shape, array.shards or array.chunks):
            ome_zarr.write_block(array, block, cells[block.slices])
        ome_zarr.build_pyramid(folder, QUALITIES)


class Judged:
    """The cells that a run has written, by the blocks of its mask.

    Args:
        folder: of the run; `mask` is its OME-Zarr, where that is not in it yet.

    Raises:
        StoreError: they are lost or damaged.
    """

    def __init__(self, folder: Path, mask: Path | None = None) -> None:
        (cells, *_), (size, _) = ome_zarr.open_finished(folder / FILES["quality"])
        self.side = round(size / ome_zarr.open_finished(mask or folder / FILES["zarr"])[1][0])
        self._cells = np.asarray(cells[:])

    def of(self, block: Block) -> Cells:
        """Return the cells of a block."""
        ends = zip(block.start, block.stop, strict=True)
        y, x = (slice(a // self.side, -(-b // self.side)) for a, b in ends)
        return self._cells[y, x]


def with_flaws(result: SlideResult, outlines: Outlines) -> Outlines:
    """Return outlines whose regions tell which share of them is in each bad quality."""
    judged = Judged(result.folder, result.mask_path)
    regions, found = outlines.regions, np.zeros((len(outlines.regions) + 1, len(QUALITIES)), int)
    for block in result.blocks:
        cells = judged.of(block)
        if block.index in regions.numbers and cells.any():
            labels, n = label(np.asarray(result.mask[block.slices]))
            counts = crossed(labels, cells, judged.side, n + 1)
            np.add.at(found, regions.numbers[block.index], counts)
    regions = replace(regions, flaws=found[1:, 1:] / regions.pixels[:, None])
    return replace(outlines, regions=regions)


def cell_side(mask_mpp: float) -> int:
    """Return mask pixels along a side of a cell: a power of two, that whole blocks are made of.

    Example:
        >>> cell_side(0.25), cell_side(0.499), cell_side(3)
        (64, 32, 4)
    """
    return int(2 ** min(max(round(math.log2(16 / mask_mpp)), 0), 10))
