"""A run's mask cut anew from its probabilities, as much of it as a page looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsi_pipeline.errors import SourceError, StoreError
from wsi_pipeline.export.ome_zarr import CHUNK, CUBOID
from wsi_pipeline.export.polygons.build import polygons
from wsi_pipeline.export.polygons.trace import find_outlines, trace_mask
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Block, Shape, box_slices, iter_blocks
from wsi_pipeline.run.probability import Probability, choose, open_probability, with_background
from wsi_pipeline.viewer.base import ShownRun
from wsi_pipeline.viewer.polygons import Polygons

Pixels = npt.NDArray[np.uint8]
Pair = tuple[int, int]
Thresholds = Sequence[float | None]
"""Of each channel; None = not cut."""

BLOCK = 1024
"""Side of what is traced at once."""
QUICK, MOST = 1 << 19, 1 << 27
"""Values of a class in a first answer, and at most in an exact one."""
FINE = 1 << 22
"""Mask pixels up to which outlines are exactly what `export` traces, before it simplifies them."""
COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Of probabilities from 0 to 1, matplotlib's viridis: even to the eye, and to the colour-blind."""
PALETTE = [
    tuple(round(float(np.interp(n / 255 * 4, range(5), part))) for part in np.transpose(COLORS))
    for n in range(256)
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """What a mask would be with other thresholds.

    All along the axes of the mask, (y, x) or (z, y, x).

    Attributes:
        values: index, in the mask, of the class of each channel.
        downsample: slide pixels per value of level 0.
        mask_downsample: slide pixels per mask pixel.
        mask_shape: of the mask.
        amount: of what a value of level 0 is of, in the run's unit.
    """

    probability: Probability
    values: Sequence[int]
    downsample: tuple[float, ...]
    mask_downsample: tuple[float, ...]
    mask_shape: Shape
    amount: float

    def shape(self, level: int) -> Shape:
        """Return the shape of a level, without channels."""
        return self.probability.levels[level].shape[1:]

    @property
    def _chunk(self) -> Shape:
        # What is decoded once.
        return CUBOID if len(self.mask_shape) > 2 else (CHUNK, CHUNK)

    def plane(self, channel: int, level: int, start: Pair, shape: Pair) -> Pixels:
        """Return a rectangle of a class's probabilities in 1/255, (y, x).

        Raises:
            SourceError: there is no such class.
        """
        self._check(channel)
        rows, columns = box_slices(start, shape)
        return np.asarray(self.probability.levels[level][channel, rows, columns])

    def at_pixels(self, start: Shape, stop: Shape, what: int | Thresholds) -> Pixels:
        """Return a class's probabilities in 1/255, or the classes, at a box of mask pixels.

        Args:
            what: channel of the probabilities, or thresholds of all.

        Raises:
            SourceError: there is no such class.
        """
        if isinstance(what, int):
            self._check(what)
            shares: Pixels = np.rint(self.probability.read(start, stop)[what] * 255).astype(
                np.uint8
            )
            return shares
        every = np.array([0, *self.values], np.uint8)
        return np.asarray(every[_chosen(self.probability.read(start, stop), what)])

    def _check(self, channel: int) -> None:
        if not 0 <= channel < len(self.values):
            raise SourceError(f"there are probabilities of {len(self.values)} classes")

    def mask(self, level: int, start: Shape, stop: Shape, thresholds: Thresholds) -> Pixels:
        """Return the classes, as the mask's indices, of a box of a level."""
        array = self.probability.levels[level]
        classes_of = self._rule(tuple(thresholds))
        found = np.zeros([b - a for a, b in zip(start, stop, strict=True)], np.uint8)

        def cut(block: Block) -> None:
            corner = [a + b for a, b in zip(block.start, start, strict=True)]
            planes = np.asarray(array[(slice(None), *box_slices(corner, block.shape))])
            if planes.any():
                found[block.slices] = classes_of(planes)

        for _ in map_in_threads(cut, iter_blocks(found.shape, self._chunk)):
            pass
        return found

    def areas(self, thresholds: Thresholds, *, is_exact: bool) -> dict[str, Any]:
        """Return `amounts` of each class, by index, and as `is_exact` whether all was counted.

        Args:
            is_exact: count all, which takes seconds on a large slide.
        """
        is_exact = is_exact or "_histogram" in self.__dict__
        level = 0 if is_exact else self._quick(self.shape(0), QUICK)
        if is_exact and len(self.values) <= 2:
            every = self._rule(tuple(thresholds))(_combinations(len(self.values))).ravel()
            counts = np.bincount(every, weights=self._histogram, minlength=1 + max(self.values))
        else:
            shape = self.shape(level)
            mask = self.mask(level, (0,) * len(shape), shape, thresholds)
            counts = np.bincount(mask.ravel(), minlength=1 + max(self.values))
        found = counts * (self.amount * 2 ** (level * len(self.downsample)))
        return {"amounts": {n: float(found[n]) for n in self.values}, "is_exact": level == 0}

    def within(
        self,
        box: tuple[int, int, int, int],
        downsample: float,
        hidden: Collection[int],
        thresholds: Thresholds,
        *,
        is_exact: bool,
    ) -> dict[str, Any]:
        """Return outlines as `Polygons.within`, and as `is_exact` whether of all that is known.

        Args:
            box: (x, y, width, height) in level-0 pixels.
            downsample: level-0 pixels per pixel of the screen.
            is_exact: take all, which takes seconds where the box is large.

        Raises:
            SourceError: the box is too large.
        """
        x, y = (max(at, 0) for at in box[:2])
        scale, shape = self.mask_downsample, self.mask_shape
        # A page asks for more than it shows, beyond the slide too.
        height, width = (
            max(0, min(at + size, math.ceil(n * s)) - max(at, 0))
            for at, size, n, s in zip((box[1], box[0]), (box[3], box[2]), shape, scale, strict=True)
        )
        level, is_fine = -1, is_exact and width * height <= FINE * scale[0] * scale[1]
        if not is_fine:
            cells = (height / self.downsample[0], width / self.downsample[1])
            if is_exact and cells[0] * cells[1] > MOST:
                raise SourceError("too much of the slide is in view to be exact; zoom in")
            level = 0 if is_exact else self._quick(cells, QUICK)
            scale = (self.downsample[0] * 2**level, self.downsample[1] * 2**level)
            shape = self.shape(level)
        # One more on each side: what is cut off there has borders that are none.
        ends = zip((y, x), (height, width), scale, shape, strict=True)
        spans = [
            (min(max(0, int(at // s) - 1), n), min(n, max(0, int((at + size) // s) + 2)))
            for at, size, s, n in ends
        ]
        start, stop = ((spans[0][i], spans[1][i]) for i in (0, 1))
        if stop[0] <= start[0] or stop[1] <= start[1]:
            return {"shapes": [], "more": 0, "is_exact": True}
        if is_fine:
            mask = self.at_pixels(start, stop, thresholds)
        else:
            mask = self.mask(level, start, stop, thresholds)
        blocks = iter_blocks(mask.shape, (BLOCK, BLOCK))
        outlines = find_outlines(mask, trace_mask(mask, blocks), block_size=BLOCK)
        shapes = shapely.transform(
            polygons(outlines), lambda xy: (xy + np.flip(start)) * np.flip(scale)
        )
        areas = shapely.area(shapes)
        order = np.argsort(-areas, kind="stable")
        found = Polygons(
            shapes=shapes[order],
            areas=areas[order],
            values=outlines.regions.value[order].astype(np.int64),
            tree=shapely.STRtree(shapes[order]),
        )
        return {**found.within(box, downsample, hidden), "is_exact": level <= 0}

    @cached_property
    def _histogram(self) -> npt.NDArray[np.int64]:
        """Return how often each combination of the values of one or two classes is there."""
        array = self.probability.levels[0]

        def count(block: Block) -> npt.NDArray[np.int64]:
            codes = _codes(np.asarray(array[(slice(None), *block.slices)]))
            return np.bincount(codes.ravel(), minlength=256 ** len(self.values))

        total = np.zeros(256 ** len(self.values), np.int64)
        for found in map_in_threads(count, iter_blocks(self.shape(0), self._chunk)):
            total += found
        return total

    def _rule(self, thresholds: tuple[float | None, ...]) -> Callable[[Pixels], Pixels]:
        """Return what makes classes of probabilities (c, …) in 1/255: of up to two by a table."""
        values = np.array([0, *self.values], np.uint8)

        def classes_of(planes: Pixels) -> Pixels:
            return np.asarray(
                values[_chosen(planes.astype(np.float32) / np.float32(255), thresholds)]
            )

        if len(thresholds) > 2:
            return classes_of
        table = classes_of(_combinations(len(thresholds)))[0]
        return lambda planes: np.asarray(table[_codes(planes)])

    def _quick(self, shape: Sequence[float], most: int) -> int:
        """Return the finest level of which a part, of a size at level 0, has few values."""
        levels = range(len(self.probability.levels))
        few = (n for n in levels if math.prod(shape) <= most * 2 ** (n * len(shape)))
        return next(few, levels[-1])


def open_cut(shown: ShownRun, mask_shape: Shape, mask_downsample: tuple[float, ...]) -> Cut | None:
    """Return what cuts a run's mask anew, where it keeps probabilities of the mask's classes.

    Args:
        mask_shape: of the mask.
        mask_downsample: level-0 pixels per mask pixel along each axis.
    """
    try:
        probability = open_probability(shown.folder)
    except StoreError:
        return None
    names, slide = list(shown.classes), shown.run.slide
    if not set(probability.classes) <= set(names) or len(probability.ratio) != len(mask_shape):
        return None
    axes = zip(mask_downsample, probability.ratio, strict=True)
    downsample = tuple(step / ratio for step, ratio in axes)
    mm = [um / 1000 for um in slide["mpp"]] if "mpp" in slide else slide["spacing_mm"] or [1.0]
    ml = 1000 if shown.run.kind == "volume" else 1
    return Cut(
        probability=probability,
        amount=math.prod(mm) * math.prod(downsample) / ml,
        values=[names.index(name) for name in probability.classes],
        downsample=downsample,
        mask_downsample=mask_downsample,
        mask_shape=mask_shape,
    )


def _combinations(count: int) -> Pixels:
    """Return all values of one or two classes, (c, 1, 256 ** c), in the order of their codes."""
    return np.indices((256,) * count).reshape(count, 1, -1).astype(np.uint8)


def _codes(planes: Pixels) -> npt.NDArray[np.uint16]:
    """Return one number for the values of one or two classes, of (c, …)."""
    codes: npt.NDArray[np.uint16] = planes[0].astype(np.uint16)
    return codes if len(planes) == 1 else codes * np.uint16(256) + planes[1]


def _chosen(planes: npt.NDArray[np.float32], thresholds: Thresholds) -> Pixels:
    """Return the channel, from 1 on, that each pixel of (c, y, x) gets; 0 = background."""
    return choose(with_background(planes), thresholds, 0.0)[1]
