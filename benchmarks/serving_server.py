"""`python -m benchmarks.serving_server ROOT loop|serve`: time the bare engine loop, or serve the model over gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path

import uvloop

from benchmarks.silero_size import NAME, make_inputs
from nearcast.serving.engines import load_engine
from nearcast.serving.host import ModelHost
from nearcast.store import Store
from nearcast.store.contents import Contents
from nearcast.transport.grpc import make_server
from nearcast.transport.oip import oip_methods

ROUNDS, CALLS = 7, 500


def time_loop(store: Store) -> float:
    """Median microseconds of one in-process run: the limit at batch 1."""
    engine = load_engine(Contents(store.manifest(NAME, 1), store.folder(NAME, 1)), threads=1)
    inputs = make_inputs()
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            engine.run(inputs)
        rounds.append((time.perf_counter() - began) / CALLS * 1e6)
    return statistics.median(rounds[1:])


async def serve(store: Store) -> None:
    """The real host behind the real transport, on loopback."""
    host = ModelHost(store, node="bench")
    await host.start()
    server = make_server("ngh2", oip_methods(host, host, server_name="bench", trusted=False), address="127.0.0.1:0")
    await server.start()
    print(json.dumps({"address": server.address, "pid": os.getpid()}), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    store = Store(Path(sys.argv[1]))
    if sys.argv[2] == "loop":
        print(json.dumps({"loop_us": time_loop(store)}), flush=True)
    else:
        uvloop.run(serve(store))


if __name__ == "__main__":
    main()
