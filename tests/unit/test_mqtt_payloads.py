from __future__ import annotations

import io
import json
import struct
import wave
from pathlib import Path

import cbor2
import msgspec
import numpy as np
import pytest

from benchmarks.fuzz_payloads import STATUSES
from edge_node.mqtt import envelope
from edge_node.mqtt.admission import Refusal, Request, admit
from edge_node.mqtt.limits import MessageLimits
from nearcast.cli import demo
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, Served, TensorSpec
from nearcast.transport.mqtt import content_types as types
from nearcast.transport.mqtt import payload as payloads
from nearcast.transport.mqtt import payload_envelope
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.payload_media import read_wav
from nearcast.transport.mqtt.payload_spec import Asked
from nearcast.transport.mqtt.status import STATUS, failure, require_success, success
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import TensorResponse

X = np.array([[1.5, -2.0]], dtype=np.float32)
Y = TensorSpec("y", "FP32", (-1, 2))


def asked(*inputs, outputs=(Y,), user=None, **more):
    properties = more.pop("properties", {})
    metadata = ModelMetadata(
        name="m", versions=("1",), platform="", inputs=inputs, outputs=outputs, properties=properties
    )
    return Asked(model="m", metadata=metadata, user=user or {}, **more)


def decoded(payload, kind, what, **more):
    return payloads.decode_request(payload, kind, what, **more).decode()


PAIR = asked(TensorSpec("x", "FP32", (-1, 2)))


# The arrays of RFC 8746, appendix A and section 3.1, byte for byte.
@pytest.mark.parametrize(
    ("data", "datatype", "shape", "elements"),
    [
        ("d828 82 82 02 03 d841 4c 000200040008000400100100", "UINT16", [2, 3], [2, 4, 8, 4, 16, 256]),
        ("d90410 82 82 02 03 86 02 04 04 10 08 190100", "UINT16", [2, 3], [2, 4, 8, 4, 16, 256]),
        ("d828 82 82 02 03 86 02 04 08 04 10 190100", "UINT16", [2, 3], [2, 4, 8, 4, 16, 256]),
        ("d855 48 0000c03f 000000c0", "FP32", [2], [1.5, -2.0]),
        ("d852 50 3ff8000000000000 c000000000000000", "FP64", [2], [1.5, -2.0]),
        ("d850 44 3e00 c000", "FP16", [2], [1.5, -2.0]),
        ("d844 43 00 7f ff", "UINT8", [3], [0, 127, 255]),
        ("d84b 50 ffffffffffffffff 7fffffffffffffff", "INT64", [2], [-1, 2**63 - 1]),
        ("d829 83 01 02 03", "UINT16", [3], [1, 2, 3]),
    ],
)
def test_typed_arrays_of_rfc_8746(data, datatype, shape, elements):
    body = bytes.fromhex("a1 61 78") + bytes.fromhex(data)
    array = decoded(body, types.CBOR, asked(TensorSpec("x", datatype, (-1,))))["x"]
    assert array.dtype.byteorder in "=|<"
    assert (list(array.shape), array.reshape(-1).tolist()) == (shape, elements)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (cbor2.CBORTag(83, bytes(16)), "tag 83"),
        (cbor2.CBORTag(76, b"1"), "tag 76"),
        (cbor2.CBORTag(85, b"123"), "tag 85"),
        (cbor2.CBORTag(85, [1]), "tag 85"),
        (cbor2.CBORTag(35, "a*"), "tag 35"),
        (cbor2.CBORTag(5, [1, 2]), "tag 5"),
        (cbor2.CBORTag(28, [cbor2.CBORTag(29, 0)]), "tag 2"),
        (cbor2.CBORTag(40, [1]), "its shape and its elements"),
        (cbor2.CBORTag(40, [3, [1, 2]]), "array of sizes"),
        (cbor2.CBORTag(40, [[2, 2], [1, 2]]), "has 2 elements; its shape is [2, 2]"),
        ([[1, 2], [3]], "nesting"),
        (["a", "b"], "a value that FP32 cannot hold"),
        ({"shape": [1, 2]}, "a map with data"),
        ({"dtype": "FP64", "data": cbor2.CBORTag(85, bytes(8))}, "another type"),
        ({"dtype": "FLOAT", "data": bytes(8)}, "use one of"),
        (b"123", "no whole number of FP32"),
        (bytes(12), "3 elements of FP32 do not fill [-1, 2] of 'x'; send a multiple of 2."),
        (None, "cannot hold"),
    ],
)
def test_cbor_that_is_no_tensor_is_refused_by_a_sentence(value, said):
    with pytest.raises(MeshError) as caught:
        decoded(cbor2.dumps({"x": value}), types.CBOR, PAIR)
    assert caught.value.code is Code.INVALID_REQUEST
    assert said in caught.value.message


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        cbor2.dumps([1]),
        cbor2.dumps({1: b""}),
        b"\x81" * 100,
        b"\xa2\x61x\x01\x61x\x02",
        b"\xbb" + b"\xff" * 8,
    ],
)
def test_what_is_no_map_of_names_is_refused(payload):
    with pytest.raises(MeshError) as caught:
        decoded(payload, types.CBOR, PAIR)
    assert caught.value.code is Code.INVALID_REQUEST


