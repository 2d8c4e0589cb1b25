"""Networks out, as programs for other runtimes: ONNX and torch.export."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from wsi_pipeline.bundle import Bundle, bundle_toml
from wsi_pipeline.errors import BundleError
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import claimed
from wsi_pipeline.networks import SegmentationNetwork, build, create
from wsi_pipeline.networks.bundle_writer import CARD, MODEL_TOML, PROGRAM, written_folder
from wsi_pipeline.networks.check import (
    TOLERANCE,
    check_shapes,
    largest_difference,
    random_patches,
    run,
)
from wsi_pipeline.networks.fold import for_inference

INPUT = "patches"
"""Name of an ONNX file's input; its outputs are `mask` and, where there is one, `label`."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    bundle: Bundle, path: Path, *, batch_size: int | None = None, overwrite: bool = False
) -> float:
    """Write a bundle's network as ONNX; return how far it is from the network.

    The file takes normalised patches and gives logits, as the network does. It holds the
    `model.toml`, which says how to normalise and what the classes are, in its metadata.

    Args:
        batch_size: the only one that the file takes; None = any.

    Returns:
        The largest difference on random patches, as a share of the largest logit.

    Raises:
        BundleError: no network to export, packages that lack, a file that is there, or an answer
            that differs.
    """
    if lacking := [name for name in ONNX_PACKAGES if not find_spec(name)]:
        raise BundleError(f'no {", ".join(lacking)} here: pip install "wsi-pipeline[onnx]"')
    if path.is_dir() or (path.exists() and not overwrite):
        raise BundleError(f"{path} is there already; name another file, or add --overwrite")
    network = _network(bundle)
    size = (bundle.input.channels, *bundle.input.patch_size)
    with torch.device("meta"):
        answer = run(create(bundle).eval(), torch.empty(1, *size))
    check_shapes(answer, bundle, 1)
    names = list(answer)
    # PyTorch warns of itself
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            _Tuple(_inference_form(network)).eval(),
            # torch.export takes an axis of one for fixed: two patches leave the batch free.
            (random_patches(bundle, batch_size or 2),),
            dynamo=True,
            dynamic_shapes=None if batch_size else ({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=names,
            verbose=False,
        )
    # None comes only where a file is given to write to
    assert program is not None
    program.model.metadata_props[MODEL_TOML] = bundle_toml(bundle, weights=None)
    try:
        with claimed(path), written_beside(path) as partial:
            # One file whatever its size: weights that lie beside get lost on the way.
            program.save(partial, external_data=False)
            return _checked(bundle, network, _onnx_runner(partial, names), batch_size)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror or error}") from error


def export_torch(
    bundle: Bundle, folder: Path, *, batch_size: int | None = None, overwrite: bool = False
) -> float:
    """Write a bundle's network as a torch.export program in a bundle; return how far it is from it.

    Returns:
        As `export_onnx`.

    Raises:
        BundleError: no network to export, a folder that is taken, or an answer that differs.
    """
    network = _network(bundle)
    card = bundle.path / CARD
    told = card.read_text("utf-8", "replace") if card.is_file() else f"# {bundle.name}\n"
    note = f"\n## This form\n\nExported from `{bundle.name}`, weights sha256 "
    exported = replace(bundle, network="exported", network_options={})
    with written_folder(folder, overwrite=overwrite) as partial:
        # PyTorch warns of itself
        with warnings.catch_warnings(action="ignore"):
            program = torch.export.export(
                _inference_form(network),
                (random_patches(bundle, batch_size or 2),),
                dynamic_shapes=None if batch_size else ({0: torch.export.Dim("batch")},),
            )
            # Into memory first: of a full disk torch's own writer says nothing that helps.
            torch.export.save(program, buffer := io.BytesIO())
            (partial / PROGRAM).write_bytes(buffer.getvalue())
            loaded = torch.export.load(partial / PROGRAM).module()
        (partial / MODEL_TOML).write_text(bundle_toml(exported, weights=PROGRAM), "utf-8")
        (partial / CARD).write_text(f"{told}{note}`{bundle.weights_sha256}`.\n", "utf-8")
        # What was saved is checked, before the folder appears.
        return _checked(bundle, network, lambda patches: run(loaded, patches), batch_size)


class _Tuple(nn.Module):
    """A network whose mapping comes as a tuple, which has an order."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the logits, those of the mask first."""
        output = self.network(x)
        return tuple(output.values()) if isinstance(output, Mapping) else output


def _network(bundle: Bundle) -> SegmentationNetwork:
    network = build(bundle).module
    if not isinstance(network, SegmentationNetwork) or bundle.encoder:
        raise BundleError(f"{bundle.path} is a program already, or works behind one")
    return network


def _inference_form(network: SegmentationNetwork) -> nn.Module:
    """Return the folded network in plain layout: what is quick here is no concern of a program."""
    folded = for_inference(network)
    return folded.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]


def _onnx_runner(path: Path, names: list[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def predict(patches: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {INPUT: patches.numpy()})
        return {name: torch.from_numpy(o) for name, o in zip(names, outputs, strict=True)}

    return predict


def _checked(
    bundle: Bundle,
    network: nn.Module,
    predict: Callable[[Tensor], dict[str, Tensor]],
    batch_size: int | None,
) -> float:
    """Return the largest difference between network and program; refuse one that matters."""
    most = 0.0
    # A batch that should be free may have been fixed all the same.
    for count in [batch_size] if batch_size else [1, 2]:
        patches = random_patches(bundle, count)
        expected = run(network, patches)
        check_shapes(expected, bundle, count)
        most = max(most, difference := largest_difference(expected, predict(patches)))
        if not difference <= TOLERANCE:
            raise BundleError(
                f"{bundle.name}: the program differs from the network by {difference:.1e} of the "
                f"largest logit, more than {TOLERANCE:g}; not written"
            )
    return most
