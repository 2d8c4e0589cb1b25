"""Whether a patch is like the tissue that a network was trained for, by what it sees itself.

Squared Mahalanobis distances of features (Lee et al., A Simple Unified Framework for Detecting
Out-of-Distribution Samples and Adversarial Attacks, 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import BundleError

FALSE_ALARMS = 0.1
"""Share of the patches of patients left out that are called unlike, where few others judge them."""
SHRINKAGE = 0.1
"""Share of the mean variance in all directions: of few patches some directions show none."""
TINY = 1e-12
MEND = "take those of this network's training, or leave features out of model.toml"
FIELDS = ("mean", "whitening", "threshold")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Familiar:
    """What patches of the training tissue look like to a network.

    Attributes:
        mean: (C,) of the features.
        whitening: (C, C) matrix that gives features around the mean variance 1 in all directions.
        threshold: (1,) distance beyond which a patch is unlike.
    """

    mean: Floats
    whitening: Floats
    threshold: Floats

    @staticmethod
    def of(patients: Sequence[npt.NDArray[np.float32]]) -> Familiar | None:
        """Return what patches of patients look like; None of fewer than two patients.

        Every patient counts alike. The threshold is what `FALSE_ALARMS` of the patches exceed, each
        patient judged by the others.

        Args:
            patients: (n, C) features of the patches of each.
        """
        each = [features.astype(np.float64) for features in patients if len(features)]
        if (count := len(each)) < 2:
            return None
        means = [features.mean(0) for features in each]
        mean = np.sum(means, 0)
        second = sum(map(_second_moment, each), np.zeros((len(mean), len(mean))))

        def by(mean: Floats, second: Floats, threshold: float) -> Familiar:
            spread = second - np.outer(mean, mean)
            around = max(np.trace(spread), TINY) / len(mean) * np.eye(len(mean))
            shrunk = (1 - SHRINKAGE) * spread + SHRINKAGE * around
            whitening = np.linalg.inv(np.linalg.cholesky(shrunk))
            return Familiar(mean=mean, whitening=whitening, threshold=np.array([threshold]))

        # by all patients but each in turn
        found = [
            by(
                (mean - own) / (count - 1), (second - _second_moment(features)) / (count - 1), 1.0
            ).distances(features)
            for own, features in zip(means, each, strict=True)
        ]
        weights = np.concatenate([np.full(len(own), 1 / len(own)) for own in found])
        threshold = np.quantile(
            np.concatenate(found), 1 - FALSE_ALARMS, weights=weights, method="inverted_cdf"
        )
        return by(mean / count, second / count, max(float(threshold), TINY))

    def distances(self, features: npt.NDArray[np.floating]) -> Floats:
        """Return (n,) squared distances of (n, C) features; beyond 1 a patch is unlike.

        Raises:
            BundleError: the features are of another network.
        """
        if features.shape[1:] != self.mean.shape:
            raise BundleError(
                f"the bundle's features are of {len(self.mean)} channels, the network has "
                f"{features.shape[1]}: {MEND}"
            )
        squares = ((features - self.mean) @ self.whitening.T) ** 2
        return np.asarray(squares.mean(1) / self.threshold)

    def to_bytes(self) -> bytes:
        """Return the content of a bundle's file of features."""
        return save({name: getattr(self, name).astype(np.float32) for name in FIELDS})


def _second_moment(features: Floats) -> Floats:
    return np.asarray(features.T @ features / len(features))


def load_familiar(bundle: Bundle) -> Familiar | None:
    """Return what a bundle says of its training tissue, None where it says nothing.

    Raises:
        BundleError: its file cannot be read, or holds something else.
    """
    if (path := bundle.features_path) is None:
        return None
    try:
        held = load(path.read_bytes())
        mean, whitening, threshold = (held[name].astype(np.float64) for name in FIELDS)
        if (mean.shape * 2, threshold.shape) != (whitening.shape, (1,)):
            raise ValueError("its arrays are of odd shapes")
        if not (np.isfinite(mean).all() and np.isfinite(whitening).all() and threshold[0] > 0):
            raise ValueError("its numbers mean nothing")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BundleError(f"cannot read features from {path} ({error!r}): {MEND}") from error
    return Familiar(mean=mean, whitening=whitening, threshold=threshold)
