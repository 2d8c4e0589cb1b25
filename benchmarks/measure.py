"""Run a command as a fresh process and tell its wall time, peak memory and last word."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

INTERVAL = 0.02
"""Seconds between two looks at the memory; a shorter peak may be missed."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a process took.

    Attributes:
        seconds: wall time from start to exit, start-up included.
        cpu_seconds: that all processors together spent on it, in user and system mode.
        peak_gb: largest resident memory (RSS) of the process and its children together, 10⁹ bytes;
            memory that they share counts for each.
        said: the JSON object in the last line of its output; {} where there is none.
    """

    seconds: float
    cpu_seconds: float
    peak_gb: float
    said: dict[str, Any]


def measure(command: Sequence[str], log: Path) -> Measured:
    """Run a command to its end; return what it took.

    Args:
        command: program and arguments.
        log: file for all that it prints.

    Raises:
        SystemExit: it failed; the message ends with the last lines of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    peak = 0
    begun, spent = time.perf_counter(), _children_cpu()
    with log.open("wb") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                peak = max(peak, _resident(process))
                time.sleep(INTERVAL)
        finally:
            if process.poll() is None:
                process.kill()
    seconds, spent = time.perf_counter() - begun, _children_cpu() - spent
    lines = log.read_text("utf-8", errors="replace").splitlines()
    if process.returncode != 0:
        tail = "\n".join(lines[-15:])
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    return Measured(
        seconds=seconds, cpu_seconds=spent, peak_gb=peak / 1e9, said=_last_object(lines)
    )


def machine() -> dict[str, Any]:
    """Return what a result depends on beside the code; nothing that names the machine."""
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "wsi-pipeline": version("wsi-pipeline"),
    }


def _children_cpu() -> float:
    """Return the processor time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _resident(process: psutil.Process) -> int:
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:  # ended between the two looks
            continue
    return total


def _last_object(lines: Sequence[str]) -> dict[str, Any]:
    for line in reversed(lines):
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            return said
    return {}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
