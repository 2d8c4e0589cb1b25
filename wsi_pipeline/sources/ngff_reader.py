"""OME-Zarr slides, 0.1 to 0.5: a folder, a zip of one, or a URL."""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync
from zarr.storage import ZipStore

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.arrays import MAX_CHUNK, SLACK, trusted
from wsi_pipeline.files.paths import is_remote, is_zarr_url, name_of
from wsi_pipeline.sources.base import (
    MAX_PIECE,
    Downsample,
    Pixels,
    Sizes,
    as_rgb,
    check_size,
    one_line,
    stated_downsamples,
    unreadable,
)
from wsi_pipeline.sources.brightfield import are_rgb
from wsi_pipeline.sources.mpp import measured

LARGE = 1 << 22
"""Bytes of a chunk above which each is read by itself."""

VERSIONS = ("0.1", "0.2", "0.3", "0.4", "0.5")


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
            # level 0 is the largest, whichever stands first
            multiscale["datasets"].sort(key=lambda d: -math.prod(group[str(d["path"])].shape))
            levels = [group[str(dataset["path"])] for dataset in multiscale["datasets"]]
            if not levels:
                raise SourceError("a damaged OME-Zarr: it lists no arrays")
            for level in levels:
                _check_array(level, self._axes)
            self._levels = [trusted(level) for level in levels]
        except Exception as error:  # metadata may be anything
            self._closing.close()
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"a damaged OME-Zarr: {one_line(error)}") from error
        x, y = self._axes.index("x"), self._axes.index("y")
        self.level_sizes: Sizes = tuple((level.shape[x], level.shape[y]) for level in self._levels)
        self.size = self.level_sizes[0]
        self.level_tiles: Sizes = tuple(
            (level.chunks[x], level.chunks[y]) for level in self._levels
        )
        self.level_downsamples = stated_downsamples(
            self.size, self.level_sizes, self.level_tiles, _stated(multiscale, x, y)
        )
        samples = self._levels[0].shape[self._axes.index("c")] if "c" in self._axes else 1
        fill = np.full((1, 1, samples), self._levels[0].fill_value or 0, np.uint8)
        self.blank = int(as_rgb(fill).max())
        self.properties: Mapping[str, str] = _properties(multiscale, group, self._axes)
        self.doubts: tuple[str, ...] = ()
        if samples == 4:
            self.doubts = ("it has a fourth channel, which is left out",)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a rectangle that lies inside a level; return uint8 (height, width, 3)."""
        where = {"x": slice(x, x + width), "y": slice(y, y + height), "c": slice(None)}
        try:
            samples = self._read(level, where)
        except Exception as error:  # codecs raise anything on damaged chunks
            raise unreadable(self._path, error, level, x, y, width, height) from error
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
        for axis in ("y", "x") if math.prod(array.chunks) > LARGE else ():
            # one chunk after the other: zarr would unpack all of them at once
            pieces = _pieces(where[axis], array.chunks[self._axes.index(axis)])
            if len(pieces) > 1:
                kept = [name for name in self._axes if name in where]
                read = [self._read(level, {**where, axis: piece}) for piece in pieces]
                return np.concatenate(read, axis=kept.index(axis))
        index = tuple(where.get(axis, 0) for axis in self._axes)
        try:
            return np.asarray(array[index])
        except OSError:  # a network's hiccup; each read opens the chunks anew
            return np.asarray(array[index])


def _pieces(span: slice, side: int) -> list[slice]:
    """Return what lies of a span in each chunk.

    Example:
        >>> _pieces(slice(5, 21), 10)
        [slice(5, 10, None), slice(10, 20, None), slice(20, 21, None)]
    """
    cuts = [span.start, *range(span.start // side * side + side, span.stop, side), span.stop]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def _open_store(path: Path, closing: ExitStack) -> tuple[Any, str]:
    """Return what zarr opens, and where in it the image is."""
    if is_zarr_url(path) if is_remote(path) else path.is_dir():
        return str(path), ""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if not entries or any(entry.file_size > _most(entry) for entry in entries):
        raise SourceError("a zip, but not of an OME-Zarr with chunks that fit in memory")
    groups = [
        entry.filename.rpartition("/")[0]
        for entry in entries
        if entry.filename.endswith((".zgroup", "zarr.json"))
    ]
    return _zip_store(path, closing), min(groups, key=len, default="")


def _most(entry: zipfile.ZipInfo) -> int:
    """Return how many bytes an entry may have: those of packed ones need not be in the file."""
    return MAX_PIECE if entry.compress_type == zipfile.ZIP_STORED else MAX_CHUNK + SLACK


def _zip_store(path: Path, closing: ExitStack) -> Any:
    store = ZipStore(Path(name_of(path)) if is_remote(path) else path, read_only=True)
    if is_remote(path):
        # zipfile, to which the store hands its path, takes an open file as well
        store.path = closing.enter_context(path.open("rb"))  # type: ignore[assignment]
    closing.callback(store.close)
    return store


def _axes(multiscale: dict[str, Any]) -> list[str]:
    """Return the names of the axes; that of the samples is c, whatever it is called."""
    axes = multiscale.get("axes", "tczyx")  # these five before 0.3, bare names in 0.3
    named = [{"name": axis} if isinstance(axis, str) else axis for axis in axes]
    return ["c" if axis.get("type") == "channel" else str(axis["name"]) for axis in named]


def _choose_image(store: Any, root_path: str, wanted: int | None) -> tuple[Any, dict[str, Any]]:
    """Return the group of one image, the largest in colours unless one is wanted, and its metadata.

    An image that is not read here is chosen too, and refused: not the thumbnail beside it.
    """
    root = zarr.open_group(store, path=root_path or None, mode="r")
    images = [(root, multiscale) for multiscale in _multiscales(root)]
    if not images:
        several = [(group, _multiscales(group)) for group in _iter_groups(root)]
        images = [
            (group, max(found, key=lambda m: _area(group, m))) for group, found in several if found
        ]
    if not images:
        raise SourceError("a zarr without multiscales; expected an OME-Zarr image")
    if wanted is not None:
        if not 0 <= wanted < len(images):
            numbers = f"series 0 to {len(images) - 1}" if len(images) > 1 else "one series, 0"
            raise SourceError(f"has {numbers}, not {wanted}; change --series")
        return images[wanted]
    return max(images, key=lambda image: _area(*image))


def _iter_groups(root: Any) -> Iterator[Any]:
    """Yield the groups of a file of several images, in the order in which it counts them."""
    try:
        attributes = dict(root["OME"].attrs)
        names = [str(name) for name in attributes.get("ome", attributes)["series"]]
    except KeyError:
        names = [name for name, _ in sorted(root.groups(), key=_number)]
    for name in names:
        yield root[name]


def _number(item: tuple[str, Any]) -> tuple[int, str]:
    return (int(item[0]) if item[0].isdigit() else 1 << 30), item[0]


def _multiscales(group: Any) -> list[dict[str, Any]]:
    """Return what a group says of its images, each of which has one or more resolutions."""
    attributes = dict(group.attrs)
    attributes = attributes.get("ome", attributes)
    found: list[dict[str, Any]] = attributes.get("multiscales") or []
    for multiscale in found:
        version = str(multiscale.get("version") or attributes.get("version") or VERSIONS[-1])
        if not version.startswith(VERSIONS):
            raise SourceError(
                f"OME-Zarr {version} is not read; expected {VERSIONS[0]} to {VERSIONS[-1]}; "
                "save it as OME-Zarr 0.5"
            )
    return found


def _area(group: Any, multiscale: dict[str, Any]) -> tuple[bool, int]:
    """Return whether an image is in colours, and how many pixels it has."""
    try:
        shapes = [group[str(dataset["path"])].shape for dataset in multiscale["datasets"]]
        shape = dict(zip(_axes(multiscale), max(shapes, key=math.prod), strict=True))
        is_colour = shape.get("c") in (3, 4) and are_rgb(_colours(group))
        return is_colour, shape["x"] * shape["y"]
    except Exception:  # metadata may be anything
        return False, 0


def _colours(group: Any) -> list[str]:
    """Return the colours in which a group's channels are to be shown, where it says."""
    attributes = dict(group.attrs)
    omero = attributes.get("ome", attributes).get("omero") or {}
    return [str(channel.get("color", "")).upper() for channel in omero.get("channels", ())]


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


