"""Masks left on disk: pictures and OME-Zarr, read where they are sliced."""

from __future__ import annotations

import re
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import zarr
from PIL.PngImagePlugin import PngImageFile

from wsi_pipeline.errors import EvaluationError
from wsi_pipeline.evaluation.meaning import LabelMap, named
from wsi_pipeline.files.arrays import trusted
from wsi_pipeline.files.ngff import LABEL, MASK, first_scale, ome_of
from wsi_pipeline.sources.base import one_line
from wsi_pipeline.sources.decoded import GDAL, open_raster
from wsi_pipeline.sources.mpp import ome_mpp

Pair = tuple[float, float]
DRIVERS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP", b"GIF8": "GIF"}
"""GDAL's names of pictures by what they begin with; others are TIFF."""
LISTED_MEANING = re.compile(r"(?:^|, )(\d+) = ")
"""Before each class in the description of an OME-TIFF that this package wrote."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskFile:
    """A mask left on disk.

    Attributes:
        pixels: Its values, (h, w), read where they are sliced.
        values: What they mean.
        mpp: (x, y) µm per pixel, where the file says.
    """

    path: Path
    pixels: Any
    values: LabelMap
    mpp: Pair | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the classes that the mask may hold."""
        return tuple(self.values.classes)

    def read(self, window: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Return the values of a window.

        Raises:
            EvaluationError: they cannot be read, or are a picture's.
        """
        try:
            return np.asarray(self.pixels[window])
        except EvaluationError:
            raise
        # GDAL, zarr and their codecs raise anything
        except Exception as error:
            raise EvaluationError(
                f"{self.path}: its pixels cannot be read, damaged or cut off ({one_line(error)}); "
                "get it anew"
            ) from error


def read_mask(path: Path) -> npt.NDArray[Any]:
    """Read the values of a picture that is a mask; return all of them, (y, x).

    Raises:
        EvaluationError: none, or one that cannot be read.
    """
    # brings GDAL, and with it much of the time to import this package
    import rasterio

    with ExitStack() as closing:
        closing.enter_context(rasterio.Env(**GDAL))
        mask = open_picture(path, closing)
        height, width = mask.pixels.shape
        return mask.read((slice(0, height), slice(0, width)))


def open_ome_zarr(path: Path) -> MaskFile:
    """Open a mask of whole numbers, (y, x); return it, with names where it tells them.

    Raises:
        EvaluationError: no such mask.
    """
    try:
        group = zarr.open_group(path, mode="r")
        every: Any = group.attrs.asdict()
        attributes = ome_of(every)
        multiscale = attributes["multiscales"][0]
        pixels: Any = group[multiscale["datasets"][0]["path"]]
        pixels = trusted(pixels, pixels.dtype)
        scale = first_scale(every)[-2:]
        units = [axis.get("unit") for axis in multiscale["axes"]][-2:]
        shape, kind = pixels.shape, pixels.dtype.kind
    # metadata may be anything
    except Exception as error:
        raise EvaluationError(
            f"{path} is no run's folder and no OME-Zarr mask ({error})"
        ) from error
    if len(shape) != 2 or kind not in "ub":
        raise EvaluationError(
            f"{path} is {shape} of {pixels.dtype}; a mask has whole numbers, (y, x)"
        )
    entries = attributes.get(LABEL, {}).get("properties", [])
    names = {int(e["label-value"]): str(e["class"]) for e in entries if "class" in e}
    if MASK in every:
        names = dict(enumerate(map(str, every[MASK]["classes"])))
    mpp = (scale[1], scale[0]) if units == ["micrometer"] * 2 else None
    return MaskFile(path=path, pixels=pixels, values=named(names), mpp=mpp)


class _Picture:
    """One band of a PNG or TIFF, read where it is sliced."""

    def __init__(self, dataset: Any, path: Path) -> None:
        self._dataset = dataset
        self._path = path
        self._lock = threading.Lock()
        self.shape = (dataset.height, dataset.width)

    def __getitem__(self, key: tuple[slice, slice]) -> npt.NDArray[np.generic]:
        import rasterio

        window = tuple((part.start, part.stop) for part in key)
        # without one in this thread GDAL prints its warnings
        with self._lock, rasterio.Env():
            bands = self._dataset.read(window=window)
        # without the transparency
        colours = bands[: len(bands) - (len(bands) in (2, 4))]
        if any((colour != colours[0]).any() for colour in colours[1:]):
            raise EvaluationError(
                f"{self._path} is a picture in colour; a mask has one value a pixel"
            )
        return np.asarray(colours[0])


def open_picture(path: Path, closing: ExitStack) -> MaskFile:
    """Open a PNG or TIFF; return it as a mask, with names where an OME-TIFF tells them.

    Raises:
        EvaluationError: no picture of whole numbers, or damaged.
    """
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with path.open("rb") as file:
            head = file.read(4)
            driver = next((d for start, d in DRIVERS.items() if head.startswith(start)), "GTiff")
            file.seek(0)
            if driver == "PNG":
                # GDAL is silent on one that is cut off; this looks at checksums, decodes nothing
                PngImageFile(file).verify()
        closing.enter_context(rasterio.Env())
        dataset = closing.enter_context(open_raster(path, driver))
    except (RasterioError, OSError, SyntaxError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read as a mask: {error}") from error
    if dataset.count > 4 or any(np.dtype(d).kind not in "uif" for d in dataset.dtypes):
        raise EvaluationError(
            f"{path} has {dataset.count} bands of {dataset.dtypes[0]}; a mask has whole numbers"
        )
    names: dict[int, str] = {}
    mpp = None
    if driver == "GTiff":
        try:
            names, mpp = _read_ome_xml(path, (dataset.width, dataset.height))
        # damaged XML may hold anything
        except Exception as error:
            raise EvaluationError(
                f"{path} does not say what its values mean: its metadata are damaged ({error})"
            ) from error
    return MaskFile(path=path, pixels=_Picture(dataset, path), values=named(names), mpp=mpp)


def _read_ome_xml(path: Path, size: tuple[int, int]) -> tuple[dict[int, str], Pair | None]:
    """Return names by value and (x, y) µm per pixel, as far as an OME-TIFF tells them."""
    with tifffile.TiffFile(path) as file:
        xml = file.ome_metadata if file.is_ome else None
    if not xml:
        return {}, None
    found = ome_mpp(xml, ifd=0, size=size, name=path.name)
    mpp = tuple(float(found[k]) for k in ("ome.mpp-x", "ome.mpp-y") if k in found)
    described = tifffile.xml2dict(xml)["OME"]["Image"]
    described = described[0] if isinstance(described, list) else described
    words = LISTED_MEANING.split(str(described.get("Description", "")))
    names = {int(v): name for v, name in zip(words[1::2], words[2::2], strict=True)}
    return names if words[0] == "" else {}, (mpp[0], mpp[1]) if len(mpp) == 2 else None
