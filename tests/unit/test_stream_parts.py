"""What is admitted on a stream's topic, how a definition fits its model, and what an event says."""

from __future__ import annotations

import json
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.mqtt.ledger.records import Input, StoredInput
from edge_node.mqtt.limits import MessageLimits, StreamLimits
from edge_node.mqtt.streams import events
from edge_node.mqtt.streams.admission import SEQ_MAX, Dropped, admit_input
from edge_node.mqtt.streams.batches import is_hopeless
from edge_node.mqtt.streams.definition import StreamDefinition, by_name
from edge_node.mqtt.streams.plan import make_plan
from edge_node.mqtt.streams.samples import read_samples, read_tensor
from edge_node.mqtt.streams.state import NOTHING, StreamState, decode_state, encode_state, rest_of, tensors_of
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, TensorSpec
from nearcast.transport.mqtt.message import Message

TOPIC = "nc/v1/local/cam-1/up/data/mic"
LIMITS = MessageLimits(payload_bytes_max=100)
SILERO = ModelMetadata(
    name="vad",
    versions=("1",),
    platform="test",
    inputs=(TensorSpec("input", "FP32", (-1, 576)), TensorSpec("state", "FP32", (2, -1, 128))),
    outputs=(TensorSpec("output", "FP32", (-1, 1)), TensorSpec("stateN", "FP32", (2, -1, 128))),
    properties={"stateful": "explicit"},
)
MIC = StreamDefinition(name="mic", model="vad", window=576, hop=512, datatype="INT16", scale=0.5)


def admit(*, topic=TOPIC, payload=b"x", wall=0.0, content_type="", **user):
    message = Message(topic=topic, payload=payload, content_type=content_type, user=user)
    return admit_input(message, 7.0, wall, LIMITS, {"mic"})


def stored(payload, **fields):
    return StoredInput(1, Input(tenant="local", device="d", stream="mic", arrived=1.0, **fields), payload)


def test_an_input_names_device_stream_boot_and_number():
    got = admit(**{"boot-id": "b1", "seq": "12", "ts": "noon", "dtype": "INT16", "other": "x"})
    assert isinstance(got, Input)
    assert (got.tenant, got.device, got.stream, got.key) == ("local", "cam-1", "mic", "local/cam-1/mic")
    assert (got.boot, got.seq, got.ts, got.arrived) == ("b1", 12, "noon", 7.0)
    assert got.user == {"dtype": "INT16"}


def test_a_device_that_counts_nothing_and_has_no_clock_is_heard_too():
    got = admit(wall=1_800_000_000.25)
    assert isinstance(got, Input)
    assert (got.boot, got.seq, got.ts) == ("", None, "2027-01-15T08:00:00.250+00:00")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"topic": "nc/v1/local/cam-1/up/data/other"}, "unknown"),
        ({"topic": "nc/v1/local/node/up/data/mic"}, "topic"),
        ({"topic": "nc/v1/local/cam-1/up/data/mic/x"}, "topic"),
        ({"payload": bytes(101)}, "too_large"),
        ({"seq": "1"}, "count"),
        ({"boot-id": "b"}, "count"),
        ({"boot-id": "b", "seq": "-1"}, "count"),
        ({"boot-id": "b", "seq": "\u0661"}, "count"),
        ({"boot-id": "b", "seq": str(SEQ_MAX + 1)}, "count"),
        ({"boot-id": "b" * 65, "seq": "1"}, "count"),
    ],
)
def test_what_cannot_be_used_is_dropped_by_name(change, reason):
    got = admit(**change)
    assert isinstance(got, Dropped)
    assert got.reason == reason


@given(st.text(max_size=25), st.text(max_size=80), st.binary(max_size=120), st.text(max_size=40))
def test_no_message_breaks_the_admission(seq, boot, payload, topic):
    for name in (TOPIC, topic):
        got = admit(topic=name, payload=payload, **{"seq": seq, "boot-id": boot})
        assert isinstance(got, Dropped) or 0 <= (got.seq or 0) <= SEQ_MAX


def test_explicit_state_goes_from_the_output_of_the_same_shape_to_its_input():
    plan = make_plan(MIC, SILERO)
    (state,) = plan.feedback
    assert (state.input, state.output, state.shape) == ("state", "stateN", (2, 1, 128))
    assert (plan.data.name, plan.shape) == ("input", (1, 576))


def test_of_outputs_of_the_same_shape_the_name_tells_which_is_state():
    metadata = msgspec.structs.replace(
        SILERO,
        inputs=(TensorSpec("x", "FP32", (-1, 3)), TensorSpec("state", "FP32", (2, -1, 3))),
        outputs=(TensorSpec("y", "FP32", (-1, 3)), TensorSpec("state_out", "FP32", (2, -1, 3))),
    )
    (state,) = make_plan(StreamDefinition(name="s", model="m", window=3), metadata).feedback
    assert (state.input, state.output) == ("state", "state_out")


