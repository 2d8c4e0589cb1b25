"""Every bundle that the repository ships."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.networks import build, create
from wsi_pipeline.networks.check import check_shapes, run, try_bundle
from wsi_pipeline.networks.cost import count_macs, count_parameters
from wsi_pipeline.training.recipe import load_recipe

MODELS = Path(__file__).parents[1] / "models"
BUNDLES = sorted(path.parent for path in MODELS.glob("*/model.toml"))


WITH_WEIGHTS = [path for path in BUNDLES if load_bundle(path).weights_path is not None]


def name_of(path: Path) -> str:
    return path.name


def test_each_network_of_the_project_has_bundles() -> None:
    networks = {load_bundle(path).network for path in BUNDLES}
    assert networks == {"lightmuseg", "nmtnet", "mm3d_unet", "highres_unet", "swish_unet"}
    assert [path.name for path in WITH_WEIGHTS] == ["lightmuseg-bcss-demo"]


def test_the_index_names_each_bundle() -> None:
    index = (MODELS / "README.md").read_text("utf-8")
    for path in BUNDLES:
        assert f"[`{path.name}`]({path.name}/README.md)" in index


@pytest.mark.parametrize("path", BUNDLES, ids=name_of)
def test_a_bundle_fits_its_network(path: Path) -> None:
    bundle = load_bundle(path)
    assert bundle.name == path.name
    with torch.device("meta"):
        network = create(bundle).eval()
        answer = run(network, torch.empty(2, bundle.input.channels, *bundle.input.patch_size))
    check_shapes(answer, bundle, 2)


@pytest.mark.parametrize("path", BUNDLES, ids=name_of)
def test_a_card_states_what_the_code_counts(path: Path) -> None:
    bundle = load_bundle(path)
    size = (bundle.input.channels, *bundle.input.patch_size)
    with torch.device("meta"):
        network = create(bundle)
    rows = dict(
        re.findall(r"^\| (.+?) \|.*\| (.+?) \|$", (path / "README.md").read_text("utf-8"), re.M)
    )
    assert rows["parameters"] == f"{count_parameters(network):,}"
    gmac = rows[f"GMAC a patch of {' × '.join(map(str, size))}"]
    assert gmac == f"{count_macs(network, size) / 1e9:.3f}"


@pytest.mark.parametrize("path", BUNDLES, ids=name_of)
def test_a_bundle_answers_small_patches_as_it_says(path: Path) -> None:
    bundle = load_bundle(path)
    with torch.device("meta"):
        side = 2 * create(bundle).size_multiple
    trial = try_bundle(bundle, patch_size=(side,))
    axes = len(bundle.input.patch_size)
    assert trial.shapes["input"] == (1, bundle.input.channels, *[side] * axes)
    assert trial.shapes["mask"] == (1, bundle.network_options["classes"], *[side] * axes)
    assert ("label" in trial.shapes) == bool(bundle.labels)
    assert trial.has_weights == (path in WITH_WEIGHTS)
    assert trial.difference is not None
    assert trial.difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in BUNDLES if load_bundle(path).modality != "volume"],  # minutes, 5 GB
    ids=name_of,
)
def test_a_bundle_answers_patches_of_its_own_size(path: Path) -> None:
    trial = try_bundle(load_bundle(path))
    assert trial.difference is not None
    assert trial.difference < 1e-5


@pytest.mark.parametrize("path", WITH_WEIGHTS, ids=name_of)
def test_weights_are_small_and_plain_without_dead_ones(path: Path) -> None:
    bundle = load_bundle(path)
    assert bundle.weights_path is not None
    assert bundle.weights_path.suffix == ".safetensors"
    assert bundle.weights_path.stat().st_size < 16e6
    with safe_open(bundle.weights_path, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith(("encoder.18.", "sideout"))]  # noqa: SIM118
    assert not build(bundle).module.training


@pytest.mark.parametrize("path", BUNDLES, ids=name_of)
def test_a_card_says_what_the_bundle_is_not_and_where_its_weights_are_from(path: Path) -> None:
    card = (path / "README.md").read_text("utf-8")
    weights = ("Training data", "Dice", "CC0")
    if path not in WITH_WEIGHTS:
        weights = ("No weights", "None exist", f"models import best.pth --like models/{path.name}")
    for words in (
        "Not a medical device",
        "not for diagnosis",
        "our reading",
        "published",
        *weights,
    ):
        assert words in card


@pytest.mark.parametrize("path", BUNDLES, ids=name_of)
def test_each_bundle_tells_its_limits(path: Path) -> None:
    limits = load_bundle(path).limits
    if path in WITH_WEIGHTS:
        recipe = load_recipe(MODELS.parent / "workflows" / "train" / "bcss-tumor.toml")
        assert limits == recipe.bundle.limits  # as `train` would write it
        card = " ".join((path / "README.md").read_text("utf-8").split()).replace("- ", "")
        assert limits in card
    else:
        assert limits.startswith("No weights come with it and nothing was measured here")


def test_the_demo_bundle_calls_glass_background() -> None:
    bundle = load_bundle(MODELS / "lightmuseg-bcss-demo")
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, *bundle.input.patch_size)
    glass = (0.94 + 0.01 * torch.randn(shape, generator=generator)).clamp(0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (bundle.input.mean, bundle.input.std))
    with torch.inference_mode():
        logits = build(bundle).module((glass - mean) / std)
    assert float((logits > 0).float().mean()) < 0.001


def test_the_demo_bundle_tells_tumour_from_necrosis_on_a_real_region(data_dir: Path) -> None:
    from wsi_pipeline.training.samples import load_samples
    from wsi_pipeline.training.validate import measure, scores_of

    recipe = load_recipe(MODELS.parent / "workflows" / "train" / "bcss-tumor.toml")
    if not (data_dir / "bcss_a0sk").is_dir():
        pytest.skip("no BCSS tiles in the real data")
    patient = "TCGA-A1-A0SK"
    bundle = load_bundle(MODELS / "lightmuseg-bcss-demo")
    with ExitStack() as closing:
        tiles = [s for s in load_samples(recipe, data_dir, closing) if s.patient == patient][:6]
        judged = measure(build(bundle).module, bundle, tiles)[patient]
    score = scores_of(judged.pixels, bundle)["Tumor"]
    assert score.dice > max(0.75, score.everywhere_dice)
