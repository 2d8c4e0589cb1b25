"""Outputs again from a finished mask, with other settings: no model, no prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import SourceError, StoreError, WsiPipelineError
from wsi_pipeline.export import geojson, ome_zarr, overlay
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.geometry import Block, Region, iter_blocks
from wsi_pipeline.options import ExportOptions, Output, Settings, as_plain
from wsi_pipeline.patch_grid import open_patch_grid
from wsi_pipeline.report.record import FILES, RUN_FILE, Run, load_run, write_run_json
from wsi_pipeline.run.finished import MASK_FILES, open_mask_of, open_scan_of
from wsi_pipeline.run.outputs import (
    frame_facts,
    made_by,
    options_of,
    stamp_of,
    write_each,
    write_polygons,
    write_tiffs,
)
from wsi_pipeline.run.scans import BLOCK_SIDE, ScanResult, fitting_outputs
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.run.written import STAYS, WrittenFiles
from wsi_pipeline.sources.radiology.preprocess import Scan

AGAIN: tuple[Output, ...] = ("tiff", "geojson", "overlay")
"""What can be written again."""
DEPENDS: Mapping[Output, tuple[str, ...]] = {
    "geojson": ("simplify_um", "min_area_um2", "frame"),
    "tiff": ("tiff", "frame"),
    "overlay": (),
}
"""The options that each output depends on."""
NEED_SOURCE: frozenset[Output] = frozenset(["overlay", "dicom", "nifti"])
"""What of an image or volume is not made of its mask alone."""
MADE_OF = "was changed since it was written: the outputs are made of it"
"""How the sentence on a mask that a person has corrected goes on behind its name."""
STOPPED = "writing the outputs again was stopped: run export again"


def export_again(folder: str | Path, changes: Mapping[str, Any]) -> Run:
    """Write what is made of a run's mask again; return the run as it is now.

    Only what is missing or depends on a changed option is written. What is not changed stays as it
    was. The files are those that `segment` would have written. Where a person has corrected the
    mask of an image or volume, all is made of that one, and what `run.json` says of it.

    Args:
        folder: of one run, with `run.json` and its mask; or that `run.json`.
        changes: values of `ExportOptions` by name. `outputs` are added to those that are there.

    Raises:
        StoreError: no run, no mask, or options that it cannot have; the folder cannot be written.
        SourceError: an output needs the image or volume, and it is not there any more.
        BusyError: another process works in it.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name == RUN_FILE else folder
    path, store = folder / RUN_FILE, RunStore(folder=folder)
    run = load_run(path)
    if why := Settings(export=replace(ExportOptions(), **changes)).why_not(run.kind):
        raise StoreError(f"{folder}: {why}")
    if run.kind != "slide":
        with store.claim():
            store.remove_partials()
            try:
                return _export_scan(store, load_run(path), changes.get("outputs", ()))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                if isinstance(error, WsiPipelineError):
                    raise
                raise StoreError(_of_other_version(path, error)) from error
    if not store.finished_mask_path.is_dir():
        raise StoreError(
            f"{folder} has no finished {FILES['zarr']}; segment the slide, with zarr as an output"
        )
    with store.claim():
        store.remove_partials()
        run = load_run(path)  # as it is now that nobody else writes it
        _, mask_mpp = ome_zarr.open_finished(store.finished_mask_path)
        try:
            before = options_of(run)
            _dialect(run, mask_mpp, before)
            _side(run)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise StoreError(_of_other_version(path, error)) from error
        wanted = tuple(dict.fromkeys([*before.outputs, *changes.get("outputs", ())]))
        options = replace(before, **{**changes, "outputs": wanted})
        due = [o for o in AGAIN if o in wanted and _is_due(o, run, folder, before, options)]
        if not due:
            return run
        mask = ome_zarr.open_mask(store.finished_mask_path)
        if lost := store.damaged(_held(run, store, _blocks(run, mask)), mask):
            reason = (
                f"{len(lost)} blocks of {FILES['zarr']} are damaged on the disk; segment the slide "
                "again, which does these anew"
            )
            write_run_json(path, replace(run, status="failed", reason=reason))
            raise StoreError(f"{folder}: {reason}")
        run = replace(
            run,
            settings={**run.settings, "export": as_plain(options)},
            frame=frame_facts(options.frame, _crop(run, options)),
        )
        # from here on old files may stand beside it
        write_run_json(path, replace(run, status="failed", reason=STOPPED))
        run = _write(run, store, _dialect(run, mask_mpp, options), options, due)
        write_run_json(path, run)
        return run


