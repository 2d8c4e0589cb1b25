"""What the values of a mask mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wsi_pipeline.annotations import is_ignored
from wsi_pipeline.errors import EvaluationError
from wsi_pipeline.report.record import UNREADABLE

LARGEST_VALUE = 65_535


@dataclass(frozen=True, kw_only=True)
class Values:
    """What the values of a mask without names mean.

    Attributes:
        classes: mask values by the class's name; other values are background.
        ignored: mask values that are not judged.
    """

    classes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: tuple[int, ...] = ()


def settle(path: Path, own: Values, given: Values, renamed: Mapping[str, str]) -> Values:
    """Return what the values of a mask mean, from its file and from the user.

    Args:
        path: of the mask.
        own: what its file says of them.
        given: what they mean, in place of that.
        renamed: new names of classes; two that get the same name become one.

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
    return Values(classes=classes, ignored=tuple(sorted(ignored)))


def named(classes: Mapping[int, str]) -> Values:
    """Return the meaning of values with names, the first of which is the background."""
    return Values(classes={name: (value,) for value, name in classes.items() if value > 0})
