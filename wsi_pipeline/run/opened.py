"""A finished run as an object: its mask, polygons, tables and picture, for programs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from PIL import Image

from wsi_pipeline.annotations.document import properties_of
from wsi_pipeline.annotations.read import class_name_of, iter_polygons
from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import SourceError, StoreError
from wsi_pipeline.export import Layer, ome_zarr
from wsi_pipeline.files.paths import as_path, is_remote
from wsi_pipeline.report.record import FILES, REGIONS_FILE, RUN_FILE, Run, load_run
from wsi_pipeline.run.finished import of_this_version, open_levels_of, open_scan_of, open_slide_of
from wsi_pipeline.run.probability import Probability, open_probability
from wsi_pipeline.sources import Slide
from wsi_pipeline.sources.base import Opened
from wsi_pipeline.sources.radiology.preprocess import Scan

if TYPE_CHECKING:
    import geojson
    import geopandas
    import pandas

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedRun(Opened):
    """What `segment` has left of one slide, image or volume; in a `with` it is closed at the end.

    Each part is opened when it is asked for. One that is missing, damaged or of something else
    raises a `StoreError`, `SourceError` or `AnnotationError` that says so.

    Attributes:
        folder: that holds it.
        record: its `run.json`.
        slide_path: where the slide, image or volume is now; None = where it was.
    """

    folder: Path
    record: Run = field(repr=False)
    slide_path: Path | None = None

    def close(self) -> None:
        """Close the slide, image or volume, if it was opened."""
        if "slide" in self.__dict__:
            self.slide.close()

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Return name and colour of each value of the mask, the background first."""
        return self.record.classes

    @cached_property
    def slide(self) -> Slide | Scan:
        """Return what was segmented, opened: the slide, image or volume."""
        openers = {"slide": open_slide_of, "image": open_scan_of, "volume": open_scan_of}
        with of_this_version(self.folder):
            return openers[self.record.kind](self.folder, self.record, self.slide_path)

    @cached_property
    def mask(self) -> Layer:
        """Return the class of each pixel, an index in `classes`, (y, x) or (z, y, x)."""
        scan: Any = None
        if self.record.kind != "slide":
            # Where the scan is not there any more, the mask is taken as it lies.
            with suppress(SourceError):
                scan = self.slide
        with of_this_version(self.folder):
            levels, mpp = open_levels_of(self.folder, self.record, scan)
        return Layer(levels=levels, mpp=mpp)

    @cached_property
    def probability(self) -> Probability:
        """Return the probability of each class but the background, (c, y, x), in 1/255."""
        return open_probability(self._file(FILES["probability"]).parent)

    @cached_property
    def quality(self) -> Layer:
        """Return what is wrong with each cell of a slide, (y, x); its file names the values."""
        levels, mpp = ome_zarr.open_finished(self._file(FILES["quality"]))
        return Layer(levels=levels, mpp=mpp)

    def polygons(self) -> geopandas.GeoDataFrame | list[geojson.Feature]:
        """Return the polygons in level-0 pixels of the whole slide, whatever frame the file has.

        With geopandas a row for each, with `id`, `class`, `name`, measurements and `geometry`;
        without it a feature for each. Of a MultiPolygon each part is one.
        """
        path, left_out = self._file(FILES["geojson"]), 0
        found, each = [np.zeros(0, object)], list[Any]()
        for shapes, owners, n_damaged in iter_polygons(path):
            found.append(shapes)
            # Without their coordinates, which hold ten times as much.
            each += [(feature.get("id"), properties_of(feature)) for feature in owners]
            left_out += n_damaged
        if left_out:
            logger.warning("%s: left out %d features that cannot be read", path, left_out)
        placed = shapely.transform(np.concatenate(found), lambda xy: xy + self._offset)
        try:
            import geopandas
        except ImportError:
            from geojson import Feature

            with_shapes = zip(each, placed, strict=True)
            return [Feature(id=i, geometry=s, properties={**p}) for (i, p), s in with_shapes]
        rows = []
        for identity, p in each:
            own = {"id": identity, "class": class_name_of(p), "name": p.get("name")}
            measured = p.get("measurements")
            # Measurements may have any name: those three come first, and count.
            rows.append(own | (measured if isinstance(measured, dict) else {}) | own)
        columns = None if rows else ["id", "class", "name"]
        return geopandas.GeoDataFrame(rows, columns=columns, geometry=placed)

    def regions(self) -> pandas.DataFrame:
        """Return `regions.csv`, a row for each polygon with its measures.

        Places are those of `polygons`, and classes have their names, whatever stands in the file.
        """
        import pandas

        path = self._file(REGIONS_FILE)
        try:
            # A class may be called NA, or like a formula: the file has an apostrophe before that.
            table = pandas.read_csv(
                path, keep_default_na=False, na_values=[""], dtype={"id": str, "class": str}
            )
            table["class"] = table["class"].str.replace("^'(?=[-=+@\t\r])", "", regex=True)
            table[["centroid_x", "centroid_y"]] += [*self._offset]
            return table
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} cannot be read as a table of regions: {error}") from error

    def overlay(self) -> Image.Image:
        """Return the picture with the mask over it."""
        path = self._file(FILES["overlay"])
        try:
            with Image.open(path) as picture:
                picture.load()
                return picture
        # Of a damaged PNG the latter.
        except (OSError, SyntaxError) as error:
            raise StoreError(f"{path} cannot be read as a picture: {error}") from error

    @property
    def _offset(self) -> Sequence[int]:
        """Return (x, y) of the origin of the files' frame in level-0 pixels."""
        offset: Sequence[int] = self.record.frame.get("offset", (0, 0))
        return offset

    def _file(self, name: str) -> Path:
        path, kind = self.folder / name, self.record.kind
        if not path.exists():
            raise StoreError(
                f"{self.folder} has no {name}; if the {kind} can have it, name it among the "
                "--outputs of `segment` or `export`"
            )
        return path


def open_run(folder: str | Path, *, slide: str | Path | None = None) -> FinishedRun:
    """Open the run of one slide, image or volume; return it.

    Args:
        folder: with a `run.json`; or that file.
        slide: where the slide, image or volume is now; None = where it was.

    Raises:
        StoreError: no run is there, or it is behind a URL.
    """
    path = as_path(folder)
    if is_remote(path):
        raise StoreError(f"{folder} is behind a URL; copy the folder here to open it")
    record, source = load_run(path), None if slide is None else as_path(slide)
    path = path.parent if path.name == RUN_FILE else path
    return FinishedRun(folder=path, record=record, slide_path=source)


def open_runs(folder: str | Path) -> list[FinishedRun]:
    """Open all runs below a folder, those that failed included; return them sorted by folder.

    What cannot be read as a run is left out, and the log says so. Links are not followed.

    Raises:
        StoreError: there is none.
    """
    found = list[FinishedRun]()
    for place, folders, files in os.walk(folder):
        folders.sort()
        if RUN_FILE in files:
            # A run holds no other, but thousands of chunks.
            folders.clear()
            try:
                found.append(open_run(place))
            except StoreError as error:
                logger.warning("left out of the list: %s", error)
    if not found:
        raise StoreError(f"no run below {folder}; expected the --output of `segment`")
    return found
