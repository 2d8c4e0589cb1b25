"""Splits by patient, the only honest ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.training.recipe import SplitSpec
from wsi_pipeline.training.samples import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Images to learn from, and images of other patients, whose name it has, to judge by."""

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]

    @classmethod
    def of(cls, name: str, samples: Sequence[Sample], patients: Collection[str]) -> Split:
        """Return the split that holds some patients out."""
        sides = {out: tuple(s for s in samples if (s.patient in patients) == out) for out in (0, 1)}
        return cls(name=name, train=sides[0], test=sides[1])

    def __post_init__(self) -> None:
        """Refuse an empty side, and patients or pictures that are on both."""
        if not self.train or not self.test:
            raise RecipeError(f"split {self.name}: one side has no images; add patients")
        if both := {s.patient for s in self.train} & {s.patient for s in self.test}:
            raise RecipeError(f"split {self.name}: patients on both sides: {sorted(both)}")
        # By content: one picture may have two names, and be said to be of two patients.
        seen = {s.digest: s for s in self.train}
        if same := [f"{s.name} is {seen[s.digest].name}" for s in self.test if s.digest in seen]:
            raise RecipeError(f"split {self.name}: the same picture on both sides: {same}")


def plan_splits(
    samples: Sequence[Sample], spec: SplitSpec, *, seed: int, wanted: Collection[str] | None = None
) -> list[Split]:
    """Hold out each patient, or each group of patients, in turn; return the splits.

    Where samples have a fold of their own, these are the groups, and samples without one are never
    held out. Of a spec with a `test` there is one split.

    Args:
        wanted: Names of the splits to return; None = all.

    Raises:
        RecipeError: too few patients, names that do not exist, or a picture that is on both sides.
    """
    patients = sorted({s.patient for s in samples})
    if spec.folds > len(patients):
        raise RecipeError(f"split.folds is {spec.folds}; there are {len(patients)} patients")
    if any(s.fold for s in samples):
        groups = {
            name: {s.patient for s in samples if s.fold == name}
            for name in sorted({s.fold for s in samples if s.fold})
        }
        pairs = Counter(patient for patient, _ in {(s.patient, s.fold) for s in samples})
        if torn := sorted(patient for patient, count in pairs.items() if count > 1):
            raise RecipeError(f"images of a patient are in several folds, or some in none: {torn}")
    elif spec.folds:
        dealt = np.random.default_rng(seed).permutation(patients).tolist()
        groups = {str(i + 1): set(dealt[i :: spec.folds]) for i in range(spec.folds)}
    else:
        groups = {patient: {patient} for patient in patients}
    if spec.test and wanted is not None:
        raise RecipeError("split.test names who is held out; leave --folds away, or split.test")
    if unknown := {*(wanted or ()), *spec.test} - groups.keys():
        what = "patient" if all(group == {name} for name, group in groups.items()) else "fold"
        raise RecipeError(f"no {what} {sorted(unknown)} to hold out; there are {list(groups)}")
    if spec.test:
        together = set[str]().union(*(groups[name] for name in spec.test))
        return [Split.of(", ".join(spec.test), samples, together)]
    return [
        Split.of(name, samples, group)
        for name, group in groups.items()
        if wanted is None or name in wanted
    ]


def leave_out_validation(
    samples: Sequence[Sample], share: float, *, seed: int
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Set patients aside by whom the best weights are chosen; return who is left, and them.

    Args:
        share: Share of the patients; one at least, where it is above 0.

    Raises:
        RecipeError: nobody would be left, or a picture is on both sides.
    """
    if share == 0:
        return samples, ()
    patients = sorted({s.patient for s in samples})
    count = max(1, round(share * len(patients)))
    chosen = np.random.default_rng(seed).permutation(patients)[:count].tolist()
    split = Split.of("validation", samples, chosen)
    return split.train, split.test
