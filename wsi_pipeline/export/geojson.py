"""Write a mask's regions as QuPath polygons, each checked by QuPath's rules, and as a table."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import shapely

from wsi_pipeline.annotations import mend_polygon, survive_float32
from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.polygons.build import Polygons, map_polygons
from wsi_pipeline.export.polygons.components import Regions
from wsi_pipeline.export.polygons.neighbours import Neighbours, find_neighbours
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.tables import as_csv
from wsi_pipeline.geometry import Region

logger = logging.getLogger(__name__)

MANY_REGIONS = 10_000
"""From here on regions are detections, which QuPath paints and edits faster than annotations."""
MANY_VERTICES = 1_000_000
"""Above this QuPath takes more than some seconds to import a file."""
EXACT_IN_FLOAT32 = 2**24
"""Up to here float32, which QuPath keeps, holds all whole numbers."""
LEFT_OUT = "left out: invalid"
"""How the sentence of a polygon ends that could not be written."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """How regions in mask pixels become features of a slide.

    Attributes:
        classes: classes in the mask's order.
        downsample: level-0 pixels per mask pixel, (y, x).
        mpp: µm per level-0 pixel, (y, x).
        crop: the part of the slide that the viewer shows, in level-0 pixels; its corner becomes
            the origin. None = the whole slide.
        simplify_um: see `wsi_pipeline.options.ExportOptions`.
        min_area_um2: see there.
        namespace: text that makes ids of this slide and model differ from others'.
        metadata: texts that are shown with each object.
        unit: unit of areas; "px^2" where nobody knows how large a pixel is, and `mpp` is 1,000.
        is_compared: whether distances to regions of other classes, and borders shared with them,
            are measured.
    """

    classes: tuple[ClassInfo, ...]
    downsample: tuple[float, float]
    mpp: tuple[float, float]
    crop: Region | None
    simplify_um: float
    min_area_um2: float
    namespace: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    unit: Literal["mm^2", "px^2"] = "mm^2"
    is_compared: bool = True

    @property
    def others(self) -> Sequence[int]:
        """Return the classes to whose regions each region is compared; of one class none."""
        count = len(self.classes)
        return range(1, count) if self.is_compared and count > 2 else ()

    @property
    def mask_mpp(self) -> tuple[float, float]:
        """Return the size of a mask pixel in µm, (y, x)."""
        return self.downsample[0] * self.mpp[0], self.downsample[1] * self.mpp[1]

    @property
    def length_unit(self) -> tuple[str, float]:
        """Return the unit of lengths, and how many of it are as long as a µm of `mpp`."""
        return ("µm", 1.0) if self.unit == "mm^2" else ("px", 1e-3)

    @property
    def measures(self) -> dict[str, str]:
        """Return the measures of each feature: names in QuPath by columns of the table.

        A name is "" where QuPath shows the same by itself.
        """
        unit = self.length_unit[0]
        um = unit.replace("µ", "u")
        found = {
            f"area_{um}2": "",
            f"perimeter_{um}": f"Length {unit}",
            "centroid_x": "",
            "centroid_y": "",
            "holes": "Holes",
            "circularity": "Circularity",
            "probability_mean": "Mean probability",
            "probability_min": "Min probability",
        }
        for info in (self.classes[index] for index in self.others):
            found[f"distance_{um}_{info.name}"] = f"Distance to {info.name} {unit}"
            found[f"border_share_{info.name}"] = f"Border shared with {info.name}"
        return found

    @property
    def min_pixels(self) -> float:
        """Return the smallest area that gets a polygon, in mask pixels."""
        return self.min_area_um2 / (self.pixel_mm2 * 1e6)

    @property
    def tolerance(self) -> float:
        """Return the root of the largest triangle to cut off an outline, in mask pixels."""
        # areas count in simplification, so on uneven axes their geometric mean does
        return float(self.simplify_um / (self.pixel_mm2 * 1e6) ** 0.5)

    @property
    def pixel_mm2(self) -> float:
        """Return the area of a mask pixel."""
        return self.mask_mpp[0] * self.mask_mpp[1] * 1e-6


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a GeoJSON file holds.

    Attributes:
        largest: per class, area of the largest feature, in the unit of the options.
        dropped: one sentence for each polygon that could not be written.
    """

    regions: dict[str, int]
    largest: dict[str, float]
    vertices: int
    dropped: list[str]


