"""One connection to a broker: the codec of `mqtt5`, our transport.

A `Connection` lives for one epoch. After a loss the owner makes a new one: a packet identifier of the old epoch can so
never be acknowledged on the new connection, and no queue in between would publish twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import mqtt5

from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt import limits, packets
from nearcast.transport.mqtt.framing import Event, FramingError, PacketReader, Unreadable
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.tls import TlsFiles, describe_failure
from nearcast.transport.tls_stream import TlsStream

PORT_DEFAULT = 1883
TLS_PORT_DEFAULT = 8883
MID_MAX = 65_535
_AT_LEAST_ONCE = mqtt5.QoS.AT_LEAST_ONCE
_AT_MOST_ONCE = mqtt5.QoS.AT_MOST_ONCE
_FAILURE = 128
_log = logging.getLogger("nearcast.mqtt")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """How to connect.

    Attributes:
        session_expiry_s: 0 = a session that ends with the connection.
        receive_max: messages that the broker may have sent and we have not acknowledged.
        packet_bytes_max: a larger packet ends the connection before it is buffered.
        stall_s: a broker that confirms nothing for so long, although something waits for it, is given up.
        tls: None = in the clear.
    """

    host: str
    port: int
    client_id: str
    session_expiry_s: int = 0
    receive_max: int = limits.RECEIVE_MAX
    packet_bytes_max: int = limits.PACKET_BYTES_MAX
    keepalive_s: int = limits.KEEPALIVE_S
    connect_timeout_s: float = limits.CONNECT_TIMEOUT_S
    stall_s: float = limits.STALL_S
    will: Message | None = None
    will_delay_s: int = 0
    tls: TlsFiles | None = None


def parse_url(url: str) -> tuple[str, int, str]:
    """Split `mqtt://host:port/path` or `mqtts://…` into host, port and path without its slashes.

    Raises:
        MeshError: INVALID_REQUEST if it is no such URL.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or (TLS_PORT_DEFAULT if parts.scheme == "mqtts" else PORT_DEFAULT)
    except ValueError:
        port = -1
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or port < 0:
        raise MeshError(Code.INVALID_REQUEST, f"{url!r} is no broker; write it as mqtt://host:port.")
    return parts.hostname, port, parts.path.strip("/")


