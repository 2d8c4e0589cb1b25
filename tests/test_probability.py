"""Probabilities against one canvas in memory; what blocks, kills and lost files leave of them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from bundles import Busy, blended_canvas, lightmuseg_bundle, pointwise_bundle
from runs import segment_job

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.errors import StoreError
from wsi_pipeline.inference.blend import iter_sampled_rows
from wsi_pipeline.options import (
    ExportOptions,
    PredictOptions,
    ScheduleOptions,
    SelectOptions,
    Settings,
)
from wsi_pipeline.report.record import load_run
from wsi_pipeline.run.jobs import plan_jobs
from wsi_pipeline.run.probability import open_probability
from wsi_pipeline.schedule.cluster import open_cluster

EVERYWHERE = SelectOptions(tissue="none")
MPP = (0.25, 0.2)
"""µm per pixel of the slide, (x, y)."""


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, slide_pixels):
    """Return a lossless slide whose pixels are no squares."""
    path = tmp_path_factory.mktemp("uneven") / "uneven.tif"
    per_cm = [10_000 / mpp for mpp in MPP]
    tifffile.imwrite(
        path, slide_pixels[:1101, :1303], photometric="rgb", tile=(256, 256), compression="deflate",
        resolution=per_cm, resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def run(slide, bundle, output, *, workers=1, select=EVERYWHERE, export=None, **predict):
    options = {"precision": "fp32", "device": "cpu", "block_size": 1024} | predict
    export = export or ExportOptions(outputs=("zarr", "probability"))
    settings = Settings(select=select, predict=PredictOptions(**options), export=export)
    (job,) = plan_jobs([Path(slide)], Path(output))
    with open_cluster(ScheduleOptions(workers=workers)) as client:
        return job.folder, segment_job(
            job, load_bundle(bundle), client=client, settings=settings, threads=workers
        )


def planes_of(folder, level=0):
    return zarr.open_array(folder / "probability.ome.zarr" / str(level), mode="r")[:]


def attributes_of(folder, name="probability.ome.zarr"):
    return zarr.open_group(folder / name, mode="r").attrs.asdict()


@pytest.fixture(scope="module")
def random(tmp_path_factory, uneven):
    """Return a model with random weights, and its canvas of `uneven`."""
    bundle = lightmuseg_bundle(
        tmp_path_factory.mktemp("random") / "model", mpp=0.37, patch_size=256, overlap=24
    )
    return bundle, blended_canvas(uneven, bundle, overlap=24)


@pytest.mark.parametrize(
    ("side", "mpp", "ngff"), [pytest.param(1, None, "0.4", marks=pytest.mark.slow), (3, 1.1, "0.5")]
)
def test_values_are_the_blended_means_however_the_slide_is_cut(
    tmp_path, uneven, random, side, mpp, ngff
):
    bundle, field = random
    outputs = ("zarr", "probability")
    export = ExportOptions(outputs=outputs, probability_mpp=mpp, ngff=ngff)
    found = []
    cuts = [(4096, 1)] if ngff == "0.5" else [(1024, 1), (2048, 1), (1024, 2)]
    for number, (block, workers) in enumerate(cuts):
        folder, made = run(
            uneven, bundle, tmp_path / str(number), export=export, block_size=block,
            workers=workers,
        )  # fmt: skip
        found.append(planes_of(folder))
        assert workers > 1 or made.patches["predicted"] == made.patches["kept"]
    _, height, width = field.shape
    cells = [
        [field[1:, y : y + side, x : x + side].mean((1, 2)) for x in range(0, width, side)]
        for y in range(0, height, side)
    ]
    expected = 255 * np.array(cells).transpose(2, 0, 1)
    assert found[0].shape == expected.shape
    assert np.abs(found[0] - expected).max() < 0.51
    assert np.ptp(expected) > 200
    assert all((other == found[0]).all() for other in found)


def test_it_lies_on_the_mask_and_has_its_classes_and_colours(tmp_path, uneven, random):
    bundle, field = random
    folder, _ = run(uneven, bundle, tmp_path / "out", mask_mpp=0.5)
    told, mask = attributes_of(folder), attributes_of(folder, "mask.ome.zarr")
    (multiscale,) = told["multiscales"]
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    assert multiscale["axes"][0]["type"] == "channel"
    assert [(c["label"], c["color"]) for c in told["omero"]["channels"]] == [
        ("Tumor", "C80000"), ("Stroma", "96C896"),
    ]  # fmt: skip
    fine = mask["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    for level, dataset in enumerate(multiscale["datasets"]):
        scale, shift = (t[t["type"]] for t in dataset["coordinateTransformations"])
        array = zarr.open_array(folder / "probability.ome.zarr" / dataset["path"], mode="r")
        # the outer edges, half a pixel before the first centre, are the same
        assert [t - s / 2 for s, t in zip(scale, shift, strict=True)][1:] == pytest.approx(
            [-s / 2 for s in fine]
        )
        assert array.shape[1:] == tuple(-(-n // 2**level) for n in field.shape[1:])
        extent = [n * s for n, s in zip(array.shape[1:], scale[1:], strict=True)]
        whole = [1101 * MPP[1], 1303 * MPP[0]]
        assert all(0 <= e - w < s for e, w, s in zip(extent, whole, scale[1:], strict=True))


def test_reduced_levels_are_means(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.25, patch_size=300)
    folder, _ = run(slide_path, bundle, tmp_path / "out")
    fine, coarse = planes_of(folder).astype(float), planes_of(folder, 1)
    assert fine.shape == (2, 1487, 1931)
    padded = np.pad(fine, [(0, 0), (0, 1), (0, 1)], mode="edge")
    expected = padded.reshape(2, 744, 2, 966, 2).mean((2, 4))
    assert np.abs(coarse - expected).max() <= 0.5
    assert len(open_probability(folder).levels) == 2


def test_off_the_tissue_and_the_roi_nothing_is_stored(tmp_path, uneven, random):
    bundle, field = random
    roi = tmp_path / "roi.geojson"
    left, top, right, bottom = 301.5, 120.25, 500.75, 333.0
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    feature = {"type": "Feature", "properties": {}, "geometry": shape}
    roi.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}), "utf-8")
    folder, _ = run(uneven, bundle, tmp_path / "out", select=SelectOptions(tissue="none", roi=roi))
    planes = planes_of(folder)
    y, x = (
        (np.arange(n) + 0.5) * 0.37 / mpp
        for n, mpp in zip(planes.shape[1:], MPP[::-1], strict=True)
    )
    reach = 2.5 * 0.37 / min(MPP)
    far = ((y < top - reach) | (y > bottom + reach))[:, None] | (
        (x < left - reach) | (x > right + reach)
    )[None]
    near = ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))[None]
    assert not planes[:, far].any()
    inside, expected = planes[:, near], 255 * field[1:, near]
    assert inside.any()
    # at the edge of the patches that touch it fewer of them are blended
    assert np.median(np.abs(inside - expected)) < 0.51
    files = {p.name for p in (folder / "probability.ome.zarr" / "0").rglob("*") if p.is_file()}
    assert files - {".zattrs"} == {".zarray", "0"}


def test_what_is_read_at_mask_pixels_is_what_the_engine_samples(tmp_path, uneven, random):
    bundle, _ = random
    folder, _ = run(uneven, bundle, tmp_path / "out")
    found, planes = open_probability(folder), planes_of(folder)
    assert found.classes == ["Tumor", "Stroma"]
    assert found.mpp == pytest.approx((0.37, 0.37), rel=1e-4)
    start, stop = (511, 3), (1101, 1303)
    bands = torch.from_numpy(planes.astype(np.float32) / np.float32(255))
    rows = iter_sampled_rows(
        [(0, bands)], (0,), start=start, stop=stop, ratio=found.ratio, shape=planes.shape[1:]
    )
    expected = torch.cat([part for _, part in rows], dim=1).numpy()
    assert (found.read(start, stop) == expected).all()


def test_files_that_are_lost_are_made_again(tmp_path, slide_path):
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.37, patch_size=300)
    folder, _ = run(slide_path, bundle, tmp_path / "out")
    first, place = planes_of(folder), folder / "probability.ome.zarr"
    chunk = place / "0" / "0" / "0" / "0"
    for harm in (
        lambda: shutil.rmtree(place),
        lambda: chunk.unlink(),
        lambda: chunk.write_bytes(chunk.read_bytes()[:-1] + b"?"),
    ):
        harm()
        (folder / "run.json").unlink()
        run(slide_path, bundle, tmp_path / "out")
        assert (planes_of(folder) == first).all()
    # What is whole stays, and so do the blocks.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    (folder / "run.json").unlink()
    run(slide_path, bundle, tmp_path / "out")
    kept = [p for p in before if p.parent.name == "blocks" or place in p.parents]
    assert all(p.stat().st_mtime_ns == before[p] for p in kept)
    assert len(kept) > 4
    with pytest.raises(StoreError, match="segment again, with probability as an output"):
        open_probability(tmp_path)


@pytest.mark.slow
def test_a_kill_between_blocks_loses_no_value(tmp_path, make_slide, slide_pixels):
    slide = make_slide(tmp_path / "slide.tif", np.tile(slide_pixels, (2, 2, 1)), 0.25)
    bundle = pointwise_bundle(tmp_path / "model", mpp=0.37, patch_size=256, program=Busy)
    arguments = [
        "segment", slide, "--model", bundle, "--block-size", "1024", "--tissue", "none",
        "--precision", "fp32", "--device", "cpu", "--outputs", "zarr,probability",
    ]  # fmt: skip
    command = [sys.executable, "-m", "wsi_pipeline", "-q", *map(str, arguments), "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")])
    folder = tmp_path / "killed" / "slide"
    deadline = time.monotonic() + 120
    while len(list((folder / ".store" / "blocks").glob("[0-9]*.npz"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = sorted((folder / ".store" / "blocks").glob("[0-9]*.npz"))
    assert 3 <= len(held) < 12
    # A disk may have lost one, and spoilt another.
    kept = folder / ".store" / "probability-1"
    (kept / held[0].name).unlink()
    spoilt = kept / held[1].name
    spoilt.write_bytes(spoilt.read_bytes()[:-100])
    times = {path: path.stat().st_mtime_ns for path in held}
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    assert (planes_of(folder) == planes_of(tmp_path / "whole" / "slide")).all()
    assert [path.stat().st_mtime_ns == times[path] for path in held[:3]] == [False, False, True]
    assert load_run(folder).status == "done"
    assert not kept.exists()
