from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch
import zarr
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from PIL import Image
from safetensors.torch import load_file
from scans import Around, blobs, scan_bundle
from scipy import ndimage
from sklearn.metrics import confusion_matrix
from torch import Tensor

from wsi_pipeline import train
from wsi_pipeline.bundle import bundle_toml, load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import RecipeError, StoreError
from wsi_pipeline.evaluation.confusion import Confusion
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.inference.unlike import load_familiar
from wsi_pipeline.networks import build, create
from wsi_pipeline.networks.encoders import mobilenet_v2_features
from wsi_pipeline.sources import open_source
from wsi_pipeline.training.augment import (
    augment,
    blur,
    borrow_colours,
    compress,
    empty_glass,
    vary_contrast,
    vary_stain,
)
from wsi_pipeline.training.bundle_card import Trained, model_card, write_bundle, write_history
from wsi_pipeline.training.calibrate import (
    calibration_error,
    fit_temperature,
    left_out_temperatures,
)
from wsi_pipeline.training.cases import draw_cases, gather_cases
from wsi_pipeline.training.crops import Sampler, random_crop, survey
from wsi_pipeline.training.fit import TrainingSet, fit, learn, open_fabric
from wsi_pipeline.training.losses import network_loss, segmentation_loss, soft_dice_loss
from wsi_pipeline.training.recipe import (
    AugmentSpec,
    DataSpec,
    Recipe,
    SplitSpec,
    TrainSpec,
    load_recipe,
)
from wsi_pipeline.training.samples import IGNORE, UNLABELLED, Cache, Sample, load_samples
from wsi_pipeline.training.splits import Split, leave_out_validation, plan_splits
from wsi_pipeline.training.validate import (
    PatientScore,
    accuracy,
    chances,
    decided,
    familiar_of,
    mean_dice,
    measure,
    open_predictor,
    scores_of,
)

ROOT = Path(__file__).parents[1]
Room = Callable[[int], AbstractContextManager[None]]
RECIPE = """
notes = "Two made-up patients."
limits = "Discs only."
notices = "CC0 1.0, drawn here."

[bundle]
name = "made-up"
modality = "slide"
network = "swish_unet"
network_options = { classes = 1, widths = [8, 16] }

[bundle.input]
mpp = 0.5
channels = 3
patch_size = [64, 64]
overlap = [16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]

[bundle.output]
activation = "sigmoid"
classes = [{ name = "Background" }, { name = "Tumor", color = [200, 0, 0] }]

[train]
steps = 3
batch_size = 2
crop = [64, 64]

[[data]]
patient = "A"
images = "A/*.png"
masks = "A/masks"
mpp = 0.25
classes = { Tumor = [1, 7] }
background = [2]
ignore = [0]

[[data]]
patient = "B"
images = "B/one.png"
masks = "B/one_mask.png"
mpp = 0.5
classes = { Tumor = [255] }
"""
QUIET = AugmentSpec(
    scale=1, rotate=0, stain=0, mixing=0, density=0, tint=0, contrast=0, blur=0, noise=0, glass=0
)


