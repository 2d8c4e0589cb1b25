"""What is written whole, swapped and swept; what a killed process left is told by its name."""

import os

import pytest

from wsi_pipeline.files.atomic import make_folders, sweep, sync_tree, this_process, written_beside


def folder_of(path, text):
    path.mkdir()
    (path / "inside").write_text(text)
    return path


def test_written_beside_is_all_or_nothing(tmp_path):
    target = tmp_path / "out.txt"

    def fail():
        with written_beside(target) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with written_beside(target) as partial:
        partial.write_text("whole")
    assert target.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_folder_is_there_as_a_whole_wherever_its_exchange_is_killed(
    tmp_path, monkeypatch, renames
):
    target = folder_of(tmp_path / "grid.zarr", "old")
    process, left = os.fork(), renames
    if process == 0:
        rename = os.rename

        def counted(*args):
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            rename(*args)

        os.rename = counted
        with written_beside(target) as partial:
            folder_of(partial, "new")
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if renames == 3 else 9)
    sweep(target)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.zarr"]
    assert (target / "inside").read_text() == ("old" if renames < 2 else "new")


def test_what_is_left_of_other_targets_stays(tmp_path):
    mine = folder_of(tmp_path / ".a.zarr.host-1.partial", "half")
    others = [
        tmp_path / name
        for name in (
            ".a.zarr.zarr.host-1.partial",
            ".b.zarr.host-1.partial",
            ".a.zarr.host-1.txt",
            "a.zarr.1",
        )
    ]
    for path in others:
        path.write_text("mine")
    sweep(tmp_path / "a.zarr")
    assert not mine.exists()
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_the_mark_of_a_process_has_no_dot(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node1.cluster.example")
    assert this_process() == f"node1-cluster-example-{os.getpid()}"


def test_all_that_is_new_is_synced(tmp_path, monkeypatch):
    """The folder that a new folder is in, too: it would be gone otherwise."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    make_folders(tmp_path / "a" / "b")
    assert set(synced) == {str(tmp_path), str(tmp_path / "a")}
    (tmp_path / "a" / "b" / "file").write_text("x")
    synced.clear()
    sync_tree(tmp_path / "a")
    names = ("a/b/file", "a", "a/b")
    assert synced[0] == str(tmp_path / names[0])
    assert set(synced) == {str(tmp_path / name) for name in names}


def test_a_file_system_that_does_not_sync_folders_is_no_reason_to_fail(tmp_path, monkeypatch):
    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    with written_beside(tmp_path / "file") as partial:
        partial.write_text("x")
    assert (tmp_path / "file").read_text() == "x"
