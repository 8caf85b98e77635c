"""A form that has passed is not looked at again; whatever else comes is."""

from __future__ import annotations

import numpy as np
import pytest

from nearcast.errors import MeshError
from nearcast.serving.signature import PASSED_FORMS_MAX, Signature, Size
from nearcast.store.manifest import Manifest, Tensor
from nearcast.wire.request import TensorRequest, WireRequest

X = Tensor(name="x", datatype="FP32", shape=(-1, -1), batch_axis=0)
Y = Tensor(name="y", datatype="FP32", shape=(-1, 3), batch_axis=0)


def signature() -> Signature:
    return Signature(
        Manifest(
            name="m",
            release=1,
            semver="1.0.0",
            engine="onnxruntime",
            model_file="m.onnx",
            licence="MIT",
            sbom_file="s.json",
            files=(),
            inputs=(X, Y),
            outputs=(Y,),
        )
    )


def request(rows: int, columns: int) -> WireRequest:
    inputs = {"x": np.zeros((rows, columns), np.float32), "y": np.zeros((rows, 3), np.float32)}
    return WireRequest(TensorRequest(model="m", inputs=inputs).encode())


def test_the_size_of_a_form_is_the_size_of_its_inputs() -> None:
    declared = signature()
    for _ in range(3):
        for rows in (1, 2, 5):
            found = request(rows, 4)
            inputs = found.decode()
            assert found.form is not None
            assert declared.check(inputs, found.form) == declared.check(inputs) == Size(rows, rows * 7)


def test_requests_of_one_layout_share_a_form_and_others_never_do() -> None:
    one, same, other = request(2, 4), request(2, 4), request(4, 2)
    for each in (one, same, other):
        each.decode()
    assert one.form == same.form != other.form
    assert TensorRequest(model="m", inputs=one.decode()).form is None


def test_what_is_wrong_is_refused_every_time_and_never_remembered() -> None:
    declared = signature()
    wrong = {"x": np.zeros((2, 4), np.float32), "y": np.zeros((3, 3), np.float32)}
    for _ in range(2):
        with pytest.raises(MeshError, match="has 3 rows along axis 0, but input x has 2"):
            declared.check(wrong, "form")


def test_many_forms_do_not_fill_the_memory() -> None:
    declared = signature()
    inputs = request(1, 1).decode()
    for form in range(3 * PASSED_FORMS_MAX):
        declared.check(inputs, form)
    assert len(declared._passed) <= PASSED_FORMS_MAX