@pytest.mark.parametrize("item", ["01", "80", "60", "1800", "c1", "9f"])
def test_more_items_than_memory_is_for_are_refused_before_they_are_made(item):
    with pytest.raises(MeshError) as caught:
        decoded(bytes.fromhex("a1 61 78 9a 00ffffff") + bytes.fromhex(item) * 100_000, types.CBOR, PAIR)
    assert caught.value.code is Code.TOO_LARGE


def test_bytes_are_one_item_whatever_their_size():
    x = np.ones((50_000, 2), np.float32)
    for value in (
        x.tobytes(),
        cbor2.CBORTag(85, x.tobytes()),
        {"dtype": "FP32", "shape": [50_000, 2], "data": x.tobytes()},
    ):
        assert np.array_equal(decoded(cbor2.dumps({"x": value}), types.CBOR, PAIR)["x"], x)


def test_the_long_form_of_cbor_has_outputs_and_parameters():
    body = {"inputs": {"x": X.tolist()}, "outputs": ["y"], "parameters": {"threshold": 0.5}, "id": "a"}
    request = payloads.decode_request(cbor2.dumps(body), types.CBOR, PAIR)
    assert request.decode()["x"].tolist() == X.tolist()
    assert (request.requested_outputs(), request.parameters, request.id) == (("y",), {"threshold": 0.5}, "a")
    without = msgspec.structs.replace(PAIR, envelope=True)
    flat = {"id": "a", "ttl_ms": 5, "x": X.tobytes()}
    assert decoded(cbor2.dumps(flat), types.CBOR, without)["x"].tolist() == X.tolist()
    own = asked(TensorSpec("inputs", "FP32", (-1, 2)))
    assert decoded(cbor2.dumps({"inputs": X.tobytes()}), types.CBOR, own)["inputs"].tolist() == X.tolist()
    payload, _ = payloads.encode_request(
        TensorRequest(model="m", inputs={"inputs": X}, parameters={"a": 1}), types.CBOR
    )
    request = payloads.decode_request(payload, types.CBOR, own)
    assert (request.decode()["inputs"].tolist(), request.parameters) == (X.tolist(), {"a": 1})


def test_tensors_that_the_model_does_not_name_must_say_what_they_are():
    with pytest.raises(MeshError, match="the model's inputs are: x"):
        decoded(cbor2.dumps({"z": [1]}), types.CBOR, PAIR)
    body = {"z": {"dtype": "INT8", "shape": [2], "data": b"\x01\x02"}}
    assert decoded(cbor2.dumps(body), types.CBOR, PAIR)["z"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("payload", "user", "wanted"),
    [
        (X.tobytes(), {}, [[1.5, -2.0]]),
        (X.tobytes(), {"shape": "[2, 1]"}, [[1.5], [-2.0]]),
        (X.astype(np.float64).tobytes(), {"dtype": "fp64"}, [[1.5, -2.0]]),
        (b"\x01\x00", {"dtype": "BOOL", "shape": "2"}, [True, False]),
    ],
)
def test_a_raw_tensor_is_what_its_properties_say_or_else_the_model(payload, user, wanted):
    what = asked(TensorSpec("x", "FP32", (-1, 2)), user=user)
    assert decoded(payload, types.OCTETS, what)["x"].tolist() == wanted


