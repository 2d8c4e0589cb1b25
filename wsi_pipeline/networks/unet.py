"""U-Nets: a light one with Swish, the plain one it is measured against, and the 3-D U-Net.

`SwishUNet` and `UNet` are the light and the base network of "A Lightweight Model Approach For
Breast CT Segmentation", https://github.com/Chelsiehi/A-Lightweight-Model-Approach-For-Breast-CT-Segmentation;
names follow its checkpoints. The text claims a Swish with a learned β, its counts hold none: β is
an option. Our reading: logits come out where the authors apply a sigmoid per channel, and sides
that would need padding are refused.

`UNet3D` is Çiçek et al.: "3D U-Net: Learning Dense Volumetric Segmentation from Sparse
Annotation", MICCAI 2016, https://arxiv.org/abs/1606.06650, with padded convolutions so that the
output has the size of the input, which is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from wsi_pipeline.networks.base import SegmentationNetwork, Up, contract, conv_norm, expand

Beta = Literal["fixed", "scalar", "channel"]
STAGES_3D = ((32, 64), (64, 128), (128, 256), (256, 512))
"""Channels after the first and second convolution of the 3-D U-Net's stages, full size first."""


class Swish(nn.Module):
    """x · sigmoid(βx) with a learned β, Ramachandran et al., https://arxiv.org/abs/1710.05941.

    Args:
        count: Number of βs, one for all channels or one a channel; they start at 1.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation, (N, C, H, W)."""
        return x * torch.sigmoid(self.beta[:, None, None] * x)


class DoubleConv(nn.Module):
    """Two 3×3 convolutions, each with batch norm and activation."""

    def __init__(
        self, inputs: int, middle: int, outputs: int, activation: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, middle, 3, padding=1),
            nn.BatchNorm2d(middle),
            activation(middle),
            nn.Conv2d(middle, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            activation(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (N, outputs, H, W)."""
        out: Tensor = self.double_conv(x)
        return out


class Down(nn.Module):
    """Halve the size, then convolve."""

    def __init__(self, conv: DoubleConv) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), conv)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (N, C, H / 2, W / 2)."""
        out: Tensor = self.maxpool_conv(x)
        return out


class _PlanarUNet(SegmentationNetwork):
    """What the base and the light U-Net share; `squeeze` divides the channels between."""

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        widths: Sequence[int],
        squeeze: int,
        activation: Callable[[int], nn.Module],
    ) -> None:
        super().__init__(channels=channels, classes=classes)
        if len(widths) < 2 or any(below != 2 * above for above, below in pairwise(widths)):
            raise ValueError(f"widths {list(widths)} must be two or more, each twice the one above")
        if widths[0] < squeeze:
            raise ValueError(f"widths {list(widths)} must start at {squeeze} or more")

        def conv(inputs: int, outputs: int) -> DoubleConv:
            return DoubleConv(inputs, outputs // squeeze, outputs, activation)

        self.depth = len(widths) - 1
        self.size_multiple = 2**self.depth
        self.looks_at = f"down{min(self.depth, 4)}"
        self.inc = conv(channels, widths[0])
        for level, (above, width) in enumerate(pairwise(widths), start=1):
            self.add_module(f"down{level}", Down(conv(above, width)))
        for level, (width, below) in reversed(list(enumerate(pairwise(widths)))):
            grow = nn.ConvTranspose2d(below, width, 2, stride=2)
            self.add_module(_up_name(level), Up(grow, conv(below, width)))
        self.outc = nn.Conv2d(widths[0], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, classes, H, W), of normalised patches, (N, channels, H, W)."""
        self.check_patches(x)
        # full size first
        skips: list[Tensor] = []
        x = self.inc(x)
        for level in range(1, self.depth + 1):
            skips.append(x)
            x = self.get_submodule(f"down{level}")(x)
        for level in reversed(range(self.depth)):
            x = self.get_submodule(_up_name(level))(x, skips.pop())
        out: Tensor = self.outc(x)
        return out


class UNet(_PlanarUNet):
    """The base U-Net; 31,043,586 parameters with 2 classes.

    Args:
        widths: channels of each level, from full size down; each doubles the one above.
    """

    def __init__(
        self,
        *,
        classes: int = 2,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
    ) -> None:
        def relu(width: int) -> nn.Module:
            return nn.ReLU(inplace=True)

        super().__init__(
            classes=classes, channels=channels, widths=widths, squeeze=1, activation=relu
        )


class SwishUNet(_PlanarUNet):
    """The light U-Net: no bottom level, half the channels between, Swish; 4,197,986 parameters.

    Args:
        widths: channels of each level, from full size down; each doubles the one above.
        beta: β of the Swish: "fixed" at 1, as the paper's counts have it, or learned, one "scalar"
            for each activation or one for each "channel".
    """

    def __init__(
        self,
        *,
        classes: int = 2,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        beta: Beta = "fixed",
    ) -> None:
        if beta not in get_args(Beta):
            raise ValueError(f"beta {beta!r} is none of {get_args(Beta)}")

        def swish(width: int) -> nn.Module:
            if beta == "fixed":
                return nn.SiLU(inplace=True)
            return Swish(1 if beta == "scalar" else width)

        super().__init__(
            classes=classes, channels=channels, widths=widths, squeeze=2, activation=swish
        )


class UNet3D(SegmentationNetwork):
    """The 3-D U-Net; 19,073,730 parameters with 2 classes."""

    ndim: ClassVar[int] = 3
    size_multiple = 8
    looks_at = "down.3"

    def __init__(self, *, classes: int = 2, channels: int = 1) -> None:
        super().__init__(channels=channels, classes=classes)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        inputs = channels
        for middle, outputs in STAGES_3D:
            self.down.append(_double_conv3d(inputs, middle, outputs))
            inputs = outputs
        for _, width in reversed(STAGES_3D[:-1]):
            grow = nn.ConvTranspose3d(inputs, inputs, 2, stride=2)
            self.up.append(Up(grow, _double_conv3d(width + inputs, width, width)))
            inputs = width
        self.pool = nn.MaxPool3d(2)
        self.head = nn.Conv3d(inputs, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, classes, D, H, W), of normalised patches, (N, channels, D, H, W)."""
        self.check_patches(x)
        # skips of 64 channels at full size, 128 at 1/2, 256 at 1/4; 512 at 1/8
        x, skips = contract(self.down, self.pool, x)
        out: Tensor = self.head(expand(self.up, x, skips))
        return out


def _up_name(level: int) -> str:
    # the authors' names end with up4, however many there are
    return f"up{4 - level}"


def _double_conv3d(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    first = conv_norm(inputs, middle, 3, ndim=3, bias=True)
    return nn.Sequential(*first, *conv_norm(middle, outputs, 3, ndim=3, bias=True))
