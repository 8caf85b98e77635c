"""What requests and answers share: tensor headers, parameters, and how arrays become pieces of a message."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter, methodcaller
from types import MappingProxyType
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from nearcast.errors import Code, MeshError
from nearcast.handler import Parameter, Tensors
from nearcast.wire.framing import LIMITS, Scan, Span, encode_field, encode_prefix, encode_text, encode_varint
from nearcast.wire.tensors import Array, datatype_of, from_elements, from_raw, to_raw
from nearcast.wire.v1 import oip_pb2 as pb

NO_PARAMETERS: Mapping[str, Parameter] = MappingProxyType({})
HEADER_CACHE_SIZE_BYTES_MAX = 256
"""Longer tensor headers and names are not remembered: whoever invents them could fill the memory."""

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Header(msgspec.Struct, frozen=True):
    """Name, datatype and shape of one tensor on the wire; `contents` if it carries elements in typed fields."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    contents: pb.InferTensorContents | None = None


class Form(msgspec.Struct, frozen=True):
    """What messages share that differ only in their id, their parameters and the bytes of their tensors.

    `template`: the message with a %b where these go; without raw contents unless `is_whole`. It is if its tensors are
    small and sent byte by byte: else their lengths differ, or to join them costs a copy.
    """

    template: bytes
    is_whole: bool


def read_parameters(body: bytes, spans: Sequence[Span]) -> Mapping[str, Parameter]:
    """The parameters of a message; a parameter without a value counts as absent.

    Raises:
        MeshError: INVALID_REQUEST if they are malformed or more than `parameters_max`.
    """
    if not spans:
        return NO_PARAMETERS
    if len(spans) > LIMITS.parameters_max:
        raise MeshError(Code.INVALID_REQUEST, f"The message has more than {LIMITS.parameters_max} parameters.")
    framed = b"".join(encode_prefix(4, stop - start) + body[start:stop] for start, stop in spans)
    return parameters_of(_parse(pb.ModelInferRequest, framed, "a parameter").parameters)


