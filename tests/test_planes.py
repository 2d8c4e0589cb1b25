"""Three slices through the largest lesion, in the proportions and directions of the body."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.export.lesions import count_lesions
from wsi_pipeline.export.planes import write_planes_overlay
from wsi_pipeline.sources.radiology.volume import open_volume

CLASSES = [ClassInfo(name="Background"), ClassInfo(name="Tumor", color=(0, 0, 255))]


def write(path, volume, mask):
    lesions = count_lesions(mask, CLASSES, volume.spacing_mm)
    write_planes_overlay(path, volume, mask, CLASSES, lesions)


LENGTHS = (60, 90, 120)
"""mm to the right, front and top; spacings below divide them."""


def body(affine, shape):
    """Return where each voxel (x, y, z) lies, in mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def affine_of(axes, signs, spacing):
    """Return an affine whose array axes follow some axes of the body, 0 to 60, 90, 120 mm."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for i, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, i] = sign * spacing[i]
        affine[axis, 3] = spacing[i] / 2 if sign > 0 else LENGTHS[axis] - spacing[i] / 2
    return affine


@pytest.mark.parametrize(
    ("axes", "signs", "spacing"),
    [
        ((0, 1, 2), (1, 1, 1), (1, 1, 1)),
        ((0, 1, 2), (-1, -1, 1), (1, 1, 5)),
        ((2, 0, 1), (-1, 1, -1), (2, 1, 3)),
        ((1, 2, 0), (1, -1, -1), (1, 3, 2)),
    ],
)
def test_every_orientation_gives_the_same_picture(tmp_path, axes, signs, spacing):
    affine = affine_of(axes, signs, spacing)
    shape = [LENGTHS[axis] // mm for axis, mm in zip(axes, spacing, strict=True)]
    place = body(affine, shape)
    # brighter to the right, to the front and to the top
    voxels = (place @ [4, 3, 2]).astype(np.float32)
    inside = np.all((place > [36, 66, 90]) & (place < [48, 78, 105]), axis=-1)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "a.nii")
    path = tmp_path / "overlay.png"
    with open_volume(tmp_path / "a.nii") as volume:
        write(path, volume, inside.T.astype(np.uint8))
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    # 480 px are 120 mm; beside each picture lie 4 px of black
    sizes = [(90, 60), (120, 60), (120, 90)]  # mm down and along: axial, coronal, sagittal
    left = 0
    for down, along in sizes:
        panel = picture[(480 - 4 * down) // 2 :][: 4 * down, left + 4 :][:, : 4 * along]
        left += 4 * along + 8
        height, width = panel.shape[:2]
        # the right and the front at the left, the front and the top at the top
        corner = panel[:16, 24:40, 0].mean(), panel[-16:, -16:, 0].mean()
        assert corner[0] > corner[1] + 20
        blue = np.argwhere(panel[..., 2] > panel[..., 0] + 40)
        middle = (blue.min(axis=0) + blue.max(axis=0)) / 2 / 4  # mm
        from_top = {90: 90 - 72, 120: 120 - 97.5}[down]
        from_left = {60: 60 - 42, 90: 90 - 72}[along]
        np.testing.assert_allclose(middle, [from_top, from_left], atol=3)
        assert (height, width) == (4 * down, 4 * along)


def test_without_lesions_the_middle_is_shown(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 7, 8), np.int16), np.eye(4)), tmp_path / "a.nii")
    with open_volume(tmp_path / "a.nii") as volume:
        write(tmp_path / "overlay.png", volume, np.zeros((8, 7, 6), np.uint8))
    with Image.open(tmp_path / "overlay.png") as picture:
        assert picture.size == (360 + 360 + 420 + 24, 480 + 10 + 480 + 35)
        # 8 mm are 480 px: the scale bar of 2 mm, below
        below = np.asarray(picture.convert("L"))[-35:]
        runs = np.flatnonzero(np.diff(np.pad((below == 40).astype(int), [(0, 0), (1, 1)]), axis=1))
        assert 120 in np.diff(runs)