def test_a_free_axis_takes_what_the_window_leaves():
    metadata = msgspec.structs.replace(SILERO, inputs=(TensorSpec("x", "FP32", (1, -1, 4)),), properties={})
    assert make_plan(StreamDefinition(name="s", model="m", window=12), metadata).shape == (1, 3, 4)


@pytest.mark.parametrize(
    ("definition", "metadata"),
    [
        (StreamDefinition(name="s", model="m", window=500), {}),
        (StreamDefinition(name="s", model="m", window=576, state={"state": "nothing"}), {}),
        (StreamDefinition(name="s", model="m", window=576), {"properties": {}}),
        (StreamDefinition(name="s", model="m", window=576), {"outputs": (TensorSpec("output", "FP32", (-1, 1)),)}),
    ],
)
def test_a_definition_that_does_not_fit_its_model_says_so(definition, metadata):
    with pytest.raises(MeshError, match="The stream s does not fit its model m") as raised:
        make_plan(definition, msgspec.structs.replace(SILERO, **metadata))
    assert raised.value.code is Code.INVALID_REQUEST


def test_a_stream_is_named_once_and_leaves_no_sample_out():
    with pytest.raises(ValueError, match="same name"):
        by_name([MIC, MIC])
    with pytest.raises(ValueError, match="hops further"):
        StreamDefinition(name="s", model="m", window=4, hop=5)


def test_samples_are_scaled_into_the_models_type():
    plan = make_plan(MIC, SILERO)
    samples = read_samples(plan, stored(np.array([2, -4], "<i2").tobytes()))
    assert samples.dtype == np.float32
    assert samples.tolist() == [1.0, -2.0]
    with pytest.raises(MeshError, match="no whole number of samples"):
        read_samples(plan, stored(b"abc"))
    with pytest.raises(MeshError, match="Samples are numbers"):
        read_samples(plan, stored(b"abcd", user={"dtype": "BYTES"}))
    texts = {"inputs": [{"name": "input", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}]}
    with pytest.raises(MeshError, match="Samples are numbers, not BYTES"):
        read_samples(plan, stored(json.dumps(texts).encode(), content_type="application/json"))


def test_a_message_may_be_one_input_as_it_is():
    metadata = msgspec.structs.replace(SILERO, inputs=(TensorSpec("x", "FP32", (-1, 2)),), properties={})
    plan = make_plan(StreamDefinition(name="mic", model="m"), metadata)
    raw = np.array([[1, 2], [3, 4]], np.float32)
    assert read_tensor(plan, stored(raw.tobytes())).tolist() == raw.tolist()
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    assert read_tensor(plan, stored(json.dumps(body).encode(), content_type="application/json")).tolist() == [[1, 2]]
    body["inputs"][0]["name"] = "y"
    with pytest.raises(MeshError, match="tensor x alone"):
        read_tensor(plan, stored(json.dumps(body).encode(), content_type="application/json"))


@given(
    st.binary(max_size=64),
    st.sampled_from(
        ["", "audio/wav", "application/json", "application/cbor", "application/x-protobuf", "image/png", "x"]
    ),
    st.dictionaries(st.sampled_from(["dtype", "shape", "name"]), st.text(max_size=8), max_size=3),
    st.integers(0, 3),
)
def test_no_payload_breaks_the_reading_of_samples(payload, content_type, user, window):
    metadata = msgspec.structs.replace(SILERO, inputs=(TensorSpec("x", "FP32", (-1, 1)),), properties={})
    plan = make_plan(StreamDefinition(name="mic", model="m", window=window), metadata)
    try:
        (read_samples if window else read_tensor)(plan, stored(payload, content_type=content_type, user=user))
    except MeshError as error:
        assert error.code in (Code.INVALID_REQUEST, Code.UNSUPPORTED, Code.TOO_LARGE)


def test_what_is_no_score_is_refused():
    plan = make_plan(MIC, SILERO)
    state = np.zeros((2, 1, 128), np.float32)
    with pytest.raises(MeshError, match="must be at most"):
        events.read_scores({"output": np.array([b"x"], object), "stateN": state}, plan)
    with pytest.raises(MeshError, match="one output of scores, not a, b"):
        events.read_scores({"a": state, "b": state, "stateN": state}, plan)
    none = {"boxes": np.zeros((1, 0, 4), np.float32), "scores": np.zeros((1, 0), np.float32)}
    assert events.read_boxes(none, plan, 0) == []


@pytest.mark.parametrize(
    ("code", "tries", "hopeless"),
    [
        (Code.INVALID_REQUEST, 0, True),
        (Code.TOO_LARGE, 0, True),
        (Code.INTERNAL, 3, False),
        (Code.INTERNAL, 4, True),
        (Code.DEADLINE, 3, False),
        (Code.DEADLINE, 4, True),
        (Code.MODEL_NOT_FOUND, 99, False),
        (Code.OVERLOADED, 99, False),
        (Code.UNAVAILABLE, 99, False),
        (Code.CANCELLED, 99, False),
    ],
)
def test_what_stays_wrong_is_not_tried_again(code, tries, hopeless):
    assert is_hopeless(MeshError(code, "."), tries, StreamLimits()) == hopeless


