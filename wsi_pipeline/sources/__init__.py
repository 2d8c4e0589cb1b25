"""Where pixels come from: slides and stored patch grids, opened by path."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from wsi_pipeline.errors import MissingMppError, SourceError, StoreError
from wsi_pipeline.sources.mpp import best_mpp, read_mpp
from wsi_pipeline.sources.slide import Backend, open_slide_file
from wsi_pipeline.sources.stored import StoredBackend
from wsi_pipeline.sources.view import Slide, SlideView
from wsi_pipeline.store import is_patch_grid

__all__ = ["Slide", "SlideView", "open_source"]

SAMPLE = 1 << 18
"""Bytes read at the head, the middle and the tail of a file for its fingerprint."""


def open_source(path: str | Path, *, mpp: float | None = None) -> Slide:
    """Open a slide, or a patch grid written by `tile`; return it.

    Args:
        path: of the slide's file, or of the patch grid's folder.
        mpp: µm per level-0 pixel along both axes, in place of what the file says.

    Raises:
        SourceError: the file cannot be opened.
        MissingMppError: it does not say how large a pixel is, and `mpp` is not given.
    """
    if mpp is not None and not 0 < mpp < math.inf:
        raise ValueError(f"mpp is {mpp}; expected µm per pixel above 0")
    path = Path(path)
    pixels = _open_backend(path)
    stored = pixels.info if isinstance(pixels, StoredBackend) else None
    try:
        scale, mpp_source = _scale(path, pixels, mpp)
    except MissingMppError:
        pixels.close()
        raise
    return Slide(
        path=path,
        mpp=scale,
        mpp_source=mpp_source,
        fingerprint=_fingerprint(path) if stored is None else stored.fingerprint,
        stored_mpp=None if stored is None else stored.grid_mpp,
        pixels=pixels,
    )


def _open_backend(path: Path) -> Backend:
    try:
        if is_patch_grid(path):
            return StoredBackend(path)
        return open_slide_file(path)
    except StoreError as error:
        raise SourceError(str(error)) from error


def _scale(path: Path, pixels: Backend, mpp: float | None) -> tuple[tuple[float, float], str]:
    """Return (x, y) µm per level-0 pixel, and where they come from."""
    if mpp is not None:
        return (mpp, mpp), "--mpp"
    readings = read_mpp(pixels.properties)
    best = best_mpp(readings)
    if best is None:
        doubts = "; ".join(f"{reading.source}: {reading.doubt}" for reading in readings)
        raise MissingMppError(
            f"{path}: does not say how many µm a pixel has{f' ({doubts})' if doubts else ''}; "
            "give the slide's µm per pixel with --mpp"
        )
    return best.mpp, best.source


def _fingerprint(path: Path) -> str:
    """Return a digest of the content, cheap for a file of any size.

    Formats of several files keep the others in a folder named like the slide; their names and
    sizes take part.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
            file.seek(offset)
            digest.update(file.read(SAMPLE))
    companions = path.with_suffix("")
    if companions != path and companions.is_dir():
        for other in sorted(companions.rglob("*")):
            if other.is_file():
                name = other.relative_to(companions).as_posix()
                digest.update(f"{name} {other.stat().st_size}\n".encode())
    return digest.hexdigest()
