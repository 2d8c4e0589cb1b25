"""Runs at a URL equal those on disk, byte for byte, whatever happens on the way.

S3 is served on loopback; what lies there is read with boto3, not with what wrote it.
"""

import csv
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import zarr
from bundles import Busy, classify, pointwise_bundle
from click.testing import CliRunner
from runs import failed

from wsi_pipeline.cli import group
from wsi_pipeline.errors import StoreError
from wsi_pipeline.files.paths import as_path
from wsi_pipeline.files.remote import (
    check_listed,
    fetch,
    reaching,
    upload,
    work_folder,
    write_whole,
)
from wsi_pipeline.report.record import write_run_json
from wsi_pipeline.run.jobs import plan_jobs
from wsi_pipeline.run.status import note_jobs, read_status
from wsi_pipeline.run.store import RunStore

SLIDE = "a [1] é"
"""Of the slide: what a client may take for a pattern, and what is no ASCII."""
SMALL = ("--outputs", "overlay", "--mask-mpp", 1)
CLIENTS = {}
"""Of S3 without credentials; kept, since they are not closed."""
METADATA = (".zattrs", ".zgroup", ".zarray", ".zmetadata")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test a machine of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def place(tmp_path_factory, slide_path):
    """Return a folder with a slide, a bundle and an ordinary run."""
    folder = tmp_path_factory.mktemp("remote")
    shutil.copy(slide_path, folder / f"{SLIDE}.tif")
    pointwise_bundle(folder / "model", mpp=0.5)
    assert segment(folder, folder / "local").exit_code == 0
    return folder


@pytest.fixture
def url(bucket, request):
    """Return the URL of a folder that no other test has."""
    return f"s3://slides/{request.node.name}"


def arguments(place, output, *options, slide=f"{SLIDE}.tif", model="model"):
    return [
        "-q", "segment", str(place / slide), "--model", str(place / model),
        "--output", str(output), "--precision", "fp32", "--device", "cpu",
        "--tissue", "none", "--block-size", "1024", *map(str, options),
    ]  # fmt: skip


def invoke(*line):
    return CliRunner().invoke(group, list(map(str, line)))


def segment(*args, **options):
    return invoke(*arguments(*args, **options))