def test_a_text_is_the_whole_payload_unless_a_shape_says_that_it_is_framed():
    spec = TensorSpec("x", "BYTES", (-1, -1))
    assert decoded(b"hello\0", types.OCTETS, asked(spec))["x"].tolist() == [[b"hello\0"]]
    framed = struct.pack("<I2sI1s", 2, b"ab", 1, b"c")
    assert decoded(framed, types.OCTETS, asked(spec, user={"shape": "2"}))["x"].tolist() == [b"ab", b"c"]


def test_json_without_its_content_type_gets_a_hint():
    with pytest.raises(MeshError, match=r"application/json, or publish to …/json\.$"):
        decoded(b'{"inputs": []}', types.OCTETS, asked(TensorSpec("x", "FP32", (1, 2))))


def test_an_answer_without_a_name_is_refused_before_the_model_runs():
    two = asked(TensorSpec("x", "FP32", (-1, 2)), outputs=(Y, TensorSpec("z", "FP32", (-1,))))
    with pytest.raises(MeshError, match=r"user property `output` \(it has y, z\)"):
        payloads.decode_request(X.tobytes(), types.OCTETS, two, accept=types.OCTETS)
    payloads.decode_request(X.tobytes(), types.OCTETS, two, accept=types.JSON)
    one = TensorRequest(model="m", inputs={"x": X}, outputs=["z"]).encode()
    payloads.decode_request(one, types.PROTOBUF, two, accept=types.OCTETS)


def wav(samples, *, rate_hz=16_000, channels=1):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(samples.dtype.itemsize)
        writer.setframerate(rate_hz)
        writer.writeframes(samples.tobytes())
    return file.getvalue()


@pytest.mark.parametrize(
    ("samples", "wanted"),
    [
        (np.array([0, 128, 192], np.uint8), [-1.0, 0.0, 0.5]),
        (np.array([-32768, 0, 16384], np.int16), [-1.0, 0.0, 0.5]),
        (np.array([-(2**31), 0, 2**30], np.int32), [-1.0, 0.0, 0.5]),
    ],
)
def test_samples_are_from_minus_one_to_one(samples, wanted):
    rate_hz, found = read_wav(wav(samples, rate_hz=8000))
    assert (rate_hz, found.tolist()) == (8000, wanted)


def test_speech_is_read_as_the_standard_library_reads_it():
    recorded = Path(demo.__path__[0], "models", "wake_word", "okay_nabu.wav").read_bytes()
    with wave.open(io.BytesIO(recorded)) as file:
        wanted = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert read_wav(recorded)[0] == file.getframerate()
    assert np.array_equal(read_wav(recorded)[1] * 32768, wanted)


def test_a_wav_file_may_hold_floats_other_chunks_and_an_end_left_open():
    samples = np.array([0.5, -1.0], np.float32)
    fmt = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 16_000, 64_000, 4, 32, 22, 32, 4) + struct.pack("<H14x", 3)
    head = b"RIFF\xff\xff\xff\xffWAVE" + b"LIST\x03\x00\x00\x00abc\x00" + b"fmt " + struct.pack("<I", len(fmt)) + fmt
    rate_hz, found = read_wav(head + b"data\xff\xff\xff\xff" + samples.tobytes() + b"\x00")
    assert (rate_hz, found.tolist()) == (16_000, [0.5, -1.0])
    with pytest.raises(MeshError, match="more than 64 chunks"):
        read_wav(head[:12] + b"JUNK\x00\x00\x00\x00" * 100_000)
    with pytest.raises(MeshError, match="no format chunk"):
        read_wav(head[:12])


def test_a_sound_fills_the_input_for_samples():
    samples = np.array([-32768, 0, 16384, 32767], np.int16)
    speech = asked(
        TensorSpec("state", "FP32", (2, 1, 3)), TensorSpec("audio", "FP32", (-1, -1)), user={"name": "audio"}
    )
    array = decoded(wav(samples), types.WAV, speech)["audio"]
    assert (array.dtype, array.shape, array[0, 2]) == (np.float32, (1, 4), 0.5)
    whole = decoded(wav(samples), types.WAV, asked(TensorSpec("audio", "INT16", (4,))))["audio"]
    assert whole.tolist() == samples.tolist()
    file = decoded(wav(samples), types.WAV, asked(TensorSpec("audio", "BYTES", (1,))))["audio"]
    assert file.tolist() == [wav(samples)]


