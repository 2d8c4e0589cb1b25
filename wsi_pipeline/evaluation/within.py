"""measure(): how much of each class lies in annotated areas."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import shapely
from shapely import Polygon

from wsi_pipeline.annotations import REGION_CLASS, is_ignored, rasterise, read_polygons
from wsi_pipeline.errors import AnnotationError, EvaluationError, StoreError, raised_as
from wsi_pipeline.evaluation.inputs import PART, SlideFrame, finished_run, open_run_mask, place
from wsi_pipeline.evaluation.masks import MaskFile
from wsi_pipeline.geometry import iter_blocks
from wsi_pipeline.options import Frame, Rule
from wsi_pipeline.patch_grid import open_patch_grid
from wsi_pipeline.report.record import Run
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.run.thresholds import RuledMask
from wsi_pipeline.sources.slide import frame_offset

logger = logging.getLogger(__name__)

TISSUE = "tissue"
"""Stands for a class in the rows on tissue."""


class Measured(NamedTuple):
    """How much of a class lies in an annotation.

    Attributes:
        annotation: its name; its index in the file, from 0, where it has none, and behind the name
            where others have the same.
        class_name: of the model, background included; or "tissue", where the model looked.
        area_mm2: mask pixels whose centre lies in it, times their area.
        percent: of the annotation, as far as it lies on the slide and is not cut out; None where
            that is nothing.
    """

    annotation: str
    class_name: str
    area_mm2: float
    percent: float | None


def measure(run: str | Path, within: str | Path, *, frame: Frame = "qupath") -> list[Measured]:
    """Measure how much of each class lies in each annotation of a file; return a row for each.

    Where an area of a class that ends in `*`, such as `Ignore*`, covers an annotation, it does not
    count. Annotations may overlap. Where polygons and areas of the run are by other thresholds than
    its mask, so is what is measured.

    Args:
        run: folder of the run of a slide or image.
        within: GeoJSON of the annotations, in level-0 pixels.
        frame: whose origin that has on slides with bounds.

    Raises:
        EvaluationError: no finished mask, or pixels whose size nobody knows.
        AnnotationError: the file cannot be read, or none of its annotations lies on the slide.
    """
    run, within = Path(run), Path(within)
    with ExitStack() as closing:
        told, mask, slide = open_shown(run, closing)
        if slide.mpp is None:
            raise EvaluationError(f"{run} does not tell how large its pixels are, to count mm²")
        names, shapes = _read_annotations(within, frame_offset(slide.bounds, frame))
        on_slide = shapely.area(shapely.intersection(shapes, shapely.box(0, 0, *slide.size)))
        for name in np.array(names)[on_slide < shapely.area(shapes) * (1 - 1e-9)]:
            logger.warning("%s: %s lies beyond the slide, all or part of it", within, name)
        if not on_slide.any():
            size = " × ".join(map(str, slide.size))
            raise AnnotationError(
                f"{within}: no annotation lies on the slide of {size} px; expected level-0 pixels "
                "of this slide"
            )
        fy, fx = place(mask, slide, "openslide").downsample
        classes, grid = [told.background, *told.colors], RunStore(folder=run).grid_path
        stored = open_patch_grid(grid) if grid.is_dir() else None
        # The last column is tissue.
        counts = np.zeros((len(shapes), len(classes) + 1), np.int64)
        tree = shapely.STRtree(shapes)
        for block in iter_blocks(mask.pixels.shape, (PART, PART)):
            (top, left), (height, width) = block.start, block.shape
            box = shapely.box(left * fx, top * fy, (left + width) * fx, (top + height) * fy)
            if len(near := tree.query(box)) == 0:
                continue
            values, looked_at = mask.read(block.slices), np.zeros((height, width), bool)
            if (highest := values.max()) >= len(classes):
                raise EvaluationError(
                    f"{mask.path} holds the value {highest}; its classes are 0 to "
                    f"{len(classes) - 1}"
                )
            if stored is not None:
                rows, columns = (
                    # The thumbnail's last pixel may end before the slide does.
                    ((first + 0.5 + np.arange(n)) * f / by).astype(np.int64).clip(max=length - 1)
                    for first, n, f, by, length in zip(
                        block.start, block.shape, (fy, fx),
                        stored.tissue_downsample, stored.tissue.shape, strict=True,
                    )
                )  # fmt: skip
                looked_at = stored.tissue[np.ix_(rows, columns)]
            for index in near:
                is_inside = rasterise(
                    [shapes[index]],
                    (height, width),
                    origin=(top * fy, left * fx),
                    downsample=(fy, fx),
                )
                counts[index, :-1] += np.bincount(values[is_inside], minlength=len(classes))
                counts[index, -1] += np.count_nonzero(looked_at & is_inside)
    mm2 = fy * slide.mpp[1] * fx * slide.mpp[0] * 1e-6
    found = []
    for name, pixels in zip(names, counts.tolist(), strict=True):
        whole = sum(pixels[:-1])
        # Without a grid nobody knows of tissue.
        for of, n in zip([*classes, TISSUE][: None if stored else -1], pixels, strict=False):
            percent = round(100 * n / whole, 4) if whole else None
            found.append(Measured(name, of, round(n * mm2, 9), percent))
    return found


def open_shown(run: Path, closing: ExitStack) -> tuple[Run, MaskFile, SlideFrame]:
    """Open the mask of which polygons and areas of a run are made; return both, and its slide.

    Raises:
        EvaluationError: there is none that is finished.
    """
    told, (mask, slide) = finished_run(run), open_run_mask(run, closing)
    if told.rule:
        with raised_as(EvaluationError, StoreError):
            mask = replace(mask, pixels=RuledMask(run, told, Rule(**told.rule)))
    return told, mask, slide


def _read_annotations(
    path: Path, offset: tuple[int, int]
) -> tuple[list[str], npt.NDArray[np.object_]]:
    """Return what annotations are called, and their shapes without what is ignored.

    Raises:
        AnnotationError: they cannot be read, or there are none.
    """
    ignored, parts, called = list[Polygon](), dict[int, list[Polygon]](), dict[int, str]()
    for area in read_polygons(path, offset=offset):
        if is_ignored(area.class_name) and area.class_name != REGION_CLASS:
            ignored.append(area.polygon)
        else:
            parts.setdefault(area.feature, []).append(area.polygon)
            called[area.feature] = area.name
    if not parts:
        raise AnnotationError(f"{path} holds no areas to measure; expected QuPath's annotations")
    often, cut = Counter(called.values()), shapely.union_all(ignored)
    names = [
        name if name and often[name] == 1 else f"{name} {index}".strip()
        for index, name in called.items()
    ]
    wholes = np.array([shapely.union_all(polygons) for polygons in parts.values()], object)
    return names, shapely.difference(wholes, cut)