class Connection(asyncio.Protocol):
    """An MQTT 5 connection. All callbacks run on the loop, never inside `publish` or `acknowledge`.

    Args:
        settings: where and how.
        on_message: called with each message that arrives.
        on_published: called with the packet identifier and whether the broker took it, once its PUBACK is here.
        on_lost: called once with a sentence when an open connection ends, except by `close`.
        on_unreadable: called with the packet identifier (0 = QoS 0) of each message that makes no sense, which has to
            be confirmed in its turn, or it would come for ever. None = that is done at once.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        *,
        on_message: Callable[[Message], None],
        on_published: Callable[[int, bool], None] = lambda _mid, _taken: None,
        on_lost: Callable[[str], None] = lambda _reason: None,
        on_unreadable: Callable[[int], None] | None = None,
    ) -> None:
        self._settings = settings
        self._on_message = on_message
        self._on_published = on_published
        self._on_lost = on_lost
        self._on_unreadable = on_unreadable or self.confirm
        self._loop = asyncio.get_running_loop()
        self._reader = PacketReader(settings.packet_bytes_max)
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._is_reading = False
        self._paused = False
        self._closing = False
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._connack: asyncio.Future[None] = self._loop.create_future()
        self._subacks: dict[int, asyncio.Future[None]] = {}
        self._unconfirmed: set[int] = set()
        self._mid = 0
        self._keepalive_s = settings.keepalive_s
        self._heard_at = self._progress_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._sent_bytes_max: int | None = None
        self.publish_window = MID_MAX
        self.session_present = False
        """Whether the broker still knew our session: queued messages follow, and subscriptions hold."""

    async def open(self) -> None:
        """Connect and wait for the broker's consent.

        Raises:
            MeshError: UNAVAILABLE naming the broker, UNAUTHENTICATED if the files for TLS cannot be used.
        """
        where = f"{self._settings.host}:{self._settings.port}"
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await self._connect()
                self._send(self._connect_packet().write())
                await self._connack
        except (OSError, TimeoutError, ValueError, OverflowError) as error:
            self._drop("The MQTT connection was closed.")
            reason = describe_failure(error) or "no answer in time"
            raise MeshError(Code.UNAVAILABLE, f"No connection to the MQTT broker at {where}: {reason}.") from error
        except BaseException:
            self._drop("The MQTT connection was closed.")
            raise
        self._tick()

    async def subscribe(self, *filters: str, qos: int = 1, retained: bool = False) -> None:
        """Subscribe, and wait for the broker's answer. `retained` = with the messages that the topics hold.

        Raises:
            MeshError: UNAVAILABLE if the broker refuses, or the connection ends first.
        """
        handling = mqtt5.RetainHandling.SEND_ALWAYS if retained else mqtt5.RetainHandling.SEND_NEVER
        granted = _AT_LEAST_ONCE if qos else _AT_MOST_ONCE
        wanted = [mqtt5.TopicFilter(text, max_qos=granted, retain_handling=handling) for text in filters]
        self._require_open()
        mid = self._next_mid()
        answer: asyncio.Future[None] = self._loop.create_future()
        self._subacks[mid] = answer
        self._send(mqtt5.SubscribePacket(mid, wanted).write())
        async with asyncio.timeout(self._settings.connect_timeout_s):
            await answer

    def publish(self, message: Message) -> int:
        """Send a message; returns the packet identifier that `on_published` will name, 0 for QoS 0.

        Raises:
            MeshError: UNAVAILABLE if the connection is gone, INVALID_REQUEST if the message cannot be sent at all.
        """
        self._require_open()
        mid = self._next_mid() if message.qos else 0
        try:
            packet = packets.encode(message, mid)
        except (ValueError, TypeError, OverflowError) as error:
            raise MeshError(Code.INVALID_REQUEST, f"The MQTT message cannot be sent: {error}.") from error
        if self._sent_bytes_max is not None and len(packet) > self._sent_bytes_max:
            reason = f"The broker takes packets of at most {self._sent_bytes_max} bytes, this one has {len(packet)}."
            raise MeshError(Code.INVALID_REQUEST, reason)
        if mid:
            if not self._unconfirmed:
                self._progress_at = self._loop.time()
            self._unconfirmed.add(mid)
        self._send(packet)
        return mid

    def acknowledge(self, message: Message) -> None:
        """Send the PUBACK of a message that came over this connection. Nothing happens if it is gone."""
        self.confirm(message.mid)

    def confirm(self, mid: int) -> None:
        """The same, for who has kept only the packet identifier; 0 = QoS 0, of which a broker hears nothing."""
        if mid and self._transport is not None:
            self._send(mqtt5.PubAckPacket(mid).write())

    def pause(self) -> None:
        """Stop reading: the broker keeps what we cannot take."""
        if not self._paused and self._transport is not None:
            self._transport.pause_reading()
        self._paused = True

    def resume(self) -> None:
        """Read again."""
        if self._paused and self._transport is not None:
            self._heard_at = self._progress_at = self._loop.time()  # while we did not read, silence was our own doing
            self._transport.resume_reading()
        self._paused = False

    async def close(self, *, flush_timeout_s: float = 1.0) -> None:
        """Send what is queued and a DISCONNECT; then the connection is gone."""
        self._closing = True
        if self._transport is not None:
            self._send(mqtt5.DisconnectPacket().write())
            self._flush()
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(flush_timeout_s):
                    await asyncio.shield(self._gone)
        self._drop("The MQTT connection was closed.")

    # -- of the transport ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self._gone.done():
            self._gone.set_result(None)
        self._lose(f"The MQTT connection ended: {describe_failure(exc) if exc else 'the broker closed it'}.")

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._is_reading = True
        try:
            for packet in self._reader.feed(data):
                self._handle(packet)
                if self._transport is None or self._closing:
                    return
        except FramingError as error:
            _log.warning("unreadable MQTT packet: %s", error)
            self._lose(f"The broker sent an unreadable packet: {error}.")
        finally:
            self._is_reading = False
            self._flush()

    def _handle(self, packet: Event) -> None:
        match packet:
            case mqtt5.PublishPacket():
                self._on_message(packets.decode(packet))
            case mqtt5.PubAckPacket():
                self._unconfirmed.discard(packet.packet_id)
                self._progress_at = self._heard_at
                self._on_published(packet.packet_id, packet.reason_code.value < _FAILURE)
            case Unreadable():
                _log.warning("dropped a message that cannot be read: %s", packet.reason)
                self._on_unreadable(packet.mid)
            case mqtt5.ConnAckPacket():
                self._connected(packet)
            case mqtt5.SubAckPacket():
                self._subscribed(packet)
            case mqtt5.DisconnectPacket():
                self._lose(f"The broker ended the MQTT connection: {_words(packet)}.")
            case _:  # a PINGRESP has done its work by being heard; nothing else was asked for
                pass

    def _connected(self, packet: mqtt5.ConnAckPacket) -> None:
        if packet.reason_code.value >= _FAILURE:
            self._fail_waiters(f"The MQTT broker refused the connection: {_words(packet)}.")
            return
        self.publish_window = packet.receive_max
        self.session_present = packet.session_present
        self._sent_bytes_max = packet.max_packet_size
        if packet.server_keep_alive is not None:
            self._keepalive_s = packet.server_keep_alive
        if not self._connack.done():
            self._connack.set_result(None)

    def _subscribed(self, packet: mqtt5.SubAckPacket) -> None:
        answer = self._subacks.pop(packet.packet_id, None)
        if answer is None or answer.done():
            return
        refused = [code.name for code in packet.reason_codes if code.value >= _FAILURE]
        if refused:
            answer.set_exception(MeshError(Code.UNAVAILABLE, f"The broker refused a subscription: {refused[0]}."))
        else:
            answer.set_result(None)

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        settings = self._settings
        if settings.tls is None:
            await self._loop.create_connection(lambda: self, settings.host, settings.port)
            return
        stream = TlsStream(
            settings.tls.context(),
            self,
            self._loop,
            server_side=False,
            server_hostname=settings.host,
            handshake_timeout_s=settings.connect_timeout_s,
        )
        await self._loop.create_connection(lambda: stream, settings.host, settings.port)
        try:
            await stream.ready
        except BaseException:
            stream.abort()
            raise

    def _connect_packet(self) -> mqtt5.ConnectPacket:
        settings, last = self._settings, self._settings.will
        return mqtt5.ConnectPacket(
            settings.client_id,
            clean_start=settings.session_expiry_s == 0,
            will=None if last is None else packets.will(last, settings.will_delay_s),
            keep_alive=settings.keepalive_s,
            session_expiry_interval=settings.session_expiry_s,
            receive_max=settings.receive_max,
            max_packet_size=settings.packet_bytes_max,
        )

    def _require_open(self) -> None:
        if self._transport is None or self._closing:
            raise MeshError(Code.UNAVAILABLE, "The MQTT connection is gone.")

    def _next_mid(self) -> int:
        if len(self._unconfirmed) + len(self._subacks) >= MID_MAX:
            raise MeshError(Code.UNAVAILABLE, "The broker has not confirmed 65535 messages; wait for it.")
        while True:
            self._mid = self._mid % MID_MAX + 1
            if self._mid not in self._unconfirmed and self._mid not in self._subacks:
                return self._mid

    def _send(self, packet: bytes) -> None:
        """Queue a packet; what one turn of the loop, or one piece of input, has brought about leaves in one write."""
        if not self._out and not self._is_reading:
            self._loop.call_soon(self._flush)
        self._out.append(packet)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out and self._transport is not None:
            self._transport.write(b"".join(out))

    def _tick(self) -> None:
        """Show that we live, and see whether the broker does."""
        if self._transport is None:
            return
        now, keepalive_s, stall_s = self._loop.time(), self._keepalive_s, self._settings.stall_s
        if not self._paused:
            if keepalive_s and now - self._heard_at > 1.5 * keepalive_s:
                self._lose("The MQTT connection ended: the broker is silent.")
                return
            if self._unconfirmed and now - self._progress_at > stall_s:
                self._lose(f"The MQTT connection ended: the broker confirmed nothing for {stall_s:g} s.")
                return
        if keepalive_s:
            self._send(mqtt5.PingReqPacket().write())
        pause_s = min(stall_s, keepalive_s or stall_s) / 2
        self._timer = self._loop.call_later(pause_s, self._tick)

    def _lose(self, reason: str) -> None:
        closing, self._closing = self._closing, True
        opened = self._connack.done() and not self._connack.cancelled() and self._connack.exception() is None
        self._drop(reason)
        if opened and not closing:
            self._on_lost(reason)

    def _drop(self, reason: str) -> None:
        """Close the socket without ceremony."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self._out.clear()
        self._fail_waiters(reason)

    def _fail_waiters(self, reason: str) -> None:
        waiters = [self._connack, *self._subacks.values()]
        self._subacks.clear()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(MeshError(Code.UNAVAILABLE, reason))
                waiter.exception()  # nobody may be waiting any more


def _words(packet: mqtt5.ConnAckPacket | mqtt5.DisconnectPacket) -> str:
    return packet.reason_str or packet.reason_code.name.replace("_", " ").lower()
