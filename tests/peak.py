"""How much memory a process has taken at the most."""

import re
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Return the peak of this process alone.

    On Linux ru_maxrss will not do: a process begins with that of the one that started it.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text("utf-8")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
