"""How often the interval of `segment --preview` holds what a run finds, on real tissue.

python benchmarks/preview.py --data ../shared/data --work bench/preview

Eleven regions: five pictures as they are, cut into many patches by a large overlap, and six
mosaics of them on glass, with the overlap of the model; and the mosaics taken as one slide. Each is
segmented once, and each of its patches measured once; then samples are drawn of these.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from make_slide import write_slide
from PIL import Image
from scipy import ndimage

import wsi_pipeline
from wsi_pipeline import PredictOptions, Settings
from wsi_pipeline.inference.predictor import Predictor
from wsi_pipeline.run.preview import Cells
from wsi_pipeline.run.segment import fitting
from wsi_pipeline.run.slide_run import SlideRun
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.tissue.sampling import PER_STRATUM, draw, estimate, look, sample_size, stratify

Pixels = npt.NDArray[np.uint8]

MPP = 0.5
CELL = 600
"""Pixels of a mosaic's pieces."""
SINGLE = {"a0d2": 224, "a3xx": 224, "a0ye": 224, "nbt": 224, "cmu": 192}
"""Pictures that are regions by themselves, and the overlap of their patches."""
MOSAICS = {
    "all": (1, {"a0d2": 1, "a3xx": 1, "a0ye": 1, "nbt": 1, "cmu": 1, "a0sk": 1}),
    "half": (2, {"a0d2": 1, "nbt": 1, "cmu": 1}),
    "rare": (3, {"os1": 0.08, "nbt": 1, "cmu": 1}),
    "few": (4, {"a3xx": 0.3, "nbt": 1, "cmu": 1, "brec": 0.3}),
    "much": (5, {"a0d2": 1, "a3xx": 1, "a0sk": 1, "a0ye": 1}),
    "brec": (6, {"brec": 1, "nbt": 1, "a0ye": 0.5}),
}
"""Seed, and how much of each picture, about."""


def read_pictures(data: Path) -> dict[str, Pixels]:
    """Return the pictures at 0.5 µm/px."""

    def scaled(image: Image.Image, mpp: float) -> Pixels:
        size = round(image.width * mpp / MPP), round(image.height * mpp / MPP)
        kind = Image.Resampling.BOX if mpp < MPP else Image.Resampling.BILINEAR
        return np.asarray(image.convert("RGB").resize(size, kind))

    def joined(folder: str, mpp: float, columns: int, shape: tuple[int, int]) -> Pixels:
        paths = sorted((data / folder).iterdir())
        tiles = [scaled(Image.open(path), mpp)[: shape[0], : shape[1]] for path in paths]
        rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
        return np.vstack(rows)

    os1 = tifffile.imread(data / "he_other/os1/OS-1-detail.ome.tif")
    with openslide.OpenSlide(data / "wsi/svs/CMU-1-Small-Region.svs") as slide:
        cmu = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    named = {
        "a0d2": ("bcss/images/1008.jpg", 0.2363),
        "a3xx": ("bcss/images/1019.jpg", 0.249),
        "a0ye": ("bcss_a0ye/images/TCGA-A2-A0YE.png", 1.09),
        "nbt": ("he_other/normal_breast_nbt/images/nbt_normal.jpg", 0.25),
    }
    return {
        **{name: scaled(Image.open(data / path), mpp) for name, (path, mpp) in named.items()},
        "cmu": cmu,
        "os1": scaled(Image.fromarray(np.ascontiguousarray(os1[..., :3])), 0.2271),
        "a0sk": joined("bcss_a0sk/images", 0.5, 6, (226, 244)),
        "brec": joined("he_other/brecahad/images", 0.25, 2, (512, 680)),
    }


