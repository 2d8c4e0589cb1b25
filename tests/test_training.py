from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor

from wsi_pipeline.bundle import bundle_toml, load_bundle, sha256_of
from wsi_pipeline.cli import group
from wsi_pipeline.errors import RecipeError
from wsi_pipeline.networks import build
from wsi_pipeline.networks.encoders import mobilenet_v2_features
from wsi_pipeline.training.augment import blur, empty_glass, vary_contrast, vary_stain
from wsi_pipeline.training.fit import fit
from wsi_pipeline.training.losses import segmentation_loss, soft_dice_loss
from wsi_pipeline.training.measure import measure, predict
from wsi_pipeline.training.recipe import AugmentSpec, Recipe, load_recipe
from wsi_pipeline.training.samples import IGNORE, Sample, draw, load_samples, random_crop
from wsi_pipeline.training.splits import Split, leave_one_patient_out
from wsi_pipeline.training.write import write_bundle

ROOT = Path(__file__).parents[1]
RECIPE = """
notes = "Two made-up patients."
limits = "Discs only."

[bundle]
name = "made-up"
modality = "slide"
network = "lightmuseg"
network_options = { classes = 1 }

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
    return load_samples(recipe, folder)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_sample(patient: str, image: Tensor, truth: Tensor) -> Sample:
    return Sample(patient=patient, name=f"{patient}.png", image=image, truth=truth)


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
        ('name = "made-up"', "", "lacks 'name'"),
        ("steps = 3", "stepz = 3", "stepz"),
        ("steps = 3", "steps = 0", "steps must be at least 1"),
        ("crop = [64, 64]", "crop = [50, 64]", "multiples of 32"),
        ("Tumor = [255]", "Necrosis = [255]", "Necrosis"),
        ("mpp = 0.25", "mpp = 0", "expected µm per pixel"),
        ("ignore = [0]", "ignored = [0]", "ignored"),
        ('activation = "sigmoid"', 'activation = "relu"', "relu"),
        ('notes = "Two', 'note = "Two', "unknown"),
        ("[train]", "[augment]\nscale = 0.5\n[train]", "scale must be at least 1"),
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


# -- samples ----------------------------------------------------------------------------------


def test_samples_come_at_the_networks_resolution_with_class_indices(samples: list[Sample]) -> None:
    assert [(s.patient, s.name, tuple(s.image.shape)) for s in samples] == [
        ("A", "x.png", (3, 100, 100)),
        ("A", "y.png", (3, 90, 90)),
        ("B", "one.png", (3, 96, 96)),
    ]
    for sample in samples:
        assert set(sample.truth.unique().tolist()) == {0, 1}
        side = sample.truth.shape[0]
        # the disc of write_pair: same place, same share, at any resolution
        assert float((sample.truth == 1).double().mean()) == pytest.approx(math.pi * 0.09, rel=0.03)
        centre = torch.nonzero(sample.truth == 1).double().mean(0) / side
        assert centre.tolist() == pytest.approx([0.45, 0.55], abs=0.01)


def test_ignored_mask_values_are_neither_class(folder: Path, recipe: Recipe) -> None:
    mask = folder / "A/masks/x.png"
    codes = np.array(Image.open(mask))
    codes[:20] = 0
    Image.fromarray(codes).save(mask)
    truth = load_samples(recipe, folder)[0].truth
    assert (truth[:10] == IGNORE).all()
    assert not (truth[10:] == IGNORE).any()


def test_a_mask_of_another_size_is_refused(folder: Path, recipe: Recipe) -> None:
    Image.new("L", (95, 96)).save(folder / "B/one_mask.png")
    with pytest.raises(RecipeError, match=r"one_mask\.png is \(95, 96\)"):
        load_samples(recipe, folder)


@pytest.mark.parametrize("missing", ["B/one.png", "B/one_mask.png", "A/masks/y.png"])
def test_a_missing_file_is_named(folder: Path, recipe: Recipe, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(RecipeError, match=missing.rsplit("/", 1)[-1]):
        load_samples(recipe, folder)


def test_patients_are_drawn_evenly_and_their_images_by_area() -> None:
    sizes = {"A": [10], "B": [10, 20]}
    samples = [
        Sample(
            patient=patient,
            name=f"{patient}{side}",
            image=torch.zeros(3, side, side, dtype=torch.uint8),
            truth=torch.zeros(side, side, dtype=torch.uint8),
        )
        for patient, sides in sizes.items()
        for side in sides
    ]
    generator = seeded()
    drawn = [draw(samples, generator).name for _ in range(2000)]
    shares = {name: drawn.count(name) / 2000 for name in ("A10", "B10", "B20")}
    assert shares == pytest.approx({"A10": 0.5, "B10": 0.1, "B20": 0.4}, abs=0.04)


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
    image, cut = random_crop(sample, size, seeded(seed), scale=scale, rotate=rotate)
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
        image, cut = random_crop(sample, 64, seeded(seed), scale=1, rotate=0)
        # a crop as large as the image lies exactly upon it
        np.testing.assert_allclose((image[0] * 255).numpy(), cut.numpy(), atol=0.01)
        found.add(next(i for i, pose in enumerate(poses) if np.array_equal(pose, cut.numpy())))
    assert found == set(range(8))


# -- augmentation -----------------------------------------------------------------------------


def test_without_strength_stains_and_contrast_stay() -> None:
    images = torch.rand(2, 3, 16, 16, generator=seeded()).clamp_min(1 / 255)
    torch.testing.assert_close(vary_stain(images, QUIET, seeded()), images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vary_contrast(images, 0, seeded()), images)
    assert blur(images, 0, seeded()) is images


def test_white_stays_white_whatever_the_stain_does() -> None:
    spec = dataclasses.replace(QUIET, stain=0.5, mixing=0.2, density=0.5)
    white = torch.ones(8, 3, 4, 4)
    torch.testing.assert_close(vary_stain(white, spec, seeded()), white)


def test_the_amount_of_stain_scales_the_optical_density() -> None:
    spec = dataclasses.replace(QUIET, density=0.4)
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


# -- splits -----------------------------------------------------------------------------------


def test_each_patient_is_held_out_once(samples: list[Sample]) -> None:
    splits = leave_one_patient_out(samples)
    assert [(s.name, len(s.train), len(s.test)) for s in splits] == [("A", 1, 2), ("B", 2, 1)]


def test_a_patient_on_both_sides_is_refused(samples: list[Sample]) -> None:
    with pytest.raises(RecipeError, match=r"patients on both sides: \['A'\]"):
        Split(name="leak", train=(samples[0],), test=(samples[1],))


def test_the_same_picture_under_two_names_is_refused(samples: list[Sample]) -> None:
    twin = dataclasses.replace(samples[0], patient="C", name="twin.png")
    with pytest.raises(RecipeError, match=r"same picture on both sides: \['x\.png'\]"):
        leave_one_patient_out([samples[0], twin])


def test_one_patient_cannot_be_left_out(samples: list[Sample]) -> None:
    with pytest.raises(RecipeError, match="add patients"):
        leave_one_patient_out(samples[:2])


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
    mask = predict(Darkness(), recipe.bundle, image)
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
    score = measure(Darkness(), recipe.bundle, [sample])["Tumor"]
    assert score.dice == pytest.approx(0.5)
    assert score.iou == pytest.approx(1 / 3)
    assert score.share == pytest.approx(0.5)
    assert score.everywhere_dice == pytest.approx(2 / 3)


# -- fitting and writing ----------------------------------------------------------------------


def test_a_training_can_be_repeated(recipe: Recipe, samples: list[Sample]) -> None:
    told = []
    first = fit(recipe, samples, progress=lambda *news: told.append(news))
    second = fit(recipe, samples)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert not first.training
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    other = fit(
        dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=1)), samples
    )
    assert not torch.equal(
        other.state_dict()["last_conv.weight"], first.state_dict()["last_conv.weight"]
    )


def test_a_few_pictures_are_learnt_by_heart(recipe: Recipe, samples: list[Sample]) -> None:
    train = dataclasses.replace(recipe.train, steps=40, batch_size=2, average=0.5)
    network = fit(dataclasses.replace(recipe, train=train, augment=QUIET), samples)
    score = measure(network, recipe.bundle, samples)["Tumor"]
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
    train = dataclasses.replace(recipe.train, encoder=location, learning_rate=1e-12)
    network = fit(dataclasses.replace(recipe, train=train), samples, data_dir=folder)
    for (name, ours), start in zip(
        network.encoder.named_parameters(), encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, start, rtol=0, atol=1e-6, msg=name)


def test_a_network_without_encoder_cannot_start_from_imagenet(
    recipe: Recipe, samples: list[Sample]
) -> None:
    bundle = dataclasses.replace(recipe.bundle, network="unet", network_options={"classes": 1})
    train = dataclasses.replace(recipe.train, encoder="a.pth")
    with pytest.raises(RecipeError, match="UNet has no encoder"):
        fit(dataclasses.replace(recipe, bundle=bundle, train=train), samples)


def test_a_written_bundle_loads_and_predicts_the_same(
    folder: Path, recipe: Recipe, samples: list[Sample]
) -> None:
    network = fit(recipe, samples)
    scores = {"A": measure(network, recipe.bundle, samples)}
    write_bundle(network, recipe, samples, scores, folder / "bundle")
    assert sorted(p.name for p in (folder / "bundle").iterdir()) == [
        "README.md",
        "model.safetensors",
        "model.toml",
    ]
    bundle = load_bundle(folder / "bundle")
    assert dataclasses.replace(bundle, path=recipe.bundle.path, weights_path=None) == recipe.bundle
    stored = load_file(bundle.weights_path)
    assert not any(n.startswith("encoder.18.") for n in stored)
    assert {t.dtype for t in stored.values()} == {torch.float16}
    image = torch.rand(1, 3, 64, 64, generator=seeded())
    with torch.inference_mode():
        ours, theirs = network(image), build(bundle).module(image)
    torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.02)
    card = (folder / "bundle" / "README.md").read_text("utf-8")
    for words in (
        "Two made-up patients.",
        "Discs only.",
        "Not a medical device",
        f"{scores['A']['Tumor'].dice:.3f}",
    ):
        assert words in card


def test_a_bundles_toml_keeps_odd_names(folder: Path, recipe: Recipe) -> None:
    bundle = dataclasses.replace(recipe.bundle, name='a "quoted" \\ näme')
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "model.toml").write_text(bundle_toml(bundle, weights="model.safetensors"), "utf-8")
    assert load_bundle(folder).name == bundle.name


# -- command line -----------------------------------------------------------------------------


def run_train(folder: Path, *args: str) -> str:
    command = [
        "-q",
        "train",
        str(folder / "recipe.toml"),
        "--output",
        str(folder / "bundle"),
        *args,
    ]
    result = CliRunner().invoke(group, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_measures_by_patient_and_writes_a_bundle(folder: Path) -> None:
    lines = run_train(folder, "--folds", "B").splitlines()
    assert len(lines) == 1
    patient, name, dice, iou = lines[0].split("\t")
    assert (patient, name) == ("B", "Tumor")
    assert 0 <= float(dice.removeprefix("Dice ")) <= 1
    assert 0 <= float(iou.removeprefix("IoU ")) <= 1
    build(load_bundle(folder / "bundle"))


def test_the_command_refuses_an_unknown_patient(folder: Path) -> None:
    command = ["train", str(folder / "recipe.toml"), "-o", str(folder / "b"), "--folds", "B,Z"]
    result = CliRunner().invoke(group, command)
    assert result.exit_code == 1
    assert "no patient ['Z'] to hold out; there are ['A', 'B']" in result.stderr
    assert not (folder / "b").exists()


def test_the_shipped_recipe_is_a_recipe() -> None:
    recipe = load_recipe(ROOT / "workflows" / "train" / "bcss-demo.toml")
    assert recipe.bundle.name == "lightmuseg-bcss-demo"
    assert len({d.patient for d in recipe.data}) == 3


def test_the_shipped_recipe_finds_its_data(data_dir: Path) -> None:
    recipe = load_recipe(ROOT / "workflows" / "train" / "bcss-demo.toml")
    if not (data_dir / "bcss_a0sk").is_dir():
        pytest.skip("no BCSS regions in the real data")
    samples = load_samples(recipe, data_dir)
    assert len(samples) == 20
    shares = {
        s.name: float((s.truth == 1).float().mean()) for s in samples if s.patient.startswith("10")
    }
    assert shares == pytest.approx({"1008.jpg": 0.500, "1019.jpg": 0.538}, abs=0.002)
