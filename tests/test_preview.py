"""Previews: cells against the mask of a whole run, and runs that know nothing of previews."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from bundles import pointwise_bundle
from click.testing import CliRunner
from PIL import Image
from scans import scan_bundle

import wsi_pipeline
from wsi_pipeline import PredictOptions, SelectOptions, Settings
from wsi_pipeline.cli import group
from wsi_pipeline.inference.predictor import Predictor
from wsi_pipeline.run.preview import Cells
from wsi_pipeline.run.segment import fitting
from wsi_pipeline.run.slide_run import SlideRun
from wsi_pipeline.run.store import RunStore

FAST = {"device": "cpu", "precision": "fp32", "outputs": ("zarr",)}


def command(slide, bundle, output, *options):
    return CliRunner().invoke(
        group,
        ["-q", "segment", str(slide), "-m", str(bundle), "-o", str(output), *options],
        catch_exceptions=False,
    )


def preview_of(folder):
    return json.loads((Path(folder) / "preview.json").read_text("utf-8"))


def files_of(folder):
    """Return the bytes of all files of a folder's mask."""
    root = folder / "mask.ome.zarr"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Return a bundle whose classes are a function of a pixel: no patch's border matters."""
    return pointwise_bundle(
        tmp_path_factory.mktemp("m") / "small", mpp=0.25, patch_size=96, overlap=29
    )


@pytest.fixture(scope="module")
def roi(tmp_path_factory):
    path = tmp_path_factory.mktemp("roi") / "roi.geojson"
    shape = shapely.Polygon([(211, 180), (1001, 333), (760, 1207), (305, 990)])
    path.write_text(shapely.to_geojson(shape), "utf-8")
    return path


@pytest.mark.parametrize("blend", ["gaussian", "constant", "crop"])
@pytest.mark.parametrize("limited", [False, True])
def test_cells_together_hold_what_a_run_finds(tmp_path, slide_path, bundle, roi, blend, limited):
    select = {"roi": roi if limited else None, "tissue": "none" if limited else "auto"}
    (run,) = wsi_pipeline.segment(
        slide_path, model=bundle, output=tmp_path / "o", blend=blend, **select, **FAST
    )
    loaded = wsi_pipeline.load_bundle(bundle)
    settings = Settings(select=SelectOptions(**select), predict=PredictOptions(blend=blend))
    with (
        SlideRun(slide_path, loaded, fitting(settings, loaded)) as slide,
        closing(Predictor(loaded, device="cpu", precision="fp32")) as predictor,
    ):
        plan = slide.lay_out(RunStore(folder=tmp_path / "none"), 1, keep=False)
        with closing(Cells(plan, slide.source, predictor)) as cells:
            areas = cells.measure(np.arange(len(plan.grid)))
            whole = cells.whole
    assert len(areas) > 32
    np.testing.assert_allclose(areas.sum(axis=0)[1:3], list(run.area_mm2.values()), rtol=1e-9)
    # Burnt into pixels, an ROI is not quite itself.
    assert areas.sum() == pytest.approx(whole, rel=2e-3 if limited else 1e-9)


def test_a_preview_tells_of_each_class_and_where_it_was_seen(tmp_path, slide_path, bundle):
    result = command(slide_path, bundle, tmp_path / "o", "--preview")
    assert result.exit_code == 0, result.output
    lines, told = result.stdout.splitlines(), preview_of(tmp_path / "o" / "synthetic slide")
    (run,) = wsi_pipeline.segment(slide_path, model=bundle, output=tmp_path / "full", **FAST)
    assert [one["class"] for one in told] == list(run.area_mm2) == ["Tumor", "Stroma"]
    for line, one in zip(lines, told, strict=True):
        assert list(one)[:5] == ["class", "mm2", "low", "high", "patches"]
        assert one["low"] <= run.area_mm2[one["class"]] <= one["high"]
        assert 0 < one["low"] < one["mm2"] < one["high"]
        assert (one["patches"], one["of"]) == (32, run.patches["kept"])
        mm2, low, high = (f"{one[name]:.3g}" for name in ("mm2", "low", "high"))
        assert line.startswith(
            f"{one['class']} {mm2} mm² (95 %: {low}–{high}) from 32 of {one['of']:,} patches, "
        )


