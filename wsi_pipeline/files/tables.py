"""Tables for scripts and spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    r"""Return rows as comma-separated text, RFC 4180.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.

    Example:
        >>> as_csv([("=1+1", -2.5, None)])
        "'=1+1,-2.5,\r\n"
    """
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(
        [
            f"'{cell}" if isinstance(cell, str) and cell.startswith((*"=+-@\t\r",)) else cell
            for cell in row
        ]
        for row in rows
    )
    return buffer.getvalue()