def write_geojson(
    path: Path,
    table: Path,
    outlines: Outlines,
    options: FeatureOptions,
    *,
    threads: int | None = None,
) -> Written:
    """Write one feature a region, in the order of their first pixels; return what was written.

    A region that is cut by the crop, or mended into several polygons, has a feature for each.

    Args:
        table: CSV to be written with a row for each feature, and what is measured of it.
        outlines: Outlines made with the options' `tolerance` and `min_pixels`.
    """
    value = outlines.regions.value
    # each region's number among those of its class, from 1
    numbers = np.empty(len(value), np.int64)
    for of_class in (np.flatnonzero(value == v) for v in np.unique(value)):
        numbers[of_class] = np.arange(1, len(of_class) + 1)
    y, x = (mpp * options.length_unit[1] for mpp in options.mask_mpp)
    neighbours = None
    if options.others:
        neighbours = find_neighbours(outlines, len(options.classes), (y, x), threads=threads)
    make = partial(_make_batch, outlines.regions, neighbours, numbers, options)
    counts, largest = np.zeros(len(options.classes), np.int64), np.zeros(len(options.classes))
    vertices, dropped = 0, list[str]()
    with (
        written_beside(path) as beside,
        written_beside(table) as table_beside,
        beside.open("wb") as file,
        table_beside.open("w", encoding="utf-8", newline="") as rows,
    ):
        file.write(b'{"type":"FeatureCollection","features":[')
        rows.write(as_csv([("id", "class", *options.measures)]))
        separator = b"\n"
        for batch in map_polygons(outlines, make, threads=threads):
            if batch.features:
                file.write(separator + batch.features)
                separator = b",\n"
            rows.write(batch.rows)
            np.add.at(counts, batch.value, 1)
            np.maximum.at(largest, batch.value, batch.area)
            vertices += batch.vertices
            dropped += batch.dropped
        file.write(b"\n]}\n")
    if vertices > MANY_VERTICES:
        logger.warning(
            "%s has %d vertices; QuPath imports it slowly: raise --simplify or --min-area",
            path, vertices,
        )  # fmt: skip
    names = [c.name for c in options.classes[1:]]
    return Written(
        regions=dict(zip(names, counts[1:].tolist(), strict=True)),
        largest=dict(zip(names, largest[1:].tolist(), strict=True)),
        vertices=vertices,
        dropped=dropped,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Features that are written at one go.

    Attributes:
        features: as JSON, with what parts them.
        rows: of the table, as CSV.
        value: (features,) class.
        area: (features,) in the unit of the options.
        vertices: of all.
        dropped: one sentence for each polygon that could not be written.
    """

    features: bytes
    rows: str
    value: npt.NDArray[np.uint8]
    area: npt.NDArray[np.float64]
    vertices: int
    dropped: list[str]


def _make_batch(
    regions: Regions,
    neighbours: Neighbours | None,
    numbers: npt.NDArray[np.int64],
    options: FeatureOptions,
    part: slice,
    shapes: Polygons,
) -> _Batch:
    """Return the features of some regions.

    Args:
        regions: All regions of the mask.
        neighbours: Of all.
        numbers: Number of each region within its class.
        options: How they become features.
        part: Regions that these are.
        shapes: Polygons of these.
    """
    dropped = list[str]()
    shapes, region, nth, area = sound_shapes(regions, options, part, shapes, dropped)
    measures = _measure(shapes, area, region, regions, neighbours, options)
    value = regions.value[region]
    ids = _ids(options, value, regions.first[region], nth)
    texts = [_as_texts(values) for values in measures]
    # QuPath keeps float32
    sized = np.array([float(f"{size:.7g}") for size in area.tolist()])
    shown = {f"Area {options.unit}": _as_texts(sized)}
    shown |= zip(options.measures.values(), texts, strict=True)
    measured = [
        [f",{_as_json(name)}:{text}" if text else "" for text in column]
        for name, column in shown.items()
        if name
    ]
    metadata = _as_json(dict(options.metadata))
    kind = "detection" if len(regions) > MANY_REGIONS else "annotation"
    names = [_as_json(info.name)[:-1] for info in options.classes]
    classes = [
        _as_json({"name": info.name, "color": list(info.color or (128, 128, 128))})
        for info in options.classes
    ]
    features = [
        f'{{"type":"Feature","id":"{identity}","geometry":{{"type":"Polygon",'
        f'"coordinates":{rings}}},"properties":{{"objectType":"{kind}",'
        f'"name":{names[v]} {i}{f", part {n + 1}" if n else ""}","isLocked":true,'
        f'"classification":{classes[v]},"measurements":{{{"".join(found)[1:]}}},'
        f'"metadata":{metadata}}}}}'
        for identity, rings, v, i, n, found in zip(
            ids,
            _iter_rings(shapes),
            value.tolist(),
            numbers[region].tolist(),
            nth.tolist(),
            zip(*measured, strict=True),
            strict=True,
        )
    ]
    cells = [as_csv([("", info.name)])[1:-2] for info in options.classes]
    rows = map(",".join, zip(ids, (cells[v] for v in value.tolist()), *texts, strict=True))
    return _Batch(
        features=",\n".join(features).encode(),
        rows="".join(f"{row}\r\n" for row in rows),
        value=value,
        area=area,
        vertices=int(shapely.get_num_coordinates(shapes).sum()),
        dropped=dropped,
    )


def sound_shapes(
    regions: Regions, options: FeatureOptions, part: slice, shapes: Polygons, dropped: list[str]
) -> tuple[Polygons, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the shapes of a part of the regions as they are written, in the options' frame.

    With each come its region, which of that one's it is, from 0, and its area in the options' unit.

    Args:
        shapes: in mask pixels.
        dropped: gets one sentence for each that cannot be written.
    """
    shapes, owner, is_cut = _place(shapes, options)
    shapes, kept = _mend(shapes, dropped)
    shapes, owner, is_cut = shapely.orient_polygons(shapes), owner[kept], is_cut[kept]
    _, first, index, count = np.unique(
        owner, return_index=True, return_inverse=True, return_counts=True
    )
    nth, is_part = np.arange(len(owner)) - first[index], is_cut | (count[index] > 1)
    region = owner + part.start
    area = np.where(
        is_part,
        shapely.area(shapes) * options.mpp[1] * options.mpp[0] * 1e-6,
        regions.pixels[region] * options.pixel_mm2,
    )
    return shapes, region, nth, area


def _measure(
    shapes: Polygons,
    area: npt.NDArray[np.float64],
    region: npt.NDArray[np.int64],
    regions: Regions,
    neighbours: Neighbours | None,
    options: FeatureOptions,
) -> list[npt.NDArray[Any]]:
    """Return the options' measures of features, each (features,); NaN is what is not known."""
    scale = np.array(options.mpp[::-1]) * options.length_unit[1]
    sized = shapely.transform(shapes, lambda xy: xy * scale)
    rings, length = shapely.get_exterior_ring(sized), shapely.length(sized)
    x, y = shapely.get_coordinates(shapely.centroid(shapes)).reshape(-1, 2).T
    found = [
        (area * (1e6 if options.unit == "mm^2" else 1)).round(4),
        np.where(length < EXACT_IN_FLOAT32, length.round(3), length.astype(np.float32)),
        x.round(2) + 0.0,
        y.round(2) + 0.0,
        shapely.get_num_interior_rings(shapes),
        # As QuPath has it, without holes.
        (4 * np.pi * shapely.area(shapely.polygons(rings)) / shapely.length(rings) ** 2).round(4),
    ]
    found += [
        np.full(len(region), np.nan) if known is None else known[region].round(4)
        for known in (regions.probability, regions.least)
    ]
    for other in options.others:
        assert neighbours is not None
        own = regions.value[region] == other
        found.append(neighbours.distance[region, other].round(3))
        found.append(np.where(own, np.nan, neighbours.shared[region, other].round(4)))
    return found


def _place(
    shapes: Polygons, options: FeatureOptions
) -> tuple[Polygons, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Put polygons into the viewer's frame; return what it shows of them.

    Returns:
        Polygons; the index of the shape that each comes from, ascending; whether that was cut.
    """
    owner, is_cut = np.arange(len(shapes)), np.zeros(len(shapes), bool)
    # GeoJSON has x before y
    scale, corner = np.array(options.downsample[::-1]), np.zeros(2)
    if (crop := options.crop) is not None:
        corner, size = np.array([crop.x, crop.y], float), np.array([crop.width, crop.height])
        low, high = corner / scale, (corner + size) / scale
        bounds = shapely.bounds(shapes)
        is_cut = (bounds[:, :2] < low).any(axis=1) | (bounds[:, 2:] > high).any(axis=1)
        seen = shapely.intersection(shapes[is_cut], shapely.box(*low, *high))
        parts, index = shapely.get_parts(seen, return_index=True)
        is_areal = shapely.area(parts) > 0
        owner = np.concatenate([owner[~is_cut], owner[is_cut][index[is_areal]]])
        order = np.argsort(owner, kind="stable")
        shapes = np.concatenate([shapes[~is_cut], parts[is_areal]])[order]
        owner = owner[order]
    if crop is None and (scale == 1).all():
        return shapes, owner, is_cut
    # + 0.0 makes -0.0 0
    placed = shapely.transform(shapes, lambda xy: np.round(xy * scale - corner, 2) + 0.0)
    return placed, owner, is_cut[owner]


def _mend(shapes: Polygons, dropped: list[str]) -> tuple[Polygons, npt.NDArray[np.int64]]:
    """Mend polygons that QuPath would not take; return all, and the index of what each was.

    One sentence for each that cannot be mended is added to `dropped`.
    """
    sound = survive_float32(shapes)
    if sound.all():
        return shapes, np.arange(len(shapes))
    parts = [
        [shape] if is_sound else mend_polygon(shape)
        for is_sound, shape in zip(sound.tolist(), shapes, strict=True)
    ]
    for shape in shapes[[not of_shape for of_shape in parts]]:
        x, y = shape.bounds[:2]
        dropped.append(f"a polygon of {shape.area:.2f} px² at ({x:.2f}, {y:.2f}) {LEFT_OUT}")
        logger.warning("%s", dropped[-1])
    mended = np.array([part for of_shape in parts for part in of_shape], object)
    return mended, np.repeat(np.arange(len(parts)), [len(of_shape) for of_shape in parts])


def _ids(
    options: FeatureOptions,
    value: npt.NDArray[np.uint8],
    first: npt.NDArray[np.int32],
    nth: npt.NDArray[np.int64],
) -> list[str]:
    """Return the id of each feature, as `uuid.uuid5` makes it, its common beginning hashed once."""
    heads = [
        hashlib.sha1(
            uuid.NAMESPACE_OID.bytes + f"{options.namespace}/{info.name}/".encode(),
            usedforsecurity=False,
        )
        for info in options.classes
    ]
    ids = list[str]()
    for v, (y, x), n in zip(value.tolist(), first.tolist(), nth.tolist(), strict=True):
        digest = heads[v].copy()
        digest.update(f"{y},{x}/{n}".encode())
        ids.append(str(uuid.UUID(bytes=digest.digest()[:16], version=5)))
    return ids


def _as_json(value: object) -> str:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _as_texts(values: npt.NDArray[Any]) -> list[str]:
    """Return numbers as JSON and CSV have them, "" for NaN."""
    text = _as_json(values)[1:-1].replace("null", "")
    return text.split(",") if len(values) else []


def _iter_rings(shapes: Polygons) -> Iterator[str]:
    """Yield the coordinates of each polygon as JSON, whole numbers as such."""
    if len(shapes) == 0:
        return
    _, xy, (rings, polygons) = shapely.to_ragged_array(shapes)
    is_whole = np.logical_and.reduceat((xy == np.rint(xy)).all(axis=1), rings[polygons[:-1]])
    written = {}
    for whole in np.unique(is_whole).tolist():
        text = _as_json(xy.astype(np.int64) if whole else xy)[1:-1]
        ends = np.flatnonzero(np.frombuffer(text.encode(), np.uint8) == ord("]")) + 1
        starts = np.append(0, ends[:-1] + 1)
        bounds = zip(starts[rings[:-1]].tolist(), ends[rings[1:] - 1].tolist(), strict=True)
        written[whole] = [f"[{text[a:b]}]" for a, b in bounds]
    for whole, (first, stop) in zip(is_whole.tolist(), pairwise(polygons.tolist()), strict=True):
        yield f"[{','.join(written[whole][first:stop])}]"
