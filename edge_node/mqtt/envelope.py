"""From a stored request to tensors, and from an answer or an error to a message."""

from __future__ import annotations

from collections.abc import Mapping

import cbor2
import msgspec

from edge_node.mqtt.admission import Refusal, Request
from edge_node.mqtt.ledger.records import Reply
from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, Parameter
from nearcast.transport.mqtt import content_types as types
from nearcast.transport.mqtt import payload as payloads
from nearcast.transport.mqtt import payload_envelope
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.payload_spec import Asked
from nearcast.transport.mqtt.status import STATUS, failure, success


def to_inference(
    request: Request, payload: bytes, metadata: ModelMetadata, parameters: Mapping[str, Parameter]
) -> InferRequest:
    """The inference request that a message stands for; `parameters` outrank those of the payload.

    Raises:
        MeshError: INVALID_REQUEST saying what does not fit, UNSUPPORTED for what the model does not take.
    """
    asked = Asked(
        model=request.model,
        version=request.version,
        metadata=metadata,
        user=request.user,
        parameters=parameters,
        envelope=request.envelope,
    )
    accept = "" if request.envelope else request.accept  # without properties, several outputs are answered as JSON
    return payloads.decode_request(payload, request.content_type, asked, accept=accept)


def reply(request: Request, response: InferResponse) -> Reply:
    """The message for an answer.

    Raises:
        MeshError: INVALID_REQUEST if the answer does not fit the content type that was asked for.
    """
    user = success(response)
    if response.model not in ("", request.model):
        user["model"] = response.model  # the best that can be had now, and not what was asked for
    topic, kind = request.reply_topic, request.accept
    if not request.envelope:
        payload, described = payloads.encode_reply(response, kind, output=request.user.get("output", ""))
        user |= described
    elif kind == types.OCTETS and len(response.decode()) == 1:
        payload, _ = payloads.encode_reply(response, kind)
    else:
        topic = _json_topic(request.reply_topic, kind)
        kind, payload = payload_envelope.encode_reply(response, kind, _id(request), user)
    return Reply(
        topic=topic,
        payload=payload,
        content_type=kind,
        correlation=request.correlation if request.echo and not request.envelope else b"",
        user=user,
        expires=request.deadline,
    )


def error_reply(request: Request, error: MeshError, *, status: int | None, expires: float) -> Reply:
    """The message for a failure; `status` defaults to the code's."""
    number = STATUS[error.code] if status is None else status
    message = refusal_message(
        refusal_of(request, number, error.code, error.message, retry_after_ms=error.retry_after_ms)
    )
    return Reply(
        topic=message.topic,
        payload=message.payload,
        content_type=message.content_type,
        correlation=message.correlation,
        user=dict(message.user),
        expires=expires,
    )


def refusal_message(refusal: Refusal) -> Message:
    """The message for a request that was not accepted."""
    user = failure(refusal.status, refusal.code, refusal.reason, refusal.retry_after_ms)
    if refusal.envelope:
        id_ = refusal.correlation.decode(errors="replace")
        kind, payload = payload_envelope.encode_failure(refusal.accept, id_, user)
        topic = _json_topic(refusal.topic, refusal.accept)
        return Message(topic=topic, payload=payload, content_type=kind, user=user)
    kind, payload = _error_body(refusal.accept, refusal.reason)
    return Message(topic=refusal.topic, payload=payload, content_type=kind, correlation=refusal.correlation, user=user)


def refusal_of(request: Request, status: int, code: Code, reason: str, *, retry_after_ms: int | None = None) -> Refusal:
    """The refusal of a request that was well-formed."""
    return Refusal(
        status=status,
        reason=reason,
        code=code,
        topic=request.reply_topic,
        correlation=request.correlation if request.echo else b"",
        envelope=request.envelope,
        accept=request.accept,
        retry_after_ms=retry_after_ms,
    )


def _error_body(accept: str, reason: str) -> tuple[str, bytes]:
    """A body for people who look at payloads alone; devices read the properties, which say more."""
    if accept == types.CBOR:
        return types.CBOR, cbor2.dumps({"error": reason})
    return types.JSON, msgspec.json.encode({"error": reason})


def _id(request: Request) -> str:
    return request.correlation.decode() if request.echo else ""


def _json_topic(topic: str, kind: str) -> str:
    """Where a device that sent raw bytes hears what raw bytes cannot say: the last level tells the format."""
    return f"{topic.removesuffix('/bin')}/json" if kind == types.OCTETS else topic
