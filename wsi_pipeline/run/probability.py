"""The probabilities of a run's classes as OME-Zarr: kept by blocks, put together, read again.

A cell is what one value is of: a grid pixel of the model, or a square of them. Borders of blocks
are mask pixels, and so hardly ever borders of cells or chunks: each block keeps the cells that are
its alone in a file beside the ledger, and the OME-Zarr is written from those once all blocks are
done. So no chunk has two writers, and a block that is done again replaces its own values alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import zarr

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import StoreError
from wsi_pipeline.export import Layer, level_shapes, ome_zarr
from wsi_pipeline.export.polygons.components import PROBABILITY_ONE
from wsi_pipeline.files.arrays import Array, trusted
from wsi_pipeline.files.atomic import remove, written_beside
from wsi_pipeline.files.locks import writing
from wsi_pipeline.files.ngff import MASK, first_scale, ome_of
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import (
    Block,
    Shape,
    box_slices,
    clear_outside,
    iter_blocks,
    sample_positions,
)
from wsi_pipeline.options import ExportOptions, Ngff
from wsi_pipeline.report.record import FILES
from wsi_pipeline.run.plan import Plan

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
NAME, DISAGREEMENT = FILES["probability"], "disagreement"
STRIP = 1 << 20
"""Mask pixels that are sampled at a time: whole rows, or planes of a volume."""
UNITS = {"micrometer": 1.0, "millimeter": 1000.0}
"""µm of each unit of length."""


def cell_of(grid_mpp: float, export: ExportOptions, *, usual: int = 1) -> int:
    """Return the side of a cell in grid pixels, 0 where probabilities are not wanted.

    Args:
        usual: what it is where nobody says.

    Example:
        >>> cell_of(0.5, ExportOptions(outputs=("probability",), probability_mpp=1.2))
        2
    """
    if "probability" not in export.outputs:
        return 0
    return max(1, round((export.probability_mpp or usual * grid_mpp) / grid_mpp))


def keep_planes(plan: Plan, block: Block, planes: Bytes) -> None:
    """Write down the probabilities of a block's cells, (c, y, x), before the ledger has it."""
    path = _kept_path(plan, block)
    packed = [imagecodecs.zstd_encode(plane.tobytes(), 1) for plane in planes]
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        with written_beside(path) as partial, partial.open("wb") as file:
            np.savez(file, *(np.frombuffer(plane, np.uint8) for plane in packed))


def _kept_path(plan: Plan, block: Block) -> Path:
    return plan.store.path / f"probability-{plan.cell}" / f"{block.name}.npz"


def _kept_plane(plan: Plan, block: Block, channel: int) -> Bytes:
    """Return one of the planes that `keep_planes` was given."""
    (start, stop), path = plan.cells(block), _kept_path(plan, block)
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    try:
        with np.load(path, allow_pickle=False) as packed:
            found = imagecodecs.zstd_decode(packed[f"arr_{channel}"], out=math.prod(shape))
        return np.frombuffer(found, np.uint8).reshape(shape)
    # What is damaged may raise anything.
    except Exception as error:
        raise StoreError(
            f"{path} is damaged ({error}); segment again, which does this block anew"
        ) from error


