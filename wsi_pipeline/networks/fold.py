"""The exact inference form of a network: fewer operations, the same function."""

from __future__ import annotations

import platform
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from wsi_pipeline.networks.base import SegmentationNetwork
from wsi_pipeline.networks.lightmuseg import MSFFM

FUSED: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}
"""What oneDNN calls the activations that it computes while a convolution's output is at hand."""


def for_inference(
    network: SegmentationNetwork,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Rewrite a network for prediction; return a copy that gives the same answers, faster.

    Batch norms go into the convolutions before them, the three scales of every MSFFM into one
    5×5 convolution, and what is never called goes. On CPUs oneDNN computes a convolution and the
    activation behind it in one call. All follows from device and number format alone, so that all
    workers of a kind get the same bits.
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
    if torch.device(device).type == "cpu" and _can_fuse(dtype):
        for module in list(folded.modules()):
            _fuse_activations(module)
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


def _can_fuse(dtype: torch.dtype) -> bool:
    """Return whether this torch has oneDNN's fused convolutions, and the processor the format."""
    ops = torch.ops.mkldnn
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(ops, "_convolution_pointwise"):
        return False
    is_lower = dtype is torch.bfloat16 and ops._is_mkldnn_bf16_supported()
    return dtype is torch.float32 or is_lower


def _fuse_activations(parent: nn.Module) -> None:
    """Put each convolution of a module, and the activation behind it in a row, into one call."""
    layers = [(n, m) for n, m in parent.named_children() if not isinstance(m, nn.Identity)]
    for (name, layer), (after_name, after) in pairwise([*layers, ("", nn.Identity())]):
        if not isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            continue
        # elsewhere the order of the calls is not known
        if isinstance(parent, nn.Sequential) and type(after) in FUSED:
            setattr(parent, name, FusedConv(layer, after))
            setattr(parent, after_name, nn.Identity())
        else:
            setattr(parent, name, FusedConv(layer, nn.Identity()))


class FusedConv(nn.Module):
    """A convolution with its activation by oneDNN, from weights in an order of its own."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.activation = conv, activation
        self.how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.attributes = FUSED.get(type(activation), ("none", []))
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the activation makes of the convolution's output."""
        # Programs that are made of the network, and counts of it, want the plain operations.
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            out: Tensor = self.activation(self.conv(x))
            return out
        ops = torch.ops.mkldnn
        # The order is best for patches of the first one's size, and right for all.
        if self._packed is None:
            self._packed = ops._reorder_convolution_weight(self.conv.weight, *self.how, x.shape)
        fused: Tensor = ops._convolution_pointwise(
            x, self._packed, self.conv.bias, *self.how, *self.attributes, ""
        )
        return fused
