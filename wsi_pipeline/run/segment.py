"""One source on its way: opened and planned, and after its blocks its files written.

prepare -> PreparedRun, or the Run itself where an earlier one has done all of it
blocks of the plan on the workers, see `batch` and `worker`
finish -> Run, moved to its URL where there is one
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import BundleError, BusyError, StoreError, WsiPipelineError, raised_as
from wsi_pipeline.files.claims import check_claim, claimed_url
from wsi_pipeline.files.locks import writing
from wsi_pipeline.files.paths import name_of, without_secrets
from wsi_pipeline.files.remote import reaching, upload
from wsi_pipeline.inference.predictor import DTYPES, choose_device, choose_dtype
from wsi_pipeline.networks import build
from wsi_pipeline.networks.quantise import load_ranges
from wsi_pipeline.options import ON_REQUEST, OUTPUTS, Precision, PredictOptions, Settings, turns
from wsi_pipeline.report.record import OUTPUT_FILES, RUN_FILE, Run, load_run, write_run_json
from wsi_pipeline.run.facts import model_facts, versions
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.previous import (
    as_exported,
    drop_what_is_old,
    find_finished,
    held_key,
    model_key,
    refuse_others,
)
from wsi_pipeline.run.source_run import SourceRun
from wsi_pipeline.run.store import RunStore, open_run_store
from wsi_pipeline.run.written import WrittenFiles

if TYPE_CHECKING:
    from wsi_pipeline.run.scan_run import ImageRun, VolumeRun
    from wsi_pipeline.run.slide_run import SlideRun

logger = logging.getLogger(__name__)

Stage = Callable[[str], None]
"""Called with what is done once all patches are: "writing annotations.geojson"."""

KINDS = {
    "slide": "slide_run:SlideRun",
    "image": "scan_run:ImageRun",
    "volume": "scan_run:VolumeRun",
}
"""How a source is done, by the modality of the model."""


def kind_of(bundle: Bundle) -> type[SlideRun] | type[ImageRun] | type[VolumeRun]:
    """Return how sources for a model are done, imported without the readers of other kinds."""
    found: type[SlideRun] = resolve_name(f"wsi_pipeline.run.{KINDS[bundle.modality]}")
    return found


def open_source_run(path: Path, bundle: Bundle, settings: Settings) -> SourceRun:
    """Open a source for a model; return its run, to be closed.

    Raises:
        SourceError: it cannot be read, or does not fit the model or the options.
    """
    return kind_of(bundle)(path, bundle, settings)


def fitting(settings: Settings, bundle: Bundle) -> Settings:
    """Return the settings with the bundle's own where none are named: all outputs, its `tta`.

    Raises:
        BundleError: an option that means nothing to it.
    """
    if reason := settings.why_not(bundle.modality):
        raise BundleError(f"{reason}; {bundle.name} is for {bundle.modality}s")
    settings.predict.rule.of([c.name for c in bundle.classes[1:]])
    tta = settings.predict.tta or bundle.tta
    with raised_as(BundleError, ValueError, bundle.name):
        turns(tta, bundle.input.patch_size, bundle.input.spacing_mm or ())
    outputs = settings.export.outputs or OUTPUTS[bundle.modality]
    if "dicom" in set(outputs) & set(ON_REQUEST[bundle.modality]):
        # DICOM of a slide tells its probabilities, too.
        outputs = tuple(dict.fromkeys((*outputs, "probability")))
    if settings.predict.skip:
        # Masks by other thresholds leave out the same.
        outputs = tuple(dict.fromkeys((*outputs, "quality")))
    export = replace(settings.export, outputs=outputs)
    predict, named = replace(settings.predict, tta=tta), settings.as_plain()["named"]
    return replace(settings, predict=predict, export=export, named=named)


def check_settings(settings: Settings, bundle: Bundle) -> None:
    """Refuse what would fail every input, before one is opened.

    Raises:
        WsiPipelineError: options that do not fit the model, a model that cannot be loaded, a file
            of where to look that cannot be read.
    """
    fitting(settings, bundle)
    overlap, patch = settings.predict.overlap, min(bundle.input.patch_size)
    if overlap is not None and overlap >= patch:
        raise BundleError(
            f"--overlap {overlap} must be below the patch size of {bundle.name}, {patch} px"
        )
    kind_of(bundle).check(settings, bundle)
    build(bundle)
    if settings.predict.precision == "int8":
        choose_dtype("int8", choose_device(settings.predict.device))
        load_ranges(bundle)


def settle_precision(run: SourceRun, job: Job, precision: Precision, *, overwrite: bool) -> None:
    """Set in which number format a run is computed, of which its key depends; return nothing.

    "auto" goes on in the one of the run that the folder holds, since a mask has one alone.

    Args:
        precision: what it is without such a run.
    """
    is_open = run.settings.predict.precision == "auto" and not overwrite
    held = held_key(job) if is_open else ""
    # never int8, which nobody gets who has not asked for it
    for name in ("auto", *DTYPES, precision):
        predict = replace(run.settings.predict, precision=name)
        run.settings = replace(run.settings, predict=predict)
        if run.key_by(version("wsi-pipeline")) == held:
            break


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A source of which the blocks are to be done.

    Attributes:
        job: its path and folder.
        run: closed again, with plan, blocks and all that outputs are written from.
        claim: of the folder, to be closed when the source is finished, or will not be.
        seconds: that it took to get here.
    """

    job: Job
    run: SourceRun
    claim: ExitStack
    seconds: float


