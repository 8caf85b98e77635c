from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nearcast.errors import Code, MeshError
from nearcast.handler import Served
from nearcast.wire import status
from nearcast.wire.framing import encode_varint, varint
from nearcast.wire.report import decode_report
from nearcast.wire.request import TensorRequest, WireRequest
from nearcast.wire.response import TensorResponse, WireResponse
from nearcast.wire.tensors import DATATYPES, datatype_of, dtype_of
from nearcast.wire.v1 import oip_pb2 as pb

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
NAMES = st.text(max_size=20)
PARAMETERS = st.dictionaries(
    NAMES,
    st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=50)),
    max_size=5,
)


@st.composite
def arrays(draw):
    datatype = draw(st.sampled_from(DATATYPES))
    shape = draw(SHAPES)
    if datatype == "BYTES":
        flat = draw(st.lists(st.binary(max_size=20), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        array = np.empty(len(flat), dtype=object)
        array[:] = flat
        return array.reshape(shape)
    if datatype == "BF16":
        return draw(hnp.arrays(np.uint16, shape)).view(ml_dtypes.bfloat16)
    return draw(hnp.arrays(dtype_of(datatype), shape))


TENSORS = st.dictionaries(NAMES, arrays(), max_size=4)


def same(left, right):
    assert list(left) == list(right)
    for name, array in left.items():
        other = right[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        if array.dtype == object:
            assert array.tolist() == other.tolist()
        else:
            assert array.tobytes() == other.tobytes()  # bit for bit, NaNs included


def protobuf_tensors(kind, tensors):
    headers, raws = [], []
    for name, array in tensors.items():
        headers.append(kind(name=name, datatype=datatype_of(array.dtype), shape=array.shape))
        if array.dtype == object:
            raws.append(b"".join(len(e).to_bytes(4, "little") + e for e in array.reshape(-1)))
        else:
            raws.append(array.tobytes())
    return headers, raws


@given(TENSORS, NAMES, NAMES, NAMES, PARAMETERS, st.lists(NAMES, max_size=3))
def test_request_round_trip_and_equality_with_protobuf(inputs, model, version, id_, parameters, outputs):
    request = TensorRequest(model=model, version=version, id=id_, inputs=inputs, parameters=parameters, outputs=outputs)
    headers, raws = protobuf_tensors(pb.ModelInferRequest.InferInputTensor, inputs)
    expected = pb.ModelInferRequest(
        model_name=model,
        model_version=version,
        id=id_,
        inputs=headers,
        raw_input_contents=raws,
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
    )
    for name, value in parameters.items():
        match value:
            case bool():
                expected.parameters[name].bool_param = value
            case int():
                field = "int64_param" if value < 2**63 else "uint64_param"
                setattr(expected.parameters[name], field, value)
            case float():
                expected.parameters[name].double_param = value
            case str():
                expected.parameters[name].string_param = value
    assert pb.ModelInferRequest.FromString(request.encode()) == expected

    received = WireRequest(expected.SerializeToString())
    assert (received.model, received.version, received.id) == (model, version, id_)
    assert received.parameters == parameters
    assert list(received.requested_outputs()) == outputs
    same(received.decode(), inputs)


@given(TENSORS, NAMES, NAMES, NAMES)
def test_response_round_trip_and_equality_with_protobuf(outputs, model, version, id_):
    response = TensorResponse(model=model, version=version, id=id_, outputs=outputs)
    headers, raws = protobuf_tensors(pb.ModelInferResponse.InferOutputTensor, outputs)
    expected = pb.ModelInferResponse(
        model_name=model, model_version=version, id=id_, outputs=headers, raw_output_contents=raws
    )
    assert pb.ModelInferResponse.FromString(response.encode()) == expected
    same(WireResponse(expected.SerializeToString(), Served()).decode(), outputs)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_mesh_errors(body):
    try:
        request = WireRequest(body)
        request.decode()
        request.requested_outputs()
    except MeshError as error:
        assert error.code in (Code.INVALID_REQUEST, Code.UNSUPPORTED)
    try:
        WireResponse(body, Served()).decode()
    except MeshError as error:
        assert error.code is Code.INTERNAL
    try:
        decode_report(body)
    except MeshError as error:
        assert error.code is Code.INTERNAL


@settings(max_examples=300)
@given(TENSORS, PARAMETERS, st.data())
def test_damaged_requests_raise_only_mesh_errors(inputs, parameters, data):
    body = bytearray(TensorRequest(model="m", inputs=inputs, parameters=parameters, outputs=["y"]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    try:
        request = WireRequest(bytes(body))
        request.decode()
        request.requested_outputs()
    except MeshError as error:
        assert error.code in (Code.INVALID_REQUEST, Code.UNSUPPORTED)


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_peek_agrees_with_protobuf(body):
    """What protobuf refuses we refuse, at the latest when decoding; what both accept, both read alike."""
    try:
        expected = pb.ModelInferRequest.FromString(body)
    except DecodeError:
        with pytest.raises(MeshError):
            read_all(body)
        return
    try:
        request = WireRequest(body)
    except MeshError:
        return  # groups, which proto3 does not use
    assert (request.model, request.version, request.id) == (
        expected.model_name,
        expected.model_version,
        expected.id,
    )
    assert set(request.parameters) == {n for n, v in expected.parameters.items() if v.WhichOneof("parameter_choice")}


def read_all(body):
    request = WireRequest(body)
    request.requested_outputs()
    request.decode()


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_varint(value, rest):
    encoded = encode_varint(value)
    assert varint(encoded + rest, 0) == (value, len(encoded))


@given(st.text())
def test_messages_are_plain_on_the_wire_and_come_back(text):
    encoded = status.encode_message(text)
    assert encoded.isascii()
    assert not encoded or encoded.isprintable()
    if len(text) <= status.MESSAGE_CHARS_MAX:
        assert status.decode_message(encoded) == text


@given(st.text(max_size=50))
def test_decoding_any_message_never_fails(text):
    status.decode_message(text)
    status.served_from_trailers({"nc-served-by": text, "nc-queue-us": text, "endpoint-load-metrics": text})


@given(st.floats(1e-9, 1e9))
def test_a_formatted_timeout_only_shrinks(seconds):
    text = status.format_timeout(seconds)
    assert len(text) <= 9
    back = status.parse_timeout(text)
    assert back <= seconds * (1 + 1e-12)
    assert back >= seconds * 0.98 or seconds < 2e-9
