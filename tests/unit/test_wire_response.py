from __future__ import annotations

import numpy as np
import pytest

from nearcast.errors import Code, MeshError
from nearcast.handler import Served
from nearcast.wire.response import TensorResponse, WireResponse
from nearcast.wire.v1 import oip_pb2 as pb

SERVED = Served(node="edge-1", tier="local", version="3")


def test_answer_equals_protobufs_own_encoding():
    outputs = {"label": np.array([[b"cat", b""]], dtype=object), "score": np.float32([[0.5, 0.25]])}
    response = TensorResponse(
        model="m", version="3", outputs=outputs, id="r1", parameters={"final": True}, served=SERVED
    )
    expected = pb.ModelInferResponse(model_name="m", model_version="3", id="r1")
    expected.parameters["final"].bool_param = True
    expected.outputs.add(name="label", datatype="BYTES", shape=[1, 2])
    expected.outputs.add(name="score", datatype="FP32", shape=[1, 2])
    expected.raw_output_contents.extend([b"\x03\0\0\0cat\0\0\0\0", np.float32([0.5, 0.25]).tobytes()])
    assert pb.ModelInferResponse.FromString(response.encode()) == expected

    received = WireResponse(response.encode(), SERVED)
    assert (received.model, received.version, received.id, received.served) == ("m", "3", "r1", SERVED)
    assert received.parameters == {"final": True}
    assert received.decode()["label"].tolist() == [[b"cat", b""]]
    assert received.decode()["score"].tolist() == [[0.5, 0.25]]


def test_with_id_shares_the_arrays_and_changes_only_the_id():
    outputs = {"y": np.float32([1.0])}
    first = TensorResponse(model="m", version="1", outputs=outputs, id="a", served=SERVED)
    first.encode()
    second = first.with_id("b")
    assert (first.id, second.id) == ("a", "b")
    assert second.decode() is outputs
    assert pb.ModelInferResponse.FromString(second.encode()).id == "b"


def test_answers_of_one_form_differ_in_id_and_values_alone():
    for id_, values, parameters in (("", [1, 2], {}), ("r", [3, 4], {"n": 1}), ("a longer id", [5, 6], {})):
        outputs = {"y": np.float32(values), "z": np.arange(3, dtype=np.int8)}
        made = TensorResponse(model="m", version="1", outputs=outputs, id=id_, parameters=parameters)
        expected = pb.ModelInferResponse(model_name="m", model_version="1", id=id_)
        for name, number in parameters.items():
            expected.parameters[name].int64_param = number
        expected.outputs.add(name="y", datatype="FP32", shape=[2])
        expected.outputs.add(name="z", datatype="INT8", shape=[3])
        expected.raw_output_contents.extend(array.tobytes() for array in outputs.values())
        assert pb.ModelInferResponse.FromString(made.encode()) == expected


def test_scalars_and_strides_and_byte_orders():
    outputs = {
        "scalar": np.float32(2.5),
        "strided": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "big": np.arange(3, dtype=">i4"),
        "text": np.array(["ä", "b"]),
    }
    received = WireResponse(TensorResponse(model="m", version="1", outputs=outputs).encode(), SERVED).decode()
    assert received["scalar"].shape == ()
    assert float(received["scalar"]) == 2.5
    assert received["strided"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert received["big"].tolist() == [0, 1, 2]
    assert received["text"].tolist() == ["ä".encode(), b"b"]


@pytest.mark.parametrize("body", [b"\x0a\x05a", b"\x2a\x02\x0a\x05", b"\x32\x01\x00"])
def test_a_malformed_answer_is_the_peers_fault(body):
    with pytest.raises(MeshError) as caught:
        WireResponse(body, SERVED).decode()
    assert caught.value.code is Code.INTERNAL


def test_an_answer_that_cannot_travel_is_internal():
    response = TensorResponse(model="m", version="1", outputs={"y": np.zeros(1, np.complex64)})
    with pytest.raises(MeshError) as caught:
        response.encode_pieces()
    assert caught.value.code is Code.INTERNAL
