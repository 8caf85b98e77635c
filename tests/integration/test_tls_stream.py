"""TLS by hand: whole messages of any size, clean goodbyes, and peers that stall or talk nonsense."""

from __future__ import annotations

import asyncio
import ssl
import time

import pytest

from nearcast.errors import Code
from nearcast.identity import CertificateAuthority, Identity, client_tls, load_identity, make_csr
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.seam import Call, CallError, Limits, Methods, Reply
from nearcast.transport.tls_stream import TlsStream

LIMITS = Limits(handshake_timeout_s=0.3, connect_timeout_s=0.5)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    root = tmp_path_factory.mktemp("tls")
    ca = CertificateAuthority.create(root / "ca")
    key, csr = make_csr("e1", "edge")
    (root / "node.key").touch(mode=0o600)
    (root / "node.key").write_bytes(key)
    (root / "node.pem").write_bytes(ca.issue(csr, name="e1", role="edge"))
    (root / "ca.pem").write_bytes(ca.certificate_pem)
    return load_identity(root)


async def echo(message: bytes, call: Call) -> Reply:
    return Reply((message,))


def methods() -> Methods:
    return Methods(unary={"/t.T/echo": echo})


async def test_messages_of_many_records_arrive_whole(identity: Identity) -> None:
    server = make_server("ngh2", methods(), address="127.0.0.1:0", identity=identity, require_client=True)
    await server.start()
    channel = make_channel("ngh2", server.address, identity=identity)
    sizes = (0, 1, 16_383, 16_384, 16_385, 300_000, 8_000_000)
    bodies = [bytes(range(256)) * (size // 256 + 1) for size in sizes]
    replies = await asyncio.gather(*(channel.unary("/t.T/echo", (b[:n],)) for b, n in zip(bodies, sizes, strict=True)))
    for size, body, reply in zip(sizes, bodies, replies, strict=True):
        assert b"".join(reply.body) == body[:size]
    await channel.close()
    await server.drain(1.0)


async def test_a_peer_that_never_shakes_hands_is_dropped(identity: Identity) -> None:
    server = make_server("ngh2", methods(), address="127.0.0.1:0", identity=identity, limits=LIMITS)
    await server.start()
    host, port = server.address.split(":")
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert time.monotonic() - began >= LIMITS.handshake_timeout_s * 0.9
    writer.close()
    await server.drain(0.1)


async def test_a_server_that_never_shakes_hands_is_given_up(identity: Identity) -> None:
    silent = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    writers: list[asyncio.StreamWriter] = []
    host, port = silent.sockets[0].getsockname()
    channel = make_channel("ngh2", f"{host}:{port}", identity=identity, limits=LIMITS)
    with pytest.raises(CallError) as caught:
        await channel.unary("/t.T/echo", (b"x",), deadline=time.monotonic() + 5)
    assert (caught.value.code, caught.value.sent) == (Code.UNAVAILABLE, False)
    await channel.close()
    for writer in writers:
        writer.close()
    silent.close()


class Recorder(asyncio.Protocol):
    """Remembers what it was told, and answers `bye` by closing."""

    def __init__(self) -> None:
        self.received = b""
        self.transport: asyncio.BaseTransport | None = None
        self.lost: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.received.endswith(b"bye"):
            assert isinstance(self.transport, TlsStream)
            self.transport.write(b"farewell")
            self.transport.close()
            self.transport.write(b"too late")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


async def listen(identity: Identity, recorder: Recorder) -> tuple[asyncio.Server, str, int]:
    from nearcast.identity import server_tls

    loop = asyncio.get_running_loop()
    tls = server_tls(identity, require_client=False, alpn=("h2",))
    server = await loop.create_server(
        lambda: TlsStream(tls, recorder, loop, server_side=True, handshake_timeout_s=2.0), "127.0.0.1", 0
    )
    host, port = server.sockets[0].getsockname()
    return server, host, port


async def test_the_goodbye_comes_after_all_that_was_written(identity: Identity) -> None:
    recorder = Recorder()
    server, host, port = await listen(identity, recorder)
    tls = client_tls(None, ca=identity.ca, alpn=("h2",))
    reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    writer.write(b"x" * 100_000 + b"bye")
    assert await asyncio.wait_for(reader.read(), 5) == b"farewell"
    assert await asyncio.wait_for(recorder.lost, 5) is None
    assert recorder.received == b"x" * 100_000 + b"bye"
    writer.close()
    server.close()


async def test_nonsense_after_the_handshake_ends_the_connection(identity: Identity) -> None:
    recorder = Recorder()
    server, host, port = await listen(identity, recorder)
    context = client_tls(None, ca=identity.ca, alpn=("h2",))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing)
    reader, writer = await asyncio.open_connection(host, port)
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
            incoming.write(await asyncio.wait_for(reader.read(1 << 16), 5))
    tls.write(b"hello")
    writer.write(outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
    assert isinstance(await asyncio.wait_for(recorder.lost, 5), ssl.SSLError)
    assert recorder.received == b"hello"
    writer.close()
    server.close()
