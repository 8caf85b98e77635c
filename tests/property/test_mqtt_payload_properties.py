"""Every format carries every tensor both ways, and whatever bytes come, they are read or refused."""

from __future__ import annotations

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_node.mqtt import envelope
from edge_node.mqtt.admission import Refusal, admit
from edge_node.mqtt.limits import MessageLimits
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, TensorSpec
from nearcast.transport.mqtt import content_types as types
from nearcast.transport.mqtt import payload as payloads
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.payload_spec import Asked
from nearcast.transport.mqtt.status import success
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import TensorResponse
from nearcast.wire.tensors import datatype_of

NUMBERS = [np.dtype(name) for name in ("?", "u1", "<u2", "<u4", "<u8", "i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")]
TYPED_ARRAYS = {
    "u1": 64,
    "u2": 69,
    "u4": 70,
    "u8": 71,
    "i1": 72,
    "i2": 77,
    "i4": 78,
    "i8": 79,
    "f2": 84,
    "f4": 85,
    "f8": 86,
}
"""RFC 8746's tags of the little-endian ones; big-endian is four less."""
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=1, max_size=4)


def text_tensor(texts):
    array = np.empty(len(texts), dtype=object)
    array[:] = [text.encode() for text in texts]
    return array


@st.composite
def tensors(draw, *, finite=False):
    if draw(st.integers(0, 5)) == 0:
        return text_tensor(draw(TEXTS))
    dtype = draw(st.sampled_from(NUMBERS))
    elements = {"allow_nan": False, "allow_infinity": False} if finite and dtype.kind == "f" else {}
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    return draw(arrays.arrays(dtype, shape, elements=arrays.from_dtype(dtype, **elements)))


def description_of(inputs):
    specs = tuple(TensorSpec(name, datatype_of(array.dtype), array.shape) for name, array in inputs.items())
    return ModelMetadata(name="m", versions=("1",), platform="", inputs=specs, outputs=specs)


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tolist() == array.tolist() or np.array_equal(found[name], array, equal_nan=True)


@pytest.mark.parametrize("kind", types.REPLY_TYPES)
@given(data=st.data())
def test_what_one_end_encodes_the_other_end_decodes(kind, data):
    array = data.draw(tensors(finite=kind == types.JSON))
    inputs = {"x": array} if kind == types.OCTETS else {"x": array, "second": np.ones(2, np.int32)}
    payload, user = payloads.encode_request(TensorRequest(model="m", inputs=inputs), kind)
    asked = Asked(model="m", metadata=description_of(inputs), user=user)
    request = payloads.decode_request(payload, kind, asked, accept=kind)
    assert request.model in ("m", "")
    assert_same(request.decode(), inputs)
    response = TensorResponse(model="m", version="3", outputs=inputs)
    payload, described = payloads.encode_reply(response, kind)
    answer = payloads.decode_reply(payload, kind, success(response) | described, model="m")
    assert (answer.model, answer.version) == ("m", "3")
    assert_same(answer.decode(), inputs)


@given(tensors(), st.sampled_from(["map", "bytes", "typed", "big", "row-major", "column-major", "nested"]))
def test_every_form_of_a_tensor_in_cbor_is_the_same_tensor(array, form):
    if array.dtype.kind in "Ob" or not array.size:
        return  # typed arrays have no booleans and no texts, and nothing tells the shape of no elements
    tag = TYPED_ARRAYS[array.dtype.str[1:]]
    little = cbor2.CBORTag(tag, array.tobytes())
    swapped = cbor2.CBORTag(
        tag - 4 if array.itemsize > 1 else tag, array.astype(array.dtype.newbyteorder(">")).tobytes()
    )
    value = {
        "map": {"dtype": datatype_of(array.dtype), "shape": list(array.shape), "data": array.tobytes()},
        "bytes": array.tobytes(),
        "typed": little,
        "big": swapped,
        "row-major": cbor2.CBORTag(40, [list(array.shape), little]),
        "column-major": cbor2.CBORTag(1040, [list(array.shape), cbor2.CBORTag(tag, array.tobytes(order="F"))]),
        "nested": array.tolist(),
    }[form]
    inputs = {"x": array}
    asked = Asked(model="m", metadata=description_of(inputs))
    for body in ({"x": value}, {"inputs": {"x": value}, "id": "long form"}):
        assert_same(payloads.decode_request(cbor2.dumps(body), types.CBOR, asked).decode(), inputs)


WORDS = st.sampled_from(["x", "inputs", "dtype", "shape", "data", "FP32", "BYTES", "id"]) | st.text(max_size=3)
LEAVES = st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats() | st.binary(max_size=9) | WORDS
CBOR_VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS, inner, max_size=3)
        | st.builds(cbor2.CBORTag, st.integers(0, 90) | st.sampled_from([258, 260, 1040, 55799]), inner)
    ),
    max_leaves=8,
)
MODELS = [
    ModelMetadata(name="m", versions=("1",), platform="", inputs=(spec,), outputs=(TensorSpec("y", "FP32", (1,)),))
    for spec in (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("x", "BYTES", (-1,)), TensorSpec("x", "INT16", (-1, -1)))
]
PAYLOADS = st.binary(max_size=40) | CBOR_VALUES.map(cbor2.dumps) | st.dictionaries(WORDS, CBOR_VALUES).map(cbor2.dumps)


@given(
    PAYLOADS,
    st.sampled_from(["", "json", "cbor", "bin"]),
    st.sampled_from(["", *types.REQUEST_TYPES]),
    st.sampled_from(MODELS),
    st.fixed_dictionaries(
        {}, optional={"shape": st.text("0123456789,-[] ", max_size=8), "dtype": WORDS, "accept": WORDS}
    ),
)
def test_whatever_bytes_come_they_are_read_or_refused(payload, suffix, kind, model, user):
    topic = f"nc/v1/local/cam/up/infer/m/{suffix}".removesuffix("/")
    message = Message(topic=topic, payload=payload, content_type=kind, user=user)
    verdict = admit(message, 0.0, MessageLimits(), nonce=b"nonce")
    if isinstance(verdict, Refusal):
        assert verdict.status in (400, 415)
        assert envelope.refusal_message(verdict).topic.startswith("nc/v1/local/cam/down/reply/m")
        return
    try:
        inputs = envelope.to_inference(verdict, payload, model, {}).decode()
    except MeshError as error:
        assert error.code in (Code.INVALID_REQUEST, Code.UNSUPPORTED)
        answer = envelope.error_reply(verdict, error, status=None, expires=1.0)
        assert answer.user["status"] in ("400", "415")
        return
    assert all(isinstance(array, np.ndarray) for array in inputs.values())


@given(
    PAYLOADS, st.sampled_from(types.REPLY_TYPES), st.sampled_from([{}, {"dtype": "FP32", "shape": "1", "name": "y"}])
)
def test_whatever_answer_comes_a_device_reads_it_or_says_so(payload, kind, described):
    try:
        payloads.decode_reply(payload, kind, {"status": "200", **described}, model="m").decode()
    except MeshError as error:
        assert error.code is Code.INTERNAL
