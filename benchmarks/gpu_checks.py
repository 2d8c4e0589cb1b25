"""Whether all that runs on a GPU gives what the CPU gives there, and how fast its parts are.

python benchmarks/gpu_checks.py check speed --out found.json
python benchmarks/gpu_checks.py predictor copies --device cpu --out found.json

Every check stands alone: one that fails is told with its error, and the next begins. The file is
written anew after each. Ends with 1 if any failed. Where there is no CUDA GPU, it says so and ends
well; `--device cpu` tries the script itself. `gpu.py` measures whole runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
import zarr
from floor import CORES, timed
from gpu import make_slides, segment
from measure import machine
from msgspec import structs
from programs import PATCH, TRAINED, write_bundle
from skimage.data import immunohistochemistry

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.export.polygons.components import find_components
from wsi_pipeline.inference.patch_queue import use_one_core
from wsi_pipeline.inference.predictor import Predictor, choose_device, choose_dtype
from wsi_pipeline.networks import NETWORKS, build
from wsi_pipeline.networks.check import run, with_patch_size
from wsi_pipeline.networks.fold import for_inference
from wsi_pipeline.networks.program import export_torch
from wsi_pipeline.training.crops import survey
from wsi_pipeline.training.fit import TrainingSet, fit, open_fabric
from wsi_pipeline.training.recipe import load_recipe
from wsi_pipeline.training.samples import Cache, Decoded, Sample

Found = dict[str, Any]
DEMO = Path(__file__).parents[1] / "workflows" / "train" / "bcss-demo.toml"
TISSUE = immunohistochemistry()
GROUPS = {
    "check": "uploads predictor shortage small_gpu masks programs networks training",
    "speed": "forwards passes copies launches",
    "compiled": "compiled",  # takes minutes
}


def predicted(predictor: Predictor, pixels: np.ndarray, origins: np.ndarray) -> torch.Tensor:
    """Return the probabilities of the patches at the origins, (n, K, *patch)."""
    found = predictor.predict(predictor.upload(pixels), origins)
    return torch.stack([prediction.cpu() for prediction in found])


class Checks:
    """The checks, each of which returns what it found or raises.

    Args:
        device: "cuda", "cuda:N" or "cpu".
        work: a folder.
    """

    def __init__(self, device: str, work: Path) -> None:
        self.device, self.work = choose_device(device), work
        self.on_gpu = self.device.type == "cuda"
        if not self.on_gpu:
            use_one_core()  # as a run does
        self.dtype = choose_dtype("auto", self.device)
        self.side, self.batch = (PATCH, 16) if self.on_gpu else (64, 1)
        self.trained = load_bundle(TRAINED.parent)
        self.busy = with_patch_size(
            write_bundle(work / "lightmuseg", "lightmuseg", TISSUE), (self.side, self.side)
        )

    def uploads(self) -> Found:
        """Regions from many threads arrive whole, one without pixels too."""
        predictor = Predictor(self.trained, device=str(self.device))
        regions = [np.full((1024, 1024, 3), i, np.uint8) for i in range(32)]
        regions.append(np.zeros((0, 0, 3), np.uint8))

        def arrives(pixels: np.ndarray) -> bool:
            return bool(np.array_equal(predictor.upload(pixels).cpu().numpy(), pixels))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(arrives, regions))
        return {"regions": len(regions)}

    def predictor(self) -> Found:
        """The shipped bundle answers as on the CPU in fp32, and with the same bits again."""
        pixels = np.tile(TISSUE, (2, 1, 1))
        origins = np.array([(y, x) for y in (0, 250, 500, 750) for x in (0, 120, 256)])
        on_cpu = Predictor(self.trained, device="cpu", precision="fp32")
        exact, found = predicted(on_cpu, pixels, origins), {}
        for precision in ("fp32", "bf16", *(["fp16"] if self.on_gpu else [])):
            predictor = Predictor(self.trained, device=str(self.device), precision=precision)
            ours, again, alone = (
                predicted(predictor, pixels, some) for some in (origins, origins, origins[:1])
            )
            found[precision] = {
                "largest difference": float((ours - exact).abs().max()),
                "mean difference": float((ours - exact).abs().mean()),
                "decisions alike": float(((ours > 0.5) == (exact > 0.5)).float().mean()),
                "the same bits again": torch.equal(ours, again),
                "the same bits alone": torch.equal(ours[:1], alone),
                "patches at once": predictor.patches_at_once,
            }
        assert found["fp32"]["largest difference"] < 1e-3, found
        for row in found.values():
            assert row["mean difference"] < 0.05, found
            assert row["decisions alike"] > 0.99, found
            assert row["the same bits again"], found
            assert row["the same bits alone"], found
        return found

    def shortage(self) -> Found:
        """A shortage amid a region: as many predictions as patches, each of its own patch."""
        bundle = with_patch_size(write_bundle(self.work / "null", "null", TISSUE), (128, 128))
        predictor = Predictor(bundle, device=str(self.device), batch_size=16, precision="fp32")
        colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
        pixels, origins = colours.repeat(128, 0).repeat(128, 1), 128 * np.argwhere(np.ones((8, 8)))
        expected = predicted(predictor, pixels, origins)
        whole, calls = predictor._run, iter(range(1000))

        def short(patches: torch.Tensor) -> Any:
            if next(calls) and len(patches) > 8:
                if self.on_gpu:  # the allocator's own error
                    torch.empty(1 << 50, dtype=torch.uint8, device=self.device)
                raise torch.OutOfMemoryError
            return whole(patches)

        predictor._run = short  # type: ignore[method-assign]
        found = predicted(predictor, pixels, origins)
        assert len(found) == len(origins), len(found)
        most = float((found - expected).abs().max())
        assert most < 0.02, most
        return {"predictions": len(found), "largest difference": most}

    def small_gpu(self) -> Found:
        """A block of five classes goes through a card of 6 GB."""
        if not self.on_gpu:
            return {"left out": "needs CUDA"}
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 6e9 / total), self.device)
        try:
            predictor = Predictor(self.busy, device=str(self.device))
            origins = PATCH * np.argwhere(np.ones((8, 8)))
            region = predictor.upload(np.zeros((8 * PATCH, 8 * PATCH, 3), np.uint8))
            count = sum(1 for _ in predictor.predict(region, origins))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        assert count == len(origins), count
        return {"predictions": count, "patches at once": predictor.patches_at_once}

    def programs(self) -> Found:
        """TorchScript and our own export answer as on the CPU."""
        null = write_bundle(self.work / "null", "null", TISSUE)
        export_torch(with_patch_size(self.trained, (64, 64)), self.work / "exported")
        found = {}
        for name, bundle in {
            "torchscript": with_patch_size(null, (64, 64)),
            "exported": load_bundle(self.work / "exported"),
        }.items():
            ours, theirs = (
                predicted(
                    Predictor(bundle, device=device, precision="fp32", batch_size=2),
                    TISSUE, np.array([(0, 0), (99, 256)]),
                )
                for device in (str(self.device), "cpu")
            )  # fmt: skip
            found[name] = float((ours - theirs).abs().max())
        assert max(found.values()) < 5e-3, found
        return found

    def networks(self) -> Found:
        """The inference form of every network, relative to the plain one in float64."""
        found = {}
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        for name, kind in NETWORKS.items():
            torch.manual_seed(0)
            network = kind().eval()
            plane = (128, 128) if self.on_gpu else (64, 64)
            x = torch.randn(2, network.channels, *((16, 32, 32) if network.ndim == 3 else plane))
            with torch.inference_mode():
                exact = run(network.double(), x.double())["mask"]
                network.float()
                row = {}
                for label, dtype in dtypes.items() if self.on_gpu else [("fp32", torch.float32)]:
                    form = for_inference(network, device=self.device, dtype=dtype)
                    ours = run(form, x.to(self.device, dtype))["mask"].double().cpu()
                    row[label] = float((ours - exact).norm() / exact.norm())
            found[name] = {label: float(f"{value:.1e}") for label, value in row.items()}
        assert max(row["fp32"] for row in found.values()) < 1e-2, found
        return found

    def masks(self) -> Found:
        """The mask of a slide, blended and sampled, is nearly that of the CPU."""
        slides = make_slides(self.work, (1536, 1024), 1, TISSUE, mpp=0.25)
        blended = ("--overlap", "64", "--precision", "fp32")
        masks, seconds = [], []
        for device in dict.fromkeys(("cpu", str(self.device))):
            output = self.work / device.replace(":", "-")
            seconds.append(segment(slides, self.busy.path, output, device, blended).seconds)
            masks.append(zarr.open_array(output / "slide-0" / "mask.ome.zarr" / "0", mode="r")[:])
        alike = float((masks[0] == masks[-1]).mean())
        assert alike > 0.97, alike
        return {
            "pixels alike": alike,
            "foreground": float((masks[0] > 0).mean()),
            "seconds": seconds,
        }

    def training(self) -> Found:
        """A training in bf16, judged as it goes, ends; its losses are finite."""
        recipe = load_recipe(DEMO)
        steps = 40 if self.on_gpu else 2
        brief = structs.replace(recipe.train, steps=steps, validate_every=steps, precision="bf16")
        image = torch.from_numpy(TISSUE.copy()).movedim(-1, 0).contiguous()
        read = image, (image.float().mean(0) < 128).to(torch.uint8)
        path, shape = Path("tissue.png"), TISSUE.shape[:2]
        source = Decoded(path=path, shape=shape, load=lambda: read, cache=Cache())
        sample = Sample(patient="A", name=path.name, source=source)
        fitted = fit(
            replace(recipe, train=brief),
            TrainingSet(samples=[sample], surveys=[survey(sample, 2)]),
            validation=[sample],
            fabric=open_fabric(replace(recipe, train=brief), device=self.device.type),
        )
        assert all(np.isfinite(row["loss"]) for row in fitted.history), fitted.history
        return {"history": fitted.history}

    def forwards(self) -> Found:
        """Patches a second through the network alone, and as a CUDA graph."""
        form, found = self._form(), {}
        for batch in (8, 16, 32, 64) if self.on_gpu else (1,):
            x = self._patches(batch)
            found[f"batch {batch}"] = self._rate(lambda x=x: form(x), batch)
            if self.on_gpu:
                graph = torch.cuda.CUDAGraph()
                with torch.inference_mode(), torch.cuda.graph(graph):
                    form(x)
                found[f"batch {batch}, graph"] = self._rate(graph.replay, batch)
        return found

    def compiled(self) -> Found:
        """Patches a second through what torch.compile makes of it, and how long that takes."""
        form, x = self._form(), self._patches(32 if self.on_gpu else 1)
        fast = torch.compile(form, dynamic=False)
        with torch.inference_mode():
            seconds = timed(lambda: fast(x).cpu())
            most = float((fast(x).float() - form(x).float()).abs().max())
        rate = self._rate(lambda: fast(x), len(x))
        return {"compiling, s": seconds, "patches a second": rate, "largest difference": most}

    def passes(self) -> Found:
        """Patches a second through a whole pass of the predictor, and without the network."""
        found = {}
        for bundle in (with_patch_size(self.trained, (self.side, self.side)), self.busy):
            predictor = Predictor(bundle, device=str(self.device), batch_size=self.batch)
            name = f"{predictor.channels} channels"
            shape = (self.batch, self.side, self.side, 3)
            patches = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
            found[name] = self._rate(lambda: predictor._run(patches), self.batch)  # noqa: B023
            answer = self._patches(self.batch, predictor.channels)
            predictor.form = lambda _, answer=answer: answer  # type: ignore[assignment]
            rate = self._rate(lambda: predictor._run(patches), self.batch)  # noqa: B023
            found[f"{name}, without the network"] = rate
        return found

    def copies(self) -> Found:
        """GB a second between the two memories."""
        if not self.on_gpu:
            return {"left out": "needs CUDA"}
        host = torch.zeros(1 << 26, dtype=torch.uint8)
        there, pinned, block = host.to(self.device), host.pin_memory(), host[: 3 << 22]
        ways: dict[str, Callable[[], Any]] = {
            "up, pageable": lambda: there.copy_(host),
            "up, pinned": lambda: there.copy_(pinned, non_blocking=True),
            "down, pageable": there.cpu,
            "down, pinned": lambda: pinned.copy_(there, non_blocking=True),
            "there": lambda: there.copy_(there.flip(0)),
        }
        found = {name: self._rate(way, len(host) / 1e9) for name, way in ways.items()}
        return found | {"pinning a block": self._rate(block.pin_memory, len(block) / 1e9)}

    def launches(self) -> Found:
        """Small passes a second, alone and while half of the cores find components."""
        form, x, over = self._form(), self._patches(1)[..., :64, :64], Event()
        classes = np.random.default_rng(0).integers(0, 3, (64, 64), np.uint8)
        mask = classes.repeat(16, 0).repeat(16, 1)

        def beside(_: int) -> None:
            while not over.is_set():
                find_components(mask, np.zeros(mask.shape, np.uint16), (0, 0))

        found = {"alone": self._rate(lambda: form(x), 1)}
        with ThreadPoolExecutor(CORES // 2) as pool:
            others = pool.map(beside, range(CORES // 2))
            try:
                found[f"{CORES // 2} threads beside"] = self._rate(lambda: form(x), 1)
            finally:
                over.set()
        list(others)
        return found

    def _form(self) -> torch.nn.Module:
        return for_inference(build(self.trained).module, device=self.device, dtype=self.dtype)

    def _patches(self, batch: int, channels: int = 3) -> torch.Tensor:
        shape = (batch, channels, self.side, self.side)
        patches = torch.randn(shape, device=self.device, dtype=self.dtype)
        return patches.to(memory_format=torch.channels_last)

    def _rate(self, work: Callable[[], Any], count: float) -> float:
        """Return the median of `count` things a second, three significant digits."""
        found: list[float] = []

        def whole() -> None:
            with torch.inference_mode():
                work()
            if self.on_gpu:
                torch.cuda.synchronize(self.device)

        whole()  # the first chooses kernels
        end = time.perf_counter() + (1.0 if self.on_gpu else 0.2)
        while len(found) < 3 or (time.perf_counter() < end and len(found) < 100):
            found.append(count / timed(whole))
        return float(f"{statistics.median(found):.3g}")


def main() -> int:
    names = [name for group in GROUPS.values() for name in group.split()]
    parser = argparse.ArgumentParser(description="Check and measure what runs on a GPU.")
    parser.add_argument("names", nargs="+", choices=[*GROUPS, *names], metavar="NAME")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to check")
        return 0
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as work:
        checks = Checks(args.device, Path(work))
        if checks.on_gpu:
            found["machine"] |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        for name in dict.fromkeys(" ".join(GROUPS.get(n, n) for n in args.names).split()):
            begun = time.perf_counter()
            try:
                value = getattr(checks, name)()
            except (Exception, SystemExit) as error:  # the latter of a command that failed
                value = {"failed": repr(error)[:2000], "at": traceback.format_exc(limit=-3)[:2000]}
            found[name] = {**value, "took": round(time.perf_counter() - begun, 2)}
            args.out.write_text(json.dumps(found, indent=1), "utf-8")
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    return int(any("failed" in value for value in found.values()))


if __name__ == "__main__":
    sys.exit(main())
