"""Payloads and properties: from a stored request to tensors, from an answer to a message.

Content types: `application/octet-stream` is one tensor, little-endian and row-major, described by the user properties
`dtype`, `shape` and `name` or else by the model; `application/x-protobuf` is a `ModelInferRequest`; `application/json`
is the REST body.
A device without MQTT 5 properties sends the REST body with `id` and `ttl_ms` beside the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import msgspec

from edge_node.mqtt.admission import Refusal, Request
from edge_node.mqtt.ledger.records import Reply
from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, Parameter, Served, TensorSpec
from nearcast.transport.json_tensors import Wanted, decode_request, encode_response
from nearcast.transport.mqtt.message import Message
from nearcast.transport.outputs import as_they_are, refuse_forms
from nearcast.wire.request import TensorRequest, WireRequest
from nearcast.wire.tensors import datatype_of, from_raw, size_bytes, to_raw

OCTETS = "application/octet-stream"
JSON = "application/json"
PROTOBUF = "application/x-protobuf"
DIMENSIONS_MAX = 16


def to_inference(
    request: Request, payload: bytes, metadata: ModelMetadata, parameters: Mapping[str, Parameter]
) -> InferRequest:
    """The inference request that a message stands for; `parameters` outrank those of the payload.

    Raises:
        MeshError: INVALID_REQUEST saying what does not fit.
    """
    if request.content_type == OCTETS:
        return _from_octets(request, payload, metadata, parameters)
    if request.content_type == PROTOBUF:
        return _from_protobuf(request, payload, parameters)
    return _from_json(request, payload, parameters)


def reply(request: Request, response: InferResponse) -> Reply:
    """The message for an answer.

    Raises:
        MeshError: INVALID_REQUEST if the answer does not fit the content type that was asked for.
    """
    user = {"status": "200", **_served(response)}
    if request.accept == OCTETS:
        payload = _to_octets(request, response, user)
    elif request.accept == PROTOBUF:
        payload = response.encode()
    else:
        payload = _to_json(request, response, user)
    return Reply(
        topic=request.reply_topic,
        payload=payload,
        content_type=request.accept,
        correlation=request.correlation if request.echo and not request.envelope else b"",
        user=user,
        expires=request.deadline,
    )


def error_reply(request: Request, error: MeshError, *, status: int | None, expires: float) -> Reply:
    """The message for a failure; `status` defaults to the catalogue's HTTP number."""
    number = CATALOGUE[error.code].http if status is None else status
    user = _failure(number, error.code, error.message, error.retry_after_ms)
    correlation = request.correlation if request.echo else b""
    content_type, payload = _error_body(request.accept, envelope=request.envelope, user=user, correlation=correlation)
    return Reply(
        topic=request.reply_topic,
        payload=payload,
        content_type=content_type,
        correlation=b"" if request.envelope else correlation,
        user=user,
        expires=expires,
    )


def refusal_message(refusal: Refusal) -> Message:
    """The message for a request that was not accepted."""
    user = _failure(refusal.status, refusal.code, refusal.reason, refusal.retry_after_ms)
    kind, payload = _error_body(OCTETS, envelope=refusal.envelope, user=user, correlation=refusal.correlation)
    return Message(
        topic=refusal.topic,
        payload=payload,
        content_type=kind,
        correlation=b"" if refusal.envelope else refusal.correlation,
        user=user,
    )


def refusal_of(request: Request, status: int, code: Code, reason: str, *, retry_after_ms: int | None = None) -> Refusal:
    """The refusal of a request that was well-formed."""
    return Refusal(
        status=status,
        reason=reason,
        code=code,
        topic=request.reply_topic,
        correlation=request.correlation if request.echo else b"",
        envelope=request.envelope,
        retry_after_ms=retry_after_ms,
    )


def _from_octets(
    request: Request, payload: bytes, metadata: ModelMetadata, parameters: Mapping[str, Parameter]
) -> InferRequest:
    spec = _input_of(request, metadata)
    datatype = request.user.get("dtype", spec.datatype).upper()
    stated = request.user.get("shape")
    shape = _fitting_shape(spec, datatype, payload) if stated is None else _parse_shape(stated)
    tensor = from_raw(spec.name, datatype, shape, payload, 0, len(payload))
    return TensorRequest(
        model=request.model, version=request.version, inputs={spec.name: tensor}, parameters=dict(parameters)
    )


def _input_of(request: Request, metadata: ModelMetadata) -> TensorSpec:
    names = [spec.name for spec in metadata.inputs]
    wanted = request.user.get("name", names[0] if len(names) == 1 else "")
    for spec in metadata.inputs:
        if spec.name == wanted:
            return spec
    raise MeshError(
        Code.INVALID_REQUEST,
        f"Name one input of '{request.model}' with the user property `name` (it has {', '.join(names)}), "
        "or send all of them as JSON or protobuf.",
    )


