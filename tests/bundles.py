"""Bundles that tests make: pointwise TorchScript programs and networks with random weights.

And what such a network finds in a slide, on one canvas in memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.signal.windows import gaussian

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.networks import NETWORKS, build
from wsi_pipeline.sources import open_source

CLASSES = """classes = [
  { name = "Background" },
  { name = "Tumor", color = [200, 0, 0] },
  { name = "Stroma", color = [150, 200, 150] },
]"""
THRESHOLDS = (150, 215)


def classify(pixels: np.ndarray) -> np.ndarray:
    """Return class 1 where green is below 150, 2 where it is below 215, else 0; (h, w) uint8."""
    green = pixels[..., 1]
    low, high = THRESHOLDS
    return np.where(green < low, 1, np.where(green < high, 2, 0)).astype(np.uint8)


class Pointwise(torch.nn.Module):
    """`classify` as a network: logits from the pixel's own colour, scaled to [0, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        green = torch.round(x[:, 1:2] * 255)
        first = (green < 150).float()
        second = (green < 215).float() - first
        return torch.cat([1 - first - second, first, second], dim=1) * 20


class Busy(Pointwise):
    """The same, after much work for nothing, so that there is time to kill it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(20):
            y = torch.sin(y)
        green = torch.round(x[:, 1:2] * 255) + 0 * y[:, :1]
        first = (green < 150).float()
        second = (green < 215).float() - first
        return torch.cat([1 - first - second, first, second], dim=1) * 20


class Coarse(torch.nn.Module):
    """The same of the mean over squares of 32 px: regions as large as those of tissue."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        green = torch.nn.functional.avg_pool2d(x[:, 1:2] * 255, 32)
        green = torch.nn.functional.interpolate(green, scale_factor=32.0, mode="nearest")
        first = (green < 150).float()
        second = (green < 215).float() - first
        return torch.cat([1 - first - second, first, second], dim=1) * 20


def write_toml(folder: Path, *, mpp: float, patch_size: int, overlap: int, **keys: str) -> Path:
    """Write a `model.toml`; return the folder."""
    options = {
        "network": '"torchscript"',
        "weights": '"program.pt"',
        "activation": '"softmax"',
        "classes": CLASSES.removeprefix("classes = "),
        "mean": "[0.0, 0.0, 0.0]",
        "std": "[1.0, 1.0, 1.0]",
        "network_options": "",
    } | keys
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(
        f"""name = "test-{folder.name}"
modality = "slide"
network = {options["network"]}
weights = {options["weights"]}
[network_options]
{options["network_options"]}
[input]
mpp = {mpp}
channels = 3
patch_size = [{patch_size}, {patch_size}]
overlap = [{overlap}, {overlap}]
mean = {options["mean"]}
std = {options["std"]}
[output]
activation = {options["activation"]}
classes = {options["classes"]}
""",
        encoding="utf-8",
    )
    return folder


def pointwise_bundle(
    folder: Path,
    *,
    mpp: float,
    patch_size: int = 256,
    overlap: int = 32,
    program: type[torch.nn.Module] = Pointwise,
) -> Path:
    """Write a bundle whose classes are `classify` of each pixel; return its folder."""
    write_toml(folder, mpp=mpp, patch_size=patch_size, overlap=overlap)
    torch.jit.script(program()).save(folder / "program.pt")
    return folder


def lightmuseg_bundle(
    folder: Path, *, mpp: float, patch_size: int = 128, overlap: int = 32, seed: int = 0
) -> Path:
    """Write a bundle of LightMuSeg with random weights and three classes; return its folder."""
    torch.manual_seed(seed)
    network = NETWORKS["lightmuseg"](classes=3).eval()
    with torch.no_grad():  # so that every class occurs: logits of mean 0 and deviation 3
        coarse = torch.rand(8, 3, 8, 8)
        sample = torch.nn.functional.interpolate(coarse, (patch_size, patch_size)) * 4 - 2
        deviation, mean = torch.std_mean(network(sample), dim=(0, 2, 3))
        network.last_conv.weight *= 3 / deviation.reshape(-1, 1, 1, 1)
        network.last_conv.bias.copy_((network.last_conv.bias - mean) * 3 / deviation)
    write_toml(
        folder,
        mpp=mpp,
        patch_size=patch_size,
        overlap=overlap,
        network='"lightmuseg"',
        weights='"model.safetensors"',
        network_options="classes = 3",
        mean="[0.485, 0.456, 0.406]",
        std="[0.229, 0.224, 0.225]",
    )
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def small_unet_bundle(folder: Path, *, patch_size: int = 32) -> Path:
    """Write a bundle of a U-Net with few and random weights and three classes; return its folder.

    For what does not depend on the network: it is quick.
    """
    torch.manual_seed(0)
    options = {"classes": 3, "widths": [8, 16]}
    network = NETWORKS["swish_unet"](**options)
    with torch.no_grad():  # statistics of its own for every norm, so that none is an identity
        network(torch.rand(4, 3, patch_size, patch_size))
    write_toml(
        folder,
        mpp=0.5,
        patch_size=patch_size,
        overlap=0,
        network='"swish_unet"',
        weights='"model.safetensors"',
        network_options="\n".join(f"{key} = {value}" for key, value in options.items()),
    )
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def spoil(folder: Path) -> None:
    """Move a small U-Net's last features so far from zero that float32 holds no more of them.

    They come back only where the batch norm is folded before it is rounded.
    """
    path, norm = folder / "model.safetensors", "up4.conv.double_conv.4"
    state = load_file(path)
    for name, value in {"running_mean": 3e8, "bias": 3e8, "running_var": 1, "weight": 1}.items():
        state[f"{norm}.{name}"].fill_(value)
    save_file(state, path)


def blended_canvas(slide_path: Path, bundle_path: Path, *, overlap: int) -> np.ndarray:
    """Predict the patches one by one, blend them in float64; return (classes, y, x)."""
    bundle = load_bundle(bundle_path)
    with open_source(slide_path) as slide:
        view = slide.at(bundle.mpp, tolerance=0.02)
        size = bundle.input.patch_size[0]
        padded = [max(n, size) for n in view.shape]
        pixels = view.read((0, 0), tuple(padded))
    network = build(bundle).module
    weight = np.outer(*[gaussian(size, size / 8)] * 2)
    total, weights = np.zeros((3, *padded)), np.zeros(padded)
    grid = PatchGrid.cover(view.shape, (size, size), (overlap, overlap))
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (bundle.input.mean, bundle.input.std))
    for y, x in grid.origins:
        patch = pixels[y : y + size, x : x + size].transpose(2, 0, 1) / 255
        with torch.inference_mode():
            inputs = torch.from_numpy(((patch - mean) / std).astype(np.float32))[None]
            probabilities = network(inputs).softmax(1)[0].numpy()
        total[:, y : y + size, x : x + size] += probabilities * weight
        weights[y : y + size, x : x + size] += weight
    return (total / weights)[:, : view.shape[0], : view.shape[1]]
