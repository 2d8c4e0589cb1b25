"""The main job, top to bottom: a slide, image or volume and a bundle in, a run's folder out."""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import (
    BundleError,
    BusyError,
    ClusterError,
    SourceError,
    StoreError,
    WsiPipelineError,
)
from wsi_pipeline.export import ome_zarr
from wsi_pipeline.files.atomic import remove, sha256_of, sync, written_beside
from wsi_pipeline.files.locks import claimed, make_folder, writing
from wsi_pipeline.files.paths import is_remote, name_of, without_secrets
from wsi_pipeline.files.remote import reaching, upload
from wsi_pipeline.geometry import Block, Region, iter_blocks
from wsi_pipeline.networks import build
from wsi_pipeline.options import (
    MPP_TOLERANCE,
    OUTPUTS,
    ExportOptions,
    SelectOptions,
    Settings,
    as_plain,
)
from wsi_pipeline.patch_grid import (
    GRID_FILES,
    PIXEL_CHUNK,
    StoredGrid,
    close_patch_grid,
    is_patch_grid,
    open_patch_grid,
    write_patch_grid,
)
from wsi_pipeline.report.record import FILES, OUTPUT_FILES, RUN_FILE, Run, load_run, write_run_json
from wsi_pipeline.run.estimate import (
    Estimate,
    ModelBytes,
    estimate_files,
    estimate_memory,
    model_bytes,
    most_model_bytes,
    passes_that_fit,
)
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.outputs import Finished, model_facts, options_of, versions, write_outputs
from wsi_pipeline.run.scans import (
    FinishedScan,
    check_block_size,
    count_chunks,
    fitting_outputs,
    make_mask,
    open_one,
    plan_scan,
    scan_identity,
    write_scan,
)
from wsi_pipeline.run.store import RunStore, another, check_same, open_run_store, run_key
from wsi_pipeline.run.worker import BlockWorker, Plan, SlidePlan, check_fingerprint, open_blocks
from wsi_pipeline.run.written import WrittenFiles
from wsi_pipeline.schedule.blocks import run_blocks
from wsi_pipeline.schedule.cluster import check_shared, gpu_share, is_in_process, worker_threads
from wsi_pipeline.schedule.memory import cpu_count, free_memory, used_memory
from wsi_pipeline.schedule.worker_state import WorkerCache
from wsi_pipeline.sources import Slide, open_source, why_not_brightfield
from wsi_pipeline.sources.radiology.preprocess import Scan
from wsi_pipeline.tissue.select import check_files, frame_offset, plan_grid, why_too_coarse

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with patches done and patches in all."""
Stage = Callable[[str], None]
"""Called with what is done once all patches are: "writing annotations.geojson"."""

DEFAULTS = Settings()
SLIDES_AT_ONCE = 32
"""Whose blocks a cluster elsewhere has at a time: small slides would starve it one by one."""


def segment(
    job: Job,
    bundle: Bundle,
    *,
    client: Client,
    settings: Settings = DEFAULTS,
    threads: int | None = None,
    overwrite: bool = False,
    max_ram: int | None = None,
    progress: Progress | None = None,
    stage: Stage | None = None,
) -> Run:
    """Segment one slide and write its run's folder; return the run.

    What an earlier run of the same slide, model and settings has done is not done again.

    Args:
        job: the slide and the folder.
        bundle: the model.
        client: of the dask cluster that does the blocks.
        settings: options.
        threads: of the CPU for one worker's forward passes; None = all.
        overwrite: start anew whatever the folder holds.
        max_ram: bytes that this process may take; None = no limit.
        progress: told of patches done.
        stage: told of what comes after them.

    Raises:
        WsiPipelineError: the slide, the model or the folder cannot be used; the message says why.
    """
    team = _Team(client, bundle, settings, threads=threads, overwrite=overwrite, max_ram=max_ram)
    return team.segment(job, progress, stage)


def segment_all(
    jobs: list[Job],
    bundle: Bundle,
    *,
    client: Client,
    settings: Settings = DEFAULTS,
    threads: int | None = None,
    overwrite: bool = False,
    max_ram: int | None = None,
    progress: Callable[[Job, int, int], None] | None = None,
    stage: Callable[[Job, str], None] | None = None,
) -> Iterator[tuple[Job, Run]]:
    """Segment slides in order; yield each with its run, failed ones too.

    While the workers do the blocks of one slide, the next is surveyed and the outputs of the one
    before are written; workers elsewhere have the blocks of several slides. Slides that another
    process has claimed are looked at again when all others are done.

    Args:
        jobs: slides and their folders.
        bundle: the model.
        client: of the dask cluster.
        settings: options.
        threads: of the CPU for one worker's forward passes; None = all, or as many as dask gives
            a worker elsewhere.
        overwrite: start anew whatever the folders hold.
        max_ram: bytes that this process may take; None = no limit.
        progress: told of a job and its patches done, by several threads.
        stage: told of a job and what comes after its patches, by several threads.

    Raises:
        ClusterError: the cluster is lost, or cannot do the work.
    """
    if not jobs:
        return
    if not is_in_process(client):
        output = jobs[0].folder.parent
        make_folder(output)
        check_shared(client, output.absolute(), _local_paths(jobs[0], bundle))
    team = _Team(client, bundle, settings, threads=threads, overwrite=overwrite, max_ram=max_ram)
    busy: list[Job] = []
    for last_look in (False, True):
        for job, run in team.segment_all(busy if last_look else jobs, progress, stage):
            if run.status == "busy" and not last_look:
                busy.append(job)
            else:
                yield job, run


def tile(
    path: str | Path,
    target: str | Path,
    *,
    mpp: float,
    patch_size: int,
    overlap: int,
    select: SelectOptions,
    progress: Progress | None = None,
) -> StoredGrid:
    """Write a slide as a zarr patch grid with its pixels, in bounded memory; return it opened.

    Stored tiles that cannot be read are white, and named in the grid.

    Args:
        path: of the slide.
        target: folder of the grid, which appears whole or not at all.
        mpp: µm per grid pixel.
        patch_size: side of a patch in grid pixels.
        overlap: grid pixels between neighbouring patches.
        select: where to look.
        progress: told of blocks of pixels done.

    Raises:
        WsiPipelineError: the slide or the target cannot be used.
    """
    target = Path(target)
    _check_grid_goes(target, path)
    with open_source(path, mpp=select.mpp, series=select.series) as slide:
        stored = plan_grid(
            slide,
            mpp=mpp,
            patch_size=(patch_size, patch_size),
            overlap=(overlap, overlap),
            select=select,
        )
        view = slide.at(mpp, tolerance=MPP_TOLERANCE)
        grid = stored.grid
        every = iter_blocks(grid.shape, (PIXEL_CHUNK, PIXEL_CHUNK))
        blocks = [b for b in every if len(grid.touching(b.start, b.stop))]
        with writing(target), claimed(target), written_beside(target) as partial:
            pixels = write_patch_grid(partial, stored, with_pixels=True).pixels
            assert pixels is not None
            bad: list[Region] = []
            for done, block in enumerate(blocks, start=1):
                y, x = block.start
                height, width = block.shape
                pixels[block.slices] = view.read((y, x), (height, width), bad=bad)
                if progress:
                    progress(done, len(blocks))
            close_patch_grid(partial, bad)
    return open_patch_grid(target)


def _check_grid_goes(target: Path, source: str | Path) -> None:
    """Refuse to replace what is no patch grid, what else lies in one, or the source itself.

    Raises:
        StoreError: it is one of these.
    """
    if not os.path.lexists(target):
        return
    # what cannot be looked at, such as a link that leads nowhere, is no file at all
    if all(map(os.path.exists, (target, source))) and target.samefile(source):
        raise StoreError(f"{target} is the slide itself; choose another --output")
    if not is_patch_grid(target):
        raise StoreError(f"{target} is there and no patch grid; choose another --output")
    if others := sorted({path.name for path in target.iterdir()} - GRID_FILES):
        raise StoreError(
            f"{target} holds {others[0]}, which no patch grid has; choose another --output"
        )


def estimate(
    job: Job,
    bundle: Bundle,
    *,
    settings: Settings = DEFAULTS,
    workers: int = 1,
    blocks_in_hand: int = 2,
    threads: int | None = None,
    rate: float,
    model: ModelBytes,
    overwrite: bool = False,
) -> Estimate:
    """Return what a slide will take, from its headers and thumbnail; nothing is written.

    Args:
        job: the slide and the folder.
        bundle: the model.
        settings: options.
        workers: of the in-process cluster.
        blocks_in_hand: of each.
        threads: of the CPU for one worker's forward passes; None = all.
        rate: patches per second, of all workers together.
        model: what it takes.
        overwrite: whatever the folder holds.

    Raises:
        WsiPipelineError: the slide, the model or the folder cannot be used; the message says why.
    """
    select = job.select(settings.select)
    settings = _fitting(replace(settings, select=select), bundle)
    with _open(job.path, bundle, settings) as source:
        if not overwrite:
            _refuse_others(job, source.fingerprint, bundle)
        store = RunStore(folder=job.folder.absolute())
        if isinstance(source, Slide):
            stored = survey(source, bundle, settings)
            plan: Plan = _plan(source, bundle, store, stored, settings, threads)
            mask_files = ome_zarr.count_files(plan.mask_shape, settings.export.ngff)
        else:
            settings = fitting_outputs(source, settings)
            passes = passes_that_fit(model, threads or cpu_count(), free=free_memory())
            plan = plan_scan(source, bundle, store, settings, passes)
            mask_files = count_chunks(plan.mask_shape)
    disk, files = estimate_files(
        settings.export,
        mask_files=mask_files,
        blocks=len(plan.blocks()),
        tissue_px=_tissue_px(plan),
    )
    return Estimate(
        patches=len(plan.grid),
        seconds=len(plan.grid) / rate,
        memory=_peak_memory(plan, bundle, model, workers=workers, blocks_in_hand=blocks_in_hand),
        disk=disk,
        files=files,
        mask_shape=plan.mask_shape,
    )


def survey(slide: Slide, bundle: Bundle, settings: Settings) -> StoredGrid:
    """Find out where on a slide a model is to look; return the patch grid, without pixels.

    Args:
        slide: opened.
        bundle: the model.
        settings: options.

    Raises:
        SourceError: the slide cannot be read, or does not fit the model.
        AnnotationError: the tissue or ROI file cannot be used.
    """
    overlap = settings.predict.overlap
    patch_size = bundle.input.patch_size
    stored = plan_grid(
        slide,
        mpp=bundle.mpp,
        patch_size=(patch_size[0], patch_size[1]),
        overlap=(bundle.input.overlap[0], bundle.input.overlap[1])
        if overlap is None
        else (overlap, overlap),
        select=settings.select,
    )
    if bundle.input.channels == 3 and (
        reason := why_not_brightfield(slide.properties, stored.thumbnail)
    ):
        raise SourceError(
            f"{slide.path}: {reason}; {bundle.name} is for colour slides in bright field, as H&E is"
        )
    return stored


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A source of which the blocks are to be done.

    Attributes:
        job: its path and folder.
        run: what it will be once they are: plan and blocks, and what outputs are written from.
        claim: of the folder, to be closed when the source is finished, or will not be.
        seconds: that it took to get here.
    """

    job: Job
    run: Finished | FinishedScan
    claim: ExitStack
    seconds: float


