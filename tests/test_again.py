"""Outputs written again: the very files that `segment` writes with those settings."""

import hashlib
import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from urllib import request

import nibabel
import numpy as np
import ome_types
import pydicom
import pytest
import tifffile
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner
from highdicom.seg import segread
from PIL import Image
from runs import segment_job
from scans import blobs, scan_bundle, write_series
from shapely import unary_union
from shapely.geometry import box, shape

from wsi_pipeline import open_run
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BusyError, SourceError, StoreError
from wsi_pipeline.files.atomic import remove
from wsi_pipeline.options import (
    OUTPUTS,
    ExportOptions,
    PredictOptions,
    ScheduleOptions,
    SelectOptions,
    Settings,
)
from wsi_pipeline.report.record import load_run
from wsi_pipeline.run.again import export_again
from wsi_pipeline.run.jobs import plan_jobs
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.schedule.cluster import open_cluster
from wsi_pipeline.viewer import serve
from wsi_pipeline.viewer.run_view import open_shown

EVERYWHERE = SelectOptions(tissue="none")
FIRST = ExportOptions(simplify_um=1, min_area_um2=100)
NAMES = ("annotations.geojson", "regions.csv", "mask.ome.tif", "mask.asap.tif", "overlay.png")


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
                segment_job(job, load_bundle(model), client=client, settings=settings)
            folders[export, mask_mpp] = job.folder
        return folders[export, mask_mpp]

    return make


@pytest.fixture
def folder(tmp_path, made):
    """Return a copy of a finished run, far from its slide and its model."""
    return Path(shutil.copytree(made(FIRST), tmp_path / "elsewhere" / "slide"))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


def told(run):
    """Return what a run tells but for its seconds, and what somebody named."""
    facts = asdict(replace(run, seconds={}))
    facts["settings"].pop("named")
    return facts


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
    assert told(run) == told(wanted)


@pytest.mark.parametrize("mask_mpp", [None, 1.3])
def test_pixels_that_are_no_squares_lie_on_the_slide_in_every_file(tmp_path, model, mask_mpp):
    pixels = np.full((451, 1003, 3), (245, 243, 246), np.uint8)
    pixels[150:350, 200:800] = 150, 92, 160
    path = tmp_path / "uneven.tif"
    x, y = 0.25, 0.5
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb",
                     resolution=(1e4 / x, 1e4 / y), resolutionunit="CENTIMETER")  # fmt: skip
    predict = PredictOptions(precision="fp32", device="cpu", mask_mpp=mask_mpp)
    export = ExportOptions(simplify_um=0, min_area_um2=100, outputs=("zarr", "geojson", "tiff"))
    (job,) = plan_jobs([path], tmp_path / "out")
    with open_cluster(ScheduleOptions()) as client:
        settings = Settings(select=EVERYWHERE, predict=predict, export=export)
        bundle = load_bundle(pointwise_bundle(tmp_path / "model", mpp=0.5))
        assert segment_job(job, bundle, client=client, settings=settings).status == "done"
    coarse = 2 * (mask_mpp or y)
    features = json.loads((job.folder / "annotations.geojson").read_text("utf-8"))["features"]
    left, top, right, bottom = unary_union([shape(f["geometry"]) for f in features]).bounds
    assert [left, right] == pytest.approx([200, 800], abs=coarse / x)
    assert [top, bottom] == pytest.approx([150, 350], abs=coarse / y)
    um = [mask_mpp, mask_mpp] if mask_mpp else [y, x]
    described = zarr.open_group(job.folder / "mask.ome.zarr", mode="r").attrs["multiscales"]
    scale = described[0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    # reductions are multiples of 1/4096
    assert scale == pytest.approx(um, rel=1e-4)
    ome = ome_types.from_tiff(job.folder / "mask.ome.tif").images[0].pixels
    assert [ome.physical_size_y, ome.physical_size_x] == pytest.approx(um, rel=1e-4)
    before = contents(job.folder)
    for name in ("annotations.geojson", "regions.csv", "mask.ome.tif"):
        (job.folder / name).unlink()
    export_again(job.folder, {})
    assert contents(job.folder) == before


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
        "annotations.geojson", "regions.csv", "overlay.png",
    }  # fmt: skip


@pytest.mark.parametrize("lost", ["regions.csv", "mask.asap.tif"])
def test_what_lies_beside_an_output_comes_back_too(folder, lost):
    export_again(folder, {"tiff": "asap"})
    before = contents(folder)
    (folder / lost).unlink()
    export_again(folder, {})
    assert contents(folder) == before


