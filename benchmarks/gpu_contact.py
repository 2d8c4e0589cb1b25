"""All that there is to learn on a GPU that is lent for minutes, on a machine without network.

python benchmarks/gpu_contact.py prepare               # here, in the environment of the tests
python benchmarks/gpu_contact.py run --out FOLDER      # there, in a copy of the tree

`prepare` downloads into `.whl/`, which git ignores, the packages that a machine with PyTorch,
NumPy, SciPy, scikit-image, Matplotlib and pytest lacks, in the versions of this environment, and
says what will travel. `run` needs nothing but the standard library before it has installed them.
Its steps have shares of `--limit` and none begins after it; `found.json` and `log.txt` are
written as they end. `--device cpu` tries it where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / ".whl"
LACKING = (
    "connected-components-3d dask distributed donfig filelock google-crc32c imagecodecs jinja2 "
    "lightning-fabric lightning-utilities locket markupsafe msgspec numcodecs openslide-bin "
    "openslide-python orjson partd pydicom shapely tblib tifffile tiffslide tornado zarr zict"
)
"""Rasterio (36 MB) is not among them: nothing here needs it, but `train` reads masks with it."""
LIGHTER = {"numcodecs": "0.17.1"}
"""Where a later version weighs a sixth."""
MIB, LIMIT = 1 << 20, 460


def prepare(python: str, most: int) -> int:
    """Download the wheels; return 1 if they and the tree are more than `most` MiB."""
    WHEELS.mkdir(exist_ok=True)
    for path in WHEELS.glob("*.whl"):
        path.unlink()
    tags = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 5)]
    tags += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(WHEELS)]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [f"--platform={tag}" for tag in tags]
    command += [f"{name}=={LIGHTER.get(name) or version(name)}" for name in LACKING.split()]
    subprocess.run(command, check=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    files = [ROOT / os.fsdecode(name) for name in names.split(b"\0") if name]
    tree = sum(path.stat().st_size for path in files if path.is_file()) / MIB
    wheels = sum(path.stat().st_size for path in WHEELS.iterdir()) / MIB
    print(f"{tree:.1f} MiB of tree and {wheels:.1f} MiB of wheels, of {most} MiB")
    return int(tree + wheels > most)


def steps(device: str, work: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Yield name, seconds at the most of `LIMIT`, and command of each step, in order of worth."""
    marked = [p for p in ROOT.glob("tests/test_*.py") if "pytest.mark.gpu" in p.read_text("utf-8")]
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    yield "tests", 60, [*tests, *map(str, sorted(marked))]
    for group, most in (("check", 150), ("speed", 60)):
        out = ["--out", str(work / f"{group}.json"), "--device", device]
        yield group, most, ["benchmarks/gpu_checks.py", group, *out]
    size = ("20480", "16384") if device != "cpu" else ("1024", "512")
    whole = ["benchmarks/gpu.py", "--device", device, "--work", str(work), "--slides", "1"]
    whole += ["--rounds", "1", "--size", *size]
    for name, options in {
        "as it comes": [],
        "shipped bundle, 0.25 um": ["--network", "shipped", "--mpp", "0.25"],
        "all outputs": ["--", "--outputs", "zarr,geojson,tiff,overlay"],
        "batches of 16": ["--", "--batch-size", "16"],
        "overlap 128": ["--", "--overlap", "128"],
    }.items():
        yield name, 75, [*whole, "--results", str(work / name), *options]
    out = ["--out", str(work / "compiled.json"), "--device", device]
    yield "compiled", 90, ["benchmarks/gpu_checks.py", "compiled", *out]


def run(device: str, out: Path, work: Path, limit: float) -> int:
    """Install the wheels and take the steps; return 1 if one failed or was cut off."""
    begun, failed = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    site = work / "site"
    install = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    wheels = map(str, WHEELS.glob("*.whl"))
    subprocess.run([sys.executable, "-m", "pip", *install, "--upgrade", *wheels], check=True)
    # the package runs from the tree, but is asked for its version
    told = site / "wsi_pipeline-0.dist-info" / "METADATA"
    told.parent.mkdir(exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    told.write_text("\n".join(lines), "utf-8")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{site}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    print(f"installed after {time.monotonic() - begun:.0f} s", flush=True)
    found = {}
    for name, most, arguments in steps(device, work):
        left = limit - (time.monotonic() - begun)
        if left < 10:
            failed.append(name)
            print(f"{name}: no time left", flush=True)
            continue
        start = time.monotonic()
        with (out / "log.txt").open("a+b") as log:
            log.write(f"\n== {name}\n".encode())
            log.flush()
            first = log.tell()
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(min(most * limit / LIMIT, left))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                code = process.wait()
            log.seek(first)
            said = log.read().decode("utf-8", "replace").splitlines()[-8:]
        failed += [name] if code else []
        found[name] = {"code": code, "seconds": round(time.monotonic() - start, 1)}
        for path in [*work.glob(f"{name}.json"), *work.glob(f"{name}/*.json")]:
            found[name]["found"] = json.loads(path.read_text("utf-8"))
        (out / "found.json").write_text(json.dumps(found, indent=1), "utf-8")
        print(f"{name}: ended with {code} after {found[name]['seconds']} s", flush=True)
        print("\n".join(f"    {line[:300]}" for line in said), flush=True)
    print(f"failed or cut off: {', '.join(failed) or 'nothing'}")
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description="Learn all at the first contact with a GPU.")
    parser.add_argument("what", choices=["prepare", "run"])
    parser.add_argument("--python", default="3.12", help="prepare: of the machine with the GPU")
    parser.add_argument("--most", type=int, default=64, help="prepare: MiB that may travel")
    parser.add_argument("--device", default="cuda", help="run: cuda or cpu")
    parser.add_argument("--out", type=Path, default=Path("contact"), help="run: what to keep")
    parser.add_argument("--work", type=Path, default=Path("bench"), help="run: for the rest")
    parser.add_argument("--limit", type=float, default=LIMIT, help="run: seconds for all")
    args = parser.parse_args()
    if args.what == "prepare":
        return prepare(args.python, args.most)
    return run(args.device, args.out.resolve(), args.work.resolve(), args.limit)


if __name__ == "__main__":
    sys.exit(main())
