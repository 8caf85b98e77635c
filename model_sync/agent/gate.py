"""The gate: load the staged version and run its golden vectors in a child, where a crash harms nobody."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

from nearcast.errors import Code, MeshError
from nearcast.serving.gate_child import gate_command, gate_environment, read_verdict

OUTPUT_BYTES_MAX = 64 * 1024


async def run_gate(folder: Path, *, timeout_s: float) -> None:
    """Return if the version in `folder` passes. A cancelled caller takes the child with it.

    Raises:
        MeshError: UNTRUSTED with the gate's reason, also if the child crashed or took longer than `timeout_s`.
        OSError: if no child could be started.
    """
    child = await asyncio.create_subprocess_exec(
        *gate_command(folder),
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
    verdict = read_verdict(status, output, errors)
    if not verdict.ok:
        raise MeshError(Code.UNTRUSTED, f"it did not pass the gate: {verdict.error}")


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    """The last bytes of a stream, however much comes."""
    tail = b""
    while piece := await stream.read(OUTPUT_BYTES_MAX):
        tail = (tail + piece)[-OUTPUT_BYTES_MAX:]
    return tail
