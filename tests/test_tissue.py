from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.data import immunohistochemistry

from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.sources import open_source
from wsi_pipeline.tissue.detect import find_tissue, read_tissue, select_patches

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

GLASS = (245, 245, 245)
EOSIN, HAEMATOXYLIN, BLOOD = (228, 168, 200), (120, 75, 150), (190, 60, 90)


def painted(
    colour: tuple[int, ...], inside: Mask, *, glass: tuple[int, ...] = GLASS, noise: float = 2.0
) -> Pixels:
    """Paint a shape on glass, with noise."""
    pixels = np.where(inside[..., None], colour, glass)
    noisy = pixels + np.random.default_rng(0).normal(0, noise, pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def square(shape: tuple[int, int] = (300, 400)) -> Mask:
    inside = np.zeros(shape, dtype=bool)
    inside[60:240, 80:300] = True
    return inside


def shrunk(path: Path, factor: int) -> Pixels:
    return np.asarray(Image.open(path).convert("RGB").reduce(factor))


def test_slide_of_known_shapes(slide_path: Path) -> None:
    with open_source(slide_path) as slide:
        thumbnail, downsample = slide.thumbnail(250)
    found = find_tissue(thumbnail, downsample[0] * 0.25)
    y, x = (np.arange(n) * downsample[0] for n in found.shape)
    big = ((x - 700) ** 2 / 560**2 + (y[:, None] - 760) ** 2 / 590**2) < 1
    hole = (x - 520) ** 2 + (y[:, None] - 600) ** 2 < 90**2
    blood = (abs(x - 930) < 130) & (abs(y[:, None] - 1030) < 95)
    assert found[ndimage.binary_erosion(big, iterations=2)].all()  # the hole is a small one
    assert found[hole].all()
    assert found[blood].all()
    right = (x > 1420) & (x < 1780) & (abs(y[:, None] - 400 - (x - 1600) // 3) < 200)
    assert found[right].mean() > 0.97
    far = ~ndimage.binary_dilation(find_tissue(thumbnail, 2.0), iterations=4)
    assert far.mean() > 0.2
    assert not found[far].any()


@pytest.mark.parametrize("colour", [EOSIN, HAEMATOXYLIN, BLOOD, (235, 225, 232), (238, 230, 236)])
@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0])
def test_tissue_is_kept_however_pale(colour: tuple[int, int, int], noise: float) -> None:
    inside = square()
    found = find_tissue(painted(colour, inside, noise=noise), 8.0)
    assert found[inside].mean() > 0.97
    assert found[~ndimage.binary_dilation(inside, iterations=3)].mean() < 0.001


def test_pale_tissue_is_kept_beside_strong() -> None:
    strong, pale = square(), np.roll(square(), 130, axis=1)
    pixels = painted(HAEMATOXYLIN, strong)
    pixels[pale & ~strong] = painted((235, 225, 232), pale)[pale & ~strong]
    assert find_tissue(pixels, 8.0)[pale].mean() > 0.97


@pytest.mark.parametrize("glass", [(240, 238, 225), (225, 228, 235), (250, 244, 246), (215,) * 3])
def test_tinted_glass_is_glass(glass: tuple[int, int, int]) -> None:
    inside = square()
    stained = tuple(round(a * b / 245) for a, b in zip(EOSIN, glass, strict=True))
    pixels = painted(stained, inside, glass=glass)
    pixels[:40] = 255  # where nothing was scanned
    found = find_tissue(pixels, 8.0)
    assert found[inside].mean() > 0.97
    assert not found[~ndimage.binary_dilation(inside, iterations=4)].any()


@pytest.mark.parametrize(
    "ink",
    [
        (30, 150, 130),  # green
        (170, 215, 205),  # faint green
        (30, 60, 150),  # blue
        (10, 20, 90),  # dark blue
        (20, 20, 22),  # black
        (200, 30, 50),  # red
    ],
)
def test_pens_are_not_tissue(ink: tuple[int, int, int]) -> None:
    tissue, stroke = square(), np.zeros((300, 400), dtype=bool)
    stroke[20:34, 10:390] = stroke[20:280, 350:365] = True
    pixels = painted(EOSIN, tissue)
    pixels[stroke] = painted(ink, stroke)[stroke]
    found = find_tissue(pixels, 8.0)
    assert found[tissue].mean() > 0.97
    assert found[stroke].mean() < 0.05


@pytest.mark.parametrize(
    ("shade", "rows"), [((205, 205, 207), 90), ((0, 0, 0), 90), ((30,) * 3, 5)]
)
def test_shadows_and_black_borders_are_not_tissue(shade: tuple[int, int, int], rows: int) -> None:
    pixels = painted(EOSIN, square())
    pixels[-rows:] = pixels[:, -20:] = shade
    found = find_tissue(pixels, 8.0)
    inside = square()
    inside[-rows:] = False
    assert found[inside].mean() > 0.97
    assert not found[245:].any()
    assert not found[:, 310:].any()


def test_dust_and_hairs_are_dropped_and_small_biopsies_are_not() -> None:
    rng = np.random.default_rng(1)
    specks = np.zeros((300, 400), dtype=bool)
    for y, x in rng.integers(5, 290, (60, 2)):
        specks[y : y + 4, x : x + 4] = True
    assert not find_tissue(painted((120, 80, 110), specks), 8.0).any()
    hair = abs(np.arange(300)[:, None] - 40 - np.arange(400) // 2) < 2
    assert not find_tissue(painted((90, 88, 85), hair), 8.0).any()
    biopsy = np.zeros((300, 400), dtype=bool)
    biopsy[100:125, 100:180] = True  # 0.2 × 0.64 mm
    assert find_tissue(painted(EOSIN, biopsy), 8.0)[biopsy].mean() > 0.95


def test_fat_is_kept_though_it_is_mostly_empty() -> None:
    side, cell, wall_um, mpp = 1600, 80, 3, 8
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(*[np.arange(0, side, cell)] * 2), axis=-1).reshape(-1, 2)
    centres = corners + rng.uniform(-28, 28, corners.shape)
    at = np.stack(np.mgrid[:side, :side], axis=-1).reshape(-1, 2)
    nearest, _ = cKDTree(centres).query(at, k=2)
    walls = (nearest[:, 1] - nearest[:, 0] < wall_um).reshape(side, side)
    y, x = np.ogrid[:side, :side]
    fat = (y - side / 2) ** 2 + (x - side / 2) ** 2 < (0.4 * side) ** 2
    n = side // mpp
    thumbnail = painted(EOSIN, walls & fat).reshape(n, mpp, n, mpp, 3).mean(axis=(1, 3))
    inside = fat[mpp // 2 :: mpp, mpp // 2 :: mpp]
    found = find_tissue(thumbnail.astype(np.uint8), mpp)
    assert found[inside].mean() > 0.9
    assert found[~inside].mean() < 0.01


@pytest.mark.parametrize("finer", [2, 3, 7])
def test_finer_thumbnails_show_the_same_tissue(finer: int) -> None:
    inside = square()
    pixels = painted(EOSIN, inside)
    found = find_tissue(pixels.repeat(finer, axis=0).repeat(finer, axis=1)[:-1, :-2], 8 / finer)
    assert found.shape == (300 * finer - 1, 400 * finer - 2)
    expected = find_tissue(pixels, 8.0).repeat(finer, axis=0).repeat(finer, axis=1)[:-1, :-2]
    np.testing.assert_array_equal(found, expected)


def test_large_holes_stay() -> None:
    inside = square()
    inside[100:200, 120:220] = False  # 0.8 mm
    found = find_tissue(painted(EOSIN, inside), 8.0)
    assert not found[115:185, 135:205].any()


@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (0, 0, 0), (128, 128, 128)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (200, 200)])
def test_plain_images_hold_no_tissue(colour: tuple[int, int, int], shape: tuple[int, int]) -> None:
    found = find_tissue(np.full((*shape, 3), colour, dtype=np.uint8), 8.0)
    assert found.shape == shape
    assert found.dtype == bool
    assert not found.any()


