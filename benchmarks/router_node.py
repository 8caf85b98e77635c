"""`python -m benchmarks.router_node IDENTITY`: a node that echoes tensors, on a client and on a mesh listener.

It must not be what is measured: a message like the last of its size is answered without looking at its tensors.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop
from msgspec.structs import replace

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.identity import load_identity
from nearcast.load import NodeReport, VersionReport
from nearcast.runtime import announce, keep_pages
from nearcast.transport.grpc import make_server
from nearcast.transport.mesh import join_methods, mesh_methods
from nearcast.transport.oip import MODEL_INFER, oip_methods
from nearcast.transport.seam import Call, Methods, Reply, UnaryMethod
from nearcast.transport.service import InferenceService
from nearcast.wire.request import WireRequest
from nearcast.wire.response import TensorResponse
from nearcast.wire.status import served_to_trailers

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


class QuickEcho:
    """`EchoModel` for messages that repeat: their tensor is what follows the same head."""

    def __init__(self, careful: UnaryMethod) -> None:
        self._careful = careful
        self._known: dict[int, tuple[bytes, bytes]] = {}
        self._trailers = served_to_trailers(Served(node=NODE, version="1"))

    async def infer(self, body: bytes, call: Call) -> Reply:
        """Answer one message."""
        known = self._known.get(len(body))
        if known is None or not body.startswith(known[0]):
            reply = await self._careful(body, call)
            answer = b"".join(reply.body)
            raw = WireRequest(body).decode()["x"].tobytes()
            if body.endswith(raw) and answer.endswith(raw):
                self._known[len(body)] = body[: -len(raw)], answer[: -len(raw)]
            return reply
        return Reply((known[1], body[len(known[0]) :]), self._trailers)


def quick(methods: Methods) -> Methods:
    """The same methods with a quicker echo."""
    return Methods(unary={**methods.unary, MODEL_INFER: QuickEcho(methods.unary[MODEL_INFER]).infer})


def report() -> NodeReport:
    """What the router learns about this node."""
    version = VersionReport(model=MODEL, version="1", service_p50_us=50.0, service_p95_us=100.0)
    return NodeReport(node=NODE, role="edge", slots=64, versions=(version,))


async def main() -> None:
    identity = load_identity(Path(sys.argv[1]))
    model = EchoModel()
    keep_pages()
    offered = quick(oip_methods(InferenceService(model, model, server_name=NODE), trusted=False))
    client = make_server("ngh2", offered, address="127.0.0.1:0")

    def report_now() -> NodeReport:
        return replace(report(), client_address=client.address)

    methods = join_methods(
        quick(oip_methods(InferenceService(model, model, server_name=NODE), trusted=True)), mesh_methods(report_now)
    )
    mesh = make_server("ngh2", methods, address="127.0.0.1:0", identity=identity, require_client=True)
    await client.start()
    await mesh.start()
    announce("node", grpc=client.address, mesh=mesh.address)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
