"""Checkpoints from elsewhere in, as bundles; encoders in, to train from."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from wsi_pipeline.bundle import (
    FOREIGN,
    RANDOM_WEIGHTS,
    Activation,
    Bundle,
    bundle_table,
    bundle_toml,
    load_bundle,
    parse_bundle,
)
from wsi_pipeline.colors import COLORS
from wsi_pipeline.errors import BundleError, raised_as
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.networks import NETWORKS, SegmentationNetwork, build, create
from wsi_pipeline.networks.bundle_writer import (
    CARD,
    ENCODER,
    MODEL_TOML,
    ONNX,
    SCRIPT,
    WEIGHTS,
    written_folder,
)
from wsi_pipeline.networks.check import try_bundle
from wsi_pipeline.networks.encoders import ResNet18, mobilenet_v2_features, present_names
from wsi_pipeline.networks.onnx import told_by, whole_onnx
from wsi_pipeline.networks.weights import kept_state, load_state, read_state


class EncoderKind(NamedTuple):
    """An encoder whose weights are published by themselves.

    Attributes:
        network: name of the network of the package that has it.
        prefix: what torchvision's names have before ours.
        classifier: prefix of the published tensors that no network here has.
    """

    name: str
    network: str
    make: Callable[[], nn.Module]
    prefix: str
    classifier: str


ENCODERS = (
    EncoderKind("MobileNetV2", "lightmuseg", mobilenet_v2_features, "features.", "classifier."),
    EncoderKind("ResNet18", "nmtnet", ResNet18, "", "fc."),
)


def import_model(
    checkpoint: Path,
    template: Bundle,
    folder: Path,
    *,
    key: str | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle with the tensors of a checkpoint; return it as it reads back.

    Names are the network's own, which are the authors' where those published code; what wrappers
    put before all of them is taken off. Two classes come as one logit or as two: the checkpoint
    decides.

    Args:
        checkpoint: `.safetensors`, or what `torch.save` writes; nothing in it is run.
        template: What the network is and sees; its weights play no part.
        key: where in the checkpoint the tensors are, as "ema.model"; None = at the only such place.

    Raises:
        BundleError: no checkpoint, one that does not fit, with all names that do not, or a folder
            that is taken.
    """
    state = unwrapped(read_state(checkpoint, key=key))
    if (kind := _encoder_of(state)) is not None:
        raise BundleError(
            f"{checkpoint} holds torchvision's {kind.name} alone: an encoder, no model. Leave out "
            "--network and --like to convert it for training"
        )
    bundle, network = _fitted(template, state, checkpoint)
    place = folder.resolve()
    with written_folder(place, overwrite=overwrite) as partial:
        save_file(kept_state(network), partial / WEIGHTS)
        (partial / MODEL_TOML).write_text(bundle_toml(bundle, weights=WEIGHTS), "utf-8")
        (partial / CARD).write_text(_card(bundle, checkpoint), "utf-8")
        # Before the folder appears: what cannot be read back and built is not left behind.
        build(load_bundle(partial))
    return load_bundle(place)


def import_onnx(
    file: Path, template: Bundle | None, folder: Path, *, overwrite: bool = False
) -> Bundle:
    """Write a bundle with an ONNX file; return it as it reads back.

    Args:
        template: What the network sees and finds; two classes come as one logit or as two: the file
            decides. None = as the file says, which `export_onnx` has written.

    Raises:
        BundleError: no ONNX file, one that is not as it was told, or a folder that is taken.
    """
    data = whole_onnx(file)
    with raised_as(BundleError, ValueError, file):
        told = template or parse_bundle(told_by(data), folder / MODEL_TOML)
    activations: list[Activation] = [told.activation]
    if len(told.classes) == 2:
        activations = ["softmax", "sigmoid"]
    place, reasons = folder.resolve(), list[BundleError]()
    with written_folder(place, overwrite=overwrite) as partial:
        (partial / ONNX).write_bytes(data)
        for activation in activations:
            bundle = replace(
                told, name=place.name, network="onnx", network_options={}, activation=activation
            )
            (partial / MODEL_TOML).write_text(bundle_toml(bundle, weights=ONNX), "utf-8")
            (partial / CARD).write_text(_card(bundle, file), "utf-8")
            try:
                build(load_bundle(partial))
                break
            except BundleError as error:
                reasons.append(BundleError(str(error).replace(str(partial / ONNX), str(file))))
        else:
            raise reasons[0]
    return load_bundle(place)