def write_pair(image_path: Path, mask_path: Path, *, size: int, inside: int, outside: int) -> None:
    """Write an image of a dark disc on a pale ground, and its mask."""
    y, x = np.ogrid[:size, :size]
    disc = (y - 0.45 * size) ** 2 + (x - 0.55 * size) ** 2 < (0.3 * size) ** 2
    pixels = np.where(disc[..., None], (110, 60, 140), (235, 190, 215)).astype(np.uint8)
    noise = np.random.default_rng(size).integers(0, 20, pixels.shape, dtype=np.uint8)
    for path in (image_path, mask_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels + noise).save(image_path)
    Image.fromarray(np.where(disc, inside, outside).astype(np.uint8)).save(mask_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two patients' images and `recipe.toml`."""
    for name, size in (("x", 200), ("y", 180)):
        write_pair(
            tmp_path / f"A/{name}.png",
            tmp_path / f"A/masks/{name}.png",
            size=size,
            inside=7,
            outside=2,
        )
    write_pair(tmp_path / "B/one.png", tmp_path / "B/one_mask.png", size=96, inside=255, outside=0)
    (tmp_path / "recipe.toml").write_text(RECIPE, "utf-8")
    return tmp_path


@pytest.fixture
def recipe(folder: Path) -> Recipe:
    return load_recipe(folder / "recipe.toml")


@pytest.fixture
def samples(folder: Path, recipe: Recipe) -> list[Sample]:
    return load(recipe, folder)


def load(recipe: Recipe, folder: Path) -> list[Sample]:
    """Load samples that need no closing."""
    with ExitStack() as closing:
        return load_samples(recipe, folder, closing)


def training_set(samples: list[Sample], *, classes: int = 2) -> TrainingSet:
    return TrainingSet(samples=samples, surveys=[survey(s, classes) for s in samples])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A source whose pixels are in memory."""

    image: Tensor
    truth: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.truth.shape)

    def read(self, origin: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        window = tuple(slice(a, a + n) for a, n in zip(origin, shape, strict=True))
        return self.image[(slice(None), *window)], self.truth[window]

    def read_truth(self, origin: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return self.read(origin, shape)[1]

    def may_know(self, origin: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        return True


def make_sample(patient: str, image: Tensor, truth: Tensor, *, name: str = "") -> Sample:
    digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    source = Held(image.contiguous(), truth)
    return Sample(patient=patient, name=name or f"{patient}.png", source=source, digest=digest)


def truth_of(sample: Sample) -> Tensor:
    return sample.read_all()[1]


def changed(recipe: Recipe, **values: Any) -> Recipe:
    """Return the recipe with other values in [train]."""
    return dataclasses.replace(recipe, train=structs.replace(recipe.train, **values))


# -- recipe -----------------------------------------------------------------------------------


def test_a_recipe_holds_what_its_file_says(recipe: Recipe) -> None:
    assert recipe.bundle.input.patch_size == (64, 64)
    assert recipe.train.steps == 3
    assert [d.patient for d in recipe.data] == ["A", "B"]
    assert recipe.data[0].classes == {"Tumor": (1, 7)}
    assert recipe.notes == "Two made-up patients."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[bundle]", "[bundle", "not valid TOML"),
        ('name = "made-up"', "", "lacks name"),
        ("steps = 3", "stepz = 3", r"unknown train\.stepz \(did you mean steps\?\)"),
        ("steps = 3", "steps = 0", r"train\.steps is 0; expected a whole number above 0"),
        ("crop = [64, 64]", "crop = [80, 64]", "two sides in px, rising"),
        ("steps = 3", 'loss = "mse"', r'train\.loss is "mse"; expected one of "ce"'),
        ("steps = 3", "balance = 2", r"train\.balance is 2; expected a number from 0 to 1"),
        ("[train]", "[split]\nfolds = 1\n[train]", "split: folds is 1; expected 0, or 2 or more"),
        (
            "[train]",
            '[split]\nwatch = "no"\n[train]',
            "split.watch is .no.; expected true or false",
        ),
        ('patient = "A"', 'patient = "A"\npatients = "A"', "'patient' or 'patients', or has both"),
        ('patient = "A"', 'patients = "("', "no regular expression"),
        ('masks = "A/masks"', "", "lacks 'masks' or 'annotations'"),
        ("mpp = 0.25", "", "lacks 'mpp'"),
        ("[1, 7]", '["Tumor"]', "expected mask values"),
        ("[1, 7]", "[1, 1]", "the same twice"),
        ("background = [2]", "background = [7]", "the same twice"),
        ("background = [2]", 'background = "other"', r'data\[0\]\.background is "other"; expected'),
        ("background = [2]", 'background = ["Glass"]', r"has \['Glass'\]; expected mask values"),
        (
            "[1, 7]",
            "[-1]",
            r"data\[0\]\.classes is \{ Tumor = \[-1\] \}; expected lists of mask values",
        ),
        (
            "ignore = [0]",
            "ignore = [70000]",
            r"ignore\[0\] is 70000; expected a whole number from 0",
        ),
        ("ignore = [0]", "threshold = 128", "is for masks of one class, without ignore and backgr"),
        ("Tumor = [255]", "Tumor = [1, 255] }\nthreshold = 128 #", "below the threshold 128"),
        ("ignore = [0]", 'label = "Benign"', "label 'Benign' is none of"),
        ("Tumor = [255]", "Necrosis = [255]", "Necrosis"),
        ("mpp = 0.25", "mpp = 0", "expected µm per pixel"),
        ("mpp = 0.25", "mpp = 0.25\nweight = 0", "weight is 0; expected a number above 0"),
        ("ignore = [0]", "ignored = [0]", "ignored"),
        ('activation = "sigmoid"', 'activation = "relu"', "relu"),
        ('notes = "Two', 'note = "Two', "unknown"),
        (
            "[train]",
            "[augment]\nscale = 0.5\n[train]",
            "augment.scale is 0.5; expected a number from 1",
        ),
        ("steps = 3", "encoder_rate = -1", "encoder_rate is -1; expected a number from 0"),
        ('patient = "A"', 'columns = { patient = "p" }', "'table' and 'columns' come together"),
        (
            'patient = "A"',
            'table = "t.csv"\ncolumns = { fold = "f" }',
            "lacks 'patient' or 'patients'",
        ),
        (
            'patient = "A"',
            'patient = "A"\ntable = "t.csv"\ncolumns = { patient = "p" }',
            "columns.patient besides",
        ),
        (
            'patient = "A"',
            'patient = "A"\ntable = "t.csv"\ncolumns = { folds = "f" }',
            r"columns has \['folds'\]",
        ),
        (
            'patient = "A"',
            'patient = "A"\nfold = "1"\ntable = "t.csv"\ncolumns = { fold = "f" }',
            "has 'fold' and columns.fold",
        ),
        (
            'patient = "A"',
            'patient = "A"\ntable = "t.csv"\ncolumns = { label = "l" }',
            "has columns.label, the bundle has no labels",
        ),
        ('patient = "A"', 'patient = "A"\nunlabelled = ["normal"]', "is for columns.label"),
        ('masks = "A/masks"', 'masks = "A/masks"\nempty = true', "or 'empty' besides"),
        ('masks = "A/masks"', "empty = true", "lacks 'classes', or has them and 'empty'"),
        ("classes = { Tumor = [1, 7] }", "", "lacks 'classes'"),
        ("[255] }", '[255] }\nfold = "1"\n[split]\nfolds = 2', "which the data have of their own"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in RECIPE
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(old, new, 1), "utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match="no recipe at"):
        train(str(tmp_path / "recipe.toml"), None, str(tmp_path / "m"))


def test_a_recipe_that_comes_from_no_file_needs_the_folder_of_its_data(
    recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="data_dir is None"):
        train(recipe, None, tmp_path / "m")


# -- samples ----------------------------------------------------------------------------------


def test_samples_come_at_the_networks_resolution_with_class_indices(samples: list[Sample]) -> None:
    assert [(s.patient, s.name, s.shape) for s in samples] == [
        ("A", "x.png", (100, 100)),
        ("A", "y.png", (90, 90)),
        ("B", "one.png", (96, 96)),
    ]
    for sample in samples:
        image, truth = sample.read_all()
        assert image.shape == (3, *sample.shape)
        assert set(truth.unique().tolist()) == {0, 1}
        side = truth.shape[0]
        # the disc of write_pair: same place, same share, at any resolution
        assert float((truth == 1).double().mean()) == pytest.approx(math.pi * 0.09, rel=0.03)
        centre = torch.nonzero(truth == 1).double().mean(0) / side
        assert centre.tolist() == pytest.approx([0.45, 0.55], abs=0.01)


def test_ignored_mask_values_are_neither_class(folder: Path, recipe: Recipe) -> None:
    mask = folder / "A/masks/x.png"
    codes = np.array(Image.open(mask))
    codes[:20] = 0
    Image.fromarray(codes).save(mask)
    truth = truth_of(load(recipe, folder)[0])
    assert (truth[:10] == IGNORE).all()
    assert not (truth[10:] == IGNORE).any()


def disc_through_jpeg(path: Path) -> np.ndarray:
    """Write a picture, and a disc of 255 that went through JPEG as its mask; return the disc."""
    y, x = np.ogrid[:200, :200]
    disc = (y - 99) ** 2 + (x - 101) ** 2 < 60**2
    Image.fromarray(np.full((200, 200), 90, np.uint8)).save(path / "a.png")
    Image.fromarray(disc * np.uint8(255)).save(path / "lossy.jpg", quality=75)
    return disc


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "bmp"])
def test_values_of_masks_without_a_meaning_are_counted_and_refused(
    tmp_path: Path, suffix: str
) -> None:
    disc = disc_through_jpeg(tmp_path)
    with Image.open(tmp_path / "lossy.jpg") as lossy:
        stored = np.array(lossy)
        if suffix != "jpg":
            lossy.save(tmp_path / f"lossy.{suffix}")
    values, counts = np.unique(stored, return_counts=True)
    strange = (values > 0) & (values < 255)
    assert strange.sum() > 20
    keys = {"images": "a.png", "masks": f"lossy.{suffix}", "classes": {"Tumor": (255,)}}
    said = (
        rf"lossy\.{suffix} holds values without a meaning: {strange.sum()} \(.*"
        rf"{counts[strange].sum():,} of 40,000 pixels"
    )
    with pytest.raises(RecipeError, match=said):
        load(image_recipe(tmp_path, background=(), **keys), tmp_path)
    recipe = image_recipe(tmp_path, background=(), threshold=128, **keys)
    spec = structs.replace(recipe.bundle.input, fit=(200, 200))
    recipe = dataclasses.replace(recipe, bundle=dataclasses.replace(recipe.bundle, input=spec))
    np.testing.assert_array_equal(truth_of(load(recipe, tmp_path)[0]), stored >= 128)
    assert np.mean((stored >= 128) == disc) > 0.999
    # said to be background, they are
    data = structs.replace(recipe.data[0], threshold=None, background="others")
    found = truth_of(load(dataclasses.replace(recipe, data=(data,)), tmp_path)[0])
    np.testing.assert_array_equal(found, stored == 255)


def test_twins_of_masks_with_fewer_bits_are_the_same_or_refused(
    tmp_path: Path, data_dir: Path
) -> None:
    for i in range(1, 5):
        for side in ("images", "masks"):
            (tmp_path / side).mkdir(exist_ok=True)
        source = data_dir / f"us/busi/images/malignant_{i}.png"
        (tmp_path / f"images/m{i}.png").write_bytes(source.read_bytes())
        with Image.open(data_dir / f"us/busi/masks/malignant_{i}.png") as mask:
            lesion = np.array(mask.convert("L")) > 0
        twin = Image.fromarray(lesion * np.uint8(255)) if i % 2 else Image.fromarray(lesion)
        twin.save(tmp_path / f"masks/m{i}.png")
    keys = {"images": "images/m?.png", "masks": "masks", "background": ()}

    def read(*values: int) -> list[Sample]:
        recipe = image_recipe(tmp_path, classes={"Tumor": values}, **keys)
        spec = structs.replace(recipe.bundle.input, fit=(512, 640))
        bundle = dataclasses.replace(recipe.bundle, input=spec)
        return load(dataclasses.replace(recipe, bundle=bundle), tmp_path)

    with pytest.raises(RecipeError, match=r"m2\.png holds values without a meaning: 1 \(1\)"):
        read(255)
    shares = [100 * float((s.read_all()[1] == 1).double().mean()) for s in read(1, 255)]
    assert shares == pytest.approx([33.9, 34.1, 6.0, 6.8], abs=0.1)


def grey_png(path: Path, values: np.ndarray, bits: int) -> Path:
    """Write a grey PNG of few bits a sample, by the standard; return its path."""
    header = struct.pack(">IIBBBBB", *values.shape[::-1], bits, 0, 0, 0, 0)
    digits = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(digits.reshape(len(values), -1).astype(np.uint8), axis=1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_any_depth_have_their_stored_values_in_train_and_evaluate(
    tmp_path: Path, bits: int
) -> None:
    values = np.random.default_rng(bits).integers(0, 2 ** min(bits, 2), (64, 96))
    mask = grey_png(tmp_path / "mask.png", values, bits)
    Image.new("L", (96, 64)).save(tmp_path / "a.png")
    keys = {"classes": {"Tumor": (1,)}, "background": (2, 3), "ignore": ()}
    recipe = image_recipe(tmp_path, images="a.png", masks="mask.png", **keys)
    np.testing.assert_array_equal(truth_of(load(recipe, tmp_path)[0]), values == 1)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "eight.png")
    names = ["--truth-values", "Tumor=1", "--prediction-values", "Tumor=1"]
    names += ["--truth-values", "Background=2,3", "--prediction-values", "Background=2,3"]
    said = run_command("evaluate", tmp_path / "eight.png", mask, *names, "--json")
    found = json.loads(said)["slides"][0]["classes"]["Tumor"]
    assert (found["dice"], found["truth_px"]) == (1.0, int((values == 1).sum()))


def test_a_mask_of_another_size_is_refused(folder: Path, recipe: Recipe) -> None:
    Image.new("L", (95, 96)).save(folder / "B/one_mask.png")
    with pytest.raises(RecipeError, match=r"one_mask\.png has 95 × 96 pixels, its image 96 × 96"):
        load(recipe, folder)


@pytest.mark.parametrize("images", ["/somewhere/*.png", ""])
def test_a_pattern_that_is_none_is_refused(folder: Path, recipe: Recipe, images: str) -> None:
    odd = dataclasses.replace(recipe, data=(structs.replace(recipe.data[0], images=images),))
    with pytest.raises(RecipeError, match=r"images = '.*', expected a path or glob from the data"):
        load(odd, folder)


@pytest.mark.parametrize("missing", ["B/one.png", "B/one_mask.png", "A/masks/y.png"])
def test_a_missing_file_is_named(folder: Path, recipe: Recipe, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(RecipeError, match=missing.rsplit("/", 1)[-1]):
        load(recipe, folder)


def tabled(folder: Path, recipe: Recipe, rows: str, **values: Any) -> Recipe:
    """Return the recipe with what a table says of the images in A, and two labels."""
    (folder / "A/table.csv").write_text(f"file,who,kind,part\n{rows}", "utf-8")
    columns = {"patient": "who", "label": "kind", "fold": "part"}
    entry = {"patient": None, "table": "A/table.csv", "columns": columns, "unlabelled": ("normal",)}
    bundle = dataclasses.replace(recipe.bundle, labels=("Benign", "Malignant"))
    data = structs.replace(recipe.data[0], **(entry | values))
    return dataclasses.replace(recipe, bundle=bundle, data=(data,))


def test_a_table_tells_patients_labels_and_folds(folder: Path, recipe: Recipe) -> None:
    # blanks are nobody's, and neither are rows of nothing
    rows = "y.png , Q,normal ,2\nx.png,P ,malignant,1 \n,,,,\nunknown.png,R,benign,3,,\n"
    found = load(tabled(folder, recipe, rows), folder)
    told = [(s.name, s.patient, s.label, s.fold) for s in found]
    assert told == [("x.png", "P", 1, "1"), ("y.png", "Q", UNLABELLED, "2")]
    splits = split_all(found)
    assert [(s.name, [t.name for t in s.test]) for s in splits] == [
        ("1", ["x.png"]),
        ("2", ["y.png"]),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("x.png,P,benign,1\n", r"table\.csv has no row for y\.png"),
        ("x.png,P,benign,1\nx.png,P,benign,1\n", "'file' names an image twice"),
        ("x.png,P,odd,1\ny.png,P,benign,1\n", r"x\.png 'odd'; .* \['Benign', 'Malignant'\]"),
        ("x.png,,benign,1\ny.png,P,benign,1\n", r"no patient of x\.png"),
        ("x.png,P\ny.png,P,benign,1\n", r"calls x\.png ''"),
        ("x.png,P, Jr.,benign,1\ny.png,P,benign,1\n", r"row of 'x\.png' has more cells"),
    ],
)
def test_a_table_that_does_not_tell_is_refused(
    folder: Path, recipe: Recipe, rows: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tabled(folder, recipe, rows), folder)


def test_a_table_that_is_none_is_refused(folder: Path, recipe: Recipe) -> None:
    made = tabled(folder, recipe, "x.png,P,benign,1\ny.png,P,benign,1\n")
    (folder / "A/nothing.csv").write_bytes(b"")
    (folder / "A/twice.csv").write_text("file,who,who,kind,part\nx.png,P,Q,benign,1\n", "utf-8")
    for values, message in (
        ({"table": "A/x.png"}, r"cannot read the table .*x\.png"),
        ({"table": "none.csv"}, r"cannot read the table .*none\.csv"),
        ({"table": "A/nothing.csv"}, r"nothing\.csv has no column .*; there are \[\]"),
        ({"table": "A/twice.csv"}, r"no column \['who'\], or several; there"),
        (
            {"columns": {"patient": "whom"}},
            r"no column \['whom'\], or several; there are \['file', 'who'",
        ),
        ({"columns": {"patient": "who", "image": "name"}}, r"no column \['name'\]"),
    ):
        (data,) = made.data
        other = structs.replace(data, **({"unlabelled": ()} | values))
        with pytest.raises(RecipeError, match=message):
            load(dataclasses.replace(made, data=(other,)), folder)


def in_folders(tmp_path: Path, **values: Any) -> Recipe:
    """Write images of one name for two patients, each with a mask of its own; return a recipe."""
    for i, patient in enumerate(("P1", "P2")):
        for name in ("a", "b"):
            write_pair(
                tmp_path / f"{patient}/images/{name}.png",
                tmp_path / f"{patient}/masks/{name}.png",
                size=100 + 20 * i + 10 * (name == "b"),
                inside=1,
                outside=0,
            )
    keys = {
        "images": "P*/images/*", "masks": ".", "mask_name": "{patient}/masks/{stem}.png",
        "patient": None, "patients": "^(P[0-9])/", "classes": {"Tumor": (1,)}, "background": (),
    }  # fmt: skip
    return image_recipe(tmp_path, **(keys | values))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"patients": "([^/]+)/images/"},
        {"masks": "sorted", "mask_name": "{patient}/{stem}.png"},
        {"images": "P*/*.png", "mask_name": "{folder}/masks/{stem}.png"},
    ],
)
def test_patients_may_have_folders_with_images_of_one_name(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    recipe = in_folders(tmp_path, **keys)
    for patient in ("P1", "P2"):
        folder = tmp_path / patient
        (tmp_path / "sorted").mkdir(exist_ok=True)
        (tmp_path / "sorted" / patient).symlink_to(folder / "masks")
        for name in ("LICENSE", "Thumbs.db", "desktop.ini", ".DS_Store", "._a.png", "notes.txt"):
            (folder / "images" / name).write_bytes(b"\0\5\26\7 no image")
        (folder / "images/old").mkdir()
        if "folder" in keys.get("mask_name", ""):
            for path in (folder / "images").glob("[ab].png"):
                path.rename(folder / path.name)
    found = load(recipe, tmp_path)
    where = "" if recipe.data[0].images == "P*/*.png" else "images/"
    expected = [(p, f"{p}/{where}{name}.png") for p in ("P1", "P2") for name in "ab"]
    assert [(s.patient, s.name) for s in found] == expected
    for sample in found:
        image, truth = sample.read_all()
        dark = image.float().mean(0) < 0.6 if image.dtype == torch.float32 else image[1] < 130
        # the disc of each image, whose sizes differ, is that of its own mask
        assert float((dark == (truth == 1)).double().mean()) > 0.98
    assert {s.test[0].patient for s in split_all(found)} == {"P1", "P2"}


def test_a_mask_of_two_images_of_one_name_is_refused(tmp_path: Path) -> None:
    recipe = in_folders(tmp_path, masks="P1/masks", mask_name="{stem}.png")
    with pytest.raises(RecipeError, match=r"a\.png would be the truth of .*P1.* and of .*P2"):
        load(recipe, tmp_path)
    with pytest.raises(
        RecipeError, match=r"a\.png has no '\^\(P\[0-9\]\)', which finds the patient"
    ):
        load(in_folders(tmp_path, patients="^(P[0-9])"), tmp_path)
    # the group is there, and finds nothing: all would be of one patient
    with pytest.raises(RecipeError, match=r"a\.png has no '\(Q\)\?P\[0-9\]/'"):
        load(in_folders(tmp_path, patients="(Q)?P[0-9]/"), tmp_path)


def test_a_table_tells_images_of_one_name_apart_by_their_paths(tmp_path: Path) -> None:
    keys = {"patients": None, "table": "t.csv", "columns": {"patient": "who", "image": "file"}}
    recipe = in_folders(tmp_path, images="P*/images/a.png", mask_name="{patient}/masks/{stem}.png")
    data = structs.replace(recipe.data[0], **keys)
    recipe = dataclasses.replace(recipe, data=(data,))
    (tmp_path / "t.csv").write_text("file,who\nP1/images/a.png,P1\nP2/images/a.png,P2\n", "utf-8")
    assert [(s.patient, s.shape) for s in load(recipe, tmp_path)] == [
        (p, recipe.bundle.input.fit) for p in ("P1", "P2")
    ]
    (tmp_path / "t.csv").write_text("file,who\na.png,P1\n", "utf-8")
    with pytest.raises(RecipeError, match=r"has one row for 2 images called a\.png; name them"):
        load(recipe, tmp_path)


def test_cases_of_images_of_one_name_are_told_apart(tmp_path: Path) -> None:
    recipe = in_folders(tmp_path)
    found = load(recipe, tmp_path)
    both = [dataclasses.replace(s, patient="P") for s in found if s.name.endswith("a.png")]
    judged = measure(Darkness(), recipe.bundle, both)
    assert [name for name, _ in judged["P"].images] == ["P1/images/a.png", "P2/images/a.png"]
    draw_cases(Darkness(), recipe.bundle, both, judged, tmp_path / "cases")
    assert len(list((tmp_path / "cases").glob("*.png"))) == 2


def test_a_patient_of_two_folds_is_refused(samples: list[Sample]) -> None:
    x, y, other = samples  # the first two are of one patient
    with pytest.raises(RecipeError, match=r"several folds, or some in none: \['A'\]"):
        split_all([dataclasses.replace(x, fold="1"), y, other])


def test_who_has_no_fold_is_never_held_out(samples: list[Sample]) -> None:
    x, y, other = samples
    (split,) = split_all([x, y, dataclasses.replace(other, fold="late")])
    assert (split.name, split.test[0].patient, len(split.train)) == ("late", "B", 2)
    with pytest.raises(RecipeError, match=r"no fold \['A'\] to hold out; there are \['late'\]"):
        plan_splits([x, dataclasses.replace(other, fold="late")], SplitSpec(), seed=1, wanted="A")


def drawn(sampler: Sampler, count: int = 2000) -> list[tuple[str, int]]:
    """Return names of samples and the classes of the places drawn."""
    generator = seeded()
    found = []
    for _ in range(count):
        sample, place = sampler.draw(generator)
        found.append((sample.name, int(truth_of(sample)[place])))
    return found


def flat_samples() -> list[Sample]:
    """Return pictures of two patients; class 2 is rare, and only in B's."""
    samples = []
    for patient, side in (("A", 10), ("B", 10), ("B", 20)):
        truth = torch.zeros(side, side, dtype=torch.uint8)
        truth[0] = 1
        truth[1, :2] = 2 if (patient, side) == ("B", 20) else 0
        image = torch.full((3, side, side), len(samples), dtype=torch.uint8)
        samples.append(make_sample(patient, image, truth, name=f"{patient}{side}"))
    return samples


def test_patients_are_drawn_evenly_and_their_images_by_area() -> None:
    samples = flat_samples()
    found = drawn(Sampler(samples, training_set(samples, classes=3).surveys, balance=0))
    shares = {name: sum(n == name for n, _ in found) / 2000 for name in ("A10", "B10", "B20")}
    assert shares == pytest.approx({"A10": 0.5, "B10": 0.1, "B20": 0.4}, abs=0.04)
    ones = sum(c == 1 for _, c in found) / 2000
    assert ones == pytest.approx(0.5 * 0.1 + 0.1 * 0.1 + 0.4 * 0.05, abs=0.03)


def test_patients_are_drawn_by_their_weights() -> None:
    samples = [
        dataclasses.replace(s, weight=0.25 if s.patient == "A" else 1.0) for s in flat_samples()
    ]
    found = drawn(Sampler(samples, training_set(samples, classes=3).surveys, balance=0))
    assert sum(name == "A10" for name, _ in found) / 2000 == pytest.approx(0.2, abs=0.03)


def test_classes_are_drawn_evenly_from_the_patients_that_have_them() -> None:
    samples = flat_samples()
    found = drawn(Sampler(samples, training_set(samples, classes=3).surveys, balance=1))
    for index in range(3):
        assert sum(c == index for _, c in found) / 2000 == pytest.approx(1 / 3, abs=0.04)
    assert {n for n, c in found if c == 2} == {"B20"}
    ones = [n for n, c in found if c == 1]
    assert ones.count("A10") / len(ones) == pytest.approx(0.5, abs=0.06)


def test_what_is_unknown_is_never_drawn() -> None:
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    truth = torch.full((40, 40), IGNORE, dtype=torch.uint8)
    nothing = make_sample("A", image, truth)
    with pytest.raises(RecipeError, match="no pixel of any image has a known class"):
        Sampler([nothing], training_set([nothing]).surveys, balance=0.5)
    truth = truth.clone()
    truth[30:33, 7] = 1
    sample = make_sample("A", image, truth)
    generator = seeded()
    sampler = Sampler([nothing, sample], training_set([nothing, sample]).surveys, balance=0.5)
    places = {sampler.draw(generator)[1] for _ in range(60)}
    assert places == {(30, 7), (31, 7), (32, 7)}


def test_a_crop_holds_the_place_it_is_for() -> None:
    truth = torch.zeros(200, 150, dtype=torch.uint8)
    truth[140, 30] = 1
    sample = make_sample("A", torch.zeros(3, 200, 150, dtype=torch.uint8), truth)
    for seed in range(40):
        _, cut = random_crop(sample, (140, 30), 64, QUIET, seeded(seed))
        assert (cut == 1).sum() == 1


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(20, 150),
    width=st.integers(20, 150),
    size=st.sampled_from([32, 64, 96]),
    scale=st.floats(1, 1.5),
    rotate=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_image_and_truth_are_cut_alike(
    height: int, width: int, size: int, scale: float, rotate: float, seed: int
) -> None:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    truth = (((y // 16) + (x // 16)) % 2).to(torch.uint8)
    sample = make_sample("A", (truth * 200).expand(3, -1, -1), truth)
    place = (seed % height, seed % width)
    spec = AugmentSpec(scale=scale, rotate=rotate)
    image, cut = random_crop(sample, place, size, spec, seeded(seed))
    assert image.shape == (3, size, size)
    assert cut.shape == (size, size)
    assert set(cut.unique().tolist()) <= {0, 1}
    # they may differ only where interpolation crosses the squares' edges
    wrong = (image[0] > 100 / 255) != (cut == 1)
    assert not (wrong & (image[0] < 0.01)).any()
    assert not (wrong & (image[0] > 0.78)).any()


def test_crops_without_scale_or_rotation_are_pixels_of_the_image_in_eight_poses() -> None:
    truth = torch.arange(64 * 64).remainder(251).reshape(64, 64).to(torch.uint8)
    sample = make_sample("A", truth.expand(3, -1, -1), truth)
    base = truth.numpy()
    poses = [np.rot90(b, k) for b in (base, base[:, ::-1]) for k in range(4)]
    found = set()
    for seed in range(60):
        image, cut = random_crop(sample, (5, 60), 64, QUIET, seeded(seed))
        # a crop as large as the image lies exactly upon it
        np.testing.assert_allclose((image[0] * 255).numpy(), cut.numpy(), atol=0.01)
        found.add(next(i for i, pose in enumerate(poses) if np.array_equal(pose, cut.numpy())))
    assert found == set(range(8))


def test_crops_may_stay_upright() -> None:
    truth = torch.arange(64 * 64).remainder(251).reshape(64, 64).to(torch.uint8)
    sample = make_sample("A", truth.expand(3, -1, -1), truth)
    upright = AugmentSpec(scale=1, rotate=1, turn=0)
    for seed in range(20):
        _, cut = random_crop(sample, (9, 9), 64, upright, seeded(seed))
        assert torch.equal(cut, truth)


def test_upright_crops_lean_and_are_mirrored_as_far_as_the_recipe_says() -> None:
    # a slope to the right: the crop's slope tells how it was turned
    slope = (torch.arange(128) / 128).expand(128, -1)
    sample = make_sample("A", slope[None], torch.zeros(128, 128, dtype=torch.uint8))
    spec = AugmentSpec(scale=1, rotate=1, turn=0, tilt=15, mirror=0.25)
    turned = []
    for seed in range(100):
        (crop,), _ = random_crop(sample, (64, 64), 32, spec, seeded(seed))
        down, right = (float(d[16, 16]) * 128 for d in torch.gradient(crop))
        assert math.hypot(down, right) == pytest.approx(1, abs=1e-3)
        turned.append((math.degrees(math.atan2(down, abs(right))), right < 0))
    angles, mirrored = zip(*turned, strict=True)
    assert -15 <= min(angles) < -13
    assert 13 < max(angles) <= 15
    assert 0.15 < sum(mirrored) / len(mirrored) < 0.35


def test_volumes_are_cut_in_three_axes() -> None:
    truth = torch.arange(16**3).remainder(251).reshape(16, 16, 16).to(torch.uint8)
    sample = make_sample("A", truth[None], truth)
    base = truth.numpy()
    poses = [
        np.rot90(b, k, (1, 2)) for b in (base, base[::-1], base[..., ::-1], base[::-1, :, ::-1])
        for k in range(4)
    ]  # fmt: skip
    found = set()
    for seed in range(240):
        image, cut = random_crop(sample, (8, 8, 8), 16, QUIET, seeded(seed))
        np.testing.assert_allclose((image[0] * 255).numpy(), cut.numpy(), atol=0.02)
        found.add(next(i for i, pose in enumerate(poses) if np.array_equal(pose, cut.numpy())))
    assert len(found) == 16


# -- slides and patch grids -------------------------------------------------------------------


SLIDE_DATA = """
[[data]]
patient = "S"
images = "SLIDE"
annotations = "truth.geojson"
classes = { Tumor = ["Tumor", "Invasive"] }
background = ["Stroma"]
"""
DRAWN = [
    (shapely.box(300, 250, 900, 1100), "Stroma"),
    (shapely.Point(560, 620).buffer(200), "Tumor"),
    (shapely.box(1500, 300, 1702, 511), "Invasive"),
    (shapely.box(1000, 1000, 1100, 1100), "Necrosis"),
    (shapely.box(520, 600, 560, 640), "Ignore*"),
]


def write_drawn(path: Path) -> None:
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(polygon),
            "properties": {"classification": {"name": name}},
        }
        for polygon, name in DRAWN
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")


def slide_recipe(folder: Path, name: str) -> Recipe:
    head = RECIPE[: RECIPE.index("[[data]]")]
    write_drawn(folder / "truth.geojson")
    (folder / "slide.toml").write_text(head + SLIDE_DATA.replace("SLIDE", name), "utf-8")
    return load_recipe(folder / "slide.toml")


def test_a_slide_without_any_class_is_background_all_over(tmp_path: Path, slide_path: Path) -> None:
    (tmp_path / "slide.tif").symlink_to(slide_path)
    recipe = slide_recipe(tmp_path, "slide.tif")
    data = structs.replace(recipe.data[0], annotations=None, empty=True, classes={}, background=())
    with ExitStack() as closing:
        (sample,) = load_samples(dataclasses.replace(recipe, data=(data,)), tmp_path, closing)
        assert not survey(sample, 2).totals[1]
        assert survey(sample, 2).totals[0] == math.prod(sample.shape)
        judged = measure(Darkness(), recipe.bundle, [sample])["S"]
    assert judged.pixels.matrix.sum() == math.prod(sample.shape)
    assert not judged.pixels.matrix[1].any()


@pytest.mark.parametrize("kind", ["slide", "patch grid"])
def test_an_annotated_slide_and_its_tiles_give_the_same_crops(
    tmp_path: Path, slide_path: Path, kind: str
) -> None:
    (tmp_path / "slide.tif").symlink_to(slide_path)
    name = "slide.tif"
    if kind == "patch grid":
        name = "slide.zarr"
        command = ["tile", tmp_path / "slide.tif", "--mpp", "0.5", "--patch-size", "128"]
        run_command(*command, "--tissue", "none", "-o", tmp_path)
    recipe = slide_recipe(tmp_path, name)
    with ExitStack() as closing:
        (from_slide,) = load_samples(recipe, tmp_path, closing)
        # the oracle: the slide's own pixels at the network's resolution, and the areas as shapely
        # knows them at the centre of each pixel
        with open_source(slide_path) as slide:
            view = slide.at(0.5)
            pixels = view.read((0, 0), view.shape)
        y, x = np.indices(view.shape) * 2 + 1.0
        truth = np.full(view.shape, IGNORE, np.uint8)
        values = {"Stroma": 0, "Tumor": 1, "Invasive": 1}
        for polygon, label in DRAWN:
            truth[shapely.contains_xy(polygon, x, y)] = values.get(label, IGNORE)
        from_tile = make_sample(
            "S", torch.from_numpy(pixels.copy()).permute(2, 0, 1), view_of(truth)
        )
        surveys = [survey(sample, 2) for sample in (from_slide, from_tile)]
        assert surveys[0].totals.tolist() == [int((truth == i).sum()) for i in range(2)]
        assert sum(len(s) for s in surveys[0].places) == sum(len(s) for s in surveys[1].places)
        generators = [seeded(), seeded()]
        samplers = [
            Sampler([sample], [found], balance=0.5)
            for sample, found in zip((from_slide, from_tile), surveys, strict=True)
        ]
        for _ in range(12):
            crops = []
            for sampler, generator in zip(samplers, generators, strict=True):
                sample, place = sampler.draw(generator)
                crops.append(random_crop(sample, place, 64, AugmentSpec(), generator))
            for slide_side, tile_side in zip(*crops, strict=True):
                assert torch.equal(slide_side, tile_side)


def test_slides_of_one_name_have_the_annotations_of_their_folders(
    tmp_path: Path, slide_path: Path
) -> None:
    write_drawn(tmp_path / "drawn.geojson")
    recipe = slide_recipe(tmp_path, "s.tif")
    area = {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(shapely.box(0, 0, 1500, 1400)),
        "properties": {"classification": {"name": "Tumor"}},
    }
    for patient in ("P1", "P2"):
        (tmp_path / patient).mkdir()
        (tmp_path / patient / "s.tif").symlink_to(slide_path)
        (tmp_path / "drawn" / patient).mkdir(parents=True)
    (tmp_path / "drawn.geojson").rename(tmp_path / "drawn/P1/s.geojson")
    (tmp_path / "drawn/P2/s.geojson").write_text(json.dumps(area), "utf-8")
    keys = {"images": "P*/s.tif", "annotations": "drawn", "patient": None, "patients": "^(P.)/"}
    data = structs.replace(recipe.data[0], **keys)
    with ExitStack() as stack:
        one, other = load_samples(dataclasses.replace(recipe, data=(data,)), tmp_path, stack)
        assert [s.name for s in (one, other)] == ["P1/s.tif", "P2/s.tif"]
        shares = [float((s.read_all()[1] == 1).double().mean()) for s in (one, other)]
    assert shares[1] == pytest.approx(1500 * 1400 / (1931 * 1487), abs=0.01)
    assert shares[0] < shares[1] / 2


def view_of(truth: np.ndarray) -> Tensor:
    return torch.from_numpy(truth)


def test_annotations_that_do_not_fit_are_refused(tmp_path: Path, slide_path: Path) -> None:
    (tmp_path / "slide.tif").symlink_to(slide_path)
    recipe = slide_recipe(tmp_path, "slide.tif")
    data = structs.replace(recipe.data[0], classes={"Tumor": ("Tumour",)}, background=())
    with pytest.raises(RecipeError, match=r"has areas of .* looks for \['Tumour'\]"):
        load(dataclasses.replace(recipe, data=(data,)), tmp_path)
    data = structs.replace(recipe.data[0], annotations="none")
    with pytest.raises(RecipeError, match=r"cannot learn from .*slide\.tif"):
        load(dataclasses.replace(recipe, data=(data,)), tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(RecipeError, match=r"has no slide\.geojson"):
        load(dataclasses.replace(recipe, data=(data,)), tmp_path)


def test_areas_that_the_recipe_does_not_name_are_said(
    tmp_path: Path, slide_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "slide.tif").symlink_to(slide_path)
    recipe = slide_recipe(tmp_path, "slide.tif")
    with ExitStack() as closing:
        load_samples(recipe, tmp_path, closing)
    assert "has areas of ['Necrosis'], which the recipe does not name" in caplog.text


# -- pictures and volumes ---------------------------------------------------------------------


def image_recipe(folder: Path, **data: Any) -> Recipe:
    (folder / "recipe.toml").write_text(RECIPE, "utf-8")
    recipe = load_recipe(folder / "recipe.toml")
    spec = structs.replace(recipe.bundle.input, mpp=None, fit=(64, 96))
    bundle = dataclasses.replace(recipe.bundle, modality="image", input=spec)
    kept = {"mpp": None, "ignore": (), "classes": {"Tumor": (1, 255)}} | data
    return dataclasses.replace(
        recipe, bundle=bundle, data=(structs.replace(recipe.data[0], **kept),)
    )


def test_pictures_are_brought_to_fit_with_masks_of_any_kind(tmp_path: Path) -> None:
    disc = np.zeros((128, 192), bool)
    disc[20:60, 30:90] = True
    masks = {
        "one bit": Image.fromarray(disc),
        "rgb": Image.fromarray(np.repeat(disc[..., None] * np.uint8(255), 3, 2)),
        "grey": Image.fromarray(disc * np.uint8(255)),
    }
    deep = (np.arange(128 * 192).reshape(128, 192) + 1000).astype(np.uint16)
    for i, (name, mask) in enumerate(masks.items()):
        for side in ("images", "masks"):
            (tmp_path / side).mkdir(exist_ok=True)
        shade = np.full((128, 192), 40 * i + 30, np.uint8)
        picture = Image.fromarray(deep) if name == "one bit" else Image.fromarray(shade)
        picture.save(tmp_path / f"images/p{i} {name}.png")
        mask.save(tmp_path / f"masks/p{i} {name}_mask.png")
    recipe = image_recipe(
        tmp_path,
        images="images/*.png",
        masks="masks",
        mask_name="{stem}_mask.png",
        patient=None,
        patients=r"^(p\d)",
    )
    samples = load(recipe, tmp_path)
    assert [s.patient for s in samples] == ["p0", "p1", "p2"]
    for sample in samples:
        image, truth = sample.read_all()
        assert image.shape == (3, 64, 96)
        assert torch.equal(truth, torch.from_numpy(disc[::2, ::2].astype(np.uint8)))
    deep_image, plain = samples[0].read_all()[0], samples[1].read_all()[0]
    assert deep_image.dtype == torch.float32
    assert float(deep_image.mean()) == pytest.approx(deep.mean() / 65535, rel=1e-4)
    assert float(deep_image[0, 0, 0]) < 1200 / 65535 < 25000 / 65535 < float(deep_image[0, -1, -1])
    assert plain.unique().tolist() == pytest.approx([70 / 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_picture_stored_in_colours_is_the_same_picture(
    tmp_path: Path, channels: int
) -> None:
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 192), dtype=np.uint8))
    for patient, mode in (("p1", "RGB"), ("p2", "L")):
        grey.convert(mode).save(tmp_path / f"{patient}.png")
        Image.new("1", grey.size, 1).save(tmp_path / f"{patient}_mask.png")
    recipe = image_recipe(
        tmp_path, images="p?.png", masks=".", mask_name="{stem}_mask.png", patient=None,
        patients=r"^(p\d)",
    )  # fmt: skip
    spec = structs.replace(recipe.bundle.input, channels=channels)
    recipe = dataclasses.replace(recipe, bundle=dataclasses.replace(recipe.bundle, input=spec))
    with pytest.raises(RecipeError, match=r"the same picture on both sides: \['p1.png is p2.png"):
        plan_splits(load(recipe, tmp_path), recipe.split, seed=0)


def test_mammograms_lie_as_the_network_wants_them_with_their_masks(tmp_path: Path) -> None:
    y, x = np.ogrid[:120, :80]
    breast = (y - 60) ** 2 / 50**2 + (x - 79) ** 2 / 60**2 < 1  # at the right edge
    lesion = breast & (y < 50)
    pixels = (np.where(breast, 500, 20) + 400 * lesion).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(lesion).save(tmp_path / "a_mask.png")
    recipe = image_recipe(tmp_path, images="a.png", masks="a_mask.png")
    spec = structs.replace(
        recipe.bundle.input, fit=(120, 120), channels=1, scale="minmax", orient="left", pad="square"
    )
    bundle = dataclasses.replace(recipe.bundle, input=spec)
    (sample,) = load(dataclasses.replace(recipe, bundle=bundle), tmp_path)
    image, truth = sample.read_all()
    assert torch.equal(truth[:, :80], torch.from_numpy(lesion[:, ::-1].astype(np.uint8)))
    assert (truth[:, 80:] == IGNORE).all()
    assert torch.equal(image[0] == 1, truth == 1)  # the lesion is the brightest of the breast


def test_a_mask_in_colour_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (96, 64), (255, 0, 0)).save(tmp_path / "a_mask.png")
    recipe = image_recipe(tmp_path, images="a.png", masks="a_mask.png")
    with pytest.raises(RecipeError, match="a picture in colour; a mask has one value a pixel"):
        load(recipe, tmp_path)


def test_volumes_are_brought_to_their_spacing(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    x, y, z = np.indices((20, 30, 8))
    inside = (x >= 4) & (x < 12) & (y >= 10) & (y < 20) & (z >= 2) & (z < 6)
    values = np.where(inside, 900, 100).astype(np.int16)
    for name, array in (("v.nii.gz", values), ("v_mask.nii.gz", inside.astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 2.0, 4.0, 1])), tmp_path / name)
    recipe = image_recipe(tmp_path, images="v.nii.gz", masks="v_mask.nii.gz")
    spec = structs.replace(
        recipe.bundle.input, fit=None, spacing_mm=(2.0, 2.0, 2.0), channels=1,
        patch_size=(16, 16, 16), overlap=(0, 0, 0),
    )  # fmt: skip
    bundle = dataclasses.replace(recipe.bundle, modality="volume", input=spec)
    (sample,) = load(dataclasses.replace(recipe, bundle=bundle), tmp_path)
    image, truth = sample.read_all()
    assert truth.shape == (16, 30, 10)  # z, y, x: 8 · 4, 30 · 2 and 20 · 1 mm
    assert image.shape == (1, 16, 30, 10)
    box = torch.zeros(16, 30, 10, dtype=torch.uint8)
    box[4:12, 10:20, 2:6] = 1
    assert torch.equal(truth, box)
    assert float(image[0, 6:10, 12:18, 3:5].min()) > 0.9
    assert float(image[0, :2].max()) < 0.1


def test_a_mask_is_laid_on_its_volume_by_geometry(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    values = np.zeros((20, 30, 12), np.int16)
    values[3:13, 4:14, 1:11] = 900  # on one side of the body
    affine = np.diag([-1.0, -2.0, 4.0, 1])  # LPS
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "v.nii.gz")
    mask = nibabel.Nifti1Image((values > 0).astype(np.uint8), affine)
    recipe = image_recipe(tmp_path, images="v.nii.gz", masks="m.nii.gz")
    spec = structs.replace(
        recipe.bundle.input, fit=None, spacing_mm=(4.0, 2.0, 1.0), channels=1,
        patch_size=(16, 16, 16), overlap=(0, 0, 0),
    )  # fmt: skip
    recipe = dataclasses.replace(
        recipe, bundle=dataclasses.replace(recipe.bundle, modality="volume", input=spec)
    )
    for other in (mask, nibabel.as_closest_canonical(mask)):  # RAS: the same body, other axes
        nibabel.save(other, tmp_path / "m.nii.gz")
        (sample,) = load(recipe, tmp_path)
        image, truth = sample.read_all()
        assert int(truth.sum()) == 1000
        assert torch.equal(truth == 1, image[0] > 0.5)
    affine[0, 3] = 3  # a shape that fits is not enough
    nibabel.save(nibabel.Nifti1Image(np.asarray(mask.dataobj), affine), tmp_path / "m.nii.gz")
    with pytest.raises(RecipeError, match=r"m\.nii\.gz does not lie on its image: the mask has"):
        load(recipe, tmp_path)


def test_volumes_may_be_scored_by_their_body(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    z, y, x = np.indices((16, 16, 16)) - 8
    body = z**2 + y**2 + x**2 < 40
    rng = np.random.default_rng(0)
    values = np.where(body, rng.normal(800, 50, body.shape), rng.normal(10, 3, body.shape))
    for name, array in (("v.nii", values.round().astype(np.int16)), ("m.nii", body * np.uint8(1))):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / name)
    recipe = image_recipe(tmp_path, images="v.nii", masks="m.nii")
    spec = structs.replace(
        recipe.bundle.input, fit=None, spacing_mm=(1.0, 1.0, 1.0), channels=1, scale="zscore",
        patch_size=(16, 16, 16), overlap=(0, 0, 0),
    )  # fmt: skip
    bundle = dataclasses.replace(recipe.bundle, modality="volume", input=spec)
    (sample,) = load(dataclasses.replace(recipe, bundle=bundle), tmp_path)
    image, truth = sample.read_all()
    inside = image[0][truth == 1]
    assert float(inside.mean()) == pytest.approx(0, abs=1e-4)
    assert float(inside.std(correction=0)) == pytest.approx(1, abs=1e-4)
    # variations do not cut off what lies beyond [0, 1]
    spec_of = structs.replace(QUIET, noise=1e-4)
    varied, _ = augment(
        image[None], truth[None], spec_of, seeded(), stained=False, bounded=False
    )  # fmt: skip
    torch.testing.assert_close(varied[0], image, rtol=0, atol=1e-3)


def test_a_cache_forgets_what_was_used_longest_ago() -> None:
    cache, loaded = Cache(limit=250), []

    def get(name: str) -> None:
        def load_it() -> tuple[Tensor, Tensor]:
            loaded.append(name)
            return torch.zeros(100, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)

        cache.get(Path(name), load_it)

    for name in ("a", "b", "a", "c", "a", "b"):
        get(name)
    assert loaded == ["a", "b", "c", "b"]


# -- augmentation -----------------------------------------------------------------------------


def test_without_strength_stains_and_contrast_stay() -> None:
    images = torch.rand(2, 3, 16, 16, generator=seeded()).clamp_min(1 / 255)
    torch.testing.assert_close(vary_stain(images, QUIET, seeded()), images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vary_contrast(images, 0, seeded()), images)
    assert blur(images, 0, seeded()) is images


def test_white_stays_white_whatever_the_stain_does() -> None:
    spec = structs.replace(QUIET, stain=0.5, mixing=0.2, density=0.5)
    white = torch.ones(8, 3, 4, 4)
    torch.testing.assert_close(vary_stain(white, spec, seeded()), white)


def test_the_amount_of_stain_scales_the_optical_density() -> None:
    spec = structs.replace(QUIET, density=0.4)
    images = torch.rand(5, 3, 8, 8, generator=seeded()) * 0.5 + 0.4
    ratio = vary_stain(images, spec, seeded(1)).log() / images.log()
    inside = ratio.reshape(5, -1)
    torch.testing.assert_close(inside, inside[:, :1].expand_as(inside), rtol=1e-3, atol=1e-3)
    assert len(inside[:, 0].unique()) == 5


def test_blur_is_a_gaussian() -> None:
    images = torch.rand(1, 3, 40, 40, generator=seeded())
    seed = next(s for s in range(50) if torch.rand(2, generator=seeded(s))[0] > 0.5)
    sigma = float(torch.rand(2, generator=seeded(seed))[1]) * 1.2
    found = blur(images, 1.2, seeded(seed))
    expected = ndimage.gaussian_filter(
        images.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, 4, 4)
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_glass_is_background_and_white_and_elsewhere_nothing_changes() -> None:
    images = torch.full((12, 3, 64, 64), 0.3)
    truths = torch.ones(12, 64, 64, dtype=torch.uint8)
    before = images.clone()
    changed, found = empty_glass(images, truths, 1.0, seeded(2))
    assert torch.equal(images, before)
    assert (truths == 1).all()
    share = (found == 0).float().mean((1, 2))
    assert share.min() < 0.5 < share.max()
    assert (changed >= 0.3 - 1e-6).all()
    assert changed[0, 0][found[0] == 0].mean() > changed[0, 0][found[0] == 1].mean()
    untouched, same = empty_glass(images, truths, 0.0, seeded(2))
    assert torch.equal(untouched, images)
    assert torch.equal(same, truths)


def test_borrowed_colours_are_those_of_another_crop() -> None:
    dark = torch.rand(2, 3, 32, 32, generator=seeded()) * 0.2
    images = dark + torch.tensor([[0.5, 0.3, 0.4], [0.3, 0.5, 0.2]])[:, :, None, None]
    given = borrow_colours(images, 1.0, seeded(1))
    own, lent = (-x.log() for x in (images, given))
    lender = torch.randint(2, (2,), generator=seeded(1)).tolist()
    assert sorted(lender) != [0, 1]  # one borrows of the other, which keeps its own
    for i, j in enumerate(lender):
        torch.testing.assert_close(lent[i].mean((1, 2)), own[j].mean((1, 2)), atol=0.01, rtol=0)
        torch.testing.assert_close(lent[i].std((1, 2)), own[j].std((1, 2)), atol=0.01, rtol=0)
        # what is where it is stays there
        for a, b in zip(own[i].flatten(1), lent[i].flatten(1), strict=True):
            assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.999
    glass = torch.ones(2, 3, 32, 32)
    assert torch.equal(borrow_colours(glass, 1.0, seeded()), glass)


def test_some_crops_are_compressed_once_more() -> None:
    images = torch.rand(40, 3, 32, 32, generator=seeded())
    found = compress(images, 0.5, seeded(3))
    loss = (found - images).abs().mean((1, 2, 3))
    untouched = int((loss == 0).sum())
    assert 10 < untouched < 30
    # noise is what JPEG keeps least of, but of its mean
    assert float(loss[loss > 0].min()) > 0.02
    assert float((found.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs().max()) < 0.03
    spec = structs.replace(QUIET, jpeg=1.0)
    deep, _ = augment(
        images[:, :1] * 3, torch.zeros(40, 32, 32), spec, seeded(), bounded=False, stained=False
    )
    torch.testing.assert_close(deep, images[:, :1] * 3)


# -- losses -----------------------------------------------------------------------------------


def test_soft_dice_is_what_counting_says() -> None:
    truth = torch.tensor([[[[1.0, 1, 0, 0]]]])
    found = torch.tensor([[[[1.0, 0, 1, 0]]]])
    # overlap 1, sums 2 and 2, smooth 1
    assert float(soft_dice_loss(found, truth)) == pytest.approx(1 - 3 / 5)
    assert float(soft_dice_loss(truth, truth)) == 0
    assert float(soft_dice_loss(truth * 0, truth * 0)) == 0


def test_one_logit_and_two_logits_agree() -> None:
    logit = torch.randn(2, 1, 8, 8, generator=seeded())
    truth = torch.randint(0, 2, (2, 8, 8), generator=seeded(1)).to(torch.uint8)
    pair = torch.cat([torch.zeros_like(logit), logit], dim=1)
    one = segmentation_loss(logit, truth, "sigmoid") - soft_dice_loss(
        logit.sigmoid(), truth[:, None].float()
    )
    target = torch.stack([truth == 0, truth == 1], dim=1).float()
    two = segmentation_loss(pair, truth, "softmax") - soft_dice_loss(pair.softmax(1), target)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_ignored_pixels_do_not_matter(activation: str) -> None:
    channels = 1 if activation == "sigmoid" else 3
    logits = torch.randn(2, channels, 8, 8, generator=seeded())
    truth = torch.randint(0, 2, (2, 8, 8), generator=seeded(1)).to(torch.uint8)
    truth[:, :4] = IGNORE
    other = logits.clone()
    other[:, :, :4] = 50 * torch.randn(2, channels, 4, 8, generator=seeded(3))
    torch.testing.assert_close(
        segmentation_loss(logits, truth, activation), segmentation_loss(other, truth, activation)
    )


def test_the_loss_of_a_sure_and_right_answer_is_nothing() -> None:
    truth = torch.randint(0, 2, (2, 8, 8), generator=seeded()).to(torch.uint8)
    logits = (truth[:, None].float() - 0.5) * 60
    assert float(segmentation_loss(logits, truth, "sigmoid")) == pytest.approx(0, abs=1e-6)


def test_deep_supervision_sums_its_maps_and_labels_are_weighed() -> None:
    logits = torch.randn(2, 1, 8, 8, generator=seeded())
    other = torch.randn(2, 1, 8, 8, generator=seeded(4))
    truth = torch.randint(0, 2, (2, 8, 8), generator=seeded(1)).to(torch.uint8)
    one, two = (segmentation_loss(x, truth, "sigmoid") for x in (logits, other))
    torch.testing.assert_close(network_loss([logits, other], truth, None, "sigmoid"), one + two)
    said = {"mask": logits, "label": torch.tensor([[0.0, 2.0], [1.0, 0.0]])}
    labels = torch.tensor([1, 1])
    entropy = (math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2
    loss = network_loss(said, truth, labels, "sigmoid", label_weight=0.3)
    torch.testing.assert_close(loss, one + 0.3 * entropy)
    torch.testing.assert_close(network_loss(said, truth, None, "sigmoid"), one)


def test_images_without_a_label_do_not_move_the_loss_of_labels() -> None:
    truth = torch.zeros(2, 8, 8, dtype=torch.uint8)
    said = {"mask": torch.zeros(2, 1, 8, 8), "label": torch.tensor([[0.0, 2.0], [1.0, 0.0]])}
    plain = network_loss(said, truth, None, "sigmoid")
    one = network_loss(said, truth, torch.tensor([1, UNLABELLED]), "sigmoid")
    torch.testing.assert_close(one - plain, torch.tensor(math.log(1 + math.exp(-2))))
    none = network_loss(said, truth, torch.tensor([UNLABELLED] * 2), "sigmoid")
    torch.testing.assert_close(none, plain)


def test_volumes_have_the_same_loss_as_their_slices() -> None:
    logits = torch.randn(1, 3, 4, 8, 8, generator=seeded())
    truth = torch.randint(0, 3, (1, 4, 8, 8), generator=seeded(1)).to(torch.uint8)
    flat = segmentation_loss(logits.reshape(1, 3, 32, 8), truth.reshape(1, 32, 8), "softmax")
    torch.testing.assert_close(segmentation_loss(logits, truth, "softmax"), flat)
    parts = [segmentation_loss(logits, truth, "softmax", kind=k) for k in ("ce", "dice")]
    torch.testing.assert_close(sum(parts), flat)


# -- splits -----------------------------------------------------------------------------------


def split_all(samples: list[Sample], folds: int = 0) -> list[Split]:
    return plan_splits(samples, SplitSpec(folds=folds), seed=1)


def test_each_patient_is_held_out_once(samples: list[Sample]) -> None:
    splits = split_all(samples)
    assert [(s.name, len(s.train), len(s.test)) for s in splits] == [("A", 1, 2), ("B", 2, 1)]


def test_groups_of_patients_are_held_out_once_each() -> None:
    pictures = [
        make_sample(f"P{i // 2}", torch.full((3, 2, 2), i, dtype=torch.uint8), torch.zeros(2, 2))
        for i in range(14)
    ]
    splits = split_all(pictures, folds=3)
    held_out = [{s.patient for s in split.test} for split in splits]
    assert sorted(map(len, held_out)) == [2, 2, 3]
    assert set.union(*held_out) == {f"P{i}" for i in range(7)}
    with pytest.raises(RecipeError, match=r"split\.folds is 8; there are 7 patients"):
        split_all(pictures, folds=8)
    learning, validation = leave_out_validation(pictures, 0.3, seed=0)
    assert len({s.patient for s in validation}) == 2
    assert not {s.patient for s in validation} & {s.patient for s in learning}


def test_a_patient_on_both_sides_is_refused(samples: list[Sample]) -> None:
    with pytest.raises(RecipeError, match=r"patients on both sides: \['A'\]"):
        Split(name="leak", train=(samples[0],), test=(samples[1],))


def test_the_same_picture_under_two_names_is_refused(
    folder: Path, recipe: Recipe, samples: list[Sample]
) -> None:
    # other bytes on disk, the same pixels
    Image.open(folder / "A/x.png").save(folder / "B/twin.png", compress_level=1)
    Image.open(folder / "A/masks/x.png").save(folder / "B/twin_mask.png")
    twin = structs.replace(
        recipe.data[0], patient="C", images="B/twin.png", masks="B/twin_mask.png"
    )
    both = load(dataclasses.replace(recipe, data=(*recipe.data, twin)), folder)
    with pytest.raises(RecipeError, match=r"same picture on both sides: \['x.png is twin.png'\]"):
        split_all(both)
    renamed = dataclasses.replace(samples[0], patient="C")
    with pytest.raises(RecipeError, match="the same picture on both sides"):
        leave_out_validation([samples[0], renamed], 0.5, seed=0)


def test_one_patient_cannot_be_left_out(samples: list[Sample]) -> None:
    with pytest.raises(RecipeError, match="add patients"):
        split_all(samples[:2])


# -- measuring --------------------------------------------------------------------------------


class Darkness(torch.nn.Module):
    """Tumour is what is darker than the middle, pixel by pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return -x.mean(1, keepdim=True) * 50


@pytest.mark.parametrize("size", [(64, 64), (200, 131), (40, 90)])
def test_whole_images_are_predicted_at_their_own_size(
    recipe: Recipe, size: tuple[int, int]
) -> None:
    image = torch.randint(0, 256, (3, *size), generator=seeded()).to(torch.uint8)
    with closing(open_predictor(Darkness(), recipe.bundle)) as predictor:
        mask = decided(chances(predictor, image))
    expected = image.float().mean(0) / 255 < 0.5
    assert mask.shape == size
    assert float((mask.bool() == expected).float().mean()) > 0.999


def test_scores_are_what_counting_says(recipe: Recipe) -> None:
    image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    image[:, :32] = 0  # predicted tumour: rows 0 to 31
    truth = torch.zeros(64, 64, dtype=torch.uint8)
    truth[16:48] = 1  # overlap: rows 16 to 31
    truth[:, 32:] = IGNORE
    sample = make_sample("A", image, truth)
    judged = measure(Darkness(), recipe.bundle, [sample])["A"]
    score = scores_of(judged.pixels, recipe.bundle)["Tumor"]
    assert score.dice == pytest.approx(0.5)
    assert score.iou == pytest.approx(1 / 3)
    assert score.share == pytest.approx(0.5)
    assert score.everywhere_dice == pytest.approx(2 / 3)


def test_large_images_are_measured_region_by_region(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randint(0, 256, (3, 200, 170), generator=seeded()).to(torch.uint8)
    truth = torch.randint(0, 2, (200, 170), generator=seeded(1)).to(torch.uint8)
    truth[:70] = IGNORE
    sample = make_sample("A", image, truth)
    whole = measure(Darkness(), recipe.bundle, [sample])["A"]
    monkeypatch.setattr("wsi_pipeline.training.validate.REGION", {2: 48})
    parts = measure(Darkness(), recipe.bundle, [sample])["A"]
    np.testing.assert_array_equal(parts.pixels.matrix, whole.pixels.matrix)
    assert whole.pixels.matrix.sum() == 130 * 170


@pytest.mark.parametrize(
    ("modality", "shape", "options"),
    [
        ("slide", (301, 211), {"resolution": "mpp = 0.5", "channels": 3}),
        ("image", (211, 301), {"resolution": "fit = [211, 301]"}),
        ("volume", (21, 75, 90), {"keys": "scale = [100.0, 900.0]"}),  # flatter than a patch
        ("volume", (21, 75, 90), {"keys": 'scale = "zscore"'}),
    ],
)
def test_what_is_measured_is_what_segment_writes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_slide: Callable[..., Path],
    modality: str,
    shape: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    nibabel = pytest.importorskip("nibabel")
    side = 32 if modality == "volume" else 64
    model = scan_bundle(
        tmp_path / "model",
        modality=modality,
        patch_size=(side,) * len(shape),
        program=Around,  # whose answers depend on where a patch ends
        **options,
    )
    values, truth = blobs(shape), np.random.default_rng(0).integers(0, 3, shape, dtype=np.uint8)
    image, mask = tmp_path / "image.png", tmp_path / "truth.png"
    if modality == "volume":
        image, mask = tmp_path / "image.nii.gz", tmp_path / "truth.nii.gz"
        nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4)), image)
        nibabel.save(nibabel.Nifti1Image(truth.T, np.eye(4)), mask)
    else:
        Image.fromarray((values // 4).astype(np.uint8)).save(image)
        Image.fromarray(truth).save(mask)
    if modality == "slide":
        red = (values // 4).astype(np.uint8)  # green and blue are looked at for colour alone
        pixels = np.stack([red, 255 - red // 2, np.full_like(red, 200)], axis=-1)
        image = make_slide(tmp_path / "image.tif", pixels, 0.5)
    everywhere = ["--tissue", "none"] if modality == "slide" else []
    run_command("segment", image, "-m", model, "-o", tmp_path / "out", "--precision", "fp32",
                *everywhere)  # fmt: skip
    folder = tmp_path / "out/image"
    if modality == "slide":
        found = zarr.open_array(folder / "mask.ome.zarr/0", mode="r")[:]
    elif modality == "image":
        found = np.asarray(Image.open(folder / "mask.png"))
    else:
        found = np.asarray(nibabel.load(folder / "mask.nii.gz").dataobj).T
    data = DataSpec(
        images=image.name,
        masks=mask.name,
        patient="A",
        classes={"Grey": (1,), "Bright": (2,)},
        mpp=0.5 if modality == "slide" else None,
    )
    bundle = load_bundle(model)
    recipe = Recipe(
        bundle=bundle, train=TrainSpec(), augment=QUIET, split=SplitSpec(), data=(data,)
    )
    monkeypatch.setattr("wsi_pipeline.training.validate.REGION", {2: 100, 3: 40})
    judged = measure(build(bundle).module, bundle, load(recipe, tmp_path))["A"]
    expected = confusion_matrix(truth.ravel(), found.ravel(), labels=[0, 1, 2])
    np.testing.assert_array_equal(judged.pixels.matrix, expected)


class Gloomy(Darkness):
    """Says besides that a patch is malignant where any of it is dark."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        mask = super().forward(x)
        dark = mask.amax((1, 2, 3))
        return {"mask": mask, "label": torch.stack([-dark, dark], dim=1)}


@pytest.fixture
def saying(recipe: Recipe) -> Recipe:
    return dataclasses.replace(
        recipe, bundle=dataclasses.replace(recipe.bundle, labels=("Benign", "Malignant"))
    )


def test_labels_are_judged_patch_by_patch(saying: Recipe) -> None:
    image = torch.full((3, 64, 208), 255, dtype=torch.uint8)  # patches start at 0, 48, 96, 144
    image[..., 60] = image[..., 203] = 0  # dark in the first two patches and in the last
    truth = torch.zeros(64, 208, dtype=torch.uint8)
    truth[:, 100] = 1  # truly in the second and the third
    parts = make_sample("A", image, truth)
    unknown = torch.full_like(truth, IGNORE)
    unknown[:, :48] = 0
    whole = dataclasses.replace(make_sample("B", image, unknown), label=1)
    judged = measure(Gloomy(), saying.bundle, [parts, whole])
    assert judged["A"].labels.tolist() == [[0, 2], [1, 1]]
    assert judged["B"].labels.tolist() == [[0, 0], [0, 1]]
    assert accuracy(judged) == pytest.approx(2 / 5)


def test_images_without_a_label_are_not_judged_by_it(saying: Recipe) -> None:
    dark = torch.zeros(3, 64, 64, dtype=torch.uint8)
    sample = make_sample("A", dark, torch.zeros(64, 64, dtype=torch.uint8))
    without = dataclasses.replace(sample, label=UNLABELLED)
    (judged,) = measure(Gloomy(), saying.bundle, [without]).values()
    assert not judged.labels.any()
    assert math.isnan(accuracy({"A": judged}))
    assert len(judged.label_chances) == 0
    assert judged.pixels.matrix.tolist() == [[0, 64 * 64], [0, 0]]


def test_a_card_tells_images_and_false_findings(saying: Recipe, samples: list[Sample]) -> None:
    nothing = PatientScore.empty(saying.bundle)
    images = {
        "A": [[[60, 10], [10, 20]], [[80, 0], [10, 10]], [[100, 0], [0, 0]]],
        "B": [[[90, 10], [0, 0]]],
    }
    said = {"A": [[1, 0.3, 0.7], [0, 0.6, 0.4]], "B": [[0, 0.2, 0.8]]}
    judged = {
        patient: dataclasses.replace(
            nothing,
            pixels=Confusion(matrix=np.sum(counts, axis=0), borders=np.zeros((2, 4), np.int64)),
            images=tuple((str(i), np.array(c)) for i, c in enumerate(counts)),
            label_chances=np.array(said[patient]),
            labels=np.array([[1, 0], [0, 1]]),
        )
        for patient, counts in images.items()
    }
    bundle = dataclasses.replace(
        saying.bundle,
        modality="image",
        input=structs.replace(saying.bundle.input, mpp=None, fit=(64, 64)),
    )
    trained = Trained(samples=samples, surveys=training_set(samples).surveys, held_out=judged)
    card = model_card(dataclasses.replace(saying, bundle=bundle), trained)
    # 2 · 20 / (30 + 30) and 2 · 10 / (10 + 20); B shows none, so every draw with A has the same
    # of A's images 30 of 100 and 20 of 100 px are tumour: 60 / 130, 40 / 120
    assert (
        "- Tumor: Dice 0.667 (0.667 to 0.667), IoU 0.500 (0.500 to 0.500); “everywhere”: Dice 0.397"
    ) in card
    assert "- 2 images show no Tumor; in a share of 0.500 (0.000 to 1.000) some is found" in card
    # 0.7 is above 0.4, not above 0.8
    assert "Area under the curve of Malignant: 0.500 (" in card
    assert "| B | Tumor | | | 0 | 0.100 | |" in card


def test_a_card_gives_no_figure_for_a_class_that_is_not_there(
    recipe: Recipe, samples: list[Sample]
) -> None:
    classes = (*recipe.bundle.classes, structs.replace(recipe.bundle.classes[1], name="Cyst"))
    bundle = dataclasses.replace(recipe.bundle, classes=classes, activation="softmax")
    recipe = dataclasses.replace(recipe, bundle=bundle)
    counts = {  # rows the truth; of A and B only the tumour is there, of C nothing
        "A": [[80, 5, 3], [4, 8, 0], [0, 0, 0]],
        "B": [[70, 0, 10], [10, 10, 0], [0, 0, 0]],
        "C": [[95, 3, 2], [0, 0, 0], [0, 0, 0]],
    }
    judged = {
        patient: dataclasses.replace(
            PatientScore.empty(bundle),
            pixels=Confusion(matrix=np.array(found), borders=np.zeros((3, 4), np.int64)),
            images=(("one.png", np.array(found)),),
        )
        for patient, found in counts.items()
    }
    trained = Trained(
        samples=samples, surveys=training_set(samples, classes=3).surveys, held_out=judged
    )
    input_spec = structs.replace(bundle.input, mpp=None, fit=(64, 64))
    of_images = dataclasses.replace(bundle, modality="image", input=input_spec)
    for card in (
        model_card(recipe, trained),
        model_card(dataclasses.replace(recipe, bundle=of_images), trained),
    ):
        assert "nan" not in card
        assert "0.000 |" not in card.partition("## How well")[2].partition("Pixels of")[0]
        assert "| C | Tumor | | | 0 | 0.030 | |" in card
        assert "| A | Cyst | | | 0 | 0.030 | |" in card
        assert "**mean of 2** | Tumor | **0.653** |" in card  # of 16 / 25 and 20 / 30
        assert "| Cyst | **" not in card
        assert "- 1 of 3 show no Tumor, and have no Dice: 3 of their 100 px are called so" in card
        assert "- 3 of 3 show no Cyst, and have no Dice: 15 of their 300 px are called so" in card
        assert "Cyst: Dice" not in card
    scores = scores_of(judged["C"].pixels, bundle)["Tumor"]
    assert [math.isnan(v) for v in (scores.dice, scores.iou, scores.everywhere_dice)] == [True] * 3
    assert scores.called == pytest.approx(0.03)
    assert mean_dice(judged, bundle) == pytest.approx(2 * 18 / (32 + 26))
    assert math.isnan(mean_dice({"C": judged["C"]}, bundle))


def test_patients_who_show_no_class_choose_no_weights(
    recipe: Recipe, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = changed(recipe, steps=4, validate_every=1, patience=1)
    image, truth = samples[0].read_all()
    clean = make_sample("C", image, torch.zeros_like(truth))
    keys = {"fabric": open_fabric(recipe, device="cpu", devices=1), "data_dir": tmp_path}
    found = fit(recipe, training_set(samples), validation=[clean], watched=[clean], **keys)
    plain = fit(recipe, training_set(samples), **keys)
    assert_same_weights(found.network, plain.network)
    assert not any("validation_dice" in row or "held_out_dice" in row for row in found.history)
    assert "show no class: no weights are chosen by them" in caplog.text


def test_held_out_pixels_give_a_temperature_at_which_certainty_holds(recipe: Recipe) -> None:
    rng = np.random.default_rng(0)
    true_logits = rng.normal(0, 1.5, (2, 20_000))
    nothing = PatientScore.empty(recipe.bundle)
    patients = []
    for logits in true_logits:
        truth = rng.random(len(logits)) < 1 / (1 + np.exp(-logits))
        said = 2.5 * logits  # two and a half times too sure
        logs = [-np.logaddexp(0, said), -np.logaddexp(0, -said)]
        patients.append(
            dataclasses.replace(nothing, pixel_chances=np.stack([truth, *logs], axis=1))
        )
    assert fit_temperature(patients) == pytest.approx(2.5, rel=0.05)
    assert calibration_error(patients, [1.0, 1.0]) > 0.08
    assert calibration_error(patients, left_out_temperatures(patients)) < 0.01
    assert fit_temperature([nothing]) == 1
    # of background alone one is the likelier the surer one is: nothing is learnt from that
    shown = np.array([[0, math.log(0.7), math.log(0.3)]])
    assert fit_temperature([dataclasses.replace(nothing, pixel_chances=shown)]) == 1


def test_what_is_familiar_is_what_patients_who_show_a_class_look_like(
    recipe: Recipe, samples: list[Sample]
) -> None:
    network = fit(recipe, training_set(samples)).network
    plain = familiar_of(network, recipe.bundle, samples)
    assert plain is not None
    # dark throughout, and nothing in it: learnt from, and not what the network is for
    dark = torch.zeros(3, 64, 64, dtype=torch.uint8)
    empty = make_sample("C", dark, torch.zeros(64, 64, dtype=torch.uint8))
    found = familiar_of(network, recipe.bundle, [*samples, empty])
    assert found is not None
    np.testing.assert_array_equal(found.mean, plain.mean)
    (judged,) = measure(network, recipe.bundle, [empty]).values()
    assert found.distances(np.concatenate(judged.features)) > 1
    assert familiar_of(network, recipe.bundle, [samples[-1], empty]) is None


def test_a_card_tells_false_alarms_and_what_is_unlike(
    recipe: Recipe, samples: list[Sample]
) -> None:
    nothing = PatientScore.empty(recipe.bundle)
    told = {
        "A": ([[50, 0], [5, 45]], [0.5, 0.8, 1.2, 0.4]),
        "B": ([[50, 0], [5, 45]], [0.3, 0.6]),
        "C": ([[90, 10], [0, 0]], [0.7, 1.5, 2.0, 3.0, 1.1]),
        "D": ([[50, 0], [5, 45]], []),
    }
    judged = {
        patient: dataclasses.replace(
            nothing,
            pixels=Confusion(matrix=np.array(counts), borders=np.zeros((2, 4), np.int64)),
            distances=np.array(distances, float),
        )
        for patient, (counts, distances) in told.items()
    }
    known = training_set(samples)
    trained = Trained(samples=samples, surveys=known.surveys, held_out=judged)
    card = model_card(recipe, trained)
    # of A a quarter, of B none; drawn anew both, or either
    assert "a share of 0.125 (0.000 to 0.250) of the patches of held-out patients who" in card
    assert "of those who show none it is 0.800; area under the curve 0.900." in card  # 27 of 30
    for left in ("A", "B"):
        del judged[left]
    assert "unlike_percent" not in model_card(recipe, trained)


def test_a_temperature_softens_probabilities_and_no_mask(recipe: Recipe) -> None:
    image = torch.randint(0, 256, (3, 64, 64), generator=seeded()).to(torch.uint8)
    soft = dataclasses.replace(recipe.bundle, temperature=20.0)
    predictors = [open_predictor(Darkness(), b) for b in (recipe.bundle, soft)]
    plain, softened = (chances(predictor, image) for predictor in predictors)
    logits = -50 * ((image.float() / 255).mean(0, keepdim=True) - 0.5) / 0.25
    torch.testing.assert_close(plain, logits.sigmoid())
    torch.testing.assert_close(softened, (logits / 20).sigmoid())
    assert torch.equal(decided(plain), decided(softened))


def test_a_card_says_how_often_labels_are_right(saying: Recipe, samples: list[Sample]) -> None:
    nothing = PatientScore.empty(saying.bundle)
    judged = {
        patient: dataclasses.replace(nothing, labels=np.array(counts))
        for patient, counts in {"A": [[6, 0], [0, 0]], "B": [[0, 1], [1, 0]]}.items()
    }
    trained = Trained(samples=samples, surveys=training_set(samples).surveys, held_out=judged)
    card = model_card(saying, trained)
    # both patients, A alone, or B alone: 6 of 8, all, or none
    assert "0.750 (0.000 to 1.000) are right" in card
    assert "the commonest label, 0.875 would be" in card
    assert "| Benign | 6 | 1 |\n| Malignant | 1 | 0 |" in card


def test_a_card_has_no_area_under_the_curve_of_one_label(
    saying: Recipe, samples: list[Sample]
) -> None:
    nothing = PatientScore.empty(saying.bundle)
    said = {
        "A": ([[0, 0.9, 0.1], [0, 0.8, 0.2]], [[2, 0], [0, 0]]),
        "B": ([[0, 0.7, 0.3], [1, 0.2, 0.8]], [[1, 0], [0, 1]]),
    }
    judged = {
        patient: dataclasses.replace(
            nothing, labels=np.array(counts), label_chances=np.array(rows, float)
        )
        for patient, (rows, counts) in said.items()
    }
    surveys = training_set(samples).surveys
    card = model_card(saying, Trained(samples=samples, surveys=surveys, held_out=judged))
    # A drawn twice has no such area
    assert "Area under the curve of Malignant: 1.000 (1.000 to 1.000)." in card
    del judged["B"]
    card = model_card(saying, Trained(samples=samples, surveys=surveys, held_out=judged))
    assert "1.000 are right" in card
    assert "Area under the curve" not in card


# -- fitting and writing ----------------------------------------------------------------------


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    others = second.state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, others[name]), name


def test_a_training_can_be_repeated(recipe: Recipe, samples: list[Sample]) -> None:
    told: list[Any] = []
    first = fit(recipe, training_set(samples), progress=lambda *news: told.append(news[:2])).network
    second = fit(recipe, training_set(samples)).network
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert not first.training
    assert_same_weights(first, second)
    other = fit(changed(recipe, seed=1), training_set(samples)).network
    weight = "outc.weight"
    assert not torch.equal(other.state_dict()[weight], first.state_dict()[weight])


class Stopped(Exception):
    pass


def stopped_after(recipe: Recipe, steps: int, folder: Path, **arguments: Any) -> None:
    def stop(done: int, *_: Any) -> None:
        if done == steps:
            raise Stopped

    with pytest.raises(Stopped):
        fit(recipe, folder=folder, progress=stop, **arguments)


def test_an_interrupted_training_goes_on_to_the_same_weights(
    recipe: Recipe, samples: list[Sample], tmp_path: Path
) -> None:
    recipe = changed(
        recipe, steps=8, checkpoint_every=3, validate_every=2, accumulate=2, schedule="cosine"
    )
    arguments = {"training_set": training_set(samples[:2]), "validation": samples[2:]}
    state = tmp_path / "state"
    state.mkdir()
    whole = fit(recipe, **arguments)
    for steps in (2, 4, 7):  # before the first checkpoint, and after each
        stopped_after(recipe, steps, state, **arguments)
    resumed = fit(recipe, folder=state, **arguments)
    assert_same_weights(whole.network, resumed.network)
    assert resumed.history == whole.history
    assert sorted(p.name for p in state.iterdir()) == ["best.pt", "last.pt"]
    (state / "last.pt").write_bytes(b"PK")
    with pytest.raises(RecipeError, match="is damaged; train with --overwrite"):
        fit(recipe, folder=state, **arguments)


def test_the_best_weights_are_kept_and_a_training_without_progress_ends(
    recipe: Recipe, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, steps=40, validate_every=2, patience=3)
    dices = iter([0.2, 0.5, 0.4, 0.5, 0.3, 0.9])
    kept: list[dict[str, Tensor]] = []

    def judged(network: torch.nn.Module, *_: Any) -> dict[str, Confusion]:
        kept.append({k: v.clone() for k, v in network.state_dict().items()})
        return {}

    monkeypatch.setattr("wsi_pipeline.training.fit.measure", judged)
    monkeypatch.setattr("wsi_pipeline.training.fit.mean_dice", lambda *_: next(dices))
    fitted = fit(recipe, training_set(samples[:2]), validation=samples[2:])
    looks = [row["validation_dice"] for row in fitted.history if "validation_dice" in row]
    assert looks == [0.2, 0.5, 0.4, 0.5, 0.3]
    for name, tensor in fitted.network.state_dict().items():
        assert torch.equal(tensor, kept[1][name]), name


def test_crops_made_by_several_threads_are_the_same(recipe: Recipe, samples: list[Sample]) -> None:
    recipe = changed(recipe, steps=6)
    plain = fit(recipe, training_set(samples))
    threaded = fit(recipe, training_set(samples), crop_threads=4)
    assert_same_weights(plain.network, threaded.network)
    assert threaded.history == plain.history


def test_held_out_patients_are_watched_and_nothing_follows_from_it(
    recipe: Recipe, samples: list[Sample], folder: Path
) -> None:
    recipe = changed(recipe, steps=6, validate_every=2)
    plain = fit(recipe, training_set(samples[:2]))
    watched = fit(recipe, training_set(samples[:2]), watched=samples[2:])
    assert_same_weights(plain.network, watched.network)
    looks = {r["step"]: r["held_out_dice"] for r in watched.history if "held_out_dice" in r}
    assert list(looks) == [2, 4, 6]
    assert looks[6] == mean_dice(measure(plain.network, recipe.bundle, samples[2:]), recipe.bundle)
    write_history(folder, watched.history)
    with (folder / "history.csv").open(newline="") as file:
        told = [row["held_out_dice"] for row in csv.DictReader(file)]
    assert told == [str(looks[step]) for step in (2, 4, 6)]


def test_history_tells_how_often_labels_are_right(
    folder: Path, saying: Recipe, samples: list[Sample]
) -> None:
    bundle = dataclasses.replace(
        saying.bundle, network="nmtnet", network_options={"classes": 1, "labels": 2}
    )
    recipe = changed(dataclasses.replace(saying, bundle=bundle), steps=1)
    train, held_out = samples[:2], samples[2:]
    fitted = fit(recipe, training_set(train), validation=held_out)
    judged = measure(fitted.network, bundle, held_out)
    assert fitted.history[-1]["validation_accuracy"] == accuracy(judged)
    write_history(folder, fitted.history)
    with (folder / "history.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["validation_accuracy"]) == accuracy(judged)


def test_the_encoder_has_a_learning_rate_of_its_own(recipe: Recipe, samples: list[Sample]) -> None:
    bundle = dataclasses.replace(
        recipe.bundle, network="lightmuseg", network_options={"classes": 1}
    )
    slow = changed(
        dataclasses.replace(recipe, bundle=bundle), steps=2, encoder_rate=0.0, average=0.0
    )
    for schedule in ("one-cycle", "cosine", "constant"):
        fitted = fit(changed(slow, schedule=schedule), training_set(samples[:1])).network
        torch.manual_seed(slow.train.seed)
        start = dict(create(bundle).named_parameters())
        moved = {
            name.startswith("encoder.")
            for name, tensor in fitted.named_parameters()
            if not torch.equal(tensor, start[name])
        }
        assert moved == {False}, schedule


def test_parts_of_a_batch_make_one_step_like_the_whole(recipe: Recipe) -> None:
    images = torch.rand(6, 3, 8, 8, generator=seeded())
    truths = torch.randint(0, 2, (6, 8, 8), generator=seeded(1)).to(torch.uint8)
    calm = changed(recipe, loss="ce")
    fabric = open_fabric(calm, device="cpu")
    weights = []
    for count in (1, 3):
        torch.manual_seed(0)
        model, optimizer = torch.nn.Conv2d(3, 1, 3, padding=1), None
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        sides = zip(images.chunk(count), truths.chunk(count), strict=True)
        learn(calm, model, optimizer, [(x, y, None) for x, y in sides], 0, fabric)
        weights.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "bf16"},
        {"schedule": "polynomial", "optimizer": "adam"},
        {"schedule": "constant", "loss": "dice"},
    ],
    ids=str,
)
def test_other_settings_train_as_well(
    recipe: Recipe, samples: list[Sample], values: dict[str, Any]
) -> None:
    network = fit(changed(recipe, **values), training_set(samples)).network
    assert all(t.dtype == torch.float32 for t in network.parameters())
    assert all(bool(t.isfinite().all()) for t in network.parameters())


def test_a_step_whose_scaled_gradients_overflow_is_left_out(
    recipe: Recipe, samples: list[Sample]
) -> None:
    fabric_of = pytest.importorskip("lightning_fabric").Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.precision.amp import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    # Where `srun` is installed, Fabric warns of a command that does not run under it.
    plugins = [LightningEnvironment(), precision]
    fabric = fabric_of(accelerator="cpu", devices=1, plugins=plugins)
    few = changed(recipe, steps=4, average=0.0)
    network = fit(few, training_set(samples), fabric=fabric).network
    assert scaler.get_scale() < 2.0**120
    assert all(bool(tensor.isfinite().all()) for tensor in network.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_no_number_ends_in_a_sentence(
    recipe: Recipe, samples: list[Sample], precision: str
) -> None:
    wild = changed(recipe, learning_rate=1e30, schedule="constant", precision=precision)
    with pytest.raises(RecipeError, match=r"step \d+: .* lower train\.learning_rate \(1e\+30\)"):
        fit(wild, training_set(samples))


def test_crops_that_the_network_does_not_take_are_refused(
    recipe: Recipe, samples: list[Sample]
) -> None:
    with pytest.raises(RecipeError, match=r"crop \[63, 64\]: swish_unet takes multiples of 2"):
        fit(changed(recipe, crop=(63, 64)), training_set(samples))


def test_a_step_that_fails_ends_in_a_sentence(recipe: Recipe, samples: list[Sample]) -> None:
    # norms over the one place that is left of one crop
    bundle = dataclasses.replace(
        recipe.bundle, network="lightmuseg", network_options={"classes": 1}
    )
    one = dataclasses.replace(changed(recipe, crop=(32, 32), batch_size=1), bundle=bundle)
    with pytest.raises(RecipeError, match=r"change batch_size or crop: .* more than 1 value"):
        fit(one, training_set(samples))


def test_labels_of_a_network_that_does_not_classify_are_refused(
    saying: Recipe, samples: list[Sample]
) -> None:
    with pytest.raises(RecipeError, match=r"'Malignant'\]: swish_unet does not classify"):
        fit(saying, training_set(samples))


@pytest.mark.parametrize("path", sorted((ROOT / "workflows/train").glob("*.toml")), ids=str)
def test_every_recipe_trains_what_its_network_can_say(path: Path) -> None:
    bundle = load_recipe(path).bundle
    with torch.device("meta"):
        network = create(bundle)
    assert bool(bundle.labels) == (bundle.network in ("nmtnet", "mm3d_unet"))
    assert all(side % network.size_multiple == 0 for side in load_recipe(path).train.crop)


def test_a_precision_that_the_device_lacks_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="which CPUs do not have"):
        open_fabric(changed(recipe, precision="fp16"), device="cpu")


def test_a_few_pictures_are_learnt_by_heart(recipe: Recipe, samples: list[Sample]) -> None:
    quick = changed(recipe, steps=60, average=0.5, learning_rate=0.01)
    network = fit(dataclasses.replace(quick, augment=QUIET), training_set(samples)).network
    judged = measure(network, recipe.bundle, samples).values()
    score = scores_of(sum(judged, start=PatientScore.empty(recipe.bundle)).pixels, recipe.bundle)[
        "Tumor"
    ]
    assert score.dice > 0.9
    assert score.everywhere_dice < 0.5


@pytest.mark.parametrize("as_url", [False, True])
def test_training_may_start_from_imagenet(
    folder: Path,
    recipe: Recipe,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    *,
    as_url: bool,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    encoder = mobilenet_v2_features()
    torch.save({f"features.{n}": t for n, t in encoder.state_dict().items()}, folder / "a.pth")
    digest = sha256_of(folder / "a.pth")[:8]
    path = (folder / "a.pth").rename(folder / f"a-{digest}.pth")
    location = path.as_uri() if as_url else path.name
    # at a rate of nothing the weights stay where they started
    still = changed(recipe, steps=1, encoder=location, learning_rate=1e-12)
    bundle = dataclasses.replace(
        recipe.bundle, network="lightmuseg", network_options={"classes": 1}
    )
    still = dataclasses.replace(still, bundle=bundle)
    network = fit(still, training_set(samples), data_dir=folder).network
    for (name, ours), start in zip(
        network.encoder.named_parameters(), encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, start, rtol=0, atol=1e-6, msg=name)


def test_a_training_goes_on_from_its_own_encoder_alone(folder: Path, recipe: Recipe) -> None:
    bundle = dataclasses.replace(
        recipe.bundle, network="lightmuseg", network_options={"classes": 1}
    )
    short = dataclasses.replace(changed(recipe, steps=1, encoder="a.pth"), bundle=bundle)
    state = {f"features.{n}": t for n, t in mobilenet_v2_features().state_dict().items()}
    torch.save(state, folder / "a.pth")
    out = folder / "out"
    train(short, folder, out, folds=(), device="cpu")
    # begun by a version that did not know of encoders, or the encoder is not there any more
    key = json.loads((out / ".training/key.json").read_text("utf-8"))
    (out / ".training/key.json").write_text(json.dumps({"key": key["key"]}), "utf-8")
    train(short, folder, out, folds=(), device="cpu")
    assert json.loads((out / ".training/key.json").read_text("utf-8")) == key
    torch.save({n: 2 * t for n, t in state.items()}, folder / "a.pth")
    with pytest.raises(RecipeError, match="by another recipe, or on other data"):
        train(short, folder, out, folds=(), device="cpu")


def test_a_network_without_encoder_cannot_start_from_imagenet(
    recipe: Recipe, samples: list[Sample]
) -> None:
    with pytest.raises(RecipeError, match="SwishUNet has no encoder"):
        fit(changed(recipe, encoder="a.pth"), training_set(samples))


def test_a_written_bundle_loads_and_predicts_the_same(
    folder: Path, recipe: Recipe, samples: list[Sample]
) -> None:
    known = training_set(samples)
    network = fit(recipe, known).network
    judged = measure(network, recipe.bundle, samples)
    trained = Trained(
        samples=samples,
        surveys=known.surveys,
        held_out=judged,
        familiar=familiar_of(network, recipe.bundle, samples),
        fingerprint="0123456789abcdef01",
    )
    write_bundle(network, recipe, trained, folder / "bundle")
    assert sorted(p.name for p in (folder / "bundle").iterdir()) == [
        "README.md",
        "features.safetensors",
        "model.safetensors",
        "model.toml",
    ]
    bundle = load_bundle(folder / "bundle")
    assert bundle.limits == "Discs only."
    assert bundle.temperature == pytest.approx(fit_temperature([*judged.values()]), abs=1e-3)
    told = {"path": recipe.bundle.path, "weights_path": None, "temperature": 1.0}
    told |= {"features_path": None}
    familiar = load_familiar(bundle)
    assert familiar is not None
    # the patches of each patient as `segment` sees them, by the stored weights
    own = {"A": judged["A"].features, "B": judged["B"].features}
    assert [len(np.concatenate(features)) for features in own.values()] == [8, 4]
    mean = np.mean([np.concatenate(features).mean(0) for features in own.values()], axis=0)
    np.testing.assert_allclose(familiar.mean, mean, rtol=1e-5)
    assert dataclasses.replace(bundle, **told) == recipe.bundle
    stored = load_file(bundle.weights_path)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    image = torch.rand(1, 3, 64, 64, generator=seeded())
    with torch.inference_mode():
        ours, theirs = network(image), build(bundle).module(image)
    torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.02)
    card = (folder / "bundle" / "README.md").read_text("utf-8")
    for words in (
        "Two made-up patients.",
        "Discs only.",
        "Not a medical device",
        "`0123456789abcdef`",
        f"{scores_of(judged['A'].pixels, recipe.bundle)['Tumor'].dice:.3f}",
        "| A | 2 |",
        "| Tumor | 2 |",
        "95 % intervals",
        "“everywhere”: Dice 0.",
        "GMAC a patch of 3 × 64 × 64",
        "## Licences and notices\n\nCC0 1.0, drawn here.",
    ):
        assert words in card


def test_what_half_precision_cannot_hold_is_kept_as_it_is(
    folder: Path, recipe: Recipe, samples: list[Sample]
) -> None:
    network = create(recipe.bundle)
    with torch.no_grad():
        name, values = next((n, p) for n, p in network.named_parameters() if p.ndim > 1)
        values[0] = 1e5
    trained = Trained(samples=samples, surveys=training_set(samples).surveys)
    write_bundle(network, recipe, trained, folder / "bundle")
    kept = build(load_bundle(folder / "bundle")).module.state_dict()[name]
    torch.testing.assert_close(kept, values.detach(), rtol=0, atol=0)


def test_a_card_names_an_encoder_without_secrets(recipe: Recipe, samples: list[Sample]) -> None:
    url = "https://me:key@host.org/mobilenet_v2-b0353104.pth?sig=secret"
    trained = Trained(samples=samples, surveys=training_set(samples).surveys)
    card = model_card(changed(recipe, encoder=url), trained)
    assert "from the encoder weights `https://host.org/mobilenet_v2-b0353104.pth`;" in card


def test_a_bundles_toml_keeps_odd_names(folder: Path, recipe: Recipe) -> None:
    bundle = dataclasses.replace(recipe.bundle, name='a "quoted" \\ näme')
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "model.toml").write_text(bundle_toml(bundle, weights="model.safetensors"), "utf-8")
    assert load_bundle(folder).name == bundle.name


