"""Clients that misbehave before, in and after a TLS handshake: bounded time and memory, others are served as before."""

from __future__ import annotations

import asyncio
import ssl

import pytest

from nearcast.identity import client_tls
from tests.integration.abuse_parts import PREFACE, SETTINGS, Bench, Raw, call, frame, raw

HELLO_WITHOUT_END = b"\x16\x03\x01\x40\x00" + b"\x01\x01\xff\xff" + bytes(0x4000 - 4)
"""The first record of a client hello that announces 128 KiB."""


class Handshake:
    """A TLS client by hand, on a socket of its own."""

    def __init__(self, one: Raw, context: ssl.SSLContext) -> None:
        self.one = one
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")

    async def step(self) -> bool:
        """Send what is due; whether the handshake is over."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            await self.one.send(self._outgoing.read())
            return False
        await self.one.send(self._outgoing.read())
        return True

    async def finish(self) -> None:
        while not await self.step():
            data = await self.one.reader.read(1 << 16)
            assert data, "the server closed during the handshake"
            self._incoming.write(data)

    def seal(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self._outgoing.read()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        PREFACE + frame(SETTINGS),
        bytes(range(256)) * 64,
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"\x16\x03\x01\xff\xff" + bytes(70_000),
        b"\x17\x03\x03\x00\x00" * 1000,
        HELLO_WITHOUT_END * 8,
    ],
    ids=["http1", "http2", "bytes", "alert", "long record", "empty records", "hello without end"],
)
async def test_what_is_no_handshake(abused: Bench, data: bytes) -> None:
    async with abused.attack("tls"), raw(abused.address("tls"), greets=False) as (one,):
        await one.send(data)
        assert await one.is_closed()


async def test_half_handshakes(abused: Bench) -> None:
    """More of them than there may be at once; the honest client's own must find its place among them."""
    context = client_tls(None, ca=abused.folder / "ca.pem", alpn=("h2",))
    async with abused.attack("tls"), raw(abused.address("tls"), 120, greets=False) as many:
        for one in many:
            await Handshake(one, context).step()
        late = await Raw.open(abused.address("tls"), tls=context)
        await late.send(call(1))
        assert not await late.is_closed(0.1)
        assert all(await asyncio.gather(*(one.is_closed() for one in many)))
        await late.close()


@pytest.mark.parametrize("alpn", [(), ("http/1.1",)], ids=["no-alpn", "http/1.1"])
async def test_another_protocol(abused: Bench, alpn: tuple[str, ...]) -> None:
    context = client_tls(None, ca=abused.folder / "ca.pem", alpn=("h2",))
    if alpn:
        context.set_alpn_protocols(list(alpn))
    else:
        context = ssl.create_default_context(cafile=str(abused.folder / "ca.pem"))
        context.check_hostname = False
    async with abused.attack("tls"):
        try:
            one = await Raw.open(abused.address("tls"), tls=context)
        except (ssl.SSLError, ConnectionError):
            return
        assert await one.is_closed()
        await one.close()


async def test_an_old_version(abused: Bench) -> None:
    """What TLS 1.3 has no renegotiation for, older versions would have."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with abused.attack("tls"):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await Raw.open(abused.address("tls"), tls=context)


@pytest.mark.parametrize("what", ["nonsense", "flipped", "cut"])
async def test_after_the_handshake(abused: Bench, what: str) -> None:
    context = client_tls(None, ca=abused.folder / "ca.pem", alpn=("h2",))
    async with abused.attack("tls"), raw(abused.address("tls"), greets=False, reads=False) as (one,):
        hands = Handshake(one, context)
        await hands.finish()
        record = hands.seal(PREFACE + frame(SETTINGS))
        match what:
            case "nonsense":
                await one.send(record + b"\x17\x03\x03\x00\x20" + bytes(32))
            case "flipped":
                await one.send(record[:-1] + bytes((record[-1] ^ 1,)))
            case _:
                await one.send(record[:-5])
        assert await one.is_closed()


async def test_many_records_of_one_byte(abused: Bench) -> None:
    context = client_tls(None, ca=abused.folder / "ca.pem", alpn=("h2",))
    async with abused.attack("tls"), raw(abused.address("tls"), greets=False, reads=False) as (one,):
        hands = Handshake(one, context)
        await hands.finish()
        await one.send(hands.seal(PREFACE + frame(SETTINGS)))
        for _ in range(20):
            await one.send(b"".join(hands.seal(piece.to_bytes()) for piece in frame(0x42, 0, 0, bytes(200))))