@pytest.mark.parametrize("is_kept", [True, False])
def test_without_its_working_folder_a_run_has_probabilities_of_eight_bits(folder, made, is_kept):
    changes = {"simplify_um": 0.0, "min_area_um2": 0.0}
    shutil.rmtree(folder / ".store")
    if not is_kept:
        shutil.rmtree(folder / "probability.ome.zarr")
    export_again(folder, changes)

    def features(path):
        found = json.loads((path / "annotations.geojson").read_text("utf-8"))["features"]
        names = ("Mean probability", "Min probability")
        told = [[f["properties"]["measurements"].pop(n, -1) for n in names] for f in found]
        return found, np.array(told)

    expected = made(replace(FIRST, **changes))
    (found, of), (exact, told) = features(folder), features(expected)
    assert found == exact
    assert (told >= 0).all()
    # Interpolated between values each of which is off by half of 1/255.
    assert np.abs(of - told).max() <= 1 / 510 + 1e-4 if is_kept else (of == -1).all()
    columns = open_run(folder).regions()[["probability_mean", "probability_min"]]
    assert columns.notna().all(axis=None) == is_kept
    (folder / "overlay.png").unlink()
    run = export_again(folder, {})  # its thumbnail lay there
    assert run.status == "failed"
    assert "overlay.png could not be written: the slide's thumbnail is not kept" in run.reason
    assert contents(folder).keys() == {"annotations.geojson", "regions.csv", "mask.ome.tif"}


def test_segment_takes_what_was_written_again_for_its_own(folder, bounded, model, made):
    export_again(folder, {"simplify_um": 3.0})
    before = contents(folder) | {"run.json": (folder / "run.json").read_bytes()}
    (job,) = plan_jobs([bounded], folder.parent)
    shutil.move(folder, job.folder)
    settings = Settings(
        select=EVERYWHERE,
        predict=PredictOptions(precision="fp32", device="cpu"),
        export=replace(FIRST, simplify_um=3.0, outputs=OUTPUTS["slide"]),
    )
    with open_cluster(ScheduleOptions()) as client:
        segment_job(job, load_bundle(model), client=client, settings=settings)
    assert contents(job.folder) | {"run.json": (job.folder / "run.json").read_bytes()} == before


def test_stopped_on_the_way_it_says_so_and_goes_on(folder, made, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wsi_pipeline.export.ome_tiff.write_ome_tiff", stop)
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
        patch.setattr("wsi_pipeline.export.ome_tiff.write_ome_tiff", full)
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
        (lambda f: edit(f, lambda r: r.update(kind="image")), "is for slides"),
        (lambda f: edit(f, lambda r: r["settings"].pop("export")), "is not a run of this version"),
        (lambda f: edit(f, lambda r: r["settings"].pop("predict")), "is not a run of this version"),
        (lambda f: edit(f, lambda r: r["settings"]["export"].update(outputs=["nope"])),
         "is not a run of this version"),
        (lambda f: edit(f, lambda r: r["settings"]["export"].update(simplify_um="1")),
         "is not a run of this version"),
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
    monkeypatch.setattr("wsi_pipeline.run.store.CLAIM_PATIENCE", 0)
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
    assert "no finished run in" in invoke(tmp_path / "alone" / "slide" / ".store", code=2)


# --- what a person made


def line(bounded, model, output, *options):
    """Return the line that begins a run in `output`, as one repeats it."""
    chosen = ("--tissue", "none", "--precision", "fp32", "--device", "cpu")
    return ["segment", bounded, "--model", model, "--output", output, *chosen, *options]


def call(*arguments, code=0):
    result = CliRunner().invoke(group, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory, bounded, model):
    output = tmp_path_factory.mktemp("quick") / "out"
    call(*line(bounded, model, output))
    return output


@pytest.fixture
def output(tmp_path, quick_start):
    """Return a copy of an output folder with one finished slide."""
    return Path(shutil.copytree(quick_start, tmp_path / "out"))


def edit_polygons(path):
    """Save a file as QuPath does: its own order and spaces, one object less; return the bytes."""
    found = json.loads(path.read_text("utf-8"))
    found["features"].pop()
    path.write_text(json.dumps(found, indent=2), "utf-8")
    return path.read_bytes()


@pytest.mark.parametrize("order", list(itertools.permutations(["segment", "export", "view"])))
def test_corrected_polygons_survive_the_three_lines_in_any_order(output, bounded, model, order):
    folder = output / "bounded"
    first = (folder / "annotations.geojson").read_bytes()
    edited = edit_polygons(folder / "annotations.geojson")
    said = ""
    for number, command in enumerate(order, start=1):
        if command == "segment":
            said += call(*line(bounded, model, output, "--simplify", 3 + number))
        elif command == "export":
            said += call("export", output, "--simplify", 3 + number, "--min-area", 500)
        else:
            with serve(output) as viewer:
                request.urlopen(f"{viewer.url}runs/bounded").read()
        assert (folder / "annotations.geojson").read_bytes() == edited
    sentence = (
        "annotations.geojson was changed since it was written and stays as it is; the new one is "
        "annotations.new.geojson"
    )
    assert said.count(f"{sentence}\n") == 2
    run = load_run(folder / "run.json")
    assert run.warnings == [sentence]
    report = (output / "report.html").read_text("utf-8")
    assert sentence in report
    assert 'href="bounded/annotations.new.geojson"' in report
    new = (folder / "annotations.new.geojson").read_bytes()
    assert new not in (first, edited)
    assert run.files == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("annotations.new.geojson", "mask.ome.tif", "overlay.png", "regions.csv")
    }
    assert {p.name for p in folder.iterdir()} == {
        *run.files, "annotations.geojson", "mask.ome.zarr", "probability.ome.zarr", "run.json",
        ".store",
    }  # fmt: skip


