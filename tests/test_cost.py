"""Costs against the published figures, and against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torchstat import TorchstatFigures, torchstat_figures

from wsi_pipeline.networks import NETWORKS
from wsi_pipeline.networks.cost import count_macs, count_parameters, peak_memory

MIB = 2**20


def macs(name: str, size: tuple[int, ...], **options: Any) -> int:
    with torch.device("meta"):
        return count_macs(NETWORKS[name](**options), size)


# in units of 1e9, as networks.md gives them
@pytest.mark.parametrize(
    ("name", "options", "size", "expected"),
    [
        ("lightmuseg", {}, (3, 224, 224), 0.932),
        ("lightmuseg", {}, (3, 256, 256), 1.218),
        ("lightmuseg", {}, (3, 512, 512), 4.870),
        ("lightmuseg", {"classes": 5}, (3, 512, 512), 4.908),
        ("lightmuseg", {"classes": 5, "deep_supervision": True}, (3, 512, 512), 4.908),
        ("nmtnet", {}, (3, 224, 224), 5.820),
        ("nmtnet", {}, (3, 256, 256), 7.601),
        ("mm3d_unet", {}, (1, 128, 128, 128), 371.5),
        ("unet3d", {}, (1, 128, 128, 128), 1953.9),
        ("unet3d", {}, (1, 64, 64, 64), 244.2),
        ("highres_unet", {"separable": False, "residual": False}, (1, 1536, 1536), 225.1),
        ("highres_unet", {"residual": False}, (1, 1536, 1536), 35.84),
        ("highres_unet", {}, (1, 1536, 1536), 37.69),
        ("highres_unet", {"convs": (2, 3, 1)}, (1, 1536, 1536), 25.42),
        ("unet", {}, (3, 256, 256), 48.17),
        ("swish_unet", {}, (3, 256, 256), 19.19),
    ],
)
def test_multiply_accumulates(
    name: str, options: dict[str, Any], size: tuple[int, ...], expected: float
) -> None:
    digits = len(str(expected).partition(".")[2])
    assert round(macs(name, size, **options) / 1e9, digits) == expected


# published: 80.90 % less
@pytest.mark.parametrize(
    ("options", "saved"),
    [({}, 80.99), ({"plan": "B"}, 81.38), ({"plan": "B", "bottleneck": True}, 81.10)],
)
def test_mm3d_unet_saves_what_its_paper_says(options: dict[str, Any], saved: float) -> None:
    size = (1, 64, 64, 64)
    share = 100 * (1 - macs("mm3d_unet", size, **options) / macs("unet3d", size))
    assert round(share, 2) == saved
    assert options or abs(share - 80.90) < 0.2


def test_the_3d_networks_cost_by_the_voxel() -> None:
    voxels = 32**3
    assert macs("unet3d", (1, 32, 32, 32)) == 931_680 * voxels
    # but for the two labels
    assert macs("mm3d_unet", (1, 32, 32, 32)) - 1024 == 177_127 * voxels


# README of the Breast-CT repository, 3×256×256: M, MiB, G, G, MiB
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("unet", (31_043_586, 404.00, 96.51, 46.16, 901.04)),
        ("swish_unet", (4_197_986, 296.50, 38.48, 17.66, 418.64)),
    ],
)
def test_the_ten_published_figures(name: str, published: tuple[float, ...]) -> None:
    figures = torchstat_figures(NETWORKS[name](), (3, 256, 256))
    found = (
        figures.parameters,
        round(figures.memory / MIB, 2),
        round(figures.madd / 1e9, 2),
        round(figures.flops / 1e9, 2),
        round(figures.traffic / MIB, 2),
    )
    assert found == published


def test_torchstats_rules_layer_by_layer() -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),  # (4, 6, 6): 144 outputs of 18 products
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),  # (4, 3, 3): 36 outputs of 4
        nn.ConvTranspose2d(4, 2, 2, stride=2),  # (2, 6, 6): 72 outputs
        nn.SiLU(),
        nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False),  # 72 outputs of 9 products
    )
    assert torchstat_figures(network, (2, 6, 6)) == TorchstatFigures(
        parameters=(2 * 9 + 1) * 4 + 8 + (4 * 4 * 2 + 2) + 18,
        memory=4 * (144 * 3 + 36 + 72 * 3),
        # 18 products and 17 sums and a bias; 4 × 9 positions of two channels with 16 products
        madd=144 * 36 + 144 * 4 + 144 + 36 * 3 + 9 * 2 * (16 + 16) + 0 + 72 * 17,
        flops=144 * 19 + 144 * 2 + 144 + 144 + 0 + 0 + 72 * 9,
        traffic=4 * ((72 + 76 + 144) + (144 + 8 + 144) + 288 + (144 + 36) + (72 + 18 + 72)),
    )


@pytest.mark.parametrize(
    ("pool", "outputs", "window"),
    [(nn.MaxPool2d(3, 2, padding=1), 9, 9), (nn.MaxPool2d((2, 3)), 6, 6)],
)
def test_torchstat_compares_whole_windows(pool: nn.Module, outputs: int, window: int) -> None:
    assert torchstat_figures(pool, (1, 6, 6)).madd == outputs * (window - 1)


def test_multiply_accumulates_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),  # 5 × 4 outputs of 4 channels
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    assert count_macs(network, (2, 9, 8)) == 20 * 4 * 18 + 20 * 4 * 9 + 20 * 4 * 6 * 4 + 30


def test_counting_changes_nothing() -> None:
    network = NETWORKS["swish_unet"](widths=[8, 16]).train()
    network.inc.eval()
    before = {n: t.clone() for n, t in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    for count in (count_macs, peak_memory):
        count(network, (3, 8, 8))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in network.modules()] == modes
    assert not any(m._forward_hooks for m in network.modules())
    assert all(p.device.type == "cpu" for p in network.parameters())


def test_the_peak_is_told_in_float32() -> None:
    network = NETWORKS["swish_unet"](widths=[8, 16])
    expected = peak_memory(network, (3, 8, 8))
    assert peak_memory(network.bfloat16(), (3, 8, 8)) == expected


def test_parameters_are_what_learns() -> None:
    assert count_parameters(nn.BatchNorm2d(5)) == 10
    shared = nn.Conv2d(3, 3, 1, bias=False)
    assert count_parameters(nn.Sequential(shared, shared)) == 9


class Skips(nn.Module):
    """Operations that take no memory of their own: views, in place, and results."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        z = F.avg_pool2d(y, 2).relu_()
        z = F.interpolate(z, scale_factor=2.0, mode="nearest")
        y = torch.cat([y, z], dim=1)
        del z
        return y[:, :1] * y.flatten(2).mean(2)[:, :1, None, None]


def test_the_peak_is_that_of_the_live_tensors() -> None:
    size = 4 * 64 * 64  # bytes of a channel
    # the input, two copies and their join of twice the channels
    assert peak_memory(Skips(), (3, 64, 64)) == (3 + 3 + 3 + 6) * size
    layers = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 1, 1))
    # input, and the ReLU's two sides
    assert peak_memory(layers, (3, 64, 64)) == (3 + 8 + 8) * size + 4 * (24 + 9)
    layers = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(inplace=True))
    assert peak_memory(layers, (3, 64, 64)) == (3 + 8) * size + 4 * 24


def test_the_peak_is_what_pytorchs_profiler_sees() -> None:
    network = Skips()
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        network(torch.ones(1, 3, 64, 64))
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert peak_memory(network, (3, 64, 64)) == pytest.approx(most, abs=1024)


def test_a_network_too_large_for_this_machine_is_counted() -> None:
    with torch.device("meta"):
        network = NETWORKS["highres_unet"](width=64, separable=False, residual=False)
    assert count_macs(network, (1, 1536, 1536)) > 3e12
    assert peak_memory(network, (1, 1536, 1536)) > 4 * 598_347_585
