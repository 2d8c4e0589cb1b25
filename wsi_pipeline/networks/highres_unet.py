"""A light U-Net for whole mammograms: deep, narrow, separable, with short residuals.

Mickael Tardy, Diana Mateus: "Lightweight U-Net for High-Resolution Breast Imaging", 2020,
https://arxiv.org/abs/2011.13698. The paper gives levels, first width and the four sizes, 600 M,
37 M, 4.6 M and 5.3 M; the options here give all four. Our reading, fitted to them: three
convolutions a level and two at the bottom, up-convolutions that halve the channels and are
separable too, where the residuals start, batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wsi_pipeline.networks.base import SegmentationNetwork, contract, conv_norm, expand


class ConvBlock(nn.Module):
    """Some 3×3 convolutions, each with batch norm and ReLU.

    Args:
        separable: each is a depthwise and a pointwise one.
        project: add a batch-normed 1×1 projection of the input.
    """

    def __init__(
        self, inputs: int, outputs: int, *, count: int, separable: bool, project: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in [inputs, *[outputs] * (count - 1)]:
            if separable:
                layers.append(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False))
            layers += conv_norm(width, outputs, 1 if separable else 3)
        self.convs = nn.Sequential(*layers)
        self.project = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (N, outputs, H, W)."""
        out: Tensor = self.convs(x)
        return out if self.project is None else out + self.project(x)


class Up(nn.Module):
    """Double the size, join the skip, convolve.

    Args:
        inputs: channels in; half of them come out.
        separable: all convolutions are, the transposed one too.
        residual: add the up-convolution's output to the block's.
    """

    def __init__(self, inputs: int, *, count: int, separable: bool, residual: bool) -> None:
        super().__init__()
        outputs = inputs // 2
        self.up = (
            nn.Sequential(
                nn.ConvTranspose2d(inputs, inputs, 2, stride=2, groups=inputs, bias=False),
                nn.Conv2d(inputs, outputs, 1),
            )
            if separable
            else nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        )
        self.block = ConvBlock(inputs, outputs, count=count, separable=separable, project=False)
        self.residual = residual

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the features, (N, inputs / 2, 2H, 2W)."""
        grown = self.up(x)
        out: Tensor = self.block(torch.cat([skip, grown], dim=1))
        return out + grown if self.residual else out


class HighResUNet(SegmentationNetwork):
    """The high-resolution U-Net; 5,343,962 parameters with 1 class.

    Args:
        width: channels at full size; each level below has twice as many.
        levels: resolutions, the bottom included.
        separable: depthwise and pointwise convolutions in place of dense ones.
        convs: convolutions of an encoder level, of the bottom, of a decoder level.
    """

    def __init__(
        self,
        *,
        classes: int = 1,
        channels: int = 1,
        width: int = 16,
        levels: int = 7,
        separable: bool = True,
        residual: bool = True,
        convs: Sequence[int] = (3, 2, 3),
    ) -> None:
        super().__init__(channels=channels, classes=classes)
        if width < 1 or levels < 2:
            raise ValueError(f"width {width} must be 1 or more, levels {levels} 2 or more")
        if len(convs) != 3 or min(convs) < 1:
            raise ValueError(f"convs {list(convs)} must be three counts of 1 or more")
        self.size_multiple = 2 ** (levels - 1)
        self.looks_at = f"down.{min(levels - 1, 4)}"
        widths = [width << level for level in range(levels)]
        encoder, bottom, decoder = convs
        counts = [encoder] * (levels - 1) + [bottom]
        self.down = nn.ModuleList(
            ConvBlock(inputs, outputs, count=count, separable=separable, project=residual)
            for inputs, outputs, count in zip([channels, *widths], widths, counts, strict=False)
        )
        self.up = nn.ModuleList(
            Up(inputs, count=decoder, separable=separable, residual=residual)
            for inputs in reversed(widths[1:])
        )
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, classes, H, W), of normalised patches, (N, channels, H, W)."""
        self.check_patches(x)
        # skips of 16 channels at full size to 512 at 1/32; 1024 at 1/64
        x, skips = contract(self.down, self.pool, x)
        out: Tensor = self.head(expand(self.up, x, skips))
        return out
