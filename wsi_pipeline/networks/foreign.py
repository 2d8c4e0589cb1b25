"""Programs from elsewhere: TorchScript, torch.export and ONNX files in a bundle's folder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks.onnx import OnnxProgram

if TYPE_CHECKING:
    from torch.export import ExportedProgram

NEVER = -1e30
"""A logit of no probability; finite, so that it can be divided."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network ready to be called.

    Attributes:
        module: maps (N, C, *patch) float32 to logits.
        batch_size: the only N that it takes; None = any.
    """

    module: nn.Module
    batch_size: int | None


def load_foreign(bundle: Bundle, *, is_encoder: bool = False) -> Network:
    """Load the program of a bundle; return it on the CPU.

    Args:
        is_encoder: it gives features in place of logits.

    Raises:
        BundleError: no program, not one of the kind that the bundle says, or an ONNX file that
            answers otherwise than it says.
    """
    # What they share with others is above this module.
    from wsi_pipeline.networks.check import check_shapes, random_patches, run, with_patch_size

    path, options = bundle.weights_path, bundle.network_options
    if path is None:
        raise BundleError(f"the bundle {bundle.path} names no program; set weights in model.toml")
    data = bundle.read_weights()
    try:
        known = ("layout" if bundle.network == "onnx" else "precision", "resize")
        if odd := [name for name in options if name not in known]:
            raise BundleError(f"network_options.{odd[0]}; expected {' or '.join(known)}")
        size = options.get("resize")
        if size and not (isinstance(size, list) and all(type(n) is int and n > 0 for n in size)):
            raise BundleError(f"network_options.resize is {size!r}; expected [height, width]")
        seen = with_patch_size(bundle, size) if size else bundle
        module, batch_size = _load(data, seen)
        if bundle.is_patchwise:
            module = PatchClassifier(module, bundle, size)
        elif size:
            raise BundleError("network_options.resize is for classifiers of whole patches")
        if bundle.network == "onnx" and not is_encoder:
            # How many classes it gives, and whether it takes such patches, no other way tells.
            answer = run(module, random_patches(bundle, batch_size or 1))
            check_shapes(answer, bundle, batch_size or 1)
        return Network(module=module, batch_size=batch_size)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    # torch's loaders raise whatever the file makes them
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise BundleError(f"cannot load {path} as {bundle.network}: {reason}") from error


class PatchClassifier(nn.Module):
    """A program that says one thing of a patch, as one that says it of each of its pixels.

    Args:
        size: pixels that patches are brought to for it, array order; None = as they are.
    """

    def __init__(self, program: nn.Module, bundle: Bundle, size: Sequence[int] | None) -> None:
        super().__init__()
        self.program, self._size = program, size
        self._sides, self._has_one = bundle.input.patch_size, bundle.activation == "sigmoid"
        if hasattr(program, "runtime"):
            self.runtime = program.runtime

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K, *patch), the background's so low that it never is."""
        if self._size:
            # As torchvision resizes pictures, but for rounding.
            x = functional.interpolate(x, tuple(self._size), mode="bilinear", antialias=True)
        answer = self.program(x)
        logits = (answer["label"] if isinstance(answer, Mapping) else answer).float().flatten(1)
        if not self._has_one:
            logits = torch.cat([torch.full_like(logits[:, :1], NEVER), logits], 1)
        ones = logits.view(*logits.shape, *(1 for _ in self._sides))
        spread: Tensor = ones.expand(-1, -1, *self._sides)
        return spread


def _load(data: bytes, bundle: Bundle) -> tuple[nn.Module, int | None]:
    """Return a program, and the only batch that it takes."""
    if bundle.network == "onnx":
        onnx = OnnxProgram(data, bundle)
        return onnx, onnx.batch_size
    file = io.BytesIO(data)
    if bundle.network == "exported":
        exported = torch.export.load(file)
        return exported.module(), _static_batch(exported)
    module = torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
    return module.eval(), None


def _static_batch(program: ExportedProgram) -> int | None:
    """Return the batch size that an exported program insists on, or None where it takes any."""
    from torch.export.graph_signature import InputKind

    names = {
        s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT
    }
    inputs = [
        n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names
    ]
    if len(inputs) != 1:
        raise BundleError(f"an exported program takes one input, this one takes {len(inputs)}")
    # It is a symbol where the batch may be of any size.
    first = inputs[0].shape[0]
    return first if isinstance(first, int) else None
