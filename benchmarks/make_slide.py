"""Write synthetic slides: any array as a TIFF pyramid, or a JPEG slide of any size.

python benchmarks/make_slide.py big.tif --size 16384 16384 --mpp 0.25
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from skimage.data import immunohistochemistry

Pixels = npt.NDArray[np.uint8]

TILE = 256
WHITE = 244
"""Grey of the big slide's background: scanned glass is not quite white."""


def write_slide(
    path: Path,
    pixels: Pixels,
    mpp: float | None,
    *,
    levels: Sequence[int] = (1, 4),
    compression: str | None = "deflate",
    tile: int | None = TILE,
) -> Path:
    """Write an array as a TIFF pyramid; return its path.

    Args:
        path: file to write.
        pixels: uint8 (h, w, 3), or (h, w) for a grey slide.
        mpp: µm per pixel for the resolution tags; None leaves the tags out.
        levels: downsample of each level; sizes are truncated as scanners do.
        compression: of tifffile; None stores the pixels as they are.
        tile: side of a tile; None writes strips.
    """
    with tifffile.TiffWriter(path, bigtiff=False) as file:
        for factor in levels:
            file.write(
                box_mean(pixels, factor),
                photometric="rgb" if pixels.ndim == 3 else "minisblack",
                tile=None if tile is None else (tile, tile),
                compression=compression,
                subfiletype=0 if factor == 1 else 1,
                metadata=None,
                **_resolution(mpp, factor),
            )
    return path


def box_mean(pixels: Pixels, factor: int) -> Pixels:
    """Return the mean of each factor × factor square, ragged edges dropped."""
    h, w = (n // factor for n in pixels.shape[:2])
    blocks = pixels[: h * factor, : w * factor].reshape(h, factor, w, factor, *pixels.shape[2:])
    return np.round(blocks.mean(axis=(1, 3))).astype(np.uint8)


def write_big_slide(
    path: Path,
    size: tuple[int, int],
    mpp: float = 0.25,
    *,
    levels: Sequence[int] = (1, 4, 16),
    quality: int = 85,
) -> Path:
    """Write a JPEG slide of repeated tissue, half of it white; return its path.

    The tissue fills an ellipse over half of the area. Few tiles are distinct, each is encoded
    once, and so time and memory hardly depend on the size.

    Args:
        path: file to write.
        size: (width, height) in pixels.
        mpp: µm per pixel at level 0.
        levels: downsample of each level, powers of two up to 256.
        quality: of the JPEG tiles.
    """
    width, height = size
    tissue = _ellipse(-(-height // TILE), -(-width // TILE))
    with tifffile.TiffWriter(path, bigtiff=width * height > 1 << 32) as file:
        for factor in levels:
            shape = (height // factor, width // factor, 3)
            file.write(
                _encoded_tiles(tissue, shape, factor, quality),
                shape=shape,
                dtype=np.uint8,
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                tile=(TILE, TILE),
                subfiletype=0 if factor == 1 else 1,
                metadata=None,
                **_resolution(mpp, factor),
            )
    return path


def _resolution(mpp: float | None, factor: int) -> dict[str, object]:
    if mpp is None:
        return {"resolutionunit": "NONE"}
    return {"resolution": (1e4 / (mpp * factor),) * 2, "resolutionunit": "CENTIMETER"}


def _ellipse(rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """Return which level-0 tiles are tissue: an ellipse over half of the slide."""
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in (rows, columns))
    return y[:, None] ** 2 + x[None] ** 2 < 0.5 / np.pi


def _encoded_tiles(
    tissue: npt.NDArray[np.bool_], shape: tuple[int, ...], factor: int, quality: int
) -> Iterator[bytes]:
    """Yield the JPEG tiles of one level, row-major; equal tiles are encoded once."""
    texture = box_mean(immunohistochemistry(), factor)
    period = max(1, len(texture) // TILE)  # the texture repeats after so many tiles
    repeats = 2 * TILE // len(texture)

    @lru_cache(maxsize=4096)
    def encode(inside: bytes, side: tuple[int, int], phase: tuple[int, int]) -> bytes:
        mask = np.frombuffer(inside, dtype=bool).reshape(side)
        mask = np.pad(mask, [(0, factor - n) for n in side])
        y, x = (p * TILE for p in phase)
        filled = np.tile(texture, (repeats, repeats, 1))[y : y + TILE, x : x + TILE]
        cell = TILE // factor
        pixels = np.where(mask.repeat(cell, 0).repeat(cell, 1)[..., None], filled, WHITE)
        encoded: bytes = imagecodecs.jpeg_encode(
            np.ascontiguousarray(pixels, dtype=np.uint8), level=quality, subsampling="420"
        )
        return encoded

    for row in range(-(-shape[0] // TILE)):
        for column in range(-(-shape[1] // TILE)):
            cells = tissue[
                row * factor : (row + 1) * factor, column * factor : (column + 1) * factor
            ]
            yield encode(cells.tobytes(), cells.shape, (row % period, column % period))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a big synthetic JPEG slide.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(16384, 16384), metavar=("W", "H"))
    parser.add_argument("--mpp", type=float, default=0.25)
    parser.add_argument("--levels", type=int, nargs="+", default=(1, 4, 16))
    args = parser.parse_args()
    write_big_slide(args.path, tuple(args.size), args.mpp, levels=args.levels)


if __name__ == "__main__":
    main()
