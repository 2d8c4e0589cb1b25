"""The exact inference form of a network: fewer operations, the same function."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from wsi_pipeline.networks.base import SegmentationNetwork
from wsi_pipeline.networks.lightmuseg import MSFFM

WIDE = 128
"""Channels from which a large kernel in fp32 is slow in channels-last order on CPUs."""


def for_inference(
    network: SegmentationNetwork,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Rewrite a network for prediction; return a copy that gives the same answers, faster.

    Batch norms go into the convolutions before them, the three scales of every MSFFM into one
    5×5 convolution, and what is never called goes. The layout in memory follows from device and
    number format alone, so that all workers get the same bits.
    """
    # in double, to fold exactly and round once
    folded = deepcopy(network).eval().requires_grad_(False).double()
    unused = [n for n, _ in folded.named_modules() if f"{n}.".startswith(folded.unused)]
    # children first
    for name in sorted(unused, reverse=True):
        folded.set_submodule(name, nn.Identity())
    for module in list(folded.modules()):
        if isinstance(module, MSFFM):
            module.compose()
        _fold_batch_norms(module)
    folded = folded.to(device=device, dtype=dtype)
    # the channels of a pixel are kept together, as slides come and as GPUs want them
    for weight in folded.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if torch.device(device).type == "cpu" and dtype is torch.float32:
        for module in folded.modules():
            conv = module.composed if isinstance(module, MSFFM) else None
            if isinstance(conv, nn.Conv2d) and conv.out_channels >= WIDE:
                conv.weight.data = conv.weight.data.contiguous()
                module.composed = nn.Sequential(_Planar(), conv)
    return folded


def _fold_batch_norms(parent: nn.Module) -> None:
    """Fold each batch norm into the layer registered just before it, as our networks call them."""
    for (name, layer), (norm_name, norm) in pairwise(list(parent.named_children())):
        if not isinstance(norm, _BatchNorm):
            continue
        if isinstance(layer, _ConvNd):
            transposed = isinstance(layer, _ConvTransposeNd)
            setattr(parent, name, fuse_conv_bn_eval(layer, norm, transpose=transposed))
        elif isinstance(layer, nn.Linear):
            setattr(parent, name, fuse_linear_bn_eval(layer, norm))
        else:
            continue
        setattr(parent, norm_name, nn.Identity())


class _Planar(nn.Module):
    """Put every channel on a plane of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, laid out channel by channel."""
        return x.contiguous()
