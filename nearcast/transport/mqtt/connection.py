"""One connection to a broker, driven by asyncio: paho's codec, our loop.

A `Connection` lives for one epoch. After a loss the owner makes a new one: a packet identifier of the old epoch can so
never be acknowledged on the new connection, and the client library keeps no queue of its own that would publish twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from paho.mqtt import MQTTException
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.message import Message

USER_PROPERTIES_MAX = 32
PORT_DEFAULT = 1883
MISC_INTERVAL_S = 1.0
EXPIRY_MAX_S = 2**32 - 1
_log = logging.getLogger("nearcast.mqtt")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """How to connect. `session_expiry_s` 0 = a session that ends with the connection."""

    host: str
    port: int
    client_id: str
    session_expiry_s: int = 0
    receive_max: int = 256
    packet_bytes_max: int = 16 * 1024 * 1024
    keepalive_s: int = 30
    connect_timeout_s: float = 5.0
    will: Message | None = None
    will_delay_s: int = 0


def parse_url(url: str) -> tuple[str, int, str]:
    """Split `mqtt://host:port/path` into host, port and path without its slashes.

    Raises:
        MeshError: INVALID_REQUEST if it is no such URL.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or PORT_DEFAULT
    except ValueError:
        port = -1
    if parts.scheme != "mqtt" or not parts.hostname or port < 0:
        raise MeshError(Code.INVALID_REQUEST, f"{url!r} is no broker; write it as mqtt://host:port.")
    return parts.hostname, port, parts.path.strip("/")


