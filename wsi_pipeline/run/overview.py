"""Summary, cohort and report of an output folder, written again and again as runs end."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from wsi_pipeline.errors import StoreError, WsiPipelineError
from wsi_pipeline.files.atomic import sweep
from wsi_pipeline.files.locks import claim_folder
from wsi_pipeline.files.remote import fetch, write_whole
from wsi_pipeline.report.page import LINKED_FILES, write_report
from wsi_pipeline.report.record import RUN_FILE, Run, find_runs
from wsi_pipeline.report.summary import write_cohort, write_summary

logger = logging.getLogger(__name__)

FILES_OF_ALL = ("summary.csv", "cohort.csv", "report.html")
"""What is written of all runs together."""
COPIES = ".report"
"""In the work folder of a URL: copies of what summary and report are written from."""
TIME_SHARE = 0.02
"""Of the time that may go into summaries on the way: those of many slides take some."""
PATIENCE = 60
"""Seconds to wait while another process writes the summary."""


class Overview:
    """Summary and report of an output folder; in a `with` they are written a last time.

    Args:
        target: folder behind a URL to which they are moved; None = they stay.
    """

    def __init__(self, output: Path, target: Path | None = None) -> None:
        self._output, self._target = output, target
        self._failed: dict[Path, Run] = {}
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def add(self, folder: Path, run: Run) -> None:
        """Take in how a source ended; write, unless writing takes too much of the time."""
        if run.status == "failed":
            self._failed[folder] = run
        start = time.monotonic()
        if start >= self._next:
            # Another process writes just this; the URL is out of reach or the disk is full, which
            # may pass, and is said in the end if it does not.
            with suppress(StoreError):
                self.write(timeout=0)
            now = time.monotonic()
            self._next = now + (now - start) / TIME_SHARE

    def write(self, *, timeout: float = PATIENCE) -> None:
        """Write of all that the folder holds, and of what has failed besides.

        Only what can be helped is raised, such as a full disk: no record is.

        Args:
            timeout: seconds to wait while another process writes.

        Raises:
            WsiPipelineError: summary or report cannot be written.
        """
        try:
            # One process after the other, so that the last to write has seen the runs of all.
            with claim_folder(self._output, timeout=timeout):
                if self._target is None:
                    self._write(self._output)
                else:
                    self._write_behind_url(self._target)
        except WsiPipelineError:
            raise
        except Exception as error:
            logger.warning("the summary is not written: %r", error, exc_info=True)

    def _write_behind_url(self, target: Path) -> None:
        copies = self._output / COPIES
        whole = ("overlay.png",)
        look = partial(fetch, target, copies, first=RUN_FILE, whole=whole, named=LINKED_FILES)
        look()
        changed = True
        while changed:
            self._write(copies)
            for name in FILES_OF_ALL:
                write_whole(target / name, (copies / name).read_bytes())
            # Other machines are not locked out: the last to write has seen the runs of all.
            changed = look()

    def _write(self, folder: Path) -> None:
        for name in FILES_OF_ALL:
            # Processes that were killed may have left halves of it.
            sweep(folder / name)
        failed = {folder / p.relative_to(self._output): run for p, run in self._failed.items()}
        # Slides that earlier calls or other shards have done belong to the picture, too.
        every = find_runs(folder) | failed
        write_summary(folder, every)
        write_cohort(folder, every.values())
        write_report(folder, every)
