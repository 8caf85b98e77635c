"""What is fuzzed: `python -m benchmarks.fuzz_child serve` listens on sockets; `drive KIND SEED COUNT` feeds itself.

`drive` runs the same protocol objects as a listener would, on a transport that is memory: ten times as many connections
in the same time. Both count what a crash would be: an error that leaves a protocol object or reaches the loop, a task
that nobody awaits, a request that fails inside.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias, cast

import ngh2
import uvloop

from benchmarks.fuzz_mutations import Conversation, mutate, record_http2, record_rest
from benchmarks.router_node import EchoModel
from nearcast.handler import InferRequest, InferResponse, RequestContext, Served
from nearcast.runtime.descriptors import raise_descriptors
from nearcast.transport.ngh2_server import Ngh2Server
from nearcast.transport.ngh2_server_connection import ServerConnection
from nearcast.transport.ngh2_server_state import ServerState
from nearcast.transport.oip import oip_methods
from nearcast.transport.rest import RestServer
from nearcast.transport.seam import Limits, Methods
from nearcast.transport.service import InferenceService
from nearcast.wire.response import TensorResponse

LIMITS = Limits(message_size_bytes_max=1 << 20, handshake_timeout_s=2.0, upload_timeout_s=2.0, stall_timeout_s=2.0)
PROBE_INTERVAL = 500
SAMPLES = 40


class Model(EchoModel):
    """Answers with what it gets, one by one or as a stream."""

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        served = Served(node="fuzz", version="1")
        return TensorResponse(model="echo", version="1", outputs=dict(request.decode()), served=served)

    async def stream(
        self, requests: AsyncIterator[InferRequest], context: RequestContext
    ) -> AsyncIterator[InferResponse]:
        async for request in requests:
            yield await self.infer(request, context)


class Crashes(logging.Handler):
    """Counts what must not happen; keeps the first few."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0
        self.first: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.note(f"{record.name}: {record.getMessage()} {record.exc_info and record.exc_info[1]!r}")

    def note(self, what: str) -> None:
        self.count += 1
        if len(self.first) < 5:
            self.first.append(what[:500])

    def hear(self, loop: asyncio.AbstractEventLoop) -> None:
        logging.getLogger().addHandler(self)
        loop.set_exception_handler(lambda _, context: self.note(f"loop: {context}"))


Talker: TypeAlias = asyncio.Protocol | asyncio.BufferedProtocol
"""A connection's end under test."""


class Memory(asyncio.Transport):
    """A transport that keeps what was written."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: Talker) -> None:
        super().__init__()
        self._loop = loop
        self._protocol: asyncio.BaseProtocol = protocol
        self._closed = False
        self.written = bytearray()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def feed(self, data: bytes) -> None:
        """Give the protocol bytes as a loop does: no more at once than it has room for."""
        while data and not self._closed:
            match self._protocol:
                case asyncio.BufferedProtocol() as protocol:
                    room = memoryview(protocol.get_buffer(-1))
                    size = min(len(room), len(data))
                    room[:size] = data[:size]
                    protocol.buffer_updated(size)
                    data = data[size:]
                case asyncio.Protocol() as protocol:
                    protocol.data_received(data)
                    return

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closed:
            self.written += data

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self._closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default


def make_methods() -> Methods:
    model = Model()
    return oip_methods(InferenceService(model, model, server_name="fuzz"), trusted=False)


async def make_factory(kind: str) -> tuple[Callable[[], Talker], list[Conversation]]:
    """Makes the protocol objects of one kind of listener, and what good conversations with it are."""
    loop = asyncio.get_running_loop()
    if kind == "h2":
        state = ServerState(methods=make_methods(), limits=LIMITS)
        return lambda: ServerConnection(state, loop), record_http2()
    model = Model()
    server = RestServer(InferenceService(model, model, server_name="fuzz"), address="127.0.0.1:0", limits=LIMITS)
    runner = await server._make_runner()
    return cast("Callable[[], Talker]", runner.server), record_rest()


async def drive(kind: str, seed: int, count: int) -> None:
    """Feed `count` mutated connections and print what was seen as JSON."""
    loop = asyncio.get_running_loop()
    crashes = Crashes()
    crashes.hear(loop)
    factory, good = await make_factory(kind)
    rng = random.Random(seed)
    warm_up = max(1, count // 5)
    every = max(1, (count - warm_up) // SAMPLES)
    samples: list[tuple[int, int]] = []
    probes = failed = 0
    for done in range(count):
        pieces = mutate(rng.choice(good), good, rng)
        try:
            await converse(factory, loop, pieces)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            crashes.note(f"seed {seed} connection {done}: {error!r}")
        if done % PROBE_INTERVAL == 0:
            probes += 1
            failed += not await answers(kind, factory, loop, good[0])
        if done >= warm_up and done % every == 0:
            gc.collect()
            samples.append((done, rss_bytes()))
    gc.collect()
    await asyncio.sleep(0)
    print(
        json.dumps(
            {
                "connections": count,
                "crashes": crashes.count,
                "first": crashes.first,
                "probes": probes,
                "probes_failed": failed,
                "samples": samples,
                "tasks": len(asyncio.all_tasks()) - 1,
            }
        ),
        flush=True,
    )


async def converse(
    factory: Callable[[], Talker], loop: asyncio.AbstractEventLoop, pieces: list[bytes], *, turns: int = 2
) -> bytes:
    """One connection from its first byte to its loss."""
    protocol = factory()
    transport = Memory(loop, protocol)
    protocol.connection_made(transport)
    for piece in pieces:
        # The server of HTTP/1.1 begins to wait in the turn after that of its connection.
        await asyncio.sleep(0)
        transport.feed(piece)
    await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    transport.close()
    await asyncio.sleep(0)
    return bytes(transport.written)


async def answers(
    kind: str, factory: Callable[[], Talker], loop: asyncio.AbstractEventLoop, good: Conversation
) -> bool:
    """Whether an honest conversation is still answered as it should be."""
    written = await converse(factory, loop, list(good), turns=20)
    if kind != "h2":
        return written.startswith(b"HTTP/1.1 200")
    client = ngh2.Connection(ngh2.Role.CLIENT)
    client.initiate_connection({})
    client.send_request([(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"x")])
    client.data_to_send()
    client.receive_data(written)
    found = [event for event in client.events() if isinstance(event, ngh2.TrailersReceived)]
    return bool(found) and dict(found[0].headers).get(b"grpc-status") == b"0"


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def serve() -> None:
    """Listen on sockets until told to stop; then say how many crashes there were."""
    raise_descriptors()
    loop = asyncio.get_running_loop()
    crashes = Crashes()
    crashes.hear(loop)
    model = Model()
    h2 = Ngh2Server(make_methods(), address="127.0.0.1:0", limits=LIMITS)
    rest = RestServer(InferenceService(model, model, server_name="fuzz"), address="127.0.0.1:0", limits=LIMITS)
    await h2.start()
    await rest.start()
    print(json.dumps({"h2": h2.address, "rest": rest.address}), flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    print(json.dumps({"crashes": crashes.count, "first": crashes.first}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        uvloop.run(serve())
    else:
        uvloop.run(drive(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