class Connection:
    """An MQTT 5 connection. All callbacks run on the loop, never inside `publish` or `acknowledge`.

    Args:
        settings: where and how.
        on_message: called with each message that arrives.
        on_published: called with the packet identifier and whether the broker took it, once its PUBACK is here.
        on_lost: called once with a sentence when an open connection ends, except by `close`.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        *,
        on_message: Callable[[Message], None],
        on_published: Callable[[int, bool], None] = lambda _mid, _taken: None,
        on_lost: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._settings = settings
        self._on_message = on_message
        self._on_published = on_published
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._client = self._make_client()
        self._attached: socket.socket | None = None
        self._flushed = asyncio.Event()
        self._paused = False
        self._closing = False
        self._misc: asyncio.Task[None] | None = None
        self._connack: asyncio.Future[None] = self._loop.create_future()
        self._subacks: dict[int, asyncio.Future[None]] = {}
        self.publish_window = 65_535

    async def open(self) -> None:
        """Connect and wait for the broker's consent.

        Raises:
            MeshError: UNAVAILABLE naming the broker.
        """
        where = f"{self._settings.host}:{self._settings.port}"
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                # Name resolution and the TCP handshake block; all later reading and writing is the loop's.
                await asyncio.to_thread(self._connect)
                self._attach()
                await self._connack
        except (OSError, TimeoutError, ValueError) as error:
            self._drop()
            reason = str(error) or "no answer in time"
            raise MeshError(Code.UNAVAILABLE, f"No MQTT broker at {where}: {reason}.") from error
        except BaseException:
            self._drop()
            raise
        self._misc = self._loop.create_task(self._keep_alive())

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Subscribe, and wait for the broker's answer.

        Raises:
            MeshError: UNAVAILABLE if the broker refuses, or the connection ends first.
        """
        options = SubscribeOptions(qos=qos, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        result, mid = self._client.subscribe([(text, options) for text in filters])
        if result != paho.MQTT_ERR_SUCCESS or mid is None:
            raise MeshError(Code.UNAVAILABLE, "The MQTT connection ended.")
        answer: asyncio.Future[None] = self._loop.create_future()
        self._subacks[mid] = answer
        async with asyncio.timeout(self._settings.connect_timeout_s):
            await answer

    def publish(self, message: Message) -> int:
        """Send a message; returns the packet identifier that `on_published` will name (QoS 1).

        Raises:
            MeshError: UNAVAILABLE if the connection is gone, INVALID_REQUEST if the message cannot be sent at all.
        """
        if self._attached is None:  # the codec does not know: it would take the message and keep it
            raise MeshError(Code.UNAVAILABLE, "The MQTT connection is gone.")
        try:
            info = self._client.publish(
                message.topic, message.payload, message.qos, message.retain, _to_properties(message)
            )
        except (ValueError, TypeError, MQTTException) as error:
            raise MeshError(Code.INVALID_REQUEST, f"The MQTT message cannot be sent: {error}.") from error
        if info.rc != paho.MQTT_ERR_SUCCESS:
            raise MeshError(Code.UNAVAILABLE, f"The MQTT message was not sent: {paho.error_string(info.rc)}")
        return info.mid

    def acknowledge(self, message: Message) -> None:
        """Send the PUBACK of a message that came over this connection. Nothing happens if it is gone."""
        if message.qos and self._attached is not None:
            self._client.ack(message.mid, message.qos)

    def pause(self) -> None:
        """Stop reading: the broker keeps what we cannot take."""
        if not self._paused and self._attached is not None:
            self._loop.remove_reader(self._attached)
        self._paused = True

    def resume(self) -> None:
        """Read again."""
        if self._paused and self._attached is not None:
            self._loop.add_reader(self._attached, self._read)
        self._paused = False

    async def close(self, *, flush_timeout_s: float = 1.0) -> None:
        """Send what is queued and a DISCONNECT; then the connection is gone."""
        self._closing = True
        if self._attached is not None:
            self._client.disconnect()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(flush_timeout_s):
                    await self._flushed.wait()
        self._drop()

    def _make_client(self) -> paho.Client:
        settings = self._settings
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            protocol=paho.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.max_inflight_messages = 65_535  # our own windows bound this; paho's queue must never hold anything back
        client.connect_timeout = settings.connect_timeout_s
        client.on_socket_open = _set_nodelay
        client.on_socket_close = lambda _c, _u, _s: self._detach()
        client.on_socket_register_write = lambda _c, _u, _s: self._want_write()
        client.on_socket_unregister_write = lambda _c, _u, _s: self._wrote_all()
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_subscribe = self._subscribed
        client.on_publish = self._published
        client.on_message = self._received
        if settings.will is not None:
            properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
            properties.WillDelayInterval = settings.will_delay_s
            will = settings.will
            client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        return client

    def _connect(self) -> None:
        settings = self._settings
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = settings.session_expiry_s
        properties.ReceiveMaximum = settings.receive_max
        properties.MaximumPacketSize = settings.packet_bytes_max
        self._client.connect(
            settings.host,
            settings.port,
            keepalive=settings.keepalive_s,
            clean_start=settings.session_expiry_s == 0,
            properties=properties,
        )

    def _attach(self) -> None:
        attached = self._client.socket()
        if attached is None:
            raise OSError("the connection closed at once")
        assert isinstance(attached, socket.socket)
        self._attached = attached
        self._loop.add_reader(attached, self._read)
        self._loop.add_writer(attached, self._write)

    def _detach(self) -> None:
        self._flushed.set()
        if self._attached is not None:
            self._loop.remove_reader(self._attached)
            self._loop.remove_writer(self._attached)
            self._attached = None

    def _drop(self) -> None:
        """Close the socket without ceremony."""
        self._closing = True
        if self._misc is not None:
            self._misc.cancel()
        attached = self._client.socket()
        self._detach()
        if attached is not None:
            attached.close()
        self._fail_waiters("The MQTT connection was closed.")

    def _fail_waiters(self, reason: str) -> None:
        waiters = [self._connack, *self._subacks.values()]
        self._subacks.clear()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(MeshError(Code.UNAVAILABLE, reason))
                waiter.exception()  # nobody may be waiting any more

    def _read(self) -> None:
        self._step(self._client.loop_read)

    def _write(self) -> None:
        self._step(self._client.loop_write)

    def _step(self, operation: Callable[[], Any]) -> None:
        """Run the codec. A packet it cannot read ends the connection: the stream behind it has no known start."""
        try:
            operation()
        except Exception as error:  # noqa: BLE001  # whatever a broker sends must not end the process
            _log.warning("unreadable MQTT packet: %s", error)
            self._lose(f"The broker sent an unreadable packet: {error}.")
            return
        if self._is_reset():
            # uvloop calls us once more for an error on the socket, and never again, whatever waits to be read.
            self._lose("The MQTT connection was reset.")

    def _is_reset(self) -> bool:
        if self._attached is None:
            return False
        errors = select.poll()
        errors.register(self._attached, 0)  # an error is reported without being asked for
        return any(events & select.POLLERR for _, events in errors.poll(0))

    def _want_write(self) -> None:
        if self._attached is not None:
            self._flushed.clear()
            self._loop.add_writer(self._attached, self._write)

    def _wrote_all(self) -> None:
        self._flushed.set()
        if self._attached is not None:
            self._loop.remove_writer(self._attached)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(MISC_INTERVAL_S)
            if not self._paused:  # while we do not read, a missing PINGRESP is our own doing
                self._step(self._client.loop_misc)

    def _lose(self, reason: str) -> None:
        if self._closing:
            return
        self._drop()
        self._on_lost(reason)

    def _connected(self, _client: Any, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._fail_waiters(f"The MQTT broker refused the connection: {reason}.")
            return
        self.publish_window = getattr(properties, "ReceiveMaximum", 65_535)
        if not self._connack.done():
            self._connack.set_result(None)

    def _disconnected(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        text = f"The MQTT connection ended: {reason}."
        self._fail_waiters(text)
        # Not inside paho's callback: it still holds its locks here.
        self._loop.call_soon(self._lose, text)

    def _subscribed(self, _client: Any, _data: Any, mid: int, reasons: list[Any], _properties: Any) -> None:
        answer = self._subacks.pop(mid, None)
        if answer is None or answer.done():
            return
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            answer.set_exception(MeshError(Code.UNAVAILABLE, f"The broker refused a subscription: {refused[0]}."))
        else:
            answer.set_result(None)

    def _published(self, _client: Any, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        self._on_published(mid, not reason.is_failure)

    def _received(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        try:
            converted = _from_paho(message)
        except ValueError:  # a topic that is no UTF-8: nobody can be told, and unacknowledged it would block the window
            _log.warning("dropped a message whose topic is not UTF-8")
            self._client.ack(message.mid, message.qos)
            return
        self._on_message(converted)


def _set_nodelay(_client: Any, _data: Any, opened: Any) -> None:
    """Without this, Nagle and delayed ACK together cost 40 ms for each direction."""
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _from_paho(message: paho.MQTTMessage) -> Message:
    properties = message.properties
    return Message(
        topic=message.topic,
        payload=bytes(message.payload),
        qos=message.qos,
        retain=message.retain,
        mid=message.mid,
        content_type=getattr(properties, "ContentType", ""),
        correlation=getattr(properties, "CorrelationData", b""),
        response_topic=getattr(properties, "ResponseTopic", ""),
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
        user=dict(list(getattr(properties, "UserProperty", []))[:USER_PROPERTIES_MAX]),
    )


def _to_properties(message: Message) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if message.content_type:
        properties.ContentType = message.content_type
    if message.correlation:
        properties.CorrelationData = message.correlation
    if message.response_topic:
        properties.ResponseTopic = message.response_topic
    if message.expiry_s is not None:
        properties.MessageExpiryInterval = max(0, min(EXPIRY_MAX_S, message.expiry_s))
    if message.user:
        properties.UserProperty = [(name, value) for name, value in message.user.items()]
    return properties
