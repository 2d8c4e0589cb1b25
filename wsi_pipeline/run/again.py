"""Outputs again from a finished mask, with other settings: no model, no prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsi_pipeline.errors import SourceError, StoreError
from wsi_pipeline.export import MaskLike, ome_zarr
from wsi_pipeline.export.features import LEFT_OUT
from wsi_pipeline.files.atomic import remove
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.geometry import Block, Shape, iter_blocks
from wsi_pipeline.options import (
    ON_REQUEST,
    POLYGONS,
    ExportOptions,
    Output,
    Rule,
    Settings,
    as_plain,
)
from wsi_pipeline.patch_grid import open_patch_grid
from wsi_pipeline.report.record import FILES, RUN_FILE, Run, files_of, load_run, write_run_json
from wsi_pipeline.run.facts import headers_of, options_of
from wsi_pipeline.run.finished import (
    MASK_FILES,
    of_this_version,
    open_mask_of,
    open_scan_of,
    open_slide_of,
)
from wsi_pipeline.run.probability import open_probability
from wsi_pipeline.run.result import (
    BLOCK_SIDE,
    ImageResult,
    Ledger,
    Result,
    SlideResult,
    VolumeResult,
    without_dicom,
)
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.run.thresholds import BY_OTHERS, Found, areas_of, write_ruled_mask
from wsi_pipeline.run.written import STAYS, WrittenFiles
from wsi_pipeline.sources.radiology.preprocess import Scan

AGAIN: tuple[Output, ...] = ("tiff", "geojson", "overlay", *ON_REQUEST["slide"])
"""What of a slide can be written again."""
DEPENDS: Mapping[Output, tuple[str, ...]] = {
    "geojson": ("simplify_um", "min_area_um2", "frame"),
    "tiff": ("tiff", "frame"),
    "overlay": (),
    "dicom": ("simplify_um", "min_area_um2"),
    "geoparquet": ("simplify_um", "min_area_um2", "frame"),
    "anndata": ("simplify_um", "min_area_um2", "frame"),
    "spatialdata": ("simplify_um", "min_area_um2"),
    "quality": (),
}
"""The options that each output depends on."""
NEED_SOURCE: frozenset[Output] = frozenset(["overlay", "dicom", "nifti"])
"""What of an image or volume is not made of its mask alone."""
MADE_OF = "was changed since it was written: the outputs are made of it"
"""How the sentence on a mask that a person has corrected goes on behind its name."""
STOPPED = "writing the outputs again was stopped: run export again"


@dataclass(frozen=True, kw_only=True)
class _Again:
    """What is to be written again.

    Attributes:
        due: outputs that are missing, in doubt, or depend on what was changed.
        open: opens the mask, and what outputs need beside it.
        changes: returns fields of the run that are others now.
        mask_name: of the file that people may correct, "" where there is none.
        is_corrected: whether somebody has.
    """

    due: list[Output]
    open: Callable[[ExitStack], Result]
    changes: Callable[[Any], Mapping[str, Any]]
    mask_name: str = ""
    is_corrected: bool = False


def export_again(folder: str | Path, changes: Mapping[str, Any], rule: Rule | None = None) -> Run:
    """Write what is made of a run's mask again; return the run as it is now.

    Only what is missing or depends on a changed option is written. What is not changed stays as it
    was. The files are those that `segment` would have written. Where a person has corrected the
    mask of an image or volume, all is made of that one, and what `run.json` says of it.

    Args:
        folder: of one run, with `run.json` and its mask; or that `run.json`.
        changes: values of `ExportOptions` by name. `outputs` are added to those that are there.
        rule: by which polygons, tables and overlay are made of the probabilities, while the mask
            stays; an empty one = of the mask again; None = as it was.

    Raises:
        StoreError: no run, no mask, or options that it cannot have; the folder cannot be written.
        SourceError: an output needs the slide, image or volume, and it is not there any more.
        BusyError: another process works in it.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name == RUN_FILE else folder
    path, store = folder / RUN_FILE, RunStore(folder=folder)
    run = load_run(path)
    asked = Settings(export=replace(ExportOptions(), **changes), named=changes)
    if why := asked.why_not(run.kind):
        raise StoreError(f"{folder}: {why}")
    with store.claim(), ExitStack() as closing:
        store.remove_partials()
        # Nobody else writes it from here on.
        run = load_run(path)
        files, clock = WrittenFiles(store), Clock()
        with of_this_version(folder):
            before = options_of(run)
            wanted = tuple(dict.fromkeys([*before.outputs, *changes.get("outputs", ())]))
            options = replace(before, **{**changes, "outputs": wanted})
            ruled = run.rule if rule is None else as_plain(rule) if rule else {}
            again = KINDS[run.kind](store, run, files, before, options, ruled)
            if not again.due and ruled == run.rule:
                return run
            result = again.open(closing)
            changed = again.changes(result)
        run = replace(run, settings={**run.settings, "export": as_plain(options)}, **changed)
        # From here on old files may stand beside it.
        write_run_json(path, replace(run, status="failed", reason=STOPPED))
        failures, written = result.write(again.due, folder, files, clock)
        warnings = [text for text in run.warnings if not text.startswith(BY_OTHERS)]
        if ruled:
            warnings.append(f"{BY_OTHERS}{Rule(**ruled)}")
        if "geojson" in again.due:
            warnings = [w for w in warnings if LEFT_OUT not in w] + written.dropped
        run = replace(
            files.noted(replace(run, warnings=warnings)),
            status="failed" if failures else "done",
            reason="; ".join(failures),
            regions=written.regions or run.regions,
            largest=written.largest or run.largest,
            seconds={**run.seconds, **{name: round(s, 3) for name, s in clock.seconds.items()}},
        )
        if again.mask_name:
            # Of a corrected mask it is not enough to say that it stays.
            old = tuple(f"{again.mask_name} {how}" for how in (STAYS, MADE_OF))
            warnings = [text for text in run.warnings if not text.startswith(old)]
            run = replace(run, warnings=warnings + ([old[-1]] if again.is_corrected else []))
        write_run_json(path, run)
        return run


