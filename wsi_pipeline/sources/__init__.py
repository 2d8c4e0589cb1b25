"""Where pixels come from: slides and stored patch grids, opened by path."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, get_args

from wsi_pipeline.errors import MissingMppError, SourceError, StoreError, raised_as
from wsi_pipeline.files.paths import as_path, is_remote
from wsi_pipeline.options import Icc
from wsi_pipeline.patch_grid import is_patch_grid
from wsi_pipeline.sources.base import Backend, sampled_digest, turned_doubts
from wsi_pipeline.sources.brightfield import why_not_brightfield
from wsi_pipeline.sources.icc import in_srgb
from wsi_pipeline.sources.mpp import best_mpp, doubts, read_mpp
from wsi_pipeline.sources.open import open_slide_file
from wsi_pipeline.sources.patch_grid_reader import StoredBackend
from wsi_pipeline.sources.slide import Slide
from wsi_pipeline.sources.view import SlideView

__all__ = ["Slide", "SlideView", "open_source", "why_not_brightfield"]


def open_source(
    path: str | Path, *, mpp: float | None = None, series: int | None = None, icc: Icc = "ignore"
) -> Slide:
    """Open a slide, or a patch grid written by `tile`; return it.

    Args:
        path: The slide's file, the folder of a patch grid, OME-Zarr or DICOM slide, or a URL.
        mpp: µm per level-0 pixel along both axes, in place of what the file says.
        series: Which image of a file with several, from 0; None = the largest of RGB.
        icc: "apply" brings all pixels to sRGB by the file's ICC profile.

    Raises:
        SourceError: the file cannot be opened, or the profile to be applied not be used.
        UnreachableError: its server does not answer, or lets nobody in.
        MissingMppError: it does not say how large a pixel is, and `mpp` is not given.
    """
    if mpp is not None and not 0 < mpp < math.inf:
        raise ValueError(f"mpp is {mpp}; expected µm per pixel above 0")
    if icc not in get_args(Icc):
        raise ValueError(f"icc is {icc!r}; expected one of {', '.join(get_args(Icc))}")
    path = as_path(path)
    is_grid = not is_remote(path) and is_patch_grid(path)
    with raised_as(SourceError, StoreError):
        pixels: Backend = StoredBackend(path) if is_grid else open_slide_file(path, series)
    # A stored grid goes by the fingerprint of the slide whose pixels it holds.
    stored = pixels.info if isinstance(pixels, StoredBackend) else None
    told: str = stored.fingerprint if stored else getattr(pixels, "fingerprint", "")
    try:
        if icc == "apply":
            pixels = in_srgb(pixels, path)
        scale, mpp_source = _scale(path, pixels, mpp)
        fingerprint = told or _fingerprint(path)
    except BaseException:
        pixels.close()
        raise
    return Slide(
        path=path,
        mpp=scale,
        mpp_source=mpp_source,
        fingerprint=fingerprint,
        first_doubts=(
            *doubts(read_mpp(pixels.properties), scale, mpp_source),
            *turned_doubts(
                pixels.properties.get("tiff.Orientation"),
                "pixels and polygons follow the order in which it is stored, as viewers of slides "
                "show it",
            ),
            *pixels.doubts,
        ),
        stored_mpp=None if stored is None else stored.grid_mpp,
        pixels=pixels,
    )


def _scale(path: Path, pixels: Backend, mpp: float | None) -> tuple[tuple[float, float], str]:
    """Return (x, y) µm per level-0 pixel, and where they come from."""
    if mpp is not None:
        return (mpp, mpp), "--mpp"
    readings = read_mpp(pixels.properties)
    best = best_mpp(readings)
    if best is None:
        doubts = "; ".join(
            f"{reading.source}: {reading.mpp[0]:.6g} × {reading.mpp[1]:.6g}, {reading.doubt}"
            for reading in readings
        )
        raise MissingMppError(
            f"{path}: does not say how many µm a pixel has{f' ({doubts})' if doubts else ''}; "
            "give the slide's µm per pixel with --mpp"
        )
    return best.mpp, best.source


def _fingerprint(path: Path) -> str:
    """Return a digest of the content, cheap for a file of any size.

    MRXS keeps most in the files of a folder named like the slide; their names and sizes take part,
    as do those of all files where the slide is a folder, and what zarr's metadata says.
    """
    if not path.is_file():
        remote: Any = path
        if is_remote(path):
            root = remote.path.rstrip("/")
            found = remote.fs.find(root, detail=True).items()
            files = [(name.removeprefix(root).lstrip("/"), entry["size"]) for name, entry in found]
        else:
            below = (file for file in path.rglob("*") if file.is_file())
            files = [(file.relative_to(path).as_posix(), file.stat().st_size) for file in below]
        digest = hashlib.sha256()
        for name, size in sorted(files):
            digest.update(f"{name} {size}\n".encode())
            if name.rpartition("/")[2] in (".zattrs", ".zarray", "zarr.json"):
                digest.update((path / name).read_bytes())
        return digest.hexdigest()
    digest = sampled_digest(path)
    if path.suffix.lower() == ".mrxs" and not is_remote(path):
        # Nothing else there is the slide's: its run may have a folder of the same name.
        for other in sorted(path.with_suffix("").glob("*")):
            if other.suffix.lower() in (".dat", ".ini"):
                digest.update(f"{other.name} {other.stat().st_size}\n".encode())
    return digest.hexdigest()
