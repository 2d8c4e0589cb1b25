"""LightMuSeg: MobileNetV2 encoder, multiscale feature fusion, feature refinement.

Zaka-Ud-Din Muhammad, Vincenzo Della Mea: "Lightweight multiscale feature refinement network for
breast cancer histopathology segmentation", Informatics in Medicine Unlocked 63, 101754, 2026,
https://doi.org/10.1016/j.imu.2026.101754. Names follow the authors' checkpoints. Our reading: the
spatial attention, whose module is not public, is CBAM's; the side-out heads, which the authors'
plain network builds and never calls, are there with deep supervision only, one map for each class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import MutableMapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.networks.base import SegmentationNetwork, conv_norm
from wsi_pipeline.networks.encoders import Grey, mobilenet_v2_features, stem_channels

TAPS = (2, 4, 7, 14, 18)
"""Stage of the encoder before which each tap is taken, from 1/2 to 1/32 of the input."""
CHANNELS = (16, 24, 32, 96, 320)
"""Of each tap."""


class SpatialAttention(nn.Module):
    """Weigh positions by a 7×7 convolution of the channels' mean and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.register_load_state_dict_pre_hook(_adopt_attention)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times its attention, (N, C, H, W)."""
        # over planes: a maximum along neighbours in memory is slow in bf16
        most = x.contiguous().amax(1, keepdim=True)
        pooled = torch.cat([x.mean(1, keepdim=True), most], dim=1)
        return x * torch.sigmoid(self.conv(pooled))


