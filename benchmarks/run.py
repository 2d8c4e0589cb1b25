"""Benchmarks of whole runs: each a fresh process, in turns with the peers, as ratios.

python benchmarks/run.py list
python benchmarks/run.py null floor --work bench --tiatoolbox tia/bin/python
python benchmarks/run.py since rates --work bench --before ../checkout-of-another-commit
python benchmarks/run.py report --work bench

Every finished process is kept in the folder `WORK`; the same command again goes on where it
stopped, as long as the package's code is the same. docs/benchmarks.md tells the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import zarr
from comparisons import COMPARISONS, Comparison, Job
from make_slide import TILE, read_tissue, tissue_tiles, write_big_slide
from measure import measure
from PIL import Image
from programs import MPP, PATCH, TRAINED, write_bundle, write_programs
from skimage.data import immunohistochemistry
from tables import job_key, write_results

import wsi_pipeline
from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.report.record import load_run
from wsi_pipeline.run.quantise import quantise_model

HERE = Path(__file__).parent
SAMPLED = 8
"""Masks are compared at every eighth pixel of every eighth row."""

PEERS = {"tiatoolbox", "fast", "before"}

Record = dict[str, Any]


class Bench:
    """The folder that holds slides, bundles, outputs and records.

    Args:
        work: the folder.
        tissue: picture to make slides of, uint8 (n, n, 3).
        pythons: "tiatoolbox", "fast" → the python of their environment.
        before: checkout of another commit.
    """

    def __init__(
        self,
        work: Path,
        tissue: npt.NDArray[np.uint8],
        pythons: Mapping[str, str],
        before: Path | None = None,
    ) -> None:
        self.work = work.resolve()
        self.pythons = pythons
        self.before = before and before.resolve()
        self._tissue = tissue
        self._digest = hashlib.sha256(tissue.tobytes()).hexdigest()[:8]
        self._records = self.work / f"runs-{self._digest}.jsonl"

    def slide(self, size: tuple[int, int], mpp: float = MPP) -> tuple[Path, Path]:
        """Return a slide of half tissue and its tissue mask, made unless they are there."""
        width, height = size
        path = self.work / "slides" / f"{width}x{height}-{mpp:g}-{self._digest}.svs"
        mask = path.with_suffix(".png")
        if not mask.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_big_slide(path, size, mpp, tissue=self._tissue)
            inside = tissue_tiles(-(-height // TILE), -(-width // TILE))
            cells = inside.repeat(4, axis=0).repeat(4, axis=1)[..., None] * np.uint8(255)
            Image.fromarray(cells.repeat(3, axis=2)).save(mask)
        return path, mask

    def bundle(self, network: str, int8: Path | None = None) -> Bundle:
        """Return the bundle of a network, written unless it is there; "before" has its own.

        A slide is what its ranges for int8 are found on.
        """
        if network == "before" and self.before is not None:
            path = self.before / TRAINED.parent.relative_to(HERE.parent)
            if int8 is not None:
                path, plain = self.work / f"bundles-{self._digest}" / "before-int8", path
                if not path.is_dir():
                    quantise_model([int8], model=plain, output=path)
            return load_bundle(path)
        folder = self.work / f"bundles-{self._digest}" / network
        return write_bundle(folder, network, self._tissue)

    def perform(self, name: str, label: str, job: Job) -> Record:
        """Run one job in a fresh process; return what it took."""
        slide, mask = self.slide(job.size, job.mpp)
        bundle = self.bundle(job.network, slide if job.precision == "int8" else None)
        output = self.work / "out" / name / label
        if job.who == "stages":
            output = output.with_name("ours")  # it does again what that has done
        else:
            shutil.rmtree(output, ignore_errors=True)
        command = self._command(job, slide, mask, bundle, output)
        read_through(slide)
        measured = measure(command, self.work / "logs" / f"{name}-{label}.log")
        record = {k: v for k, v in asdict(measured).items() if k != "said"} | measured.said
        if job.who in ("ours", "unsynced", "before"):
            record |= _own_facts(output / slide.stem)
        if job.who in self.pythons:
            same = "fp32" if "fp32" in COMPARISONS[name].jobs else "ours"
            ours = _mask_of(self.work / "out" / name / same / slide.stem)
            record["agreement"] = _agreement(ours, record["mask"])
        record.pop("mask", None)  # a path on this machine
        return record

    def _command(
        self, job: Job, slide: Path, mask: Path, bundle: Bundle, output: Path
    ) -> list[str]:
        tissue = str(mask) if job.tissue == "mask" else job.tissue
        options = ["--overlap", str(job.overlap), "--tissue", tissue]
        model = ["--model", str(bundle.path)]
        match job.who:
            case "ours" | "unsynced" | "before":
                ours = (
                    [str(HERE / "unsynced.py")] if job.who == "unsynced" else ["-m", "wsi_pipeline"]
                )
                # Before what is installed comes PYTHONPATH, and by -P not the current folder.
                code = self.before if job.who == "before" else HERE.parent
                isa = ["ONEDNN_MAX_CPU_ISA=AVX2", "ATEN_CPU_CAPABILITY=avx2"] if job.old else []
                python = ["env", f"PYTHONPATH={code}", *isa, sys.executable, "-P"]
                segment = [*python, *ours, "-q", "segment", str(slide)]
                outputs = ["--output", str(output), "--outputs", ",".join(job.outputs)]
                return [*segment, *model, *options, "--precision", job.precision, *outputs]
            case "floor":
                return [sys.executable, str(HERE / "floor.py"), str(slide), *model, *options]
            case "stages":
                run = str(output / slide.stem)
                return [sys.executable, str(HERE / "stages.py"), run, *model]
        program = write_programs(self.work / f"programs-{self._digest}", bundle)[job.who]
        script = HERE / "peers" / f"{job.who}_run.py"
        target = output if job.who == "tiatoolbox" else output / "mask.tif"
        command = [self.pythons[job.who], str(script), str(slide), str(program), str(target)]
        return [*command, "--tissue", str(mask)] if job.tissue == "mask" else command

    def records(self) -> list[Record]:
        """Return every record, oldest first."""
        if not self._records.is_file():
            return []
        return [json.loads(line) for line in self._records.read_text("utf-8").splitlines()]

    def keep(self, record: Record) -> None:
        """Add a record."""
        with self._records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def run_comparison(
    bench: Bench, name: str, comparison: Comparison, *, rounds: int, deadline: float
) -> bool:
    """Do what is left of a comparison; return whether all is done.

    Args:
        bench: where.
        name: of the comparison.
        comparison: the jobs.
        rounds: how often each job runs.
        deadline: `time.monotonic()` by which the last process must have ended, as far as earlier
            ones tell.
    """
    code = code_digest()
    for turn in range(rounds):
        for label, job in comparison.jobs.items():
            key = job_key(name, label, job)
            alike = [r for r in bench.records() if key.items() <= r.items()]
            if any(r["round"] == turn and r["code"] == code for r in alike):
                continue
            longest = max((r["facts"]["seconds"] for r in alike), default=0)
            if time.monotonic() + longest > deadline:
                print(f"{name}: no time left for {label} in round {turn + 1}; run this again")
                return False
            facts = bench.perform(name, label, job)
            when = {"round": turn, "code": code, "date": date.today().isoformat()}
            bench.keep({**key, **when, "facts": facts})
            print(
                f"{name}, round {turn + 1} of {rounds}, {label}: {facts['seconds']:.1f} s, "
                f"{facts['peak_gb']:.2f} GB",
                flush=True,
            )
    return True


def shrunk(comparison: Comparison, factor: int) -> Comparison:
    """Return a comparison on smaller slides, whose sides stay whole patches."""

    def shrink(job: Job) -> Job:
        width, height = (max(n // factor // PATCH, 2) * PATCH for n in job.size)
        return replace(job, size=(width, height))

    return replace(comparison, jobs={label: shrink(job) for label, job in comparison.jobs.items()})


def code_digest() -> str:
    """Return a digest of the package's code: what was measured with another is measured anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(wsi_pipeline.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _own_facts(folder: Path) -> Record:
    """Return what our `run.json` says."""
    run = load_run(folder / "run.json")
    megapixels = run.tissue_mm2 / (run.slide["mpp"][0] * run.slide["mpp"][1])
    return {
        "job_seconds": run.seconds["total"],
        "stages": run.seconds,
        "patches": run.patches["kept"],
        "predicted": run.patches["predicted"],
        "regions": sum(run.regions.values()),
        "tissue_megapixels": megapixels,
    }