def _slide(
    store: RunStore,
    run: Run,
    files: WrittenFiles,
    before: ExportOptions,
    options: ExportOptions,
    ruled: Mapping[str, Any],
) -> _Again:
    mask_path = store.finished_mask_path
    if not mask_path.is_dir():
        raise StoreError(
            f"{store.folder} has no finished {FILES['zarr']}; segment the slide, with zarr as an "
            "output"
        )
    (_, (mask_y, mask_x)), (x, y) = ome_zarr.open_finished(mask_path), run.slide["mpp"]
    mask = ome_zarr.open_mask(mask_path)
    side = ome_zarr.block_side(
        run.settings["predict"]["block_size"], run.settings["export"]["ngff"]
    )
    every, names = list(iter_blocks(mask.shape, (side, side))), files_of(options, run.files)

    def is_due(output: Output) -> bool:
        is_lost = not all((store.folder / n).exists() for n in names[output])
        # It appears when it is whole, and depends on nothing but the slide.
        if is_lost or (run.status != "done" and output != "quality"):
            return True
        if ruled != run.rule and output not in ("tiff", "quality"):
            return True
        return any(getattr(before, n) != getattr(options, n) for n in DEPENDS[output])

    def open_result(closing: ExitStack) -> Result:
        headers = []
        # The slide may be DICOM, to which DICOM refers.
        if "dicom" in due and run.slide["backend"] in ("openslide", "dicomweb"):
            with open_slide_of(store.folder, run) as slide:
                headers = headers_of(slide)
        held = held_blocks(store, run, every)
        if lost := store.damaged(held, mask):
            reason = (
                f"{len(lost)} blocks of {FILES['zarr']} are damaged on the disk; segment the slide "
                "again, which does these anew"
            )
            write_run_json(store.folder / RUN_FILE, replace(run, status="failed", reason=reason))
            raise StoreError(f"{store.folder}: {reason}")
        # The ledger tells probabilities, if it is kept.
        judged = ledger = {block.index: store.load_block(block) for block in held}
        if "quality" in due and not held and run.patches.get("kept"):
            raise StoreError(f"{store.folder}: what blocks were like is lost; segment again")
        shown: MaskLike = mask
        ruled_path = None
        if ruled:
            shown, found = _ruled(store, run, ruled, closing)
            ruled_path = store.ruled_path
            ledger, blocks = {b.index: arrays for b, arrays in found.items()}, list(found)
        else:
            blocks = [b for b in every if b.index in ledger or not ome_zarr.is_empty(mask, b)]
        return SlideResult(
            **_common(store.folder, run, ledger),
            mask=shown,
            blocks=blocks,
            judged=judged,
            ruled_path=ruled_path,
            side=side,
            mask_path=mask_path,
            downsample=(mask_y / y, mask_x / x),
            folder=store.folder,
            headers=headers,
            options=options,
            stored=open_patch_grid(store.grid_path) if store.grid_path.is_dir() else None,
        )

    def changes_of(result: SlideResult) -> Mapping[str, Any]:
        changed = {"frame": result.frame, "rule": ruled}
        if ruled == run.rule:
            return changed
        mm2 = result.features.pixel_mm2
        return {**changed, **areas_of(store.folder, run, result.mask, result.blocks, mm2)}

    due = [output for output in AGAIN if output in options.outputs and is_due(output)]
    return _Again(due=due, open=open_result, changes=changes_of)


