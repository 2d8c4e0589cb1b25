"""The U-Nets that nnU-Net plans, all folds of a model as one network.

Isensee et al.: "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation", Nature Methods 18, 203, 2021. `PlainConvUNet` and `ResidualEncoderUNet` of
github.com/MIC-DKFZ/dynamic-network-architectures by the names of their tensors, but for those that
they hold twice and for the heads of deep supervision.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn

from wsi_pipeline.networks.base import SegmentationNetwork

Sides: TypeAlias = tuple[int, ...]
Stage = tuple[int, Sides, Sides, int]
"""Channels, kernel, stride and how many convolutions or blocks."""
Conv: TypeAlias = "partial[nn.Sequential]"
LAYERS: dict[int, tuple[type[nn.Module], ...]] = {
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.AvgPool2d, nn.InstanceNorm2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.AvgPool3d, nn.InstanceNorm3d, nn.BatchNorm3d),
}
"""Convolution, its reverse, mean, norm of instances and of batches by the axes of a patch."""


class NNUNet(SegmentationNetwork):
    """The mean logits of one or more U-Nets of a kind.

    Args:
        folds: U-Nets, each with weights of its own.
        features: channels of each stage, from full size down.
        kernels: of the convolutions of each stage, `ndim` numbers a stage.
        strides: likewise, by which a stage is coarser than the one above.
        blocks: convolutions of each stage of the encoder, or residual blocks.
        decoder: convolutions of each stage of the decoder, from the bottom up.
        residual: whether the encoder is `ResidualEncoderUNet`'s.
        batch_norm: whether norms are of batches, not of instances.
        zscore: whether each patch is brought to mean 0 and deviation 1, channel by channel.
    """

    def __init__(
        self,
        *,
        classes: int = 2,
        channels: int = 3,
        ndim: int = 2,
        folds: int = 1,
        features: Sequence[int] = (32, 64, 128, 256, 320),
        kernels: Sequence[int] = (3, 3) * 5,
        strides: Sequence[int] = (1, 1, 2, 2, 2, 2, 2, 2, 2, 2),
        blocks: Sequence[int] = (2,) * 5,
        decoder: Sequence[int] = (2,) * 4,
        residual: bool = False,
        batch_norm: bool = False,
        zscore: bool = False,
    ) -> None:
        super().__init__(channels=channels, classes=classes)
        n = len(features)
        lengths = tuple(map(len, (kernels, strides, blocks, decoder)))
        if ndim not in (2, 3) or lengths != (ndim * n, ndim * n, n, n - 1):
            raise ValueError(f"{n} stages in {ndim} dimensions: other lists do not fit these")
        # Of each other network it is the class's own.
        self.ndim = ndim  # type: ignore[misc]
        self.sizes = tuple(math.prod(strides[axis::ndim]) for axis in range(ndim))
        self.size_multiple = math.lcm(*self.sizes)
        self.looks_at = f"nets.0.encoder.stages.{min(n - 1, 4)}"
        self.zscore = zscore
        conv: Conv = partial(_conv, batch_norm=batch_norm)
        kernel, step = (
            [tuple(flat[i : i + ndim]) for i in range(0, len(flat), ndim)]
            for flat in (kernels, strides)
        )
        stages = list(zip(features, kernel, step, blocks, strict=True))
        self.nets = nn.ModuleList(
            _UNet(conv, channels, classes, stages, decoder, residual=residual) for _ in range(folds)
        )

    @property
    def multiples(self) -> tuple[int, ...]:
        """Return what the sides of a patch are multiples of, axis by axis."""
        return self.sizes

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, classes, *patch), of normalised patches, (N, channels, *patch)."""
        self.check_patches(x)
        if self.zscore:
            axes = tuple(range(2, x.ndim))
            x = x - x.mean(axes, keepdim=True)
            x = x / x.std(axes, correction=0, keepdim=True).clamp(min=1e-8)
        total = torch.zeros((), device=x.device)
        for net in self.nets:
            total = total + net(x)
        return total / len(self.nets)


