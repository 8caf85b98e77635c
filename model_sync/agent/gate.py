"""The gate: load the staged version and run its golden vectors in a child, where a crash harms nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

import nearcast
from nearcast.errors import Code, MeshError

OUTPUT_BYTES_MAX = 64 * 1024
REASON_CHARACTERS_MAX = 500


async def run_gate(folder: Path, *, timeout_s: float) -> None:
    """Return if the version in `folder` passes.

    Raises:
        MeshError: UNTRUSTED with the gate's reason, also if the child crashed or took longer than `timeout_s`.
        OSError: if no child could be started.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "nearcast.serving.gate",
        str(folder),
        "--json",
        env=_environment(),
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
    if status != 0:
        raise MeshError(Code.UNTRUSTED, f"it did not pass the gate: {_reason(status, output, errors)}")


def _environment() -> dict[str, str]:
    """Nothing secret, and the same packages whatever the working directory is."""
    root = str(Path(nearcast.__file__).resolve().parents[1])
    paths = (root, os.environ.get("PYTHONPATH", ""))
    return {
        "PATH": os.environ.get("PATH", ""),
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    """The last bytes of a stream, however much comes."""
    tail = b""
    while piece := await stream.read(OUTPUT_BYTES_MAX):
        tail = (tail + piece)[-OUTPUT_BYTES_MAX:]
    return tail


def _reason(status: int, output: bytes, errors: bytes) -> str:
    if status < 0:
        return f"loading it crashed the process with signal {-status}."
    try:
        answer = msgspec.json.decode(output.strip().splitlines()[-1], type=dict[str, object])
        reason = str(answer.get("error") or answer.get("reason") or "")
    except (msgspec.DecodeError, IndexError):
        reason = ""
    if not reason:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {status}"
    return reason.rstrip(".")[:REASON_CHARACTERS_MAX] + "."
