"""Inference over gRPC where a tensor does not travel in the message, or an output not as it is. Off the quick path."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse
from nearcast.transport.outputs import Form, form_outputs, read_form, read_place
from nearcast.transport.seam import Call
from nearcast.transport.service import InferenceService
from nearcast.wire.message import encode_parameters, parameters_of
from nearcast.wire.request import TensorRequest, WireRequest
from nearcast.wire.tensors import Array, from_raw, to_raw
from nearcast.wire.v1 import oip_pb2 as pb


def read_extended(service: InferenceService, body: bytes, call: Call) -> tuple[TensorRequest, dict[str, Form]]:
    """A request with its tensors fetched, and how it wants its outputs.

    Raises:
        MeshError: INVALID_REQUEST for what is malformed; what `Regions.read` raises.
    """
    try:
        message = pb.ModelInferRequest.FromString(body)
    except DecodeError as error:
        raise MeshError(Code.INVALID_REQUEST, "The message is no ModelInferRequest.") from error
    forms = {output.name: read_form(output.name, parameters_of(output.parameters)) for output in message.outputs}
    names = [tensor.name for tensor in message.inputs]
    if len(set(names)) != len(names):
        raise MeshError(Code.INVALID_REQUEST, "A tensor occurs twice.")
    fetched: dict[str, Array] = {}
    rest = []
    for tensor in message.inputs:
        place = read_place(tensor.name, parameters_of(tensor.parameters))
        if place is None:
            rest.append(tensor)
            continue
        if any(size < 0 for size in tensor.shape):
            raise MeshError(Code.INVALID_REQUEST, f"Tensor '{tensor.name}' has a negative axis in its shape.")
        data = service.regions.read(call, place)
        fetched[tensor.name] = from_raw(tensor.name, tensor.datatype, tuple(tensor.shape), data, 0, len(data))
    sent = pb.ModelInferRequest(
        model_name=message.model_name, inputs=rest, raw_input_contents=message.raw_input_contents
    )
    tensors = fetched | dict(WireRequest(sent.SerializeToString()).decode())
    request = TensorRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs={name: tensors[name] for name in names},
        parameters=parameters_of(message.parameters),
        outputs=[output.name for output in message.outputs],
    )
    return request, forms


async def encode_extended(
    service: InferenceService, response: InferResponse, forms: dict[str, Form], call: Call
) -> bytes:
    """The answer as one message. An output in shared memory keeps its place among the raw contents, which is empty.

    Raises:
        MeshError: what `form_outputs` raises.
    """
    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for output in await form_outputs(service, response, forms, call):
        tensor = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        for name, value in output.parameters.items():
            if isinstance(value, str):
                tensor.parameters[name].string_param = value
            else:
                tensor.parameters[name].int64_param = value
        message.raw_output_contents.append(b"" if output.array is None else to_raw(output.array))
    return message.SerializeToString() + encode_parameters(response.parameters)
