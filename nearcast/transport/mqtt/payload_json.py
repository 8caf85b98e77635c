"""Tensors as the JSON of the Open Inference Protocol's REST body: the device's side, and answers in an envelope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, Parameter, Served
from nearcast.transport import json_tensors
from nearcast.transport.json_elements import read_elements
from nearcast.transport.json_tensors import JsonTensor, Parameters, Wanted, json_elements
from nearcast.transport.mqtt.payload_spec import Asked
from nearcast.transport.outputs import as_they_are, refuse_forms
from nearcast.wire.framing import encode_text
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import TensorResponse
from nearcast.wire.tensors import Array, datatype_of, from_elements


class _Answer(msgspec.Struct, frozen=True):
    """The body of an answer, as far as a device reads it."""

    outputs: Annotated[tuple[JsonTensor, ...], msgspec.Meta(max_length=1024)]
    model_name: str = ""
    model_version: str = ""
    id: str = ""
    parameters: Parameters = {}


_ANSWERS = msgspec.json.Decoder(_Answer)


def decode_request(payload: bytes, asked: Asked) -> InferRequest:
    """The request that a REST body stands for.

    Raises:
        MeshError: INVALID_REQUEST saying what does not fit; UNSUPPORTED for outputs in another form.
    """
    if not payload:
        raise MeshError(Code.INVALID_REQUEST, "The payload is empty; it must be JSON with `inputs`.")
    sent, wanted = json_tensors.decode_request(asked.model, asked.version, payload, len(payload))
    refuse_forms(wanted.forms)
    if not asked.parameters:
        return sent
    return TensorRequest(
        model=sent.model,
        version=sent.version,
        id=sent.id,
        inputs=sent.decode(),
        parameters={**sent.parameters, **asked.parameters},
        outputs=sent.requested_outputs(),
    )


def encode_request(request: InferRequest) -> bytes:
    """A request as REST body.

    Raises:
        MeshError: INVALID_REQUEST for values that JSON lacks.
    """
    inputs = [
        {
            "name": name,
            "datatype": datatype_of(array.dtype),
            "shape": array.shape,
            "data": json_elements(name, array),
        }
        for name, array in request.decode().items()
    ]
    body: dict[str, object] = {"inputs": inputs}
    if request.id:
        body["id"] = request.id
    if request.parameters:
        parameters: dict[str, Parameter] = dict(request.parameters)
        body["parameters"] = parameters
    if request.requested_outputs():
        body["outputs"] = [{"name": name} for name in request.requested_outputs()]
    return msgspec.json.encode(body)


def encode_reply(response: InferResponse, fields: Mapping[str, object] | None = None) -> bytes:
    """An answer as REST body; `fields` stand before its own.

    Raises:
        MeshError: INVALID_REQUEST for values that JSON lacks.
    """
    try:
        body, _ = json_tensors.encode_response(response, as_they_are(response), Wanted())  # nothing may follow the JSON
    except MeshError as error:
        what = error.message.partition(";")[0]
        raise MeshError(error.code, f"{what}; set `accept` to application/cbor or application/x-protobuf.") from error
    return body if not fields else msgspec.json.encode(fields)[:-1] + b"," + body[1:]


def decode_reply(payload: bytes, served: Served) -> InferResponse:
    """The answer that a REST body is.

    Raises:
        MeshError: INVALID_REQUEST if it is none.
    """
    try:
        body = _ANSWERS.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"The answer is no inference JSON: {error}.") from error
    return TensorResponse(
        model=body.model_name,
        version=body.model_version,
        id=body.id,
        parameters=body.parameters,
        outputs={tensor.name: _read(tensor) for tensor in body.outputs},
        served=served,
    )


def _read(tensor: JsonTensor) -> Array:
    elements = read_elements(tensor.name, tensor.datatype, bytes(tensor.data), tensor.shape)
    if tensor.datatype == "BYTES":
        elements = [encode_text(element) for element in elements]
    return from_elements(tensor.name, tensor.datatype, tensor.shape, elements)
