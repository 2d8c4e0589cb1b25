"""OME-Zarr slides, 0.1 to 0.5: a folder, a zip of one, or a URL."""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync
from zarr.storage import ZipStore

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.arrays import MAX_CHUNK, SLACK, trusted
from wsi_pipeline.files.ngff import is_zarr_url, ome_of, scales_of
from wsi_pipeline.files.paths import is_remote, name_of
from wsi_pipeline.sources.base import (
    MAX_PIECE,
    Downsample,
    Pixels,
    Sizes,
    as_rgb,
    check_size,
    one_line,
    reading,
    relative_to_first,
    stated_downsamples,
)
from wsi_pipeline.sources.brightfield import are_rgb
from wsi_pipeline.sources.mpp import measured

LARGE = 1 << 22
"""Bytes of a chunk above which each is read by itself."""
PACKED = MAX_CHUNK + SLACK
"""Bytes that a packed entry of a zip may come to."""
VERSIONS = ("0.1", "0.2", "0.3", "0.4", "0.5")
WRONG = AttributeError, IndexError, KeyError, TypeError, ValueError
"""What reading metadata raises that are not as they should be: what is said wrongly is not said."""


class OmeZarrBackend:
    """A multiscale image of RGB or grey pixels."""

    name = "zarr"

    def __init__(self, path: Path, series: int | None = None) -> None:
        self._path = path
        self._closing = ExitStack()
        try:
            store, root = _open_store(path, self._closing)
            group, multiscale = _choose_image(store, root, series)
            self._axes = _axes(multiscale)
            # Level 0 is the largest, whichever stands first.
            multiscale["datasets"].sort(key=lambda d: -math.prod(group[str(d["path"])].shape))
            levels = [group[str(dataset["path"])] for dataset in multiscale["datasets"]]
            if not levels:
                raise SourceError("a damaged OME-Zarr: it lists no arrays")
            for level in levels:
                _check_array(level, self._axes)
            self._levels = [trusted(level) for level in levels]
        except Exception as error:
            # Metadata may be anything.
            self._closing.close()
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"a damaged OME-Zarr: {one_line(error)}") from error
        x, y = self._axes.index("x"), self._axes.index("y")
        self.level_sizes: Sizes = tuple((each.shape[x], each.shape[y]) for each in self._levels)
        self.size = self.level_sizes[0]
        self.level_tiles: Sizes = tuple((each.chunks[x], each.chunks[y]) for each in self._levels)
        scales = [_scale(dataset, x, y) for dataset in multiscale["datasets"]]
        self.level_downsamples = stated_downsamples(
            self.size, self.level_sizes, self.level_tiles, relative_to_first(scales)
        )
        samples = self._levels[0].shape[self._axes.index("c")] if "c" in self._axes else 1
        fill = np.full((1, 1, samples), self._levels[0].fill_value or 0, np.uint8)
        self.blank = int(as_rgb(fill).max())
        self.properties: Mapping[str, str] = _mpp(multiscale, x, y)
        if colours := _colours(group):
            self.properties = {**self.properties, "ome-zarr.colors": ",".join(colours)}
        self.doubts: tuple[str, ...] = ()
        if samples == 4:
            self.doubts = ("it has a fourth channel, which is left out",)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3)."""
        where = {"x": slice(x, x + width), "y": slice(y, y + height), "c": slice(None)}
        with reading(self._path, level, x, y, width, height):
            samples = self._read(level, where)
        left = [axis for axis in self._axes if axis in where]
        samples = samples.reshape(*samples.shape, *([1] if "c" not in left else []))
        left += [] if "c" in left else ["c"]
        return as_rgb(np.transpose(samples, [left.index(axis) for axis in "yxc"]))

    def holds(self, level: int, column: int, row: int) -> bool:
        """Return whether a chunk was written."""
        array = self._levels[level]
        stored = array.shards or array.chunks
        place = {"x": column, "y": row}
        where = [
            place.get(axis, 0) * chunk // side
            for axis, chunk, side in zip(self._axes, array.chunks, stored, strict=True)
        ]
        key = array.metadata.encode_chunk_key(tuple(where))
        return bool(sync((array.store_path / key).exists()))

    def close(self) -> None:
        """Give the file back."""
        self._closing.close()

    def _read(self, level: int, where: Mapping[str, slice]) -> Pixels:
        array = self._levels[level]
        # Of several large chunks zarr would unpack all at once: they are read one by one.
        for axis in ("y", "x") if math.prod(array.chunks) > LARGE else ():
            span, side = where[axis], array.chunks[self._axes.index(axis)]
            cuts = [*range(span.start // side * side + side, span.stop, side), span.stop]
            if len(cuts) > 1:
                kept = [name for name in self._axes if name in where]
                pieces = itertools.starmap(slice, itertools.pairwise([span.start, *cuts]))
                read = [self._read(level, {**where, axis: piece}) for piece in pieces]
                return np.concatenate(read, axis=kept.index(axis))
        index = tuple(where.get(axis, 0) for axis in self._axes)
        try:
            return np.asarray(array[index])
        except OSError:
            # A network's hiccup: each read opens the chunks anew.
            return np.asarray(array[index])


def _open_store(path: Path, closing: ExitStack) -> tuple[Any, str]:
    """Return what zarr opens, and where in it the image is."""
    if is_zarr_url(path) if is_remote(path) else path.is_dir():
        return str(path), ""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    # Packed entries may come to more than the file has bytes.
    most = {zipfile.ZIP_STORED: MAX_PIECE}
    if not entries or any(e.file_size > most.get(e.compress_type, PACKED) for e in entries):
        raise SourceError("a zip, but not of an OME-Zarr with chunks that fit in memory")
    names = [entry.filename for entry in entries]
    groups = [n.rpartition("/")[0] for n in names if n.endswith((".zgroup", "zarr.json"))]
    store = ZipStore(Path(name_of(path)) if is_remote(path) else path, read_only=True)
    if is_remote(path):
        # zipfile, to which the store hands its path, takes an open file as well.
        store.path = closing.enter_context(path.open("rb"))  # type: ignore[assignment]
    closing.callback(store.close)
    return store, min(groups, key=len, default="")


def _axes(multiscale: dict[str, Any]) -> list[str]:
    """Return the names of the axes; that of the samples is c, whatever it is called."""
    # These five before 0.3, bare names in 0.3.
    axes = multiscale.get("axes", "tczyx")
    named = [{"name": axis} if isinstance(axis, str) else axis for axis in axes]
    return ["c" if axis.get("type") == "channel" else str(axis["name"]) for axis in named]


def _choose_image(store: Any, root_path: str, wanted: int | None) -> tuple[Any, dict[str, Any]]:
    """Return the group of one image, the largest in colours unless one is wanted, and its metadata.

    An image that is not read here is chosen too, and refused: not the thumbnail beside it.
    """
    root = zarr.open_group(store, path=root_path or None, mode="r")
    images = _images(root)
    if not images:
        try:
            names = [str(name) for name in ome_of(root["OME"].attrs.asdict())["series"]]
        except KeyError:
            found = [name for name, _ in root.groups()]
            names = sorted(found, key=lambda n: (int(n) if n.isdigit() else 1 << 30, n))
        several = [_images(root[name]) for name in names]
        images = [max(each, key=lambda image: _area(*image)) for each in several if each]
    if not images:
        raise SourceError("a zarr without multiscales; expected an OME-Zarr image")
    if wanted is not None:
        if not 0 <= wanted < len(images):
            numbers = f"series 0 to {len(images) - 1}" if len(images) > 1 else "one series, 0"
            raise SourceError(f"has {numbers}, not {wanted}; change --series")
        return images[wanted]
    return max(images, key=lambda image: _area(*image))


def _images(group: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return a group with what it says of each of its images, of one or more resolutions."""
    attributes = ome_of(group.attrs.asdict())
    found: list[dict[str, Any]] = attributes.get("multiscales") or []
    for multiscale in found:
        version = str(multiscale.get("version") or attributes.get("version") or VERSIONS[-1])
        if not version.startswith(VERSIONS):
            raise SourceError(
                f"OME-Zarr {version} is not read; expected {VERSIONS[0]} to {VERSIONS[-1]}; "
                "save it as OME-Zarr 0.5"
            )
    return [(group, multiscale) for multiscale in found]


