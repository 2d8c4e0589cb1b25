"""What lies on disk between the steps: stored patch grids, and a run's ledger of finished blocks.

A patch grid is a zarr group (contract 4.4 of the docs' `patch-grid.md`); `tile` writes one with
pixels, every run keeps one without. The ledger is a folder with one file for every finished block,
written whole after the block's mask, so that a run killed anywhere goes on where it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from filelock import FileLock, Timeout

from wsi_pipeline.arrays import read_whole, trusted
from wsi_pipeline.errors import BusyError, StoreError, WsiPipelineError
from wsi_pipeline.grid import Block, PatchGrid, Region, Shape
from wsi_pipeline.records import check, read_json

logger = logging.getLogger(__name__)

FORMAT = "wsi_pipeline/patch-grid"
VERSION = 1
PIXEL_CHUNK = 1024
"""Side of a chunk of stored pixels, in grid pixels."""
LOCK_FILE = ".lock"
CLAIM_PATIENCE = 0.2
"""Seconds: who only looks whether a folder is claimed has it for a moment."""
GOES_ON = "the same command goes on where this one stopped"
ENOTSUPP = 524
"""The Linux kernel's own "not supported", which some network file systems let through."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, ENOTSUPP}
"""What a file system without locks answers, as NFS does without its lock daemon."""
_told_of_no_locks: set[int] = set()
"""File systems of which a warning said so: once is enough for ten thousand slides."""


@dataclass(frozen=True, kw_only=True)
class GridInfo:
    """Geometry of a stored patch grid: how its pixels lie on the slide.

    Attributes:
        source_name: file name of the slide.
        fingerprint: of the slide's content.
        size: (width, height) of the slide at level 0.
        mpp: (x, y) µm per level-0 pixel.
        bounds: of the slide's content in level-0 pixels, where the file says.
        grid_mpp: µm per grid pixel that was asked for.
        downsample: (y, x) level-0 pixels per grid pixel, exact.
        shape: (y, x) grid pixels of the whole slide.
        patch_size: (y, x) grid pixels.
        stride: (y, x) grid pixels between origins.
    """

    source_name: str
    fingerprint: str
    size: tuple[int, int]
    mpp: tuple[float, float]
    bounds: Region | None
    grid_mpp: float
    downsample: tuple[float, float]
    shape: tuple[int, int]
    patch_size: tuple[int, int]
    stride: tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredGrid:
    """An opened patch grid.

    Attributes:
        info: its geometry.
        patches: (n, 2) int64 origins (y, x) in grid pixels, row-major.
        tissue: bool (h, w) at thumbnail scale.
        thumbnail: uint8 (h, w, 3), of the same size as `tissue`.
        tissue_downsample: (y, x) level-0 pixels per pixel of both.
        pixels: zarr array uint8 (*shape, 3), white where no kept patch lies; None without.
        unreadable: parts of the slide that could not be read, in level-0 pixels; white in `pixels`.
    """

    info: GridInfo
    patches: npt.NDArray[np.int64]
    tissue: npt.NDArray[np.bool_]
    thumbnail: npt.NDArray[np.uint8]
    tissue_downsample: tuple[float, float]
    pixels: zarr.Array[Any] | None
    unreadable: tuple[Region, ...] = ()

    @property
    def grid(self) -> PatchGrid:
        """Return the patches as a grid."""
        info = self.info
        return PatchGrid(
            shape=info.shape, patch_size=info.patch_size, stride=info.stride, origins=self.patches
        )


def write_patch_grid(path: Path, stored: StoredGrid, *, with_pixels: bool) -> StoredGrid:
    """Create a patch grid on disk, its pixels still white; return it opened.

    Args:
        path: folder to create; replaced where it exists.
        stored: what to write; its `pixels` are ignored.
        with_pixels: whether to make room for pixels.
    """
    group = zarr.open_group(path, mode="w")
    info = asdict(stored.info)
    group.attrs.update({"format": FORMAT, "version": VERSION, **info})
    group.create_array("patches", data=stored.patches)
    for name in ("tissue", "thumbnail"):
        array = group.create_array(name, data=getattr(stored, name))
        array.attrs["downsample"] = list(stored.tissue_downsample)
    if with_pixels:
        group.create_array(
            "pixels",
            shape=(*stored.info.shape, 3),
            chunks=(PIXEL_CHUNK, PIXEL_CHUNK, 3),
            dtype=np.uint8,
            fill_value=255,
        )
    return open_patch_grid(path, mode="r+")


def note_unreadable(path: Path, regions: Iterable[Region]) -> None:
    """Write down, in a patch grid, which parts of the slide could not be read; return nothing.

    Args:
        path: of the grid.
        regions: in level-0 pixels.
    """
    zarr.open_group(path, mode="r+").attrs["unreadable"] = [asdict(region) for region in regions]


