"""The inference form answers as the plain network does, with less."""

import platform

import numpy as np
import pytest
import torch
from skimage.data import immunohistochemistry
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.networks import NETWORKS, build
from wsi_pipeline.networks.cost import count_macs, count_parameters
from wsi_pipeline.networks.fold import for_inference

DEMO = "models/lightmuseg-bcss-demo"


def settled(network: nn.Module) -> nn.Module:
    """Give the batch norms statistics and weights that are not the neutral ones."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            n = module.num_features
            module.running_mean = torch.randn(n, generator=generator) * 0.1
            module.running_var = torch.rand(n, generator=generator) + 0.5
            module.weight.data = torch.rand(n, generator=generator) + 0.5
            module.bias.data = torch.randn(n, generator=generator) * 0.1
    return network.eval()


def masks(output):
    return (
        output
        if isinstance(output, torch.Tensor)
        else torch.cat([v.flatten(1) for v in output.values()], dim=1)
    )


def small_input(network: nn.Module, name: str) -> torch.Tensor:
    channels = 1 if name in ("mm3d_unet", "unet3d", "highres_unet") else 3
    side = network.size_multiple * (2 if network.size_multiple < 64 else 1)
    return torch.randn(1, channels, *[side] * network.ndim)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_keeps_its_answer(name):
    torch.manual_seed(0)
    options = {"width": 4} if name == "highres_unet" else {}
    network = settled(NETWORKS[name](classes=2, **options))
    sample = small_input(network, name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.inference_mode():
        plain, folded = masks(network(sample)), masks(for_inference(network)(sample))
    scale = plain.abs().max()
    assert torch.allclose(folded, plain, atol=float(1e-5 * scale), rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not [m for m in for_inference(network).modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize(
    ("classes", "parameters", "macs"), [(1, 5_147_509, 4.011e9), (5, 5_148_089, 4.049e9)]
)
def test_counts_are_those_of_the_derivation(classes, parameters, macs):
    """networks specification, exact inference form: all three rewritings."""
    folded = for_inference(NETWORKS["lightmuseg"](classes=classes))
    assert count_parameters(folded) == parameters
    assert count_macs(folded, (3, 512, 512)) == pytest.approx(macs, rel=1e-3)


def tissue(bundle) -> torch.Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(immunohistochemistry())).permute(2, 0, 1)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (bundle.input.mean, bundle.input.std))
    side = bundle.input.patch_size[0]
    whole = (pixels.float() / 255 - mean) / std
    return torch.stack([whole[:, y : y + side, x : x + side] for y in (0, 256) for x in (0, 256)])


def test_a_trained_bundle_on_real_tissue_in_full_precision():
    bundle = load_bundle(DEMO)
    network, patches = build(bundle).module, tissue(bundle)
    with torch.inference_mode():
        plain, folded = network(patches), for_inference(network)(patches)
    # Rounding grows with the logits, which training makes as large as it likes.
    assert (plain.sigmoid() - folded.sigmoid()).abs().max() < 1e-5


def test_a_trained_bundle_on_real_tissue_in_half_the_bits():
    bundle = load_bundle(DEMO)
    network, patches = build(bundle).module, tissue(bundle)[:1]
    half = for_inference(network, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain, lower = network(patches), half(patches.bfloat16())
    assert ((plain > 0) == (lower > 0)).float().mean() >= 0.999


def test_what_is_never_called_is_gone_and_the_rest_is_not():
    network = NETWORKS["lightmuseg"](classes=2, deep_supervision=True)
    folded = for_inference(network)
    names = [name for name, _ in folded.named_parameters()]
    assert not [n for n in names if n.startswith(("encoder.18.", "sideout"))]
    assert [n for n in names if n.startswith("encoder.17.")]


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="plain elsewhere")
@pytest.mark.parametrize(
    ("name", "left"),
    # the gates' ReLUs; those behind sums and before them; none
    [("lightmuseg", 9), ("nmtnet", 18), ("swish_unet", 0), ("mm3d_unet", 0)],
)
def test_a_convolution_and_its_activation_are_one_call_on_cpus(monkeypatch, name, left):
    torch.manual_seed(0)
    network = settled(NETWORKS[name](classes=2))
    sample, fused = small_input(network, name), for_inference(network)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    plain = for_inference(network)
    with torch.inference_mode(), Calls() as calls:
        answer = masks(fused(sample))
    activations = [n for n in calls.names if n.startswith(("relu", "hardtanh", "silu"))]
    assert (len(activations), {"conv2d", "conv3d"} & {*calls.names}) == (left, set())
    # the weights were put in order for the patch before
    other = torch.cat([sample] * 2, dim=2)
    with torch.inference_mode(), Calls() as calls:
        pairs = [(answer, masks(plain(sample))), (masks(fused(other)), masks(plain(other)))]
    assert {"conv2d", "conv3d"} & {*calls.names}
    for one, two in pairs:
        assert torch.allclose(one, two, atol=float(1e-5 * two.abs().max()), rtol=0)
