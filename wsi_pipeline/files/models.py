"""Bundles by name: the folders in which a model is looked for, and the one that a name means."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from wsi_pipeline.errors import BundleError, raised_as
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import claimed
from wsi_pipeline.files.paths import cache_dir
from wsi_pipeline.files.schema import converted, read_toml

MODEL_TOML, CARD = "model.toml", "README.md"
ORIGIN = ".origin.json"
"""Where a bundle was fetched from, in its folder."""
CHECKOUT = Path(__file__).resolve().parents[2]
PLACES = "WSI_PIPELINE_MODELS"
"""Variable that names more folders, separated as those of PATH are."""


def model_places() -> list[Path]:
    """Return the folders that are there in which bundles are looked for by name, in this order.

    Packages offer theirs by an entry point in `wsi_pipeline.models`, the name of a package that
    holds nothing else: none of its code is run.
    """
    told = filter(None, os.environ.get(PLACES, "").split(os.pathsep))
    names = [e.value.partition(".")[0] for e in entry_points(group="wsi_pipeline.models")]
    packages = [p for spec in map(find_spec, names) if spec
                for p in spec.submodule_search_locations or ()]  # fmt: skip
    places = ["models", *told, str(cache_dir() / "models"), str(CHECKOUT / "models"), *packages]
    there = dict[Path, Path]()
    for place in filter(os.path.isdir, places):
        # By two names a folder goes by the first.
        there.setdefault(Path(place).resolve(), Path(place))
    return list(there.values())


def bundles_in(place: Path) -> Iterator[Path]:
    """Yield the folders of bundles in a folder, which may be one itself."""
    for file in (place / MODEL_TOML, *sorted(place.glob(f"*/{MODEL_TOML}"))):
        if file.is_file():
            yield file.parent


def named_models() -> dict[str, Path]:
    """Return the folder of each bundle that is found by its name: that of the folder."""
    named = dict[str, Path]()
    for place in model_places():
        for folder in bundles_in(place):
            named.setdefault(folder.absolute().name, folder)
    return named


def find_model(location: str) -> Path:
    """Return the `model.toml` that a location means: a file, a folder or a name.

    Raises:
        BundleError: none is there.
    """
    path = Path(location)
    file = path if path.suffix == ".toml" else path / MODEL_TOML
    try:
        file.stat()
        return file
    except OSError as error:
        reason = error.strerror
    named = named_models()
    if location in named:
        return named[location] / MODEL_TOML
    wanted = path.name.lower()
    close = [n for n in named if wanted in n.lower()] or difflib.get_close_matches(wanted, named)
    asked = f"did you mean {' or '.join(close[:3])}?" if close else "`models list` lists the names"
    raise BundleError(
        f"no bundle at {location}: expected a folder with a model.toml ({reason}), or the name of "
        f"one in {', '.join(map(str, model_places())) or 'models/, which is not here'}; {asked}"
    )


def keep_model(folder: Path, name: str, *, overwrite: bool) -> Path:
    """Copy a bundle to where it is found by its name from anywhere; return the folder there.

    Raises:
        BundleError: no name of a folder, or there is one already.
        StoreError: the cache cannot be written.
    """
    if Path(name).name != name or name.startswith("."):
        raise BundleError(
            f"{name!r} is no name for a folder; change `name` in {folder / MODEL_TOML}"
        )
    target = cache_dir() / "models" / name
    with claimed(target):
        if target.exists() and not overwrite:
            raise BundleError(f"{target} is there already; add --overwrite to replace it")
        with written_beside(target) as partial:
            gather(lambda file, copy: shutil.copyfile(folder / file, copy), partial)
            with suppress(FileNotFoundError):
                shutil.copyfile(folder / ORIGIN, partial / ORIGIN)
    return target


def gather(get: Callable[[str, Path], object], folder: Path) -> None:
    """Make a folder of the files of a bundle that lie elsewhere: those that it names, and its card.

    Args:
        get: writes the file of a name to a path; raises FileNotFoundError where there is none.
        folder: created.
    """
    folder.mkdir()
    get(MODEL_TOML, folder / MODEL_TOML)
    with raised_as(BundleError, ValueError, MODEL_TOML):
        table = read_toml(folder / MODEL_TOML)
    encoder = table.get("encoder")
    named = {what: table.get(what) for what in ("weights", "features", "int8")}
    named["encoder"] = encoder.get("weights") if isinstance(encoder, dict) else None
    for what, name in named.items():
        if isinstance(name, str):
            path = inside(folder, name, what)
            path.parent.mkdir(parents=True, exist_ok=True)
            get(name, path)
    # a model predicts without its card
    with suppress(FileNotFoundError, BundleError):
        get(CARD, folder / CARD)


def origin_of(folder: Path) -> dict[str, str]:
    """Return what is known of where a bundle was fetched from; nothing where a person put it.

    Raises:
        ValueError: the file that tells is damaged.
    """
    try:
        return converted(json.loads((folder / ORIGIN).read_bytes()), dict[str, str])
    except (FileNotFoundError, NotADirectoryError):
        return {}


def inside(folder: Path, name: str, what: str) -> Path:
    """Return the path of a file that a bundle names, which is in its folder.

    Raises:
        BundleError: it is not, by links or by name.
    """
    path = folder / name
    # A bundle from elsewhere has no business with other files.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{what} {name!r} lie outside the bundle {folder}")
    return path
