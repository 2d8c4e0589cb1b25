"""Read and segment damaged inputs of all kinds in processes that may crash: what the fuzzer runs.

One case again: python tests/fuzz.py "Aperio SVS" 1234
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from bundles import pointwise_bundle, small_unet_bundle
from click.testing import CliRunner
from mutate import mutate
from peak import peak_bytes
from PIL import Image
from runs import segment_job
from scans import blobs, write_series

from wsi_pipeline.annotations import read_region
from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.options import PredictOptions, ScheduleOptions, SelectOptions, Settings
from wsi_pipeline.report.page import write_report
from wsi_pipeline.report.record import find_runs
from wsi_pipeline.report.summary import write_summary
from wsi_pipeline.run.jobs import Job, find_slides, plan_jobs, read_mpp_table
from wsi_pipeline.run.slide_run import SlideRun
from wsi_pipeline.schedule.cluster import open_cluster
from wsi_pipeline.sources import Slide, open_source
from wsi_pipeline.sources.radiology.discover import find_volumes
from wsi_pipeline.sources.radiology.preprocess import open_scan
from wsi_pipeline.tissue.detect import check_tissue, read_tissue
from wsi_pipeline.viewer.run_view import open_shown

MPP = 0.5
SECONDS = 30
"""After which a case hangs; one of them takes about 0.1 s on a quiet machine."""
MEMORY = 2 << 30
"""Bytes by which no case may grow a process: eight of the largest tiles that are believed."""
ROOM = 6 << 30
"""Bytes of addresses that a process has besides those it begins with."""
SEGMENTED = 0.15
"""Share of the cases that are segmented, too."""
LARGEST = 8 << 20
"""Pixels of a slide that is segmented."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One damaged slide.

    Attributes:
        kind: of slide.
        original: the intact slide.
        seed: of everything drawn.
    """

    kind: str
    original: Path
    seed: int

    def __str__(self) -> str:
        return f'python tests/fuzz.py "{self.kind}" {self.seed}'


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: the damaged slide.
        ended: "refused", "read" or "segmented", each of which is right; or what is wrong.
        said: the refusal, or the traceback of what is wrong.
    """

    case: Case
    ended: str
    said: str = ""

    @property
    def is_right(self) -> bool:
        """Return whether this is what may happen."""
        return self.ended in ("refused", "read", "segmented")


class Wrong(Exception):
    """Something that must not be, and is no exception by itself."""


# --- in a worker -------------------------------------------------------------------------------


class Reader:
    """Does cases one after the other, in a folder of its own."""

    def __init__(self, folder: Path, closing: ExitStack) -> None:
        self._folder = folder
        self._bundle: Bundle = load_bundle(
            pointwise_bundle(folder / "model", mpp=MPP, patch_size=256, overlap=0)
        )
        self._client = closing.enter_context(open_cluster(ScheduleOptions()))

    def __call__(self, case: Case) -> Outcome:
        """Damage a slide, read it; return what became of it."""
        draw = random.Random(f"{case.kind} {case.seed}")
        with tempfile.TemporaryDirectory(dir=self._folder) as text:
            folder = Path(text)
            path = mutate(case.original, folder, draw)
            try:
                if case.kind in OTHERS:
                    return Outcome(case=case, ended=OTHERS[case.kind](path, case.original))
                _info(path)
                return Outcome(case=case, ended=self._read(path, folder, draw))
            except WsiPipelineError as error:
                return Outcome(case=case, **_judged(str(error)))
            except Exception:
                return Outcome(case=case, ended="traceback", said=traceback.format_exc())

    def _read(self, path: Path, folder: Path, draw: random.Random) -> str:
        settings = Settings(
            select=SelectOptions(mpp=MPP, tissue="none"), predict=PredictOptions(device="cpu")
        )
        chance = draw.random()
        with open_source(path, mpp=MPP) as slide:
            size = slide.size
            _read_blocks(slide, draw)
        with SlideRun(path, self._bundle, settings) as run_of_slide:
            run_of_slide.survey()
        if chance > SEGMENTED or size[0] * size[1] > LARGEST:
            return "read"
        run = segment_job(
            Job(path=path, folder=folder / "out"),
            self._bundle,
            client=self._client,
            settings=settings,
            threads=1,
        )
        mask = zarr.open_array(folder / "out" / "mask.ome.zarr" / "0", mode="r")
        if mask.shape != size[::-1]:
            raise Wrong(f"a mask of {mask.shape} for a slide of {size}")
        if bool((mask[:] == 3).any()) != bool(run.bad_regions):
            raise Wrong(f"{len(run.bad_regions)} bad regions in run.json, not so in the mask")
        return "segmented"


