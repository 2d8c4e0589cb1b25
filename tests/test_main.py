"""The main job from Python: all that the command does, wherever it is called from."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from bundles import Busy, pointwise_bundle, small_unet_bundle
from click.testing import CliRunner

from wsi_pipeline import UsageError, WsiPipelineError, load_run, segment
from wsi_pipeline.cli import group
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.preview import preview
from wsi_pipeline.run.status import read_status
from wsi_pipeline.run.verify import verify
from wsi_pipeline.sources import Slide, open_source, shared
from wsi_pipeline.sources.base import tiles_touching
from wsi_pipeline.viewer.server import serve

MPP = 0.5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pointwise_bundle(tmp_path_factory.mktemp("model") / "quick", mpp=MPP)


@pytest.fixture
def slides(tmp_path: Path, slide_path: Path) -> Path:
    """Return a folder with a slide and a file that is none."""
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copyfile(slide_path, folder / "a.tif")
    (folder / "b.tif").write_bytes(b"no slide")
    return folder


def test_all_is_done_that_the_command_does(tmp_path: Path, slides: Path, model: Path) -> None:
    output, told, stages = tmp_path / "out", list[str](), set[str]()
    runs = segment(
        str(slides),
        model=str(model),
        output=str(output),
        outputs=("zarr", "geojson"),
        precision="fp32",
        progress=lambda job, done, total: told.append(f"{job.path.name} {done}/{total}"),
        stage=lambda job, text: stages.add(text),
        ended=lambda job, run: told.append(f"{job.path.name} {run.status}"),
    )
    assert [run.status for run in runs] == ["done", "failed"]
    assert told[-2:] == ["a.tif done", "b.tif failed"]
    assert "writing annotations.geojson" in stages
    assert load_run(output / "a") == runs[0]
    assert {"summary.csv", "report.html", ".slides.json"} <= {p.name for p in output.iterdir()}
    command = [sys.executable, "-m", "wsi_pipeline", "-q", "segment", slides, "-m", model, "-o"]
    options = ["--outputs", "zarr,geojson", "--precision", "fp32"]
    other = tmp_path / "other"
    assert subprocess.run([*command, other, *options], check=False).returncode == 1
    for name in ("annotations.geojson", "mask.ome.zarr/0/0/0", "mask.ome.zarr/0/.zarray"):
        assert (output / "a" / name).read_bytes() == (other / "a" / name).read_bytes()
    header, *_ = (output / "summary.csv").read_text("utf-8").splitlines()
    assert header == (other / "summary.csv").read_text("utf-8").splitlines()[0]


def test_from_standard_input_and_without_a_guard(tmp_path: Path, slides: Path, model: Path) -> None:
    script = f"""
