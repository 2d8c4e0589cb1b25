"""Networks tried on random patches: do they answer as their bundle says, and two forms alike?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from msgspec import structs
from torch import Tensor, nn

from wsi_pipeline.bundle import FOREIGN, Bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks import Network, SegmentationNetwork, build, create
from wsi_pipeline.networks.fold import for_inference

FAILS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""What programs raise that do not take patches, exported ones the last."""
TOLERANCE = 1e-4
"""Largest difference between two forms of a network, as a share of its largest logit."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a bundle's network did.

    Attributes:
        shapes: shapes of the input and of each output, by name.
        seconds: time of the network as it is stored, on the CPU in fp32.
        seconds_folded: time of its inference form; None for a foreign program, which has none.
        difference: difference between the two, as a share of the largest logit; None likewise.
    """

    shapes: Mapping[str, tuple[int, ...]]
    seconds: float
    seconds_folded: float | None
    difference: float | None
    has_weights: bool


def try_bundle(bundle: Bundle, *, patch_size: Sequence[int] | None = None) -> Trial:
    """Predict random patches on the CPU and check the answer; return how it went.

    Raises:
        BundleError: the network cannot be built, fails, or its answer is not what the bundle says.
    """
    if patch_size is not None:
        bundle = with_patch_size(bundle, patch_size)
    has_weights = bundle.weights_path is not None
    if has_weights or bundle.network in FOREIGN or bundle.encoder:
        network = build(bundle)
    else:
        # The same weights each time, and the caller's own random numbers as they were.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Network(module=create(bundle).eval(), batch_size=None)
    module, count = network.module, network.batch_size or 1
    patches = random_patches(bundle, count)
    seconds, answer = _timed(module, patches, bundle)
    check_shapes(answer, bundle, count)
    if odd := [name for name, logits in answer.items() if not logits.isfinite().all()]:
        raise BundleError(f"{bundle.name} answers with values that are not finite: {odd[0]}")
    seconds_folded = difference = None
    if isinstance(module, SegmentationNetwork):
        seconds_folded, folded = _timed(for_inference(module), patches, bundle)
        difference = largest_difference(answer, folded)
        # Not by >, which NaN would pass.
        if not difference <= TOLERANCE:
            raise BundleError(
                f"{bundle.name}: the inference form differs from the network by {difference:.1e} "
                f"of the largest logit, more than {TOLERANCE:g}"
            )
    return Trial(
        shapes={"input": tuple(patches.shape), **{n: tuple(t.shape) for n, t in answer.items()}},
        seconds=seconds,
        seconds_folded=seconds_folded,
        difference=difference,
        has_weights=has_weights,
    )


def with_patch_size(bundle: Bundle, patch_size: Sequence[int]) -> Bundle:
    """Return the bundle with patches of another size.

    Args:
        patch_size: one number an axis, or one for all.

    Raises:
        BundleError: another number of axes.
    """
    axes = len(bundle.input.patch_size)
    sizes = tuple(patch_size) * (axes if len(patch_size) == 1 else 1)
    if len(sizes) != axes:
        raise BundleError(f"{bundle.name}: {len(sizes)} sizes for patches of {axes} axes")
    # The bundle's overlap may be no longer below the patch, and one patch has none.
    return replace(
        bundle, input=structs.replace(bundle.input, patch_size=sizes, overlap=(0,) * axes)
    )


def random_patches(bundle: Bundle, count: int) -> Tensor:
    """Return patches of noise, normalised as the bundle says, (N, channels, *patch) float32."""
    spec = bundle.input
    # The same noise each time, so that what fails can be looked at again.
    pixels = torch.rand(
        count, spec.channels, *spec.patch_size, generator=torch.Generator().manual_seed(0)
    )
    axes = [1] * len(spec.patch_size)
    mean, std = (torch.tensor(v).reshape(-1, *axes) for v in (spec.mean, spec.std))
    return (pixels - mean) / std


def run(module: nn.Module, patches: Tensor) -> dict[str, Tensor]:
    """Return a network's logits by name: `mask`, and `label` where it classifies."""
    with torch.inference_mode():
        output = module(patches)
    return dict(output) if isinstance(output, Mapping) else {"mask": output}


def check_shapes(answer: Mapping[str, Tensor], bundle: Bundle, count: int) -> None:
    """Refuse logits of other shapes than the bundle says; return nothing.

    Raises:
        BundleError: other classes, other labels, or a mask that is not of the patch's size.
    """
    channels = 1 if bundle.activation == "sigmoid" else len(bundle.classes)
    expected = {"mask": (count, channels, *bundle.input.patch_size)}
    if bundle.labels:
        expected["label"] = (count, len(bundle.labels))
    found = {n: tuple(getattr(part, "shape", [type(part)])) for n, part in answer.items()}
    if found != expected:
        told, wanted = (", ".join(f"{n} {s}" for n, s in d.items()) for d in (found, expected))
        raise BundleError(
            f"{bundle.name} answers with {told}; activation, classes and labels of its "
            f"model.toml make it {wanted}"
        )


def largest_difference(answer: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two answers, as a share of the largest logit.

    Example:
        >>> one, two = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])
        >>> largest_difference({"mask": one}, {"mask": two})
        0.25
    """
    shares = [
        (logits - other[name]).abs().max() / logits.abs().max().clamp(min=1e-12)
        for name, logits in answer.items()
    ]
    return float(torch.stack(shares).max())


def failure(bundle: Bundle, patches: Tensor, error: Exception) -> BundleError:
    """Return what to raise of a network that does not take patches."""
    reason = (str(error).strip() or repr(error)).splitlines()[-1]
    return BundleError(f"{bundle.name} failed on a batch {tuple(patches.shape)}: {reason}")


def _timed(module: nn.Module, patches: Tensor, bundle: Bundle) -> tuple[float, dict[str, Tensor]]:
    begun = time.perf_counter()
    try:
        answer = run(module, patches)
    except FAILS as error:
        raise failure(bundle, patches, error) from error
    return time.perf_counter() - begun, answer