def test_each_correction_is_kept_and_the_next_has_a_number(output, bounded, model, made):
    folder = output / "bounded"
    names = [f"annotations{n}.geojson" for n in ("", ".new", ".new-2")]
    edited = {}
    for n, name in enumerate(names):
        edited[name] = edit_polygons(folder / name)
        call("export", output, "--simplify", n + 2)
    call(*line(bounded, model, output, "--overwrite"))  # nor does this change it
    assert {name: (folder / name).read_bytes() for name in names} == edited
    found = sorted(p.name for p in folder.glob("annotations*"))
    assert found == sorted([*names, "annotations.new-3.geojson"])
    for name in names:
        (folder / name).unlink()
    call("export", output, "--simplify", 5)  # the usual name is free, the last was ours
    assert [p.name for p in folder.glob("annotations*")] == ["annotations.geojson"]


def test_no_file_of_a_person_is_written_over_or_removed(output, bounded, model):
    folder, theirs = output / "bounded", {}
    for name in ("mask.ome.tif", "overlay.png"):
        theirs[name] = b"painted"
    theirs |= {"mask.asap.tif": b"brought here", "notes.txt": b"mine"}
    for name, content in theirs.items():
        (folder / name).write_bytes(content)
    call(*line(bounded, model, output, "--for", "openslide", "--tiff", "asap"))
    said = call(*line(bounded, model, output, "--mask-mpp", 1, "--outputs", "zarr"))
    assert {name: (folder / name).read_bytes() for name in theirs} == theirs
    assert {p.name for p in folder.iterdir()} == {
        *theirs, "mask.ome.zarr", "run.json", ".store",
    }  # fmt: skip
    assert "warning: bounded.zarr: mask.ome.tif was changed since it was written" in said


@pytest.mark.parametrize("lost", [".store", "run.json"])
def test_what_is_ours_is_known_by_the_working_folder_and_by_the_record(
    output, bounded, model, lost
):
    folder = output / "bounded"
    remove(folder / lost)
    call(*line(bounded, model, output, "--simplify", 2))
    assert not list(folder.glob("*.new.*"))
    edited = edit_polygons(folder / "annotations.geojson")
    remove(folder / lost)
    call(*line(bounded, model, output, "--simplify", 3))
    assert (folder / "annotations.geojson").read_bytes() == edited
    assert (folder / "annotations.new.geojson").is_file()
    assert len(list(folder.glob("*.new.*"))) == 1


def test_polygons_of_a_version_that_kept_no_hashes_stay(output, bounded, model):
    folder = output / "bounded"
    edit(folder, lambda r: r.pop("files"))
    (folder / ".store" / "written.sha256").unlink()
    before = (folder / "annotations.geojson").read_bytes()
    call("export", output, "--for", "openslide", "--simplify", 2)
    assert (folder / "annotations.geojson").read_bytes() == before
    assert [p.name for p in folder.glob("*.new.*")] == ["annotations.new.geojson"]


