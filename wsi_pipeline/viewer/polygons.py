"""The polygons of a GeoJSON file by place and size, so that a page gets what it can show only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsi_pipeline.annotations.classes import is_number
from wsi_pipeline.annotations.document import properties_of
from wsi_pipeline.annotations.read import Shapes, class_name_of, iter_polygons

MOST_SHAPES = 3000
"""Polygons in an answer: more are no longer told apart on a screen."""
MOST_VERTICES = 200_000
"""Vertices in an answer: a browser draws them within a frame."""
NO_CLASS = "No class"


@dataclass(frozen=True, kw_only=True, eq=False)
class Polygons:
    """Polygons, the largest first.

    Attributes:
        shapes: (n,) polygons in level-0 pixels, (x, y).
        areas: (n,) in level-0 pixels.
        values: (n,) indices in `classes`.
        measured: (n, 2) mm² and mean probability as the file tells, NaN where it does not.
        left_out: Number of features that could not be read.
    """

    shapes: Shapes
    areas: npt.NDArray[np.float64]
    values: npt.NDArray[np.int64]
    tree: shapely.STRtree
    classes: tuple[str, ...] = ()
    names: list[str] = field(default_factory=list)
    measured: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    left_out: int = 0

    def within(
        self, box: tuple[int, int, int, int], downsample: float, hidden: Collection[int] = ()
    ) -> dict[str, Any]:
        """Return the outlines that lie in a box, the largest polygons first.

        Polygons below a pixel are left out, and outlines are simplified by at most half a pixel.

        Args:
            box: (x, y, width, height) in level-0 pixels.
            downsample: level-0 pixels per pixel of the screen.

        Returns:
            `shapes`, each with its `id`, `class` and `lines`, flat arrays of x, y, x, y, …, cut off
            at the box; `more`: how many polygons there was no room for.
        """
        x, y, width, height = box
        bounds = (x, y, x + width, y + height)
        # Their numbers go by size, the largest first.
        found = np.sort(self.tree.query(shapely.box(*bounds)))
        found = found[self.areas[found] >= downsample**2]
        found = found[~np.isin(self.values[found], list(hidden))]
        outlines = shapely.boundary(self.shapes[found[:MOST_SHAPES]])
        # Cut off before it is simplified: of a region as large as the slide little is seen.
        clipped = shapely.clip_by_rect(outlines, *bounds)
        lines = shapely.simplify(clipped, downsample / 2, preserve_topology=False)
        n_vertices = np.cumsum(shapely.get_num_coordinates(lines))
        lines = lines[: max(1, int(np.searchsorted(n_vertices, MOST_VERTICES, "right")))]
        parts, owner = shapely.get_parts(lines, return_index=True)
        parts, owner = (array[shapely.get_type_id(parts) == 1] for array in (parts, owner))
        xy, part = shapely.get_coordinates(parts, return_index=True)
        places = np.rint(xy).astype(np.int32) if downsample >= 1 else np.round(xy, 2)
        rings = np.split(places.ravel(), 2 * np.flatnonzero(np.diff(part)) + 2)
        shapes: dict[int, dict[str, Any]] = {}
        for n, ring in zip(found[owner].tolist(), rings, strict=False):
            own = shapes.setdefault(n, {"id": n, "class": int(self.values[n]), "lines": []})
            own["lines"].append(ring)
        return {"shapes": list(shapes.values()), "more": len(found) - len(lines)}

    def at(self, x: int, y: int, hidden: Collection[int] = ()) -> dict[str, Any] | None:
        """Return what is known of the smallest polygon around a level-0 pixel; None = none is."""
        found = np.sort(self.tree.query(shapely.Point(x + 0.5, y + 0.5)))
        found = found[~np.isin(self.values[found], list(hidden))]
        around = found[shapely.contains_xy(self.shapes[found], x + 0.5, y + 0.5)]
        return self._told(int(around[-1])) if len(around) else None

    def listed(
        self, by: str, is_up: bool, first: int, count: int, hidden: Collection[int] = ()
    ) -> dict[str, Any]:
        """Return `count` polygons from the `first` on, and how many there are, in an order.

        Args:
            by: "area", "class" or "probability", of which those that have none come last.
            is_up: the smallest first, or the largest.
        """
        keys = {"area": self.areas, "class": self.values, "probability": self.measured[:, 1]}
        order = np.argsort(keys[by] * (1.0 if is_up else -1.0), kind="stable")
        order = order[~np.isin(self.values[order], list(hidden))]
        return {
            "regions": [self._told(n) for n in order[first : first + count].tolist()],
            "count": len(order),
        }

    def _told(self, n: int) -> dict[str, Any]:
        # JSON has null for NaN
        mm2, probability = self.measured[n].tolist()
        return {
            "id": n,
            "name": self.names[n],
            "class": int(self.values[n]),
            "area_px": float(self.areas[n]),
            "area_mm2": mm2,
            "probability": probability,
            "box": shapely.bounds(self.shapes[n]).tolist(),
        }


def load_polygons(path: Path, *, offset: Sequence[float], classes: Iterable[str]) -> Polygons:
    """Read the polygons of a GeoJSON file; return them.

    Args:
        offset: (x, y) of its origin in level-0 pixels.
        classes: names of those that come first, the background's included.

    Raises:
        AnnotationError: the file cannot be read, or is no GeoJSON.
    """
    found: list[Shapes] = []
    values, names, measured = list[int](), list[str](), list[list[float]]()
    numbers = {name: i for i, name in enumerate(classes)}
    left_out = 0
    for shapes, owners, n_damaged in iter_polygons(path):
        found.append(shapes)
        left_out += n_damaged
        for properties in map(properties_of, owners):
            name = class_name_of(properties) or NO_CLASS
            values.append(numbers.setdefault(name, len(numbers)))
            names.append(str(properties.get("name") or ""))
            given = properties.get("measurements")
            told = given if isinstance(given, Mapping) else {}
            both = (told.get(of) for of in ("Area mm^2", "Mean probability"))
            measured.append([float(v) if is_number(v) else np.nan for v in both])
    array = np.concatenate([np.zeros(0, object), *found])
    areas = shapely.area(array)
    order = np.argsort(-areas, kind="stable")
    array = array[order]
    if any(offset):
        array = shapely.transform(array, lambda xy: xy + offset)
    return Polygons(
        shapes=array,
        areas=areas[order],
        values=np.array(values, np.int64)[order],
        classes=tuple(numbers),
        names=[names[i] for i in order.tolist()],
        measured=np.array(measured, float).reshape(-1, 2)[order],
        left_out=left_out,
        tree=shapely.STRtree(array),
    )