def mosaic(
    pictures: dict[str, Pixels], seed: int, kinds: dict[str, float], size: tuple[int, int]
) -> Pixels:
    """Lay turned pieces of pictures, those of one kind together, in a blob on glass; return it."""
    random, (width, height) = np.random.default_rng(seed), size
    rows, columns = -(-height // CELL), -(-width // CELL)
    fields = []
    for weight in kinds.values():
        field = ndimage.gaussian_filter(random.normal(size=(rows, columns)), 1.5, mode="reflect")
        fields.append(field / field.std() + np.log(weight))
    which = np.argmax(fields, axis=0)
    y, x = np.mgrid[:height:8, :width:8]
    edge = ndimage.gaussian_filter(random.normal(size=y.shape), 60)
    is_tissue = (y / height - 0.5) ** 2 + (x / width - 0.5) ** 2 + 0.03 * edge / edge.std() < 0.2
    is_tissue = is_tissue.repeat(8, 0).repeat(8, 1)[:height, :width]
    pixels = np.full((height, width, 3), 244, np.uint8)
    for row, column in np.ndindex(rows, columns):
        piece = pictures[list(kinds)[which[row, column]]]
        if random.random() < 0.5:
            piece = piece[::-1]
        if random.random() < 0.5:
            piece = piece[:, ::-1]
        if random.random() < 0.5:
            piece = piece.transpose(1, 0, 2)
        short = min(piece.shape[:2])
        piece = np.tile(piece, (-(-CELL // short),) * 2 + (1,)) if short < CELL else piece
        top, left = (random.integers(0, n - CELL + 1) for n in piece.shape[:2])
        target = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        target[:] = piece[top : top + target.shape[0], left : left + target.shape[1]]
    noise = random.integers(-2, 3, size=(height, width, 1))
    return np.where(is_tissue[..., None], pixels, (244 + noise).astype(np.uint8))


def write_regions(data: Path, folder: Path) -> dict[Path, int]:
    """Write the regions that are not there; return them with the overlap of their patches."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {folder / f"one-{n}.tif": o for n, o in SINGLE.items()}
    found |= {folder / f"mosaic-{name}.tif": 64 for name in MOSAICS}
    if missing := [path for path in found if not path.is_file()]:
        pictures = read_pictures(data)
        for path in missing:
            kind, _, name = path.stem.partition("-")
            pixels = pictures[name] if kind == "one" else None
            if pixels is None:
                pixels = mosaic(pictures, *MOSAICS[name], size=(9000, 8000))
            write_slide(path, pixels, MPP, compression="jpeg")
    return found


def record(path: Path, overlap: int, model: Path, work: Path, predictor: Predictor) -> Path:
    """Segment a region and measure all its patches; return the file that holds what was found."""
    target = work / f"{path.stem}.npz"
    if target.is_file():
        return target
    (run,) = wsi_pipeline.segment(
        path, model=model, output=work / "out", overlap=overlap, outputs=("zarr",), mask_mpp=1.0
    )
    bundle = predictor.bundle
    settings = fitting(Settings(predict=PredictOptions(overlap=overlap)), bundle)
    with SlideRun(path, bundle, settings) as slide:
        plan = slide.lay_out(RunStore(folder=work / "none"), 2, keep=False)
        with closing(Cells(plan, slide.source, predictor)) as cells:
            areas = cells.measure(np.arange(len(plan.grid)))
            np.savez(
                target,
                areas=areas,
                features=look(slide.stored),
                whole=cells.whole,
                run=list(run.area_mm2.values()),
                seconds=run.seconds["total"],
            )
    return target


def simulate(held: dict[str, np.ndarray], size: int, draws: int) -> tuple[float, float, float]:
    """Return how often the interval holds what the run found, its half width and the error.

    Both in shares of it; the error is that of the root mean square. Where several regions are
    taken for one, what all cells hold stands for the run.
    """
    areas, features = held["areas"], held["features"]
    truth = held["run"][0] if "run" in held else areas.sum(axis=0)[1]
    random = np.random.default_rng(1)
    strata = stratify(features, size // PER_STRATUM)
    found = np.empty((draws, 3))
    for i in range(draws):
        chosen = draw(strata, size, random)
        found[i] = estimate(areas[chosen], strata, chosen, float(held["whole"]))[1]
    holds = (found[:, 1] <= truth) & (truth <= found[:, 2])
    half = (found[:, 2] - found[:, 1]).mean() / 2
    error = np.sqrt(((found[:, 0] - truth) ** 2).mean())
    return float(holds.mean()), float(half / truth), float(error / truth)


def with_one_nest(held: dict[str, np.ndarray], *, patches: int) -> dict[str, np.ndarray]:
    """Return what is hard: specks of tumour everywhere, and all else of it in one place.

    Args:
        patches: that are left of those with more than a twentieth of tumour.
    """
    areas, places = held["areas"].copy(), held["features"][:, 4:]
    much = np.flatnonzero(areas[:, 1] > 0.05 * areas.sum(axis=1))
    apart = ((places[much] - places[much[100]]) ** 2).sum(axis=1)
    gone = much[np.argsort(apart)[patches:]]
    areas[gone, 0] += areas[gone, 1]
    areas[gone, 1] = 0
    return {"areas": areas, "features": held["features"], "whole": areas.sum()}


def plain_error(areas: np.ndarray, size: int) -> float:
    """Return the standard error of a plain random sample, as a share of what there is."""
    values, count = areas[:, 1], len(areas)
    variance = count**2 * (1 - size / count) * values.var(ddof=1) / size
    return float(np.sqrt(variance) / values.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="Intervals of previews against runs.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of real data")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("models/lightmuseg-bcss-demo"))
    parser.add_argument("--draws", type=int, default=1000)
    args = parser.parse_args()
    regions = write_regions(args.data, args.work / "slides")
    bundle = wsi_pipeline.load_bundle(args.model)
    with closing(Predictor(bundle)) as predictor:
        paths = [record(p, o, args.model, args.work, predictor) for p, o in regions.items()]
    held = {path.stem: dict(np.load(path)) for path in paths}

    print("| region | patches | run, mm² | all cells | preview, mm² | 95 % | holds | run, s | s |")
    print("|---|---:|---:|---:|---:|---|---|---:|---:|")
    for (path, overlap), (name, one) in zip(regions.items(), held.items(), strict=True):
        (seen,) = wsi_pipeline.preview(
            path, model=args.model, output=args.work / "previews", overlap=overlap
        )
        ((mm2, low, high),), truth = seen.areas.values(), one["run"][0]
        cells = one["areas"].sum(axis=0)[1] / truth - 1
        print(
            f"| {name} | {len(one['areas'])} | {truth:.4g} | {cells:+.2%} | {mm2:.4g} | "
            f"{low:.4g}–{high:.4g} | {'yes' if low <= truth <= high else 'no'} | "
            f"{np.ravel(one['seconds'])[0]:.0f} | {seen.seconds:.0f} |"
        )
    mosaics = [one for name, one in held.items() if name.startswith("mosaic")]
    places = [one["features"] + [0, 0, 0, 0, i, 0] for i, one in enumerate(mosaics)]
    held["all mosaics"] = {
        "areas": np.concatenate([one["areas"] for one in mosaics]),
        "features": np.concatenate(places),
        "whole": np.sum([one["whole"] for one in mosaics]),
    }
    held["one nest"] = with_one_nest(held["all mosaics"], patches=64)
    print(
        "\n| region | patches | tumour | sampled | coverage | half width | error | of a plain one |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, one in held.items():
        count = len(one["areas"])
        for size in (sample_size(count), 64, 128):
            if 2 * size > count:
                continue
            coverage, half, error = simulate(one, size, args.draws)
            share, plain = (
                one["areas"].sum(axis=0)[1] / one["whole"],
                plain_error(one["areas"], size),
            )
            print(
                f"| {name} | {count} | {share:.2%} | {size} | {coverage:.1%} | {half:.1%} | "
                f"{error:.1%} | {plain:.1%} |"
            )


if __name__ == "__main__":
    main()
