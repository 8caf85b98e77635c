"""Starting a coroutine without a task: most calls are answered before they wait for anything.

It looks from inside as it does in a task, and from Python 3.12 on `asyncio.Task(..., eager_start=True)` does the same:
the coroutine runs at once, in a context of its own, and only if it has to wait the loop gets to know of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from contextvars import copy_context
from typing import Any

_NAME = "call"


def start(coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> asyncio.Task[None] | None:
    """Run a coroutine up to its first wait; a task does the rest. None = there is no rest.

    Args:
        coroutine: handles its own exceptions; a cancellation ends it quietly.
        loop: the running loop.
    """
    if asyncio.current_task(loop) is not None:
        return loop.create_task(coroutine)
    context = copy_context()
    beginning: Any = _Beginning()
    # The documented interface for other implementations of tasks. Timeouts and task groups ask for the current one.
    asyncio._enter_task(loop, beginning)  # noqa: SLF001
    try:
        waited = context.run(coroutine.send, None)
    except (StopIteration, asyncio.CancelledError):
        return None
    finally:
        asyncio._leave_task(loop, beginning)  # noqa: SLF001
    # Without the loop, whose way is longer, and with a name, or it would be given a number in words each time.
    task = asyncio.Task(_Rest(coroutine, waited), loop=loop, name=_NAME, context=context)
    beginning.become(task)
    return task


class _Beginning:
    """The current task while there is none yet: who keeps it (a timeout, a hedge) means the later task."""

    # On the class, because one is made for each call and hardly any is ever asked.
    _task: asyncio.Task[None] | None = None
    _cancelling = 0

    def become(self, task: asyncio.Task[None]) -> None:
        self._task = task
        for _ in range(self._cancelling):
            task.cancel()

    def cancel(self, msg: object = None) -> bool:
        if self._task is not None:
            return self._task.cancel(msg)
        self._cancelling += 1
        return True

    def cancelling(self) -> int:
        return self._cancelling if self._task is None else self._task.cancelling()

    def uncancel(self) -> int:
        if self._task is not None:
            return self._task.uncancel()
        self._cancelling = max(0, self._cancelling - 1)
        return self._cancelling

    def done(self) -> bool:
        return self._task is not None and self._task.done()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def get_name(self) -> str:
        return _NAME


class _Rest(Coroutine[Any, Any, None]):
    """A coroutine that has begun: its task first hears again what it waits for."""

    __slots__ = ("_coroutine", "_has_told", "_waited")

    def __init__(self, coroutine: Coroutine[Any, Any, None], waited: Any) -> None:
        self._coroutine = coroutine
        self._waited = waited
        self._has_told = False

    def send(self, value: Any) -> Any:
        if self._has_told:
            return self._coroutine.send(value)
        self._has_told = True
        return self._waited

    def throw(self, *error: Any) -> Any:
        if not self._has_told:
            self._has_told = True
            # As a task that is cancelled while it waits: what it waits for is cancelled, and tells the coroutine so.
            if isinstance(self._waited, asyncio.Future) and self._waited.cancel():
                return self._waited
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, None]:
        raise TypeError("only a task may run the rest of a call")
