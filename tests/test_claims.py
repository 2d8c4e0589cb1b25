"""Machines share a folder behind a URL, S3 on loopback: every slide is done once."""

import errno
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from bundles import pointwise_bundle

from wsi_pipeline.errors import BusyError
from wsi_pipeline.files import claims
from wsi_pipeline.files.claims import check_claim, claimed_url
from wsi_pipeline.files.paths import as_path


@pytest.fixture
def target(bucket, request, monkeypatch):
    """Return the folder of a slide behind a URL that no other test has."""
    monkeypatch.setattr(claims, "_has_conditions", {})
    return as_path(f"s3://slides/{request.node.name}", use_listings_cache=False) / "a slide é"


def held(target):
    """Return the names of the claims that lie at a URL, and the tokens in them."""
    folder = target.parent / ".claims" / target.name
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_a_claim_is_of_one_machine_and_goes_with_it(target, tmp_path):
    with claimed_url(target, tmp_path / "a"):
        assert list(held(target)) == ["000001"]
        with pytest.raises(BusyError, match=r"is working on it: left to it$"):
            claimed_url(target, tmp_path / "b").__enter__()
        check_claim(target, tmp_path / "a")
        with pytest.raises(BusyError, match="no sign of life"):
            check_claim(target, tmp_path / "b")
    assert held(target) == {}
    with claimed_url(target, tmp_path / "b"):
        check_claim(target, tmp_path / "b")


def test_who_was_killed_goes_on_at_once_and_others_after_a_silence(target, tmp_path, monkeypatch):
    first = claimed_url(target, tmp_path / "a")
    first.__enter__()
    with claimed_url(target, tmp_path / "a"):
        # as the process that goes on does, in the same folder
        pass
    assert held(target) == {}
    first = claimed_url(target, tmp_path / "a")
    first.__enter__()
    monkeypatch.setattr(claims, "SILENCE", 0.0)
    second = claimed_url(target, tmp_path / "b")
    second.__enter__()
    assert list(held(target)) == ["000001", "000002"]
    check_claim(target, tmp_path / "b")
    with pytest.raises(BusyError, match="another machine has taken"):
        check_claim(target, tmp_path / "a")
    # who wakes up takes away what is his own
    first.__exit__(None, None, None)
    assert list(held(target)) == ["000002"]
    second.__exit__(None, None, None)
    assert held(target) == {}


def test_signs_of_life_are_given(target, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    with claimed_url(target, tmp_path / "a"):
        path = target.parent / ".claims" / target.name / "000001"
        before = path.fs.modified(path.path)
        deadline = time.monotonic() + 20
        while path.fs.modified(path.path) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert path.fs.modified(path.path) > before


@pytest.mark.parametrize("answer", ["ignores", "refuses"])
def test_without_conditional_writes_a_second_machine_is_refused(
    target, tmp_path, monkeypatch, caplog, answer
):
    whole = target.fs.pipe_file

    def pipe(path, data, mode="overwrite"):
        if answer == "refuses" and mode == "create":
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not")
        whole(path, data)

    monkeypatch.setattr(target.fs, "pipe_file", pipe)
    with claimed_url(target, tmp_path / "a"):
        assert "no conditional writes: give each machine its own slides with --shard" in caplog.text
        with pytest.raises(BusyError, match="--shard I/N"):
            claimed_url(target, tmp_path / "b").__enter__()


@pytest.mark.slow
def test_two_machines_do_every_slide_once(bucket, tmp_path, make_slide):
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="versions")
    # every object that is written is kept, so that one written twice is seen
    client.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    rng = np.random.default_rng(3)
    (tmp_path / "slides").mkdir()
    for name in "abcdef":
        pixels = rng.integers(0, 255, (333, 421, 3), np.uint8)
        make_slide(tmp_path / "slides" / f"{name}.tif", pixels, 0.5)
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.5)
    line = [
        sys.executable, "-m", "wsi_pipeline", "segment", str(tmp_path / "slides"),
        "--model", str(bundle), "--output", "s3://versions/runs", "--tissue", "none",
        "--precision", "fp32", "--device", "cpu", "--outputs", "overlay",
    ]  # fmt: skip
    machines = [
        subprocess.Popen(
            line,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / name)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    told = [machine.communicate(timeout=240) for machine in machines]
    # the last slide may be in the other's hands when one ends
    assert {machine.returncode for machine in machines} <= {0, 1}, told
    found = client.list_object_versions(Bucket="versions", Prefix="runs/")["Versions"]
    client.close()
    written = [v["Key"] for v in found if v["Key"].endswith("/run.json")]
    assert sorted(written) == [f"runs/{name}/run.json" for name in "abcdef"], told
    for name in "abcdef":
        record = as_path(f"s3://versions/runs/{name}/run.json").read_text("utf-8")
        assert json.loads(record)["status"] == "done"
