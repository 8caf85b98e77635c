"""One MQTT application message, without the client library's types."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A PUBLISH that came in or goes out. `user` holds the last value of each user property.

    `mid` is the packet identifier of an incoming message, valid only on the connection it came over; `dup` says that
    the broker may have delivered it before.
    """

    topic: str
    payload: bytes = b""
    qos: int = 1
    retain: bool = False
    mid: int = 0
    dup: bool = False
    content_type: str = ""
    correlation: bytes = b""
    response_topic: str = ""
    expiry_s: int | None = None
    user: Mapping[str, str] = {}

    def expiring(self, expiry_s: int) -> Message:
        """The same message with a Message Expiry in seconds."""
        return msgspec.structs.replace(self, expiry_s=expiry_s)
