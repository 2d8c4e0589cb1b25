"""Whether probabilities hold: how often a network is right where it says that it is sure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from wsi_pipeline.training.validate import PatientScore

GROUPS = 10
"""Of patients, each judged by a temperature that fits the others."""
BINS = 15
"""Of equal width, into which certainties are sorted."""

Reals = npt.NDArray[np.float64]


def fit_temperature(judged: Collection[PatientScore]) -> float:
    """Return the temperature at which held-out pixels are likeliest; every patient counts alike.

    Guo et al., On Calibration of Modern Neural Networks, 2017.

    Args:
        judged: of each patient.
    """
    kept = [found.sampled for found in judged if len(found.sampled)]
    if not kept:
        return 1.0

    def unlikely(exponent: float) -> float:
        return float(np.mean([-_of_truth(rows, np.exp(exponent)).mean() for rows in kept]))

    return float(np.exp(minimize_scalar(unlikely, bounds=(-2.0, 2.5), method="bounded").x))


def calibration_error(judged: Sequence[PatientScore], temperatures: Sequence[float]) -> float:
    """Return the expected calibration error, 0 to 1; every patient counts alike.

    Args:
        judged: of each patient.
        temperatures: that the probabilities of each are taken at.
    """
    if not any(len(found.sampled) for found in judged):
        return 0.0
    pairs = [(f.sampled, t) for f, t in zip(judged, temperatures, strict=True) if len(f.sampled)]
    sure, right, weight = (
        np.concatenate(columns)
        for columns in zip(*(_certainty(rows, t) for rows, t in pairs), strict=True)
    )
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, (sure - right) * weight, minlength=BINS)
    return float(np.abs(gaps).sum() / weight.sum())


def left_out_temperatures(judged: Sequence[PatientScore]) -> list[float]:
    """Return, for each patient, the temperature that fits others, left out in ten groups."""
    groups = [
        fit_temperature([found for i, found in enumerate(judged) if i % GROUPS != group])
        for group in range(min(GROUPS, len(judged)))
    ]
    return [groups[i % GROUPS] for i in range(len(judged))]


def _scaled(rows: Reals, temperature: float) -> Reals:
    return np.asarray(log_softmax(rows[:, 1:] / temperature, axis=1))


def _of_truth(rows: Reals, temperature: float) -> Reals:
    """Return the logarithm of the probability of each pixel's true class."""
    logs = _scaled(rows, temperature)
    return np.asarray(np.take_along_axis(logs, rows[:, :1].astype(int), axis=1))


def _certainty(rows: Reals, temperature: float) -> tuple[Reals, Reals, Reals]:
    """Return of each pixel how sure the network is, whether it is right, and its weight."""
    logs = _scaled(rows, temperature)
    right = (logs.argmax(1) == rows[:, 0]).astype(float)
    return np.exp(logs.max(1)), right, np.full(len(rows), 1 / len(rows))