def is_patch_grid(path: Path) -> bool:
    """Return whether a folder looks like a patch grid, without reading it."""
    try:
        meta = read_json(path / "zarr.json")
    except (OSError, ValueError, RecursionError):
        return False
    attributes = meta.get("attributes", {}) if isinstance(meta, dict) else {}
    return isinstance(attributes, dict) and attributes.get("format") == FORMAT


def open_patch_grid(path: str | Path, *, mode: str = "r") -> StoredGrid:
    """Open a patch grid; return it with its pixels left on disk.

    Raises:
        StoreError: not a patch grid, a damaged one, or one of a newer version.
    """
    path = Path(path)
    if not is_patch_grid(path):
        raise StoreError(f"{path} is not a patch grid; expected a folder that `tile` wrote")
    try:
        group = zarr.open_group(path, mode=mode)  # type: ignore[arg-type]
        attrs: dict[str, Any] = dict(group.attrs)
        if attrs["version"] != VERSION:
            raise StoreError(
                f"{path} is a patch grid of version {attrs['version']}; this program reads "
                f"{VERSION}: write it again with `tile --overwrite`"
            )
        tissue: Any = group["tissue"]
        pixels = group.get("pixels")
        y, x = tissue.attrs["downsample"]
        return StoredGrid(
            info=_grid_info(attrs),
            patches=read_whole(group["patches"], np.int64),
            tissue=read_whole(tissue, bool),
            thumbnail=read_whole(group["thumbnail"], np.uint8),
            tissue_downsample=(float(y), float(x)),
            pixels=None if pixels is None else trusted(pixels),
            unreadable=tuple(Region(**region) for region in attrs.get("unreadable", ())),
        )
    except StoreError:
        raise
    except Exception as error:  # metadata may be anything, and codecs raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"the patch grid {path} is damaged ({reason}); write it again") from error


def _grid_info(attrs: Mapping[str, Any]) -> GridInfo:
    bounds = attrs["bounds"]
    return GridInfo(
        source_name=str(attrs["source_name"]),
        fingerprint=str(attrs["fingerprint"]),
        grid_mpp=float(attrs["grid_mpp"]),
        bounds=None if bounds is None else Region(**bounds),
        **{name: _pair(attrs[name], float) for name in ("mpp", "downsample")},
        **{name: _pair(attrs[name], int) for name in ("size", "shape", "patch_size", "stride")},
    )


def _pair(value: Any, kind: type) -> Any:
    first, second = value
    return (kind(first), kind(second))


