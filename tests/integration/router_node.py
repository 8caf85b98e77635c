"""A node for tests of the router: `python router_node.py NAME DELAY_MS VERSIONS [IDENTITY_FOLDER]`, or in process."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.identity import Identity, load_identity
from nearcast.load import NodeReport, VersionReport
from nearcast.runtime import Shutdown, announce, run
from nearcast.transport.grpc import make_server
from nearcast.transport.mesh import join_methods, mesh_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.seam import Server
from nearcast.transport.service import InferenceService
from nearcast.wire.response import TensorResponse


class TinyHost:
    """Doubles its input after a pause; holds the model `digits` in some versions."""

    def __init__(self, name: str, *, delay_s: float = 0.0, versions: tuple[str, ...] = ("1",)) -> None:
        self.name = name
        self.delay_s = self.claimed_s = delay_s
        self.versions = versions
        self.in_flight = self.most_in_flight = self.answered = self.cancelled = 0
        self.seen: list[tuple[str, RequestContext]] = []
        self.fail: MeshError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.client_address = ""
        self.client_tls = False

    async def infer(self, request: InferRequest, context: RequestContext) -> TensorResponse:
        version = context.version or request.version or self.versions[0]
        if version not in self.versions:
            raise MeshError(Code.VERSION_MISMATCH, f"{self.name} does not hold {version}.")
        if self.fail is not None:
            raise self.fail
        self.seen.append((version, context))
        seen = self.in_flight
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        self.answered += 1
        x = request.decode()["x"]
        served = Served(
            node=self.name,
            tier="peer",
            version=version,
            compute_us=int(self.delay_s * 1e6) + 10,
            queue_us=1,
            in_flight=seen,
        )
        return TensorResponse(
            model=request.model, version=version, outputs={"y": np.asarray(x) * 2}, id=request.id, served=served
        )

    async def stream(self, requests, context):  # type: ignore[no-untyped-def]
        async for request in requests:
            yield await self.infer(request, context)

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        if model != "digits":
            raise MeshError(Code.MODEL_NOT_FOUND, f"{self.name} holds digits only.")
        spec = TensorSpec("x", "FP32", (-1,))
        return ModelMetadata(
            name=model, versions=self.versions, platform="tiny", inputs=(spec,), outputs=(spec,), properties={}
        )

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        return True

    def report(self) -> NodeReport:
        us = self.claimed_s * 1e6 + 50
        return NodeReport(
            node=self.name,
            role="edge",
            slots=64,
            in_flight=self.in_flight,
            client_address=self.client_address,
            client_tls=self.client_tls,
            versions=tuple(
                VersionReport(model="digits", version=v, service_p50_us=us, service_p95_us=1.5 * us)
                for v in self.versions
            ),
        )


def make_node_server(
    host: TinyHost, identity: Identity | None, kind: str = "ngh2", address: str = "127.0.0.1:0"
) -> Server:
    """The listener of a tiny host: a mesh listener with an identity, a client listener without."""
    methods = oip_methods(InferenceService(host, host, server_name=host.name), trusted=identity is not None)
    if identity is not None:
        methods = join_methods(methods, mesh_methods(host.report))
    return make_server(kind, methods, address=address, identity=identity, require_client=identity is not None)  # type: ignore[arg-type]


async def serve(shutdown: Shutdown) -> int:
    """Serve until told to end: clients, or with an identity the mesh and clients."""
    name, delay_ms, versions, *folder = sys.argv[1:]
    host = TinyHost(name, delay_s=float(delay_ms) / 1e3, versions=tuple(versions.split(",")))
    servers = [make_node_server(host, identity) for identity in [*(load_identity(Path(f)) for f in folder), None]]
    for server in servers:
        await server.start()
    host.client_address = servers[-1].address
    announce(name, grpc=servers[0].address, client=host.client_address)
    await shutdown.wait()
    await asyncio.gather(*(server.drain(1.0) for server in servers))
    return 0


if __name__ == "__main__":
    sys.exit(run(serve))
