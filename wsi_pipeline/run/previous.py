"""What an earlier run has left in a folder: done already, another's, or exported since."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import StoreError
from wsi_pipeline.files.atomic import remove, sha256_of, sync
from wsi_pipeline.files.records import read_json
from wsi_pipeline.files.remote import reaching
from wsi_pipeline.files.schema import converted
from wsi_pipeline.options import ExportOptions, Settings, as_plain
from wsi_pipeline.report.record import (
    FILES,
    OUTPUT_FILES,
    PREVIEW_FILE,
    RUN_FILE,
    Run,
    files_of,
    load_run,
    run_in,
)
from wsi_pipeline.run.facts import model_facts, options_of
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.store import RunStore, another, check_same, run_key
from wsi_pipeline.run.written import WrittenFiles


def model_key(bundle: Bundle) -> str:
    """Return a digest of what makes a model another one: its name, its weights, what it sees."""
    return run_key(model_facts(replace(bundle, limits="", origin={})))


def refuse_others(job: Job, fingerprint: str, bundle: Bundle) -> None:
    """Refuse a folder that holds another slide's run, or another model's.

    Raises:
        StoreError: it does.
    """
    run = run_in(job.home)
    if run is not None and (run.status == "done" or run.amounts):
        facts = model_facts(bundle)
        if run.slide.get("fingerprint") != fingerprint:
            raise another(job.home, "slide")
        own = ("name", "weights_sha256", "encoder_sha256", "input")
        if any(run.model.get(k, facts.get(k)) != facts.get(k) for k in own):
            raise another(job.home, f"model, {run.model.get('name')}")
    check_same(job.folder, fingerprint=fingerprint, model=model_key(bundle))


def held_key(job: Job) -> str:
    """Return the key of the run that a folder holds, begun or finished, "" where there is none."""
    if key := RunStore(folder=job.folder).key().get("key"):
        return key
    run = run_in(job.home)
    return str(run.settings.get("key", "")) if run else ""


def find_finished(folder: Path, key: str, bundle: Bundle, export: ExportOptions) -> Run | None:
    """Return the run that a folder holds, if it is whole and was made the same way."""
    path = folder / RUN_FILE
    with reaching(folder):
        if not path.is_file():
            return None
        try:
            run = load_run(path)
        except StoreError as error:
            # What is out of reach may be whole: nothing is written over it.
            if isinstance(error.__cause__, OSError):
                raise
            # A damaged record is written again.
            return None
        names = itertools.chain.from_iterable(files_of(export, run.files).values())
        if not all((folder / name).exists() for name in names):
            return None
    wanted = {"key": key, "export": as_plain(export)}
    # What the model says of its limits may have changed since.
    same = run.status == "done" and run.model == model_facts(bundle)
    same &= wanted.items() <= run.settings.items()
    return run if same else None


def as_exported(home: Path, key: str, settings: Settings) -> Settings:
    """Return the settings as `export` has changed them since the same options were named here.

    So a line that is given again goes on with what is there, and one that names others does not.
    """
    run, wanted = run_in(home), {"key": key, "named": settings.as_plain()["named"]}
    # It may be none of this version.
    with suppress(KeyError, TypeError, ValueError):
        if run and wanted.items() <= run.settings.items():
            return replace(settings, export=options_of(run))
    return settings


def drop_what_is_old(store: RunStore, key: str, files: WrittenFiles) -> None:
    """Remove what new outputs will replace or contradict, `run.json` in any case."""
    folder = store.folder
    path = folder / RUN_FILE
    same = (run := run_in(folder)) is not None and run.settings.get("key") == key
    # A run moves its mask before it writes anything else: once it has, the rest is its own too.
    moved = not store.mask_path.is_dir()
    # run.json first: without it nobody takes what comes next for another run's.
    path.unlink(missing_ok=True)
    for name in files.ours([PREVIEW_FILE]):
        # Of the same slide, model and options: from now on it belongs to this run.
        if _run_of_preview(folder / name) == key:
            files.placed[name] = sha256_of(folder / name)
    if not same and not moved:
        kept = set(files.placed)
        # With a digest in the store they are this run's, and what they were made of is gone.
        kept |= {FILES["probability"]} if any(store.path.glob("probability-*.sha256")) else set()
        for name in set(files.ours(OUTPUT_FILES)) - kept:
            remove(folder / name)
    sync(folder)


def _run_of_preview(path: Path) -> str:
    """Return the key of the run that a preview is of, "" where it says none."""
    try:
        found = converted(read_json(path), list[dict[str, Any]])
    except (OSError, ValueError):
        return ""
    return str(found[0].get("run", "")) if found else ""
