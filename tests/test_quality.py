"""Quality of slides: flaws put on real tissue, real tissue as it is, and what runs make of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner
from PIL import Image
from scipy import ndimage

import wsi_pipeline
from wsi_pipeline import open_run
from wsi_pipeline.cli import group
from wsi_pipeline.errors import StoreError
from wsi_pipeline.run.again import export_again
from wsi_pipeline.sources import open_source
from wsi_pipeline.tissue.detect import find_tissue
from wsi_pipeline.tissue.quality import CELL, QUALITIES, assess, look_of

MPP = 0.25
NAMES = [quality.name for quality in QUALITIES]
INKS = {
    "blue": (0.8, 0.45, 0.1),
    "green": (0.7, 0.25, 0.5),
    "black": (0.8, 0.8, 0.8),
    "red": (0.05, 0.65, 0.5),
}
"""Optical density in red, green and blue light of a stroke through which tissue is seen."""


@pytest.fixture(scope="module")
def tissue(data_dir):
    """Return 896 × 640 µm of a carcinoma, and how its slide looks."""
    pixels = np.asarray(Image.open(data_dir / "bcss" / "images" / "1008.jpg").convert("RGB"))
    return pixels, look(pixels, MPP)


def look(pixels, mpp):
    factor = max(1, round(8 / mpp))
    thumbnail = np.asarray(Image.fromarray(pixels).reduce(factor))
    return look_of(thumbnail, find_tissue(thumbnail, mpp * factor), 64)


def cells_of(pixels, mpp, look_of_it):
    """Return the cells of a picture, of 16 µm, by Pillow's box filter."""
    rows, columns = (int(n * mpp // CELL) for n in pixels.shape[:2])
    box = (0, 0, columns * CELL / mpp, rows * CELL / mpp)
    size = (columns * CELL, rows * CELL)
    small = Image.fromarray(pixels).resize(size, Image.Resampling.BOX, box=box)
    return assess(np.asarray(small), look_of_it)


def blurred(pixels, sigma_um, mpp=MPP):
    planes = [ndimage.gaussian_filter(p.astype(np.float32), sigma_um / mpp) for p in pixels.T]
    return np.round(np.stack(planes).T).astype(np.uint8)


def ellipse(shape):
    y, x = np.ogrid[: shape[0], : shape[1]]
    return ((y / shape[0] - 0.5) / 0.35) ** 2 + ((x / shape[1] - 0.5) / 0.35) ** 2 < 1


def saved(pixels, tmp_path):
    """Return pixels as scanners save them."""
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=85)
    return np.asarray(Image.open(tmp_path / "a.jpg"))


def area(found, name):
    """Return µm² of a quality."""
    return (found == NAMES.index(name)).sum() * CELL**2


@pytest.mark.parametrize("sigma_um", [2, 3, 5])
def test_blurred_tissue(tissue, tmp_path, sigma_um):
    pixels, own = tissue
    where = ellipse(pixels.shape)
    blurry = np.where(where[..., None], blurred(pixels, sigma_um), pixels)
    found = cells_of(saved(blurry, tmp_path), MPP, own)
    assert area(found, "out-of-focus") == pytest.approx(where.sum() * MPP**2, rel=0.1)
    assert (found > 0).sum() * CELL**2 == area(found, "out-of-focus")


@pytest.mark.parametrize("ink", INKS)
def test_tissue_under_a_pen(tissue, tmp_path, ink):
    pixels, own = tissue
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]] * MPP
    where = abs(x - 440 - 80 * np.sin(y / 100)) < 100
    edge = ndimage.gaussian_filter(where.astype(np.float32), 3 / MPP)[..., None]
    inked = np.round(pixels * 10 ** (-edge * np.array(INKS[ink]))).astype(np.uint8)
    found = cells_of(saved(inked, tmp_path), MPP, own)
    assert area(found, "pen") == pytest.approx(where.sum() * MPP**2, rel=0.1)


def test_folded_tissue(tissue, tmp_path):
    pixels, own = tissue
    where, above = ellipse(pixels.shape), np.roll(pixels, (480, -360), (0, 1))
    double = pixels * (above / np.array(own.glass)).clip(0, 1)
    folded = np.where(where[..., None], np.round(double), pixels).astype(np.uint8)
    found = cells_of(saved(folded, tmp_path), MPP, own)
    assert area(found, "fold") == pytest.approx(where.sum() * MPP**2, rel=0.1)


