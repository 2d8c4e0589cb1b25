"""A bundle's folder out: whole or not at all, and never over what is not a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsi_pipeline.errors import BundleError, StoreError
from wsi_pipeline.files import written_beside
from wsi_pipeline.store import claimed

MODEL_TOML, CARD, WEIGHTS = "model.toml", "README.md", "model.safetensors"
PROGRAM, ENCODER = "program.pt2", "encoder.safetensors"


@contextmanager
def written_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` once the body has ended well.

    Args:
        folder: that is to be; nothing is there yet, or an empty folder.
        overwrite: a bundle may be there too, which goes.

    Raises:
        BundleError: something is there that is to stay, or the folder cannot be written.
    """
    folder = folder.resolve()
    try:
        with claimed(folder):
            _check_free(folder, overwrite=overwrite)
            with written_beside(folder) as partial:
                partial.mkdir()
                yield partial
    except StoreError as error:
        raise BundleError(str(error)) from error
    except OSError as error:
        raise BundleError(f"cannot write {folder}: {error.strerror or error}") from error


def _check_free(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file; name a folder")
    found = {path.name for path in folder.iterdir()}
    if found and not overwrite:
        raise BundleError(f"{folder} is there already; name another folder, or add --overwrite")
    if others := sorted(found - {MODEL_TOML, CARD, WEIGHTS, PROGRAM, ENCODER}):
        raise BundleError(f"{folder} holds {others[0]}, which no bundle has; name another folder")