def import_wsinfer(source: Path, folder: Path, *, overwrite: bool = False) -> Bundle:
    """Write a bundle with a patch classifier of WSInfer's zoo; return it as it reads back.

    Args:
        source: folder with `config.json` and `torchscript_model.pt`, which is a program, and run.

    Raises:
        BundleError: no such folder, one that says what is not known here, a program that answers
            otherwise, or a folder that is taken.
    """
    place, what = folder.resolve(), f"{source}: no patch classifier of WSInfer"
    try:
        told = json.loads((source / "config.json").read_bytes())
        steps = {step["name"]: step.get("arguments") or {} for step in told["transform"]}
        names, side, mpp = (
            told[key] for key in ("class_names", "patch_size_pixels", "spacing_um_px")
        )
        size = steps.get("Resize", {}).get("size", side)
        normal = steps.get("Normalize", {"mean": [0.0] * 3, "std": [1.0] * 3})
        means, program = (normal["mean"], normal["std"]), source / "torchscript_model.pt"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{what}: its config.json lacks or misuses {error}") from error
    if odd := steps.keys() - {"Resize", "ToTensor", "Normalize"}:
        raise BundleError(f"{what} as known here: its transform has {', '.join(sorted(odd))}")
    sizes = [size, size] if isinstance(size, int) else size
    table = {
        "name": place.name,
        "modality": "slide",
        "network": "torchscript",
        "network_options": {} if sizes == [side, side] else {"resize": sizes},
        "input": {"mpp": mpp, "patch_size": [side, side], "overlap": [0, 0],
                  "mean": means[0], "std": means[1]},
        "output": {"activation": "sigmoid" if len(names) == 1 else "softmax", "labels": names},
    }  # fmt: skip
    bundle = parse_bundle(table, source / "config.json")
    with written_folder(place, overwrite=overwrite) as partial:
        if not program.is_file():
            raise BundleError(f"{what}: it lacks {program.name}")
        shutil.copyfile(program, partial / SCRIPT)
        (partial / MODEL_TOML).write_text(bundle_toml(bundle, weights=SCRIPT), "utf-8")
        (partial / CARD).write_text(_card(bundle, program), "utf-8")
        try_bundle(load_bundle(partial))
    return load_bundle(place)