def _begin(
    job: Job,
    bundle: Bundle,
    *,
    settings: Settings,
    threads: int | None,
    overwrite: bool,
    check: Callable[[Plan], None],
) -> Run | _Begun:
    """Open a source and its run's folder, survey it; return it, or its run if that is done."""
    start = time.perf_counter()
    settings = replace(settings, select=job.select(settings.select))
    with _open(job.path, bundle, settings) as source, ExitStack() as claim:
        if isinstance(source, Slide):
            key = run_key(_identity(source, bundle, settings))
        else:
            settings = fitting_outputs(source, settings)
            key = run_key(scan_identity(source, bundle, settings))
        if not overwrite:
            _refuse_others(job, source.fingerprint, bundle)
            settings = _as_exported(job.home, key, settings)

        def finished(folder: Path) -> Run | None:
            return None if overwrite else _finished(folder, key, bundle, settings.export)

        in_hand = job.target is not None and job.folder.is_dir()
        if not in_hand and (run := finished(job.home)):
            logger.info("%s is done already", job.folder)
            return run
        # absolute: workers elsewhere have another current folder
        folder = job.folder.absolute()
        claim.enter_context(RunStore(folder=folder).claim())
        if run := finished(job.home):
            if job.target:
                shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            return run  # by another process, a moment ago
        if job.target and (run := finished(folder)):
            return _move_home(job, run)  # which an earlier run could not
        store = open_run_store(
            folder,
            fingerprint=source.fingerprint,
            model=_who(bundle),
            key=key,
            overwrite=overwrite,
        )
        begun: Finished | FinishedScan
        if isinstance(source, Slide):
            begun = _begin_slide(source, bundle, store, settings, threads, key, check)
        else:
            begun = _begin_scan(source, bundle, store, settings, threads, key, check)
        return _Begun(
            job=job, run=begun, claim=claim.pop_all(), seconds=time.perf_counter() - start
        )


