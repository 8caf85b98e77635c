from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from nearcast.errors import Code, MeshError
from nearcast.handler import SEQUENCE_ID_CHARS_MAX
from nearcast.wire.framing import LIMITS, encode_field
from nearcast.wire.request import PiecedRequest, TensorRequest, WireRequest
from nearcast.wire.v1 import oip_pb2 as pb


def make(**inputs) -> pb.ModelInferRequest:
    """Protobuf's own encoding of inputs given as (datatype, shape, raw bytes)."""
    message = pb.ModelInferRequest(model_name="m", model_version="3", id="r1")
    for name, (datatype, shape, raw) in inputs.items():
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        if raw is not None:
            message.raw_input_contents.append(raw)
    return message


def refused(message: pb.ModelInferRequest | bytes) -> MeshError:
    body = message if isinstance(message, bytes) else message.SerializeToString()
    with pytest.raises(MeshError) as caught:
        WireRequest(body).decode()
    assert caught.value.code is Code.INVALID_REQUEST
    return caught.value


def test_top_level_fields_without_decoding():
    message = make(x=("FP32", [2], b"\0" * 7))  # broken tensor: must not matter before `decode`
    message.parameters["sequence_id"].string_param = "s1"
    message.parameters["sequence_start"].bool_param = True
    message.parameters["big"].uint64_param = 2**64 - 1
    message.parameters["small"].int64_param = -5
    message.parameters["ratio"].double_param = 0.5
    message.outputs.add(name="y")
    request = WireRequest(message.SerializeToString())
    assert (request.model, request.version, request.id) == ("m", "3", "r1")
    assert request.parameters == {
        "sequence_id": "s1",
        "sequence_start": True,
        "big": 2**64 - 1,
        "small": -5,
        "ratio": 0.5,
    }
    assert request.sequence_id == "s1"
    assert list(request.requested_outputs()) == ["y"]
    assert request.size_bytes == len(request.encode())


def test_encode_gives_the_original_bytes():
    body = make(x=("FP32", [1], b"\0\0\x80?")).SerializeToString()
    assert WireRequest(body).encode() is body


def test_last_string_wins_and_unknown_fields_are_skipped_as_protobuf_does():
    body = b"\x0a\x01a" + b"\x78\x96\x01" + b"\x7a\x02hi" + b"\x81\x01" + b"\0" * 8 + b"\x0a\x01b" + b"\x85\x01\0\0\0\0"
    assert pb.ModelInferRequest.FromString(body).model_name == "b"
    assert WireRequest(body).model == "b"


@pytest.mark.parametrize("tag", [b"\x8a\x00", b"\x92\x80\x00", b"\xba\x80\x80\x00"])
def test_a_tag_in_more_bytes_than_it_needs_is_refused(tag):
    """Protobuf takes it, so skipping it would show two readers two different messages."""
    pb.ModelInferRequest.FromString(tag + b"\x02hi")
    assert "tag" in refused(tag + b"\x02hi").message


def test_a_tag_that_protobuf_refuses_for_its_length_is_refused():
    body = b"\xc5\xf8\x8f\xf2\x8f\x00four"
    with pytest.raises(DecodeError):
        pb.ModelInferRequest.FromString(body)
    assert "tag" in refused(body).message


def test_a_known_number_of_another_wire_type_is_unknown():
    body = b"\x08\x05\x0a\x01a"
    assert pb.ModelInferRequest.FromString(body).model_name == WireRequest(body).model == "a"


def test_small_and_large_tensors_are_aligned_whatever_the_offset():
    values = np.arange(40_000, dtype=np.float64)
    for length in range(1, 9):
        request = TensorRequest(model="m" * length, inputs={"x": values, "y": values[:10]})
        decoded = WireRequest(request.encode()).decode()
        for name, array in decoded.items():
            assert array.flags.aligned
            assert array.flags.c_contiguous
            assert not array.flags.writeable
            assert np.array_equal(array, values[: len(array)]), name


