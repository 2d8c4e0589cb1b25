"""Blocks on a real dask cluster: all done once, few in flight, errors come home."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pytest
from bundles import pointwise_bundle
from distributed import Client, LocalCluster, Scheduler, SpecCluster, Worker, get_worker

from wsi_pipeline.errors import (
    BundleError,
    ClusterError,
    DeviceError,
    SourceError,
    WsiPipelineError,
)
from wsi_pipeline.geometry import iter_blocks
from wsi_pipeline.options import ScheduleOptions
from wsi_pipeline.schedule.blocks import run_blocks
from wsi_pipeline.schedule.cluster import check_shared, gpu_share, open_cluster
from wsi_pipeline.schedule.memory import cpu_count, memory_limit_of_job
from wsi_pipeline.schedule.pace import Pace
from wsi_pipeline.schedule.worker_state import WorkerState

BLOCKS = list(iter_blocks((50, 40), (10, 10)))


class Recorder:
    """Work that writes down what it saw."""

    opened = 0
    closed = 0
    at_once = 0
    most_at_once = 0
    lock = threading.Lock()

    def __init__(self, keep):
        with Recorder.lock:
            Recorder.opened += 1

    def __call__(self, block):
        with Recorder.lock:
            Recorder.at_once += 1
            Recorder.most_at_once = max(Recorder.at_once, Recorder.most_at_once)
        time.sleep(0.01)
        with Recorder.lock:
            Recorder.at_once -= 1
        return block.index

    def close(self):
        with Recorder.lock:
            Recorder.closed += 1


class Failing(Recorder):
    def __call__(self, block):
        raise SourceError(f"block {block.name} cannot be read")


@pytest.mark.parametrize("workers", [1, 3])
def test_every_block_is_done_once_on_tools_opened_once_a_worker(workers):
    Recorder.opened = Recorder.closed = Recorder.most_at_once = 0
    with open_cluster(ScheduleOptions(workers=workers)) as client:
        done = list(run_blocks(client, iter(BLOCKS), Recorder))
    assert sorted(done) == [b.index for b in BLOCKS]
    assert Recorder.opened == Recorder.closed == workers
    assert 2 <= Recorder.most_at_once <= 2 * workers


def test_a_few_blocks_are_taken_at_a_time():
    taken = []

    def watched():
        for block in iter_blocks((1000, 1), (1, 1)):
            taken.append(block)
            yield block

    with open_cluster(ScheduleOptions()) as client:
        results = run_blocks(client, watched(), Recorder)
        next(results)
        assert len(taken) < 20
        results.close()


def test_above_the_memory_limit_no_block_is_begun_and_the_last_one_is_no_error():
    with open_cluster(ScheduleOptions(blocks_in_hand=1)) as client:
        assert list(run_blocks(client, BLOCKS[:1], Recorder, max_ram=1)) == [(0, 0)]
        done = run_blocks(client, BLOCKS[:2], Recorder, max_ram=1)
        assert next(done) == (0, 0)
        with pytest.raises(WsiPipelineError, match=r"allows 0\.00 GB, and no block is in hand"):
            next(done)


def test_an_error_comes_home_and_the_cluster_lives_on():
    with open_cluster(ScheduleOptions()) as client:
        with pytest.raises(SourceError, match="cannot be read"):
            list(run_blocks(client, BLOCKS, Failing))
        assert len(list(run_blocks(client, BLOCKS, Recorder))) == len(BLOCKS)


class Unopenable(Recorder):
    def __init__(self, keep):
        raise BundleError("no weights")


def test_tools_that_do_not_open_are_an_error_without_a_traceback(caplog):
    with open_cluster(ScheduleOptions()) as client, pytest.raises(BundleError, match="no weights"):
        list(run_blocks(client, BLOCKS, Unopenable))
    assert caplog.records == []


def test_a_block_that_comes_with_the_end_opens_nothing():
    state, before = WorkerState(), Recorder.opened
    work = state.work("one", Recorder)
    state.close("one")
    with pytest.raises(RuntimeError, match="end of its work"):
        work(BLOCKS[0])
    assert Recorder.opened == before


def test_no_blocks_no_work():
    with open_cluster(ScheduleOptions()) as client:
        assert list(run_blocks(client, [], Recorder)) == []


def test_a_scheduler_that_does_not_answer_is_named():
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),  # dask's own settings hold
        pytest.raises(WsiPipelineError, match=r"127\.0\.0\.1:9.*running"),
        open_cluster(ScheduleOptions(scheduler="tcp://127.0.0.1:9")),
    ):
        pass


class Named(Recorder):
    """Work that tells which worker did it."""

    def __call__(self, block):
        return get_worker().name


class FailingOnOne(Named):
    """Work that one worker cannot do."""

    def __call__(self, block):
        if get_worker().name == "plain":
            raise SourceError("the disk is not mounted")
        return super().__call__(block)


class Lost(Named):
    """Work of which one worker's GPU, or all, is lost on the way."""

    only = "plain"

    def __call__(self, block):
        if self.only is None or get_worker().name == self.only:
            raise DeviceError("cuda:0 failed: an illegal memory access was encountered")
        return super().__call__(block)