def _conv(
    inputs: int, outputs: int, kernel: Sides, stride: int | Sides = 1, *,
    batch_norm: bool, bias: bool = True, nonlin: bool = True,
) -> nn.Sequential:  # fmt: skip
    """Return a convolution, its norm and, unless it is left out, its activation."""
    conv, _, _, *norms = LAYERS[len(kernel)]
    padding = tuple((side - 1) // 2 for side in kernel)
    layers = OrderedDict[str, nn.Module](
        conv=conv(inputs, outputs, kernel, stride, padding, bias=bias),
        norm=norms[batch_norm](outputs, affine=True),
    )
    if nonlin:
        layers["nonlin"] = nn.LeakyReLU(inplace=True)
    return nn.Sequential(layers)


class _Residual(nn.Module):
    """Two convolutions beside a skip that is pooled and projected where it must be (ResNet-D)."""

    def __init__(self, conv: Conv, inputs: int, outputs: int, kernel: Sides, stride: Sides) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, kernel, stride)
        self.conv2 = conv(outputs, outputs, kernel, nonlin=False)
        self.nonlin2, self.skip = nn.LeakyReLU(inplace=True), nn.Sequential()
        if max(stride) > 1:
            self.skip.append(LAYERS[len(stride)][2](stride, stride))
        if inputs != outputs:
            self.skip.append(conv(inputs, outputs, (1,) * len(kernel), bias=False, nonlin=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (N, outputs, *size)."""
        out: Tensor = self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))
        return out


class _UNet(nn.Module):
    """One U-Net; the first convolution of a stage has its stride."""

    def __init__(
        self, conv: Conv, channels: int, classes: int, stages: Sequence[Stage],
        decoder: Sequence[int], *, residual: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        first, kernel, _, _ = stages[0]
        one, inputs, down = (1,) * len(kernel), channels, nn.Sequential()
        head, grow, *_ = LAYERS[len(kernel)]

        def convs(inputs: int, width: int, kernel: Sides, step: Sides, count: int) -> nn.Sequential:
            rest = (conv(width, width, kernel) for _ in range(count - 1))
            every = nn.Sequential(conv(inputs, width, kernel, step), *rest)
            return nn.Sequential(OrderedDict(convs=every))

        self.encoder = nn.ModuleDict()
        if residual:
            self.encoder["stem"] = convs(channels, first, kernel, one, 1)
            inputs = first
        for width, kernel, step, count in stages:
            if residual:
                rest = (_Residual(conv, width, width, kernel, one) for _ in range(count - 1))
                every = nn.Sequential(_Residual(conv, inputs, width, kernel, step), *rest)
                down.append(nn.Sequential(OrderedDict(blocks=every)))
            else:
                down.append(nn.Sequential(convs(inputs, width, kernel, step, count)))
            inputs = width
        self.encoder["stages"] = down
        ups, ways = nn.ModuleList(), nn.ModuleList()
        for (below, above), count in zip(pairwise(reversed(stages)), decoder, strict=True):
            width, kernel, _, _ = above
            ups.append(grow(below[0], width, below[2], below[2]))
            ways.append(convs(2 * width, width, kernel, one, count))
        # The last head alone predicts; the others were there to train.
        heads = nn.ModuleList([head(first, classes, 1)])
        self.decoder = nn.ModuleDict({"transpconvs": ups, "stages": ways, "seg_layers": heads})

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, classes, *size)."""
        if "stem" in self.encoder:
            x = self.encoder["stem"](x)
        skips: list[Tensor] = [x := stage(x) for stage in self.encoder["stages"].children()]
        skips.pop()
        ups, ways, heads = (list(part.children()) for part in self.decoder.values())
        for up, stage in zip(ups, ways, strict=True):
            x = stage(torch.cat([up(x), skips.pop()], 1))
        out: Tensor = heads[0](x)
        return out
