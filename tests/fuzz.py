"""Read and segment damaged slides in processes that may crash: what the fuzzer runs.

One case again: python tests/fuzz.py "Aperio SVS" 1234
"""

from __future__ import annotations

import faulthandler
import json
import logging
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner
from mutate import mutate
from peak import peak_bytes

from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.inputs import Job
from wsi_pipeline.options import PredictOptions, ScheduleOptions, SelectOptions, Settings
from wsi_pipeline.pipeline import segment, survey
from wsi_pipeline.schedule import open_cluster
from wsi_pipeline.sources import Slide, open_source

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
            survey(slide, self._bundle, settings)
        if chance > SEGMENTED or size[0] * size[1] > LARGEST:
            return "read"
        run = segment(
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
        if self._process is None:
            self._start()
        self._pipe.send(case)
        try:
            # the first case waits for the imports besides
            if self._pipe.poll(SECONDS):
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

    from wsi_pipeline.pipeline import tile

    found = {kind: DATA / "wsi" / name for kind, name in REAL.items()}
    found = {kind: path for kind, path in found.items() if path.exists()}
    for number, made in enumerate(made for made in MADE if not made.kind.startswith("DICOM")):
        (folder / str(number)).mkdir()
        found[made.kind] = made.write(folder / str(number))
    plain = write_tiff(folder / "a.tif", np.ascontiguousarray(TISSUE[:300, :400]))
    select = SelectOptions(mpp=MPP, tissue="none")
    tile(plain, folder / "grid.zarr", mpp=MPP, patch_size=128, overlap=0, select=select)
    return {**found, "patch grid": folder / "grid.zarr"}


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
