"""From a message on a stream's topic to an input that can be stored, or to the reason why not. Pure."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from datetime import UTC, datetime

from edge_node.mqtt.ledger.records import Input
from edge_node.mqtt.limits import MessageLimits
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.message import Message

BOOT_LENGTH_MAX = 64
TS_LENGTH_MAX = 64
SEQ_MAX = 2**63 - 1
KEPT_PROPERTIES = ("dtype", "shape", "name", "traceparent", "priority")
"""User properties that the execution reads; others are not stored."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A message that cannot be used. Nobody waits for an answer: it is acknowledged, counted and logged.

    `reason` is one word for a counter, `detail` a sentence.
    """

    reason: str
    detail: str


def admit_input(
    message: Message, now: float, wall: float, limits: MessageLimits, streams: Container[str]
) -> Input | Dropped:
    """Judge a message on a stream's topic.

    Args:
        message: as the broker delivered it.
        now: monotonic instant of its arrival in seconds.
        wall: the node's wall clock, seconds since 1970: the time of a message that says none itself.
        limits: bounds.
        streams: names of the streams that mean something here.
    """
    found = topics.parse_data(message.topic)
    if found is None:
        return Dropped("topic", "The topic names no tenant, device and stream of the form [a-z0-9_-]{1,64}.")
    tenant, device, stream = found
    if stream not in streams:
        return Dropped("unknown", f"No stream {stream!r} is configured here.")
    size_bytes = len(message.payload)
    if size_bytes > limits.payload_bytes_max:
        return Dropped("too_large", f"{size_bytes} bytes; at most {limits.payload_bytes_max} are accepted.")
    boot, seq, is_counted = _count_of(message)
    if not is_counted:
        return Dropped("count", "boot-id and seq belong together: a short text and a whole number from 0.")
    user = message.user
    return Input(
        tenant=tenant,
        device=device,
        stream=stream,
        boot=boot,
        seq=seq,
        ts=user.get("ts", "")[:TS_LENGTH_MAX] or _stamp(wall),
        content_type=message.content_type,
        user={name: user[name] for name in KEPT_PROPERTIES if name in user},
        arrived=now,
    )


def _stamp(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")


def _count_of(message: Message) -> tuple[str, int | None, bool]:
    """Boot and number of a message, and whether what it says of them can be used; "" and None where it says nothing."""
    boot, text = message.user.get("boot-id", ""), message.user.get("seq")
    if not boot and text is None:
        return "", None, True
    if not boot or text is None or len(boot) > BOOT_LENGTH_MAX:
        return "", None, False
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > SEQ_MAX:
        return "", None, False
    return boot, int(text), True
