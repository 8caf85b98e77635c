"""Let the event loop interrupt the models that run beside it on the same core, and not the other way round.

A waking thread of equal rank waits until the running one has used up its slice, about 3 ms on Linux: too long for a
deadline timer or a frame's refusal. So the loop's thread is real-time while it uses little of its core (`loop_rank`):
it runs as soon as it wakes, whatever else is there. Where or while it is not, it asks for short slices, which lets it
interrupt sooner (Linux 6.12 and later, `sched_setattr(2)`; earlier ones ignore it), and the models' threads give way a
little. What the system refuses stays as it was. No thread or child inherits any of it.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import math
import os
import platform
import struct
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from nearcast.metrics import Collector
from nearcast.serving.loop_rank import LoopRank

if TYPE_CHECKING:
    from prometheus_client import Metric

SLICE_NS = 100_000
"""The shortest that Linux grants."""
NICENESS = 2
"""Of the threads that run models, relative to the loop: two thirds of its share where both want the core."""
_SYSCALLS = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_SCHED_OTHER, _SCHED_BATCH = 0, 3
_RESET_ON_FORK = 1
_LOG = logging.getLogger(__name__)


class LoopPrecedence(Collector):
    """Of the loop that calls `start`, until `stop`; a collector of what is in force.

    Args:
        real_time: whether to ask for that at all.
    """

    def __init__(self, *, real_time: bool) -> None:
        self._wanted = real_time
        self._rank = LoopRank(0.0, 0.0)
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf
        self._loads = 0

    def start(self) -> None:
        """On the loop's own thread. One whose scheduling somebody has chosen already keeps that."""
        if _is_ordinary() and _ask_for_short_slices() and self._wanted:
            now, self._due = time.monotonic(), math.inf
            self._rank = LoopRank(now, time.thread_time())
            self._wait(now)

    def stop(self) -> None:
        """Be ordinary from now on. On the loop's own thread."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._rank.is_first:
            self._rank.is_first = False
            _ask_for_short_slices()

    def lead(self, work: Future[Any]) -> None:
        """While a thread loads or frees a version: half busy and ordinary the loop would wait behind that thread.

        Until the work is over, not until nobody waits for it any more.
        """
        end = partial(_call_if_open, asyncio.get_running_loop(), self._end_load)
        self._loads += 1
        work.add_done_callback(end)
        if self._loads == 1:
            self._change(self._rank.begin_load)

    def _end_load(self) -> None:
        self._loads -= 1
        if not self._loads:
            self._change(self._rank.end_load)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not collect to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        text = "1 while the event loop's thread is real-time, 0 while it is busy or the system grants no such thing."
        yield GaugeMetricFamily("nearcast_loop_real_time", text, float(self._rank.is_first))

    def _look(self) -> None:
        self._due = math.inf
        self._change(self._rank.look)

    def _change(self, judge: Callable[[float, float], object]) -> None:
        if self._timer is None:  # not started, over, or not granted
            return
        was_first, now = self._rank.is_first, time.monotonic()
        judge(now, time.thread_time())
        if self._rank.is_first is not was_first:
            if was_first:
                _ask_for_short_slices()
            elif not _become_real_time():
                self._rank.is_first = False
                self._timer.cancel()
                self._timer = None
                _LOG.info("the loop's thread stays ordinary: the system grants no real-time priority (RLIMIT_RTPRIO)")
                return
        self._wait(now)

    def _wait(self, now: float) -> None:
        """A timer that is due sooner stays: nothing that comes often puts off a look."""
        due = now + self._rank.window_s
        if due < self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._due = due
            self._timer = asyncio.get_running_loop().call_later(self._rank.window_s, self._look)


def give_way_to_loop() -> bool:
    """For the calling thread, which is to run models; False where the system has no such thing."""
    return _is_ordinary() and _take_turns(_SCHED_OTHER, 0, NICENESS, 0)


def yield_to_serving() -> None:
    """For a thread that loads or compares models: it never takes the processor from what serves when it wakes.

    Its slices are short: interrupted by the loop while it holds the interpreter's lock, it comes next, and not after
    another's slice, for which the loop would wait with it.

    Its share stays a full one. A thread with less is put off by the models while it holds the interpreter's lock, and
    then the loop waits with it: at nice 19 comparing versions made it wait 20 to 140 ms on a busy core, at nice 10
    loading one made p99 14-35 ms instead of 6-11.
    """
    if _is_ordinary() and not _take_turns(_SCHED_BATCH, SLICE_NS, 0, 0):
        with suppress(OSError):  # without short slices, where the system knows or permits only that
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _call_if_open(loop: asyncio.AbstractEventLoop, callback: Callable[[], object], _: Future[Any]) -> None:
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


def _is_ordinary() -> bool:
    """Whether nobody else has chosen how the calling thread is scheduled."""
    if platform.system() != "Linux":
        return False
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == _SCHED_OTHER


def _ask_for_short_slices() -> bool:
    return _take_turns(_SCHED_OTHER, SLICE_NS, 0, _RESET_ON_FORK)


def _become_real_time() -> bool:
    """As low as that goes: what the system itself needs in real time goes first."""
    lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, lowest)
    except OSError:
        return False
    return True


def _niceness() -> int:
    """Of the calling thread, but no less than the process's: a thread that a real-time one makes starts at 0."""
    return max(os.getpriority(os.PRIO_PROCESS, each) for each in (threading.get_native_id(), os.getpid()))


def _take_turns(policy: int, slice_ns: int, nicer: int, flags: int) -> bool:
    """False where the system refuses, or where we do not know how to ask it."""
    if platform.machine() not in _SYSCALLS:
        return False
    niceness = min(19, _niceness() + nicer)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, flags, niceness, 0, slice_ns, 0, 0)
    call = ctypes.CDLL(None, use_errno=True).syscall
    return bool(call(_SYSCALLS[platform.machine()], 0, attributes, 0) == 0)
