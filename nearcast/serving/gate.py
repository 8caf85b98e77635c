"""The last check before a version may serve: format, load, golden vectors, latency; in a child process with limits.

`python -m nearcast.serving.gate FOLDER` is the child: it prints one JSON object and exits with 0 or 1. `run_gate`
starts it; a child that crashes, hangs or eats memory has refused the version just as well.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors
from nearcast.serving.engines import LoadedModel, Runner, load_engine
from nearcast.serving.formats import require_format
from nearcast.serving.golden import difference, read_tensors
from nearcast.serving.joining import join, split
from nearcast.serving.signature import Signature
from nearcast.store.manifest import Manifest, decode_manifest

RUNS_PER_VECTOR = 5
_OUTPUT_CHARS_MAX = 2000
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
    root = Path(__file__).resolve().parents[2]
    environ = {
        "PATH": os.environ.get("PATH", ""),
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", "")))),
        # Thread pools of BLAS reserve address space for each core.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "nearcast.serving.gate", str(folder), "--json"]
    command.append(f"--limits={msgspec.json.encode(limits).decode()}")
    try:
        done = subprocess.run(command, capture_output=True, env=environ, timeout=limits.timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return GateResult(ok=False, error=f"The check took longer than {limits.timeout_s:g} s.")
    try:
        result = msgspec.json.decode(done.stdout.strip().rsplit(b"\n", 1)[-1], type=GateResult)
    except msgspec.DecodeError:
        said = done.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        how = _SIGNALS.get(done.returncode, f"ended with status {done.returncode}")
        return GateResult(ok=False, error=f"The checking process {how}. {said}"[:_OUTPUT_CHARS_MAX].strip())
    if result.ok and done.returncode != 0:
        return GateResult(ok=False, error=f"The checking process ended with status {done.returncode}.")
    return result


def check(folder: Path, *, threads: int = 1) -> GateResult:
    """Check a version in this process.

    Raises:
        MeshError: UNTRUSTED with the reason why the version is refused.
    """
    try:
        manifest = decode_manifest((folder / "manifest.json").read_bytes())
    except OSError as error:
        raise MeshError(Code.UNTRUSTED, "The folder has no readable manifest.json.") from error
    require_format(manifest, folder)
    started = time.perf_counter()
    engine = load_engine(manifest, folder, threads=threads)
    load_ms = (time.perf_counter() - started) * 1000
    vectors = [(read_tensors(folder, v.inputs), read_tensors(folder, v.outputs), v.atol) for v in manifest.golden]
    signature = Signature(manifest)
    for index, (inputs, outputs, _) in enumerate(vectors):
        try:
            signature.require(inputs)
            signature.require_outputs(list(outputs))
        except MeshError as error:
            raise MeshError(Code.UNTRUSTED, f"Golden vector {index}: {error.message}") from error
    times = _run_vectors(manifest, engine, vectors)
    if signature.batchable:
        _require_batches(engine, signature, vectors)
    p50_us = float(np.median(times)) if times else 0.0
    if p50_us > manifest.latency_budget_ms * 1000:
        raise MeshError(
            Code.UNTRUSTED,
            f"A golden run takes {p50_us / 1000:.1f} ms, over the budget of {manifest.latency_budget_ms:g} ms.",
        )
    return GateResult(ok=True, p50_us=round(p50_us, 1), load_ms=round(load_ms, 1), vectors=len(vectors))


def _run_vectors(
    manifest: Manifest, engine: LoadedModel, vectors: Sequence[tuple[Tensors, Tensors, float]]
) -> list[float]:
    """Times in µs of all runs but the first of each round, which pays for the memory."""
    times: list[float] = []
    hidden = manifest.stateful == "hidden"
    for turn in range(RUNS_PER_VECTOR):
        runner: Runner = engine.new_sequence() if hidden else engine
        for index, (inputs, expected, atol) in enumerate(vectors):
            started = time.perf_counter()
            outputs = runner.run(inputs)
            took_us = (time.perf_counter() - started) * 1e6
            if wrong := difference(expected, outputs, atol):
                raise MeshError(Code.UNTRUSTED, f"Golden vector {index}: {wrong}.")
            if turn and (index or not hidden):
                times.append(took_us)
    return times


def _require_batches(
    engine: LoadedModel, signature: Signature, vectors: Sequence[tuple[Tensors, Tensors, float]]
) -> None:
    """A declared batch axis is a promise: two requests joined must give what they give alone."""
    for index, (inputs, expected, atol) in enumerate(vectors):
        rows = signature.rows(inputs)
        outputs = engine.run(join([inputs, inputs], signature.input_axes))
        for part in split(outputs, [rows, rows], signature.output_axes):
            if wrong := difference(expected, part, atol):
                raise MeshError(Code.UNTRUSTED, f"Golden vector {index} in a batch of two: {wrong}.")


def _confine(limits: GateLimits) -> None:
    """From here on the process can neither grow, spin, write large files nor leave a core behind."""
    for kind, bound in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, limits.cpu_s_max),
        (resource.RLIMIT_FSIZE, limits.file_size_bytes_max),
        (resource.RLIMIT_AS, limits.address_space_bytes_max),
    ):
        hard = resource.getrlimit(kind)[1]
        lowered = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (lowered, lowered))


def main(arguments: list[str]) -> int:
    """Entry of the child: `FOLDER [--json] [--limits=JSON]`; 0 = may serve, 1 = refused, 2 = wrong usage."""
    folders = [argument for argument in arguments if not argument.startswith("--")]
    options = {name: value for name, _, value in (a.partition("=") for a in arguments if a.startswith("--"))}
    if len(folders) != 1 or options.keys() - {"--json", "--limits"}:
        sys.stderr.write("usage: python -m nearcast.serving.gate FOLDER [--json] [--limits=JSON]\n")
        return 2
    limits = msgspec.json.decode(options.get("--limits", "{}"), type=GateLimits)
    _confine(limits)
    try:
        result = check(Path(folders[0]), threads=limits.threads)
    except MeshError as error:
        result = GateResult(ok=False, error=error.message)
    except (MemoryError, OSError, ValueError) as error:
        result = GateResult(ok=False, error=f"The version cannot be checked: {type(error).__name__}.")
    if "--json" in options:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        sys.stdout.write(f"{'ok' if result.ok else 'refused'}: {_describe(result)}\n")
    return 0 if result.ok else 1


def _describe(result: GateResult) -> Any:
    return result.error or f"{result.vectors} golden vectors, p50 {result.p50_us:g} us, loaded in {result.load_ms:g} ms"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
