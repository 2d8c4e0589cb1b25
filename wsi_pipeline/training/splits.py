"""Splits by patient, the only honest ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.training.samples import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Images to learn from and images to judge by.

    Attributes:
        name: of the held-out side.
        train: to learn from.
        test: to judge by, of other patients.
    """

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def __post_init__(self) -> None:
        """Refuse an empty side, and patients or pictures that are on both."""
        if not self.train or not self.test:
            raise RecipeError(f"split {self.name}: one side has no images; add patients")
        if both := {s.patient for s in self.train} & {s.patient for s in self.test}:
            raise RecipeError(f"split {self.name}: patients on both sides: {sorted(both)}")
        seen = {s.image.numpy().tobytes() for s in self.train}
        if same := [s.name for s in self.test if s.image.numpy().tobytes() in seen]:
            raise RecipeError(f"split {self.name}: the same picture on both sides: {same}")


def leave_one_patient_out(samples: Sequence[Sample]) -> list[Split]:
    """Hold out each patient in turn; return the splits, by patient.

    Raises:
        RecipeError: fewer than two patients, or a picture that two patients share.
    """
    patients = sorted({s.patient for s in samples})
    return [
        Split(
            name=patient,
            train=tuple(s for s in samples if s.patient != patient),
            test=tuple(s for s in samples if s.patient == patient),
        )
        for patient in patients
    ]
