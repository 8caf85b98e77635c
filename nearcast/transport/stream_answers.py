"""One answer of ModelStreamInfer: a model's answer, or the error of one request, after which the stream goes on.

An error travels as text, as the protocol has it. For peers of the mesh its code and retry hint stand beside it, as
parameters of an otherwise empty answer with the request's id; other clients do not look there.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.handler import Served
from nearcast.transport.seam import CallError
from nearcast.wire import status
from nearcast.wire.framing import varint
from nearcast.wire.message import parameters_of
from nearcast.wire.response import WireResponse
from nearcast.wire.v1 import oip_pb2 as pb

_ANSWER_TAG = 0x12


def encode_error(error: MeshError, request_id: str) -> bytes:
    """The error of one request as a `ModelStreamInferResponse`."""
    empty = pb.ModelInferResponse(id=request_id)
    empty.parameters["triton_final_response"].bool_param = True
    for name, value in status.error_to_status(error).trailers:
        empty.parameters[name].string_param = value
    text = (error.message or str(error.code)).encode("utf-8", "replace").decode()
    return pb.ModelStreamInferResponse(error_message=text, infer_response=empty).SerializeToString()


def decode_answer(body: bytes, served: Served) -> WireResponse:
    """A model's answer from a `ModelStreamInferResponse`.

    Raises:
        CallError: the error that it holds instead; INTERNAL if it comes from a server that names no code.
        MeshError: INTERNAL if the bytes are no such message.
    """
    if body and body[0] == _ANSWER_TAG:
        try:
            size_bytes, start = varint(body, 1)
        except MeshError as error:
            raise _malformed() from error
        if start + size_bytes == len(body):
            return WireResponse(body[start:], served)
    try:
        message = pb.ModelStreamInferResponse.FromString(body)
    except DecodeError as error:
        raise _malformed() from error
    if not message.error_message:
        return WireResponse(message.infer_response.SerializeToString(), served)
    said = {name: str(value) for name, value in parameters_of(message.infer_response.parameters).items()}
    text = status.encode_message(message.error_message)
    raise status.error_from_status(CATALOGUE[Code.INTERNAL].grpc, text, said, kind=CallError)


def _malformed() -> MeshError:
    return MeshError(Code.INTERNAL, "The peer's answer on a stream is malformed.")
