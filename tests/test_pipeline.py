"""The main job against independent oracles: the pixels themselves, and one canvas in memory."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openslide
import pytest
import shapely
import tifffile
import torch
import zarr
from bundles import (
    Busy,
    Coarse,
    blended_canvas,
    classify,
    lightmuseg_bundle,
    pointwise_bundle,
    small_unet_bundle,
)
from click.testing import CliRunner
from rasterio.features import rasterize
from runs import segment_job
from scipy.ndimage import map_coordinates

from wsi_pipeline import segment
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError, DeviceError, SourceError, StoreError
from wsi_pipeline.inference import ensemble
from wsi_pipeline.options import (
    ExportOptions,
    PredictOptions,
    ScheduleOptions,
    SelectOptions,
    Settings,
)
from wsi_pipeline.report.record import load_run
from wsi_pipeline.run.batch import segment_jobs
from wsi_pipeline.run.jobs import plan_jobs
from wsi_pipeline.run.tile import tile
from wsi_pipeline.run.worker import BlockWorker
from wsi_pipeline.schedule.cluster import open_cluster
from wsi_pipeline.sources import open_source

EXACT = ExportOptions(simplify_um=0, min_area_um2=0)
MASK_ONLY = ExportOptions(outputs=("zarr",))
EVERYWHERE = SelectOptions(tissue="none")


def run(slide, bundle, output, *, workers=1, select=EVERYWHERE, export=MASK_ONLY, **predict):
    options = {"precision": "fp32", "device": "cpu", "block_size": 1024} | predict
    settings = Settings(select=select, predict=PredictOptions(**options), export=export)
    (job,) = plan_jobs([Path(slide)], Path(output))
    with open_cluster(ScheduleOptions(workers=workers)) as client:
        return job.folder, segment_job(
            job, load_bundle(bundle), client=client, settings=settings, threads=workers
        )


def mask_of(folder):
    return zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]


def openslide_pixels(path):
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


COMBINATIONS = [
    # patch, overlap, blend, block, workers
    (256, 32, "gaussian", 1024, 1),
    (192, 96, "constant", 1024, 2),
    (320, 0, "crop", 2048, 1),
    (224, 100, "crop", 1024, 3),
    (512, 128, "gaussian", 4096, 1),
    (101, 7, "gaussian", 2048, 2),
    (640, 63, "constant", 3072, 2),
]


@pytest.mark.parametrize(("patch", "overlap", "blend", "block", "workers"), COMBINATIONS)
def test_a_pointwise_network_gives_the_same_function_of_openslides_pixels(
    tmp_path, cmu_path, patch, overlap, blend, block, workers
):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.499, patch_size=patch, overlap=overlap)
    folder, _ = run(
        cmu_path, bundle, tmp_path / "out", blend=blend, block_size=block, workers=workers
    )
    mask, expected = mask_of(folder), classify(openslide_pixels(cmu_path))
    assert mask.shape == expected.shape == (2967, 2220)
    same = mask == expected
    assert same.mean() >= 0.999
    for y in range(0, 2967, 256):
        for x in range(0, 2220, 256):
            assert same[y : y + 256, x : x + 256].mean() >= 0.98
    assert np.bincount(expected.ravel()).min() > 10_000  # every class is really there


def test_all_slides_and_files_are_told_of(tmp_path, slide_path):
    bundle = load_bundle(pointwise_bundle(tmp_path / "model", mpp=1.0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.tif").symlink_to(slide_path)
    jobs = plan_jobs([slide_path, tmp_path / "other" / "b.tif"], tmp_path / "out")
    told = {job: [] for job in jobs}
    with open_cluster(ScheduleOptions()) as client:
        runs = segment_jobs(
            jobs,
            bundle,
            client=client,
            settings=Settings(select=EVERYWHERE, predict=PredictOptions(mask_mpp=1.0)),
            progress=lambda job, done, total: told[job].append((done, total)),
            stage=lambda job, text: told[job].append(text),
        )
        assert [job for job, run in runs if run.status == "done"] == jobs
    for job in jobs:
        files = [text.removeprefix("writing ") for text in told[job] if isinstance(text, str)]
        assert files == [
            "mask.ome.zarr", "annotations.geojson", "mask.ome.tif", "overlay.png",
            "probability.ome.zarr",
        ]  # fmt: skip
        patches = told[job][: -len(files)]
        assert patches[0][0] == 0
        assert patches[-1] == (6, 6)  # of 483 × 372 px


def test_the_network_is_built_once_while_the_first_slide_is_planned(
    tmp_path, slide_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    bundle = load_bundle(pointwise_bundle(tmp_path / "model", mpp=1.0).relative_to(tmp_path))
    Path("b.tif").symlink_to(slide_path)
    steps = []

    def spy(of, name):
        real = getattr(of, name)

        def called(*args, **options):
            steps.append(name)
            return real(*args, **options)

        monkeypatch.setattr(of, name, called)

    spy(ensemble, "open_predictor")
    spy(BlockWorker, "__init__")
    with open_cluster(ScheduleOptions()) as client:
        jobs = plan_jobs([slide_path, Path("b.tif")], tmp_path / "out")
        runs = segment_jobs(jobs, bundle, client=client, settings=Settings(select=EVERYWHERE))
        assert [run.status for _, run in runs] == ["done", "done"]
    assert steps == ["open_predictor", "__init__", "__init__"]


def test_on_a_lossless_slide_every_pixel_is_right(tmp_path, slide_path, slide_pixels):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25, patch_size=200, overlap=30)
    folder, _ = run(slide_path, bundle, tmp_path / "out")
    assert (mask_of(folder) == classify(slide_pixels)).all()


def one_shot(slide_path, bundle_path, *, mpp, overlap):
    field = blended_canvas(slide_path, bundle_path, overlap=overlap)
    with open_source(slide_path) as slide:
        (fy, fx), (width, height) = slide.at(mpp, tolerance=0.02).downsample, slide.size
    yy = (np.arange(height) + 0.5) / fy - 0.5
    xx = (np.arange(width) + 0.5) / fx - 0.5
    where = np.meshgrid(yy, xx, indexing="ij")
    full = [map_coordinates(f, where, order=1, mode="nearest") for f in field]
    return np.argmax(full, axis=0)


# that of the slide itself takes four times as long, and runs of pointwise models have it as well
@pytest.mark.parametrize(
    "mpp", [0.37, *(pytest.param(m, marks=pytest.mark.slow) for m in (0.5, 0.25))]
)
def test_blocks_equal_one_canvas_and_know_no_block_size_or_worker(tmp_path, slide_path, mpp):
    overlap = 24
    bundle = lightmuseg_bundle(tmp_path / "model", mpp=mpp, patch_size=256, overlap=overlap)
    expected = one_shot(slide_path, bundle, mpp=mpp, overlap=overlap)
    assert np.bincount(expected.ravel(), minlength=3).min() > 0.01 * expected.size
    masks = []
    for number, (block, workers) in enumerate([(1024, 1), (2048, 1), (1024, 2)]):
        folder, made = run(
            slide_path, bundle, tmp_path / str(number), block_size=block, workers=workers
        )
        masks.append(mask_of(folder))
        if workers == 1:
            assert made.patches["predicted"] == made.patches["kept"]
    assert (masks[0] == expected).mean() >= 0.9999
    assert (masks[0] == masks[1]).all()
    assert (masks[0] == masks[2]).all()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, slide_path):
    """Return the folder of a run with all outputs, exact polygons, and the run."""
    place = tmp_path_factory.mktemp("whole")
    bundle = pointwise_bundle(place / "model", mpp=0.25, patch_size=300, overlap=40)
    return run(slide_path, bundle, place / "out", export=EXACT, select=SelectOptions())


def test_the_whole_tree_is_written(whole_run, slide_path):
    folder, made = whole_run
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "mask.ome.zarr", "mask.ome.tif", "annotations.geojson",
        "regions.csv", "overlay.png", "probability.ome.zarr", "run.json", ".store",
    }  # fmt: skip
    assert folder.name == slide_path.stem
    facts = json.loads((folder / "run.json").read_text("utf-8"))
    assert facts["status"] == made.status == "done"
    assert facts["slide"]["size"] == [1931, 1487]
    assert facts["patches"]["predicted"] <= facts["patches"]["kept"] < facts["patches"]["grid"]


def test_all_outputs_tell_the_same(whole_run):
    folder, made = whole_run
    mask = mask_of(folder)
    assert (tifffile.imread(folder / "mask.ome.tif") == mask).all()
    collection = json.loads((folder / "annotations.geojson").read_text("utf-8"))
    value = {"Tumor": 1, "Stroma": 2}
    shapes = [
        (shapely.geometry.shape(f["geometry"]), value[f["properties"]["classification"]["name"]])
        for f in collection["features"]
    ]
    assert (rasterize(shapes, out_shape=mask.shape, dtype=np.uint8) == mask).all()
    for name, index in value.items():
        pixels = int((mask == index).sum())
        assert sum(s.area for s, v in shapes if v == index) == pixels > 1000
        assert made.area_mm2[name] == pytest.approx(pixels * 0.25**2 * 1e-6)
        assert made.regions[name] == sum(v == index for _, v in shapes)


def test_what_is_no_tissue_stays_background(whole_run, slide_pixels):
    folder, _ = whole_run
    mask, everywhere = mask_of(folder), classify(slide_pixels)
    assert ((mask == everywhere) | (mask == 0)).all()
    assert (mask == everywhere).mean() > 0.999  # nothing but specks lies off the tissue


def test_running_again_does_nothing_and_other_exports_infer_nothing(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.5)
    output = tmp_path / "out"
    folder, first = run(slide_path, bundle, output, export=ExportOptions())
    ledger = {p: p.stat().st_mtime_ns for p in (folder / ".store" / "blocks").iterdir()}
    polygons = (folder / "annotations.geojson").stat().st_mtime_ns
    mask = mask_of(folder)
    _, again = run(slide_path, bundle, output, export=ExportOptions())
    assert again == first
    assert (folder / "annotations.geojson").stat().st_mtime_ns == polygons
    run(slide_path, bundle, output, export=EXACT)
    assert (folder / "annotations.geojson").stat().st_mtime_ns > polygons
    other = SelectOptions(tissue="none", frame="openslide")
    run(slide_path, bundle, output, select=other, export=ExportOptions(frame="openslide"))
    assert {p: p.stat().st_mtime_ns for p in (folder / ".store" / "blocks").iterdir()} == ledger
    assert (mask_of(folder) == mask).all()


def test_other_settings_leave_no_file_of_the_first(tmp_path, slide_path):
    output = tmp_path / "out"
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.5)
    folder, _ = run(slide_path, bundle, output, export=ExportOptions(tiff="asap"))
    assert (folder / "mask.asap.tif").is_file()
    few = ExportOptions(outputs=("zarr", "geojson"))
    run(slide_path, bundle, output, export=few, mask_mpp=1.0)
    assert {p.name for p in folder.iterdir()} == {
        "mask.ome.zarr", "annotations.geojson", "regions.csv", "run.json", ".store",
    }  # fmt: skip


def change_toml(bundle, old, new):
    text = (bundle / "model.toml").read_text("utf-8")
    assert old in text
    (bundle / "model.toml").write_text(text.replace(old, new), "utf-8")


def other_name(bundle):
    change_toml(bundle, "test-model", "another")


def other_weights(bundle):
    torch.jit.script(Busy()).save(bundle / "program.pt")


def other_input(bundle):
    change_toml(bundle, "overlap = [32, 32]", "overlap = [16, 16]")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, slide_path):
    """Return a folder with a model, and what the command has made by it."""
    place = tmp_path_factory.mktemp("plain")
    bundle = pointwise_bundle(place / "model", mpp=0.5)
    line = ["-q", "segment", slide_path, "--model", bundle, "--output", place / "out"]
    assert CliRunner().invoke(group, [*map(str, line)]).exit_code == 0
    return place


@pytest.mark.parametrize("change", [other_name, other_weights, other_input])
def test_another_model_is_refused_like_another_slide(tmp_path, slide_path, plain_run, change):
    place = shutil.copytree(plain_run, tmp_path / "place")
    bundle = place / "model"
    line = ["segment", slide_path, "--model", bundle, "--output", place / "out"]

    def call(*options):
        return CliRunner().invoke(group, ["-q", *map(str, line), *options])

    (folder,) = (path for path in (place / "out").iterdir() if path.is_dir())
    change(bundle)
    for lost in (None, ".store"):
        if lost:
            shutil.rmtree(folder / lost)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        refused, dry = call(), call("--dry-run")
        assert (refused.exit_code, dry.exit_code) == (1, 1)
        told = "holds the run of another model, test-model; choose another --output, or --overwrite"
        assert f"failed: {slide_path}: {folder} {told}" in refused.stderr
        assert f"would fail: {folder} {told}" in dry.stdout
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before | {
            p: p.read_bytes() for p in (folder / ".store").glob(".lock")
        }
    assert call("--overwrite", "--dry-run").exit_code == 0
    assert call("--overwrite").exit_code == 0
    made = load_run(folder / "run.json")
    bytes_of = (bundle / "program.pt").read_bytes()
    assert made.model["weights_sha256"] == hashlib.sha256(bytes_of).hexdigest()
    with (place / "out" / "summary.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["weights"]) == (made.model["name"], made.model["weights_sha256"])
    mask = mask_of(folder)
    tissue = made.tissue_mm2
    for index, name in enumerate(("Tumor", "Stroma"), start=1):
        percent = 100 * (mask == index).sum() * 0.25**2 * 1e-6 / tissue
        assert float(row[f"tissue_percent_{name}"]) == pytest.approx(percent, abs=1e-3)
        text = (folder / "annotations.geojson").read_text("utf-8")
        features = json.loads(text)["features"]
        named = [f["properties"]["classification"]["name"] for f in features]
        assert int(row[f"regions_{name}"]) == named.count(name)


def test_what_a_model_may_not_be_trusted_with_costs_no_prediction(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.5)
    folder, made = run(slide_path, bundle, tmp_path / "out")
    assert "limits" not in made.model
    blocks = {p: p.stat().st_mtime_ns for p in (folder / ".store" / "blocks").iterdir()}
    change_toml(bundle, "modality", 'limits = """\nFour\n  patients."""\nmodality')
    _, made = run(slide_path, bundle, tmp_path / "out")
    assert made.model["limits"] == "Four patients."
    assert blocks == {p: p.stat().st_mtime_ns for p in (folder / ".store" / "blocks").iterdir()}


def slides_in_turn(tmp_path, make_slide, slide_pixels):
    """Return a slide of several blocks, and another that may take its place."""
    pixels = np.tile(slide_pixels, (2, 2, 1))
    return (
        make_slide(tmp_path / "slide.tif", pixels, 0.25, levels=(1, 8)),
        make_slide(tmp_path / "other.tif", pixels[::-1, ::-1], 0.25, levels=(1, 8)),
        pixels,
    )


def segment_and(what, slide, bundle, output):
    """Segment a slide, and do something when the first block is done; return the run."""
    done = []

    def progress(job, patches, total):
        if patches and not done:
            done.append(what())

    predict = PredictOptions(precision="fp32", device="cpu", block_size=1024)
    settings = Settings(select=EVERYWHERE, predict=predict, export=MASK_ONLY)
    with open_cluster(ScheduleOptions()) as client:
        ((_, made),) = segment_jobs(
            plan_jobs([slide], output),
            load_bundle(bundle),
            client=client,
            settings=settings,
            threads=1,
            progress=progress,
        )
    assert done
    return made


def replaced(path, by):
    os.replace(shutil.copy(by, path.with_name("by")), path)  # in one step: never seen half copied
    return True


def written_over(path, by):
    path.write_bytes(by.read_bytes())
    return True


@pytest.mark.parametrize("replace_by", [replaced, written_over])
def test_a_slide_that_is_replaced_on_the_way_is_never_done(
    tmp_path, make_slide, slide_pixels, replace_by
):
    slide, other, pixels = slides_in_turn(tmp_path, make_slide, slide_pixels)
    first = shutil.copy(slide, tmp_path / "first.tif")
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25)
    made = segment_and(lambda: replace_by(slide, other), slide, bundle, tmp_path / "out")
    assert made.status == "failed"
    if replace_by is replaced:  # else a tile may be read half written, too
        assert made.reason.startswith("its content was replaced while it was segmented; put the")
    shutil.copy(first, slide)
    folder, made = run(slide, bundle, tmp_path / "out")
    assert made.status == "done"
    assert (mask_of(folder) == classify(pixels)).all()


def test_a_slide_that_is_replaced_behind_the_last_block_is_not_done(
    tmp_path, make_slide, slide_pixels
):
    slide, other, _ = slides_in_turn(tmp_path, make_slide, slide_pixels)
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25)

    def progress(patches, total):
        if patches == total:
            replaced(slide, other)

    (job,) = plan_jobs([slide], tmp_path / "out")
    settings = Settings(select=EVERYWHERE, export=MASK_ONLY)
    with open_cluster(ScheduleOptions()) as client, pytest.raises(SourceError, match="replaced"):
        segment_job(job, load_bundle(bundle), client=client, settings=settings, progress=progress)
    assert not list((job.folder / ".store").glob("blocks/*"))


@pytest.mark.parametrize("change", [other_weights, other_input])
def test_a_model_that_is_replaced_on_the_way_is_never_taken_for_the_first(
    tmp_path, slide_path, change
):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25)
    loaded = load_bundle(bundle)
    digest = loaded.weights_sha256
    change(bundle)
    (job,) = plan_jobs([slide_path], tmp_path / "out")
    with open_cluster(ScheduleOptions()) as client, pytest.raises(BundleError, match="replaced"):
        segment_job(job, loaded, client=client, settings=Settings(export=MASK_ONLY))
    made = segment_now(job, bundle)
    if change is other_weights:
        assert made.model["weights_sha256"] != digest
    else:
        assert made.model["input"]["overlap"] == [16, 16]


def segment_now(job, bundle):
    with open_cluster(ScheduleOptions()) as client:
        return segment_job(
            job, load_bundle(bundle), client=client, settings=Settings(export=MASK_ONLY)
        )


def test_augmentation_is_part_of_a_run_and_its_cost_is_told(tmp_path, slide_path):
    bundle = small_unet_bundle(tmp_path / "m", patch_size=64)
    made = shutil.copytree(bundle, tmp_path / "made")
    toml = (made / "model.toml").read_text("utf-8")
    (made / "model.toml").write_text(f'tta = "mirror"\n{toml}', "utf-8")
    found = {}
    for name, model, options in [
        ("plain", bundle, []), ("asked", bundle, ["--tta", "mirror"]), ("made", made, []),
        ("again", made, ["--tta", "none"]), ("turned", bundle, ["--tta", "d4"]),
    ]:  # fmt: skip
        line = ["segment", str(slide_path), "--model", str(model), "--outputs", "zarr,probability"]
        line += ["--mask-mpp", "0.5", "--precision", "fp32", *options]
        output = tmp_path / name
        done = CliRunner().invoke(group, [*line, "--output", str(output)])
        assert done.exit_code == 0, done.output
        run = output / "synthetic slide"
        planes = np.asarray(zarr.open(run / "probability.ome.zarr", mode="r")["0"])
        found[name] = planes, json.loads((run / "run.json").read_text("utf-8"))["settings"]
    assert {name: s["predict"]["tta"] for name, (_, s) in found.items()} == {
        "plain": "none", "asked": "mirror", "made": "mirror", "again": "none", "turned": "d4",
    }  # fmt: skip
    assert (found["asked"][0] == found["made"][0]).all()
    assert (found["plain"][0] == found["again"][0]).all()
    assert (found["plain"][0] != found["asked"][0]).any()
    assert (found["turned"][0] != found["asked"][0]).any()
    assert len({s["key"] for _, s in found.values()}) == 5
    # what was whole by another way of looking is done anew
    line = ["segment", str(slide_path), "--model", str(bundle), "--outputs", "zarr,probability"]
    line += [
        "--output",
        str(tmp_path / "plain"),
        "--mask-mpp",
        "0.5",
        "--precision",
        "fp32",
        "--tta",
        "d4",
    ]
    told = CliRunner().invoke(group, [*line, "--dry-run"])
    assert "each predicted 8 times (--tta d4)" in told.output
    assert CliRunner().invoke(group, line).exit_code == 0
    again = zarr.open(tmp_path / "plain" / "synthetic slide" / "probability.ome.zarr", mode="r")
    assert (np.asarray(again["0"]) == found["turned"][0]).all()
    (made / "model.toml").write_text(toml.replace("[64, 64]", "[64, 96]"), "utf-8")
    refused = CliRunner().invoke(group, [*line[:3], str(made), *line[4:]])
    assert refused.exit_code != 0
    assert 'along y and x they have (64, 96); expected the same, or tta "mirror"' in refused.output


def test_a_lost_mask_is_made_again(tmp_path, slide_path, slide_pixels):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25)
    folder, _ = run(slide_path, bundle, tmp_path / "out")
    shutil.rmtree(folder / "mask.ome.zarr")
    run(slide_path, bundle, tmp_path / "out")
    assert (mask_of(folder) == classify(slide_pixels)).all()


@pytest.mark.parametrize(
    ("mpp", "make_bundle"),
    [(0.25, pointwise_bundle), (0.5, pointwise_bundle), (0.61, lightmuseg_bundle)],
)
def test_a_stored_grid_gives_the_slides_mask(tmp_path, slide_path, mpp, make_bundle):
    bundle = make_bundle(tmp_path / "model", mpp=mpp, patch_size=160, overlap=16)
    select = SelectOptions()
    grid = tmp_path / f"{slide_path.stem}.zarr"
    tile(slide_path, grid, mpp=mpp, patch_size=160, overlap=16, select=select)
    direct, _ = run(slide_path, bundle, tmp_path / "a", select=select)
    stored, made = run(grid, bundle, tmp_path / "b", select=select)
    assert made.slide["size"] == [1931, 1487]
    assert (mask_of(direct) == mask_of(stored)).all()


@pytest.mark.parametrize("what", ["folder", "noted grid", "slide"])
def test_tile_replaces_nothing_but_grids(tmp_path, slide_path, what):
    target = tmp_path / "grid.zarr"
    options = {"mpp": 1.0, "patch_size": 128, "overlap": 0, "select": SelectOptions()}
    source = slide_path
    if what != "folder":
        tile(slide_path, target, **options)
        tile(slide_path, target, **options)
    if what == "slide":
        source = target
    else:
        target.mkdir(exist_ok=True)
        (target / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
    with pytest.raises(StoreError, match="choose another --output"):
        tile(source, target, **options)
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before


def test_a_mask_may_be_coarser_than_the_slide(tmp_path, slide_path, slide_pixels):
    bundle = pointwise_bundle(tmp_path / "model", mpp=1.0, patch_size=100, overlap=10)
    folder, made = run(slide_path, bundle, tmp_path / "out", mask_mpp=1.0, export=EXACT)
    mask = mask_of(folder)
    assert mask.shape == (372, 483)
    means = slide_pixels[: 371 * 4, : 482 * 4].reshape(371, 4, 482, 4, 3).mean((1, 3))
    assert (mask[:371, :482] == classify(np.rint(means))).mean() > 0.999
    collection = json.loads((folder / "annotations.geojson").read_text("utf-8"))
    area = sum(shapely.geometry.shape(f["geometry"]).area for f in collection["features"])
    assert area == (mask > 0).sum() * 16
    assert sum(made.area_mm2.values()) == pytest.approx(area * 0.25**2 * 1e-6)


def test_the_roi_limits_the_mask_to_the_pixel(tmp_path, slide_path, slide_pixels):
    roi = shapely.Polygon([(400.5, 300.5), (1200.5, 500.5), (700.5, 1100.5)])
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps(shapely.geometry.mapping(roi)))
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25)
    folder, _ = run(
        slide_path, bundle, tmp_path / "out", select=SelectOptions(tissue="none", roi=path)
    )
    inside = rasterize([roi], out_shape=slide_pixels.shape[:2]).astype(bool)
    assert (mask_of(folder) == np.where(inside, classify(slide_pixels), 0)).all()


def test_what_is_ignored_in_the_roi_is_background(tmp_path, slide_path, slide_pixels):
    drawn = [(shapely.box(301, 403, 901, 1203), "Tumor"), (shapely.box(500, 600, 700, 800), "Pen*")]
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(polygon),
            "properties": {"classification": {"name": name}},
        }
        for polygon, name in drawn
    ]
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps(features))
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25)
    folder, _ = run(
        slide_path, bundle, tmp_path / "out", select=SelectOptions(tissue="none", roi=path)
    )
    inside = np.zeros(slide_pixels.shape[:2], bool)
    inside[403:1203, 301:901] = True
    inside[600:800, 500:700] = False
    assert (mask_of(folder) == np.where(inside, classify(slide_pixels), 0)).all()


def test_a_roi_without_tissue_is_said_to_be_one(tmp_path, slide_path):
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps(shapely.geometry.mapping(shapely.box(1850, 1400, 1930, 1480))))
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.5)
    _, made = run(slide_path, bundle, tmp_path / "out", select=SelectOptions(roi=path))
    assert made.warnings == ["no tissue found in the ROI; --tissue none looks everywhere"]


def cli(*arguments):
    return [sys.executable, "-m", "wsi_pipeline", *map(str, arguments)]


@pytest.mark.slow
def test_a_kill_in_the_middle_loses_nothing(tmp_path, make_slide, slide_pixels):
    """R10 too: what was done keeps its modification time."""
    slide = make_slide(
        tmp_path / "slide.tif", np.tile(slide_pixels, (2, 2, 1)), 0.25, levels=(1, 8)
    )
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25, patch_size=256, program=Busy)
    arguments = ["--model", bundle, "--block-size", 1024, "--tissue", "none", "--device", "cpu"]
    command = cli("-q", "segment", slide, "--output", tmp_path / "killed", *arguments)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    blocks = tmp_path / "killed" / "slide" / ".store" / "blocks"
    deadline = time.monotonic() + 120
    while len(list(blocks.glob("[0-9]*.npz"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p.name: p.stat().st_mtime_ns for p in blocks.glob("[0-9]*.npz")}
    assert 2 <= len(done) < 12  # of 3 × 4
    folder = tmp_path / "killed" / "slide"
    assert {p.name for p in folder.iterdir()} == {".store"}  # no output before it is whole
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert done.items() <= {p.name: p.stat().st_mtime_ns for p in blocks.iterdir()}.items()
    undisturbed = cli("-q", "segment", slide, "--output", tmp_path / "calm", *arguments)
    assert subprocess.run(undisturbed).returncode == 0
    calm = tmp_path / "calm" / "slide"
    assert (mask_of(folder) == mask_of(calm)).all()
    assert (mask_of(folder) == classify(np.tile(slide_pixels, (2, 2, 1)))).all()
    name = "annotations.geojson"
    assert (folder / name).read_bytes() == (calm / name).read_bytes()


def test_bad_slides_cost_no_other(tmp_path, slide_path, make_slide, slide_pixels):
    """R9: one bad slide ends a peer's batch."""
    slides = tmp_path / "slides"
    slides.mkdir()
    shutil.copy(slide_path, slides / "b good é.tif")
    whole = slide_path.read_bytes()
    (slides / "a truncated.tif").write_bytes(whole[: len(whole) // 2])
    (slides / "c noise.svs").write_bytes(np.random.default_rng(0).bytes(100_000))
    (slides / "d empty.svs").write_bytes(b"")
    (slides / "notes.docx").write_bytes(b"no slide")
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25)
    output = tmp_path / "out put"
    command = cli("segment", slides, "--model", bundle, "--output", output)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr + result.stdout
    failures = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 3
    for name in ("a truncated", "c noise", "d empty"):
        assert sum(name in line for line in failures) == 1
    assert (mask_of(output / "b good é") == classify(slide_pixels)).mean() > 0.999
    with (output / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "a truncated.tif": "failed",
        "b good é.tif": "done",
        "c noise.svs": "failed",
        "d empty.svs": "failed",
    }
    report = (output / "report.html").read_text("utf-8")
    assert "a truncated.tif" in report
    assert "truncated:" in report


def test_a_slide_without_mpp_is_refused_in_one_sentence(tmp_path, slide_pixels):
    """R7: peers guess in silence."""
    path = tmp_path / "bare.tif"
    tifffile.imwrite(path, slide_pixels, tile=(256, 256), photometric="rgb")
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.5)
    command = cli("segment", path, "--model", bundle, "--output", tmp_path / "out")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("failed")]
    assert "--mpp" in line
    assert "Traceback" not in result.stderr
    again = subprocess.run([*command, "--mpp", "0.25"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert mask_of(tmp_path / "out" / "bare").shape == slide_pixels.shape[:2]


def test_a_failing_export_costs_nothing_else(tmp_path, slide_path, monkeypatch):
    """R11: the mask and the other outputs are whole, the failure is named and mended later."""

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    bundle = pointwise_bundle(tmp_path / "model", mpp=0.5)
    with monkeypatch.context() as patch:
        patch.setattr("wsi_pipeline.export.ome_tiff.write_ome_tiff", fail)
        folder, made = run(slide_path, bundle, tmp_path / "out", export=ExportOptions())
    assert made.status == "failed"
    assert made.reason == f"cannot write to {folder / 'mask.ome.tif'}: No space left on device"
    assert (folder / "annotations.geojson").is_file()
    assert (folder / "overlay.png").is_file()
    _, again = run(slide_path, bundle, tmp_path / "out", export=ExportOptions())
    assert again.status == "done"
    assert (tifffile.imread(folder / "mask.ome.tif") == mask_of(folder)).all()


PEAK = """
import sys
from peak import peak_bytes
from wsi_pipeline.cli import group
try:
    group(sys.argv[1:])
finally:
    print(peak_bytes() // 2**20)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_slide(tmp_path, make_big_slide):
    bundle = pointwise_bundle(
        tmp_path / "model", mpp=0.5, patch_size=512, overlap=64, program=Coarse
    )
    peaks = {}
    for side in (8192, 16384):
        slide = make_big_slide(tmp_path / f"{side}.tif", (side, side), 0.5)
        arguments = ["-q", "segment", slide, "--model", bundle, "--output", tmp_path / "out"]
        command = [sys.executable, "-c", PEAK, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        assert result.returncode == 0, result.stderr
        peaks[side] = int(result.stdout.split()[-1])
    assert peaks[16384] < 2048, peaks
    assert peaks[16384] <= 1.15 * peaks[8192], peaks


def test_the_frame_is_the_viewers(tmp_path, bounded, slide_pixels):
    """O1, O3 and O4 of the checklist, and the crop of the TIFF."""
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25)
    found = {}
    for frame in ("qupath", "openslide"):
        export = ExportOptions(simplify_um=0, min_area_um2=0, frame=frame)
        folder, made = run(bounded, bundle, tmp_path / frame, export=export)
        collection = json.loads((folder / "annotations.geojson").read_text("utf-8"))
        union = shapely.union_all(
            [shapely.geometry.shape(f["geometry"]) for f in collection["features"]]
        )
        found[frame] = union
        assert made.frame == {
            "for": frame, "offset": [301, 257] if frame == "qupath" else [0, 0],
        }  # fmt: skip
        whole = classify(slide_pixels)
        assert (mask_of(folder) == whole).all()
        expected = whole[257:1257, 301:1501] if frame == "qupath" else whole
        assert (tifffile.imread(folder / "mask.ome.tif") == expected).all()
    clipped = shapely.intersection(found["openslide"], shapely.box(301, 257, 1501, 1257))
    moved = shapely.transform(clipped, lambda xy: xy - np.array([301, 257]))
    assert shapely.symmetric_difference(found["qupath"], moved).area == 0
    assert moved.area > 100_000
    x0, y0, x1, y1 = found["qupath"].bounds
    assert min(x0, y0) >= 0
    assert x1 <= 1200
    assert y1 <= 1000


def test_a_roi_is_read_in_the_frame_we_write(tmp_path, bounded, slide_pixels):
    roi = shapely.box(100, 50, 700, 900)  # as drawn in QuPath, which crops
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps(shapely.geometry.mapping(roi)))
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25)
    select = SelectOptions(tissue="none", roi=path, frame="qupath")
    folder, _ = run(bounded, bundle, tmp_path / "out", select=select)
    expected = np.zeros(slide_pixels.shape[:2], np.uint8)
    expected[307:1157, 401:1001] = classify(slide_pixels)[307:1157, 401:1001]
    assert (mask_of(folder) == expected).all()


@pytest.mark.slow
def test_a_mask_is_of_one_number_format_whatever_machine_goes_on(tmp_path, slide_path, monkeypatch):
    lightmuseg_bundle(tmp_path / "model", mpp=1.0)
    folder = tmp_path / "out" / slide_path.stem
    blocks = folder / ".store" / "blocks"

    def segment_on(*, has_bf16, **options):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: has_bf16)
        (run,) = segment(
            slide_path, model=tmp_path / "model", output=tmp_path / "out", device="cpu",
            block_size=1024, tissue="none", outputs=("zarr",), **options,
        )  # fmt: skip
        assert run.status == "done"
        return run.settings["predict"]["precision"], [c[:4] for c in run.certificate["computed"]]

    assert segment_on(has_bf16=False) == ("fp32", ["fp32"])
    done = {p.name: p.stat().st_mtime_ns for p in blocks.iterdir()}
    assert len(done) > 1
    # finished elsewhere is finished
    assert segment_on(has_bf16=True) == ("fp32", ["fp32"])
    assert {p.name: p.stat().st_mtime_ns for p in blocks.iterdir()} == done
    # and what was begun goes on as it was
    (folder / "run.json").unlink()
    (folder / "mask.ome.zarr" / "0" / "0" / "0").write_bytes(b"")
    assert segment_on(has_bf16=True) == ("fp32", ["fp32"])
    after = {p.name: p.stat().st_mtime_ns for p in blocks.iterdir()}
    assert {name for name in done if after[name] != done[name]} == {"00000_00000.npz"}
    # who names another format, or starts anew, gets it for the whole mask
    assert segment_on(has_bf16=True, overwrite=True) == ("bf16", ["bf16"])
    assert segment_on(has_bf16=True, precision="fp32") == ("fp32", ["fp32"])


class Overflowing(torch.nn.Module):
    """Logits of which some are beyond all numbers, as fp16 makes them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1 / (x - x[:, :, :1, :1]).abs().clamp(max=1)


def test_logits_beyond_all_numbers_are_no_background(tmp_path, slide_path):
    model = pointwise_bundle(tmp_path / "model", mpp=1.0, patch_size=64, program=Overflowing)
    told = (model / "model.toml").read_text("utf-8")
    told = told.replace("[input]", '[input]\nconvention = "nnunet"')
    (model / "model.toml").write_text(told, "utf-8")
    (made,) = segment(slide_path, model=model, output=tmp_path / "out", tissue="none", device="cpu")
    assert made.status == "failed"
    assert "values that are no numbers; try `models check`" in made.reason


def test_a_gpu_that_is_lost_ends_the_run_wherever_that_is_seen(tmp_path, slide_path, monkeypatch):
    """What a card computes is waited for where its answer is fetched, and there CUDA raises."""

    def lost(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with ...")

    monkeypatch.setattr("wsi_pipeline.run.worker.best_class", lost)
    model = pointwise_bundle(tmp_path / "model", mpp=1.0)
    with pytest.raises(DeviceError, match=r"cpu failed: .* illegal memory access$"):
        segment(slide_path, model=model, output=tmp_path / "out", tissue="none", device="cpu")
