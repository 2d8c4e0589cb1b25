"""What `status` says of an output folder equals what was put there."""

import json
import os
import zlib

import numpy as np
import pytest
from click.testing import CliRunner

from wsi_pipeline.cli import group
from wsi_pipeline.errors import StoreError
from wsi_pipeline.geometry import Block
from wsi_pipeline.options import SelectOptions
from wsi_pipeline.patch_grid import write_patch_grid
from wsi_pipeline.report.record import Run, write_run_json
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.status import note_jobs, read_status
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources import open_source
from wsi_pipeline.tissue.select import plan_grid


def jobs(output, *names):
    return [Job(path=output.parent / f"{name}.svs", folder=output / name) for name in names]


def end(output, name, *, status="done", reason="", at=1000.0, seconds=100.0, patches=None):
    path = output / name / "run.json"
    path.parent.mkdir()
    run = Run(
        kind="slide",
        status=status,
        reason=reason,
        slide={"name": f"{name}.svs"},
        model={},
        settings={},
        versions={},
        seconds={"total": seconds} if status == "done" else {},
        patches={} if patches is None else {"kept": patches},
    )
    write_run_json(path, run)
    os.utime(path, (at, at))


@pytest.fixture
def output(tmp_path):
    """Return a folder of eight slides: three done, one failed, one in hand, three to be done."""
    output = tmp_path / "out"
    note_jobs(output, jobs(output, "a", "b", "c", "d"))
    note_jobs(output, jobs(output, "e", "f", "g", "h"))  # of another command
    # side by side for 150 s, and for 100 s after a pause that does not count
    end(output, "a", at=1100, seconds=100)
    end(output, "b", at=1150, seconds=100)
    end(output, "c", at=9000, seconds=100)
    end(output, "d", status="failed", reason="no mpp")
    for name, blocks in (("e", 3), ("f", 1)):
        folder = RunStore(folder=output / name).path / "blocks"
        folder.mkdir(parents=True)
        for number in range(blocks):
            (folder / f"0-{number}.npz").touch()
    RunStore(folder=output / "f").claim().close()  # of a process that has ended
    return output


def test_every_slide_is_counted_once(output):
    with RunStore(folder=output / "e").claim():
        status = read_status(output)
    assert status.done == ["a", "b", "c"]
    assert status.failed == {"d": "no mpp"}
    assert status.running == {"e": 3}
    assert status.waiting == ["f", "g", "h"]
    assert status.slides_per_hour == pytest.approx(3 / 250 * 3600)
    assert status.seconds_left == pytest.approx(4 * 250 / 3)


def begin(output, slide_path, name, *, size, predicted):
    """Write what a process leaves of a slide that it works on: the grid, and patches by block."""
    store = RunStore(folder=output / name)
    select = SelectOptions(tissue="none")
    with open_source(slide_path) as slide:
        stored = plan_grid(slide, mpp=0.25, patch_size=(size, size), overlap=(0, 0), select=select)
    store.grid_path.parent.mkdir(parents=True)
    write_patch_grid(store.grid_path, stored, with_pixels=False)
    (store.path / "blocks").mkdir()
    for i, count in enumerate(predicted):
        store.finish_block(Block(index=(0, i), start=(0, 0), stop=(1, 1)), {"predicted": count})


def test_slides_weigh_by_their_patches(tmp_path, slide_path):
    output = tmp_path / "out"
    note_jobs(output, jobs(output, "small", "large", "none", "begun", "stopped", "unknown"))
    end(output, "small", at=1010, seconds=10, patches=10)
    end(output, "large", at=2000, seconds=190, patches=190)
    end(output, "none", status="failed")
    for name, size, predicted in (("begun", 128, (3, 7)), ("stopped", 256, (5,))):
        begin(output, slide_path, name, size=size, predicted=predicted)
    begun, stopped = 16 * 12, 8 * 6  # patches of 1931 × 1487 px, side by side
    with RunStore(folder=output / "begun").claim():
        status = read_status(output)
    mean = (10 + 190 + begun + stopped) / 4
    assert status.patches == round(10 + 190 + begun + stopped + 2 * mean)
    assert status.patches_done == round(10 + 190 + mean + 10 + 5)
    assert status.slides_per_hour == 2 / 200 * 3600
    # a patch a second
    assert status.seconds_left == pytest.approx(begun - 10 + stopped - 5 + mean)
    assert status.running == {"begun": 2}
    told = CliRunner().invoke(group, ["status", str(output)])
    assert "patches  325 of about 660 (49%)" in told.stdout.splitlines()


def test_nobody_at_work_no_time_left(output):
    status = read_status(output)
    assert status.running == {}
    assert status.waiting == ["e", "f", "g", "h"]
    assert status.seconds_left is None


def test_a_slide_that_is_done_again_is_running(output):
    with RunStore(folder=output / "a").claim():
        assert read_status(output).running == {"a": 0}


def test_a_damaged_block_does_not_end_it(output):
    path = RunStore(folder=output / "f").path / "blocks" / "0-0.npz"
    np.savez_compressed(path, predicted=np.arange(1000))
    data = bytearray(path.read_bytes())
    start = data.index(b"predicted.npy") + len("predicted.npy")
    data[start + 40 : -200] = b"\xff" * len(data[start + 40 : -200])
    path.write_bytes(data)
    with pytest.raises(zlib.error), np.load(path) as arrays:
        arrays["predicted"]
    assert "f" in read_status(output).waiting


def test_the_command_says_it_for_people_and_for_programs(output):
    with RunStore(folder=output / "e").claim():
        told = CliRunner().invoke(group, ["status", str(output)])
        plain = CliRunner().invoke(group, ["status", str(output), "--json"])
    assert told.exit_code == plain.exit_code == 0
    assert told.stdout.splitlines() == [
        "done     3",
        "running  1  e (3 blocks)",
        "failed   1",
        "waiting  3",
        "rate     43.2 slides/h",
        "left     about 6 min",
        "failed: d: no mpp",
    ]
    found = json.loads(plain.stdout)
    assert found["waiting"] == ["f", "g", "h"]
    assert found["running"] == {"e": 3}


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(StoreError, match="holds no runs"):
        read_status(tmp_path)