def this_process() -> str:
    """Return what marks the files of this process, also on a disk that machines share."""
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` that takes its place once the body has ended well."""
    partial = target.with_name(f".{target.name}.{this_process()}.partial")
    try:
        yield partial
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a failed write in the body into a sentence.

    Args:
        path: that the body writes, or the folder in which it does.

    Raises:
        StoreError: the disk is full, or nothing may be written there.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, WsiPipelineError):
            raise
        raise StoreError(why_not_written(path, error)) from error


def why_not_written(path: Path, error: OSError) -> str:
    """Return the sentence that tells why a path could not be written, and what to do."""
    if error.errno == errno.EDQUOT:
        return f"{path} could not be written: the disk quota is used up; make room: {GOES_ON}"
    if error.errno != errno.ENOSPC:
        return f"cannot write to {path}: {error.strerror or error}"
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    return (
        f"{path} could not be written: the disk is full, {free / 1e6:.1f} MB are free; "
        f"make room: {GOES_ON}"
    )


def make_folder(folder: Path) -> None:
    """Create a folder unless it is there, and make sure that files can be written in it.

    Raises:
        StoreError: they cannot.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{this_process()}.partial"
        try:
            probe.write_bytes(b"0")  # a full disk takes an empty file
        finally:
            probe.unlink(missing_ok=True)


def claim_folder(folder: Path, *, lock_file: str = LOCK_FILE, timeout: float = 0) -> ExitStack:
    """Claim a folder for this process; return what releases it when it is closed.

    The operating system holds the lock, and drops it when the process dies, however that happens.

    Args:
        folder: created.
        lock_file: relative to it; never removed.
        timeout: seconds to wait for another process.

    Raises:
        BusyError: another process has claimed it.
        StoreError: the folder cannot be written.
    """
    # not thread_local: one thread begins a slide and another finishes it
    # no soft lock in place of the system's: it would outlive a process that was killed
    lock = FileLock(folder / lock_file, timeout=timeout, thread_local=False, fallback_to_soft=False)
    with writing(folder):
        (folder / lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise BusyError(f"another process is working in {folder}: left to it") from None
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
                raise
            if (device := folder.stat().st_dev) not in _told_of_no_locks:
                _told_of_no_locks.add(device)
                logger.warning("%s cannot be locked: start no second process on it", folder)
    claim = ExitStack()
    claim.callback(lock.release)
    return claim


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
        return self.folder / ".store"

    @property
    def grid_path(self) -> Path:
        """Return the patch grid's folder."""
        return self.path / "grid.zarr"

    @property
    def mask_path(self) -> Path:
        """Return where the mask grows until it is whole."""
        return self.path / "mask.ome.zarr"

    @property
    def finished_mask_path(self) -> Path:
        """Return where the whole mask lies."""
        return self.folder / "mask.ome.zarr"

    @property
    def stage_path(self) -> Path:
        """Return the folder in which outputs are written before they get their places."""
        return self.path / "new"

    @property
    def written_path(self) -> Path:
        """Return the file with the hashes of all that was written into the run's folder."""
        return self.path / "written.sha256"

    def create_mask(self, shape: Shape, *, chunk: int) -> None:
        """Create the mask of an image or volume where it grows, all background.

        Args:
            shape: of the mask.
            chunk: side of a chunk.
        """
        with writing(self.mask_path), written_beside(self.mask_path) as partial:
            group = zarr.open_group(partial, mode="w-")
            group.create_array("0", shape=shape, chunks=(chunk,) * len(shape), dtype=np.uint8)

    def open_mask(self) -> zarr.Array[Any]:
        """Open a mask that `create_mask` made, to be read and written; return it."""
        return trusted(zarr.open_array(self.mask_path / "0", mode="r+"))

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

    def _block_path(self, block: Block) -> Path:
        return self.path / "blocks" / f"{block.name}.npz"

    def pending(self, blocks: Iterable[Block]) -> list[Block]:
        """Return the blocks that the ledger does not hold."""
        return [block for block in blocks if not self._block_path(block).is_file()]

    def blocks(self) -> list[Path]:
        """Return the files of the blocks in the ledger."""
        return list((self.path / "blocks").glob("[0-9]*.npz"))

    def forget_blocks(self) -> None:
        """Empty the ledger."""
        for path in (self.path / "blocks").iterdir():
            path.unlink()

    def remove_partials(self, process: str | None = None) -> None:
        """Remove what `this_process` has left half written; None = any, which needs a claim."""
        owner = "" if process is None else f".{process}"
        for folder in (self.folder, self.path, self.path / "blocks", self.stage_path):
            for path in folder.glob(f".*{owner}.partial"):
                remove(path)
        if process is None:
            for path in (self.mask_path / "0").rglob("*.partial"):  # zarr's, which tell no process
                remove(path)

    def empty(self) -> None:
        """Remove all that belongs to a run, but what tells its files from those of people."""
        # the key first: killed on the way, no run takes the rest for its own
        for path in (self.key_path, *self.path.glob("*")):
            if path not in (self.path / LOCK_FILE, self.written_path):
                remove(path)

    def finish_block(self, block: Block, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Enter a block in the ledger, with what later steps want to know of it.

        To be called after the block's mask is written: a block in the ledger is never done again.
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
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(f"{path} is damaged ({error}); run again with --overwrite") from error


def run_key(parts: Mapping[str, Any]) -> str:
    """Return a digest of everything that the mask depends on.

    Example:
        >>> run_key({"a": 1, "b": 2}) == run_key({"b": 2, "a": 1})
        True
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def open_run_store(folder: Path, *, fingerprint: str, key: str, overwrite: bool) -> RunStore:
    """Open a run's working folder, emptied unless it belongs to the same run; return it.

    Outputs of an earlier run beside it stay until new ones take their place.

    Args:
        folder: the run's folder; created.
        fingerprint: of the slide.
        key: digest of slide, model and settings, from `run_key`.
        overwrite: throw away what is there.

    Raises:
        StoreError: the folder holds another slide's run, or cannot be written.
    """
    store = RunStore(folder=folder)
    wanted = {"fingerprint": fingerprint, "key": key}
    try:
        found = read_json(store.key_path)
        check(found, dict[str, str])
    except (OSError, ValueError):
        found = None
    if found and not overwrite and found.get("fingerprint") != fingerprint:
        raise StoreError(
            f"{folder} holds the run of another slide; choose another --output, or --overwrite"
        )
    with writing(folder):
        if overwrite or found != wanted:
            store.empty()
        (store.path / "blocks").mkdir(parents=True, exist_ok=True)
        store.remove_partials()
        with written_beside(store.key_path) as partial:
            partial.write_text(json.dumps(wanted), "utf-8")
    return store


def remove(path: Path) -> None:
    """Remove a file or a folder, where there is one; return nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
