"""A message as a packet and back."""

from __future__ import annotations

from typing import Any

import mqtt5

from nearcast.transport.mqtt import limits
from nearcast.transport.mqtt.message import Message

EXPIRY_MAX_S = 2**32 - 1
_AT_LEAST_ONCE = mqtt5.QoS.AT_LEAST_ONCE


def decode(packet: mqtt5.PublishPacket) -> Message:
    """What arrived."""
    user = packet.user_properties
    return Message(
        topic=packet.topic,
        payload=packet.payload,
        qos=1 if packet.packet_id else 0,
        retain=packet.retain,
        mid=packet.packet_id or 0,
        dup=packet.duplicate,
        content_type=packet.content_type or "",
        correlation=packet.correlation_data or b"",
        response_topic=packet.response_topic or "",
        expiry_s=packet.message_expiry_interval,
        user=dict(user[: limits.USER_PROPERTIES_MAX + 1]) if user else {},
    )


def encode(message: Message, mid: int) -> bytes:
    """A PUBLISH; `mid` 0 = QoS 0.

    Raises:
        ValueError, TypeError, OverflowError: if it cannot be said in MQTT.
    """
    properties: dict[str, Any] = {}
    if message.content_type:
        properties["content_type"] = message.content_type
    if message.correlation:
        properties["correlation_data"] = message.correlation
    if message.response_topic:
        properties["response_topic"] = message.response_topic
    if message.expiry_s is not None:
        properties["message_expiry_interval"] = max(0, min(EXPIRY_MAX_S, message.expiry_s))
    if message.user:
        properties["user_properties"] = list(message.user.items())
    if mid:
        properties["packet_id"] = mid
        properties["qos"] = _AT_LEAST_ONCE
    return mqtt5.PublishPacket(message.topic, message.payload, retain=message.retain, **properties).write()


def will(message: Message, delay_s: int) -> mqtt5.Will:
    """What the broker says for us when we are gone."""
    return mqtt5.Will(
        message.topic,
        payload=message.payload,
        qos=_AT_LEAST_ONCE if message.qos else mqtt5.QoS.AT_MOST_ONCE,
        retain=message.retain,
        content_type=message.content_type or None,
        message_expiry_interval=message.expiry_s,
        will_delay_interval=delay_s,
        user_properties=list(message.user.items()),
    )
