"""Integers in place of floats: near the answer on every processor, and where they are made."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file, save_file
from skimage.data import immunohistochemistry
from test_fold import Calls, masks, settled, small_input

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks import NETWORKS
from wsi_pipeline.networks.fold import FusedConv, for_inference
from wsi_pipeline.networks.quantise import load_ranges, quantise, rows, watched

DEMO = Path("models/lightmuseg-bcss-demo")
torch_alone = """
import sys, torch
from wsi_pipeline.networks import NETWORKS
from wsi_pipeline.networks.fold import for_inference
from wsi_pipeline.networks.quantise import quantise, watched
torch.manual_seed(0)
# weights of one sign, and patches of the largest value: the sums are as large as they get
network = NETWORKS["unet"](widths=(4, 8)).eval()
for module in network.modules():
    if isinstance(module, torch.nn.Conv2d):
        module.weight.data = module.weight.data.abs()
patches = torch.ones(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
form = for_inference(network)
with torch.inference_mode():
    with watched(form) as ranges:
        exact = form(patches)
    quantise(form, ranges)
    print(float((form(patches) - exact).abs().max() / exact.abs().max()))
"""


def run(*arguments: object) -> str:
    """Run a command that ends well; return what it says on stderr."""
    found = CliRunner().invoke(group, ["-q", *map(str, arguments)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stderr


def in_integers(name: str) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Return a network's inference form, the same of integers, and a patch."""
    torch.manual_seed(0)
    network = settled(NETWORKS[name](classes=2))
    exact, form, sample = for_inference(network), for_inference(network), small_input(network, name)
    with torch.inference_mode(), watched(form) as ranges:
        form(sample)
    quantise(form, ranges)
    return exact, form, sample


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_near_its_answer(name: str) -> None:
    exact, form, sample = in_integers(name)
    with torch.inference_mode():
        plain, near = masks(exact(sample)), masks(form(sample))
    # of noise through random weights, in five steps of a hundred
    assert (near - plain).std() < 0.15 * plain.std()
    assert torch.equal(near, plain) == (exact.ndim == 3)


def test_integers_are_handed_on_within_a_row() -> None:
    exact, form, sample = in_integers("lightmuseg")
    found = rows(exact)
    # MobileNetV2's first block has two convolutions, the sixteen behind it three
    assert [len(row) for row in found if row[0].startswith("encoder.") and len(row) > 1] == [
        2,
        *[3] * 16,
    ]
    with torch.inference_mode(), Calls() as calls:
        form(sample)
    assert calls.names.count("qconv_pointwise") == sum(map(len, found))
    left = [m for m in form.modules() if isinstance(m, FusedConv)]
    assert calls.names.count("_convolution_pointwise") == len(left)
    # once a row: to int32, then to uint8
    assert calls.names.count("clamp_") == len(found)


@pytest.mark.parametrize("isa", ["", "AVX2"])
def test_the_largest_sums_are_right_on_processors_of_old(isa: str) -> None:
    """AVX2 adds pairs of products in 16 bits, which eight bits of both factors overflow."""
    told = {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": "avx2"} if isa else {}
    done = subprocess.run(
        [sys.executable, "-c", torch_alone], env=os.environ | told, capture_output=True, text=True
    )
    assert float(done.stdout) < 0.1, done.stderr


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "tissue.png"
    Image.fromarray(np.tile(immunohistochemistry(), (2, 1, 1))[:900, :470]).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> Path:
    """Return a bundle that `models quantise` has made of the shipped one."""
    folder = tmp_path_factory.mktemp("models") / "quick"
    where = ("--mpp", 1, "--tissue", "none", "--patches", 8)
    said = run("models", "quantise", DEMO, picture, "-o", folder, *where)
    assert re.fullmatch(r"99\.\d\d% of the pixels keep the class that they have in fp32\n", said)
    return folder


@pytest.mark.slow
def test_a_run_in_integers_has_the_masks_of_one_in_floats(
    tmp_path: Path, picture: Path, model: Path
) -> None:
    for precision in ("fp32", "int8"):
        run(
            "segment", picture, "-m", model, "-o", tmp_path / precision, "--precision", precision,
            "--device", "cpu", "--mpp", 1, "--tissue", "none", "--outputs", "zarr",
        )  # fmt: skip
    found = [
        np.asarray(zarr.open(tmp_path / p / "tissue" / "mask.ome.zarr", mode="r")["0"])
        for p in ("fp32", "int8")
    ]
    assert 0 < (found[0] != found[1]).mean() < 0.01
    runs = [
        json.loads((tmp_path / p / "tissue" / "run.json").read_text()) for p in ("fp32", "int8")
    ]
    assert runs[0]["settings"]["key"] != runs[1]["settings"]["key"]
    assert run("verify", tmp_path / "int8" / "tissue", "--share", 1) is not None


@pytest.mark.slow
def test_the_bundle_holds_ranges_and_tells_what_they_cost(model: Path) -> None:
    made, of = load_bundle(model), load_bundle(DEMO)
    assert (made.name, made.weights_sha256) == (of.name, of.weights_sha256)
    assert made.digest != of.digest
    card = (model / "README.md").read_text("utf-8")
    before, _, after = (DEMO / "README.md").read_text("utf-8").rstrip().partition("## int8\n")
    # that of the shipped ranges gives way to that of these
    assert card.startswith(f"{before}## Limits{after.partition('## Limits')[2]}\n\n## int8\n")
    assert (card.count("## int8"), "| Tumor | " in card[-200:]) == (1, True)
    ranges = load_ranges(made)
    assert all(low <= 0 <= high for low, high in ranges.values())
    # what ReLU6 gives
    assert all(high <= 6 for name, (_, high) in ranges.items() if name.endswith(".conv.1.0"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: {"elsewhere": held["encoder.0.0"]}, "of another network: it has no elsewh"),
        (lambda held: held | {"encoder.0.0": np.array([1.0, 2.0])}, "encoder.0.0 has no range"),
        (lambda held: held | {"encoder.0.0": np.array([1.0])}, "cannot read the ranges"),
    ],
)
def test_ranges_of_something_else_are_refused(tmp_path, picture, model, change, message) -> None:
    path = model / "int8.safetensors"
    before = path.read_bytes()
    save_file(change(load_file(path)), path)
    form = for_inference(NETWORKS["lightmuseg"](classes=1))
    with pytest.raises(BundleError, match=message):
        quantise(form, load_ranges(load_bundle(model)))
    path.write_bytes(before)


def test_int8_that_a_bundle_has_not_is_refused_at_once(tmp_path: Path, picture: Path) -> None:
    run("models", "init", DEMO, "-o", tmp_path / "random")
    told = ("segment", picture, "-m", tmp_path / "random", "-o", tmp_path, "--precision", "int8")
    found = CliRunner().invoke(group, [*map(str, told)])
    assert found.exit_code == 2
    assert "random has no int8: make it with `wsi-pipeline models quantise`" in found.stderr
    assert not (tmp_path / "tissue").exists()
