"""Model bundles: a folder with `model.toml`, a card and weights. Reading one needs no torch.

Long because a record, what it may hold and how it is written are one thing.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, structs

from wsi_pipeline.colors import COLORS, QUPATH_COLORS
from wsi_pipeline.errors import BundleError, raised_as
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.files.download import cache_path, download
from wsi_pipeline.files.fetched import fetched_model
from wsi_pipeline.files.models import find_model, inside, origin_of
from wsi_pipeline.files.schema import (
    Count,
    Index,
    Mpp,
    Positive,
    Real,
    Record,
    as_toml,
    converted,
    paragraph,
    read_toml,
    toml_of,
)
from wsi_pipeline.options import Tta, turns

Modality = Literal["slide", "image", "volume"]
Activation = Literal["sigmoid", "softmax"]
Scale = Literal["range", "minmax", "zscore"]
Interpolation = Literal["linear", "cubic"]
Program = Literal["exported", "torchscript", "onnx"]
FOREIGN: tuple[str, ...] = get_args(Program)
"""Networks that come as a program in the bundle's folder."""
DECODER = "decoder"
"""The network of the package that works behind a program of others."""
AXES: Mapping[Modality, int] = {"slide": 2, "image": 2, "volume": 3}
"""Of a patch."""
RANDOM_WEIGHTS = "RANDOM WEIGHTS"
"""How the limits of a model begin that has learnt nothing."""
RESOLUTION: Mapping[Modality, str] = {"slide": "mpp", "image": "fit", "volume": "spacing_mm"}
"""The key of `[input]` that says at what resolution the network sees."""
Word = Annotated[str, Meta(pattern=r"\S", description="a word in quotes")]
Name = Annotated[
    str,
    Meta(pattern=r"^\s*[^\s:*][^:*\n\r]*$", description="a name without ':', '*' and line breaks"),
]
Byte = Annotated[int, Meta(ge=0, le=255, description="a whole number from 0 to 255")]
PREPARATION: Mapping[str, tuple[Modality, ...]] = {
    "scale": ("image", "volume"),
    "orient": ("image",),
    "pad": ("image",),
    "interpolation": ("image", "volume"),
    "time_points": ("volume",),
    "convention": ("slide", "image", "volume"),
}
"""The keys of `[input]` that say how pixels are prepared, and of what."""


