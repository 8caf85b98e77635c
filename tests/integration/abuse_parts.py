"""A real server in a process of its own, an honest client in another, and what the abuse tests need to hurt the first.

`python -m tests.integration.abuse_parts server|honest` are those processes; a line of JSON says that they are ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from nearcast.identity import CertificateAuthority, Identity, load_identity, make_csr
from nearcast.transport.seam import Call, Limits, Methods, Reply
from nearcast.transport.service import InferenceService
from tests.patience import WAIT_S, own_time, until

MEBIBYTE = 1 << 20
LIMITS = Limits(
    message_size_bytes_max=8 * MEBIBYTE,
    receive_buffer_bytes_max=48 * MEBIBYTE,
    unsent_bytes_max=48 * MEBIBYTE,
    reply_queue_bytes_max=4 * MEBIBYTE,
    connections_max=300,
    handshakes_max=50,
    handshake_timeout_s=0.3,
    upload_timeout_s=0.4,
    stall_timeout_s=0.4,
)
HONEST_LATENCY_S = 1.0
"""What an honest call may take of the two processes' own time at most while others misbehave."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8


# The two processes.


async def echo(message: bytes, call: Call) -> Reply:
    return Reply((message,))


async def big(message: bytes, call: Call) -> Reply:
    return Reply((bytes(int(message or b"1") * MEBIBYTE),))


async def hang(message: bytes, call: Call) -> Reply:
    await asyncio.sleep(30)
    return Reply((b"",))