def _info(path: Path) -> None:
    """Run `info` on a slide: it ends with facts, or with one line."""
    ran = CliRunner().invoke(group, ["info", str(path), "--json"])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    if ran.exit_code == 0:
        json.loads(ran.output)
    elif ran.output.count("\n") != 1 or not ran.output.startswith("Error: "):
        raise Wrong(f"info said {ran.output!r}")


def _command(*arguments: object) -> bool:
    """Run a command, which ends with its facts or with sentences; return whether all was well."""
    ran = CliRunner().invoke(group, ["-q", *map(str, arguments)])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    if ran.exit_code not in (0, 1, 2) or "Traceback" in ran.output:
        raise Wrong(f"{arguments[0]} ended with {ran.exit_code} and said {ran.output!r}")
    if ran.exit_code and not ran.output.strip():
        raise Wrong(f"{arguments[0]} ended with {ran.exit_code} without a word")
    return ran.exit_code == 0


def _list(path: Path, original: Path) -> str:
    """Take slides from a list, and µm per pixel from a table."""
    slide = original.parent.parent / "a.tif"
    (path.parent / slide.name).symlink_to(slide)
    plan_jobs(find_slides([str(path)], output=path.parent / "out"), path.parent / "out")
    if path.suffix == ".csv":
        read_mpp_table(path)
    return "read"


def _areas(path: Path, original: Path) -> str:
    """Check annotations, and take them for a truth and for a region."""
    _command("check-geojson", path)
    _command("check-geojson", path, "--fix", path.with_name("mended.geojson"))
    _command("evaluate", path, original, "--size", "9000,9000")
    read_region(path)
    return "read"


def _run(path: Path, original: Path) -> str:
    """Do with a run's folder all that is done with those, beside one that is whole."""
    output, whole = path.parent, path.with_name("whole")
    whole.mkdir()
    (whole / "run.json").write_bytes((original / "run.json").read_bytes())
    mask = original / "mask.ome.zarr"
    ended = [_command("evaluate", path, mask), _command("export", path, "--simplify", "3")]
    if not _command("status", output):
        raise Wrong("status does not know the whole run")
    runs = find_runs(output)
    if whole not in runs:
        raise Wrong("the whole run is not found")
    write_summary(output, runs)
    write_report(output, runs)
    with suppress(WsiPipelineError):
        open_shown(path)
    return "read" if all(ended) else "refused"


def _bundle(path: Path, original: Path) -> str:
    """Load a bundle, and try it."""
    load_bundle(path)
    _command("models", "show", path)
    return "read" if _command("models", "check", path, "--patch-size", "32") else "refused"


def _mask(path: Path, original: Path) -> str:
    """Take a mask for the tissue, and compare it."""
    _command(
        "evaluate", path, original, *("--prediction-values", "A=1+"), *("--truth-values", "A=1+")
    )
    check_tissue(path)
    read_tissue(path, (400, 300), (30, 40), (10.0, 10.0))
    return "read"


def _scan(path: Path, original: Path, *, axes: int) -> str:
    """Read an image or a volume; where the format has checksums, pixels are right or refused."""
    _command("info", path, "--json")
    with open_scan(path, axes=axes) as scan:
        if math.prod(scan.shape) > LARGEST:
            return "read"
        pixels = scan.read((0,) * axes, scan.shape)
        if pixels.shape[:axes] != scan.shape:
            raise Wrong(f"{pixels.shape} read of {scan.shape}")
    if path.name.endswith((".png", ".nii.gz")):
        with open_scan(original, axes=axes) as scan:
            if not np.array_equal(pixels, scan.read((0,) * axes, scan.shape)):
                raise Wrong("other pixels than there were, and not a word")
    return "read"


def _series(path: Path, original: Path) -> str:
    """Read the volumes of a folder of DICOM files."""
    for volume in find_volumes([str(path)], path / "none"):
        _scan(volume, original, axes=3)
    return "read"


OTHERS: dict[str, Callable[[Path, Path], str]] = {
    "list of slides": _list,
    "list of slides, CSV": _list,
    "GeoJSON": _areas,
    "run": _run,
    "bundle": _bundle,
    "mask, PNG": _mask,
    "mask, TIFF": _mask,
    "image, PNG": partial(_scan, axes=2),
    "image, DICOM": partial(_scan, axes=2),
    "NIfTI": partial(_scan, axes=3),
    "NIfTI, gzip": partial(_scan, axes=3),
    "NRRD": partial(_scan, axes=3),
    "NRRD, gzip": partial(_scan, axes=3),
    "DICOM series": _series,
}
"""What is done with kinds that are no slides: called with the damaged and the intact path."""