def parameters_of(values: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    """A protobuf parameter map as plain values."""
    out: dict[str, Parameter] = {}
    for name, value in values.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is not None:
            out[name] = getattr(value, choice)
    return out


def encode_parameters(parameters: Mapping[str, Parameter]) -> bytes:
    """Field 4 of a message.

    Raises:
        MeshError: INVALID_REQUEST for a value that is no bool, integer of 64 bits, float or text.
    """
    if not parameters:
        return b""
    message = pb.ModelInferRequest()
    for name, value in parameters.items():
        try:
            match value:
                case bool():
                    message.parameters[name].bool_param = value
                case int() if value < 2**63:
                    message.parameters[name].int64_param = value
                case int():
                    message.parameters[name].uint64_param = value
                case float():
                    message.parameters[name].double_param = value
                case _:
                    message.parameters[name].string_param = value
        except (ValueError, TypeError) as error:
            raise MeshError(Code.INVALID_REQUEST, f"Parameter '{name[:64]}' has a value that cannot travel.") from error
    return message.SerializeToString(deterministic=True)


def read_tensors(model: str, body: bytes, found: Scan, raws: Sequence[Span]) -> dict[str, Array]:
    """All tensors of a message, by name in the order of the wire.

    Args:
        model: for the error texts.
        body: the message.
        found: its top-level fields.
        raws: its raw contents (field 7 of a request, 6 of an answer).

    Raises:
        MeshError: INVALID_REQUEST for every malformed tensor; UNSUPPORTED for shared memory.
    """
    out: dict[str, Array] = {}
    used = 0
    for start, stop in found.tensors:
        header = _read_header(body[start:stop])
        if header.contents is not None and raws:
            raise MeshError(
                Code.INVALID_REQUEST,
                "contents field must not be specified when using raw_input_contents "
                f"for '{header.name}' for model '{model}'",
            )
        if header.contents is not None:
            tensor = _from_contents(header, header.contents, model)
        elif used < len(raws):
            tensor = from_raw(header.name, header.datatype, header.shape, body, *raws[used])
            used += 1
        elif header.datatype in _CONTENTS and 0 in header.shape:
            tensor = from_elements(header.name, header.datatype, header.shape, ())
        else:
            raise MeshError(
                Code.INVALID_REQUEST,
                f"unable to find data for input tensor '{header.name}' for model '{model}' in request.",
            )
        if header.name in out:
            raise MeshError(Code.INVALID_REQUEST, f"Tensor '{header.name}' occurs twice.")
        out[header.name] = tensor
    if used < len(raws):
        raise MeshError(Code.INVALID_REQUEST, f"The message has {len(raws)} raw contents for {used} tensors.")
    return out


def encode_message(
    *,
    model: str,
    version: str,
    id_: str,
    parameters: Mapping[str, Parameter],
    tensors: Tensors,
    sixth: bytes,
    raw_field: int,
) -> tuple[bytes, ...]:
    """An inference message in pieces: small tensors are joined to what precedes them, large ones stay by themselves.

    Args:
        model: field 1.
        version: field 2.
        id_: field 3.
        parameters: field 4.
        tensors: field 5, and their bytes in `raw_field`.
        sixth: encoded field 6 of a request (its requested outputs); b"" for an answer.
        raw_field: 7 for a request, 6 for an answer.

    Raises:
        MeshError: INVALID_REQUEST if an array or a parameter cannot travel.
    """
    # Numpy's scalars, which engines may hand out, have all that is asked of an array here.
    arrays = tensors.values()
    key = model, version, sixth, raw_field, *tensors, *map(_TYPE_AND_SHAPE, arrays)
    form = _FORMS.get(key)
    if form is None:
        form = _remember(key, _make_form(model, version, tensors, sixth, raw_field))
    named = encode_field(3, encode_text(id_)) if id_ else b""
    if parameters:
        named += encode_parameters(parameters)
    if form.is_whole:
        return (form.template % (named, *map(_TO_BYTES, arrays)),)
    return _large_apart([form.template % named], [to_raw(array) for array in arrays], raw_field)


def _large_apart(gathered: list[bytes], raws: Sequence[bytes], raw_field: int) -> tuple[bytes, ...]:
    pieces: list[bytes] = []
    for raw in raws:
        gathered.append(encode_prefix(raw_field, len(raw)))
        if len(raw) < LIMITS.zero_copy_size_bytes_min:
            gathered.append(raw)
        else:
            pieces += (b"".join(gathered), raw)
            gathered = []
    if gathered:
        pieces.append(b"".join(gathered))
    return tuple(pieces)


def encode_requested(outputs: Sequence[str]) -> bytes:
    """Field 6 of a request: the outputs asked for."""
    return b"".join(
        encode_prefix(6, len(inner)) + inner for inner in (encode_field(1, encode_text(name)) for name in outputs)
    )


def read_requested(body: bytes, spans: Sequence[Span]) -> tuple[str, ...]:
    """Names of the outputs asked for.

    Raises:
        MeshError: INVALID_REQUEST if they are malformed, UNSUPPORTED for classification and shared memory.
    """
    names = []
    for start, stop in spans:
        output = _parse(pb.ModelInferRequest.InferRequestedOutputTensor, body[start:stop], "a requested output")
        if output.parameters:
            require_supported(output.name, output.parameters)
        names.append(output.name)
    return tuple(names)


def require_supported(name: str, parameters: Mapping[str, Any]) -> None:
    """Refuse tensor parameters that would change the answer and that we do not implement.

    Raises:
        MeshError: UNSUPPORTED, naming the tensor and the extension.
    """
    for extension in ("classification", "shared_memory_region"):
        if extension in parameters:
            raise MeshError(
                Code.UNSUPPORTED, f"Tensor '{name}' asks for {extension}, which this server does not offer."
            )


def _read_header(data: bytes) -> Header:
    return _cached_header(data) if len(data) <= HEADER_CACHE_SIZE_BYTES_MAX else _parse_header(data)


def _parse_header(data: bytes) -> Header:
    tensor = _parse(pb.ModelInferRequest.InferInputTensor, data, "a tensor")
    shape = tuple(tensor.shape)
    if len(shape) > LIMITS.rank_max:
        raise MeshError(Code.INVALID_REQUEST, f"Tensor '{tensor.name}' has more than {LIMITS.rank_max} axes.")
    if any(size < 0 for size in shape):
        raise MeshError(Code.INVALID_REQUEST, f"Tensor '{tensor.name}' has a negative axis in its shape {list(shape)}.")
    if tensor.parameters:
        require_supported(tensor.name, tensor.parameters)
    # Some servers write an empty `contents` beside raw contents: it carries nothing, so it is none.
    contents = tensor.contents if tensor.contents.ListFields() else None
    return Header(tensor.name, tensor.datatype, shape, contents)


# The same clients send the same headers again and again; one with contents is remembered too, at most 256 bytes of it.
_cached_header = lru_cache(maxsize=1024)(_parse_header)


def _from_contents(header: Header, contents: pb.InferTensorContents, model: str) -> Array:
    field = _CONTENTS.get(header.datatype)
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    if field is None or any(name != field for name in filled):
        raise MeshError(
            Code.INVALID_REQUEST,
            f"unexpected explicit tensor data for input tensor '{header.name}' for model '{model}', "
            f"expected datatype '{header.datatype}'"
            + (f" in {field}" if field else ", which travels as raw bytes only"),
        )
    values = getattr(contents, field)
    if len(values) > LIMITS.contents_elements_max:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"Tensor '{header.name}' has more than {LIMITS.contents_elements_max} elements in typed contents; "
            "send its bytes in raw_input_contents.",
        )
    return from_elements(header.name, header.datatype, header.shape, list(values))