def test_the_legend_of_the_curves_names_every_line(tmp_path: Path) -> None:
    looks = {"validation_dice": 0.5, "held_out_dice": 0.4}
    history = [{"step": i, "loss": 2 / i, "learning_rate": 0.1, **looks} for i in (1, 2, 3)]
    write_history(tmp_path, history)
    with Image.open(tmp_path / "curves.png") as file:
        picture = np.asarray(file.convert("RGB"))
    inside = int(np.argmax((picture == 0).all(-1).sum(1) > 600))  # the upper edge of the axes
    for color in ((69, 117, 180), (215, 48, 39), (26, 152, 80)):
        assert (picture[:inside] == color).all(-1).any()


# -- command line -----------------------------------------------------------------------------


def run_command(*arguments: object, code: int = 0) -> str:
    command = ["-q", *map(str, arguments)]
    result = CliRunner().invoke(group, command, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def run_train(folder: Path, *arguments: object, code: int = 0) -> str:
    recipe, bundle = folder / "recipe.toml", folder / "bundle"
    return run_command("train", recipe, "--output", bundle, *arguments, code=code)


def test_the_command_measures_by_patient_and_writes_a_bundle(folder: Path) -> None:
    lines = run_train(folder, "--folds", "B").splitlines()
    assert len(lines) == 1
    patient, name, dice, iou = lines[0].split("\t")
    assert (patient, name) == ("B", "Tumor")
    assert 0 <= float(dice.removeprefix("Dice ")) <= 1
    assert 0 <= float(iou.removeprefix("IoU ")) <= 1
    build(load_bundle(folder / "bundle"))
    with (folder / "bundle/history.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3"]
    assert float(rows[0]["loss"]) > 0
    with Image.open(folder / "bundle/curves.png") as curves:
        assert curves.format == "PNG"
    # nothing is done again, unless other data or settings ask for it
    before = (folder / "bundle/model.safetensors").read_bytes()
    assert run_train(folder, "--folds", "B").splitlines() == lines
    assert (folder / "bundle/model.safetensors").read_bytes() == before
    text = (folder / "recipe.toml").read_text("utf-8")
    (folder / "recipe.toml").write_text(text.replace("steps = 3", "steps = 2"), "utf-8")
    said = run_train(folder, "--folds", "none", code=1)
    assert "holds a training by another recipe, or on other data" in said
    run_train(folder, "--folds", "none", "--overwrite")
    assert (folder / "bundle/model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    "name",
    ["model.toml", "README.md", "model.safetensors", "history.csv", "curves.png", "cases/mine.png"],
)
def test_what_a_person_made_is_not_trained_over(folder: Path, name: str) -> None:
    path = folder / "bundle" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine", "utf-8")
    said = run_train(folder, "--folds", "none", code=1)
    assert f"holds {name.split('/')[0]}, which was not trained there" in said
    assert path.read_text("utf-8") == "mine"


def test_what_a_person_adds_to_a_bundle_stays_when_it_is_trained_again(folder: Path) -> None:
    run_train(folder, "--folds", "B")
    names = {p.relative_to(folder) for p in (folder / "bundle").rglob("*")}
    run_train(folder, "--folds", "B")
    # of the same card there is one
    assert {p.relative_to(folder) for p in (folder / "bundle").rglob("*")} == names
    (folder / "bundle/README.md").write_text("Mine.", "utf-8")
    (folder / "bundle/cases/mine.png").write_text("mine", "utf-8")
    run_train(folder, "--folds", "A,B")
    written = [(folder / "bundle" / name).read_bytes() for name in ("README.md", "model.toml")]
    run_train(folder, "--folds", "A,B")
    # the same command again, after a kill or not, comes to the same bundle
    for name, data in zip(("README.md", "model.toml"), written, strict=True):
        assert (folder / "bundle" / name).read_bytes() == data, name
    assert written[0].startswith(b"# made-up\n")
    assert [p.read_text("utf-8") for p in folder.glob("bundle/README.old*")] == ["Mine."]
    assert (folder / "bundle/cases/mine.png").read_text("utf-8") == "mine"
    found = [p.name.split()[0] for p in sorted(folder.glob("bundle/cases/* *.png"))]
    assert found == ["best", "median", "worst"]


def test_a_full_disk_ends_in_a_sentence(folder: Path, recipe: Recipe, least_room: Room) -> None:
    with least_room(10_000), pytest.raises(StoreError, match=r"cannot write to .*last\.pt"):
        train(recipe, folder, folder / "bundle", folds=(), device="cpu")
    samples = load(recipe, folder)
    network = fit(recipe, training_set(samples)).network
    trained = Trained(samples=samples, surveys=training_set(samples).surveys)
    with least_room(10_000), pytest.raises(StoreError, match=r"cannot write to .*other"):
        write_bundle(network, recipe, trained, folder / "other")
    judged = measure(network, recipe.bundle, samples)
    with least_room(1000), pytest.raises(StoreError, match=r"cannot write to .*cases"):
        draw_cases(network, recipe.bundle, samples, judged, folder / "cases")
    draw_cases(network, recipe.bundle, samples, judged, folder / "cases")
    with least_room(1000), pytest.raises(StoreError, match=r"cannot write to .*gathered"):
        gather_cases([folder / "cases"], folder / "gathered")
    # with room again it goes on
    train(recipe, folder, folder / "bundle", folds=(), device="cpu")
    build(load_bundle(folder / "bundle"))


def test_who_is_kept_apart_is_in_no_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_train(folder, "--folds", "B")
    state = folder / "bundle/.training"
    (fold,) = state.glob("without_B-*/last.pt")
    learnt = torch.load(fold, weights_only=True)
    everybody = load_file(folder / "bundle/model.safetensors")
    with (folder / "recipe.toml").open("a", encoding="utf-8") as file:
        file.write('\n[split]\ntest = ["B"]\n')
    said = run_train(folder, "--folds", "A", code=1)
    assert "split.test names who is held out; leave --folds away, or split.test" in said
    # what the fold had learnt is the bundle now, and is not learnt again
    fits, module = list[object](), importlib.import_module("wsi_pipeline.training.train")
    fit = module.fit
    monkeypatch.setattr(module, "fit", lambda *a, **k: fits.append(a) or fit(*a, **k))
    (fold.parent / "held_out.json").unlink()
    line = run_train(folder)
    assert line.startswith("B\tTumor\tDice ")
    # read once, to be measured and to be the bundle
    assert len(fits) == 1
    assert torch.load(fold, weights_only=True).keys() == learnt.keys()
    assert fold.stat().st_mtime_ns < (folder / "bundle/model.toml").stat().st_mtime_ns
    weights = load_file(folder / "bundle/model.safetensors")
    assert any(not torch.equal(weights[name], everybody[name]) for name in weights)
    card = (folder / "bundle/README.md").read_text("utf-8")
    assert "kept apart for good: the weights here have seen none of them" in card
    assert "| A | 2 |" in card
    assert "| B | 1 |" not in card
    # from nothing it comes to the same
    run_command("train", folder / "recipe.toml", "--output", folder / "again")
    assert not list((folder / "again/.training").glob("all*"))
    for name, tensor in load_file(folder / "again/model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_what_was_held_out_by_other_folds_is_not_taken_over(folder: Path) -> None:
    text = (folder / "recipe.toml").read_text("utf-8")
    marks = [text.replace('patient = "B"', f'patient = "B"\nfold = "{n}"') for n in (1, 2)]
    for mark, code in zip(marks, (0, 1), strict=True):
        (folder / "recipe.toml").write_text(mark, "utf-8")
        said = run_train(folder, "--folds", "none", code=code)
    assert "holds a training by another recipe, or on other data" in said


def test_held_out_images_are_drawn_beside_where_their_masks_disagree(folder: Path) -> None:
    run_train(folder, "--folds", "A")
    pictures = sorted((folder / "bundle/cases").iterdir())
    assert [p.name.split()[0] for p in pictures] == ["best", "median", "worst"]
    scores = {p.name.split()[0]: float(p.name.split()[1]) for p in pictures}
    assert scores["worst"] <= scores["median"] <= scores["best"]
    sides = {"x.png.png": 100, "y.png.png": 90}
    assert {p.name.split()[2] for p in pictures} == sides.keys()
    for path in pictures:
        with Image.open(path) as picture:
            side = sides[path.name.split()[2]]
            assert picture.size == (2 * side, side)
            # where the masks agree it is white or green, and elsewhere red or blue
            found = {c for _, c in picture.crop((side, 0, 2 * side, side)).getcolors()}
        assert found <= {(255, 255, 255), (150, 190, 150), (215, 48, 39), (69, 117, 180)}


def test_each_fold_has_the_curve_of_its_held_out_patient(folder: Path) -> None:
    text = (folder / "recipe.toml").read_text("utf-8")
    (folder / "recipe.toml").write_text(f"{text}\n[split]\nwatch = true\n", "utf-8")
    printed = run_train(folder, "--folds", "B")
    (path,) = (folder / "bundle/.training").glob("without_B-*/history.csv")
    with path.open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert f"Dice {float(last['held_out_dice']):.3f}" in printed
    with (folder / "bundle/history.csv").open(encoding="utf-8", newline="") as file:
        assert not any(row["held_out_dice"] for row in csv.DictReader(file))


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        (
            "[1, 7]",
            "[1, 7]",
            ["--folds", "B,Z"],
            "no patient ['Z'] to hold out; there are ['A', 'B'",
        ),
        ('patient = "B"', 'patient = "A"', [], "one side has no images; add patients"),
        ("Tumor = [1, 7]", "Tumor = [1, 2, 7]", ["--folds", "none"], ""),
        ('masks = "A/masks"', 'masks = "B/one_mask.png"', [], "one_mask.png is no folder"),
        ("[1, 7]", "[3]", [], ""),
    ],
)
def test_the_command_says_what_it_refuses(
    folder: Path, old: str, new: str, options: list[str], message: str
) -> None:
    text = RECIPE.replace(old, new).replace("background = [2]", 'background = "others"')
    if new == "[3]":  # no pixel of any patient is tumour
        text = text.replace("[255] }", '[254] }\nbackground = "others"')
        message = "no pixel of any image is Tumor"
    if "[1, 2, 7]" in new:  # nor background
        text = text.replace("[255]", "[0, 255]")
        message = "no pixel of any image is Background"
    (folder / "recipe.toml").write_text(text, "utf-8")
    said = run_train(folder, *options, code=1)
    assert message in said
    assert "Traceback" not in said
    assert not (folder / "bundle/model.toml").exists()


