"""Tensors as JSON, and the binary tensor data extension that puts raw bytes behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse, ModelMetadata, Parameter
from nearcast.transport.json_elements import read_elements
from nearcast.transport.outputs import Form, Output, read_form, read_place
from nearcast.transport.place import Place
from nearcast.wire.framing import LIMITS, encode_text
from nearcast.wire.request import TensorRequest
from nearcast.wire.tensors import Array, datatype_of, elements_of, from_elements, from_raw, size_bytes, to_raw

JSON_SIZE_BYTES_MAX = 16 * 1024 * 1024
"""Parsed JSON needs some ten times its size in memory; larger tensors travel as binary data."""
_NOT_MODEL_PARAMETERS = frozenset({"binary_data_output"})

Body: TypeAlias = Any
"""Of a request: bytes, or a memoryview that is read-only, beneath which nobody writes any more. Where it says where its
JSON ends, an item of any type would be aligned there."""
Axis = Annotated[int, msgspec.Meta(ge=0)]
Parameters = Annotated[dict[str, bool | int | float | str], msgspec.Meta(max_length=LIMITS.parameters_max)]
Shape = Annotated[tuple[Axis, ...], msgspec.Meta(max_length=LIMITS.rank_max)]


class JsonTensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input. Unknown fields are ignored here and below: the protocol lets clients send more than we know."""

    name: str
    datatype: str
    shape: Shape
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: Parameters = {}


class JsonOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output that the client asks for."""

    name: str
    parameters: Parameters = {}


class JsonRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of an inference request."""

    inputs: Annotated[tuple[JsonTensor, ...], msgspec.Meta(max_length=1024)]
    outputs: Annotated[tuple[JsonOutput, ...], msgspec.Meta(max_length=1024)] = ()
    id: str = ""
    parameters: Parameters = {}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which outputs the client wants as binary data, and which in a form of their own."""

    by_default: bool = False
    by_name: Mapping[str, bool] = msgspec.field(default_factory=dict)
    forms: Mapping[str, Form] = msgspec.field(default_factory=dict)

    @property
    def is_all_binary(self) -> bool:
        """Whether all outputs go behind the JSON, as they are."""
        return self.by_default and not self.by_name and not self.forms

    def is_binary(self, name: str) -> bool:
        """Whether output `name` goes behind the JSON."""
        return self.by_name.get(name, self.by_default)


_DECODER = msgspec.json.Decoder(JsonRequest)


def decode_request(
    model: str, version: str, body: Body, json_size_bytes: int, fetch: Callable[[Place], bytes] | None = None
) -> tuple[TensorRequest, Wanted]:
    """A request from its HTTP body.

    Args:
        model: from the path.
        version: from the path; "" = the channel's choice.
        body: JSON, then the binary data of its inputs in their order.
        json_size_bytes: where the JSON ends.
        fetch: copies the bytes of a tensor out of shared memory; None = there is none.

    Raises:
        MeshError: INVALID_REQUEST for malformed JSON, tensors that do not fit their shape, or binary data left over;
            TOO_LARGE for too much JSON; UNSUPPORTED for shared memory where there is none; what `fetch` raises.
    """
    if not 0 < json_size_bytes <= len(body):
        raise MeshError(
            Code.INVALID_REQUEST, "The Inference-Header-Content-Length header does not fit the body's size."
        )
    if json_size_bytes > JSON_SIZE_BYTES_MAX:
        raise MeshError(
            Code.TOO_LARGE, f"The JSON is larger than {JSON_SIZE_BYTES_MAX} bytes; send tensors as binary data."
        )
    try:
        message = _DECODER.decode(memoryview(body)[:json_size_bytes])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"The request is no valid inference JSON: {error}.") from error
    inputs: dict[str, Array] = {}
    position = json_size_bytes
    for tensor in message.inputs:
        if tensor.name in inputs:
            raise MeshError(Code.INVALID_REQUEST, f"Tensor '{tensor.name}' occurs twice.")
        inputs[tensor.name], position = _read(tensor, body, position, fetch)
    if position != len(body):
        raise MeshError(Code.INVALID_REQUEST, f"{len(body) - position} bytes of binary data belong to no input.")
    parameters = {name: value for name, value in message.parameters.items() if name not in _NOT_MODEL_PARAMETERS}
    request = TensorRequest(
        model=model,
        version=version,
        id=message.id,
        inputs=inputs,
        parameters=parameters,
        outputs=[output.name for output in message.outputs],
    )
    return request, _wanted(message)


def decode_raw_request(metadata: ModelMetadata, version: str, body: Body) -> tuple[TensorRequest, Wanted]:
    """A request whose whole body is the raw data of a model's only input; a free axis follows from the size.

    Raises:
        MeshError: INVALID_REQUEST if the model has several inputs or the size fits no shape.
    """
    if len(metadata.inputs) != 1:
        raise MeshError(
            Code.INVALID_REQUEST, f"Model '{metadata.name}' has {len(metadata.inputs)} inputs; raw requests need one."
        )
    spec = metadata.inputs[0]
    if spec.datatype == "BYTES":
        element = np.empty(1, dtype=object)
        element[0] = bytes(body)
        tensor: Array = element.reshape((1,) * max(1, len(spec.shape)))
    else:
        shape = _fit(spec.shape, len(body), size_bytes(spec.datatype, [max(1, axis) for axis in spec.shape]) or 1)
        tensor = from_raw(spec.name, spec.datatype, shape, body, 0, len(body))
    request = TensorRequest(model=metadata.name, version=version, inputs={spec.name: tensor})
    return request, Wanted(by_default=True)


def encode_response(response: InferResponse, found: Sequence[Output], wanted: Wanted) -> tuple[bytes, list[bytes]]:
    """An answer as JSON and the binary data that follows it.

    Args:
        response: what is answered.
        found: its outputs as they travel.
        wanted: which of them as binary data.

    Raises:
        MeshError: INVALID_REQUEST if an output cannot be JSON and was not asked for as binary data.
    """
    outputs = []
    pieces = []
    for each in found:
        output: dict[str, Any] = {"name": each.name, "datatype": each.datatype, "shape": each.shape}
        if each.array is None:
            output["parameters"] = each.parameters
        elif wanted.is_binary(each.name):
            raw = to_raw(each.array)
            output["parameters"] = {"binary_data_size": len(raw)}
            pieces.append(raw)
        else:
            output["data"] = json_elements(each.name, each.array)
        outputs.append(output)
    message: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        message["id"] = response.id
    if response.parameters:
        message["parameters"] = dict(response.parameters)
    return msgspec.json.encode(message | {"outputs": outputs}), pieces


def _read(tensor: JsonTensor, body: Body, position: int, fetch: Callable[[Place], bytes] | None) -> tuple[Array, int]:
    place = read_place(tensor.name, tensor.parameters) if tensor.parameters else None
    if place is not None:
        if fetch is None:
            raise MeshError(Code.UNSUPPORTED, f"Tensor '{tensor.name}' is in shared memory, which is not offered here.")
        fetched = fetch(place)
        return from_raw(tensor.name, tensor.datatype, tensor.shape, fetched, 0, len(fetched)), position
    size, data = tensor.parameters.get("binary_data_size"), bytes(tensor.data)
    if size is None:
        if not data:
            raise MeshError(Code.INVALID_REQUEST, f"Tensor '{tensor.name}' has neither data nor binary_data_size.")
        elements = read_elements(tensor.name, tensor.datatype, data, tensor.shape)
        if tensor.datatype == "BYTES":
            elements = [encode_text(element) for element in elements]
        return from_elements(tensor.name, tensor.datatype, tensor.shape, elements), position
    if data:
        raise MeshError(Code.INVALID_REQUEST, f"Tensor '{tensor.name}' has both data and binary_data_size.")
    if type(size) is not int or not 0 <= size <= len(body) - position:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"Tensor '{tensor.name}' announces {size!r} bytes of binary data; {len(body) - position} are left.",
        )
    stop = position + size
    if type(body) is memoryview and (size < LIMITS.zero_copy_size_bytes_min or tensor.datatype == "BYTES"):
        return from_raw(tensor.name, tensor.datatype, tensor.shape, bytes(body[position:stop]), 0, size), stop
    return from_raw(tensor.name, tensor.datatype, tensor.shape, body, position, stop), stop


def json_elements(name: str, array: Array) -> list[Any]:
    """Elements of a tensor in row-major order, as JSON has them.

    Raises:
        MeshError: INVALID_REQUEST for NaN, infinity and bytes that are no text.
    """
    datatype = datatype_of(array.dtype)
    if datatype == "BYTES":
        try:
            return [element.decode() for element in elements_of(array)]
        except UnicodeDecodeError as error:
            raise MeshError(
                Code.INVALID_REQUEST, f"Output '{name}' is not text; ask for it with the parameter binary_data."
            ) from error
    if datatype == "BF16":
        array = array.astype(np.float32)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise MeshError(
            Code.INVALID_REQUEST,
            f"Output '{name}' holds NaN or infinity, which JSON lacks; ask for it with the parameter binary_data.",
        )
    values: list[Any] = array.reshape(-1).tolist()
    return values


def _wanted(message: JsonRequest) -> Wanted:
    by_name, forms = {}, {}
    for output in message.outputs:
        value: Parameter | None = output.parameters.get("binary_data")
        if value is not None:
            by_name[output.name] = bool(value)
        if output.parameters:
            forms[output.name] = read_form(output.name, output.parameters)
    return Wanted(by_default=bool(message.parameters.get("binary_data_output", False)), by_name=by_name, forms=forms)


def _fit(shape: Sequence[int], got: int, unit: int) -> tuple[int, ...]:
    """`shape` with its first free axis sized so that `got` bytes fill it; other free axes are 1."""
    out = list(shape)
    for axis, size in enumerate(out):
        if size < 0:
            out[axis] = max(1, got // unit) if -1 not in shape[:axis] else 1
    return tuple(out)
