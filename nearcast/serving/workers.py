"""Threads that run models: work goes in from the loop, and what became of it comes back to the loop.

An executor of the standard library makes two futures, three locks and a chain of callbacks for each call. After a model
of 8 ms none of that is in the processor's caches any more, and it costs as much as the rest of a request.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

_LOG = logging.getLogger(__name__)

Work: TypeAlias = Callable[[], Any]
Then: TypeAlias = Callable[[Any], None]
"""Takes what the work returned, or the exception that it raised."""


class Workers:
    """At most `count` threads, each started when work comes and all others are busy. Lives on one loop.

    The queue has no bound of its own: a version hands over no more runs than it has engines, and keeps the others.

    Args:
        count: threads at most.
        name: of the threads, before their number.
        initializer: called first in each thread.
    """

    def __init__(self, count: int, name: str, initializer: Callable[[], object]) -> None:
        self._count = count
        self._name = name
        self._initializer = initializer
        self._waiting: SimpleQueue[tuple[Work, Then] | None] = SimpleQueue()
        self._over: deque[tuple[Then, Any]] = deque()
        self._threads: list[threading.Thread] = []
        self._busy = 0
        # Made at once: a node that runs short of descriptors later can still start threads.
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Not in `close`: a thread that still runs would ring whatever file has the number by then.
        weakref.finalize(self, os.close, self._bell).atexit = False
        self._is_closed = False

    def run(self, work: Work, then: Then) -> None:
        """Call `work` in a thread and then `then` on the loop; once closed, `then` alone, with a `CancelledError`."""
        if self._is_closed:
            asyncio.get_running_loop().call_soon(then, asyncio.CancelledError())
            return
        if self._busy >= len(self._threads) < self._count:
            try:
                self._start_thread()
            except (RuntimeError, OSError) as error:  # the system has no thread left, or cannot watch the bell
                if not self._threads:
                    asyncio.get_running_loop().call_soon(then, error)
                    return
        self._busy += 1
        self._waiting.put((work, then))

    def close(self) -> None:
        """Cancel what no thread has begun. What runs is still told to the loop; then the threads end."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(Empty):
            while (job := self._waiting.get_nowait()) is not None:
                self._over.append((job[1], asyncio.CancelledError()))
        self._let_threads_end()
        self._tell()

    def _start_thread(self) -> None:
        if not self._threads:
            asyncio.get_running_loop().add_reader(self._bell, self._hear)
        # A daemon, because a process that fails before `close` must end all the same.
        thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self._threads)}", daemon=True)
        thread.start()
        self._threads.append(thread)
        if len(self._threads) == 1:
            # A process that ends under a running engine may crash in the engine's library.
            atexit.register(self._wait_at_exit)

    def _work(self) -> None:
        try:
            self._initializer()
        except Exception:  # noqa: BLE001 (better a thread of another precedence than none)
            _LOG.exception("a thread could not be set up as it should be")
        while (job := self._waiting.get()) is not None:
            work, then = job
            try:
                outcome = work()
            except BaseException as error:  # noqa: BLE001 (it is told to the loop)
                outcome = error
            self._over.append((then, outcome))
            del job, work, then, outcome  # an idle thread keeps no tensors
            # This gives up the interpreter's lock and wakes the loop. `call_soon_threadsafe` would wake it first: on
            # one core the loop takes the processor, finds the lock taken and sleeps again.
            os.eventfd_write(self._bell, 1)

    def _hear(self) -> None:
        os.eventfd_read(self._bell)
        self._tell()

    def _tell(self) -> None:
        while self._over:
            then, outcome = self._over.popleft()
            self._busy -= 1
            try:
                then(outcome)
            except Exception:  # noqa: BLE001 (others wait for theirs)
                _LOG.exception("what a thread did could not be told")
        if self._is_closed and not self._busy:
            asyncio.get_running_loop().remove_reader(self._bell)
            atexit.unregister(self._wait_at_exit)

    def _wait_at_exit(self) -> None:
        self._let_threads_end()
        for thread in self._threads:
            thread.join()

    def _let_threads_end(self) -> None:
        for _ in self._threads:
            self._waiting.put(None)
