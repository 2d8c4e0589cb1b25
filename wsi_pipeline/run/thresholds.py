"""Other thresholds for a finished run: masks from its probabilities, without slide or model."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from shapely import Polygon

from wsi_pipeline.annotations import REGION_CLASS, is_ignored, rasterise, read_polygons, read_region
from wsi_pipeline.errors import StoreError
from wsi_pipeline.export import MaskLike, ome_zarr
from wsi_pipeline.export.polygons.components import PROBABILITY_ONE, find_components
from wsi_pipeline.files.atomic import remove, sha256_of, written_beside
from wsi_pipeline.files.locks import make_folder, writing
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Block, Region, iter_blocks
from wsi_pipeline.options import Rule, as_plain
from wsi_pipeline.report.record import FILES, OUTPUT_FILES, RUN_FILE, Run, load_run, write_run_json
from wsi_pipeline.run.probability import NAME, choose, open_probability, with_background
from wsi_pipeline.run.quality import Judged, crossed, leave_out, quality_areas
from wsi_pipeline.run.result import BLOCK_SIDE
from wsi_pipeline.run.store import (
    RunStore,
    another,
    create_scan_mask,
    open_run_store,
    run_key,
    settle,
)
from wsi_pipeline.run.written import STAYS, WrittenFiles
from wsi_pipeline.sources.slide import frame_offset
from wsi_pipeline.tissue.quality import QUALITIES

Found = dict[Block, dict[str, npt.NDArray[Any]]]
BY_OTHERS = "polygons, areas and overview are by other thresholds than the mask: "
"""How the warning begins of a run whose mask stays as it is."""
UNFINISHED = "its outputs are not written yet: give the same export again"


class RuledMask:
    """The mask that a run has by another rule, made of its probabilities where it is sliced.

    Args:
        folder: of the run.
        corrections: GeoJSON of what a person says. Where it has areas of Region*, what lies in one
            of a class is that, and the rest background; else the mask is the rule's, or, of an
            empty one, as it was.

    Attributes:
        shape: (y, x) or (z, y, x).
        mpp: (y, x) µm per pixel of a slide's.
        side: of its blocks.
        unreadable: the value of what could not be read.

    Raises:
        StoreError: the run has no probabilities, its ROI is not kept, or corrections have no areas
            of Region* or are not of a slide.
        UsageError: a class that it has not.
        AnnotationError: corrections cannot be read.
    """

    def __init__(self, folder: Path, run: Run, rule: Rule, corrections: Path | None = None) -> None:
        self._run, self._rule, self._found = run, rule, open_probability(folder)
        self.unreadable = len(self._found.classes) + 1
        self._thresholds, store = rule.of(self._found.classes), RunStore(folder=folder)
        self.side, self._roi = run.settings["predict"]["block_size"], None
        self._judged: Judged | None = None
        self._keeps_mask, self._corrected = corrections is not None and not rule, Corrected()
        if corrections is not None:
            self._corrected = read_corrected(corrections, run)
        if run.kind != "slide":
            self.shape = tuple(reversed(run.slide["size"]))
            self.side = self.side or BLOCK_SIDE[len(self.shape)]
            return
        self._skip = run.settings["predict"].get("skip") or ()
        self._judged = Judged(folder) if self._skip else None
        (self._mask, *_), self.mpp = ome_zarr.open_finished(store.finished_mask_path)
        self.shape, select, bounds = self._mask.shape, run.settings["select"], run.slide["bounds"]
        self.side = ome_zarr.block_side(self.side, run.settings["export"]["ngff"])
        if select["roi"]:
            if not store.roi_path.is_file():
                raise StoreError(f"{store.roi_path}, the run's ROI, is lost; segment again")
            offset = frame_offset(Region(**bounds) if bounds else None, select["frame"])
            self._roi = read_region(store.roi_path, offset=offset)

    def __getitem__(self, key: Any, /) -> npt.NDArray[np.uint8]:
        """Return the class indices of a box, by its slices without steps."""
        start, stop = (tuple(getattr(s, end) for s in key) for end in ("start", "stop"))
        return self.read(Block(index=(), start=start, stop=stop))[0]

    def read(self, block: Block) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
        """Return the class of each pixel of a block, and its probability in 1/65535."""
        pixels, probability = np.zeros(block.shape, np.uint8), np.zeros(block.shape, np.uint16)
        for row, planes in self._found.iter_rows(block.start, block.stop):
            # Most of a slide is glass.
            if planes.any():
                rows = slice(row, row + planes.shape[1])
                every = with_background(planes)
                best, pixels[rows] = choose(every, self._thresholds, self._rule.min_margin)
                probability[rows] = np.rint(best.clip(0, 1) * PROBABILITY_ONE)
        if self._keeps_mask:
            pixels = np.array(self._mask[block.slices])
        if self._roi is not None or self._corrected.regions:
            (y, x), (height, width), (mpp_y, mpp_x) = block.start, block.shape, self.mpp
            fine = (mpp_y / self._run.slide["mpp"][1], mpp_x / self._run.slide["mpp"][0])
            mark = partial(
                rasterise, shape=(height, width), origin=(y * fine[0], x * fine[1]), downsample=fine
            )
            if self._roi is not None:
                pixels *= mark(self._roi)
        if self._judged:
            leave_out(pixels, self._judged.of(block), self._judged.side, self._skip)
        if self._corrected.regions:
            said = mark(self._corrected.regions) & ~mark(self._corrected.ignored)
            if said.any():
                pixels[said], probability[said] = 0, PROBABILITY_ONE
                for index, areas in self._corrected.drawn:
                    pixels[said & mark(areas)] = index
        if self._run.bad_regions:
            bad = np.asarray(self._mask[block.slices]) == self.unreadable
            pixels[bad], probability[bad] = self.unreadable, 0
        return pixels, probability


class Corrected(NamedTuple):
    """What a person says of a slide: polygons in level-0 pixels.

    Attributes:
        regions: in which it counts.
        ignored: parts of these in which it does not.
        drawn: class index and areas, of which later ones lie on top.
    """

    regions: Sequence[Polygon] = ()
    ignored: Sequence[Polygon] = ()
    drawn: Sequence[tuple[int, Sequence[Polygon]]] = ()


def read_corrected(path: Path, run: Run) -> Corrected:
    """Read GeoJSON of corrections in the frame of a run's polygons; return what it says.

    Raises: see `RuledMask`.
    """
    offset = (0.0, 0.0)
    if run.kind == "slide":
        x, y = run.frame["offset"]
        offset = (float(x), float(y))
    # The smallest lies on top, as in QuPath.
    areas = sorted(read_polygons(path, offset=offset), key=lambda area: -area.polygon.area)
    regions = [area.polygon for area in areas if area.class_name == REGION_CLASS]
    if run.kind != "slide" or not regions:
        raise StoreError(
            f"{path}: corrections are of slides, with an area of {REGION_CLASS} around what was "
            "looked at: in it what has no area of a class is background"
        )
    if any(area.class_name is None for area in areas):
        raise StoreError(
            f"{path} has areas without a class; give them one, Ignore* where none fits"
        )
    # To the rules of other classes, its star makes it one that does not count.
    others = [area for area in areas if area.class_name != REGION_CLASS]
    ignored = [area.polygon for area in others if is_ignored(area.class_name)]
    index = {info.name: i for i, info in enumerate(run.classes)}
    drawn = [
        (index.get(area.class_name or "", 0), area.polygon)
        for area in others
        if not is_ignored(area.class_name)
    ]
    groups = itertools.groupby(drawn, key=lambda pair: pair[0])
    return Corrected(regions, ignored, [(i, [p for _, p in pairs]) for i, pairs in groups])


def write_ruled_mask(
    folder: Path, run: Run, rule: Rule, path: Path, corrections: Path | None = None
) -> Found:
    """Write the mask that a run has by another rule, from its probabilities, block by block.

    Args:
        folder: of the run.
        path: of the new mask, an OME-Zarr, of images and volumes an array `0`.

    Returns:
        Pieces, pixels and checksums of each block that holds anything.

    Raises: see `RuledMask`.
    """
    ruled = RuledMask(folder, run, rule, corrections)
    if run.kind == "slide":
        new = ome_zarr.create_mask(
            path,
            ruled.shape,
            classes=run.classes,
            mask_mpp=ruled.mpp,
            ngff=run.settings["export"]["ngff"],
            name=Path(run.slide["name"]).stem,
        )
    else:
        new = create_scan_mask(path, ruled.shape)

    def do(block: Block) -> tuple[Block, dict[str, npt.NDArray[Any]]]:
        pixels, probability = ruled.read(block)
        if not pixels.any():
            return block, {}
        ome_zarr.write_block(new, block, pixels)
        arrays = {"counts": np.bincount(pixels.ravel(), minlength=ruled.unreadable + 1)}
        if pixels.ndim == 2:
            corner = (block.start[0], block.start[1])
            arrays |= find_components(pixels, probability, corner).as_arrays()
        arrays["chunks"] = settle(new, block)
        return block, arrays

    done = map_in_threads(do, iter_blocks(ruled.shape, (ruled.side,) * len(ruled.shape)))
    ledger = {block: arrays for block, arrays in done if arrays}
    if run.kind == "slide":
        ome_zarr.build_pyramid(path, run.classes)
    return ledger


def areas_of(
    folder: Path, run: Run, mask: MaskLike, blocks: Iterable[Block], mm2: float
) -> dict[str, Any]:
    """Return `area_mm2` and `quality_mm2` of a run, counted in the blocks of a mask.

    Args:
        folder: of the run, which holds the quality of its cells if it tells of that.
        mm2: of a mask pixel.
    """
    judged = Judged(folder) if run.quality_mm2 else None

    def count(block: Block) -> npt.NDArray[np.int64]:
        pixels = np.asarray(mask[block.slices])
        found = np.zeros((256, 1 + len(QUALITIES)), np.int64)
        found[:, 0] = np.bincount(pixels.ravel(), minlength=256)
        if judged:
            found[:, 1:] = crossed(pixels, judged.of(block), judged.side, 256)
        return found

    counts = sum(map_in_threads(count, blocks), np.zeros((256, 1 + len(QUALITIES)), np.int64))
    for column, quality in enumerate(QUALITIES, start=1):
        # Of each quality there is as much as before; blocks without any class are not looked at.
        whole = math.fsum(told.get(quality.name, 0) for told in run.quality_mm2.values())
        counts[0, column] = round(whole / mm2) - counts[1:, column].sum()
    areas = {c.name: float(counts[i, 0] * mm2) for i, c in enumerate(run.classes[1:], start=1)}
    return {"area_mm2": areas, "quality_mm2": quality_areas(counts[:, 1:], run.classes, mm2)}


def copy_ruled(folder: Path, output: Path, rule: Rule, corrections: Path | None = None) -> Path:
    """Make a run of its own of another one's probabilities by a rule; return its folder.

    With corrections it is of the other one's mask, but for these.

    Its mask and probabilities are whole; what is made of them is left to `export_again`.

    Args:
        folder: of the run; nothing in it is changed.
        output: in which the new folder has the same name.

    Raises:
        StoreError: the run has no probabilities; the folder is that of another run.
        BusyError: another process works in one of them.
    """
    run, source = load_run(folder), RunStore(folder=folder)
    target = output / folder.name
    if target.resolve() == folder.resolve():
        raise StoreError(f"{output} holds this very run; choose another --output")
    told = {"corrections": sha256_of(corrections)} if corrections else {}
    key = run_key({"run": run.settings["key"], **as_plain(rule), **told})
    fingerprint, model = run.slide["fingerprint"], source.key().get("model", "")
    make_folder(target)
    with source.claim(), RunStore(folder=target).claim():
        if (target / RUN_FILE).is_file():
            there = load_run(target)
            if there.slide.get("fingerprint") != fingerprint:
                raise another(target, "slide")
            if there.settings.get("key") == key and there.status == "done":
                return target
        store = open_run_store(
            target, fingerprint=fingerprint, model=model, key=key, overwrite=False
        )
        with writing(target):
            with written_beside(store.mask_path) as partial:
                ledger = write_ruled_mask(folder, run, rule, partial, corrections)
            ours = WrittenFiles(store).ours(OUTPUT_FILES)
            # Without it nobody takes what comes next for another run's.
            (target / RUN_FILE).unlink(missing_ok=True)
            for name in ours:
                remove(target / name)
            if run.kind == "slide":
                os.rename(store.mask_path, store.finished_mask_path)
                levels, mpp = ome_zarr.open_finished(store.finished_mask_path)
                mm2 = math.prod(mpp) * 1e-6
                run = replace(run, **areas_of(folder, run, levels[0], ledger, mm2))
            for block, arrays in ledger.items():
                store.finish_block(block, arrays)
            for kept, copy in (
                (folder / NAME, target / NAME),
                (folder / FILES["quality"], target / FILES["quality"]),
                (source.grid_path, store.grid_path),
                (source.roi_path, store.roi_path),
            ):
                if kept.is_dir():
                    shutil.copytree(kept, copy, dirs_exist_ok=True)
                elif kept.is_file():
                    shutil.copyfile(kept, copy)
            predict = {**run.settings["predict"], **as_plain(rule)}
            made = replace(
                run,
                status="failed",
                reason=UNFINISHED,
                settings={
                    **run.settings,
                    "key": key,
                    "predict": predict,
                    "made_of": run.settings["key"],
                    **told,
                },
                warnings=[
                    *(w for w in run.warnings if STAYS not in w and BY_OTHERS not in w),
                    *([f"corrected by hand, as {corrections.name} says"] if corrections else ()),
                ],
                files={},
                rule={},
                certificate=None,
            )
            write_run_json(target / RUN_FILE, made)
    return target
