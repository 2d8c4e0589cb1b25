"""The main job from Python: all that the command does, wherever it is called from."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from bundles import Busy, pointwise_bundle

from wsi_pipeline import UsageError, WsiPipelineError, load_run, segment

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
        names = [thread.name for thread in threading.enumerate()]
        found.append(len([name for name in names if name.startswith("predict")]))

    for threads in (1, 3):
        found.clear()
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
