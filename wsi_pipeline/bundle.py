"""Model bundles: a folder with `model.toml`, a card and weights. Reading one needs no torch."""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from wsi_pipeline.colors import QUPATH_COLORS
from wsi_pipeline.errors import BundleError

Modality = Literal["slide", "image", "volume"]
Activation = Literal["sigmoid", "softmax"]
FOREIGN = ("exported", "torchscript")
"""Networks that come as a program in the bundle's folder."""


@dataclass(frozen=True, kw_only=True)
class ClassInfo:
    """One class of the mask.

    Attributes:
        name: as shown to people.
        color: red, green, blue, 0 to 255; None for the background only.
    """

    name: str
    color: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What the network wants to see.

    Attributes:
        mpp: µm per pixel, for slides.
        channels: of the input.
        patch_size: pixels, array order.
        overlap: pixels between neighbouring patches, array order.
        mean: per channel, after scaling to [0, 1].
        std: per channel.
    """

    mpp: float
    channels: int = 3
    patch_size: tuple[int, ...] = (512, 512)
    overlap: tuple[int, ...] = (128, 128)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A model ready to be built.

    Attributes:
        path: folder of `model.toml`.
        name: of the model.
        modality: what it looks at.
        network: a name in `wsi_pipeline.networks.NETWORKS`, "exported" or "torchscript".
        weights_path: the file with weights, or the foreign program; None where there are none.
        network_options: keyword arguments of the network.
        input: what the network wants to see.
        activation: what turns logits into probabilities.
        classes: in the mask's order; 0 is the background.
    """

    path: Path
    name: str
    modality: Modality
    network: str
    weights_path: Path | None
    network_options: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec
    activation: Activation
    classes: tuple[ClassInfo, ...]

    @cached_property
    def weights_sha256(self) -> str:
        """Return the hex digest of the weights file, or "" where there is none."""
        return sha256_of(self.weights_path) if self.weights_path else ""


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, sha256: str, *, origin: str | Path) -> None:
    """Refuse a file that is not what was expected; return nothing.

    Args:
        path: of the file.
        sha256: the hex digest, or its first eight digits or more, as some file names have them.
        origin: where it came from, for the message.

    Raises:
        BundleError: another file.
    """
    _check_digest(sha256, origin, least=8)
    if not (found := sha256_of(path)).startswith(sha256.lower()):
        raise BundleError(f"{origin} has sha256 {found}, expected {sha256}")


def download(url: str, sha256: str) -> Path:
    """Fetch a file once into the user's cache; return its path, checked.

    Args:
        url: of the file.
        sha256: the hex digest, or its first eight digits or more.

    Raises:
        BundleError: it cannot be fetched, or is another file; then it is not kept.
    """
    _check_digest(sha256, url, least=8)
    suffix = Path(urllib.parse.urlparse(url).path).suffix
    target = _cache_dir() / f"{sha256}{suffix}"
    if not target.is_file():
        _fetch(url, target)
    try:
        check_sha256(target, sha256, origin=url)
    except BundleError:
        target.unlink()
        raise
    return target


def load_bundle(location: str | Path) -> Bundle:
    """Read and check a bundle; return it.

    Args:
        location: the bundle's folder, its `model.toml`, or the URL of a `model.toml`.

    Raises:
        BundleError: no such bundle, or one that lacks something or contradicts itself.
    """
    path = _local_toml(str(location))
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise BundleError(
            f"no bundle at {location}: expected a folder with a model.toml ({error.strerror})"
        ) from error
    return parse_bundle(table, path)


def parse_bundle(table: dict[str, Any], path: Path) -> Bundle:
    """Check the content of a `model.toml`; return the bundle.

    Args:
        table: the parsed TOML.
        path: of the file, in the bundle's folder.

    Raises:
        BundleError: something is missing or contradicts itself.
    """
    try:
        return _parse(table, path)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path}: {what}") from error


