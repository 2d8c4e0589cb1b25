"""The main job on a real dask cluster on loopback: the same masks, whatever dies on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import zarr
from bundles import Busy, Pointwise, classify, pointwise_bundle

from wsi_pipeline import (
    ExportOptions,
    ScheduleOptions,
    Settings,
    find_slides,
    load_bundle,
    open_cluster,
    plan_jobs,
)
from wsi_pipeline.report.record import load_run
from wsi_pipeline.run.batch import segment_jobs
from wsi_pipeline.run.store import RunStore

SLIDES = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_slide, slide_pixels):
    """Return a folder with slides of 2 × 2 blocks and one of 3 × 4, a quick and a slow bundle."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "slides").mkdir()
    for number in range(SLIDES):
        pixels = pixels_of(slide_pixels, number)
        make_slide(folder / "slides" / f"{number}.tif", pixels, 0.25, levels=(1, 8))
    for name, program in (("quick", Pointwise), ("busy", Busy)):
        pointwise_bundle(folder / name, mpp=0.25, patch_size=256, program=program)
    return folder


def pixels_of(slide_pixels, number):
    """Return a slide that is like no other, the first four times as large."""
    pixels = np.roll(slide_pixels, 100 * number, axis=1)
    return pixels if number else np.tile(pixels, (2, 2, 1))


