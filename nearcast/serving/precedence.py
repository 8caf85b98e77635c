"""Let the event loop interrupt the models that run beside it on the same core, and not the other way round.

A waking thread of equal rank waits until the running one has used up its slice, about 3 ms on Linux: too long for a
deadline timer or a frame's refusal. So the loop's thread asks for short slices, which lets it interrupt at once (Linux
6.12 and later, `sched_setattr(2)`; earlier ones ignore it), and the models' threads give way a little. Where the system
refuses, all stays as it was.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from contextlib import suppress

SLICE_NS = 100_000
"""The shortest that Linux grants."""
NICENESS = 2
"""Of the threads that run models, relative to the loop: two thirds of its share where both want the core."""
_SYSCALLS = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_SCHED_OTHER = 0


def ask_for_short_slices() -> bool:
    """For the calling thread, which runs an event loop; False where the system has no such thing."""
    return _schedule(SLICE_NS, 0)


def give_way_to_loop() -> bool:
    """For the calling thread, which is to run models: slices as usual, not the loop's, which it inherited."""
    return _schedule(0, NICENESS)


def yield_to_serving() -> None:
    """For a thread that loads or compares models: it never takes the processor from what serves when it wakes.

    Its share stays a full one. A thread with less is put off by the models while it holds the interpreter's lock, and
    then the loop waits with it: at nice 19 comparing versions made it wait 20 to 140 ms on a busy core, at nice 10
    loading one made p99 14-35 ms instead of 6-11.
    """
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_BATCH, os.sched_param(0))


def _schedule(slice_ns: int, nicer: int) -> bool:
    number = _SYSCALLS.get(platform.machine())
    if platform.system() != "Linux" or number is None or os.sched_getscheduler(0) != _SCHED_OTHER:
        return False
    niceness = min(19, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + nicer)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, _SCHED_OTHER, 0, niceness, 0, slice_ns, 0, 0)
    return bool(ctypes.CDLL(None, use_errno=True).syscall(number, 0, attributes, 0) == 0)
