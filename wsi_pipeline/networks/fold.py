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

    Args:
        network: of this package, with its weights; left as it is.
        device: to run on.
        dtype: of weights and inputs.
    """
    folded = deepcopy(network).eval().requires_grad_(False).double()  # fold exactly, then round
    _drop_unused(folded)
    for module in list(folded.modules()):
        if isinstance(module, MSFFM):
            module.compose()
        _fold_batch_norms(module)
    folded = folded.to(device=device, dtype=dtype)
    is_slow_wide = torch.device(device).type == "cpu" and dtype is torch.float32
    _lay_out(folded, below=WIDE if is_slow_wide else None)
    return folded


def _drop_unused(network: SegmentationNetwork) -> None:
    """Put an empty module in the place of each that is never called."""
    names = [n for n, _ in network.named_modules() if f"{n}.".startswith(network.unused)]
    for name in sorted(names, reverse=True):  # children first
        network.set_submodule(name, nn.Identity())


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


def _lay_out(network: nn.Module, *, below: int | None) -> None:
    """Keep the channels of a pixel together, as slides come and as GPUs want them.

    Args:
        network: on its device.
        below: composed convolutions of so many channels or more stay on planes; None = none.
    """
    for weight in network.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    for module in network.modules():
        conv = module.composed if isinstance(module, MSFFM) else None
        if isinstance(conv, nn.Conv2d) and below is not None and conv.out_channels >= below:
            conv.weight.data = conv.weight.data.contiguous()
            module.composed = nn.Sequential(_Planar(), conv)


class _Planar(nn.Module):
    """Put every channel on a plane of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, laid out channel by channel."""
        return x.contiguous()
