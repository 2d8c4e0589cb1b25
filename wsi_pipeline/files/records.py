"""Small JSON files, whoever wrote them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 26
"""Of a record: those of slides with a hundred classes have some ten thousand."""
DEEPEST = 32
"""Lists and tables in each other."""


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
    # Whoever goes through it later, by recursion, must not be stopped by Python's own limit.
    _check_depth(found, DEEPEST)
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _check_depth(value: object, left: int) -> None:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if left == 0:
        raise ValueError("nested too deeply")
    for part in parts:
        if isinstance(part, dict | list):
            _check_depth(part, left - 1)
