"""Which files of a folder are planar images or volumes."""

from __future__ import annotations

from pathlib import Path


def find_images(inputs: list[str], output: Path) -> list[Path]:
    """Expand files, folders (recursively) and globs; return the paths of planar images.

    Raises:
        SourceError: an input that does not exist.
    """
    return []


def find_volumes(inputs: list[str], output: Path) -> list[Path]:
    """Expand files, folders (recursively) and globs; return the paths of volumes.

    Raises:
        SourceError: an input that does not exist.
    """
    return []