def test_the_plain_line_leaves_what_export_wrote(output, bounded, model):
    folder = output / "bounded"
    call("export", output, "--simplify", 2, "--for", "openslide")
    before = contents(folder) | {"run.json": (folder / "run.json").read_bytes()}
    call(*line(bounded, model, output))
    assert contents(folder) | {"run.json": (folder / "run.json").read_bytes()} == before
    for lost in ("annotations.geojson", "regions.csv"):
        (folder / lost).unlink()
        call(*line(bounded, model, output))  # what is lost comes back as it was
        assert contents(folder) == contents(folder) | {
            name: content for name, content in before.items() if name != "run.json"
        }
    call(*line(bounded, model, output, "--simplify", 1))  # the default, but asked for
    assert load_run(folder / "run.json").settings["export"]["simplify_um"] == 1.0
    assert contents(folder)["annotations.geojson"] != before["annotations.geojson"]
    call("export", output, "--simplify", 2)
    before = contents(folder)
    call(*line(bounded, model, output, "--simplify", 1))  # the same line again
    assert contents(folder) == before


def test_options_that_no_run_has_are_not_gone_on_with(output, bounded, model):
    folder = output / "bounded"
    before = contents(folder)
    edit(folder, lambda run: run["settings"]["export"].update(outputs=["zarr", "nope"]))
    call(*line(bounded, model, output))
    assert load_run(folder / "run.json").settings["export"]["outputs"] != ["zarr", "nope"]
    assert contents(folder) == before


def test_class_0_is_called_as_the_model_calls_it(tmp_path, bounded, model):
    glass = Path(shutil.copytree(model, tmp_path / "model"))
    text = (glass / "model.toml").read_text("utf-8").replace('"Background"', '"Glass"')
    (glass / "model.toml").write_text(text, "utf-8")
    for name in ("again", "direct"):
        call(*line(bounded, glass, tmp_path / name, *(["--for", "openslide"] * (name == "direct"))))
    folder, direct = (tmp_path / name / "bounded" for name in ("again", "direct"))
    call("export", folder, "--for", "openslide")
    assert contents(folder) == contents(direct)
    assert b"Glass" in (folder / "mask.ome.tif").read_bytes()
    assert open_shown(folder).facts()["classes"][0]["name"] == "Glass"


def test_random_weights_are_said_wherever_results_are(tmp_path, bounded):
    nothing = tmp_path / "nothing"
    demo = Path(__file__).parents[1] / "models" / "lightmuseg-bcss-demo"
    call("models", "init", demo, "--output", nothing)
    said = call(*line(bounded, nothing, tmp_path / "out", "--mask-mpp", 1))
    folder = tmp_path / "out" / "bounded"
    run = load_run(folder / "run.json")
    assert "RANDOM WEIGHTS" in run.model["limits"]
    assert run.model["limits"] in run.warnings
    assert f"limits of nothing: {run.model['limits']}" in said
    assert f"warning: bounded.zarr: {run.model['limits']}" in said
    assert "Limits of nothing: RANDOM WEIGHTS" in (tmp_path / "out/report.html").read_text("utf-8")
    with serve(tmp_path / "out") as viewer:
        facts = json.loads(request.urlopen(f"{viewer.url}runs/bounded").read())
    assert facts["limits"] == run.model["limits"]
    features = json.loads((folder / "annotations.geojson").read_text("utf-8"))["features"]
    assert {f["properties"]["metadata"]["limits"] for f in features} == {"RANDOM WEIGHTS"}
    stamped = (folder / "overlay.png").read_bytes()
    (folder / "overlay.png").unlink()
    call("export", folder)
    assert (folder / "overlay.png").read_bytes() == stamped
    # the legend has room for one more entry than the same picture without the stamp
    edit(folder, lambda r: r["model"].pop("limits"))
    (folder / "overlay.png").unlink()
    call("export", folder)
    assert (folder / "overlay.png").read_bytes() != stamped


# --- images and volumes