def prepare(
    job: Job,
    bundle: Bundle,
    *,
    settings: Settings,
    precision: Precision,
    threads: int,
    overwrite: bool,
    check: Callable[[Plan], int | None],
    begin: Callable[[PredictOptions], None],
) -> Run | PreparedRun:
    """Open a source and its run's folder, plan it; return it, or its run if that is done.

    Args:
        precision: in which number format to compute, where an unfinished run has none.
        begin: told how to predict, before the source is looked at closely.

    Raises:
        WsiPipelineError: the source, the model or the folder cannot be used.
    """
    start = time.perf_counter()
    settings = replace(settings, select=job.select(settings.select))
    with open_source_run(job.path, bundle, settings) as run, ExitStack() as claim:
        settle_precision(run, job, precision, overwrite=overwrite)
        key, fingerprint = run.key, run.source.fingerprint
        if not overwrite:
            refuse_others(job, fingerprint, bundle)
            run.settings = as_exported(job.home, key, run.settings)

        def finished(folder: Path) -> Run | None:
            return None if overwrite else find_finished(folder, key, bundle, run.settings.export)

        in_hand = job.target is not None and job.folder.is_dir()
        if not in_hand and (done := finished(job.home)):
            logger.info("%s is done already", job.folder)
            return done
        # Absolute: workers elsewhere have another current folder.
        folder = job.folder.absolute()
        claim.enter_context(RunStore(folder=folder).claim())
        if job.target:
            claim.enter_context(claimed_url(job.target, folder))
        if done := finished(job.home):
            if job.target:
                # The process that moved it was killed before it removed this.
                shutil.rmtree(folder, ignore_errors=True)
            # Another process has done it, a moment ago.
            return done
        if job.target and (done := finished(folder)):
            # An earlier run could not reach the URL.
            return move_home(job, done)
        model = model_key(bundle)
        store = open_run_store(
            folder, fingerprint=fingerprint, model=model, key=key, overwrite=overwrite
        )
        begin(run.settings.predict)
        run.prepare(store, threads, check)
        seconds = time.perf_counter() - start
        return PreparedRun(job=job, run=run, claim=claim.pop_all(), seconds=seconds)


def finish(prepared: PreparedRun, seconds: float, stage: Stage) -> Run:
    """Write the outputs of a source whose blocks are done; return its run, at home.

    Args:
        stage: told what is being written.

    Raises:
        WsiPipelineError: the source was replaced, or nothing can be written.
    """
    start, job, run = time.perf_counter(), prepared.job, prepared.run
    store = run.plan.store
    with run.reopen():
        with writing(store.folder):
            files = WrittenFiles(store, tell=lambda name: stage(f"writing {name}"))
            drop_what_is_old(store, run.key, files)
        written = run.write(files)
    total = prepared.seconds + seconds + time.perf_counter() - start
    written = replace(written, seconds={**written.seconds, "total": round(total, 3)})
    write_run_json(job.folder / RUN_FILE, written)
    if written.status == "done":
        if job.target:
            stage("uploading")
        return move_home(job, written)
    if job.target:
        _note_failure(job, written)
    return written


def move_home(job: Job, run: Run) -> Run:
    """Move a run that is whole to the URL where users look, if they asked for that; return it.

    Raises:
        BusyError: another machine has taken it over.
        StoreError: the URL cannot be written; the run stays here.
    """
    if job.target is None:
        return run
    try:
        check_claim(job.target, job.folder)
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


def reason_of(job: Job, error: Exception) -> str:
    """Return a sentence on why a source failed, to be said beside its name."""
    reason = " ".join(str(error).split()) or type(error).__name__
    for path in (job.path, job.path.absolute()):
        reason = reason.removeprefix(f"{without_secrets(str(path))}: ")
    reason = without_secrets(reason)
    return reason if isinstance(error, WsiPipelineError) else f"{type(error).__name__}: {reason}"


def failed_run(job: Job, bundle: Bundle, settings: Settings, error: Exception) -> Run:
    """Return the run of a source that failed, written down unless its folder holds a good run."""
    run = Run(
        kind=bundle.modality,
        status="busy" if isinstance(error, BusyError) else "failed",
        reason=reason_of(job, error),
        slide={"name": name_of(job.path), "path": without_secrets(str(job.path))},
        model=model_facts(bundle),
        settings=settings.as_plain(),
        versions=versions(),
    )
    if run.status == "failed":
        _note_failure(job, run)
    return run


def _note_failure(job: Job, run: Run) -> None:
    """Write down where users look that a source failed, unless a good run is there."""
    path = job.home / RUN_FILE
    try:
        with reaching(path):
            old = load_run(path) if path.is_file() else None
            if old is None or old.status == "failed":
                # The hashes of what is there are not lost with what was said of it.
                run = replace(run, files=(old.files if old else {}) | run.files)
                if job.target is None:
                    job.folder.mkdir(parents=True, exist_ok=True)
                write_run_json(path, run)
    except OSError:
        logger.debug("cannot write %s", path, exc_info=True)