def without_planes(plan: Plan, blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks in the ledger of which the disk does not hold the probabilities."""
    if not plan.cell or _is_whole(plan):
        return []

    def is_sound(block: Block) -> bool:
        try:
            with zipfile.ZipFile(_kept_path(plan, block)) as file:
                return file.testzip() is None
        except (OSError, zipfile.BadZipFile, zlib.error):
            return False

    pending = set(plan.store.pending(blocks))
    held = [block for block in blocks if block not in pending]
    sound = map_in_threads(is_sound, held)
    return [block for block, good in zip(held, sound, strict=True) if not good]


def _digest_path(plan: Plan) -> Path:
    return plan.store.path / f"probability-{plan.cell}.sha256"


def _digest(folder: Path) -> str:
    """Return a digest of a folder with all its files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _is_whole(plan: Plan) -> bool:
    """Return whether the finished OME-Zarr is there as it was written."""
    noted = _digest_path(plan)
    return noted.is_file() and noted.read_text("utf-8") == _digest(plan.store.folder / NAME)


def write_probability(
    plan: Plan,
    blocks: Sequence[Block],
    classes: Sequence[ClassInfo],
    *,
    pixel: Sequence[float],
    unit: str | None,
    ngff: Ngff,
    is_ensemble: bool = False,
) -> None:
    """Put together what blocks have kept, unless that was done before; return nothing.

    Memory is bounded by a file of the array for each thread.

    Args:
        blocks: all that may hold anything.
        classes: all but the background.
        pixel: size of a mask pixel along each axis.
        unit: of that, one of `UNITS`; None = it is not known.
        is_ensemble: in a group beneath, where members disagree.
    """
    target = plan.store.folder / NAME
    if not _is_whole(plan):
        with writing(target), written_beside(target) as folder:
            parts = [(folder, classes, 0)]
            if is_ensemble:
                parts.append((folder / DISAGREEMENT, [ClassInfo(name=DISAGREEMENT)], len(classes)))
            for group, named, first in parts:
                array = _create(group, plan, named, pixel, unit, ngff)
                _assemble(array, plan, blocks, first)
                for level in range(1, len(level_shapes(plan.cells_shape))):
                    _reduce(group, level)
        with written_beside(_digest_path(plan)) as partial:
            partial.write_text(_digest(target), "utf-8")
    for path in plan.store.path.glob("probability-*"):
        if path != _digest_path(plan):
            remove(path)


def _create(
    folder: Path,
    plan: Plan,
    classes: Sequence[ClassInfo],
    pixel: Sequence[float],
    unit: str | None,
    ngff: Ngff,
) -> Array:
    """Create the OME-Zarr with all its levels, nothing but 0; return level 0."""
    group = zarr.open_group(folder, mode="w-", zarr_format=2 if ngff == "0.4" else 3)
    ratio, shapes = [r / plan.cell for r in plan.ratio], level_shapes(plan.cells_shape)
    told: dict[str, Any] = {"probabilities": [c.name for c in classes], "ratio": ratio}
    offset = [o / plan.cell for o in plan.offset]
    if plan.crop is not None:
        told |= {"offset": offset, "crop": plan.crop, "nearest": plan.nearest}
    if plan.is_mirrored:
        # Cells begin at what is the last pixel here.
        offset[-1] = plan.cells_shape[-1] - plan.mask_shape[-1] * ratio[-1]
        told["offset"] = offset
    size = [p / r for p, r in zip(pixel, ratio, strict=True)]
    edge = [-p / 2 - o * s for p, o, s in zip(pixel, offset, size, strict=True)]
    measured = {"unit": unit} if unit else {}
    space = [{"name": axis, "type": "space", **measured} for axis in "zyx"[-len(ratio) :]]
    multiscale = {
        "name": "probability",
        "axes": [{"name": "c", "type": "channel"}, *space],
        "datasets": ome_zarr.datasets(size, len(shapes), edge),
        "type": "mean",
    }
    window = {"min": 0.0, "max": 255.0, "start": 0.0, "end": 255.0}
    channels = [ome_zarr.channel(c.name, c, active=True) | {"window": window} for c in classes]
    attributes = ome_zarr.attributes_of(group, multiscale, omero={"channels": channels})
    group.attrs.put(attributes | {MASK: told})
    # Of probabilities effort 5 leaves three quarters of what 1 does, and more gains little.
    levels = [
        ome_zarr.create_level(group, i, (len(classes), *shape), effort=5)
        for i, shape in enumerate(shapes)
    ]
    return levels[0]


def _assemble(array: Array, plan: Plan, blocks: Sequence[Block], first: int) -> None:
    """Write level 0 of channels from `first` on, whole files of it in threads."""
    unit = array.shards or array.chunks
    touching: dict[Shape, list[tuple[Block, Shape, Shape]]] = {}
    for block in blocks:
        start, stop = plan.cells(block)
        if plan.is_mirrored:
            width = plan.cells_shape[-1]
            start, stop = (*start[:-1], width - stop[-1]), (*stop[:-1], width - start[-1])
        spans = [range(a // n, -(-b // n)) for a, b, n in zip(start, stop, unit[1:], strict=True)]
        for index in itertools.product(*spans):
            touching.setdefault(index, []).append((block, start, stop))

    def assemble(part: Block) -> None:
        pixels = np.zeros(part.shape, np.uint8)
        for block, start, stop in touching.get(part.index[1:], ()):
            low = [max(a, b) for a, b in zip(start, part.start[1:], strict=True)]
            size = [min(a, b) - c for a, b, c in zip(stop, part.stop[1:], low, strict=True)]
            here, there = (
                box_slices([a - b for a, b in zip(low, corner, strict=True)], size)
                for corner in (start, part.start[1:])
            )
            pixels[0][there] = _kept_plane(plan, block, first + part.start[0])[here]
        ome_zarr.write_block(array, part, pixels)

    for _ in map_in_threads(assemble, iter_blocks(array.shape, unit)):
        pass


def _reduce(folder: Path, level: int) -> None:
    """Write a reduced level: the mean of four pixels, eight of a volume, of fewer at the edge."""
    below, array = (ome_zarr.open_mask(folder, level=i) for i in (level - 1, level))

    def reduce(part: Block) -> None:
        start, stop = ((at[0], *(2 * n for n in at[1:])) for at in (part.start, part.stop))
        stop = tuple(map(min, stop, below.shape))
        source = Block(index=part.index, start=start, stop=stop)
        if ome_zarr.is_empty(below, source):
            return
        pixels: Bytes = np.asarray(below[source.slices])
        odd = [(0, 0), *((0, n % 2) for n in pixels.shape[1:])]
        sums: npt.NDArray[Any] = np.pad(pixels, odd, mode="edge")
        axes = sums.ndim - 1
        for axis in range(1, axes + 1):
            all_before = (slice(None),) * axis
            even, uneven = (sums[(*all_before, slice(i, None, 2))] for i in (0, 1))
            sums = np.add(even, uneven, dtype=np.uint16)
        means = (sums + (1 << axes - 1)) >> axes
        ome_zarr.write_block(array, part, means.astype(np.uint8))

    # Of shards each takes a hundred megabytes.
    threads = 2 if array.shards else None
    for _ in map_in_threads(
        reduce, iter_blocks(array.shape, array.shards or array.chunks), threads=threads
    ):
        pass


def with_background(planes: Floats) -> Floats:
    """Return probabilities (c, y, x) with the background's first: what the classes leave."""
    return np.concatenate([1 - planes.sum(0, keepdims=True), planes])


def choose(
    planes: Floats, thresholds: Sequence[float | None], min_margin: float
) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Return probability and class of each pixel; the first of equals.

    A class with a threshold has the score p - threshold, one without p - the largest of the others:
    what is not negative only where it is the likeliest. The largest score that is not negative
    wins, else the background; so it does where the likeliest leads by less than `min_margin`.

    Args:
        planes: (C, y, x) probabilities, the background's first.
        thresholds: of each class but the background; None = it has none.
    """
    first, top, second = np.zeros(planes.shape[1:], np.uint8), planes[0].copy(), None
    for index, plane in enumerate(planes[1:], start=1):
        lower = np.minimum(top, plane)
        second = lower if second is None else np.maximum(second, lower)
        first[plane > top] = index
        np.maximum(top, plane, out=top)
    margin = top - second
    score, chosen = np.full_like(top, -1), np.zeros_like(first)
    for index, threshold in enumerate(thresholds, start=1):
        if threshold is None:
            own = np.where(first == index, margin, np.float32(-1))
        else:
            own = planes[index] - np.float32(threshold)
        better = (own >= 0) & (own > score)
        score[better], chosen[better] = own[better], index
    chosen[margin < np.float32(min_margin)] = 0
    return np.take_along_axis(planes, chosen[None].astype(np.intp), 0)[0], chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class Probability(Layer):
    """The probabilities of a run's classes, uint8 (c, y, x) or (c, z, y, x), in 1/255.

    Attributes:
        classes: names of the channels: all classes but the background.
        ratio: pixels of level 0 per mask pixel along each axis.
        offset: where the mask begins in them.
        crop: first mask pixel that they are of, and one past the last; None = they are of all.
        nearest: axis along which the mask takes the nearest; None = it interpolates.
    """

    classes: list[str]
    ratio: tuple[float, ...]
    offset: tuple[float, ...]
    crop: tuple[Shape, Shape] | None = None
    nearest: int | None = None

    def iter_rows(self, start: Shape, stop: Shape) -> Iterator[tuple[int, Floats]]:
        """Interpolate at mask pixels as `segment` does; yield row and (c, rows, x), from the top.

        Of a volume rows are planes, (c, planes, y, x). They count from `start`. Values are in
        [0, 1].
        """
        axes = zip(start, stop, self.ratio, self.offset, self.levels[0].shape[1:], strict=True)
        places = [
            sample_positions(a, b, ratio=r, length=n, offset=o, nearest=axis == self.nearest)
            for axis, (a, b, r, o, n) in enumerate(axes)
        ]
        spans = [slice(int(p[0]), int((p + (f > 0))[-1]) + 1) for p, f in places]
        planes = np.asarray(self.levels[0][(slice(None), *spans)])
        (y, fy), *others = ((p - span.start, f) for (p, f), span in zip(places, spans, strict=True))
        step = max(1, STRIP // math.prod(b - a for a, b in zip(start[1:], stop[1:], strict=True)))
        for row in range(0, len(y), step):
            own, share = y[row : row + step], fy[row : row + step]
            top, bottom = own[0], own[-1] + (share[-1] > 0) + 1
            lines = planes[:, top:bottom].astype(np.float32) / np.float32(255)
            lines = _between(lines, 1, own - top, share)
            for axis, (floor, fraction) in enumerate(others, start=2):
                lines = _between(lines, axis, floor, fraction)
            if self.crop is not None:
                clear_outside(lines, (start[0] + row, *start[1:]), self.crop)
            yield row, lines

    def read(self, start: Shape, stop: Shape) -> Floats:
        """Return the probabilities, (c, y, x) or (c, z, y, x) in [0, 1], at a box of mask pixels.

        Args:
            start: first mask pixel, (y, x) or (z, y, x).
            stop: one past the last.
        """
        return np.concatenate([rows for _, rows in self.iter_rows(start, stop)], axis=1)

    def of_classes(self, block: Block, classes: Bytes) -> npt.NDArray[np.uint16]:
        """Return the probability, in 1/65535, of the class of each pixel of a block of the mask."""
        found = np.zeros(classes.shape, np.uint16)
        for row, planes in self.iter_rows(block.start, block.stop):
            rows = slice(row, row + planes.shape[1])
            for index, plane in enumerate(planes, start=1):
                is_own = classes[rows] == index
                found[rows][is_own] = np.rint(plane[is_own] * PROBABILITY_ONE)
        return found


def _between(
    field: Floats, axis: int, floor: npt.NDArray[np.int64], fraction: npt.NDArray[np.float32]
) -> Floats:
    """Interpolate between neighbours along an axis, step by step as `iter_sampled_rows` does."""
    lower = field.take(floor, axis)
    between: Floats = field.take(floor + (fraction > 0), axis)
    between -= lower
    between *= fraction.reshape(-1, *[1] * (field.ndim - axis - 1))
    between += lower
    return between


def open_probability(folder: Path) -> Probability:
    """Open the probabilities in a run's folder; return them.

    Raises:
        StoreError: it has none, or they are damaged.
    """
    path = folder / NAME
    if not path.is_dir():
        raise StoreError(f"{folder} has no {NAME}; segment again, with probability as an output")
    try:
        attributes: dict[str, Any] = zarr.open_group(path, mode="r").attrs.asdict()
        told, crop = attributes[MASK], attributes[MASK].get("crop")
        classes, ratio = list(map(str, told["probabilities"])), tuple(map(float, told["ratio"]))
        first = trusted(zarr.open_array(path / "0", mode="r"))
        count, *shape = first.shape
        shapes = level_shapes(tuple(shape))
        rest = [trusted(zarr.open_array(path / str(i), mode="r")) for i in range(1, len(shapes))]
        if [level.shape for level in (first, *rest)] != [(len(classes), *s) for s in shapes]:
            raise ValueError(f"levels of other shapes than {count} classes have")
        unit = UNITS.get(ome_of(attributes)["multiscales"][0]["axes"][-1].get("unit"))
        return Probability(
            levels=[first, *rest],
            classes=classes,
            ratio=ratio,
            offset=tuple(map(float, told.get("offset", [0.0] * len(ratio)))),
            crop=(tuple(crop[0]), tuple(crop[1])) if crop else None,
            nearest=told.get("nearest"),
            mpp=tuple(float(n) * unit for n in first_scale(attributes)[1:]) if unit else None,
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise StoreError(f"{path} is damaged ({error}); segment again") from error
