"""`python -m benchmarks.outage_node DEVICE_PORT UPSTREAM_PORT FOLDER`: a node whose upstream broker comes and goes.

Its streams run a detector that costs nothing and finds the same five things: each event has a bit more than 512 bytes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import uvloop

from edge_node.mqtt.streams.definition import StreamDefinition
from edge_node.mqtt.worker import MqttWorker
from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.runtime import announce, keep_pages
from nearcast.transport.mqtt.connection import ConnectionSettings
from nearcast.wire.response import TensorResponse

NODE = "outage-node"
STREAM = StreamDefinition(name="sensor", model="detector", labels=("person", "bicycle", "car", "dog", "chair"))
INPUT_VALUES = 128
DEVICES = 64
"""`d0` and so on: those whose events wait."""


class Detector:
    """Finds five things in whatever it sees."""

    def __init__(self) -> None:
        self._outputs = {
            "boxes": np.arange(20, dtype=np.float32).reshape(1, 5, 4),
            "scores": np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], dtype=np.float32),
            "classes": np.array([[0, 1, 2, 3, 4]], dtype=np.float32),
        }
        self._metadata = ModelMetadata(
            name="detector",
            versions=("1",),
            platform="none",
            inputs=(TensorSpec("x", "FP32", (-1, INPUT_VALUES)),),
            outputs=tuple(TensorSpec(name, "FP32", (-1, *each.shape[1:])) for name, each in self._outputs.items()),
        )

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        request.decode()
        served = Served(node=NODE, tier="local", version="1")
        return TensorResponse(model=request.model, version="1", outputs=self._outputs, served=served)

    def stream(self, requests: AsyncIterator[InferRequest], context: RequestContext) -> AsyncIterator[InferResponse]:
        raise MeshError(Code.UNSUPPORTED, "This benchmark answers unary calls only.")

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        return self._metadata

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        return True


async def main() -> None:
    device_port, upstream_port, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    keep_pages()
    handler = Detector()
    worker = MqttWorker(
        handler,
        handler,
        node=NODE,
        host="127.0.0.1",
        port=device_port,
        inbox=folder / "inbox.sqlite",
        streams=(STREAM,),
        upstream=ConnectionSettings(host="127.0.0.1", port=upstream_port, client_id="outage-node-up"),
    )
    await worker.start()
    await worker.wait_connected()
    announce("outage")
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
