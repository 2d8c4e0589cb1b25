"""Other thresholds for a finished run: masks from its probabilities, without slide or model."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.annotations import rasterise, read_region
from wsi_pipeline.errors import StoreError
from wsi_pipeline.export import MaskLike, ome_zarr
from wsi_pipeline.export.polygons.components import PROBABILITY_ONE, find_components
from wsi_pipeline.files.atomic import remove, written_beside
from wsi_pipeline.files.locks import make_folder, writing
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Block, Region, iter_blocks
from wsi_pipeline.options import Rule, as_plain
from wsi_pipeline.report.record import OUTPUT_FILES, RUN_FILE, Run, load_run, write_run_json
from wsi_pipeline.run.probability import NAME, choose, open_probability, with_background
from wsi_pipeline.run.store import RunStore, another, open_run_store, run_key, settle
from wsi_pipeline.run.written import STAYS, WrittenFiles
from wsi_pipeline.sources.slide import frame_offset

Found = dict[Block, dict[str, npt.NDArray[Any]]]
BY_OTHERS = "polygons, areas and overview are by other thresholds than the mask: "
"""How the warning begins of a run whose mask stays as it is."""
ONLY_SLIDES = "thresholds are for slides, whose runs keep probabilities"
UNFINISHED = "its outputs are not written yet: give the same export again"


def write_ruled_mask(folder: Path, run: Run, rule: Rule, path: Path) -> Found:
    """Write the mask that a run has by another rule, from its probabilities, block by block.

    Args:
        folder: of the run.
        path: of the new OME-Zarr.

    Returns:
        Pieces, pixels and checksums of each block that holds anything.

    Raises:
        StoreError: the run has no probabilities, or its ROI is not kept.
        UsageError: a class that it has not.
    """
    found, store = open_probability(folder), RunStore(folder=folder)
    thresholds, unreadable = rule.of(found.classes), len(found.classes) + 1
    (mask, *_), mask_mpp = ome_zarr.open_finished(store.finished_mask_path)
    export, select, bounds = (run.settings["export"], run.settings["select"], run.slide["bounds"])
    side = ome_zarr.block_side(run.settings["predict"]["block_size"], export["ngff"])
    fine = (mask_mpp[0] / run.slide["mpp"][1], mask_mpp[1] / run.slide["mpp"][0])
    roi = None
    if select["roi"]:
        if not store.roi_path.is_file():
            raise StoreError(f"{store.roi_path}, the run's ROI, is lost; segment the slide again")
        offset = frame_offset(Region(**bounds) if bounds else None, select["frame"])
        roi = read_region(store.roi_path, offset=offset)
    new = ome_zarr.create_mask(
        path,
        mask.shape,
        classes=run.classes,
        mask_mpp=mask_mpp,
        ngff=export["ngff"],
        name=Path(run.slide["name"]).stem,
    )

    def do(block: Block) -> tuple[Block, dict[str, npt.NDArray[Any]]]:
        (y, x), shape = block.start, (block.shape[0], block.shape[1])
        pixels, probability = np.zeros(shape, np.uint8), np.zeros(shape, np.uint16)
        for row, planes in found.iter_rows(block.start, block.stop):
            # Most of a slide is glass.
            if planes.any():
                rows = slice(row, row + planes.shape[1])
                every = with_background(planes)
                best, pixels[rows] = choose(every, thresholds, rule.min_margin)
                probability[rows] = np.rint(best.clip(0, 1) * PROBABILITY_ONE)
        if roi is not None:
            pixels *= rasterise(roi, shape, origin=(y * fine[0], x * fine[1]), downsample=fine)
        if run.bad_regions:
            bad = np.asarray(mask[block.slices]) == unreadable
            pixels[bad], probability[bad] = unreadable, 0
        if not pixels.any():
            return block, {}
        ome_zarr.write_block(new, block, pixels)
        arrays = find_components(pixels, probability, (y, x)).as_arrays()
        arrays["counts"] = np.bincount(pixels.ravel(), minlength=unreadable + 1)
        arrays["chunks"] = settle(new, block)
        return block, arrays

    done = map_in_threads(do, iter_blocks(mask.shape, (side, side)))
    ledger = {block: arrays for block, arrays in done if arrays}
    ome_zarr.build_pyramid(path, run.classes)
    return ledger


def areas_of(run: Run, mask: MaskLike, blocks: Iterable[Block], mm2: float) -> dict[str, float]:
    """Return mm² of each class that a run tells of, counted in the blocks of a mask.

    Args:
        mm2: of a mask pixel.
    """

    def count(block: Block) -> npt.NDArray[np.int64]:
        return np.bincount(np.asarray(mask[block.slices]).ravel(), minlength=256)

    counts = sum(map_in_threads(count, blocks), np.zeros(256, np.int64))
    return {c.name: float(counts[i] * mm2) for i, c in enumerate(run.classes[1:], start=1)}


def copy_ruled(folder: Path, output: Path, rule: Rule) -> Path:
    """Make a run of its own of another one's probabilities by a rule; return its folder.

    Its mask and probabilities are whole; what is made of them is left to `export_again`.

    Args:
        folder: of the run; nothing in it is changed.
        output: in which the new folder has the same name.

    Raises:
        StoreError: the run has no probabilities; the folder is that of another run.
        BusyError: another process works in one of them.
    """
    run, source = load_run(folder), RunStore(folder=folder)
    if run.kind != "slide":
        raise StoreError(f"{folder}: {ONLY_SLIDES}")
    target = output / folder.name
    if target.resolve() == folder.resolve():
        raise StoreError(f"{output} holds this very run; choose another --output")
    key = run_key({"run": run.settings["key"], **as_plain(rule)})
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
                ledger = write_ruled_mask(folder, run, rule, partial)
            ours = WrittenFiles(store).ours(OUTPUT_FILES)
            # Without it nobody takes what comes next for another run's.
            (target / RUN_FILE).unlink(missing_ok=True)
            for name in ours:
                remove(target / name)
            os.rename(store.mask_path, store.finished_mask_path)
            for block, arrays in ledger.items():
                store.finish_block(block, arrays)
            for kept, copy in (
                (folder / NAME, target / NAME),
                (source.grid_path, store.grid_path),
                (source.roi_path, store.roi_path),
            ):
                if kept.is_dir():
                    shutil.copytree(kept, copy, dirs_exist_ok=True)
                elif kept.is_file():
                    shutil.copyfile(kept, copy)
            levels, mpp = ome_zarr.open_finished(store.finished_mask_path)
            predict = {**run.settings["predict"], **as_plain(rule)}
            made = replace(
                run,
                status="failed",
                reason=UNFINISHED,
                settings={**run.settings, "key": key, "predict": predict},
                area_mm2=areas_of(run, levels[0], ledger, math.prod(mpp) * 1e-6),
                warnings=[w for w in run.warnings if STAYS not in w and BY_OTHERS not in w],
                files={},
                rule={},
                certificate=None,
            )
            write_run_json(target / RUN_FILE, made)
    return target
