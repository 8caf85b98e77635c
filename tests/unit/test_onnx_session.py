"""A large model reaches the runtime as a file in memory, a small one, or where there is no such file, as bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from nearcast.serving.engines import onnxruntime as engine

SIDE = 300


@pytest.fixture(scope="module")
def model() -> bytes:
    """y = x · w, 360 kB of weights."""
    weights = np.random.default_rng(1).standard_normal((SIDE, SIDE)).astype(np.float32)
    specs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", SIDE]) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "large", specs[:1], specs[1:], [numpy_helper.from_array(weights, "w")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = made.SerializeToString()
    assert len(data) > engine.COPIED_SIZE_BYTES_MAX
    return data


def test_a_large_model_is_read_from_a_file_in_memory_and_answers_as_from_bytes(model: bytes) -> None:
    session = engine._make_session(model, onnxruntime.SessionOptions())
    assert session._model_path.startswith("/proc/self/fd/")
    assert not Path(session._model_path).exists()
    x = np.ones((2, SIDE), np.float32)
    copied = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(["y"], {"x": x})[0], copied.run(["y"], {"x": x})[0])


@pytest.mark.parametrize("why", ["none", "full", "no proc"])
def test_without_a_file_in_memory_the_model_is_copied(model: bytes, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "none":

        def refuse(*_: object) -> int:
            raise OSError("not permitted")

        monkeypatch.setattr(os, "memfd_create", refuse)
    elif why == "full":
        # As in the gate's child, which may write no large file: a write to this device finds no room.
        monkeypatch.setattr(os, "memfd_create", lambda *_: os.open("/dev/full", os.O_WRONLY))
    else:
        make = onnxruntime.InferenceSession

        def find_nothing(source: object, *args: object, **named: object) -> object:
            if isinstance(source, str):
                raise ort_errors.NoSuchFile("no /proc here")
            return make(source, *args, **named)

        monkeypatch.setattr(onnxruntime, "InferenceSession", find_nothing)
    session = engine._make_session(model, onnxruntime.SessionOptions())
    assert session.get_outputs()[0].name == "y"


def test_what_is_no_model_is_refused_either_way() -> None:
    for size in (300, engine.COPIED_SIZE_BYTES_MAX + 1):
        with pytest.raises(ort_errors.InvalidProtobuf):
            engine._make_session(b"\xff" * size, onnxruntime.SessionOptions())


def test_the_runtime_keeps_no_list_of_models_to_send(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "large.onnx").write_bytes(model)
    program = "import nearcast.serving.engines.onnxruntime as e; e.ort.InferenceSession('large.onnx')"
    place = {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=place, check=True, timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["large.onnx"]