@pytest.mark.parametrize(("name", "mpp"), [("pen_green", 70.0), ("pen_red", 40.0)])
def test_pen_marks_of_real_slides(data_dir: Path, name: str, mpp: float) -> None:
    folder = data_dir / "he_other" / "histoqc_pen"
    pixels = np.asarray(Image.open(folder / "images" / f"{name}.png").convert("RGB"))
    pen = np.asarray(Image.open(folder / "masks" / f"{name}.png").convert("L")) > 0
    found = find_tissue(pixels, mpp)
    red, green, blue = np.moveaxis(pixels.astype(int), 2, 0)
    stained = (red - green > 25) & (blue - green > 12) & (green > 70)  # pink and purple
    stained &= ~ndimage.binary_dilation(pen, iterations=6)
    assert stained.mean() > 0.1
    assert found[stained].mean() > 0.99
    assert found[pen].mean() < {"pen_green": 0.01, "pen_red": 0.1}[name]


def test_real_tissue_is_kept(data_dir: Path) -> None:
    images = [
        *(data_dir / "bcss" / "images").glob("*.jpg"),
        *(data_dir / "he_other" / "brecahad" / "images").glob("*.jpg"),
        *(data_dir / "bcss_tiles" / "images").glob("*.png"),
    ]
    assert len(images) >= 9
    for path in images:
        assert find_tissue(shrunk(path, 32), 8.0).mean() > 0.95, path


