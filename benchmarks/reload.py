"""Memory over many loads and unloads: a real host follows a store's pointers, on and off, and answers in between.

`python -m benchmarks.reload FOLDER KIND CYCLES` is the child whose resident memory is watched.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.footprint import read_memory_bytes
from benchmarks.rows import Row
from benchmarks.silero_size import HIDDEN
from nearcast.handler import RequestContext
from nearcast.serving import HostLimits, ModelHost
from nearcast.store import Pointer, Store
from nearcast.wire.request import TensorRequest

KINDS = ("onnx_static", "onnx_dynamic", "litert")
WARM_UP_SHARE = 0.3
"""First cycles, in which heaps and caches find their size, are not judged."""
TIMEOUT_S = 900.0


def run(*, quick: bool) -> list[Row]:
    """One child for each kind of model."""
    from benchmarks.reload_models import fill_store

    cycles = 120 if quick else 500
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = fill_store(Path(folder))
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.reload", str(store.root), kind, str(cycles)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
            resident = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
            judged = resident[int(WARM_UP_SHARE * cycles) :]
            note = f"{cycles} cycles; {judged[0] / 1e6:.1f} MB after warm-up, {judged[-1] / 1e6:.1f} MB at the end"
            rows.append(Row(f"reload.{kind}_kb_per_cycle", slope(judged) / 1e3, "kB", note))
    rows.append(Row("reload.worst_kb_per_cycle", max(row.value for row in rows), "kB", "RSS, Theil-Sen slope"))
    return rows


def slope(values: Sequence[float]) -> float:
    """Theil-Sen: the median of the slopes of all pairs. A few outliers, or one step, do not move it."""
    heights = np.asarray(values, float)
    first, second = np.triu_indices(len(heights), 1)
    return float(np.median((heights[second] - heights[first]) / (second - first)))


async def cycle(store: Store, kind: str, cycles: int) -> list[int]:
    """Resident bytes after each cycle."""
    registry = CollectorRegistry()
    host = ModelHost(store, node="bench", limits=HostLimits(inline_us_max=0.0), registry=registry)
    await host.start()
    resident = []
    for _ in range(cycles):
        store.write_pointer(kind, Pointer(stable=1))
        await host.refresh(kind)
        for inputs in make_inputs(kind):
            await host.infer(TensorRequest(model=kind, inputs=inputs), RequestContext())
        generate_latest(registry)
        store.write_pointer(kind, Pointer())
        await host.refresh(kind)
        while host._residency._tasks:
            await asyncio.sleep(0.001)
        resident.append(read_memory_bytes("self"))
    await host.close()
    return resident


def make_inputs(kind: str) -> list[dict[str, Any]]:
    """The requests of one cycle."""
    if kind == "litert":
        return [{"input_audio": np.zeros((1, 3, 40), np.int8)}] * 3
    rows = (1, 1, 1) if kind == "onnx_static" else (1, 7, 32, 3, 19)
    return [{"input": np.zeros((n, 576), np.float32), "state": np.zeros((2, n, HIDDEN), np.float32)} for n in rows]


def main() -> None:
    folder, kind, cycles = sys.argv[1:]
    print(json.dumps(asyncio.run(cycle(Store(Path(folder)), kind, int(cycles)))), flush=True)


if __name__ == "__main__":
    main()