def objects(url):
    """Return the bytes behind a URL by their path below it."""
    import boto3

    client = boto3.client("s3")
    name, _, prefix = url.removeprefix("s3://").partition("/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=prefix + "/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    found = {
        key.removeprefix(prefix + "/"): client.get_object(Bucket=name, Key=key)["Body"].read()
        for key in keys
    }
    client.close()
    return found


def files(folder):
    """Return the bytes of a run's outputs by their path in the folder; not its own notes."""
    paths = [p for p in folder.rglob("*") if p.is_file() and ".store" not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths if p.name != ".lock"}


def same_files(found, expected):
    """Compare runs by their bytes; times and dates may differ."""
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith("run.json"):
            one, other = (json.loads(side[name]) for side in (found, expected))
            assert one.pop("seconds").keys() == other.pop("seconds").keys()
            assert one == other
        elif name not in ("summary.csv", "report.html"):
            assert found[name] == expected[name], name
    if "summary.csv" in found:
        tables = [
            list(csv.DictReader(io.StringIO(side["summary.csv"].decode())))
            for side in (found, expected)
        ]
        assert [r | {"seconds": ""} for r in tables[0]] == [r | {"seconds": ""} for r in tables[1]]


def slides_in_hand(cache):
    return [p.name for p in cache.glob("wsi_pipeline/runs/*/*") if p.is_dir() and p.name[0] != "."]


def no_blocks(*args, **options):
    raise AssertionError("blocks are done again")


def test_a_run_at_a_url_equals_one_on_disk(place, url, cache, monkeypatch, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "werkzeug"):
        result = segment(place, url)
    assert result.exit_code == 0, result.output
    found = objects(url)
    same_files(found, files(place / "local"))
    assert slides_in_hand(cache) == []
    mask = zarr.open_group(f"{url}/{SLIDE}/mask.ome.zarr", mode="r")["0"]
    expected = zarr.open_group(place / "local" / SLIDE / "mask.ome.zarr", mode="r")["0"]
    np.testing.assert_array_equal(mask[:], expected[:])
    report = found["report.html"].decode()
    links = set(re.findall(r'href="([^"#]+)"', report))
    assert links == set(
        re.findall(r'href="([^"#]+)"', (place / "local" / "report.html").read_text("utf-8"))
    )
    assert "data:image/jpeg" in report

    # nothing is there before that without which it would be taken for what it is not
    put = [unquote(m[1]) for t in caplog.messages if (m := re.search('"PUT (.*) HTTP', t))]
    put = [path for path in put if f"/{SLIDE}/" in path and "/.claims/" not in path]
    chunks = [n for n, p in enumerate(put) if "/mask.ome.zarr/" in p and not p.endswith(METADATA)]
    metadata = [n for n, p in enumerate(put) if p.endswith(METADATA)]
    files_ = [n for n, p in enumerate(put) if ".zarr/" not in p]
    assert max(chunks) < min(metadata) < max(metadata) < min(files_)
    assert put[-1].endswith("/run.json")

    # another machine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr("wsi_pipeline.run.slide_run.plan_grid", no_blocks)
    result = segment(place, url)
    assert result.exit_code == 0, result.output
    again = objects(url)
    assert {n: b for n, b in again.items() if n != "report.html"} == {
        n: b for n, b in found.items() if n != "report.html"
    }
    status = json.loads(invoke("status", url, "--json").stdout)
    assert status["done"] == [SLIDE]
    assert status["slides_per_hour"] > 0
    assert not status["waiting"] + list(status["failed"])


def test_another_run_leaves_nothing_of_the_one_before(place, url, tmp_path):
    other = ["--outputs", "zarr", "--mask-mpp", 1]
    for output, options in ((url, ["--tiff", "asap"]), (url, other), (tmp_path / "local", other)):
        result = segment(place, output, *options)
        assert result.exit_code == 0, result.output
    same_files(objects(url), files(tmp_path / "local"))


def test_an_upload_that_fails_is_made_up_for(place, url, cache, monkeypatch):
    import s3fs

    put = s3fs.S3FileSystem._put_file

    async def fail(self, lpath, rpath, **options):
        if rpath.endswith(".tif"):
            raise PermissionError("Access Denied")
        await put(self, lpath, rpath, **options)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_put_file", fail)
        result = segment(place, url)
    assert result.exit_code == 1
    assert "Access Denied" in result.stderr
    assert "the same command uploads them" in result.stderr
    assert slides_in_hand(cache) == [SLIDE]
    half = objects(url)
    assert json.loads(half[f"{SLIDE}/run.json"])["status"] == "failed"
    assert f"{SLIDE}/mask.ome.zarr/.zattrs" in half
    assert b"Access Denied" in half["summary.csv"]
    assert json.loads(invoke("status", url, "--json").stdout)["failed"].keys() == {SLIDE}

    monkeypatch.setattr("wsi_pipeline.run.batch.run_blocks", no_blocks)
    result = segment(place, url)
    assert result.exit_code == 0, result.output
    same_files(objects(url), files(place / "local"))
    assert slides_in_hand(cache) == []


def put_object(url, content):
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key=key, Body=content)
    client.close()


def test_what_people_changed_at_the_url_stays_there(place, url):
    polygons = ("--outputs", "zarr,geojson,overlay", "--mask-mpp", 1)
    assert segment(place, url, *polygons).exit_code == 0
    theirs = {f"{SLIDE}/annotations.geojson": b"corrected", f"{SLIDE}/overlay.png": b"painted"}
    for name, content in theirs.items():
        put_object(f"{url}/{name}", content)
    result = segment(place, url, *polygons, "--simplify", 2)
    assert result.exit_code == 0, result.output
    for name in ("annotations", "overlay"):
        assert f"{name}.new." in result.stderr
    first = objects(url)
    assert theirs.items() <= first.items()
    told = json.loads(first[f"{SLIDE}/run.json"])["files"]
    assert told == {
        name: hashlib.sha256(first[f"{SLIDE}/{name}"]).hexdigest()
        for name in ("annotations.new.geojson", "overlay.new.png", "regions.csv")
    }
    assert segment(place, url, *polygons, "--simplify", 3, "--overwrite").exit_code == 0
    second = objects(url)
    assert theirs.items() <= second.items()
    assert first.keys() == second.keys()
    name = f"{SLIDE}/annotations.new.geojson"
    assert first[name] != second[name]