def _mask_of(folder: Path) -> Path:
    """Return the mask of a run's folder, whichever kind it holds."""
    stored = folder / "mask.ome.zarr" / "0"
    return stored if stored.is_dir() else folder / "mask.ome.tif"


def _agreement(ours: Path, theirs: str) -> float:
    """Return the share of sampled pixels in which two masks hold the same class."""
    masks = [_sample(str(path)) for path in (ours, theirs)]
    return float((masks[0] == masks[1]).mean())


def _sample(path: str) -> npt.NDArray[np.uint8]:
    if path.endswith(".tif"):
        return tifffile.imread(path, level=0)[::SAMPLED, ::SAMPLED]
    return np.asarray(zarr.open_array(path, mode="r")[::SAMPLED, ::SAMPLED])


def read_through(path: Path) -> None:
    """Read a file once, so that it lies in the page cache for everybody."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark whole runs against floor and peers.")
    parser.add_argument(
        "names",
        nargs="+",
        choices=("list", "all", "report", *COMPARISONS),
        metavar="NAME",
        help=f"list, report, all, or some of {', '.join(COMPARISONS)}",
    )
    parser.add_argument("--work", type=Path, default=Path("bench"), help="folder for everything")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each process")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds; then stop")
    parser.add_argument("--shrink", type=int, default=1, help="divide sides of slides by this")
    parser.add_argument("--tissue", type=Path, help="picture of tissue for the slides")
    parser.add_argument("--reduce", type=int, default=1, help="its pixels that become one")
    parser.add_argument("--tiatoolbox", metavar="PYTHON", help="of TIAToolbox's environment")
    parser.add_argument("--fast", metavar="PYTHON", help="of FAST's environment")
    parser.add_argument("--before", type=Path, help="checkout of a commit to compare with")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="for `report`")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the measured process ends too
    chosen = {name: shrunk(c, args.shrink) for name, c in COMPARISONS.items()}
    if "all" not in args.names:
        chosen = {name: c for name, c in chosen.items() if name in args.names}
    if "list" in args.names:
        for name, comparison in COMPARISONS.items():
            print(f"{name:18} {comparison.text}")
    tissue = read_tissue(args.tissue, args.reduce) if args.tissue else immunohistochemistry()
    pythons = {n: p for n, p in (("tiatoolbox", args.tiatoolbox), ("fast", args.fast)) if p}
    bench = Bench(args.work, tissue, pythons, args.before)
    there = {*pythons, *(["before"] if args.before else [])}
    deadline = time.monotonic() + args.within
    for name, comparison in chosen.items():
        if missing := {job.who for job in comparison.jobs.values()} & PEERS - there:
            print(f"{name}: left out; it needs --{' and --'.join(missing)}")
        elif not run_comparison(bench, name, comparison, rounds=args.rounds, deadline=deadline):
            break
    if "report" in args.names:
        every = {name: shrunk(c, args.shrink) for name, c in COMPARISONS.items()}
        name = args.tissue.name if args.tissue else "scikit-image's picture of stained colon"
        for path in write_results(every, bench.records(), args.results, tissue=name):
            print(path)


if __name__ == "__main__":
    main()
