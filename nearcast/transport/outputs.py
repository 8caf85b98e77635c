"""How tensors travel other than in the message: read from shared memory, written into it, or as their top classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse
from nearcast.transport.classification import classify
from nearcast.transport.model_config import number
from nearcast.transport.place import Place
from nearcast.wire.tensors import Array, datatype_of, to_raw

if TYPE_CHECKING:
    from nearcast.transport.seam import Call
    from nearcast.transport.service import InferenceService

REGION = "shared_memory_region"
REGION_SIZE = "shared_memory_byte_size"
REGION_OFFSET = "shared_memory_offset"
CLASSES = "classification"
CLASSES_MAX = 10_000


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """How one output is wanted: its first `classes` (0 = all of it), in `place` (None = in the answer)."""

    classes: int = 0
    place: Place | None = None


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """One output as it travels. `array` None = it is where `parameters` say."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    array: Array | None
    parameters: Mapping[str, Any] = msgspec.field(default_factory=dict)


def read_place(name: str, parameters: Mapping[str, Any]) -> Place | None:
    """Where the parameters say that a tensor lies; None = in the message.

    Raises:
        MeshError: INVALID_REQUEST for values of the wrong type or sign.
    """
    region = parameters.get(REGION)
    if region is None:
        return None
    size, offset = parameters.get(REGION_SIZE), parameters.get(REGION_OFFSET, 0)
    if type(region) is not str or type(size) is not int or type(offset) is not int or size < 0 or offset < 0:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"Tensor '{name}' needs {REGION} (text), {REGION_SIZE} and {REGION_OFFSET} (numbers of bytes).",
        )
    return Place(region=region, size_bytes=size, offset=offset)


def read_form(name: str, parameters: Mapping[str, Any]) -> Form:
    """How the parameters of a requested output want it.

    Raises:
        MeshError: INVALID_REQUEST for values of the wrong type or sign, or classes in shared memory.
    """
    place, classes = read_place(name, parameters), parameters.get(CLASSES)
    if classes is None:
        return Form(place=place)
    if type(classes) is not int or not 0 < classes <= CLASSES_MAX:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"The {CLASSES} of output '{name}' must be a number from 1 to {CLASSES_MAX}.",
        )
    if place is not None:
        raise MeshError(Code.INVALID_REQUEST, f"Output '{name}' cannot go to shared memory by its classes.")
    return Form(classes=classes)


def refuse_forms(forms: Mapping[str, Form]) -> None:
    """Refuse outputs that are wanted otherwise, where the transport has no such thing.

    Raises:
        MeshError: UNSUPPORTED, naming an output.
    """
    for name, form in forms.items():
        if form != Form():
            raise MeshError(
                Code.UNSUPPORTED, f"Output '{name}' can be had as it is alone here: neither by classes nor elsewhere."
            )


def as_they_are(response: InferResponse) -> Sequence[Output]:
    """The outputs of an answer, each in the message."""
    outputs = []
    for name, array in response.decode().items():
        array = np.asarray(array)  # noqa: PLW2901 - engines may hand out numpy scalars
        outputs.append(Output(name=name, datatype=datatype_of(array.dtype), shape=array.shape, array=array))
    return outputs


async def form_outputs(
    service: InferenceService, response: InferResponse, forms: Mapping[str, Form], call: Call
) -> Sequence[Output]:
    """The outputs of an answer in the form in which they were asked for. Writes those that go to shared memory.

    Raises:
        MeshError: INVALID_REQUEST if an output has no classes or does not fit its place.
    """
    outputs = as_they_are(response)
    return [
        await _form(service, response, each, forms[each.name], call) if each.name in forms else each for each in outputs
    ]


async def _form(service: InferenceService, response: InferResponse, output: Output, form: Form, call: Call) -> Output:
    array = output.array
    assert array is not None
    if form.classes:
        properties = (await service.described(response.model, response.version)).properties
        labels = properties["labels"].split("\n") if properties.get("labels") else ()
        by_row = array.ndim > 1 and number(properties.get("batch_rows_max", "")) > 0
        top = classify(output.name, array, form.classes, labels, by_row=by_row)
        return Output(name=output.name, datatype="BYTES", shape=top.shape, array=top)
    if form.place is None:
        return output
    is_plain = array.dtype.kind in "biufV" and array.dtype.byteorder != ">"
    # Plain numbers go straight from the engine's memory; `to_raw` would copy them once more.
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if is_plain else to_raw(array)
    service.regions.write(call, form.place, raw)
    where: dict[str, Any] = {REGION: form.place.region, REGION_SIZE: len(raw)}
    if form.place.offset:
        where[REGION_OFFSET] = form.place.offset
    return Output(name=output.name, datatype=output.datatype, shape=output.shape, array=None, parameters=where)
