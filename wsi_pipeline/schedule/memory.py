"""How much memory and how many cores this process has, and what it takes of them."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

M_MMAP_THRESHOLD = -3
"""The number of this option in glibc."""
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Which control groups hold this process, and where groups are folders."""


def trim_memory() -> None:
    """Give freed memory back: glibc keeps what each thread freed, so that peaks would add up."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def map_large_arrays() -> None:
    """Let arrays above 4 MiB go back when they are freed; those of volumes are such.

    glibc comes to keep what is below 32 MiB, each thread its own, in pieces that fit no other.
    """
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        set_option(M_MMAP_THRESHOLD, 4 << 20)


def read_size(text: str) -> int:
    """Return the bytes that a size with a unit means.

    Example:
        >>> read_size("8GB"), read_size("500 MiB")
        (8000000000, 524288000)

    Raises:
        ValueError: it has no unit, or is none.
    """
    if text.strip().isdigit():
        raise ValueError(f"{text!r} has no unit; expected a size such as 8GB")
    # dask takes a while to load, and most runs have no limit
    from dask.utils import parse_bytes

    return int(parse_bytes(text))


def used_memory() -> int:
    """Return the bytes that this process has in memory."""
    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Return the bytes that this process can have besides, in its container or job if in one."""
    # What a job's control group allows is less than what the machine has.
    return min(int(psutil.virtual_memory().available), memory_limit_of_job() - used_memory())


def memory_limit_of_job(own: Path = OWN_GROUPS, root: Path = GROUPS) -> int:
    """Return the bytes that the control groups of this process allow, a SLURM job's among them."""
    limits = [sys.maxsize]
    for group in _groups("memory", own, root):
        for file in ("memory.limit_in_bytes", "memory.max"):
            # a group without a limit says "max", and one out of sight has no folder
            with suppress(OSError, ValueError):
                limits.append(int((group / file).read_text()))
    return min(limits)


def cpu_count(own: Path = OWN_GROUPS, root: Path = GROUPS) -> int:
    """Return how many CPUs this process may use: its container or its job may not have all."""
    counts = [os.cpu_count() or 1]
    # not known of macOS
    if hasattr(process := psutil.Process(), "cpu_affinity"):
        counts.append(len(process.cpu_affinity()))
    for group in _groups("cpu", own, root):
        for files in (("cpu.cfs_quota_us", "cpu.cfs_period_us"), ("cpu.max",)):
            # no limit is -1, or "max"
            with suppress(OSError, ValueError):
                texts = " ".join((group / file).read_text() for file in files)
                quota, period = map(int, texts.split())
                counts += [math.ceil(quota / period)] * (quota > 0)
    return min(counts)


def _groups(controller: str, own: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that hold this process, and of those above them."""
    # no Linux has no such file
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            # version 2 has one tree for all, and names no controller
            if controllers and controller not in controllers.split(","):
                continue
            top = root / controller if controllers else root
            group = top / name.lstrip("/")
            for folder in (group, *group.parents):
                yield folder
                if folder == top:
                    break