class AllLost(Lost):
    only = None


@pytest.fixture
def two_workers():
    """Return the address of a scheduler with two workers, one of which announces GPUs."""
    host = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    options = {"plain": {"nthreads": 1}, "with GPUs": {"nthreads": 4, "resources": {"GPU": 2}}}
    workers = {
        name: {"cls": Worker, "options": host | own | {"name": name}}
        for name, own in options.items()
    }
    with SpecCluster(workers=workers, scheduler={"cls": Scheduler, "options": host}) as cluster:
        yield cluster.scheduler_address


def test_where_workers_announce_gpus_they_get_all_blocks(two_workers):
    with open_cluster(ScheduleOptions(scheduler=two_workers)) as client:
        share = gpu_share(client)
        assert share == {"GPU": 0.5}
        assert set(run_blocks(client, BLOCKS, Named)) == {"plain", "with GPUs"}
        assert set(run_blocks(client, BLOCKS, Named, resources=share)) == {"with GPUs"}


def test_a_block_that_fails_on_one_worker_is_done_by_another(two_workers, caplog):
    with open_cluster(ScheduleOptions(scheduler=two_workers)) as client:
        done = list(run_blocks(client, BLOCKS, FailingOnOne))
    assert done == ["with GPUs"] * len(BLOCKS)
    assert "the disk is not mounted; it is tried again" in caplog.text


def test_a_block_that_fails_everywhere_fails(two_workers):
    with (
        open_cluster(ScheduleOptions(scheduler=two_workers)) as client,
        pytest.raises(SourceError, match="cannot be read"),
    ):
        list(run_blocks(client, BLOCKS, Failing))