@pytest.mark.parametrize("model", ["m", "mo", "mod", "mode"])
@pytest.mark.parametrize("order", ["xy", "yx"])  # behind a large tensor, a first piece says nothing of the other
def test_tensors_of_a_message_in_pieces_are_aligned_whatever_the_offset(model, order):
    values = {"x": np.arange(40_000, dtype=np.float64).reshape(4, -1), "y": np.arange(3, dtype=np.int32)}
    inputs = {name: values[name] for name in order}
    for number in range(3):  # the first time nothing is known of the layout
        body = TensorRequest(model=model, id=f"i{number}", inputs=inputs, outputs=("o",)).encode()
        request = PiecedRequest([body[:400], *(body[at : at + 16_384] for at in range(400, len(body), 16_384))])
        assert request.requested_outputs() == ("o",)
        decoded = request.decode()
        assert list(decoded) == list(order)
        for name, array in decoded.items():
            np.testing.assert_array_equal(array, values[name])
            assert array.dtype == values[name].dtype
            assert array.flags.aligned
            assert not array.flags.writeable
        assert request.encode() == body
        if number and order == "yx":
            assert not np.shares_memory(decoded["x"], np.frombuffer(request.encode(), np.uint8))


@pytest.mark.parametrize("size_bytes", [0x25, LIMITS.zero_copy_size_bytes_min + 0x25])
def test_percent_signs_stay_as_they_are(size_bytes):
    """They mean something in the templates of messages; a size of 37 bytes is one, too."""
    inputs = {"%b": np.ones(0x25, np.uint8), "%": np.full(size_bytes, 0x25, np.uint8)}
    body = TensorRequest(model="50%b", version="%%", id="%d", inputs=inputs, outputs=("%s",)).encode()
    message = pb.ModelInferRequest.FromString(body)
    assert (message.model_name, message.model_version, message.id) == ("50%b", "%%", "%d")
    assert [(tensor.name, *tensor.shape) for tensor in message.inputs] == [("%b", 0x25), ("%", size_bytes)]
    assert [output.name for output in message.outputs] == ["%s"]
    assert list(message.raw_input_contents) == [array.tobytes() for array in inputs.values()]


@pytest.mark.parametrize("last_size_bytes", [3000, 24, 5, 3])
def test_an_id_behind_the_raw_contents_is_read_whole_from_pieces(last_size_bytes):
    base = TensorRequest(model="behind", inputs={"x": np.ones(1500, np.int64)}).encode()
    for number in range(3):  # the first time nothing is known of the layout
        id_ = f"request-{number:04d}-of-tenänt"
        body = base + encode_field(3, id_.encode())
        request = PiecedRequest([body[:-last_size_bytes], body[-last_size_bytes:]])
        assert request.id == WireRequest(body).id == id_
        np.testing.assert_array_equal(request.decode()["x"], np.ones(1500, np.int64))


def test_decoding_again_joins_no_pieces():
    body = TensorRequest(model="again", inputs={"x": np.arange(40_000, dtype=np.float32)}).encode()
    WireRequest(body).decode()
    request = PiecedRequest([body[:17_000], body[17_000:]])
    assert request.decode() is request.decode()
    assert len(request.encode_pieces()) == 2
    assert request._body == b""


