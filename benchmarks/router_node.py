"""`python -m benchmarks.router_node IDENTITY`: a node that echoes tensors, on a client and on a mesh listener."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.identity import load_identity
from nearcast.load import NodeReport, VersionReport
from nearcast.transport.grpc import make_server
from nearcast.transport.mesh import join_methods, mesh_methods
from nearcast.transport.oip import oip_methods
from nearcast.wire.response import TensorResponse

MODEL, NODE = "echo", "bench-node"


class EchoModel:
    """Answers with its input; so cheap that what is measured is the way."""

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        served = Served(node=NODE, version="1")
        return TensorResponse(model=MODEL, version="1", outputs={"y": request.decode()["x"]}, served=served)

    def stream(self, requests: AsyncIterator[InferRequest], context: RequestContext) -> AsyncIterator[InferResponse]:
        raise MeshError(Code.UNSUPPORTED, "This benchmark answers unary calls only.")

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        spec = TensorSpec("x", "UINT8", (-1,))
        return ModelMetadata(name=MODEL, versions=("1",), platform="echo", inputs=(spec,), outputs=(spec,))

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        return True


def report() -> NodeReport:
    """What the router learns about this node."""
    version = VersionReport(model=MODEL, version="1", service_p50_us=50.0, service_p95_us=100.0)
    return NodeReport(node=NODE, role="edge", slots=64, versions=(version,))


async def main() -> None:
    identity = load_identity(Path(sys.argv[1]))
    model = EchoModel()
    client = make_server("ngh2", oip_methods(model, model, server_name=NODE, trusted=False), address="127.0.0.1:0")
    methods = join_methods(oip_methods(model, model, server_name=NODE, trusted=True), mesh_methods(report))
    mesh = make_server("ngh2", methods, address="127.0.0.1:0", identity=identity, require_client=True)
    await client.start()
    await mesh.start()
    print(json.dumps({"grpc": client.address, "mesh": mesh.address}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
