"""The two sides of a comparison: masks, runs and annotations, read as classes in one frame."""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tifffile
import zarr
from PIL.PngImagePlugin import PngImageFile

from wsi_pipeline.errors import EvaluationError, StoreError
from wsi_pipeline.evaluation.annotations import AreaReader, Areas, load_areas
from wsi_pipeline.evaluation.confusion import Mask
from wsi_pipeline.evaluation.meaning import Lookup, Values, named, settle
from wsi_pipeline.evaluation.volumes import open_labels
from wsi_pipeline.files.arrays import trusted
from wsi_pipeline.files.formats import is_dicom
from wsi_pipeline.files.ngff import LABEL, MASK, first_scale, ome_of
from wsi_pipeline.geometry import Region, iter_blocks
from wsi_pipeline.options import Frame
from wsi_pipeline.report.record import FILES, RUN_FILE, Run, load_run
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources import Slide
from wsi_pipeline.sources.decoded import GDAL
from wsi_pipeline.sources.mpp import ome_mpp

Pair = tuple[float, float]
MASK_SUFFIXES = (".png", ".tif", ".tiff")
DRIVERS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP", b"GIF8": "GIF"}
"""GDAL's names of pictures by what they begin with; others are TIFF."""
PART = 4096
"""Side of what is read at once of a mask that is refused, px."""
AREA_SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz")
LISTED_MEANING = re.compile(r"(?:^|, )(\d+) = ")
"""Before each class in the description of an OME-TIFF that this package wrote."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The slide that both sides are of.

    Attributes:
        size: (width, height) of level 0.
        mpp: (x, y) µm per level-0 pixel, where it is known.
        bounds: of the slide's content in level-0 pixels, where the file says.
    """

    size: tuple[int, int]
    mpp: Pair | None = None
    bounds: Region | None = None

    @classmethod
    def of(cls, slide: Slide) -> Canvas:
        """Return a slide's canvas."""
        return cls(size=slide.size, mpp=slide.mpp, bounds=slide.bounds)

    def offset(self, frame: Frame) -> tuple[int, int]:
        """Return (x, y) of a viewer's origin in level-0 pixels: QuPath crops to the bounds."""
        if frame == "openslide" or self.bounds is None:
            return 0, 0
        return self.bounds.x, self.bounds.y


class Pixels(Protocol):
    """A mask's stored values, to slice."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (h, w)."""

    def __getitem__(self, key: tuple[slice, slice], /) -> Any:
        """Return the values of two slices."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskFile:
    """A mask left on disk.

    Attributes:
        path: of the file or folder.
        pixels: its values.
        values: what they mean.
        mpp: (x, y) µm per pixel, where the file says.
    """

    path: Path
    pixels: Pixels
    values: Values
    mpp: Pair | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the classes that the mask may hold."""
        return tuple(self.values.classes)

    def read(self, window: tuple[slice, slice]) -> npt.NDArray[Any]:
        """Return the values of a window.

        Raises:
            EvaluationError: they cannot be read, or are a picture's.
        """
        try:
            return np.asarray(self.pixels[window])
        except EvaluationError:
            raise
        except Exception as error:  # GDAL, zarr and their codecs raise anything
            raise EvaluationError(
                f"{self.path}: its pixels cannot be read, damaged or cut off ({error}); get it anew"
            ) from error


def read_mask(path: Path) -> npt.NDArray[Any]:
    """Read the values of a picture that is a mask; return all of them, (y, x).

    Raises:
        EvaluationError: none, or one that cannot be read.
    """
    import rasterio  # brings GDAL

    with ExitStack() as closing:
        closing.enter_context(rasterio.Env(**GDAL))
        mask = _open_picture(path, closing)
        height, width = mask.pixels.shape
        return mask.read((slice(0, height), slice(0, width)))


@dataclass(frozen=True, kw_only=True)
class Placed:
    """How the pixels of a mask lie on the slide.

    Attributes:
        origin: (y, x) of the first pixel's corner, level-0 pixels.
        downsample: (y, x) level-0 pixels per pixel.
    """

    origin: Pair
    downsample: Pair