def _who(bundle: Bundle) -> str:
    """Return a digest of what makes a model another one: its name, its weights, what it sees."""
    return run_key(model_facts(replace(bundle, limits="")))


def _refuse_others(job: Job, fingerprint: str, bundle: Bundle) -> None:
    """Refuse a folder that holds another slide's run, or another model's.

    Raises:
        StoreError: it does.
    """
    try:
        with reaching(job.home):
            run = load_run(job.home / RUN_FILE)
    except StoreError:  # nothing, or nothing that can be read
        run = None
    if run is not None and (run.status == "done" or run.amounts):
        facts = model_facts(bundle)
        if run.slide.get("fingerprint") != fingerprint:
            raise another(job.home, "slide")
        if any(run.model.get(k, facts[k]) != facts[k] for k in ("name", "weights_sha256", "input")):
            raise another(job.home, f"model, {run.model.get('name')}")
    check_same(job.folder, fingerprint=fingerprint, model=_who(bundle))


def _open(path: Path, bundle: Bundle, settings: Settings) -> Slide | Scan:
    """Open what a bundle is for: here is asked which of the three it is, and nowhere below."""
    if bundle.modality == "slide":
        slide = open_source(path, mpp=settings.select.mpp, series=settings.select.series)
        reason = why_too_coarse(slide.mpp, bundle.mpp)
        if reason and not settings.select.any_resolution:
            slide.close()
            raise SourceError(f"{path}: {reason}; --any-resolution takes it all the same")
        return slide
    return open_one(path, bundle, settings)