def _parse(table: dict[str, Any], path: Path) -> Bundle:
    spec, output = table["input"], table["output"]
    if (modality := table["modality"]) not in get_args(Modality):
        raise BundleError(f"{path}: modality {modality!r} is none of {get_args(Modality)}")
    if (activation := output["activation"]) not in get_args(Activation):
        raise BundleError(f"{path}: activation {activation!r} is none of {get_args(Activation)}")
    bundle = Bundle(
        path=path.parent,
        name=str(table["name"]),
        modality=modality,
        network=str(table["network"]),
        weights_path=_weights(table.get("weights"), path.parent),
        network_options=dict(table.get("network_options", {})),
        input=_input_spec(spec),
        activation=activation,
        classes=tuple(_class_info(entry, i, path) for i, entry in enumerate(output["classes"])),
    )
    _check(bundle, path)
    return bundle


def _input_spec(table: Mapping[str, Any]) -> InputSpec:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    return InputSpec(**values)


def _class_info(entry: dict[str, Any], index: int, path: Path) -> ClassInfo:
    name, color = str(entry["name"]).strip(), entry.get("color")
    if not name or any(c in name for c in ":*\n\r"):
        raise BundleError(f"{path}: class name {name!r} is empty or has ':', '*' or a line break")
    if color is None and index > 0 and name not in QUPATH_COLORS:
        raise BundleError(f"{path}: class {name!r} has no color; add color = [red, green, blue]")
    if color is not None and (
        len(color) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in color)
    ):
        raise BundleError(f"{path}: color {color} of {name!r} is not three integers in 0–255")
    # QuPath has its own colour for some names and takes no other, so all outputs have it
    own = QUPATH_COLORS.get(name, tuple(color) if color else None)
    return ClassInfo(name=name, color=own if index > 0 else None)


def _check(bundle: Bundle, path: Path) -> None:
    spec = bundle.input
    if not spec.mpp > 0:
        raise BundleError(f"{path}: input.mpp is {spec.mpp}; expected µm per pixel above 0")
    if len(spec.mean) != spec.channels or len(spec.std) != spec.channels:
        raise BundleError(f"{path}: mean and std need {spec.channels} values, one a channel")
    if len(spec.patch_size) != len(spec.overlap) or any(
        not 0 <= o < p for o, p in zip(spec.overlap, spec.patch_size, strict=True)
    ):
        raise BundleError(
            f"{path}: overlap {spec.overlap} must have as many axes as patch_size "
            f"{spec.patch_size} and lie below it"
        )
    count = len(bundle.classes)
    if not 2 <= count <= 255 or (bundle.activation == "sigmoid" and count != 2):
        raise BundleError(
            f"{path}: {count} classes with {bundle.activation}; sigmoid takes 2, softmax 2 to 255, "
            "the background included"
        )
    if len({c.name for c in bundle.classes}) != count:
        raise BundleError(f"{path}: two classes have the same name")


def _weights(entry: str | dict[str, str] | None, folder: Path) -> Path | None:
    if entry is None:
        return None
    if isinstance(entry, dict):
        _check_digest(entry["sha256"], entry["url"], least=64)
        return download(entry["url"], entry["sha256"])
    path = folder / entry
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"weights {entry!r} lie outside the bundle {folder}")
    if not path.is_file():
        raise BundleError(f"the bundle {folder} names weights {entry!r}, which are not there")
    return path


def _check_digest(sha256: str, origin: str | Path, *, least: int) -> None:
    if not re.fullmatch(rf"[0-9a-fA-F]{{{least},64}}", sha256):
        raise BundleError(f"sha256 {sha256!r} of {origin}: expected {least} to 64 hex digits")


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wsi_pipeline"


def _local_toml(location: str) -> Path:
    if location.startswith(("http://", "https://")):
        key = hashlib.sha256(location.encode()).hexdigest()[:16]
        return _fetch(location, _cache_dir() / key / "model.toml")
    path = Path(location)
    return path / "model.toml" if path.suffix != ".toml" else path


def _fetch(url: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        urllib.request.urlretrieve(url, partial)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise BundleError(f"cannot fetch {url}: {error}") from error
    os.replace(partial, target)
    return target