class MaskReader:
    """A mask as class indices, wherever they are asked for, at any resolution.

    Args:
        mask: left on disk.
        placed: where it lies.
        indices: class index by name; other classes are background.
    """

    def __init__(self, mask: MaskFile, placed: Placed, indices: Mapping[str, int]) -> None:
        self._mask = mask
        self._placed = placed
        self._lookup = Lookup(mask.path, mask.values, indices)

    def read(self, origin: tuple[int, int], shape: tuple[int, int], downsample: Pair) -> Mask:
        """Return the class index at the centre of each pixel, background beyond the mask.

        Args:
            origin: (y, x) of the first pixel.
            shape: (h, w) in pixels.
            downsample: (y, x) level-0 pixels per pixel.

        Raises:
            EvaluationError: the mask is damaged, or has values without a meaning.
        """
        axes = zip(
            origin,
            shape,
            downsample,
            self._placed.origin,
            self._placed.downsample,
            self._mask.pixels.shape,
            strict=True,
        )
        found = [_nearest(*axis) for axis in axes]
        result = np.zeros(shape, np.uint8)
        (rows, is_row), (columns, is_column) = found
        if not (len(rows) and len(columns)):
            return result
        top, left = int(rows[0]), int(columns[0])
        window = slice(top, int(rows[-1]) + 1), slice(left, int(columns[-1]) + 1)
        values = self._mask.read(window)
        if not (_is_run(rows) and _is_run(columns)):
            values = values[np.ix_(rows - top, columns - left)]
        pixels = self._mask.pixels
        parts = iter_blocks(pixels.shape, (PART, PART))
        whole = (self._mask.read((part.slices[0], part.slices[1])) for part in parts)
        result[is_row[0] : is_row[-1] + 1, is_column[0] : is_column[-1] + 1] = self._lookup(
            values, whole
        )
        return result


def _is_run(index: npt.NDArray[np.int64]) -> bool:
    """Return whether indices count up one by one."""
    return bool((np.diff(index) == 1).all())


