"""How tests wait, and judge how long something took, on a machine of any speed that does other things as well."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

WAIT_S = 30.0
"""After this a condition is believed never to come true."""


async def until(condition: Callable[[], object], what: str = "the condition") -> float:
    """Wait for it; returns how much of its own time this process needed. The condition may be a coroutine function."""
    began, ends_at = own_time(), time.monotonic() + WAIT_S
    while True:
        found = condition()
        if await found if inspect.isawaitable(found) else found:
            return own_time() - began
        assert time.monotonic() < ends_at, f"it never came true within {WAIT_S:g} s: {what}"
        await asyncio.sleep(0.002)


def own_time(*pids: int) -> float:
    """The time that processes have had: the clock, less what their threads waited for a core.

    A bound on it is as sharp as one on the clock where nothing else runs, and holds where much else does.

    Args:
        pids: of the processes; none = of this one.

    Returns:
        Seconds of an arbitrary origin.
    """
    return time.monotonic() - sum(map(_starved_s, pids or (os.getpid(),)))


def _starved_s(pid: int) -> float:
    """How long the threads of a process could have run and had no core."""
    waited_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # the thread has just ended
            waited_ns += int((task / "schedstat").read_text().split()[1])
    return waited_ns / 1e9
