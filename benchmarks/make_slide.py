"""Write synthetic slides: any array as a TIFF pyramid, or a JPEG slide of any size.

python benchmarks/make_slide.py big.svs --size 16384 16384 --mpp 0.25 --share 0.5
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
from PIL import Image
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
    share: float = 0.5,
    tissue: Pixels | None = None,
) -> Path:
    """Write a JPEG slide of repeated tissue on white glass; return its path.

    The tissue fills an ellipse in the middle. Few tiles are distinct, each is encoded once, and so
    memory does not depend on the size, and time hardly.

    Args:
        path: file to write; `.svs` makes it Aperio's kind, anything else a plain pyramid.
        size: (width, height) in pixels.
        mpp: µm per pixel at level 0.
        levels: downsample of each level, powers of two up to 256.
        quality: of the JPEG tiles.
        share: of the tiles that hold tissue, 0 to 1.
        tissue: what to repeat, uint8 (n, n, 3) with n a power of two of at least 256; None =
            scikit-image's picture of stained colon.
    """
    width, height = size
    texture = immunohistochemistry() if tissue is None else tissue
    inside = tissue_tiles(-(-height // TILE), -(-width // TILE), share)
    is_aperio = path.suffix == ".svs"
    with tifffile.TiffWriter(path, bigtiff=width * height > 1 << 32) as file:
        for factor in levels:
            shape = (height // factor, width // factor, 3)
            file.write(
                _encoded_tiles(inside, box_mean(texture, factor), shape, factor, quality),
                shape=shape,
                dtype=np.uint8,
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                tile=(TILE, TILE),
                subfiletype=0 if factor == 1 or is_aperio else 1,
                description=_aperio_text(size, shape, mpp, quality) if is_aperio else None,
                metadata=None,
                **_resolution(mpp, factor),
            )
            if factor == 1 and is_aperio:  # its second page is always a thumbnail
                thumbnail = np.where(inside[..., None], texture.mean((0, 1)), WHITE)
                file.write(thumbnail.astype(np.uint8), photometric="rgb", metadata=None)
    return path


def read_tissue(path: Path, reduce: int = 1) -> Pixels:
    """Read the largest square of a picture that `write_big_slide` can repeat; return it.

    Args:
        path: any picture of tissue and nothing else.
        reduce: how many of its pixels become one, along each axis.
    """
    pixels = box_mean(np.asarray(Image.open(path).convert("RGB")), reduce)
    side = 1 << (min(pixels.shape[:2]).bit_length() - 1)
    if side < TILE:
        raise SystemExit(f"{path}: {pixels.shape[:2]} px after reduction; at least {TILE} wanted")
    return np.ascontiguousarray(pixels[:side, :side])


def _resolution(mpp: float | None, factor: int) -> dict[str, object]:
    if mpp is None:
        return {"resolutionunit": "NONE"}
    return {"resolution": (1e4 / (mpp * factor),) * 2, "resolutionunit": "CENTIMETER"}


def _aperio_text(size: tuple[int, int], shape: tuple[int, ...], mpp: float, quality: int) -> str:
    """Return what Aperio writes into a level's description, as far as readers need it."""
    width, height = size
    target = "" if shape[:2] == (height, width) else f" -> {shape[1]}x{shape[0]}"
    return (
        f"Aperio Image Library v12.0.0\r\n{width}x{height} [0,0 {width}x{height}] "
        f"({TILE}x{TILE}){target} JPEG/RGB Q={quality}|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
    )


def tissue_tiles(rows: int, columns: int, share: float = 0.5) -> npt.NDArray[np.bool_]:
    """Return which level-0 tiles are tissue: the share of them that is nearest to the middle."""
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in (rows, columns))
    distance = y[:, None] ** 2 + x[None] ** 2
    return distance <= np.quantile(distance, share)


def _encoded_tiles(
    tissue: npt.NDArray[np.bool_],
    texture: Pixels,
    shape: tuple[int, ...],
    factor: int,
    quality: int,
) -> Iterator[bytes]:
    """Yield the JPEG tiles of one level, row-major; equal tiles are encoded once."""
    period = max(1, len(texture) // TILE)  # the texture repeats after so many tiles
    repeats = max(1, 2 * TILE // len(texture))

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
    parser.add_argument("--mpp", type=float, default=0.25, help="0.5 is 20×, 0.25 is 40×")
    parser.add_argument("--levels", type=int, nargs="+", default=(1, 4, 16))
    parser.add_argument("--share", type=float, default=0.5, help="of the area that is tissue")
    parser.add_argument("--tissue", type=Path, help="picture of tissue to repeat")
    parser.add_argument("--reduce", type=int, default=1, help="pixels of it that become one")
    args = parser.parse_args()
    write_big_slide(
        args.path,
        tuple(args.size),
        args.mpp,
        levels=args.levels,
        share=args.share,
        tissue=args.tissue and read_tissue(args.tissue, args.reduce),
    )


if __name__ == "__main__":
    main()
