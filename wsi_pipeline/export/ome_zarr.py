"""The mask as OME-Zarr: a multiscale image of class indices, NGFF 0.4 (zarr 2) or 0.5 (zarr 3).

Once it is finished its pixels are there twice by name, and once on the disk where the file system
has hard links: as the image `0`, `1` … and as the labels `labels/classes/0` … with the classes'
names and colours. Readers look for labels there and nowhere else: napari-ome-zarr takes a root
that is a label for one of an image two folders up, and makes a zarr group of that folder. QuPath
sees the image alone.

https://ngff.openmicroscopy.org
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import StoreError
from wsi_pipeline.export import level_shapes
from wsi_pipeline.files.arrays import chunk_files, trusted, write_chunk
from wsi_pipeline.files.atomic import sync_all
from wsi_pipeline.files.ngff import MASK, first_scale, ome_of
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Block, Shape, box_slices, iter_blocks
from wsi_pipeline.options import Ngff

CHUNK = 1024
"""Side of a chunk: small enough to read a view, large enough to keep the number of files low."""
CUBOID = (16, 256, 256)
"""Of a volume, as many pixels."""
SHARD = 4096
"""Side of a shard of NGFF 0.5: 16 chunks in one file, written by one writer at a time."""
BLOCK = 2048
"""Side of a block where nothing else is asked for: larger ones take memory and save no time."""
AXES = ("y", "x")
LABELS = "labels/classes"
"""Where in the OME-Zarr the mask is a label image."""
CONFIG: Any = {"write_empty_chunks": True}
"""Not to look for empty chunks: zarr's look takes several times as long as compressing them."""

MaskArray: TypeAlias = "zarr.Array[Any]"
Mask = npt.NDArray[np.uint8]


def block_side(wanted: int | None, ngff: Ngff) -> int:
    """Return the side of a block in px: whole chunks of the mask, or whole shards.

    Raises:
        StoreError: the side that is wanted is no multiple of those.
    """
    unit = SHARD if ngff == "0.5" else CHUNK
    side = wanted or max(unit, BLOCK)
    if side % unit:
        raise StoreError(f"--block-size {side} is not a multiple of {unit}, the mask's chunk")
    return side


def create_mask(
    path: Path,
    shape: Shape,
    *,
    classes: Sequence[ClassInfo],
    mask_mpp: tuple[float, float],
    ngff: Ngff = "0.4",
    name: str,
) -> MaskArray:
    """Create an OME-Zarr mask that is all background; return its level 0, uint8 (y, x).

    Blocks of it are written with `write_block`.

    Args:
        path: Folder to create; must not hold a zarr group yet.
        shape: Shape (y, x) of level 0.
        classes: Classes in the mask's order; 0 is the background.
        mask_mpp: Size (y, x) of a mask pixel in µm.
        name: Name of the image, as viewers show it.
    """
    group = zarr.open_group(path, mode="w-", zarr_format=2 if ngff == "0.4" else 3)
    multiscale = {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "micrometer"} for axis in AXES],
        "datasets": datasets([float(mpp) for mpp in mask_mpp], 1),
        "type": "nearest",
    }
    _describe(group, multiscale, classes)
    return create_level(group, 0, shape)


def open_mask(path: Path, *, level: int = 0, mode: Literal["r", "r+"] = "r+") -> MaskArray:
    """Open one level of an OME-Zarr mask, also to write; return it, uint8 (y, x).

    Raises:
        ValueError: it is no such array; the folder may be anybody's.
    """
    return trusted(zarr.open_array(path / str(level), mode=mode, config=CONFIG))


def open_begun(path: Path) -> MaskArray | None:
    """Open the mask that an interrupted run has begun; return its level 0, None unless it is sound.

    Its chunks are not looked at.
    """
    try:
        first_scale(zarr.open_group(path, mode="r").attrs.asdict())
        return open_mask(path)
    # what is damaged may be anything
    except Exception:
        return None


def write_block(mask: MaskArray, block: Block, pixels: Mask) -> None:
    """Write the pixels of a block; chunks (shards with 0.5) that are all background are not stored.

    Args:
        block: Made of whole chunks or shards, and written by nobody else at the same time.
        pixels: Class indices, of the block's shape.
    """
    parts = iter_blocks(block.shape, mask.shards or mask.chunks)
    for part, file in zip(parts, chunk_files(mask, block), strict=True):
        values = pixels[part.slices]
        if not values.any():
            file.unlink(missing_ok=True)
        elif mask.metadata.zarr_format == 2:
            write_chunk(mask, file, values)
        else:
            start = (a + b for a, b in zip(block.start, part.start, strict=True))
            mask[box_slices(tuple(start), values.shape)] = values


def open_levels(path: Path) -> list[MaskArray]:
    """Open all levels of a finished OME-Zarr mask to read; return them, the whole one first.

    Raises:
        ValueError: they are no such arrays.
    """
    shapes = level_shapes(open_mask(path, mode="r").shape)
    levels = [open_mask(path, level=i, mode="r") for i in range(len(shapes))]
    if (found := [level.shape for level in levels]) != shapes:
        raise ValueError(f"levels of {found}; expected {shapes}")
    return levels