async def chat(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
    async for message in messages:
        yield Reply((message[:16],))


async def pour(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
    for _ in range(400):
        yield Reply((bytes(256 * 1024),))


async def tasks(message: bytes, call: Call) -> Reply:
    """How many tasks the server runs beside this one."""
    return Reply((str(len(asyncio.all_tasks()) - 1).encode(),))


def make_identity(folder: Path) -> Identity:
    """A node's certificate and its authority."""
    ca = CertificateAuthority.create(folder / "ca")
    key, csr = make_csr("e1", "edge")
    (folder / "node.key").touch(mode=0o600)
    (folder / "node.key").write_bytes(key)
    (folder / "node.pem").write_bytes(ca.issue(csr, name="e1", role="edge"))
    (folder / "ca.pem").write_bytes(ca.certificate_pem)
    return load_identity(folder)


async def serve(folder: Path, changes: dict[str, float]) -> None:
    """All listeners: gRPC plain and over TLS, REST."""
    from nearcast.transport.grpc import make_server
    from nearcast.transport.oip import oip_methods
    from nearcast.transport.rest import RestServer
    from tests.integration.add_model import AddModel

    limits = msgspec.structs.replace(LIMITS, **changes)
    model = AddModel()
    oip = oip_methods(InferenceService(model, model, server_name="abused"), trusted=False)
    own = {"echo": echo, "big": big, "hang": hang, "tasks": tasks}
    methods = Methods(
        unary={**oip.unary, **{f"/t.T/{name}": method for name, method in own.items()}},
        stream={**oip.stream, "/t.T/chat": chat, "/t.T/pour": pour},
    )
    plain = make_server("ngh2", methods, address="127.0.0.1:0", limits=limits)
    secure = make_server("ngh2", methods, address="127.0.0.1:0", limits=limits, identity=load_identity(folder))
    rest = RestServer(InferenceService(model, model, server_name="abused"), address="127.0.0.1:0", limits=limits)
    for server in (plain, secure, rest):
        await server.start()
    addresses = {"h2": plain.address, "tls": secure.address, "rest": rest.address}
    print(json.dumps(addresses | {"pid": os.getpid()}), flush=True)
    while True:
        # What the model keeps for its other tests would look like a leak here.
        await asyncio.sleep(0.05)
        model.contexts.clear()
        model.requests.clear()


async def be_honest(addresses: dict[str, Any], folder: Path) -> None:
    """Call each listener again and again; on each line of input say what the calls since the last one were like."""
    import aiohttp

    from nearcast.transport.grpc import make_channel

    ca = folder / "ca.pem"
    channels = {
        "h2": make_channel("ngh2", addresses["h2"]),
        "tls": make_channel("ngh2", addresses["tls"], ca=ca),
    }
    session = aiohttp.ClientSession(f"http://{addresses['rest']}")
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}

    async def call_rest() -> bool:
        async with session.post("/v2/models/echo/infer", json=body) as answer:
            return answer.status == 200 and (await answer.json())["outputs"][0]["data"] == [1.0, 2.0]

    def call_channel(name: str) -> Callable[[], Awaitable[bool]]:
        async def call() -> bool:
            deadline = time.monotonic() + 20.0
            return b"".join((await channels[name].unary("/t.T/echo", (b"on",), deadline=deadline)).body) == b"on"

        return call

    calls: dict[str, Callable[[], Awaitable[bool]]] = {name: call_channel(name) for name in channels}
    calls["rest"] = call_rest
    seen: dict[str, list[float]] = {name: [] for name in calls}
    problems: list[str] = []

    async def go_on(name: str) -> None:
        while True:
            began = own_time(os.getpid(), addresses["pid"])
            try:
                if not await calls[name]():
                    problems.append(f"{name}: a wrong answer")
            except Exception as error:
                problems.append(f"{name}: {error!r}")
            seen[name].append(own_time(os.getpid(), addresses["pid"]) - began)
            await asyncio.sleep(0.01)

    # What the server imports for its first clients is no growth.
    await asyncio.gather(*(call() for call in calls.values()))
    runs = [asyncio.create_task(go_on(name)) for name in calls]
    print(json.dumps({"pid": os.getpid()}), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        said = {name: {"calls": len(took), "worst_s": max(took, default=0.0)} for name, took in seen.items()}
        print(json.dumps({"problems": problems[:5], "seen": said}), flush=True)
        problems.clear()
        for took in seen.values():
            took.clear()
    for run in runs:
        run.cancel()


# What tests hold.


class Child:
    """One of the processes."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.abuse_parts", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready: dict[str, Any] = json.loads(self.read_line())

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline() or "{}"

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.read_line())
        return answer

    @property
    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


@dataclasses.dataclass
class Bench:
    """The server, the honest client, and what was seen during the last attack."""

    server: Child
    honest: Child
    folder: Path
    took_s: float = 0.0
    cpu_s: float = 0.0
    grown_bytes: int = 0
    worst_s: float = 0.0

    def address(self, listener: str = "h2") -> tuple[str, int]:
        host, _, port = self.server.ready[listener].rpartition(":")
        return host, int(port)

    @asynccontextmanager
    async def attack(
        self, listener: str, *, grown_mib: float = 16.0, time_s: float = 10.0, slowest_s: float = HONEST_LATENCY_S
    ) -> AsyncIterator[None]:
        """Measure the server during the block; then judge time, memory and the honest client's calls."""
        await asyncio.to_thread(self.honest.ask)
        rss, cpu = self.server.rss_bytes, self.server.cpu_s
        began = own_time(os.getpid(), self.server.process.pid)
        peak = rss

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, self.server.rss_bytes)
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        try:
            yield
            problems, worst_s = await self._hear()
            assert self.server.process.poll() is None, "the server has died"
        finally:
            watching.cancel()
        self.took_s = own_time(os.getpid(), self.server.process.pid) - began
        self.cpu_s = self.server.cpu_s - cpu
        self.grown_bytes = max(peak, self.server.rss_bytes) - rss
        assert problems == []
        self.worst_s = max(worst_s.values())
        print(
            f"{listener}: {self.took_s:.2f} s, CPU {self.cpu_s:.2f} s, +{self.grown_bytes / MEBIBYTE:.1f} MiB, "
            f"honest worst {self.worst_s * 1e3:.0f} ms"
        )
        assert self.worst_s < slowest_s, worst_s
        assert self.grown_bytes < grown_mib * MEBIBYTE
        assert self.took_s < time_s

    async def _hear(self) -> tuple[list[str], dict[str, float]]:
        """Problems and the slowest call to each listener, since the last question."""
        calls: dict[str, int] = {}
        worst_s: dict[str, float] = {}
        problems: list[str] = []

        async def every_listener_was_asked() -> bool:
            said = await asyncio.to_thread(self.honest.ask)
            problems.extend(said["problems"])
            for name, seen in said["seen"].items():
                calls[name] = calls.get(name, 0) + seen["calls"]
                worst_s[name] = max(worst_s.get(name, 0.0), seen["worst_s"])
            return min(calls.values()) > 0

        await asyncio.sleep(0.02)
        await until(every_listener_was_asked, "each listener serves the honest client")
        return problems, worst_s

    async def tasks_in_server(self) -> int:
        """Tasks that the server runs, besides those of honest calls."""
        from nearcast.transport.ngh2_channel import Ngh2Channel

        channel = Ngh2Channel(self.server.ready["h2"])
        try:
            return int(b"".join((await channel.unary("/t.T/tasks", (b"",))).body))
        finally:
            await channel.close()


@contextmanager
def bench(folder: Path, **changes: float) -> Iterator[Bench]:
    """Both processes."""
    make_identity(folder)
    with contextlib.ExitStack() as stack:
        server = Child("server", str(folder), json.dumps(changes))
        stack.callback(server.stop)
        honest = Child("honest", json.dumps(server.ready), str(folder))
        stack.callback(honest.stop)
        yield Bench(server, honest, folder)


# HTTP/2 by hand: a library would refuse to misbehave.


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """One frame; `length` lies about its size."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes, *, first: int = 0x00) -> bytes:
    """A header field as it is; `first` 0x40 puts it into the dynamic table."""

    def text(data: bytes) -> bytes:
        size, out = len(data), b""
        if size < 127:
            return bytes((size,)) + data
        size -= 127
        while size >= 128:
            out += bytes((size % 128 + 128,))
            size //= 128
        return b"\x7f" + out + bytes((size,)) + data

    return bytes((first,)) + text(name) + text(value)


def request(path: bytes = b"/t.T/echo", *more: bytes) -> bytes:
    """The header block of a gRPC call."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"x"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
    return b"".join(literal(*field) for field in fields) + b"".join(more)


def message(body: bytes, *, flag: int = 0) -> bytes:
    """A gRPC message."""
    return bytes((flag,)) + len(body).to_bytes(4, "big") + body


def call(stream_id: int, path: bytes = b"/t.T/echo", body: bytes = b"x", *more: bytes) -> bytes:
    """A whole unary call, in frames of at most 16 KiB."""
    data = message(body)
    head = frame(HEADERS, END_HEADERS, stream_id, request(path, *more))
    return head + data_frames(stream_id, data, end=True)


def data_frames(stream_id: int, data: bytes, *, end: bool) -> bytes:
    """DATA frames of at most 16 KiB."""
    pieces = [data[i : i + 16384] for i in range(0, len(data), 16384)] or [b""]
    return b"".join(
        frame(DATA, END_STREAM if end and i == len(pieces) - 1 else 0, stream_id, piece)
        for i, piece in enumerate(pieces)
    )


class Raw:
    """A socket that has greeted as an HTTP/2 client, and then sends what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.received = b""
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        address: tuple[str, int],
        *,
        settings: bytes = b"",
        greets: bool = True,
        reads: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> Raw:
        sock = socket.create_connection(address)
        sock.setblocking(False)
        if not reads:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self = cls(
            *await asyncio.open_connection(sock=sock, ssl=tls, server_hostname="127.0.0.1" if tls else None, limit=1024)
        )
        if greets:
            self.writer.write(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(SETTINGS, ACK))
        if reads:
            self._reading = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        with suppress(ConnectionError, ssl.SSLError):
            while data := await self.reader.read(1 << 16):
                self.received = (self.received + data)[-(1 << 16) :]

    async def send(self, data: bytes) -> bool:
        """Whether the server still took it."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except (ConnectionError, ssl.SSLError):
            return False
        return not (self.writer.is_closing() or (self._reading is not None and self._reading.done()))

    async def is_closed(self, timeout_s: float = WAIT_S) -> bool:
        """Whether the server ends the connection in time."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        done, _ = await asyncio.wait([self._reading], timeout=timeout_s)
        return bool(done)

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self.writer.transport.abort()
        await asyncio.sleep(0)


@asynccontextmanager
async def raw(address: tuple[str, int], count: int = 1, **how: Any) -> AsyncIterator[list[Raw]]:
    """Several such sockets."""
    opened = [await Raw.open(address, **how) for _ in range(count)]
    try:
        yield opened
    finally:
        for one in opened:
            await one.close()


if __name__ == "__main__":
    import uvloop

    if sys.argv[1] == "server":
        uvloop.run(serve(Path(sys.argv[2]), json.loads(sys.argv[3])))
    else:
        asyncio.run(be_honest(json.loads(sys.argv[2]), Path(sys.argv[3])))
