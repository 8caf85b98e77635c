"""When a core stood still for everybody: a process that goes before all others on it, and only sleeps.

`python -m benchmarks.stalls` sleeps 1 ms again and again until it is told to end, and then says when it woke 1 ms late
or more. No ordinary process can make it: that is a hypervisor that runs something else, or a kernel that will not be
interrupted. What is due meanwhile is late whatever the server does.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import LOAD_CPU, SERVER_CPU, cpu_s

SLEEP_S = 0.001
LATE_S = 0.001

Span = tuple[float, float]
"""From when to when, in monotonic seconds."""


@dataclass(slots=True)
class Stalls:
    """Of the server's and the load's core, once the block of `watch_stalls` has ended.

    Attributes:
        is_known: False where the system lets no process go first.
        stolen_ms: what the kernel says that the hypervisor took, in its steps of 10 ms.
        others_share: of the server's core, that other processes used: they put off what is ordinary, but stall nobody.
    """

    spans: list[Span] = field(default_factory=list)
    is_known: bool = True
    stolen_ms: float = 0.0
    others_share: float = 0.0

    def met(self, began: float, ended: float) -> bool:
        """Whether some core stood still for a part of that time."""
        return any(since < ended and until > began for since, until in self.spans)

    def beyond(self, spans: Sequence[Span]) -> int:
        """How many of them met no stall."""
        return sum(not self.met(*span) for span in spans)

    def __str__(self) -> str:
        if not self.is_known:
            return "not known: the system grants no real-time priority"
        took_ms = [(until - since) * 1e3 for since, until in self.spans]
        took = f"{sum(took_ms):.0f} ms, longest {max(took_ms, default=0.0):.1f} ms; {self.stolen_ms:.0f} ms stolen"
        return f"{took}; others used {self.others_share:.2f} of the server's core"


@contextlib.contextmanager
def watch_stalls(server_pid: int) -> Iterator[Stalls]:
    """Watch both cores until the block ends; then the result is filled in."""
    stalls = Stalls()
    cpus = sorted({SERVER_CPU, LOAD_CPU})
    command = [sys.executable, "-m", "benchmarks.stalls"]
    watchers = [subprocess.Popen([*command, str(cpu)], stdout=subprocess.PIPE, text=True) for cpu in cpus]
    for watcher in watchers:
        assert watcher.stdout is not None
        stalls.is_known &= json.loads(watcher.stdout.readline())
    began, stolen_ms, others_s = time.monotonic(), _stolen_ms(cpus), _others_s(server_pid)
    try:
        yield stalls
    finally:
        stalls.stolen_ms = _stolen_ms(cpus) - stolen_ms
        stalls.others_share = max(0.0, (_others_s(server_pid) - others_s) / (time.monotonic() - began))
        for watcher in watchers:
            watcher.terminate()
            stalls.spans += [(since, until) for since, until in json.loads(watcher.communicate(timeout=10)[0])]


def main(cpu: int) -> None:
    """Say whether this process goes first, and after SIGTERM or the parent's end when it woke late nevertheless."""
    ends: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ends.append(number))
    is_first = become_first(cpu)
    print(json.dumps(is_first), flush=True)
    parent, spans, at = os.getppid(), [], time.monotonic()
    gc.disable()
    while not ends and os.getppid() == parent:
        time.sleep(SLEEP_S)
        now = time.monotonic()
        if now - at > SLEEP_S + LATE_S:
            spans.append((at + SLEEP_S, now))
        at = now
    print(json.dumps(spans if is_first else []), flush=True)


def become_first(cpu: int) -> bool:
    """On that core, before everything else; False where the system does not let this process."""
    os.sched_setaffinity(0, {cpu})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(os.sched_get_priority_max(os.SCHED_FIFO)))
    except OSError:
        return False
    return True


def _stolen_ms(cpus: Sequence[int]) -> float:
    return sum(_fields(cpu)[7] for cpu in cpus) * 1e3


def _others_s(server_pid: int) -> float:
    """What ran on the server's core without being the server: user, nice and system time."""
    return sum(_fields(SERVER_CPU)[:3]) - cpu_s(server_pid)


def _fields(cpu: int) -> list[float]:
    """What the kernel counts for one core, in seconds (`proc_stat(5)`)."""
    rows = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    return next([int(field) / os.sysconf("SC_CLK_TCK") for field in row[1:]] for row in rows if row[0] == f"cpu{cpu}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
