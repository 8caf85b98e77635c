"""The gate: load the staged version and run its golden vectors in a child, where a crash harms nobody."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

from nearcast.errors import Code, MeshError
from nearcast.serving.gate_child import KILLED, gate_command, gate_environment, read_verdict

OUTPUT_BYTES_MAX = 64 * 1024
KILLS_MAX = 5
"""A child that is killed from outside says nothing about the version, but so many times in a row it does: the version
takes more memory than this node has, and each new try endangers what serves."""


class Gate:
    """The gate of one model. `tenant_keys` is the folder of the keys that open sealed versions."""

    def __init__(self, tenant_keys: Path | None = None) -> None:
        self._tenant_keys = tenant_keys
        self._kills: Counter[Path] = Counter()

    async def run(self, folder: Path, *, timeout_s: float) -> None:
        """Return if the version in `folder` passes. A cancelled caller takes the child with it.

        Raises:
            MeshError: UNTRUSTED with the gate's reason, also if the child crashed, took longer than `timeout_s`, or was
                killed `KILLS_MAX` times; UNAVAILABLE if it may pass later: it was killed, or a tenant's key is missing.
            OSError: if no child could be started.
        """
        status, output, errors = await _run_child(folder, timeout_s, self._tenant_keys)
        verdict = read_verdict(status, output, errors)
        if status != KILLED:
            del self._kills[folder]
        else:
            self._kills[folder] += 1
        if verdict.is_transient and self._kills[folder] < KILLS_MAX:
            raise MeshError(Code.UNAVAILABLE, f"its gate came to no end and is tried again: {verdict.error}")
        if not verdict.ok:
            del self._kills[folder]
            raise MeshError(Code.UNTRUSTED, f"it did not pass the gate: {verdict.error}")


async def _run_child(folder: Path, timeout_s: float, tenant_keys: Path | None) -> tuple[int, bytes, bytes]:
    """Exit status, and the end of what the child wrote to stdout and stderr."""
    child = await asyncio.create_subprocess_exec(
        *gate_command(folder, tenant_keys=tenant_keys),
        env=gate_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await asyncio.gather(_read_tail(child.stdout), _read_tail(child.stderr))
            status = await child.wait()
    except TimeoutError:
        raise MeshError(Code.UNTRUSTED, f"its gate took longer than {timeout_s:g} s.") from None
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    return status, output, errors


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    """The last bytes of a stream, however much comes."""
    tail = b""
    while piece := await stream.read(OUTPUT_BYTES_MAX):
        tail = (tail + piece)[-OUTPUT_BYTES_MAX:]
    return tail
