"""The mask of a planar image: a PNG of class indices in the image's own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export import MaskLike
from wsi_pipeline.files.atomic import written_beside


def write_mask_png(path: Path, mask: MaskLike, *, classes: Sequence[ClassInfo]) -> None:
    """Write class indices as a PNG of 8 bits whose palette has the classes' colours.

    The file appears when it is complete; the background, class 0, is black.
    """
    picture = Image.fromarray(np.asarray(mask[:, :], np.uint8))
    picture.putpalette([value for c in classes for value in c.color or (0, 0, 0)])
    with written_beside(path) as beside:
        picture.save(beside, format="PNG")