from wsi_pipeline import segment
(run,) = segment("{slides / "a.tif"}", model="{model}", output="{tmp_path / "out"}", workers=2)
print(run.status, sorted(run.area_mm2))
"""
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True)
    assert done.stdout == "done ['Stroma', 'Tumor']\n", done.stderr


def test_wrong_usage_is_refused_before_any_work(tmp_path: Path, slides: Path, model: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(TypeError, match=r"tisue is no option; expected one of .*tissue"):
        segment(slides, model=model, output=output, tisue="none")
    (tmp_path / "empty").mkdir()
    for inputs, options, reason in (
        (tmp_path / "empty", {}, "no slides found in"),
        (slides, {"outputs": ("nifti",)}, "nifti is no output for slides"),
        (slides, {"overlap": 4096}, "must be below the patch size"),
        (slides, {"work": tmp_path / "work"}, "--work is for a URL"),
        (slides, {"device": "cpu", "gpus": (0,)}, "--gpus is for"),
        (slides, {"scheduler": "tcp://h:1", "cluster": "slurm"}, "exclude each other"),
    ):
        with pytest.raises(UsageError, match=reason):
            segment(inputs, model=model, output=output, **options)
    for name, given in {"workers": 0, "block_size": -2048, "batch_size": -1, "mpp": np.nan}.items():
        with pytest.raises(UsageError, match=f"{name} is {given}; expected a number above 0"):
            segment(slides, model=model, output=output, **{name: given})
    for shard in ((1, 0), (3, 2), (0, 2)):
        with pytest.raises(UsageError, match="expected one from 1 to the number of all"):
            segment(slides, model=model, output=output, shard=shard)
    assert not output.exists()


def test_shards_share_the_slides(tmp_path: Path, slides: Path, model: Path) -> None:
    output = tmp_path / "out"
    first, second = (segment(slides, model=model, output=output, shard=(n, 2)) for n in (1, 2))
    assert [run.slide["name"] for run in (*first, *second)] == ["a.tif", "b.tif"]


def test_too_much_memory_ends_in_a_sentence_and_the_work_goes_on_later(
    tmp_path: Path, slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = pointwise_bundle(tmp_path / "busy", mpp=0.25, program=Busy, patch_size=128)
    taken = iter([0, 0])
    with monkeypatch.context() as patch:
        patch.setattr("wsi_pipeline.run.main.used_memory", lambda: next(taken, 9 * 10**9))
        with pytest.raises(WsiPipelineError, match="GB of memory are taken, --max-ram"):
            segment(
                slides / "a.tif",
                model=busy,
                output=tmp_path / "out",
                max_ram=8 * 10**9,
                block_size=1024,
                # The memory is looked at for a second before it is too much.
                progress=lambda *_: time.sleep(1),
            )
    (run,) = segment(slides / "a.tif", model=busy, output=tmp_path / "out", block_size=1024)
    assert run.status == "done"
    assert zarr.open_array(tmp_path / "out" / "a" / "mask.ome.zarr" / "0", mode="r").shape == (
        1487, 1931,
    )  # fmt: skip


def test_as_many_cpus_are_kept_busy_as_are_asked_for(
    tmp_path: Path, slides: Path, model: Path
) -> None:
    masks, found = [], list[int]()

    def count(*_: object) -> None:
        names = [thread.name for thread in threading.enumerate() if thread not in others]
        found.append(len([name for name in names if name.startswith("predict")]))

    for threads in (1, 3):
        found.clear()
        # of tests before this one, whose predictors are still open
        others = set(threading.enumerate())
        output = tmp_path / f"out{threads}"
        segment(
            slides / "a.tif",
            model=model,
            output=output,
            threads=threads,
            precision="fp32",
            device="cpu",
            tissue="none",
            outputs=("zarr",),
            progress=count,
        )
        assert max(found) <= threads
        masks.append(np.asarray(zarr.open(output / "a" / "mask.ome.zarr", mode="r")["0"]))
    assert (masks[0] == masks[1]).all()


def pixels_of(run: Path) -> npt.NDArray[np.uint8]:
    mask: npt.NDArray[np.uint8] = zarr.open_array(run / "mask.ome.zarr" / "0", mode="r")[:]
    return mask


def files_of(run: Path) -> dict[str, bytes]:
    """Return all files of a run but what tells of times."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and ".store" not in path.parts and path.name != "run.json"
    }


