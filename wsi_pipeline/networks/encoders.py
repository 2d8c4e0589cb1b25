"""Encoders with torchvision's state_dict names, so that its ImageNet weights load unchanged."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from wsi_pipeline.networks.weights import load_weights

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


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise 3×3, project 1×1 without activation; MobileNetV2's block.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the depthwise convolution.
        expansion: channels between, as a multiple of `inputs`; 1 leaves the expansion out.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_conv_bn_relu6(inputs, hidden, kernel=1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (N, outputs, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.is_residual else out


def mobilenet_v2_features(channels: int = 3) -> nn.Sequential:
    """Return the 19 stages of MobileNetV2 (width 1.0), Kaiming-initialised.

    Args:
        channels: of the input.
    """
    stages: list[nn.Module] = [_conv_bn_relu6(channels, 32, kernel=3, stride=2)]
    inputs = 32
    for expansion, outputs, repeats, first_stride in MOBILENET_V2:
        for i in range(repeats):
            stride = first_stride if i == 0 else 1
            stages.append(InvertedResidual(inputs, outputs, stride=stride, expansion=expansion))
            inputs = outputs
    stages.append(_conv_bn_relu6(inputs, 1280, kernel=1))
    features = nn.Sequential(*stages)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return features


def load_imagenet(features: nn.Sequential, path: Path) -> None:
    """Load torchvision's published MobileNetV2 weights into `features`; return nothing.

    Args:
        features: as `mobilenet_v2_features` makes them.
        path: a `.pth` or `.safetensors` file with torchvision's names.

    Raises:
        BundleError: the file holds other tensors.
    """
    load_weights(nn.ModuleDict({"features": features}), path, unused=("classifier.",))


def _conv_bn_relu6(
    inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )
