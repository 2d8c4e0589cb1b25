"""Model bundles: a folder with `model.toml`, a card and weights. Reading one needs no torch."""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import re
import tomllib
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from wsi_pipeline.colors import QUPATH_COLORS
from wsi_pipeline.errors import BundleError
from wsi_pipeline.files.atomic import make_folders, sha256_of, written_beside
from wsi_pipeline.files.paths import cache_dir

Modality = Literal["slide", "image", "volume"]
Activation = Literal["sigmoid", "softmax"]
Scale = Literal["range", "minmax", "zscore"]
Interpolation = Literal["linear", "cubic"]
MOST_TOML = 1 << 20
"""Bytes of a `model.toml`."""
MOST_WEIGHTS = 1 << 33
"""Bytes that are fetched: what nobody asked for is not to fill the disk."""
PATIENCE = 60
"""Seconds to wait for a server to go on."""
FOREIGN = ("exported", "torchscript")
"""Networks that come as a program in the bundle's folder."""
AXES: Mapping[Modality, int] = {"slide": 2, "image": 2, "volume": 3}
"""Of a patch."""
RANDOM_WEIGHTS = "RANDOM WEIGHTS"
"""How the limits of a model begin that has learnt nothing."""
RESOLUTION: Mapping[Modality, str] = {"slide": "mpp", "image": "fit", "volume": "spacing_mm"}
"""The key of `[input]` that says at what resolution the network sees."""
PREPARATION: Mapping[str, tuple[Modality, ...]] = {
    "scale": ("image", "volume"),
    "orient": ("image",),
    "pad": ("image",),
    "interpolation": ("image", "volume"),
    "time_points": ("volume",),
}
"""The keys of `[input]` that say how pixels are prepared, and of what."""


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
        mpp: µm per pixel, for slides; else None.
        fit: (height, width) in pixels that a planar image is brought to; else None.
        spacing_mm: (z, y, x) of a voxel in mm, for volumes; else None.
        channels: of the input.
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
    """

    mpp: float | None = None
    fit: tuple[int, ...] | None = None
    spacing_mm: tuple[float, ...] | None = None
    channels: int = 3
    patch_size: tuple[int, ...] = (512, 512)
    overlap: tuple[int, ...] = (128, 128)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: Scale | tuple[float, ...] = "range"
    orient: Literal["left"] | None = None
    pad: Literal["square"] | None = None
    interpolation: Interpolation = "linear"
    time_points: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """Weights that lie elsewhere.

    Attributes:
        url: where.
        sha256: hex digest that the file must have.
    """

    url: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A model ready to be built.

    Attributes:
        path: folder of `model.toml`.
        name: of the model.
        modality: what it looks at.
        network: a name in `wsi_pipeline.networks.NETWORKS`, "exported" or "torchscript".
        weights_path: the file with weights, or the foreign program; None where there are none.
        weights_origin: where the weights are fetched from; None where they lie in the folder.
        network_options: keyword arguments of the network.
        input: what the network wants to see.
        activation: what turns logits into probabilities.
        classes: in the mask's order; 0 is the background.
        labels: names of what the network says of a whole patch, in its order; empty where nothing.
        temperature: that the mask's logits are divided by, so that probabilities are as often right
            as they say.
        limits: what its results must not be trusted with, one paragraph that goes with them.
    """

    path: Path
    name: str
    modality: Modality
    network: str
    weights_path: Path | None
    weights_origin: RemoteFile | None = None
    network_options: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec
    activation: Activation
    classes: tuple[ClassInfo, ...]
    labels: tuple[str, ...] = ()
    temperature: float = 1.0
    limits: str = ""

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
        if self.__dict__.setdefault("weights_sha256", digest) != digest:
            raise BundleError(
                f"{self.weights_path} has been replaced since this command began: give it again"
            )
        return data

    @property
    def digest(self) -> str:
        """Return a digest of all that masks depend on."""
        table = bundle_table(replace(self, limits=""))
        text = json.dumps([table, self.weights_sha256], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


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
    target = _cache_path(url, sha256)
    if not target.is_file():
        _fetch(url, target)
    try:
        check_sha256(target, sha256, origin=url)
    except BundleError:
        target.unlink()
        raise
    return target


def load_bundle(location: str | Path, *, fetch: bool = True) -> Bundle:
    """Read and check a bundle; return it.

    Args:
        location: the bundle's folder, its `model.toml`, or the URL of a `model.toml`.
        fetch: get weights that lie behind a URL. False: such a bundle has no `weights_path` as
            long as they are not in the cache.

    Raises:
        BundleError: no such bundle, or one that lacks something or contradicts itself.
    """
    path = _local_toml(str(location))
    try:
        with path.open("rb") as file:
            data = file.read(MOST_TOML + 1)
        if len(data) > MOST_TOML:
            raise BundleError(f"{path} has more than {MOST_TOML >> 20} MB; expected a model.toml")
        table = tomllib.loads(data.decode("utf-8-sig"))  # as Windows writes it
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise BundleError(
            f"no bundle at {location}: expected a folder with a model.toml ({error.strerror})"
        ) from error
    return parse_bundle(table, path, fetch=fetch)


def parse_bundle(table: Mapping[str, Any], path: Path, *, fetch: bool = True) -> Bundle:
    """Check the content of a `model.toml`; return the bundle.

    Args:
        table: the parsed TOML.
        path: of the file, in the bundle's folder.
        fetch: as in `load_bundle`.

    Raises:
        BundleError: something is missing, unknown or contradicts something else.
    """
    try:
        return _parse(table, path, fetch=fetch)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path}: {what}") from error


