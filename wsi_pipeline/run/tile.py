"""A slide as a patch grid with its pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from wsi_pipeline.errors import StoreError
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import claimed, writing
from wsi_pipeline.geometry import Region, iter_blocks
from wsi_pipeline.options import MPP_TOLERANCE, SelectOptions
from wsi_pipeline.patch_grid import (
    GRID_FILES,
    PIXEL_CHUNK,
    StoredGrid,
    close_patch_grid,
    is_patch_grid,
    open_patch_grid,
    write_patch_grid,
)
from wsi_pipeline.sources import open_source
from wsi_pipeline.sources.icc import SrgbBackend
from wsi_pipeline.tissue.select import plan_grid

Progress = Callable[[int, int], None]
"""Called with blocks of pixels done and in all."""


def tile(
    path: str | Path,
    target: str | Path,
    *,
    mpp: float,
    patch_size: int,
    overlap: int,
    select: SelectOptions,
    progress: Progress | None = None,
) -> StoredGrid:
    """Write a slide as a zarr patch grid with its pixels, in bounded memory; return it opened.

    Stored tiles that cannot be read are white, and named in the grid.

    Args:
        target: folder of the grid, which appears whole or not at all.
        mpp: µm per grid pixel.
        patch_size: side of a patch in grid pixels.
        overlap: grid pixels between neighbouring patches.
        select: where to look.
        progress: told of blocks of pixels done.

    Raises:
        WsiPipelineError: the slide or the target cannot be used.
    """
    target = Path(target)
    _check_grid_goes(target, path)
    with open_source(path, mpp=select.mpp, series=select.series, icc=select.icc) as slide:
        stored = plan_grid(
            slide,
            mpp=mpp,
            patch_size=(patch_size, patch_size),
            overlap=(overlap, overlap),
            select=select,
        )
        if isinstance(slide.pixels, SrgbBackend):
            # Other pixels than the slide's, which a run tells apart by this alone.
            own = hashlib.sha256(f"{slide.fingerprint} in sRGB".encode()).hexdigest()
            stored = replace(stored, info=replace(stored.info, fingerprint=own))
        view = slide.at(mpp, tolerance=MPP_TOLERANCE)
        grid = stored.grid
        every = iter_blocks(grid.shape, (PIXEL_CHUNK, PIXEL_CHUNK))
        blocks = [b for b in every if len(grid.touching(b.start, b.stop))]
        with writing(target), claimed(target), written_beside(target) as partial:
            pixels = write_patch_grid(partial, stored, with_pixels=True).pixels
            assert pixels is not None
            bad: list[Region] = []
            for done, block in enumerate(blocks, start=1):
                y, x = block.start
                height, width = block.shape
                pixels[block.slices] = view.read((y, x), (height, width), bad=bad)
                if progress:
                    progress(done, len(blocks))
            close_patch_grid(partial, bad)
    return open_patch_grid(target)


def _check_grid_goes(target: Path, source: str | Path) -> None:
    """Refuse to replace what is no patch grid, what else lies in one, or the source itself.

    Raises:
        StoreError: it is one of these.
    """
    if not os.path.lexists(target):
        return
    # what cannot be looked at, such as a link that leads nowhere, is no file at all
    if all(map(os.path.exists, (target, source))) and target.samefile(source):
        raise StoreError(f"{target} is the slide itself; choose another --output")
    if not is_patch_grid(target):
        raise StoreError(f"{target} is there and no patch grid; choose another --output")
    if others := sorted({path.name for path in target.iterdir()} - GRID_FILES):
        raise StoreError(
            f"{target} holds {others[0]}, which no patch grid has; choose another --output"
        )