@pytest.mark.parametrize(
    ("payload", "what", "code"),
    [
        (b"RIFF", PAIR, Code.INVALID_REQUEST),
        (wav(np.zeros(4, np.int16), channels=2), PAIR, Code.INVALID_REQUEST),
        (wav(np.zeros(3, np.int16)), asked(TensorSpec("x", "FP32", (1, 4))), Code.INVALID_REQUEST),
        (wav(np.zeros(4, np.int16)), asked(TensorSpec("x", "UINT8", (-1,))), Code.UNSUPPORTED),
        (
            wav(np.zeros(4, np.int16), rate_hz=44_100),
            asked(TensorSpec("x", "FP32", (-1,)), properties={"sample_rate_hz": "16000"}),
            Code.UNSUPPORTED,
        ),
    ],
)
def test_sounds_that_do_not_fit_are_refused(payload, what, code):
    with pytest.raises(MeshError) as caught:
        decoded(payload, types.WAV, what)
    assert caught.value.code is code


def test_images_are_for_models_that_take_files():
    image = b"\xff\xd8\xff\xe0 whatever"
    assert decoded(image, "image/jpeg", asked(TensorSpec("image", "BYTES", (-1,))))["image"].tolist() == [image]
    with pytest.raises(MeshError, match="takes no image files") as caught:
        decoded(image, "image/png", PAIR)
    assert STATUS[caught.value.code] == 415
    sent = np.array([image], dtype=object)
    payload, user = payloads.encode_request(TensorRequest(model="m", inputs={"image": sent}), "image/jpeg")
    assert (payload, user) == (image, {"name": "image"})
    with pytest.raises(MeshError, match="only element"):
        payloads.encode_request(TensorRequest(model="m", inputs={"a": sent, "b": sent}), "image/jpeg")


def test_protobuf_must_name_the_model_of_the_topic():
    body = TensorRequest(model="other", inputs={"x": X}).encode()
    with pytest.raises(MeshError, match="the topic names 'm'"):
        decoded(body, types.PROTOBUF, PAIR)
    nameless = TensorRequest(model="", inputs={"x": X}).encode()
    assert payloads.decode_request(nameless, types.PROTOBUF, PAIR).model == "m"


def test_nan_goes_as_everything_but_json():
    response = TensorResponse(model="m", version="1", outputs={"y": np.array([np.nan], np.float32)})
    with pytest.raises(MeshError, match="set `accept` to application/cbor"):
        payloads.encode_reply(response, types.JSON)
    payload, described = payloads.encode_reply(response, types.CBOR)
    answer = payloads.decode_reply(payload, types.CBOR, success(response) | described, model="m")
    assert np.isnan(answer.decode()["y"]).all()


# -- what properties and envelopes say --------------------------------------------------------------------------------


def test_every_code_has_a_status_of_the_convention():
    assert set(STATUS) == set(Code)
    assert set(STATUS.values()) | {200, 408} == STATUSES


@pytest.mark.parametrize(
    ("served", "wanted"),
    [
        (Served(node="n1", tier="local", version="7"), {"served-by": "edge", "node": "n1", "tier": "local"}),
        (Served(node="c1", tier="cloud", version="7"), {"served-by": "cloud", "node": "c1", "tier": "cloud"}),
        (Served(), {"served-by": "edge"}),
    ],
)
def test_an_answer_says_who_gave_it(served, wanted):
    user = success(TensorResponse(model="m", version="7", outputs={}, served=served))
    assert user == {"status": "200", "model-version": "7", **wanted}
    assert require_success(user) == Served(node=served.node, tier=served.tier, version="7")


@pytest.mark.parametrize(
    ("user", "code", "retry_after_ms"),
    [
        (failure(429, Code.OVERLOADED, "full", 200), Code.OVERLOADED, 200),
        (failure(415, Code.UNSUPPORTED, "no"), Code.UNSUPPORTED, None),
        ({"status": "500", "code": "NEWER_THAN_WE", "retry-after-ms": "soon"}, Code.INTERNAL, None),
        ({}, Code.INTERNAL, None),
    ],
)
def test_a_device_hears_the_error_that_the_node_had(user, code, retry_after_ms):
    with pytest.raises(MeshError) as caught:
        payloads.decode_reply(b"", types.JSON, user, model="m")
    assert (caught.value.code, caught.value.retry_after_ms) == (code, retry_after_ms)