def bundle_toml(bundle: Bundle, *, weights: str | None) -> str:
    """Return the `model.toml` of a bundle.

    Args:
        bundle: to describe.
        weights: name of the file with its weights, in its folder; None = it has none.
    """
    table = bundle_table(bundle) | ({"weights": weights} if weights else {})
    head = {key: value for key, value in table.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    return "\n".join([_lines(head), *(f"[{key}]\n{_lines(tables[key])}" for key in tables)])


def bundle_table(bundle: Bundle) -> dict[str, Any]:
    """Return what the `model.toml` of a bundle holds, but for the weights."""
    usual = {f.name: f.default for f in fields(InputSpec) if f.name in PREPARATION}
    spec = {
        key: value
        for key, value in asdict(bundle.input).items()
        if value is not None and value != usual.get(key)
    }
    output: dict[str, Any] = {"activation": bundle.activation}
    output["classes"] = [
        {"name": c.name} | ({"color": list(c.color)} if c.color else {}) for c in bundle.classes
    ]
    if bundle.labels:
        output["labels"] = list(bundle.labels)
    if bundle.temperature != 1:
        output["temperature"] = bundle.temperature
    return {
        "name": bundle.name,
        "modality": bundle.modality,
        **({"limits": bundle.limits} if bundle.limits else {}),
        "network": bundle.network,
        "network_options": dict(bundle.network_options),
        "input": {k: list(v) if isinstance(v, tuple) else v for k, v in spec.items()},
        "output": output,
    }


def _parse(table: Mapping[str, Any], path: Path, *, fetch: bool) -> Bundle:
    words = ("name", "modality", "limits", "network", "weights")
    _know(table, (*words, "network_options", "input", "output"))
    for key in ("name", "modality", "network"):
        if not isinstance(table[key], str) or not table[key].strip():
            raise ValueError(f"{key} is {table[key]!r}; expected a word in quotes")
    if (modality := table["modality"]) not in get_args(Modality):
        raise ValueError(f"modality {modality!r} is none of {get_args(Modality)}")
    output = _subtable(table["output"], "output")
    _know(output, ("activation", "classes", "labels", "temperature"), "output.")
    if (activation := output["activation"]) not in get_args(Activation):
        raise ValueError(f"output.activation {activation!r} is none of {get_args(Activation)}")
    temperature = output.get("temperature", 1.0)
    if not _are_reals((temperature,), 1, above=0):
        raise ValueError(f"output.temperature is {temperature!r}; expected a number above 0")
    weights_path, origin = _weights(table.get("weights"), path.parent, fetch=fetch)
    return Bundle(
        path=path.parent,
        name=table["name"],
        modality=modality,
        network=table["network"],
        weights_path=weights_path,
        weights_origin=origin,
        network_options=_subtable(table.get("network_options", {}), "network_options"),
        input=_input_spec(_subtable(table["input"], "input"), modality),
        activation=activation,
        classes=_classes(output["classes"], activation),
        labels=_labels(output.get("labels", [])),
        temperature=float(temperature),
        limits=paragraph(table.get("limits", "")),
    )


def paragraph(text: Any) -> str:
    r"""Return a text of several lines, or a Markdown list, as one paragraph.

    Example:
        >>> paragraph("- Four patients.\n- No glass,\n  no fat.")
        'Four patients. No glass, no fat.'

    Raises:
        ValueError: it is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"limits is {text!r}; expected a paragraph in quotes")
    return " ".join(re.sub(r"^[-*] ", "", text, flags=re.MULTILINE).split())


def _subtable(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}; expected a table")
    return dict(value)


def _know(table: Mapping[str, Any], known: Collection[str], prefix: str = "") -> None:
    """Refuse keys that mean nothing: a misspelt one would pass in silence."""
    if unknown := [f"{prefix}{key}" for key in table if key not in known]:
        there = ", ".join(f"{prefix}{key}" for key in known)
        raise ValueError(f"unknown {', '.join(unknown)}; there are {there}")


def _input_spec(table: Mapping[str, Any], modality: Modality) -> InputSpec:
    _know(table, [f.name for f in fields(InputSpec)], "input.")
    own, axes = RESOLUTION[modality], AXES[modality]
    if others := [key for key in RESOLUTION.values() if key != own and key in table]:
        raise ValueError(
            f"input.{others[0]} is not for {modality}s, whose resolution is input.{own}"
        )
    if own not in table:
        raise ValueError(f"lacks input.{own}, the resolution of {modality}s")
    if others := [k for k, kinds in PREPARATION.items() if k in table and modality not in kinds]:
        raise ValueError(f"input.{others[0]} is not for {modality}s")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    spec = InputSpec(**values)
    count = spec.channels
    least, *most = spec.scale if isinstance(spec.scale, tuple) else (0, 1)
    rules = {
        "mpp": (_are_reals((spec.mpp,), 1, above=0), "µm per pixel above 0"),
        "fit": (_are_sizes(spec.fit, 2), "[height, width] in pixels above 0"),
        "spacing_mm": (_are_reals(spec.spacing_mm, 3, above=0), "[z, y, x] in mm above 0"),
        "channels": (_are_sizes((count,), 1), "a whole number above 0"),
        "patch_size": (_are_sizes(spec.patch_size, axes), f"{axes} numbers of pixels above 0"),
        "mean": (_are_reals(spec.mean, count), f"{count} values, one a channel"),
        "std": (_are_reals(spec.std, count, above=0), f"{count} values above 0, one a channel"),
        "scale": (
            spec.scale in get_args(Scale)
            or (_are_reals(spec.scale, 2) and _are_reals(tuple(most), 1, above=least)),
            f"one of {', '.join(get_args(Scale))}, or [low, high]",
        ),
        "orient": (spec.orient in (None, "left"), '"left", or nothing'),
        "pad": (
            spec.pad is None
            or (spec.pad == "square" and _are_sizes(spec.fit, 2) and len({*(spec.fit or ())}) == 1),
            '"square" with a fit of equal sides, or nothing',
        ),
        "interpolation": (
            spec.interpolation in get_args(Interpolation),
            f"one of {', '.join(get_args(Interpolation))}",
        ),
        "time_points": (
            spec.time_points is None or _are_sizes(spec.time_points, count, least=0),
            f"{count} numbers from 0, one a channel",
        ),
    }
    for key in (own, "channels", "patch_size", "mean", "std", *PREPARATION):
        holds, expected = rules[key]
        if not holds:
            raise ValueError(f"input.{key} is {_shown(getattr(spec, key))}; expected {expected}")
    if not _are_sizes(spec.overlap, axes, least=0) or any(
        overlap >= side for overlap, side in zip(spec.overlap, spec.patch_size, strict=True)
    ):
        raise ValueError(
            f"input.overlap is {_shown(spec.overlap)}; it has as many axes as patch_size, "
            f"{_shown(spec.patch_size)}, and lies below it"
        )
    return spec


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def _are_sizes(values: Any, count: int, *, least: int = 1) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(type(v) is int and v >= least for v in values)
    )


def _are_reals(values: Any, count: int, *, above: float = -math.inf) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(type(v) in (int, float) and above < v < math.inf for v in values)
    )


def _classes(entries: Any, activation: Activation) -> tuple[ClassInfo, ...]:
    if not isinstance(entries, list):
        raise ValueError(f'output.classes is {entries!r}; expected a list of {{ name = "…" }}')
    classes = tuple(_class_info(entry, index) for index, entry in enumerate(entries))
    count = len(classes)
    if not 2 <= count <= 255 or (activation == "sigmoid" and count != 2):
        raise ValueError(
            f"{count} classes with {activation}; sigmoid takes 2, softmax 2 to 255, "
            "the background included"
        )
    if len({c.name for c in classes}) != count:
        raise ValueError("two classes have the same name")
    return classes


def _class_info(entry: Any, index: int) -> ClassInfo:
    table = _subtable(entry, f"output.classes[{index}]")
    _know(table, ("name", "color"), f"output.classes[{index}].")
    name, color = _name(table["name"], "class name"), table.get("color")
    if color is None and index > 0 and name not in QUPATH_COLORS:
        raise ValueError(f"class {name!r} has no color; add color = [red, green, blue]")
    if color is not None and not (
        isinstance(color, list)
        and len(color) == 3
        and all(type(v) is int and 0 <= v <= 255 for v in color)
    ):
        raise ValueError(f"color {color} of {name!r} is not three integers in 0–255")
    # QuPath has its own colour for some names and takes no other, so all outputs have it
    own = QUPATH_COLORS.get(name, tuple(color) if color else None)
    return ClassInfo(name=name, color=own if index > 0 else None)


def _labels(entries: Any) -> tuple[str, ...]:
    if not isinstance(entries, list) or len(entries) == 1:
        raise ValueError(f"output.labels is {entries!r}; expected two names or more")
    labels = tuple(_name(entry, "label") for entry in entries)
    if len(set(labels)) != len(labels):
        raise ValueError("two labels have the same name")
    return labels


def _name(value: Any, what: str) -> str:
    name = value.strip() if isinstance(value, str) else ""
    if not name or any(c in name for c in ":*\n\r"):
        raise ValueError(f"{what} {value!r} is empty or has ':', '*' or a line break")
    return name


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())


def _toml(value: Any) -> str:
    """Write one value inline.

    Example:
        >>> _toml([{"name": "Tumor", "color": [200, 0, 0]}, True])
        '[{ name = "Tumor", color = [200, 0, 0] }, true]'
    """
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            # TOML's basic strings escape as JSON's do
            return json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            pairs = ", ".join(f"{k} = {_toml(v)}" for k, v in value.items())
            return f"{{ {pairs} }}"
    raise TypeError(f"{value!r} has no place in a model.toml")


def _weights(entry: Any, folder: Path, *, fetch: bool) -> tuple[Path | None, RemoteFile | None]:
    """Return the weights' file, where it is there, and where it is fetched from."""
    if entry is None:
        return None, None
    if isinstance(entry, dict):
        _know(entry, ("url", "sha256"), "weights.")
        origin = RemoteFile(url=str(entry["url"]), sha256=str(entry["sha256"]))
        _check_digest(origin.sha256, origin.url, least=64)
        cached = _cache_path(origin.url, origin.sha256)
        is_here = fetch or cached.is_file()
        return download(origin.url, origin.sha256) if is_here else None, origin
    if "://" in str(entry):
        raise BundleError(f"weights {entry!r} is a URL; expected {{ url = …, sha256 = … }}")
    path = folder / str(entry)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"weights {entry!r} lie outside the bundle {folder}")
    if not path.is_file():
        raise BundleError(f"the bundle {folder} names weights {entry!r}, which are not there")
    return path, None


