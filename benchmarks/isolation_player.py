"""A client with a certificate that writes down what it hears. It is paho: the judge shares no code with the node."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from nearcast.identity.device import DeviceIdentity

WAIT_S = 10.0


class Player:
    """Somebody with a certificate at a broker.

    Attributes:
        heard: (topic, payload) of everything that was delivered, in order.
        statuses: what their user property `status` said.
        refused: why there is no connection; "" = there is one.
    """

    def __init__(
        self,
        files: tuple[Path, Path, Path],
        port: int,
        *,
        client_id: str = "anything",
        clean: bool = True,
        session_s: int = 0,
        will: tuple[str, bytes] | None = None,
    ) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.statuses: list[str] = []
        self.refused = ""
        self.session_present = False
        self.lost = threading.Event()
        self._answered = threading.Event()
        self._pending: dict[int, threading.Event] = {}
        ca, certificate, key = files
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv5, reconnect_on_failure=False
        )
        self.client.tls_set(str(ca), str(certificate), str(key))
        self.client.on_message = self._heard
        self.client.on_connect = self._connected
        self.client.on_disconnect = self._disconnected
        self.client.on_subscribe = lambda _c, _u, mid, *_: self._done(mid)
        self.client.on_publish = lambda _c, _u, mid, *_: self._done(mid)
        self.client.on_socket_open = _set_nodelay
        if will is not None:
            self.client.will_set(*will, qos=1)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = session_s
        try:
            self.client.connect("127.0.0.1", port, clean_start=clean, properties=properties)
        except (OSError, ssl.SSLError) as error:
            self.refused = str(error)
            return
        self.client.loop_start()
        self._answered.wait(WAIT_S)
        if self.lost.is_set() and not self.refused:
            self.refused = "closed"

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self.heard]

    def subscribe(self, *filters: str) -> None:
        self._wait([self.client.subscribe(text, 1)[1] for text in filters])

    def say(self, topic: str, payload: bytes, *, retain: bool = False, response_topic: str = "") -> None:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if response_topic:
            properties.ResponseTopic = response_topic
            properties.CorrelationData = payload[:16]
            properties.ContentType = "application/octet-stream"
        self._wait([self.client.publish(topic, payload, 1, retain, properties).mid])

    def leave(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def vanish(self) -> None:
        """Lose the connection without a word, so that the will is said."""
        with contextlib.suppress(OSError):
            connected = self.client.socket()
            if isinstance(connected, socket.socket):
                connected.shutdown(socket.SHUT_RDWR)
        self.client.loop_stop()

    def _heard(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        self.heard.append((message.topic, bytes(message.payload)))
        self.statuses += [value for key, value in getattr(message.properties, "UserProperty", []) if key == "status"]

    def _connected(self, _client: Any, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        self.session_present = flags.session_present
        if reason.is_failure:
            self.refused = str(reason)
        self._answered.set()

    def _disconnected(self, *_: Any) -> None:
        self.lost.set()
        self._answered.set()

    def _done(self, mid: int) -> None:
        self._pending.setdefault(mid, threading.Event()).set()

    def _wait(self, mids: Iterable[int | None]) -> None:
        for mid in mids:
            assert mid is not None
            deadline = time.monotonic() + WAIT_S
            while not self._pending.setdefault(mid, threading.Event()).wait(0.05) and not self.lost.is_set():
                assert time.monotonic() < deadline, "the broker confirmed nothing"
            self._pending.pop(mid, None)


def _set_nodelay(_client: Any, _data: Any, opened: Any) -> None:
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def is_greeted(files: tuple[Path, Path | None, Path | None], port: int) -> bool:
    """Whether a broker says a word to the holder of a certificate, or of none. `ca` = whom the holder trusts."""
    ca, certificate, key = files
    context = ssl.create_default_context(cafile=ca)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    connect = bytes.fromhex("10100004" + b"MQTT".hex() + "05020000" + "00" + "0003" + b"abc".hex())
    try:
        with (
            socket.create_connection(("127.0.0.1", port), WAIT_S) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as secured,
        ):
            secured.sendall(connect)
            return bool(secured.recv(1))
    except OSError:
        return False


def files_of(identity: DeviceIdentity) -> tuple[Path, Path, Path]:
    return identity.ca, identity.certificate, identity.key
