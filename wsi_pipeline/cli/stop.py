"""Ctrl-C and SIGTERM end a run at once, with a sentence. A killed run loses nothing either."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from wsi_pipeline.cli.json_log import JsonLines, as_json


@contextmanager
def stopping(tidy: Callable[[], None], sentence: str) -> Iterator[None]:
    """End the process when it is asked to during the body, with exit code 128 + the signal."""
    # Python lets the main thread alone hear signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        end(tidy, sentence, 128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(tidy: Callable[[], None], sentence: str, code: int) -> NoReturn:
    """Say a sentence, tidy and end the process, whatever its threads are at."""
    # not through sys.stderr: the signal may have come in the middle of a write to it
    said = as_json(sentence) if isinstance(sys.stderr, JsonLines) else f"\n{sentence}"
    os.write(2, f"{said}\n".encode())
    try:
        tidy()
    finally:
        # threads would be waited for otherwise: a block takes seconds, large outputs minutes
        os._exit(code)