def test_few_patches_are_all_taken_and_leave_no_doubt(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.25, patch_size=512, overlap=64)
    (found,) = wsi_pipeline.preview(slide_path, model=bundle, output=tmp_path / "o", **FAST)
    (run,) = wsi_pipeline.segment(slide_path, model=bundle, output=tmp_path / "o", **FAST)
    assert found.patches == found.of == run.patches["kept"] < 32
    assert found.areas.keys() == run.area_mm2.keys()
    for name, three in found.areas.items():
        assert three == pytest.approx((run.area_mm2[name],) * 3, rel=1e-9)


def test_without_tissue_there_is_nothing(tmp_path, make_slide):
    glass = np.full((1700, 2301, 3), 244, np.uint8)
    slide = make_slide(tmp_path / "glass.tif", glass, 0.25)
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.25, patch_size=128)
    (found,) = wsi_pipeline.preview(slide, model=bundle, output=tmp_path / "o", **FAST)
    assert (found.reason, found.patches) == ("", 0)
    assert found.areas == {"Tumor": (0, 0, 0), "Stroma": (0, 0, 0)}


def test_a_run_after_a_preview_is_the_same_run(tmp_path, slide_path, bundle):
    wsi_pipeline.segment(slide_path, model=bundle, output=tmp_path / "alone", **FAST)
    wsi_pipeline.preview(slide_path, model=bundle, output=tmp_path / "both", **FAST)
    alone, both = (tmp_path / name / "synthetic slide" for name in ("alone", "both"))
    assert not (both / "run.json").exists()
    told = preview_of(both)
    (run,) = wsi_pipeline.segment(slide_path, model=bundle, output=tmp_path / "both", **FAST)
    assert files_of(both) == files_of(alone)
    assert preview_of(both) == told
    # It belongs to the run of which it is, and goes with it.
    assert "preview.json" in run.files
    wsi_pipeline.segment(
        slide_path, model=bundle, output=tmp_path / "both", **FAST | {"mask_mpp": 1.0}
    )
    assert not (both / "preview.json").exists()


def test_what_an_interrupted_run_has_left_goes_on(tmp_path, slide_path, bundle):
    options = {**FAST, "block_size": 1024, "overlap": 0}
    (run,) = wsi_pipeline.segment(slide_path, model=bundle, output=tmp_path / "o", **options)
    folder = tmp_path / "o" / "synthetic slide"
    whole = files_of(folder)
    (folder / "run.json").unlink()
    (folder / "mask.ome.zarr").rename(folder / ".store" / "mask.ome.zarr")
    lost, *kept = sorted((folder / ".store" / "blocks").iterdir())
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in kept}
    # With other options, too.
    for overlap in (0, 32):
        wsi_pipeline.preview(
            slide_path, model=bundle, output=tmp_path / "o", **options | {"overlap": overlap}
        )
    (again,) = wsi_pipeline.segment(slide_path, model=bundle, output=tmp_path / "o", **options)
    assert files_of(folder) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert again.area_mm2 == run.area_mm2


def test_a_persons_file_stays(tmp_path, slide_path, bundle):
    folder = tmp_path / "o" / "synthetic slide"
    folder.mkdir(parents=True)
    (folder / "preview.json").write_text("mine", "utf-8")
    wsi_pipeline.preview(slide_path, model=bundle, output=tmp_path / "o", **FAST)
    assert (folder / "preview.json").read_text("utf-8") == "mine"
    assert json.loads((folder / "preview.new.json").read_text("utf-8"))[0]["class"] == "Tumor"


def test_another_models_run_is_refused(tmp_path, slide_path, bundle):
    wsi_pipeline.segment(slide_path, model=bundle, output=tmp_path / "o", **FAST)
    other = pointwise_bundle(tmp_path / "other", mpp=0.25, patch_size=96)
    result = command(slide_path, other, tmp_path / "o", "--preview")
    assert result.exit_code == 1
    assert "another model" in result.stderr
    assert command(slide_path, other, tmp_path / "o", "--preview", "--overwrite").exit_code == 0


def test_a_bad_slide_costs_no_other(tmp_path, slide_path, bundle):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "bad.tif").write_bytes(slide_path.read_bytes()[:5000])
    shutil.copy(slide_path, tmp_path / "slides" / "good.tif")
    result = command(tmp_path / "slides", bundle, tmp_path / "o", "--preview")
    assert result.exit_code == 1
    assert result.stderr.startswith("failed: ")
    assert "bad.tif: " in result.stderr
    assert [line.partition(" ")[0] for line in result.stdout.splitlines()] == ["good.tif:"] * 2
    assert preview_of(tmp_path / "o" / "good")