REGIONS = {
    "1019": ("bcss/images/1019.jpg", 0.249),
    "a0ye": ("bcss_a0ye/images/TCGA-A2-A0YE.png", 1),
    "CMU-1": ("wsi/svs/CMU-1-Small-Region.svs", 0.499),
}
"""Other tissue, of other stains and scanners; `a0ye` has 1.09 µm per pixel, which a run leaves."""


@pytest.fixture(scope="module", params=REGIONS)
def region(request, data_dir):
    """Return a region's name, pixels, µm per pixel, what of it is tissue, how its slide looks."""
    name, mpp = REGIONS[request.param]
    with open_source(data_dir / name, mpp=mpp) as slide:
        view = slide.at(max(mpp, 0.5))
        pixels, mpp = view.read((0, 0), view.shape), max(mpp, 0.5)
    own = look(pixels, mpp)
    density = np.log10((np.array(own.glass) + 1) / (pixels + 1.0)).clip(0)
    is_tissue = ndimage.uniform_filter(density.mean(axis=2), CELL / mpp) > 0.05
    return request.param, pixels, mpp, is_tissue, own, density


def found_in(region, flawed, where, name, tmp_path):
    """Return the area that is called so over that of the tissue where it is so."""
    _, _, mpp, is_tissue, own, _ = region
    pixels = np.round(flawed).clip(0, 255).astype(np.uint8)
    found = cells_of(saved(pixels, tmp_path), mpp, own)
    return area(found, name) / ((where & is_tissue).sum() * mpp**2)


@pytest.mark.parametrize("sigma_um", [2, 3, 5, 10])
def test_other_tissue_that_is_blurred(region, tmp_path, sigma_um):
    pixels, mpp, where = *region[1:3], ellipse(region[1].shape)
    blurry = np.where(where[..., None], blurred(pixels, sigma_um, mpp), pixels)
    share = found_in(region, blurry, where, "out-of-focus", tmp_path)
    assert share == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("strength", [0.5, 1])
def test_other_tissue_under_a_pen(region, tmp_path, ink, strength):
    name, pixels, mpp = region[:3]
    y, x = (axis * mpp for axis in np.ogrid[: pixels.shape[0], : pixels.shape[1]])
    where = abs(x - x.max() / 2 - 80 * np.sin(y / 100)) < 100
    edge = ndimage.gaussian_filter(where.astype(np.float32), 3 / mpp)[..., None]
    inked = pixels * 10 ** (-strength * edge * np.array(INKS[ink]))
    everywhere = (name, pixels, mpp, np.ones(where.shape, bool), *region[4:])
    share = found_in(everywhere, inked, where, "pen", tmp_path)
    # Where the slide's own tissue has the hue of faint ink, less of that is found.
    least = 0.9 if strength == 1 else 0.55
    assert least < share < 1.1


def test_other_tissue_that_is_folded(region, tmp_path):
    name, pixels, mpp, *_, density = region
    y, x = (axis * mpp for axis in np.ogrid[: pixels.shape[0], : pixels.shape[1]])
    where = abs(x - x.max() / 2 - 60 * np.sin(y / 100)) < 80
    edge = ndimage.gaussian_filter(where.astype(np.float32), 2 / mpp)[..., None]
    share = found_in(region, pixels * 10 ** (-edge * density), where, "fold", tmp_path)
    # Of this one's tissue half is denser than two layers of the rest.
    assert 0.3 < share < 0.6 if name == "CMU-1" else share == pytest.approx(1, rel=0.1)


def test_blood_is_no_fold_however_dense(region, tmp_path):
    (_, pixels, mpp), own = region[:3], region[4]
    where = ellipse(pixels.shape)
    pool = np.array(own.glass) * 10 ** -np.array([0.03, 0.45, 0.4])
    found = cells_of(np.where(where[..., None], pool, pixels).astype(np.uint8), mpp, own)
    assert area(found, "blood") == pytest.approx(where.sum() * mpp**2, rel=0.1)


def test_a_bubble_is_what_a_closed_grey_rim_surrounds(tissue, tmp_path):
    pixels, own = tissue
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]] * MPP
    distance = np.hypot(y - 320, x - 450)
    bubble = np.where((distance < 200)[..., None], np.uint8(240), pixels)
    bubble[abs(distance - 200) < 8] = 90
    found = cells_of(saved(bubble.astype(np.uint8), tmp_path), MPP, own)
    assert area(found, "bubble") == pytest.approx(np.pi * 200**2, rel=0.15)


