"""GeoJSON in: read it, check it against QuPath's rules, mend it, burn it into an array."""

from wsi_pipeline.annotations.check import Finding as Finding
from wsi_pipeline.annotations.check import Report as Report
from wsi_pipeline.annotations.check import check_feature as check_feature
from wsi_pipeline.annotations.check import check_geojson as check_geojson
from wsi_pipeline.annotations.classes import IGNORED_CLASS as IGNORED_CLASS
from wsi_pipeline.annotations.classes import REGION_CLASS as REGION_CLASS
from wsi_pipeline.annotations.classes import color_of as color_of
from wsi_pipeline.annotations.classes import is_ignored as is_ignored
from wsi_pipeline.annotations.geometry import mend_polygon as mend_polygon
from wsi_pipeline.annotations.geometry import survive_float32 as survive_float32
from wsi_pipeline.annotations.geometry import survives_float32 as survives_float32
from wsi_pipeline.annotations.raster import rasterise as rasterise
from wsi_pipeline.annotations.read import Annotation as Annotation
from wsi_pipeline.annotations.read import read_polygons as read_polygons
from wsi_pipeline.annotations.read import read_region as read_region
from wsi_pipeline.annotations.repair import Repair as Repair
from wsi_pipeline.annotations.repair import mend_geojson as mend_geojson
