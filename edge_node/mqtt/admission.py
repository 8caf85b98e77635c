"""From a message to a request that can be stored, or to a refusal. Pure: no clock, no loop, no storage."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import msgspec

from edge_node.mqtt.idempotency import digest_of
from edge_node.mqtt.limits import MessageLimits
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt import content_types as types
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.limits import USER_PROPERTIES_MAX
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.payload_envelope import read_head
from nearcast.transport.mqtt.status import STATUS

DIGEST_PROPERTIES = ("dtype", "shape", "name", "sequence-id", "sequence-start", "sequence-end", "priority")
KEPT_PROPERTIES = frozenset({*DIGEST_PROPERTIES, "output", "traceparent"})
"""What the execution reads; the others are not stored."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One admitted request, as the inbox stores it (without its payload).

    Attributes:
        correlation: Correlation Data, or the envelope's id; random where the device gave none: it matches nothing.
        echo: whether the device gave the correlation and gets it back.
        envelope: sent by a device without MQTT 5 properties; the answer is an envelope too, or raw bytes.
        content_type, accept: formats of the request and of its answer.
        user: the properties in `KEPT_PROPERTIES`.
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
    accept: str = types.OCTETS
    retry_after_ms: int | None = None


@dataclass(slots=True)
class _Asker:
    """How whoever sent a message can be told what became of it, as far as it has been read."""

    reply_topic: str
    correlation: bytes
    envelope: bool
    accept: str


def admit(message: Message, now: float, limits: MessageLimits, *, nonce: bytes) -> Request | Refusal:
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
    # A device without MQTT 5 sends no property at all; what it may say is in the topic and in the payload.
    envelope = not (message.content_type or message.correlation or message.response_topic or message.user)
    announced = types.SUFFIXES.get(topic.suffix, "")
    content_type = types.media_type(message.content_type) or announced or (types.JSON if envelope else types.OCTETS)
    accept = types.media_type(message.user.get("accept", "")) or types.reply_type(content_type)
    asker = _Asker(topic.reply, message.correlation, envelope, accept)
    try:
        _require_own_topic(message, topic, asker)
        _require_bounds(message, content_type, limits)
        _require_formats(content_type, accept, announced)
        if not topic.model:
            raise MeshError(
                Code.INVALID_REQUEST,
                "The topic must end with a model's name of [a-z0-9_-]{1,64}, an optional @version, "
                "and optionally /json, /cbor or /bin.",
            )
        return _read(message, topic, asker, content_type, now, limits, nonce)
    except MeshError as error:
        return Refusal(
            status=STATUS[error.code],
            reason=error.message,
            code=error.code,
            topic=asker.reply_topic,
            correlation=asker.correlation,
            envelope=envelope,
            accept=accept,
        )


def _require_own_topic(message: Message, topic: topics.RequestTopic, asker: _Asker) -> None:
    asked = message.response_topic
    if not asked:
        return
    if not topics.is_own_reply_topic(asked, topic.tenant, topic.device):
        prefix = topics.down_prefix(topic.tenant, topic.device)
        raise MeshError(
            Code.FORBIDDEN,
            f"The Response Topic must lie under {prefix} of the requester, with at most {topics.TOPIC_LEVELS_MAX} "
            "levels and no wildcard.",
        )
    asker.reply_topic = asked


def _require_bounds(message: Message, content_type: str, limits: MessageLimits) -> None:
    size_bytes = len(message.payload)
    bytes_max = limits.payload_bytes_max
    if content_type in types.IMAGES:
        bytes_max = min(bytes_max, limits.image_bytes_max)
    elif content_type == types.JSON:
        bytes_max = min(bytes_max, limits.json_bytes_max)
    if size_bytes > bytes_max:
        raise MeshError(
            Code.TOO_LARGE, f"The payload has {size_bytes} bytes; at most {bytes_max} are accepted as {content_type}."
        )
    if len(message.correlation) > limits.correlation_bytes_max:
        raise MeshError(
            Code.INVALID_REQUEST, f"Correlation Data may have at most {limits.correlation_bytes_max} bytes."
        )
    user = message.user
    if len(user) > USER_PROPERTIES_MAX:
        raise MeshError(Code.INVALID_REQUEST, f"A message may have at most {USER_PROPERTIES_MAX} user properties.")
    if user and sum(map(len, user)) + sum(map(len, user.values())) > limits.user_chars_max:
        raise MeshError(
            Code.INVALID_REQUEST, f"User properties may have at most {limits.user_chars_max} characters together."
        )


def _require_formats(content_type: str, accept: str, announced: str) -> None:
    for kind, known in ((content_type, types.REQUEST_TYPES), (accept, types.REPLY_TYPES)):
        if kind not in known:
            what = "Content Type" if known is types.REQUEST_TYPES else "user property `accept`"
            raise MeshError(Code.UNSUPPORTED, f"The {what} {kind[:80]!r} is not understood; use {', '.join(known)}.")
    if announced and content_type != announced:
        raise MeshError(Code.INVALID_REQUEST, f"The topic announces {announced}, the Content Type is {content_type}.")


def _read(
    message: Message,
    topic: topics.RequestTopic,
    asker: _Asker,
    content_type: str,
    now: float,
    limits: MessageLimits,
    nonce: bytes,
) -> Request:
    version, ttl, user = topic.version, None, message.user
    if user:
        version, ttl = version or user.get("version", ""), user.get("ttl-ms")
    if asker.envelope and content_type != types.OCTETS:
        head = read_head(message.payload, content_type)
        asker.correlation = head.id.encode()
        if len(asker.correlation) > limits.correlation_bytes_max:
            raise MeshError(Code.INVALID_REQUEST, f"The id may have at most {limits.correlation_bytes_max} bytes.")
        version, ttl = version or str(head.model_version), None if head.ttl_ms is None else str(head.ttl_ms)
    if version and not topics.is_version(version):
        raise MeshError(Code.INVALID_REQUEST, "The version must be a release number or a name like 1.2.0.")
    return Request(
        tenant=topic.tenant,
        device=topic.device,
        model=topic.model,
        version=version,
        correlation=asker.correlation or nonce,
        echo=bool(asker.correlation),
        envelope=asker.envelope,
        reply_topic=asker.reply_topic,
        content_type=content_type,
        accept=asker.accept,
        user={name: value for name, value in user.items() if name in KEPT_PROPERTIES},
        arrived=now,
        deadline=now + _ttl_ms(ttl, message.expiry_s, limits) / 1000.0,
        digest=_digest(topic.model, version, f"envelope {content_type}" if asker.envelope else content_type, message),
    )


def _ttl_ms(stated: str | None, expiry_s: int | None, limits: MessageLimits) -> float:
    """The smaller of `ttl-ms` and the remaining Message Expiry; the default where neither is given."""
    bound_ms = limits.ttl_max_ms if expiry_s is None else min(limits.ttl_max_ms, expiry_s * 1000.0)
    if stated is None:
        return bound_ms if expiry_s is not None else min(bound_ms, limits.ttl_default_ms)
    try:
        value_ms = float(stated)
    except ValueError:
        value_ms = -1.0
    if not 0.0 < value_ms < inf:
        raise MeshError(Code.INVALID_REQUEST, "ttl-ms must be a positive number of milliseconds.")
    return min(bound_ms, value_ms)


def _digest(model: str, version: str, form: str, message: Message) -> bytes:
    fields = [("model", model), ("version", version), ("content-type", form)]
    fields += [(name, message.user[name]) for name in DIGEST_PROPERTIES if name in message.user]
    return digest_of(fields, message.payload)