def _stated(multiscale: dict[str, Any], x: int, y: int) -> list[Downsample | None]:
    """Return the (x, y) downsample of each level as its scale says, None where it says nothing."""
    scales: list[Downsample | None] = []
    for dataset in multiscale["datasets"]:
        try:
            (scale,) = (
                transform["scale"]
                for transform in dataset["coordinateTransformations"]
                if transform["type"] == "scale"
            )
            pair = (float(scale[x]), float(scale[y]))
        except (IndexError, KeyError, TypeError, ValueError):
            pair = (0.0, 0.0)
        scales.append(pair if all(0 < value < math.inf for value in pair) else None)
    first = scales[0]
    return [scale and first and (scale[0] / first[0], scale[1] / first[1]) for scale in scales]


def _properties(multiscale: dict[str, Any], group: Any, axes: list[str]) -> dict[str, str]:
    """Return µm per pixel and the colours of the channels, where the metadata says."""
    properties: dict[str, str] = {}
    wrong = AttributeError, IndexError, KeyError, TypeError, ValueError
    with suppress(*wrong):  # what is said wrongly is not said
        units = [axis.get("unit") for axis in multiscale["axes"]]
        lists = (multiscale["datasets"][0], multiscale)
        transforms = [t for m in lists for t in m.get("coordinateTransformations", ())]
        scales = [t["scale"] for t in transforms if t.get("type") == "scale"]
        x, y = axes.index("x"), axes.index("y")
        if scales:
            sizes = [math.prod(float(scale[index]) for scale in scales) for index in (x, y)]
            properties |= measured("OME-Zarr", sizes, [units[x], units[y]])
    with suppress(*wrong):
        if colours := _colours(group):
            properties["ome-zarr.colors"] = ",".join(colours)
    return properties
