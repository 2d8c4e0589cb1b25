"""What lies on disk between the steps: stored patch grids, and a run's ledger of finished blocks.

A patch grid is a zarr group (contract 4.4 of the docs' `patch-grid.md`); `tile` writes one with
pixels, every run keeps one without. The ledger is a folder with one file for every finished block,
written whole once the block's mask is on the disk, so that a run killed anywhere goes on where it
was. It holds checksums of what was written: what a disk has lost since is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from wsi_pipeline.errors import BusyError, StoreError
from wsi_pipeline.files.arrays import chunk_files
from wsi_pipeline.files.atomic import make_folders, remove, sync, written_beside
from wsi_pipeline.files.locks import LOCK_FILE, claim_folder, writing
from wsi_pipeline.files.paths import WORK
from wsi_pipeline.files.records import read_json
from wsi_pipeline.files.schema import converted
from wsi_pipeline.geometry import Block, Shape

logger = logging.getLogger(__name__)

LEAST_ROOM = 1 << 28
"""Bytes that any entry of the ledger may unpack to."""
MOST_PACKED = 128
"""Bytes besides for one that is stored: outlines pack to a tenth or so."""
CHUNK = {2: 1024, 3: 64}
"""Side of a chunk of the mask of an image or volume, by its axes; blocks are made of whole ones."""
CLAIM_PATIENCE = 0.2
"""Seconds: who only looks whether a folder is claimed has it for a moment."""


def settle(array: zarr.Array[Any], block: Block) -> npt.NDArray[np.int64]:
    """Have the disk hold a block that is written; return its checksums, for the ledger."""
    files = chunk_files(array, block)
    root = cast("LocalStore", array.store).root
    # zarr puts chunks in place without asking the disk to keep them, or the folders they are in
    folders = {above for file in files for above in file.parents if above.is_relative_to(root)}
    for path in (*files, *folders):
        if path.exists():
            sync(path)
    return _checksums(files)


def _checksums(files: Iterable[Path]) -> npt.NDArray[np.int64]:
    """Return a checksum of each file, -1 where there is none."""
    # A CRC is enough for what disks lose, and costs little beside the write.
    return np.array([zlib.crc32(p.read_bytes()) if p.is_file() else -1 for p in files], np.int64)


@dataclass(frozen=True, kw_only=True)
class RunStore:
    """A run's working folder, kept beside its outputs so that they can be written again.

    Attributes:
        folder: the run's folder.
    """

    folder: Path

    @property
    def path(self) -> Path:
        """Return the working folder."""
        return self.folder / WORK

    @property
    def grid_path(self) -> Path:
        """Return the patch grid's folder."""
        return self.path / "grid.zarr"

    @property
    def ruled_path(self) -> Path:
        """Return where a mask by other thresholds is while outputs are made of it."""
        return self.path / "ruled.ome.zarr"

    @property
    def roi_path(self) -> Path:
        """Return the copy of the ROI, by which masks are made of probabilities later."""
        return self.path / "roi.geojson"

    @property
    def mask_path(self) -> Path:
        """Return where the mask grows until it is whole."""
        return self.path / "mask.ome.zarr"

    @property
    def finished_mask_path(self) -> Path:
        """Return where the whole mask lies."""
        return self.folder / "mask.ome.zarr"

    @property
    def kept_mask_path(self) -> Path:
        """Return where a run left its mask: without zarr among the outputs where it grew."""
        paths = (self.finished_mask_path, self.mask_path)
        return next((path for path in paths if path.is_dir()), paths[0])

    @property
    def stage_path(self) -> Path:
        """Return the folder in which outputs are written before they get their places."""
        return self.path / "new"

    @property
    def written_path(self) -> Path:
        """Return the file with the hashes of all that was written into the run's folder."""
        return self.path / "written.sha256"

    def claim(self) -> ExitStack:
        """Claim the folder for this process, as `claim_folder` does."""
        lock_file = f"{self.path.name}/{LOCK_FILE}"
        return claim_folder(self.folder, lock_file=lock_file, timeout=CLAIM_PATIENCE)

    def is_claimed(self) -> bool:
        """Return whether a process is working in the folder."""
        if not (self.path / LOCK_FILE).is_file():
            return False
        try:
            self.claim().close()
        except BusyError:
            return True
        return False

    @property
    def key_path(self) -> Path:
        """Return the file that tells whose run it is."""
        return self.path / "key.json"

    def key(self) -> dict[str, str]:
        """Return what that file tells, nothing where there is none."""
        try:
            return converted(read_json(self.key_path), dict[str, str])
        except (OSError, ValueError):
            return {}

    def _block_path(self, block: Block) -> Path:
        return self.path / "blocks" / f"{block.name}.npz"

    def pending(self, blocks: Iterable[Block]) -> list[Block]:
        """Return the blocks that the ledger does not hold."""
        return [block for block in blocks if not self._block_path(block).is_file()]

    def blocks(self) -> list[Path]:
        """Return the files of the blocks in the ledger."""
        return list((self.path / "blocks").glob("[0-9]*.npz"))

    def forget_blocks(self, blocks: Iterable[Block] | None = None) -> None:
        """Remove blocks from the ledger, all if none are named: they will be done again."""
        folder = self.path / "blocks"
        for path in folder.iterdir() if blocks is None else map(self._block_path, blocks):
            path.unlink()
        sync(folder)

    def damaged(self, blocks: Iterable[Block], mask: zarr.Array[Any]) -> list[Block]:
        """Return the blocks in the ledger of which the disk does not hold what was written."""

        def is_sound(block: Block) -> bool:
            try:
                noted = self.load_block(block).get("chunks")
                # older runs have noted nothing
                return noted is None or np.array_equal(noted, _checksums(chunk_files(mask, block)))
            except OSError:
                return False

        held = [block for block in blocks if self._block_path(block).is_file()]
        with ThreadPoolExecutor() as pool:
            sound = pool.map(is_sound, held)
            lost = [block for block, good in zip(held, sound, strict=True) if not good]
        if lost:
            logger.warning("%s: %d finished blocks are damaged on the disk", self.folder, len(lost))
        return lost

    def remove_partials(self, process: str | None = None) -> None:
        """Remove what `this_process` has left half written; None = any, which needs a claim."""
        owner = "" if process is None else f".{process}"
        kept = self.path.glob("probability-*")
        for folder in (self.folder, self.path, self.path / "blocks", self.stage_path, *kept):
            for kind in ("partial", "old"):
                for path in folder.glob(f".*{owner}.{kind}"):
                    remove(path)
        if process is None:
            # Those of zarr do not tell whose they are.
            for path in self.mask_path.rglob("*.partial"):
                remove(path)

    def empty(self) -> None:
        """Remove all that belongs to a run, but what tells its files from those of people."""
        # the key first: killed on the way, no run takes the rest for its own
        for path in (self.key_path, *self.path.glob("*")):
            if path not in (self.path / LOCK_FILE, self.written_path):
                remove(path)
        if self.path.is_dir():
            sync(self.path)

    def finish_block(self, block: Block, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Enter a block in the ledger, with what later steps want to know of it.

        To be called with what `settle` returned as `chunks`: a block in the ledger is never done
        again while the disk holds these.
        """
        path = self._block_path(block)
        with writing(path), written_beside(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **dict(arrays))

    def load_block(self, block: Block) -> dict[str, npt.NDArray[Any]]:
        """Return what `finish_block` was given.

        Raises:
            StoreError: the file is damaged.
        """
        path = self._block_path(block)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                room = LEAST_ROOM + MOST_PACKED * path.stat().st_size
                entries = arrays.zip.infolist()
                if sum(entry.file_size for entry in entries) > room:
                    raise ValueError("it unpacks to more than a block has")
                # We write no comments: one has swallowed the entries behind it.
                if any(entry.comment for entry in entries):
                    raise ValueError("entries are missing")
                return dict(arrays)
        except Exception as error:
            # What is damaged may raise anything.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StoreError(
                f"{path} is damaged ({reason}); segment the slide again, which does this block anew"
            ) from error


def create_scan_mask(path: Path, shape: Shape) -> zarr.Array[Any]:
    """Create the mask of an image or volume, all background; return it."""
    group, chunks = zarr.open_group(path, mode="w-"), (CHUNK[len(shape)],) * len(shape)
    return group.create_array("0", shape=shape, chunks=chunks, dtype=np.uint8)


def hash_block(pixels: npt.NDArray[np.uint8]) -> str:
    """Return the SHA-256 of a block's pixels, in C order, however they are compressed."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def root_of(hashes: Mapping[Block, str]) -> str:
    """Return the SHA-256 of a line for each block that holds a class: its name and its hash."""
    lines = sorted(f"{block.name} {found}\n" for block, found in hashes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def run_key(parts: Mapping[str, Any]) -> str:
    """Return a digest of everything that the mask depends on.

    Example:
        >>> run_key({"a": 1, "b": 2}) == run_key({"b": 2, "a": 1})
        True
    """
    # Among the options are paths.
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def another(folder: Path, what: str) -> StoreError:
    """Return the refusal of a folder that holds the run of another slide or model."""
    return StoreError(
        f"{folder} holds the run of another {what}; choose another --output, or --overwrite"
    )


def check_same(folder: Path, *, fingerprint: str, model: str) -> None:
    """Refuse a folder in which another slide, or another model, was begun; return nothing.

    Args:
        model: digest of what makes a model another; "" = any will do.

    Raises:
        StoreError: it was. Of another model something must be there to be lost.
    """
    found = RunStore(folder=folder).key()
    if found.get("fingerprint", fingerprint) != fingerprint:
        raise another(folder, "slide")
    if found.get("model", model) != model and RunStore(folder=folder).blocks():
        raise another(folder, "model")


def open_run_store(
    folder: Path, *, fingerprint: str, model: str = "", key: str, overwrite: bool
) -> RunStore:
    """Open a run's working folder, emptied unless it belongs to the same run; return it.

    Outputs of an earlier run beside it stay until new ones take their place.

    Args:
        folder: the run's folder; created.
        model: as in `check_same`.
        key: digest of slide, model and settings, from `run_key`.

    Raises:
        StoreError: the folder holds another slide's or model's run, or cannot be written.
    """
    store = RunStore(folder=folder)
    wanted = {"fingerprint": fingerprint, "model": model, "key": key}
    if not overwrite:
        check_same(folder, fingerprint=fingerprint, model=model)
    with writing(folder):
        is_new = overwrite or store.key().get("key") != key
        if is_new:
            store.empty()
        make_folders(store.path / "blocks")
        store.remove_partials()
        if is_new:
            with written_beside(store.key_path) as partial:
                partial.write_text(json.dumps(wanted), "utf-8")
    return store
