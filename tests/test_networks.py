from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.bundle import Bundle, ClassInfo, InputSpec
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks import NETWORKS, SegmentationNetwork, build, create
from wsi_pipeline.networks.cost import count_macs, count_parameters
from wsi_pipeline.networks.highres_unet import ConvBlock, HighResUNet
from wsi_pipeline.networks.highres_unet import Up as HighResUp
from wsi_pipeline.networks.lightmuseg import CHANNELS, FRFM, MSFFM, LightMuSeg
from wsi_pipeline.networks.mm3d_unet import IRB, MM3DUNet
from wsi_pipeline.networks.nmtnet import LRE, MFCR, NMTNet, _masked_mean
from wsi_pipeline.networks.nnunet import NNUNet
from wsi_pipeline.networks.unet import SwishUNet, UNet, UNet3D
from wsi_pipeline.networks.weights import load_state, read_state

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def make_bundle(path: Path, *, network: str = "lightmuseg", **changes: object) -> Bundle:
    options = {
        "weights_path": None,
        "input": InputSpec(mpp=0.5, patch_size=(64, 64), overlap=(16, 16)),
        "network_options": {"classes": 1} if network == "lightmuseg" else {},
        **changes,
    }
    return Bundle(
        path=path,
        name="test",
        modality="slide",
        network=network,
        activation="sigmoid",
        classes=(ClassInfo(name="Background"), ClassInfo(name="Tumor", color=(200, 0, 0))),
        **options,
    )


def patches(network: SegmentationNetwork, count: int, *, times: int = 1) -> Tensor:
    """Return random patches of the smallest size, or of some times that."""
    generator = torch.Generator().manual_seed(1)
    # Instance norms want more than one pixel, at the bottom, too.
    side = max(times, 1 + isinstance(network, NNUNet)) * network.size_multiple
    return torch.randn(count, network.channels, *[side] * network.ndim, generator=generator)


def maps_of(output: Any) -> list[Tensor]:
    """Return what a network returned as a list."""
    if isinstance(output, dict):
        return list(output.values())
    return output if isinstance(output, list) else [output]


def make_norms_real(module: nn.Module) -> None:
    """Give all norms statistics, weights and biases of their own, so that none is an identity."""
    generator = torch.Generator().manual_seed(2)
    for norm in module.modules():
        if isinstance(norm, NORMS):
            for tensor in (norm.running_mean, norm.bias.data):
                tensor.normal_(0, 0.1, generator=generator)
            for tensor in (norm.running_var, norm.weight.data):
                tensor.uniform_(0.5, 1.5, generator=generator)


@pytest.fixture(scope="module")
def network() -> LightMuSeg:
    """A network in eval mode whose norms have seen data, so that none of them is an identity."""
    torch.manual_seed(0)
    network = LightMuSeg(classes=2)
    with torch.no_grad():
        network(torch.randn(4, 3, 64, 64))
    return network.eval()


COUNTS: list[tuple[str, dict[str, Any], int]] = [
    # published as 7.05 M
    ("lightmuseg", {}, 7_052_381),
    ("lightmuseg", {"classes": 2}, 7_052_526),
    ("lightmuseg", {"classes": 3}, 7_052_671),
    ("lightmuseg", {"classes": 5}, 7_052_961),
    # all that the authors' class holds
    ("lightmuseg", {"deep_supervision": True}, 7_076_872),
    ("lightmuseg", {"classes": 5, "deep_supervision": True}, 7_077_616),
    ("lightmuseg", {"channels": 1}, 7_052_381),
    ("lightmuseg", {"channels": 1, "grey": "sum"}, 7_052_381 - 2 * 32 * 9),
    ("nmtnet", {}, 17_107_791),
    ("nmtnet", {"channels": 1}, 17_107_791),
    ("nmtnet", {"channels": 1, "grey": "sum"}, 17_107_791 - 2 * 64 * 49),
    ("mm3d_unet", {}, 7_027_268),
    ("mm3d_unet", {"plan": "B"}, 6_993_380),
    ("mm3d_unet", {"plan": "B", "bottleneck": True}, 7_054_308),
    ("unet3d", {}, 19_073_730),
    ("nnunet", {}, 5_688_194),
    # published exactly
    ("swish_unet", {}, 4_197_986),
    ("swish_unet", {"beta": "scalar"}, 4_198_000),
    ("swish_unet", {"beta": "channel"}, 4_200_098),
    ("unet", {}, 31_043_586),
    ("unet", {"widths": [64, 128, 256, 512]}, 7_703_042),
]
LADDER: dict[str, dict[str, Any]] = {
    # published as 600 M, 37 M, 4.6 M, 5.3 M, and "about 10 M" for four levels
    "600": {"width": 64, "separable": False, "residual": False},
    "37": {"separable": False, "residual": False},
    "4.6": {"residual": False},
    "5.3": {},
    "10": {"width": 64, "levels": 4, "separable": False, "residual": False},
}
PLANS = {
    (3, 2, 3): (598_347_585, 37_409_745, 4_641_002, 5_343_962, 9_249_089),
    (2, 3, 1): (598_368_449, 37_408_049, 4_619_258, 5_322_218, 9_284_289),
    (2, 2, 2): (497_692_737, 31_115_793, 3_919_946, 4_622_906, 7_699_009),
}
COUNTS += [
    ("highres_unet", {**options, "convs": convs}, count)
    for convs, counts in PLANS.items()
    for options, count in zip(LADDER.values(), counts, strict=True)
]


