"""Weight files that are not what they seem: none is run, each is refused in one sentence."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks.weights import kept_state, load_state, read_state

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Touch:
    """Unpickled, makes a file: code that a weight file might hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["checkpoint", "legacy", "pickle"])
def test_code_in_a_weight_file_is_not_run(tmp_path: Path, kind: str) -> None:
    evil, path = {**STATE, "evil": Touch(tmp_path / "ran")}, tmp_path / "weights.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind == "checkpoint")
    with pytest.raises(BundleError, match=r"cannot read weights from .*weights\.pth"):
        read_state(path)
    assert not (tmp_path / "ran").exists()
    with path.open("rb") as file:
        if kind == "pickle":  # the file would have, if anyone had let it
            pickle.load(file)
            assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        (np.float64(0.5), "numpy"),
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_tensor_is_named_with_the_remedy(
    tmp_path: Path, beside: Any, named: str
) -> None:
    torch.save({"state_dict": STATE, "beside": beside}, tmp_path / "w.pth")
    with pytest.raises(BundleError, match=f"it holds {named}.*save its state dict alone"):
        read_state(tmp_path / "w.pth")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["checkpoint", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "w"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "checkpoint")
    assert read_state(path).keys() == STATE.keys()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BundleError, match="cannot read weights"):
        read_state(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no weights at all\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 28000000\n",
        b"<!DOCTYPE html><html>not found</html>",
        b"\x89HDF\r\n\x1a\n",
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(text)
    with pytest.raises(BundleError, match="neither safetensors nor a PyTorch checkpoint"):
        read_state(tmp_path / "w.pth")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        read_state(tmp_path / "w.pth")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as honest,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in honest.infolist():
            is_data = entry.filename.endswith("data/0")
            bomb.writestr(entry.filename, bytes(10**8) if is_data else honest.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 10**6
    with pytest.raises(BundleError, match="would unpack to more than it is"):
        read_state(tmp_path / "bomb.pth")


def test_a_program_is_said_to_be_one(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "w.pth")
    with pytest.raises(BundleError, match=r'it is a program.*network = "torchscript"'):
        read_state(tmp_path / "w.pth")
    exported = torch.export.export(nn.Linear(1, 1), (torch.ones(1, 1),))
    torch.export.save(exported, tmp_path / "w.pt2")
    with pytest.raises(BundleError, match="it is a program"):
        read_state(tmp_path / "w.pt2")


@pytest.mark.parametrize("value", [[], {}, {"a": 1}, {"a": {"b": {"c": {"d": torch.ones(1)}}}}])
def test_a_file_without_tensors_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(BundleError, match="holds no mapping of names to tensors alone"):
        read_state(tmp_path / "w.pth")


def test_a_mapping_that_holds_itself_is_refused(tmp_path: Path) -> None:
    value: dict[str, Any] = {"epoch": 1}
    value["self"] = value
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(BundleError, match="holds no mapping"):
        read_state(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "odd",
    [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.empty(2, device="meta")],
    ids=["sparse", "complex", "meta"],
)
def test_odd_tensors_are_named(tmp_path: Path, odd: torch.Tensor) -> None:
    torch.save({**STATE, "odd": odd}, tmp_path / "w.pth")
    with pytest.raises(BundleError, match="odd: not plain arrays of real numbers"):
        read_state(tmp_path / "w.pth")


def test_parameters_come_as_plain_tensors(tmp_path: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(2))}, tmp_path / "w.pth")
    assert not read_state(tmp_path / "w.pth")["w"].requires_grad


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(1, 1)})
    state = {**STATE, "a.bias": torch.ones(3), "c": torch.ones(1)}
    path = tmp_path / "w.pth"
    with pytest.raises(
        BundleError, match=r"missing b\.weight, b\.bias; unexpected c; misshapen a\.bias 3 for 2$"
    ):
        load_state(network, state, path=path)
    with pytest.raises(BundleError, match=r"missing b\.weight, b\.bias; misshapen"):
        load_state(network, state, path=path, unused=("c",))


def test_what_is_kept_is_what_prediction_calls() -> None:
    network = nn.ModuleDict({"used": nn.BatchNorm2d(2), "side": nn.Linear(1, 1)})
    network.unused = ("side.",)
    vectors = ("weight", "bias", "running_mean", "running_var")
    assert list(kept_state(network)) == [f"used.{v}" for v in vectors]