_TYPE_AND_SHAPE, _TO_BYTES = attrgetter("dtype", "shape"), methodcaller("tobytes")
_FORMS: dict[Hashable, Form] = {}
"""At most `layouts_max` of them: as `Layouts`, of messages that go out."""


def _make_form(model: str, version: str, tensors: Tensors, sixth: bytes, raw_field: int) -> Form:
    headers, prefixes, is_whole = [], [], True
    for name, array in tensors.items():
        datatype = datatype_of(array.dtype)
        packed = b"".join(encode_varint(size) for size in array.shape)
        inner = encode_field(1, encode_text(name)) + encode_field(2, datatype.encode()) + encode_field(3, packed)
        headers.append(encode_prefix(5, len(inner)) + inner)
        prefixes.append(encode_prefix(raw_field, array.nbytes))
        is_swapped = datatype == "BYTES" or array.dtype.byteorder == ">"
        is_whole = is_whole and not is_swapped and array.nbytes < LIMITS.zero_copy_size_bytes_min
    head = encode_field(1, encode_text(model)) + encode_field(2, encode_text(version))
    template = _escape(head) + b"%b" + _escape(b"".join((*headers, sixth)))
    if is_whole:
        template += b"".join(_escape(prefix) + b"%b" for prefix in prefixes)
    return Form(template, is_whole)


def _escape(fixed: bytes) -> bytes:
    return fixed.replace(b"%", b"%%")


def _remember(key: Hashable, form: Form) -> Form:
    if len(form.template) <= LIMITS.layout_size_bytes_max:
        if len(_FORMS) >= LIMITS.layouts_max:
            _FORMS.clear()
        _FORMS[key] = form
    return form


def _parse(kind: Any, data: bytes, what: str) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise MeshError(Code.INVALID_REQUEST, f"The message holds {what} that is malformed.") from error