def _begin_slide(
    slide: Slide,
    bundle: Bundle,
    store: RunStore,
    settings: Settings,
    threads: int | None,
    key: str,
    check: Callable[[Plan], None],
) -> Finished:
    """Survey a slide, plan its blocks and create its mask; return what it will be."""
    stored = _kept_survey(store, slide, bundle, settings)
    plan = _plan(slide, bundle, store, stored, settings, threads)
    check(plan)
    _ensure_mask(plan, bundle, slide, settings.export)
    logger.info(
        "%s: %d patches of %d², %g µm/px", name_of(slide.path), len(plan.grid),
        plan.grid.patch_size[0], stored.info.grid_mpp,
    )  # fmt: skip
    return Finished(
        slide=slide,
        bundle=bundle,
        plan=plan,
        stored=stored,
        settings=settings,
        key=key,
        blocks=plan.blocks(),
    )


def _begin_scan(
    scan: Scan,
    bundle: Bundle,
    store: RunStore,
    settings: Settings,
    threads: int | None,
    key: str,
    check: Callable[[Plan], None],
) -> FinishedScan:
    """Measure an image or volume, plan its blocks, create its mask; return what it will be."""
    plan = plan_scan(scan, bundle, store, settings, threads or cpu_count())
    check(plan)
    make_mask(plan)
    logger.info("%s: %d patches", name_of(scan.path), len(plan.grid))
    return FinishedScan(
        scan=scan, bundle=bundle, plan=plan, settings=settings, key=key, blocks=plan.blocks()
    )