def test_brown_stain_is_kept() -> None:
    pixels = np.asarray(Image.fromarray(immunohistochemistry()).reduce(8))
    assert find_tissue(pixels, 4.0).mean() > 0.95


def test_real_slide(cmu_path: Path) -> None:
    with open_source(cmu_path) as slide:
        view = slide.at(8.0)
        pixels = view.read((0, 0), view.shape)
    found = find_tissue(pixels, 8.0)
    assert found[pixels.astype(int).min(axis=2) < 190].mean() > 0.98
    assert not found[90:, : found.shape[1] // 5].any()  # glass on the left
    assert 0.35 < found.mean() < 0.5


def test_fluorescence_holds_no_tissue(data_dir: Path) -> None:
    with open_source(data_dir / "wsi" / "ndpi" / "test3-DAPI-2-_387_.ndpi") as slide:
        view = slide.at(8.0)
        assert not find_tissue(view.read((0, 0), view.shape), 8.0).any()


# --- patches -----------------------------------------------------------------------------------


@given(
    size=st.tuples(*[st.integers(200, 3000)] * 2),
    grid_downsample=st.tuples(*[st.floats(1, 9)] * 2),
    tissue_downsample=st.tuples(*[st.integers(8, 40)] * 2),
    patch=st.integers(20, 200),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_a_patch_is_kept_where_tissue_touches_it(
    size: tuple[int, int],
    grid_downsample: tuple[float, float],
    tissue_downsample: tuple[int, int],
    patch: int,
    seed: int,
) -> None:
    shape = tuple(int(np.ceil(n / f)) for n, f in zip(size, grid_downsample, strict=True))
    grid = PatchGrid.cover(shape, (patch, patch), (patch // 4, patch // 4))
    thumbnail = tuple(-(-n // f) for n, f in zip(size, tissue_downsample, strict=True))
    tissue = np.random.default_rng(seed).random(thumbnail) < 0.02
    kept = select_patches(tissue, tissue_downsample, grid, grid_downsample)
    assert kept.shape == (len(grid),)
    low = np.argwhere(tissue) * tissue_downsample  # corners of tissue pixels at level 0
    high = low + tissue_downsample
    for origin, is_kept in zip(grid.origins, kept, strict=True):
        start = origin * grid_downsample
        stop = (origin + patch) * grid_downsample
        inside = ((low < stop - 1e-6) & (high > start + 1e-6)).all(axis=1).any()
        near = ((low <= stop + 1e-6) & (high >= start - 1e-6)).all(axis=1).any()
        assert is_kept or not inside
        assert not is_kept or near


def test_no_tissue_keeps_no_patch_and_all_tissue_all() -> None:
    grid = PatchGrid.cover((1000, 700), (128, 128), (32, 32))
    tissue = np.zeros((63, 44), dtype=bool)
    assert not select_patches(tissue, (32.0, 32.0), grid, (2.0, 2.0)).any()
    assert select_patches(~tissue, (32.0, 32.0), grid, (2.0, 2.0)).all()


# --- tissue from a file ------------------------------------------------------------------------

SIZE, SHAPE, DOWNSAMPLE = (1931, 1487), (75, 97), (20.0, 20.0)


def test_a_mask_image_of_any_size_is_stretched_over_the_slide(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    for width, height in [(1931, 1487), (966, 744), (483, 372), (97, 75), (30, 23)]:
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[: height // 2, width // 3 :] = 1
        Image.fromarray(mask).save(path)
        found = read_tissue(path, SIZE, SHAPE, DOWNSAMPLE)
        rows = (np.arange(75) * 20 < SIZE[1] * (height // 2) / height)[:, None]
        columns = np.arange(1, 98) * 20 > SIZE[0] * (width // 3) / width
        np.testing.assert_array_equal(found, rows & columns)


def test_no_pixel_of_a_fine_mask_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    mask = np.zeros((1487, 1931), dtype=bool)
    mask[777, 1234] = True
    Image.fromarray(mask).save(path)
    found = read_tissue(path, SIZE, SHAPE, DOWNSAMPLE)
    assert found.sum() == 1
    assert found[777 // 20, 1234 // 20]


def test_masks_of_every_mode(tmp_path: Path) -> None:
    path, inside = tmp_path / "mask.png", np.zeros((75, 97), dtype=bool)
    inside[20:40, 30:60] = True
    grey = Image.fromarray(inside.astype(np.uint8) * 255)
    red = Image.merge("RGB", [grey, *[Image.new("L", grey.size)] * 2])
    overlay = Image.new("RGBA", grey.size, (200, 10, 10, 0))
    overlay.putalpha(grey)
    deep = Image.fromarray(inside.astype(np.uint16) * 300)
    for image in (grey, grey.convert("1"), red, overlay, deep, red.quantize(2)):
        image.save(path)
        found = read_tissue(path, (97, 75), (75, 97), (1.0, 1.0))
        if image.mode == "P":  # which of the two gets index 0 is the palette's choice
            found = found if found[30, 40] else ~found
        np.testing.assert_array_equal(found, inside)


def test_polygons_are_tissue(tmp_path: Path) -> None:
    path = tmp_path / "tissue.geojson"
    ring = [[400, 300], [800, 300], [800, 700], [400, 700], [400, 300]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    found = read_tissue(path, SIZE, SHAPE, DOWNSAMPLE)
    assert found[15:35, 20:40].all()
    assert found.sum() <= 22 * 22
    moved = read_tissue(path, SIZE, SHAPE, DOWNSAMPLE, offset=(200, 100))
    assert moved[20:40, 30:50].all()
    assert moved.sum() <= 22 * 22


def test_what_is_ignored_is_no_tissue(tmp_path: Path) -> None:
    path = tmp_path / "tissue.geojson"
    drawn = [(shapely.box(400, 300, 800, 700), "Tumor"), (shapely.box(500, 400, 600, 500), "Pen*")]
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(polygon),
            "properties": {"classification": {"name": name}},
        }
        for polygon, name in drawn
    ]
    path.write_text(json.dumps(features))
    found = read_tissue(path, SIZE, (1487, 1931), (1.0, 1.0))
    assert found.sum() == 400 * 400 - 100 * 100
    assert not found[400:500, 500:600].any()
    with pytest.raises(AnnotationError, match="no area lies on the slide"):
        read_tissue(path, SIZE, SHAPE, DOWNSAMPLE, offset=(-900, 0))


LARGE_MASK = """
import sys, warnings
from pathlib import Path
from peak import peak_bytes
from wsi_pipeline.tissue.detect import read_tissue
warnings.simplefilter("error")
before = peak_bytes()
found = read_tissue(Path(sys.argv[1]), (90000, 70000), (1593, 2048), (70000 / 1593, 90000 / 2048))
rows, columns = found.nonzero()
print(rows.min(), rows.max(), columns.min(), columns.max(), (peak_bytes() - before) // 10**6)
"""


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_a_mask_of_252_million_pixels_is_read_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    mask = np.zeros((14_000, 18_000), dtype=bool)
    mask[3000:9001, 5000:12_000] = True
    path = tmp_path / f"mask.{kind}"
    options = {"compression": "group4"} if kind == "tif" else {}
    Image.fromarray(mask).save(path, **options)
    done = subprocess.run(
        [sys.executable, "-c", LARGE_MASK, str(path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    *extent, megabytes = map(int, done.stdout.split())
    assert extent == [341, 1024, 568, 1365]  # 3000 / 14000 * 1593 and so on, outward
    assert megabytes < 500


def test_white_is_tissue_where_zero_is_white(tmp_path: Path) -> None:
    inside = np.zeros((75, 97), dtype=bool)
    inside[20:40, 30:60] = True
    for bits, pixels in ((1, ~inside), (8, np.where(inside, 0, 255).astype(np.uint8))):
        path = tmp_path / f"{bits}.tif"
        tifffile.imwrite(path, pixels, photometric="miniswhite")
        found = read_tissue(path, (97, 75), (75, 97), (1.0, 1.0))
        np.testing.assert_array_equal(found, inside)


@pytest.mark.parametrize("size", [(1487, 1931), (1931, 1400), (500, 500)])
def test_a_mask_of_another_shape_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "mask.png"
    Image.new("1", size).save(path)
    with pytest.raises(AnnotationError, match="do not fit a slide of 1931 × 1487"):
        read_tissue(path, SIZE, SHAPE, DOWNSAMPLE)


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    with pytest.raises(AnnotationError, match="no mask image"):
        read_tissue(path, SIZE, SHAPE, DOWNSAMPLE)
    path.write_bytes(b"noise")
    with pytest.raises(AnnotationError, match="no mask image"):
        read_tissue(path, SIZE, SHAPE, DOWNSAMPLE)
    Image.new("L", SIZE).save(tmp_path / "mask.jpg")
    with pytest.raises(AnnotationError, match="JPEG"):
        read_tissue(tmp_path / "mask.jpg", SIZE, SHAPE, DOWNSAMPLE)
    (tmp_path / "a.geojson").write_text("{")
    with pytest.raises(AnnotationError):
        read_tissue(tmp_path / "a.geojson", SIZE, SHAPE, DOWNSAMPLE)
