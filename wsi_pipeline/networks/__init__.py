"""Networks by name, and the building of a bundle's."""

from __future__ import annotations

import inspect
import math

import torch
from torch import nn

from wsi_pipeline.bundle import DECODER, FOREIGN, Bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks.base import SegmentationNetwork
from wsi_pipeline.networks.decoder import Decoder, FrozenEncoder
from wsi_pipeline.networks.ensemble import check_members
from wsi_pipeline.networks.foreign import Network, load_foreign
from wsi_pipeline.networks.highres_unet import HighResUNet
from wsi_pipeline.networks.lightmuseg import LightMuSeg
from wsi_pipeline.networks.mm3d_unet import MM3DUNet
from wsi_pipeline.networks.nmtnet import NMTNet
from wsi_pipeline.networks.nnunet import NNUNet
from wsi_pipeline.networks.unet import SwishUNet, UNet, UNet3D
from wsi_pipeline.networks.weights import load_state, read_state

NETWORKS: dict[str, type[SegmentationNetwork]] = {
    "lightmuseg": LightMuSeg,
    "nmtnet": NMTNet,
    "mm3d_unet": MM3DUNet,
    "highres_unet": HighResUNet,
    "swish_unet": SwishUNet,
    "unet": UNet,
    "unet3d": UNet3D,
    "nnunet": NNUNet,
}
"""Every network of the package: what `network` in a model.toml, or a recipe, may name."""

MOST_PER_PASS = 8
"""Patches of a pass on a core: the last passes of a slide are filled up with nothing."""

__all__ = ["NETWORKS", "Network", "SegmentationNetwork", "build", "create", "patches_per_pass"]


def build(bundle: Bundle) -> Network:
    """Build a bundle's network with its weights; return it on the CPU, in eval mode.

    Raises:
        BundleError: no such network, no weights, or weights that do not fit it.
    """
    if bundle.members:
        check_members(bundle)
        modules = [build(member).module for member in bundle.members]
        return Network(module=nn.ModuleList(modules), batch_size=None)
    if bundle.network in FOREIGN:
        return load_foreign(bundle)
    module = create(bundle)
    if bundle.weights_path is None:
        raise BundleError(
            f"the bundle {bundle.path} has no weights; bring some in with `models import`, or try "
            "it with random ones of `models init`"
        )
    state = read_state(bundle.weights_path, data=bundle.read_weights())
    load_state(module, state, path=bundle.weights_path, unused=module.unused)
    batch_size = None
    if bundle.encoder and isinstance(module, Decoder):
        module.encoder = FrozenEncoder(bundle.encoder, module)
        batch_size = module.encoder.batch_size
    return Network(module=module.eval(), batch_size=batch_size)


def patches_per_pass(bundle: Bundle, dtype: torch.dtype) -> int:
    """Return how many patches make the best pass on one core of a CPU.

    It is 1 but in bf16, in which a patch gets the same bits in any company; fp32 is rounded
    differently in another batch, and by a patch's place in it.
    """
    if bundle.members:
        return min(patches_per_pass(member, dtype) for member in bundle.members)
    network = NETWORKS.get(bundle.network, SegmentationNetwork)
    # What is brought to a size is a patch or two, and a pass would mostly be empty.
    if dtype is not torch.bfloat16 or bundle.input.fit:
        return 1
    return min(max(1, network.pass_pixels // math.prod(bundle.input.patch_size)), MOST_PER_PASS)


def create(bundle: Bundle) -> SegmentationNetwork:
    """Create the bundle's network with random weights; return it in training mode.

    Raises:
        BundleError: no such network, or options or a patch size that it does not take.
    """
    known_networks: dict[str, type[SegmentationNetwork]] = {**NETWORKS, DECODER: Decoder}
    if bundle.network not in known_networks:
        raise BundleError(
            f"{bundle.path}: no network {bundle.network!r}; "
            f"there are {', '.join([*known_networks, *FOREIGN])}"
        )
    network, patch_size = known_networks[bundle.network], bundle.input.patch_size
    try:
        known = inspect.signature(network).parameters
        for name, value in bundle.network_options.items():
            if name not in known:
                raise ValueError(f"no option {name!r}; {network.__name__} has {', '.join(known)}")
            default = known[name].default
            given = tuple(value) if isinstance(value, list) else value
            # Not by isinstance: to Python true is a whole number.
            if type(given) is not type(default) or (
                isinstance(given, tuple) and not all(type(v) is int for v in given)
            ):
                raise TypeError(f"{name} is {value!r}, expected something like {default!r}")
        module = network(**{"channels": bundle.input.channels, **bundle.network_options})
    # the last is torch's, of what has no memory
    except (TypeError, ValueError, RuntimeError) as error:
        raise BundleError(f"{bundle.path}: network_options: {error}") from error
    if module.channels != bundle.input.channels:
        raise BundleError(
            f"{bundle.path}: network_options has {module.channels} channels, "
            f"input has {bundle.input.channels}"
        )
    if len(patch_size) != module.ndim or any(
        side % n for side, n in zip(patch_size, module.multiples, strict=True)
    ):
        raise BundleError(
            f"{bundle.path}: patch_size {list(patch_size)} px; "
            f"{bundle.network} takes {module.ndim} multiples of {module.told_multiples}"
        )
    return module
