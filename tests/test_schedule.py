"""Blocks on a real dask cluster: all done once, few in flight, errors come home."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from distributed import Client, LocalCluster

from wsi_pipeline.errors import BundleError, SourceError, WsiPipelineError
from wsi_pipeline.grid import iter_blocks
from wsi_pipeline.options import ScheduleOptions
from wsi_pipeline.schedule import open_cluster, run_blocks

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


def test_no_blocks_no_work():
    with open_cluster(ScheduleOptions()) as client:
        assert list(run_blocks(client, [], Recorder)) == []


def test_a_scheduler_that_does_not_answer_is_named():
    with (
        pytest.raises(WsiPipelineError, match=r"127\.0\.0\.1:9.*running"),
        open_cluster(ScheduleOptions(scheduler="tcp://127.0.0.1:9")),
    ):
        pass


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
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
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
