"""Stored patch grids: a zarr group with the patches over a slide's tissue, with or without pixels.

`tile` writes one with pixels, every run keeps one without. The format is that of the docs'
`patch-grid.md`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zarr

from wsi_pipeline.errors import StoreError
from wsi_pipeline.files.arrays import read_whole, trusted
from wsi_pipeline.files.ngff import zarr_attributes
from wsi_pipeline.geometry import PatchGrid, Region

FORMAT = "wsi_pipeline/patch-grid"
VERSION = 1
PIXEL_CHUNK = 1024
"""Side of a chunk of stored pixels, in grid pixels."""
GRID_FILES = frozenset(["zarr.json", "patches", "tissue", "thumbnail", "pixels"])
"""What a patch grid's folder may hold."""


@dataclass(frozen=True, kw_only=True)
class GridInfo:
    """Geometry of a stored patch grid: how its pixels lie on the slide.

    Attributes:
        size: (width, height) of the slide at level 0.
        mpp: (x, y) µm per level-0 pixel.
        bounds: of the slide's content in level-0 pixels, where the file says.
        grid_mpp: µm per grid pixel that was asked for.
        downsample: (y, x) level-0 pixels per grid pixel, exact.
        shape: (y, x) grid pixels of the whole slide.
        patch_size: (y, x) grid pixels.
        stride: (y, x) grid pixels between origins.
        doubts: sentences on what makes the slide's picture doubtful.
    """

    source_name: str
    fingerprint: str
    size: tuple[int, int]
    mpp: tuple[float, float]
    bounds: Region | None
    grid_mpp: float
    downsample: tuple[float, float]
    shape: tuple[int, int]
    patch_size: tuple[int, int]
    stride: tuple[int, int]
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredGrid:
    """An opened patch grid.

    Attributes:
        patches: (n, 2) int64 origins (y, x) in grid pixels, row-major.
        tissue: bool (h, w) at thumbnail scale.
        thumbnail: uint8 (h, w, 3), of the same size as `tissue`.
        tissue_downsample: (y, x) level-0 pixels per pixel of both.
        pixels: zarr array uint8 (*shape, 3), white where no kept patch lies; None without.
        unreadable: parts of the slide that could not be read, in level-0 pixels; white in `pixels`.
    """

    info: GridInfo
    patches: npt.NDArray[np.int64]
    tissue: npt.NDArray[np.bool_]
    thumbnail: npt.NDArray[np.uint8]
    tissue_downsample: tuple[float, float]
    pixels: zarr.Array[Any] | None
    unreadable: tuple[Region, ...] = ()

    @property
    def grid(self) -> PatchGrid:
        """Return the patches as a grid."""
        info = self.info
        return PatchGrid(
            shape=info.shape, patch_size=info.patch_size, stride=info.stride, origins=self.patches
        )


def write_patch_grid(path: Path, stored: StoredGrid, *, with_pixels: bool) -> StoredGrid:
    """Create a patch grid on disk, its pixels still white; return it opened.

    Args:
        path: Folder to create; replaced where it exists.
        stored: What to write; its `pixels` are ignored.
    """
    group = zarr.open_group(path, mode="w")
    info = asdict(stored.info)
    group.attrs.update({"format": FORMAT, "version": VERSION, **info})
    group.create_array("patches", data=stored.patches)
    for name in ("tissue", "thumbnail"):
        array = group.create_array(name, data=getattr(stored, name))
        array.attrs["downsample"] = list(stored.tissue_downsample)
    if with_pixels:
        group.create_array(
            "pixels",
            shape=(*stored.info.shape, 3),
            chunks=(PIXEL_CHUNK, PIXEL_CHUNK, 3),
            dtype=np.uint8,
            fill_value=255,
        )
    return open_patch_grid(path, mode="r+")


def close_patch_grid(path: Path, unreadable: Iterable[Region] = ()) -> None:
    """Write down, in a patch grid, what is to be found in it; return nothing.

    Args:
        path: Folder of the grid, all of whose pixels are written.
        unreadable: Parts of the slide that could not be read, in level-0 pixels.
    """
    group = zarr.open_group(path, mode="r+")
    # sorted, as folders list them in any order
    chunks = {name: array.nchunks_initialized for name, array in sorted(group.arrays())}
    regions = [asdict(region) for region in unreadable]
    group.attrs.update({"chunks": chunks} | ({"unreadable": regions} if "pixels" in chunks else {}))


def is_patch_grid(path: Path) -> bool:
    """Return whether a folder looks like a patch grid, without reading it."""
    return (zarr_attributes(path) or {}).get("format") == FORMAT


def open_patch_grid(path: str | Path, *, mode: str = "r") -> StoredGrid:
    """Open a patch grid; return it with its pixels left on disk.

    Raises:
        StoreError: not a patch grid, a damaged one, or one of a newer version.
    """
    path = Path(path)
    if not is_patch_grid(path):
        raise StoreError(f"{path} is not a patch grid; expected a folder that `tile` wrote")
    try:
        group = zarr.open_group(path, mode=mode)  # type: ignore[arg-type]
        attrs: dict[str, Any] = dict(group.attrs)
        if attrs["version"] != VERSION:
            raise StoreError(
                f"{path} is a patch grid of version {attrs['version']}; this program reads "
                f"{VERSION}: write it again with `tile --overwrite`"
            )
        # Older grids do not say.
        for name, count in attrs.get("chunks", {}).items():
            array: Any = group[name]
            if (found := array.nchunks_initialized) != count:
                raise StoreError(
                    f"the patch grid {path} is not whole: {found} of {count} chunks of {name} are "
                    "there, as after a copy that was interrupted; copy or write it again"
                )
        tissue: Any = group["tissue"]
        pixels = group.get("pixels")
        y, x = tissue.attrs["downsample"]
        stored = StoredGrid(
            info=msgspec.convert(attrs, GridInfo),
            patches=read_whole(group["patches"], np.int64),
            tissue=read_whole(tissue, bool),
            thumbnail=read_whole(group["thumbnail"], np.uint8),
            tissue_downsample=(float(y), float(x)),
            pixels=None if pixels is None else trusted(pixels),
            unreadable=msgspec.convert(attrs.get("unreadable", ()), tuple[Region, ...]),
        )
        stored.grid  # noqa: B018  # looks at the order of the patches
        return stored
    except StoreError:
        raise
    except Exception as error:
        # Metadata may be anything, and codecs raise anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"the patch grid {path} is damaged ({reason}); write it again") from error
