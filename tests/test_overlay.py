from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from contrast import LEAST, least_contrast
from PIL import Image
from scipy import ndimage

from wsi_pipeline.bundle import ClassInfo, load_bundle
from wsi_pipeline.colors import COLORS, QUPATH_COLORS
from wsi_pipeline.export.overlay import FILL, TISSUE_COLOR, read_preview, write_overlay
from wsi_pipeline.sources import open_source

RED, BLUE, WHITE, BLACK = (200, 0, 0), (10, 20, 250), (255, 255, 255), (0, 0, 0)
YELLOW = (250, 230, 20)
CLASSES = (
    ClassInfo(name="Background"),
    ClassInfo(name="Tumor", color=RED),
    ClassInfo(name="Nécrose µ", color=BLUE),
)
BUNDLES = sorted((Path(__file__).parents[1] / "models").glob("*/model.toml"))
H, W = 300, 400
CROSS = np.zeros((5, 5), bool)
CROSS[2], CROSS[:, 2] = True, True


@pytest.fixture
def thumbnail() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(H, W, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    labels = np.zeros((H, W), np.uint8)
    labels[50:150, 60:200] = 1
    labels[100:200, 200:310] = 2
    labels[250, 300] = 1
    return labels


def drawn(path: Path, *args: np.ndarray, tissue: np.ndarray | None = None) -> np.ndarray:
    """Return the overlay's pixels, legend included."""
    write_overlay(path, *args, classes=CLASSES, tissue=tissue)
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def test_background_is_the_thumbnail_itself(
    tmp_path: Path, thumbnail: np.ndarray, mask: np.ndarray
) -> None:
    image = drawn(tmp_path / "o.png", thumbnail, mask)
    far = ndimage.distance_transform_cdt(mask == 0, "chessboard") > 2
    assert np.array_equal(image[:H, :W][far], thumbnail[far])
    assert np.array_equal(image[:H, -W:], thumbnail)  # and is beside, to compare


def test_a_wide_thumbnail_lies_below(tmp_path: Path) -> None:
    wide = np.random.default_rng(1).integers(0, 256, size=(90, 401, 3), dtype=np.uint8)
    image = drawn(tmp_path / "o.png", wide, np.zeros((90, 401), np.uint8))
    assert image.shape[1] == 401
    assert np.array_equal(image[:90], wide)
    (top,) = (y for y in range(91, 120) if np.array_equal(image[y : y + 90], wide))
    assert (image[90:top] == 255).all()


@pytest.mark.parametrize(("color", "rim"), [(RED, WHITE), (BLUE, WHITE), (YELLOW, BLACK)])
def test_an_outline_has_a_rim_that_its_colour_stands_out_from(
    tmp_path: Path, mask: np.ndarray, color: tuple[int, ...], rim: tuple[int, ...]
) -> None:
    """Of tissue in the very colour of a class only the rim tells the outline."""
    classes = (CLASSES[0], ClassInfo(name="a", color=color), ClassInfo(name="b", color=color))
    tissue = np.full((H, W, 3), color, np.uint8)
    write_overlay(tmp_path / "o.png", tissue, mask, classes=classes)
    picture = np.asarray(Image.open(tmp_path / "o.png"))[:H, :W]
    inner = np.zeros_like(mask, bool)
    for value in (1, 2):
        # 2 px of each class are its line
        inner |= ndimage.binary_erosion(mask == value, CROSS)
    line = (mask > 0) & ~inner
    steps = ndimage.distance_transform_cdt(~line, "chessboard")
    assert (picture[line] == color).all()
    assert (picture[steps == 1] == rim).all()
    assert (picture[steps == 2] == np.subtract(255, rim)).all()
    assert (picture[steps > 2] == color).all()


def backgrounds(cmu_path: Path) -> dict[str, np.ndarray]:
    """Return pictures of real tissue and of what is lightest and darkest on slides, (240, 240)."""
    with open_source(cmu_path) as slide:
        real = slide.at(2).read((100, 100), (240, 240))
    noise = np.random.default_rng(0).integers(-12, 13, (240, 240, 3))
    flat = {"glass": (243, 242, 244), "nuclei": (62, 34, 98), "eosin": (214, 130, 178)}
    return {"real": real} | {
        name: np.clip(noise + color, 0, 255).astype(np.uint8) for name, color in flat.items()
    }


def test_outlines_stand_out_from_any_tissue(tmp_path: Path, cmu_path: Path) -> None:
    """Of all colours that a class may have by itself, on what is lightest, darkest and between."""
    labels = np.zeros((240, 240), np.uint8)
    labels[20:110, 30:120], labels[60:200, 120:210], labels[215:222, 40:180] = 1, 2, 1
    shipped = [c for b in BUNDLES for c in load_bundle(b).classes[1:]]
    colors = sorted({*QUPATH_COLORS.values(), *COLORS, *(c.color for c in shipped if c.color)})
    assert len(colors) > 12
    least = {}
    for name, tissue in backgrounds(cmu_path).items():
        for color, other in zip(colors, colors[1:] + colors[:1], strict=True):
            classes = (
                CLASSES[0],
                ClassInfo(name="a", color=color),
                ClassInfo(name="b", color=other),
            )
            write_overlay(tmp_path / "o.png", tissue, labels, classes=classes)
            picture = np.asarray(Image.open(tmp_path / "o.png"))[:240, :240]
            fills = np.array([(0, 0, 0), color, other])[labels]
            mixed = np.round(0.7 * tissue.astype(np.float32) + 0.3 * fills).astype(np.uint8)
            plain = np.where((labels > 0)[..., None], mixed, tissue)
            # a grey value of rounding is no outline
            plain = np.where(
                abs(picture.astype(int) - plain).max(axis=2, keepdims=True) < 2, picture, plain
            )
            least[name, color] = least_contrast(picture, plain, reach=6)
    assert min(least.values()) >= LEAST, least


@pytest.mark.parametrize(
    ("width", "um", "length"), [(400, 0.7, 100), (801, 3.3, 1000), (90, 40.0, 1000)]
)
def test_a_scale_bar_is_as_long_as_it_says(
    tmp_path: Path, width: int, um: float, length: int
) -> None:
    """1, 2 or 5 times a power of ten, at most a fifth of the picture."""
    blank = np.full((width, width, 3), 255, np.uint8)
    empty = np.zeros((width, width), np.uint8)
    for name, scale in (("bar.png", um), ("none.png", None)):
        write_overlay(tmp_path / name, blank, empty, classes=CLASSES[:1], um=scale)
    strip = np.asarray(Image.open(tmp_path / "bar.png"))[width:]
    # the bar begins at the margin
    longest = int(np.argmin(np.all(strip[:, 10:] == (40, 40, 40), axis=2), axis=1).max())
    assert longest == round(length / um)
    assert longest <= (2 * width + 10) / 5 < 2.5 * longest
    assert (np.asarray(Image.open(tmp_path / "none.png"))[width:] == 255).all()


@pytest.mark.parametrize("name", ["a\nb.svs", "a\udce9.svs", "很长" * 200, "\u202e\x00", ""])
def test_notes_are_drawn_whatever_they_hold(tmp_path: Path, name: str) -> None:
    blank, empty = np.full((60, 60, 3), 255, np.uint8), np.zeros((60, 60), np.uint8)
    write_overlay(tmp_path / "o.png", blank, empty, classes=CLASSES[:1], notes=[name, "m" * 99])
    strip = np.asarray(Image.open(tmp_path / "o.png"))[60:]
    assert strip.shape[1] == 130
    assert (strip < 128).any()
    assert (strip[:, -3:] == 255).all()  # nothing is cut off


def test_tissue_stays_visible_inside_a_crisp_outline(
    tmp_path: Path, thumbnail: np.ndarray, mask: np.ndarray
) -> None:
    picture = drawn(tmp_path / "o.png", thumbnail, mask)[:H, :W]
    for index, color in ((1, RED), (2, BLUE)):
        own = np.pad(mask, 1, mode="edge") == index  # the picture's edge is no outline
        inner = ndimage.binary_erosion(own, CROSS, border_value=1)[1:-1, 1:-1]
        outline = (mask == index) & ~inner
        assert (picture[outline] == color).all()
        # within the line and its halo
        inner = ndimage.binary_erosion(own, np.ones((9, 9)), border_value=1)[1:-1, 1:-1]
        mixed = thumbnail[inner] * (1 - FILL) + np.array(color) * FILL
        assert np.abs(picture[inner] - mixed).max() <= 1
    assert FILL < 0.5


def test_tissue_gets_a_thin_line(tmp_path: Path, thumbnail: np.ndarray) -> None:
    tissue = np.zeros((H, W), bool)
    tissue[20:280, 30:370] = True
    picture = drawn(tmp_path / "o.png", thumbnail, np.zeros((H, W), np.uint8), tissue=tissue)
    picture = picture[:H, :W]
    line = tissue & ~ndimage.binary_erosion(tissue)
    rim = ndimage.binary_dilation(line, np.ones((3, 3))) & ~line
    assert (picture[line] == TISSUE_COLOR).all()
    assert (picture[rim] == 255).all()
    assert np.array_equal(picture[~line & ~rim], thumbnail[~line & ~rim])
    assert least_contrast(picture, thumbnail, reach=3) >= LEAST


@pytest.mark.parametrize("width", [40, 400, 2500])
def test_the_legend_is_below_and_shows_each_class(tmp_path: Path, width: int) -> None:
    blank = np.full((H, width, 3), 255, np.uint8)
    image = drawn(tmp_path / "o.png", blank, np.zeros((H, width), np.uint8))
    legend = image[H:].reshape(-1, 3)
    assert image.shape[1] == (width if width >= 1.5 * H else 2 * width + 10)
    assert (image[:H] == 255).all()
    for color in (RED, BLUE):
        assert (legend == color).all(axis=1).any()


def test_the_preview_is_small_and_has_both_pictures(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 900).astype(np.uint8)
    thumbnail = np.repeat(np.repeat(gradient[:, None, None], 1200, axis=1), 3, axis=2)
    drawn(tmp_path / "o.png", thumbnail, np.zeros((900, 1200), np.uint8))
    small = np.asarray(Image.fromarray(thumbnail).resize((315, 236)))
    pair = np.pad(small, [(0, 0), (0, 10), (0, 0)], constant_values=255)
    pair = np.concatenate([pair, small], axis=1)
    for side, size in ((640, (640, 236)), (320, (320, 118)), (1000, (640, 236))):
        with Image.open(io.BytesIO(read_preview(tmp_path / "o.png", side))) as preview:
            assert preview.format == "JPEG"
            assert preview.width == size[0]
            assert size[1] < preview.height < size[1] + 40  # of the notes and the scale bar
            pixels = np.asarray(preview)[: size[1]]
        expected = np.asarray(Image.fromarray(pair).resize(size))
        assert np.abs(pixels.astype(int) - expected).mean() < 3


def test_an_overlay_without_preview_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "o.png")
    with pytest.raises(KeyError):
        read_preview(tmp_path / "o.png", 480)


def test_nothing_else_is_left_in_the_folder(
    tmp_path: Path, thumbnail: np.ndarray, mask: np.ndarray
) -> None:
    drawn(tmp_path / "o.png", thumbnail, mask)
    assert [p.name for p in tmp_path.iterdir()] == ["o.png"]
