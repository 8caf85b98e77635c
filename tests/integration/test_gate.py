"""The gate refuses what must not serve, in a child process that is really started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pymicro_wakeword
import pytest
from onnx import TensorProto, helper

from nearcast.errors import Code, MeshError
from nearcast.serving.formats.onnx import check_onnx
from nearcast.serving.gate import check
from nearcast.serving.gate_child import GateLimits, run_gate
from tests.tiny_models import affine_model, recurrent_model, tensor, write_version

X = np.arange(8, dtype=np.float32).reshape(2, 4)
GOLDEN = (({"x": X}, {"y": 2 * X}),)
ROOT = Path(__file__).resolve().parents[2]


def refused(match: str) -> Any:
    return pytest.RaisesExc(MeshError, match=match, check=lambda error: error.code is Code.UNTRUSTED)


def test_a_good_version_passes_in_the_child(tmp_path: Path) -> None:
    write_version(tmp_path, affine_model(), golden=GOLDEN)
    result = run_gate(tmp_path)
    assert (result.ok, result.error, result.vectors) == (True, "", 1)
    assert 0 < result.p50_us < 1e6


def test_the_command_line_speaks_json_and_exit_codes(tmp_path: Path) -> None:
    write_version(tmp_path / "good", affine_model(), golden=GOLDEN)
    write_version(tmp_path / "bad", affine_model(3.0), golden=GOLDEN)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    for name, status in (("good", 0), ("bad", 1)):
        command = [sys.executable, "-m", "nearcast.serving.gate", str(tmp_path / name), "--json"]
        done = subprocess.run(command, capture_output=True, check=False, env=environ)
        assert done.returncode == status
        answer = json.loads(done.stdout)
        assert answer["ok"] is (status == 0)
        assert ("differs by up to 7" in answer["error"]) is (status == 1)


@pytest.mark.parametrize("engine", ["onnxruntime", "litert"])
def test_bytes_that_are_no_model_are_refused(tmp_path: Path, engine: str) -> None:
    for index, data in enumerate((b"", b"MZ\x90\x00 not a model", affine_model()[:-7], b"\x00" * 64)):
        folder = tmp_path / str(index)
        write_version(folder, data, engine=engine)
        with refused("is no (ONNX|TFLite) model|cannot load"):
            check(folder)


def test_a_pickle_in_disguise_is_refused(tmp_path: Path) -> None:
    write_version(tmp_path, b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.")
    with refused("is no ONNX model"):
        check(tmp_path)


def external_model(location: str) -> bytes:
    weights = TensorProto(name="s", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value=location)
    weights.external_data.add(key="length", value="4")
    nodes = [helper.make_node("Mul", ["x", "s"], ["y"])]
    specs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "external", specs[:1], specs[1:], [weights])
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return data


def test_external_data_inside_of_the_version_is_fine(tmp_path: Path) -> None:
    data = np.array([2.0], np.float32).tobytes()
    write_version(tmp_path, external_model("weights.bin"), golden=GOLDEN, extra={"weights.bin": data})
    assert check(tmp_path).ok


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "unlisted.bin", "a/b.bin", ""])
def test_external_data_elsewhere_is_refused_without_loading(tmp_path: Path, location: str) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x00\x00\x00\x40")
    write_version(tmp_path / "version", external_model(location))
    (tmp_path / "version" / "unlisted.bin").write_bytes(b"\x00\x00\x00\x40")
    with refused("which is no file of its manifest"):
        check(tmp_path / "version")


def test_external_data_is_found_in_subgraphs_and_attributes() -> None:
    inner = onnx.load_from_string(external_model("inner.bin")).graph
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    constant = onnx.load_from_string(external_model("constant.bin")).graph.initializer[0]
    nodes = [helper.make_node("Constant", [], ["k"], value=constant), branch]
    function = helper.make_function("d", "F", ["x"], ["y"], [branch], [helper.make_opsetid("", 17)])
    function.node[0].attribute[0].g.initializer[0].external_data[0].value = "function.bin"
    model = helper.make_model(helper.make_graph(nodes, "outer", [], []), functions=[function])
    found = {part.location for part in check_onnx(model.SerializeToString())}
    assert found == {"inner.bin", "constant.bin", "function.bin"}


def test_deep_nesting_is_refused_and_not_followed() -> None:
    data = b""
    for _ in range(200):
        for number in (6, 5, 1):  # graph of an attribute of a node of a graph
            size, prefix = len(data), b""
            while size >= 0x80:
                prefix, size = prefix + bytes([size & 0x7F | 0x80]), size >> 7
            data = bytes([number << 3 | 2]) + prefix + bytes([size]) + data
    size, prefix = len(data), b""
    while size >= 0x80:
        prefix, size = prefix + bytes([size & 0x7F | 0x80]), size >> 7
    with refused("nested more than"):
        check_onnx(bytes([7 << 3 | 2]) + prefix + bytes([size]) + data)


def test_a_link_is_no_file_of_a_version(tmp_path: Path) -> None:
    write_version(tmp_path / "version", affine_model())
    (tmp_path / "version" / "model.onnx").rename(tmp_path / "model.onnx")
    (tmp_path / "version" / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with refused("no regular file"):
        check(tmp_path / "version")


def test_wrong_golden_shapes_and_names_are_refused(tmp_path: Path) -> None:
    for index, (golden, match) in enumerate(
        [
            ((({"x": X[:, :3]}, {"y": X}),), "Golden vector 0: Input x"),
            ((({"z": X}, {"y": X}),), "Golden vector 0: Input x"),
            ((({"x": X}, {"q": X}),), "has no output q"),
            ((({"x": X}, {"y": X.astype(np.float64)}),), "expected float64"),
            ((({"x": X}, {"y": X * np.nan}),), "differs"),
        ]
    ):
        write_version(tmp_path / str(index), affine_model(), golden=golden)
        with refused(match):
            check(tmp_path / str(index))


def test_too_slow_for_its_own_budget_is_refused(tmp_path: Path) -> None:
    write_version(tmp_path, affine_model(), golden=GOLDEN, latency_budget_ms=1e-4)
    with refused("over the budget of 0.0001 ms"):
        check(tmp_path)


def test_a_batch_axis_that_does_not_hold_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("CumSum", ["x", "axis"], ["y"])]
    axis = helper.make_tensor("axis", TensorProto.INT64, [], [0])
    specs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "rows depend on each other", specs[:1], specs[1:], [axis])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    write_version(tmp_path, model.SerializeToString(), golden=(({"x": X}, {"y": X.cumsum(0)}),))
    with refused("in a batch of two: output y differs"):
        check(tmp_path)


def test_explicit_state_passes_on_its_own_axis(tmp_path: Path) -> None:
    x, state = np.ones((1, 3), np.float32), np.ones((2, 1, 3), np.float32)
    write_version(
        tmp_path,
        recurrent_model(),
        stateful="explicit",
        inputs=(tensor("x", "FP32", (-1, 3)), tensor("state", "FP32", (2, -1, 3), 1)),
        outputs=(tensor("y", "FP32", (-1, 3)), tensor("state_out", "FP32", (2, -1, 3), 1)),
        golden=(({"x": x, "state": state}, {"y": x + 1, "state_out": state + 1}),),
    )
    assert check(tmp_path).ok


def test_hidden_state_vectors_run_in_order_on_a_fresh_interpreter(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    model = (Path(pymicro_wakeword.__file__).parent / "models" / "okay_nabu.tflite").read_bytes()
    with np.load(ROOT / "nearcast" / "cli" / "demo" / "models" / "wake_word" / "clips.npz") as clips:
        windows = clips["okay_nabu"][20:40]
    interpreter = Interpreter(model_content=model)
    interpreter.allocate_tensors()
    run = interpreter.get_signature_runner()
    golden = tuple(({"input_audio": window}, run(input_audio=window)) for window in windows)
    assert len({int(outputs["dense_1"][0, 0]) for _, outputs in golden}) > 3
    fields: dict[str, Any] = {
        "engine": "litert",
        "model_file": "model.tflite",
        "stateful": "hidden",
        "inputs": (tensor("input_audio", "INT8", (1, 3, 40), None),),
        "outputs": (tensor("dense_1", "UINT8", (1, 1), None),),
        "atol": 0.0,
    }
    write_version(tmp_path / "ordered", model, golden=golden, **fields)
    assert check(tmp_path / "ordered").ok
    write_version(tmp_path / "shuffled", model, golden=golden[::-1], **fields)
    with refused("output dense_1 has other values"):
        check(tmp_path / "shuffled")


def test_a_child_that_crashes_or_hangs_has_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_version(tmp_path / "version", affine_model(), golden=GOLDEN)
    hook = tmp_path / "hook"
    hook.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(hook))
    (hook / "sitecustomize.py").write_text("import os; os.abort()")
    assert run_gate(tmp_path / "version").error.startswith("The checking process aborted.")
    (hook / "sitecustomize.py").write_text("import time; time.sleep(60)")
    assert run_gate(tmp_path / "version", GateLimits(timeout_s=0.5)).error == "The check took longer than 0.5 s."
    (hook / "sitecustomize.py").write_text("print('{\"ok\": true}', flush=True); import os; os._exit(3)")
    assert not run_gate(tmp_path / "version").ok


def test_limits_hold_in_the_child(tmp_path: Path) -> None:
    write_version(tmp_path, affine_model(), golden=GOLDEN)
    result = run_gate(tmp_path, GateLimits(address_space_bytes_max=64 * 1024 * 1024))
    assert not result.ok
    assert result.error
