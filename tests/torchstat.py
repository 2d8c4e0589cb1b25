"""What torchstat tells of a network; published figures are often its.

It knows no transposed convolution (but in `madd`) and no SiLU, hence `flops` and the traffic are
less than the truth. https://github.com/Swall0w/torchstat
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _MaxPoolNd

from wsi_pipeline.networks.cost import count_parameters


@dataclass(frozen=True, kw_only=True)
class TorchstatFigures:
    """What torchstat tells of a network; published figures are often its.

    It knows no transposed convolution (but in `madd`) and no SiLU, hence `flops` and the traffic
    are less than the truth.

    Attributes:
        parameters: learned numbers.
        memory: outputs of all layers, bytes.
        madd: multiplications and additions.
        flops: multiply-accumulates, and what else it counts as one operation.
        traffic: read and written by all layers, bytes.
    """

    parameters: int
    memory: int
    madd: int
    flops: int
    traffic: int


def torchstat_figures(module: nn.Module, input_size: Sequence[int]) -> TorchstatFigures:
    """Return the figures by torchstat's rules, https://github.com/Swall0w/torchstat.

    Args:
        module: a network of convolutions, batch norms, max poolings and ReLUs; of other layers
            only the outputs count.
        input_size: (channels, *patch).
    """
    totals = {"memory": 0, "madd": 0, "flops": 0, "traffic": 0}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rule = next((r for kind, r in TORCHSTAT_RULES.items() if isinstance(layer, kind)), None)
        counts = rule(layer, inputs[0], output) if rule else {}
        for name, count in {"memory": 4 * output.numel(), **counts}.items():
            totals[name] += count

    shape = deepcopy(module).to("meta").eval()
    for layer in shape.modules():
        if not list(layer.children()):
            layer.register_forward_hook(add)
    with torch.no_grad():
        shape(torch.empty(1, *input_size, device="meta"))
    return TorchstatFigures(parameters=count_parameters(module), **totals)


def _convolution(layer: _ConvNd, x: Tensor, y: Tensor) -> dict[str, int]:
    kernel, bias = layer.weight[0].numel(), int(layer.bias is not None)
    return {
        "madd": y.numel() * (2 * kernel - 1 + bias),
        "flops": y.numel() * (kernel + bias),
        "traffic": 4 * (x.numel() + count_parameters(layer) + y.numel()),
    }


def _transposed_convolution(layer: _ConvTransposeNd, x: Tensor, y: Tensor) -> dict[str, int]:
    kernel, bias = layer.weight.numel() // layer.out_channels, int(layer.bias is not None)
    positions = x.numel() // layer.in_channels
    return {"madd": positions * layer.out_channels * (2 * kernel - 1 + bias)}


def _batch_norm(layer: _BatchNorm, x: Tensor, y: Tensor) -> dict[str, int]:
    traffic = 4 * (x.numel() + count_parameters(layer) + y.numel())
    return {"madd": 4 * x.numel(), "flops": 2 * x.numel(), "traffic": traffic}


def _relu(layer: nn.ReLU, x: Tensor, y: Tensor) -> dict[str, int]:
    return {"madd": x.numel(), "flops": x.numel(), "traffic": 4 * (x.numel() + y.numel())}


def _max_pool(layer: _MaxPoolNd, x: Tensor, y: Tensor) -> dict[str, int]:
    sides = layer.kernel_size
    window = sides ** (x.ndim - 2) if isinstance(sides, int) else prod(sides)
    return {
        "madd": y.numel() * (window - 1),
        "flops": x.numel(),
        "traffic": 4 * (x.numel() + y.numel()),
    }


# the first that fits; a layer of no kind has outputs only
TORCHSTAT_RULES: Mapping[type, Callable[[Any, Tensor, Tensor], dict[str, int]]] = {
    _ConvTransposeNd: _transposed_convolution,
    _ConvNd: _convolution,
    _BatchNorm: _batch_norm,
    nn.ReLU: _relu,
    _MaxPoolNd: _max_pool,
}
