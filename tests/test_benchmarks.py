"""Benchmarks: slides, networks, floor and records are what they say, and a run of them ends."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from skimage.data import immunohistochemistry

from wsi_pipeline import PatchGrid, open_source
from wsi_pipeline.cli import group

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIDE = 1024


@pytest.fixture
def module(monkeypatch):
    """Return `module(name)`, which imports a file of `benchmarks/`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def start(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def records(work):
    (path,) = work.glob("runs-*.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_made_slide_is_aperios_with_its_share_of_tissue(module, tmp_path, share):
    make_slide = module("make_slide")
    path = make_slide.write_big_slide(tmp_path / "made.svs", (4096, 2048), 0.25, share=share)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.25
        assert slide.level_dimensions == ((4096, 2048), (1024, 512), (256, 128))
        assert set(slide.associated_images) == {"thumbnail"}
        pixels = np.asarray(slide.read_region((0, 0), 2, (256, 128)).convert("RGB")).astype(int)
    blocks = pixels.reshape(8, 16, 16, 16, 3)  # (row, y, column, x, channel): a tile is 16 px
    is_tissue = blocks.std(axis=(1, 3)).max(axis=-1) > 5
    assert abs(is_tissue.mean() - share) < 0.05  # whole tiles, and both halves alike
    np.testing.assert_array_equal(is_tissue, make_slide.tissue_tiles(8, 16, share))


def test_the_null_network_takes_the_nearest_colour_and_peers_get_the_same(module, work):
    programs = module("programs")
    tissue = immunohistochemistry()
    bundle = programs.write_bundle(work / "null", "null", tissue)
    paths = programs.write_programs(work, bundle)
    colours = np.array(programs.COLOURS)
    distance = ((tissue[..., None, :].astype(float) - colours) ** 2).sum(-1)
    pixels = torch.from_numpy(tissue).permute(2, 0, 1)[None].float()
    probabilities = torch.jit.load(paths["tiatoolbox"])(pixels)[0].numpy()
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    order = np.sort(distance, axis=-1)
    is_clear = order[..., 1] - order[..., 0] > 10  # of the rest rounding decides
    assert is_clear.mean() > 0.9
    np.testing.assert_array_equal(probabilities.argmax(0)[is_clear], distance.argmin(-1)[is_clear])
    assert paths["fast"].stat().st_size > 0


def test_the_floor_decodes_each_tile_under_a_patch_once(module, work):
    floor, make_slide, programs = module("floor"), module("make_slide"), module("programs")
    path = make_slide.write_big_slide(work / "floor.svs", (SIDE, SIDE), programs.MPP)
    bundle = programs.write_bundle(work / "null", "null", immunohistochemistry())
    with open_source(path) as slide:
        view = slide.at(programs.MPP)
        every = floor.grid_of(slide, bundle, overlap=128, tissue="none")
        corner = every.keep(np.arange(len(every)) == 0)  # the patch at (0, 0): 2 × 2 tiles
        patches = floor.read_patches(view, corner)
        np.testing.assert_array_equal(patches[0], view.read((0, 0), (512, 512)))
    assert len(every) == len(PatchGrid.cover((SIDE, SIDE), (512, 512), (128, 128)))
    tiles = floor.tiles_under(path, view, every)
    assert len(set(tiles)) == len(tiles) == (SIDE // 256) ** 2
    assert set(floor.tiles_under(path, view, corner)) == {tiles[i] for i in (0, 1, 4, 5)}
    assert floor.decode_seconds(path, tiles) > 0


def test_measure_tells_memory_and_the_last_object(module, tmp_path):
    measure = module("measure").measure
    code = """
import time
x = bytearray(b"1" * 300_000_000)
while time.process_time() < 0.5: pass
print('{"a": 1}')
"""
    measured = measure([sys.executable, "-c", code], tmp_path / "log")
    assert 0.3 < measured.peak_gb < 0.7
    assert 0.5 <= measured.cpu_seconds <= measured.seconds  # it has one thread
    assert measured.said == {"a": 1}
    with pytest.raises(SystemExit, match=r"ended with 3:\nlast words"):
        measure([sys.executable, "-c", "print('last words'); exit(3)"], tmp_path / "log")


def test_figures_are_medians_of_ratios_within_rounds_of_the_latest_code(module, tmp_path):
    tables, comparisons = module("tables"), module("comparisons")
    comparison = comparisons.COMPARISONS["null"]

    def record(turn, label, seconds, *, code="new", **facts):
        key = tables.job_key("null", label, comparison.jobs[label])
        common = {"peak_gb": 1.0, "cpu_seconds": seconds, "job_seconds": seconds, "agreement": 1.0}
        facts = {"seconds": seconds, **common, **facts}
        return {**key, "round": turn, "code": code, "date": "2020-02-03", "facts": facts}

    records = [
        record(0, "ours", 1, code="old"),
        record(0, "tiatoolbox", 999, code="old"),
        *(record(i, "ours", ours) for i, ours in enumerate([1, 2, 4])),
        *(record(i, "tiatoolbox", theirs) for i, theirs in enumerate([12, 22, 60])),
        record(3, "ours", 1000),  # its round is not whole
    ]
    (result,) = tables.finished({"null": comparison}, records)
    times = comparison.figures[0]
    assert [times.of(facts) for facts in result.rounds] == [12, 11, 15]
    table, numbers = tables.write_results({"null": comparison}, records, tmp_path, tissue="cloth")
    assert f"| {times.text} | **12** | 11 – 15 | ≥ 10 | met |" in table.read_text("utf-8")
    assert table.name.startswith("2020-02-03-")
    assert len(json.loads(numbers.read_text("utf-8"))["comparisons"]["null"]["rounds"]) == 3


@pytest.mark.slow
def test_a_comparison_runs_is_kept_and_is_told(work, tmp_path):
    options = ["--work", work, "--shrink", 16, "--rounds", 1, "--results", tmp_path]
    first = start("run.py", "patches", "null", *options)
    assert first.returncode == 0, first.stderr
    assert "null: left out; it needs --tiatoolbox" in first.stdout
    (record,) = records(work)
    # 1,024 px: tissue in the middle half, patches of 512 px at 0, 384 and 512: all nine touch it
    assert record["facts"]["patches"] == record["facts"]["predicted"] == 9
    again = start("run.py", "patches", "report", *options)
    assert again.returncode == 0, again.stderr
    assert records(work) == [record]
    (table,) = tmp_path.glob("*.md")
    assert "| patches predicted ÷ patches in the grid | **1** |" in table.read_text("utf-8")
    assert str(work) not in "".join(path.read_text("utf-8") for path in tmp_path.iterdir())


@pytest.mark.slow
def test_another_checkout_takes_turns_with_this_one(work, tmp_path):
    before, ran = tmp_path / "before", tmp_path / "ran"
    for part in ("wsi_pipeline", "models/lightmuseg-bcss-demo"):
        shutil.copytree(BENCHMARKS.parent / part, before / part)
    main = before / "wsi_pipeline" / "__main__.py"
    main.write_text(f"open({str(ran)!r}, 'a').write('x')\n{main.read_text('utf-8')}", "utf-8")
    options = ["--work", work, "--shrink", 16, "--rounds", 1, "--results", tmp_path / "results"]
    ended = start("run.py", "since", "report", *options, "--before", before)
    assert ended.returncode == 0, ended.stderr
    # by the one process that should
    assert ran.read_text("utf-8") == "x"
    facts = {r["label"]: r["facts"] for r in records(work) if r["comparison"] == "since"}
    assert facts["ours"]["patches"] == facts["ours before"]["patches"] > 0
    (table,) = (tmp_path / "results").glob("*.md")
    assert "| ours before | " in table.read_text("utf-8").partition("everything, a core")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_ends_well_without_one(work):
    ended = start("gpu.py", "--work", work)
    assert (ended.returncode, ended.stdout) == (0, "no CUDA GPU here: nothing to measure\n")


@pytest.mark.slow
def test_what_is_checked_on_a_gpu_runs_on_the_cpu(module, tmp_path):
    checks = module("gpu_checks").GROUPS
    out = tmp_path / "found.json"
    ended = start("gpu_checks.py", "check", "speed", "--device", "cpu", "--out", out)
    assert ended.returncode == 0, ended.stdout
    found = json.loads(out.read_text("utf-8"))
    assert list(found) == ["machine", *checks["check"].split(), *checks["speed"].split()]
    left_out = {name for name, value in found.items() if "left out" in value}
    assert left_out == {"small_gpu", "copies"}
    assert found["shortage"]["predictions"] == 64
    assert 0.2 < found["masks"]["foreground"] < 1
    assert found["passes"].keys() > {"1 channels", "5 channels, without the network"}


@pytest.mark.slow
def test_the_floor_comparison_runs_and_is_drawn(work, tmp_path):
    options = ["--work", work, "--shrink", 16, "--rounds", 1, "--results", tmp_path]
    ended = start("run.py", "floor", "report", *options)
    assert ended.returncode == 0, ended.stderr
    facts = {r["label"]: r["facts"] for r in records(work) if r["comparison"] == "floor"}
    assert facts["ours"]["patches"] == facts["floor"]["patches"]
    assert facts["stages"]["alone"].keys() == {"read", "write", "pyramid", "tiff"}
    assert facts["floor"]["floor_seconds"] == facts["floor"]["forward_seconds"] > 0
    (chart,) = tmp_path.glob("*.png")
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_gpu_benchmark_counts_patches(work, tmp_path):
    sizes = ["--size", SIDE, 512, "--slides", 2, "--rounds", 1]
    ended = start("gpu.py", "--device", "cpu", "--work", work, "--results", tmp_path, *sizes)
    assert ended.returncode == 0, ended.stderr
    (path,) = tmp_path.glob("*.json")
    (facts,) = json.loads(path.read_text("utf-8"))["rounds"]
    assert facts["patches"] == 2 * SIDE // 512


@pytest.mark.slow
def test_trained_networks_are_compared_by_patient(tmp_path):
    workflows = BENCHMARKS.parent / "workflows/train"
    pixels = {"A": [[60, 10], [10, 20]], "B": [[50, 0], [30, 20]]}  # rows true, columns predicted
    pairs = []
    for recipe, shift in (("bcss-compare.toml", 0), ("bcss-compare-unet.toml", 10)):
        for patient, ((rest, over), (missed, found)) in pixels.items():
            fold = tmp_path / recipe / ".training" / f"without_{patient}"
            fold.mkdir(parents=True)
            counts = {"pixels": [[rest, over], [missed - shift, found + shift]], "labels": []}
            counts |= {"images": [], "said": [], "sampled": []}
            (fold / "held_out.json").write_text(json.dumps({patient: counts}), "utf-8")
            rows = ["step,loss,held_out_dice", "20,1.5,", "40,1.25,0.5"]
            (fold / "history.csv").write_text("\n".join(rows), "utf-8")
        pairs.append(f"{workflows / recipe}={tmp_path / recipe}")
    output = tmp_path / "compared"
    run = start("compare_training.py", *pairs, "--output", output)
    assert run.returncode == 0, run.stderr
    said = output.with_suffix(".md").read_text("utf-8")
    assert said.strip() == run.stdout.strip()
    # 2 · found / (2 · found + over + missed), found / (found + over + missed), by hand
    assert "| A | 0.667 | 0.500 | 0.857 | 0.750 | 0.462 |" in said
    assert "| B | 0.571 | 0.400 | 0.750 | 0.600 | 0.667 |" in said
    assert "| **mean** | **0.619** | **0.450** | **0.804** | **0.675** | 0.564 |" in said
    assert "- lightmuseg (7.05 M): Dice 0.615 (0.571 to 0.667), IoU 0.444 (0.400 to 0.500)" in said
    assert "- unet (31.04 M): Dice 0.800 (0.750 to 0.857)" in said
    with Image.open(output.with_suffix(".png")) as picture:
        assert picture.format == "PNG"
    nothing = f"{workflows / 'bcss-compare.toml'}={tmp_path}"
    assert "no held-out patient" in start("compare_training.py", nothing, "--output", output).stderr


LEFT_OUT = """
[bundle]
name = "spots"
modality = "image"
network = "swish_unet"
network_options = { classes = 1, widths = [8, 16], channels = 1 }

[bundle.input]
fit = [64, 64]
channels = 1
patch_size = [64, 64]
overlap = [0, 0]
mean = [0.0]
std = [1.0]

[bundle.output]
activation = "sigmoid"
classes = [{ name = "Background" }, { name = "Lesion", color = [200, 0, 0] }]

[train]
steps = 4
batch_size = 2
crop = [64, 64]

[[data]]
patients = "^P\\\\d"
images = "P*.png"
masks = "masks"
classes = { Lesion = [255] }
"""


@pytest.mark.slow
def test_left_out_images_are_judged_anew_by_networks_that_have_not_seen_them(tmp_path):
    (tmp_path / "masks").mkdir()
    for i, name in enumerate(("P1_a", "P1_b", "P2_a")):
        mask = np.zeros((64, 64), np.uint8)
        mask[8:24, 8:24] = mask[40:56, 30:50] = 255
        Image.fromarray(mask // 2 + 40 + i).save(tmp_path / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.png")
    (tmp_path / "recipe.toml").write_text(LEFT_OUT, "utf-8")
    trained = CliRunner().invoke(
        group,
        ["-q", "train", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "out")],
        catch_exceptions=False,
    )
    assert trained.exit_code == 0, trained.output
    counted = np.zeros((2, 2))
    for path in (tmp_path / "out/.training").glob("*/held_out.json"):
        for told in json.loads(path.read_text("utf-8")).values():
            counted += np.array(told["pixels"])
    dice = 2 * counted[1, 1] / (counted[1].sum() + counted[:, 1].sum())
    run = start("left_out.py", tmp_path / "recipe.toml", tmp_path / "out", "--data", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "3 images" in run.stdout
    assert f"{dice:.3f} of all pixels" in run.stdout
    run = start(
        "left_out.py", tmp_path / "recipe.toml", tmp_path / "out", "--data", tmp_path,
        "--only", "_a", "--mirrored",
    )  # fmt: skip
    assert "2 images" in run.stdout
    for arguments in (("--only", "none"), ()):
        place = tmp_path / "out" if arguments else tmp_path
        run = start("left_out.py", tmp_path / "recipe.toml", place, "--data", tmp_path, *arguments)
        assert run.returncode == 2
        assert "is through, or no image is named so" in run.stderr


def test_a_lesion_is_found_where_a_tenth_of_the_union_is_shared(module):
    found_at = module("left_out").found_at
    truth, chance = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.float32)
    truth[0:10, 0:10] = 1
    truth[20:30, 0:10] = 1
    truth[:, 30:] = 255
    chance[0:10, 5:15] = 0.9  # 100 px, 50 of 150
    chance[29:31, 9:30] = 0.8  # 42 px, 1 of 141
    chance[0:10, 32:40] = 0.9  # where nothing is known
    assert found_at(chance, truth, 1) == (2, 1, 1)
    assert found_at(chance, truth, 43) == (2, 1, 0)
    assert found_at(chance, truth, 101) == (2, 0, 0)
