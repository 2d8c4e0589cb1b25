"""The networks of the benchmarks, as bundles for us and as programs for the peers.

`null` is one 1×1 convolution: what a run with it takes is the engine. `lightmuseg` is the shipped
LightMuSeg with a random head of five classes, `lightmuseg-one` with its own of one. All take
patches of 512 px at 0.5 µm/px. `shipped` is models/lightmuseg-bcss-demo itself.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.networks import build

PATCH = 512
MPP = 0.5
NETWORKS = ("null", "lightmuseg", "lightmuseg-one", "shipped")
TRAINED = Path(__file__).parents[1] / "models" / "lightmuseg-bcss-demo" / "model.safetensors"
COLOURS = ((244, 244, 244), (222, 178, 210), (190, 120, 180), (140, 80, 150), (90, 45, 110))
"""Glass and four stains of tissue: the null network gives a pixel the nearest of them."""

TOML = """name = "benchmark-{name}"
modality = "slide"
network = "{network}"
weights = "{weights}"
[network_options]
{options}
[input]
mpp = {mpp}
channels = 3
patch_size = [{patch}, {patch}]
overlap = [0, 0]
mean = [{mean}]
std = [{std}]
[output]
activation = "{activation}"
classes = [{classes}]
"""
CLASSES = (
    '{ name = "Background" }',
    '{ name = "A", color = [200, 0, 0] }',
    '{ name = "B", color = [150, 200, 150] }',
    '{ name = "C", color = [90, 90, 220] }',
    '{ name = "D", color = [230, 180, 40] }',
)
TISSUE = {"mean": "0.485, 0.456, 0.406", "std": "0.229, 0.224, 0.225"}


def write_bundle(folder: Path, network: str, tissue: npt.NDArray[np.uint8]) -> Bundle:
    """Write the bundle of a network unless the folder holds it; return it.

    Args:
        folder: of the bundle.
        network: one of `NETWORKS`; what is shipped is returned from where it lies.
        tissue: uint8 (n, n, 3); the random head is scaled so that it sees all classes there.
    """
    if network == "shipped":
        return load_bundle(TRAINED.parent)
    if not folder.is_dir():
        beside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        match network:
            case "null":
                _write_null(beside)
            case "lightmuseg":
                _write_lightmuseg(beside, tissue)
            case "lightmuseg-one":
                _write_one_class(beside)
        beside.rename(folder)
    return load_bundle(folder)


def write_programs(folder: Path, bundle: Bundle) -> dict[str, Path]:
    """Write a bundle's network as the peers load it, unless it is there; return their files.

    Both map float32 (N, 3, 512, 512), 0 to 255, to probabilities: the network in its plain form,
    with the normalisation before it and the softmax after it.

    Args:
        folder: to write to.
        bundle: of this module.

    Returns:
        "tiatoolbox" → TorchScript; "fast" → ONNX for one patch.
    """
    paths = {"tiatoolbox": folder / f"{bundle.name}.pt", "fast": folder / f"{bundle.name}.onnx"}
    if not all(path.is_file() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        program = Program(bundle).eval()
        sample = torch.rand(1, 3, PATCH, PATCH) * 255
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of TorchScript: peers take nothing newer
            torch.jit.trace(program, sample).save(paths["tiatoolbox"])
            torch.onnx.export(program, (sample,), paths["fast"], dynamo=False, opset_version=17)
    return paths


class Program(nn.Module):
    """A bundle's network with all that a pixel goes through before and after it.

    Args:
        bundle: of this module.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        # ONNX is written from a module, not from the program that the null bundle holds
        self.network = null_network() if bundle.name.endswith("null") else build(bundle).module
        mean, std = (
            torch.tensor(v).reshape(-1, 1, 1) for v in (bundle.input.mean, bundle.input.std)
        )
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the probabilities, (N, 5, H, W)."""
        return self.network(pixels * self.scale + self.shift).softmax(1)


def null_network() -> nn.Conv2d:
    """Return the convolution whose largest logit is the nearest colour's."""
    colours = torch.tensor(COLOURS) / 255
    convolution = nn.Conv2d(3, len(COLOURS), 1).eval().requires_grad_(False)
    # |x - c|² = |x|² - 2 c·x + |c|², and |x|² is the same for all
    convolution.weight.copy_(2 * 20 * colours[..., None, None])
    convolution.bias.copy_(-20 * (colours**2).sum(1))
    return convolution


def _write_null(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(null_network(), torch.rand(1, 3, PATCH, PATCH))
    program.save(folder / "program.pt")
    _write_toml(folder, "null", "torchscript", "program.pt")


def _write_lightmuseg(folder: Path, tissue: npt.NDArray[np.uint8]) -> None:
    """Write the shipped network with a head of five random classes, seeded."""
    weights = load_file(TRAINED)
    _, channels, height, width = weights["last_conv.weight"].shape
    head = torch.randn(len(COLOURS), channels, 1, 1, generator=torch.Generator().manual_seed(0))
    # the same over the kernel, so that it smooths: trained masks are no speckle
    weights["last_conv.weight"] = head.repeat(1, 1, height, width)
    weights["last_conv.bias"] = torch.zeros(len(COLOURS))
    save_file(weights, folder / "model.safetensors")
    _write_toml(
        folder, "lightmuseg", "lightmuseg", "model.safetensors",
        options=f"classes = {len(COLOURS)}", **TISSUE,
    )  # fmt: skip
    bundle = load_bundle(folder)
    with torch.inference_mode():
        patch = torch.from_numpy(tissue[:PATCH, :PATCH].copy()).permute(2, 0, 1)[None] / 255
        mean, std = (
            torch.tensor(v).reshape(-1, 1, 1) for v in (bundle.input.mean, bundle.input.std)
        )
        logits = build(bundle).module((patch - mean) / std)
        spread, middle = torch.std_mean(logits, dim=(0, 2, 3))
    weights["last_conv.weight"] *= (3 / spread).reshape(-1, 1, 1, 1)
    weights["last_conv.bias"] = -middle * 3 / spread
    save_file(weights, folder / "model.safetensors")


def _write_one_class(folder: Path) -> None:
    """Write the shipped network as it is, for patches as large as those of the others."""
    shutil.copyfile(TRAINED, folder / TRAINED.name)
    _write_toml(
        folder, "lightmuseg-one", "lightmuseg", TRAINED.name, options="classes = 1", one=True,
        **TISSUE,
    )  # fmt: skip


def _write_toml(
    folder: Path,
    name: str,
    network: str,
    weights: str,
    *,
    options: str = "",
    mean: str = "0.0, 0.0, 0.0",
    std: str = "1.0, 1.0, 1.0",
    one: bool = False,
) -> None:
    text = TOML.format(
        name=name,
        network=network,
        weights=weights,
        options=options,
        mpp=MPP,
        patch=PATCH,
        mean=mean,
        std=std,
        activation="sigmoid" if one else "softmax",
        classes=", ".join(CLASSES[: 2 if one else None]),
    )
    (folder / "model.toml").write_text(text, encoding="utf-8")
