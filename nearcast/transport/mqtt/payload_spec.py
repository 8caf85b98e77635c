"""What a payload may leave unsaid, because the model's description says it: the input's name, datatype and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, Parameter, TensorSpec
from nearcast.wire.message import NO_PARAMETERS

DIMENSIONS_MAX = 16


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What surrounds the payload of a request.

    Attributes:
        model, version: as the topic names them; "" = the channel's choice of version.
        metadata: the model's tensors.
        user: user properties of the message.
        parameters: outrank those of the payload.
        envelope: the device has no properties; `inputs` stands beside `id` and `ttl_ms` in the payload.
    """

    model: str
    metadata: ModelMetadata
    version: str = ""
    user: Mapping[str, str] = {}
    parameters: Mapping[str, Parameter] = NO_PARAMETERS
    envelope: bool = False


def find_input(asked: Asked) -> TensorSpec:
    """The one input that a payload without names fills: the property `name`, or the model's only one.

    Raises:
        MeshError: INVALID_REQUEST naming the model's inputs.
    """
    inputs = asked.metadata.inputs
    wanted = asked.user.get("name", "")
    for spec in inputs:
        if spec.name == wanted or (not wanted and len(inputs) == 1):
            return spec
    names = ", ".join(spec.name for spec in inputs)
    raise MeshError(
        Code.INVALID_REQUEST,
        f"Name one input of '{asked.model}' with the user property `name` (it has {names}), "
        "or send all of them as CBOR, JSON or protobuf.",
    )


def find_output(asked: Asked) -> str:
    """The one output that an answer without names holds: the property `output`, or the model's only one.

    Raises:
        MeshError: INVALID_REQUEST naming the model's outputs.
    """
    names = [spec.name for spec in asked.metadata.outputs]
    wanted = asked.user.get("output", names[0] if len(names) == 1 else "")
    if wanted in names:
        return wanted
    raise MeshError(
        Code.INVALID_REQUEST,
        f"Name one output of '{asked.model}' with the user property `output` (it has {', '.join(names)}), "
        "or set `accept` to application/json or application/cbor.",
    )


def fit_shape(spec: TensorSpec, elements: int) -> tuple[int, ...]:
    """The model's own shape for so many elements. One free axis takes what is left over; more must be stated.

    Raises:
        MeshError: INVALID_REQUEST if that leaves the shape open.
    """
    free = [axis for axis, size in enumerate(spec.shape) if size < 0]
    if not free:
        return spec.shape
    fixed = 1
    for size in spec.shape:
        fixed *= size if size >= 0 else 1
    if len(free) > 1 or not fixed or not elements or elements % fixed:
        what = "state its shape" if len(free) > 1 else f"send a multiple of {fixed}"
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{elements} elements of {spec.datatype} do not fill {list(spec.shape)} of '{spec.name}'; {what}.",
        )
    return tuple(elements // fixed if size < 0 else size for size in spec.shape)


def parse_shape(text: str) -> tuple[int, ...]:
    """The property `shape`: `1,224,224,3`, with or without brackets; "" = a scalar.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    inner = text.strip("[]() ")
    digits = [part.strip() for part in inner.split(",")] if inner else []
    if len(digits) > DIMENSIONS_MAX or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in digits):
        raise MeshError(Code.INVALID_REQUEST, "The user property `shape` must be like 1,224,224,3.")
    return tuple(map(int, digits))


def format_shape(shape: Sequence[int]) -> str:
    """What `parse_shape` reads."""
    return ",".join(map(str, shape))
