"""Exit codes and messages; what commands do is tested with the modules they call."""

import csv
import io
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
import tifffile
import zarr
from bundles import pointwise_bundle, write_toml
from click.testing import CliRunner
from PIL import Image

from wsi_pipeline.cli import COMMANDS, BesideBars, group
from wsi_pipeline.cli.progress import Bars, new_bar

ROOT = Path(__file__).parents[1]


def invoke(*arguments):
    return CliRunner().invoke(group, [str(a) for a in arguments])


def commands_by_words():
    """Return every command, those of a group too, by the words that call it."""
    found = {}
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        inner = command.commands if isinstance(command, click.Group) else {None: command}
        found |= {(name, word) if word else (name,): each for word, each in inner.items()}
    return found


@pytest.mark.parametrize("words", commands_by_words(), ids=" ".join)
def test_help_is_a_screen_and_help_all_has_every_option(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short, long = (invoke(*words, flag) for flag in ("--help", "--help-all"))
    assert (short.exit_code, long.exit_code) == (0, 0), short.output + long.output
    assert re.match(rf"Usage: \S+ {' '.join(words)} ", short.output)
    assert len(short.output.splitlines()) < 40
    options = [p for p in commands_by_words()[words].params if isinstance(p, click.Option)]
    assert all(re.search(rf"^  .*{option.opts[-1]}\b", long.output, re.M) for option in options)
    missing = [o for o in options if not re.search(rf"^  .*{o.opts[-1]}\b", short.output, re.M)]
    left = re.search(r"--help-all +Show (\d+) more options", short.output)
    assert len(missing) == (int(left[1]) if left else 0)
    # Bounds such as x>=1 are a programmer's, and 'RANGE' too.
    assert not re.search(r"x[<>]|RANGE", long.output)
    assert "; 0 = exact." in long.output or "--simplify" not in long.output


@pytest.mark.parametrize("words", commands_by_words(), ids=" ".join)
def test_the_example_of_each_command_is_one_of_it(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("out/slide", "slides"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("annotations.geojson", "best.pth"):
        (tmp_path / file).touch()
    (example,) = re.findall(r"^Example: wsi-pipeline (.*)$", invoke(*words, "--help").output, re.M)
    assert example.split()[: len(words)] == list(words)
    command = commands_by_words()[words]
    with command.make_context(words[-1], example.split()[len(words) :]) as context:
        assert context.params


def test_options_stand_under_their_headings():
    text = invoke("segment", "--help-all").output
    titles = re.findall(r"^(\w[\w ]*):$", text, re.M)
    assert titles == [
        "Input", "What to segment", "Model", "Output", "Speed and memory", "Cluster", "Options",
    ]  # fmt: skip
    sections = dict(zip(titles, re.split(r"^\w[\w ]*:$", text, flags=re.M)[1:], strict=True))
    for title, flag in (
        ("Input", "--mpp-table"),
        ("What to segment", "--roi"),
        ("Model", "--tta"),
        ("Output", "--for"),
        ("Speed and memory", "--gpus"),
        ("Cluster", "--shard"),
    ):
        assert [t for t, part in sections.items() if f"  {flag} " in part] == [title]
    assert "Cluster:" not in invoke("segment", "--help").output


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
        ["segment", "x.svs", "-m", "m", "-o", "o", "--device", "gpu"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--device", "mps:0"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--device", "cuda:"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--device", "cuda:9999"],
        ["info", "x.svs", "-m", "m", "-m", "n"],
        ["demo", "-m", "m", "-m", "n", "-o", "o"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--tissue", "none", "--tissue", "auto"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--roi", __file__, "--roi", __file__],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--max-ram", "nanGB"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--max-ram", "infGB"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--max-ram", "-5GB"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--max-ram", "0GB"],
        ["segment", "x.svs", "-m", "m", "-o", "o", "--batch-size", "9" * 30],
        ["models", "init", "m", "-o", "o", "--seed", "9" * 30],
        ["evaluate", "p", "t", "--truth-values", "Tumor=70000"],
        ["evaluate", "p", "t", "--ignore", "70000"],
        ["evaluate", "p", "t", "--size", "9999999999x5"],
        ["train", "r.toml", "-o", "o", "--threads", "9" * 30],
        ["status", "no-such-folder"],
        ["tile", "x.svs", "--output", "o"],
        ["tile", "x.svs", "--mpp", "1", "--patch-size", "64", "--overlap", "64", "--output", "o"],
    ],
)
def test_wrong_usage_ends_with_2(arguments):
    assert invoke(*arguments).exit_code == 2


def figures():
    """Return every option of every command that takes a number with a fraction."""
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        inner = command.commands if isinstance(command, click.Group) else {"": command}
        for word, each in inner.items():
            for option in each.params:
                if isinstance(option.type, click.types.FloatParamType):
                    yield [name, *filter(None, [word]), option.opts[0]]


@pytest.mark.parametrize("words", list(figures()), ids=" ".join)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e400", "ten"])
def test_no_option_takes_what_is_no_number(words, value):
    *names, flag = words
    result = invoke(*names, f"{flag}={value}")
    assert result.exit_code == 2
    assert f"Invalid value for '{flag}'" in result.stderr


def test_there_are_options_with_fractions():
    assert len(list(figures())) >= 8


def wrong_settings(folder):
    """Return what would fail every slide: arguments beside the usual, and what is said."""
    nothing = folder / "nothing.geojson"
    nothing.write_text('{"type": "FeatureCollection", "features": []}')
    table = folder / "table.csv"
    table.write_text("slide;mpp\na;much\n")
    picture = folder / "picture.png"
    picture.write_bytes(b"noise")
    bare = write_toml(folder / "bare", mpp=0.5, patch_size=64, overlap=0, network='"lightmuseg"')
    (bare / "model.toml").write_text(
        (bare / "model.toml").read_text("utf-8").replace('weights = "program.pt"\n', ""), "utf-8"
    )
    spoilt = pointwise_bundle(folder / "spoilt", mpp=0.5)
    (spoilt / "program.pt").write_bytes(b"noise")
    return [
        (["--overlap", "256"], "--overlap 256 must be below the patch size"),
        (["--overlap", "9" * 30], "must be below the patch size"),
        (["--block-size", "1025"], "not a multiple of 1024"),
        (["--block-size", "2048", "--ngff", "0.5"], "not a multiple of 4096"),
        (["--roi", str(nothing)], "holds no areas"),
        (["--roi", str(picture)], "picture.png"),
        (["--tissue", str(nothing)], "holds no areas"),
        (["--tissue", str(picture)], "no mask image"),
        (["--mpp-table", str(table)], "line 2: expected the columns"),
        (["--model", str(bare)], "has no weights"),
        (["--model", str(spoilt)], "cannot load"),
    ]


def test_what_would_fail_every_slide_is_wrong_usage_said_once(tmp_path, slide_path):
    for number in range(2):
        shutil.copy(slide_path, tmp_path / f"{number}.tif")
    slides, output = str(tmp_path / "*.tif"), str(tmp_path / "o")
    bundle = ["--model", str(pointwise_bundle(tmp_path / "m", mpp=0.5))]
    for options, said in wrong_settings(tmp_path):
        model = [] if "--model" in options else bundle
        result = invoke("segment", slides, "--output", output, *model, *options)
        assert result.exit_code == 2, (options, result.output)
        assert said in result.stderr
        assert result.stderr.count(said) == 1
        if options[0] in ("--roi", "--tissue", "--mpp-table"):
            result = invoke("tile", slides, "--output", output, "--mpp", "1", *options)
            assert (result.exit_code, said in result.stderr) == (2, True), (options, result.output)
    assert not (tmp_path / "o").exists()


def test_a_slide_too_coarse_for_the_model_is_refused(tmp_path, make_slide, slide_pixels):
    slides = tmp_path / "slides"
    slides.mkdir()
    bundle = pointwise_bundle(tmp_path / "m", mpp=1.0, patch_size=128)
    for name, mpp in (("fine", 0.05), ("same", 2.5), ("coarse", 2.6)):
        make_slide(slides / f"{name}.tif", slide_pixels[:600, :700], mpp, levels=(1, 4))
    common = ["segment", slides, "--model", bundle, "--output", tmp_path / "o", "--outputs", "zarr"]
    for extra in ([], ["--dry-run"]):
        result = invoke("-q", *common, "--tissue", "none", *extra)
        assert result.exit_code == 1
        said = [line for line in result.output.splitlines() if "--any-resolution" in line]
        assert len(said) == 1
        assert "coarse.tif" in said[0]
        assert "2.6 µm/px are 2.6 times as coarse as the model's 1 µm/px" in said[0]
    assert (tmp_path / "o" / "same" / "mask.ome.zarr").is_dir()
    assert (tmp_path / "o" / "fine" / "mask.ome.zarr").is_dir()
    assert not (tmp_path / "o" / "coarse" / "mask.ome.zarr").exists()
    result = invoke("-q", *common, "--tissue", "none", "--any-resolution")
    assert result.exit_code == 0, result.output
    again = invoke("-q", *common, "--tissue", "none")
    assert again.exit_code == 1
    assert (tmp_path / "o" / "coarse" / "mask.ome.zarr").is_dir()
    for name, takes in (("same", True), ("coarse", False)):
        shown = invoke("info", slides / f"{name}.tif", "--model", bundle)
        assert ("test-m takes it" in shown.stdout) == takes
        assert ("times as coarse" in shown.stdout) != takes
        facts = json.loads(invoke("info", slides / f"{name}.tif", "-m", bundle, "--json").stdout)
        assert facts["model"]["name"] == "test-m"
        assert (facts["model"]["why_not"] is None) == takes


def test_a_folder_of_pictures_says_what_is_there_and_what_to_do(tmp_path, slide_pixels):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        Image.fromarray(slide_pixels[:600, :700]).save(folder / name)
    (folder / "notes.txt").write_text("")
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    output = tmp_path / "o"
    tile = ["tile", folder, "--mpp", "1", "--output", output]
    for command in (["segment", folder, "--model", bundle, "--output", output], tile):
        result = invoke(*command)
        assert result.exit_code == 2
        assert f"no slides found in {folder}, which holds 2 .png, 1 .txt" in result.stderr
        pattern = re.search(r"as in '(.*)'", result.stderr)[1]
        assert pattern == f"{folder}/**/*.png"
    named = ["segment", pattern, "--model", bundle, "--output", output, "--mpp", "0.5"]
    assert invoke("-q", *named, "--dry-run").stdout.count("700 × 600 px mask") == 2


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
    assert result.exit_code == 2
    assert "--block-size 1500 is not a multiple of 1024" in result.stderr


def test_a_defect_is_one_line_for_the_user_and_a_traceback_in_the_log(
    tmp_path, slide_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("wsi_pipeline.run.slide_run.plan_grid", fail)
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


def test_results_may_lie_beside_their_slides(tmp_path, slide_path):
    shutil.copy(slide_path, tmp_path / "a.tif")
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    line = ["-q", "segment", tmp_path, "--model", bundle, "--output", tmp_path, "--device", "cpu"]
    assert invoke(*line).exit_code == 0
    before = (tmp_path / "a" / "run.json").stat()
    again = invoke(*line)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "a" / "run.json").stat() == before  # is done
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        assert [row["folder"] for row in csv.DictReader(file)] == ["a"]


def test_tile_leaves_a_link_that_leads_nowhere(tmp_path, slide_path):
    link = tmp_path / f"{slide_path.stem}.zarr"
    link.symlink_to(tmp_path / "gone")
    result = invoke("tile", slide_path, "--mpp", "1", "--output", tmp_path)
    assert result.exit_code == 1
    assert "is there and no patch grid" in result.stderr
    assert link.is_symlink()


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
    assert f"wsi-pipeline view {output}" in result.stderr
    assert "scikit-image's picture" in result.stderr
    run = json.loads((output / "demo slide" / "run.json").read_text("utf-8"))
    assert run["slide"]["size"] == [768, 768]
    pixels = tifffile.imread(output / "demo slide.tif")
    tissue = pixels[128:-128, 128:-128].astype(int)
    assert (pixels[:128] == 244).all()
    # Nothing is mirrored, and no brown is left: blue is above green, as in H&E.
    assert not any(np.array_equal(tissue, np.flip(tissue, axis)) for axis in (0, 1))
    dark = tissue[tissue.sum(axis=-1) < 600]
    assert len(dark) > 50_000
    assert (dark[:, 2] >= dark[:, 1]).mean() > 0.99


def test_the_demo_takes_an_own_slide(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    # What follows the first dot of the ending is no part of the folder's name.
    slide = tmp_path / "own.slide.ome.tif"
    shutil.copy(slide_path, slide)
    line = ["-q", "demo", "-o", tmp_path / "o", "-m", bundle, "--slide", slide]
    result = invoke(*line)
    assert result.exit_code == 0, result.output
    (overlay,) = (tmp_path / "o").glob("*/overlay.png")
    assert str(overlay) in result.stdout.splitlines()
    assert f"segmenting {slide}: your own" in result.stderr
    assert "Dice" not in result.stderr


def test_the_demo_of_ultrasound_finds_what_it_has_drawn(tmp_path, monkeypatch):
    monkeypatch.delenv("WSI_PIPELINE_TEST_DATA", raising=False)
    result = invoke("demo", "ultrasound", "--output", tmp_path / "o")
    assert result.exit_code == 0, result.output
    assert "a phantom drawn by computer" in result.stderr
    dice = float(re.search(r"Lesion against the truth: Dice ([\d.]+)", result.stderr)[1])
    truth, found = (
        np.asarray(Image.open(tmp_path / "o" / name)) > 0
        for name in ("ultrasound phantom truth.png", "ultrasound phantom/mask.png")
    )
    assert truth.sum() == pytest.approx(np.pi * 62 * 88, rel=0.01)
    assert dice == pytest.approx(2 * (truth & found).sum() / (truth.sum() + found.sum()), abs=1e-3)
    assert dice > 0.8


def test_a_demo_without_weights_says_so(tmp_path):
    model = ROOT / "models" / "swish-unet-breast"
    result = invoke("demo", "ultrasound", "--model", model, "--output", tmp_path / "o")
    assert result.exit_code == 1
    assert "swish-unet-breast has no weights: train some" in result.stderr
    assert not (tmp_path / "o").exists()


def test_the_demo_compares_with_the_truth_where_there_is_one(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("WSI_PIPELINE_TEST_DATA", str(data_dir))
    result = invoke("-q", "demo", "--output", tmp_path / "o")
    assert result.exit_code == 0, result.output
    assert "trained on that data set" in result.stderr
    assert float(re.search(r"Tumor against the truth: Dice ([\d.]+)", result.stderr)[1]) > 0.8


def test_a_bar_tells_which_slide_it_is_and_what_comes_after_the_patches(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", written)
    with Bars(quiet=False, unit="patches", of=3) as bars:
        bars("a.svs", 0, 4, number=1)
        bars("a.svs", 4, 4, number=1)
        assert "writing" not in written.getvalue()
        bars.tell("a.svs", "writing mask.ome.tif", number=1)
        assert "4/4" in written.getvalue().rpartition("\r")[2]
        assert "writing mask.ome.tif" in written.getvalue().rpartition("\r")[2]
        bars("a.svs", 0, 5, number=2)  # of the same name in another folder
        bars.tell("a.svs", "writing overlay.png", number=1)  # is not shown any more
    assert "1/3 a.svs" in written.getvalue()
    assert "2/3 a.svs" in written.getvalue()
    assert "overlay.png" not in written.getvalue()


def test_a_bar_tells_how_far_all_slides_are_and_for_how_long(monkeypatch):
    written, now = io.StringIO(), [1000.0]
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Bars(quiet=False, unit="patches", of=4) as bars:
        monkeypatch.setattr(written, "isatty", lambda: True, raising=False)
        bars.end(1)  # was done already: nothing is left of it
        bars("b.svs", 100, 200, number=2)  # goes on where it was
        bars.tell("b.svs", "", number=2)
        assert "all 17%" in written.getvalue()  # 100 of 200, and two more of as many
        assert "left" not in written.getvalue()
        now[0] += 600
        bars("b.svs", 200, 200, number=2)
        bars.tell("b.svs", "writing mask.ome.tif", number=2)
        # 100 patches in 10 minutes; 400 are to come
        assert "writing mask.ome.tif, all 33%, 40 min left" in written.getvalue()
        bars.end(2)
        bars("c.svs", 0, 100, number=3)
        bars.tell("c.svs", "", number=3)
        assert "all 44%" in written.getvalue()  # 200 of 300, and one more of 150
        bars.end(3)  # it has failed
        now[0] += 600
        bars("d.svs", 0, 200, number=4)
        bars("d.svs", 100, 200, number=4)
        bars.tell("d.svs", "", number=4)
        assert "all 75%, 10 min left" in written.getvalue().rpartition("\r")[2]


def test_the_end_of_a_folder_is_a_table(tmp_path, slide_path):
    (tmp_path / "in").mkdir()
    shutil.copy(slide_path, tmp_path / "in" / "good.tif")
    (tmp_path / "in" / "bad.tif").write_bytes(b"noise")
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    result = invoke("segment", tmp_path / "in", "--model", bundle, "--output", tmp_path / "o")
    assert result.exit_code == 1
    assert result.stdout == ""
    table = result.stderr[result.stderr.index("slide  ") :].splitlines()
    assert re.split("  +", table[0])[:2] == ["slide", "status"]
    assert re.split("  +", table[1])[:3] == ["bad.tif", "failed", "-"]
    with (tmp_path / "o" / "summary.csv").open(encoding="utf-8", newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["slide"] == "good.tif")
    cells = dict(zip(re.split("  +", table[0]), re.split("  +", table[2]), strict=True))
    name = next(key for key in row if key.endswith("_mm2") and key != "tissue_mm2")
    area = float(cells[f"{name.removesuffix('_mm2')} mm²"])
    assert area == pytest.approx(float(row[name]), rel=1e-3)
    assert table[3] == f"report: {tmp_path / 'o' / 'report.html'}"
    again = invoke("-q", "segment", tmp_path / "in", "-m", bundle, "-o", tmp_path / "o")
    assert "report:" not in again.stderr
    other = pointwise_bundle(tmp_path / "n", mpp=0.5)
    models = ["-m", bundle, "-m", other]
    both = invoke("segment", tmp_path / "in" / "good.tif", *models, "-o", tmp_path / "several")
    assert re.findall(r"^good.tif by (test-[mn])  +done ", both.stderr, re.M) == [
        "test-m",
        "test-n",
    ]
    # Of the last slide nothing is left when its outputs are written.
    assert "100%, 1 min left" not in both.stderr


def test_with_json_log_all_of_stderr_is_json(tmp_path, slide_path):
    (tmp_path / "in").mkdir()
    shutil.copy(slide_path, tmp_path / "in" / "good.tif")
    (tmp_path / "in" / "bad ü.tif").write_bytes(b"noise")
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.5)
    line = ["segment", tmp_path / "in", "--model", bundle, "--output", tmp_path / "o"]
    command = [sys.executable, "-m", "wsi_pipeline", "-v", "--json-log", *map(str, line)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    told = [json.loads(text) for text in done.stderr.splitlines()]
    assert all(set(one) == {"time", "level", "logger", "message"} for one in told)
    said = {one["message"].partition(":")[0]: one["level"] for one in told}
    assert (said["failed"], said["done"]) == ("ERROR", "INFO")
    assert any(one["logger"].startswith("wsi_pipeline.run") for one in told)
    assert any("good.tif: 100%" in one["message"] for one in told)
    assert any("bad ü.tif" in one["message"] for one in told)
    wrong = subprocess.run([*command, "--blend", "no"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert json.loads(wrong.stderr.splitlines()[-1])["level"] == "ERROR"


def test_the_shell_completes_commands_and_options(monkeypatch):
    def complete(kind, *words):
        said = {"_WSI_PIPELINE_COMPLETE": kind, "COMP_WORDS": " ".join(words)}
        said["COMP_CWORD"] = str(len(words) - 1)
        return CliRunner().invoke(group, prog_name="wsi-pipeline", env=said).stdout

    source = complete("bash_source")
    assert "_WSI_PIPELINE_COMPLETE=bash_complete" in source
    assert subprocess.run(["bash", "-n"], input=source, text=True, check=False).returncode == 0
    assert set(complete("bash_complete", "wsi-pipeline", "e").split()) == {
        "plain,export",
        "plain,evaluate",
    }
    flags = complete("bash_complete", "wsi-pipeline", "segment", "--s").split()
    assert {"plain,--shard", "plain,--simplify"} <= set(flags)


def test_of_what_goes_on_one_after_another_each_has_its_bar(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", written)
    with Bars(quiet=False, unit="steps") as bars:
        bars("without A", 3, 10)
        bars.tell("without A", "loss=0.500, Dice=0.900")
        bars("without B", 1, 10)  # A has ended early
        bars.tell("without B", "loss=0.700")
    first, _, second = written.getvalue().rpartition("\n")[0].partition("without B")
    assert "without A" in first
    assert "loss=0.500, Dice=0.900" in first
    assert "loss=0.700" in second


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


@pytest.mark.slow
def test_decoders_do_not_write_to_stderr(tmp_path):
    grey = np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "mask.tif", grey)
    data = bytearray((tmp_path / "mask.tif").read_bytes())
    first = struct.unpack_from("<I", data, 4)[0] + 2
    tags = data[first : first + 12], data[first + 12 : first + 24]
    data[first : first + 24] = tags[1] + tags[0]  # GDAL warns of tags that are not in order
    (tmp_path / "mask.tif").write_bytes(data)
    colours = np.random.default_rng(0).integers(0, 9, (64, 64, 3), np.uint8)
    tifffile.imwrite(tmp_path / "packed.tif", colours, compression="zlib", tile=(32, 32))
    with tifffile.TiffFile(tmp_path / "packed.tif") as file:
        start = file.pages[0].dataoffsets[0]
    with (tmp_path / "packed.tif").open("r+b") as file:
        file.seek(start + 30)
        file.write(b"\xa7" * 200)  # libtiff prints what is wrong with it
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "v.nii")
    with (tmp_path / "v.nii").open("r+b") as file:
        file.seek(108)
        file.write(struct.pack("<f", 8))  # nibabel logs that voxels cannot begin there
    recipe = """
        [[data]]
        patient = "A"
        images = "packed.tif"
        masks = "mask.tif"
        mpp = 0.5
        classes = { Tumor = [1] }
        [bundle]
        name = "m"
        modality = "slide"
        network = "swish_unet"
        network_options = { classes = 1 }
        [bundle.input]
        mpp = 0.5
        channels = 3
        patch_size = [64, 64]
        overlap = [0, 0]
        mean = [0.5, 0.5, 0.5]
        std = [0.5, 0.5, 0.5]
        [bundle.output]
        activation = "sigmoid"
        classes = [{ name = "B" }, { name = "Tumor", color = [1, 2, 3] }]
    """
    (tmp_path / "r.toml").write_text(recipe, "utf-8")
    values = ["--truth-values", "T=1", "--prediction-values", "T=1"]
    for arguments, code in (
        (["evaluate", "mask.tif", "mask.tif", *values], 0),
        (["info", "v.nii"], 1),
        (["train", "r.toml", "-o", "out", "--device", "cpu"], 1),
    ):
        command = [sys.executable, "-m", "wsi_pipeline", "-q", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == code, done.stderr
        assert all(line.startswith(("Error: cannot", "Error: v.nii")) for line in lines)


def test_warnings_and_bars_have_lines_of_their_own(capfd):
    handler = BesideBars(sys.stderr)
    record = logging.LogRecord("wsi_pipeline", logging.WARNING, "", 0, "faded", (), None)
    with new_bar("slide", total=9, initial=0, unit="patches", quiet=False) as bar:
        bar.refresh()
        handler.emit(record)
    assert "faded" in re.split(r"[\r\n]", capfd.readouterr().err)


def test_a_misspelt_command_is_told_which_is_meant():
    assert "Did you mean segment?" in invoke("segmnt", "slides").output
    assert "Did you mean" not in invoke("xyzzy").output


def test_a_console_of_few_letters_gets_escapes(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.5)
    line = ["segment", slide_path, "--dry-run", "--model", bundle, "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "wsi_pipeline", *map(str, line)]
    told = subprocess.run(
        command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"}
    )
    assert told.returncode == 0, told.stderr
    assert b"\\u2192 " in told.stdout
    assert "1931 × 1487 px mask".encode("cp1252") in told.stdout