@pytest.mark.parametrize(("name", "options", "count"), COUNTS)
def test_parameter_counts_are_exact(name: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(NETWORKS[name](**options)) == count


def sections() -> dict[str, str]:
    """Return the parts of the networks' page by their headings."""
    _, *parts = PAGE.read_text("utf-8").split("\n## ")
    return {heading: text for heading, _, text in (part.partition("\n") for part in parts)}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_page_tells_every_option_and_its_default(name: str) -> None:
    (text,) = (text for heading, text in sections().items() if name in heading.split(" and "))
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    told = {row[1].strip(" `"): row[2].strip(" `") for row in rows}
    if name == "unet":  # shares its rows with swish_unet
        del told["beta"]
    options = inspect.signature(NETWORKS[name]).parameters
    assert set(told) == set(options)
    for option, parameter in options.items():
        default = parameter.default
        expected = json.dumps(list(default) if isinstance(default, tuple) else default)
        assert told[option].startswith(expected.removesuffix(", 1024]"))


def test_the_pages_overview_is_true() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text("utf-8").split("\n## ")[0].splitlines()]
    told = {row[0].strip("| `"): row for row in rows if row[0].startswith("| `")}
    assert list(told) == list(NETWORKS)
    for name, row in told.items():
        with torch.device("meta"):
            network = NETWORKS[name]()
        facts = f"{network.ndim}, {network.channels}", str(network.size_multiple)
        assert tuple(row[2:4]) == facts
        assert row[4] == f"{count_parameters(network):,}"
        side = int(re.search(r"at (\d+)[²³]", row[5])[1])
        macs = count_macs(network, (network.channels, *[side] * network.ndim)) / 1e9
        figure = row[5].partition(" G")[0].replace(",", "")
        assert round(macs, len(figure.partition(".")[2])) == float(figure)


def test_mm3d_unet_has_the_published_share_of_the_3d_unets_parameters() -> None:
    with torch.device("meta"):
        light, base = count_parameters(MM3DUNet()), count_parameters(UNet3D())
    assert round(100 * (1 - light / base), 2) == 63.16


def test_the_3d_unet_has_the_count_of_its_own_paper() -> None:
    """Çiçek et al. count 19,069,955: three channels and classes, no norms, no up-conv biases."""
    with torch.device("meta"):
        network = UNet3D(channels=3, classes=3)
    norms = sum(count_parameters(m) for m in network.modules() if isinstance(m, NORMS))
    ups = [m for m in network.modules() if isinstance(m, nn.ConvTranspose3d)]
    biases = sum(m.get_parameter("bias").numel() for m in ups)
    assert len(ups) == 3
    assert count_parameters(network) - norms - biases == 19_069_955


def test_lightmuseg_parts_have_the_published_counts() -> None:
    network = LightMuSeg(deep_supervision=True)
    parts = {
        "encoder": count_parameters(network.encoder[:18]),
        "unused": count_parameters(network.encoder[18]),
        "msffm": [count_parameters(getattr(network, f"mltslayer{i}")) for i in range(1, 6)],
        "up": [count_parameters(getattr(network, f"s{i}_up_conv")) for i in (5, 4, 3, 2)],
        "frfm": [
            count_parameters(getattr(network, n)) for n in ("lca45", "lca34", "lca23", "lca12")
        ],
        "last": count_parameters(network.last_conv),
        "sideout": [count_parameters(getattr(network, f"sideout{i}")) for i in (4, 3, 2)],
    }
    assert parts == {
        "encoder": 1_811_712,
        "unused": 412_160,
        "msffm": [10_310, 23_000, 40_746, 364_730, 4_046_898],
        "up": [276_768, 27_744, 6_984, 3_504],
        "frfm": [23_040, 2_560, 1_440, 640],
        "last": 145,
        "sideout": [20_833, 2_337, 1_321],
    }


