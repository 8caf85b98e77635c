"""A frame in, four numbers out, after as much work as the request says.

The work is `work` products of 128 x 128 matrices in an ONNX loop: a real engine, and a run as long as a benchmark
needs. `python -m benchmarks.paced ROOT LIMITS` serves it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper, numpy_helper

from model_sync.publisher.bundle import BundleSpec, create_bundle
from nearcast.runtime import announce
from nearcast.serving.host import ModelHost
from nearcast.serving.limits import HostLimits
from nearcast.store import Store
from nearcast.store.manifest import Tensor
from nearcast.store.pointer import Pointer
from nearcast.transport.grpc import make_server
from nearcast.transport.oip import oip_methods
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest

NAME = "paced"
SIZE = 128
FRAME = (1, 224, 224, 3)
GOLDEN_WORK = 1000


def build_model() -> onnx.ModelProto:
    """Mean of the frame, then `work` products that keep it as it is."""
    identity = numpy_helper.from_array(np.eye(SIZE, dtype=np.float32), "identity")
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["goes_on"]),
            helper.make_node("MatMul", ["held", "identity"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("held", TensorProto.FLOAT, [SIZE, SIZE]),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [SIZE, SIZE]),
        ],
    )
    constants = [
        identity,
        numpy_helper.from_array(np.ones((SIZE, SIZE), np.float32), "ones"),
        numpy_helper.from_array(np.array([0, 0], np.int64), "starts"),
        numpy_helper.from_array(np.array([1, 4], np.int64), "ends"),
        numpy_helper.from_array(np.array(True), "always"),
    ]
    nodes = [
        helper.make_node("Cast", ["frame"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["ones", "mean"], ["start"]),
        helper.make_node("Squeeze", ["work"], ["count"]),
        helper.make_node("Loop", ["count", "always", "start"], ["product"], body=body),
        helper.make_node("Slice", ["product", "starts", "ends"], ["scores"]),
    ]
    inputs = [
        helper.make_tensor_value_info("frame", TensorProto.UINT8, list(FRAME)),
        helper.make_tensor_value_info("work", TensorProto.INT64, [1]),
    ]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 4])]
    graph = helper.make_graph(nodes, NAME, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def make_inputs(work: int) -> dict[str, np.ndarray]:
    """One request's tensors."""
    return {"frame": np.full(FRAME, 7, np.uint8), "work": np.array([work], np.int64)}


def make_request(work: int, *, request_id: str = "", timeout_s: float | None = None) -> bytes:
    """One request as protobuf; the server is to answer within `timeout_s` of its arrival."""
    parameters = {} if timeout_s is None else {"timeout": int(timeout_s * 1e6)}
    return TensorRequest(model=NAME, id=request_id, inputs=make_inputs(work), parameters=parameters).encode()


def fill_store(root: Path) -> str:
    """A store with the model as release 1, stable; returns its path."""
    source = root / "source"
    source.mkdir()
    onnx.save(build_model(), source / "model.onnx")
    np.savez(source / "golden.npz", **{f"in_{name}": tensor for name, tensor in make_inputs(GOLDEN_WORK).items()})  # type: ignore[arg-type]
    spec = BundleSpec(
        name=NAME,
        release=1,
        semver="1.0.0",
        engine="onnxruntime",
        model_file="model.onnx",
        licence="Apache-2.0",
        golden=("golden.npz",),
        inputs=(
            Tensor(name="frame", datatype="UINT8", shape=FRAME),
            Tensor(name="work", datatype="INT64", shape=(1,)),
        ),
        outputs=(Tensor(name="scores", datatype="FP32", shape=(1, 4)),),
    )
    create_bundle(spec, source, root / "bundle")
    store = Store(root / "store")
    store.commit(NAME, 1, root / "bundle")
    store.write_pointer(NAME, Pointer(stable=1, last_good=1))
    return str(root / "store")


async def serve(root: str, limits: HostLimits) -> None:
    """The real host behind the real transport, on loopback."""
    host = ModelHost(Store(Path(root)), node="bench", limits=limits)
    await host.start()
    server = make_server(
        "ngh2", oip_methods(InferenceService(host, host, server_name="bench"), trusted=False), address="127.0.0.1:0"
    )
    await server.start()
    announce("paced", address=server.address)
    await asyncio.Event().wait()


if __name__ == "__main__":
    # One core is the server's: one run at a time.
    uvloop.run(serve(sys.argv[1], HostLimits(slots=1, **json.loads(sys.argv[2]))))
