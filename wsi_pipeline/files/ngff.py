"""Metadata of OME-Zarr, NGFF 0.1 to 0.5: where they lie, and what they say.

https://ngff.openmicroscopy.org
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wsi_pipeline.files.records import read_json

LABEL = "image-label"
"""Marks an OME-Zarr that is a mask, not a slide; of whatever origin."""
MASK = "wsi_pipeline"
"""Attribute of a run's mask, whose labels lie deeper: `classes` are their names by value."""


def ome_of(attributes: Mapping[str, Any]) -> Any:
    """Return what a zarr group's attributes say in the words of NGFF: since 0.5 under "ome"."""
    return attributes.get("ome", attributes)


def scales_of(described: Mapping[str, Any]) -> list[Any]:
    """Return the scales among the transformations of a multiscale, or of one of its datasets."""
    transforms = described.get("coordinateTransformations", ())
    return [transform["scale"] for transform in transforms if transform.get("type") == "scale"]


def first_scale(attributes: Mapping[str, Any]) -> Any:
    """Return the scale of the first dataset of a group's first multiscale, in its axes' order.

    Raises:
        Exception: `IndexError`, `KeyError`, `TypeError` or `AttributeError`, where there is none.
    """
    return scales_of(ome_of(attributes)["multiscales"][0]["datasets"][0])[0]


def zarr_attributes(path: Path) -> dict[str, Any] | None:
    """Return the attributes of the zarr group in a folder, {} without one, None if damaged."""
    for name in (".zattrs", "zarr.json"):
        try:
            found = read_json(path / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError):
            return None
        if name == "zarr.json" and isinstance(found, dict):
            found = found.get("attributes")
        return found if isinstance(found, dict) else {}
    return {}


def is_damaged_zarr(path: Path) -> bool:
    """Return whether a folder holds metadata of zarr that cannot be read."""
    return zarr_attributes(path) is None


def is_ome_zarr(path: Path) -> bool:
    """Return whether a folder holds an OME-Zarr image, several, or one whose metadata are damaged.

    Masks do not count.
    """
    attributes = zarr_attributes(path)
    if attributes is None:
        return True
    ome = ome_of(attributes)
    if not isinstance(ome, dict) or LABEL in ome or MASK in attributes:
        return False
    return "multiscales" in ome or "bioformats2raw.layout" in ome


def is_zarr_url(path: Path) -> bool:
    """Return whether a URL names a zarr, by its ending: it may be no folder that can be listed."""
    return urlsplit(str(path)).path.rstrip("/").endswith(".zarr")
