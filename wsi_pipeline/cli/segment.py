"""`wsi-pipeline segment`."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from wsi_pipeline.cli.options import (
    MPP,
    DeviceChoice,
    Figure,
    OutputChoice,
    OutputsChoice,
    choose_work,
    inputs_argument,
    once,
    overwrite_option,
    select_options,
    work_option,
    wrong_usage,
)
from wsi_pipeline.cli.stop import end, stopping
from wsi_pipeline.options import (
    Blend,
    ExportOptions,
    Ngff,
    Output,
    Precision,
    PredictOptions,
    Queue,
    ScheduleOptions,
    SelectOptions,
    Settings,
    TiffKind,
)

MOST_BLOCKS_IN_HAND = 8
"""Of one worker: each takes some 150 MB."""
LOG_FILE = "wsi_pipeline.log"
"""In the output folder: warnings, and tracebacks of what should not happen."""
REPORT_FOLDER = ".report"
"""In the work folder of a URL: copies of what summary and report are written from."""
SUMMARY_SHARE = 0.02
"""Of the time that may go into summaries on the way: those of many slides take some."""
SUMMARY_PATIENCE = 60
"""Seconds to wait while another process writes the summary."""
LINE = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
"""Where options come from that somebody has chosen."""
PREDICT, EXPORT, SCHEDULE = PredictOptions(), ExportOptions(), ScheduleOptions()


class LogFile(logging.FileHandler):
    """A log that is not worth failing for, and that keeps no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return what is written of a record."""
        from wsi_pipeline.files.paths import without_secrets

        return without_secrets(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that the log cannot be written, and write no more."""
        logging.getLogger().removeHandler(self)
        click.echo(f"warning: no more is logged: {sys.exception()}", err=True)