def _of_other_version(path: Path, error: Exception) -> str:
    return f"{path} is not a run of this version ({error!r}); segment again"


def _export_scan(store: RunStore, run: Run, more: Sequence[Output]) -> Run:
    """Write what is missing, and what is made of a mask that a person has corrected."""
    folder, before = store.folder, options_of(run)
    options = replace(before, outputs=tuple(dict.fromkeys([*before.outputs, *more])))
    mask_file, files = folder / MASK_FILES[run.kind], WrittenFiles(store)
    is_ours = not mask_file.is_file() or mask_file.name in files.ours([mask_file.name])
    was_corrected = f"{mask_file.name} {MADE_OF}" in run.warnings
    is_stale = run.status != "done" or was_corrected or not is_ours
    paths = {output: folder / FILES[output] for output in options.outputs}
    due = [o for o, p in paths.items() if not p.exists() or (is_stale and p != mask_file)]
    if not due:
        return run
    with ExitStack() as closing:
        scan: Scan | None = None
        if NEED_SOURCE & {*due}:
            try:
                scan = open_scan_of(folder, run)
                closing.callback(scan.close)
            except SourceError as error:
                names = ", ".join(FILES[o] for o in due if o in NEED_SOURCE)
                raise SourceError(f"{folder}: {names} cannot be written: {error}") from error
            if "dicom" in due:
                fitting_outputs(scan, Settings(export=ExportOptions(outputs=("dicom",))))
        mask = open_mask_of(folder, run, closing, scan)
        shape, size = tuple(mask.shape), run.settings["predict"]["block_size"]
        blocks = list(iter_blocks(shape, (size or BLOCK_SIDE[2],) * 2)) if len(shape) == 2 else []
        result = ScanResult(
            facts=run.slide,
            model=run.model,
            key=run.settings["key"],
            classes=(ClassInfo(name=run.background), *_classes(run)),
            mask=mask,
            blocks=blocks,
            side=size or BLOCK_SIDE[2],
            ledger={b.index: store.load_block(b) for b in _held(run, store, blocks) if is_ours},
        )
        settings = {**run.settings, "export": as_plain(options)}
        kept = [w for w in run.warnings if "geojson" not in due or geojson.LEFT_OUT not in w]
        run = replace(run, settings=settings, warnings=kept, **result.amounts())
        write_run_json(folder / RUN_FILE, replace(run, status="failed", reason=STOPPED))
        clock = Clock()
        failures, written = result.write(due, scan, folder, files, clock)
    run = replace(
        files.noted(run),
        status="failed" if failures else "done",
        reason="; ".join(failures),
        regions=written.regions or run.regions,
        seconds={**run.seconds, **{name: round(s, 3) for name, s in clock.seconds.items()}},
    )
    # of a corrected mask it is not enough to say that it stays
    old = tuple(f"{mask_file.name} {how}" for how in (STAYS, MADE_OF))
    warnings = [text for text in run.warnings if not text.startswith(old)] + written.dropped
    run = replace(run, warnings=warnings + ([] if is_ours else [old[-1]]))
    write_run_json(folder / RUN_FILE, run)
    return run


def _is_due(
    output: Output, run: Run, folder: Path, before: ExportOptions, options: ExportOptions
) -> bool:
    """Return whether an output is missing, in doubt, or was written with other options."""
    if run.status != "done" or not (folder / FILES[output]).exists():
        return True
    return any(getattr(before, name) != getattr(options, name) for name in DEPENDS[output])


def _crop(run: Run, options: ExportOptions) -> Region | None:
    """Return the part of the slide that the viewer shows; None = all."""
    bounds = run.slide["bounds"]
    return Region(**bounds) if bounds and options.frame == "qupath" else None


