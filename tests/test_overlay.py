from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.overlay import FILL, TISSUE_COLOR, read_preview, write_overlay

RED, BLUE = (200, 0, 0), (10, 20, 250)
CLASSES = (
    ClassInfo(name="Background"),
    ClassInfo(name="Tumor", color=RED),
    ClassInfo(name="Nécrose µ", color=BLUE),
)
H, W = 300, 400


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
    picture = drawn(tmp_path / "o.png", thumbnail, mask)[:H]
    assert np.array_equal(picture[mask == 0], thumbnail[mask == 0])


def test_tissue_stays_visible_inside_a_crisp_outline(
    tmp_path: Path, thumbnail: np.ndarray, mask: np.ndarray
) -> None:
    picture = drawn(tmp_path / "o.png", thumbnail, mask)[:H]
    for index, color in ((1, RED), (2, BLUE)):
        own = np.pad(mask, 1, mode="edge") == index  # the picture's edge is no outline
        inner = ndimage.binary_erosion(own)[1:-1, 1:-1]
        outline = (mask == index) & ~inner
        assert (picture[outline] == color).all()
        mixed = thumbnail[inner] * (1 - FILL) + np.array(color) * FILL
        assert np.abs(picture[inner] - mixed).max() <= 1
    assert FILL < 0.5


def test_tissue_gets_a_thin_line(tmp_path: Path, thumbnail: np.ndarray) -> None:
    tissue = np.zeros((H, W), bool)
    tissue[20:280, 30:370] = True
    picture = drawn(tmp_path / "o.png", thumbnail, np.zeros((H, W), np.uint8), tissue=tissue)[:H]
    line = tissue & ~ndimage.binary_erosion(tissue)
    assert (picture[line] == TISSUE_COLOR).all()
    assert np.array_equal(picture[~line], thumbnail[~line])


@pytest.mark.parametrize("width", [40, 400, 2500])
def test_the_legend_is_below_and_shows_each_class(tmp_path: Path, width: int) -> None:
    blank = np.full((H, width, 3), 255, np.uint8)
    image = drawn(tmp_path / "o.png", blank, np.zeros((H, width), np.uint8))
    legend = image[H:].reshape(-1, 3)
    assert image.shape[1] == width
    assert (image[:H] == 255).all()
    for color in (RED, BLUE):
        assert (legend == color).all(axis=1).any()


def test_the_preview_is_small_and_has_no_legend(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 900).astype(np.uint8)
    thumbnail = np.repeat(np.repeat(gradient[:, None, None], 1200, axis=1), 3, axis=2)
    drawn(tmp_path / "o.png", thumbnail, np.zeros((900, 1200), np.uint8))
    for side, size in ((480, (480, 360)), (240, (240, 180)), (1000, (480, 360))):
        with Image.open(io.BytesIO(read_preview(tmp_path / "o.png", side))) as preview:
            assert preview.format == "JPEG"
            assert preview.size == size
            pixels = np.asarray(preview)
        expected = np.asarray(Image.fromarray(thumbnail).resize(size))
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
