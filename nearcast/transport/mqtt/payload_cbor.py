"""Tensors as CBOR (RFC 8949): `{name: tensor, …}`, or the long form with `inputs`, `outputs` and `parameters`.

A tensor is a map of `dtype`, `shape` and `data`, or `data` alone. `data` is bytes (little-endian and row-major), a
typed array (RFC 8746: tags 64 to 87, with its dimensions below tag 40 or 1040), or an array of numbers or texts; what
`dtype` and `shape` leave out is the model's own. Of BYTES, `data` is the only element or an array of all, unframed.
A map with the key `inputs` is the long form; for a model with an input of that name, only if there is one more inside.
Devices without properties put `id` and `ttl_ms` beside the tensors, or beside `inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import cbor2
import msgspec
import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, Parameter, Served, Tensors, TensorSpec
from nearcast.transport.json_elements import flatten
from nearcast.transport.mqtt.payload_spec import DIMENSIONS_MAX, Asked, fit_shape
from nearcast.wire.framing import LIMITS, encode_text
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import TensorResponse
from nearcast.wire.tensors import Array, datatype_of, dtype_of, elements_of, from_elements, from_raw, to_raw

DEPTH_MAX = DIMENSIONS_MAX + 8
TENSORS_MAX = 1024
ITEMS_MAX = 64 * 1024
"""Of a payload: each becomes an object, and millions of empty arrays half a gigabyte. A string of bytes is one item."""
ENVELOPE_FIELDS = ("id", "ttl_ms", "model_version")
"""What a device without properties says beside its tensors."""
_TYPED_ARRAYS = range(64, 88)
_ROW_MAJOR, _COLUMN_MAJOR, _HOMOGENEOUS, _SELF_DESCRIBED = 40, 1040, 41, 55799


class _LongForm(msgspec.Struct, frozen=True):
    """A request with more than its tensors."""

    inputs: Annotated[dict[str, Any], msgspec.Meta(max_length=TENSORS_MAX)]
    outputs: Annotated[tuple[str, ...], msgspec.Meta(max_length=TENSORS_MAX)] = ()
    id: str = ""
    parameters: Annotated[dict[str, bool | int | float | str], msgspec.Meta(max_length=LIMITS.parameters_max)] = {}


class _Dimensions(msgspec.Struct, frozen=True):
    """Tag 40 or 1040: an array and its shape."""

    shape: Any
    data: Any
    order: Literal["C", "F"]


def decode_request(payload: bytes, asked: Asked) -> InferRequest:
    """The request that a CBOR payload stands for.

    Raises:
        MeshError: INVALID_REQUEST saying what does not fit.
    """
    body = load_map(payload)
    specs = {spec.name: spec for spec in asked.metadata.inputs}
    nested = body.get("inputs")
    if "inputs" in body and ("inputs" not in specs or (isinstance(nested, dict) and "inputs" in nested)):
        try:
            long = msgspec.convert(body, _LongForm)
        except msgspec.ValidationError as error:
            raise MeshError(Code.INVALID_REQUEST, f"The CBOR is no inference request: {error}.") from error
    else:
        head = ENVELOPE_FIELDS if asked.envelope else ()
        long = _LongForm({name: value for name, value in body.items() if name not in head})
    return TensorRequest(
        model=asked.model,
        version=asked.version,
        id=long.id,
        inputs=_read_tensors(long.inputs, specs),
        parameters={**long.parameters, **asked.parameters},
        outputs=long.outputs,
    )


def encode_request(request: InferRequest) -> bytes:
    """A request as CBOR, in the long form if it has more than tensors."""
    inputs = _to_map(request.decode())
    outputs = list(request.requested_outputs())
    if not (outputs or request.parameters or request.id or "inputs" in inputs):
        return cbor2.dumps(inputs)
    parameters: dict[str, Parameter] = dict(request.parameters)
    return cbor2.dumps({"id": request.id, "inputs": inputs, "outputs": outputs, "parameters": parameters})


def encode_reply(response: InferResponse, fields: Mapping[str, object] | None = None) -> bytes:
    """An answer as `{name: tensor}`; with `fields`, those and the tensors below `outputs`."""
    outputs = _to_map(response.decode())
    return cbor2.dumps(outputs if fields is None else {**fields, "outputs": outputs})


def decode_reply(payload: bytes, model: str, served: Served) -> InferResponse:
    """The answer that `{name: tensor}` is.

    Raises:
        MeshError: INVALID_REQUEST if it is none.
    """
    outputs = _read_tensors(load_map(payload), {})
    return TensorResponse(model=model, version=served.version, outputs=outputs, served=served)


def load_map(payload: bytes) -> dict[str, Any]:
    """A CBOR map of names. No tag is known but those of arrays: not the patterns, powers and cycles that others mean.

    Raises:
        MeshError: INVALID_REQUEST, TOO_LARGE for more than `ITEMS_MAX` items.
    """
    if len(payload) > ITEMS_MAX and _has_too_many_items(payload):
        raise MeshError(
            Code.TOO_LARGE, f"The CBOR has more than {ITEMS_MAX} items; send tensors as bytes or typed arrays."
        )
    try:
        body = cbor2.loads(
            payload,
            max_depth=DEPTH_MAX,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
            semantic_decoders=_TAGS,
        )
    except (cbor2.CBORError, ValueError, RecursionError) as error:
        if isinstance(error.__cause__, MeshError):
            raise error.__cause__ from None
        raise MeshError(Code.INVALID_REQUEST, f"The payload is no valid CBOR: {error}.") from error
    if not isinstance(body, dict) or not all(isinstance(name, str) for name in body):
        raise MeshError(Code.INVALID_REQUEST, "The CBOR must be a map from names to tensors.")
    return body


def _has_too_many_items(payload: bytes) -> bool:
    """Walk from head to head (RFC 8949 §3): only texts and bytes have a length to skip."""
    position, size = 0, len(payload)
    for _ in range(ITEMS_MAX):
        if position >= size:
            return False
        major, low = payload[position] >> 5, payload[position] & 31
        position += 1
        length = low
        if 24 <= low < 28:
            width = 1 << (low - 24)
            length = int.from_bytes(payload[position : position + width], "big")
            position += width
        if major in (2, 3) and low < 28:
            position += length
    return position < size


def _read_tensors(values: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    if len(values) > TENSORS_MAX:
        raise MeshError(Code.INVALID_REQUEST, f"The CBOR has more than {TENSORS_MAX} tensors.")
    return {name: _read_tensor(name, value, specs.get(name), ", ".join(specs)) for name, value in values.items()}


def _read_tensor(name: str, value: Any, spec: TensorSpec | None, known: str) -> Array:
    datatype, shape, data, order = "", None, value, "C"
    if isinstance(value, dict):
        datatype, shape, data = value.get("dtype", ""), value.get("shape"), value.get("data")
        if data is None or not isinstance(datatype, str):
            raise MeshError(Code.INVALID_REQUEST, f"Tensor '{name}' must be a map with data, and dtype as text.")
    if isinstance(data, _Dimensions):
        shape, data, order = data.shape if shape is None else shape, data.data, data.order
    if isinstance(data, np.ndarray):
        datatype = datatype or datatype_of(data.dtype)
        if datatype.upper() != datatype_of(data.dtype):
            raise MeshError(Code.INVALID_REQUEST, f"Tensor '{name}' is a typed array of another type than {datatype}.")
    if spec is None and not datatype:
        raise MeshError(Code.INVALID_REQUEST, f"State dtype and shape of '{name}'; the model's inputs are: {known}.")
    datatype = datatype.upper() or ("" if spec is None else spec.datatype)
    dimensions = _stated_shape(name, data, shape)
    flat = _flat(name, datatype, data, dimensions)
    if dimensions is None:
        dimensions = (flat.size,) if spec is None else fit_shape(spec, flat.size)
    try:
        shaped: Array = flat.reshape(dimensions, order=order)  # type: ignore[call-overload]
        return np.asarray(shaped, order="C")
    except ValueError as error:
        raise MeshError(
            Code.INVALID_REQUEST, f"Tensor '{name}' has {flat.size} elements; its shape is {list(dimensions)}."
        ) from error


def _flat(name: str, datatype: str, data: Any, shape: tuple[int, ...] | None) -> Array:
    """The elements, in the order in which they came."""
    if isinstance(data, np.ndarray):
        return data
    if isinstance(data, bytes) and datatype != "BYTES":
        count, rest = divmod(len(data), dtype_of(datatype).itemsize)
        if rest:
            raise MeshError(
                Code.INVALID_REQUEST, f"Tensor '{name}': {len(data)} bytes are no whole number of {datatype} elements."
            )
        return from_raw(name, datatype, (count,), data, 0, len(data))
    elements = flatten(name, data, shape or ()) if isinstance(data, list) else [data]
    if len(elements) > LIMITS.contents_elements_max:
        raise MeshError(
            Code.INVALID_REQUEST, f"Tensor '{name}' has more than {LIMITS.contents_elements_max} elements; send bytes."
        )
    if datatype == "BYTES":
        elements = [encode_text(element) if isinstance(element, str) else element for element in elements]
        if not all(isinstance(element, bytes) for element in elements):
            raise MeshError(Code.INVALID_REQUEST, f"The elements of BYTES tensor '{name}' must be bytes or texts.")
    return from_elements(name, datatype, (len(elements),), elements)


def _stated_shape(name: str, data: Any, shape: Any) -> tuple[int, ...] | None:
    """The shape that was stated, or that nested arrays have; None = there is none."""
    if shape is None and isinstance(data, list) and data and isinstance(data[0], list):
        shape = _nesting(data)
    if shape is None:
        return None
    if (
        not isinstance(shape, list)
        or len(shape) > DIMENSIONS_MAX
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
    ):
        raise MeshError(Code.INVALID_REQUEST, f"The shape of tensor '{name}' must be an array of sizes.")
    return tuple(shape)


def _nesting(data: Any) -> list[int]:
    """The shape that nested arrays would have if all were like the first."""
    shape = []
    while isinstance(data, list):
        shape.append(len(data))
        data = data[0] if data else None
    return shape


def _to_map(tensors: Tensors) -> dict[str, Any]:
    return {name: _to_tensor(np.asarray(array)) for name, array in tensors.items()}


def _to_tensor(array: Array) -> dict[str, Any]:
    datatype = datatype_of(array.dtype)
    data = elements_of(array) if datatype == "BYTES" else to_raw(array)
    return {"dtype": datatype, "shape": list(array.shape), "data": data}


# -- tags -------------------------------------------------------------------------------------------------------------


def _element_type(tag: int) -> np.dtype[Any] | None:
    """RFC 8746 §2.1: the bits are 010, float, signed, little-endian, and two of length."""
    size, order = 1 << (tag & 3), "<" if tag & 4 else ">"
    if tag & 16:
        return np.dtype(f"{order}f{2 * size}") if size < 8 else None
    if size > 1:
        return np.dtype(f"{order}{'i' if tag & 8 else 'u'}{size}")
    if tag & 8:
        return None if tag & 4 else np.dtype("i1")
    return np.dtype("u1")  # for bytes, "little-endian" says that they were clamped


def _typed_array(tag: int, value: Any) -> Array:
    dtype = _element_type(tag)
    if dtype is None or not isinstance(value, bytes) or len(value) % dtype.itemsize:
        raise MeshError(Code.INVALID_REQUEST, f"The typed array of tag {tag} is none of a known type, or is cut off.")
    return np.frombuffer(value, dtype).astype(dtype.newbyteorder("<"), copy=False)


def _dimensioned(order: Literal["C", "F"], value: Any) -> _Dimensions:
    if not isinstance(value, list) or len(value) != 2:
        raise MeshError(Code.INVALID_REQUEST, "A multi-dimensional array is an array of its shape and its elements.")
    return _Dimensions(value[0], value[1], order)


def _refuse(tag: int) -> Any:
    raise MeshError(Code.INVALID_REQUEST, f"CBOR tag {tag} is not understood; there are typed arrays only (RFC 8746).")


class _Tags(dict[int, Callable[[Any, bool], Any]]):
    """What becomes of a tagged value. Tags that the library knows of itself are refused too."""

    def __missing__(self, tag: int) -> Callable[[Any, bool], Any]:
        return lambda _value, _immutable: _refuse(tag)


_TAGS = _Tags({tag: lambda value, _, tag=tag: _typed_array(tag, value) for tag in _TYPED_ARRAYS})  # type: ignore[misc]
_TAGS[_ROW_MAJOR] = lambda value, _: _dimensioned("C", value)
_TAGS[_COLUMN_MAJOR] = lambda value, _: _dimensioned("F", value)
_TAGS[_HOMOGENEOUS] = _TAGS[_SELF_DESCRIBED] = lambda value, _: value