def _nearest(
    first: int, count: int, downsample: float, start: float, own: float, length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the mask's pixels along an axis, ascending, and the pixels wanted they stand for."""
    centres = (np.arange(first, first + count) + 0.5) * downsample
    index = np.floor((centres - start) / own).astype(np.int64)
    # the mask's last pixel may end before the slide does, by rounding
    index[index == length] = length - 1
    inside = np.flatnonzero((index >= 0) & (index < length))
    return index[inside], inside


def place(mask: MaskFile, canvas: Canvas, frame: Frame) -> Placed:
    """Find out how a mask lies on its slide: over all of it, or over its bounds; return it.

    Args:
        mask: to be placed.
        canvas: the slide.
        frame: whose view of the slide a mask may be of.

    Raises:
        EvaluationError: its size fits neither at any resolution.
    """
    height, width = mask.pixels.shape
    parts = [(0, 0, *canvas.size)]
    if frame == "qupath" and canvas.bounds is not None:
        b = canvas.bounds
        parts.append((b.x, b.y, b.width, b.height))
    for x, y, full_width, full_height in parts:
        spans = _span(full_height, height), _span(full_width, width)
        if mask.mpp and canvas.mpp:
            told = mask.mpp[1] / canvas.mpp[1], mask.mpp[0] / canvas.mpp[0]
            if all(low < f < high for f, (low, high) in zip(told, spans, strict=True)):
                return Placed(origin=(y, x), downsample=told)
        low, high = max(low for low, _ in spans), min(high for _, high in spans)
        if low < high:
            whole = round(full_width / width)
            factor = whole if low < whole < high else min(max(full_width / width, low), high)
            return Placed(origin=(y, x), downsample=(factor, factor))
    wanted = " or ".join(f"{w} × {h}" for *_, w, h in parts)
    raise EvaluationError(
        f"{mask.path} is {width} × {height} px, which is no reduction of {wanted} px: "
        "it is of another slide, or cut; give the slide's own with --slide"
    )


def _span(full: int, length: int) -> Pair:
    """Return between which factors a length is reduced to another, rounded up or down."""
    return full / (length + 1), full / (length - 1) if length > 1 else math.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """A prediction or a truth, before it is known which classes are judged.

    Attributes:
        path: as given.
        content: a mask, or annotated areas.
        canvas: of the slide, where this side tells it.
    """

    path: Path
    content: MaskFile | Areas
    canvas: Canvas | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the classes that it may hold."""
        return self.content.names

    def frame(self, asked: Frame) -> Frame:
        """Return in whose frame it is: a run's own mask is of the whole slide in any."""
        return "openslide" if self.canvas else asked

    def downsample(self, canvas: Canvas, frame: Frame) -> Pair | None:
        """Return (y, x) level-0 pixels per pixel of a mask; None for areas.

        Raises:
            EvaluationError: its size does not fit the slide.
        """
        if isinstance(self.content, Areas):
            return None
        return place(self.content, canvas, self.frame(frame)).downsample


class Reader(Protocol):
    """Class indices, wherever they are asked for."""

    def read(self, origin: tuple[int, int], shape: tuple[int, int], downsample: Pair) -> Mask:
        """Return the class index at the centre of each pixel, (h, w) uint8."""


def reader_of(side: Side, canvas: Canvas, indices: Mapping[str, int], frame: Frame) -> Reader:
    """Return what reads a side on a slide.

    Raises:
        EvaluationError: a mask whose size does not fit the slide.
    """
    if isinstance(side.content, Areas):
        return AreaReader(side.content, indices)
    placed = place(side.content, canvas, side.frame(frame))
    return MaskReader(side.content, placed, indices)


def open_side(
    path: Path,
    *,
    values: Values,
    renamed: Mapping[str, str],
    canvas: Canvas | None,
    frame: Frame,
    closing: ExitStack,
) -> Side:
    """Open a mask, a run's folder or a GeoJSON file; return it as a side.

    Args:
        path: of it.
        values: what a mask's values mean, in place of what the file says.
        renamed: new names of classes; two that get the same name become one.
        canvas: of the slide, where another file tells it.
        frame: origin of GeoJSON on slides with bounds.
        closing: takes what is to be closed.

    Raises:
        EvaluationError: not something to compare, or a mask without names for its values.
        AnnotationError: GeoJSON that cannot be read, or areas without class.
    """
    if not path.exists():
        raise EvaluationError(f"no file or folder {path}")
    if path.name.lower().endswith(AREA_SUFFIXES):
        offset = canvas.offset(frame) if canvas else (0, 0)
        return Side(path=path, content=load_areas(path, offset=offset, renamed=renamed))
    own = None
    if (path / RUN_FILE).is_file():
        mask, own = _open_run(path, closing)
    elif path.is_dir():
        mask = _open_ome_zarr(path)
    elif path.suffix.lower() in MASK_SUFFIXES:
        mask = _open_picture(path, closing)
    elif is_dicom(path):
        labels = open_labels(path)
        mask = MaskFile(path=path, pixels=labels.codes[0], values=labels.values)
    else:
        raise EvaluationError(
            f"{path} is no mask (PNG, TIFF, OME-Zarr, NIfTI, NRRD, DICOM-SEG), no run's folder and "
            "no GeoJSON"
        )
    settled = settle(mask.path, mask.values, values, renamed)
    return Side(path=path, content=replace(mask, values=settled), canvas=own)


def finished_run(folder: Path) -> Run:
    """Return the run that a folder holds.

    Raises:
        EvaluationError: none that is done.
    """
    try:
        run = load_run(folder / RUN_FILE)
    except StoreError as error:
        raise EvaluationError(str(error)) from error
    if run.status != "done":
        raise EvaluationError(f"{folder} holds no finished mask ({run.reason or run.status})")
    return run


def classes_of(run: Run) -> Values:
    """Return what the values of the mask of an image or volume mean."""
    return named(dict(enumerate(run.colors, start=1)))


def _open_run(folder: Path, closing: ExitStack) -> tuple[MaskFile, Canvas]:
    run = finished_run(folder)
    store = RunStore(folder=folder)
    if run.kind != "slide":
        return _open_run_of_image(folder, run, closing)
    paths = [p for p in (store.finished_mask_path, store.mask_path) if p.is_dir()]
    if not paths:
        raise EvaluationError(f"{folder} holds no finished mask; run `segment` again")
    bounds = run.slide.get("bounds")
    canvas = Canvas(
        size=(run.slide["size"][0], run.slide["size"][1]),
        mpp=run.slide["mpp"],
        bounds=Region(**bounds) if bounds else None,
    )
    return _open_ome_zarr(paths[0]), canvas


def _open_run_of_image(folder: Path, run: Run, closing: ExitStack) -> tuple[MaskFile, Canvas]:
    path = folder / FILES["png"]
    if not path.is_file():
        raise EvaluationError(f"{folder} holds no {path.name}; segment with --outputs png")
    mask = _open_picture(path, closing)
    spacing = run.slide["spacing_mm"]
    mpp = (1000 * spacing[0], 1000 * spacing[1]) if spacing else None
    height, width = mask.pixels.shape
    canvas = Canvas(size=(width, height), mpp=mpp)
    return replace(mask, values=classes_of(run), mpp=mpp), canvas


def _open_ome_zarr(path: Path) -> MaskFile:
    try:
        group = zarr.open_group(path, mode="r")
        every: Any = group.attrs.asdict()
        attributes = ome_of(every)
        dataset = attributes["multiscales"][0]["datasets"][0]
        pixels: Any = group[dataset["path"]]
        pixels = trusted(pixels, pixels.dtype)
        scale = first_scale(every)[-2:]
        units = [axis.get("unit") for axis in attributes["multiscales"][0]["axes"]][-2:]
        shape, kind = pixels.shape, pixels.dtype.kind
    except Exception as error:  # metadata may be anything
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
    return MaskFile(
        path=path,
        pixels=pixels,
        values=named(names),
        mpp=(scale[1], scale[0]) if units == ["micrometer"] * 2 else None,
    )


class _Picture:
    """One band of a PNG or TIFF, read where it is sliced."""

    def __init__(self, dataset: Any, path: Path) -> None:
        self._dataset = dataset
        self._path = path
        self._lock = threading.Lock()
        self.shape: tuple[int, int] = (dataset.height, dataset.width)

    def __getitem__(self, key: tuple[slice, slice]) -> npt.NDArray[np.generic]:
        import rasterio

        rows, columns = key
        window = ((rows.start, rows.stop), (columns.start, columns.stop))
        # without one in this thread GDAL prints its warnings
        with self._lock, rasterio.Env():
            bands = self._dataset.read(window=window)
        colours = bands[: len(bands) - (len(bands) in (2, 4))]  # without the transparency
        if any((colour != colours[0]).any() for colour in colours[1:]):
            raise EvaluationError(
                f"{self._path} is a picture in colour; a mask has one value a pixel"
            )
        return np.asarray(colours[0])


def _open_picture(path: Path, closing: ExitStack) -> MaskFile:
    import rasterio  # brings GDAL
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    try:
        with path.open("rb") as file:
            head = file.read(4)
            driver = next((d for start, d in DRIVERS.items() if head.startswith(start)), "GTiff")
            file.seek(0)
            if driver == "PNG":
                # GDAL is silent on one that is cut off; this looks at checksums, decodes nothing
                PngImageFile(file).verify()
        with warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning):
            closing.enter_context(rasterio.Env())
            dataset = closing.enter_context(rasterio.open(path, driver=driver))
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
        except Exception as error:  # damaged XML may hold anything
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


