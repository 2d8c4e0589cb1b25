"""A light decoder behind a frozen encoder: a program of others, which gives features."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.files.remote import write_whole
from wsi_pipeline.networks.base import SegmentationNetwork, conv_norm
from wsi_pipeline.networks.foreign import load_foreign


class Decoder(SegmentationNetwork):
    """Convolutions over what an encoder gives of patches, brought to the size of these.

    In training it takes what the encoder gives in place of patches: that is computed once.

    Attributes:
        encoder: gives the features of patches; no part of the network's weights.

    Args:
        features: channels that the encoder gives.
        stride: pixels of a patch to each of its places, along both axes.
        prefix_tokens: what comes before the tokens of places, as the class's and registers.
        width: channels of the first convolutions.
    """

    looks_at = "given"

    def __init__(
        self,
        *,
        channels: int = 3,
        classes: int = 1,
        features: int = 1280,
        stride: int = 32,
        prefix_tokens: int = 0,
        width: int = 128,
    ) -> None:
        super().__init__(channels=channels, classes=classes)
        if min(features, stride, width // 4, prefix_tokens + 1) < 1:
            raise ValueError("features and stride start at 1, width at 4, prefix_tokens at 0")
        self.features, self.size_multiple, self.prefix_tokens = features, stride, prefix_tokens
        self.encoder: FrozenEncoder | None = None
        self.given = nn.Identity()
        self.layers = nn.Sequential(
            *conv_norm(features, width, 1),
            *conv_norm(width, width, 3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            *conv_norm(width, width // 2, 3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            *conv_norm(width // 2, width // 4, 3),
        )
        self.head = nn.Conv2d(width // 4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, classes, H, W), of patches; in training of their features."""
        found = x
        if self.encoder and not self.training:
            self.check_patches(x)
            found = self.encoder(x).to(x.dtype)
        size = [self.size_multiple * side for side in found.shape[2:]]
        return functional.interpolate(
            self.head(self.layers(self.given(found))), size, mode="bilinear"
        )

    @property
    def runtime(self) -> str:
        """Return what runs it and its encoder."""
        own = getattr(self.encoder and self.encoder.program, "runtime", "")
        return f"torch {torch.__version__}" + (own and f", its encoder {own}")


class FrozenEncoder:
    """The program that a decoder works behind; never learnt, copied, folded or cast.

    Attributes:
        batch_size: the only one that it takes; None = any.
        kept: Folder where what it gives of each patch is kept; None = nowhere.
    """

    def __init__(self, bundle: Bundle, decoder: Decoder) -> None:
        network = load_foreign(bundle, is_encoder=True)
        self.program, self.batch_size = network.module, network.batch_size
        self.kept: Path | None = None
        self._device = torch.device("cpu")
        self._features, self._stride = decoder.features, decoder.size_multiple
        self._prefix = decoder.prefix_tokens

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself: not all programs can be copied, and none need."""
        return self

    def __call__(self, patches: Tensor) -> Tensor:
        """Return the features of patches, from where they are kept if they are."""
        if self.kept is None:
            return self.encode(patches)
        # By content: a patch is the same whoever asks for it.
        pixels = [patch.cpu().contiguous().numpy() for patch in patches]
        names = (hashlib.sha256(values.tobytes()).hexdigest() for values in pixels)
        paths = [self.kept / f"{name}.safetensors" for name in names]
        if lacking := [i for i, path in enumerate(paths) if not path.is_file()]:
            for i, found in zip(lacking, self.encode(patches[lacking]), strict=True):
                write_whole(paths[i], packed(found))
        kept = torch.stack([load(path.read_bytes())["features"] for path in paths])
        return kept.to(patches.device, torch.float32)

    @torch.inference_mode()
    def encode(self, patches: Tensor) -> Tensor:
        """Return the features of normalised patches, (N, features, H / stride, W / stride) float32.

        The program gives these, alone or before others, or tokens (N, prefix + places, features).

        Raises:
            BundleError: it gives something else.
        """
        # Not each time: passes on CPUs go side by side.
        if self._device != patches.device:
            self.program.to(patches.device)
            self._device = patches.device
        count, given = self.batch_size or len(patches), []
        for part in torch.split(patches.float().contiguous(), count):
            filled = functional.pad(part, [0] * 7 + [count - len(part)])
            lower = patches.dtype is not torch.float32
            with torch.autocast(patches.device.type, patches.dtype, enabled=lower):
                answer = self.program(filled)
            if isinstance(answer, Mapping):
                answer = tuple(answer.values())
            given.append((answer[0] if isinstance(answer, tuple | list) else answer)[: len(part)])
        found = torch.cat(given).float()
        rows, columns = (side // self._stride for side in patches.shape[2:])
        expected = (len(patches), self._features, rows, columns)
        tokens = (len(patches), self._prefix + rows * columns, self._features)
        if found.shape == tokens:
            found = found[:, self._prefix :].mT.reshape(expected)
        if found.shape != expected:
            raise BundleError(
                f"the encoder gives {tuple(found.shape)} of patches {tuple(patches.shape)}; "
                f"features, stride and prefix_tokens of model.toml make it {expected}, or "
                f"{tokens} of tokens"
            )
        return found


def packed(features: Tensor, **others: Tensor) -> bytes:
    """Return a file of features in half precision, and of what belongs to them.

    Raises:
        BundleError: they are no numbers in it.
    """
    kept = features.half().cpu().contiguous()
    if not kept.isfinite().all():
        raise BundleError("the encoder gives values beyond ±65,504, or none, which cannot be kept")
    return save({"features": kept, **others})
