"""What lies on disk between the steps: stored patch grids, and a run's ledger of finished blocks.

A patch grid is a zarr group (contract 4.4 of the docs' `patch-grid.md`); `tile` writes one with
pixels, every run keeps one without. The ledger is a folder with one file for every finished block,
written whole once the block's mask is on the disk, so that a run killed anywhere goes on where it
was. It holds checksums of what was written: what a disk has lost since is done again.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr
from filelock import FileLock, Timeout
from zarr.storage import LocalStore

from wsi_pipeline.errors import BusyError, StoreError, WsiPipelineError
from wsi_pipeline.files.arrays import read_whole, trusted
from wsi_pipeline.files.atomic import make_folders, remove, sweep, sync, written_beside
from wsi_pipeline.files.paths import WORK
from wsi_pipeline.files.records import check, read_json
from wsi_pipeline.geometry import Block, PatchGrid, Region, Shape

logger = logging.getLogger(__name__)

FORMAT = "wsi_pipeline/patch-grid"
VERSION = 1
PIXEL_CHUNK = 1024
"""Side of a chunk of stored pixels, in grid pixels."""
GRID_FILES = frozenset(["zarr.json", "patches", "tissue", "thumbnail", "pixels"])
"""What a patch grid's folder may hold."""
LEAST_ROOM = 1 << 28
"""Bytes that any entry of the ledger may unpack to."""
MOST_PACKED = 128
"""Bytes besides for one that is stored: outlines pack to a tenth or so."""
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
        doubts: sentences on what makes the slide's picture doubtful.
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
    doubts: tuple[str, ...] = ()


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


def close_patch_grid(path: Path, unreadable: Iterable[Region] = ()) -> None:
    """Write down, in a patch grid, what is to be found in it; return nothing.

    Args:
        path: of the grid, all of whose pixels are written.
        unreadable: parts of the slide that could not be read, in level-0 pixels.
    """
    group = zarr.open_group(path, mode="r+")
    # sorted, as folders list them in any order
    chunks = {name: array.nchunks_initialized for name, array in sorted(group.arrays())}
    regions = [asdict(region) for region in unreadable]
    group.attrs.update({"chunks": chunks} | ({"unreadable": regions} if "pixels" in chunks else {}))


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
        for name, count in attrs.get("chunks", {}).items():  # older grids do not say
            array: Any = group[name]
            if (found := array.nchunks_initialized) != count:
                raise StoreError(
                    f"the patch grid {path} is not whole: {found} of {count} chunks of {name} are "
                    "there, as after a copy that was interrupted; copy or write it again"
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
        doubts=tuple(map(str, attrs.get("doubts", ()))),
        **{name: _pair(attrs[name], float) for name in ("mpp", "downsample")},
        **{name: _pair(attrs[name], int) for name in ("size", "shape", "patch_size", "stride")},
    )


def _pair(value: Any, kind: type) -> Any:
    first, second = value
    return (kind(first), kind(second))


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
        make_folders(folder)
        with TemporaryFile(dir=folder) as probe:
            probe.write(b"0")  # a full disk takes an empty file


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
        make_folders((folder / lock_file).parent)
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


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Claim a file or folder that the body writes; what killed processes left of it goes first.

    Args:
        target: that no folder claimed as a whole holds.

    Raises:
        BusyError: another process writes it.
        StoreError: the folder cannot be written.
    """
    lock = target.with_name(f".{target.name}.lock")
    try:
        claim = claim_folder(target.parent, lock_file=lock.name)
    except BusyError as error:
        raise BusyError(f"another process is writing {target}") from error
    with claim:
        try:
            sweep(target)
            yield
        finally:
            with suppress(OSError):  # Windows keeps what is open
                lock.unlink()


def chunk_files(array: zarr.Array[Any], block: Block) -> list[Path]:
    """Return where the chunks (shards, where there are) of a block lie, also if none is there."""
    unit, folder = array.shards or array.chunks, cast("LocalStore", array.store).root / array.path
    axes = zip(block.start, block.stop, unit, strict=True)
    spans = (range(start // side, -(-stop // side)) for start, stop, side in axes)
    return [folder / array.metadata.encode_chunk_key(key) for key in itertools.product(*spans)]


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

    def key(self) -> dict[str, str]:
        """Return what that file tells, nothing where there is none."""
        try:
            found: dict[str, str] = read_json(self.key_path)
            check(found, dict[str, str])
        except (OSError, ValueError):
            return {}
        return found

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
        """Return the blocks in the ledger of which the disk does not hold what was written.

        Args:
            blocks: to look at.
            mask: in which they are.
        """

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
        for folder in (self.folder, self.path, self.path / "blocks", self.stage_path):
            for kind in ("partial", "old"):
                for path in folder.glob(f".*{owner}.{kind}"):
                    remove(path)
        if process is None:
            for path in self.mask_path.rglob("*.partial"):  # zarr's, which tell no process
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
                if sum(entry.file_size for entry in arrays.zip.infolist()) > room:
                    raise ValueError("it unpacks to more than a block has")
                return dict(arrays)
        except Exception as error:  # what is damaged may be anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StoreError(
                f"{path} is damaged ({reason}); segment the slide again, which does this block anew"
            ) from error


def run_key(parts: Mapping[str, Any]) -> str:
    """Return a digest of everything that the mask depends on.

    Example:
        >>> run_key({"a": 1, "b": 2}) == run_key({"b": 2, "a": 1})
        True
    """
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
        folder: the run's folder.
        fingerprint: of the slide.
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
        fingerprint: of the slide.
        model: as in `check_same`.
        key: digest of slide, model and settings, from `run_key`.
        overwrite: throw away what is there.

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
