"""A finished run opened again: what was segmented, and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from PIL.PngImagePlugin import PngImageFile

from wsi_pipeline.errors import SourceError, StoreError, WsiPipelineError
from wsi_pipeline.export import MaskLike, level_shapes, ome_zarr
from wsi_pipeline.files.arrays import trusted
from wsi_pipeline.files.paths import as_path, is_remote
from wsi_pipeline.report.record import RUN_FILE, Run
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources import Slide, open_source
from wsi_pipeline.sources.radiology.alignment import turned_onto
from wsi_pipeline.sources.radiology.preprocess import Scan, open_scan
from wsi_pipeline.sources.radiology.volume import Volume, open_volume

MASK_FILES = {"image": "mask.png", "volume": "mask.nii.gz"}
"""Of a run, by its kind: where people look, and correct."""


@contextmanager
def of_this_version(folder: Path) -> Iterator[None]:
    """Say of a record that the body finds incomplete or odd that it is of another version.

    Raises:
        StoreError: it is.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, WsiPipelineError):
            raise
        raise StoreError(
            f"{folder / RUN_FILE} is not a run of this version ({error!r}); segment again"
        ) from error


def source_path(folder: Path, told: str) -> Path:
    """Return where the source of a run lies: a path may count from where `segment` was called.

    Args:
        told: the path in `run.json`.
    """
    path = as_path(told)
    if is_remote(path) or path.is_absolute() or path.exists():
        return path
    # The command may have been called where the output folder was made.
    beside = folder.absolute().parent.parent / path
    return beside if beside.exists() else path


def open_slide_of(folder: Path, run: Run, path: Path | None = None) -> Slide:
    """Open the slide of a run again; return it.

    Args:
        run: what its `run.json` says.
        path: where the slide is now; None = where it was.

    Raises:
        SourceError: it is not there, or another one is.
    """
    path = path or source_path(folder, run.slide["path"])
    if not is_remote(path) and not path.exists():
        raise SourceError(f"the slide was not found at {path.absolute()}")
    select = run.settings["select"]
    # Runs of earlier versions do not say what they took for granted.
    icc = select.get("icc", "ignore")
    slide = open_source(path, mpp=select["mpp"], series=select["series"], icc=icc)
    if slide.fingerprint != run.slide["fingerprint"]:
        slide.close()
        raise SourceError(f"{path} is not the slide that was segmented: its content differs")
    return slide


def open_scan_of(folder: Path, run: Run, path: Path | None = None) -> Scan:
    """Open the image or volume of a run again; return it.

    Args:
        run: what its `run.json` says.
        path: where the source is now; None = where it was.

    Raises:
        SourceError: it is not there, or another one is.
    """
    path = path or source_path(folder, run.slide["path"])
    if not path.exists():
        raise SourceError(f"the {run.kind} was not found at {path.absolute()}")
    select = run.settings["select"]
    chosen = select.get("time_point")
    scan = open_scan(
        path,
        axes=len(run.slide["size"]),
        frame=select["series"],
        time_points=run.model["input"].get("time_points") or (None if chosen is None else [chosen]),
    )
    if scan.fingerprint != run.slide["fingerprint"]:
        scan.close()
        raise SourceError(f"{path} is not the {run.kind} that was segmented: its content differs")
    return scan


