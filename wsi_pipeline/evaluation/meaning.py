"""What the values of a mask mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.annotations import is_ignored
from wsi_pipeline.errors import EvaluationError
from wsi_pipeline.evaluation.confusion import IGNORE, Mask
from wsi_pipeline.report.record import UNREADABLE

LARGEST_VALUE = 65_535
BACKGROUND = "Background"
ADVICE = (
    "say what they are, as in --truth-values Tumor=1,20 or Background=2,3, --ignore 255, "
    "Background=others, or, of a mask that went through JPEG, Tumor=128+"
)


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """What the values of a mask without names mean.

    Attributes:
        classes: Mask values by the class's name.
        ignored: Mask values that are not judged.
        background: Mask values that are background, unless they are named above; None = all others.
    """

    classes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    ignored: Sequence[int] = ()
    background: Sequence[int] | None = (0,)


class Lookup:
    """What turns the values of a mask into class indices.

    Args:
        indices: Class index by name; other classes are background.
        advice: What to do about values without a meaning.
    """

    def __init__(
        self, path: Path, values: LabelMap, indices: Mapping[str, int], *, advice: str = ADVICE
    ) -> None:
        self._path, self._advice = path, advice
        self._table = np.zeros(LARGEST_VALUE + 1, np.uint8)
        self._has_meaning = np.full(len(self._table), values.background is None)
        self._has_meaning[list(values.background or ())] = True
        for name, codes in values.classes.items():
            self._table[list(codes)] = indices.get(name, 0)
            self._has_meaning[list(codes)] = True
        self._table[list(values.ignored)] = IGNORE
        self._has_meaning[list(values.ignored)] = True

    def __call__(
        self, codes: npt.NDArray[Any], whole: Iterable[npt.NDArray[Any]] | None = None
    ) -> Mask:
        """Return the class index of each value, of any shape.

        Args:
            whole: All of the mask, in pieces, to be counted where a value is refused.

        Raises:
            EvaluationError: values that no mask has, or that nothing gives a meaning: none of them
                is silently background.
        """
        codes = self._checked(codes)
        if not self._has_meaning[codes].all():
            counts = np.zeros(len(self._table), np.int64)
            # Counted over the whole mask: a window of it would tell of less than there is.
            for piece in whole or (codes,):
                counts += np.bincount(self._checked(piece).ravel(), minlength=len(counts))
            strange = np.flatnonzero((counts > 0) & ~self._has_meaning)
            some = ", ".join(map(str, strange[:5])) + ", …" * (len(strange) > 5)
            number, total = int(counts[strange].sum()), int(counts.sum())
            raise EvaluationError(
                f"{self._path} holds values without a meaning: {len(strange)} ({some}), "
                f"{number:,} of {total:,} pixels, {number / total:.2%}; {self._advice}"
            )
        return np.asarray(self._table[codes])

    def _checked(self, codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return values as whole numbers that a mask may have."""
        if codes.dtype.kind == "f" and (codes != np.floor(codes)).any():
            raise EvaluationError(f"{self._path} holds fractions; a mask has whole numbers")
        if codes.size and not 0 <= codes.min() <= codes.max() <= LARGEST_VALUE:
            raise EvaluationError(
                f"{self._path} holds values from {codes.min():g} to {codes.max():g}; a mask has "
                f"whole numbers, 0 to {LARGEST_VALUE}"
            )
        return codes if codes.dtype in (np.uint8, np.uint16) else codes.astype(np.uint16)


def settle(path: Path, own: LabelMap, given: LabelMap, renamed: Mapping[str, str]) -> LabelMap:
    """Return what the values of a mask mean, from its file (`own`) and, first, from the user.

    Args:
        renamed: New names of classes; two that get the same name become one.

    Raises:
        EvaluationError: nothing says what they mean, or a value is a class and ignored.
    """
    told = given.classes or own.classes
    if not told:
        raise EvaluationError(
            f"{path} does not say what its values mean; tell it with "
            "--prediction-values or --truth-values, as Tumor=1"
        )
    classes: dict[str, tuple[int, ...]] = {}
    ignored = {*given.ignored, *own.classes.get(UNREADABLE.name, ())}
    for name, codes in told.items():
        new = renamed.get(name, name)
        if is_ignored(new):
            ignored |= {*codes}
        elif name != UNREADABLE.name:
            classes[new] = (*classes.get(new, ()), *codes)
    if twice := ignored & {code for codes in classes.values() for code in codes}:
        raise EvaluationError(f"{path}: the values {sorted(twice)} are a class and ignored")
    return LabelMap(classes=classes, ignored=tuple(sorted(ignored)), background=given.background)


def named(classes: Mapping[int, str]) -> LabelMap:
    """Return the meaning of values with names, the first of which is the background."""
    return LabelMap(classes={name: (value,) for value, name in classes.items() if value > 0})