def _read_blocks(slide: Slide, draw: random.Random) -> None:
    """Read here and there, at level 0, between levels and beyond the edges."""
    for mpp in (MPP, MPP, 1.3 * MPP, 8 * MPP):
        view = slide.at(mpp)
        origin = (draw.randrange(-50, view.shape[0] + 50), draw.randrange(-50, view.shape[1] + 50))
        shape = (draw.randint(1, 400), draw.randint(1, 400))
        bad: list[Any] = []
        pixels = view.read(origin, shape, bad=bad)
        if pixels.shape != (*shape, 3) or pixels.dtype != np.uint8:
            raise Wrong(f"{pixels.shape} of {pixels.dtype} read, {shape} asked for")
        if any(min(region.width, region.height) < 1 for region in bad):
            raise Wrong(f"bad regions without area: {bad}")


def _judged(refusal: str) -> dict[str, str]:
    """Return how a refusal ends: well if it is a sentence, and no allocation had to fail."""
    if "\n" in refusal or "Traceback" in refusal or not refusal.strip():
        return {"ended": "no sentence", "said": refusal}
    if "MemoryError" in refusal or "allocate" in refusal:
        return {"ended": "allocation", "said": refusal}
    return {"ended": "refused", "said": refusal}


def _serve(pipe: Connection, folder: Path, errors: Path) -> None:
    """Do cases as they come; ends with the pipe."""
    stream = errors.open("ab", buffering=0)
    os.dup2(stream.fileno(), 2)
    os.dup2(stream.fileno(), 1)
    faulthandler.enable(stream)
    logging.getLogger().setLevel(logging.CRITICAL)
    with ExitStack() as closing, suppress(EOFError):
        read = Reader(folder, closing)
        _limit_addresses()
        while True:
            case = pipe.recv()
            faulthandler.dump_traceback_later(SECONDS - 1, file=stream)
            before = peak_bytes()
            outcome = read(case)
            faulthandler.cancel_dump_traceback_later()
            if (grown := peak_bytes() - before) > MEMORY:
                outcome = Outcome(case=case, ended="memory", said=f"{grown / 1e9:.1f} GB more")
            pipe.send(outcome)


def _limit_addresses() -> None:
    """Let an allocation of many gigabytes fail, before it takes the machine along."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# --- outside -----------------------------------------------------------------------------------


class Worker:
    """A process that does cases; a new one where it has crashed or hangs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: Any = None
        self._errors = folder / "stderr.txt"

    def __call__(self, case: Case) -> Outcome:
        """Have a case done; return what became of it."""
        # the first case waits for the imports besides, which a busy machine has little time for
        patience = SECONDS if self._process else 6 * SECONDS
        if self._process is None:
            self._start()
        self._pipe.send(case)
        try:
            if self._pipe.poll(patience):
                outcome: Outcome = self._pipe.recv()
                if outcome.ended != "memory":
                    return outcome
            else:
                outcome = Outcome(case=case, ended="hang", said=self._last_words())
        except (EOFError, ConnectionError):
            self._process.join(SECONDS)
            said = f"exit code {self._process.exitcode}\n{self._last_words()}"
            outcome = Outcome(case=case, ended="crash", said=said)
        self.close()
        return outcome

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, folder, self._errors), daemon=True
        )
        self._process.start()
        other.close()

    def _last_words(self) -> str:
        return self._errors.read_text("utf-8", "replace")[-4000:] if self._errors.exists() else ""


def run_cases(cases: Iterable[Case], folder: Path, *, workers: int) -> Iterator[Outcome]:
    """Do cases in some processes; yield what became of each."""
    local = threading.local()
    every: list[Worker] = []

    def do(case: Case) -> Outcome:
        if not hasattr(local, "worker"):
            local.worker = Worker(Path(tempfile.mkdtemp(dir=folder)))
            every.append(local.worker)
        found: Outcome = local.worker(case)
        return found

    with ThreadPoolExecutor(workers) as threads, ExitStack() as closing:
        closing.callback(lambda: [worker.close() for worker in every])
        yield from threads.map(do, cases)


# --- what is damaged ---------------------------------------------------------------------------

REAL = {
    "Aperio SVS": "svs/CMU-1-Small-Region.svs",
    "NDPI": "ndpi/test3-DAPI-2-_387_.ndpi",
    "MIRAX": "mrxs_partial/Mirax2-Fluorescence-2.mrxs",
    "DICOM WSI": "dicom_panimg/full_with_bot.dcm",
    "DICOM WSI, large": "dicom/multiframe_camelyon_challenge_image.dcm",
    "TIFF pyramid": "panimg_tiff/valid_tiff.tif",
    "TIFF, ZSTD": "large_image/yb10kx5k.zstd.tiff",
    "TIFF, turned": "large_image/test_orient3.tif",
    "OME-TIFF, several files": "ome_viv/multifile-Z1.ome.tiff",
    "PNG": "wsidicom_tiles/test_tile.png",
    "JPEG": "wsidicom_tiles/JPEG_Baseline_(Process_1)-RGB-8.jpg",
}
"""Real slides by their kind."""


