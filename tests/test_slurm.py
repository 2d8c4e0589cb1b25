"""Array jobs and `--cluster slurm` on a real SLURM of one node: six slides, cancelled, finished."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zarr
from bundles import Busy, classify, pointwise_bundle

from wsi_pipeline.report.record import load_run

WORKFLOW = Path(__file__).parents[1] / "workflows" / "slurm"
SLIDES = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Return the environment of a SLURM that is stopped at the end."""
    for program in ("slurmctld", "slurmd", "munged", "sbatch"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("starting SLURM needs root")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(
        [WORKFLOW / "test" / "slurm.sh", "start", folder], stderr=subprocess.PIPE, text=True
    )
    if started.returncode != 0:
        pytest.skip(f"SLURM does not start on this machine: {started.stderr[-500:]}")
    programs = Path(sys.executable).parent
    yield os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    subprocess.run([WORKFLOW / "test" / "slurm.sh", "stop", folder], check=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_slide, slide_pixels):
    """Return a folder with six slides of 2 × 2 blocks and a slow bundle."""
    folder = tmp_path_factory.mktemp("slides")
    (folder / "slides").mkdir()
    for number in range(SLIDES):
        make_slide(folder / "slides" / f"{number}.tif", slide_pixels, 0.25, levels=(1, 8))
    pointwise_bundle(folder / "busy", mpp=0.25, patch_size=256, program=Busy)
    return folder


OPTIONS = [
    "--block-size", "1024", "--tissue", "none", "--device", "cpu", "--precision", "fp32",
    "--outputs", "zarr,geojson",
]  # fmt: skip


def call(slurm, *command):
    done = subprocess.run(list(map(str, command)), env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submit(slurm, place, output):
    job = call(
        slurm, "sbatch", "--parsable", "--array=1-2", "--cpus-per-task=1", "--chdir", output.parent,
        WORKFLOW / "segment.sbatch", place / "slides", place / "busy", output, *OPTIONS,
    )  # fmt: skip
    return job.strip()


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def jobs_left(slurm):
    return call(slurm, "squeue", "--noheader").splitlines()


def blocks_done(output):
    return list(output.glob("*/.store/blocks/[0-9]*.npz"))


def runs_done(output):
    return sorted(path.parent.name for path in output.glob("*/run.json"))


def assert_whole(output, slide_pixels):
    assert runs_done(output) == [str(number) for number in range(SLIDES)]
    for number in range(SLIDES):
        mask = zarr.open_array(output / str(number) / "mask.ome.zarr" / "0", mode="r")[:]
        assert (mask == classify(slide_pixels)).all()
        assert load_run(output / str(number) / "run.json").status == "done"
    assert len((output / "summary.csv").read_text().splitlines()) == SLIDES + 1
    assert not list(output.rglob("*.partial"))


def test_an_array_job_is_cancelled_and_finished_by_the_next(tmp_path, slurm, place, slide_pixels):
    output = tmp_path / "out"
    job = submit(slurm, place, output)
    wait_for(lambda: len(blocks_done(output)) >= 3)
    call(slurm, "scancel", job)
    wait_for(lambda: not jobs_left(slurm))
    before = {path: path.stat().st_mtime_ns for path in blocks_done(output)}
    assert 3 <= len(before) < 4 * SLIDES
    submit(slurm, place, output)
    wait_for(lambda: not jobs_left(slurm))
    assert_whole(output, slide_pixels)
    assert before.items() <= {p: p.stat().st_mtime_ns for p in blocks_done(output)}.items()


def test_workers_as_jobs_are_cancelled_and_all_is_finished(tmp_path, slurm, place, slide_pixels):
    """A worker's job is cancelled, then the command; the same command finishes the rest."""
    output = tmp_path / "out"
    (tmp_path / "dask.yaml").write_text(
        "jobqueue: {slurm: {cores: 1, memory: 2GB, scheduler-options: {host: 127.0.0.1},"
        f" worker-extra-args: ['--host=127.0.0.1'], local-directory: {tmp_path},"
        f" log-directory: {tmp_path}}}}}\n"
    )
    command = [
        sys.executable, "-m", "wsi_pipeline", "-q", "segment", place / "slides", "--model",
        place / "busy", "--output", output, *OPTIONS, "--cluster", "slurm", "--workers", "2",
    ]  # fmt: skip
    environment = slurm | {"DASK_CONFIG": str(tmp_path / "dask.yaml")}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(blocks_done(output)) >= 3)
    call(slurm, "scancel", jobs_left(slurm)[0].split()[0])
    more = len(blocks_done(output)) + 2
    wait_for(lambda: len(blocks_done(output)) >= more or first.poll() is not None)
    first.terminate()
    stderr = first.communicate(timeout=60)[1]
    assert first.returncode in (0, 143), stderr
    call(slurm, "scancel", "--user", "root")
    wait_for(lambda: not jobs_left(slurm))
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert_whole(output, slide_pixels)
    wait_for(lambda: not jobs_left(slurm))
