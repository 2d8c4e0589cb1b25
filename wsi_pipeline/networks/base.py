"""What the networks share: what each says of itself, the check of its input, the U's two ways."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class SegmentationNetwork(nn.Module):
    """A network that maps patches to logits of the same size.

    Args:
        labels: logits of a classification, where there is one.
    """

    ndim: ClassVar[int] = 2
    """Axes of a patch: 2 for images and slides, 3 for volumes."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Prefixes of tensors that prediction never calls; weight files may lack or have them."""
    pass_pixels: ClassVar[int] = 0
    """Pixels of a pass on one core of a CPU, in several patches if they are small; 0 = one patch.
    What a pass costs in any case counts where a network is light, and the caches where it is not.
    """
    size_multiple: int
    """Every side of a patch is a multiple of this; ask the instance, it may depend on options."""
    looks_at: str
    """Module whose output tells what a patch looks like: the encoder's at 1/16 of the input, or its
    last. Below, where only the answer is left, tissue that it was not made for looks the same."""

    def __init__(self, *, channels: int, classes: int, labels: int = 1) -> None:
        super().__init__()
        if min(channels, classes, labels) < 1:
            raise ValueError(
                f"channels, classes and labels start at 1: {(channels, classes, labels)}"
            )
        self.channels = channels

    def check_patches(self, x: Tensor) -> None:
        """Refuse patches that the network cannot take; return nothing.

        Args:
            x: (N, channels, *patch).

        Raises:
            ValueError: other axes, channels, or a side that is no multiple of `size_multiple`.
        """
        # PyTorch would fail somewhere inside, where the first skip does not fit.
        name = type(self).__name__
        if x.ndim != self.ndim + 2 or x.shape[1] != self.channels:
            axes = "N, C, D, H, W" if self.ndim == 3 else "N, C, H, W"
            raise ValueError(
                f"patches of shape {tuple(x.shape)}: "
                f"{name} takes ({axes}) with {self.channels} channels"
            )
        if any(side % n for side, n in zip(x.shape[2:], self.multiples, strict=True)):
            size = " × ".join(str(side) for side in x.shape[2:])
            raise ValueError(
                f"a patch of {size} px: {name} takes multiples of {self.told_multiples}"
            )

    @property
    def multiples(self) -> tuple[int, ...]:
        """Return what the sides of a patch are multiples of, axis by axis."""
        return (self.size_multiple,) * self.ndim

    @property
    def told_multiples(self) -> str:
        """Return the multiples as people read them: one number where they are the same."""
        alike = len({*self.multiples}) == 1
        return " × ".join(map(str, self.multiples[:1] if alike else self.multiples))


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    ndim: int = 2,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
    activation: type[nn.ReLU | nn.ReLU6] = nn.ReLU,
) -> list[nn.Module]:
    """Return a convolution that keeps the size at stride 1, its batch norm and its activation."""
    # Usually without a bias, which the norm behind would take away again.
    conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[ndim - 2]
    padding = dilation * (kernel // 2)
    return [
        conv(inputs, outputs, kernel, stride, padding, dilation, groups, bias),
        norm(outputs),
        activation(inplace=True),
    ]


def contract(down: nn.ModuleList, pool: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Go the way down a U-Net; return the features of the bottom and the skips, full size first.

    Args:
        down: One stage for each size, the bottom last.
    """
    skips: list[Tensor] = []
    for stage in down[:-1]:
        skips.append(stage(x))
        x = pool(skips[-1])
    return down[-1](x), skips


def expand(up: nn.ModuleList, x: Tensor, skips: list[Tensor]) -> Tensor:
    """Go the way up a U-Net; return the features at full size.

    Args:
        up: a stage for each size above the bottom, full size last; takes features and a skip.
        skips: as `contract` returns them; the list is emptied, so that none is held too long.
    """
    for stage in up:
        x = stage(x, skips.pop())
    return x


class Up(nn.Module):
    """Double the size, join the skip, convolve."""

    def __init__(self, up: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.up = up
        self.conv = conv

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the features, (N, C, *doubled)."""
        out: Tensor = self.conv(torch.cat([skip, self.up(x)], dim=1))
        return out