def originals(folder: Path) -> dict[str, Path]:
    """Make the slides that are damaged; return them by kind, real ones where they are there."""
    from test_formats import DATA, MADE, TISSUE, write_tiff

    from wsi_pipeline.run.tile import tile

    found = {kind: DATA / "wsi" / name for kind, name in REAL.items()}
    found = {kind: path for kind, path in found.items() if path.exists()}
    for number, made in enumerate(made for made in MADE if not made.kind.startswith("DICOM")):
        (folder / str(number)).mkdir()
        found[made.kind] = made.write(folder / str(number))
    plain = write_tiff(folder / "a.tif", np.ascontiguousarray(TISSUE[:300, :400]))
    select = SelectOptions(mpp=MPP, tissue="none")
    tile(plain, folder / "grid.zarr", mpp=MPP, patch_size=128, overlap=0, select=select)
    return {**found, "patch grid": folder / "grid.zarr", **_others(folder / "others", plain)}


def _others(folder: Path, slide: Path) -> dict[str, Path]:
    """Make what else is read: lists, annotations, a run, a bundle, masks, images, volumes."""
    import nibabel
    import nrrd

    folder.mkdir()
    # paths of their own folder: what is left of a longer one would have the whole disk searched
    (folder / "a.txt").write_text(f"{slide.name}\n\n*.tif\nb.svs\n", "utf-8")
    (folder / "a.csv").write_text(f"slide,mpp\n{slide.name},0.5\n", "utf-8")
    bundle = pointwise_bundle(folder / "model", mpp=MPP, patch_size=128, overlap=0)
    small_unet_bundle(folder / "bundle")
    settings = Settings(select=SelectOptions(mpp=MPP, tissue="none"))
    with open_cluster(ScheduleOptions()) as client:
        job = Job(path=slide, folder=folder / "run")
        segment_job(job, load_bundle(bundle), client=client, settings=settings, threads=1)
    mask = np.zeros((300, 400), np.uint8)
    mask[50:200, 100:300] = 1
    Image.fromarray(mask).save(folder / "mask.png")
    tifffile.imwrite(folder / "mask.tif", mask, tile=(128, 128), compression="zlib")
    Image.fromarray(np.repeat(blobs((60, 70))[..., None] % 256, 3, 2).astype("u1")).save(
        folder / "image.png"
    )
    voxels = blobs((12, 20, 24))
    write_series(folder / "series", voxels, spacing=(2.0, 1.0, 0.5), seed=0)
    image = nibabel.Nifti1Image(voxels.T, np.diag([0.5, 1.0, 2.0, 1.0]))
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(image, folder / name)
    for name, encoding in (("a.nrrd", "raw"), ("b.nrrd", "gzip")):
        nrrd.write(str(folder / name), voxels.T, {"encoding": encoding, "spacings": [0.5, 1, 2]})
    return {
        "list of slides": folder / "a.txt",
        "list of slides, CSV": folder / "a.csv",
        "GeoJSON": folder / "run" / "annotations.geojson",
        "run": folder / "run",
        "bundle": folder / "bundle",
        "mask, PNG": folder / "mask.png",
        "mask, TIFF": folder / "mask.tif",
        "image, PNG": folder / "image.png",
        "image, DICOM": next((folder / "series").iterdir()),
        "NIfTI": folder / "a.nii",
        "NIfTI, gzip": folder / "a.nii.gz",
        "NRRD": folder / "a.nrrd",
        "NRRD, gzip": folder / "b.nrrd",
        "DICOM series": folder / "series",
    }


def choose_cases(originals: dict[str, Path], count: int, *, first: int = 0) -> list[Case]:
    """Return cases that go through the kinds in turn."""
    kinds = sorted(originals)
    return [
        Case(kind=kinds[n % len(kinds)], original=originals[kinds[n % len(kinds)]], seed=n)
        for n in range(first, first + count)
    ]


def main() -> None:
    """Do one case again, in this process."""
    kind, seed = sys.argv[1:]
    faulthandler.dump_traceback_later(SECONDS)
    with tempfile.TemporaryDirectory() as text, ExitStack() as closing:
        folder = Path(text)
        case = Case(kind=kind, original=originals(folder)[kind], seed=int(seed))
        outcome = Reader(folder, closing)(case)
    print(outcome.ended, outcome.said, f"{peak_bytes() / 1e9:.1f} GB", sep="\n")


if __name__ == "__main__":
    main()
