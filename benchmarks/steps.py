"""Bytecodes that one request takes here from its client's bytes to its answer's: no load on the machine changes them.

They say how much of a request is Python, and by whose hand; what C code does in between is not counted. Between
versions of Python the figures differ. `python -m benchmarks.steps` prints them function by function.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self, cast

import uvloop
from ngh2 import Configuration, Connection, Role, StreamClosed, TrailersReceived

import nearcast
from benchmarks.rows import Row
from benchmarks.silero_size import NAME, fill_store, make_inputs
from nearcast.serving.host import ModelHost
from nearcast.serving.limits import HostLimits
from nearcast.store import Store
from nearcast.transport.ngh2_headers import OK, request_prefix
from nearcast.transport.ngh2_server_connection import ServerConnection
from nearcast.transport.ngh2_server_state import ServerState
from nearcast.transport.oip import MODEL_INFER, oip_methods
from nearcast.transport.seam import Limits
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest

CROWD = 16
"""Requests in one read; together they are one run of the model."""
WARM_UP_ROUNDS, ROUNDS = 40, 10
_HERE = str(Path(nearcast.__file__).parent)


class Memory:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Nothing is known of a peer."""
        return default

    def set_write_buffer_limits(self, **_: int) -> None:
        """Everything is taken at once."""

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0

    def is_closing(self) -> bool:
        """It stays open."""
        return False

    def write(self, data: bytes) -> None:
        """Keep it for the client."""
        self.written.append(data)


class Client:
    """A client's end of the connection, so many requests at a time."""

    def __init__(self, server: ServerConnection, memory: Memory, *, timeout: bytes) -> None:
        self._server, self._memory = server, memory
        self._h2 = Connection(Role.CLIENT, Configuration())
        self._h2.initiate_connection({4: 1 << 24})
        self._h2.set_local_window_size(1 << 30)
        self._fields = [*request_prefix(MODEL_INFER, authority="here", is_tls=False)]
        self._fields += [(b"grpc-timeout", timeout)] if timeout else []

    async def ask(self, body: bytes, requests: int) -> None:
        """Send them in one read of the server and wait until all are answered."""
        for _ in range(requests):
            self._h2.send_data(self._h2.send_request(self._fields), body, end_stream=True)
        # As the loop calls it: not from a task.
        loop = asyncio.get_running_loop()
        loop.call_soon(self._server.data_received, self._h2.data_to_send())
        left = requests
        while left:
            await asyncio.sleep(0)
            self._h2.receive_data(b"".join(self._memory.written))
            self._memory.written.clear()
            for event in self._h2.events():
                if type(event) is TrailersReceived:
                    assert OK in event.headers
                left -= type(event) is StreamClosed


class Steps:
    """Counts the bytecodes of this package's functions while it is entered."""

    def __init__(self) -> None:
        self.taken: Counter[CodeType] = Counter()

    def __enter__(self) -> Self:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            self.taken[frame.f_code] += 1
        elif not frame.f_code.co_filename.startswith(_HERE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._trace


async def count(store: Store, *, requests: int, timeout: bytes = b"") -> dict[CodeType, float]:
    """Bytecodes of one request, by function."""
    # What would depend on time is off: the model runs on the loop however slow it is, and answers say nothing of load.
    host = ModelHost(store, node="here", limits=HostLimits(inline_us_max=1e9, load_interval_s=1e9))
    await host.start()
    methods = oip_methods(InferenceService(host, host, server_name="here"), trusted=False)
    server = ServerConnection(ServerState(methods=methods, limits=Limits()), asyncio.get_running_loop())
    memory = Memory()
    server.connection_made(cast("asyncio.Transport", memory))
    client = Client(server, memory, timeout=timeout)
    message = TensorRequest(model=NAME, inputs=make_inputs()).encode()
    body = b"\0" + len(message).to_bytes(4, "big") + message
    for _ in range(WARM_UP_ROUNDS):
        await client.ask(body, requests)
    with Steps() as steps:
        for _ in range(ROUNDS):
            await client.ask(body, requests)
    await host.close()
    return {code: taken / ROUNDS / requests for code, taken in steps.taken.items()}


def run(*, quick: bool) -> list[Row]:
    """A request alone, with a deadline, and among others that arrive with it."""
    return [Row(f"steps.{name}", round(sum(found.values())), "") for name, found in measure().items()]


def measure() -> dict[str, dict[CodeType, float]]:
    """All kinds of requests."""
    with tempfile.TemporaryDirectory() as folder:
        store, _ = fill_store(Path(folder))
        return {
            "alone": uvloop.run(count(store, requests=1)),
            "with_deadline": uvloop.run(count(store, requests=1, timeout=b"10S")),
            "in_a_crowd": uvloop.run(count(store, requests=CROWD)),
        }


if __name__ == "__main__":
    for kind, by_code in measure().items():
        print(f"{kind}: {sum(by_code.values()):.0f}")
        for code, taken in sorted(by_code.items(), key=lambda entry: -entry[1]):
            print(f"  {taken:7.1f} {code.co_qualname}")