class ClassInfo(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One class of the mask.

    Attributes:
        color: Red, green, blue, 0 to 255; None for the background only.
    """

    name: Name
    color: Annotated[tuple[Byte, Byte, Byte], Meta(description="[red, green, blue]")] | None = None


class InputSpec(Record, frozen=True, kw_only=True):
    """What the network wants to see.

    Attributes:
        mpp: µm per pixel, for slides; else None.
        fit: (height, width) in pixels that a planar image is brought to; else None.
        spacing_mm: (z, y, x) of a voxel in mm, for volumes; else None.
        patch_size: pixels, array order.
        overlap: pixels between neighbouring patches, array order.
        mean: per channel, after scaling to [0, 1].
        std: per channel.
        scale: which values of an image or volume become 0 and 1: those of the file's own "range",
            the least and largest of the body ("minmax"), or these two numbers. "zscore": the
            body's mean and mean + standard deviation.
        orient: "left" = an image is mirrored where its right half is the brighter.
        pad: "square" = an image's shorter side is padded to the longer before `fit`.
        interpolation: where pixels are not taken as they are.
        time_points: which of a volume with several, from 0, are its channels; None = one alone.
        convention: "nnunet" = prepared, tiled and blended, by logits, as nnU-Net does.
    """

    mpp: Mpp | None = None
    fit: (
        Annotated[tuple[Count, Count], Meta(description="[height, width] in pixels above 0")] | None
    ) = None
    spacing_mm: (
        Annotated[tuple[Positive, Positive, Positive], Meta(description="[z, y, x] in mm above 0")]
        | None
    ) = None
    channels: Count = 3
    patch_size: Annotated[
        tuple[Count, ...],
        Meta(min_length=2, max_length=3, description="[y, x] or [z, y, x] in pixels above 0"),
    ] = (512, 512)
    overlap: tuple[Index, ...] = (128, 128)
    mean: tuple[Real, ...] = (0.485, 0.456, 0.406)
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    scale: Scale | Annotated[tuple[Real, Real], Meta(description="[low, high], rising")] = "range"
    orient: Literal["left"] | None = None
    pad: Literal["square"] | None = None
    interpolation: Interpolation = "linear"
    time_points: tuple[Index, ...] | None = None
    convention: Literal["nnunet"] | None = None


class OutputSpec(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What the network answers, see `Bundle`."""

    activation: Activation
    classes: Annotated[tuple[ClassInfo, ...], Meta(description='a list of { name = "…" }')] = ()
    labels: Annotated[tuple[Name, ...], Meta(description="one name, two names or more")] = ()
    temperature: Positive = 1.0


class RemoteFile(Record, frozen=True, kw_only=True):
    """Weights that lie elsewhere, and the digest that they must have."""

    url: str
    sha256: Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$", description="64 hex digits")]


class EncoderSpec(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The program that a decoder works behind, see `Bundle`."""

    network: Program
    weights: Annotated[
        str | RemoteFile, Meta(description="a file's name, or { url = …, sha256 = … }")
    ]
    network_options: dict[str, Any] = msgspec.field(default_factory=dict)


class ModelToml(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What a `model.toml` holds, see `Bundle`."""

    name: Word
    modality: Modality
    limits: Annotated[str, Meta(description="a paragraph in quotes")] = ""
    network: Word
    weights: Annotated[
        str | RemoteFile | None, Meta(description="a file's name, or { url = …, sha256 = … }")
    ] = None
    features: Annotated[str | None, Meta(description="a file's name")] = None
    int8: Annotated[str | None, Meta(description="a file's name")] = None
    tta: Tta = "none"
    network_options: dict[str, Any] = msgspec.field(default_factory=dict)
    encoder: EncoderSpec | None = None
    input: InputSpec
    output: OutputSpec


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A model ready to be built.

    Attributes:
        path: The folder of `model.toml`.
        network: A name in `wsi_pipeline.networks.NETWORKS`, DECODER, which works behind `encoder`,
            or one of FOREIGN, which are programs.
        weights_path: The file with weights, or the foreign program; None where there are none.
        weights_origin: Where weights are fetched from; None where they lie in the folder.
        features_path: The file that says what training patches look like to the network, or None.
        int8_path: The file of ranges by which the network predicts in 8-bit integers, or None.
        activation: "sigmoid" or "softmax", which turns logits into probabilities.
        classes: Classes in the mask's order; 0 is the background.
        labels: What the network says of a whole patch, in its order; empty where nothing.
        is_patchwise: Whether it says nothing else: `classes` are its labels then, behind a
            background that it never says, and each pixel of a patch has what the patch has.
        temperature: Number that the mask's logits are divided by, so that probabilities are as
            often right as they say.
        limits: What its results must not be trusted with: a paragraph that goes with them.
        tta: "none", "flip", "mirror" or "d4": how patches are shown where nobody says.
        origin: Where it was fetched from: `url`, with the commit of a repository, and `sha256` of
            what was there otherwise; empty where a person has put it in its place.
        members: Of an ensemble.
        encoder: Of a decoder, the frozen program that it works behind; `network`, `weights_…` and
            `network_options` are the program's, all else is the bundle's own.
    """

    path: Path
    name: str
    modality: Modality
    network: str
    weights_path: Path | None
    weights_origin: RemoteFile | None = None
    features_path: Path | None = None
    int8_path: Path | None = None
    network_options: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec
    activation: Activation
    classes: tuple[ClassInfo, ...]
    labels: tuple[str, ...] = ()
    is_patchwise: bool = False
    temperature: float = 1.0
    limits: str = ""
    tta: Tta = "none"
    origin: Mapping[str, str] = field(default_factory=dict)
    members: tuple[Bundle, ...] = ()
    encoder: Bundle | None = None

    @property
    def mpp(self) -> float:
        """Return the µm per pixel that slides are seen at.

        Raises:
            BundleError: the bundle is not for slides.
        """
        if self.input.mpp is None:
            raise BundleError(f"{self.name} is for {self.modality}s and has no µm per pixel")
        return self.input.mpp

    @cached_property
    def weights_sha256(self) -> str:
        """Return the hex digest of the weights file, or "" where there is none."""
        if self.members:
            return hashlib.sha256("".join(m.digest for m in self.members).encode()).hexdigest()
        with raised_as(BundleError, OSError, "cannot read weights"):
            return sha256_of(self.weights_path) if self.weights_path else ""

    def read_weights(self) -> bytes:
        """Return what the weights file holds, the very bytes that `weights_sha256` is of.

        Raises:
            BundleError: there is none, or it has been replaced since the digest was taken.
        """
        if self.weights_path is None:
            raise BundleError(f"the bundle {self.path} names no weights; set them in model.toml")
        try:
            data = self.weights_path.read_bytes()
        except OSError as error:
            raise BundleError(
                f"cannot read weights from {self.weights_path}: {error.strerror or error}"
            ) from error
        digest = hashlib.sha256(data).hexdigest()
        # Where nobody has asked for the digest, that of these bytes counts from here on.
        if self.__dict__.setdefault("weights_sha256", digest) != digest:
            raise BundleError(
                f"{self.weights_path} has been replaced since this command began: give it again"
            )
        return data

    @property
    def digest(self) -> str:
        """Return a digest of all that masks, and what is told of them, depend on."""
        # Words that are added to the limits must not have finished slides done anew.
        table = bundle_table(replace(self, limits=""))
        files = [sha256_of(path) for path in (self.features_path, self.int8_path) if path]
        files += [self.encoder.weights_sha256] if self.encoder else []
        text = json.dumps([table, self.weights_sha256, *files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_bundle(location: str | Path, *, fetch: bool = True) -> Bundle:
    """Read and check a bundle; return it.

    Args:
        location: the bundle's folder, its name, its `model.toml`, or a URL of https:// or hf://.
        fetch: get weights that lie behind a URL. False: such a bundle has no `weights_path` as
            long as they are not in the cache.

    Raises:
        BundleError: no such bundle, or one that lacks something or contradicts itself.
    """
    path = (fetched_model if "://" in str(location) else find_model)(str(location))
    try:
        table = read_toml(path)
    except ValueError as error:
        raise BundleError(f"{path} {error}") from error
    except OSError as error:
        raise BundleError(f"no bundle at {location}: {error.strerror or error}") from error
    return parse_bundle(table, path, fetch=fetch)


def parse_bundle(
    table: Mapping[str, Any], path: Path, *, fetch: bool = True, is_recipe: bool = False
) -> Bundle:
    """Check the content of a `model.toml`; return the bundle.

    Args:
        path: The file, in the bundle's folder.
        fetch: See `load_bundle`.
        is_recipe: Its encoder may lie anywhere from there, and be missing until it is read.

    Raises:
        BundleError: something is missing, unknown or contradicts something else.
    """
    with raised_as(BundleError, ValueError, path):
        found = converted(table, ModelToml)
        _check_input(found.input, found.modality, table["input"])
        turns(found.tta, found.input.patch_size, found.input.spacing_mm or ())
        is_patchwise = bool(found.output.labels and not found.output.classes)
        if is_patchwise and found.network not in FOREIGN:
            raise ValueError(f"lacks output.classes: {found.network} gives a mask")
        classes = _classes(_by_patch(found.output) if is_patchwise else found.output)
        members = converted(found.network_options.get("members", []), list[str])
        if bool(members) != (found.network == "ensemble"):
            raise ValueError('network = "ensemble" and network_options.members come together')
        if (found.network == DECODER) != (found.encoder is not None):
            raise ValueError(f'network = "{DECODER}" and [encoder] come together')
        is_program = found.network in FOREIGN
        if (found.features and is_program) or (found.int8 and (is_program or found.encoder)):
            raise ValueError("features and int8 are of a network of the package, not of a program")
        origin = origin_of(path.parent)
        for part in (found, found.encoder):
            if origin and part and part.network in FOREIGN and part.network != "onnx":
                name = part.weights if isinstance(part.weights, str) else "the file that it names"
                raise ValueError(
                    f"{name}, from {origin.get('url')}, is a program, and none is run that "
                    "was fetched; download it and name its folder, if you trust who made it"
                )
    weights_path, weights_origin = _weights(found.weights, path.parent, fetch=fetch)
    features_path = found.features and _in_folder(found.features, "features", path.parent)
    int8_path = found.int8 and _in_folder(found.int8, "int8 ranges", path.parent)
    bundle = Bundle(
        path=path.parent,
        name=found.name,
        modality=found.modality,
        network=found.network,
        weights_path=weights_path,
        weights_origin=weights_origin,
        features_path=features_path or None,
        int8_path=int8_path or None,
        network_options={k: v for k, v in found.network_options.items() if k != "members"},
        input=found.input,
        activation=found.output.activation,
        classes=classes,
        labels=() if is_patchwise else tuple(label.strip() for label in found.output.labels),
        is_patchwise=is_patchwise,
        temperature=found.output.temperature,
        limits=paragraph(found.limits),
        tta=found.tta,
        origin=origin,
        members=tuple(load_bundle(path.parent / member) for member in members),
    )
    if (spec := found.encoder) is None:
        return bundle
    file, fetched = _weights(spec.weights, path.parent, fetch=fetch, is_recipe=is_recipe)
    encoder = replace(
        bundle,
        name=f"the encoder of {bundle.name}",
        network=spec.network,
        weights_path=file,
        weights_origin=fetched,
        network_options=spec.network_options,
    )
    return replace(bundle, encoder=encoder)


def bundle_toml(
    bundle: Bundle,
    *,
    weights: str | None,
    features: str | None = None,
    int8: str | None = None,
    encoder: str | None = None,
) -> str:
    """Return the `model.toml` of a bundle.

    Args:
        weights: Name of the file with its weights, in its folder; None = it has none.
        features: Name of the file that says what training patches look like, likewise.
        int8: Name of the file of ranges for 8-bit integers, likewise.
        encoder: Name of the program that it works behind, likewise; None = it is fetched.
    """
    files = {"weights": weights, "features": features, "int8": int8}
    table = bundle_table(bundle) | {key: name for key, name in files.items() if name}
    if own := bundle.encoder:
        place = encoder or (own.weights_origin and structs.asdict(own.weights_origin))
        table["encoder"]["weights"] = place
    return toml_of(table)


def bundle_table(bundle: Bundle) -> dict[str, Any]:
    """Return what the `model.toml` of a bundle holds, but for the names of its files."""
    names = [info.name for info in bundle.classes[1:]]
    found = ModelToml(
        name=bundle.name,
        modality=bundle.modality,
        limits=bundle.limits,
        network=bundle.network,
        tta=bundle.tta,
        network_options=dict(bundle.network_options),
        input=bundle.input,
        output=OutputSpec(
            activation=bundle.activation,
            classes=() if bundle.is_patchwise else bundle.classes,
            labels=bundle.labels or tuple(names) * bundle.is_patchwise,
            temperature=bundle.temperature,
        ),
    )
    # by way of JSON, which has lists for tuples, as what is read back
    table: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(found))
    # Usual values are left out: a key that is new here must not change the digests of old bundles.
    table["input"] = {
        key: value
        for key, value in table["input"].items()
        if value is not None and (key not in PREPARATION or value != getattr(InputSpec(), key))
    }
    if own := bundle.encoder:
        options = {"network_options": dict(own.network_options)} if own.network_options else {}
        table["encoder"] = {"network": own.network, **options}
    return {"network_options": {}} | table


def _check_input(spec: InputSpec, modality: Modality, given: Collection[str]) -> None:
    """Refuse what a modality does not have, and sizes that do not go together.

    Args:
        given: The keys that the bundle's file has.
    """
    own, axes, count = RESOLUTION[modality], AXES[modality], spec.channels
    # Told by keys, not by values: one may be given that is the usual one.
    if others := [key for key in RESOLUTION.values() if key != own and key in given]:
        raise ValueError(f"input.{others[0]} is not for {modality}s, which have input.{own}")
    if own not in given and not (spec.convention and own == "fit"):
        raise ValueError(f"lacks input.{own}, the resolution of {modality}s")
    if others := [k for k, kinds in PREPARATION.items() if k in given and modality not in kinds]:
        raise ValueError(f"input.{others[0]} is not for {modality}s")
    lengths = {"patch_size": axes, "overlap": axes, "mean": count, "std": count}
    for key, length in (lengths | {"time_points": count}).items():
        values = getattr(spec, key)
        if values is not None and len(values) != length:
            each = "an axis" if key in ("patch_size", "overlap") else "a channel"
            raise ValueError(f"input.{key} is {as_toml(values)}; expected {length}, one {each}")
    if any(map(operator.ge, spec.overlap, spec.patch_size)):
        raise ValueError(
            f"input.overlap is {as_toml(spec.overlap)}; expected less than patch_size, "
            f"{as_toml(spec.patch_size)}"
        )
    if not isinstance(spec.scale, str) and spec.scale[0] >= spec.scale[1]:
        raise ValueError(f"input.scale is {as_toml(spec.scale)}; expected [low, high], rising")
    if spec.pad and len({*(spec.fit or ())}) != 1:
        raise ValueError(f"input.pad is {as_toml(spec.pad)}; expected a fit of equal sides with it")


def _by_patch(output: OutputSpec) -> OutputSpec:
    """Return the output that a classifier's is in a mask."""
    if (len(output.labels) == 1) != (output.activation == "sigmoid"):
        raise ValueError("output without classes: sigmoid takes one of labels, softmax several")
    nothing = "No patch" if "Background" in output.labels else "Background"
    named = zip(output.labels, cycle(COLORS), strict=False)
    classes = (ClassInfo(name=nothing), *(ClassInfo(name=n, color=c) for n, c in named))
    return structs.replace(output, classes=classes, labels=())


def _classes(output: OutputSpec) -> tuple[ClassInfo, ...]:
    """Return the classes with the colours that they are shown in."""
    names = [info.name.strip() for info in output.classes]
    count, activation = len(names), output.activation
    if not 2 <= count <= 255 or (activation == "sigmoid" and count != 2):
        raise ValueError(
            f"output.classes has {count} classes with {activation}; sigmoid takes 2, softmax 2 to "
            "255, the background included"
        )
    if len(output.labels) == 1:
        raise ValueError(f"output.labels is {as_toml(output.labels)}; expected two names or more")
    for what, given in (("classes", names), ("labels", [s.strip() for s in output.labels])):
        if len({*given}) != len(given):
            raise ValueError(f"two of output.{what} have the same name")
    classes = [ClassInfo(name=names[0])]
    for name, info in zip(names[1:], output.classes[1:], strict=True):
        # QuPath has its own colour for some names and takes no other, so all outputs have it
        color = QUPATH_COLORS.get(name, info.color)
        if color is None:
            raise ValueError(f"class {name!r} has no color; add color = [red, green, blue]")
        classes.append(ClassInfo(name=name, color=color))
    return tuple(classes)


def _weights(
    entry: str | RemoteFile | None, folder: Path, *, fetch: bool, is_recipe: bool = False
) -> tuple[Path | None, RemoteFile | None]:
    """Return the weights' file, where it is there, and where it is fetched from."""
    if entry is None:
        return None, None
    if isinstance(entry, RemoteFile):
        is_here = fetch or cache_path(entry.url, entry.sha256).is_file()
        return download(entry.url, entry.sha256) if is_here else None, entry
    if "://" in entry:
        raise BundleError(f"weights {entry!r} is a URL; expected {{ url = …, sha256 = … }}")
    return folder / entry if is_recipe else _in_folder(entry, "weights", folder), None


def _in_folder(name: str, what: str, folder: Path) -> Path:
    """Return a file of a bundle, which is there and in its folder."""
    path = inside(folder, name, what)
    if not path.is_file():
        raise BundleError(f"the bundle {folder} names {what} {name!r}, which are not there")
    return path
