"""How long until a first answer: of a new process, and of a model that is on disk only."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.foreign import call
from benchmarks.processes import serve
from benchmarks.rows import Row
from benchmarks.serving import PATH
from benchmarks.silero_size import NAME, fill_store, make_inputs
from nearcast.handler import RequestContext
from nearcast.serving.host import ModelHost
from nearcast.store import Store
from nearcast.wire.request import TensorRequest


def run(*, quick: bool) -> list[Row]:
    """Medians over a few starts."""
    rounds = 3 if quick else 9
    message = TensorRequest(model=NAME, inputs=make_inputs()).encode()
    starts, answers = [], []
    with tempfile.TemporaryDirectory() as folder:
        store, _ = fill_store(Path(folder))
        for _ in range(rounds):
            began = time.perf_counter()
            with serve("benchmarks.serving_server", str(store.root), "serve", cpu=None) as ready:
                starts.append((time.perf_counter() - began) * 1e3)
                call(ready["address"], PATH, message)
                answers.append((time.perf_counter() - began) * 1e3)
        cold = [asyncio.run(measure_model(store)) for _ in range(rounds)]
    return [
        Row(
            "coldstart.process_to_ready_ms",
            statistics.median(starts),
            "ms",
            "interpreter start to listening, model warm",
        ),
        Row("coldstart.process_to_answer_ms", statistics.median(answers), "ms", "and one foreign client's answer"),
        Row("coldstart.model_to_answer_ms", statistics.median(cold), "ms", "1.3 MB model on disk to first answer"),
    ]


async def measure_model(store: Store) -> float:
    """Milliseconds from a host's refresh to its first answer."""
    host = ModelHost(store, node="bench")
    began = time.perf_counter()
    await host.start()
    await host.infer(TensorRequest(model=NAME, inputs=make_inputs()), RequestContext())
    took_ms = (time.perf_counter() - began) * 1e3
    await host.close()
    return took_ms
