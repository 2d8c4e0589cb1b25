"""Parameters, operations and memory of a network, counted without weights, data or time.

Networks are neither run nor changed: copies of them without numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers the module learns; running statistics of norms are none."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, input_size: Sequence[int]) -> int:
    """Return the multiply-accumulates of predicting one patch, (channels, *patch).

    Convolutions, transposed convolutions and linear layers count, and nothing else: a transposed
    convolution has its weights times the positions of its input.
    """
    with FlopCounterMode(display=False) as counter:
        _predict(_shape_of(module), input_size)
    # PyTorch counts the addition apart
    return int(counter.get_total_flops()) // 2


def peak_memory(module: nn.Module, input_size: Sequence[int]) -> int:
    """Return the bytes that predicting one patch, (channels, *patch), in float32 holds at most.

    Weights, the input, and the activations that are alive at the same time as the network is
    written; what a convolution's algorithm takes for itself, and the framework, come on top.
    """
    shape, live = _shape_of(module), _LiveBytes()
    with live:
        _predict(shape, input_size)
    # Weights were made before the count began.
    return sum(t.nbytes for t in chain(shape.parameters(), shape.buffers())) + live.most


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made under it: `now`, and the `most` that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most = 0, 0
        self._known: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            # that of a view, or of an operation in place, is known
            if storage not in self._known:
                self._known.add(storage)
                self.add(storage.nbytes())
                finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size: int) -> None:
        """Count bytes that came, or went."""
        self.now += size
        self.most = max(self.most, self.now)


def _shape_of(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose tensors have float32 shapes and no numbers."""

    def empty(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device="meta", dtype=dtype)

    tensors: dict[int, object] = {id(b): empty(b) for b in module.buffers()}
    tensors |= {id(p): nn.Parameter(empty(p)) for p in module.parameters()}
    # what has a copy already is not copied again
    return deepcopy(module, tensors).eval()


def _predict(shape: nn.Module, input_size: Sequence[int]) -> None:
    with torch.no_grad():
        shape(torch.empty(1, *input_size, device="meta"))
