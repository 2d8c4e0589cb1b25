"""A progress bar with a rate and a remaining time, on stderr."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn, Self

from tqdm import tqdm

SECONDS_IN_FILES = 60.0
"""Between two states of a bar in the log of a batch job: a night of them stays readable."""


def new_bar(name: str, *, total: int, initial: int, unit: str, quiet: bool) -> tqdm[NoReturn]:
    """Return a bar on stderr, redrawn at once on a terminal, and seldom in a file.

    Args:
        initial: what was done before, which does not count for the rate.
    """
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_IN_FILES
    # tqdm's own variable: who reads the bar, as a script in QuPath does, wants it more often.
    with suppress(KeyError, ValueError):
        seconds = float(os.environ["TQDM_MININTERVAL"])
    return tqdm(
        desc=name,
        total=total,
        initial=initial,
        unit=f" {unit}",
        disable=quiet,
        mininterval=seconds,
        # tqdm has a watch that draws after this time, whatever the other one is.
        maxinterval=max(10.0, seconds),
    )


def duration(seconds: float) -> str:
    """Return seconds for people.

    Example:
        >>> [duration(s) for s in (20, 150, 86400)]
        ['1 min', '3 min', '24 h 0 min']
    """
    hours, minutes = divmod(max(round(seconds / 60 + 0.49), 1), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class Bars:
    """One bar at a time; of several slides it tells how far all of them are, too.

    Args:
        of: how many slides go on side by side, of which the first that is not through is shown;
            1 = one after another, each with its bar.
    """

    def __init__(self, *, quiet: bool, unit: str, of: int = 1) -> None:
        self._quiet, self._unit, self._of = quiet, unit, of
        self._name = self._stage = ""
        self._bar: tqdm[NoReturn] | None = None
        # Of each slide: what was done before, what is done by now, and of how much.
        self._counts: dict[int, tuple[int, int, int]] = {}
        self._begun = time.monotonic()
        # One that may be taken twice: a new bar closes the last under the same lock.
        self._drawing = threading.RLock()

    def __call__(self, name: str, done: int, total: int, *, number: int = 1) -> None:
        """Show how far `name` is, which is the slide of that number, unless another is shown."""
        name = self._title(name, number)
        with self._drawing:
            self._counts[number] = (self._counts.get(number, (done,))[0], done, total)
            bar = self._bar
            if bar is None or (name != self._name and (self._of == 1 or bar.n >= (bar.total or 0))):
                self.close()
                self._name, self._stage = name, ""
                self._bar = bar = new_bar(
                    name, total=total, initial=done, unit=self._unit, quiet=self._quiet
                )
            if name == self._name:
                bar.set_postfix_str(self._told(), refresh=False)
                bar.update(done - bar.n)

    def tell(self, name: str, text: str, *, number: int = 1) -> None:
        """Show what is done with `name` now that nothing is counted, unless another is shown."""
        with self._drawing:
            if self._bar is not None and self._title(name, number) == self._name:
                self._stage = text
                # in a file the next state of the bar has it: a line for each would be too many
                self._bar.set_postfix_str(self._told(), refresh=sys.stderr.isatty())

    def end(self, number: int) -> None:
        """Close the bar, since something is printed now; nothing more comes of that slide."""
        with self._drawing:
            self.close()
            before, done, _ = self._counts.get(number, (0, 0, 0))
            self._counts[number] = (before, done, done)

    def _told(self) -> str:
        """Return the stage, and how far all slides are, by what those known so far have of it."""
        counts = [count for count in self._counts.values() if count[2]]
        if self._of == 1 or not counts:
            return self._stage
        before, done, total = map(sum, zip(*counts, strict=True))
        # Slides that nobody has looked at yet count as the mean of the others.
        expected = total + (self._of - len(self._counts)) * total / len(counts)
        told = f"all {done / expected:.0%}"
        if before < done < expected:
            rest = (expected - done) / (done - before) * (time.monotonic() - self._begun)
            told += f", {duration(rest)} left"
        return ", ".join(filter(None, (self._stage, told)))

    def _title(self, name: str, number: int) -> str:
        return name if self._of == 1 else f"{number}/{self._of} {name}"

    def close(self) -> None:
        """End the bar."""
        with self._drawing:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
