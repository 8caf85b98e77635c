"""A model of Silero VAD's size and interface, with weights of our own: what a request costs, not what it means.

Inputs `input` FP32 [N, 576] and `state` FP32 [2, N, 128], outputs `output` FP32 [N, 1] and `stateN` FP32 [2, N, 128];
about 0.3 million parameters in convolutions and an LSTM, like the original.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from model_sync.publisher.bundle import BundleSpec, create_bundle
from nearcast.store import Store
from nearcast.store.manifest import Manifest, Tensor
from nearcast.store.pointer import Pointer

NAME = "silero_size"
HIDDEN = 128
CHANNELS = (258, 136, 72, 72, 128)


def build_model() -> onnx.ModelProto:
    """An STFT-like convolution, four convolutions with ReLU, an LSTM and a sigmoid."""
    rng = np.random.default_rng(7)
    weights, nodes = [], []

    def constant(name: str, shape: tuple[int, ...]) -> str:
        scale = 1.0 / np.sqrt(np.prod(shape[1:]))
        weights.append(numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name))
        return name

    weights.append(numpy_helper.from_array(np.array([1], np.int64), "axis1"))
    nodes.append(helper.make_node("Unsqueeze", ["input", "axis1"], ["x0"]))
    nodes.append(helper.make_node("Conv", ["x0", constant("stft", (CHANNELS[0], 1, 256))], ["c0"], strides=[128]))
    nodes.append(helper.make_node("Abs", ["c0"], ["x1"]))
    for i, (inputs, outputs) in enumerate(pairwise(CHANNELS), start=1):
        arguments = [f"x{i}", constant(f"w{i}", (outputs, inputs, 3)), constant(f"b{i}", (outputs,))]
        nodes.append(helper.make_node("Conv", arguments, [f"c{i}"], pads=[1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"]))
    last = f"x{len(CHANNELS)}"
    nodes.append(helper.make_node("ReduceMean", [last, "axis2"], ["mean"], keepdims=0))
    weights.append(numpy_helper.from_array(np.array([2], np.int64), "axis2"))
    weights.append(numpy_helper.from_array(np.array([0], np.int64), "axis0"))
    nodes.append(helper.make_node("Unsqueeze", ["mean", "axis0"], ["sequence"]))
    nodes.append(helper.make_node("Split", ["state"], ["h0", "cell0"], axis=0, num_outputs=2))
    lstm = [
        "sequence",
        constant("W", (1, 4 * HIDDEN, HIDDEN)),
        constant("R", (1, 4 * HIDDEN, HIDDEN)),
        "",
        "",
        "h0",
        "cell0",
    ]
    nodes.append(helper.make_node("LSTM", lstm, ["", "h1", "cell1"], hidden_size=HIDDEN))
    nodes.append(helper.make_node("Concat", ["h1", "cell1"], ["stateN"], axis=0))
    nodes.append(helper.make_node("Squeeze", ["h1", "axis0"], ["h"]))
    nodes.append(helper.make_node("Gemm", ["h", constant("head", (HIDDEN, 1))], ["logit"]))
    nodes.append(helper.make_node("Sigmoid", ["logit"], ["output"]))

    def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    graph = helper.make_graph(
        nodes,
        NAME,
        [value("input", "N", 576), value("state", 2, "N", HIDDEN)],
        [value("output", "N", 1), value("stateN", 2, "N", HIDDEN)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def make_inputs() -> dict[str, np.ndarray]:
    """One request's tensors."""
    rng = np.random.default_rng(1)
    return {
        "input": rng.standard_normal((1, 576)).astype(np.float32),
        "state": np.zeros((2, 1, HIDDEN), np.float32),
    }


def fill_store(root: Path) -> tuple[Store, Manifest]:
    """A store that holds the model as release 1, stable."""
    source = root / "source"
    source.mkdir()
    onnx.save(build_model(), source / "model.onnx")
    np.savez(source / "golden.npz", **{f"in_{name}": tensor for name, tensor in make_inputs().items()})  # type: ignore[arg-type]
    spec = BundleSpec(
        name=NAME,
        release=1,
        semver="1.0.0",
        engine="onnxruntime",
        model_file="model.onnx",
        licence="Apache-2.0",
        stateful="explicit",
        golden=("golden.npz",),
        inputs=(
            Tensor(name="input", datatype="FP32", shape=(-1, 576), batch_axis=0),
            Tensor(name="state", datatype="FP32", shape=(2, -1, HIDDEN), batch_axis=1),
        ),
        outputs=(
            Tensor(name="output", datatype="FP32", shape=(-1, 1), batch_axis=0),
            Tensor(name="stateN", datatype="FP32", shape=(2, -1, HIDDEN), batch_axis=1),
        ),
    )
    manifest = create_bundle(spec, source, root / "bundle")
    store = Store(root / "store")
    store.commit(NAME, 1, root / "bundle")
    store.write_pointer(NAME, Pointer(stable=1, last_good=1))
    return store, manifest
