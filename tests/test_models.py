"""Every bundle that the repository ships."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from msgspec import structs
from PIL import Image
from safetensors import safe_open

from wsi_pipeline import segment
from wsi_pipeline.bundle import bundle_toml, load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.networks import build, create
from wsi_pipeline.networks.check import check_shapes, run, try_bundle
from wsi_pipeline.networks.cost import count_macs, count_parameters
from wsi_pipeline.training.recipe import load_recipe

MODELS = Path(__file__).parents[1] / "models"
BUNDLES = sorted(path.parent for path in MODELS.glob("*/model.toml"))
RECIPES = {
    "highres-unet-mammography": "cdd-cesm.toml",
    "lightmuseg-bcss-demo": "bcss-tumor.toml",
    "nmtnet-ultrasound": "busi-groups-nmtnet.toml",
}
"""Of each bundle that ships weights, by which it was trained: who adds one adds it here."""
WITH_WEIGHTS = [MODELS / name for name in RECIPES]
SECTIONS = (
    "The network", "Training data", "Training", "How well it does", "Speed", "Limits",
    "Licences and notices",
)  # fmt: skip
"""Of the card of a bundle with weights."""
MOST_BYTES = 36e6
"""Of a file of a bundle."""


def name_of(path: Path) -> str:
    return path.name


def test_each_network_of_the_project_has_bundles() -> None:
    networks = {load_bundle(path).network for path in BUNDLES}
    assert networks == {"lightmuseg", "nmtnet", "mm3d_unet", "highres_unet", "swish_unet"}
    there = [path for path in BUNDLES if load_bundle(path).weights_path is not None]
    assert {path.name for path in there} == RECIPES.keys()


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
    assert max(file.stat().st_size for file in path.iterdir()) < MOST_BYTES
    with safe_open(bundle.weights_path, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith(("encoder.18.", "sideout"))]  # noqa: SIM118
    assert not build(bundle).module.training


@pytest.mark.parametrize("path", BUNDLES, ids=name_of)
def test_a_card_says_what_the_bundle_is_not_and_where_its_weights_are_from(path: Path) -> None:
    card = (path / "README.md").read_text("utf-8")
    weights = ("Dice", "left out", "expected calibration error", "ms a patch")
    if path in WITH_WEIGHTS:
        sections = re.findall(r"^## (.+)$", card, re.M)
        assert [name for name in sections if name in SECTIONS] == [*SECTIONS]
        # figures with their intervals, the answer of who looks at nothing, a licence of the data
        assert re.search(r"Dice 0\.\d+ \(0\.\d+ to 0\.\d+\)", card)
        assert re.search("“everywhere”|commonest label", card)
        assert re.search(r"CC0|CC BY 4\.0|MIT|BSD-3|Apache-2\.0", card)
    else:
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
        recipe = load_recipe(MODELS.parent / "workflows" / "train" / RECIPES[path.name])
        assert limits == recipe.bundle.limits  # as `train` would write it
        card = " ".join((path / "README.md").read_text("utf-8").split()).replace("- ", "")
        assert limits in card
    else:
        assert limits.startswith("No weights come with it")
        assert ("nothing was measured here" in limits) != ("left out" in limits)


@pytest.mark.parametrize("path", WITH_WEIGHTS, ids=name_of)
def test_a_run_carries_the_limits_and_tells_what_is_unlike(
    path: Path, tmp_path: Path, make_slide: Callable[..., Path]
) -> None:
    bundle = load_bundle(path)
    side = bundle.input.patch_size[-1]
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    source = tmp_path / "noise.png"
    Image.fromarray(pixels).save(source)
    options: dict[str, Any] = {"device": "cpu"}
    if bundle.modality == "slide":
        source = make_slide(tmp_path / "noise.tif", pixels, bundle.mpp)
        options["tissue"] = "none"
    (run,) = segment(source, model=path, output=tmp_path / "out", **options)
    assert run.model["limits"] == bundle.limits
    # no tissue looks like noise
    assert run.unlike_percent == (100 if bundle.features_path else None)


def test_three_phases_of_a_real_dce_mri_run_through(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "volumes" / "duke_153_weak" / "volume.npz"
    if not path.is_file():
        pytest.skip(f"no {path.name} of a DCE-MRI in the real data")
    held = np.load(path)
    # 32 voxels each way around the tumour, which stay as they are
    middle = np.argwhere(held["mask_weak"]).mean(0).astype(int)
    around = tuple(slice(max(0, m - 16), max(0, m - 16) + 32) for m in middle)
    phases = np.stack([held[name][around] for name in ("pre", "post1", "post4")])
    spacing = [float(mm) for mm in held["spacing_zyx"]]
    affine = np.diag([*reversed(spacing), 1])
    nibabel.save(nibabel.Nifti1Image(phases.T, affine), tmp_path / "dce.nii.gz")
    shipped = load_bundle(MODELS / "mm3d-unet-dcemri")
    seen = {"channels": 3, "time_points": (0, 1, 2), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    size = {"patch_size": (32, 32, 32), "overlap": (0, 0, 0), "spacing_mm": tuple(spacing)}
    three = replace(shipped, input=structs.replace(shipped.input, **seen, **size))
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "model.toml").write_text(bundle_toml(three, weights=None), "utf-8")
    command = ["models", "init", str(tmp_path / "three"), "-o", str(tmp_path / "random")]
    assert CliRunner().invoke(group, command).exit_code == 0
    (run,) = segment(
        tmp_path / "dce.nii.gz",
        model=tmp_path / "random",
        output=tmp_path / "out",
        device="cpu",
        precision="fp32",
    )
    assert run.status == "done", run.reason
    assert run.slide["size"] == [32, 32, 32]
    prepared = run.settings["prepared"]
    values = (phases - prepared["black"]) / (prepared["white"] - prepared["black"])
    patch = torch.from_numpy(values.astype(np.float32))[None]
    with torch.inference_mode():
        answer = build(load_bundle(tmp_path / "random")).module(patch)
    (margin,) = (answer["mask"][:, 1] - answer["mask"][:, 0]).numpy()
    mask = np.asarray(nibabel.load(tmp_path / "out" / "dce" / "mask.nii.gz").dataobj).T
    clear = abs(margin) > 1e-3
    assert clear.mean() > 0.95
    assert 0 < mask.mean() < 1
    np.testing.assert_array_equal(mask[clear], (margin > 0)[clear])
    chances = answer["label"].softmax(1)[0].tolist()
    assert list(run.labels.values()) == pytest.approx(chances, abs=1e-4)


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
