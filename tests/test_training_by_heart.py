"""Networks learn one real image by heart: recipe, data, crops, loss, bundle, measuring."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import threshold_otsu
from sklearn.metrics import f1_score

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.inference.predictor import Predictor
from wsi_pipeline.training.recipe import load_recipe
from wsi_pipeline.training.samples import IGNORE, load_samples
from wsi_pipeline.training.train import train
from wsi_pipeline.training.validate import chances, decided

RECIPE = """
[bundle]
name = "by-heart"
{bundle}

[bundle.input]
{input}

[bundle.output]
{output}

[train]
learning_rate = 3e-3
average = 0.9
weight_decay = 0.0
validate_every = 1000
{train}

[augment]
scale = 1
turn = 0
stain = 0
mixing = 0
density = 0
tint = 0
contrast = 0
blur = 0
noise = 0
glass = 0

[[data]]
patient = "one"
{data}
"""
RGB = "channels = 3\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]"
GREY = "channels = 1\nmean = [0.3]\nstd = [0.3]"
LESION = 'classes = [{ name = "Background" }, { name = "Lesion", color = [200, 0, 0] }]'
SIGMOID, SOFTMAX = 'activation = "sigmoid"\n', 'activation = "softmax"\n'
TUMOR = 'classes = [{ name = "Background" }, { name = "Tumor", color = [200, 0, 0] }]'
TISSUE = 'classes = [{ name = "Background" }, { name = "Tissue", color = [200, 0, 0] }]'
BUSI = 'images = "us/busi/images/malignant_3.png"\nmasks = "us/busi/masks/malignant_3.png"\n'
CASES = {
    "lightmuseg": {
        "bundle": 'modality = "slide"\nnetwork = "lightmuseg"\nnetwork_options = { classes = 1 }',
        # at which the tile is 128 px
        "input": f"mpp = 0.953125\npatch_size = [128, 128]\noverlap = [0, 0]\n{RGB}",
        "output": SIGMOID + TUMOR,
        "train": "steps = 200\nbatch_size = 2\ncrop = [128, 128]",
        "data": 'images = "bcss_a0sk/images/TCGA-A1-A0SK_0x3.png"\nmasks = "bcss_a0sk/masks"\n'
        'mpp = 0.5\nclasses = { Tumor = [1] }\nbackground = "others"',
    },
    "nmtnet": {
        "bundle": 'modality = "image"\nnetwork = "nmtnet"\n'
        "network_options = { classes = 1, labels = 2 }",
        "input": f"fit = [64, 64]\npatch_size = [64, 64]\noverlap = [0, 0]\n{RGB}",
        "output": SIGMOID + LESION + '\nlabels = ["Benign", "Malignant"]',
        "train": "steps = 200\nbatch_size = 4\ncrop = [64, 64]",
        "data": BUSI + 'classes = { Lesion = [1] }\nlabel = "Malignant"',
    },
    "mm3d_unet": {
        "bundle": 'modality = "volume"\nnetwork = "mm3d_unet"',
        # at which its 25 × 41 × 33 voxels of 2 mm are 24 × 24 × 24
        "input": f"spacing_mm = [{25 / 12}, {41 / 12}, {33 / 12}]\npatch_size = [24, 24, 24]\n"
        "overlap = [0, 0, 0]\n"
        "channels = 1\nmean = [0.5]\nstd = [0.25]",
        "output": SOFTMAX + TISSUE + '\nlabels = ["Empty", "Tissue"]',
        "train": "steps = 150\nbatch_size = 1\ncrop = [24, 24]",
        "data": 'images = "volumes/nibabel/anatomical.nii"\nmasks = "tissue.nii"\n'
        "classes = { Tissue = [1] }",
    },
    "swish_unet": {
        "bundle": 'modality = "image"\nnetwork = "swish_unet"\nnetwork_options = { classes = 2 }',
        "input": f"fit = [64, 64]\npatch_size = [64, 64]\noverlap = [0, 0]\n{RGB}",
        "output": SOFTMAX + LESION,
        "train": "steps = 200\nbatch_size = 4\ncrop = [64, 64]",
        "data": BUSI + "classes = { Lesion = [1] }",
    },
    "highres_unet": {
        "bundle": 'modality = "image"\nnetwork = "highres_unet"\nnetwork_options = { classes = 1 }',
        "input": f"fit = [128, 128]\npatch_size = [128, 128]\noverlap = [0, 0]\n{GREY}",
        "output": SIGMOID + LESION,
        "train": "steps = 150\nbatch_size = 2\ncrop = [128, 128]",
        "data": 'images = "mammo/mammogram_mastery/images/barrdistorted_1002_0.3_0.3_2432.png"\n'
        'masks = "mammo/mammogram_mastery/masks/barrdistorted_1002_0.3_0.3_2432.png"\n'
        "classes = { Lesion = [255] }\nthreshold = 128",
    },
}


def write_tissue(volume: Path, mask: Path) -> None:
    """Write which voxels of an MRI are bright, by Otsu's threshold of the smoothed volume."""
    opened = nibabel.load(volume)
    smooth = ndimage.gaussian_filter(np.asarray(opened.dataobj, np.float32), 1)
    is_bright = (smooth > threshold_otsu(smooth)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(is_bright, opened.affine), mask)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_network_learns_a_real_image_by_heart(tmp_path: Path, data_dir: Path, name: str) -> None:
    for folder in ("us", "mammo", "bcss_a0sk", "volumes"):
        if not (data_dir / folder).is_dir():
            pytest.skip(f"no {folder} in the real data")
        (tmp_path / folder).symlink_to(data_dir / folder)
    write_tissue(tmp_path / "volumes/nibabel/anatomical.nii", tmp_path / "tissue.nii")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(**CASES[name]), "utf-8")
    recipe = load_recipe(tmp_path / "recipe.toml")
    train(recipe, tmp_path, tmp_path / "bundle", folds=(), device="cpu")
    bundle = load_bundle(tmp_path / "bundle")
    with ExitStack() as stack:
        (sample,) = load_samples(recipe, tmp_path, stack)
        image, truth = sample.read_all()
    with closing(Predictor(bundle, device="cpu", precision="fp32")) as predictor:
        found = decided(chances(predictor, image, outside=sample.outside))
    known = truth != IGNORE
    classes = list(range(1, len(bundle.classes)))
    dice = f1_score(truth[known], found[known], labels=classes, average=None)
    assert dice.min() >= 0.95, dice