def open_levels_of(
    folder: Path, run: Run, scan: Scan | None = None
) -> tuple[Sequence[MaskLike], tuple[float, ...] | None]:
    """Open the mask of a run; return its levels, the whole one first, and µm per pixel of that.

    Each level halves the one before; a volume has one. µm are (y, x) or (z, y, x), None where
    nobody knows.

    Args:
        run: what its `run.json` says.
        scan: the image or volume, on which the mask must lie; None = it is not known.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    if run.kind == "slide":
        path = RunStore(folder=folder).kept_mask_path
        if not path.is_dir():
            raise StoreError(f"{folder} has no {path.name}; segment the slide again")
        return ome_zarr.open_finished(path)
    with ExitStack() as closing:
        whole = np.asarray(open_mask_of(folder, run, closing, scan)[:])
    levels = range(len(level_shapes(whole.shape)) if whole.ndim == 2 else 1)
    spacing = run.slide["spacing_mm"]
    return [whole[:: 2**n, :: 2**n] for n in levels], tuple(
        1000 * mm for mm in reversed(spacing)
    ) if spacing else None


class FileMask:
    """The mask of a volume left in its file, to slice.

    Attributes:
        volume: the file.
        shape: (z, y, x).
    """

    def __init__(self, volume: Volume, classes: int) -> None:
        """Say how many classes there may be in which file."""
        self.volume, self._classes = volume, classes
        self.shape = volume.shape

    def __getitem__(self, key: Any, /) -> npt.NDArray[np.uint8]:
        """Return the class indices of up to three slices.

        Raises:
            StoreError: values that are none.
        """
        slices = key if isinstance(key, tuple) else (key,)
        slices += (slice(None),) * (3 - len(slices))
        spans = [range(n)[s] for n, s in zip(self.shape, slices, strict=True)]
        start, shape = tuple(s.start for s in spans), tuple(map(len, spans))
        values = self.volume.read(start, shape)[..., 0]
        return _as_indices(values, self._classes, self.volume.path)


def open_mask_of(folder: Path, run: Run, closing: ExitStack, scan: Scan | None = None) -> MaskLike:
    """Open the mask of an image or volume; return it, (y, x) or (z, y, x) class indices.

    It is the file that people see and correct, else what the working folder keeps of the run.

    Args:
        run: what its `run.json` says.
        scan: what was segmented, on which the mask must lie; None = it is not known.

    Raises:
        StoreError: there is none, it is damaged, or is not of this image or volume.
    """
    path, store = folder / MASK_FILES[run.kind], RunStore(folder=folder)
    try:
        if path.is_file():
            opener = _open_png if run.kind == "image" else _open_nifti
            return opener(path, run, closing, scan)
        if store.key().get("key") == run.settings["key"]:
            return trusted(zarr.open_array(store.mask_path / "0", mode="r"))
    except (SourceError, OSError, SyntaxError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as a mask: {error}") from error
    raise StoreError(f"{folder} has no {path.name}; segment the {run.kind} again")


def _open_png(path: Path, run: Run, closing: ExitStack, scan: Scan | None) -> MaskLike:
    # Image.open would refuse large pictures: this one is no larger than its image.
    with path.open("rb") as file, PngImageFile(file) as picture:
        _check_size(path, picture.size, run)
        pixels = np.asarray(picture)
    if pixels.ndim != 2:
        raise ValueError("it has colours, where class indices were expected")
    return _as_indices(pixels, 1 + len(run.colors), path)


def _open_nifti(path: Path, run: Run, closing: ExitStack, scan: Scan | None) -> MaskLike:
    volume = closing.enter_context(open_volume(path))
    mask = FileMask(volume, 1 + len(run.colors))
    if not isinstance(scan, Volume) or sorted(volume.shape) != sorted(scan.shape):
        _check_size(path, volume.shape[::-1], run)
        return mask
    if volume.shape == scan.shape and np.allclose(volume.affine, scan.affine, atol=1e-3):
        return mask
    return turned_onto(mask[:], volume.affine, scan.shape, scan.affine)


def _check_size(path: Path, size: Sequence[int], run: Run) -> None:
    """Refuse a mask of another size, (x, y) or (x, y, z), before it is read."""
    if list(size) != list(run.slide["size"]):
        found, wanted = (" × ".join(map(str, s)) for s in (size, run.slide["size"]))
        raise StoreError(f"{path} has {found} px, the {run.kind} {wanted}")


def _as_indices(values: npt.NDArray[Any], classes: int, path: Path) -> npt.NDArray[np.uint8]:
    # What is no number becomes another value, which the next line finds.
    with np.errstate(invalid="ignore"):
        found = values.astype(np.uint8)
    if (found != values).any() or found.max(initial=0) >= classes:
        wrong = values[(found != values) | (found >= classes)][0]
        raise StoreError(f"{path} holds the value {wrong}; its classes are 0 to {classes - 1}")
    return found