def test_nmtnet_parts_have_the_counts_of_the_plan() -> None:
    with torch.device("meta"):
        network = NMTNet()
    assert {name: count_parameters(part) for name, part in network.named_children()} == {
        "encoder": 11_176_512,
        "mfcr": 2_132_512,
        "lre": 137_315 + 35_939 + 9_827 + 9_827,
        "decoder": 3_209_216,
        "up": 0,
        "last_conv": 18_496,
        "head": 33,
        "classifier": 378_114,
    }
    assert [count_parameters(m) for m in network.lre] == [137_315, 35_939, 9_827, 9_827]


def test_mm3d_unet_stages_have_the_counts_of_the_plan() -> None:
    with torch.device("meta"):
        network = MM3DUNet()
    assert [count_parameters(stage) for stage in network.down] == [
        58_368,
        241_920,
        958_976,
        3_818_496,
    ]
    assert [(count_parameters(stage.up), count_parameters(stage.conv)) for stage in network.up] == [
        (1_048_832, 424_960),
        (262_272, 114_176),
        (65_600, 32_512),
    ]
    assert count_parameters(network.act) == 1_026
    assert count_parameters(network.head) == 130


def test_highres_unet_levels_have_the_counts_of_the_plan() -> None:
    with torch.device("meta"):
        network = HighResUNet()
    assert [count_parameters(block) for block in network.down] == [
        *(969, 4_048, 14_240, 53_056, 204_416, 802_048),
        2_117_120,
    ]
    assert [count_parameters(stage.up) for stage in network.up] == [
        *(528_896, 133_376, 33_920, 8_768, 2_336, 656)
    ]
    assert [count_parameters(stage.block) for stage in network.up] == [
        *(1_070_080, 272_896, 70_912, 19_072, 5_440, 1_696)
    ]
    assert count_parameters(network.head) == 17


