"""Records that were written as JSON, read back as what they must be, whoever wrote them."""

from __future__ import annotations

import json
import math
import stat
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

MOST_BYTES = 1 << 26
"""Of a record: those of slides with a hundred classes have some ten thousand."""
DEEPEST = 32
"""Lists and tables in each other."""
LARGEST = 1 << 63
"""Of whole numbers: others are no amounts of anything."""


def read_json(path: Path) -> Any:
    """Read a small JSON file, strictly; return what it holds.

    Raises:
        OSError: it cannot be read.
        ValueError: no file, too large, no UTF-8, no JSON, nested too deeply.
    """
    # What lies behind a URL has no mode.
    if isinstance(path, Path):
        status = path.stat()
        # A pipe would be waited for.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no file")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MB")
    try:
        found = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(found, DEEPEST)
    return found


def check(value: object, kind: Any, where: str = "it") -> None:
    """Make sure that a value read from JSON is of a type; return nothing.

    Args:
        value: What was read.
        kind: A plain type, a `Literal`, a union, a list, tuple or dict of such, a `TypedDict` or a
            dataclass, of which the keys that it does not name may be anything. `Annotated` means
            its second part.
        where: Name of the value in the message.

    Raises:
        ValueError: it is something else.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        check(value, inner[1], where)
    elif origin is Required:
        check(value, inner[0], where)
    elif origin in (Union, types.UnionType):
        if not any(_fits(value, one) for one in inner):
            raise _wrong(value, where, " or ".join(map(_name, inner)))
    elif origin is dict and isinstance(value, dict):
        for key, entry in value.items():
            check(entry, inner[1], f"{where}.{key}")
    elif isinstance(value, list) and (origin is list or inner[1:] == (...,)):
        for index, entry in enumerate(value):
            check(entry, inner[0], f"{where}[{index}]")
    elif origin is tuple and isinstance(value, list) and len(value) == len(inner):
        for index, (entry, one) in enumerate(zip(value, inner, strict=True)):
            check(entry, one, f"{where}[{index}]")
    elif (is_typeddict(kind) or is_dataclass(kind)) and isinstance(value, dict):
        hints = _hints(kind)
        if lacking := [key for key in _required(kind, hints) if key not in value]:
            raise ValueError(f"{where} lacks {', '.join(lacking)}")
        for key in filter(value.__contains__, hints):
            check(value[key], hints[key], f"{where}.{key}")
    elif not _is_plain(value, kind, origin, inner):
        raise _wrong(value, where, _name(kind))


def _is_plain(value: object, kind: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    """Return whether a value is of a type without parts."""
    if kind is Any:
        return True
    if origin is Literal:
        return value in inner
    if kind is float and isinstance(value, float):
        return math.isfinite(value)
    if kind in (int, float):
        return type(value) is int and abs(value) < LARGEST
    return origin is None and type(value) is kind


def _fits(value: object, kind: Any) -> bool:
    try:
        check(value, kind)
    except ValueError:
        return False
    return True


# To find them takes longer than all the rest of a check.
@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _required(kind: Any, hints: dict[str, Any]) -> list[str]:
    """Return the keys without which there is no such record."""
    if is_typeddict(kind):
        return [k for k, hint in hints.items() if kind.__total__ or get_origin(hint) is Required]
    return [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]


def _name(kind: Any) -> str:
    return "nothing" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _wrong(value: object, where: str, expected: str) -> ValueError:
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return ValueError(f"{where} is {shown}; expected {expected}")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _check_depth(value: object, left: int) -> None:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if left == 0:
        raise ValueError("nested too deeply")
    for part in parts:
        if isinstance(part, dict | list):
            _check_depth(part, left - 1)
