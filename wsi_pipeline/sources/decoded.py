"""Pictures that must be decoded from their first row to their last: once, into memory or a file."""

from __future__ import annotations

import math
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.paths import is_remote, name_of
from wsi_pipeline.files.threads import quiet_gdal
from wsi_pipeline.sources.base import Alpha, Downsamples, Pixels, Sizes, as_rgb, check_size, reading

IN_MEMORY = 1 << 28
"""Decoded bytes up to which a picture stays in memory; larger ones lie in a temporary file."""
BAND = 1 << 25
"""Bytes decoded at once."""
DENSEST = 1100
"""Decoded bytes for a stored one: what deflate comes to at most, and JPEG never."""
PNG_BITS = 24
"""Where a PNG says how many bits a sample has: Pillow cuts 16 down to 8 without a word."""
OPENERS: Mapping[str, Callable[..., ImageFile]] = {"JPEG": JpegImageFile, "PNG": PngImageFile}
"""Pillow's reader of each. `Image.open` warns of large pictures, which are bounded here."""
GDAL = {
    # No files beside a picture are looked at.
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # A truncated picture is no picture; the optimisation is silent on one.
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "YES",
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",
    "GDAL_CACHEMAX": 64 << 20,
}


@dataclass(eq=False)
class Spool:
    """The pixels of one picture, decoded in order when they are first asked for.

    A picture that does not fit in memory is decoded band by band into a temporary file, which is
    gone with the object.

    Attributes:
        directory: Offset of a TIFF's directory, 0 in other files.
    """

    path: Path
    size: tuple[int, int]
    driver: str
    directory: int = 0
    alpha: Alpha = "straight"
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _pixels: Pixels | None = field(default=None, init=False)

    def read(self, x: int, y: int, width: int, height: int) -> Pixels:
        """Return a rectangle, uint8 (height, width, 3)."""
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decoded()
        return np.array(self._pixels[y : y + height, x : x + width])

    def close(self) -> None:
        """Give memory or file back."""
        self._pixels = None

    def _decoded(self) -> Pixels:
        width, height = self.size
        rows = max(1, BAND // (width * 3))
        with ExitStack() as closing:
            path = self.path
            if is_remote(path):
                # GDAL opens local files.
                remote: Any = path
                path = Path(closing.enter_context(tempfile.TemporaryDirectory())) / name_of(path)
                remote.fs.get_file(remote.path, str(path))
            dataset = closing.enter_context(opened(path, self.driver, self.directory))
            if (dataset.width, dataset.height) != self.size:
                raise ValueError(f"{dataset.width} × {dataset.height} px, {self.size} expected")
            if set(dataset.dtypes) != {"uint8"} or dataset.count not in (1, 3, 4):
                raise ValueError(f"{dataset.count} bands of {dataset.dtypes[0]}")
            windows = (((a, min(a + rows, height)), (0, width)) for a in range(0, height, rows))
            read = (np.moveaxis(dataset.read(window=window), 0, -1) for window in windows)
            bands = (as_rgb(band, self.alpha) for band in read)
            if width * height * 3 <= IN_MEMORY:
                pixels, top = np.empty((height, width, 3), np.uint8), 0
                for band in bands:
                    pixels[top : top + len(band)] = band
                    top += len(band)
                return pixels
            with tempfile.TemporaryFile() as file:
                for band in bands:
                    file.write(band.tobytes())
                file.flush()
                return np.memmap(file, np.uint8, "r", shape=(height, width, 3))


class PictureBackend:
    """A JPEG or PNG: one level, no tiles."""

    name = "gdal"
    doubts: tuple[str, ...] = ()

    def __init__(self, path: Path, driver: str) -> None:
        self._path = path
        try:
            with (
                warnings.catch_warnings(action="ignore"),
                path.open("rb") as file,
                OPENERS[driver](file) as image,
            ):
                self.size = image.size
                mode, dpi = image.mode, image.info.get("dpi")
                self._profile = bytes(image.info.get("icc_profile") or b"")
                file.seek(PNG_BITS)
                deep = driver == "PNG" and file.read(1) == b"\x10"
                # In a PNG it may stand after the pixels, all of which would be decoded for it.
                orientation: Any = 1
                if driver == "JPEG":
                    with suppress(Exception):
                        # Pillow raises anything on damaged EXIF.
                        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except SyntaxError as error:
            raise SourceError(
                f"begins like a {driver}, but is none that is read; save it as a tiled TIFF"
            ) from error
        check_size(self.size)
        if deep or mode not in ("RGB", "RGBA", "L"):
            found = f"mode {mode}, 16 bits" if deep else f"mode {mode}"
            raise SourceError(f"a {driver} of {found}; expected RGB or grey, 8 bits")
        decoded, stored = math.prod(self.size) * 3, path.stat().st_size
        if decoded > max(IN_MEMORY, DENSEST * stored):
            raise SourceError(f"its header says {decoded:,} bytes, which {stored:,} cannot hold")
        self.level_sizes: Sizes = (self.size,)
        self.level_downsamples: Downsamples = ((1.0, 1.0),)
        self.level_tiles: Sizes = (self.size,)
        properties = {"tiff.Compression": driver, "tiff.Orientation": str(orientation)}
        if dpi and min(dpi) > 0:
            sizes = (str(25400 / float(value)) for value in dpi)
            properties |= zip(("picture.mpp-x", "picture.mpp-y"), sizes, strict=True)
        self.properties: Mapping[str, str] = properties
        self._spool = Spool(path, self.size, driver=driver)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle of the picture; return uint8 (height, width, 3)."""
        with reading(self._path, level, x, y, width, height):
            return self._spool.read(x, y, width, height)

    def icc_profile(self) -> bytes:
        """Return the ICC profile of the picture, b"" where there is none."""
        return self._profile

    def close(self) -> None:
        """Give the picture back."""
        self._spool.close()


@contextmanager
def opened(path: Path, driver: str, directory: int = 0) -> Iterator[Any]:
    """Yield GDAL's data set of a picture, or of one directory of a TIFF, by its offset."""
    import rasterio

    name = f"GTIFF_DIR:off:{directory}:{path}" if directory else str(path)
    with rasterio.Env(**GDAL), open_raster(name, driver) as dataset:
        yield dataset


def open_raster(path: str | Path, driver: str) -> Any:
    """Open a picture that lies nowhere on Earth; return GDAL's data set.

    Args:
        driver: the only one that is tried, as some open what a file names.
    """
    # It brings GDAL: half of the time to import this package.
    import rasterio

    with quiet_gdal():
        return rasterio.open(path, driver=driver)
