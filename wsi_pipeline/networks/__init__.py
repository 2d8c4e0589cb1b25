"""Networks by name, and the building of a bundle's."""

from __future__ import annotations

from wsi_pipeline.bundle import FOREIGN, Bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks.foreign import Network, load_foreign
from wsi_pipeline.networks.lightmuseg import LightMuSeg
from wsi_pipeline.networks.weights import load_weights

NETWORKS = {"lightmuseg": LightMuSeg}
"""Every network of the package: what `network` in a model.toml, or a recipe, may name."""

__all__ = ["NETWORKS", "Network", "build", "create"]


def build(bundle: Bundle) -> Network:
    """Build a bundle's network with its weights; return it on the CPU, in eval mode.

    Args:
        bundle: a network of the package with a weight file, or a foreign program.

    Raises:
        BundleError: no such network, no weights, or weights that do not fit it.
    """
    if bundle.network in FOREIGN:
        return load_foreign(bundle)
    module = create(bundle)
    if bundle.weights_path is None:
        raise BundleError(f"the bundle {bundle.path} has no weights; name them in its model.toml")
    load_weights(module, bundle.weights_path, unused=module.unused)
    return Network(module=module.eval(), batch_size=None)


def create(bundle: Bundle) -> LightMuSeg:
    """Create the bundle's network with random weights; return it in training mode.

    Raises:
        BundleError: no such network, or options or a patch size that it does not take.
    """
    if bundle.network not in NETWORKS:
        known = ", ".join([*NETWORKS, *FOREIGN])
        raise BundleError(f"{bundle.path}: no network {bundle.network!r}; there are {known}")
    network = NETWORKS[bundle.network]
    multiple = network.size_multiple
    if any(side % multiple for side in bundle.input.patch_size):
        raise BundleError(
            f"{bundle.path}: patch_size {list(bundle.input.patch_size)} px; "
            f"{bundle.network} takes multiples of {multiple}"
        )
    try:
        return network(**bundle.network_options)
    except TypeError as error:
        raise BundleError(f"{bundle.path}: network_options: {error}") from error
