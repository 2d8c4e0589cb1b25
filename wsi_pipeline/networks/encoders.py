"""Encoders with torchvision's state_dict names, so that its ImageNet weights load unchanged.

The published files are `mobilenet_v2-b0353104.pth`, which LightMuSeg's authors start from, and
`resnet18-f37072fd.pth`, under https://download.pytorch.org/models/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlparse

from torch import Tensor, nn

from wsi_pipeline.errors import BundleError
from wsi_pipeline.files.download import download
from wsi_pipeline.networks.base import conv_norm
from wsi_pipeline.networks.weights import load_state, read_state

Grey = Literal["replicate", "sum"]

# Sandler et al., "MobileNetV2", table 2: expansion t, channels c, repeats n, first stride s
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# layers of a block that has no expansion, and of one that has
OLDER_ROWS = {
    "0134": {"0": "0.0", "1": "0.1", "3": "1", "4": "2"},
    "013467": {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"},
}
# He et al., "Deep Residual Learning for Image Recognition", table 1: channels, first stride
RESNET18 = ((64, 1), (128, 2), (256, 2), (512, 2))


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise 3×3, project 1×1 without activation; MobileNetV2's block.

    Args:
        expansion: channels between, as a multiple of `inputs`; 1 leaves the expansion out.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_conv_relu6(inputs, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_relu6(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (N, outputs, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.is_residual else out


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a residual connection; ResNet18's block."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (N, outputs, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        total: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return total


class ResNet18(nn.Module):
    """ResNet18 without its classifier, Kaiming-initialised; 11,176,512 parameters."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inputs = 64
        for i, (outputs, stride) in enumerate(RESNET18, start=1):
            blocks = (
                BasicBlock(inputs, outputs, stride=stride),
                BasicBlock(outputs, outputs, stride=1),
            )
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            inputs = outputs
        _init_convolutions(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return five taps: 64 channels at 1/2, then 64, 128, 256, 512 at 1/4 to 1/32."""
        taps = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(taps[0])
        for i in range(1, len(RESNET18) + 1):
            x = self.get_submodule(f"layer{i}")(x)
            taps.append(x)
        return taps


def mobilenet_v2_features(channels: int = 3) -> nn.Sequential:
    """Return the 19 stages of MobileNetV2 (width 1.0), Kaiming-initialised."""
    stages: list[nn.Module] = [_conv_relu6(channels, 32, 3, stride=2)]
    inputs = 32
    for expansion, outputs, repeats, first_stride in MOBILENET_V2:
        for i in range(repeats):
            stride = first_stride if i == 0 else 1
            stages.append(InvertedResidual(inputs, outputs, stride=stride, expansion=expansion))
            inputs = outputs
    stages.append(_conv_relu6(inputs, 1280, 1))
    features = nn.Sequential(*stages)
    _init_convolutions(features)
    return features


def stem_channels(channels: int, grey: Grey) -> int:
    """Return the input channels of an encoder's first convolution.

    Args:
        grey: for one channel, "replicate" lets the encoder see it three times, as ImageNet's
            weights want it; "sum" gives the encoder one channel, whose ImageNet weights are the
            sum over the three: the same function, with fewer operations.
    """
    if grey not in get_args(Grey):
        raise ValueError(f"grey {grey!r} is none of {get_args(Grey)}")
    return 3 if channels == 1 and grey == "replicate" else channels


def load_imagenet(encoder: nn.Module, location: str | Path) -> None:
    """Load torchvision's published ImageNet weights into an encoder; return nothing.

    Args:
        encoder: What `mobilenet_v2_features` or `ResNet18` makes; with one channel, its first
            convolution takes the sum of the weights over the colours.
        location: A `.pth` or `.safetensors` file with torchvision's names, or its URL, which is
            fetched once into the user's cache. A URL's name ends with eight hex digits or more of
            the file's sha256, as those of torchvision do.

    Raises:
        BundleError: no such file, another digest, or other tensors.
    """
    path, url = Path(location), str(location)
    if "://" in url:
        named = re.search(r"-([0-9a-f]{8,64})$", Path(urlparse(url).path).stem)
        if named is None:
            raise BundleError(
                f"{location}: its name does not end with a sha256; fetch the file yourself and "
                "name its path"
            )
        path = download(url, named[1])
    state = present_names(read_state(path))
    # torchvision's MobileNetV2 is features and classifier, its ResNet has no such parts
    module = nn.ModuleDict({"features": encoder}) if isinstance(encoder, nn.Sequential) else encoder
    stem, weight = next((n, p) for n, p in module.named_parameters() if p.ndim == 4)
    if weight.shape[1] == 1 and stem in state and state[stem].ndim == 4:
        state[stem] = state[stem].sum(1, keepdim=True)
    load_state(module, state, path=path, unused=("classifier.", "fc."))


def present_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the names that MobileNetV2's blocks have in torchvision today.

    Up to its version 0.2, and in the implementations that it came from, a block was one row of
    layers, its activations counted.

    Example:
        >>> list(present_names({f"1.conv.{i}.weight": Tensor() for i in (0, 1, 3, 4)}))
        ['1.conv.0.0.weight', '1.conv.0.1.weight', '1.conv.1.weight', '1.conv.2.weight']
    """
    layers = {name: re.fullmatch(r"(.*\d\.conv)\.(\d)\.(\w+)", name) for name in state}
    blocks: dict[str, str] = {}
    for found in filter(None, layers.values()):
        blocks[found[1]] = "".join(sorted({*blocks.get(found[1], ""), found[2]}))
    renamed = {}
    for name, tensor in state.items():
        layer = layers[name]
        row = OLDER_ROWS.get(blocks[layer[1]]) if layer else None
        renamed[f"{layer[1]}.{row[layer[2]]}.{layer[3]}" if layer and row else name] = tensor
    return renamed


def _init_convolutions(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _conv_relu6(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layers = conv_norm(inputs, outputs, kernel, stride=stride, groups=groups, activation=nn.ReLU6)
    return nn.Sequential(*layers)