def _dialect(run: Run, mask_mpp: tuple[float, float], options: ExportOptions) -> geojson.Dialect:
    """Return how regions become features, as `segment` makes them."""
    (x, y), mpp = mask_mpp, run.slide["mpp"]
    return geojson.Dialect(
        classes=(ClassInfo(name=run.background), *_classes(run)),
        downsample=(x / mpp[0], y / mpp[1]),
        mpp=(mpp[0], mpp[1]),
        crop=_crop(run, options),
        simplify_um=options.simplify_um,
        min_area_um2=options.min_area_um2,
        namespace=f"{run.slide['fingerprint']}/{run.model['weights_sha256']}",
        metadata=made_by(run.model, run.settings["key"]),
    )


def _classes(run: Run) -> list[ClassInfo]:
    """Return the classes but the background, in the mask's order."""
    return [
        ClassInfo(name=name, color=(c[0], c[1], c[2]) if c else None)
        for name, c in run.colors.items()
    ]


def _write(
    run: Run, store: RunStore, dialect: geojson.Dialect, options: ExportOptions, due: list[Output]
) -> Run:
    """Write what is due; return the run, "failed" if an output could not be written."""
    mask_path, clock = store.finished_mask_path, Clock()
    written: list[geojson.Written] = []
    writers: dict[Output, Callable[[Path], object]] = {
        "geojson": lambda path: written.append(_write_polygons(path, run, store, dialect)),
        "tiff": lambda path: write_tiffs(
            path, mask_path, dialect, name=Path(run.slide["name"]).stem, kind=options.tiff
        ),
        "overlay": lambda path: _write_overlay(path, store, dialect, stamp_of(run.model)),
    }
    files = WrittenFiles(store)
    failures = write_each(writers, due, store.folder, files, clock)
    warnings = run.warnings
    if written:
        warnings = [w for w in warnings if geojson.LEFT_OUT not in w] + written[0].dropped
    run = replace(
        run,
        status="failed" if failures else "done",
        reason="; ".join(failures),
        regions=written[0].regions if written else run.regions,
        seconds={**run.seconds, **{name: round(s, 3) for name, s in clock.seconds.items()}},
        warnings=warnings,
    )
    return files.noted(run)


def _write_polygons(
    path: Path, run: Run, store: RunStore, dialect: geojson.Dialect
) -> geojson.Written:
    mask = ome_zarr.open_mask(store.finished_mask_path)
    every = _blocks(run, mask)
    # tells probabilities, if that is kept
    ledger = {block.index: store.load_block(block) for block in _held(run, store, every)}
    blocks = [b for b in every if b.index in ledger or not ome_zarr.is_empty(mask, b)]
    return write_polygons(path, mask, dialect, blocks=blocks, side=_side(run), ledger=ledger)


def _blocks(run: Run, mask: ome_zarr.MaskArray) -> list[Block]:
    """Return the blocks in which a run did its mask."""
    return list(iter_blocks((mask.shape[0], mask.shape[1]), (_side(run),) * 2))


def _side(run: Run) -> int:
    settings = run.settings
    return ome_zarr.block_side(settings["predict"]["block_size"], settings["export"]["ngff"])


def _held(run: Run, store: RunStore, blocks: list[Block]) -> list[Block]:
    """Return which blocks are in the ledger, if that is the run's."""
    if store.key().get("key") != run.settings["key"]:
        return []  # lost, or of a run with other settings that was begun since
    pending = {block.index for block in store.pending(blocks)}
    return [block for block in blocks if block.index not in pending]


def _write_overlay(path: Path, store: RunStore, dialect: geojson.Dialect, note: str) -> None:
    if not store.grid_path.is_dir():
        raise WsiPipelineError("the slide's thumbnail is not kept here; segment the slide again")
    stored = open_patch_grid(store.grid_path)
    overlay.write_overlay(
        path,
        stored.thumbnail,
        ome_zarr.read_mask(store.finished_mask_path, stored.tissue.shape),
        classes=dialect.classes,
        tissue=stored.tissue,
        note=note,
    )
