"""A node whose model takes a known time: `python -m benchmarks.live_node FOLDER SCENARIO SEED NAME PORT`.

Everything about it is real (process, mutual TLS, transport, reports) but the model, which sleeps as long as the
simulator's workload says for this request on this node, and the distance, which a proxy in front of it keeps.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.identity import load_identity
from nearcast.load import NodeReport, VersionReport
from nearcast.runtime import announce
from nearcast.transport.grpc import make_server
from nearcast.transport.mesh import join_methods, mesh_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.service import InferenceService
from nearcast.wire.response import TensorResponse
from simulations.scenario import MODEL, VERSION, NodeSpec, Scenario
from simulations.workload import Luck, draw_workload

ROLES = {"local": "edge", "peer": "edge", "cloud": "cloud"}
_SAMPLES = 64
_READ_BYTES = 65_536


class SleepingModel:
    """First come, first served on the node's slots. What has begun runs to its end, whoever still wants it."""

    def __init__(self, spec: NodeSpec, luck: Luck) -> None:
        self._spec = spec
        self._luck = luck
        self._slots = asyncio.Semaphore(spec.slots)
        self._samples: deque[float] = deque([spec.service_s], maxlen=_SAMPLES)
        self._runs: set[asyncio.Task[None]] = set()
        self.in_flight = 0

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        """Sleep as long as this request has to."""
        seen, arrived = self.in_flight, time.monotonic()
        if seen >= self._spec.slots + self._spec.queue_max:
            raise MeshError(Code.OVERLOADED, "The queue is full; ask another node.", retry_after_ms=20)
        self.in_flight += 1
        try:
            await self._slots.acquire()
        except asyncio.CancelledError:
            self.in_flight -= 1
            raise
        began = time.monotonic()
        run = asyncio.get_running_loop().create_task(self._run(request.id, began))
        self._runs.add(run)
        run.add_done_callback(self._runs.discard)
        await asyncio.shield(run)
        served = Served(
            node=self._spec.name,
            tier=self._spec.tier,
            version=VERSION,
            queue_us=int((began - arrived) * 1e6),
            compute_us=int((time.monotonic() - began) * 1e6),
            in_flight=seen,
        )
        x = request.decode()["x"]
        return TensorResponse(model=MODEL, version=VERSION, outputs={"y": x}, id=request.id, served=served)

    async def _run(self, request_id: str, began: float) -> None:
        known = request_id.isdecimal() and int(request_id) < len(self._luck.work_s)
        index = int(request_id) if known else 0
        await asyncio.sleep(self._luck.work_s[index] + self._luck.stall_s[index])
        self._samples.append(time.monotonic() - began)
        self.in_flight -= 1
        self._slots.release()

    def stream(self, requests: AsyncIterator[InferRequest], context: RequestContext) -> AsyncIterator[InferResponse]:
        """No streams here."""
        raise MeshError(Code.UNSUPPORTED, "This node answers unary calls only.")

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        """One tensor in, the same out."""
        spec = TensorSpec("x", "UINT8", (-1,))
        return ModelMetadata(name=MODEL, versions=(VERSION,), platform="sleep", inputs=(spec,), outputs=(spec,))

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        """Always."""
        return True

    def report(self) -> NodeReport:
        """What the node has measured of itself."""
        p50_us, p95_us = (float(q) * 1e6 for q in np.quantile(self._samples, (0.5, 0.95)))
        version = VersionReport(
            model=MODEL, version=VERSION, in_flight=self.in_flight, service_p50_us=p50_us, service_p95_us=p95_us
        )
        return NodeReport(
            node=self._spec.name,
            role=ROLES[self._spec.tier],
            slots=self._spec.slots,
            in_flight=self.in_flight,
            versions=(version,),
        )


class DelayProxy:
    """Passes bytes on `delay_s` later, each way."""

    def __init__(self, upstream: str, delay_s: float) -> None:
        self._host, _, port = upstream.rpartition(":")
        self._port = int(port)
        self._delay_s = delay_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._sinks: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def listen(self, port: int) -> str:
        """Begin; returns the address."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", port)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Cut all connections."""
        if self._server is not None:
            self._server.close()
        for sink in self._sinks:
            sink.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *(sink.wait_closed() for sink in self._sinks), return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        self._sinks += (back, writer)
        for source, sink in ((reader, back), (there, writer)):
            chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
            for work in (self._read(source, chunks), self._write(chunks, sink)):
                task = asyncio.get_running_loop().create_task(work)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _read(self, source: asyncio.StreamReader, chunks: asyncio.Queue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = await source.read(_READ_BYTES)
            except OSError:
                data = b""
            chunks.put_nowait((time.monotonic() + self._delay_s, data))

    async def _write(self, chunks: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        while True:
            due, data = await chunks.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not data:
                sink.close()
                return
            sink.write(data)


async def main(folder: Path, scenario: Scenario, seed: int, name: str, port: int) -> None:
    """Serve until the process is ended."""
    spec = next(node for node in scenario.nodes if node.name == name)
    model = SleepingModel(spec, draw_workload(scenario, seed).luck[name])
    methods = join_methods(
        oip_methods(InferenceService(model, model, server_name=name), trusted=True), mesh_methods(model.report)
    )
    identity = load_identity(folder / name)
    server = make_server("ngh2", methods, address="127.0.0.1:0", identity=identity, require_client=True)
    await server.start()
    proxy = DelayProxy(server.address, spec.rtt_ms / 2e3)
    announce(name, mesh=await proxy.listen(port))
    await asyncio.Event().wait()


if __name__ == "__main__":
    place, text, seed_text, own_name, port_text = sys.argv[1:]
    loaded = msgspec.json.decode(text, type=Scenario)
    asyncio.run(main(Path(place), loaded, int(seed_text), own_name, int(port_text)))