@pytest.mark.filterwarnings("error")
def test_on_a_slide_of_glass_alone_nothing_is_wrong():
    glass = np.full((256, 256, 3), 244, np.uint8)
    glass[64:128, 64:128], glass[128:192] = 240, 255
    for tissue in (False, True):
        look_of_it = look_of(glass[:64], np.full((64, 256), tissue), 64)
        assert not assess(glass, look_of_it).any()


def test_tissue_as_it_is(data_dir, cmu_path):
    """Of all real tissue at hand not one cell in a hundred is bad, ink that is there among them."""
    files = {
        *(data_dir / "bcss" / "images").glob("*.jpg"),
        *(data_dir / "he_other" / "brecahad" / "images").glob("*.jpg"),
        *(data_dir / "he_other" / "normal_breast_nbt" / "images").glob("*.jpg"),
        *(data_dir / "bcss_tiles" / "images").glob("*.png"),
    }
    coarser = {
        *(data_dir / "he_other" / "negatives_crc" / "images").glob("*.png"),
        *(data_dir / "bcss_a0sk" / "images").glob("*.png"),
        *(data_dir / "bcss_a0ye" / "images").glob("*.png"),
    }
    assert len(files) >= 9
    assert len(coarser) >= 30
    pictures = [(p, np.asarray(Image.open(p).convert("RGB")), 0.25) for p in sorted(files)]
    pictures += [(p, np.asarray(Image.open(p).convert("RGB")), 0.5) for p in sorted(coarser)]
    for path in (cmu_path, data_dir / "he_other" / "os1" / "OS-1-detail.ome.tif"):
        with open_source(path) as slide:
            view = slide.at(slide.mpp[0])
            pictures.append((path, view.read((0, 0), view.shape), slide.mpp[0]))
    found = [cells_of(p, mpp, look(p, mpp)).ravel() for _, p, mpp in pictures]
    assert (np.concatenate(found) > 0).mean() < 0.01


