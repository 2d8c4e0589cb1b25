"""Parameters, operations and memory of a network, counted without weights, data or time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _MaxPoolNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers the module learns; running statistics of norms are none."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, input_size: Sequence[int]) -> int:
    """Return the multiply-accumulates of predicting one patch.

    Convolutions, transposed convolutions and linear layers count, and nothing else: a transposed
    convolution has its weights times the positions of its input.

    Args:
        module: a network; it is neither run nor changed.
        input_size: (channels, *patch).
    """
    with FlopCounterMode(display=False) as counter:
        _predict(_shape_of(module), input_size)
    return int(counter.get_total_flops()) // 2  # PyTorch counts the addition apart


def peak_memory(module: nn.Module, input_size: Sequence[int]) -> int:
    """Return the bytes that predicting one patch in float32 holds at most.

    Weights, the input, and the activations that are alive at the same time as the network is
    written; what a convolution's algorithm takes for itself, and the framework, come on top.

    Args:
        module: a network; it is neither run nor changed.
        input_size: (channels, *patch).
    """
    shape, live = _shape_of(module), _LiveBytes()
    with live:
        _predict(shape, input_size)
    return sum(t.nbytes for t in chain(shape.parameters(), shape.buffers())) + live.most


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

    shape = _shape_of(module)
    for layer in shape.modules():
        if not list(layer.children()):
            layer.register_forward_hook(add)
    _predict(shape, input_size)
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


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made under it: `now`, and the `most` that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most = 0, 0
        self._known: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:  # a view, or an operation in place
            return
        self._known.add(storage)
        size = storage.nbytes()
        finalize(storage, self._release, size)
        self.now += size
        self.most = max(self.most, self.now)

    def _release(self, size: int) -> None:
        self.now -= size


def _shape_of(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose tensors have float32 shapes and no numbers."""

    def empty(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device="meta", dtype=dtype)

    tensors: dict[int, object] = {id(b): empty(b) for b in module.buffers()}
    tensors |= {id(p): nn.Parameter(empty(p)) for p in module.parameters()}
    return deepcopy(module, tensors).eval()  # what has a copy already is not copied again


def _predict(shape: nn.Module, input_size: Sequence[int]) -> None:
    with torch.no_grad():
        shape(torch.empty(1, *input_size, device="meta"))
