"""ONNX files as networks, run by onnxruntime: data, with which no code comes."""

from __future__ import annotations

import logging
import threading
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import BundleError

logger = logging.getLogger(__name__)

NUMBERS = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
}
"""What the input may be made of, by onnxruntime's names."""
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Of the operators that onnxruntime brings itself."""
LAYOUTS = ("channels_first", "channels_last")


class OnnxProgram(nn.Module):
    """An ONNX file as a network, which runs where its patches are.

    Attributes:
        batch_size: the only one that it takes; None = any.
        runtime: what runs it.

    Raises:
        BundleError: onnxruntime lacks, the file needs more than itself, or its input is another
            than the bundle says.
    """

    batch_size: int | None

    def __init__(self, data: bytes, bundle: Bundle) -> None:
        super().__init__()
        _check_alone(data)
        self._data, self._lock, self._sessions = data, threading.Lock(), dict[str, Any]()
        self.runtime = "onnxruntime"
        session = self._session("cpu")
        inputs, self._outputs = session.get_inputs(), [o.name for o in session.get_outputs()]
        if len(inputs) != 1:
            raise BundleError(f"it takes {len(inputs)} inputs, {[i.name for i in inputs]}; one may")
        self._input, shape = inputs[0].name, inputs[0].shape
        if inputs[0].type not in NUMBERS:
            raise BundleError(f"{self._input} is a {inputs[0].type}; may be {', '.join(NUMBERS)}")
        self._dtype = NUMBERS[inputs[0].type]
        self._is_last = _layout(shape, bundle) == "channels_last"
        self.batch_size = shape[0] if isinstance(shape[0], int) else None
        has_label = bool(bundle.labels) or bundle.is_patchwise
        self._names = ["mask"] * (not bundle.is_patchwise) + ["label"] * has_label
        sides, channels = bundle.input.patch_size, len(bundle.classes)
        channels = 1 if bundle.activation == "sigmoid" else channels
        self._first, self._last = (channels, *sides), (*sides, channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits by name: `mask`, and `label` where the bundle has labels."""
        shown = x.movedim(1, -1) if self._is_last else x
        feed = {self._input: shown.to("cpu", self._dtype).contiguous().numpy()}
        try:
            found = self._session(x.device.type).run(None, feed)
        # its errors have no class in common but Exception
        except Exception as error:
            raise RuntimeError(str(error)) from error
        answer = {}
        for place, name in enumerate(self._names):
            # Others name them otherwise, and put the mask first.
            index = self._outputs.index(name) if name in self._outputs else place
            if index < len(found):
                logits = torch.from_numpy(found[index]).to(x.device)
                is_last = tuple(logits.shape[1:]) == self._last != self._first
                answer[name] = logits.movedim(-1, 1) if is_last else logits
        return answer

    def _session(self, kind: str) -> Any:
        """Return what runs on a kind of device, made once."""
        import onnxruntime

        with self._lock:
            if kind not in self._sessions:
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 3
                options.use_deterministic_compute = True
                has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
                providers = ["CUDAExecutionProvider"] * (kind == "cuda" and has_cuda)
                # On CPUs passes run side by side, each on one core.
                options.intra_op_num_threads = int(kind == "cpu")
                options.inter_op_num_threads = 1
                session = onnxruntime.InferenceSession(
                    self._data, options, [*providers, "CPUExecutionProvider"]
                )
                taken = session.get_providers()[0].removesuffix("ExecutionProvider")
                self.runtime = f"onnxruntime {onnxruntime.__version__} ({taken})"
                if kind not in ("cpu", taken.lower()):
                    logger.warning(
                        "onnxruntime here does not run on %s, and so on the CPU: pip install "
                        "onnxruntime-gpu in its place", kind,
                    )  # fmt: skip
                self._sessions[kind] = session
            return self._sessions[kind]


def whole_onnx(file: Path) -> bytes:
    """Return what an ONNX file holds, with the numbers that it keeps in other files of its folder.

    Raises:
        BundleError: it is none, or lacks any of those.
    """
    try:
        data = file.read_bytes()
        if not any(map(_is_beside, _messages(_parsed(data)))):
            return data
        import onnx

        return bytes(onnx.load(file).SerializeToString())
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from error
    # onnx has errors of its own for files that lack and for those outside of the folder
    except Exception as error:
        reason = getattr(error, "strerror", "") or error
        raise BundleError(f"cannot read {file}: {reason}") from error


def told_by(data: bytes) -> dict[str, Any]:
    """Return the `model.toml` that an ONNX file of `models export` holds.

    Raises:
        BundleError: it holds none.
        ValueError: it is damaged.
    """
    about = {entry.key: entry.value for entry in _parsed(data).metadata_props}
    if "model.toml" not in about:
        raise BundleError("the ONNX file does not say what it is: name --classes and --mpp")
    return tomllib.loads(about["model.toml"])


def _parsed(data: bytes) -> Any:
    """Return what an ONNX file holds, but for what lies beside it."""
    if lacking := [name for name in ("onnx", "onnxruntime") if not find_spec(name)]:
        raise BundleError(
            f'ONNX files need {" and ".join(lacking)}: pip install "wsi-pipeline[onnx]"'
        )
    import onnx

    try:
        return onnx.ModelProto.FromString(data)
    # protobuf's own error, of a package that has no types
    except Exception as error:
        raise BundleError(f"no ONNX file, or a damaged one: {error}") from error


def _check_alone(data: bytes) -> None:
    """Refuse a file that needs others: operators of someone's library, numbers that lie beside."""
    model = _parsed(data)
    own = {(f.domain, f.name) for f in model.functions}
    for message in _messages(model):
        if _is_beside(message):
            raise BundleError(
                f"it keeps {message.name!r} in another file, which is not read; `models import` "
                "makes one file of both"
            )
        if message.DESCRIPTOR.name == "NodeProto" and (message.domain, message.op_type) not in own:
            if message.domain in DOMAINS:
                continue
            name = f"{message.domain}:{message.op_type}"
            raise BundleError(f"it needs the custom operator {name}, and none is loaded")


def _is_beside(message: Any) -> bool:
    is_tensor = message.DESCRIPTOR.name == "TensorProto"
    return is_tensor and bool(message.external_data or message.data_location)


def _messages(message: Any) -> Iterator[Any]:
    """Yield a message of protobuf and all that are in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(inner)


def _layout(shape: list[int | str | None], bundle: Bundle) -> str:
    """Return which of LAYOUTS the input has, of what the file says of it."""
    channels, sides = bundle.input.channels, bundle.input.patch_size
    wanted = dict(zip(LAYOUTS, ((channels, *sides), (*sides, channels)), strict=True))
    fitting = [
        layout
        for layout, sizes in wanted.items()
        if len(shape) == len(sizes) + 1
        and all(
            n == size or not isinstance(n, int) for n, size in zip(shape[1:], sizes, strict=True)
        )
    ]
    told = bundle.network_options.get("layout")
    if told is not None and told not in LAYOUTS:
        raise BundleError(f"network_options.layout is {told!r}; expected {' or '.join(LAYOUTS)}")
    if not fitting or (told and told not in fitting):
        raise BundleError(
            f"its input is {shape}; channels and patch_size of model.toml make it "
            + " or ".join(
                f"[N, {', '.join(map(str, s))}]" for w, s in wanted.items() if told in (None, w)
            )
        )
    if not told and len(fitting) > 1:
        raise BundleError(
            f"its input is {shape}, which does not tell where the channels are; set "
            f"network_options.layout to {' or '.join(LAYOUTS)} in model.toml"
        )
    return str(told or fitting[0])
