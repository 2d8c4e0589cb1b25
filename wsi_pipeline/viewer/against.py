"""A second run or a truth over a run that is looked at: tiles of it, and of where both differ."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsi_pipeline.errors import EvaluationError, SourceError, StoreError
from wsi_pipeline.evaluation.confusion import IGNORE
from wsi_pipeline.evaluation.disagreement import KINDS, kinds_of
from wsi_pipeline.evaluation.inputs import (
    MaskReader,
    Placement,
    Reader,
    SlideFrame,
    open_side,
    reader_of,
    settle_slide,
)
from wsi_pipeline.evaluation.masks import MaskFile
from wsi_pipeline.evaluation.meaning import LabelMap
from wsi_pipeline.export import ome_zarr
from wsi_pipeline.report.record import RUN_FILE, UNREADABLE, load_run
from wsi_pipeline.viewer.run_view import ShownPicture, indexed_png, place_of

MOST_READ = 1 << 26
"""Pixels of a mask without a pyramid that a tile may cost."""
SHOWN_KINDS = slice(2, 5)
"""Of `KINDS`: what only one of both has, and what they call by different names."""
LAYERS = ("other", "differences")


def against_facts(name: str) -> dict[str, Any]:
    """Return what the page has to know: what was named, "" for nothing, and what colours mean."""
    told = ("this run only", "the other only", KINDS[4][0])
    colors = [color for _, color in KINDS[SHOWN_KINDS]]
    kinds = [{"name": n, "color": c} for n, c in zip(told, colors, strict=True)]
    return {"against": name, "kinds": kinds}


@dataclass(frozen=True, kw_only=True, eq=False)
class Against:
    """What a run is held against, opened.

    Attributes:
        readers: of its classes at one resolution after the other, the finest first.
        names: of the run's classes, and behind them those that the other has besides.
    """

    shown: ShownPicture
    readers: Sequence[Reader]
    names: tuple[str, ...]

    def tile(self, layer: str, level: int, column: int, row: int) -> bytes:
        """Return a PNG over a tile of the run's mask, of the other's classes or of what differs.

        Raises:
            SourceError: there is no such tile or layer, or it would take too long.
            EvaluationError: the other is damaged there.
        """
        shown = self.shown
        if layer not in LAYERS or not 0 <= level < len(shown.mask):
            raise SourceError(f"no layer {layer} at level {level}")
        mask = shown.mask[level]
        (y, x), shape = place_of((mask.shape[0], mask.shape[1]), column, row)
        down_y, down_x = (d * 2**level for d in shown.mask_downsample)
        fitting = [r for r in self.readers if not r.downsample or r.downsample[0] <= down_y * 1.01]
        reader = (fitting or self.readers)[-1 if fitting else 0]
        own = reader.downsample or (down_y, down_x)
        if shape[0] * shape[1] * (down_y / own[0]) * (down_x / own[1]) > MOST_READ:
            raise SourceError("what is compared with has no coarser levels; zoom in to see it")
        other = reader.read((y, x), shape, (down_y, down_x))
        if layer == "other":
            other[other == IGNORE] = 0
            colors = [tuple(of["color"]) for of in shown.legend(self.names)]
            return indexed_png(other, colors, frozenset([0]))
        own_classes = shown.mask_pixels(level, (y, x), shape)
        if UNREADABLE.name in shown.classes:
            own_classes[own_classes == list(shown.classes).index(UNREADABLE.name)] = IGNORE
        hidden = frozenset(range(len(KINDS))) - {*range(len(KINDS))[SHOWN_KINDS]}
        return indexed_png(kinds_of(own_classes, other), [color for _, color in KINDS], hidden)


def open_against(shown: ShownPicture, path: Path) -> Against:
    """Open what a run is to be held against: a run's folder, a mask or GeoJSON; return it.

    Raises:
        EvaluationError: nothing to compare with, or of a slide of another size.
        AnnotationError: GeoJSON that cannot be read.
        StoreError: a run of another slide.
    """
    run = shown.run
    if (path / RUN_FILE).is_file():
        other = load_run(path / RUN_FILE)
        if other.slide.get("fingerprint") != run.slide.get("fingerprint"):
            raise StoreError(f"{path} is a run of another {run.kind}: its content differs")
    slide = SlideFrame.of_run(run)
    frame = run.frame.get("for", "openslide")
    with ExitStack() as closing:
        side = open_side(
            path, values=LabelMap(), renamed={}, slide=slide, frame=frame, closing=closing
        )
        settle_slide([side], slide, None)
        names = tuple(dict.fromkeys([*shown.classes, *side.names]))
        indices = {name: i for i, name in enumerate(names) if i}
        readers = [reader_of(side, slide, indices, frame)]
        if isinstance(whole := readers[0], MaskReader) and isinstance(side.content, MaskFile):
            # a pyramid, where it is a run's or one like it
            with suppress(StoreError, EvaluationError):
                for n, pixels in enumerate(ome_zarr.open_levels(side.content.path)[1:], start=1):
                    placement = Placement(
                        origin=whole.origin,
                        downsample=(whole.downsample[0] * 2**n, whole.downsample[1] * 2**n),
                    )
                    readers.append(
                        MaskReader(replace(side.content, pixels=pixels), placement, indices)
                    )
        against = Against(shown=shown, readers=readers, names=names)
        weakref.finalize(against, closing.pop_all().close)
        return against
