"""The time that processes have had: what the clock says, less what their threads waited for a core.

A bound on it is as sharp as one on the clock where nothing else runs, and holds where much else does.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


def own_time(*pids: int) -> float:
    """Seconds of an arbitrary origin; without process numbers those of this process."""
    return time.monotonic() - sum(map(_starved_s, pids or (os.getpid(),)))


def _starved_s(pid: int) -> float:
    """How long the threads of a process could have run and had no core."""
    waited_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # the thread has just ended
            waited_ns += int((task / "schedstat").read_text().split()[1])
    return waited_ns / 1e9
