"""How far an output folder is, from nothing but what lies in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsi_pipeline.errors import StoreError
from wsi_pipeline.files.atomic import sweep
from wsi_pipeline.files.locks import claim_folder
from wsi_pipeline.files.paths import as_path, is_remote, name_of, without_secrets
from wsi_pipeline.files.records import read_json
from wsi_pipeline.files.remote import check_listed, fetch, reaching, write_whole
from wsi_pipeline.files.schema import converted
from wsi_pipeline.patch_grid import open_patch_grid
from wsi_pipeline.report.record import RUN_FILE, Run, find_runs
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.store import RunStore

JOBS_FILE = ".slides.json"
"""In an output folder: the slide of each run's folder, of all commands that wrote into it."""
PATIENCE = 60
"""Seconds to wait while other processes note their slides."""
RECENT = 100
"""Slides from which the rate is taken."""
SAMPLED = 50
"""Blocks of a slide that are read to see how far it is."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far an output folder is.

    Attributes:
        done: folders of finished slides, relative to the output folder, as all others.
        running: blocks done by folder of a slide in which a process is working.
        failed: reasons by folder.
        waiting: folders of slides that are not begun, or begun by a process that has ended.
        patches: of all slides; those that are not known yet count as the mean of the others.
        patches_done: of slides that have ended, and of those that are begun, about.
        slides_per_hour: of the latest slides, while any process worked; None before the first.
        seconds_left: of the patches that are left, at the rate of the latest; None unless a process
            is working.
    """

    done: list[str]
    running: dict[str, int]
    failed: dict[str, str]
    waiting: list[str]
    patches: int
    patches_done: int
    slides_per_hour: float | None
    seconds_left: float | None


def note_jobs(output: Path, jobs: Iterable[Job], *, target: Path | None = None) -> None:
    """Add slides to what an output folder is to hold.

    Args:
        target: folder behind a URL to which the runs are moved; it holds the note then, written
            in any case, to find out whether it can be.

    Raises:
        StoreError: the note cannot be written, or is not found again.
    """
    home = target or output
    with claim_folder(output, timeout=PATIENCE):
        sweep(output / JOBS_FILE)
        noted = _load_jobs(home)
        every = noted | {job.folder.name: name_of(job.path) for job in jobs}
        if target or every != noted:
            write_whole(home / JOBS_FILE, json.dumps(every, indent=0).encode())
        if target:
            check_listed(home / JOBS_FILE)


def _load_jobs(output: Path) -> dict[str, str]:
    """Return the slides' names by folder; nothing where no command has noted any."""
    try:
        with reaching(output):
            found = converted(read_json(output / JOBS_FILE), dict[str, str])
    except (OSError, ValueError):
        return {}
    # each is looked for in the folder, and nowhere else
    return {name: slide for name, slide in found.items() if Path(name).name == name}


def read_status(output: str | Path, work: str | Path | None = None) -> Status:
    """Return how far an output folder is.

    Args:
        output: the folder, or its URL.
        work: of a URL, the folder in which its slides are worked on here.

    Raises:
        StoreError: no command has written there.
    """
    output = home = as_path(output)
    work = as_path(work) if work else home
    if is_remote(home):
        output = work / ".status"
        fetch(home, output, first=RUN_FILE)
    runs = {f.relative_to(output).as_posix(): run for f, run in find_runs(output).items()}
    noted = set(_load_jobs(home))
    if not is_remote(home):
        # Each of several models has a folder of its own.
        models = (path.parent for path in home.glob(f"*/{JOBS_FILE}"))
        noted |= {f"{model.name}/{name}" for model in models for name in _load_jobs(model)}
    names = sorted(noted | runs.keys())
    if not names:
        home_name = without_secrets(str(home))
        raise StoreError(f"{home_name} holds no runs; expected the --output of `segment`")
    stores = {name: RunStore(folder=work / name) for name in names}
    running = {name: len(s.blocks()) for name, s in stores.items() if s.is_claimed()}
    ended = {name: run for name, run in runs.items() if name not in running}
    waiting = [name for name in names if name not in running and name not in ended]
    known = {name: _patches(store, ended.get(name)) for name, store in stores.items()}
    told = [n for n in known.values() if n is not None]
    mean = sum(told) / len(told) if told else 1.0
    patches = {name: mean if n is None else n for name, n in known.items()}
    done = {
        name: n if name in ended else min(_predicted(stores[name]), n)
        for name, n in patches.items()
    }
    latest, worked = _latest(output, runs)
    per_second = sum(patches[name] for name in latest) / worked if worked else 0.0
    left = (sum(patches.values()) - sum(done.values())) / per_second if per_second else None
    return Status(
        done=[name for name, run in ended.items() if run.status == "done"],
        running=running,
        failed={name: run.reason for name, run in ended.items() if run.status == "failed"},
        waiting=waiting,
        patches=round(sum(patches.values())) if told else 0,
        patches_done=round(sum(done.values())) if told else 0,
        slides_per_hour=3600 * len(latest) / worked if worked else None,
        seconds_left=left if running else None,
    )


def _patches(store: RunStore, run: Run | None) -> int | None:
    """Return how many patches a slide has; None where nobody has looked at it yet."""
    if run and "kept" in run.patches:
        return run.patches["kept"]
    try:
        return len(open_patch_grid(store.grid_path).patches)
    except StoreError:
        return None


def _predicted(store: RunStore) -> float:
    """Return how many patches a begun slide has done, from some of its blocks."""
    blocks = store.blocks()
    counts = []
    for path in blocks[:: len(blocks) // SAMPLED + 1]:
        # written at this moment, or damaged, which may be anything: the run itself will say so
        with suppress(Exception), np.load(path) as arrays:
            counts.append(int(arrays["predicted"]))
    return len(blocks) * sum(counts) / len(counts) if counts else 0.0


def _latest(output: Path, runs: dict[str, Run]) -> tuple[list[str], float]:
    """Return the latest slides, and the seconds for which any process worked on them."""
    spans = []
    for name, run in runs.items():
        # whoever removes it just now, or wrote it by hand, is told of elsewhere
        with suppress(OSError):
            end = (output / name / RUN_FILE).stat().st_mtime
            if run.status == "done" and "total" in run.seconds:
                spans.append((end, end - run.seconds["total"], name))
    latest = sorted(spans)[-RECENT:]
    worked, until = 0.0, float("-inf")
    for start, end in sorted((start, end) for end, start, _ in latest):
        worked += max(end - max(start, until), 0)
        until = max(until, end)
    return [name for _, _, name in latest], worked
