"""NMTNet: one encoder for the mask of a breast tumour and for benign against malignant.

Xuelian Yang, Yuanjun Wang, Li Sui: "NMTNet: A Multi-task Deep Learning Network for Joint
Segmentation and Classification of Breast Tumors", Journal of Imaging Informatics in Medicine,
2025, https://doi.org/10.1007/s10278-025-01440-7. Given are the shared ResNet18, the names and the
roles of the three modules. Their insides, MFCR, LRE and the classifier, and the decoder are our
reading.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.networks.base import SegmentationNetwork, conv_norm
from wsi_pipeline.networks.encoders import Grey, ResNet18, stem_channels

TAPS = (64, 64, 128, 256, 512)
"""Channels of the encoder's taps, from 1/2 to 1/32 of the input."""
DECODER = ((512, 256, 256), (256, 128, 128), (128, 64, 64), (64, 64, 64))
"""Channels from below, of the skip, and out, of each stage from 1/16 to 1/2 of the input."""


class MFCR(nn.Module):
    """Multi-scale fusion channel refinement: four receptive fields under a channel attention."""

    # kernel and dilation of each
    BRANCHES: ClassVar = ((1, 1), (3, 1), (3, 2), (3, 4))

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*conv_norm(channels, channels // 4, kernel, dilation=dilation))
            for kernel, dilation in self.BRANCHES
        )
        self.fuse = nn.Sequential(*conv_norm(channels, channels, 1))
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // reduction, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features, (N, C, H, W)."""
        fused: Tensor = self.fuse(torch.cat([branch(x) for branch in self.branches], dim=1))
        mean, most = fused.mean((2, 3), keepdim=True), fused.amax((2, 3), keepdim=True)
        return x + torch.sigmoid(self.mlp(mean) + self.mlp(most)) * fused


class LRE(nn.Module):
    """Lesion region enhancement: a skip's texture and edges, where the decoder sees a lesion."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.texture = nn.Sequential(*conv_norm(channels, channels, 3, groups=channels))
        self.edge = nn.Sequential(*conv_norm(channels, channels, 3, groups=channels))
        self.fuse = nn.Sequential(*conv_norm(2 * channels, channels, 1))
        self.attention = nn.Conv2d(2, 1, 7, padding=3)
        # the mean leaves the padding out, so that the border of the image is no edge
        self.smooth = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """Return the enhanced skip, (N, C, H, W); `guide` is (N, any, H, W)."""
        parts = torch.cat([self.texture(x), self.edge(x - self.smooth(x))], dim=1)
        pooled = torch.cat([guide.mean(1, keepdim=True), guide.amax(1, keepdim=True)], dim=1)
        out: Tensor = x + torch.sigmoid(self.attention(pooled)) * self.fuse(parts)
        return out


class NMTNet(SegmentationNetwork):
    """NMTNet; 17,107,791 parameters with 1 class and 2 labels.

    Batch norm in the classifier needs training batches of two images or more.

    Args:
        grey: what becomes of one channel: the encoder sees it three times, or has one itself.
    """

    size_multiple = 32
    looks_at = "encoder.layer3"

    def __init__(
        self, *, classes: int = 1, labels: int = 2, channels: int = 3, grey: Grey = "replicate"
    ) -> None:
        super().__init__(channels=channels, classes=classes, labels=labels)
        self.stem_channels = stem_channels(channels, grey)
        self.encoder = ResNet18(self.stem_channels)
        deepest = TAPS[-1]
        self.mfcr = MFCR(deepest)
        self.lre = nn.ModuleList(LRE(skip) for _, skip, _ in DECODER)
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(*conv_norm(below + skip, outputs, 3)),
                nn.Sequential(*conv_norm(outputs, outputs, 3)),
            )
            for below, skip, outputs in DECODER
        )
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.last_conv = nn.Sequential(*conv_norm(DECODER[-1][-1], 32, 3))
        self.head = nn.Conv2d(32, classes, 1)
        pooled = 2 * deepest + sum(outputs for *_, outputs in DECODER[:-1])
        self.classifier = nn.Sequential(
            nn.Linear(pooled, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(256, labels),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return logits of normalised patches, (N, channels, H, W).

        Returns:
            `mask`, (N, classes, H, W), and `label`, (N, labels).
        """
        self.check_patches(x)
        *skips, deepest = self.encoder(x.expand(-1, self.stem_channels, -1, -1))
        refined = self.mfcr(deepest)  # 512, H/32
        decoded = [refined]  # then 256, H/16; 128, H/8; 64, H/4; 64, H/2
        for lre, stage in zip(self.lre, self.decoder, strict=True):
            grown = self.up(decoded[-1])
            decoded.append(stage(torch.cat([grown, lre(skips.pop(), grown)], dim=1)))
        mask = self.head(self.last_conv(self.up(decoded[-1])))
        # the probability of any class but the background
        lesion = mask.sigmoid() if mask.shape[1] == 1 else 1 - mask.softmax(1)[:, :1]
        pooled = [refined.mean((2, 3)), *(_masked_mean(t, lesion) for t in decoded[:-1])]
        return {"mask": mask, "label": self.classifier(torch.cat(pooled, dim=1))}


def _masked_mean(features: Tensor, probability: Tensor) -> Tensor:
    """Return the mean of features weighted by a probability of any size, (N, C)."""
    height, width = features.shape[2:]
    weight = functional.adaptive_avg_pool2d(probability, (height, width))
    # Where no lesion is seen the weights add up to nothing.
    return (features * weight).sum((2, 3)) / (weight.sum((2, 3)) + 1e-6)
