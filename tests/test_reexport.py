"""Outputs written again: the very files that `segment` writes with those settings."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from bundles import pointwise_bundle
from click.testing import CliRunner

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BusyError, StoreError
from wsi_pipeline.inputs import plan_jobs
from wsi_pipeline.options import (
    ExportOptions,
    PredictOptions,
    ScheduleOptions,
    SelectOptions,
    Settings,
)
from wsi_pipeline.pipeline import segment
from wsi_pipeline.reexport import export_again
from wsi_pipeline.report import load_run
from wsi_pipeline.schedule import open_cluster
from wsi_pipeline.store import RunStore

EVERYWHERE = SelectOptions(tissue="none")
FIRST = ExportOptions(simplify_um=1, min_area_um2=100)
NAMES = ("annotations.geojson", "mask.ome.tif", "mask.asap.tif", "overlay.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pointwise_bundle(tmp_path_factory.mktemp("model") / "model", mpp=0.25)


@pytest.fixture(scope="module")
def made(tmp_path_factory, bounded, model):
    """Return `made(export, mask_mpp)`: a finished run, made once."""
    folders = {}

    def make(export, mask_mpp=None):
        if (export, mask_mpp) not in folders:
            predict = PredictOptions(precision="fp32", device="cpu", mask_mpp=mask_mpp)
            settings = Settings(select=EVERYWHERE, predict=predict, export=export)
            (job,) = plan_jobs([bounded], tmp_path_factory.mktemp("out"))
            with open_cluster(ScheduleOptions()) as client:
                segment(job, load_bundle(model), client=client, settings=settings)
            folders[export, mask_mpp] = job.folder
        return folders[export, mask_mpp]

    return make


@pytest.fixture
def folder(tmp_path, made):
    """Return a copy of a finished run, far from its slide and its model."""
    return Path(shutil.copytree(made(FIRST), tmp_path / "elsewhere" / "slide"))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


@pytest.mark.parametrize(
    ("changes", "mask_mpp"),
    [
        ({"simplify_um": 0.0, "min_area_um2": 0.0}, None),
        ({"simplify_um": 4.0}, 0.37),
        ({"min_area_um2": 5000.0, "frame": "openslide"}, 0.5),
        ({"tiff": "asap", "frame": "openslide"}, None),
    ],
)
def test_the_files_are_those_that_segment_writes(tmp_path, made, changes, mask_mpp):
    folder = Path(shutil.copytree(made(FIRST, mask_mpp), tmp_path / "again"))
    expected = made(replace(FIRST, **changes), mask_mpp)
    run, wanted = export_again(folder, changes), load_run(expected / "run.json")
    assert contents(folder) == contents(expected)
    assert load_run(folder / "run.json") == run
    moving = {"seconds"}
    assert {k: v for k, v in asdict(run).items() if k not in moving} == {
        k: v for k, v in asdict(wanted).items() if k not in moving
    }


def test_only_what_depends_on_a_change_is_written(folder):
    times = {name: (folder / name).stat().st_mtime_ns for name in contents(folder)}
    before = (folder / "run.json").read_bytes()
    export_again(folder, {"simplify_um": 1.0})
    assert (folder / "run.json").read_bytes() == before
    export_again(folder, {"simplify_um": 2.0})
    (folder / "overlay.png").unlink()
    export_again(folder, {})
    now = {name: (folder / name).stat().st_mtime_ns for name in times}
    assert {name for name in now if now[name] != times[name]} == {
        "annotations.geojson", "overlay.png",
    }  # fmt: skip


def test_without_its_working_folder_a_run_loses_probabilities_only(folder, made):
    changes = {"simplify_um": 0.0, "min_area_um2": 0.0}
    shutil.rmtree(folder / ".store")
    export_again(folder, changes)

    def features(path):
        found = json.loads((path / "annotations.geojson").read_text("utf-8"))["features"]
        for feature in found:
            feature["properties"]["measurements"].pop("Mean probability", None)
        return found

    expected = made(replace(FIRST, **changes))
    assert features(folder) == features(expected)
    assert "Mean probability" in (expected / "annotations.geojson").read_text("utf-8")
    (folder / "overlay.png").unlink()
    run = export_again(folder, {})  # its thumbnail lay there
    assert run.status == "failed"
    assert "overlay.png could not be written: the slide's thumbnail is not kept" in run.reason
    assert contents(folder).keys() == {"annotations.geojson", "mask.ome.tif"}


def test_segment_takes_what_was_written_again_for_its_own(folder, bounded, model, made):
    export_again(folder, {"simplify_um": 3.0})
    before = contents(folder) | {"run.json": (folder / "run.json").read_bytes()}
    (job,) = plan_jobs([bounded], folder.parent)
    shutil.move(folder, job.folder)
    settings = Settings(
        select=EVERYWHERE,
        predict=PredictOptions(precision="fp32", device="cpu"),
        export=replace(FIRST, simplify_um=3.0, outputs=("zarr", "tiff", "geojson", "overlay")),
    )
    with open_cluster(ScheduleOptions()) as client:
        segment(job, load_bundle(model), client=client, settings=settings)
    assert contents(job.folder) | {"run.json": (job.folder / "run.json").read_bytes()} == before


def test_stopped_on_the_way_it_says_so_and_goes_on(folder, made, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wsi_pipeline.reexport.write_tiffs", stop)
        with pytest.raises(KeyboardInterrupt):
            export_again(folder, {"frame": "openslide"})
    run = load_run(folder / "run.json")
    assert (run.status, run.reason) == (
        "failed", "writing the outputs again was stopped: run export again",
    )  # fmt: skip
    assert export_again(folder, {}).status == "done"
    assert contents(folder) == contents(made(replace(FIRST, frame="openslide")))


def test_a_file_that_cannot_be_written_costs_no_other(folder, made, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("wsi_pipeline.reexport.write_tiffs", full)
        run = export_again(folder, {"frame": "openslide"})
    assert run.status == "failed"
    assert "the disk is full" in run.reason
    name = "annotations.geojson"
    expected = made(replace(FIRST, frame="openslide"))
    assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert export_again(folder, {}).status == "done"
    assert contents(folder) == contents(expected)


def edit(folder, change):
    found = json.loads((folder / "run.json").read_text("utf-8"))
    change(found)
    (folder / "run.json").write_text(json.dumps(found), "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "mask.ome.zarr"), "has no finished mask.ome.zarr; segment"),
        (lambda f: (f / "run.json").unlink(), "cannot read .*run.json"),
        (lambda f: (f / "run.json").write_text("{"), "is not a run of this version"),
        (lambda f: edit(f, lambda r: r["slide"].update(spacing_mm=[1, 1])), "export is for slides"),
        (lambda f: edit(f, lambda r: r["settings"].pop("export")), "is not a run of this version"),
        (lambda f: edit(f, lambda r: r["slide"].pop("bounds")), "is not a run of this version"),
        (lambda f: (f / "mask.ome.zarr/zarr.json").unlink(missing_ok=True)
         or (f / "mask.ome.zarr/.zattrs").unlink(missing_ok=True), "mask.ome.zarr is damaged"),
        (lambda f: shutil.rmtree(f / "mask.ome.zarr/0"), "mask.ome.zarr is damaged"),
    ],
)  # fmt: skip
def test_what_is_no_finished_slide_is_refused_and_left_as_it_is(folder, damage, message):
    damage(folder)
    before = contents(folder)
    run_file = folder / "run.json"
    said = run_file.read_bytes() if run_file.exists() else None
    with pytest.raises(StoreError, match=message):
        export_again(folder, {"simplify_um": 3.0})
    assert contents(folder) == before
    assert (run_file.read_bytes() if run_file.exists() else None) == said


def test_a_folder_in_use_is_left_alone(folder, monkeypatch):
    monkeypatch.setattr("wsi_pipeline.store.CLAIM_PATIENCE", 0)
    with RunStore(folder=folder).claim(), pytest.raises(BusyError, match="another process"):
        export_again(folder, {"simplify_um": 3.0})


def invoke(*arguments, code=0):
    result = CliRunner().invoke(group, ["export", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr


def test_the_command_takes_runs_and_whole_output_folders(tmp_path, folder, made):
    output = folder.parent
    shutil.copytree(made(FIRST), output / "other")
    (output / "summary.csv").write_text("old", "utf-8")
    said = invoke(output, "--simplify", 0, "--min-area", 0)
    assert said.count("done: ") == 2
    for name in ("slide", "other"):
        expected = made(replace(FIRST, simplify_um=0.0, min_area_um2=0.0))
        assert contents(output / name) == contents(expected)
    assert (output / "summary.csv").read_text("utf-8").count("done") == 2
    assert (output / "report.html").is_file()
    alone = shutil.copytree(folder, tmp_path / "alone" / "slide")
    invoke(alone, "--for", "openslide", "--outputs", "tiff,geojson", "--tiff", "asap")
    assert (alone / "mask.asap.tif").is_file()
    assert [p.name for p in alone.parent.iterdir()] == ["slide"]
    shutil.rmtree(output / "other" / "mask.ome.zarr")
    said = invoke(output, "--simplify", 5, code=1)
    assert said.count("done: ") == 1
    assert "failed: " in said
    assert "no finished slide in" in invoke(tmp_path / "alone" / "slide" / ".store", code=2)