class _Team:
    """Takes slides through the three steps: begin, do the blocks, finish.

    Args:
        client: of the dask cluster.
        bundle: the model.
        settings: options.
        threads: of the CPU for one worker's forward passes.
        overwrite: start anew whatever the folders hold.
        max_ram: bytes that this process may take.
    """

    def __init__(
        self,
        client: Client,
        bundle: Bundle,
        settings: Settings,
        *,
        threads: int | None,
        overwrite: bool,
        max_ram: int | None,
    ) -> None:
        settings = _fitting(settings, bundle)
        alone = is_in_process(client)
        if alone and bundle.modality != "slide":  # whose patches are small
            wanted, free = threads or cpu_count(), free_memory()
            threads = passes_that_fit(most_model_bytes(bundle), wanted, free=free)
            if threads < wanted:
                threads = passes_that_fit(model_bytes(bundle), wanted, free=free)
        self._client, self._bundle, self._settings = client, bundle, settings
        self._begin = partial(
            _begin,
            bundle=bundle,
            settings=settings,
            threads=threads,
            overwrite=overwrite,
            check=_memory_check(client, bundle, max_ram),
        )
        self._max_ram = max_ram if alone else None
        self._resources = {} if alone or settings.predict.device == "cpu" else gpu_share(client)
        self._open = open_blocks if alone else partial(_open_elsewhere, threads=threads)
        # in this process one slide a step, for the sake of memory
        self._at_once = 3 if alone else SLIDES_AT_ONCE
        steps = (1, 1, 1) if alone else (cpu_count(), SLIDES_AT_ONCE, cpu_count())
        self._beginning, self._computing, self._finishing = map(threading.Semaphore, steps)
        self._stopped = threading.Event()

    def segment(
        self,
        job: Job,
        progress: Progress | None = None,
        stage: Stage | None = None,
        *,
        number: int = 0,
    ) -> Run:
        """Segment one slide; return its run. Of several, those of a low number come first."""
        with self._beginning:
            begun = self._begin(job)
        if isinstance(begun, Run):
            return begun
        with begun.claim:
            with self._computing:
                start = time.perf_counter()
                for _ in self._do_blocks(begun, progress, number):
                    if self._stopped.is_set():
                        raise CancelledError
                seconds = time.perf_counter() - start
            with self._finishing:
                tell = stage or (lambda text: None)
                run = _finish(begun, seconds, tell)
                if run.status == "done":
                    if job.target:
                        tell("uploading")
                    run = _move_home(job, run)
                elif job.target:
                    _note_failure(job, run)
                return run

    def segment_all(
        self,
        jobs: Sequence[Job],
        progress: Callable[[Job, int, int], None] | None,
        stage: Callable[[Job, str], None] | None,
    ) -> Iterator[tuple[Job, Run]]:
        """Segment slides, several at once; yield each with its run, in order."""
        with ThreadPoolExecutor(self._at_once, "slide") as pool:
            runs = deque(
                pool.submit(
                    self.segment,
                    job,
                    partial(progress, job) if progress else None,
                    partial(stage, job) if stage else None,
                    number=number,
                )
                for number, job in enumerate(jobs)
            )
            try:
                for job in jobs:
                    yield job, _ended(job, runs.popleft(), self._bundle, self._settings)
            except BaseException:  # the caller's generator may have been closed, too
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _do_blocks(self, begun: _Begun, progress: Progress | None, number: int) -> Iterator[int]:
        """Do the blocks that are left; yield how many patches are done after each."""
        plan = begun.run.plan
        pending = plan.store.pending(begun.run.blocks)
        done = len(plan.grid) - _patches_touching(plan, pending)
        if progress:
            progress(done, len(plan.grid))
        if not pending:
            return
        for fresh in run_blocks(
            self._client,
            pending,
            partial(self._open, plan),
            max_ram=self._max_ram,
            priority=-number,
            resources=self._resources,
        ):
            done = min(done + fresh, len(plan.grid))
            if progress:
                progress(done, len(plan.grid))
            yield done
        if not is_in_process(self._client):
            plan.store.remove_partials()  # of workers that died


def _open_elsewhere(plan: Plan, keep: WorkerCache, *, threads: int | None) -> BlockWorker:
    """Open a source on a worker of another process, with the threads that dask gives it."""
    return open_blocks(replace(plan, threads=threads or worker_threads()), keep)


def _finish(begun: _Begun, seconds: float, stage: Stage) -> Run:
    """Write the outputs of a slide whose blocks took so many seconds; return its run."""
    start = time.perf_counter()
    store = begun.run.plan.store
    if isinstance(begun.run, Finished):
        _check_slide(begun.run)
    with writing(store.folder):
        files = WrittenFiles(store, tell=lambda name: stage(f"writing {name}"))
        _drop_what_is_old(begun, files)
    if isinstance(begun.run, Finished):
        run = write_outputs(begun.run, files)
    else:
        run = write_scan(begun.run, files)
    total = begun.seconds + seconds + time.perf_counter() - start
    run = replace(run, seconds={**run.seconds, "total": round(total, 3)})
    write_run_json(begun.job.folder / RUN_FILE, run)
    return run


