"""From a message to a request that can be stored, or to a refusal. Pure: no clock, no loop, no storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from edge_node.mqtt.idempotency import digest_of
from edge_node.mqtt.limits import MqttLimits
from nearcast.errors import Code
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.message import Message

STATUS_EXPIRED = 408
STATUS_UNSUPPORTED_TYPE = 415
DIGEST_PROPERTIES = ("dtype", "shape", "name", "sequence-id", "sequence-start", "sequence-end", "priority")
ACCEPTED_TYPES = ("application/octet-stream", "application/json", "application/x-protobuf")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One admitted request, as the inbox stores it (without its payload).

    Attributes:
        correlation: Correlation Data, or the envelope's id; random where the device gave none: it matches nothing.
        echo: whether the device gave the correlation and gets it back.
        envelope: sent by a device without MQTT 5 properties; the answer is an envelope too.
        arrived, deadline: monotonic seconds of this boot.
    """

    tenant: str
    device: str
    model: str
    version: str = ""
    correlation: bytes
    echo: bool = True
    envelope: bool = False
    reply_topic: str
    content_type: str
    accept: str
    user: dict[str, str] = {}
    arrived: float
    deadline: float
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A message that never becomes a request. `topic` "" = nobody can be told."""

    status: int
    reason: str
    code: str = Code.INVALID_REQUEST
    topic: str = ""
    correlation: bytes = b""
    envelope: bool = False
    retry_after_ms: int | None = None


class _Head(msgspec.Struct):
    """What admission needs of an envelope; the rest is read when the request runs."""

    id: str = ""
    ttl_ms: float | None = None
    model_version: str | int = ""


Form = Literal["properties", "envelope"]


def admit(message: Message, now: float, limits: MqttLimits, *, nonce: bytes) -> Request | Refusal:
    """Judge a message on a request topic.

    Args:
        message: as the broker delivered it.
        now: monotonic instant of its arrival in seconds; its time to live counts from here.
        limits: bounds of the worker.
        nonce: unique bytes, the correlation of a request that brings none.
    """
    topic = topics.parse_request(message.topic)
    if topic is None:
        return Refusal(status=400, reason="The topic names no tenant and device of the form [a-z0-9_-]{1,64}.")
    form = _form_of(message)
    reply_topic, refusal = _reply_topic(message, topic)
    if refusal is not None:
        return refusal
    if not topic.model:
        reason = "The topic's last level is no model name with an optional @version."
        return _refuse(400, reason, Code.INVALID_REQUEST, reply_topic, message, form)
    if len(message.payload) > limits.payload_bytes_max:
        reason = f"The payload has {len(message.payload)} bytes; at most {limits.payload_bytes_max} are accepted."
        return _refuse(413, reason, Code.TOO_LARGE, reply_topic, message, form)
    if len(message.correlation) > limits.correlation_bytes_max:
        reason = f"Correlation Data may have at most {limits.correlation_bytes_max} bytes."
        return _refuse(400, reason, Code.INVALID_REQUEST, reply_topic, message, form)
    if form == "envelope":
        return _admit_envelope(message, topic, reply_topic, now, limits, nonce)
    return _admit_properties(message, topic, reply_topic, now, limits, nonce)


def _form_of(message: Message) -> Form:
    """A device without MQTT 5 sends no property at all; what it may say is in a JSON envelope."""
    spoken = message.content_type or message.correlation or message.response_topic or message.user
    return "properties" if spoken else "envelope"


def _reply_topic(message: Message, topic: topics.RequestTopic) -> tuple[str, Refusal | None]:
    asked = message.response_topic
    if not asked:
        return topic.reply, None
    if topics.is_own_reply_topic(asked, topic.tenant, topic.device):
        return asked, None
    reason = f"The Response Topic must lie under {topics.down_prefix(topic.tenant, topic.device)} of the requester."
    return "", _refuse(403, reason, Code.FORBIDDEN, topic.reply, message, "properties")


def _refuse(status: int, reason: str, code: str, topic: str, message: Message, form: Form) -> Refusal:
    return Refusal(
        status=status,
        reason=reason,
        code=code,
        topic=topic,
        correlation=message.correlation,
        envelope=form == "envelope",
    )


def _admit_properties(
    message: Message, topic: topics.RequestTopic, reply_topic: str, now: float, limits: MqttLimits, nonce: bytes
) -> Request | Refusal:
    content_type = _media_type(message.content_type) or "application/octet-stream"
    accept = _media_type(message.user.get("accept", "")) or content_type
    for kind in (content_type, accept):
        if kind not in ACCEPTED_TYPES:
            reason = f"{kind[:80]!r} is not understood; use {', '.join(ACCEPTED_TYPES)}."
            return _refuse(STATUS_UNSUPPORTED_TYPE, reason, Code.UNSUPPORTED, reply_topic, message, "properties")
    ttl_ms, problem = _ttl_ms(message.user.get("ttl-ms"), message.expiry_s, limits)
    if problem:
        return _refuse(400, problem, Code.INVALID_REQUEST, reply_topic, message, "properties")
    return Request(
        tenant=topic.tenant,
        device=topic.device,
        model=topic.model,
        version=topic.version or message.user.get("version", ""),
        correlation=message.correlation or nonce,
        echo=bool(message.correlation),
        reply_topic=reply_topic,
        content_type=content_type,
        accept=accept,
        user=dict(message.user),
        arrived=now,
        deadline=now + ttl_ms / 1000.0,
        digest=_digest(topic, content_type, message),
    )


def _admit_envelope(
    message: Message, topic: topics.RequestTopic, reply_topic: str, now: float, limits: MqttLimits, nonce: bytes
) -> Request | Refusal:
    try:
        head = msgspec.json.decode(message.payload, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError):
        reason = "Without a Content Type the payload must be a JSON object with id (text), ttl_ms and inputs."
        return _refuse(STATUS_UNSUPPORTED_TYPE, reason, Code.UNSUPPORTED, reply_topic, message, "envelope")
    correlation = head.id.encode()
    if len(correlation) > limits.correlation_bytes_max:
        reason = f"The id may have at most {limits.correlation_bytes_max} bytes."
        return _refuse(400, reason, Code.INVALID_REQUEST, reply_topic, message, "envelope")
    ttl_ms, problem = _ttl_ms(None if head.ttl_ms is None else str(head.ttl_ms), message.expiry_s, limits)
    if problem:
        return _refuse(400, problem, Code.INVALID_REQUEST, reply_topic, message, "envelope")
    return Request(
        tenant=topic.tenant,
        device=topic.device,
        model=topic.model,
        version=topic.version or str(head.model_version),
        correlation=correlation or nonce,
        echo=bool(correlation),
        envelope=True,
        reply_topic=reply_topic,
        content_type="application/json",
        accept="application/json",
        arrived=now,
        deadline=now + ttl_ms / 1000.0,
        digest=_digest(topic, "envelope", message),
    )


def _media_type(content_type: str) -> str:
    """`application/x-protobuf; messageType=…` without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def _ttl_ms(stated: str | None, expiry_s: int | None, limits: MqttLimits) -> tuple[float, str]:
    """The smaller of `ttl-ms` and the remaining Message Expiry; the default where neither is given."""
    bounds = [] if expiry_s is None else [expiry_s * 1000.0]
    if stated is not None:
        try:
            value = float(stated)
        except ValueError:
            value = -1.0
        if not 0.0 < value < float("inf"):
            return 0.0, "ttl-ms must be a positive number of milliseconds."
        bounds.append(value)
    return min(limits.ttl_max_ms, *bounds, *([] if bounds else [limits.ttl_default_ms])), ""


def _digest(topic: topics.RequestTopic, content_type: str, message: Message) -> bytes:
    fields = [("model", topic.model), ("version", topic.version or message.user.get("version", ""))]
    fields.append(("content-type", content_type))
    fields += [(name, message.user[name]) for name in DIGEST_PROPERTIES if name in message.user]
    return digest_of(fields, message.payload)
