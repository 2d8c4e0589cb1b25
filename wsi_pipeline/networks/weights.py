"""Weight files in, without executing anything they hold."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wsi_pipeline.errors import BundleError


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file or a PyTorch checkpoint; return them by name.

    Args:
        path: the file; a checkpoint may hold its tensors under `state_dict` or `model`.

    Raises:
        BundleError: not a weight file, or one that holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"cannot read weights from {path}: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise BundleError(f"{path} holds no mapping of names to tensors")
    return dict(found)


def load_weights(network: nn.Module, path: Path, *, unused: Collection[str] = ()) -> None:
    """Load a weight file into a network, upcast to the network's own precision; return nothing.

    Args:
        network: to load into.
        path: of the weights.
        unused: prefixes of tensors that the network never calls and a file may lack or have.

    Raises:
        BundleError: the file does not fit, with the names that do not.
    """
    load_state(network, read_state(path), path=path, unused=unused)


def load_state(
    network: nn.Module, state: Mapping[str, Tensor], *, path: Path, unused: Collection[str] = ()
) -> None:
    """Load tensors into a network, upcast to the network's own precision; return nothing.

    Args:
        network: to load into.
        state: tensors by name.
        path: of the file that they come from, for the message.
        unused: prefixes of tensors that the network never calls and `state` may lack or have.

    Raises:
        BundleError: they do not fit, with the names that do not.
    """
    try:
        found = network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a size mismatch, with PyTorch's own list of names
        raise BundleError(f"{path} does not fit the network: {error}") from error
    missing = [n for n in found.missing_keys if not _is_optional(n, unused)]
    unexpected = [n for n in found.unexpected_keys if not _is_optional(n, unused)]
    if missing or unexpected:
        raise BundleError(
            f"{path} does not fit the network: "
            f"missing {_listed(missing)}; unexpected {_listed(unexpected)}"
        )


def _is_optional(name: str, unused: Collection[str]) -> bool:
    return name.endswith("num_batches_tracked") or name.startswith(tuple(unused))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more
