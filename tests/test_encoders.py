"""Encoders against torchvision where there is one, and against their papers everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks.cost import count_parameters
from wsi_pipeline.networks.encoders import ResNet18, load_imagenet, mobilenet_v2_features

State = dict[str, Tensor]


def lively_state(module: nn.Module) -> State:
    """Return random tensors for a module's names, with norms that are no identities."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = tensor
        elif tensor.ndim > 1:
            scale = (2 / tensor[0].numel()) ** 0.5
            state[name] = scale * torch.randn(tensor.shape, generator=generator)
        else:
            state[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
    return state


def imagenet_state(module: nn.Module) -> State:
    """Return tensors as torchvision publishes them: with a classifier, without counters."""
    state = {n: t for n, t in lively_state(module).items() if not n.endswith("tracked")}
    if isinstance(module, ResNet18):
        return {**state, "fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)}
    classifier = {
        "classifier.1.weight": torch.rand(1000, 1280),
        "classifier.1.bias": torch.rand(1000),
    }
    return {f"features.{n}": t for n, t in state.items()} | classifier


def conv_norm(state: State, conv: str, norm: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{conv}.weight"]
    groups = x.shape[1] // weight.shape[1]
    y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    statistics = (state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(y, *statistics)


def resnet18_taps(state: State, x: Tensor) -> list[Tensor]:
    """ResNet18 from tensors by torchvision's names: He et al., table 1 and figure 5."""
    x = conv_norm(state, "conv1", "bn1", x, stride=2).relu()
    taps = [x]
    x = F.max_pool2d(x, 3, 2, padding=1)
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = conv_norm(state, f"{name}.conv1", f"{name}.bn1", x, stride).relu()
            y = conv_norm(state, f"{name}.conv2", f"{name}.bn2", y)
            if stride == 2:
                x = conv_norm(state, f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
            x = (x + y).relu()
        taps.append(x)
    return taps


def mobilenet_v2_taps(state: State, x: Tensor) -> list[Tensor]:
    """MobileNetV2 from tensors by torchvision's names: Sandler et al., tables 1 and 2."""
    strides = [1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    x = F.relu6(conv_norm(state, "0.0", "0.1", x, stride=2))
    taps = [x]
    for i, stride in enumerate(strides, start=1):
        y, layer = x, 0
        if i > 1:
            y = F.relu6(conv_norm(state, f"{i}.conv.0.0", f"{i}.conv.0.1", y))
            layer = 1
        name = f"{i}.conv.{layer}"
        y = F.relu6(conv_norm(state, f"{name}.0", f"{name}.1", y, stride))
        y = conv_norm(state, f"{i}.conv.{layer + 1}", f"{i}.conv.{layer + 2}", y)
        x = x + y if x.shape == y.shape else y
        taps.append(x)
    return [*taps, F.relu6(conv_norm(state, "18.0", "18.1", x))]


def stages_of(features: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Return what each stage of MobileNetV2 gives."""
    taps = []
    for stage in features:
        x = stage(x)
        taps.append(x)
    return taps


def test_the_encoders_have_torchvisions_tensors() -> None:
    features, resnet = mobilenet_v2_features(), ResNet18()
    assert (len(features.state_dict()), count_parameters(features)) == (312, 2_223_872)
    assert (len(resnet.state_dict()), count_parameters(resnet)) == (120, 11_176_512)
    shapes = {n: tuple(t.shape) for n, t in resnet.state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.0.conv1.weight"] == (64, 64, 3, 3)
    assert shapes["layer2.0.downsample.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer4.1.bn2.running_var"] == (512,)
    assert "layer1.0.downsample.0.weight" not in shapes


@pytest.mark.parametrize(
    ("encoder", "stages", "oracle"),
    [
        (mobilenet_v2_features(), stages_of, mobilenet_v2_taps),
        (ResNet18(), lambda m, x: m(x), resnet18_taps),
    ],
    ids=["mobilenet_v2", "resnet18"],
)
def test_the_encoders_are_what_their_papers_say(
    encoder: nn.Module,
    stages: Callable[[nn.Module, Tensor], list[Tensor]],
    oracle: Callable[[State, Tensor], list[Tensor]],
) -> None:
    state = lively_state(encoder)
    encoder.load_state_dict(state)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found, expected = stages(encoder.eval(), x), oracle(state, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(float(t.std()) > 0 for t in expected)


def test_mobilenet_v2_equals_torchvisions_where_that_is_installed() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is no dependency")
    theirs = models.mobilenet_v2(weights=None).features.eval()
    theirs.load_state_dict(lively_state(theirs))
    ours = mobilenet_v2_features().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(stages_of(ours, x), stages_of(theirs, x))


def test_resnet18_equals_torchvisions_where_that_is_installed() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is no dependency")
    theirs = models.resnet18(weights=None).eval()
    theirs.load_state_dict(lively_state(theirs))
    ours = ResNet18().eval()
    ours.load_state_dict({n: t for n, t in theirs.state_dict().items() if not n.startswith("fc.")})
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = [theirs.relu(theirs.bn1(theirs.conv1(x)))]
        y = theirs.maxpool(expected[0])
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            y = layer(y)
            expected.append(y)
        torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize("make", [mobilenet_v2_features, ResNet18])
def test_random_weights_keep_the_scale_of_the_signal(make: Callable[[], nn.Module]) -> None:
    """Kaiming's rule, fan out: the variance of a convolution's weights is 2 / (outputs · k²)."""
    torch.manual_seed(0)
    for module in make().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            outputs, _, height, width = module.weight.shape
            expected = 2 / (outputs * height * width)
            assert float(module.weight.detach().var()) == pytest.approx(expected, rel=0.1)


@pytest.fixture(params=[mobilenet_v2_features, ResNet18], ids=["mobilenet_v2", "resnet18"])
def make(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    """Return the maker of each encoder."""
    return request.param


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_imagenet_weights_load_without_their_classifier(
    tmp_path: Path, make: Callable[..., nn.Module], suffix: str
) -> None:
    encoder = make()
    state, path = imagenet_state(encoder), tmp_path / f"imagenet{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    load_imagenet(encoder, path)
    expected = lively_state(encoder)
    loaded = encoder.state_dict()
    assert {n for n in expected if n.endswith("weight")}
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_one_channel_takes_the_sum_over_the_colours(
    tmp_path: Path, make: Callable[..., nn.Module]
) -> None:
    colour, grey = make(), make(1)
    torch.save(imagenet_state(colour), tmp_path / "imagenet.pth")
    load_imagenet(colour, tmp_path / "imagenet.pth")
    load_imagenet(grey, tmp_path / "imagenet.pth")
    x = torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        expected = colour.eval()(x.expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, make: Callable[..., nn.Module]) -> None:
    encoder = make()
    state = imagenet_state(encoder)
    first = next(iter(state))
    torch.save(
        {n: t for n, t in state.items() if n != first} | {"stranger": torch.ones(1)},
        tmp_path / "a.pth",
    )
    with pytest.raises(BundleError, match=f"missing {first}; unexpected stranger"):
        load_imagenet(encoder, tmp_path / "a.pth")
    torch.save({**state, first: state[first][:5]}, tmp_path / "b.pth")
    with pytest.raises(BundleError, match=first):
        load_imagenet(encoder, tmp_path / "b.pth")
    with pytest.raises(BundleError, match=first):
        load_imagenet(make(4), write(tmp_path / "c.pth", state))
    broken = {**state, first: torch.full_like(state[first], float("inf"))}
    with pytest.raises(
        BundleError, match=r"d\.pth: .* holds whole numbers, or values that are not finite"
    ):
        load_imagenet(make(), write(tmp_path / "d.pth", broken))


def test_weights_of_the_other_encoder_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "resnet.pth", imagenet_state(ResNet18()))
    with pytest.raises(BundleError, match="missing features"):
        load_imagenet(mobilenet_v2_features(), path)


def write(path: Path, state: State) -> Path:
    torch.save(state, path)
    return path


def test_a_date_in_the_name_of_a_file_is_no_digest(tmp_path: Path) -> None:
    encoder = ResNet18()
    load_imagenet(encoder, write(tmp_path / "resnet18-20240101.pth", imagenet_state(encoder)))


# a file: URL needs no network; the user's cache is found through XDG_CACHE_HOME
def test_a_url_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoder = ResNet18()
    path = write(tmp_path / "resnet18.pth", imagenet_state(encoder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(tmp_path / "resnet18-11111111.pth")
    with pytest.raises(BundleError, match=f"has sha256 {digest}, expected 11111111"):
        load_imagenet(encoder, path.as_uri())
    path = path.rename(tmp_path / f"resnet18-{digest[:8]}.pth")
    url = path.as_uri()
    load_imagenet(encoder, url)
    path.rename(tmp_path / "resnet18.pth")
    load_imagenet(encoder, url)
    with pytest.raises(BundleError, match="does not end with a sha256"):
        load_imagenet(encoder, (tmp_path / "resnet18.pth").as_uri())


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing-00000000\.pth"):
        load_imagenet(ResNet18(), tmp_path / "nothing-00000000.pth")