def train_process(folder: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "wsi_pipeline", "-q", "train", str(folder / "recipe.toml")]
    command += ["-o", str(output), "--folds", "none", "--threads", "1", "--device", "cpu"]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_killed_training_ends_with_the_same_weights(folder: Path) -> None:
    text = RECIPE.replace("steps = 3", "steps = 150\ncheckpoint_every = 5")
    text = text.replace("crop = [64, 64]", "crop = [32, 32]")
    (folder / "recipe.toml").write_text(text, "utf-8")
    undisturbed = train_process(folder, folder / "whole")
    killed = train_process(folder, folder / "killed")
    while not list((folder / "killed").glob(".training/*/last.pt")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (folder / "killed/model.toml").exists()
    assert train_process(folder, folder / "killed").wait() == 0
    assert undisturbed.wait() == 0
    for name in ("model.safetensors", "history.csv", "README.md"):
        same = [(folder / place / name).read_bytes() for place in ("whole", "killed")]
        assert same[0] == same[1], name


@pytest.mark.slow
def test_two_processes_learn_together(folder: Path) -> None:
    command = [sys.executable, "-m", "wsi_pipeline", "-q", "train", str(folder / "recipe.toml")]
    command += ["-o", str(folder / "b"), "--folds", "B", "--device", "cpu", "--devices", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    build(load_bundle(folder / "b"))


RECIPES = sorted((ROOT / "workflows" / "train").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_train_networks_that_there_are(path: Path) -> None:
    recipe = load_recipe(path)
    with torch.device("meta"):
        network = create(recipe.bundle)
    assert all(side % network.size_multiple == 0 for side in recipe.train.crop)
    assert f"`{path.name}`" in (path.parent / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "baseline"),
    [
        ("bcss-binary", "bcss-binary-unet"),
        ("bcss-wsss", "bcss-wsss-unet"),
        ("bcss-demo", "bcss-demo-unet"),
        ("bcss-compare", "bcss-compare-unet"),
        ("busi-swish-unet", "busi-unet"),
        ("cdd-cesm-sizes", "cdd-cesm-sizes-plain"),
        ("cdd-cesm-sizes", "cdd-cesm-sizes-dense"),
        ("inbreast", "inbreast-dense"),
        ("dce-mri", "dce-mri-unet3d"),
    ],
)
def test_baselines_are_trained_identically(name: str, baseline: str) -> None:
    ours, other = (load_recipe(ROOT / f"workflows/train/{n}.toml") for n in (name, baseline))
    assert ours.data == other.data
    assert ours.augment == other.augment
    assert ours.split == other.split
    assert ours.bundle.input == other.bundle.input
    assert structs.replace(ours.train, encoder=None) == structs.replace(other.train, encoder=None)


def test_the_recipe_with_normal_tissue_holds_it_out_with_patients(data_dir: Path) -> None:
    recipe = load_recipe(ROOT / "workflows" / "train" / "bcss-tumor.toml")
    if not (data_dir / "he_other/negatives_crc").is_dir():
        pytest.skip("no normal tissue in the real data")
    with ExitStack() as closing:
        samples = load_samples(recipe, data_dir, closing)
        surveys = {s: survey(s, 2) for s in samples}
        without = {s.patient for s in samples if surveys[s].totals[1]}
        assert {s.patient for s in samples} - without == NORMAL
        for split in plan_splits(samples, recipe.split, seed=0):
            held_out = {s.patient for s in split.test}
            assert len(held_out - NORMAL) == 1
            assert len(held_out & NORMAL) == (split.name != "5")


NORMAL = {"normal breast", "lymph node", "colon", "skin"}


@pytest.mark.parametrize("name", ["", ".", "/a/other.toml", "below/other.toml", ["other.toml"]])
def test_a_recipe_extends_one_of_its_own_folder_only(tmp_path: Path, name: object) -> None:
    (tmp_path / "a.toml").write_text(f"extends = {json.dumps(name)}", "utf-8")
    with pytest.raises(RecipeError, match=r"extends .* in the same folder|no recipe at"):
        load_recipe(tmp_path / "a.toml")


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{other}.toml"', "utf-8")
    with pytest.raises(RecipeError, match=r"extends a\.toml, which extends it"):
        load_recipe(tmp_path / "a.toml")


def test_the_shipped_recipe_finds_its_data(data_dir: Path) -> None:
    recipe = load_recipe(ROOT / "workflows" / "train" / "bcss-demo.toml")
    if not (data_dir / "bcss_a0sk").is_dir():
        pytest.skip("no BCSS regions in the real data")
    samples = load(recipe, data_dir)
    assert len(samples) == 23
    shares = {
        s.name: float((truth_of(s) == 1).float().mean())
        for s in samples
        if s.patient.startswith("10")
    }
    assert shares == pytest.approx({"1008.jpg": 0.500, "1019.jpg": 0.538}, abs=0.002)
