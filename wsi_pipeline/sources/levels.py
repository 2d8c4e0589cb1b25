"""Which stored levels show the slide, and at what factor: stated, then checked against level 0."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsi_pipeline.errors import SourceError
from wsi_pipeline.sources.base import (
    Backend,
    Downsample,
    Downsamples,
    Pixels,
    Sizes,
    Sparse,
    fits_size,
    is_whole,
    part_of,
    possible_downsamples,
    tiles_touching,
)

EDGE = (48, 128)
"""Pixels of a level along a side of the square that is compared: the first for coarse levels."""
SIDE = (512, 3072)
"""Level-0 pixels along a side of that square, for the finest levels and the coarsest."""
MAP = 1 << 22
"""Pixels up to which a level is read whole, to find where there is something to compare."""
CELLS = 16
"""Parts of the slide along each axis among which the places to compare are chosen."""
FLAT = 3.0
"""Standard deviation of grey values below which a place shows nothing that could be found again."""
NOISE = 12.0
"""Grey values by which JPEG and sharpening change a pixel."""
STRAY = 0.1
"""Share of pixels that no kernel can have made of level 0, above which a level is no level."""

Grey = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


class Levels:
    """The levels of a slide: a level is compared with level 0 before it is used.

    A level whose size does not tell its factor, because it was padded or is another picture, is
    compared when the slide is opened; the others when they are first chosen. All share one lock.

    Attributes:
        level_sizes: (width, height) of each stored level, those that are no levels among them.
        level_tiles: (width, height) of the pieces that each is stored in.
        doubts: Sentences on levels that are left out or not what they seem.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.size = backend.size
        self.level_sizes: Sizes = backend.level_sizes
        self.level_tiles: Sizes = backend.level_tiles
        self.doubts: list[str] = []
        self.read_level = backend.read_level
        self._lock = threading.RLock()
        self._settled: dict[int, Downsample | None] = {}
        for level in range(1, len(self.level_sizes)):
            downsample = backend.level_downsamples[level]
            if not is_whole(downsample) or not fits_size(
                self.size, self.level_sizes[level], downsample
            ):
                self.check(level)

    @property
    def level_downsamples(self) -> Downsamples:
        """Return (x, y) level-0 pixels per pixel of each level, as far as is known by now."""
        stated = self._backend.level_downsamples
        return tuple(self._settled.get(level) or pair for level, pair in enumerate(stated))

    def usable(self) -> list[int]:
        """Return the levels that have not been found to be none."""
        return [n for n in range(len(self.level_sizes)) if self._settled.get(n, ()) is not None]

    def check(self, level: int) -> bool:
        """Return whether a level shows the slide; from then on its downsample is right."""
        if level == 0:
            return True
        with self._lock:
            if level not in self._settled:
                self._settled[level] = self._settle(level)
        return self._settled[level] is not None

    def gaps(self, level: int, x: int, y: int, pixels: Pixels) -> Iterator[tuple[int, int]]:
        """Yield (x, y) of stored tiles that were left out of a level, but not of all finer ones.

        They are those of the pixels that were read at another (x, y) of the level.
        """
        sparse = self._backend
        if level == 0 or not isinstance(sparse, Sparse):
            return
        downsamples, (width, height) = self.level_downsamples, self.level_tiles[level]

        def is_held(finer: int, left: int, top: int) -> bool:
            pairs = zip(downsamples[level], downsamples[finer], strict=True)
            (rx, ry) = (own / fine for own, fine in pairs)
            box = left * rx, top * ry, width * rx, height * ry
            return any(self._tiles(finer, *map(int, box)))

        for left, top in tiles_touching(x, y, pixels.shape[1], pixels.shape[0], (width, height)):
            part = part_of(pixels, (x, y), (left, top), (width, height))
            if (
                (part[0, 0] == sparse.blank).all()
                and (part == sparse.blank).all()
                and not sparse.holds(level, left // width, top // height)
                and any(is_held(n, left, top) for n in self.finer(level))
            ):
                yield left, top

    def finer(self, level: int) -> list[int]:
        """Return the levels finer than one, the nearest first."""
        downsamples = self.level_downsamples
        found = [n for n in self.usable() if downsamples[n][0] < downsamples[level][0]]
        return sorted(found, key=lambda n: -downsamples[n][0])

    def _tiles(self, level: int, x: int, y: int, width: int, height: int) -> Iterator[bool]:
        """Yield whether each stored tile that a rectangle of a level touches was written."""
        sparse = self._backend if isinstance(self._backend, Sparse) else None
        tile, (full_width, full_height) = self.level_tiles[level], self.level_sizes[level]
        size = min(width, full_width - x), min(height, full_height - y)
        for left, top in tiles_touching(x, y, *size, tile):
            yield sparse is None or sparse.holds(level, left // tile[0], top // tile[1])

    def _settle(self, level: int) -> Downsample | None:
        """Return the downsample at which a level shows what level 0 shows, None where at none."""
        size, stated = self.level_sizes[level], self._backend.level_downsamples[level]
        name = f"level {level} ({size[0]} × {size[1]} px)"
        if not any(self._tiles(level, 0, 0, *size)):
            self.doubts.append(f"{name} holds no pixels; it is computed from a finer level")
            return None
        verdicts: list[bool | None] = []
        for downsample in possible_downsamples(self.size, size, self.level_tiles[level], stated):
            fits = fits_size(self.size, size, downsample)
            verdicts.append(self._shows_level_0(level, downsample))
            # Where nothing is to be seen, nothing speaks against what the sizes say.
            if verdicts[-1] or (verdicts == [None] and fits):
                if not fits:
                    self.doubts.append(
                        f"{name} goes beyond the edge of the slide: a pixel of it counts as "
                        f"{downsample[0]:g} × {downsample[1]:g} of level 0, as its content shows"
                    )
                return downsample
        why = "does not show what level 0 shows"
        if False not in verdicts:
            why = "has a size that tells nothing of its place, as does what is to be seen on it"
        if not verdicts:
            why = "has another shape than the slide"
        self.doubts.append(f"{name} {why}; it is not used")
        return None

    def _shows_level_0(self, level: int, downsample: Downsample) -> bool | None:
        """Compare places of a level with level 0; return None where there is nothing to see."""
        # Where level 0 takes long, the level is compared with a coarser one.
        wanted = max(downsample) * EDGE[0] / SIDE[1]
        levels = [n for n in self.usable() if max(self.level_downsamples[n]) <= wanted]
        levels.sort(key=lambda n: -max(self.level_downsamples[n]))
        reference = next((n for n in levels if self._settled.get(n) or self.check(n)), 0)
        base = self.level_downsamples[reference]
        ratio = (downsample[0] / base[0], downsample[1] / base[1])
        side = min(max(SIDE[0], EDGE[0] * max(ratio)), EDGE[1] * max(ratio), SIDE[1])
        # What was cut off at the edge may be anything.
        extents = [
            min(own, full // f)
            for own, full, f in zip(self.level_sizes[level], self.size, downsample, strict=True)
        ]
        edge = int(min(side / max(ratio), *extents))
        damaged = 0
        for v, u in self._places() if edge >= 4 else ():
            x, y = (
                int(min(max(0, part * extent - edge / 2), extent - edge))
                for part, extent in zip((u, v), extents, strict=True)
            )
            try:
                verdict = self._same(level, reference, ratio, (x, y), edge)
            except _LeftOut:
                continue
            except SourceError:
                logger.debug("level %d is not compared at %d, %d", level, x, y, exc_info=True)
                damaged += 1
                # Some libraries take long to open a file again after an error.
                if damaged > 1:
                    return None
                continue
            if verdict is not None:
                return verdict
        return None

    def _same(
        self,
        level: int,
        reference: int,
        ratio: tuple[float, float],
        corner: tuple[int, int],
        edge: int,
    ) -> bool | None:
        """Return whether a square of a level shows what a finer one shows there.

        Two questions, for any kernel by which a level may have been made: could each pixel be a
        mean of its surroundings in the finer level, and is the square found again where it should
        be? The first sees smooth pictures out of place, the second textured ones.
        """
        # It would double the time to open a slide; most need none.
        from scipy.ndimage import uniform_filter

        x, y = corner
        stored = self._read_grey(level, x, y, edge, edge)
        box = [x * ratio[0], y * ratio[1], (x + edge) * ratio[0], (y + edge) * ratio[1]]
        left, top = math.floor(box[0]), math.floor(box[1])
        width, height = self.level_sizes[reference]
        right, bottom = min(math.ceil(box[2]), width), min(math.ceil(box[3]), height)
        fine = self._read_grey(reference, left, top, right - left, bottom - top)
        inside = (
            box[0] - left,
            box[1] - top,
            min(box[2] - left, fine.shape[1]),
            min(box[3] - top, fine.shape[0]),
        )
        mean, square = (
            np.asarray(
                Image.fromarray(values).resize((edge, edge), Image.Resampling.BOX, box=inside)
            )
            for values in (fine, fine * fine)
        )
        around = uniform_filter(mean, 3)
        spread = np.sqrt(np.maximum(uniform_filter(square, 3) - around * around, 0))
        if (abs(stored - around) > NOISE + 3 * spread).mean() > STRAY:
            return False
        reach = max(4, edge // 8)
        inner = stored[reach:-reach, reach:-reach]
        if edge < 4 * reach or min(inner.std(), mean.std()) < FLAT:
            return None
        found = _match(mean, inner)
        here = found[reach - 1 : reach + 2, reach - 1 : reach + 2].max()
        # It is near 1 but for nearest neighbours of noise, and the less sure for it.
        best = found.max()
        return bool(here >= (0.97 if best > 0.7 else 0.9) * best)

    def _read_grey(self, level: int, x: int, y: int, width: int, height: int) -> Grey:
        pixels = self._backend.read_level(level, x, y, width, height)
        # To ask for a tile may take a request or a decoding of its own.
        if (
            isinstance(self._backend, Sparse)
            and (pixels == self._backend.blank).all(axis=2).any()
            and not all(self._tiles(level, x, y, width, height))
        ):
            raise _LeftOut
        return np.asarray(pixels.sum(axis=2, dtype=np.uint16) / np.float32(3), np.float32)

    def _places(self) -> Iterator[tuple[float, float]]:
        """Yield (y, x) in parts of the slide, those first where most is to be seen far out.

        An error of the factor moves what lies far from the origin; hence the weights.
        """
        at = (np.arange(CELLS) + 0.5) / CELLS
        score = self._structure * (0.2 + at[:, None]) * (0.2 + at)
        for index in np.argsort(-score, axis=None)[:4]:
            row, column = divmod(int(index), CELLS)
            if self._structure[row, column] >= FLAT:
                yield float(at[row]), float(at[column])
        yield from [(0.5, 0.5), (0.35, 0.6), (0.65, 0.4)]

    @cached_property
    def _structure(self) -> npt.NDArray[np.float64]:
        """Return the standard deviation of grey values in each part of the slide, (y, x)."""
        level = min(range(len(self.level_sizes)), key=lambda n: math.prod(self.level_sizes[n]))
        width, height = self.level_sizes[level]
        found = np.zeros((CELLS, CELLS))
        is_small = width * height <= MAP
        try:
            whole = self._backend.read_level(level, 0, 0, width, height) if is_small else None
            for row in range(CELLS):
                for column in range(CELLS):
                    x, y = column * width // CELLS, row * height // CELLS
                    w, h = -(-width // CELLS), -(-height // CELLS)
                    w, h = min(w, width - x), min(h, height - y)
                    if whole is not None:
                        part = whole[y : y + h, x : x + w]
                    elif (row + column) % 4:
                        # Fewer are enough of those that must be read one by one.
                        continue
                    else:
                        part = self._backend.read_level(level, x, y, min(w, 64), min(h, 64))
                    few = part[:: -(-len(part) // 32), :: -(-part.shape[1] // 32)]
                    found[row, column] = few.std(axis=(0, 1)).mean()
        except SourceError:
            logger.debug("no picture of the whole slide", exc_info=True)
        return found


class _LeftOut(Exception):
    """Tiles that were not written say nothing about a level."""


def _match(picture: Grey, part: Grey) -> npt.NDArray[np.float64]:
    """Return how alike a picture is to a part wherever that fits: 1 = but for light and contrast.

    Normalised cross-correlation (Lewis, Fast Template Matching, 1995), as of skimage.feature.
    """
    # Which brings SciPy's statistics, and they take a quarter of a second of every run to load.
    from scipy.ndimage import uniform_filter

    shape, (height, width) = picture.shape, part.shape
    fits = slice(shape[0] - height + 1), slice(shape[1] - width + 1)
    whole, sought = (values.astype(float) - values.mean() for values in (picture, part))
    spectrum = np.fft.rfft2(whole) * np.fft.rfft2(sought, shape).conj()
    products = np.fft.irfft2(spectrum, shape)[fits]
    mean, square = (
        uniform_filter(values, (height, width))[height // 2 :, width // 2 :][fits]
        for values in (whole, whole * whole)
    )
    # Where the picture is flat, nothing is found.
    variance = np.maximum(square - mean * mean, FLAT / 100) * part.size
    found: npt.NDArray[np.float64] = products / np.sqrt(variance * (sought * sought).sum())
    return found
