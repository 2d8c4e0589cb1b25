"""How much memory and how many cores this process has, and what it takes of them."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import dask
import psutil
from dask.system import CPU_COUNT
from distributed.system import MEMORY_LIMIT

M_MMAP_THRESHOLD = -3
"""The number of this option in glibc."""


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
    return int(dask.utils.parse_bytes(text))


def used_memory() -> int:
    """Return the bytes that this process has in memory."""
    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Return the bytes that this process can have besides, in its container or job if in one."""
    limit = min(MEMORY_LIMIT, memory_limit_of_job())
    # What a job's control group allows is less than what the machine has.
    return min(int(psutil.virtual_memory().available), limit - used_memory())


def memory_limit_of_job(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the bytes that the control groups of this process allow, a SLURM job's among them.

    dask asks the topmost group only, whose limit is the container's.

    Args:
        root: where groups are folders.
    """
    limits = [sys.maxsize]
    # no Linux has no such file
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if "memory" in controllers.split(","):
                top, file = root / "memory", "memory.limit_in_bytes"
            elif not controllers:
                # version 2, which has one tree for all
                top, file = root, "memory.max"
            else:
                continue
            group = top / name.lstrip("/")
            for folder in (group, *group.parents):
                # a group without a limit says "max", and one out of sight has no folder
                with suppress(OSError, ValueError):
                    limits.append(int((folder / file).read_text()))
                if folder == top:
                    break
    return min(limits)


def cpu_count() -> int:
    """Return how many CPUs this process may use: its container or its job may not have all."""
    return int(CPU_COUNT)
