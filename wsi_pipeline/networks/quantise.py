"""Convolutions of 8-bit integers, for CPUs: quicker, and less exact, from ranges found beforehand.

What a convolution reads is mapped from its range to 0 … 255. Its weights get 7 bits, with a scale
for each channel that comes out: two products fit then into the 16 bits in which processors without
VNNI add them, and all processors agree. Sums, activations and all else are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby, pairwise

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks.fold import FusedConv

LEAST_USES = 64
"""Products that a value goes into, from which on a convolution by itself is worth its rounding."""
WEIGHT_STEPS, STEPS = 63, 255
TINY = 1e-9
Ranges = dict[str, tuple[float, float]]
"""The least and the largest value that a convolution reads, at most and at least 0, by its name."""


@contextmanager
def watched(module: nn.Module) -> Iterator[Ranges]:
    """Yield ranges that grow with every patch that an inference form predicts in the body."""
    ranges: Ranges = {}

    def watch(name: str, conv: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = map(float, inputs[0].aminmax())
            least, most = ranges.get(name, (0.0, 0.0))
            ranges[name] = (min(low, least), max(high, most))

        return conv.register_forward_pre_hook(note)

    hooks = [watch(name, conv) for name, conv in _convolutions(module).items()]
    try:
        yield ranges
    finally:
        for hook in hooks:
            hook.remove()


def quantise(module: nn.Module, ranges: Ranges) -> None:
    """Put convolutions of an inference form in fp32 into integers, in place; return nothing.

    Args:
        ranges: of all convolutions of some of its rows; the others stay as they are.

    Raises:
        BundleError: the ranges are of another network, or this machine has none of what it takes.
    """
    if not (names := _convolutions(module)):
        raise BundleError("--precision int8 takes an x86 processor and torch with oneDNN")
    if others := ranges.keys() - names:
        raise BundleError(f"the ranges for int8 are of another network: it has no {min(others)}")
    for row in rows(module):
        if not {*row} <= ranges.keys():
            continue
        made = [_IntegerConv(names[name], *ranges[name]) for name in row]
        for one, after in pairwise(made):
            one.gives = (after.scale, after.zero, torch.uint8)
        for name, one in zip(row, made, strict=True):
            module.set_submodule(name, one)


def to_bytes(ranges: Ranges) -> bytes:
    """Return the content of a bundle's file of ranges."""
    return save({name: np.array(ends, np.float32) for name, ends in ranges.items()})


def load_ranges(bundle: Bundle) -> Ranges:
    """Return the ranges of a bundle.

    Raises:
        BundleError: it has none, or its file cannot be read.
    """
    if (path := bundle.int8_path) is None:
        raise BundleError(f"{bundle.name} has no int8: make it with `wsi-pipeline models quantise`")
    found: Ranges = {}
    try:
        for name, ends in load(path.read_bytes()).items():
            low, high = map(float, ends)
            if not -math.inf < low <= 0 <= high < math.inf:
                raise ValueError(f"{name} has no range around 0")
            found[name] = (low, high)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise BundleError(f"cannot read the ranges for int8 from {path}: {error}") from error
    return found


def _convolutions(module: nn.Module) -> dict[str, FusedConv]:
    return {name: conv for name, conv in module.named_modules() if isinstance(conv, FusedConv)}


def rows(module: nn.Module) -> list[list[str]]:
    """Return the names of convolutions of an inference form that are worth being of integers.

    In a row each reads what the one before gives, and nothing else does: they hand integers on.
    """

    def flat(row: nn.Sequential) -> Iterator[nn.Module]:
        for layer in row:
            yield from flat(layer) if isinstance(layer, nn.Sequential) else [layer]

    # torch has no activations behind those of volumes
    names = {m: n for n, m in _convolutions(module).items() if isinstance(m.conv, nn.Conv2d)}
    found, done = list[list[str]](), set[nn.Module]()
    # outer rows come before those within
    for parent in module.modules():
        in_row = isinstance(parent, nn.Sequential)
        layers = flat(parent) if isinstance(parent, nn.Sequential) else parent.children()
        called = [m for m in layers if not isinstance(m, nn.Identity)]
        for is_conv, group in groupby(called, key=lambda m: m in names and m not in done):
            if not is_conv:
                continue
            row = [m for m in group if isinstance(m, FusedConv)]
            done.update(row)
            for part in [row] if in_row else [[m] for m in row]:
                conv = part[0].conv
                uses = conv.out_channels // conv.groups * math.prod(conv.kernel_size)
                # by itself it may save less than rounding what it reads takes
                if len(part) > 1 or uses >= LEAST_USES * math.prod(conv.stride):
                    found.append([names[m] for m in part])
    return found


class _IntegerConv(nn.Module):
    """A convolution with its activation, of integers."""

    def __init__(self, fused: FusedConv, low: float, high: float) -> None:
        super().__init__()
        weight = fused.conv.weight
        each = (-1, *[1] * (weight.ndim - 1))
        self.scales = weight.flatten(1).abs().amax(1).clamp(min=TINY) / WEIGHT_STEPS
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.integers = (weight / self.scales.view(each)).round().to(torch.int8)
        self.bias, self.how, self.activation = fused.conv.bias, fused.how, fused.attributes
        self.scale = max(high - low, TINY) / STEPS
        self.zero = round(-low / self.scale)
        # rounds where it is cut off behind the point
        self.offset = torch.tensor(self.zero + 0.5)
        self.gives: tuple[float, int, torch.dtype] = (1.0, 0, torch.float32)
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the activation makes of the convolution's output."""
        if x.dtype is not torch.uint8:
            x = torch.add(self.offset, x, alpha=1 / self.scale).clamp_(0, STEPS)
            # by way of int32, which processors convert many at a time
            x = x.to(torch.int32).to(torch.uint8)
        read = (self.scale, self.zero)
        padding, stride, dilation, groups = self.how
        if self._packed is None:
            self._packed = torch.ops.onednn.qconv_prepack(
                self.integers, self.scales, *read, stride, padding, dilation, groups, x.shape
            )
        out: Tensor = torch.ops.onednn.qconv_pointwise(
            x, *read, self._packed, self.scales, self.zeros, self.bias,
            stride, padding, dilation, groups, *self.gives, *self.activation, "",
        )  # fmt: skip
        return out
