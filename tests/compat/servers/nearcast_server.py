"""`python -m tests.compat.servers.nearcast_server` serves the contract by nearcast: both gRPC servers and REST.

The models are ONNX, built here, and the wake word of the demo for hidden state. BF16 and BYTES are echoed by a handler
in front of the host: ONNX Runtime's Python interface has no BF16, and ONNX strings hold UTF-8 only.
"""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pymicro_wakeword
import uvloop
from onnx import TensorProto, helper

from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.load import NodeReport, VersionReport
from nearcast.serving.host import ModelHost
from nearcast.serving.limits import HostLimits
from nearcast.store import Store
from nearcast.store.manifest import Tensor
from nearcast.transport.grpc import KINDS, make_server
from nearcast.transport.health import health_methods
from nearcast.transport.mesh import join_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.rest import RestServer
from nearcast.transport.service import InferenceService
from nearcast.transport.statistics import Statistics
from nearcast.wire.response import TensorResponse
from tests.compat.contract import ADD, IDENTITY, SEQUENCE, SLOW
from tests.compat.tensors import DATATYPES
from tests.tiny_models import activate, install

ECHOED = {IDENTITY[datatype]: datatype for datatype in ("BF16", "BYTES")}
ONNX_TYPES = {"FP16": "FLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE"}
WIDTH, PRODUCTS = 256, 40


class ContractHost(ModelHost):
    """A model host, with the two identities that no engine here can run."""

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        if request.model not in ECHOED or request.version not in ("", "1"):
            return await super().infer(request, context)
        served = Served(node="compat", version="1")
        inputs = request.decode()
        return TensorResponse(model=request.model, version="1", outputs={"y": inputs["x"]}, served=served)

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        if model not in ECHOED or version not in ("", "1"):
            return await super().metadata(model, version)
        spec = TensorSpec("x", ECHOED[model], (-1, -1))
        return ModelMetadata(
            name=model,
            versions=("1",),
            platform="python",
            inputs=(spec,),
            outputs=(TensorSpec("y", spec.datatype, spec.shape),),
        )

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        return True if model in ECHOED and version in ("", "1") else await super().is_ready(model, version)

    def report(self) -> NodeReport:
        found = super().report()
        echoed = tuple(VersionReport(model=model, version="1") for model in ECHOED)
        return msgspec.structs.replace(found, versions=(*found.versions, *echoed))


def identity_model(datatype: str) -> bytes:
    """y = x over [n, m]."""
    kind = getattr(TensorProto, ONNX_TYPES.get(datatype, datatype))
    return serialise([helper.make_node("Identity", ["x"], ["y"])], [], [("x", kind)], [("y", kind)], ["n", "m"])


def add_model() -> bytes:
    """sum = a + b, difference = a - b over [n, 4]."""
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    kind = TensorProto.FLOAT
    return serialise(nodes, [], [("a", kind), ("b", kind)], [("sum", kind), ("difference", kind)], ["n", 4])


def slow_model() -> bytes:
    """y = x over [n, 4], plus zero times the mean of a long chain of matrix products."""
    constants = [
        onnx.numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "unit"),
        onnx.numpy_helper.from_array(np.array([WIDTH, WIDTH], np.int64), "square"),
        onnx.numpy_helper.from_array(np.zeros((1, 1), np.float32), "zero"),
    ]
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"]), helper.make_node("Expand", ["mean", "square"], ["p0"])]
    nodes += [helper.make_node("MatMul", [f"p{n}", "unit"], [f"p{n + 1}"]) for n in range(PRODUCTS)]
    nodes += [
        helper.make_node("ReduceMean", [f"p{PRODUCTS}"], ["last"]),
        helper.make_node("Mul", ["last", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    kind = TensorProto.FLOAT
    return serialise(nodes, constants, [("x", kind)], [("y", kind)], ["n", 4])


def serialise(nodes, constants, inputs, outputs, shape) -> bytes:
    """A checked ONNX model whose tensors all have one shape."""
    sides = [[helper.make_tensor_value_info(name, kind, shape) for name, kind in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "contract", *sides, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def fill(store: Store) -> None:
    """Install the contract's models."""

    def put(name: str, model: bytes, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], **fields: object) -> None:
        install(store, model, name=name, inputs=inputs, outputs=outputs, **fields)
        activate(store, name, stable=1)

    def tensor(name: str, datatype: str, shape: tuple[int, ...], batch_axis: int | None = None) -> Tensor:
        return Tensor(name=name, datatype=datatype, shape=shape, batch_axis=batch_axis)

    for datatype in DATATYPES:
        if IDENTITY[datatype] not in ECHOED:
            x, y = (tensor(name, datatype, (-1, -1)) for name in "xy")
            put(IDENTITY[datatype], identity_model(datatype), (x,), (y,))
    names = [tensor(name, "FP32", (-1, 4), 0) for name in ("a", "b", "sum", "difference")]
    put(ADD, add_model(), tuple(names[:2]), tuple(names[2:]))
    put(SLOW, slow_model(), (tensor("x", "FP32", (-1, 4)),), (tensor("y", "FP32", (-1, 4)),))
    wake_word = Path(pymicro_wakeword.__file__).parent / "models" / "okay_nabu.tflite"
    sides = (tensor("input_audio", "INT8", (1, 3, 40)),), (tensor("dense_1", "UINT8", (1, 1)),)
    fields = {"engine": "litert", "model_file": "model.tflite", "stateful": "hidden"}
    put(SEQUENCE, wake_word.read_bytes(), *sides, **fields)


async def serve(store: Store) -> None:
    """Serve until SIGTERM; the first line of output says where."""
    host = ContractHost(store, node="compat", limits=HostLimits(slots=1))
    await host.start()
    shared = {"server_name": "compat", "counting": host, "repository": host, "statistics": Statistics()}
    rest = RestServer(InferenceService(host, host, **shared), address="127.0.0.1:0")
    methods = join_methods(
        oip_methods(InferenceService(host, host, **shared), trusted=False), health_methods(host.is_ready)
    )
    servers = {kind: make_server(kind, methods, address="127.0.0.1:0") for kind in KINDS}
    for server in (rest, *servers.values()):
        await server.start()
    places = {kind: server.address for kind, server in servers.items()} | {"rest": f"http://{rest.address}"}
    print(json.dumps(places), flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    for server in (rest, *servers.values()):
        await server.drain(1.0)
    await host.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        fill(store)
        uvloop.run(serve(store))


if __name__ == "__main__":
    main()