def test_what_cannot_be_read_is_no_class(tmp_path, make_slide, slide_pixels):
    slide = make_slide(tmp_path / "broken.tif", slide_pixels, 0.25, levels=(1,))
    with tifffile.TiffFile(slide) as file:
        page = file.pages[0]
        spans = [(page.dataoffsets[i], page.databytecounts[i]) for i in (9, 10, 18, 27)]
    with slide.open("r+b") as file:
        for offset, size in spans:
            file.seek(offset)
            file.write(b"\xa5" * size)
    options = {**FAST, "tissue": "none", "max_unreadable": 1.0, "overlap": 0}
    bundle = pointwise_bundle(tmp_path / "m", mpp=0.25, patch_size=512)
    (run,) = wsi_pipeline.segment(slide, model=bundle, output=tmp_path / "o", **options)
    (found,) = wsi_pipeline.preview(slide, model=bundle, output=tmp_path / "o", **options)
    assert run.bad_regions
    assert found.patches == found.of
    for name, (mm2, _, _) in found.areas.items():
        assert mm2 == pytest.approx(run.area_mm2[name], rel=1e-9)


def test_at_a_url_it_lies_beside_the_run(tmp_path, slide_path, bundle, bucket, monkeypatch):
    import boto3

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url, key = "s3://slides/previews", "previews/synthetic slide/preview.json"
    client = boto3.client("s3")

    def told():
        return json.loads(client.get_object(Bucket="slides", Key=key)["Body"].read())

    wsi_pipeline.preview(slide_path, model=bundle, output=url, **FAST)
    before = told()
    assert [one["class"] for one in before] == ["Tumor", "Stroma"]
    (run,) = wsi_pipeline.segment(slide_path, model=bundle, output=url, **FAST)
    assert run.status == "done"
    assert told() == before
    client.close()


def test_what_it_is_not_for_is_said_in_a_sentence(tmp_path, slide_path, bundle):
    for extra, sentence in {
        "--dry-run": "exclude each other",
        "--scheduler=127.0.0.1:1": "works on this machine",
    }.items():
        result = command(slide_path, bundle, tmp_path / "o", "--preview", extra)
        assert result.exit_code == 2
        assert sentence in result.stderr
    assert not (tmp_path / "o").exists()


def test_images_are_refused_in_a_sentence(tmp_path):
    bundle = scan_bundle(
        tmp_path / "m", modality="image", resolution="fit = [64, 64]", patch_size=(64, 64)
    )
    Image.new("L", (99, 75), 60).save(tmp_path / "image.png")
    result = command(tmp_path / "image.png", bundle, tmp_path / "o", "--preview")
    assert result.exit_code == 2
    assert "--preview is for slides" in result.stderr


def test_a_preview_keeps_the_memory_limit(tmp_path, slide_path, bundle, monkeypatch):
    before = command(slide_path, bundle, tmp_path / "out", "--preview", "--max-ram", "10MB")
    assert before.exit_code == 1
    assert "before any work, --max-ram allows 0.01 GB" in before.output
    taken = iter([0])
    monkeypatch.setattr("wsi_pipeline.run.main.used_memory", lambda: next(taken, 9 * 10**9))
    with pytest.raises(
        wsi_pipeline.WsiPipelineError, match=r"are taken, --max-ram .*; lower --bat"
    ):
        wsi_pipeline.preview(
            slide_path, model=bundle, output=tmp_path / "out", tissue="none", device="cpu",
            max_ram=8 * 10**9,
            # The memory is looked at for a second before it is too much.
            progress=lambda *_: time.sleep(0.5),
        )  # fmt: skip
    assert not (tmp_path / "out" / slide_path.stem / "preview.json").exists()
    script = """
import itertools, sys
from wsi_pipeline.run import main
from wsi_pipeline.cli import group
used = itertools.chain([0], itertools.repeat(9_000_000_000))
main.used_memory = lambda: next(used)
import wsi_pipeline.run.preview as preview, time
old = preview.Cells.measure
preview.Cells.measure = lambda *a: (time.sleep(60), old(*a))
group(sys.argv[1:])
"""
    line = ["segment", slide_path, "-m", bundle, "-o", tmp_path / "out", "--preview"]
    ended = subprocess.run(
        [sys.executable, "-c", script, *map(str, line), "--max-ram", "8GB"],
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "9.00 GB of memory are taken, --max-ram allows 8.00 GB; lower" in ended.stderr
