"""What `status` says of an output folder equals what was put there."""

import json
import os

import pytest
from click.testing import CliRunner

from wsi_pipeline.cli import group
from wsi_pipeline.errors import StoreError
from wsi_pipeline.inputs import Job
from wsi_pipeline.report import Run, write_run_json
from wsi_pipeline.status import note_jobs, read_status
from wsi_pipeline.store import RunStore


def jobs(output, *names):
    return [Job(path=output.parent / f"{name}.svs", folder=output / name) for name in names]


def end(output, name, *, status="done", reason="", at=1000.0, seconds=100.0):
    path = output / name / "run.json"
    path.parent.mkdir()
    run = Run(
        status=status,
        reason=reason,
        slide={"name": f"{name}.svs"},
        model={},
        settings={},
        versions={},
        seconds={"total": seconds} if status == "done" else {},
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


def test_nobody_at_work_no_time_left(output):
    status = read_status(output)
    assert status.running == {}
    assert status.waiting == ["e", "f", "g", "h"]
    assert status.seconds_left is None


def test_a_slide_that_is_done_again_is_running(output):
    with RunStore(folder=output / "a").claim():
        assert read_status(output).running == {"a": 0}


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