def segment_scan(path, bundle, output):
    predict = PredictOptions(precision="fp32", device="cpu")
    (job,) = plan_jobs([path], output)
    with open_cluster(ScheduleOptions()) as client:
        settings = Settings(predict=predict)
        run = segment_job(job, load_bundle(bundle), client=client, settings=settings)
    assert run.status == "done", run.reason
    return job.folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Return a folder with an image, a DICOM series, and in `out` the folders of their runs."""
    place = tmp_path_factory.mktemp("scans")
    grey = (blobs((211, 301)) // 4).astype(np.uint8)
    Image.fromarray(grey).save(place / "image.png")
    model = scan_bundle(
        place / "images", modality="image", resolution="fit = [211, 301]", patch_size=(128, 128)
    )
    segment_scan(place / "image.png", model, place / "out")
    write_series(place / "ct", blobs((11, 41, 33)), spacing=(2.5, 0.8, 0.8), seed=3)
    model = scan_bundle(
        place / "volumes", resolution="spacing_mm = [2.5, 0.8, 0.8]", keys="scale = [0.0, 1024.0]"
    )
    segment_scan(place / "ct", model, place / "out")
    return place


@pytest.fixture
def runs(tmp_path, scans):
    """Return a copy of the runs, whose sources stay where they were."""
    return Path(shutil.copytree(scans / "out", tmp_path / "out"))


def segments(path):
    """Return the pixels of a DICOM segmentation and the names of its segments."""
    found = pydicom.dcmread(path)
    return found.pixel_array, [segment.SegmentLabel for segment in found.SegmentSequence]


def test_of_images_and_volumes_the_files_are_those_that_segment_wrote(runs, scans):
    again = {
        "image": ("mask.png", "annotations.geojson", "regions.csv", "overlay.png"),
        "ct": ("mask.nii.gz", "overlay.png"),
    }
    before = {name: load_run(scans / "out" / name) for name in again}
    for name, files in again.items():
        assert export_again(runs / name, {}) == before[name]
        for file in files:
            (runs / name / file).unlink()
    (runs / "ct" / "mask.dcm").unlink()
    assert invoke(runs).count("done: ") == 2
    for name, files in again.items():
        for file in files:
            new, old = (place / name / file for place in (runs, scans / "out"))
            assert new.read_bytes() == old.read_bytes(), file
        now = told(load_run(runs / name))
        expected = told(before[name])
        for facts in (now, expected):
            facts["files"].pop("mask.dcm", None)  # it has identifiers of its own
        assert now == expected
    new, old = (segments(place / "ct" / "mask.dcm") for place in (runs, scans / "out"))
    assert np.array_equal(new[0], old[0])
    assert new[1] == old[1] == ["Grey", "Bright"]


def test_of_a_corrected_mask_of_an_image_all_is_made_and_the_mask_stays(runs, scans):
    folder = runs / "image"
    corrected = np.zeros((211, 301), np.uint8)
    corrected[20:51, 100:177] = 2
    corrected[25:30, 110:120] = 0
    Image.fromarray(corrected).save(folder / "mask.png")
    mine = (folder / "mask.png").read_bytes()
    run = export_again(folder, {})
    assert (folder / "mask.png").read_bytes() == mine
    assert run.status == "done"
    assert run.area_px == {"Grey": 0, "Bright": (corrected == 2).sum()}
    assert {name: found["count"] for name, found in run.lesions.items()} == {"Grey": 0, "Bright": 1}
    assert run.regions == {"Grey": 0, "Bright": 1}
    assert run.warnings == ["mask.png was changed since it was written: the outputs are made of it"]
    (feature,) = json.loads((folder / "annotations.geojson").read_text("utf-8"))["features"]
    assert feature["properties"]["classification"]["name"] == "Bright"
    outline = shape(feature["geometry"])
    assert outline.equals(box(100, 20, 177, 51).difference(box(110, 25, 120, 30)))
    small = np.asarray(Image.open(folder / "overlay.png").convert("RGB")).astype(int)[:211]
    edge = np.argwhere((small[..., 0] > 150) & (small[..., 1] < 60))
    assert (edge.min(axis=0) == (20, 100)).all()
    # without the correction all is as it was
    kept = folder.parent / "mine.png"
    (folder / "mask.png").rename(kept)
    export_again(folder, {})
    assert told(load_run(folder)) == told(load_run(scans / "out" / "image"))
    for file in ("mask.png", "annotations.geojson", "overlay.png"):
        assert (folder / file).read_bytes() == (scans / "out" / "image" / file).read_bytes()
    kept.replace(folder / "mask.png")
    # polygons that a person has corrected stay as well
    edit_polygons(folder / "annotations.geojson")
    mine = (folder / "annotations.geojson").read_bytes()
    run = export_again(folder, {})
    assert (folder / "annotations.geojson").read_bytes() == mine
    assert (folder / "annotations.new.geojson").is_file()
    assert sum("annotations.geojson was changed" in text for text in run.warnings) == 1


def test_of_a_corrected_mask_of_a_volume_all_is_made_wherever_its_axes_lead(runs, scans):
    folder = runs / "ct"
    mask = nibabel.load(folder / "mask.nii.gz")
    corrected = np.zeros(mask.shape, np.uint8)  # (x, y, z)
    corrected[5:21, 10:30, 3:7] = 1
    corrected[25:30, 30:38, 8:9] = 2
    turned = nibabel.Nifti1Image(corrected, mask.affine).as_reoriented([[1, -1], [2, 1], [0, -1]])
    assert turned.shape != mask.shape
    nibabel.save(turned, folder / "mask.nii.gz")
    mine = (folder / "mask.nii.gz").read_bytes()
    run = export_again(folder, {})
    assert (folder / "mask.nii.gz").read_bytes() == mine
    ml = 2.5 * 0.8 * 0.8 / 1000
    assert run.volume_ml == pytest.approx({"Grey": 16 * 20 * 4 * ml, "Bright": 5 * 8 * ml})
    (listed,) = run.lesions["Grey"]["listed"]
    assert (listed["start"], listed["stop"]) == ([5, 10, 3], [21, 30, 7])
    found = segread(folder / "mask.dcm").get_volume(combine_segments=True)
    grey = np.argwhere(np.asarray(found.array) == 1)
    assert len(grey) == 16 * 20 * 4
    # where each lies in the patient, LPS, against where nibabel says, RAS
    places = np.array([found.map_indices_to_reference(grey[[i]])[0] for i in (0, -1)])
    corners = nibabel.affines.apply_affine(mask.affine, [[5, 10, 3], [20, 29, 6]])
    corners *= (-1, -1, 1)
    assert np.allclose(np.sort(places, axis=0), np.sort(corners, axis=0), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "damage", "message"),
    [
        ("image", {"simplify_um": 2.0}, None, "--simplify is for slides"),
        ("image", {"simplify_um": 1.0}, None, "--simplify is for slides"),
        ("image", {"min_area_um2": 9.0}, None, "--min-area is for slides"),
        ("ct", {"frame": "openslide"}, None, "--for is for slides"),
        ("ct", {"tiff": "asap"}, None, "--tiff is for slides"),
        ("ct", {"outputs": ("geojson",)}, None, "geojson is no output for volumes"),
        ("image", {"outputs": ("nifti",)}, None, "nifti is no output for images"),
        ("image", {"outputs": ("dicom",)}, None, "is no DICOM, which a DICOM segmentation must"),
        ("image", {}, lambda f: (f / "overlay.png").unlink(), "overlay.png cannot be written: the "
         "image was not found"),
        ("ct", {}, lambda f: (f / "mask.dcm").unlink(), "mask.dcm cannot be written: the volume"),
        ("image", {}, lambda f: Image.new("L", (301, 211), 7).save(f / "mask.png"),
         "holds the value 7; its classes are 0 to 2"),
        ("image", {}, lambda f: Image.new("RGB", (301, 211)).save(f / "mask.png"), "has colours"),
        ("image", {}, lambda f: Image.new("L", (300, 211)).save(f / "mask.png"), "300 × 211 px"),
        ("image", {}, lambda f: (f / "mask.png").write_bytes(b"nothing"), "cannot be read as a"),
        ("ct", {}, lambda f: (f / "mask.nii.gz").write_bytes(b"nothing"), "cannot be read as a"),
        ("image", {"outputs": ("png",)}, lambda f: (shutil.rmtree(f / ".store"),
         (f / "mask.png").unlink()), "has no mask.png"),
    ],
)  # fmt: skip
def test_what_an_image_or_volume_cannot_have_is_refused_and_all_left(
    runs, scans, name, changes, damage, message
):
    folder = runs / name
    if damage is not None:
        damage(folder)
    if "not found" in message or "mask.dcm" in message:
        edit(folder, lambda run: run["slide"].update(path=str(runs / "gone")))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises((StoreError, SourceError), match=message):
        export_again(folder, changes)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before


def test_polygons_of_an_image_need_neither_image_nor_model(runs):
    folder = runs / "image"
    wanted = (folder / "annotations.geojson").read_bytes()
    edit(folder, lambda run: run["slide"].update(path=str(runs / "gone")))
    (folder / "annotations.geojson").unlink()
    assert export_again(folder, {}).status == "done"
    assert (folder / "annotations.geojson").read_bytes() == wanted