def test_blocks_of_several_threads_are_done_by_priority(two_workers):
    """Those of the first slide end before most of the second, which began at the same time."""
    order = []

    def slide(number):
        order.extend(number for _ in run_blocks(client, BLOCKS, Recorder, priority=-number))

    with open_cluster(ScheduleOptions(scheduler=two_workers)) as client:
        threads = [threading.Thread(target=slide, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(order) == [0] * len(BLOCKS) + [1] * len(BLOCKS) + [2] * len(BLOCKS)
    last = [len(order) - order[::-1].index(number) for number in range(3)]
    assert last == sorted(last)


def test_files_that_workers_do_not_see_are_named(two_workers, tmp_path):
    with open_cluster(ScheduleOptions(scheduler=two_workers)) as client:
        check_shared(client, tmp_path, [tmp_path])
        with pytest.raises(ClusterError, match=r"does not see .*nowhere"):
            check_shared(client, tmp_path, [tmp_path / "nowhere"])
    assert list(tmp_path.iterdir()) == []


def test_each_gpu_gets_a_process_that_sees_no_other(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")  # as a queue would have set it
    with open_cluster(ScheduleOptions(gpus=(0, 2))) as client:
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        pids = client.run(os.getpid)
        assert all("//127.0.0.1:" in worker for worker in seen)
    assert sorted(seen.values()) == ["4", "6"]
    assert len({os.getpid(), *pids.values()}) == 3


@pytest.mark.parametrize("from_stdin", [True, False])
def test_a_script_without_a_guard_has_processes_for_gpus(tmp_path, from_stdin):
    script = """
from wsi_pipeline import ScheduleOptions, open_cluster
with open_cluster(ScheduleOptions(gpus=(0, 1))) as client:
    print(len(client.run(int)))
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, "-" if from_stdin else path]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr


class Slow:
    """Work that tells which process did it."""

    def __init__(self, keep):
        pass

    def __call__(self, block):
        time.sleep(0.1)
        return block.index, os.getpid()

    def close(self):
        pass


@pytest.mark.slow
def test_a_killed_workers_blocks_are_done_by_another():
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        address = cluster.scheduler_address
        with open_cluster(ScheduleOptions(scheduler=address)) as ours:
            done = []
            for index, pid in run_blocks(ours, BLOCKS, Slow):
                done.append(index)
                if len(done) == 4:
                    os.kill(pid, signal.SIGKILL)
        assert sorted(done) == [b.index for b in BLOCKS]
        assert client.status == "running"


def test_help_needs_neither_torch_nor_dask():
    script = (
        "import sys; from wsi_pipeline.cli import group\n"
        "try: group(['segment', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'dask', 'distributed', 'zarr', 'openslide', 'shapely', 'skimage'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "--model" in found.stdout


def test_one_process_segments_slides_without_dask_and_readers_of_scans(tmp_path, make_big_slide):
    # Its half is compared with level 0, as of most slides.
    slide_path = make_big_slide(tmp_path / "slide.tif", (2400, 1900), 0.25, levels=(1, 2))
    pointwise_bundle(tmp_path / "model", mpp=0.5, patch_size=256)
    script = (
        "import gc, sys; from wsi_pipeline.cli import group\n"
        "try: group(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert gc.isenabled()\n"
        "needless = {'dask', 'distributed', 'tornado', 'pydicom', 'nibabel', 'scipy.stats',\n"
        "            'scipy.spatial', 'scipy.sparse.csgraph'}\n"
        "sys.exit(', '.join(needless & set(sys.modules)) or 0)"
    )
    options = ["--model", tmp_path / "model", "--output", tmp_path / "out", "--outputs", "zarr"]
    line = [sys.executable, "-c", script, "segment", slide_path, *options]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / slide_path.stem / "mask.ome.zarr").is_dir()


def test_a_jobs_share_of_the_processors_counts(tmp_path):
    own, every = tmp_path / "cgroup", len(os.sched_getaffinity(0))
    job = tmp_path / "slurm" / "job_7"
    (job / "step_0").mkdir(parents=True)
    own.write_text("0::/slurm/job_7/step_0\n")
    (job / "step_0" / "cpu.max").write_text("max 100000\n")
    assert cpu_count(own, tmp_path) == every
    # half a processor is rounded up
    (job / "cpu.max").write_text("50000 100000\n")
    assert cpu_count(own, tmp_path) == 1
    older = tmp_path / "cpu" / "job_7"
    older.mkdir(parents=True)
    own.write_text("7:blkio:/\n4:cpu,cpuacct:/job_7\n")
    (older / "cpu.cfs_period_us").write_text("100000\n")
    (older / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_count(own, tmp_path) == every
    (older / "cpu.cfs_quota_us").write_text("100000\n")
    assert cpu_count(own, tmp_path) == 1
    assert cpu_count(tmp_path / "no Linux", tmp_path) == every


def test_the_least_limit_of_a_jobs_control_groups_counts(tmp_path):
    own = tmp_path / "cgroup"
    job = tmp_path / "slurm" / "job_7"
    step = job / "step_0"
    step.mkdir(parents=True)
    own.write_text("0::/slurm/job_7/step_0\n")
    (step / "memory.max").write_text("max\n")
    assert memory_limit_of_job(own, tmp_path) == sys.maxsize
    (job / "memory.max").write_text("6442450944\n")
    (tmp_path / "memory.max").write_text("9000000000\n")
    assert memory_limit_of_job(own, tmp_path) == 6 << 30
    older = tmp_path / "memory" / "job_7"
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text("4294967296\n")
    own.write_text("7:blkio:/\n4:memory:/job_7\n1:cpu,cpuacct:/\n0::/\n")
    assert memory_limit_of_job(own, tmp_path) == 4 << 30
    assert memory_limit_of_job(tmp_path / "no Linux", tmp_path) == sys.maxsize


@pytest.mark.skipif(
    not os.access("/sys/fs/cgroup/memory", os.W_OK), reason="no control groups of our own to make"
)
def test_a_process_sees_the_limit_of_its_own_control_group():
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    (own,) = [Path("/sys/fs/cgroup/memory") / g.lstrip("/") for _, c, g in groups if c == "memory"]
    job = own / f"wsi-pipeline-{os.getpid()}"
    job.mkdir()
    try:
        (job / "memory.limit_in_bytes").write_text(f"{3 << 30}")
        script = (
            "import os, sys\n"
            "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
            "from wsi_pipeline.schedule.memory import free_memory, used_memory\n"
            "print(free_memory(), used_memory())"
        )
        line = [sys.executable, "-c", script, str(job / "cgroup.procs")]
        said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        free, used = map(int, said.split())
        assert 2.5 * 2**30 < free <= (3 << 30) - used + (16 << 20)
    finally:
        job.rmdir()


def test_a_lost_gpu_ends_its_worker_and_the_last_one_the_work(two_workers, caplog):
    with open_cluster(ScheduleOptions(scheduler=two_workers)) as client:
        assert set(run_blocks(client, BLOCKS, Lost)) == {"with GPUs"}
        assert "cuda:0 failed: an illegal memory access was encountered; it is sent" in caplog.text
        assert len(client.nthreads()) == 1
        with pytest.raises(DeviceError, match="cuda:0 failed"):
            list(run_blocks(client, BLOCKS, AllLost))


def test_a_lost_gpu_of_this_process_ends_the_work():
    with (
        open_cluster(ScheduleOptions(workers=2)) as client,
        pytest.raises(DeviceError, match="cuda:0 failed"),
    ):
        list(run_blocks(client, BLOCKS, AllLost))


def test_works_on_one_source_keep_pace_whatever_each_has_to_do():
    works = [BLOCKS, BLOCKS[7:], BLOCKS[::3], []]
    pace, handed, lock = Pace(works), [], threading.Lock()

    def hand_out(work):
        rng = random.Random(work)
        for block in pace.blocks(work):
            with lock:
                handed.append((work, block.index))
            time.sleep(rng.random() * 0.002)
            if work == 1 and block.index >= (2, 0):
                # it has failed
                break
        pace.end(work)

    threads = [threading.Thread(target=hand_out, args=[work]) for work in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for work, blocks in enumerate(works):
        mine = [index for n, index in handed if n == work]
        wanted = [block.index for block in blocks]
        assert mine == (wanted if work != 1 else [i for i in wanted if i <= (2, 0)])
    # Nobody is handed a block while another has one before it to come.
    left = [[b.index for b in blocks] for blocks in works]
    left[1] = [index for index in left[1] if index <= (2, 0)]
    for work, index in handed:
        assert not any(rest and rest[0] < index for rest in left)
        left[work].remove(index)
