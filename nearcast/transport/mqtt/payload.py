"""Requests and answers as MQTT payloads, for both ends: a device encodes and the node decodes, and the way back.

The format of a request is its Content Type; that of an answer is what `accept` names, else the same. A pair of payload
and user properties is a whole message but for its topic, correlation and expiry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse
from nearcast.transport.mqtt import content_types as types
from nearcast.transport.mqtt import payload_cbor, payload_json, payload_media, payload_raw
from nearcast.transport.mqtt.payload_spec import Asked, find_output
from nearcast.transport.mqtt.status import require_success
from nearcast.wire.request import TensorRequest, WireRequest
from nearcast.wire.response import WireResponse
from nearcast.wire.tensors import elements_of

Properties = dict[str, str]


def encode_request(request: InferRequest, content_type: str = types.PROTOBUF) -> tuple[bytes, Properties]:
    """A device's request as a payload, and the user properties that belong to it.

    Args:
        request: what is asked; model and version travel in the topic.
        content_type: one of `REQUEST_TYPES`. An image or a sound is the only element of a BYTES tensor.

    Raises:
        MeshError: INVALID_REQUEST if the format cannot carry it, UNSUPPORTED for an unknown format.
    """
    match types.media_type(content_type):
        case types.OCTETS:
            return payload_raw.encode_request(request)
        case types.JSON:
            return payload_json.encode_request(request), {}
        case types.CBOR:
            return payload_cbor.encode_request(request), {}
        case types.PROTOBUF:
            return request.encode(), {}
        case kind if kind in (*types.IMAGES, types.WAV):
            return _encode_file(request)
        case kind:
            raise _unknown(kind)


def decode_request(payload: bytes, content_type: str, asked: Asked, *, accept: str = "") -> InferRequest:
    """The inference request that a message stands for.

    Args:
        payload: the message's.
        content_type: one of `REQUEST_TYPES`.
        asked: what the topic, the properties and the model's description say.
        accept: the format of the answer, where it is known: one that cannot carry it is refused before the model runs.

    Raises:
        MeshError: INVALID_REQUEST saying what does not fit, UNSUPPORTED for what the model does not take.
    """
    decode = _DECODERS.get(content_type)
    if decode is None:
        raise _unknown(content_type)
    request = decode(payload, asked)
    if accept == types.OCTETS and len(request.requested_outputs()) != 1:
        find_output(asked)
    return request


def encode_reply(response: InferResponse, content_type: str, *, output: str = "") -> tuple[bytes, Properties]:
    """The node's answer as a payload, and the user properties that describe it.

    Args:
        response: what was answered.
        content_type: one of `REPLY_TYPES`.
        output: the one that a raw payload holds; "" = the only one.

    Raises:
        MeshError: INVALID_REQUEST if the format cannot carry it.
    """
    if content_type == types.OCTETS:
        return payload_raw.encode_reply(response, output)
    if content_type == types.PROTOBUF:
        return response.encode(), {}
    return (payload_cbor if content_type == types.CBOR else payload_json).encode_reply(response), {}


def decode_reply(payload: bytes, content_type: str, user: Mapping[str, str], *, model: str) -> InferResponse:
    """The answer that a device received.

    Args:
        payload: the message's.
        content_type: the message's.
        user: its user properties.
        model: that was asked; not every format repeats it.

    Raises:
        MeshError: what the mesh answered instead; INTERNAL if the answer cannot be read.
    """
    served = require_success(user)
    try:
        match types.media_type(content_type):
            case types.OCTETS:
                return payload_raw.decode_reply(payload, user, model, served)
            case types.JSON:
                return payload_json.decode_reply(payload, served)
            case types.CBOR:
                return payload_cbor.decode_reply(payload, model, served)
            case types.PROTOBUF:
                return WireResponse(payload, served)
            case kind:
                raise _unknown(kind)
    except MeshError as error:
        raise MeshError(Code.INTERNAL, f"The answer cannot be read. {error.message}") from error


def _encode_file(request: InferRequest) -> tuple[bytes, Properties]:
    inputs = request.decode()
    ((name, array),) = inputs.items() if len(inputs) == 1 else (("", None),)
    elements = [] if array is None else elements_of(array)
    if len(elements) != 1 or request.parameters:
        raise MeshError(Code.INVALID_REQUEST, "A file is the only element of the only input, and has no parameters.")
    return elements[0], {"name": name}


def _decode_protobuf(payload: bytes, asked: Asked) -> InferRequest:
    try:
        sent = WireRequest(payload)
    except MeshError as error:
        raise MeshError(error.code, f"The payload is no ModelInferRequest. {error.message}") from error
    if sent.model not in ("", asked.model):
        raise MeshError(
            Code.INVALID_REQUEST, f"The payload names model '{sent.model[:64]}', the topic names '{asked.model}'."
        )
    if sent.is_extended:
        sent.requested_outputs()  # refuses those that are wanted in another form
    version = asked.version or sent.version
    if not asked.parameters and sent.model == asked.model and sent.version == version:
        return sent
    return TensorRequest(
        model=asked.model,
        version=version,
        id=sent.id,
        inputs=sent.decode(),
        parameters={**sent.parameters, **asked.parameters},
        outputs=sent.requested_outputs(),
    )


def _unknown(kind: str) -> MeshError:
    return MeshError(Code.UNSUPPORTED, f"{kind[:80]!r} is not understood; use {', '.join(_DECODERS)}.")


_DECODERS: Mapping[str, Callable[[bytes, Asked], InferRequest]] = {
    types.OCTETS: payload_raw.decode_request,
    types.JSON: payload_json.decode_request,
    types.CBOR: payload_cbor.decode_request,
    types.PROTOBUF: _decode_protobuf,
    **dict.fromkeys(types.IMAGES, payload_media.decode_image),
    types.WAV: payload_media.decode_wav,
}