def test_large_aligned_tensor_is_a_view():
    values = np.zeros(LIMITS.zero_copy_size_bytes_min, dtype=np.uint8)
    body = TensorRequest(model="m", inputs={"x": values}).encode()
    array = WireRequest(body).decode()["x"]
    assert np.shares_memory(array, np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("datatype", "field", "values", "expected"),
    [
        ("BOOL", "bool_contents", [True, False], [True, False]),
        ("INT8", "int_contents", [-128, 127], [-128, 127]),
        ("INT16", "int_contents", [-5, 5], [-5, 5]),
        ("INT32", "int_contents", [-(2**31), 2**31 - 1], [-(2**31), 2**31 - 1]),
        ("INT64", "int64_contents", [-(2**63), 2**63 - 1], [-(2**63), 2**63 - 1]),
        ("UINT8", "uint_contents", [0, 255], [0, 255]),
        ("UINT16", "uint_contents", [0, 65535], [0, 65535]),
        ("UINT32", "uint_contents", [0, 2**32 - 1], [0, 2**32 - 1]),
        ("UINT64", "uint64_contents", [0, 2**64 - 1], [0, 2**64 - 1]),
        ("FP32", "fp32_contents", [0.5, -1.5], [0.5, -1.5]),
        ("FP64", "fp64_contents", [0.1, 1e300], [0.1, 1e300]),
        ("BYTES", "bytes_contents", [b"a", b"\xff\0"], [b"a", b"\xff\0"]),
    ],
)
def test_typed_contents(datatype, field, values, expected):
    message = make(x=(datatype, [1, 2], None))
    getattr(message.inputs[0].contents, field).extend(values)
    array = WireRequest(message.SerializeToString()).decode()["x"]
    assert array.shape == (1, 2)
    assert array.reshape(-1).tolist() == expected


def test_raw_and_typed_together_are_refused_in_tritons_words():
    message = make(INPUT0=("INT32", [2], b"\0" * 8))
    message.inputs[0].contents.int_contents.extend([1, 2])
    text = "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'm'"
    assert refused(message).message == text


def test_empty_contents_beside_raw_ones_carry_nothing():
    message = make(x=("FP32", [2], b"\0" * 8), y=("BYTES", [1], b"\1\0\0\0a"))
    for tensor in message.inputs:
        tensor.contents.SetInParent()
    inputs = WireRequest(message.SerializeToString()).decode()
    assert (inputs["x"].tolist(), inputs["y"].tolist()) == ([0.0, 0.0], [b"a"])
    del message.raw_input_contents[1]
    assert "unable to find data for input tensor 'y'" in refused(message).message


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_typed_contents(datatype):
    message = make(x=(datatype, [1], None))
    message.inputs[0].contents.fp32_contents.append(1.0)
    assert "raw bytes only" in refused(message).message


def test_contents_of_another_type_are_refused():
    message = make(x=("FP32", [1], None))
    message.inputs[0].contents.int_contents.append(1)
    assert "fp32_contents" in refused(message).message


def test_typed_value_out_of_range_is_refused():
    message = make(x=("INT8", [1], None))
    message.inputs[0].contents.int_contents.append(128)
    assert "INT8" in refused(message).message


def test_wrong_size_names_tensor_expected_and_got():
    text = refused(make(speech=("FP32", [1, 3], b"\0" * 11))).message
    assert "'speech'" in text
    assert "needs 12 bytes, got 11" in text


def test_wrong_count_of_typed_elements():
    message = make(x=("INT32", [3], None))
    message.inputs[0].contents.int_contents.extend([1, 2])
    assert "needs 3 elements, got 2" in refused(message).message


@pytest.mark.parametrize(
    "message",
    [
        make(x=("FP32", [-1], b"\0" * 4)),
        make(x=("FP32", [1] * 33, b"\0" * 4)),
        make(x=("FP32", [2**62, 2**62, 0], b"")),
        make(x=("FP33", [1], b"\0" * 4)),
        make(x=("", [1], b"\0" * 4)),
        make(x=("FP32", [1], None)),
        make(x=("BYTES", [1], b"\x05\0\0\0abc")),
        make(x=("BYTES", [1], b"\x05\0")),
        make(x=("BYTES", [2], b"\x01\0\0\0a")),
        make(x=("BYTES", [], b"")),
    ],
    ids=str,
)
def test_malformed_tensors(message):
    refused(message)


def test_more_raw_contents_than_tensors():
    message = make(x=("FP32", [1], b"\0" * 4))
    message.raw_input_contents.append(b"")
    assert "2 raw contents for 1 tensors" in refused(message).message


