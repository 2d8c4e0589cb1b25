"""Every bundle that the repository ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from wsi_pipeline.bundle import FOREIGN, load_bundle
from wsi_pipeline.networks import build, create

MODELS = Path(__file__).parents[1] / "models"
BUNDLES = sorted(path.parent for path in MODELS.glob("*/model.toml"))


def test_there_are_bundles() -> None:
    assert "lightmuseg-bcss-demo" in [path.name for path in BUNDLES]


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_a_bundle_fits_its_network(path: Path) -> None:
    bundle = load_bundle(path)
    assert bundle.name == path.name
    assert bundle.network not in FOREIGN
    with torch.device("meta"):
        network = create(bundle).eval()
        logits = network(torch.empty(2, bundle.input.channels, *bundle.input.patch_size))
    expected = 1 if bundle.activation == "sigmoid" else len(bundle.classes)
    assert logits.shape == (2, expected, *bundle.input.patch_size)


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_a_bundle_holds_small_plain_weights_without_dead_ones(path: Path) -> None:
    bundle = load_bundle(path)
    assert bundle.weights_path is not None
    assert bundle.weights_path.suffix == ".safetensors"
    assert bundle.weights_path.stat().st_size < 16e6
    with safe_open(bundle.weights_path, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith(("encoder.18.", "sideout"))]  # noqa: SIM118
    assert not build(bundle).module.training


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_a_bundle_has_a_card_that_says_what_it_is_not(path: Path) -> None:
    card = (path / "README.md").read_text("utf-8")
    for words in ("Not a medical device", "Training data", "Dice", "CC0"):
        assert words in card


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
    from wsi_pipeline.training.measure import measure
    from wsi_pipeline.training.recipe import load_recipe
    from wsi_pipeline.training.samples import load_samples

    recipe = load_recipe(MODELS.parent / "workflows" / "train" / "bcss-demo.toml")
    if not (data_dir / "bcss_a0sk").is_dir():
        pytest.skip("no BCSS tiles in the real data")
    tiles = [s for s in load_samples(recipe, data_dir) if s.patient == "TCGA-A1-A0SK"][:6]
    bundle = load_bundle(MODELS / "lightmuseg-bcss-demo")
    score = measure(build(bundle).module, bundle, tiles)["Tumor"]
    assert score.dice > max(0.75, score.everywhere_dice)