def _area(group: Any, multiscale: dict[str, Any]) -> tuple[bool, int]:
    """Return whether an image is in colours, and how many pixels it has."""
    try:
        shapes = [group[str(dataset["path"])].shape for dataset in multiscale["datasets"]]
        shape = dict(zip(_axes(multiscale), max(shapes, key=math.prod), strict=True))
        is_colour = shape.get("c") in (3, 4) and are_rgb(_colours(group))
        return is_colour, shape["x"] * shape["y"]
    except Exception:
        # Metadata may be anything.
        return False, 0


def _colours(group: Any) -> list[str]:
    """Return the colours in which a group's channels are to be shown, where it says."""
    with suppress(*WRONG):
        omero = ome_of(group.attrs.asdict()).get("omero") or {}
        return [str(channel.get("color", "")).upper() for channel in omero.get("channels", ())]
    return []


def _check_array(array: Any, axes: list[str]) -> None:
    """Refuse what is not one plane of 8-bit RGB or grey."""
    if not isinstance(array, zarr.Array) or len(axes) != array.ndim:
        raise SourceError("a damaged OME-Zarr: its axes do not fit its arrays")
    shape = dict(zip(axes, array.shape, strict=True))
    if not {"x", "y"} <= set(axes) or array.dtype != np.uint8 or shape.get("c", 1) not in (1, 3, 4):
        raise SourceError(
            f"an OME-Zarr of {array.dtype}, {'×'.join(f'{n} {a}' for a, n in shape.items())}; "
            "expected 8-bit RGB or grey"
        )
    if any(length != 1 for axis, length in shape.items() if axis not in "xyc"):
        raise SourceError(f"an OME-Zarr of several planes ({shape}); expected one")
    check_size((shape["x"], shape["y"]))


def _scale(dataset: dict[str, Any], x: int, y: int) -> Downsample | None:
    """Return the (x, y) scale of one level, None where it says nothing."""
    with suppress(*WRONG):
        (scale,) = scales_of(dataset)
        pair = (float(scale[x]), float(scale[y]))
        return pair if all(0 < value < math.inf for value in pair) else None
    return None


def _mpp(multiscale: dict[str, Any], x: int, y: int) -> dict[str, str]:
    """Return the properties that say how large a pixel of level 0 is, where the metadata do."""
    with suppress(*WRONG):
        units = [axis.get("unit") for axis in multiscale["axes"]]
        if scales := scales_of(multiscale["datasets"][0]) + scales_of(multiscale):
            sizes = [math.prod(float(scale[index]) for scale in scales) for index in (x, y)]
            return measured("OME-Zarr", sizes, [units[x], units[y]])
    return {}