def _check_slide(finished: Finished) -> None:
    """Refuse a slide that was replaced since it was surveyed, and forget what was made of it.

    Raises:
        SourceError: it was.
    """
    plan = finished.plan
    with open_source(plan.path, mpp=plan.mpp, series=plan.series) as slide:
        try:
            check_fingerprint(plan, slide.fingerprint)
        except SourceError:
            plan.store.empty()
            raise


def _move_home(job: Job, run: Run) -> Run:
    """Move a run that is whole to the URL where users look, if they asked for that; return it.

    Raises:
        StoreError: the URL cannot be written; the run stays here.
    """
    if job.target is None:
        return run
    try:
        there = WrittenFiles(RunStore(folder=job.folder), job.target)
        for name in run.files:
            if (free := there.free(name)) != name:
                (job.folder / name).rename(job.folder / free)
                there.placed[free] = run.files[name]
        run = there.noted(run)
        write_run_json(job.folder / RUN_FILE, run)
        upload(job.folder, job.target, last=RUN_FILE, replaced=there.ours(OUTPUT_FILES))
    except StoreError as error:
        raise StoreError(
            f"{error}; the outputs stay in {job.folder}, and the same command uploads them"
        ) from error
    shutil.rmtree(job.folder, ignore_errors=True)
    return run


def _local_paths(job: Job, bundle: Bundle) -> list[Path]:
    return [p.absolute() for p in (bundle.path, job.path) if not is_remote(p)]


def _ended(job: Job, end: Future[Run], bundle: Bundle, settings: Settings) -> Run:
    """Return the run of a slide once it has ended, well or not."""
    try:
        return end.result()
    except (ClusterError, CancelledError):
        raise  # no fault of the slide, and the others would fare the same
    except Exception as error:
        # one bad slide must not end the night; what is not ours is a defect: keep its traceback
        expected = isinstance(error, WsiPipelineError)
        logger.log(
            logging.DEBUG if expected else logging.ERROR, "%s failed", job.path, exc_info=True
        )
        return _failed(job, bundle, settings, error)


def check_settings(settings: Settings, bundle: Bundle) -> None:
    """Refuse what would fail every input, before one is opened.

    Raises:
        WsiPipelineError: options that do not fit the model, a model that cannot be loaded, a file
            of where to look that cannot be read.
    """
    _fitting(settings, bundle)
    predict, patch = settings.predict, min(bundle.input.patch_size)
    if predict.overlap is not None and predict.overlap >= patch:
        raise BundleError(
            f"--overlap {predict.overlap} must be below the patch size of {bundle.name}, {patch} px"
        )
    if bundle.modality == "slide":
        ome_zarr.block_side(predict.block_size, settings.export.ngff)
        check_files(settings.select)
    else:
        check_block_size(len(bundle.input.patch_size), predict.block_size)
    build(bundle)


def _fitting(settings: Settings, bundle: Bundle) -> Settings:
    """Return the settings with all outputs of the bundle's modality where none are named.

    Raises:
        BundleError: an option that means nothing to it.
    """
    if reason := settings.why_not(bundle.modality):
        raise BundleError(f"{reason}; {bundle.name} is for {bundle.modality}s")
    outputs = settings.export.outputs or OUTPUTS[bundle.modality]
    export = replace(settings.export, outputs=outputs)
    return replace(settings, export=export, named=settings.as_plain()["named"])


def _identity(slide: Slide, bundle: Bundle, settings: Settings) -> dict[str, Any]:
    """Return everything that the mask depends on."""
    select, predict = settings.select, settings.predict
    files = {
        name: sha256_of(path)
        for name, path in (("tissue", select.tissue), ("roi", select.roi))
        if isinstance(path, Path) and path.is_file()
    }
    # the frame of what is read matters only where something is read
    where = asdict(select if files else replace(select, frame="qupath"))
    del where["any_resolution"]  # slides that are taken either way have one mask
    return {
        "slide": slide.fingerprint,
        "mpp": slide.mpp,
        "model": bundle.digest,
        "select": where,
        "files": files,
        "predict": {k: v for k, v in asdict(predict).items() if k not in ("device", "batch_size")},
        "ngff": settings.export.ngff,
        "version": version("wsi-pipeline"),
    }