def settle_canvas(
    sides: Sequence[Side], slide: Canvas | None, size: tuple[int, int] | None
) -> Canvas:
    """Return the slide that both sides are of, from whatever tells it.

    Args:
        sides: prediction and truth.
        slide: of the slide's file, where one is given.
        size: (width, height) of level 0, where the user tells it.

    Raises:
        EvaluationError: nothing tells how a mask and areas lie on each other, or two runs are of
            slides of different sizes.
    """
    told = [canvas for canvas in (slide, *(s.canvas for s in sides)) if canvas]
    if len({canvas.size for canvas in told}) > 1:
        sizes = " and ".join(f"{c.size[0]} × {c.size[1]}" for c in told)
        raise EvaluationError(f"{sides[0].path} and {sides[1].path}: of slides of {sizes} px")
    if told:
        return told[0]
    masks = [side.content for side in sides if isinstance(side.content, MaskFile)]
    if size:
        return Canvas(size=size)
    if not masks:
        ends = [side.content.extent for side in sides if isinstance(side.content, Areas)]
        width, height = (max(1, math.ceil(max(e[i] for e in ends))) for i in (2, 3))
        return Canvas(size=(width, height))
    if len(masks) == 1:
        raise EvaluationError(
            f"{masks[0].path} does not tell how large its slide is, and GeoJSON is in the slide's "
            "pixels; give the slide with --slide, or its size with --size"
        )
    finest = max(masks, key=lambda mask: mask.pixels.shape)
    height, width = finest.pixels.shape
    return Canvas(size=(width, height), mpp=finest.mpp)
