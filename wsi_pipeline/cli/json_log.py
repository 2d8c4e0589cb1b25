"""`--json-log`: whatever is written to stderr as JSON objects, one a line."""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime
from typing import TextIO

LEVELS = {"error": "ERROR", "failed": "ERROR", "traceback": "ERROR", "warning": "WARNING"}
"""Of lines that are no log's, by their first word."""


def as_json(text: str, level: str = "", logger: str = "wsi_pipeline.cli") -> str:
    """Return a line as a JSON object with its time."""
    first = re.match(r"\w*", text)
    facts = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": level or LEVELS.get(first[0].lower() if first else "", "INFO"),
        "logger": logger,
        "message": text,
    }
    # In ASCII, with escapes: names of files may hold what has no UTF-8.
    return json.dumps(facts)


class JsonLines:
    """A stream in place of stderr that makes an object of each line.

    Args:
        stream: where they go.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._rest = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Write the lines that are whole; each state of a bar is one, too."""
        with self._lock:
            *lines, self._rest = re.split(r"[\r\n]", self._rest + text)
            said = (as_json(line.strip()) + "\n" for line in lines if line.strip())
            self.stream.write("".join(said))
        return len(text)

    def isatty(self) -> bool:
        """Return that nobody looks at it."""
        return False

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)
