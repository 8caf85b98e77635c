"""Which answers are uncertain, and what a manifest may say about it."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from nearcast.errors import MeshError
from nearcast.handler import Served
from nearcast.serving.confidence import is_uncertain
from nearcast.store.manifest import Cascade, File, Manifest, Tensor, decode_manifest
from nearcast.wire.request import StandInRequest, TensorRequest, WireRequest
from nearcast.wire.status import ESCALATE, served_from_trailers, served_to_trailers

CASCADE = Cascade(larger="big", output="p", high=0.8)


def manifest(**fields: Any) -> Manifest:
    spec = Tensor(name="p", datatype="FP32", shape=(-1, 3), batch_axis=0)
    plain: dict[str, Any] = {
        "name": "small",
        "release": 1,
        "semver": "1.0.0",
        "engine": "onnxruntime",
        "model_file": "m.onnx",
        "licence": "MIT",
        "inputs": (spec,),
        "outputs": (spec,),
        "files": (File(path="m.onnx", size_bytes=0, sha256="0" * 64, chunks=()),),
    }
    return Manifest(**plain | fields)


@pytest.mark.parametrize(
    ("rows", "uncertain"),
    [
        ([[0.1, 0.85, 0.05]], False),
        ([[0.1, 0.79, 0.11]], True),
        ([[0.1, 0.8, 0.1]], False),
        ([[0.9, 0.1, 0.0], [0.5, 0.4, 0.1]], True),
        ([[float("nan"), 0.9, 0.1]], True),
        (np.empty((0, 3)), False),
    ],
)
def test_an_answer_is_as_certain_as_its_least_certain_row(rows: Any, *, uncertain: bool) -> None:
    assert is_uncertain(CASCADE, {"p": np.asarray(rows, np.float32)}) is uncertain


def test_a_single_score_is_certain_at_both_ends() -> None:
    cascade = Cascade(larger="big", output="p", low=0.3, high=0.7)
    told = {score: is_uncertain(cascade, {"p": np.float32([[score]])}) for score in (0.05, 0.31, 0.69, 0.95)}
    assert told == {0.05: False, 0.31: True, 0.69: True, 0.95: False}
    assert is_uncertain(cascade, {"p": np.float32([0.5])})


def test_logits_become_probabilities() -> None:
    cascade = Cascade(larger="big", output="p", high=0.8, softmax=True)
    sure, torn = np.float32([[9.0, 1.0, 1.0]]), np.float32([[900.0, 899.5, 0.0]])
    assert not is_uncertain(cascade, {"p": sure})
    assert is_uncertain(cascade, {"p": torn})
    assert is_uncertain(cascade, {"p": np.float32([[np.inf, 1.0, 0.0]])})


def test_an_image_of_scores_is_one_row_per_image() -> None:
    scores = np.zeros((2, 4, 4), np.float32)
    scores[0, 1, 2] = scores[1, 3, 3] = 0.9
    assert not is_uncertain(CASCADE, {"p": scores})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"smaller": "small"}, "itself as its smaller"),
        ({"cascade": Cascade(larger="small", output="p", high=0.5)}, "from the model to itself"),
        ({"cascade": Cascade(larger="big", output="q", high=0.5)}, "no floating-point output"),
        ({"cascade": Cascade(larger="big", output="p", low=0.5, high=0.5)}, "less than its high"),
        ({"cascade": CASCADE, "stateful": "explicit"}, "keeps state"),
    ],
)
def test_a_cascade_that_could_not_be_followed_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MeshError, match=words):
        decode_manifest(manifest(**fields).encode())


def test_older_agents_see_no_field_that_says_nothing() -> None:
    plain = msgspec.json.decode(manifest().encode())
    assert not {"smaller", "cascade"} & set(plain)
    told = manifest(smaller="tiny", cascade=CASCADE)
    assert decode_manifest(told.encode()) == told


def test_a_stand_in_is_the_same_request_under_another_name() -> None:
    original = TensorRequest(model="small", version="7", id="42", inputs={"x": np.arange(6, dtype=np.float32)})
    for first in (original, WireRequest(original.encode())):
        stand_in = StandInRequest(first, "big")
        read = WireRequest(stand_in.encode())
        assert (read.model, read.version, read.id) == ("big", "", "42")
        assert read.size_bytes == stand_in.size_bytes
        np.testing.assert_array_equal(read.decode()["x"], original.decode()["x"])
        again = WireRequest(StandInRequest(stand_in, "small").encode())
        assert (again.model, again.version) == ("small", "")


def test_uncertainty_travels_as_a_trailer_only_where_there_is_any() -> None:
    assert ESCALATE not in dict(served_to_trailers(Served(node="a")))
    told = Served(node="a", version="1", escalate="big")
    assert served_from_trailers(served_to_trailers(told)) == told
