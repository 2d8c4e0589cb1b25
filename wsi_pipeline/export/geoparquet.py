"""Write a mask's regions as GeoParquet, for GeoPandas, DuckDB and GIS.

https://geoparquet.org/releases/v1.1.0
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import shapely

from wsi_pipeline.export.features import FeatureOptions, Features, map_features
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.files.atomic import written_beside

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def write_geoparquet(path: Path, outlines: Outlines, options: FeatureOptions) -> None:
    """Write a row for each feature, as `regions.csv` has it, and its polygon; return nothing.

    A batch of features is a row group: readers that want a part of the slide skip the others.

    Args:
        outlines: made with the options' `tolerance` and `min_pixels`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    names = pa.array([c.name for c in options.classes])
    kinds = {name: pa.int64() if name == "holes" else pa.float64() for name in options.measures}
    box = pa.struct(dict.fromkeys(CORNERS, pa.float64()))
    covering = {"bbox": {corner: ["bbox", corner] for corner in CORNERS}}
    # Without a reference system it would be taken for longitude and latitude.
    geometry = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None, "covering": covering}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    schema = pa.schema(
        {
            "id": pa.string(),
            "class": pa.dictionary(pa.int16(), pa.string()),
            **kinds,
            "bbox": box,
            "geometry": pa.binary(),
        },
        metadata={"geo": json.dumps(geo), "wsi_pipeline": json.dumps(options.told)},
    )

    def rows_of(found: Features) -> pa.RecordBatch:
        corners = [pa.array(values) for values in shapely.bounds(found.shapes).T]
        columns = [
            pa.array(found.ids, pa.string()),
            pa.DictionaryArray.from_arrays(found.value.astype(np.int16), names),
            *(pa.array(values, kinds[n], from_pandas=True) for n, values in found.measures.items()),
            pa.StructArray.from_arrays(corners, CORNERS),
            pa.array(shapely.to_wkb(found.shapes), pa.binary()),
        ]
        return pa.record_batch(columns, schema=schema)

    with (
        written_beside(path) as beside,
        parquet.ParquetWriter(beside, schema, compression="zstd") as writer,
    ):
        for rows in map_features(outlines, options, rows_of):
            writer.write_batch(rows)
