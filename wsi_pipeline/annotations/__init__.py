"""GeoJSON in: read it, check it against QuPath's rules, mend it, burn it into an array."""

from __future__ import annotations

from wsi_pipeline.annotations.check import Finding, Report, check_feature, check_geojson
from wsi_pipeline.annotations.classes import IGNORED_CLASS, REGION_CLASS, color_of, is_ignored
from wsi_pipeline.annotations.geometry import mend_polygon, survive_float32, survives_float32
from wsi_pipeline.annotations.raster import rasterise
from wsi_pipeline.annotations.read import Annotation, read_polygons, read_region
from wsi_pipeline.annotations.repair import Repair, mend_geojson
from wsi_pipeline.colors import QUPATH_COLORS

__all__ = [
    "IGNORED_CLASS",
    "QUPATH_COLORS",
    "REGION_CLASS",
    "Annotation",
    "Finding",
    "Repair",
    "Report",
    "check_feature",
    "check_geojson",
    "color_of",
    "is_ignored",
    "mend_geojson",
    "mend_polygon",
    "rasterise",
    "read_polygons",
    "read_region",
    "survive_float32",
    "survives_float32",
]