def _scan(
    store: RunStore,
    run: Run,
    files: WrittenFiles,
    before: ExportOptions,
    options: ExportOptions,
    ruled: Mapping[str, Any],
) -> _Again:
    folder = store.folder
    mask_file = folder / MASK_FILES[run.kind]
    is_ours = not mask_file.is_file() or mask_file.name in files.ours([mask_file.name])
    was_corrected = f"{mask_file.name} {MADE_OF}" in run.warnings
    is_stale = run.status != "done" or was_corrected or not is_ours
    due = list[Output]()
    for output, names in files_of(options).items():
        is_lost = not all((folder / name).exists() for name in names)
        is_old = is_stale and mask_file.name not in names
        is_other = ruled != run.rule and output in (POLYGONS | {"overlay"})
        if output != "probability" and (is_lost or is_old or is_other):
            due.append(output)

    def open_result(closing: ExitStack) -> Result:
        scan: Scan | None = None
        if needing := [FILES[output] for output in due if output in NEED_SOURCE]:
            try:
                scan = open_scan_of(folder, run)
            except SourceError as error:
                raise SourceError(
                    f"{folder}: {', '.join(needing)} cannot be written: {error}; put it back"
                ) from error
            closing.callback(scan.close)
            if "dicom" in due:
                without_dicom(scan, Settings(export=ExportOptions(outputs=("dicom",))))
        own = mask = open_mask_of(folder, run, closing, scan)
        shape: Shape = tuple(mask.shape)
        side = run.settings["predict"]["block_size"] or BLOCK_SIDE[2]
        blocks = list(iter_blocks(shape, (side, side))) if len(shape) == 2 else []
        ledger = {b.index: store.load_block(b) for b in held_blocks(store, run, blocks) if is_ours}
        if ruled:
            mask, found = _ruled(store, run, ruled, closing)
            ledger = {b.index: arrays for b, arrays in found.items()}
        kind = {"image": ImageResult, "volume": VolumeResult}[run.kind]
        result: Result = kind(
            **_common(folder, run, ledger),
            mask=mask,
            own_mask=own,
            blocks=blocks,
            side=side,
            scan=scan,
        )
        return result

    return _Again(
        due=due,
        open=open_result,
        changes=lambda result: {**result.amounts, "rule": ruled},
        mask_name=mask_file.name,
        is_corrected=not is_ours,
    )


KINDS = {"slide": _slide, "image": _scan, "volume": _scan}
"""What is written again, and how it is opened, by what was segmented."""


def _common(folder: Path, run: Run, ledger: Ledger) -> dict[str, Any]:
    """Return the fields of `Result` that a folder and its `run.json` tell."""
    probability = None
    with suppress(StoreError):
        probability = open_probability(folder)
    return {
        "probability": probability,
        "facts": run.slide,
        "model": run.model,
        "key": run.settings["key"],
        "classes": run.classes,
        "ledger": ledger,
    }


def _ruled(
    store: RunStore, run: Run, ruled: Mapping[str, Any], closing: ExitStack
) -> tuple[MaskLike, Found]:
    """Return the mask by another rule, until it is closed, and what is known of its blocks."""
    path = store.ruled_path
    remove(path)
    closing.callback(remove, path)
    found = write_ruled_mask(store.folder, run, Rule(**ruled), path)
    return ome_zarr.open_mask(path), found


def held_blocks(store: RunStore, run: Run, blocks: list[Block]) -> list[Block]:
    """Return which blocks are in the ledger, if that is the run's, in their order."""
    if store.key().get("key") != run.settings["key"]:
        # The ledger is lost, or is that of a run with other settings that was begun since.
        return []
    pending = {block.index for block in store.pending(blocks)}
    return [block for block in blocks if block.index not in pending]