def test_state_comes_back_from_bytes_as_it_was():
    state = StreamState(boot="b", seq=3, version="1", rest=b"12", tensors={"state": bytes(1024)}, recent=((0.5,),))
    assert decode_state(encode_state(state)) == state
    assert decode_state(b"") == decode_state(b"\x93garbage") == NOTHING


def test_state_that_fits_no_more_begins_anew():
    plan = make_plan(MIC, SILERO)
    kept = np.arange(256, dtype=np.float32).reshape(2, 1, 128)
    good = StreamState(rest=np.ones(70, np.float32).tobytes(), tensors={"state": kept.tobytes()})
    assert np.array_equal(tensors_of(good, plan)["state"], kept)
    assert len(rest_of(good, plan)) == 70
    bad = StreamState(rest=np.ones(576, np.float32).tobytes(), tensors={"state": bytes(8)})
    assert not tensors_of(bad, plan)["state"].any()
    assert rest_of(bad, plan).tolist() == rest_of(NOTHING, plan).tolist() == [0.0] * 64


def test_an_event_is_named_by_the_devices_own_count():
    name = events.event_id("local/d/mic", "b", 1, otherwise="7")
    assert len(name) == 32
    assert name == events.event_id("local/d/mic", "b", 1, otherwise="8")
    others = [("local/d/mic", "b", 2), ("local/d/mic", "c", 1), ("local/d/cam", "b", 1), ("local/d/mic", "", None)]
    assert len({name, *(events.event_id(*other, otherwise="7") for other in others)}) == 5
    assert events.event_id("k", "", None, otherwise="7") != events.event_id("k", "", None, otherwise="8")


def test_the_best_class_counts_if_it_reaches_the_threshold():
    metadata = msgspec.structs.replace(SILERO, properties={"stateful": "explicit", "labels": "cat\ndog"})
    plan = make_plan(StreamDefinition(name="mic", model="vad", window=576, threshold=0.5), metadata)
    assert events.best_class([0.2, 0.7], plan, 3) == [events.Result(class_name="dog", score=0.7, window=3)]
    assert events.best_class([0.2, 0.4], plan, 0) == []
    assert events.best_class([math.nan], plan, 0) == []
    assert events.best_class([], plan, 0) == []
    unnamed = make_plan(MIC, SILERO)
    assert events.best_class([0.5], unnamed, 0)[0].class_name == "vad"
    assert events.best_class([0.1, 0.5], unnamed, 0)[0].class_name == "1"


def test_scores_are_averaged_over_windows_and_silence_precedes_the_first():
    recent, mean = events.mean_scores((), [0.9], 3)
    assert mean == pytest.approx([0.3])
    recent, mean = events.mean_scores(recent, [0.6], 3)
    recent, mean = events.mean_scores(recent, [0.3], 3)
    recent, mean = events.mean_scores(recent, [0.0], 3)
    assert recent == ((0.6,), (0.3,), (0.0,))
    assert mean == pytest.approx([0.3])
    assert events.mean_scores(recent, [1.0, 2.0], 3)[0] == ((1.0, 2.0),)


def test_a_detector_gives_its_boxes():
    plan = make_plan(StreamDefinition(name="mic", model="vad", window=576, threshold=0.5, labels=("a", "b")), SILERO)
    outputs = {
        "boxes": np.array([[[0, 0, 1, 1], [0.5, 0, 1, 1], [0, 0, 0, 0]]], np.float32),
        "scores": np.array([[0.9, 0.4, 0.0]], np.float32),
        "classes": np.array([[1, 0, 0]], np.int64),
    }
    (result,) = events.read_boxes(outputs, plan, 0)
    assert (result.class_name, result.score, result.bbox) == ("b", 0.9, (0.0, 0.0, 1.0, 1.0))
    assert events.read_boxes({"output": outputs["scores"]}, plan, 0) is None


def test_the_strongest_results_stay():
    many = [events.Result(class_name=str(i), score=i / 1000) for i in range(400)]
    assert events.strongest(many) == many[-events.RESULTS_MAX :]


def test_the_body_of_an_event_says_what_a_reader_needs():
    body = events.EventBody(
        id="1", ts="t", boot_id="b", seq=4, device="d", stream="s", model="m", version="2", latency_ms=None, results=[]
    )
    assert msgspec.json.decode(events.encode_event(body)) == {
        "id": "1",
        "ts": "t",
        "boot_id": "b",
        "seq": 4,
        "device": "d",
        "stream": "s",
        "model": "m",
        "version": "2",
        "latency_ms": None,
        "results": [],
    }