class MSFFM(nn.Module):
    """Multiscale feature fusion: three kernel sizes, channel attention, spatial attention."""

    def __init__(self, channels: int, *, reduction: int = 4) -> None:
        super().__init__()
        self.scale1 = nn.Conv2d(channels, channels, 1)
        self.scale2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale3 = nn.Conv2d(channels, channels, 5, padding=2)
        self.reduce_channel = nn.Conv2d(3 * channels, channels, 1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)
        self.spatialatt = SpatialAttention()
        self.fusion_conv = nn.Conv2d(channels, channels, 1)
        self.composed: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the fused features, (N, C, H, W)."""
        if self.composed is None:
            scales = torch.cat([self.scale1(x), self.scale2(x), self.scale3(x)], dim=1)
            fused = self.reduce_channel(scales)
        else:
            fused = self.composed(x)
        squeezed = functional.relu(self.fc1(fused.mean((2, 3), keepdim=True)))
        fused = fused * torch.sigmoid(self.fc2(squeezed))
        out: Tensor = self.fusion_conv(self.spatialatt(fused))
        return out

    def compose(self) -> None:
        """Replace the multiscale step by the one 5×5 convolution that equals it; return nothing.

        Its four convolutions are linear with nothing between them, so this is exact. The module
        has other tensors then than a weight file: for inference only.
        """
        scales = (self.scale1, self.scale2, self.scale3)
        kernels = torch.cat(
            [functional.pad(s.weight, [2 - s.kernel_size[0] // 2] * 4) for s in scales]
        )
        biases = torch.cat([s.get_parameter("bias") for s in scales])
        mix = self.reduce_channel.weight[:, :, 0, 0]  # (C, 3C)
        bias = mix @ biases + self.reduce_channel.get_parameter("bias")
        conv = nn.Conv2d(len(mix), len(mix), 5, padding=2, device="meta")
        conv.weight = nn.Parameter(torch.einsum("oi,icyx->ocyx", mix, kernels))
        conv.bias = nn.Parameter(bias)
        self.composed = conv
        del self.scale1, self.scale2, self.scale3, self.reduce_channel


class FRFM(nn.Module):
    """Feature refinement: skip and decoder features under one channel attention."""

    def __init__(self, channels: int, *, reduction: int = 4) -> None:
        super().__init__()
        self.channel_fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )
        self.spatial_fusion = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, skip: Tensor, decoded: Tensor) -> Tensor:
        """Return the refined features, (N, C, H, W)."""
        weight = self.channel_fc((skip + decoded).mean((2, 3)))[:, :, None, None]
        out: Tensor = self.spatial_fusion(torch.cat([weight * skip, weight * decoded], dim=1))
        return out


class SideOut(nn.Module):
    """A head that maps features of the decoder to logits, for deep supervision."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        middle = channels // 4
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, middle, 3, padding=1),
                bn=nn.BatchNorm2d(middle),
                relu=nn.ReLU(inplace=True),
            )
        )
        self.dropout = nn.Dropout2d(0.1)
        self.conv2 = nn.Conv2d(middle, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, classes, H, W)."""
        out: Tensor = self.conv2(self.dropout(self.conv1(x)))
        return out


class LightMuSeg(SegmentationNetwork):
    """LightMuSeg; 7,052,236 parameters and 145 for every class.

    Global pooling and aligned-corner upsampling make each output pixel depend on the whole patch:
    predict with patches of the size that the weights were trained for.

    Args:
        grey: what becomes of one channel: the encoder sees it three times, or has one itself.
        deep_supervision: while training, the logits of the decoder's other levels come out too;
            24,450 parameters more, and 41 for every class.
    """

    pass_pixels = 512 * 512
    size_multiple = 32
    looks_at = "encoder.13"
    unused: ClassVar[tuple[str, ...]] = ("encoder.18.", "sideout")

    def __init__(
        self,
        *,
        classes: int = 1,
        channels: int = 3,
        grey: Grey = "replicate",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(channels=channels, classes=classes)
        self.stem_channels = stem_channels(channels, grey)
        self.encoder = mobilenet_v2_features(self.stem_channels)
        c1, c2, c3, c4, c5 = CHANNELS
        self.mltslayer1, self.mltslayer2, self.mltslayer3 = MSFFM(c1), MSFFM(c2), MSFFM(c3)
        self.mltslayer4, self.mltslayer5 = MSFFM(c4), MSFFM(c5)
        self.s5_up_conv, self.s4_up_conv = _up(c5, c4), _up(c4, c3)
        self.s3_up_conv, self.s2_up_conv = _up(c3, c2), _up(c2, c1)
        self.lca45, self.lca34, self.lca23, self.lca12 = FRFM(c4), FRFM(c3), FRFM(c2), FRFM(c1)
        self.deep_supervision = deep_supervision
        if deep_supervision:
            self.sideout2, self.sideout3 = SideOut(c2, classes), SideOut(c3, classes)
            self.sideout4 = SideOut(c4, classes)
        # the gates, about 1/2 each, take from the skips what this gain gives: they start at unit
        # scale, as what comes up from below does behind its batch norm
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("encoder."):
                nn.init.kaiming_normal_(module.weight)
        self.last_conv = nn.Conv2d(c1, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, (N, classes, H, W), of normalised patches, (N, channels, H, W).

        With deep supervision, in training mode: four such maps, the first of which is the answer.
        """
        self.check_patches(x)
        size = x.shape[2:]
        s1, s2, s3, s4, s5 = self._taps(x.expand(-1, self.stem_channels, -1, -1))
        d4 = self.lca45(self.mltslayer4(s4), self.s5_up_conv(self.mltslayer5(s5)))  # 96, H/16
        d3 = self.lca34(self.mltslayer3(s3), self.s4_up_conv(d4))  # 32, H/8
        d2 = self.lca23(self.mltslayer2(s2), self.s3_up_conv(d3))  # 24, H/4
        d1 = self.lca12(self.mltslayer1(s1), self.s2_up_conv(d2))  # 16, H/2
        logits: Tensor = self.last_conv(d1)
        answer = functional.interpolate(logits, scale_factor=2.0, mode="bilinear")
        if not (self.deep_supervision and self.training):
            return answer
        sides = [self.sideout2(d2), self.sideout3(d3), self.sideout4(d4)]
        return [answer, *(functional.interpolate(s, size=size, mode="bilinear") for s in sides)]

    def _taps(self, x: Tensor) -> list[Tensor]:
        taps = []
        for start, stop in pairwise((0, *TAPS)):
            x = self.encoder[start:stop](x)
            taps.append(x)
        return taps


def _up(inputs: int, outputs: int) -> nn.Sequential:
    grow = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    return nn.Sequential(grow, *conv_norm(inputs, outputs, 3, bias=True))


def _adopt_attention(
    module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any
) -> None:
    """Take the attention's convolution under whatever name, size and bias a checkpoint has it.

    The authors' module is not public: its weight is known by its shape, (1, 2, k, k), alone. What
    holds more than one convolution is left as it is and refused by name.
    """
    own = {n: t for n, t in state.items() if n.startswith(prefix)}
    weights = [n for n, t in own.items() if t.ndim == 4 and t.shape[:2] == (1, 2)]
    biases = [n for n, t in own.items() if n.endswith("bias") and t.shape == (1,)]
    if len(weights) != 1 or len(biases) > 1 or len(own) != 1 + len(biases):
        return
    height, width = own[weights[0]].shape[2:]
    if height != width or height % 2 == 0:
        return
    for kind, names in (("weight", weights), ("bias", biases)):
        for name in names:
            state[f"{prefix}conv.{kind}"] = state.pop(name)
    module.conv = nn.Conv2d(2, 1, height, padding=height // 2, bias=bool(biases))