@pytest.mark.slow
def test_several_models_in_one_pass_give_what_each_gives_alone(
    tmp_path: Path, slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [
        pointwise_bundle(tmp_path / "fine", mpp=0.25, patch_size=200, overlap=30),
        pointwise_bundle(tmp_path / "coarse", mpp=1.0),
        small_unet_bundle(tmp_path / "unet"),
    ]
    options = {"block_size": 1024, "tissue": "none", "mask_mpp": 0.25}
    alone = [segment(slides, model=m, output=tmp_path / f"alone-{m.name}", **options)
             for m in models]  # fmt: skip
    counts: Counter[tuple[int, ...]] = Counter()

    def counting(*args: object, **options: object) -> Slide:
        slide = open_source(*args, **options)
        read, tiles = slide.pixels.read_level, slide.pixels.level_tiles
        counts.clear()

        def read_level(level: int, *box: int) -> npt.NDArray[np.uint8]:
            counts.update((level, *place) for place in tiles_touching(*box, tiles[level]))
            return read(level, *box)

        slide.pixels.read_level = read_level
        return slide

    monkeypatch.setattr(shared, "open_source", counting)
    output = tmp_path / "out"
    runs = segment(slides, model=models, output=output, **options)
    assert [run.status for run in runs] == ["done"] * 3 + ["failed"] * 3
    assert counts
    assert set(counts.values()) == {1}
    for model, each in zip(models, alone, strict=True):
        one, other = tmp_path / f"alone-{model.name}" / "a", output / f"test-{model.name}" / "a"
        assert files_of(one) == files_of(other)
        assert load_run(one).files == load_run(other).files
        assert load_run(other).settings == each[0].settings
    rows = list(csv.DictReader((output / "summary.csv").read_text("utf-8").splitlines()))
    assert [(row["folder"], row["model"], row["status"]) for row in rows] == [
        (f"test-{name}/{slide}", f"test-{name}", status)
        for name in ("coarse", "fine", "unet")
        for slide, status in (("a", "done"), ("b", "failed"))
    ]
    status = read_status(output)
    assert status.done == [f"test-{name}/a" for name in ("coarse", "fine", "unet")]
    assert len(status.failed) == 3
    assert verify(output / "test-fine" / "a", share=1).different == ()
    with serve(output) as viewer:
        assert [run["folder"] for run in viewer.list_runs() if run["status"] == "done"] == [
            f"test-{name}/a" for name in ("coarse", "fine", "unet")
        ]
    # masks by another threshold lie as the runs do
    line = ["export", str(output), "--threshold", "Tumor=0.9", "--output", str(tmp_path / "high")]
    assert CliRunner().invoke(group, line).exit_code == 0
    assert sorted((tmp_path / "high").glob("*/a/run.json")) == [
        tmp_path / "high" / f"test-{name}" / "a" / "run.json" for name in ("coarse", "fine", "unet")
    ]


def test_several_models_go_on_where_each_has_stopped(tmp_path: Path, slides: Path) -> None:
    models = [pointwise_bundle(tmp_path / name, mpp=0.25, patch_size=128) for name in "xy"]
    options = {"output": tmp_path / "out", "block_size": 1024, "tissue": "none"}
    (whole,) = segment(slides / "a.tif", model=models[0], **(options | {"output": tmp_path / "x1"}))
    seen = []

    def kill(job: Job, done: int, of: int) -> None:
        seen.append(job.folder.parent.name)
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(slides / "a.tif", model=models, progress=kill, **options)
    assert set(seen) == {"test-x", "test-y"}
    ledger = {p for n in "xy" for p in (tmp_path / "out" / f"test-{n}").glob("a/.store/blocks/*")}
    times = {path: path.stat().st_mtime_ns for path in ledger}
    assert times
    runs = segment(slides / "a.tif", model=models, **options)
    assert [run.status for run in runs] == ["done", "done"]
    assert {path: path.stat().st_mtime_ns for path in ledger} == times
    expected = pixels_of(tmp_path / "x1" / "a")
    for name in ("test-x", "test-y"):
        np.testing.assert_array_equal(pixels_of(tmp_path / "out" / name / "a"), expected)
    assert whole.area_mm2 == runs[0].area_mm2


def test_models_that_cannot_go_side_by_side_are_refused(tmp_path: Path, slides: Path) -> None:
    one = pointwise_bundle(tmp_path / "one", mpp=1.0)
    odd = pointwise_bundle(tmp_path / "two", mpp=1.0)
    text = (odd / "model.toml").read_text("utf-8").replace("test-two", "a/b")
    (odd / "model.toml").write_text(text, "utf-8")
    for models, reason in (([one, one], "have the name 'test-one'"), ([one, odd], "'a/b'")):
        with pytest.raises(UsageError, match=reason):
            segment(slides, model=models, output=tmp_path / "out")
    with pytest.raises(UsageError, match=r"of several kinds, .*one for slides, .* for volumes"):
        segment(slides, model=[one, "mm3d-unet-dcemri"], output=tmp_path / "out")
    with pytest.raises(UsageError, match="one model at a time"):
        preview(slides, model=[one, pointwise_bundle(tmp_path / "b", mpp=1.0)], output=tmp_path)
    assert not (tmp_path / "out").exists()