def _drop_what_is_old(begun: _Begun, files: WrittenFiles) -> None:
    """Remove what new outputs will replace or contradict, `run.json` in any case."""
    folder = begun.job.folder
    path = folder / RUN_FILE
    try:
        same = load_run(path).settings.get("key") == begun.run.key
    except StoreError:
        same = False
    # a run moves its mask before it writes anything else: once it has, the rest is its own too
    moved = not begun.run.plan.store.mask_path.is_dir()
    # run.json first: without it nobody takes what comes next for another run's
    path.unlink(missing_ok=True)
    if not same and not moved:
        for name in files.ours(OUTPUT_FILES):
            remove(folder / name)
    sync(folder)


def _finished(folder: Path, key: str, bundle: Bundle, export: ExportOptions) -> Run | None:
    """Return the run that a folder holds, if it is whole and was made the same way."""
    path = folder / RUN_FILE
    with reaching(folder):
        if not path.is_file() or not all((folder / FILES[o]).exists() for o in export.outputs):
            return None
        try:
            run = load_run(path)
        except StoreError as error:
            if isinstance(error.__cause__, OSError):  # out of reach
                raise
            return None  # damaged: it is written again
    wanted = {"key": key, "export": as_plain(export)}
    # what the model says of its limits may have changed since
    same = run.status == "done" and run.model == model_facts(bundle)
    same &= wanted.items() <= run.settings.items()
    return run if same else None


def _as_exported(home: Path, key: str, settings: Settings) -> Settings:
    """Return the settings as `export` has changed them since the same options were named here.

    So a line that is given again goes on with what is there, and one that names others does not.
    """
    try:
        with reaching(home):
            run = load_run(home / RUN_FILE)
        held = run.settings
        if held["key"] == key and held["named"] == settings.as_plain()["named"]:
            return replace(settings, export=options_of(run))
    except (StoreError, KeyError, TypeError, ValueError):  # no run, or none of this version
        pass
    return settings


def _kept_survey(store: RunStore, slide: Slide, bundle: Bundle, settings: Settings) -> StoredGrid:
    """Return the run's patch grid, found once and then read from its store."""
    try:
        return open_patch_grid(store.grid_path)
    except StoreError:
        with writing(store.grid_path), written_beside(store.grid_path) as partial:
            write_patch_grid(partial, survey(slide, bundle, settings), with_pixels=False)
            close_patch_grid(partial)
        return open_patch_grid(store.grid_path)


def _plan(
    slide: Slide,
    bundle: Bundle,
    store: RunStore,
    stored: StoredGrid,
    settings: Settings,
    threads: int | None,
) -> SlidePlan:
    width, height = slide.size
    downsample, shape = (1.0, 1.0), (height, width)
    if (mask_mpp := settings.predict.mask_mpp) is not None:
        view = slide.at(mask_mpp, tolerance=MPP_TOLERANCE)
        downsample, shape = view.downsample, view.shape
        if min(downsample) < 1:
            raise StoreError(
                f"--mask-mpp {mask_mpp:g} is finer than the slide's {max(slide.mpp):g} µm/px; "
                "leave it out for full resolution"
            )
    return SlidePlan(
        path=slide.path.absolute(),
        mpp=settings.select.mpp,
        series=settings.select.series,
        fingerprint=slide.fingerprint,
        bundle_path=bundle.path.absolute(),
        model=bundle.digest,
        store=store,
        grid=stored.grid,
        grid_mpp=stored.info.grid_mpp,
        downsample=stored.info.downsample,
        mask_shape=shape,
        mask_downsample=downsample,
        mask_mpp=(downsample[1] * slide.mpp[0], downsample[0] * slide.mpp[1]),
        block_shape=(ome_zarr.block_side(settings.predict.block_size, settings.export.ngff),) * 2,
        predict=settings.predict,
        roi=settings.select.roi.absolute() if settings.select.roi else None,
        roi_offset=frame_offset(slide, settings.select.frame),
        threads=threads or cpu_count(),
        outlines="geojson" in settings.export.outputs,
    )