class Shard(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """`I/N`: the I-th of N equal shares, counted from 1."""

    name = "I/N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Return (i, n)."""
        try:
            index, count = (int(part) for part in str(value).split("/"))
        except ValueError:
            self.fail(f"{value!r} is not of the form I/N, such as 2/8", param, ctx)
        if not 1 <= index <= count:
            self.fail(f"{value!r}: I must lie between 1 and N", param, ctx)
        return index, count


class Gpus(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """Numbers of GPUs with commas between."""

    name = "N,N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Return the numbers, each once."""
        numbers = str(value).split(",")
        if not all(number.isdecimal() for number in numbers):
            self.fail(f"{value!r} is no list of numbers such as 0,2", param, ctx)
        return tuple(dict.fromkeys(map(int, numbers)))


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A number of bytes with its unit."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return the bytes."""
        from wsi_pipeline.schedule.memory import read_size

        try:
            size = read_size(str(value))
        except (ValueError, OverflowError) as error:
            self.fail(str(error), param, ctx)
        if size <= 0:
            self.fail(f"{value!r} is no memory at all", param, ctx)
        return size


@click.command()
@inputs_argument
@once("--model", "-m", required=True, help="Bundle: a folder, a model.toml or its URL.")
@click.option(
    "--output",
    "-o",
    required=True,
    type=OutputChoice(url=True),
    help="Folder for the results, or its URL, such as s3://bucket/runs.",
)
@work_option
@select_options()
@click.option(
    "--any-resolution",
    is_flag=True,
    help="Take slides, too, that are more than 2.5 times as coarse as the model.",
)
@click.option(
    "--time-point",
    type=click.IntRange(min=0),
    help="Which volume of a DICOM series, NIfTI or NRRD with several in one place, from 0.",
)
@click.option(
    "--overlap", type=click.IntRange(min=0), help="px between patches  [default: the bundle's]"
)
@click.option(
    "--blend",
    type=click.Choice(get_args(Blend)),
    default=PREDICT.blend,
    help="How overlapping predictions combine.",
)
@click.option(
    "--device",
    type=DeviceChoice(),
    default=PREDICT.device,
    help="auto: the first GPU, else the CPU.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default=PREDICT.precision,
    help="Number format of the forward pass; auto takes the fastest that the device has.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1, max=65_536),
    help="Patches in a forward pass  [default: by device]",
)
@click.option(
    "--block-size",
    type=click.IntRange(min=64),
    help="Side of a unit of work, px of the mask  [default: 2048, with --ngff 0.5 4096; 256 in "
    "volumes]",
)
@click.option(
    "--mask-mpp",
    type=MPP,
    help="µm per pixel of mask and polygons  [default: the slide's own, full resolution]",
)
@click.option(
    "--outputs",
    type=OutputsChoice(get_args(Output)),
    help="What to write  [default: all that there is for the model's modality]",
)
@click.option(
    "--ngff", type=click.Choice(get_args(Ngff)), default=EXPORT.ngff, help="OME-Zarr version."
)
@click.option(
    "--tiff",
    type=click.Choice(get_args(TiffKind)),
    default=EXPORT.tiff,
    help="asap writes ASAP's kind beside the OME-TIFF.",
)
@click.option(
    "--simplify",
    type=Figure(min=0),
    default=EXPORT.simplify_um,
    help="Root of the largest triangle that simplifying an outline may cut off, µm; 0 = exact.",
)
@click.option(
    "--min-area",
    type=Figure(min=0),
    default=EXPORT.min_area_um2,
    help="Regions and holes below this get no polygon, µm²; the mask keeps them.",
)
@click.option(
    "--max-unreadable",
    type=Figure(min=0, max=100),
    default=100 * EXPORT.max_unreadable,
    help="Percent of the patches' area that may be unreadable; a slide with more fails.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=SCHEDULE.workers,
    help="Workers of the in-process cluster, or jobs of --cluster.",
)
@click.option("--gpus", type=Gpus(), help="This machine's GPUs to use  [default: all]")
@click.option(
    "--max-ram", type=Size(), help="Memory that this process may take, such as 8GB.  [default: all]"
)
@click.option("--scheduler", help="Address or scheduler file of a running dask scheduler.")
@click.option(
    "--cluster",
    type=click.Choice(get_args(Queue)),
    help="Queue to which workers are submitted, as dask's configuration says.",
)
@click.option("--shard", type=Shard(), help="Do only the I-th of N shares of the slides.")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    inputs: tuple[str, ...],
    model: str,
    output: Path,
    work: Path | None,
    **options: Any,
) -> None:
    """Segment slides: masks at full resolution, QuPath polygons, overviews and a report.

    A model for images or volumes takes those, and its masks are in their own geometry.

    INPUT: files, folders (searched recursively), patterns, or a .txt file with one path a line.
    Running the same command again goes on where it stopped.
    """
    from wsi_pipeline.bundle import load_bundle
    from wsi_pipeline.files.locks import make_folder
    from wsi_pipeline.files.paths import is_remote
    from wsi_pipeline.run.jobs import find_slides, plan_jobs, read_mpp_table, why_none
    from wsi_pipeline.run.segment import check_settings
    from wsi_pipeline.run.status import note_jobs
    from wsi_pipeline.sources.radiology.discover import find_images, find_volumes

    if options["scheduler"] and options["cluster"]:
        raise click.UsageError("--scheduler and --cluster exclude each other")
    gpus = _gpus(options)
    if options["gpus"] and len(gpus) == 1:
        options["device"] = f"cuda:{gpus[0]}"
    settings = _settings(options, _named(ctx, options))
    bundle = load_bundle(model)
    reason = settings.why_not(bundle.modality)
    if options["mpp_table"] and bundle.modality != "slide":
        reason = "--mpp-table is for slides"
    if reason:
        raise click.UsageError(f"{reason}; {bundle.name} is for {bundle.modality}s")
    with wrong_usage():
        check_settings(settings, bundle)
        table = read_mpp_table(options["mpp_table"]) if options["mpp_table"] else None
    target = output if is_remote(output) else None
    output = choose_work(output, work)
    finders: dict[str, Callable[..., list[Path]]] = {
        "slide": find_slides,
        "image": find_images,
        "volume": find_volumes,
    }
    found = finders[bundle.modality](inputs, output=output)
    jobs = every = plan_jobs(found, output, table, target=target)
    if not every:
        raise click.UsageError(why_none(inputs, bundle.modality))
    if options["shard"]:
        index, count = options["shard"]
        jobs = every[index - 1 :: count]
    schedule = ScheduleOptions(
        workers=options["workers"],
        scheduler=options["scheduler"],
        cluster=options["cluster"],
        gpus=gpus,
        blocks_in_hand=_blocks_in_hand(
            "cpu" if options["scheduler"] or options["cluster"] else options["device"],
            len(gpus) or options["workers"],
        ),
        max_ram=options["max_ram"],
    )
    if options["dry_run"]:
        if not _dry_run(jobs, bundle, settings, schedule, options["overwrite"]):
            ctx.exit(1)
        return
    make_folder(output)
    note_jobs(output, every, target=target)
    not_done = _run(
        jobs, bundle, output, target, settings, schedule, options["overwrite"], ctx.obj["quiet"]
    )
    if not_done:
        ctx.exit(1)


def _gpus(options: dict[str, Any]) -> tuple[int, ...]:
    """Return which GPUs of this machine to use; none where another option says what does."""
    from wsi_pipeline.inference.predictor import choose_device, count_gpus

    chosen: tuple[int, ...] | None = options["gpus"]
    elsewhere = options["scheduler"] or options["cluster"]
    is_told = elsewhere or options["device"] not in ("auto", "cuda")
    if chosen and is_told:
        raise click.UsageError("--gpus is for --device auto or cuda, on this machine")
    if not elsewhere:
        with wrong_usage():
            choose_device(options["device"])
    if is_told:
        return ()
    count = count_gpus()
    if absent := [gpu for gpu in chosen or () if gpu >= count]:
        raise click.UsageError(
            f"--gpus {absent[0]}: this machine shows {count} GPUs, numbered from 0"
        )
    return chosen or tuple(range(count))


def _blocks_in_hand(device: str, workers: int) -> int:
    """Return how many blocks a worker needs in hand: on a GPU as many as cores can prepare."""
    from wsi_pipeline.inference.predictor import choose_device
    from wsi_pipeline.schedule.memory import cpu_count

    if choose_device(device).type == "cpu":
        return SCHEDULE.blocks_in_hand
    return max(SCHEDULE.blocks_in_hand, min(cpu_count() // workers, MOST_BLOCKS_IN_HAND))


def _named(ctx: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Return what the line says of how to write a finished mask."""
    names = ("outputs", "ngff", "tiff", "simplify", "min_area", "frame", "max_unreadable")
    given = {name: options[name] for name in names if ctx.get_parameter_source(name) in LINE}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in given.items()}


def _settings(options: dict[str, Any], named: dict[str, Any]) -> Settings:
    return Settings(
        named=named,
        select=SelectOptions(
            mpp=options["mpp"],
            series=options["series"],
            time_point=options["time_point"],
            tissue=options["tissue"],
            roi=options["roi"],
            frame=options["frame"],
            any_resolution=options["any_resolution"],
        ),
        predict=PredictOptions(
            **{
                name: options[name]
                for name in (
                    "overlap", "blend", "device", "precision",
                    "batch_size", "block_size", "mask_mpp",
                )
            }
        ),
        export=ExportOptions(
            outputs=options["outputs"] or (),
            ngff=options["ngff"],
            tiff=options["tiff"],
            simplify_um=options["simplify"],
            min_area_um2=options["min_area"],
            frame=options["frame"],
            max_unreadable=options["max_unreadable"] / 100,
        ),
    )  # fmt: skip


def _run(
    jobs: list[Any],
    bundle: Any,
    output: Path,
    target: Path | None,
    settings: Settings,
    schedule: ScheduleOptions,
    overwrite: bool,
    quiet: bool,
) -> int:
    """Segment the slides, say how each ended, write the report; return how many are not whole."""
    from wsi_pipeline.cli.progress import Bars
    from wsi_pipeline.files.atomic import this_process
    from wsi_pipeline.files.locks import GOES_ON
    from wsi_pipeline.files.paths import name_of, without_secrets
    from wsi_pipeline.run.segment import segment_all
    from wsi_pipeline.run.store import RunStore
    from wsi_pipeline.schedule.cluster import dashboard_link, open_cluster

    def tidy() -> None:
        for job in jobs:
            RunStore(folder=job.folder).remove_partials(this_process())

    threads = None if schedule.scheduler or schedule.cluster else _threads(schedule)
    runs: dict[Path, Any] = {}
    numbers = {job.folder: number for number, job in enumerate(jobs, start=1)}
    with (
        stopping(tidy, f"stopped: {GOES_ON}"),
        _bounded_memory(schedule.max_ram, tidy),
        _log_file(output),
        open_cluster(schedule) as client,
        Bars(quiet=quiet, unit="patches", of=len(jobs)) as bars,
        _summary(output, target) as summary,
    ):
        if not quiet and bundle.limits:
            click.echo(f"limits of {bundle.name}: {bundle.limits}", err=True)
        if not quiet and (link := dashboard_link(client)):
            click.echo(f"dashboard: {link}", err=True)
        for job, run in segment_all(
            jobs,
            bundle,
            client=client,
            settings=settings,
            threads=threads,
            overwrite=overwrite,
            max_ram=schedule.max_ram,
            progress=lambda job, done, total: bars(
                name_of(job.path), done, total, number=numbers[job.folder]
            ),
            stage=lambda job, text: bars.tell(name_of(job.path), text, number=numbers[job.folder]),
        ):
            bars.close()
            runs[job.folder] = run
            summary.add(job.folder, run)
            if run.status != "done":
                path = without_secrets(str(job.path))
                click.echo(f"{run.status}: {path}: {run.reason}", err=True)
            elif not quiet:
                facts = [f"{name} {n:.4g} {run.unit}" for name, n in run.amounts.items()]
                facts += [f"{label} {p:.3f}" for label, p in run.labels.items()]
                home = without_secrets(str(job.home))
                click.echo(f"done: {name_of(job.path)} → {home} ({', '.join(facts)})", err=True)
            for warning in run.warnings:
                click.echo(f"warning: {name_of(job.path)}: {warning}", err=True)
    return sum(run.status != "done" or bool(run.bad_regions) for run in runs.values())


class Summary:
    """Summary and report, written again and again as slides finish.

    Args:
        output: folder of the runs.
        target: folder behind a URL to which they are moved; None = they stay.
    """

    def __init__(self, output: Path, target: Path | None) -> None:
        self._output, self._target = output, target
        self._failed: dict[Path, Any] = {}
        self._next = 0.0

    def add(self, folder: Path, run: Any) -> None:
        """Take in how a slide ended; write, unless writing takes too much of the time."""
        from wsi_pipeline.errors import StoreError

        if run.status == "failed":
            self._failed[folder] = run
        start = time.monotonic()
        if start >= self._next:
            # another process writes just this; the URL is out of reach or the disk is full, which
            # may pass, and is said in the end if it does not
            with suppress(StoreError):
                self.write(timeout=0)
            now = time.monotonic()
            self._next = now + (now - start) / SUMMARY_SHARE

    def write(self, *, timeout: float = SUMMARY_PATIENCE) -> None:
        """Write of all that the folder holds, and of what has failed besides.

        Only what can be helped ends the command, such as a full disk: no record does.
        """
        from wsi_pipeline.errors import WsiPipelineError

        try:
            self._write_all(timeout)
        except WsiPipelineError:
            raise
        except Exception as error:
            logging.getLogger(__name__).warning(
                "the summary is not written: %r", error, exc_info=True
            )

    def _write_all(self, timeout: float) -> None:
        from wsi_pipeline.files.locks import claim_folder
        from wsi_pipeline.files.remote import fetch, write_whole
        from wsi_pipeline.report.page import LINKED_FILES
        from wsi_pipeline.report.record import RUN_FILE

        # one process after the other, so that the last to write has seen the runs of all
        with claim_folder(self._output, timeout=timeout):
            if self._target is None:
                self._write(self._output)
                return
            copies = self._output / REPORT_FOLDER
            look = partial(
                fetch,
                self._target,
                copies,
                first=RUN_FILE,
                whole=("overlay.png",),
                named=LINKED_FILES,
            )
            look()
            changed = True
            while changed:
                self._write(copies)
                for name in ("summary.csv", "report.html"):
                    write_whole(self._target / name, (copies / name).read_bytes())
                # other machines are not locked out: the last to write has seen the runs of all
                changed = look()

    def _write(self, folder: Path) -> None:
        from wsi_pipeline.files.atomic import sweep
        from wsi_pipeline.report.page import write_report
        from wsi_pipeline.report.record import find_runs
        from wsi_pipeline.report.summary import write_summary

        for name in ("summary.csv", "report.html"):
            sweep(folder / name)  # of processes that were killed
        failed = {folder / path.name: run for path, run in self._failed.items()}
        # slides that earlier calls or other shards have done belong to the picture too
        every = find_runs(folder) | failed
        write_summary(folder, every)
        write_report(folder, every)


@contextmanager
def _summary(output: Path, target: Path | None) -> Iterator[Summary]:
    """Yield a summary that is written a last time however the body ends."""
    summary = Summary(output, target)
    try:
        yield summary
    finally:
        summary.write()


@contextmanager
def _log_file(output: Path) -> Iterator[None]:
    """Write warnings and errors, with tracebacks, to a file in the output folder."""
    handler = LogFile(output / LOG_FILE, encoding="utf-8", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):  # of which the user has been told
            handler.close()


@contextmanager
def _bounded_memory(max_ram: int | None, tidy: Callable[[], None]) -> Iterator[None]:
    """End the process with a sentence when it takes more memory than allowed for a second."""
    from wsi_pipeline.errors import WsiPipelineError
    from wsi_pipeline.files.locks import GOES_ON
    from wsi_pipeline.schedule.memory import used_memory

    over = threading.Event()

    def watch(limit: int) -> None:
        above = 0
        while not over.wait(0.25):
            above = above + 1 if (used := used_memory()) > limit else 0
            if above == 4:
                end(
                    tidy,
                    f"Error: {used / 1e9:.2f} GB of memory are taken, --max-ram allows "
                    f"{limit / 1e9:.2f} GB; lower --workers, --block-size or --batch-size, raise "
                    f"--min-area, or raise the limit: {GOES_ON}",
                    1,
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


def _threads(schedule: ScheduleOptions) -> int:
    """Return how many of this machine's CPUs each worker gets."""
    from wsi_pipeline.schedule.memory import cpu_count

    return max(cpu_count() // (len(schedule.gpus) or schedule.workers), 1)


def _dry_run(
    jobs: list[Any], bundle: Any, settings: Settings, schedule: ScheduleOptions, overwrite: bool
) -> bool:
    """Say what a run would take, a line for each slide and one for all; return whether it could."""
    from wsi_pipeline.errors import WsiPipelineError
    from wsi_pipeline.files.paths import without_secrets
    from wsi_pipeline.run.estimate import model_bytes, patches_per_second
    from wsi_pipeline.run.segment import estimate
    from wsi_pipeline.schedule.memory import cpu_count

    rate = patches_per_second(bundle, settings.predict, threads=cpu_count())
    model = model_bytes(bundle)
    found = []
    for job in jobs:
        try:
            one = estimate(
                job,
                bundle,
                settings=settings,
                workers=schedule.workers,
                blocks_in_hand=schedule.blocks_in_hand,
                threads=_threads(schedule),
                rate=rate,
                model=model,
                overwrite=overwrite,
            )
        except WsiPipelineError as error:
            click.echo(without_secrets(f"{job.path}\twould fail: {error}"))
            continue
        found.append(one)
        size = " × ".join(map(str, reversed(one.mask_shape)))
        path = without_secrets(str(job.path))
        home = without_secrets(str(job.home))
        click.echo(f"{path}\t{size} px mask\t{_needs(one)}\t→ {home}")
    if len(jobs) > 1 and found:
        total = type(found[0])(
            patches=sum(e.patches for e in found),
            seconds=sum(e.seconds for e in found),
            memory=max(e.memory for e in found),
            disk=sum(e.disk for e in found),
            files=sum(e.files for e in found),
            mask_shape=(),
        )
        home = without_secrets(str(jobs[0].home.parent))
        click.echo(f"total of {len(found)} {bundle.modality}s\t\t{_needs(total)}\t→ {home}")
    click.echo(f"estimated from {rate:.3g} patches/s of this machine", err=True)
    return len(found) == len(jobs)


def _needs(estimate: Any) -> str:
    return (
        f"{estimate.patches} patches\tabout {estimate.seconds / 60:.1f} min\t"
        f"{estimate.memory / 1e9:.1f} GB memory\t{estimate.disk / 1e9:.2f} GB disk\t"
        f"at most {estimate.files} files"
    )
