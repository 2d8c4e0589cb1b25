"""Where the time goes."""

from __future__ import annotations

import time


class Clock:
    """Seconds spent since the last lap, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap for a stage."""
        last, self._last = self._last, time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._last - last

    def skip(self) -> None:
        """Leave out the time since the last lap."""
        self._last = time.perf_counter()
