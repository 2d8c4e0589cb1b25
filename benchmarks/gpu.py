"""How many patches of 512 px a second one GPU predicts from disk to mask, and how busy it is.

python benchmarks/gpu.py --work bench --slides 4 -- --batch-size 64

Segments copies of a slide that is all tissue in one process, LightMuSeg, zarr only; what follows
`--` goes to `wsi-pipeline segment`. Start-up is the time of the same command on a slide of one
patch. The forward-only rate is that of floor.py on the same GPU, its patches resident. Where there
is no CUDA GPU, it says so and ends well; `--device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from make_slide import read_tissue, write_big_slide
from measure import Measured, machine, measure
from programs import MPP, PATCH, write_bundle
from run import HERE, read_through
from skimage.data import immunohistochemistry
from tables import slug

from wsi_pipeline.report.record import find_runs

SAMPLING_MS = 100
PAPER_RATE = 44.51
"""Patches a second that LightMuSeg's paper tells, its hardware unknown."""


def make_slides(
    folder: Path, size: tuple[int, int], count: int, tissue: Any, mpp: float = MPP
) -> Path:
    """Return a folder of equal slides that are all tissue, made unless they are there."""
    width, height = size
    target = folder / f"{width}x{height}-{mpp:g}"
    target.mkdir(parents=True, exist_ok=True)
    first = target / "slide-0.svs"
    if not first.is_file():
        write_big_slide(first, size, mpp, share=1.0, tissue=tissue)
    for path in target.glob("slide-*.svs"):
        if path != first:
            path.unlink()
    for i in range(1, count):
        shutil.copyfile(first, target / f"slide-{i}.svs")  # a link would be the same slide
    return target


@contextmanager
def watched(log: Path) -> Iterator[None]:
    """Write the GPU's utilisation (%) and memory (MiB) to a file, many times a second."""
    if shutil.which("nvidia-smi") is None:
        log.write_bytes(b"")
        yield
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used"]
    options = ["--format=csv,noheader,nounits", "-i", "0", "-lms", str(SAMPLING_MS)]
    with log.open("wb") as output:
        watcher = subprocess.Popen([*command, *options], stdout=output)
        try:
            yield
        finally:
            watcher.terminate()
            watcher.wait()


def utilisation(log: Path) -> dict[str, float]:
    """Return mean and median utilisation (%) from the first to the last busy look, and memory."""
    rows = [line.split(",") for line in log.read_text("utf-8").splitlines()]
    looks = [(float(row[0]), float(row[1])) for row in rows if len(row) == 2]
    busy = [i for i, (percent, _) in enumerate(looks) if percent > 0]
    if not busy:
        return {}
    percents = [percent for percent, _ in looks[busy[0] : busy[-1] + 1]]
    return {
        "gpu_percent_mean": statistics.mean(percents),
        "gpu_percent_median": statistics.median(percents),
        "gpu_memory_gb": max(mib for _, mib in looks) * 2**20 / 1e9,
    }


def segment(
    slides: Path, bundle: Path, output: Path, device: str, options: Sequence[str]
) -> Measured:
    """Segment a folder of slides in a fresh process; return what it took."""
    shutil.rmtree(output, ignore_errors=True)
    for path in slides.iterdir():
        read_through(path)
    begin = [sys.executable, "-m", "wsi_pipeline", "-q", "segment", str(slides)]
    what = ["--model", str(bundle), "--output", str(output), "--outputs", "zarr"]
    where = ["--tissue", "none", "--overlap", "0", "--device", device]
    return measure([*begin, *what, *where, *options], output.with_suffix(".log"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure end-to-end speed on a GPU.")
    parser.add_argument("--work", type=Path, default=Path("bench"), help="folder for everything")
    parser.add_argument("--size", type=int, nargs=2, default=(40960, 32768), metavar=("W", "H"))
    parser.add_argument("--slides", type=int, default=4, help="in one process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mpp", type=float, default=MPP, help="µm/px of the slides")
    parser.add_argument("--network", choices=["lightmuseg", "shipped"], default="lightmuseg")
    parser.add_argument("--tissue", type=Path, help="picture of tissue for the slides")
    parser.add_argument("--reduce", type=int, default=1, help="its pixels that become one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the floor, too")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("options", nargs="*", help="of wsi-pipeline segment, after --")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to measure")
        return
    work = args.work.resolve()
    tissue = read_tissue(args.tissue, args.reduce) if args.tissue else immunohistochemistry()
    bundle = write_bundle(work / "bundle-gpu", args.network, tissue).path
    slides = make_slides(work / "gpu", tuple(args.size), args.slides, tissue, args.mpp)
    tiny = make_slides(work / "gpu", (PATCH, PATCH), 1, tissue, args.mpp)
    output = work / "out" / "gpu"
    rounds = []
    for turn in range(args.rounds):
        start_up = segment(tiny, bundle, output, args.device, args.options).seconds
        watch = work / f"gpu-{turn}.csv"
        with watched(watch):
            measured = segment(slides, bundle, output, args.device, args.options)
        runs = find_runs(output)
        patches = sum(run.patches["kept"] for run in runs.values())
        command = [sys.executable, str(HERE / "floor.py"), str(slides / "slide-0.svs")]
        floor = measure(
            [*command, "--model", str(bundle), "--tissue", "none", "--device", args.device]
            + ["--compile"] * args.compile,
            work / "gpu-floor.log",
        ).said
        steady = patches / (measured.seconds - start_up)
        forward = floor["patches"] / floor["forward_seconds"]
        facts = {
            "patches": patches,
            "seconds": measured.seconds,
            "start_up_seconds": start_up,
            "patches_per_second": steady,
            "patches_per_second_with_start_up": patches / measured.seconds,
            "forward_only_per_second": forward,
            "form": floor["form"],
            "decode_only_per_second": floor["patches"] / floor["decode_seconds"],
            "ratio_to_forward": steady / forward,
            "ratio_to_paper": steady / PAPER_RATE,
            "peak_gb": measured.peak_gb,
            "stages": [run.seconds for run in runs.values()],
            **utilisation(watch),
        }
        rounds.append(facts)
        print(json.dumps({k: v for k, v in facts.items() if k != "stages"}, indent=1), flush=True)
    here = machine()
    if args.device != "cpu":
        here |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{here['date']}-{slug(here.get('gpu', 'no gpu'))}.json"
    path.write_text(
        json.dumps({"machine": here, "options": args.options, "rounds": rounds}, indent=1)
    )
    median = statistics.median(r["patches_per_second"] for r in rounds)
    share = statistics.median(r["ratio_to_forward"] for r in rounds)
    print(f"median {median:,.0f} patches/s from disk to mask, {share:.2f} of forward only; {path}")


if __name__ == "__main__":
    main()
