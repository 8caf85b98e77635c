"""A tiny real handler and directory for wire tests: adds two tensors, echoes text, can be slow, refuse and break."""

from __future__ import annotations

import asyncio

import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.load import NodeReport, VersionReport
from nearcast.wire.response import TensorResponse

MODELS = {
    "add": ModelMetadata(
        name="add",
        versions=("1", "2"),
        platform="test_numpy",
        inputs=(TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "FP32", (-1, 2))),
        outputs=(TensorSpec("sum", "FP32", (-1, 2)), TensorSpec("difference", "FP32", (-1, 2))),
        properties={"licence": "test"},
    ),
    "echo": ModelMetadata(
        name="echo",
        versions=("1",),
        platform="test_numpy",
        inputs=(TensorSpec("x", "FP32", (-1, 2)),),
        outputs=(TensorSpec("x", "FP32", (-1, 2)),),
    ),
}


class AddModel:
    """Handler and directory. `contexts` and `requests` keep what arrived; `cancelled` counts abandoned runs."""

    def __init__(self) -> None:
        self.contexts: list[RequestContext] = []
        self.requests: list[InferRequest] = []
        self.cancelled = asyncio.Event()
        self.running = asyncio.Event()
        self.release = asyncio.Event()
        self.ready = True

    async def infer(self, request: InferRequest, context: RequestContext) -> TensorResponse:
        self.contexts.append(context)
        self.requests.append(request)
        version = context.version or request.version or "2"
        match request.model:
            case "add":
                outputs = self._add(request, version)
            case "echo":
                outputs = dict(request.decode())
            case "busy":
                raise MeshError(Code.OVERLOADED, "Too busy; try again later.", retry_after_ms=1500)
            case "broken":
                raise RuntimeError("a secret path /etc/passwd")
            case "slow":
                await self._wait()
                outputs = {}
            case other:
                raise MeshError(Code.MODEL_NOT_FOUND, f"There is no model '{other}'; there are add and echo.")
        names = request.requested_outputs()
        return TensorResponse(
            model=request.model,
            version=version,
            outputs={name: outputs[name] for name in names} if names else outputs,
            served=Served(node="test-1", tier="local", version=version, queue_us=7, compute_us=11, in_flight=3),
        )

    def _add(self, request: InferRequest, version: str) -> dict[str, np.ndarray]:
        if version not in MODELS["add"].versions:
            raise MeshError(Code.VERSION_MISMATCH, f"Model 'add' has no version {version}; it has 1 and 2.")
        inputs = request.decode()
        if set(inputs) != {"a", "b"}:
            raise MeshError(Code.INVALID_REQUEST, "Model 'add' takes the inputs a and b.")
        return {"sum": inputs["a"] + inputs["b"], "difference": inputs["a"] - inputs["b"]}

    async def _wait(self) -> None:
        self.running.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def stream(self, requests, context):
        async for request in requests:
            yield await self.infer(request, context)

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        if model not in MODELS:
            raise MeshError(Code.MODEL_NOT_FOUND, f"There is no model '{model}'; there are add and echo.")
        return MODELS[model]

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        if model:
            await self.metadata(model, version)
        return self.ready

    def report(self) -> NodeReport:
        return NodeReport(
            node="test-1",
            role="edge",
            versions=(
                VersionReport(model="add", version="1", residency="cold"),
                VersionReport(model="add", version="2"),
            ),
        )
