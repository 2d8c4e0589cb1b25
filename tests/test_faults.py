"""Full disks, kills, stops and second processes: nothing lost, nothing mixed, each with a sentence.

The oracle is the slide's pixels and an undisturbed run of the same command.
"""

import random
import re
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
from click.testing import CliRunner

from wsi_pipeline.cli import group
from wsi_pipeline.files.atomic import this_process
from wsi_pipeline.report.record import load_run
from wsi_pipeline.run.store import RunStore

NOT_COMPARED = {"run.json", ".store"}


@pytest.fixture(scope="module")
def big_pixels(slide_pixels):
    return np.tile(slide_pixels, (2, 2, 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_slide, big_pixels):
    """Return a folder with a slide of 3 × 4 blocks and a quick and a slow bundle."""
    folder = tmp_path_factory.mktemp("faults")
    make_slide(folder / "slide.tif", big_pixels, 0.25, levels=(1, 8))
    for name, program in (("quick", Pointwise), ("busy", Busy)):
        pointwise_bundle(folder / name, mpp=0.25, patch_size=256, program=program)
    return folder


def command(place, output, *options, model="quick"):
    arguments = [
        "segment", place / "slide.tif", "--model", place / model, "--output", output,
        "--block-size", 1024, "--tissue", "none", "--device", "cpu", "--min-area", 0,
        "--precision", "fp32", *options,
    ]  # fmt: skip
    return [sys.executable, "-m", "wsi_pipeline", "-q", *map(str, arguments)]


def run(*args, **options):
    """Run a command in this process, which is quicker; return what `subprocess.run` would."""
    return invoke(command(*args, **options))


def invoke(line):
    result = CliRunner().invoke(group, line[3:])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(line, result.exit_code, result.stdout, result.stderr)


def run_apart(*args, **options):
    return subprocess.run(command(*args, **options), capture_output=True, text=True)


def start(*args, **options):
    return subprocess.Popen(command(*args, **options), stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def calm(place):
    """Return the folder of an undisturbed run."""
    result = run(place, place / "calm")
    assert result.returncode == 0, result.stderr
    return place / "calm" / "slide"


def assert_same(folder, calm, big_pixels):
    """Assert that a run wrote what an undisturbed one did, and left nothing else."""
    mask = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
    assert (mask == classify(big_pixels)).all()
    assert load_run(folder / "run.json").status == "done"
    assert {p.name for p in folder.iterdir()} == {p.name for p in calm.iterdir()}
    assert not list(folder.rglob("*.partial"))
    for path in calm.rglob("*"):
        name = path.relative_to(calm)
        if path.is_file() and name.parts[0] not in NOT_COMPARED:
            assert (folder / name).read_bytes() == path.read_bytes(), name


def said(stderr):
    """Return the lines of the sentences; there must be no traceback among them."""
    assert "Traceback" not in stderr, stderr
    assert "Exception ignored" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.strip()]


@contextmanager
def small_disk(folder, megabytes):
    """Mount a file system of so many MB; yield what makes it large."""
    folder.mkdir()

    def mount(*options):
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder],
            capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"cannot mount a tmpfs: {made.stderr.strip()}")

    mount(f"size={int(megabytes * 1024)}k")
    try:
        yield lambda *options: mount("remount", *options)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def size_of(folder):
    return sum(-(-p.stat().st_size // 4096) for p in folder.rglob("*") if p.is_file()) / 256


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize(
    "share", [0.5, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.02, 0.1, 0.3, 0.7, 0.9))]
)
def test_a_full_disk_is_one_sentence_and_costs_nothing(tmp_path, place, calm, big_pixels, share):
    disk = tmp_path / "disk"
    with small_disk(disk, share * size_of(calm)) as remount:
        full = run_apart(place, disk / "out")
        assert full.returncode == 1
        lines = said(full.stderr)
        assert any("the disk is full" in line and str(disk) in line for line in lines), lines
        assert any("the same command goes on" in line for line in lines)
        assert len(lines) <= 3, lines  # the slide, and perhaps the summary and the log
        path = disk / "out" / "slide" / "run.json"
        assert not path.is_file() or load_run(path).status == "failed"
        blocks = disk / "out" / "slide" / ".store" / "blocks"
        done = {p.name: p.stat().st_mtime_ns for p in blocks.glob("[0-9]*.npz")}
        remount("size=1g")
        again = run(place, disk / "out")
        assert again.returncode == 0, again.stderr
        assert_same(disk / "out" / "slide", calm, big_pixels)
        assert done.items() <= {p.name: p.stat().st_mtime_ns for p in blocks.iterdir()}.items()


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_read_only_output_is_refused_before_any_work(tmp_path, place):
    disk = tmp_path / "disk"
    with small_disk(disk, 1) as remount:
        remount("ro")
        for output in (disk, disk / "out"):
            result = run(place, output)
            assert result.returncode == 1
            (line,) = said(result.stderr)
            assert line == f"Error: cannot write to {output}: Read-only file system"


