"""Where on a slide to look: the tissue on its thumbnail, and the patches over it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsi_pipeline.annotations import rasterise, read_region
from wsi_pipeline.errors import StoreError, raised_as
from wsi_pipeline.files.paths import name_of
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.options import MPP_TOLERANCE, SelectOptions
from wsi_pipeline.patch_grid import GridInfo, StoredGrid
from wsi_pipeline.sources.slide import Slide, frame_offset
from wsi_pipeline.tissue.detect import check_tissue, find_tissue, read_tissue, select_patches

logger = logging.getLogger(__name__)

THUMBNAIL_UM = 8.0
"""µm per pixel of the thumbnail on which tissue is looked for."""
COARSEST = 2.5
"""Times the model's µm per pixel up to which a slide is enlarged: cells are no longer seen then."""
THUMBNAIL_MIN, THUMBNAIL_MAX = 1024, 4096
"""Bounds of the thumbnail's longer side, in px."""


def why_too_coarse(mpp: tuple[float, float], wanted: float) -> str:
    """Return why a model cannot see on a slide what it was trained on, "" where it can.

    Finer slides are never too fine: they are reduced.

    Args:
        mpp: (x, y) µm per level-0 pixel of the slide.
    """
    times = max(mpp) / wanted
    # files round what they say
    if times <= COARSEST * 1.001:
        return ""
    return (
        f"{max(mpp):g} µm/px are {times:.3g} times as coarse as the model's {wanted:g} µm/px: what "
        "it looks for cannot be seen"
    )


def check_files(select: SelectOptions) -> None:
    """Read the files that say where to look: a bad one would fail every slide.

    Raises:
        AnnotationError: the tissue or ROI file cannot be read, or holds no area.
    """
    if select.roi is not None:
        read_region(select.roi)
    if isinstance(select.tissue, Path):
        check_tissue(select.tissue)


def plan_grid(
    slide: Slide,
    *,
    mpp: float,
    patch_size: tuple[int, int],
    overlap: tuple[int, int],
    select: SelectOptions,
) -> StoredGrid:
    """Lay patches over the tissue of a slide; return the patch grid, without pixels.

    Args:
        mpp: µm per grid pixel wanted; a nearly whole multiple of the slide's own is taken as whole.
        patch_size: (y, x) grid pixels.
        overlap: (y, x) grid pixels between neighbouring patches.

    Raises:
        SourceError: the slide cannot be read.
        AnnotationError: the tissue or ROI file cannot be used.
        StoreError: an overlap that is not below the patch size.
    """
    view = slide.at(mpp, tolerance=MPP_TOLERANCE)
    with raised_as(StoreError, ValueError):
        grid = PatchGrid.cover(view.shape, patch_size, overlap)
    # about 8 µm/px, and enough to look at
    extent_um = max(side * mpp for side, mpp in zip(slide.size, slide.mpp, strict=True))
    side = max(THUMBNAIL_MIN, min(int(extent_um / THUMBNAIL_UM), THUMBNAIL_MAX))
    # Never enlarged: of a small slide the thumbnail is the slide.
    thumbnail, downsample = slide.thumbnail(min(max(slide.size), side))
    tissue = _tissue(slide, thumbnail, downsample, select)
    keep = select_patches(tissue, downsample, grid, view.downsample)
    return StoredGrid(
        info=GridInfo(
            source_name=name_of(slide.path),
            fingerprint=slide.fingerprint,
            size=slide.size,
            mpp=slide.mpp,
            bounds=slide.bounds,
            grid_mpp=mpp,
            downsample=view.downsample,
            shape=view.shape,
            patch_size=patch_size,
            stride=(grid.stride[0], grid.stride[1]),
            doubts=slide.pixels.doubts,
        ),
        patches=grid.keep(keep).origins,
        tissue=tissue,
        thumbnail=thumbnail,
        tissue_downsample=downsample,
        pixels=None,
    )


def _tissue(
    slide: Slide,
    thumbnail: npt.NDArray[np.uint8],
    downsample: tuple[float, float],
    select: SelectOptions,
) -> npt.NDArray[np.bool_]:
    """Return where to look at thumbnail scale: tissue as asked for, within the ROI."""
    shape = thumbnail.shape[0], thumbnail.shape[1]
    offset = frame_offset(slide.bounds, select.frame)
    if isinstance(select.tissue, Path):
        tissue = read_tissue(select.tissue, slide.size, shape, downsample, offset=offset)
    elif select.tissue == "none":
        tissue = np.ones(shape, bool)
    else:
        tissue = find_tissue(thumbnail, downsample[1] * slide.mpp[0])
    if select.roi is not None:
        region = read_region(select.roi, offset=offset, size=slide.size)
        # a thin ROI may hold no pixel's centre
        tissue &= rasterise(region, shape, downsample=downsample, touched=True)
    if not tissue.any():
        where = " in the ROI" if select.roi else ""
        logger.warning(
            "%s: no tissue found%s; --tissue none looks everywhere", name_of(slide.path), where
        )
    return np.asarray(tissue)
