"""An IoT device of the demo: plain paho-mqtt, MQTT 5, one tensor as raw bytes per request."""

from __future__ import annotations

import asyncio
import socket
import uuid
from math import prod
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from nearcast.errors import Code, MeshError
from nearcast.wire.tensors import datatype_of, from_raw, to_raw

TENANT = "local"
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 5.0


class Device:
    """One device with a client identifier and topics of its own."""

    def __init__(self, broker: str, name: str) -> None:
        self.name = name
        self._host, port = broker.rsplit(":", 1)
        self._port = int(port)
        self._replies = f"nc/v1/{TENANT}/{name}/down/reply/demo"
        self._waiting: dict[bytes, asyncio.Future[mqtt.MQTTMessage]] = {}
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"demo-{name}", protocol=mqtt.MQTTv5)
        self._client.on_socket_open = _send_at_once
        self._client.on_message = self._on_message
        self._client.on_subscribe = self._on_subscribe

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        await asyncio.to_thread(self._client.connect, self._host, self._port)
        self._client.loop_start()
        # The reply topic before the first request, or its answer has nowhere to go.
        self._client.subscribe(self._replies, qos=1)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await self._ready.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)

    async def infer(self, model: str, inputs: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Send one tensor, wait for the reply.

        Raises:
            MeshError: UNAVAILABLE with the status and text of a reply that is no answer, DEADLINE without any reply.
        """
        ((name, tensor),) = inputs.items()
        key = uuid.uuid4().bytes
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = self._replies
        properties.CorrelationData = key
        properties.ContentType = "application/octet-stream"
        properties.UserProperty = [
            ("name", name),
            ("dtype", datatype_of(tensor.dtype)),
            ("shape", ",".join(map(str, tensor.shape))),
            ("ttl-ms", str(int(ANSWER_TIMEOUT_S * 1e3))),
        ]
        future = self._waiting[key] = self._loop.create_future()
        self._client.publish(f"nc/v1/{TENANT}/{self.name}/up/infer/{model}", to_raw(tensor), 1, properties=properties)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                reply = await future
        except TimeoutError as error:
            raise MeshError(Code.DEADLINE, f"No reply for {model} within {ANSWER_TIMEOUT_S:g} s.") from error
        finally:
            self._waiting.pop(key, None)
        return _read(reply)

    def _on_subscribe(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ready.set)

    def _on_message(self, _client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        key = getattr(message.properties, "CorrelationData", b"")

        def deliver() -> None:
            future = self._waiting.get(key)
            if future is not None and not future.done():
                future.set_result(message)

        self._loop.call_soon_threadsafe(deliver)


def _read(reply: mqtt.MQTTMessage) -> dict[str, npt.NDArray[Any]]:
    user = dict(getattr(reply.properties, "UserProperty", []))
    if user.get("status") != "200":
        raise MeshError(Code.UNAVAILABLE, f"{user.get('status')}: {user.get('status-message', 'no text')}")
    shape = tuple(int(size) for size in user["shape"].split(","))
    payload = bytes(reply.payload)
    tensor = from_raw(user["name"], user["dtype"], shape, payload, 0, len(payload))
    assert prod(shape) == tensor.size
    return {user["name"]: np.asarray(tensor)}


def _send_at_once(_client: mqtt.Client, _data: object, sock: Any) -> None:
    # Nagle's algorithm and delayed acknowledgements cost 44 ms a message.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