def _ensure_mask(plan: SlidePlan, bundle: Bundle, slide: Slide, export: ExportOptions) -> None:
    """Create the mask unless an interrupted run has begun one; forget blocks that are damaged."""
    store, path = plan.store, plan.store.mask_path
    is_moved = not path.is_dir() and bool(store.blocks())
    mask = ome_zarr.open_begun(store.finished_mask_path if is_moved else path)
    if mask is not None:
        damaged = store.damaged(plan.blocks(), mask)
        if damaged and is_moved:
            with writing(path):
                os.rename(store.finished_mask_path, path)
                sync(store.path)
                sync(store.folder)
        store.forget_blocks(damaged)
        return
    store.forget_blocks()
    with writing(path), written_beside(path) as partial:
        ome_zarr.create_mask(
            partial,
            plan.mask_shape,
            classes=bundle.classes,
            mask_mpp=plan.mask_mpp,
            ngff=export.ngff,
            name=Path(name_of(slide.path)).stem,
        )


def _tissue_px(plan: Plan) -> float:
    """Return how many mask pixels the patches cover, about."""
    covered = len(plan.grid) * math.prod(plan.grid.stride) / math.prod(plan.ratio)
    return min(covered, math.prod(plan.mask_shape))


def _peak_memory(
    plan: Plan, bundle: Bundle, model: ModelBytes, *, workers: int, blocks_in_hand: int
) -> int:
    return estimate_memory(
        bundle,
        plan.predict,
        model=model,
        block_shape=tuple(min(b, max(plan.mask_shape)) for b in plan.block_shape),
        ratio=plan.ratio,
        patches=len(plan.grid),
        blocks_in_hand=workers * blocks_in_hand,
        workers=workers,
        threads=plan.threads,
        tissue_px=_tissue_px(plan),
    )


def _memory_check(client: Client, bundle: Bundle, max_ram: int | None) -> Callable[[Plan], None]:
    """Return what refuses a slide that will take more memory than allowed, or warns of it."""
    if not is_in_process(client):  # workers elsewhere have limits of their own
        return lambda plan: None
    threads = client.nthreads()
    workers, in_hand = len(threads), sum(threads.values()) // len(threads)
    lower = "lower --workers, --block-size or --batch-size"
    peak = partial(_peak_memory, bundle=bundle, workers=workers, blocks_in_hand=in_hand)
    most, exact = most_model_bytes(bundle), cache(partial(model_bytes, bundle))

    def check(plan: Plan) -> None:
        free = free_memory() + used_memory()
        if peak(plan, model=most) <= min(free, max_ram or free):
            return  # without losing time
        needed = peak(plan, model=exact())
        if max_ram is not None and needed > max_ram:
            raise WsiPipelineError(
                f"about {needed / 1e9:.1f} GB of memory are needed, --max-ram allows "
                f"{max_ram / 1e9:.1f} GB; {lower}"
            )
        if needed > free:
            logger.warning(
                "%s takes about %.1f GB of memory, %.1f GB are free; %s",
                name_of(plan.path), needed / 1e9, free / 1e9, lower,
            )  # fmt: skip

    return check


def _patches_touching(plan: Plan, blocks: list[Block]) -> int:
    touched = [plan.grid.touching(*plan.box(block)) for block in blocks]
    return len(np.unique(np.concatenate(touched))) if touched else 0


def _failed(job: Job, bundle: Bundle, settings: Settings, error: Exception) -> Run:
    """Return the run of a slide that failed, written down unless its folder holds a good run."""
    reason = " ".join(str(error).split()) or type(error).__name__
    for path in (job.path, job.path.absolute()):
        # it is said beside the slide's name
        reason = reason.removeprefix(f"{without_secrets(str(path))}: ")
    reason = without_secrets(reason)
    if not isinstance(error, WsiPipelineError):
        reason = f"{type(error).__name__}: {reason}"
    run = Run(
        status="busy" if isinstance(error, BusyError) else "failed",
        reason=reason,
        slide={"name": name_of(job.path), "path": without_secrets(str(job.path))},
        model=model_facts(bundle),
        settings=settings.as_plain(),
        versions=versions(),
    )
    if run.status == "failed":
        _note_failure(job, run)
    return run


def _note_failure(job: Job, run: Run) -> None:
    """Write down where users look that a slide failed, unless a good run is there."""
    path = job.home / RUN_FILE
    try:
        with reaching(path):
            old = load_run(path) if path.is_file() else None
            if old is None or old.status == "failed":
                # the hashes of what is there are not lost with what was said of it
                run = replace(run, files=(old.files if old else {}) | run.files)
                if job.target is None:
                    job.folder.mkdir(parents=True, exist_ok=True)
                write_run_json(path, run)
    except OSError:
        logger.debug("cannot write %s", path, exc_info=True)
