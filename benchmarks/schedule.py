"""What scheduling costs: blocks that do nothing, by the thousand; and what a second worker gains.

python benchmarks/schedule.py blocks --slides 10000 --blocks 50
python benchmarks/schedule.py speed --slides FOLDER --model BUNDLE

Both run a `dask scheduler` and workers as processes on loopback. `blocks` hands in the blocks of
all slides as `segment_all` does, and prints milliseconds a block and the memory of client and
scheduler. `speed` runs `segment` with one worker of one thread and with two, in turns, and prints
the ratio of the medians of the seconds between the first and the last block of a run; the model is
loaded before, by a slide that does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from wsi_pipeline.geometry import Block, iter_blocks
from wsi_pipeline.options import ScheduleOptions
from wsi_pipeline.run.batch import SLIDES_AT_ONCE
from wsi_pipeline.schedule.blocks import run_blocks
from wsi_pipeline.schedule.cluster import open_cluster


class Nothing:
    """Work that is none."""

    def __init__(self, keep: Any) -> None:
        pass

    def __call__(self, block: Block) -> int:
        return 1

    def close(self) -> None:
        pass


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[Path, psutil.Process]]:
    """Yield the file and the process of a scheduler with workers of one thread."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    common = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    common += ["--scheduler-file", str(file)]
    alone = ["--nthreads", "1", "--no-nanny", "--local-directory", str(folder)]
    commands = [["dask_scheduler", "--port", "0", "--no-show", *common]]
    commands += [["dask_worker", *alone, *common]] * workers
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{program}", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for program, *options in commands
    ]
    try:
        while not file.exists():
            time.sleep(0.1)
        yield file, psutil.Process(processes[0].pid)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def peak_mb(process: psutil.Process) -> float:
    """Return the most memory that a process has had, MB; what it has now where nobody tells."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
    except OSError:
        return float(process.memory_info().rss / 1e6)
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def blocks(arguments: argparse.Namespace, folder: Path) -> None:
    """Print what a block costs that does nothing."""
    every = list(iter_blocks((arguments.blocks, 1), (1, 1)))
    with (
        cluster(folder, arguments.workers) as (file, scheduler),
        open_cluster(ScheduleOptions(scheduler=str(file))) as client,
        ThreadPoolExecutor(SLIDES_AT_ONCE) as pool,
    ):
        client.wait_for_workers(arguments.workers)
        before = peak_mb(psutil.Process())
        start, cpu = time.perf_counter(), time.process_time()
        done = 0
        for number, count in enumerate(
            pool.map(
                lambda slide: sum(run_blocks(client, every, Nothing, priority=-slide)),
                range(arguments.slides),
            )
        ):
            done += count
            if number + 1 in (arguments.slides // 10, arguments.slides):
                seconds = time.perf_counter() - start
                figures = {
                    "slides": number + 1,
                    "blocks": done,
                    "seconds": round(seconds, 1),
                    "ms a block": round(1000 * seconds / done, 3),
                    "ms a block, CPU of the client": round(
                        1000 * (time.process_time() - cpu) / done, 3
                    ),
                    "ms a block, CPU of the scheduler": round(
                        1000 * sum(scheduler.cpu_times()[:2]) / done, 3
                    ),
                    "MB of the client before": round(before),
                    "MB of the client at the most": round(peak_mb(psutil.Process())),
                    "MB of the scheduler at the most": round(peak_mb(scheduler)),
                }
                print(json.dumps(figures), flush=True)


def speed(arguments: argparse.Namespace, folder: Path) -> None:
    """Print how much faster two workers are than one."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(arguments.rounds):
        for workers, found in seconds.items():
            found.append(_seconds(arguments, folder / f"{turn}-{workers}", workers))
            print(f"{workers} workers: {found[-1]:.1f} s", flush=True)
    one, two = (statistics.median(found) for found in seconds.values())
    print(f"{one:.1f} s and {two:.1f} s: {one / two:.2f} times as fast")


def _seconds(arguments: argparse.Namespace, folder: Path, workers: int) -> float:
    folder.mkdir()
    with cluster(folder, workers) as (file, _):
        common = [
            *(sys.executable, "-m", "wsi_pipeline", "-q", "segment"),
            *("--model", arguments.model, "--scheduler", str(file), "--tissue", "none"),
            *("--outputs", "zarr", "--device", "cpu"),
        ]
        slides = sorted(Path(arguments.slides).iterdir())
        for name, inputs in (("first", slides[:1]), ("all", slides)):
            command = [*common, "--output", str(folder / name), *map(str, inputs)]
            subprocess.run(command, check=True)
    times = sorted(p.stat().st_mtime for p in folder.glob("all/*/.store/blocks/[0-9]*.npz"))
    done = len(times) - workers  # the first of each worker end after they began
    return (times[-1] - times[workers - 1]) * len(times) / done


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    jobs = parser.add_subparsers(required=True)
    first = jobs.add_parser("blocks")
    first.add_argument("--slides", type=int, default=10_000)
    first.add_argument("--blocks", type=int, default=50, help="of a slide")
    first.add_argument("--workers", type=int, default=2)
    first.set_defaults(run=blocks)
    second = jobs.add_parser("speed")
    second.add_argument("--slides", required=True, help="folder of slides")
    second.add_argument("--model", required=True)
    second.add_argument("--rounds", type=int, default=3)
    second.set_defaults(run=speed)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments.run(arguments, Path(folder))


if __name__ == "__main__":
    main()
