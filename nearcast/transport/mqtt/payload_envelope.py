"""The envelope: what a device without MQTT 5 properties says and is told in the body, as JSON or as CBOR.

A request has `id`, `ttl_ms` and `model_version` beside `inputs`; an answer has `id`, `status`, `served_by`, … beside
`outputs`, or beside `error`. Raw bytes (`…/bin`) have no envelope: the answer is raw too, and what went wrong is JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cbor2
import msgspec

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse
from nearcast.transport.mqtt import content_types as types
from nearcast.transport.mqtt import payload_cbor, payload_json

_NUMBERS = frozenset({"status", "retry-after-ms"})
_IN_BODY = frozenset({"model-version", "status-message"})
"""Properties that the body says in a field of its own."""


class Head(msgspec.Struct, frozen=True):
    """What admission needs of an envelope; the rest is read when the request runs."""

    id: str = ""
    ttl_ms: float | None = None
    model_version: str | int = ""


def read_head(payload: bytes, content_type: str) -> Head:
    """The head of a request.

    Raises:
        MeshError: UNSUPPORTED if the payload is no envelope, TOO_LARGE for too many items.
    """
    try:
        if content_type == types.CBOR:
            return msgspec.convert(payload_cbor.load_map(payload), Head)
        return msgspec.json.decode(payload, type=Head)
    except msgspec.ValidationError as error:
        raise MeshError(Code.UNSUPPORTED, f"The payload is no request: {error}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MeshError) as error:
        if isinstance(error, MeshError) and error.code is Code.TOO_LARGE:
            raise
        raise MeshError(
            Code.UNSUPPORTED,
            "Without a Content Type the payload must be JSON like "
            '{"id": "1", "ttl_ms": 5000, "inputs": […]}; publish raw bytes to …/bin and a CBOR map to …/cbor.',
        ) from error


def encode_reply(response: InferResponse, content_type: str, id_: str, user: Mapping[str, str]) -> tuple[str, bytes]:
    """Content Type and payload of an answer; `user` are the properties that it would have.

    Raises:
        MeshError: INVALID_REQUEST if the format cannot carry it.
    """
    fields = _fields(user)
    if content_type == types.CBOR:
        names = {"id": id_, "model_name": response.model, "model_version": response.version}
        return types.ENVELOPE_CBOR, payload_cbor.encode_reply(response, names | fields)
    if not response.id:
        fields = {"id": id_} | fields
    return types.ENVELOPE_JSON, payload_json.encode_reply(response, fields)


def encode_failure(content_type: str, id_: str, user: Mapping[str, str]) -> tuple[str, bytes]:
    """Content Type and payload of a failure; `user` are the properties that it would have."""
    body = {"id": id_, **_fields(user), "error": user["status-message"]}
    if content_type == types.CBOR:
        return types.ENVELOPE_CBOR, cbor2.dumps(body)
    return types.ENVELOPE_JSON, msgspec.json.encode(body)


def mark_repeated(content_type: str, payload: bytes) -> bytes:
    """The payload of an answer that is sent once more; an envelope says so in the body."""
    if content_type == types.ENVELOPE_JSON:
        return b'{"dedup":1,' + payload[1:]
    if content_type == types.ENVELOPE_CBOR:
        return cbor2.dumps({"dedup": 1, **cbor2.loads(payload)})
    return payload


def _fields(user: Mapping[str, str]) -> dict[str, Any]:
    """User properties as fields of an envelope: `served-by` becomes `served_by`, numbers are numbers."""
    return {
        name.replace("-", "_"): int(value) if name in _NUMBERS else value
        for name, value in user.items()
        if name not in _IN_BODY
    }
