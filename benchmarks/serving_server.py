"""`python -m benchmarks.serving_server ROOT MODEL loop|ngh2|aio [BATCH_ROWS_MAX]`: time the engine, or serve it.

`aio` is a plain server of grpc.aio with the same host behind it. Both serve REST too.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop

from benchmarks.serving_models import workloads
from nearcast.handler import Tensors
from nearcast.runtime import announce
from nearcast.serving.engines import LoadedModel, load_engine
from nearcast.serving.host import ModelHost
from nearcast.serving.joining import join
from nearcast.serving.limits import HostLimits
from nearcast.serving.signature import Signature
from nearcast.store import Store
from nearcast.store.contents import Contents
from nearcast.transport.grpc import make_server
from nearcast.transport.oip import MODEL_INFER, oip_methods
from nearcast.transport.rest import RestServer
from nearcast.transport.seam import Call, Methods
from nearcast.transport.service import InferenceService

LOOP_S, ROUNDS = 0.8, 5
BATCH_ROWS, PAUSE_S = 16, 0.0003


def time_engine(store: Store, name: str) -> dict[str, float]:
    """The bare engine: `time_loop`, a row of a batch (0 if there are none), and a run after a pause."""
    workload = next(each for each in workloads() if each.name == name)
    manifest = store.manifest(name, 1)
    engine = load_engine(Contents(manifest, store.folder(name, 1)), threads=1)
    inputs = workload.arrays()
    loop_us, cpu_us = time_loop(engine, inputs, workload.engine_us)
    axes = Signature(manifest).input_axes
    row_us = 0.0
    if axes:
        joined = join([inputs] * BATCH_ROWS, axes)
        row_us = time_loop(engine, joined, workload.engine_us * BATCH_ROWS)[0] / BATCH_ROWS
    paused_us = time_loop(engine, inputs, workload.engine_us, pause_s=PAUSE_S)[1]
    return {"loop_us": loop_us, "cpu_us": cpu_us, "row_us": row_us, "paused_cpu_us": paused_us}


def time_loop(engine: LoadedModel, inputs: Tensors, engine_us: float, *, pause_s: float = 0.0) -> tuple[float, float]:
    """Microseconds of one in-process run, the limit at batch 1: the median of some rounds, and its processor time."""
    calls = max(10, int(LOOP_S / ROUNDS * 1e6 / engine_us))
    rounds = []
    used = 0.0
    for number in range(ROUNDS + 1):
        used = time.process_time() if number == 1 else used
        began = time.perf_counter()
        for _ in range(calls):
            engine.run(inputs)
            if pause_s:
                time.sleep(pause_s)
        rounds.append((time.perf_counter() - began) / calls * 1e6)
    return statistics.median(rounds[1:]), (time.process_time() - used) / calls / ROUNDS * 1e6


class PlainMethods(grpc.GenericRpcHandler):
    """ModelInfer for grpc.aio: bytes in, bytes out, the same method behind."""

    def __init__(self, methods: Methods) -> None:
        self._infer = methods.unary[MODEL_INFER]

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer) if details.method == MODEL_INFER else None

    async def _answer(self, body: bytes, _: Any) -> bytes:
        return b"".join((await self._infer(body, Call(method=MODEL_INFER))).body)


async def serve(store: Store, kind: str, limits: HostLimits) -> None:
    """The real host behind the real transports, on loopback."""
    host = ModelHost(store, node="bench", limits=limits)
    await host.start()
    methods = oip_methods(InferenceService(host, host, server_name="bench"), trusted=False)
    rest = RestServer(InferenceService(host, host, server_name="bench"), address="127.0.0.1:0")
    await rest.start()
    if kind == "aio":
        plain = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
        plain.add_generic_rpc_handlers((PlainMethods(methods),))
        address = f"127.0.0.1:{plain.add_insecure_port('127.0.0.1:0')}"
        await plain.start()
    else:
        server = make_server("ngh2", methods, address="127.0.0.1:0")
        await server.start()
        address = server.address
    announce("serving", grpc=address, rest=f"http://{rest.address}")
    await asyncio.Event().wait()


def main() -> None:
    store, name, kind = Store(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
    if kind == "loop":
        print(json.dumps(time_engine(store, name)), flush=True)
        return
    limits = HostLimits(batch_rows_max=int(sys.argv[4])) if len(sys.argv) > 4 else HostLimits()
    uvloop.run(serve(store, kind, limits))


if __name__ == "__main__":
    main()
