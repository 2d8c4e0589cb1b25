"""Regions of a mask as features: polygons of a slide, and what is measured of each."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import shapely

from wsi_pipeline.annotations import mend_polygon, survive_float32
from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.polygons.build import Polygons, map_polygons
from wsi_pipeline.export.polygons.components import Regions
from wsi_pipeline.export.polygons.neighbours import Neighbours, find_neighbours
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.geometry import Region

logger = logging.getLogger(__name__)

EXACT_IN_FLOAT32 = 2**24
"""Up to here float32, which QuPath keeps, holds all whole numbers."""
LEFT_OUT = "left out: invalid"
"""How the sentence of a polygon ends that could not be written."""
R = TypeVar("R")


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
        flaws: what the shares of flaws in regions are of, in their order.
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
    flaws: Sequence[str] = ()

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
        return found | {f"share_{flaw}": f"Share {flaw}" for flaw in self.flaws}

    @property
    def told(self) -> dict[str, Any]:
        """Return what a table says of its places, both (x, y), and of who made it.

        None stands for µm that nobody knows.
        """
        crop, mpp = self.crop, [*self.mpp[::-1]] if self.unit == "mm^2" else None
        origin = [crop.x, crop.y] if crop else [0, 0]
        return {**self.metadata, "um_per_pixel": mpp, "offset": origin}

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Features that are written at one go.

    Attributes:
        ids: of each.
        value: (features,) class.
        number: (features,) of its region among those of its class, from 1.
        nth: (features,) which part of its region, from 0.
        shapes: in the frame of the options.
        area: (features,) in the unit of the options.
        measures: (features,) by column, as the options name them; NaN is what is not known.
        dropped: one sentence for each polygon that could not be written.
    """

    ids: list[str]
    value: npt.NDArray[np.uint8]
    number: npt.NDArray[np.int64]
    nth: npt.NDArray[np.int64]
    shapes: Polygons
    area: npt.NDArray[np.float64]
    measures: dict[str, npt.NDArray[Any]]
    dropped: list[str]


def map_features(
    outlines: Outlines,
    options: FeatureOptions,
    function: Callable[[Features], R],
    *,
    threads: int | None = None,
) -> Iterator[R]:
    """Make features in batches and do something with each; yield the results in order.

    Regions come in the order of their first pixels. One that is cut by the crop, or mended into
    several polygons, has a feature for each. Only few batches are held at a time.

    Args:
        outlines: made with the options' `tolerance` and `min_pixels`.
    """
    regions, value = outlines.regions, outlines.regions.value
    # each region's number among those of its class, from 1
    numbers = np.empty(len(value), np.int64)
    for of_class in (np.flatnonzero(value == v) for v in np.unique(value)):
        numbers[of_class] = np.arange(1, len(of_class) + 1)
    y, x = (mpp * options.length_unit[1] for mpp in options.mask_mpp)
    neighbours: Neighbours | None = None
    if options.others:
        neighbours = find_neighbours(outlines, len(options.classes), (y, x), threads=threads)

    def make(part: slice, shapes: Polygons) -> R:
        dropped = list[str]()
        shapes, region, nth, area = sound_shapes(regions, options, part, shapes, dropped)
        measured = _measure(shapes, area, region, regions, neighbours, options)
        return function(
            Features(
                ids=_ids(options, value[region], regions.first[region], nth),
                value=value[region],
                number=numbers[region],
                nth=nth,
                shapes=shapes,
                area=area,
                measures=dict(zip(options.measures, measured, strict=True)),
                dropped=dropped,
            )
        )

    return map_polygons(outlines, make, threads=threads)


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
    return [*found, *(regions.flaws[region, i].round(4) for i in range(len(options.flaws)))]


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
