"""The life of one process: start the loop, listen for signals, drain within a bound, end with a numbered exit code."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from nearcast.errors import MeshError
from nearcast.runtime.descriptors import raise_descriptors, watch_descriptors
from nearcast.runtime.exit import ExitCode, exit_code

CANCEL_GRACE_S = 1.0
"""How long a cancelled main may clean up before the process ends regardless."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger("nearcast.runtime")


class Shutdown:
    """The wish to end. Signals request it, and so may any part of the process."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        """Whether the process is to end."""
        return self._event.is_set()

    def request(self) -> None:
        """Ask the process to end. Repeating it changes nothing."""
        self._event.set()

    async def wait(self) -> None:
        """Return once the process is to end."""
        await self._event.wait()


def run(main: Callable[[Shutdown], Awaitable[int]], *, drain_s: float = 5.0) -> int:
    """Run a process to its end and return its exit code.

    SIGTERM and the first SIGINT request the shutdown; `main` then has `drain_s` seconds to return before it is
    cancelled. A second signal ends the process at once. A `MeshError` becomes one line on stderr and its exit code.
    """
    import uvloop

    raise_descriptors()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_supervise(main, drain_s))


def announce(name: str, **addresses: str) -> None:
    """Tell the parent, by one JSON line on stdout, that this process is ready and where it listens."""
    # What start-up made stays, so the collector need not walk over it while requests wait.
    gc.freeze()
    gc.enable()
    try:
        sys.stdout.write(json.dumps({"ready": name, **addresses}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _log.debug("nobody reads stdout any more")


async def _supervise(main: Callable[[Shutdown], Awaitable[int]], drain_s: float) -> int:
    shutdown = Shutdown()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, _on_signal, shutdown, number)
    task = asyncio.ensure_future(main(shutdown))
    watch = asyncio.ensure_future(shutdown.wait())
    descriptors = loop.create_task(watch_descriptors())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=drain_s)
        if not task.done():
            _log.warning("still busy %.1f s after the shutdown was requested; cancelling", drain_s)
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
            return _result(task, default=ExitCode.FAILED)
        return _result(task, default=ExitCode.OK if shutdown.requested else ExitCode.FAILED)
    finally:
        watch.cancel()
        descriptors.cancel()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _on_signal(shutdown: Shutdown, number: int) -> None:
    if shutdown.requested:
        os._exit(128 + number)
    shutdown.request()


def _result(task: asyncio.Future[int], *, default: ExitCode) -> int:
    if not task.done() or task.cancelled():
        return default
    error = task.exception()
    if error is None:
        return int(task.result())
    expected = _mesh_error(error)
    if expected is None:
        _log.error("the process failed", exc_info=error)
        return ExitCode.INTERNAL
    sys.stderr.write(f"nearcast: {expected.message}\n")
    return exit_code(expected)


def _mesh_error(error: BaseException) -> MeshError | None:
    """The error to show: itself, or the first of a task group in which nothing else went wrong."""
    if isinstance(error, MeshError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [_mesh_error(inner) for inner in error.exceptions]
        return None if None in found else found[0]
    return None