def open_finished(path: Path) -> tuple[list[MaskArray], tuple[float, float]]:
    """Open a mask of which nothing else is known; return its levels, and (y, x) µm per pixel.

    Raises:
        StoreError: it is damaged.
    """
    try:
        y, x = first_scale(zarr.open_group(path, mode="r").attrs.asdict())
        return open_levels(path), (y, x)
    except (OSError, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise StoreError(f"{path} is damaged ({error}); segment the slide again") from error


def read_mask(path: Path, shape: Shape) -> Mask:
    """Sample a finished mask, nearest, at a small shape; return it, uint8 (y, x).

    Reads the smallest level that is not smaller than `shape`, never more.

    Args:
        shape: Shape (y, x) of the picture wanted, such as a thumbnail's.
    """
    levels = open_levels(path)
    fitting = [i for i, level in enumerate(levels) if all(map(int.__ge__, level.shape, shape))]
    small = np.asarray(levels[max(fitting, default=0)][:])
    rows, columns = (
        (np.arange(n) * 2 + 1) * size // (2 * n) for n, size in zip(shape, small.shape, strict=True)
    )
    return small[np.ix_(rows, columns)]


def count_files(shape: Shape, ngff: Ngff) -> int:
    """Return the largest number of names that a mask of this shape can have, pyramid included.

    Half of them are hard links where the file system has those.

    Example:
        >>> count_files((100_000, 100_000), "0.4"), count_files((100_000, 100_000), "0.5")
        (25776, 1751)
    """
    unit = CUBOID if len(shape) > 2 else (CHUNK if ngff == "0.4" else SHARD,) * 2
    shapes = level_shapes(shape)
    chunks = sum(math.prod(-(-n // m) for n, m in zip(s, unit, strict=True)) for s in shapes)
    # .zgroup or .zarray with .zattrs; zarr.json
    metadata_files = 2 if ngff == "0.4" else 1
    # three groups: the image, its labels, and the one label
    return 2 * (chunks + metadata_files * len(shapes)) + metadata_files * 3


def is_empty(mask: MaskArray, block: Block) -> bool:
    """Say, without reading pixels, whether a block has no stored chunk, so is all background."""
    return not any(file.exists() for file in chunk_files(mask, block))


def build_pyramid(path: Path, classes: Sequence[ClassInfo]) -> None:
    """Add the reduced levels to a written mask, its labels, and the metadata that lists them.

    A level takes every second pixel of the one below (nearest), so no level holds a value that
    level 0 lacks. May be run again; levels are then written anew. Memory is bounded by a block
    for each thread, whatever the size of the mask, and empty blocks are not even read.
    """
    # An attempt that was interrupted may have left links to chunks that are written anew.
    shutil.rmtree(path / "labels", ignore_errors=True)
    group = zarr.open_group(path, mode="r+")
    shapes = level_shapes(open_mask(path).shape)
    for i in range(1, len(shapes)):
        below, level = open_mask(path, level=i - 1), create_level(group, i, shapes[i])
        # whole shards; else a few whole chunks
        side = (level.shards or (2 * CHUNK,))[0]

        def reduce(block: Block, below: MaskArray = below, level: MaskArray = level) -> None:
            start = tuple(2 * a for a in block.start)
            stop = tuple(min(2 * b, n) for b, n in zip(block.stop, below.shape, strict=True))
            if not is_empty(below, Block(index=block.index, start=start, stop=stop)):
                y, x = (slice(a, b, 2) for a, b in zip(start, stop, strict=True))
                write_block(level, block, np.asarray(below[y, x]))

        for _ in map_in_threads(reduce, iter_blocks(shapes[i], (side, side))):
            pass
    attributes = group.attrs.asdict()
    (multiscale,) = ome_of(attributes)["multiscales"]
    multiscale["datasets"] = datasets(first_scale(attributes), len(shapes))
    label = group.create_group(LABELS)
    for i in range(len(shapes)):
        # an array's metadata and chunks say nothing of where they lie
        shutil.copytree(path / str(i), path / LABELS / str(i), copy_function=_link_or_copy)
    _describe_label(label, multiscale, classes)
    # last, so that whoever finds all levels listed finds all there is
    _describe(group, multiscale, classes)
    # the disk is to hold all but the blocks of level 0, which it holds already
    every = [(other, other.relative_to(path).parts[0]) for other in path.rglob("*")]
    sync_all(
        other
        for other, part in every
        if not other.is_dir() and part != "0" and (part != "labels" or other.stat().st_nlink == 1)
    )
    sync_all([*(other for other, _ in every if other.is_dir()), path])


def link_levels(path: Path, target: Path) -> int:
    """Give all levels of a finished mask a place in a zarr 3 as well; return how many there are."""
    levels = open_levels(path)
    for i, level in enumerate(levels):
        old = level.metadata.zarr_format == 2
        ignored = shutil.ignore_patterns(".z*") if old else None
        place = target / str(i)
        shutil.copytree(path / str(i), place, ignore=ignored, copy_function=_link_or_copy)
        if old:
            # The chunks of both formats are the same bytes, under names that zarr 3 knows too.
            zarr.create_array(
                place,
                shape=level.shape,
                chunks=level.chunks,
                dtype="uint8",
                fill_value=0,
                compressors=BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle", typesize=1),
                chunk_key_encoding={"name": "v2", "separator": "/"},
                dimension_names=AXES,
                zarr_format=3,
            )
    return len(levels)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # a file system without hard links, or with too many of one file
        shutil.copyfile(source, target)


def create_level(group: zarr.Group, index: int, shape: Shape, *, effort: int = 1) -> MaskArray:
    """Create a level of an OME-Zarr, uint8 (y, x), (c, y, x) or (c, z, y, x), all 0; return it.

    Args:
        effort: of compression, 1 to 9.
    """
    alone, unit = (1,) * (len(shape) > 2), CUBOID if len(shape) > 3 else (CHUNK, CHUNK)
    common: dict[str, Any] = {
        "shape": shape,
        "chunks": (*alone, *unit),
        "dtype": "uint8",
        "fill_value": 0,
        "config": CONFIG,
        "overwrite": True,
    }
    # zstd 1 without shuffle writes busy masks at 0.8 GB/s a core; zstd 3 makes them 5 % smaller at
    # a third of the speed, lz4 three times as large. In Blosc as Java readers know zstd only there.
    codec: dict[str, Any] = {"cname": "zstd", "clevel": effort}
    if group.metadata.zarr_format == 2:
        return group.create_array(
            str(index),
            compressors={"id": "blosc", "shuffle": 0, **codec},
            chunk_key_encoding={"name": "v2", "separator": "/"},
            **common,
        )
    return group.create_array(
        str(index),
        shards=(*alone, SHARD, SHARD),
        compressors=BloscCodec(shuffle="noshuffle", typesize=1, **codec),
        dimension_names=("c", *AXES)[-len(shape) :],
        **common,
    )


def _describe(group: zarr.Group, multiscale: dict[str, Any], classes: Sequence[ClassInfo]) -> None:
    """Write the attributes of the image of class indices."""
    last = float(len(classes) - 1)
    window = {"min": 0.0, "max": last, "start": 0.0, "end": last}
    # hidden: it would cover the slide, and its labels show the same in colours
    shown = channel("class index", classes[1], active=False) | {"window": window}
    attributes = attributes_of(group, multiscale, omero={"channels": [shown]})
    group.attrs.put(attributes | {MASK: {"classes": [c.name for c in classes]}})


def _describe_label(
    group: zarr.Group, multiscale: dict[str, Any], classes: Sequence[ClassInfo]
) -> None:
    """Write the attributes of the labels: names and colours of the classes."""
    rgba = [[*c.color, 255] if c.color else [0, 0, 0, 0] for c in classes]
    label = {
        "colors": [{"label-value": i, "rgba": color} for i, color in enumerate(rgba)],
        "properties": [{"label-value": i, "class": c.name} for i, c in enumerate(classes)],
        "source": {"image": "../../"},
    }
    old = group.metadata.zarr_format == 2
    group.attrs.put(
        attributes_of(
            group,
            multiscale,
            # napari-ome-zarr shows labels only if this says so; it fails on a window, which the
            # specification wants here
            omero={"channels": [channel("classes", classes[1], active=True)]},
            **{"image-label": ({"version": "0.4"} if old else {}) | label},
        )
    )
    listed: dict[str, Any] = {"labels": [LABELS.rpartition("/")[2]]}
    parent = zarr.open_group(group.store, path=LABELS.partition("/")[0], mode="r+")
    parent.attrs.put(listed if old else {"ome": {"version": "0.5"} | listed})


def attributes_of(group: zarr.Group, multiscale: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a group's attributes in the place of its version of NGFF."""
    if group.metadata.zarr_format == 2:
        return {"multiscales": [{"version": "0.4"} | multiscale], **more}
    return {"ome": {"version": "0.5", "multiscales": [multiscale], **more}}


def channel(label: str, shown_as: ClassInfo, *, active: bool) -> dict[str, Any]:
    """Return how viewers show a channel, in the colour of a class."""
    color = "".join(f"{part:02X}" for part in shown_as.color or (255, 255, 255))
    return {"label": label, "color": color, "active": active}


def datasets(
    scale: Sequence[float], n_levels: int, edge: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """List the levels; pixel (i, j) of level n is pixel (i·2ⁿ, j·2ⁿ) of level 0.

    Args:
        edge: where the first pixel begins, of channels whose levels are means instead.
    """
    found, alone = [], [1.0][: len(edge)]
    for level in range(n_levels):
        sizes = [size * 2**level for size in scale]
        transforms = [{"type": "scale", "scale": [*alone, *sizes]}]
        if edge:
            # Viewers take places for those of pixels' centres: what is coarser begins later.
            centre = [a + size / 2 for a, size in zip(edge, sizes, strict=True)]
            transforms.append({"type": "translation", "translation": [0.0, *centre]})
        found.append({"path": str(level), "coordinateTransformations": transforms})
    return found