def _check_digest(sha256: str, origin: str | Path, *, least: int) -> None:
    if not re.fullmatch(rf"[0-9a-fA-F]{{{least},64}}", sha256):
        raise BundleError(f"sha256 {sha256!r} of {origin}: expected {least} to 64 hex digits")


def _cache_path(url: str, sha256: str) -> Path:
    return cache_dir() / f"{sha256}{Path(urllib.parse.urlparse(url).path).suffix}"


def _local_toml(location: str) -> Path:
    if location.startswith(("http://", "https://")):
        key = hashlib.sha256(location.encode()).hexdigest()[:16]
        return _fetch(location, cache_dir() / key / "model.toml", most=MOST_TOML)
    path = Path(location)
    return path / "model.toml" if path.suffix != ".toml" else path


def _fetch(url: str, target: Path, *, most: int = MOST_WEIGHTS) -> Path:
    """Write what is behind a URL to a file of at most so many bytes; return its path."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https", "file"):
        raise BundleError(f"{url} is not fetched; expected a URL of https://, http:// or file://")
    try:
        make_folders(target.parent)
        with written_beside(target) as partial:
            with urllib.request.urlopen(_request(parts), timeout=PATIENCE) as answer:
                announced = int(answer.headers.get("Content-Length") or 0)
                with partial.open("wb") as file:
                    while (size := file.tell()) <= most and (data := answer.read(1 << 20)):
                        file.write(data)
            if size > most or announced > most:
                raise BundleError(f"{url} has more than {most >> 20:,} MB; fetch it yourself")
            if size < announced:
                raise BundleError(
                    f"{url} broke off: {size:,} of {announced:,} bytes came; try again"
                )
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, BundleError):
            raise
        reason = str(error)
        for secret in filter(None, (parts.password, parts.query)):
            reason = reason.replace(secret, "…")  # some say a part of the URL only
        raise BundleError(f"cannot fetch {url}: {reason}") from error
    return target


def _request(parts: urllib.parse.SplitResult) -> urllib.request.Request:
    """Return what asks for a URL; its user and password are sent as servers want them."""
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    request = urllib.request.Request(urllib.parse.urlunsplit(bare))
    if parts.username is not None:
        told = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}").encode()
        # to nobody to whom the server sends us on
        request.add_unredirected_header("Authorization", f"Basic {b64encode(told).decode()}")
    return request
