"""One tensor as its bytes, little-endian and row-major: no parsing on a microcontroller.

The user properties `dtype`, `shape` and `name` describe it; what they leave out is the model's own. These are the bytes
of the protocol's `raw_input_contents`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, Served, TensorSpec
from nearcast.transport.mqtt.payload_spec import Asked, find_input, fit_shape, format_shape, parse_shape
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import TensorResponse
from nearcast.wire.tensors import Array, datatype_of, dtype_of, from_raw, to_raw


def decode_request(payload: bytes, asked: Asked) -> InferRequest:
    """The request that one raw tensor stands for.

    Raises:
        MeshError: INVALID_REQUEST saying what does not fit.
    """
    spec = find_input(asked)
    return TensorRequest(
        model=asked.model,
        version=asked.version,
        inputs={spec.name: _read(payload, spec, asked.user)},
        parameters=dict(asked.parameters),
    )


def whole(spec: TensorSpec, payload: bytes) -> Array:
    """A payload as the only element of a BYTES input: an image, a text, a sound file."""
    array = np.empty(1, dtype=object)
    array[0] = payload
    return array.reshape((1,) * len(spec.shape))


def encode_request(request: InferRequest) -> tuple[bytes, dict[str, str]]:
    """The only input of a request and the properties that describe it.

    Raises:
        MeshError: INVALID_REQUEST if there are several, or parameters.
    """
    inputs = request.decode()
    if len(inputs) != 1 or request.parameters:
        raise MeshError(
            Code.INVALID_REQUEST, "A raw payload is one tensor without parameters; use protobuf, JSON or CBOR."
        )
    ((name, array),) = inputs.items()
    payload, user = _write(name, array)
    if request.requested_outputs():
        user["output"] = request.requested_outputs()[0]
    return payload, user


def encode_reply(response: InferResponse, output: str) -> tuple[bytes, dict[str, str]]:
    """One output of an answer and the properties that describe it; "" = the only one.

    Raises:
        MeshError: INVALID_REQUEST naming the outputs that there are.
    """
    outputs = response.decode()
    wanted = output or (next(iter(outputs)) if len(outputs) == 1 else "")
    if wanted not in outputs:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"Name one output of '{response.model}' with the user property `output` (it has {', '.join(outputs)}), "
            "or set `accept` to application/json or application/cbor.",
        )
    return _write(wanted, outputs[wanted])


def decode_reply(payload: bytes, user: Mapping[str, str], model: str, served: Served) -> InferResponse:
    """The answer that a raw output is.

    Raises:
        MeshError: INVALID_REQUEST if the properties do not describe the bytes.
    """
    name, shape = user.get("name", ""), parse_shape(user.get("shape", ""))
    tensor = from_raw(name, user.get("dtype", ""), shape, payload, 0, len(payload))
    return TensorResponse(model=model, version=served.version, outputs={name: tensor}, served=served)


def _read(payload: bytes, spec: TensorSpec, user: Mapping[str, str]) -> Array:
    datatype = user["dtype"].upper() if "dtype" in user else spec.datatype
    stated = user.get("shape")
    if datatype == "BYTES" and stated is None:
        return whole(spec, payload)
    try:
        shape = parse_shape(stated) if stated is not None else fit_shape(spec, _elements(payload, datatype))
        return from_raw(spec.name, datatype, shape, payload, 0, len(payload))
    except MeshError as error:
        if payload[:1] in (b"{", b"["):
            hint = "It looks like JSON: say so with the Content Type application/json, or publish to …/json."
            raise MeshError(error.code, f"{error.message} {hint}") from error
        raise


def _elements(payload: bytes, datatype: str) -> int:
    count, rest = divmod(len(payload), dtype_of(datatype).itemsize)
    if rest:
        raise MeshError(Code.INVALID_REQUEST, f"{len(payload)} bytes are no whole number of {datatype} elements.")
    return count


def _write(name: str, array: Array) -> tuple[bytes, dict[str, str]]:
    array = np.asarray(array)  # engines may hand out numpy scalars
    return to_raw(array), {"name": name, "dtype": datatype_of(array.dtype), "shape": format_shape(array.shape)}