def _parse_shape(text: str) -> tuple[int, ...]:
    parts = text.strip("[] ").split(",") if text.strip("[] ") else []
    digits = [part.strip() for part in parts]
    if len(digits) > DIMENSIONS_MAX or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in digits):
        raise MeshError(Code.INVALID_REQUEST, "The user property `shape` must be like 1,224,224,3.")
    return tuple(int(part) for part in digits)


def _fitting_shape(spec: TensorSpec, datatype: str, payload: bytes) -> tuple[int, ...]:
    """The model's own shape. One free axis takes what the payload's length leaves over; more must be stated."""
    free = [axis for axis, size in enumerate(spec.shape) if size < 0]
    if not free:
        return spec.shape
    fixed = size_bytes(datatype, [size for size in spec.shape if size >= 0])
    if len(free) > 1 or not fixed or not payload or len(payload) % fixed:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{len(payload)} bytes do not fit {datatype} {list(spec.shape)}; state the user property `shape`.",
        )
    return tuple(len(payload) // fixed if size < 0 else size for size in spec.shape)


def _from_protobuf(request: Request, payload: bytes, parameters: Mapping[str, Parameter]) -> InferRequest:
    sent = WireRequest(payload)
    _require_model(request, sent.model)
    version = request.version or sent.version
    if not parameters and sent.model == request.model and sent.version == version:
        return sent
    return TensorRequest(
        model=request.model,
        version=version,
        id=sent.id,
        inputs=sent.decode(),
        parameters={**sent.parameters, **parameters},
        outputs=sent.requested_outputs(),
    )


def _require_model(request: Request, named: str) -> None:
    if named not in ("", request.model):
        raise MeshError(
            Code.INVALID_REQUEST, f"The payload names model '{named[:64]}', the topic names '{request.model}'."
        )


def _to_octets(request: Request, response: InferResponse, user: dict[str, str]) -> bytes:
    outputs = response.decode()
    names = list(outputs)
    wanted = request.user.get("output", names[0] if len(names) == 1 else "")
    if wanted not in outputs:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"Name one output of '{request.model}' with the user property `output` (it has {', '.join(names)}), "
            f"or set `accept` to {JSON}.",
        )
    tensor = outputs[wanted]
    user["name"] = wanted
    user["dtype"] = datatype_of(tensor.dtype)
    user["shape"] = ",".join(str(size) for size in tensor.shape)
    assert prod(tensor.shape) == tensor.size
    return to_raw(tensor)


def _served(response: InferResponse) -> dict[str, str]:
    served: Served = response.served
    out = {"model-version": served.version or response.version, "served-by": served.node, "tier": served.tier}
    return {name: value for name, value in out.items() if value}


def _failure(status: int, code: str, reason: str, retry_after_ms: int | None) -> dict[str, str]:
    user = {"status": str(status), "code": str(code), "status-message": reason}
    if retry_after_ms is not None:
        user["retry-after-ms"] = str(retry_after_ms)
    return user


def _error_body(accept: str, *, envelope: bool, user: Mapping[str, str], correlation: bytes) -> tuple[str, bytes]:
    """A body only where the client reads JSON anyway: for the others the properties say it all."""
    if envelope:
        body = {"id": correlation.decode(errors="replace"), **_json_names(user), "error": user["status-message"]}
        return JSON, msgspec.json.encode(body)
    if accept == JSON:
        return JSON, msgspec.json.encode({"error": user["status-message"]})
    return "", b""


def _json_names(user: Mapping[str, str]) -> dict[str, str | int]:
    """User properties as fields of an envelope: `served-by` becomes `served_by`, numbers are numbers."""
    out: dict[str, str | int] = {}
    for name, value in user.items():
        if name != "status-message":
            out[name.replace("-", "_")] = int(value) if name in ("status", "retry-after-ms") else value
    return out


def _from_json(request: Request, payload: bytes, parameters: Mapping[str, Parameter]) -> InferRequest:
    sent, wanted = decode_request(request.model, request.version, payload, len(payload))
    refuse_forms(wanted.forms)
    if not parameters:
        return sent
    return TensorRequest(
        model=sent.model,
        version=sent.version,
        id=sent.id,
        inputs=sent.decode(),
        parameters={**sent.parameters, **parameters},
        outputs=sent.requested_outputs(),
    )


def _to_json(request: Request, response: InferResponse, user: Mapping[str, str]) -> bytes:
    body, _ = encode_response(response, as_they_are(response), Wanted())  # nothing may follow the JSON here
    if not request.envelope:
        return body
    fields: dict[str, object] = msgspec.json.decode(body)
    return msgspec.json.encode({**fields, **_json_names(user), "id": response.id})