def test_lightmuseg_state_has_the_authors_names() -> None:
    state = LightMuSeg().state_dict()
    assert len(state) == 429
    expected = {
        "encoder.0.0.weight": (32, 3, 3, 3),
        "encoder.1.conv.0.0.weight": (32, 1, 3, 3),
        "encoder.1.conv.1.weight": (16, 32, 1, 1),
        "encoder.1.conv.2.running_mean": (16,),
        "encoder.17.conv.2.weight": (320, 960, 1, 1),
        "encoder.17.conv.3.weight": (320,),
        "encoder.18.0.weight": (1280, 320, 1, 1),
        "mltslayer5.scale3.weight": (320, 320, 5, 5),
        "mltslayer5.scale1.bias": (320,),
        "mltslayer1.reduce_channel.weight": (16, 48, 1, 1),
        "mltslayer2.fc1.weight": (6, 24, 1, 1),
        "mltslayer2.fc2.bias": (24,),
        "mltslayer4.fusion_conv.weight": (96, 96, 1, 1),
        "s5_up_conv.1.weight": (96, 320, 3, 3),
        "s2_up_conv.2.running_var": (16,),
        "lca45.channel_fc.0.weight": (24, 96),
        "lca12.channel_fc.2.weight": (16, 4),
        "lca23.spatial_fusion.weight": (24, 48, 1, 1),
        "last_conv.bias": (1,),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert "lca12.spatial_fusion.bias" not in state


def test_the_side_outs_have_the_authors_names() -> None:
    state = LightMuSeg(deep_supervision=True).state_dict()
    assert len(state) == 456
    expected = {
        "sideout4.conv1.conv.weight": (24, 96, 3, 3),
        "sideout4.conv1.bn.running_mean": (24,),
        "sideout3.conv1.conv.bias": (8,),
        "sideout2.conv2.weight": (1, 6, 1, 1),
        "sideout2.conv2.bias": (1,),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


def norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{n}"] for n in names))


def conv(state: Mapping[str, Tensor], name: str, x: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


@pytest.mark.parametrize(
    ("network", "activation", "downs"),
    [
        (UNet(widths=[8, 16, 32, 64, 128]), F.relu, 4),
        (SwishUNet(widths=[8, 16, 32, 64]), F.silu, 3),
    ],
)
def test_the_unets_are_what_the_authors_names_say(
    network: UNet | SwishUNet, activation: Callable[[Tensor], Tensor], downs: int
) -> None:
    """The forward pass as networks.md tells it, from the tensors by the authors' names."""
    make_norms_real(network)
    state = network.double().eval().state_dict()
    groups = ["inc", *(f"down{i}.maxpool_conv.1" for i in range(1, downs + 1))]
    ups = [f"up{i}" for i in range(5 - downs, 5)]

    def double_conv(name: str, x: Tensor) -> Tensor:
        for i in (0, 3):
            x = conv(state, f"{name}.double_conv.{i}", x, padding=1)
            x = activation(norm(state, f"{name}.double_conv.{i + 1}", x))
        return x

    x = patches(network, 2, times=2).double()
    features = [double_conv("inc", x)]
    for name in groups[1:]:
        features.append(double_conv(name, F.max_pool2d(features[-1], 2)))
    expected = features.pop()
    for name in ups:
        weight, bias = state[f"{name}.up.weight"], state[f"{name}.up.bias"]
        grown = F.conv_transpose2d(expected, weight, bias, stride=2)
        expected = double_conv(f"{name}.conv", torch.cat([features.pop(), grown], dim=1))
    expected = conv(state, "outc", expected)
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-12)
    parts = {n.rpartition(".double_conv.")[0] or n.rpartition(".")[0] for n in state}
    assert parts == {*groups, *(f"{n}.up" for n in ups), *(f"{n}.conv" for n in ups), "outc"}


@pytest.mark.parametrize(("beta", "count"), [("fixed", 0), ("scalar", 14), ("channel", 14)])
def test_swish_starts_as_silu_and_learns_its_beta(beta: Any, count: int) -> None:
    torch.manual_seed(0)
    plain, network = SwishUNet(widths=[8, 16]), SwishUNet(widths=[8, 16], beta=beta)
    network.load_state_dict(plain.state_dict(), strict=False)
    x = patches(plain, 2)
    torch.testing.assert_close(network.eval()(x), plain.eval()(x))
    betas = [m for m in network.modules() if type(m).__name__ == "Swish"]
    assert len(betas) == count * 6 // 14  # of two levels
    for module in betas:
        with torch.no_grad():
            module.beta.uniform_(0.5, 2)
        y = torch.randn(1, 1 if beta == "scalar" else len(module.beta), 3, 3)
        scale = module.beta[:, None, None]
        torch.testing.assert_close(module(y), F.silu(scale * y) / scale)


def test_a_residual_level_adds_the_projection_behind_the_activation() -> None:
    block = ConvBlock(3, 8, count=2, separable=True, project=True).double().eval()
    make_norms_real(block)
    state = block.state_dict()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    y = x
    for first, groups in ((0, 3), (4, 8)):
        y = conv(state, f"convs.{first}", y, padding=1, groups=groups)
        y = norm(state, f"convs.{first + 2}", conv(state, f"convs.{first + 1}", y)).relu()
    expected = y + norm(state, "project.1", conv(state, "project.0", x))
    torch.testing.assert_close(block(x), expected)
    assert expected.min() < 0


def test_a_residual_decoder_level_adds_what_came_up() -> None:
    level = HighResUp(16, count=1, separable=True, residual=True).eval()
    x, skip = torch.randn(1, 16, 3, 3), torch.randn(1, 8, 6, 6)
    grown = level.up(x)
    assert grown.shape == skip.shape
    expected = level.block(torch.cat([skip, grown], dim=1)) + grown
    torch.testing.assert_close(level(x, skip), expected)


@pytest.mark.parametrize("expansion", [1, 2, 6])
def test_the_inverted_residual_block_projects_without_activation(expansion: int) -> None:
    block = IRB(4, expansion).double().eval()
    make_norms_real(block)
    state = list(block.state_dict().items())
    convs = [t for _, t in state if t.ndim == 5]
    norms = [t for _, t in state if t.ndim == 1]  # weight, bias, mean, variance of each
    x = torch.randn(1, 4, 3, 4, 5, dtype=torch.float64)
    y = x
    for i, weight in enumerate(convs):
        y = F.conv3d(y, weight, padding=weight.shape[-1] // 2, groups=y.shape[1] // weight.shape[1])
        scale, shift, mean, variance = norms[4 * i : 4 * i + 4]
        y = F.batch_norm(y, mean, variance, scale, shift)
        if i + 1 < len(convs):
            y = y.relu()
    assert [tuple(w.shape[:2]) for w in convs[-2:]] == [(4 * expansion, 1), (4, 4 * expansion)]
    assert len(convs) == (2 if expansion == 1 else 3)
    torch.testing.assert_close(block(x), x + y)


def test_mfcr_adds_what_its_channel_attention_lets_through() -> None:
    module = MFCR(32).double().eval()
    make_norms_real(module)
    state = module.state_dict()
    x = torch.randn(2, 32, 9, 8, dtype=torch.float64)

    def cbr(name: str, x: Tensor, **options: int) -> Tensor:
        return norm(state, f"{name}.1", conv(state, f"{name}.0", x, **options)).relu()

    branches = [cbr("branches.0", x)]
    for i, dilation in ((1, 1), (2, 2), (3, 4)):
        branches.append(cbr(f"branches.{i}", x, padding=dilation, dilation=dilation))
    y = cbr("fuse", torch.cat(branches, dim=1))

    def mlp(x: Tensor) -> Tensor:
        return conv(state, "mlp.2", conv(state, "mlp.0", x).relu())

    weight = (mlp(F.adaptive_avg_pool2d(y, 1)) + mlp(F.adaptive_max_pool2d(y, 1))).sigmoid()
    torch.testing.assert_close(module(x), x + weight * y)


def test_lre_sees_no_edge_in_a_flat_skip_and_none_at_its_border() -> None:
    module = LRE(4).eval()
    flat = torch.full((1, 4, 6, 6), 3.0)
    torch.testing.assert_close(module.smooth(flat), flat)
    # in a ramp the mean is the value itself, but at the two ends half a step off
    ramp = torch.arange(6.0).expand(1, 4, 6, 6)
    edges = torch.zeros(6)
    edges[0], edges[-1] = -0.5, 0.5
    torch.testing.assert_close((ramp - module.smooth(ramp)), edges.expand(1, 4, 6, 6))


def test_lre_adds_texture_and_edges_where_the_decoder_looks() -> None:
    module = LRE(4).double().eval()
    make_norms_real(module)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    guide = torch.randn(1, 9, 6, 6, dtype=torch.float64)
    parts = [module.texture(x), module.edge(x - module.smooth(x))]
    maps = torch.stack([guide.mean(1), guide.max(1).values], dim=1)
    expected = x + module.attention(maps).sigmoid() * module.fuse(torch.cat(parts, dim=1))
    torch.testing.assert_close(module(x, guide), expected)


def test_masked_pooling_is_the_mean_over_the_lesion() -> None:
    features = torch.randn(2, 5, 4, 4)
    everywhere = torch.full((2, 1, 8, 8), 0.25)
    torch.testing.assert_close(_masked_mean(features, everywhere), features.mean((2, 3)))
    corner = torch.zeros(2, 1, 8, 8)
    corner[..., :4, 4:] = 1
    expected = features[..., :2, 2:].mean((2, 3))
    torch.testing.assert_close(_masked_mean(features, corner), expected)


def test_nmtnets_label_sees_the_mask_of_one_logit_as_of_two() -> None:
    torch.manual_seed(0)
    one, two = NMTNet().eval(), NMTNet(classes=2).eval()
    state = one.state_dict()
    for name in ("head.weight", "head.bias"):  # softmax over (0, l) is the sigmoid of l
        state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])
    two.load_state_dict(state)
    x = patches(one, 2)
    torch.testing.assert_close(two(x)["label"], one(x)["label"])


def test_the_encoder_taps_have_the_published_shapes(network: LightMuSeg) -> None:
    with torch.inference_mode():
        taps = network._taps(torch.zeros(1, 3, 64, 96))
    assert [tuple(t.shape[1:]) for t in taps] == [
        (c, 64 // f, 96 // f) for c, f in zip(CHANNELS, (2, 4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("classes", [1, 3])
def test_logits_have_the_size_of_the_patch(name: str, classes: int) -> None:
    with torch.device("meta"):
        network = NETWORKS[name](classes=classes).eval()
        size = [network.size_multiple, 3 * network.size_multiple, 2 * network.size_multiple]
        x = torch.empty(2, network.channels, *size[: network.ndim])
        output = network(x)
    mask = output["mask"] if isinstance(output, dict) else output
    assert mask.shape == (2, classes, *x.shape[2:])
    if isinstance(output, dict):
        assert set(output) == {"mask", "label"}
        assert output["label"].shape == (2, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_patches_of_a_batch_do_not_touch_each_other(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    make_norms_real(network)
    network.eval()
    batch = patches(network, 3)
    with torch.inference_mode():
        together = maps_of(network(batch))
        alone = [maps_of(network(patch[None])) for patch in batch]
    for i, logits in enumerate(together):
        parts = torch.cat([a[i] for a in alone])
        # the order of sums differs with the batch: 1e-5 of the range of the answer
        spread = float(logits.max() - logits.min())
        torch.testing.assert_close(logits, parts, rtol=0, atol=1e-5 * spread)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_all_parameters_but_the_unused(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    make_norms_real(network)
    assert_gradients_reach_all_but(network, network.unused)


def test_gradients_reach_the_side_outs_too() -> None:
    torch.manual_seed(0)
    network = LightMuSeg(classes=2, deep_supervision=True)
    make_norms_real(network)
    assert_gradients_reach_all_but(network, ("encoder.18.",))


@pytest.mark.parametrize("options", [{"beta": "scalar"}, {"beta": "channel"}])
def test_gradients_reach_every_beta(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert_gradients_reach_all_but(SwishUNet(widths=[8, 16], **options), ())


def assert_gradients_reach_all_but(network: SegmentationNetwork, unused: tuple[str, ...]) -> None:
    network.train()
    for module in network.modules():
        if isinstance(module, NORMS):  # with a batch's own mean, a bias before it has no effect
            module.eval()
    weighted = [(y * torch.randn_like(y)).sum() for y in maps_of(network(patches(network, 2)))]
    torch.stack(weighted).sum().backward()
    without = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {n for n, _ in network.named_parameters() if n.startswith(unused)}


@pytest.mark.parametrize(("name", "apart"), [("nmtnet", ()), ("mm3d_unet", ("up.", "head."))])
def test_the_label_trains_what_it_looks_at(name: str, apart: tuple[str, ...]) -> None:
    """In NMTNet that is everything, for it looks where the mask is; else the encoder."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    make_norms_real(network)
    network.eval()(patches(network, 2))["label"][:, 0].sum().backward()
    without = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {n for n, _ in network.named_parameters() if n.startswith(apart)}


def test_lightmuseg_trains_all_but_the_encoders_last_stage() -> None:
    network = LightMuSeg()
    used = {n: p for n, p in network.named_parameters() if not n.startswith(network.unused)}
    assert sum(p.numel() for p in used.values()) == 6_640_221


def test_deep_supervision_adds_three_maps_while_training() -> None:
    torch.manual_seed(0)
    plain, network = LightMuSeg(classes=2), LightMuSeg(classes=2, deep_supervision=True)
    network.load_state_dict(plain.state_dict(), strict=False)
    x = patches(plain, 2, times=2)  # norms need more than one value a channel
    with torch.no_grad():
        outputs = network(x)
        torch.testing.assert_close(outputs[0], plain(x))
        assert [o.shape for o in outputs] == [(2, 2, 64, 64)] * 4
        torch.testing.assert_close(network.eval()(x), plain.eval()(x))


def test_side_outs_are_upsampled_heads_of_the_decoder() -> None:
    torch.manual_seed(0)
    network = LightMuSeg(deep_supervision=True)
    seen: dict[str, Tensor] = {}
    for name in ("sideout2", "sideout3", "sideout4"):
        network.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, name=name: seen.update({name: output})
        )
    outputs = network(patches(network, 2, times=2))
    for name, factor, aux in zip(sorted(seen), (4, 8, 16), outputs[1:], strict=True):
        assert seen[name].shape == (2, 1, 64 // factor, 64 // factor)
        expected = F.interpolate(seen[name], scale_factor=factor, mode="bilinear")
        torch.testing.assert_close(aux, expected)


def test_msffm_is_what_its_description_says() -> None:
    torch.manual_seed(0)
    module = MSFFM(24).double()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float64)
    m = module.reduce_channel(
        torch.cat([module.scale1(x), module.scale2(x), module.scale3(x)], dim=1)
    )
    pooled = F.adaptive_avg_pool2d(m, 1)
    a = m * module.fc2(module.fc1(pooled).relu()).sigmoid()
    maps = torch.stack([a.mean(1), a.max(1).values], dim=1)
    expected = module.fusion_conv(a * module.spatialatt.conv(maps).sigmoid())
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-12)


def test_frfm_takes_the_skip_first() -> None:
    module = FRFM(8)
    with torch.no_grad():
        module.spatial_fusion.weight.zero_()
        module.spatial_fusion.weight[:, :8, 0, 0] = torch.eye(8)
    skip, decoded = torch.randn(2, 1, 8, 4, 4)
    weight = module.channel_fc((skip + decoded).mean((2, 3)))[:, :, None, None]
    torch.testing.assert_close(module(skip, decoded), weight * skip)


@pytest.mark.parametrize(
    ("name", "options", "multiple"),
    [
        ("lightmuseg", {}, 32),
        ("nmtnet", {}, 32),
        ("mm3d_unet", {}, 8),
        ("highres_unet", {}, 64),
        ("highres_unet", {"levels": 4}, 8),
        ("swish_unet", {}, 8),
        ("unet", {}, 16),
        ("unet", {"widths": [8, 16]}, 2),
        ("unet3d", {}, 8),
    ],
)
def test_a_side_that_does_not_divide_is_refused(
    name: str, options: dict[str, Any], multiple: int
) -> None:
    with torch.device("meta"):
        network = NETWORKS[name](**options).eval()
        assert network.size_multiple == multiple
        for axis in range(network.ndim):
            size = [2 * multiple] * network.ndim
            size[axis] += multiple // 2
            with pytest.raises(ValueError, match=f"multiples of {multiple}$"):
                network(torch.empty(1, network.channels, *size))


@pytest.mark.parametrize("name", NETWORKS)
def test_patches_of_other_axes_or_channels_are_refused(name: str) -> None:
    with torch.device("meta"):
        network = NETWORKS[name]().eval()
        channels, side = network.channels, network.size_multiple
        other = torch.empty(1, 4 - channels, *[side] * network.ndim)  # 1 for 3, 3 for 1
        flat = torch.empty(channels, *[side] * network.ndim)
        for x in (other, flat):
            with pytest.raises(ValueError, match=f"with {channels} channels"):
                network(x)


@pytest.mark.parametrize("network", [LightMuSeg, NMTNet])
def test_one_channel_is_seen_as_grey(network: type[LightMuSeg | NMTNet]) -> None:
    """Three equal channels, one channel replicated, and one with summed weights: one answer."""
    torch.manual_seed(0)
    colour, replicated = network().eval(), network(channels=1).eval()
    summed = network(channels=1, grey="sum").eval()
    state = colour.state_dict()
    replicated.load_state_dict(state)
    stem = "encoder.0.0.weight" if network is LightMuSeg else "encoder.conv1.weight"
    summed.load_state_dict({**state, stem: state[stem].sum(1, keepdim=True)})
    x = patches(replicated, 2)
    with torch.inference_mode():
        expected = maps_of(colour(x.expand(-1, 3, -1, -1)))
        for other in (replicated, summed):
            for a, b in zip(maps_of(other(x)), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lightmuseg", {"grey": "mean"}, "grey 'mean'"),
        ("swish_unet", {"beta": "learned"}, "beta 'learned'"),
        ("unet", {"widths": [64, 100]}, "each twice the one above"),
        ("unet", {"widths": [64]}, "two or more"),
        ("mm3d_unet", {"plan": "C"}, "plan 'C'"),
        ("mm3d_unet", {"bottleneck": True}, "plan B"),
        ("highres_unet", {"levels": 1}, "levels 1"),
        ("highres_unet", {"width": 0}, "width 0"),
        ("highres_unet", {"convs": [3, 2]}, "three counts"),
        ("highres_unet", {"convs": [3, 2.0, 3]}, "convs is"),
        ("highres_unet", {"width": 2**40}, ""),
        ("swish_unet", {"widths": [1, 2]}, "start at 2"),
        ("nmtnet", {"classes": 0}, "start at 1"),
        ("nmtnet", {"labels": -1}, "start at 1"),
        ("highres_unet", {"separable": "no"}, "separable is 'no', expected something like True"),
        ("unet", {"classes": True}, "classes is True"),
        ("unet3d", {"depth": 3}, "no option 'depth'; UNet3D has classes, channels"),
    ],
)
def test_options_that_make_no_network_are_refused(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=f"network_options: .*{message}"):
        create(make_bundle(tmp_path, network=name, network_options=options))


def test_a_bundle_gives_its_channels_to_the_network(tmp_path: Path) -> None:
    spec = InputSpec(
        mpp=0.5, channels=1, patch_size=(64, 64), overlap=(16, 16), mean=(0,), std=(1,)
    )
    network = create(make_bundle(tmp_path, network="highres_unet", input=spec))
    assert network.channels == 1
    bundle = make_bundle(tmp_path, input=spec, network_options={"channels": 3})
    with pytest.raises(BundleError, match=r"network_options has 3 channels, input has 1"):
        create(bundle)


@pytest.mark.parametrize("name", ["mm3d_unet", "unet3d"])
def test_volumes_take_three_sides(tmp_path: Path, name: str) -> None:
    options = {"network_options": {}, "network": name}
    with pytest.raises(BundleError, match="takes 3 multiples of 8"):
        create(make_bundle(tmp_path, **options))
    spec = InputSpec(mpp=0.5, patch_size=(16, 24, 32), overlap=(8, 8, 8))
    assert create(make_bundle(tmp_path, input=spec, **options)).ndim == 3


def test_build_refuses_a_patch_size_that_is_no_multiple(tmp_path: Path) -> None:
    spec = InputSpec(mpp=0.5, patch_size=(500, 500), overlap=(100, 100))
    with pytest.raises(BundleError, match="multiples of 32"):
        build(make_bundle(tmp_path, input=spec))


def authors_checkpoint(*, bias: bool, sideouts: bool) -> dict[str, torch.Tensor]:
    """A checkpoint as the authors' class writes it: other attention names, more tensors."""
    torch.manual_seed(3)
    state = {}
    for name, tensor in LightMuSeg().state_dict().items():
        tensor = torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        state[name.replace("spatialatt.conv.", "spatialatt.conv2d.")] = tensor
    for i in range(1, 6):
        if bias:
            state[f"mltslayer{i}.spatialatt.conv2d.bias"] = torch.rand(1)
    if sideouts:
        state["sideout4.conv1.conv.weight"] = torch.rand(24, 96, 3, 3)
        state["sideout2.conv2.bias"] = torch.rand(1)
    return state


@pytest.mark.parametrize("bias", [False, True])
def test_an_authors_checkpoint_loads(tmp_path: Path, *, bias: bool) -> None:
    state = authors_checkpoint(bias=bias, sideouts=True)
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    module = build(make_bundle(tmp_path, weights_path=tmp_path / "model.pt")).module
    loaded = module.state_dict()
    assert count_parameters(module) == 7_052_381 + (5 if bias else 0)
    for name, tensor in state.items():
        if not name.startswith("sideout"):
            ours = name.replace("spatialatt.conv2d.", "spatialatt.conv.")
            torch.testing.assert_close(loaded[ours], tensor)


def test_weights_without_the_unused_layers_load_and_are_upcast(tmp_path: Path) -> None:
    state = {
        n: t.half() if t.is_floating_point() else t
        for n, t in LightMuSeg().state_dict().items()
        if not n.startswith("encoder.18.") and not n.endswith("num_batches_tracked")
    }
    save_file(state, tmp_path / "model.safetensors")
    bundle = make_bundle(tmp_path, weights_path=tmp_path / "model.safetensors")
    built = build(bundle)
    assert built.batch_size is None
    assert not built.module.training
    assert {p.dtype for p in built.module.parameters()} == {torch.float32}
    name = "mltslayer3.scale2.weight"
    torch.testing.assert_close(built.module.state_dict()[name], state[name].float())


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    state = LightMuSeg().state_dict()
    state["decoder.stranger"] = state.pop("last_conv.bias")
    path = tmp_path / "model.safetensors"
    with pytest.raises(BundleError, match=r"missing last_conv\.bias; unexpected decoder\.stranger"):
        load_state(LightMuSeg(), state, path=path, unused=LightMuSeg.unused)


def test_weights_of_another_number_of_classes_are_refused_by_name(tmp_path: Path) -> None:
    save_file(LightMuSeg(classes=5).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match=r"last_conv\.weight"):
        build(make_bundle(tmp_path, weights_path=tmp_path / "model.safetensors"))


def test_a_checkpoint_that_holds_code_is_refused(tmp_path: Path) -> None:
    torch.save(LightMuSeg(), tmp_path / "model.pt")
    with pytest.raises(BundleError, match="cannot read weights"):
        read_state(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_of_noise_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    with pytest.raises(BundleError, match="cannot read weights"):
        read_state(tmp_path / name)


def test_a_bundle_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no weights"):
        build(make_bundle(tmp_path))


def test_an_unknown_network_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nnunet, decoder, exported, torchscript"):
        build(make_bundle(tmp_path, network="resnet"))


class Brightness(nn.Module):
    """One logit from the pixel's own brightness."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True) * 4 - 1


def test_a_torchscript_program_runs(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(Brightness()).save(str(path))
    built = build(make_bundle(tmp_path, network="torchscript", weights_path=path))
    patch = torch.rand(3, 3, 64, 64)
    assert built.batch_size is None
    torch.testing.assert_close(built.module(patch), Brightness()(patch))


@pytest.mark.parametrize("batch_size", [4, None])
def test_an_exported_program_runs_and_tells_its_batch_size(
    tmp_path: Path, batch_size: int | None
) -> None:
    dynamic = None if batch_size else {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    example = (torch.rand(4, 3, 64, 64),)
    program = torch.export.export(Brightness(), example, dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "model.pt2")
    bundle = make_bundle(tmp_path, network="exported", weights_path=tmp_path / "model.pt2")
    built = build(bundle)
    assert built.batch_size == batch_size
    patch = torch.rand(batch_size or 7, 3, 64, 64)
    torch.testing.assert_close(built.module(patch), Brightness()(patch))


def test_lightmuseg_itself_can_be_exported(tmp_path: Path, network: LightMuSeg) -> None:
    patch = torch.rand(2, 3, 64, 64)
    torch.export.save(torch.export.export(network, (patch,)), tmp_path / "model.pt2")
    bundle = make_bundle(tmp_path, network="exported", weights_path=tmp_path / "model.pt2")
    torch.testing.assert_close(build(bundle).module(patch), network(patch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["exported", "torchscript"])
def test_a_program_of_noise_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model.bin").write_bytes(b"no program" * 100)
    with pytest.raises(BundleError, match=f"as {kind}"):
        build(make_bundle(tmp_path, network=kind, weights_path=tmp_path / "model.bin"))