def init_model(template: Bundle, folder: Path, *, seed: int = 0, overwrite: bool = False) -> Bundle:
    """Write a bundle with random weights, to try what is around the network; return it.

    Raises:
        BundleError: a foreign program, whose weights are its own, or a folder that is taken.
    """
    if template.network in FOREIGN or template.encoder:
        raise BundleError(f"{template.path} is a program: its weights are in it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create(template)
        _balance(network, template)
    limits = f"{RANDOM_WEIGHTS}: the model has learnt nothing, and what it marks means nothing."
    bundle = replace(template, name=folder.resolve().name, limits=limits, temperature=1.0)
    with written_folder(folder, overwrite=overwrite) as partial:
        save_file(kept_state(network), partial / WEIGHTS)
        (partial / MODEL_TOML).write_text(bundle_toml(bundle, weights=WEIGHTS), "utf-8")
        (partial / CARD).write_text(
            f"# {bundle.name}\n\n`{bundle.network}` with random weights (seed {seed}), as "
            f"{template.name}. It has learnt nothing and finds nothing: a bundle to try the "
            "pipeline with.\n",
            "utf-8",
        )
    return load_bundle(folder)


@torch.no_grad()
def _balance(network: SegmentationNetwork, bundle: Bundle) -> None:
    """Let batch norms and the last biases know coarse noise, so that all classes occur on it."""
    sides = (2 * network.size_multiple,) * network.ndim
    coarse = torch.rand(4, bundle.input.channels, *(side // 4 for side in sides))
    noise = functional.interpolate(coarse * 4 - 2, sides)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            # One pass is to set the running figures, not to move them a tenth of the way.
            module.momentum = 1.0
    network.train()(noise)
    answer = network.eval()(noise)
    logits = answer["mask"] if isinstance(answer, Mapping) else answer
    heads = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    (*_, head) = (m for m in heads if m.out_channels == logits.shape[1] and m.bias is not None)
    assert head.bias is not None
    head.bias -= logits.transpose(0, 1).flatten(1).median(1).values


def import_encoder(
    checkpoint: Path, folder: Path, *, key: str | None = None, overwrite: bool = False
) -> tuple[EncoderKind, Path]:
    """Write torchvision's weights of an encoder as safetensors; return its kind and the file.

    Raises:
        BundleError: no encoder that a network here has, or a folder that is taken.
    """
    state = unwrapped(read_state(checkpoint, key=key))
    if (kind := _encoder_of(state)) is None:
        names = " nor ".join(f"torchvision's {kind.name}" for kind in ENCODERS)
        raise BundleError(
            f"{checkpoint} is neither {names}; say what it is with --network or --like"
        )
    load_state(kind.make(), _encoder_state(state, kind), path=checkpoint)
    kept = {
        # a copy of each: safetensors takes none that share their memory
        f"{kind.prefix}{name}": tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in _encoder_state(state, kind).items()
    }
    with written_folder(folder, overwrite=overwrite) as partial:
        save_file(kept, partial / ENCODER)
    return kind, folder / ENCODER


def make_template(
    *,
    folder: Path,
    like: Bundle | None = None,
    network: str | None = None,
    classes: Sequence[str] | None = None,
    mpp: float | None = None,
    patch_size: Sequence[int] | None = None,
) -> Bundle:
    """Describe a model that is to be imported; return it as a bundle without weights.

    Args:
        like: a bundle that it is like, but for the rest of the arguments.
        network: Name of a network for slides, without `like`.
        classes: names in the mask's order, the background first.
        patch_size: pixels, one number for all axes or one an axis; overlaps become a quarter.

    Raises:
        BundleError: the description lacks something or contradicts itself.
    """
    if like is not None and (like.network in FOREIGN or like.encoder):
        raise BundleError(f"{like.path} is a program, which takes no checkpoint")
    if like is None and (network is None or classes is None or mpp is None):
        raise BundleError("a model is described by --like, or by --network, --classes and --mpp")
    # what another model is not to be trusted with says nothing of this one
    # What was measured of its weights is not of others.
    own = like and replace(like, limits="", temperature=1.0)
    table = bundle_table(own) if own else _slide_table(str(network))
    spec, output = table["input"], table["output"]
    table["name"] = folder.resolve().name
    if mpp is not None:
        spec["mpp"] = mpp
    if patch_size is not None:
        sizes = list(patch_size) * (len(spec["patch_size"]) if len(patch_size) == 1 else 1)
        spec |= {"patch_size": sizes, "overlap": [side // 4 for side in sizes]}
    if classes is not None:
        classes = [name.strip() for name in classes]
        known = {c["name"]: c for c in output["classes"] if c["name"] in classes}
        taken = [c.get("color") for c in known.values()]
        colors = cycle([color for color in COLORS if color not in taken] or COLORS)
        output["classes"] = [
            known.get(name) or {"name": name, "color": next(colors)} for name in classes
        ]
        output["activation"] = "softmax"
    return parse_bundle(table, folder / MODEL_TOML)


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without what stands before all of their names, such as `module.`.

    Example:
        >>> list(unwrapped({"_orig_mod.module.a.weight": torch.ones(1)}))
        ['weight']
    """
    state = dict(state)
    # Wrappers stand in each other, as data parallelism around what is compiled.
    while all("." in n for n in state) and len({n.partition(".")[0] for n in state}) == 1:
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def _slide_table(network: str) -> dict[str, Any]:
    """Return the `model.toml` of a network for slides, but for what the user must say."""
    if network not in (*NETWORKS, "onnx"):
        raise BundleError(f"no network {network!r}; there are {', '.join(NETWORKS)}")
    kind = NETWORKS.get(network)
    if kind and (kind.ndim != 2 or "labels" in inspect.signature(kind).parameters):
        raise BundleError(f"--network {network}: not made for slides; name a bundle with --like")
    return {
        "modality": "slide",
        "network": network,
        "network_options": {} if network == "onnx" else {"channels": 3},
        "input": {"patch_size": [512, 512], "overlap": [128, 128]},
        "output": {"activation": "softmax", "classes": []},
    }


def _fitted(
    template: Bundle, state: Mapping[str, Tensor], checkpoint: Path
) -> tuple[Bundle, SegmentationNetwork]:
    """Return the bundle and network, of those that the template allows, that the tensors fit."""
    count = len(template.classes)
    # one logit where there are two classes, and one for each class
    reasons = []
    for logits in [1, count] if count == 2 else [count]:
        bundle = replace(
            template,
            network_options={**template.network_options, "classes": logits},
            activation="sigmoid" if logits == 1 else "softmax",
        )
        network = create(bundle)
        try:
            load_state(network, state, path=checkpoint, unused=network.unused)
        except BundleError as error:
            reasons.append(error)
        else:
            return bundle, network
    # with the least to complain of
    raise min(reasons, key=lambda error: len(str(error)))


def _encoder_of(state: Mapping[str, Tensor]) -> EncoderKind | None:
    """Return the encoder that the tensors are, and nothing else; None where they are not."""
    for kind in ENCODERS:
        with torch.device("meta"):
            # Shapes are all that is asked for: on meta they take neither time nor memory.
            expected = _shapes(kind.make().state_dict())
        if _shapes(_encoder_state(state, kind)) == expected:
            return kind
    return None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {n: t.shape for n, t in state.items() if not n.endswith("num_batches_tracked")}


def _encoder_state(state: Mapping[str, Tensor], kind: EncoderKind) -> dict[str, Tensor]:
    return {
        name.removeprefix(kind.prefix): tensor
        for name, tensor in present_names(state).items()
        if not name.startswith(kind.classifier)
    }


def _card(bundle: Bundle, checkpoint: Path) -> str:
    """Return a model card with what is known, and with what its reader must add."""
    names = ", ".join(c.name for c in bundle.classes[1:])
    labels = f" It says of a patch: {', '.join(bundle.labels)}." if bundle.labels else ""
    patch = " × ".join(map(str, bundle.input.patch_size))
    sections = [
        f"# {bundle.name}",
        f"`{bundle.network}` for {names} on {bundle.modality}s, in patches of {patch} px.{labels}",
        "**For research. Not a medical device; not for diagnosis.**",
        "## Weights",
        f"Imported from `{checkpoint.name}`, sha256 `{sha256_of(checkpoint)}`. Whether it was "
        "trained at the resolution and with the mean and deviation of `model.toml` its file does "
        "not say: check them.",
        "## Training data\n\nNot known: add where they come from, and under which licence.",
        "## How well it does\n\nNot measured.",
        "## Limits\n\nNot known: add what it has not seen.",
    ]
    return "\n\n".join(sections) + "\n"
