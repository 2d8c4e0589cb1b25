"""Write a mask's regions as QuPath polygons, each checked by QuPath's rules, and as a table."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import shapely

from wsi_pipeline.export.features import FeatureOptions, Features, map_features
from wsi_pipeline.export.polygons.build import Polygons
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.tables import as_csv

logger = logging.getLogger(__name__)

MANY_REGIONS = 10_000
"""From here on regions are detections, which QuPath paints and edits faster than annotations."""
MANY_VERTICES = 1_000_000
"""Above this QuPath takes more than some seconds to import a file."""


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
    counts, largest = np.zeros(len(options.classes), np.int64), np.zeros(len(options.classes))
    vertices, dropped = 0, list[str]()
    kind = "detection" if len(outlines.regions) > MANY_REGIONS else "annotation"
    with (
        written_beside(path) as beside,
        written_beside(table) as table_beside,
        beside.open("wb") as file,
        table_beside.open("w", encoding="utf-8", newline="") as rows,
    ):
        file.write(b'{"type":"FeatureCollection","features":[')
        rows.write(as_csv([("id", "class", *options.measures)]))
        separator = b"\n"
        batches = map_features(outlines, options, partial(_texts, options, kind), threads=threads)
        for found, features, lines in batches:
            if features:
                file.write(separator + features)
                separator = b",\n"
            rows.write(lines)
            np.add.at(counts, found.value, 1)
            np.maximum.at(largest, found.value, found.area)
            vertices += int(shapely.get_num_coordinates(found.shapes).sum())
            dropped += found.dropped
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


def _texts(options: FeatureOptions, kind: str, found: Features) -> tuple[Features, bytes, str]:
    """Return features, their JSON with what parts them, and their rows of the table as CSV."""
    texts = [_as_texts(values) for values in found.measures.values()]
    # QuPath keeps float32
    sized = np.array([float(f"{size:.7g}") for size in found.area.tolist()])
    shown = {f"Area {options.unit}": _as_texts(sized)}
    shown |= zip(options.measures.values(), texts, strict=True)
    measured = [
        [f",{_as_json(name)}:{text}" if text else "" for text in column]
        for name, column in shown.items()
        if name
    ]
    metadata = _as_json(dict(options.metadata))
    names = [_as_json(info.name)[:-1] for info in options.classes]
    classes = [
        _as_json({"name": info.name, "color": list(info.color or (128, 128, 128))})
        for info in options.classes
    ]
    features = [
        f'{{"type":"Feature","id":"{identity}","geometry":{{"type":"Polygon",'
        f'"coordinates":{rings}}},"properties":{{"objectType":"{kind}",'
        f'"name":{names[v]} {i}{f", part {n + 1}" if n else ""}","isLocked":true,'
        f'"classification":{classes[v]},"measurements":{{{"".join(values)[1:]}}},'
        f'"metadata":{metadata}}}}}'
        for identity, rings, v, i, n, values in zip(
            found.ids,
            _iter_rings(found.shapes),
            found.value.tolist(),
            found.number.tolist(),
            found.nth.tolist(),
            zip(*measured, strict=True),
            strict=True,
        )
    ]
    cells = [as_csv([("", info.name)])[1:-2] for info in options.classes]
    own = (cells[v] for v in found.value.tolist())
    rows = map(",".join, zip(found.ids, own, *texts, strict=True))
    return found, ",\n".join(features).encode(), "".join(f"{row}\r\n" for row in rows)


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
