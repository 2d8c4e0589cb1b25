"""Programs from elsewhere: TorchScript, torch.export and ONNX files in a bundle's folder."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks.onnx import OnnxProgram

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network ready to be called.

    Attributes:
        module: maps (N, C, *patch) float32 to logits.
        batch_size: the only N that it takes; None = any.
    """

    module: nn.Module
    batch_size: int | None


def load_foreign(bundle: Bundle) -> Network:
    """Load the program of a bundle; return it on the CPU.

    Raises:
        BundleError: no program, not one of the kind that the bundle says, or an ONNX file that
            answers otherwise than it says.
    """
    # What they share with others is above this module.
    from wsi_pipeline.networks.check import check_shapes, random_patches, run

    path = bundle.weights_path
    if path is None:
        raise BundleError(f"the bundle {bundle.path} names no program; set weights in model.toml")
    data = bundle.read_weights()
    try:
        if bundle.network == "onnx":
            program = OnnxProgram(data, bundle)
            # How many classes it gives, and whether it takes such patches, no other way tells.
            answer = run(program, random_patches(bundle, count := program.batch_size or 1))
            check_shapes(answer, bundle, count)
            return Network(module=program, batch_size=program.batch_size)
        file = io.BytesIO(data)
        if bundle.network == "exported":
            exported = torch.export.load(file)
            return Network(module=exported.module(), batch_size=_static_batch(exported))
        module = torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
        return Network(module=module.eval(), batch_size=None)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    # torch's loaders raise whatever the file makes them
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise BundleError(f"cannot load {path} as {bundle.network}: {reason}") from error


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
