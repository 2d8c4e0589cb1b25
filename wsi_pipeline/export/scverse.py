"""Write what a mask holds for the tools of scverse: regions as AnnData, all of it as SpatialData.

SpatialData is written as its version 0.7 has it, container 0.2, without that package: the mask is
linked chunk for chunk, and polygons and table never lie in memory together.

https://spatialdata.scverse.org, https://anndata.readthedocs.io/en/latest/fileformat-prose.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from wsi_pipeline.export import ome_zarr
from wsi_pipeline.export.features import FeatureOptions, map_features
from wsi_pipeline.export.geoparquet import write_geoparquet
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.files.atomic import written_beside

if TYPE_CHECKING:
    from anndata import AnnData

REGIONS, MEASURES = "regions", "measures"
"""Names of the polygons and of the table that tells of them: SpatialData wants them to differ."""


def write_anndata(path: Path, outlines: Outlines, options: FeatureOptions) -> None:
    """Write a table with a row for each feature, as `regions.csv` has it; return nothing.

    Args:
        outlines: made with the options' `tolerance` and `min_pixels`.
    """
    with written_beside(path) as beside:
        _table(outlines, options).write_h5ad(beside)


def write_spatialdata(path: Path, mask: Path, outlines: Outlines, options: FeatureOptions) -> None:
    """Write labels, shapes and table of a slide into a folder that is not there; return nothing.

    Args:
        mask: the finished OME-Zarr.
        outlines: made with the options' `tolerance` and `min_pixels`.
        options: in the frame of the whole slide.
    """
    from anndata.io import write_elem

    told = options.told | {"classes": [c.name for c in options.classes]}
    kept: dict[str, Any] = {"spatialdata_attrs": {"version": "0.2"}, "wsi_pipeline": told}
    root = zarr.open_group(path, mode="w-", zarr_format=3, attributes=kept)
    root.create_group("labels", attributes={"ome": {"labels": ["mask"]}})
    levels = ome_zarr.link_levels(mask, path / "labels" / "mask")
    multiscale = {
        "name": "mask",
        "axes": [{"name": axis, "type": "space"} for axis in ome_zarr.AXES],
        "datasets": ome_zarr.datasets((1.0, 1.0), levels),
        "coordinateTransformations": _placed("yx", options.downsample, options.mask_mpp),
    }
    labels = {
        "ome": {"version": "0.5-dev-spatialdata", "multiscales": [multiscale]},
        "spatialdata_attrs": {"version": "0.3"},
    }
    root.create_group("labels/mask", attributes=labels)
    shapes = {
        "encoding-type": "ngff:shapes",
        "axes": ["x", "y"],
        "coordinateTransformations": _placed("xy", (1.0, 1.0), options.mpp[::-1]),
        "spatialdata_attrs": {"version": "0.3"},
    }
    root.create_group(f"shapes/{REGIONS}", attributes=shapes)
    write_geoparquet(path / "shapes" / REGIONS / "shapes.parquet", outlines, options)
    table = _table(outlines, options)
    keys: dict[str, Any] = {"region": REGIONS, "region_key": "region", "instance_key": "instance"}
    table.obs["region"], table.obs["instance"] = REGIONS, np.arange(table.n_obs)
    table.obs["region"] = table.obs["region"].astype("category")
    table.uns["spatialdata_attrs"] = keys
    tables = root.create_group("tables")
    write_elem(tables, MEASURES, table)
    encoding = {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2"}
    tables[MEASURES].attrs.update(encoding | keys)


def _table(outlines: Outlines, options: FeatureOptions) -> AnnData:
    """Return a row for each feature: class and measures in `obs`, centroids in `obsm`."""
    import pandas as pd
    from anndata import AnnData

    none, names = np.zeros(0, object), [c.name for c in options.classes]
    found = list(map_features(outlines, options, lambda batch: replace(batch, shapes=none)))
    columns: dict[str, Any] = {
        name: np.concatenate([np.zeros(0, np.uint8), *(batch.measures[name] for batch in found)])
        for name in options.measures
    }
    codes = [names[v] for batch in found for v in batch.value.tolist()]
    kinds = pd.Categorical(codes, [name for name in names if name in set(codes)])
    ids = [identity for batch in found for identity in batch.ids]
    obs = pd.DataFrame({"class": kinds, **columns}, index=pd.Index(ids, dtype=object))
    shown = [c for c in options.classes if c.name in kinds.categories]
    uns = {
        "wsi_pipeline": {name: value for name, value in options.told.items() if value is not None},
        # By this name scanpy and squidpy look for them.
        "class_colors": ["#%02x%02x%02x" % (c.color or (128, 128, 128)) for c in shown],
    }
    spatial = obs[["centroid_x", "centroid_y"]].to_numpy(float)
    return AnnData(obs=obs, obsm={"spatial": spatial}, uns=uns)


def _placed(axes: str, pixels: Sequence[float], um: Sequence[float]) -> list[dict[str, Any]]:
    """Return how an element lies in level-0 pixels and in µm, as SpatialData has it."""
    named = [{"name": axis, "type": "space", "unit": "unit"} for axis in axes]
    return [
        {
            "type": "scale",
            "scale": list(scale),
            "input": {"name": axes, "axes": named},
            "output": {"name": system, "axes": named},
        }
        for system, scale in (("global", pixels), ("microns", um))
    ]
