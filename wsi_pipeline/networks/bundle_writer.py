"""A bundle's folder out: whole or not at all, and never over what is not a bundle."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from wsi_pipeline.errors import BundleError, StoreError
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.locks import claimed
from wsi_pipeline.files.models import CARD as CARD
from wsi_pipeline.files.models import MODEL_TOML as MODEL_TOML

WEIGHTS = "model.safetensors"
PROGRAM, SCRIPT, ONNX = "program.pt2", "program.pt", "model.onnx"
ENCODER = "encoder.safetensors"
ENCODERS = {"torchscript": "encoder.pt", "exported": "encoder.pt2", "onnx": "encoder.onnx"}
"""The frozen program that a decoder works behind, by its kind."""
FEATURES, INT8 = "features.safetensors", "int8.safetensors"
OLD_CARD = re.compile(r"README\.old(-\d+)?\.md")


@contextmanager
def written_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` once the body has ended well.

    Args:
        folder: Folder to become; nothing is there yet, or an empty folder.
        overwrite: a bundle may be there too, which goes; but its card stays as `README.old.md`, or
            with a number, unless the new one is the same: it was its reader's to fill in.

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
                for path in folder.glob("README.old*.md"):
                    shutil.copy2(path, partial)
                card = partial / CARD
                keep_card(folder / CARD, partial, card.read_bytes() if card.is_file() else b"")
    except StoreError as error:
        raise BundleError(str(error)) from error
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise BundleError(f"cannot write {folder}: {why}") from error


def keep_card(card: Path, folder: Path, new: bytes) -> None:
    """Copy a card that is to go under a free name, unless the new one, or an old, says the same."""
    known = [path.read_bytes() for path in folder.glob("README.old*.md")]
    if not card.is_file() or card.read_bytes() in (new, *known):
        return
    names = itertools.chain(["README.old.md"], (f"README.old-{n}.md" for n in itertools.count(2)))
    shutil.copy2(card, folder / next(name for name in names if not (folder / name).exists()))


def _check_free(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file; name a folder")
    found = {path.name for path in folder.iterdir()}
    if found and not overwrite:
        raise BundleError(f"{folder} is there already; name another folder, or add --overwrite")
    found = {name for name in found if not OLD_CARD.fullmatch(name)}
    # --overwrite is for bundles: a folder with anything else in it was not meant.
    own = {MODEL_TOML, CARD, WEIGHTS, PROGRAM, SCRIPT, ONNX, ENCODER, FEATURES, INT8}
    own.update(ENCODERS.values())
    if others := sorted(found - own):
        raise BundleError(f"{folder} holds {others[0]}, which no bundle has; name another folder")
