"""The main job: slides, images or volumes in; runs, `summary.csv`, `report.html` and a log out."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import BundleError, UsageError, WsiPipelineError, raised_as
from wsi_pipeline.files.atomic import this_process
from wsi_pipeline.files.locks import GOES_ON, make_folder
from wsi_pipeline.files.paths import Inputs, as_path, is_remote, without_secrets
from wsi_pipeline.files.remote import choose_work
from wsi_pipeline.inference.predictor import choose_device, count_gpus, tell_choice
from wsi_pipeline.networks.ensemble import FOLDER, combined, write_ensemble
from wsi_pipeline.networks.nnunet_folder import load_model
from wsi_pipeline.options import (
    Combine,
    ExportOptions,
    PredictOptions,
    ScheduleOptions,
    SelectOptions,
    Settings,
    chosen,
)
from wsi_pipeline.report.record import Run
from wsi_pipeline.run.batch import segment_jobs
from wsi_pipeline.run.jobs import (
    SLIDE_SUFFIXES,
    Job,
    find_slides,
    plan_jobs,
    read_mpp_table,
    why_none,
)
from wsi_pipeline.run.overview import Overview
from wsi_pipeline.run.segment import check_settings
from wsi_pipeline.run.status import note_jobs
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.schedule.cluster import dashboard_link, open_cluster
from wsi_pipeline.schedule.memory import cpu_count, used_memory
from wsi_pipeline.sources.radiology.discover import find_images, find_volumes

LOG_FILE = "wsi_pipeline.log"
"""In the output folder: warnings, and tracebacks of what should not happen."""
MOST_BLOCKS_IN_HAND = 8
"""Of one worker: each takes some 150 MB."""
LOWER = "lower --workers, --block-size or --batch-size, raise --min-area, or raise the limit"
PATCHES_A_BLOCK = 16
"""Of 512 px, side by side at the slide's own resolution."""
FINDERS: Mapping[str, tuple[Callable[..., list[Path]], Collection[str]]] = {
    "slide": (find_slides, SLIDE_SUFFIXES),
    "image": (find_images, ()),
    "volume": (find_volumes, ()),
}
"""What finds the inputs, and the suffixes that it looks for, by the modality of the model."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs that were found, and all that is needed to segment them.

    Attributes:
        bundles: the model, or several, each with a folder of its runs in `output`.
        jobs: to be done, with their folders; those of a slide follow one another.
        every: those that are left to other shards, too.
        output: folder of the runs, here.
        target: folder behind a URL to which they are moved; None = they stay.
        settings: options of the runs.
        schedule: where blocks run.
        overwrite: start anew whatever the folders hold.
    """

    bundles: list[Bundle]
    jobs: list[Job]
    every: list[Job]
    output: Path
    target: Path | None
    settings: Settings
    schedule: ScheduleOptions
    overwrite: bool

    @property
    def bundle(self) -> Bundle:
        """Return the first model."""
        return self.bundles[0]

    @property
    def folders(self) -> dict[Path, Path | None]:
        """Return the folders that runs lie in, with those behind a URL that they are moved to."""
        return {job.folder.parent: job.target and job.target.parent for job in self.every}

    @property
    def threads(self) -> int | None:
        """Return how many CPUs each worker of this machine gets; None = workers are elsewhere."""
        if self.schedule.scheduler or self.schedule.cluster:
            return None
        # Models take turns with all CPUs, and are held to a share of those that were counted.
        cpus = cpu_count()
        if self.schedule.threads:
            cpus = max(self.schedule.threads // len(self.bundles), 1)
        return max(cpus // (len(self.schedule.gpus) or self.schedule.workers), 1)

    def tidy(self) -> None:
        """Remove what this process has left half written."""
        for job in self.jobs:
            RunStore(folder=job.folder).remove_partials(this_process())


def segment(
    inputs: Inputs,
    *,
    model: str | Path | Sequence[str | Path],
    combine: Combine | None = None,
    output: str | Path,
    work: str | Path | None = None,
    mpp_table: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    progress: Callable[[Job, int, int], None] | None = None,
    stage: Callable[[Job, str], None] | None = None,
    ended: Callable[[Job, Run], None] | None = None,
    **options: Any,
) -> list[Run]:
    """Segment slides, images or volumes as the command does; return the run of each.

    What an earlier call has done is not done again. A source that fails is among the runs, with
    its reason, and costs no other.

    Args:
        inputs: files, folders (searched recursively), patterns, or .txt files with a path a line.
        model: folder of a bundle, its name, its model.toml, or its URL; or `nnunet:FOLDER`,
            a result folder of nnU-Net v2, for slides with `@MPP` behind. Of several each has its
            runs in a folder of its name in `output`, and what is stored is decoded once for all.
        combine: of several, make one run of them all: the mean of their probabilities, or the
            shares of their votes.
        output: folder of the results, or its URL.
        work: folder here for slides in hand, where the output is a URL.
        mpp_table: CSV with the columns slide and mpp.
        shard: (i, n): do only the i-th of n shares of the inputs, counted from 1.
        overwrite: start anew instead of going on where an earlier call stopped.
        progress: told of a job, its patches done and in all, by several threads.
        stage: told of a job and what is done after its patches, by several threads.
        ended: told of each job and its run.
        options: fields of `SelectOptions`, `PredictOptions`, `ExportOptions` and `ScheduleOptions`
            by name, such as `tissue`, `mask_mpp`, `outputs` or `workers`.

    Raises:
        WsiPipelineError: nothing was found, the model or an option cannot be used, the output
            cannot be written, or the cluster is lost.
        TypeError: an option that there is not.
    """
    batch = plan_batch(
        inputs,
        model=model,
        combine=combine,
        output=output,
        work=work,
        mpp_table=mpp_table,
        shard=shard,
        overwrite=overwrite,
        **grouped(options),
    )
    return run_batch(batch, progress=progress, stage=stage, ended=ended)


class Groups(TypedDict):
    """Options of a run as `plan_batch` takes them."""

    settings: Settings
    schedule: ScheduleOptions


def grouped(options: Mapping[str, Any]) -> Groups:
    """Return options in their groups.

    Raises:
        TypeError: an option that there is not.
    """
    groups = (SelectOptions, PredictOptions, ExportOptions, ScheduleOptions)
    known = {f.name for kind in groups for f in fields(kind)}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"{unknown[0]} is no option; expected one of {', '.join(sorted(known))}")
    return {
        "settings": Settings(
            select=chosen(SelectOptions, options),
            predict=chosen(PredictOptions, options),
            export=chosen(ExportOptions, options),
        ),
        "schedule": chosen(ScheduleOptions, options),
    }


def plan_batch(
    inputs: Inputs,
    *,
    model: str | Path | Sequence[str | Path],
    combine: Combine | None = None,
    output: str | Path,
    work: str | Path | None = None,
    mpp_table: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    settings: Settings,
    schedule: ScheduleOptions,
) -> Batch:
    """Find the inputs and check model and options; return all that is needed to segment them.

    Args: see `segment`; the options are in their groups.

    Raises:
        UsageError: nothing was found, or options that do not fit the model or each other.
        WsiPipelineError: the model or an input cannot be read.
    """
    # Other machines write there, too.
    home = as_path(output, use_listings_cache=False)
    target = home if is_remote(home) else None
    with raised_as(UsageError, WsiPipelineError):
        schedule, device = _with_gpus(schedule, settings.predict)
        settings = replace(settings, predict=replace(settings.predict, device=device))
    bundles = [load_model(one) for one in ([model] if isinstance(model, str | Path) else model)]
    with raised_as(UsageError, WsiPipelineError):
        folder = choose_work(home, Path(work) if work else None)
        bundles = [combined(bundles, combine, folder)] if combine else bundles
    bundle = _check_several(bundles)
    find, suffixes = FINDERS[bundle.modality]
    with raised_as(UsageError, WsiPipelineError):
        if mpp_table and not suffixes:
            raise BundleError(f"--mpp-table is for slides; {bundle.name} is for {bundle.modality}s")
        for one in bundles:
            check_settings(settings, one)
        table = read_mpp_table(mpp_table) if mpp_table else None
    slides = plan_jobs(find(inputs, output=folder), folder, table, target=target)
    if not slides:
        raise UsageError(why_none(inputs, f"{bundle.modality}s", suffixes))
    (index, count), n = shard or (1, 1), len(bundles)
    if not 1 <= index <= count:
        raise UsageError(f"shard {index}/{count}: expected one from 1 to the number of all")
    every = [job.of(i, bundles[i].name) if n > 1 else job for job in slides for i in range(n)]
    return Batch(
        bundles=bundles,
        jobs=[job for i, job in enumerate(every) if i // n % count == index - 1],
        every=every,
        output=folder,
        target=target,
        settings=settings,
        schedule=schedule,
        overwrite=overwrite,
    )


def _check_several(bundles: Sequence[Bundle]) -> Bundle:
    """Return the first of some models.

    Raises:
        UsageError: they cannot go side by side.
    """
    kinds = {bundle.modality: bundle.name for bundle in bundles}
    if len(kinds) > 1:
        told = ", ".join(f"{name} for {kind}s" for kind, name in kinds.items())
        raise UsageError(f"models of several kinds, {told}: give them one by one")
    names = [bundle.name for bundle in bundles]
    for name in names if len(names) > 1 else ():
        if names.count(name) > 1 or Path(name).name != name or name.startswith("."):
            raise UsageError(
                f"two models, or one that no folder can be called by, have the name {name!r}; each "
                "of several has its runs in a folder of its name: change it in model.toml"
            )
    return bundles[0]


def _with_gpus(schedule: ScheduleOptions, predict: PredictOptions) -> tuple[ScheduleOptions, str]:
    """Return which GPUs do the blocks and how many of them each has in hand, and the device.

    Raises:
        BundleError: GPUs that there are not, or that another option excludes.
    """
    device, is_elsewhere = predict.device, bool(schedule.scheduler or schedule.cluster)
    if schedule.scheduler and schedule.cluster:
        raise BundleError("--scheduler and --cluster exclude each other")
    is_told = is_elsewhere or device not in ("auto", "cuda")
    if schedule.gpus and is_told:
        raise BundleError("--gpus is for --device auto or cuda, on this machine")
    if is_elsewhere:
        return schedule, device
    is_cpu = choose_device(device).type == "cpu"
    count = count_gpus()
    if absent := [gpu for gpu in schedule.gpus if gpu >= count]:
        raise BundleError(f"--gpus {absent[0]}: this machine shows {count} GPUs, numbered from 0")
    gpus = () if is_told else schedule.gpus or tuple(range(count))
    if schedule.gpus and len(gpus) == 1:
        device = f"cuda:{gpus[0]}"
    each = (schedule.threads or cpu_count()) // (len(gpus) or schedule.workers)
    # As many blocks as the cores can prepare keep a GPU busy; passes on CPUs are to be filled.
    wanted = 1 + each * (predict.batch_size or 1) // PATCHES_A_BLOCK if is_cpu else each
    in_hand = max(schedule.blocks_in_hand, min(wanted, MOST_BLOCKS_IN_HAND))
    return replace(schedule, gpus=gpus, blocks_in_hand=in_hand), device


def run_batch(
    batch: Batch,
    *,
    progress: Callable[[Job, int, int], None] | None = None,
    stage: Callable[[Job, str], None] | None = None,
    ended: Callable[[Job, Run], None] | None = None,
    dashboard: Callable[[str], None] | None = None,
    too_large: Callable[[str], None] | None = None,
) -> list[Run]:
    """Segment what was planned, with summary, report and log; return the run of each job.

    Args:
        batch: from `plan_batch`.
        progress: see `segment`.
        stage: see `segment`.
        ended: see `segment`.
        dashboard: told the URL of dask's, where there is one.
        too_large: told the sentence when the process takes more memory than `max_ram`, by another
            thread; None = the runs are stopped, and the sentence raised.

    Raises:
        WsiPipelineError: the output cannot be written, the cluster is lost, or memory is short.
    """
    make_folder(batch.output)
    for bundle in batch.bundles:
        # Its members may have been moved since. What people have written stays.
        if bundle.path.parent == (batch.output / FOLDER).absolute():
            write_ensemble(bundle)
    for folder, home in batch.folders.items():
        make_folder(folder)
        note_jobs(folder, [job for job in batch.every if job.folder.parent == folder], target=home)
    runs, told, stopped = list[Run](), list[str](), threading.Event()

    def stop(sentence: str) -> None:
        told.append(sentence)
        stopped.set()

    try:
        with (
            bounded_memory(batch.schedule.max_ram, too_large or stop, f"{LOWER}: {GOES_ON}"),
            _log_file(batch.output),
            open_cluster(batch.schedule) as client,
            ExitStack() as closing,
        ):
            is_elsewhere = batch.schedule.scheduler or batch.schedule.cluster
            if batch.settings.predict.device == "auto" and not is_elsewhere:
                tell_choice()
            # One for all models; behind a URL one for each.
            places = batch.folders if batch.target else {batch.output: None}
            overviews = {f: closing.enter_context(Overview(f, t)) for f, t in places.items()}
            if dashboard and (link := dashboard_link(client)):
                dashboard(link)
            for job, run in segment_jobs(
                batch.jobs,
                batch.bundles,
                client=client,
                settings=batch.settings,
                threads=batch.threads,
                overwrite=batch.overwrite,
                max_ram=batch.schedule.max_ram,
                progress=progress,
                stage=stage,
                stopped=stopped,
            ):
                runs.append(run)
                overviews[job.folder.parent if batch.target else batch.output].add(job.folder, run)
                if ended:
                    ended(job, run)
    except BaseException as error:
        # What stopped the runs is the reason, not the error with which they ended.
        if told:
            raise WsiPipelineError(told[0]) from error
        raise
    return runs


class _LogFile(logging.FileHandler):
    """A log that is not worth failing for, and that keeps no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        logging.getLogger(__name__).warning("no more is logged: %s", sys.exception())


@contextmanager
def _log_file(output: Path) -> Iterator[None]:
    """Write warnings and errors, with tracebacks, to a file in the output folder."""
    path = output / LOG_FILE
    # The file comes with the first line: most runs have nothing to log.
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        # Of a log that cannot be written the user has been told.
        with suppress(OSError):
            handler.close()


@contextmanager
def bounded_memory(
    max_ram: int | None, exceeded: Callable[[str], None], advice: str
) -> Iterator[None]:
    """Say when the process takes more memory than allowed for a second.

    Args:
        exceeded: told the sentence, by another thread.
        advice: what to do then.

    Raises:
        WsiPipelineError: it does before any work.
    """
    over = threading.Event()

    def watch(limit: int) -> None:
        above = 0
        while not over.wait(0.25):
            above = above + 1 if (used := used_memory()) > limit else 0
            if above == 4:
                exceeded(
                    f"{used / 1e9:.2f} GB of memory are taken, --max-ram allows "
                    f"{limit / 1e9:.2f} GB; {advice}"
                )

    if max_ram is None:
        yield
        return
    if (used := used_memory()) > max_ram:
        raise WsiPipelineError(
            f"{used / 1e9:.2f} GB of memory are taken before any work, --max-ram allows "
            f"{max_ram / 1e9:.2f} GB; raise it"
        )
    watcher = threading.Thread(target=watch, args=(max_ram,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
