"""Models that harm whoever runs them: the child that tries them ends, within its bounds, and nobody else does."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from nearcast.serving.gate_child import GateLimits, run_gate
from tests.tiny_models import affine_model, tensor, write_version

X = np.ones((1, 4), np.float32)
GOLDEN = (({"x": X}, {"y": X}),)


def serialise(nodes: list[Any], constants: list[Any]) -> bytes:
    specs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", specs[:1], specs[1:], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = made.SerializeToString()
    return data


def hungry_model() -> bytes:
    """Asks for 32 GiB when it runs; the file has a few hundred bytes."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Mul", ["s", "much"], ["wanted"]),
        helper.make_node("ConstantOfShape", ["wanted"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return serialise(nodes, [helper.make_tensor("much", TensorProto.INT64, [2], [1, 2**31])])


def endless_model() -> bytes:
    """A loop that ends after 2**62 turns."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Sin", ["v"], ["v2"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v2", TensorProto.FLOAT, None),
        ],
    )
    constants = [
        helper.make_tensor("turns", TensorProto.INT64, [], [2**62]),
        helper.make_tensor("go", TensorProto.BOOL, [], [True]),
    ]
    return serialise([helper.make_node("Loop", ["turns", "go", "x"], ["y"], body=body)], constants)


def test_memory_without_end_is_a_refusal(tmp_path: Path) -> None:
    write_version(tmp_path, hungry_model(), golden=GOLDEN, inputs=(tensor("x", "FP32", (-1, 4), None),),
                  outputs=(tensor("y", "FP32", (-1, 4), None),))  # fmt: skip
    result = run_gate(tmp_path)
    assert not result.ok
    assert not result.is_transient, result.error


def test_time_without_end_is_a_refusal(tmp_path: Path) -> None:
    write_version(tmp_path, endless_model(), golden=GOLDEN, inputs=(tensor("x", "FP32", (-1, 4), None),),
                  outputs=(tensor("y", "FP32", (-1, 4), None),))  # fmt: skip
    result = run_gate(tmp_path, GateLimits(cpu_s_max=2))
    assert result.error.startswith("The checking process used too much CPU time.")
    assert not result.is_transient, "its own bound is no accident"


CHECKS = {
    "memory": ("bytearray(5 * 1024**3)", "MemoryError"),
    "file": ("open(folder + '/large', 'wb').write(bytes(2 * 1024**2))", "OSError"),
    "crash": ("__import__('ctypes').string_at(0)", "crashed"),
    "abort": ("__import__('os').abort()", "aborted"),
    "bus_error": ("__import__('os').kill(__import__('os').getpid(), 7)", "crashed"),
    "exit": ("__import__('os')._exit(0)", "ended with status 0"),
    "recursion": ("(lambda f: f(f))(lambda f: f(f))", "ended with status 1"),
    "core": ("print(__import__('resource').getrlimit(4)) or __import__('os').abort()", "aborted"),
}


@pytest.mark.parametrize("kind", CHECKS)
def test_cve_2018_8825_cve_2022_23560_whatever_the_child_does_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What a parser with a hole would do, done in its place: after the bounds are set, while the file is read."""
    deed, match = CHECKS[kind]
    hook, work = tmp_path / "hook", tmp_path / "work"
    hook.mkdir()
    work.mkdir()
    (hook / "sitecustomize.py").write_text(
        f"import nearcast.serving.formats as f\nfolder = {str(work)!r}\nf.require_format = lambda contents: {deed}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hook))
    monkeypatch.chdir(work)
    version = tmp_path / "version"
    write_version(version, affine_model())
    began = time.monotonic()
    result = run_gate(version, GateLimits(cpu_s_max=2))
    assert not result.ok
    assert not result.is_transient, result.error
    assert re.search(match, result.error), result.error
    assert time.monotonic() - began < 30
    large = work / "large"
    assert not large.exists() or large.stat().st_size <= GateLimits().file_size_bytes_max
    assert not list(work.glob("core*"))


def test_a_child_killed_from_outside_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    monkeypatch.setenv("PYTHONPATH", str(hook))
    write_version(tmp_path / "version", affine_model())
    result = run_gate(tmp_path / "version")
    assert result.error.startswith("The checking process was killed (out of memory?).")
    assert result.is_transient


def test_cve_2020_25860_what_is_loaded_is_what_was_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is replaced right after the format check: the golden run still sees the model that was checked."""
    hook, version = tmp_path / "hook", tmp_path / "version"
    hook.mkdir()
    write_version(version, affine_model(1.0), golden=GOLDEN)
    (tmp_path / "evil.onnx").write_bytes(affine_model(3.0))
    (hook / "sitecustomize.py").write_text(
        "import os\nimport nearcast.serving.formats as f\nchecked = f.require_format\n"
        "def then_replace(contents):\n    checked(contents)\n"
        f"    os.replace({str(tmp_path / 'evil.onnx')!r}, {str(version / 'model.onnx')!r})\n"
        "f.require_format = then_replace\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hook))
    assert run_gate(version).ok
    assert not (tmp_path / "evil.onnx").exists(), "it was replaced"
    monkeypatch.delenv("PYTHONPATH")
    assert "has not the size" in run_gate(version).error or "other bytes" in run_gate(version).error
