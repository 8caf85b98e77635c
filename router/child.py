"""Child processes of a node: started, watched, started again with backoff, never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from nearcast.telemetry import get_logger

_log = get_logger("nearcast.child")


class ChildLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How a child is restarted: full jitter between 0 and base · 2^n up to max; `stable_s` of life start n over."""

    restart_base_s: float = 0.5
    restart_max_s: float = 30.0
    stable_s: float = 30.0
    stop_timeout_s: float = 3.0


def tied_to_parent(command: Sequence[str]) -> list[str]:
    """The command, run so that the kernel ends it with SIGTERM when its parent dies, even by SIGKILL.

    Where `setpriv` (util-linux) is missing the command is returned as it is.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--", *command] if setpriv else list(command)


class Child:
    """One child process that is kept alive.

    Args:
        name: for the log.
        command: what to run.
        log: file that its stdout and stderr are appended to.
        nice: added to its niceness: a background child must not slow the requests.
        limits: bounds of restart and stop.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, nice: int = 0, limits: ChildLimits | None = None
    ) -> None:
        self._name = name
        self._command = tied_to_parent(command)
        self._log = log
        self._nice = nice
        self._limits = limits or ChildLimits()
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Process id; 0 while it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    def start(self) -> None:
        """Start it and keep it alive from now on."""
        self._task = asyncio.get_running_loop().create_task(self._keep_alive())

    async def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL after the timeout."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self._limits.stop_timeout_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            await process.wait()

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        attempt = 0
        limits = self._limits
        while True:
            started = loop.time()
            try:
                code = await self._run_once()
                _log.warning("child ended", child=self._name, exit_code=code)
            except OSError as error:
                _log.warning("child did not start", child=self._name, error=str(error))
            attempt = 0 if loop.time() - started > limits.stable_s else min(attempt + 1, 16)
            await asyncio.sleep(min(limits.restart_max_s, limits.restart_base_s * 2.0**attempt) * random.random())

    async def _run_once(self) -> int:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if self._nice:
            # The child of a real-time thread starts at 0, whatever the node's own niceness is.
            niceness = min(19, os.getpriority(os.PRIO_PROCESS, 0) + self._nice)
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid, niceness)
        return await self._process.wait()
