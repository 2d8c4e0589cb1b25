from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from wsi_pipeline.bundle import Bundle, ClassInfo, InputSpec
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks import build, create
from wsi_pipeline.networks.encoders import load_imagenet, mobilenet_v2_features
from wsi_pipeline.networks.lightmuseg import CHANNELS, FRFM, MSFFM, LightMuSeg
from wsi_pipeline.networks.weights import load_weights, read_state


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


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def network() -> LightMuSeg:
    """A network in eval mode whose norms have seen data, so that none of them is an identity."""
    torch.manual_seed(0)
    network = LightMuSeg(classes=2)
    with torch.no_grad():
        network(torch.randn(4, 3, 64, 64))
    return network.eval()


# the published 7.05 M, per number of classes: networks.md 1.6
@pytest.mark.parametrize(
    ("classes", "count"), [(1, 7_052_381), (2, 7_052_526), (3, 7_052_671), (5, 7_052_961)]
)
def test_lightmuseg_has_the_published_parameter_count(classes: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(LightMuSeg(classes=classes)) == count


def test_lightmuseg_parts_have_the_published_counts() -> None:
    network = LightMuSeg()
    parts = {
        "encoder": parameters(network.encoder[:18]),
        "unused": parameters(network.encoder[18]),
        "msffm": [parameters(getattr(network, f"mltslayer{i}")) for i in range(1, 6)],
        "up": [parameters(getattr(network, f"s{i}_up_conv")) for i in (5, 4, 3, 2)],
        "frfm": [parameters(getattr(network, n)) for n in ("lca45", "lca34", "lca23", "lca12")],
        "last": parameters(network.last_conv),
    }
    assert parts == {
        "encoder": 1_811_712,
        "unused": 412_160,
        "msffm": [10_310, 23_000, 40_746, 364_730, 4_046_898],
        "up": [276_768, 27_744, 6_984, 3_504],
        "frfm": [23_040, 2_560, 1_440, 640],
        "last": 145,
    }


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


def test_the_encoder_taps_have_the_published_shapes(network: LightMuSeg) -> None:
    with torch.inference_mode():
        taps = network._taps(torch.zeros(1, 3, 64, 96))
    assert [tuple(t.shape[1:]) for t in taps] == [
        (c, 64 // f, 96 // f) for c, f in zip(CHANNELS, (2, 4, 8, 16, 32), strict=True)
    ]


def test_the_encoder_equals_torchvision_where_that_is_installed() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is no dependency")
    theirs = models.mobilenet_v2(weights=None).features.eval()
    ours = mobilenet_v2_features().eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(image), theirs(image))


def test_logits_have_the_size_of_the_patch(network: LightMuSeg) -> None:
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, 64, 96)).shape == (2, 2, 64, 96)


def test_patches_of_a_batch_do_not_touch_each_other(network: LightMuSeg) -> None:
    batch = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together = network(batch)
        alone = torch.cat([network(patch[None]) for patch in batch])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_gradients_reach_all_parameters_but_the_unused() -> None:
    torch.manual_seed(0)
    network = LightMuSeg()
    # the norms of the encoder's last stage need more than one value a channel
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    without = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    unused = {n for n, _ in network.named_parameters() if n.startswith("encoder.18.")}
    assert without == unused
    touched = sum(p.numel() for n, p in network.named_parameters() if n not in unused)
    assert touched == 6_640_221


# 24 channels are computed composed, 160 part by part
@pytest.mark.parametrize("channels", [24, 160])
def test_msffm_is_what_its_description_says(channels: int) -> None:
    torch.manual_seed(0)
    module = MSFFM(channels).double()
    x = torch.randn(2, channels, 9, 7, dtype=torch.float64)
    m = module.reduce_channel(
        torch.cat([module.scale1(x), module.scale2(x), module.scale3(x)], dim=1)
    )
    pooled = functional.adaptive_avg_pool2d(m, 1)
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


@pytest.mark.parametrize("size", [(64, 80), (33, 32)])
def test_a_patch_that_is_no_multiple_of_32_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        LightMuSeg().eval()(torch.zeros(1, 3, *size))


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
    assert parameters(module) == 7_052_381 + (5 if bias else 0)
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
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match=r"missing last_conv\.bias; unexpected decoder\.stranger"):
        load_weights(LightMuSeg(), tmp_path / "model.safetensors", unused=LightMuSeg.unused)


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
    with pytest.raises(BundleError, match=r"lightmuseg, .*unet3d, exported, torchscript"):
        build(make_bundle(tmp_path, network="resnet"))


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="network_options"):
        create(make_bundle(tmp_path, network_options={"depth": 3}))


def test_imagenet_weights_load_without_their_classifier(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = mobilenet_v2_features()
    state = {
        f"features.{n}": t
        for n, t in source.state_dict().items()
        if not n.endswith("num_batches_tracked")
    }
    state |= {"classifier.1.weight": torch.rand(1000, 1280), "classifier.1.bias": torch.rand(1000)}
    torch.save(state, tmp_path / "mobilenet_v2.pth")
    target = mobilenet_v2_features()
    load_imagenet(target, tmp_path / "mobilenet_v2.pth")
    torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_the_encoder_has_torchvisions_tensors() -> None:
    features = mobilenet_v2_features()
    assert len(features.state_dict()) == 312
    assert parameters(features) == 2_223_872


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
