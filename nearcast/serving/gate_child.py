"""How the gate's child is started and what its end means. Light: the agent, which loads no engine, starts it too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

ERROR_CHARS_MAX = 2000
_SIGNALS = {-9: "was killed (out of memory?)", -11: "crashed", -6: "aborted", -24: "used too much CPU time"}


class GateLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the child may use. `address_space_bytes_max` counts reserved memory too, so it must be generous."""

    timeout_s: float = 90.0
    cpu_s_max: int = 60
    address_space_bytes_max: int = 4 * 1024**3
    file_size_bytes_max: int = 1024 * 1024
    threads: int = 1


class GateResult(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict. `p50_us` is the median golden run; `vectors` how many were checked; `load_ms` the time to load."""

    ok: bool
    error: str = ""
    p50_us: float = 0.0
    load_ms: float = 0.0
    vectors: int = 0


def run_gate(folder: Path, limits: GateLimits | None = None) -> GateResult:
    """Check a version in a child process. Blocks for at most `timeout_s`; never raises for what the child does."""
    limits = limits or GateLimits()
    command, environ = gate_command(folder, limits), gate_environment()
    try:
        done = subprocess.run(command, capture_output=True, env=environ, timeout=limits.timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return GateResult(ok=False, error=f"The check took longer than {limits.timeout_s:g} s.")
    return read_verdict(done.returncode, done.stdout, done.stderr)


def gate_command(folder: Path, limits: GateLimits | None = None) -> list[str]:
    """The child that checks the version in `folder`."""
    command = [sys.executable, "-m", "nearcast.serving.gate", str(folder), "--json"]
    return [*command, f"--limits={msgspec.json.encode(limits or GateLimits()).decode()}"]


def gate_environment() -> dict[str, str]:
    """Nothing secret, and the same packages whatever the working directory is."""
    root = Path(__file__).resolve().parents[2]
    return {
        "PATH": os.environ.get("PATH", ""),
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", "")))),
        # Thread pools of BLAS reserve address space for each core.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def read_verdict(status: int, output: bytes, errors: bytes) -> GateResult:
    """What a child that has ended says. One that crashed, or says nothing, has refused the version.

    Args:
        status: its exit status, negative for a signal.
        output: the end of its stdout.
        errors: the end of its stderr.
    """
    try:
        result = msgspec.json.decode(output.strip().rsplit(b"\n", 1)[-1], type=GateResult)
    except msgspec.DecodeError:
        said = errors.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        how = _SIGNALS.get(status, f"ended with status {status}")
        return GateResult(ok=False, error=f"The checking process {how}. {said}"[:ERROR_CHARS_MAX].strip())
    if result.ok and status != 0:
        return GateResult(ok=False, error=f"The checking process ended with status {status}.")
    return result
