"""Patch grids read back, ledgers survive, folders of other slides are refused."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr

from wsi_pipeline.errors import BusyError, StoreError
from wsi_pipeline.files.locks import claimed
from wsi_pipeline.geometry import Block, PatchGrid, Region
from wsi_pipeline.patch_grid import (
    GridInfo,
    StoredGrid,
    close_patch_grid,
    is_patch_grid,
    open_patch_grid,
    write_patch_grid,
)
from wsi_pipeline.run.store import RunStore, open_run_store, run_key

BLOCK = Block(index=(3, 4), start=(0, 0), stop=(2, 2))


def stored():
    grid = PatchGrid.cover((700, 900), (256, 256), (64, 64))
    info = GridInfo(
        source_name="a slide.svs",
        fingerprint="f00",
        size=(1801, 1399),
        mpp=(0.25, 0.26),
        bounds=Region(x=1, y=2, width=3, height=4),
        grid_mpp=0.5,
        downsample=(1.5, 2.0),
        shape=(700, 900),
        patch_size=(256, 256),
        stride=(192, 192),
    )
    tissue = np.random.default_rng(0).random((70, 90)) > 0.5
    thumbnail = np.random.default_rng(1).integers(0, 255, (70, 90, 3), np.uint8)
    return StoredGrid(
        info=info,
        patches=grid.origins,
        tissue=tissue,
        thumbnail=thumbnail,
        tissue_downsample=(20.0, 20.0),
        pixels=None,
    )


@pytest.mark.parametrize("with_pixels", [True, False])
def test_a_patch_grid_reads_back(tmp_path, with_pixels):
    wanted = stored()
    write_patch_grid(tmp_path / "g.zarr", wanted, with_pixels=with_pixels)
    found = open_patch_grid(tmp_path / "g.zarr")
    assert found.info == wanted.info
    for name in ("patches", "tissue", "thumbnail"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name))
    assert found.tissue_downsample == wanted.tissue_downsample
    if with_pixels:
        assert found.pixels.shape == (700, 900, 3)
        assert (found.pixels[:] == 255).all()
    else:
        assert found.pixels is None


def test_plain_zarr_reads_what_the_contract_names(tmp_path):
    write_patch_grid(tmp_path / "g.zarr", stored(), with_pixels=True)
    group = zarr.open(tmp_path / "g.zarr", mode="r")
    assert group["patches"].dtype == np.int64
    assert group["patches"].shape[1] == 2
    assert group["tissue"].dtype == bool
    assert group["pixels"].dtype == np.uint8
    attrs = dict(group.attrs)
    assert attrs["fingerprint"] == "f00"
    assert attrs["size"] == [1801, 1399]
    assert attrs["mpp"] == [0.25, 0.26]
    assert attrs["patch_size"] == [256, 256]
    assert attrs["stride"] == [192, 192]
    assert attrs["version"] == 1


def test_what_is_no_patch_grid_is_refused(tmp_path):
    assert not is_patch_grid(tmp_path)
    with pytest.raises(StoreError, match="not a patch grid"):
        open_patch_grid(tmp_path)
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    assert not is_patch_grid(tmp_path / "other.zarr")


@pytest.mark.parametrize("damage", ["version", "missing", "attribute"])
def test_a_damaged_grid_is_refused(tmp_path, damage):
    path = tmp_path / "g.zarr"
    write_patch_grid(path, stored(), with_pixels=False)
    meta = json.loads((path / "zarr.json").read_text())
    if damage == "version":
        meta["attributes"]["version"] = 99
    elif damage == "attribute":
        del meta["attributes"]["mpp"]
    else:
        (path / "patches" / "zarr.json").unlink()
    (path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(StoreError, match=r"99|damaged"):
        open_patch_grid(path)


def test_the_ledger_holds_what_is_finished(tmp_path):
    store = open_run_store(tmp_path / "run", fingerprint="a", key="k", overwrite=False)
    other = Block(index=(0, 0), start=(0, 0), stop=(1, 1))
    assert not store.blocks()
    store.finish_block(BLOCK, {"pixels": np.arange(5), "predicted": np.array(7)})
    assert store.pending([other, BLOCK]) == [other]
    again = open_run_store(tmp_path / "run", fingerprint="a", key="k", overwrite=False)
    assert len(again.blocks()) == 1
    assert again.load_block(BLOCK)["pixels"].tolist() == [0, 1, 2, 3, 4]
    again.forget_blocks()
    assert again.pending([BLOCK]) == [BLOCK]


def test_a_damaged_ledger_entry_is_named(tmp_path):
    store = open_run_store(tmp_path / "run", fingerprint="a", key="k", overwrite=False)
    store.finish_block(BLOCK, {"pixels": np.arange(5)})
    (path,) = (store.path / "blocks").glob("*.npz")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StoreError, match="segment the slide again"):
        store.load_block(BLOCK)


def test_a_ledger_entry_whose_directory_has_lost_arrays_is_named(tmp_path):
    store = open_run_store(tmp_path / "run", fingerprint="a", key="k", overwrite=False)
    store.finish_block(BLOCK, {"first": np.arange(5), "second": np.arange(6)})
    (path,) = (store.path / "blocks").glob("*.npz")
    data = bytearray(path.read_bytes())
    # the length of the first entry's comment, which then takes in the second entry
    data[data.index(b"PK\x01\x02") + 33] ^= 16
    path.write_bytes(data)
    with pytest.raises(StoreError, match="entries are missing"):
        store.load_block(BLOCK)


def test_other_settings_begin_anew_and_leave_old_outputs(tmp_path):
    store = open_run_store(tmp_path / "run", fingerprint="a", key="k", overwrite=False)
    store.finish_block(BLOCK, {"pixels": np.arange(5)})
    (tmp_path / "run" / "annotations.geojson").write_text("{}")
    changed = open_run_store(tmp_path / "run", fingerprint="a", key="other", overwrite=False)
    assert not changed.blocks()
    assert (tmp_path / "run" / "annotations.geojson").is_file()


def test_another_slides_folder_is_refused(tmp_path):
    open_run_store(tmp_path / "run", fingerprint="a", key="k", overwrite=False)
    with pytest.raises(StoreError, match="another slide"):
        open_run_store(tmp_path / "run", fingerprint="b", key="k", overwrite=False)
    open_run_store(tmp_path / "run", fingerprint="b", key="k", overwrite=True)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        open_run_store(tmp_path / "file" / "run", fingerprint="a", key="k", overwrite=False)


def test_only_one_process_writes_a_target_and_nothing_stays_of_its_claim(tmp_path):
    target = tmp_path / "a.zarr"
    (tmp_path / ".a.zarr.host-1.partial").mkdir()
    with claimed(target):
        assert [path.name for path in tmp_path.iterdir()] == [".a.zarr.lock"]
        with (
            pytest.raises(BusyError, match=r"another process is writing .*a\.zarr"),
            claimed(target),
        ):
            pass
        with claimed(tmp_path / "b.zarr"):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("array", ["patches", "tissue", "thumbnail", "pixels"])
def test_a_grid_that_lacks_a_chunk_is_refused(tmp_path, array):
    path = tmp_path / "g.zarr"
    written = write_patch_grid(path, stored(), with_pixels=True)
    written.pixels[:300, :300] = 7
    close_patch_grid(path)
    assert (open_patch_grid(path).pixels[:300, :300] == 7).all()
    meta = json.loads((path / "zarr.json").read_text())
    assert meta["attributes"]["chunks"]["pixels"] == 1
    chunk = next(p for p in (path / array / "c").rglob("*") if p.is_file())
    chunk.unlink()
    with pytest.raises(StoreError, match=rf"is not whole: \d+ of \d+ chunks of {array} are there"):
        open_patch_grid(path)
    del meta["attributes"]["chunks"]  # as older versions wrote them
    (path / "zarr.json").write_text(json.dumps(meta))
    open_patch_grid(path)


def test_the_key_knows_every_part():
    base = {"a": 1, "b": (1, 2)}
    assert run_key(base) == run_key(dict(reversed(base.items())))
    assert run_key(base) != run_key({**base, "b": (1, 3)})


REFUSING = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("FLOCK_SAYS")); return -1; }
"""


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """Return a library that, preloaded, answers `flock` as a file system without locks does."""
    if sys.platform != "linux" or not shutil.which("gcc"):
        pytest.skip("no gcc to build a library that refuses locks")
    source = tmp_path_factory.mktemp("refusing") / "refusing.c"
    source.write_text(REFUSING)
    library = source.with_suffix(".so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, 524])
def test_a_file_system_without_locks_is_worked_on_with_one_warning(tmp_path, refusing, answer):
    script = """
import logging, sys, warnings
from pathlib import Path
from wsi_pipeline.run.store import RunStore
warnings.simplefilter("error")
logging.basicConfig(format="%(message)s")
for name in ("one", "two"):
    store = RunStore(folder=Path(sys.argv[1]) / name)
    with store.claim():
        (store.path / "written").write_text("")
    assert not store.is_claimed()
    with store.claim():
        pass
"""
    line = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "LD_PRELOAD": str(refusing), "FLOCK_SAYS": str(answer)}
    ended = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    (said,) = ended.stderr.splitlines()
    assert said == f"{tmp_path / 'one'} cannot be locked: start no second process on it"
    assert (tmp_path / "two" / ".store" / "written").is_file()


def test_a_lock_that_fails_otherwise_is_a_sentence(tmp_path, refusing):
    script = """
import sys
from pathlib import Path
from wsi_pipeline.errors import StoreError
from wsi_pipeline.run.store import claim_folder
try: claim_folder(Path(sys.argv[1]))
except StoreError as error: sys.exit(str(error))
"""
    line = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "LD_PRELOAD": str(refusing), "FLOCK_SAYS": str(errno.EIO)}
    ended = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert ended.stderr.strip() == f"cannot write to {tmp_path}: Input/output error"


def test_an_entry_that_unpacks_to_much_is_refused(tmp_path):
    store = RunStore(folder=tmp_path)
    block = Block(index=(0, 0), start=(0, 0), stop=(64, 64))
    (store.path / "blocks").mkdir(parents=True)
    np.savez_compressed(store._block_path(block), vertices=np.zeros(350_000_000, np.uint8))
    with pytest.raises(StoreError, match="unpacks to more than a block has"):
        store.load_block(block)
