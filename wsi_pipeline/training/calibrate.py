"""Whether probabilities hold: how often a network is right where it says that it is sure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from wsi_pipeline.training.validate import PatientScore

GROUPS = 10
"""Of patients, each judged by a temperature that fits the others."""
BINS = 15
"""Of equal width, into which certainties are sorted."""


def fit_temperature(scores: Collection[PatientScore]) -> float:
    """Return the temperature at which held-out pixels are likeliest; every patient counts alike.

    Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    kept = [found.pixel_chances for found in scores if len(found.pixel_chances)]
    # By one class alone they would be the likelier the surer they are.
    if not kept or np.ptp(np.concatenate([rows[:, 0] for rows in kept])) == 0:
        return 1.0

    def unlikely(exponent: float) -> float:
        logs = [log_softmax(rows[:, 1:] / np.exp(exponent), axis=1) for rows in kept]
        each = zip(kept, logs, strict=True)
        true = [log[np.arange(len(log)), rows[:, 0].astype(int)] for rows, log in each]
        return float(np.mean([-log.mean() for log in true]))

    # By its logarithm, since a temperature is a factor.
    return float(np.exp(minimize_scalar(unlikely, bounds=(-2.0, 2.5), method="bounded").x))


def calibration_error(scores: Sequence[PatientScore], temperatures: Sequence[float]) -> float:
    """Return the expected calibration error at each patient's temperature, 0 to 1.

    Every patient counts alike.
    """
    sure, right, weight = [], [], []
    for rows, temperature in zip((s.pixel_chances for s in scores), temperatures, strict=True):
        logs = log_softmax(rows[:, 1:] / temperature, axis=1)
        sure.append(np.exp(logs.max(1)))
        right.append((logs.argmax(1) == rows[:, 0]).astype(float))
        weight.append(np.full(len(rows), 1 / max(1, len(rows))))
    if not any(map(len, sure)):
        return 0.0
    weights = np.concatenate(weight)
    bins = np.minimum((np.concatenate(sure) * BINS).astype(int), BINS - 1)
    gaps = (np.concatenate(sure) - np.concatenate(right)) * weights
    return float(np.abs(np.bincount(bins, gaps, minlength=BINS)).sum() / weights.sum())


def left_out_temperatures(scores: Sequence[PatientScore]) -> list[float]:
    """Return, for each patient, the temperature that fits others, left out in ten groups."""
    groups = [
        fit_temperature([found for i, found in enumerate(scores) if i % GROUPS != group])
        for group in range(min(GROUPS, len(scores)))
    ]
    return [groups[i % GROUPS] for i in range(len(scores))]
