"""Bundles that are asked together: one that names several, written where its runs are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from wsi_pipeline.bundle import RANDOM_WEIGHTS, Bundle, bundle_table, bundle_toml
from wsi_pipeline.errors import BundleError
from wsi_pipeline.files.models import MODEL_TOML
from wsi_pipeline.files.remote import write_whole
from wsi_pipeline.options import Combine

FOLDER = ".models"
"""In an output folder: the ensembles whose runs lie there."""


def combined(members: Sequence[Bundle], combine: Combine, output: Path) -> Bundle:
    """Return the ensemble of some bundles, which is not written yet.

    Args:
        output: folder of its runs.

    Raises:
        BundleError: the members do not fit each other.
    """
    limits = list(dict.fromkeys(m.limits for m in members if m.limits))
    # What has learnt nothing is said first.
    limits.sort(key=lambda text: not text.startswith(RANDOM_WEIGHTS))
    first, name = members[0], f"{combine} of {', '.join(m.name for m in members)}"
    digest = hashlib.sha256("".join([combine, *(m.digest for m in members)]).encode()).hexdigest()
    bundle = replace(
        first,
        path=(output / FOLDER / digest[:12]).absolute(),
        name=name,
        network="ensemble",
        weights_path=None,
        weights_origin=None,
        features_path=None,
        int8_path=None,
        network_options={"combine": combine},
        activation="softmax",
        temperature=1.0,
        limits=" ".join(limits),
        origin={},
        members=tuple(members),
        encoder=None,
    )
    check_members(bundle)
    return bundle


def check_members(bundle: Bundle) -> None:
    """Refuse an ensemble of which the members see or answer different things; return nothing.

    Raises:
        BundleError: they do.
    """
    if len(bundle.members) < 2:
        raise BundleError(f"{bundle.name}: an ensemble has two members or more")
    if (combine := bundle.network_options.get("combine")) not in get_args(Combine):
        raise BundleError(f"{bundle.name}: combine is {combine!r}; expected mean or vote")
    if nested := [member.name for member in bundle.members if member.members]:
        raise BundleError(f"{bundle.name}: {nested[0]} is an ensemble itself; name its members")
    first, wanted = bundle.members[0], _seen(bundle.members[0])
    # By its own file it sees what they see, unless one of them has been changed since.
    for other in (*bundle.members[1:], bundle):
        own = _seen(other)
        for key in sorted(own.keys() | wanted.keys()):
            if own.get(key) != wanted.get(key):
                raise BundleError(
                    f"{first.name} and {other.name} cannot be one ensemble: {key} is "
                    f"{wanted.get(key)} and {own.get(key)}; leave --combine out, and each has its "
                    "own runs"
                )
    if bundle.input.convention:
        raise BundleError(
            f"{bundle.name}: nnU-Net blends logits, an ensemble probabilities; give a folder with "
            "several folds, which are one model"
        )
    if bundle.labels:
        raise BundleError(f"{bundle.name}: networks that label whole patches make no ensemble")


def _seen(bundle: Bundle) -> dict[str, object]:
    """Return what must be the same in all members of an ensemble."""
    table = bundle_table(bundle)
    own = {key: table["input"].get(key) for key in sorted({*table["input"], "mpp"})}
    told = {f"input.{k}": v for k, v in own.items() if k not in ("mean", "std", "overlap")}
    return {
        "modality": bundle.modality,
        "classes": [info.name for info in bundle.classes],
        "labels": list(bundle.labels),
        "tta": bundle.tta,
        **told,
    }


def write_ensemble(bundle: Bundle) -> None:
    """Write the `model.toml` of an ensemble, by which workers and `verify` open it."""
    paths = [str(member.path.absolute()) for member in bundle.members]
    options = {**bundle.network_options, "members": paths}
    bundle.path.mkdir(parents=True, exist_ok=True)
    text = bundle_toml(replace(bundle, network_options=options), weights=None)
    write_whole(bundle.path / MODEL_TOML, text.encode())
