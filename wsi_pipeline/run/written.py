"""The files of a run by their hashes: what is none of those that were written is a person's."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from wsi_pipeline.files.atomic import sha256_of, sync, written_beside
from wsi_pipeline.files.paths import is_remote, name_of
from wsi_pipeline.files.remote import reaching
from wsi_pipeline.report.record import Run, run_in
from wsi_pipeline.run.store import RunStore

ANNOTATIONS = "annotations.geojson"
STAYS = "was changed since it was written and stays as it is"
"""How the sentence on a person's file goes on behind its name."""


class WrittenFiles:
    """Which files of a run's folder are as they were written, and may be replaced or removed.

    `run.json` tells the hashes of a run's files. The working folder keeps those of all that were
    ever written, each from before its file has its name: what a kill leaves is known. Where an
    earlier version kept none, `annotations.geojson` is taken for a person's, since people are
    asked to correct it under its name, and nothing else is.

    Args:
        home: folder behind a URL where the files are; None = they are where the store is.
        tell: called with the name of each file before it is written.
    """

    def __init__(
        self,
        store: RunStore,
        home: Path | None = None,
        *,
        tell: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.tell = tell
        self._store, self._folder = store, home or store.folder
        self._warnings: dict[str, str] = {}
        self.placed: dict[str, str] = {}
        """SHA-256 of each file that was placed, by its name."""
        run = run_in(self._folder)
        told = run.files if run else None
        kept = store.written_path
        self._known = set((told or {}).values())
        if kept.is_file():
            self._known |= set(kept.read_text("utf-8", "replace").split())
        self._has_no_hashes = told == {} and not kept.is_file()
        if home is None:
            if self._has_no_hashes:
                found = [path for path in store.folder.iterdir() if path.is_file()]
                self._known |= {sha256_of(path) for path in found if path.name != ANNOTATIONS}
            self._keep()

    def noted(self, run: Run) -> Run:
        """Return a run that tells of what was placed, and of the files of people that were met."""
        again = set(map(_usual, self.placed))
        files = {name: digest for name, digest in run.files.items() if _usual(name) not in again}
        old = tuple(f"{name} {STAYS}" for name in again)
        warnings = [text for text in run.warnings if not text.startswith(old)]
        told = [text for text in self._warnings.values() if text not in warnings]
        return replace(run, files=files | self.placed, warnings=warnings + told)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Yield an empty folder, on the same disk, whose files are given their places at the end.

        Where the body fails they are not.
        """
        stage = self._store.stage_path
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        try:
            yield stage
            for path in sorted(stage.iterdir()):
                self._place(path)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            sync(stage.parent)

    def free(self, name: str) -> str:
        """Return the name under which a file may be written: its own, or one beside a person's."""
        for other in _names(name):
            path = self._folder / other
            with reaching(path):
                is_free = not (path.exists() or path.is_symlink())
            if is_free or self._is_ours(other):
                if other != name:
                    self._warnings[name] = f"{name} {STAYS}; the new one is {other}"
                return other
        # There are always more names.
        raise AssertionError

    def ours(self, names: Collection[str], *, above: int = -1) -> list[str]:
        """Return what of an earlier run is there under these names and is no person's.

        A zarr is ours. A file of a person gets a warning.

        Args:
            names: without what is added where a person's file has the name.
            above: number of a name, of which only later ones count.
        """
        found = []
        with reaching(self._folder):
            there = self._folder.iterdir() if self._folder.is_dir() else ()
            entries = sorted(map(name_of, there))
        for entry in entries:
            if _usual(entry) not in names or _number(entry) <= above:
                continue
            if entry.endswith(".zarr") or self._is_ours(entry):
                found.append(entry)
            else:
                self._warnings.setdefault(_usual(entry), f"{entry} {STAYS}")
        return found

    def _place(self, path: Path) -> None:
        """Give a file the name that is free; what is ours under a later one goes."""
        if path.is_dir():
            # A zarr, which nobody corrects.
            with written_beside(self._folder / path.name) as partial:
                os.rename(path, partial)
            return
        # known before it is there, so that no kill leaves a file of ours that looks like another's
        self._known.add(digest := sha256_of(path))
        self._keep()
        name = self.free(path.name)
        os.replace(path, self._folder / name)
        self.placed[name] = digest
        for later in self.ours([path.name], above=_number(name)):
            (self._folder / later).unlink()

    def _is_ours(self, name: str) -> bool:
        path = self._folder / name
        if self._has_no_hashes and is_remote(path):
            return _usual(name) != ANNOTATIONS
        with reaching(path):
            return path.is_file() and sha256_of(path) in self._known

    def _keep(self) -> None:
        """Write down the hashes that are known."""
        target = self._store.written_path
        with written_beside(target) as partial:
            partial.write_text("".join(f"{digest}\n" for digest in sorted(self._known)), "utf-8")


def _names(name: str) -> Iterator[str]:
    """Yield a file's name and those that it may have instead.

    Example:
        >>> list(itertools.islice(_names("mask.ome.tif"), 3))
        ['mask.ome.tif', 'mask.new.ome.tif', 'mask.new-2.ome.tif']
    """
    head, dot, tail = name.partition(".")
    yield name
    yield f"{head}.new{dot}{tail}"
    for number in itertools.count(2):
        yield f"{head}.new-{number}{dot}{tail}"


def _usual(name: str) -> str:
    """Return the name without what `_names` adds."""
    return re.sub(r"\.new(-\d+)?\.", ".", name, count=1)


def _number(name: str) -> int:
    """Return which of its names, from 0, a file has."""
    match = re.search(r"\.new(?:-(\d+))?\.", name)
    return int(match[1] or 1) if match else 0
