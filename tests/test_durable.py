"""Commands killed at every file event, and disks that lose their power: the same command again ends
with the files that an undisturbed one writes, and with no other.

The oracle is an undisturbed run of the same command.
"""

import csv
import itertools
import json
import os
import shutil
import sys

import numpy as np
import pytest
from bundles import lightmuseg_bundle, pointwise_bundle
from walk import Walker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks /proc")
# all events take an hour: WSI_PIPELINE_EVERY_EVENT=1 goes through them
STEP = 1 if os.environ.get("WSI_PIPELINE_EVERY_EVENT") else 13


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_slide):
    """Return a folder with a slide of two blocks, whose patches lie in one each, and bundles."""
    folder = tmp_path_factory.mktemp("durable")
    coarse = np.random.default_rng(0).integers(0, 255, (30, 128, 3), dtype=np.uint8)
    make_slide(folder / "slide.tif", coarse.repeat(10, 0).repeat(10, 1), 0.25, levels=(1, 4))
    pointwise_bundle(folder / "quick", mpp=0.25, patch_size=256, overlap=0)
    for seed in range(2):
        lightmuseg_bundle(folder / f"network{seed}", mpp=0.25, patch_size=64, seed=seed)
    return folder


@pytest.fixture(scope="module")
def walker(place):
    (place / "root").mkdir()
    walker = Walker(place / "root")
    yield walker
    walker.close()


def commands(place):
    """Return for each command what comes before it, and its own line."""
    root = place / "root"
    look = [place / "slide.tif", "--tissue", "none"]
    segment = [
        "-q", "segment", *look, "--model", place / "quick", "--output", root / "out", "--workers",
        1, "--block-size", 1024, "--device", "cpu", "--precision", "fp32", "--min-area", 0,
    ]  # fmt: skip
    tile = ["-q", "tile", *look, "--output", root / "grids", "--patch-size", 256, "--overwrite"]
    export = ["-q", "export", root / "out", "--simplify", 3, "--tiff", "asap"]

    def brought(seed):
        bundle = place / f"network{seed}"
        line = ["-q", "models", "import", bundle / "model.safetensors", "--like", bundle]
        return [*line, "--output", root / "brought", "--overwrite"]

    return {
        "segment": ([], segment),
        "segment otherwise": ([*segment, "--mask-mpp", 0.5], segment),
        "tile": ([*tile, "--mpp", 0.5], [*tile, "--mpp", 0.25]),
        "export": (segment, export),
        "models import": (brought(0), brought(1)),
    }


def held(folder):
    """Return all that a folder holds by name: bytes, or what is left of them without times."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in folder.rglob("*")
        if path.name != "wsi_pipeline.log"  # tells what was damaged
    }


def _content(path):
    match path.name.rpartition(".")[2]:
        case _ if path.is_dir():
            return None
        case "npz":
            with np.load(path) as arrays:
                return {
                    name: arrays[name].tolist()
                    for name in arrays
                    if not name.startswith("seconds_")
                }
        case "json" if path.name == "run.json":
            run = json.loads(path.read_text("utf-8"))
            return {name: value for name, value in run.items() if name != "seconds"}
        case "csv":
            rows = csv.DictReader(path.read_text("utf-8").splitlines())
            return [{name: cell for name, cell in row.items() if name != "seconds"} for row in rows]
        case "html":  # with seconds here and there
            return b"</html>" in path.read_bytes()
    return path.read_bytes()


class Stage:
    """A command that is done again and again from the same beginning."""

    def __init__(self, walker, place, name):
        self.walker, self.root = walker, place / "root"
        before, self.line = commands(place)[name]
        self._start, self._old = place / f"before {name}", {}
        self._empty()
        if before:
            self._run(before)
            self._old = held(self.root)
        shutil.rmtree(self._start, ignore_errors=True)  # of another test of the same command
        shutil.copytree(self.root, self._start)
        self._run(self.line)
        self.calm = held(self.root)
        assert self.calm != self._old

    def _empty(self):
        for path in self.root.iterdir():
            shutil.rmtree(path)

    def _run(self, line):
        code, _, said = self.walker.run(*line)
        assert code == 0, said

    def end_early(self, event, **options):
        """Begin anew and end at an event; return exit code and number of events."""
        self._empty()
        shutil.copytree(self._start, self.root, dirs_exist_ok=True)
        code, events, said = self.walker.run(*self.line, die_at=event, **options)
        assert code in (0, None), said
        return code, events

    def check(self, where):
        """Do it again; there must be what an undisturbed command leaves, and nothing else."""
        self._run(self.line)
        found = held(self.root)
        assert found.keys() == self.calm.keys(), where
        assert not [name for name in found if found[name] != self.calm[name]], where

    def check_whole(self, name, where):
        """A folder that is replaced as a whole is the old one or the new one, if it is there."""

        def inside(every):
            return {path: data for path, data in every.items() if path.startswith(f"{name}/")}

        now = inside(held(self.root))
        assert now in ({}, inside(self._old), inside(self.calm)), where


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name", ["segment", "segment otherwise", "tile", "export", "models import"]
)
def test_killed_at_file_events(place, walker, name):
    stage = Stage(walker, place, name)
    for event in itertools.count(0, STEP):
        code, _ = stage.end_early(event)
        if code == 0:
            break
        whole = {"tile": "grids/slide.zarr", "models import": "brought"}.get(name)
        if whole:
            stage.check_whole(whole, f"killed at event {event}")
        stage.check(f"killed at event {event}")
    assert event > 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["segment", "segment otherwise", "tile", "export"])
@pytest.mark.parametrize("disk", ["what was synced", "names without content"])
def test_power_cut(place, walker, name, disk):
    stage = Stage(walker, place, name)
    _, events = stage.end_early(None, keep=True)
    for cut in range(20):
        event = (2 * cut + 1) * events // 40
        code, _ = stage.end_early(event, keep=True)
        if code is None:  # threads: the last events may come to less
            walker.cut_power(None if disk == "what was synced" else cut)
            stage.check(f"cut at event {event} of {events}")
