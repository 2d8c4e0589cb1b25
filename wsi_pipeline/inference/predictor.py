"""Run a network over patches of a region: batches on the device in, probabilities out."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wsi_pipeline.bundle import FOREIGN, Bundle
from wsi_pipeline.errors import BundleError, DeviceError
from wsi_pipeline.geometry import box_slices
from wsi_pipeline.inference.patch_queue import Answer, PatchQueue
from wsi_pipeline.networks import Network, SegmentationNetwork, build, patches_per_pass
from wsi_pipeline.networks.check import FAILS, check_shapes, failure
from wsi_pipeline.networks.fold import for_inference
from wsi_pipeline.networks.quantise import load_ranges, quantise
from wsi_pipeline.options import DEVICES, Precision, PredictOptions, Tta, turns

logger = logging.getLogger(__name__)

SHORT_OF_MEMORY = ("unable to find an engine", "ALLOC_FAILED", "out of memory",
                   "Failed to allocate memory", "you tried to allocate")  # fmt: skip
"""In errors of libraries that have not found the memory they wanted."""
NO_NUMBERS = "answers with values that are no numbers; try `models check`, --precision fp32"
_cudnn_flags = threading.Lock()
PROBE, MAX_BATCH = 4, 64
"""Patches of the pass that finds out what a patch takes of a GPU, and of any other at the most."""
MAX_PIXELS = 2**22
"""Of a pass on a GPU: a block's, which keep it busy, so that the blocks in hand fill several."""
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver tells what there is, whatever torch was built for."""
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" takes the first GPU, else the CPU.

    Raises:
        BundleError: no such device, or a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(DEVICES, name):
        raise BundleError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise BundleError("--device mps: this machine shows no GPU of Apple's; use --device cpu")
    if name == "mps":
        _warn("--device mps: nobody has tried this; hold a mask against that of --device cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BundleError(f"--device {name}: this machine shows no CUDA GPU; use --device cpu")
    device = torch.device(name)
    if (device.index or 0) >= (count := count_gpus()) and device.type == "cuda":
        raise BundleError(
            f"--device {name}: this machine shows {count} GPU{'s' * (count > 1)}, numbered from 0"
        )
    return device


def tell_choice() -> None:
    """Log what "auto" takes and why, and which GPU of this machine it leaves alone."""
    found = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(n) for n in range(count_gpus())] if found else []
    logger.info("--device auto: %s", ", ".join(names) or "the CPU, as torch shows no CUDA GPU")
    if torch.backends.mps.is_available():
        _warn("a GPU of Apple's is there and not used: nobody has tried it; --device mps takes it")
    # Who hides them all means it.
    if found or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    for file in sorted(NVIDIA.glob("*/information")):
        model = re.search(r"Model:\s*(.+)", file.read_text("utf-8", "replace"))
        _warn(
            f"{model[1] if model else 'a GPU'} is there and not used: torch {torch.__version__} "
            "does not show it; install torch for CUDA, or see whether it fits the driver"
        )


def count_gpus() -> int:
    """Return how many GPUs this machine shows."""
    return torch.cuda.device_count()


def choose_dtype(
    precision: Precision, device: torch.device, bundle: Bundle | None = None
) -> torch.dtype:
    """Return the number format to compute in; "auto" is bf16 where the hardware has it.

    Of a program, or behind one, it is fp32, in which such are made, unless the `precision` of its
    options is what the hardware has. With "int8" it is that of all that is no convolution.

    Raises:
        BundleError: int8 is asked for on a GPU, or anything of an ONNX file, which has its own.
    """
    program = bundle and (bundle.encoder or bundle)
    if program is not None and program.network == "onnx":
        if precision not in ("auto", "fp32"):
            raise BundleError(
                f"--precision {precision}: {program.name} is an ONNX file, which computes in the "
                "numbers that it was made with; leave it out"
            )
        return torch.float32
    if precision == "int8":
        if device.type != "cpu":
            raise BundleError(f"--precision int8 is for CPUs, not for {device}; leave it out")
        return torch.float32
    if precision == "auto" and program is not None and program.network in FOREIGN:
        best, allowed = choose_dtype("auto", device), program.network_options.get("precision")
        return best if allowed == _name(best) else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bf16" and device.type == "cpu" and not has_bf16:
        _warn(
            "bf16: this processor has no arithmetic for it and takes about ten times as long as "
            "with fp32; --precision fp32 starts a run anew that was begun in bf16"
        )
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        with torch.cuda.device(device):
            is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_native else torch.float16
    return torch.bfloat16 if has_bf16 and device.type == "cpu" else torch.float32


def number_format(predict: PredictOptions, bundle: Bundle) -> Precision:
    """Return the name of the number format in which a bundle is computed here.

    Raises:
        BundleError: no such device.
    """
    if bundle.members:
        found = {number_format(predict, member) for member in bundle.members}
        return found.pop() if len(found) == 1 else "fp32"
    return _name(choose_dtype(predict.precision, choose_device(predict.device), bundle))


def _name(dtype: torch.dtype) -> Precision:
    return next(name for name, kind in DTYPES.items() if kind is dtype)


@contextmanager
def telling_of(device: torch.device) -> Iterator[None]:
    """Tell lack of memory, and that CUDA has given up: it says so wherever it is waited for."""
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in SHORT_OF_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from error
        if isinstance(error, getattr(torch, "AcceleratorError", ())):
            raise DeviceError(f"{device} failed: {str(error).splitlines()[0]}") from error
        raise


# once, not by every worker
@cache
def _warn(sentence: str) -> None:
    logger.warning("%s", sentence)


class Predictor:
    """A network on its device, ready to predict patches; close it.

    Attributes:
        form: the network as it predicts.
        queue: of the patches of all who predict here.
        gives_logits: whether it gives logits in place of probabilities, to be blended as such.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        batch_size: patches in one forward pass; None = chosen for the device.
        threads: of the CPU to keep busy; None = all.
        tta: how patches are shown, see `turns`, to take the mean; None = the bundle's.

    Raises:
        BundleError: the bundle has no network that can be built, or no int8, or the device is not
            there.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        batch_size: int | None = None,
        threads: int | None = None,
        tta: Tta | None = None,
        network: nn.Module | None = None,
    ) -> None:
        built = Network(module=network, batch_size=None) if network else build(bundle)
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device, bundle)
        self.channels = 1 if bundle.activation == "sigmoid" else len(bundle.classes)
        self.bundle = bundle
        spec = bundle.input
        self._turns = turns(tta or bundle.tta, spec.patch_size, spec.spacing_mm or ())
        self.gives_logits = bool(spec.convention) and bundle.activation == "softmax"
        self._is_ours = isinstance(built.module, SegmentationNetwork)
        self.form = (
            for_inference(built.module, device=self.device, dtype=self.dtype)
            if isinstance(built.module, SegmentationNetwork)
            else built.module.to(self.device)
        )
        self._is_int8 = precision == "int8"
        if self._is_int8:
            quantise(self.form, load_ranges(bundle))
        # of the pass that a thread is in
        self._seen = threading.local()
        if isinstance(built.module, SegmentationNetwork):
            stage = self.form.get_submodule(built.module.looks_at)
            stage.register_forward_hook(self._see)
        on_cpu = self.device.type == "cpu"
        # Several passes on one core each are as fast as one pass on several, and what a pass gives
        # does not depend on the number of threads then. Passes share nothing but the weights.
        self._passes = (threads or os.cpu_count() or 1) if on_cpu else 1
        # a row of pixels is normalised at one go
        row = bundle.input.patch_size[-1]
        mean = torch.tensor(bundle.input.mean, device=self.device).repeat(row)
        std = torch.tensor(bundle.input.std, device=self.device).repeat(row)
        self._scale = {torch.uint8: 1 / (255 * std), torch.float32: 1 / std}
        self._shift = -mean / std
        self.queue = PatchQueue(
            self._run,
            batch=built.batch_size or batch_size or self._fitting_batch(),
            passes=self._passes,
            too_large=(
                f"{bundle.name} does not fit into the memory of {self.device} with {{}} patches at "
                "a time; use --device cpu"
            ),
            is_fixed=built.batch_size is not None,
        )

    @property
    def patches_at_once(self) -> int:
        """Return how many patches keep the device busy."""
        return self.queue.batch * self._passes

    @property
    def how(self) -> str:
        """Return the number format, then all else that probabilities' last digits depend on."""
        number, kind = "int8" if self._is_int8 else _name(self.dtype), self.device.type
        unit = torch.backends.cpu.get_cpu_capability()
        where = f"cpu ({unit})" if kind == "cpu" else str(self.device)
        where = torch.cuda.get_device_name(self.device) if kind == "cuda" else where
        runtime = getattr(self.form, "runtime", f"torch {torch.__version__}")
        return f"{number} on {where}, {self.queue.batch} patches a pass, {runtime}"

    def activated(self, blended: torch.Tensor) -> torch.Tensor:
        """Return the probabilities (K, *part) of what was blended."""
        return blended.softmax(0) if self.gives_logits else blended

    def upload(self, pixels: npt.NDArray[np.uint8] | npt.NDArray[np.float32]) -> torch.Tensor:
        """Bring the pixels of a region to the device; return them there.

        Args:
            pixels: (*region, C), uint8, or float32 in units of full scale.
        """
        region, is_gpu = torch.from_numpy(pixels), self.device.type == "cuda"
        # pinned for any: torch asks a GPU that the process has begun with
        return (region.pin_memory() if is_gpu else region).to(self.device, non_blocking=is_gpu)

    def predict(
        self,
        region: torch.Tensor,
        origins: npt.NDArray[np.int64],
        *,
        labels: list[torch.Tensor] | None = None,
        features: list[torch.Tensor] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Predict patches of a region; yield the probabilities of each in turn.

        Args:
            region: (*region, C) on the device, as `upload` returns it, holding all the patches.
            origins: (n, d) first corners within the region, array order.
            labels: gets (L,) probabilities of what the network says of each patch as a whole, in
                turn, where it classifies.
            features: gets (C,) of what each patch looks like to a network of the package.

        Yields:
            float32 (K, *patch) on the device; K = 1 for sigmoid, else the number of classes.

        Raises:
            BundleError: the network fails, or answers in another shape than the bundle says.
        """
        ahead: deque[Future[Answer]] = deque()
        size, queue = self.bundle.input.patch_size, self.queue

        def taken() -> torch.Tensor:
            mask, *told = queue.wait(ahead.popleft())
            for kept, found in zip((labels, features), told, strict=True):
                if kept is not None and len(found):
                    kept.append(found)
            return mask

        try:
            for origin in origins.tolist():
                ahead.append(queue.put(region[box_slices(origin, size)]))
                # one pass more than runs, so that no core waits
                if len(ahead) > queue.batch * (self._passes + 1):
                    yield taken()
            while ahead:
                yield taken()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self.queue.close()
        # what any thread set last is what torch gives to threads that are new to it
        torch.set_num_threads(torch.get_num_threads())

    def _run(self, patches: torch.Tensor) -> Answer:
        """Return what the network says of patches, (N, *patch, C) in full scale or uint8.

        Probabilities (N, K, *patch), (N, L) of what is said of whole patches, features (N, C): the
        mean of those of each turn. Batches know of one pass.
        """
        scale = self._scale[patches.dtype]
        # A copy, whatever they are: the other members of an ensemble see them, too.
        values = patches.flatten(-2).to(torch.float32, copy=True).mul_(scale).add_(self._shift)
        values = values.view(patches.shape)
        total: Answer = ()
        for is_turned, axes in self._turns:
            shown = values.movedim(-1, 1)
            if axes or is_turned:
                shown = shown.transpose(-2, -1) if is_turned else shown
                shown = shown.flip(axes).movedim(1, -1).contiguous().movedim(-1, 1)
            mask, *told = self._answer(shown)
            mask = mask.flip(axes) if axes else mask
            mask = mask.transpose(-2, -1) if is_turned else mask
            answer = (mask, *told)
            total = tuple(map(torch.add, total, answer)) if total else answer
        if len(self._turns) == 1:
            return total
        return tuple((part / len(self._turns)).contiguous() for part in total)

    def _answer(self, inputs: torch.Tensor) -> Answer:
        """Return the probabilities of normalised patches, (N, C, *patch), channels last."""
        # a foreign program may count on the usual order
        inputs = inputs.to(self.dtype) if self._is_ours else inputs.contiguous()
        lower = self.dtype is not torch.float32 and not self._is_ours
        is_gpu = self.device.type == "cuda"
        # Or cuDNN rounds the factors of fp32's products; passes are alike, so it may try its ways.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
        try:
            with (
                # a pass of another model that ends would set them back
                _cudnn_flags if is_gpu else nullcontext(),
                exact if is_gpu else nullcontext(),
                torch.autocast(self.device.type, dtype=self.dtype, enabled=lower),
                telling_of(self.device),
            ):
                output = self.form(inputs)
        except (torch.OutOfMemoryError, BundleError):
            raise
        except FAILS as error:
            raise failure(self.bundle, inputs, error) from error
        given = output if isinstance(output, dict) else {"mask": output}
        wanted = ("mask", "label")[: 1 + bool(self.bundle.labels)]
        answer = {name: given[name] for name in wanted if name in given}
        check_shapes(answer, self.bundle, len(inputs))
        # classes apart: fast from here on
        logits = answer["mask"].float().contiguous()
        if self.bundle.temperature != 1:
            logits = logits / self.bundle.temperature
        mask = logits
        if not self.gives_logits:
            is_alone = self.bundle.activation == "sigmoid"
            mask = logits.sigmoid() if is_alone else logits.softmax(1)
        # For a GPU one would have to wait.
        if mask.device.type == "cpu" and bool(mask.sum().isnan()):
            raise BundleError(f"{self.bundle.name} {NO_NUMBERS}")
        nothing = mask.new_empty(len(mask), 0)
        features = self._seen.__dict__.pop("features", nothing)
        labels = answer["label"].float().softmax(1) if self.bundle.labels else nothing
        return mask, labels, features

    def _see(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        """Keep what the patches of a pass look like: the means over their places."""
        axes = tuple(range(2, output.ndim))
        self._seen.features = output.mean(axes, dtype=torch.float32)

    def _fitting_batch(self) -> int:
        """Return how many patches, a power of two, fit into half of the GPU's free memory."""
        if self.device.type == "cpu":
            return patches_per_pass(self.bundle, self.dtype)
        if self.device.type != "cuda":
            # its memory is not known
            return PROBE
        spec = self.bundle.input
        patches = torch.zeros((PROBE, *spec.patch_size, spec.channels), dtype=torch.uint8)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with torch.inference_mode():
                self._run(patches.to(self.device))
        except torch.OutOfMemoryError:
            return 1
        each = (torch.cuda.max_memory_allocated(self.device) - before) / PROBE
        free, _ = torch.cuda.mem_get_info(self.device)
        batch = 1
        most = min(MAX_BATCH, MAX_PIXELS // math.prod(spec.patch_size))
        while 2 * batch <= most and 2 * batch * each <= free / 2:
            batch *= 2
        return batch
