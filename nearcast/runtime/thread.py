"""Blocking work beside the loop that must not hold up the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")


async def run_in_daemon(call: Callable[[], T], *, name: str) -> T:
    """Run `call` on a thread of its own, and return or raise what it does.

    A process waits for the threads of an executor before it ends, however long the network or a terminal keeps them;
    it does not wait for this one. So `call` must leave nothing half done when it is never finished.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(cast("T", result))
        else:
            done.set_exception(error)

    def work() -> None:
        result: T | None = None
        problem: Exception | None = None
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 (it is raised where the result is awaited)
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, result, problem)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await done
