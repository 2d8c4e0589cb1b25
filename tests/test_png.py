"""Masks as PNG, read back by Pillow."""

import numpy as np
from PIL import Image

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.png import write_mask_png

CLASSES = [
    ClassInfo(name="Background"),
    ClassInfo(name="Tumor", color=(200, 0, 0)),
    ClassInfo(name="Stroma", color=(150, 200, 150)),
]


def test_values_are_classes_and_look_as_such(tmp_path):
    mask = np.random.default_rng(0).integers(0, 3, (17, 23), dtype=np.uint8)
    write_mask_png(tmp_path / "mask.png", mask, classes=CLASSES)
    with Image.open(tmp_path / "mask.png") as found:
        assert (np.asarray(found) == mask).all()
        colors = np.array([[0, 0, 0], [200, 0, 0], [150, 200, 150]])
        assert (np.asarray(found.convert("RGB")) == colors[mask]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]
