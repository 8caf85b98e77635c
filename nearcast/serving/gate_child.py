"""How the gate's child is started and what its end means. Light: the agent, which loads no engine, starts it too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

ERROR_CHARS_MAX = 2000
KILLED = -9
"""By the system, out of memory, or by somebody: the child's own bounds end it in other ways."""
_SIGNALS = {
    KILLED: "was killed (out of memory?)",
    -4: "crashed",
    -6: "aborted",
    -7: "crashed",
    -8: "crashed",
    -11: "crashed",
    -24: "used too much CPU time",
    -25: "wrote a large file",
}


class GateLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the child may use. `address_space_bytes_max` counts reserved memory too, so it must be generous."""

    timeout_s: float = 90.0
    cpu_s_max: int = 60
    address_space_bytes_max: int = 4 * 1024**3
    file_size_bytes_max: int = 1024 * 1024
    threads: int = 1


class GateResult(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict. `p50_us` is the median golden run; `vectors` how many were checked; `load_ms` the time to load.

    `is_transient`: the child came to no verdict for a reason that is not the version's; try again, a few times.
    """

    ok: bool
    error: str = ""
    is_transient: bool = False
    p50_us: float = 0.0
    load_ms: float = 0.0
    vectors: int = 0


def run_gate(folder: Path, limits: GateLimits | None = None, *, tenant_keys: Path | None = None) -> GateResult:
    """Check a version in a child process. Blocks for at most `timeout_s`; never raises for what the child does."""
    limits = limits or GateLimits()
    command, environ = gate_command(folder, limits, tenant_keys=tenant_keys), gate_environment()
    try:
        done = subprocess.run(command, capture_output=True, env=environ, timeout=limits.timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return GateResult(ok=False, error=f"The check took longer than {limits.timeout_s:g} s.")
    return read_verdict(done.returncode, done.stdout, done.stderr)


def gate_command(folder: Path, limits: GateLimits | None = None, *, tenant_keys: Path | None = None) -> list[str]:
    """The child that checks the version in `folder`. Of the tenants' keys it is told the folder alone."""
    command = [sys.executable, "-m", "nearcast.serving.gate", str(folder), "--json"]
    command += [f"--tenant-keys={tenant_keys}"] if tenant_keys else []
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
        reason = f"The checking process {describe_end(status)}. {said}"[:ERROR_CHARS_MAX].strip()
        return GateResult(ok=False, error=reason, is_transient=status == KILLED)
    if result.ok and status != 0:
        return GateResult(ok=False, error=f"The checking process ended with status {status}.")
    return result


def describe_end(status: int) -> str:
    """What an exit status of a confined child means, negative for a signal; goes after "The process …"."""
    return _SIGNALS.get(status, f"ended with status {status}")