def test_a_tensor_twice():
    message = make(x=("FP32", [1], b"\0" * 4))
    message.inputs.add(name="x", datatype="FP32", shape=[1])
    message.raw_input_contents.append(b"\0" * 4)
    assert "twice" in refused(message).message


def test_every_truncation_is_refused_or_another_valid_message():
    body = make(x=("FP32", [1, 2], b"\0" * 8)).SerializeToString()
    for length in range(1, len(body)):
        try:
            WireRequest(body[:length]).decode()
        except MeshError as error:
            assert error.code is Code.INVALID_REQUEST
        else:
            pb.ModelInferRequest.FromString(body[:length])


@pytest.mark.parametrize(
    "body",
    [b"\x0a", b"\x0a\x05ab", b"\x0a\xff", b"\x00\x00", b"\x0b", b"\x0a\x01\xff", b"\xff" * 11, b"\x0a" + b"\xff" * 10],
)
def test_malformed_framing(body):
    with pytest.raises(MeshError) as caught:
        WireRequest(body)
    assert caught.value.code is Code.INVALID_REQUEST


def test_number_of_fields_and_parameters_is_bounded():
    with pytest.raises(MeshError, match="fields"):
        WireRequest(b"\x0a\x00" * (LIMITS.fields_max + 1))
    with pytest.raises(MeshError, match="fields"):
        WireRequest(b"\x78\x00" * (LIMITS.fields_max + 1))
    WireRequest(b"\x78\x00" * LIMITS.fields_max)
    message = pb.ModelInferRequest()
    for index in range(LIMITS.parameters_max + 1):
        message.parameters[str(index)].bool_param = True
    with pytest.raises(MeshError, match="parameters"):
        WireRequest(message.SerializeToString())


@pytest.mark.parametrize("extension", ["classification", "shared_memory_region"])
def test_extensions_that_would_change_the_answer_are_refused(extension):
    message = make(x=("FP32", [1], b"\0" * 4))
    output = message.outputs.add(name="y")
    output.parameters[extension].int64_param = 1
    with pytest.raises(MeshError) as caught:
        WireRequest(message.SerializeToString()).requested_outputs()
    assert caught.value.code is Code.UNSUPPORTED


def test_booleans_are_clean_even_if_the_client_was_not():
    array = WireRequest(make(x=("BOOL", [3], b"\x00\x01\xff")).SerializeToString()).decode()["x"]
    assert array.dtype == np.bool_
    assert int(array.sum()) == 2


def test_parameters_that_cannot_travel():
    for value in (2**64, -(2**63) - 1, "\ud800", object()):
        with pytest.raises(MeshError) as caught:
            TensorRequest(model="m", inputs={}, parameters={"p": value}).encode()
        assert caught.value.code is Code.INVALID_REQUEST


def test_arrays_that_cannot_travel():
    for array in (np.zeros(1, np.complex64), np.array([object()]), np.zeros(1, "M8[s]")):
        with pytest.raises(MeshError) as caught:
            TensorRequest(model="m", inputs={"x": array}).encode()
        assert caught.value.code is Code.INVALID_REQUEST


def test_large_tensors_are_pieces_of_their_own():
    values = np.arange(100_000, dtype=np.float32)
    request = TensorRequest(model="m", inputs={"a": values, "b": np.float32([1.0]), "c": values})
    pieces = request.encode_pieces()
    assert [len(piece) for piece in pieces if len(piece) > 1000] == [400_000, 400_000]
    assert b"".join(pieces) == request.encode()
    parsed = pb.ModelInferRequest.FromString(request.encode())
    assert list(parsed.raw_input_contents) == [values.tobytes(), b"\0\0\x80?", values.tobytes()]


def test_a_sequence_has_a_bounded_name():
    message = make()
    message.parameters["sequence_id"].string_param = "s" * 1000
    assert WireRequest(message.SerializeToString()).sequence_id == "s" * SEQUENCE_ID_CHARS_MAX