@pytest.fixture(scope="module")
def blurry_slide(tissue, tmp_path_factory, make_slide):
    """Return a slide of odd size that is out of focus on its right."""
    pixels = tissue[0][:2301, :3007].copy()
    pixels[:, 1800:] = blurred(pixels, 3)[:, 1800:]
    return make_slide(tmp_path_factory.mktemp("blurry") / "a.tif", pixels, MPP, levels=(1,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pointwise_bundle(tmp_path_factory.mktemp("model"), mpp=0.5)


OUTPUTS = ("zarr", "probability", "geojson")


def segment(slide, model, output, outputs=OUTPUTS, **options):
    (run,) = wsi_pipeline.segment(
        [slide], model=model, output=output, outputs=outputs, tissue="none", device="cpu",
        block_size=options.pop("block_size", 1024), precision="fp32", **options,
    )  # fmt: skip
    assert run.status == "done", run.reason
    return run, np.asarray(zarr.open(Path(output) / "a" / "mask.ome.zarr", mode="r")["0"])


def quality_of(output):
    image = zarr.open(Path(output) / "a" / "quality.ome.zarr", mode="r")
    return image, np.asarray(image["0"])


def pixels_of(cells, shape):
    """Return the cell of each pixel of a mask at 0.25 µm/px."""
    return np.kron(cells, np.ones((64, 64), np.uint8))[: shape[0], : shape[1]]


def test_a_run_tells_the_quality_of_each_class(blurry_slide, model, tmp_path):
    plain, mask = segment(blurry_slide, model, tmp_path / "plain")
    run, same = segment(blurry_slide, model, tmp_path / "out", (*OUTPUTS, "quality"))
    assert np.array_equal(mask, same)
    assert run.certificate["sha256"] == plain.certificate["sha256"]
    assert not plain.quality_mm2
    image, cells = quality_of(tmp_path / "out")
    scale = image.attrs["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    assert scale == pytest.approx([16, 16])
    labels = image["labels/classes"].attrs["image-label"]["properties"]
    assert [label["class"] for label in labels] == NAMES
    # 1,800 of 3,007 columns are in focus; some cells straddle that or the edge
    is_out = cells == NAMES.index("out-of-focus")
    assert not is_out[:, :27].any()
    assert is_out[:-1, 30:-1].mean() > 0.95
    every = pixels_of(cells, mask.shape)
    for index, name in enumerate(["Background", *run.area_mm2]):
        told = run.quality_mm2.get(name, {})
        counts = np.bincount(every[mask == index], minlength=len(NAMES))
        wanted = {n: c * MPP**2 * 1e-6 for n, c in zip(NAMES[1:], counts[1:], strict=True) if c}
        assert told == pytest.approx(wanted, rel=1e-3)
    (first, second) = (tmp_path / "out" / "summary.csv").read_text().splitlines()
    row = dict(zip(first.split(","), second.split(","), strict=True))
    name, told = next((n, q) for n, q in run.quality_mm2.items() if n != "Background")
    assert float(row[f"{name}_out-of-focus_mm2"]) == pytest.approx(told["out-of-focus"], abs=1e-6)
    assert "of which" in (tmp_path / "out" / "report.html").read_text()


def regions_of(folder):
    return pd.read_csv(folder / "a" / "regions.csv", index_col="id")


SHARES = [f"share_{name}" for name in NAMES[1:]]


@pytest.mark.slow
def test_regions_tell_which_part_of_them_is_bad(blurry_slide, model, tmp_path):
    exact = {"simplify_um": 0, "min_area_um2": 0}
    outputs, out = (*OUTPUTS, "quality"), tmp_path / "out"
    run, mask = segment(blurry_slide, model, out, outputs, **exact)
    every, table = pixels_of(quality_of(out)[1], mask.shape), regions_of(out)
    assert list(table)[-5:] == SHARES
    text = (out / "a" / "annotations.geojson").read_text("utf-8")
    features = {f["id"]: f for f in json.loads(text)["features"]}
    share = table["share_out-of-focus"]
    chosen = [*table["area_um2"].nlargest(5).index, *share[(share > 0) & (share < 1)].index[:20]]
    assert len(chosen) > 10
    for name in chosen:
        polygon = shapely.geometry.shape(features[name]["geometry"])
        x0, y0, x1, y1 = map(int, polygon.bounds)
        y, x = np.mgrid[y0:y1, x0:x1]
        inside = shapely.contains_xy(polygon, x + 0.5, y + 0.5)
        wanted = np.bincount(every[y0:y1, x0:x1][inside], minlength=len(NAMES))[1:] / inside.sum()
        assert table.loc[name, SHARES].to_numpy(float) == pytest.approx(wanted, abs=5e-5)
        measured = features[name]["properties"]["measurements"]
        assert measured["Share out-of-focus"] == share[name]
    # All of a class lies in its regions.
    told = sum(run.quality_mm2[c].get("out-of-focus", 0) for c in run.area_mm2)
    assert (share * table["area_um2"]).sum() * 1e-6 == pytest.approx(told, rel=1e-3)
    # Of any blocks, made again, by other thresholds here and elsewhere.
    segment(blurry_slide, model, tmp_path / "whole", outputs, block_size=4096, **exact)
    assert regions_of(tmp_path / "whole")[SHARES].equals(table[SHARES])
    export_again(tmp_path / "whole" / "a", {"min_area_um2": 100})
    kept = regions_of(tmp_path / "whole")
    assert kept[SHARES].equals(table.loc[kept.index, SHARES])
    rule = ["--threshold", f"{next(iter(run.area_mm2))}=0.3"]
    line = ["export", str(tmp_path / "whole" / "a"), *rule]
    assert CliRunner().invoke(group, [*line, "--output", str(tmp_path / "new")]).exit_code == 0
    assert CliRunner().invoke(group, line).exit_code == 0
    ruled = regions_of(tmp_path / "new")
    assert not ruled.index.equals(kept.index)
    assert ruled[SHARES].equals(regions_of(tmp_path / "whole")[SHARES])
    segment(blurry_slide, model, tmp_path / "plain", **exact)
    assert regions_of(tmp_path / "plain").equals(table.drop(columns=SHARES))


def test_an_opened_run_has_the_quality(blurry_slide, model, tmp_path):
    segment(blurry_slide, model, tmp_path / "out", ("zarr", "quality"))
    with open_run(tmp_path / "out" / "a") as run:
        assert np.array_equal(run.quality, quality_of(tmp_path / "out")[1])
        assert run.quality.mpp == pytest.approx((16, 16))
    shutil.rmtree(tmp_path / "out" / "a" / "quality.ome.zarr")
    with pytest.raises(StoreError, match=r"no quality\.ome\.zarr"):
        _ = open_run(tmp_path / "out" / "a").quality


def test_models_that_see_too_little_call_nothing_out_of_focus(blurry_slide, tmp_path):
    coarse = pointwise_bundle(tmp_path / "model", mpp=2)
    segment(blurry_slide, coarse, tmp_path / "out", ("zarr", "quality"), mask_mpp=2)
    cells = quality_of(tmp_path / "out")[1]
    assert cells.size > 1000
    assert not (cells == NAMES.index("out-of-focus")).any()


def test_quality_is_that_of_any_blocks_and_is_added_to_a_run(blurry_slide, model, tmp_path):
    outputs = ("zarr", "quality")
    segment(blurry_slide, model, tmp_path / "whole", outputs, block_size=4096)
    # Without it at first: the same blocks are done again for its sake.
    segment(blurry_slide, model, tmp_path / "blocks", ("zarr",))
    run, _ = segment(blurry_slide, model, tmp_path / "blocks", outputs)
    whole, blocks = (quality_of(tmp_path / name)[1] for name in ("whole", "blocks"))
    assert np.array_equal(whole, blocks)
    folder = tmp_path / "blocks" / "a"
    (folder / "quality.ome.zarr").rename(tmp_path / "old")
    assert export_again(folder, {}).quality_mm2 == run.quality_mm2
    assert np.array_equal(quality_of(tmp_path / "blocks")[1], blocks)


def test_what_blends_logits_is_judged_the_same(blurry_slide, model, tmp_path):
    """Of a model that sees single pixels all patches say the same: blending changes nothing."""
    other = Path(shutil.copytree(model, tmp_path / "model"))
    told = (other / "model.toml").read_text("utf-8")
    told = told.replace("[input]", '[input]\nconvention = "nnunet"')
    (other / "model.toml").write_text(told, "utf-8")
    kept = {"skip": ("out-of-focus",), "outputs": (*OUTPUTS, "quality")}
    run, mask = segment(blurry_slide, model, tmp_path / "plain", **kept)
    made, found = segment(blurry_slide, other, tmp_path / "out", **kept)
    assert made.certificate["model"] != run.certificate["model"]
    assert (found == mask).mean() > 0.9999
    levels = [
        np.asarray(zarr.open(tmp_path / name / "a" / "probability.ome.zarr", mode="r")["0"])
        for name in ("plain", "out")
    ]
    assert abs(levels[0].astype(int) - levels[1]).max() <= 1
    assert np.array_equal(*(quality_of(tmp_path / name)[1] for name in ("plain", "out")))
    for name, areas in run.quality_mm2.items():
        assert made.quality_mm2[name] == pytest.approx(areas, rel=1e-3, abs=1e-5)


def test_skipped_qualities_are_background(blurry_slide, model, tmp_path):
    plain, mask = segment(blurry_slide, model, tmp_path / "plain")
    run, without = segment(blurry_slide, model, tmp_path / "out", skip=("out-of-focus", "pen"))
    assert run.settings["key"] != plain.settings["key"]
    every = pixels_of(quality_of(tmp_path / "out")[1], mask.shape)
    is_out = np.isin(every, [NAMES.index("out-of-focus"), NAMES.index("pen")])
    assert mask[is_out].any()
    assert np.array_equal(without, np.where(is_out, 0, mask))
    assert set(run.quality_mm2) <= {"Background"} | {
        n for n, q in run.quality_mm2.items() if set(q) - {"out-of-focus", "pen"}
    }
    folder = tmp_path / "out" / "a"
    assert CliRunner().invoke(group, ["verify", str(folder), "--share", "1"]).exit_code == 0
    # Other thresholds leave out the same.
    name = next(iter(run.area_mm2))
    line = ["export", str(folder), "--threshold", f"{name}=0.3", "--output", str(tmp_path / "new")]
    assert CliRunner().invoke(group, line).exit_code == 0
    ruled = np.asarray(zarr.open(tmp_path / "new" / "a" / "mask.ome.zarr", mode="r")["0"])
    assert ruled.any()
    assert not ruled[is_out].any()
    told = json.loads((tmp_path / "new" / "a" / "run.json").read_text())["quality_mm2"]
    assert told["Background"]["out-of-focus"] == pytest.approx(
        (every == 1).sum() * MPP**2 * 1e-6, rel=1e-3
    )
