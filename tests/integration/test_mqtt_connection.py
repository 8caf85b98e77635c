"""The connection against brokers that misbehave: each ends in an acknowledgement or in a loss, never in a wait."""

from __future__ import annotations

import asyncio
import contextlib

import mqtt5
import pytest

from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

CONNACK = mqtt5.ConnAckPacket(receive_max=10, max_packet_size=200).write()


class Broker:
    """Greets, sends what it is told to, and keeps what it hears. It answers nothing."""

    def __init__(self, greeting: bytes) -> None:
        self._greeting = greeting
        self.heard = bytearray()
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._greeting)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self.heard += data
            writer.close()
            await writer.wait_closed()
        self.ended.set()


@contextlib.asynccontextmanager
async def connected(greeting=CONNACK, **options):
    """A connection, what it received, and why it was lost."""
    broker, received, unreadable = Broker(greeting), [], []
    lost = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(broker.serve, "127.0.0.1", 0)
    settings = ConnectionSettings(host="127.0.0.1", port=server.sockets[0].getsockname()[1], client_id="c", **options)
    connection = Connection(
        settings,
        on_message=received.append,
        on_lost=lambda reason: lost.done() or lost.set_result(reason),
        on_unreadable=lambda mid: unreadable.append(mid) or connection.confirm(mid),
    )
    try:
        await connection.open()
        yield connection, broker, received, unreadable, lost
    finally:
        await connection.close()
        server.close()
        await broker.ended.wait()


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_broker_that_confirms_nothing_is_left():
    async with connected(stall_s=0.05) as (connection, _, _, _, lost):
        connection.publish(Message(topic="t"))
        async with asyncio.timeout(5):
            assert "confirmed nothing" in await lost
        with pytest.raises(MeshError):
            connection.publish(Message(topic="t"))


async def test_a_silent_broker_is_left():
    async with connected(stall_s=0.05) as (connection, *_, lost):
        connection._keepalive_s = 0.05  # the protocol counts in seconds
        async with asyncio.timeout(5):
            assert "silent" in await lost


async def test_while_we_do_not_read_silence_is_our_own_doing():
    async with connected(stall_s=0.05) as (connection, broker, _, _, lost):
        connection.publish(Message(topic="t"))
        connection.pause()
        await until(lambda: broker.heard.count(mqtt5.PingReqPacket().write()) >= 4)
        assert not lost.done()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the codec's way to say so
async def test_a_message_that_makes_no_sense_is_acknowledged_and_counted():
    good = mqtt5.PublishPacket("ab", b"", qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=5).write()
    bad = good.replace(b"ab", b"\xff\xff").replace(b"\x05", b"\x06")
    async with connected(CONNACK + bad + good) as (_, broker, received, unreadable, lost):
        await until(lambda: mqtt5.PubAckPacket(6).write() in broker.heard)
        assert ([message.mid for message in received], unreadable, lost.done()) == ([5], [6], False)


async def test_a_packet_larger_than_agreed_ends_the_connection_before_it_is_kept():
    async with connected(CONNACK + b"\x30\xff\xff\x7f", packet_bytes_max=1000) as (*_, lost):
        async with asyncio.timeout(5):
            assert "unreadable" in await lost


async def test_the_bounds_of_the_broker_hold_for_us():
    async with connected() as (connection, *_):
        assert connection.publish_window == 10
        with pytest.raises(MeshError) as raised:
            connection.publish(Message(topic="t", payload=b"x" * 200))
        assert raised.value.code is Code.INVALID_REQUEST
        with pytest.raises(MeshError, match="cannot be sent"):
            connection.publish(Message(topic="t/+"))


async def test_a_refusal_says_why():
    refusal = mqtt5.ConnAckPacket(reason_code=mqtt5.ConnAckReasonCode.NOT_AUTHORIZED).write()
    with pytest.raises(MeshError, match="not authorized"):
        async with connected(refusal):
            pass


async def test_a_broker_that_says_nothing_is_left_without_a_trace():
    problems = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
    with pytest.raises(MeshError) as caught:
        async with connected(b"", connect_timeout_s=0.05):
            pytest.fail("it did not greet")
    assert caught.value.code is Code.UNAVAILABLE
    await asyncio.sleep(0.01)
    assert not problems