@pytest.mark.parametrize("kind", [types.JSON, types.CBOR])
def test_an_envelope_says_what_properties_would(kind):
    read = json.loads if kind == types.JSON else cbor2.loads
    response = TensorResponse(
        model="m", version="7", outputs={"y": X}, served=Served(node="n1", tier="local", version="7")
    )
    content_type, payload = payload_envelope.encode_reply(response, kind, "a-1", success(response))
    body = read(payload)
    outputs = body.pop("outputs")
    assert body == {
        "id": "a-1",
        "status": 200,
        "served_by": "edge",
        "node": "n1",
        "tier": "local",
        "model_name": "m",
        "model_version": "7",
    }
    assert len(outputs) == 1
    again = read(payload_envelope.mark_repeated(content_type, payload))
    assert again.pop("dedup") == 1
    assert again.pop("outputs") == outputs
    assert again == body
    _, failed = payload_envelope.encode_failure(kind, "a-1", failure(429, Code.OVERLOADED, "full", 200))
    assert read(failed) == {"id": "a-1", "status": 429, "code": "OVERLOADED", "retry_after_ms": 200, "error": "full"}


def test_a_repeated_answer_without_an_envelope_stays_as_it_is():
    assert payload_envelope.mark_repeated(types.JSON, b"{}") == b"{}"
    assert payload_envelope.mark_repeated(types.OCTETS, b"\x01") == b"\x01"


# -- what the node makes of it ----------------------------------------------------------------------------------------


def asked_without_properties(suffix, payload):
    message = Message(topic=f"nc/v1/local/cam/up/infer/m/{suffix}", payload=payload)
    request = admit(message, 0.0, MessageLimits(), nonce=b"nonce")
    assert isinstance(request, Request)
    return request


def test_what_raw_bytes_cannot_say_is_json_on_the_topic_beside():
    request = asked_without_properties("bin", X.tobytes())
    one = TensorResponse(model="m", version="7", outputs={"y": X})
    answer = envelope.reply(request, one)
    assert (answer.topic, answer.payload) == ("nc/v1/local/cam/down/reply/m/bin", X.tobytes())
    two = TensorResponse(model="m", version="7", outputs={"y": X, "z": X})
    answer = envelope.reply(request, two)
    assert answer.topic == "nc/v1/local/cam/down/reply/m/json"
    assert [output["name"] for output in json.loads(answer.payload)["outputs"]] == ["y", "z"]
    error = MeshError(Code.OVERLOADED, "full", retry_after_ms=100)
    answer = envelope.error_reply(request, error, status=None, expires=1.0)
    assert answer.topic == "nc/v1/local/cam/down/reply/m/json"
    assert json.loads(answer.payload)["retry_after_ms"] == 100


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("suffix", ["json", "cbor"])
def test_every_error_reaches_a_device_without_properties(code, suffix):
    read = json.loads if suffix == "json" else cbor2.loads
    request = asked_without_properties(suffix, b'{"id": "a"}' if suffix == "json" else cbor2.dumps({"id": "a"}))
    answer = envelope.error_reply(request, MeshError(code, "why"), status=None, expires=1.0)
    assert answer.topic == f"nc/v1/local/cam/down/reply/m/{suffix}"
    assert answer.correlation == b""
    assert read(answer.payload) == {"id": "a", "status": STATUS[code], "code": str(code), "error": "why"}


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("kind", types.REQUEST_TYPES)
def test_every_error_is_raised_again_where_it_was_asked(code, kind):
    message = Message(topic="nc/v1/local/cam/up/infer/m", content_type=kind, correlation=b"key")
    request = admit(message, 0.0, MessageLimits(), nonce=b"nonce")
    answer = envelope.error_reply(request, MeshError(code, "why", retry_after_ms=5), status=None, expires=1.0)
    assert (answer.correlation, answer.user["status"]) == (b"key", str(STATUS[code]))
    with pytest.raises(MeshError, match="why") as caught:
        payloads.decode_reply(answer.payload, answer.content_type, answer.user, model="m")
    assert (caught.value.code, caught.value.retry_after_ms) == (code, 5)


def test_too_many_items_are_413_also_without_properties():
    message = Message(topic="nc/v1/local/cam/up/infer/m/cbor", payload=b"\x80" * 70_000)
    refusal = admit(message, 0.0, MessageLimits(), nonce=b"nonce")
    assert isinstance(refusal, Refusal)
    assert refusal.status == 413
