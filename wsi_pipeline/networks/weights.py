"""Weight files in, without executing anything they hold."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from wsi_pipeline.errors import BundleError

NAMES_SHOWN = 8
"""Of each kind, where tensors do not fit."""


def read_state(
    path: Path, *, key: str | None = None, data: bytes | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file or a PyTorch checkpoint; return them by name.

    Args:
        key: where in a checkpoint the tensors are, as "ema.model"; None = at the only such place.

    Raises:
        BundleError: no weight file, one that holds more than tensors or several sets of them.
    """
    states = _states(read_checkpoint(path, data))
    if key is None:
        if len(states) > 1:
            raise BundleError(
                f"{path} holds tensors under {', '.join(states)}; `models import --key` takes one"
            )
        key = next(iter(states), "")
    if key not in states:
        where = f"under {key!r}; it does under {', '.join(states)}" if states else "alone"
        raise BundleError(f"{path} holds no mapping of names to tensors {where}")
    state = {name: tensor.detach() for name, tensor in states[key].items()}
    if odd := [name for name, tensor in state.items() if not _is_plain(tensor)]:
        raise BundleError(f"{path}: {_listed(odd)}: not plain arrays of real numbers")
    return state


def load_state(
    network: nn.Module, state: Mapping[str, Tensor], *, path: Path, unused: Collection[str] = ()
) -> None:
    """Load tensors into a network, upcast to the network's own precision; return nothing.

    Args:
        unused: prefixes of tensors that the network never calls and `state` may lack or have.

    Raises:
        BundleError: they do not fit, with the names that do not.
    """
    misshapen: dict[str, str] = {}
    try:
        found = network.load_state_dict(state, strict=False)
    # shapes; by now the network has adopted what it can
    except RuntimeError:
        own = network.state_dict()
        misshapen = {
            name: f"{name} {_shape(tensor)} for {_shape(own[name])}"
            for name, tensor in state.items()
            if name in own and tensor.shape != own[name].shape
        }
        rest = {name: tensor for name, tensor in state.items() if name not in misshapen}
        found = network.load_state_dict(rest, strict=False)
    faults = {
        "missing": [n for n in found.missing_keys if n not in misshapen],
        "unexpected": found.unexpected_keys,
        "misshapen": list(misshapen),
    }
    named = {
        kind: [misshapen.get(n, n) for n in names if not _is_optional(n, unused)]
        for kind, names in faults.items()
    }
    if any(named.values()):
        listed = "; ".join(f"{kind} {_listed(names)}" for kind, names in named.items() if names)
        raise BundleError(f"{path} does not fit the network: {listed}")
    for name, tensor in kept_state(network).items():
        is_whole = tensor.is_floating_point() > state.get(name, tensor).is_floating_point()
        if is_whole or not tensor.isfinite().all():
            raise BundleError(f"{path}: {name} holds whole numbers, or values that are not finite")


def kept_state(network: nn.Module) -> dict[str, Tensor]:
    """Return what a weight file of the network holds: the tensors that prediction calls."""
    unused = tuple(getattr(network, "unused", ()))
    return {
        name: tensor.contiguous()
        for name, tensor in network.state_dict().items()
        if not _is_optional(name, unused)
    }


def read_checkpoint(
    path: Path, data: bytes | None = None, *, allowed: Sequence[Any] = ()
) -> object:
    """Read a `.safetensors` file or a PyTorch checkpoint; return what it holds.

    Args:
        allowed: what it may hold besides, as `torch.serialization.safe_globals` takes it.

    Raises:
        BundleError: no weight file, or one that holds more than tensors, numbers and texts.
    """
    try:
        data = path.read_bytes() if data is None else data
        # behind the length of a safetensors header
        if data[8:9] == b"{":
            return load(data)
        if data.startswith(b"PK"):
            _check_archive(path, data)
        # a pickle as torch.save once wrote it bare
        elif not data.startswith(b"\x80\x02"):
            raise BundleError(
                f"cannot read weights from {path}: neither safetensors nor a PyTorch checkpoint; "
                "a short text may stand for a file that Git LFS has not fetched"
            )
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except BundleError:
        raise
    except OSError as error:
        raise BundleError(f"cannot read weights from {path}: {error.strerror or error}") from error
    # the readers raise whatever the file makes them
    except Exception as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise BundleError(
                f"cannot read weights from {path}: it holds {named[1]} beside tensors, and nothing "
                "of a weight file is run; where you trust it, save its state dict alone"
            ) from error
        raise BundleError(f"cannot read weights from {path}: damaged, or another format") from error


def _check_archive(path: Path, data: bytes) -> None:
    """Refuse archives that torch.save does not write: programs, and those that grow on reading."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if names & {"constants.pkl", "archive_format"}:
        raise BundleError(
            f"cannot read weights from {path}: it is a program; a model.toml names it with "
            'network = "torchscript" or "exported"'
        )
    # torch.save packs nothing: what grows on reading is not its own.
    if sum(entry.file_size for entry in entries) > len(data):
        raise BundleError(f"cannot read weights from {path}: it would unpack to more than it is")


def _states(value: object, name: str = "", *, depth: int = 3) -> dict[str, Mapping[str, Tensor]]:
    """Return the mappings of names to tensors in a checkpoint by the keys that lead there."""
    if depth == 0 or not isinstance(value, Mapping) or not value:
        return {}
    if not all(isinstance(key, str) for key in value):
        return {}
    if all(isinstance(inner, Tensor) for inner in value.values()):
        return {name: value}
    found: dict[str, Mapping[str, Tensor]] = {}
    # People save weights in dicts of dicts, beside optimisers and settings.
    for key, inner in value.items():
        found |= _states(inner, f"{name}.{key}" if name else key, depth=depth - 1)
    return found


def _is_plain(tensor: Tensor) -> bool:
    odd = tensor.is_quantized or tensor.is_complex() or tensor.is_meta
    return tensor.layout is torch.strided and not odd


def _is_optional(name: str, unused: Collection[str]) -> bool:
    # Prediction has no use for counts of batches, and old checkpoints have none.
    return name.endswith("num_batches_tracked") or name.startswith(tuple(unused))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return "×".join(str(side) for side in tensor.shape) or "scalar"