def test_a_file_in_the_way_is_named(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        result = run(place, output)
        assert result.returncode == 1
        (line,) = said(result.stderr)
        assert line.startswith(f"Error: cannot write to {output}: ")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slide").write_text("mine")
    result = run(place, tmp_path / "out")
    assert result.returncode == 1
    (line,) = said(result.stderr)
    assert f"cannot write to {tmp_path / 'out' / 'slide'}: " in line
    assert (tmp_path / "out" / "slide").read_text() == "mine"


def wait_for(process, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def blocks_of(output):
    return list((output / "slide" / ".store" / "blocks").glob("[0-9]*.npz"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stop_is_quick_tidy_and_resumable(tmp_path, place, calm, big_pixels, number):
    output = tmp_path / "out"
    process = start(place, output, model="busy")
    wait_for(process, lambda: len(blocks_of(output)) >= 2)
    process.send_signal(number)
    begun = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - begun < 5
    assert process.returncode == 128 + number
    assert said(stderr) == ["stopped: the same command goes on where this one stopped"]
    assert not list(output.rglob(".*.partial"))
    assert len(blocks_of(output)) < 12
    result = run(place, output, model="busy")
    assert result.returncode == 0, result.stderr
    assert_mask(output / "slide", big_pixels)
    assert not list(output.rglob("*.partial"))


def assert_mask(folder, big_pixels):
    mask = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
    assert (mask == classify(big_pixels)).all()


@pytest.mark.slow
def test_ten_kills_at_random_lose_nothing(tmp_path, place, big_pixels):
    calm = tmp_path / "calm"
    began = time.monotonic()
    assert run(place, calm, model="busy").returncode == 0
    whole = time.monotonic() - began
    moments = random.Random(0)
    output = tmp_path / "out"
    killed = 0
    while killed < 10:  # a run that ends before its moment does not count
        before = {p.name: p.stat().st_mtime_ns for p in blocks_of(output)}
        process = start(place, output, model="busy")
        time.sleep(moments.uniform(0.2, 0.8) * whole)
        process.kill()
        _, stderr = process.communicate()
        assert not stderr, stderr
        killed += process.returncode == -signal.SIGKILL
        after = {p.name: p.stat().st_mtime_ns for p in blocks_of(output)}
        assert before.items() <= after.items()
        if process.returncode == 0:
            assert_same(output / "slide", calm / "slide", big_pixels)
            shutil.rmtree(output)
    assert run(place, output, model="busy").returncode == 0
    assert_same(output / "slide", calm / "slide", big_pixels)


@pytest.mark.slow
def test_of_two_processes_one_works_and_the_other_says_so(tmp_path, place, big_pixels):
    output = tmp_path / "out"
    both = [start(place, output, model="busy") for _ in range(2)]
    ends = [(p.communicate(timeout=300)[1], p.returncode) for p in both]
    assert sorted(code for _, code in ends) == [0, 1], ends
    (line,) = said(next(stderr for stderr, code in ends if code))
    assert line.startswith("busy: ")
    assert f"another process is working in {output / 'slide'}" in line
    assert_mask(output / "slide", big_pixels)
    assert load_run(output / "slide" / "run.json").status == "done"
    rows = (output / "summary.csv").read_text("utf-8").splitlines()
    assert len(rows) == 2
    assert ",done," in rows[1]
    assert not list(output.rglob("*.partial"))


def test_the_claim_of_a_dead_process_blocks_nobody(tmp_path, place):
    output = tmp_path / "out"
    process = start(place, output, model="busy")
    wait_for(process, lambda: (output / "slide" / ".store" / ".lock").exists())
    process.kill()
    process.communicate()
    assert run(place, output).returncode == 0


def test_two_processes_share_out_a_batch(tmp_path, place, make_slide, slide_pixels):
    """Each meets slides that the other has claimed, goes on, and the summary holds all."""
    slides = tmp_path / "slides"
    slides.mkdir()
    for number in range(4):
        make_slide(slides / f"{number}.tif", slide_pixels, 0.25, levels=(1, 8))
    output = tmp_path / "out"
    line = [slides if a == str(place / "slide.tif") else a for a in command(place, output)]
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        lines = said(process.communicate(timeout=300)[1])
        assert all(text.startswith("busy: ") for text in lines), lines
        assert process.returncode == bool(lines)
    for number in range(4):
        mask = zarr.open_array(output / str(number) / "mask.ome.zarr" / "0", mode="r")[:]
        assert (mask == classify(slide_pixels)).all()
    rows = (output / "summary.csv").read_text("utf-8").splitlines()[1:]
    assert sorted(row.split(",")[:3] for row in rows) == [
        [str(n), f"{n}.tif", "done"] for n in range(4)
    ]
    report = (output / "report.html").read_text("utf-8")
    assert "4 of 4" in report


def settings_of(folder):
    return load_run(folder / "run.json").settings


@pytest.mark.slow
def test_what_is_still_valid_is_reused_and_the_rest_redone(tmp_path, place):
    output = tmp_path / "out"
    folder = output / "slide"
    assert run(place, output, "--outputs", "zarr,geojson").returncode == 0

    def state():
        blocks = {p.name: p.stat().st_mtime_ns for p in blocks_of(output)}
        chunks = {str(p): p.stat().st_mtime_ns for p in (folder / "mask.ome.zarr" / "0").rglob("*")}
        return blocks, chunks, (folder / "annotations.geojson").stat().st_mtime_ns

    first = state()
    assert run(place, output, "--outputs", "zarr,geojson").returncode == 0
    assert state() == first
    assert run(place, output, "--outputs", "zarr,geojson", "--simplify", 3).returncode == 0
    second = state()
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert settings_of(folder)["export"]["simplify_um"] == 3
    for options in (["--overlap", 64], ["--blend", "crop"], ["--mask-mpp", 0.5]):
        before = state()
        assert run(place, output, "--outputs", "zarr,geojson", *options).returncode == 0
        assert not set(before[0].items()) & set(state()[0].items()), options
    assert run(place, output, "--outputs", "zarr", "--overwrite", model="busy").returncode == 0
    # what the other model had written is gone
    assert {p.name for p in folder.iterdir()} == {"mask.ome.zarr", "run.json", ".store"}
    assert load_run(folder / "run.json").model["name"] == "test-busy"


@pytest.mark.parametrize(
    "where", ["key", *(pytest.param(w, marks=pytest.mark.slow) for w in ("drop", "rewrite"))]
)
def test_no_old_file_outlives_a_kill_in_the_middle(tmp_path, place, calm, big_pixels, where):
    """Old outputs never stand beside another run's, wherever the new run is killed."""
    output = tmp_path / "out"
    folder = output / "slide"
    assert run(place, output, "--mask-mpp", 1).returncode == 0
    script = f"""
import os, shutil, sys
from wsi_pipeline.run import result
from wsi_pipeline.cli import group
def die(*args, **kwargs):
    os._exit(9)
if {where!r} == "key":  # half emptied
    shutil.rmtree = die
elif {where!r} == "drop":  # half of the old outputs removed
    shutil.rmtree = die
else:  # mask in place, nothing else written
    result.write_geojson = die
group(sys.argv[1:])
"""
    line = command(place, output)
    killed = subprocess.run([sys.executable, "-c", script, *line[3:]], capture_output=True)
    assert killed.returncode == 9
    assert run(place, output, "--outputs", "zarr,geojson").returncode == 0
    assert {p.name for p in folder.iterdir()} == {
        "mask.ome.zarr", "annotations.geojson", "regions.csv", "run.json", ".store",
    }  # fmt: skip
    assert_mask(folder, big_pixels)
    assert run(place, output).returncode == 0
    assert_same(folder, calm, big_pixels)


def test_a_replaced_slide_is_refused_with_the_choice(tmp_path, place, make_slide, slide_pixels):
    slide = make_slide(tmp_path / "slide.tif", slide_pixels, 0.25, levels=(1, 8))
    output = tmp_path / "out"
    line = [str(slide) if a == str(place / "slide.tif") else a for a in command(place, output)]
    assert invoke(line).returncode == 0
    before = (output / "slide" / "run.json").read_bytes()
    make_slide(slide, slide_pixels[::-1], 0.25, levels=(1, 8))
    result = invoke(line)
    assert result.returncode == 1
    (text,) = said(result.stderr)
    assert re.search(r"another slide; choose another --output, or --overwrite", text)
    assert (output / "slide" / "run.json").read_bytes() == before
    result = invoke([*line, "--overwrite"])
    assert result.returncode == 0, result.stderr
    mask = zarr.open_array(output / "slide" / "mask.ome.zarr" / "0", mode="r")[:]
    assert (mask == classify(slide_pixels[::-1])).all()


def test_partials_of_living_processes_are_left_alone(tmp_path):
    store = RunStore(folder=tmp_path)
    (store.path / "blocks").mkdir(parents=True)
    mine, other = (tmp_path / f".mask.ome.tif.{n}.partial" for n in (this_process(), "other-1"))
    for path in (mine, other):
        path.write_text("half")
    store.remove_partials(this_process())
    assert not mine.exists()
    assert other.exists()
    store.remove_partials()
    assert not other.exists()


def damage(path, kind):
    """Make of a file what a disk may after a power cut."""
    data = path.read_bytes()
    half = len(data) // 2
    if kind == "missing":
        path.unlink()
        return
    garbage = np.random.default_rng(0).integers(0, 256, len(data), np.uint8).tobytes()
    # The checksum in a zip's directory: not every bit of what is deflated means something.
    at = data.index(b"PK\x01\x02") + 16 if path.suffix == ".npz" else half
    path.write_bytes(
        {
            "empty": b"",
            "zeros": bytes(len(data)),
            "truncated": data[:half],
            "garbage": garbage,
            "one bit": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        }[kind]
    )


@pytest.mark.parametrize("moved", [False, True], ids=["growing", "in its place"])
def test_what_the_disk_has_lost_is_done_again_and_nothing_else(
    tmp_path, place, calm, big_pixels, moved
):
    folder = tmp_path / "out" / "slide"
    shutil.copytree(calm, folder)
    (folder / "run.json").unlink()
    mask, blocks = folder / "mask.ome.zarr", folder / ".store" / "blocks"
    if not moved:
        mask = mask.rename(folder / ".store" / "mask.ome.zarr")
    every = sorted(blocks.glob("[0-9]*.npz"))
    kinds = ("missing", "empty", "zeros", "truncated", "garbage", "one bit")
    for number, kind in enumerate(kinds):
        damage(every[number], kind)
    for number, kind in enumerate(kinds[:-1], start=len(kinds)):
        row, column = every[number].stem.split("_")
        damage(mask / "0" / str(int(row)) / str(int(column)), kind)
    sound = every[-1]
    before = {p.name: p.stat().st_ino for p in every if p.exists()}
    result = run(place, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert_same(folder, calm, big_pixels)
    after = {p.name: p.stat().st_ino for p in every}
    assert [name for name in before if before[name] == after[name]] == [sound.name]


@pytest.mark.parametrize("name", [".zattrs", "0/.zarray"])
def test_a_mask_that_cannot_be_opened_is_begun_anew(tmp_path, place, calm, big_pixels, name):
    folder = tmp_path / "out" / "slide"
    shutil.copytree(calm, folder)
    (folder / "run.json").unlink()
    damage(folder / "mask.ome.zarr" / name, "zeros")
    result = run(place, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert_same(folder, calm, big_pixels)


def test_export_tells_of_a_lost_chunk_and_segment_brings_it_back(tmp_path, place, calm, big_pixels):
    folder = tmp_path / "out" / "slide"
    shutil.copytree(calm, folder)
    damage(folder / "mask.ome.zarr" / "0" / "1" / "1", "missing")
    line = [*command(place, tmp_path)[:4], "export", str(folder), "--simplify", "0"]
    result = invoke(line)
    assert result.returncode == 1
    assert "segment the slide again" in said(result.stderr)[0]
    assert run(place, tmp_path / "out").returncode == 0
    assert_same(folder, calm, big_pixels)


def test_what_killed_processes_left_is_swept_by_the_next_command(tmp_path, place, calm):
    out = tmp_path / "out"
    folder = out / "slide"
    shutil.copytree(calm, folder)
    (folder / "run.json").unlink()
    mask = (folder / "mask.ome.zarr").rename(folder / ".store" / "mask.ome.zarr")
    names = (
        folder / ".annotations.geojson.host-1.partial", mask / ".zattrs.0123abcd.partial",
        mask / "1" / "0" / "0.0123abcd.partial", folder / ".store" / ".key.json.host-1.partial",
        out / ".summary.csv.host-1.partial", out / ".report.html.host-1.partial",
        out / "..slides.json.host-1.partial",
    )  # fmt: skip
    for path in names:
        path.write_text("half")
    assert run(place, out).returncode == 0
    assert not list(out.rglob("*.partial"))
    left = folder / ".mask.ome.tif.host-1.partial"
    left.write_text("half")
    line = [*command(place, out)[:4], "export", str(folder), "--simplify", "3"]
    assert invoke(line).returncode == 0
    assert not left.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_summary_that_does_not_fit_costs_no_slide_its_turn(tmp_path, place):
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in "abc":
        shutil.copyfile(place / "slide.tif", slides / f"{name}.tif")
    disk = tmp_path / "disk"
    with small_disk(disk, 0.02):
        line = command(place, disk / "out")
        line[line.index(str(place / "slide.tif"))] = str(slides)
        full = subprocess.run(line, capture_output=True, text=True)
        assert full.returncode == 1
        *lines, last = said(full.stderr)
        for name in "abc":
            assert [x for x in lines if x.startswith(f"failed: {slides}/{name}.tif: ")], lines
        full_disk = r"Error: .*(summary\.csv|report\.html) could not be written: the disk is full"
        assert re.match(full_disk, last)


def test_a_grid_that_was_copied_in_part_is_no_white_slide(tmp_path, place):
    tile = [*command(place, tmp_path)[:4], "tile", str(place / "slide.tif"), "--mpp", "0.5"]
    tile += ["--patch-size", "256", "--tissue", "none", "--output", str(tmp_path / "grids")]
    assert invoke(tile).returncode == 0
    (tmp_path / "grids" / "slide.zarr" / "pixels" / "c" / "1" / "1" / "0").unlink()
    line = command(place, tmp_path / "out")
    line[line.index(str(place / "slide.tif"))] = str(tmp_path / "grids")
    result = invoke(line)
    assert result.returncode == 1
    assert "is not whole: 3 of 4 chunks of pixels" in said(result.stderr)[0]


def test_a_damaged_run_json_is_written_again(tmp_path, place, calm, big_pixels):
    folder = tmp_path / "out" / "slide"
    shutil.copytree(calm, folder)
    damage(folder / "run.json", "zeros")
    result = run(place, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert_same(folder, calm, big_pixels)


def test_the_memory_limit_is_checked_before_and_kept(tmp_path, place, monkeypatch, big_pixels):
    early = run(place, tmp_path / "out", "--max-ram", "10MB")
    assert early.returncode == 1
    assert "before any work" in said(early.stderr)[0]
    monkeypatch.setattr("wsi_pipeline.run.main.used_memory", lambda: int(0.2e9))
    refused = run(place, tmp_path / "out", "--max-ram", "300MB")
    assert refused.returncode == 1
    (line,) = said(refused.stderr)
    assert re.search(r"about \d\.\d GB of memory are needed, --max-ram allows 0\.3 GB; lower", line)
    assert not blocks_of(tmp_path / "out")
    assert run(place, tmp_path / "out", "--max-ram", "8").returncode == 2
    # near the limit all the time: one block after the other, and the same mask
    monkeypatch.setattr("wsi_pipeline.run.main.used_memory", lambda: int(7.9e9))
    monkeypatch.setattr("wsi_pipeline.schedule.threads.used_memory", lambda: int(7.9e9))
    assert run(place, tmp_path / "out", "--max-ram", "8GB").returncode == 0
    assert_mask(tmp_path / "out" / "slide", big_pixels)


def test_a_process_above_its_limit_ends_with_a_sentence(tmp_path, place):
    script = """
import itertools, sys
from wsi_pipeline.run import estimate, main
from wsi_pipeline.cli import group
estimate._peak_memory = lambda *args, **kwargs: (0, 0)
used = itertools.chain([0], itertools.repeat(300_000_000))
main.used_memory = lambda: next(used)
group(sys.argv[1:])
"""
    line = command(place, tmp_path / "out", "--max-ram", "200MB", model="busy")
    ended = subprocess.run(
        [sys.executable, "-c", script, *line[3:]], capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "GB of memory are taken, --max-ram allows 0.2" in said(ended.stderr)[-1]
    assert run(place, tmp_path / "out", model="busy").returncode == 0


def test_a_dry_run_tells_what_a_run_takes(tmp_path, place, calm):
    result = run(place, tmp_path / "out", "--dry-run")
    assert result.returncode == 0
    assert not (tmp_path / "out").exists()
    fields = result.stdout.strip().split("\t")
    assert fields[1] == "3862 × 2974 px mask"
    assert fields[2] == f"{load_run(calm / 'run.json').patches['kept']} patches"
    files = sum(path.is_file() for path in calm.rglob("*"))
    # Until probabilities are whole each block has one more.
    files += len(list((calm / ".store" / "blocks").iterdir()))
    assert files <= int(re.search(r"at most (\d+) files", result.stdout)[1]) < files + 90
    memory = float(re.search(r"([\d.]+) GB memory", result.stdout)[1])
    assert 0.7 < memory < 1.5
