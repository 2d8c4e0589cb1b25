"""MM-3DUNet: a light 3-D U-Net that also says whether the patch holds a tumour.

Xian Wang, Wenzhi Zeng, Junzeng Xu, Senhao Zhang, Yuexing Gu, Benhui Li, Xueyang Wang: "MM-3D Unet:
development of a lightweight breast cancer tumor segmentation network utilizing multi-task and
depthwise separable convolution", Frontiers in Oncology, 2025,
https://doi.org/10.3389/fonc.2025.1563959. Given are the units' names and two numbers, 63.16 % fewer
parameters and 80.90 % less compute than the 3-D U-Net. All internals are our reading: plan A is
fitted to the two numbers, plan B is closer to the abstract's words.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from wsi_pipeline.networks.base import SegmentationNetwork, Up, contract, conv_norm, expand

Plan = Literal["A", "B"]
WIDTHS = (64, 128, 256, 512)
"""Channels of each stage's output, from full size down."""

_conv = partial(conv_norm, ndim=3)


class IRB(nn.Module):
    """Inverted residual block: expand 1³, depthwise 3³, project 1³ without activation, add.

    Args:
        expansion: channels between, as a multiple; 1 leaves the expansion out.
    """

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.conv = _bottleneck(channels, channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (N, channels, D, H, W)."""
        out: Tensor = self.conv(x)
        return x + out


class MM3DUNet(SegmentationNetwork):
    """MM-3DUNet; 7,027,268 parameters with 2 classes and 2 labels.

    Args:
        plan: "A", channels expand in dense convolutions, or "B", in separable ones.
        bottleneck: plan B's decoder convolves 1³, 3³ depthwise, 1³ in place of 3³ depthwise, 1³.
    """

    ndim: ClassVar[int] = 3
    size_multiple = 8
    looks_at = "down.3"

    def __init__(
        self,
        *,
        classes: int = 2,
        labels: int = 2,
        channels: int = 1,
        plan: Plan = "A",
        bottleneck: bool = False,
    ) -> None:
        super().__init__(channels=channels, classes=classes, labels=labels)
        if plan not in get_args(Plan):
            raise ValueError(f"plan {plan!r} is none of {get_args(Plan)}")
        if bottleneck and plan != "B":
            raise ValueError("bottleneck is an option of plan B")
        down, up = _plan_a(channels) if plan == "A" else _plan_b(channels, bottleneck)
        self.down = nn.ModuleList(down)
        self.up = nn.ModuleList(up)
        self.pool = nn.MaxPool3d(2)
        self.act = nn.Linear(WIDTHS[-1], labels)
        self.head = nn.Conv3d(WIDTHS[0], classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return logits of normalised patches, (N, channels, D, H, W).

        Returns:
            `mask`, (N, classes, D, H, W), and `label`, (N, labels).
        """
        self.check_patches(x)
        # skips of 64 channels at full size, 128 at 1/2, 256 at 1/4; 512 at 1/8
        x, skips = contract(self.down, self.pool, x)
        label = self.act(x.mean((2, 3, 4)))
        return {"mask": self.head(expand(self.up, x, skips)), "label": label}


def _plan_a(channels: int) -> tuple[list[nn.Sequential], list[Up]]:
    """Return the ways down and up: a stage keeps channels by an IRB, then doubles them (CEC)."""
    first = nn.Sequential(*_conv(channels, 32, 3), IRB(32, 1), *_conv(32, 64, 3))
    down = [nn.Sequential(IRB(c, 2), *_conv(c, 2 * c, 3)) for c in WIDTHS[:-1]]
    up = [
        Up(
            nn.ConvTranspose3d(2 * c, c, 2, stride=2),
            nn.Sequential(*_separable(2 * c, c), IRB(c, 2)),
        )
        for c in reversed(WIDTHS[:-1])
    ]
    return [first, *down], up


def _plan_b(channels: int, bottleneck: bool) -> tuple[list[nn.Sequential], list[Up]]:
    """Return the ways down and up with MobileNetV2's expansion, 6, and a separable CEC."""

    def join(c: int) -> list[nn.Module]:
        if bottleneck:
            return [*_conv(3 * c, c, 1), *_separable(c, c)]
        return _separable(3 * c, c)

    first = nn.Sequential(*_conv(channels, 32, 3), IRB(32, 6), *_conv(32, 64, 3))
    down = [nn.Sequential(IRB(c, 6), IRB(c, 6), *_bottleneck(c, 2 * c, 6)) for c in WIDTHS[:-1]]
    up = [
        Up(nn.ConvTranspose3d(2 * c, 2 * c, 2, stride=2), nn.Sequential(*join(c)))
        for c in reversed(WIDTHS[:-1])
    ]
    return [first, *down], up


def _bottleneck(inputs: int, outputs: int, expansion: int) -> nn.Sequential:
    hidden = expansion * inputs
    return nn.Sequential(
        *(_conv(inputs, hidden, 1) if expansion != 1 else []),
        *_conv(hidden, hidden, 3, groups=hidden),
        nn.Conv3d(hidden, outputs, 1, bias=False),
        nn.BatchNorm3d(outputs),
    )


def _separable(inputs: int, outputs: int) -> list[nn.Module]:
    """Return a depthwise separable convolution (DSC)."""
    return [*_conv(inputs, inputs, 3, groups=inputs), *_conv(inputs, outputs, 1)]
