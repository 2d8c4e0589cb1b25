"""A server of forks: each runs one command and dies at a chosen file event, or loses its power.

Started as `python walk.py ROOT`, it takes a JSON request a line and answers each with a line. All
that a command writes lies below ROOT. An event is what changes a folder, and what opens a file to
write, before and after; with a disk also what asks it to keep something. A fork that dies does so
by SIGKILL. Forks share the imports of the server, which make up nearly all of a command's
time.

Of a power cut the disk's own knowledge is kept beside: what was there in the beginning, the
content of each file and the entries of each folder when it was last synced. `cut_power` makes of
ROOT what such a disk holds.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Walker:
    """The server, as a test sees it.

    Args:
        root: folder below which commands write.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known = root.with_name(f"{root.name}-disk")
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(
        self, *args: object, die_at: int | None = None, keep: bool = False
    ) -> tuple[int | None, int, str]:
        """Run a command; return its exit code, None if it was killed, its events and its stderr.

        Args:
            args: of `wsi-pipeline`.
            die_at: number of the event, from 0.
            keep: whether to keep what the disk knows, for `cut_power`.
        """
        request = {"args": [str(a) for a in args], "die_at": die_at, "keep": keep}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return answer["code"], answer["events"], answer["said"]

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def cut_power(self, seed: int | None) -> None:
        """Make of the folder what the disk holds after a power cut.

        Args:
            seed: None = nothing but what was synced. A number = all names, as of a file system
                that had just written its journal, while of each file that was not synced the disk
                holds the content, half of it, zeros or nothing, at random.
        """
        built = self.root.with_name(f"{self.root.name}-built")
        if seed is None:
            folders: dict[int, dict[str, tuple[int, bool]]] = {}
            homes: dict[int, int] = {}  # a folder that was moved is where it was seen last
            for line in (self.known / "log").read_text().splitlines():
                folder, entries = json.loads(line)
                folders[folder] = entries
                homes |= {inode: folder for inode, is_folder in entries.values() if is_folder}

            def build(folder: int, path: Path) -> None:
                path.mkdir()
                for name, (inode, is_folder) in folders.get(folder, {}).items():
                    if not is_folder:
                        self._content(inode, path / name)
                    elif homes[inode] == folder:
                        build(inode, path / name)

            build(os.stat(self.root).st_ino, built)
            shutil.rmtree(self.root)
            built.rename(self.root)
            return
        dice = random.Random(seed)
        for path in sorted(p for p in self.root.rglob("*") if p.is_file()):
            data = path.read_bytes()
            synced = self.known / str(path.stat().st_ino)
            if not synced.is_file() or synced.read_bytes() != data:
                half = data[: len(data) // 2]
                path.write_bytes(dice.choice([data, half, bytes(len(data)), b""]))

    def _content(self, inode: int, path: Path) -> None:
        synced = self.known / str(inode)
        if synced.is_file():
            shutil.copyfile(synced, path)
        else:
            path.touch()


class Disk:
    """What a disk knows for certain, written down at every sync."""

    def __init__(self, root: Path, known: Path) -> None:
        self._known, self._lock = known, threading.Lock()
        self._held: list[int] = []  # open: no inode gets the number of another
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2
        )
        shutil.rmtree(known, ignore_errors=True)
        known.mkdir()
        self._log = open(known / "log", "ab", buffering=0)  # noqa: SIM115  # until the process dies
        for path in (root, *root.rglob("*")):
            self.keep(path)

    def keep(self, path: Path) -> None:
        """WorkerCache the content of a file or the entries of a folder."""
        with self._lock:
            self._held.append(os.open(path, os.O_RDONLY))
            inode = os.fstat(self._held[-1]).st_ino
            if not path.is_dir():
                shutil.copyfile(path, self._known / "new")
                os.replace(self._known / "new", self._known / str(inode))
                return
            entries = {}
            for entry in os.scandir(path):
                try:
                    self._held.append(os.open(entry.path, os.O_RDONLY))
                except FileNotFoundError:  # another thread's
                    continue
                entries[entry.name] = (os.fstat(self._held[-1]).st_ino, entry.is_dir())
            self._log.write(json.dumps([inode, entries]).encode() + b"\n")


def serve(root: Path) -> None:
    """Answer requests until there are no more."""
    from wsi_pipeline.cli import export, group, models, segment, tile  # noqa: F401
    from wsi_pipeline.networks import checkpoints, program  # noqa: F401

    known, said = root.with_name(f"{root.name}-disk"), root.with_name(f"{root.name}-said")
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(read)
            with open(said, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            disk = Disk(root, known) if request["keep"] else None
            events = watch(root, disk, request["die_at"])
            try:
                group(request["args"], standalone_mode=True)
            except SystemExit as end:
                count = next(events)
                sys.stderr.flush()
                os.write(write, json.dumps([end.code or 0, count]).encode())
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            told = pipe.read()
        _, status_ = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status_) and os.WTERMSIG(status_) == signal.SIGKILL
        code, count = (None, request["die_at"]) if killed else json.loads(told or b"[1, 0]")
        answer = {"code": code, "events": count, "said": said.read_text("utf-8", "replace")}
        print(json.dumps(answer), flush=True)


def watch(root: Path, disk: Disk | None, die_at: int | None) -> itertools.count[int]:
    """Count the events of this process from now on, and end it at one of them; return the count."""
    events, below = itertools.count(), os.fspath(root)

    def event() -> None:
        if next(events) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def is_ours(path: Any) -> bool:
        try:
            name = os.fsdecode(path)
        except TypeError:
            return False
        return os.path.abspath(name).startswith(below)

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if name in CHANGES and (is_ours(args[0]) or args[-1] != -1):  # or relative to a folder
            event()

    def opening(original: Any, writes: Any) -> Any:
        def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not (writes(*args, **kwargs) and is_ours(path)):
                return original(path, *args, **kwargs)
            event()
            found = original(path, *args, **kwargs)
            event()
            return found

        return opened

    def has_mode(mode: str = "r", *args: Any, **kwargs: Any) -> bool:
        return not set(mode).isdisjoint("wax+")

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if disk is not None and is_ours(path):  # nobody else can tell
            event()
            disk.keep(path)

    import builtins

    builtins.open = io.open = opening(io.open, has_mode)
    os.open = opening(os.open, lambda flags, *args, **kwargs: flags & WRITES)
    os.fsync = fsync
    sys.addaudithook(hook)
    return events


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
