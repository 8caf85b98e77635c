"""A broker that dies with a reset while more of its bytes wait to be read than one turn of the loop takes.

On the loop that nodes run on: where the kernel reports an error on a socket, uvloop calls its reader once more and then
never again. Nobody would notice before the keep-alive has run out, half a minute later, and requests that are accepted
in between would stumble over the dead poll handle.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading

import pytest
import uvloop

from nearcast.errors import MeshError
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

CONNACK = bytes([0x20, 0x03, 0x00, 0x00, 0x00])
RESET = struct.pack("ii", 1, 0)
MESSAGES = 50
FOUND_S_MAX = 2.0


def publish_packet(mid: int) -> bytes:
    """A PUBLISH of QoS 1 to the topic `t`, without properties or payload."""
    body = struct.pack(">H", 1) + b"t" + struct.pack(">HB", mid, 0)
    return bytes([0x32, len(body)]) + body


class DyingBroker:
    """Takes one connection, sends messages, and resets the connection behind them when it is told to."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._die = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def die(self) -> None:
        self._die.set()
        self._thread.join()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        peer.recv(65536)
        peer.sendall(CONNACK + b"".join(publish_packet(mid) for mid in range(1, MESSAGES + 1)))
        self._die.wait(10.0)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        peer.close()
        self._listener.close()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while it is used"])
def test_a_reset_is_a_loss(busy):
    async def work() -> None:
        broker = DyingBroker()
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        received: list[Message] = []

        def receive(message: Message) -> None:
            received.append(message)
            if len(received) == 1:
                broker.die()  # the rest and the reset are there before the loop looks again

        connection = Connection(
            ConnectionSettings(host="127.0.0.1", port=broker.port, client_id="c"),
            on_message=receive,
            on_lost=lambda reason: lost.done() or lost.set_result(reason),
        )
        await connection.open()
        async with asyncio.timeout(FOUND_S_MAX):
            while not received:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            if busy:
                connection.pause()
                connection.resume()
                connection.acknowledge(received[0])  # goes nowhere, and does not raise
                with pytest.raises(MeshError):
                    while True:
                        connection.publish(Message(topic="t"))
                        await asyncio.sleep(0.01)
            assert "connection" in await lost
        await connection.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())