class Cluster:
    """A dask scheduler and workers, each a process."""

    def __init__(self, folder):
        self.folder = folder
        self.file = folder / "scheduler.json"
        self.scheduler = self._start("dask_scheduler", "--port", 0, "--no-show")
        wait_for(self.file.exists)
        self.workers = []

    def add_worker(self, *options, **environment):
        worker = self._start(
            "dask_worker", "--nthreads", 1, "--no-nanny", "--local-directory", self.folder,
            *options, **environment,
        )  # fmt: skip
        self.workers.append(worker)

    def _start(self, program, *options, **environment):
        return subprocess.Popen(
            [
                *(sys.executable, "-m", f"distributed.cli.{program}", "--host", "127.0.0.1"),
                *("--scheduler-file", self.file, "--dashboard-address", "127.0.0.1:0"),
                *map(str, options),
            ],
            cwd=self.folder,  # and not a checkout, where another version would be found
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def close(self):
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@contextmanager
def cluster(folder, workers):
    folder.mkdir(exist_ok=True)
    started = Cluster(folder)
    try:
        for _ in range(workers):
            started.add_worker()
        yield started
    finally:
        started.close()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def command(place, output, *options, model="quick"):
    arguments = [
        "segment", place / "slides", "--model", place / model, "--output", output,
        "--block-size", 1024, "--tissue", "none", "--device", "cpu", "--precision", "fp32",
        "--outputs", "zarr,geojson", *options,
    ]  # fmt: skip
    return [sys.executable, "-m", "wsi_pipeline", "-q", *map(str, arguments)]


def run(*args, **options):
    return subprocess.run(command(*args, **options), capture_output=True, text=True)


def start(*args, **options):
    return subprocess.Popen(command(*args, **options), stderr=subprocess.PIPE, text=True)


def blocks_done(output):
    return len(list(output.glob("*/.store/blocks/[0-9]*.npz")))


def assert_masks(output, slide_pixels):
    for number in range(SLIDES):
        folder = output / str(number)
        mask = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
        assert (mask == classify(pixels_of(slide_pixels, number))).all()
        assert load_run(folder / "run.json").status == "done"
        assert json.loads((folder / "annotations.geojson").read_text())["features"]
    assert not list(output.rglob("*.partial"))


def test_a_slide_in_another_hand_is_looked_at_again_in_the_end(tmp_path, place):
    jobs = plan_jobs(find_slides([str(place / "slides")], output=tmp_path), tmp_path)
    settings = Settings(export=ExportOptions(outputs=("zarr",)))
    claim = RunStore(folder=jobs[0].folder).claim()
    with open_cluster(ScheduleOptions()) as client:
        done = []
        for job, run in segment_jobs(
            jobs, load_bundle(place / "quick"), client=client, settings=settings
        ):
            done.append((job.folder.name, run.status))
            claim.close()  # the other process has died
    assert done == [("1", "done"), ("2", "done"), ("0", "done")]


@pytest.mark.slow
def test_two_shards_at_the_same_moment_do_every_slide_once(tmp_path, place, slide_pixels):
    output = tmp_path / "out"
    both = [start(place, output, "--shard", f"{n}/2", model="busy") for n in (1, 2)]
    growing = set()
    while any(process.poll() is None for process in both):
        if (output / "summary.csv").exists():
            growing.add(len((output / "summary.csv").read_text().splitlines()) - 1)
        time.sleep(0.02)
    for process in both:
        assert process.communicate() == (None, "")
        assert process.returncode == 0
    assert_masks(output, slide_pixels)
    assert growing >= {1, SLIDES}  # the summary grew as slides finished
    log = [load_run(output / str(n) / "run.json").seconds["total"] for n in range(SLIDES)]
    again = run(place, output, model="busy")  # finds all of them done
    assert again.returncode == 0
    assert log == [load_run(output / str(n) / "run.json").seconds["total"] for n in range(SLIDES)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_worker_processes_give_the_masks(tmp_path, place, slide_pixels, workers):
    with cluster(tmp_path / "dask", workers) as dask:
        result = run(place, tmp_path / "out", "--scheduler", dask.file)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert_masks(tmp_path / "out", slide_pixels)


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_and_is_said(tmp_path, place, slide_pixels):
    output = tmp_path / "out"
    with cluster(tmp_path / "dask", 2) as dask:
        process = start(place, output, "--scheduler", dask.file, model="busy")
        wait_for(lambda: blocks_done(output) >= 2)
        dask.workers[0].send_signal(signal.SIGKILL)
        stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 0, stderr
    assert_masks(output, slide_pixels)
    for told in (stderr, (output / "wsi_pipeline.log").read_text()):
        assert "is lost" in told
        assert "done again" in told
        assert "Traceback" not in told


@pytest.mark.slow
def test_a_killed_scheduler_is_one_sentence_and_the_rest_is_finished(tmp_path, place, slide_pixels):
    output = tmp_path / "out"
    with cluster(tmp_path / "dask", 2) as dask:
        process = start(place, output, "--scheduler", dask.file, model="busy")
        wait_for(lambda: blocks_done(output) >= 2)
        dask.scheduler.send_signal(signal.SIGKILL)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    (line,) = stderr.splitlines()
    assert line.startswith("Error: the dask scheduler at tcp://127.0.0.1:")
    assert "the same command goes on" in line
    before = blocks_done(output)
    with cluster(tmp_path / "again", 2) as dask:
        result = run(place, output, "--scheduler", dask.file, model="busy")
    assert result.returncode == 0, result.stderr
    assert before >= 2
    assert_masks(output, slide_pixels)


@pytest.fixture
def other_version(tmp_path):
    """Return a folder of packages in which this one has another version."""
    other = tmp_path / "packages" / "wsi_pipeline-0.0.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: wsi-pipeline\nVersion: 0.0.9\n")
    return str(other.parent)


def test_workers_of_another_version_are_refused(tmp_path, place, other_version):
    with cluster(tmp_path / "dask", 0) as dask:
        dask.add_worker(PYTHONPATH=other_version)
        result = run(place, tmp_path / "out", "--scheduler", dask.file)
    assert result.returncode == 1
    *_, line = result.stderr.splitlines()
    assert "has wsi-pipeline 0.0.9 (here " in line
    assert "same versions" in line
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_worker_of_another_version_that_comes_later_gets_no_say(
    tmp_path, place, slide_pixels, other_version
):
    output = tmp_path / "out"
    with cluster(tmp_path / "dask", 1) as dask:
        process = start(place, output, "--scheduler", dask.file, model="busy")
        wait_for(lambda: blocks_done(output) >= 1)
        dask.add_worker(PYTHONPATH=other_version)
        stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 0, stderr
    assert "has wsi-pipeline 0.0.9" in stderr
    assert "it is sent away" in stderr
    assert_masks(output, slide_pixels)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_a_folder_that_workers_do_not_share_is_named(tmp_path, place):
    """The worker has a folder of the same name, on a disk of its own."""
    output = tmp_path / "out"
    output.mkdir()
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", output])
    if probe.returncode:
        pytest.skip("this process may not mount")
    with cluster(tmp_path / "dask", 0) as dask:
        script = 'mount -t tmpfs none "$0" && exec "$@"'
        dask.workers.append(
            subprocess.Popen(
                [
                    *("unshare", "-m", "sh", "-c", script, output, sys.executable, "-m"),
                    *("distributed.cli.dask_worker", "--scheduler-file", dask.file, "--no-nanny"),
                    *("--host", "127.0.0.1", "--no-dashboard", "--local-directory", tmp_path),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        result = run(place, output, "--scheduler", dask.file)
    assert result.returncode == 1
    *_, line = result.stderr.splitlines()
    assert f"does not see {output}; " in line
