"""The last check before a version may serve: format, load, golden vectors, latency; in a child process with limits.

`python -m nearcast.serving.gate FOLDER` is the child: it prints one JSON object and exits with 0 or 1.
`nearcast.serving.gate_child` starts it; a child that crashes, hangs or eats memory has refused the version as well.
Format check, engine and golden vectors see one and the same bytes, those that were hashed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors
from nearcast.serving.confinement import confine
from nearcast.serving.engines import LoadedModel, Runner, load_engine
from nearcast.serving.formats import require_format
from nearcast.serving.gate_child import GateLimits, GateResult
from nearcast.serving.golden import difference, read_tensors
from nearcast.serving.joining import join, split
from nearcast.serving.signature import Signature
from nearcast.store.contents import Contents
from nearcast.store.manifest import MANIFEST_FILE, Manifest, decode_manifest

RUNS_PER_VECTOR = 5
TRANSIENT = (Code.UNAUTHENTICATED, Code.UNAVAILABLE)
"""Codes that speak about this node and not about the version."""
USAGE = "FOLDER [--json] [--limits=JSON] [--tenant-keys=FOLDER]"


def check(folder: Path, *, threads: int = 1, tenant_keys: Path | None = None) -> GateResult:
    """Check a version in this process.

    Args:
        folder: the version.
        threads: of one run.
        tenant_keys: folder with the tenants' keys, for a sealed version.

    Raises:
        MeshError: UNTRUSTED with the reason why the version is refused; UNAUTHENTICATED or UNAVAILABLE if this node
            cannot check it.
    """
    try:
        manifest = decode_manifest((folder / MANIFEST_FILE).read_bytes())
    except OSError as error:
        raise MeshError(Code.UNTRUSTED, "The folder has no readable manifest.json.") from error
    contents = Contents(manifest, folder, tenant_keys=tenant_keys)
    require_format(contents)
    started = time.perf_counter()
    engine = load_engine(contents, threads=threads)
    load_ms = (time.perf_counter() - started) * 1000
    vectors = [(read_tensors(contents, v.inputs), read_tensors(contents, v.outputs), v.atol) for v in manifest.golden]
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


def main(arguments: list[str]) -> int:
    """Entry of the child: `FOLDER` and options; 0 = may serve, 1 = refused, 2 = wrong usage."""
    folders = [argument for argument in arguments if not argument.startswith("--")]
    options = {name: value for name, _, value in (a.partition("=") for a in arguments if a.startswith("--"))}
    if len(folders) != 1 or options.keys() - {"--json", "--limits", "--tenant-keys"}:
        sys.stderr.write(f"usage: python -m nearcast.serving.gate {USAGE}\n")
        return 2
    limits = msgspec.json.decode(options.get("--limits", "{}"), type=GateLimits)
    confine(
        cpu_s_max=limits.cpu_s_max,
        address_space_bytes_max=limits.address_space_bytes_max,
        file_size_bytes_max=limits.file_size_bytes_max,
    )
    keys = options.get("--tenant-keys")
    try:
        result = check(Path(folders[0]), threads=limits.threads, tenant_keys=Path(keys) if keys else None)
    except MeshError as error:
        result = GateResult(ok=False, error=error.message, is_transient=error.code in TRANSIENT)
    except (MemoryError, OSError, ValueError) as error:
        # A disk that does not give the files is UNAVAILABLE; what is left are the child's own bounds.
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
