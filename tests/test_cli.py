"""Exit codes and messages; what commands do is tested with the modules they call."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner

from wsi_pipeline.cli import COMMANDS, group
from wsi_pipeline.cli.progress import new_bar

ROOT = Path(__file__).parents[1]


def invoke(*arguments):
    return CliRunner().invoke(group, [str(a) for a in arguments])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


def test_help_lists_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["segment"],
        ["segment", "x.svs", "--output", "o"],
        ["segment", "x.svs", "--model", "m", "--output", "o", "--blend", "maximum"],
        ["segment", "x.svs", "--model", "m", "--output", "o", "--tissue", "missing.png"],
        ["segment", "x.svs", "--model", "m", "--output", "o", "--shard", "3/2"],
        ["segment", "x.svs", "--model", "m", "--output", "o", "--outputs", "zarr,pdf"],
        ["segment", "x.svs", "--model", "m", "--output", "o", "--gpus", "first"],
        ["segment", "x.svs", "--model", "m", "--output", "o", "--gpus", "0", "--device", "cpu"],
        ["segment", "x.svs", "--model", "m", "--output", "o", "--gpus", "99"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--cluster", "slurm", "--scheduler", "tcp://h"],
        ["status", "no-such-folder"],
        ["tile", "x.svs", "--output", "o"],
        ["tile", "x.svs", "--mpp", "1", "--patch-size", "64", "--overlap", "64", "--output", "o"],
    ],
)
def test_wrong_usage_ends_with_2(arguments):
    assert invoke(*arguments).exit_code == 2


def test_a_missing_bundle_or_slide_ends_with_1_and_one_line(tmp_path, slide_path):
    for arguments in (
        ["segment", slide_path, "--model", tmp_path / "none", "--output", tmp_path / "o"],
        ["segment", tmp_path / "none.svs", "--model",
         pointwise_bundle(tmp_path / "m", mpp=0.5), "--output", tmp_path / "o"],
    ):  # fmt: skip
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.strip().splitlines()) == 1


def test_an_empty_folder_is_wrong_usage(tmp_path):
    (tmp_path / "slides").mkdir()
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    result = invoke("segment", tmp_path / "slides", "--model", bundle, "--output", tmp_path / "o")
    assert result.exit_code == 2
    assert "no slides found" in result.output


def test_a_dry_run_writes_nothing(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    output = tmp_path / "o"
    result = invoke("segment", slide_path, "--model", bundle, "--output", output, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "patches" in result.stdout
    assert "1931 × 1487" in result.stdout
    assert not output.exists()


def test_shards_share_out_all_slides(tmp_path, slide_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for number in range(5):
        (slides / f"{number}.tif").write_bytes(slide_path.read_bytes())
    bundle = pointwise_bundle(tmp_path / "m", mpp=1.0, patch_size=128)
    for shard in ("1/2", "2/2", "7/9"):
        result = invoke(
            "-q", "segment", slides, "--model", bundle, "--output", tmp_path / "o",
            "--outputs", "zarr", "--mask-mpp", "1", "--shard", shard,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        done = sorted(p.parent.name for p in (tmp_path / "o").glob("*/run.json"))
        assert done == (["0", "2", "4"] if shard == "1/2" else ["0", "1", "2", "3", "4"])
    status = json.loads(invoke("status", tmp_path / "o", "--json").stdout)
    assert status["done"] == ["0", "1", "2", "3", "4"]
    rows = (tmp_path / "o" / "summary.csv").read_text().splitlines()
    assert len(rows) == 6  # with the header: the second call keeps the first's


def test_asap_and_ngff_05(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    result = invoke(
        "-q", "segment", slide_path, "--model", bundle, "--output", tmp_path / "o",
        "--tiff", "asap", "--ngff", "0.5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    folder = tmp_path / "o" / slide_path.stem
    assert (folder / "mask.asap.tif").is_file()
    assert zarr.open_group(folder / "mask.ome.zarr").metadata.zarr_format == 3


def test_a_block_size_that_is_no_multiple_of_the_chunk_is_refused(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    result = invoke(
        "segment", slide_path, "--model", bundle, "--output", tmp_path / "o", "--block-size", 1500
    )
    assert result.exit_code == 1
    assert "--block-size 1500 is not a multiple of 1024" in result.stderr


def test_a_defect_is_one_line_for_the_user_and_a_traceback_in_the_log(
    tmp_path, slide_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("wsi_pipeline.pipeline.plan_grid", fail)
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    result = invoke("segment", slide_path, "--model", bundle, "--output", tmp_path / "o")
    assert result.exit_code == 1
    assert "failed: " in result.stderr
    assert "ZeroDivisionError: oh" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in (tmp_path / "o" / "wsi_pipeline.log").read_text("utf-8")


def test_an_output_that_cannot_be_made_is_said(tmp_path, slide_path):
    (tmp_path / "file").write_text("")
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    result = invoke("segment", slide_path, "--model", bundle, "--output", tmp_path / "file" / "o")
    assert result.exit_code == 1
    assert "cannot write to" in result.stderr


def test_a_mask_finer_than_the_slide_is_refused(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    result = invoke(
        "segment", slide_path, "--model", bundle, "--output", tmp_path / "o", "--mask-mpp", "0.1"
    )
    assert result.exit_code == 1
    assert "--mask-mpp 0.1 is finer than the slide's 0.25" in result.stderr


def test_tile_writes_a_grid_that_plain_zarr_reads(tmp_path, slide_path):
    arguments = ["tile", slide_path, "--mpp", "1", "--patch-size", "128", "--overlap", "16"]
    result = invoke("-q", *arguments, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    group = zarr.open(tmp_path / f"{slide_path.stem}.zarr", mode="r")
    assert group["pixels"].shape == (372, 483, 3)
    assert 0 < group["patches"].shape[0] <= 4 * 5
    again = invoke("-q", *arguments, "--output", tmp_path)
    assert again.exit_code == 0
    assert "--overwrite" in again.stderr


def test_tile_names_its_own_option_for_a_slide_without_mpp(tmp_path, slide_pixels):
    import tifffile

    path = tmp_path / "bare.tif"
    tifffile.imwrite(path, slide_pixels, tile=(256, 256), photometric="rgb")
    result = invoke("-q", "tile", path, "--mpp", "1", "--output", tmp_path / "o")
    assert result.exit_code == 1
    assert "--slide-mpp" in result.stderr
    result = invoke("-q", "tile", path, "--mpp", "1", "--slide-mpp", "0.25", "-o", tmp_path / "o")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [["cli.py"], ["-m", "wsi_pipeline"]])
def test_it_runs_from_a_checkout(command):
    result = subprocess.run(
        [sys.executable, *command, "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "wsi-pipeline, version" in result.stdout


def test_the_demo_makes_its_own_slide_where_there_is_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("WSI_PIPELINE_TEST_DATA", str(tmp_path / "nothing"))
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    output = tmp_path / "o"
    result = invoke("-q", "demo", "--output", output, "--model", bundle)
    assert result.exit_code == 0, result.output
    shown = [Path(line) for line in result.stdout.split("\n") if line]
    assert all(path.exists() for path in shown)
    assert {"overlay.png", "annotations.geojson", "report.html"} <= {p.name for p in shown}
    run = json.loads((output / "demo slide" / "run.json").read_text("utf-8"))
    assert run["slide"]["size"] == [2048, 2048]


@pytest.mark.parametrize(("terminal", "most"), [(True, 1000), (False, 3)])
def test_a_bar_leaves_few_states_in_a_file(monkeypatch, terminal, most):
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stderr", written)
    bar = new_bar("slide", total=50, initial=0, unit="blocks", quiet=False)
    for _ in range(50):
        time.sleep(0.01)
        bar.update(1)
    bar.close()
    states = written.getvalue().count("slide:")
    assert 1 < states <= most
    assert (states > 3) == terminal
    assert "50/50" in written.getvalue()