@pytest.mark.slow
def test_a_kill_loses_nothing(place, url, cache, tmp_path, make_slide, slide_pixels, monkeypatch):
    pixels = np.tile(slide_pixels, (2, 2, 1))
    slide = make_slide(tmp_path / "slide.tif", pixels, 0.25, levels=(1, 8))
    bundle = pointwise_bundle(tmp_path / "busy", mpp=0.25, patch_size=256, program=Busy)
    line = arguments(place, url, "--outputs", "zarr", slide=slide, model=bundle)
    process = subprocess.Popen(
        [sys.executable, "-m", "wsi_pipeline", *line], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list(cache.rglob("[0-9]*.npz"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p.name: p.stat().st_mtime_ns for p in cache.rglob("[0-9]*.npz")}
    assert 2 <= len(done) < 12
    assert objects(url).keys() == {".slides.json", ".claims/slide/000001"}
    assert json.loads(invoke("status", url, "--json").stdout)["waiting"] == ["slide"]

    kept = {}

    def look(store, *_):
        kept.update({p.name: p.stat().st_mtime_ns for p in store.blocks()})

    monkeypatch.setattr("wsi_pipeline.run.segment.drop_what_is_old", look)
    assert invoke(*line).exit_code == 0
    assert done.items() <= kept.items()
    mask = zarr.open_group(f"{url}/slide/mask.ome.zarr", mode="r")["0"]
    assert (mask[:] == classify(pixels)).all()
    assert not [name for name in objects(url) if ".claims" in name]


def test_a_kill_after_the_upload_leaves_nothing_here(place, url, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("wsi_pipeline.run.segment.shutil.rmtree", lambda *args, **options: None)
        assert segment(place, url, *SMALL).exit_code == 0
    assert slides_in_hand(cache) == [SLIDE]
    assert segment(place, url, *SMALL).exit_code == 0
    assert slides_in_hand(cache) == []


def test_two_machines_write_one_summary(place, url, monkeypatch, tmp_path):
    for number in "12":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / number))
        shutil.copy(place / f"{SLIDE}.tif", tmp_path / f"{number}.tif")
        result = segment(place, url, *SMALL, slide=tmp_path / f"{number}.tif")
        assert result.exit_code == 0, result.output
    found = objects(url)
    assert [line[:1] for line in found["summary.csv"].splitlines()[1:]] == [b"1", b"2"]
    assert found["report.html"].count(b"data:image/jpeg") == 2
    assert json.loads(found[".slides.json"]) == {"1": "1.tif", "2": "2.tif"}


@pytest.mark.parametrize("trouble", ["bucket", "credentials"])
def test_what_cannot_be_written_is_said_before_any_work(place, url, cache, monkeypatch, trouble):
    import s3fs

    if trouble == "bucket":
        url, reason = "s3://no-such-bucket/runs", "bucket does not exist"
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        reason = "credentials"
        monkeypatch.setattr(s3fs.S3FileSystem, "_cache", CLIENTS)
    result = segment(place, url)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert reason in result.stderr
    assert slides_in_hand(cache) == []


def test_only_segment_and_status_take_a_url(place, tmp_path):
    slide = place / f"{SLIDE}.tif"
    result = invoke("tile", slide, "--mpp", 1, "--output", "s3://me:hidden@slides/grids")
    assert result.exit_code == 2
    assert "expected a folder here" in result.stderr
    assert "hidden" not in result.stderr
    result = segment(place, tmp_path / "out", "--work", tmp_path / "work")
    assert result.exit_code == 2
    assert "--work is for a URL" in result.stderr
    result = segment(place, "nowhere://me:hidden@host/runs")
    assert result.exit_code == 1
    assert "wsi-pipeline[remote]" in result.stderr
    assert "hidden" not in result.stderr


def test_a_dry_run_writes_nothing(place, url, cache):
    result = segment(place, url, "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"{url}/{SLIDE}" in result.stdout
    assert objects(url) == {}
    assert not cache.exists()


def test_the_work_folder_knows_the_place_and_no_secret(tmp_path):
    one, same, other = (
        work_folder(as_path(f"http://{secret}host/{path}"))
        for secret, path in (("me:hidden@", "runs?sig=hidden"), ("", "runs"), ("", "others/runs"))
    )
    assert one == same
    assert len({same, other}) == 2
    assert other.name.startswith("runs-")
    assert "hidden" not in str(one)


def test_what_a_client_raises_becomes_a_sentence_without_secrets():
    path = as_path("http://me:hidden@host/runs?sig=hidden")
    with (
        pytest.raises(StoreError, match="http://host/runs cannot be used: no way") as error,
        reaching(path),
    ):
        raise RuntimeError(f"no way\nto {path}")
    assert "hidden" not in str(error.value)
    with pytest.raises(ZeroDivisionError), reaching(Path("here")):
        raise ZeroDivisionError


def test_a_url_of_this_machine_is_a_folder(tmp_path):
    assert as_path(f"file://{tmp_path}/runs") == tmp_path / "runs"


def test_status_counts_what_is_there_and_what_is_in_hand_here(tmp_path):
    target = as_path(f"memory://{tmp_path.name}/runs", use_listings_cache=False)
    slides = [tmp_path / f"{name}.tif" for name in "abc"]
    jobs = plan_jobs(slides, tmp_path / "work", target=target)
    note_jobs(tmp_path / "work", jobs[:2], target=target)
    note_jobs(tmp_path / "elsewhere", jobs[2:], target=target)
    run = failed("a", "oh")
    write_run_json(jobs[0].home / "run.json", run)
    with RunStore(folder=jobs[1].folder).claim():
        status = read_status(target, tmp_path / "work")
    assert (status.failed, status.running, status.waiting) == ({"a": "oh"}, {"b": 0}, ["c"])
    with pytest.raises(StoreError, match="holds no runs"):
        read_status(target / "none", tmp_path / "none")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path):
    path = as_path(f"memory://{tmp_path.name}/note", use_listings_cache=False)
    with pytest.raises(StoreError, match="cannot be used"):
        check_listed(path)
    write_whole(path.parent / "other", b"")
    with pytest.raises(StoreError, match="note was written and is not listed"):
        check_listed(path)
    write_whole(path, b"")
    check_listed(path)


def test_copies_follow_what_is_there(tmp_path):
    target = as_path(f"memory://{tmp_path.name}/runs", use_listings_cache=False)
    for name, text in (("a", "1"), ("b", "2")):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("run.json", "picture", "large", ".hidden"):
            (folder / file).write_text(text)
        upload(folder, target / name, last="run.json", replaced=["large"])
    copies = tmp_path / "copies"

    def look():
        return fetch(target, copies, first="run.json", whole=["picture"], named=["large", "more"])

    assert look()
    assert not look()
    expected = {"run.json": "1", "picture": "1", "large": ""}
    assert {p.name: p.read_text() for p in (copies / "a").iterdir()} == expected
    modified = target.fs.modified(f"{target.path}/a/run.json").timestamp()
    assert (copies / "a" / "run.json").stat().st_mtime == pytest.approx(modified)

    (tmp_path / "a" / "run.json").write_text("3")
    (tmp_path / "a" / "large").unlink()
    upload(tmp_path / "a", target / "a", last="run.json", replaced=["large"])
    target.fs.rm(f"{target.path}/b/run.json")
    assert look()
    assert {p.name: p.read_text() for p in copies.rglob("*") if p.is_file()} == {
        "run.json": "3", "picture": "1",
    }  # fmt: skip
    assert not look()
