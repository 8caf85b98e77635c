"""A small model server and a device for the MQTT tests; run as a script it is a worker process that can be killed.

The device is paho with its own thread: a second codec path beside the worker's, over real sockets.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from paho.mqtt import client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_node.mqtt.limits import MqttLimits, SessionLimits
from edge_node.mqtt.worker import MqttWorker
from nearcast.backoff import ReconnectLimits
from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.wire.response import TensorResponse

WAIT_S = 10.0
QUICK = ReconnectLimits(base_s=0.02, max_s=0.1)
FAST = MqttLimits(session=SessionLimits(reconnect=QUICK, will_delay_s=0))
"""For nodes whose broker goes away and comes back while a test waits."""


class Doubler:
    """Two models: `double` answers 2x; `sum`, with hidden state, answers the running sum of a sequence."""

    def __init__(self, *, delay_s: float = 0.0, journal: Path | None = None) -> None:
        self.delay_s = delay_s
        self.journal = journal
        self.executed: list[str] = []
        self.contexts: list[RequestContext] = []
        self.sums: dict[str, float] = {}

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        if model not in ("double", "sum"):
            raise MeshError(Code.MODEL_NOT_FOUND, "There are the models double and sum.")
        return ModelMetadata(
            name=model,
            versions=("7",),
            platform="test",
            inputs=(TensorSpec("x", "FP32", (-1, 2)),),
            outputs=(TensorSpec("y", "FP32", (-1, 2)),),
            properties={"stateful": "hidden" if model == "sum" else "none"},
        )

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        return True

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        self.executed.append(context.idempotency_key)
        self.contexts.append(context)
        if self.journal is not None:
            with self.journal.open("a") as journal:
                journal.write(f"{os.getpid()} {context.idempotency_key}\n")
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        x = request.decode()["x"]
        if request.model == "sum":
            sequence = request.sequence_id
            if request.parameters["sequence_start"]:
                self.sums[sequence] = 0.0
            self.sums[sequence] += float(np.sum(x))
            y = np.full((1, 2), self.sums[sequence], dtype=np.float32)
        else:
            y = 2 * x
        served = Served(node="n1", tier="local", version="7")
        return TensorResponse(model=request.model, version="7", outputs={"y": y}, id=request.id, served=served)

    def stream(self, requests: AsyncIterator[InferRequest], context: RequestContext) -> AsyncIterator[InferResponse]:
        raise NotImplementedError


class Device:
    """One device with its own client, connected while the context lasts."""

    def __init__(self, port: int, name: str, *, protocol: int = paho.MQTTv5, session_expiry_s: int = 0) -> None:
        self.name = name
        self.replies: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self._subscribed: queue.Queue[int] = queue.Queue()
        self._port = port
        self._session_expiry_s = session_expiry_s
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=f"device-{name}", protocol=protocol)
        self.client.on_message = lambda _c, _u, message: self.replies.put(message)
        self.client.on_subscribe = lambda _c, _u, mid, _r, _p: self._subscribed.put(mid)
        self.client.on_connect = lambda client, _u, _f, _r, _p: client.subscribe(f"nc/v1/local/{name}/down/#", 1)
        self.client.on_socket_open = lambda _c, _u, s: s.setsockopt(6, 1, 1)
        self.client.reconnect_delay_set(1, 1)

    def __enter__(self) -> Self:
        if self._session_expiry_s:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = self._session_expiry_s
            self.client.connect("127.0.0.1", self._port, clean_start=False, properties=properties)
        else:
            self.client.connect("127.0.0.1", self._port)
        self.client.loop_start()
        self._subscribed.get(timeout=WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def ask(
        self,
        payload: bytes,
        *,
        model: str = "double",
        correlation: bytes | None = None,
        response_topic: str = "",
        content_type: str = "",
        expiry_s: int | None = None,
        **user: str,
    ) -> bytes:
        """Publish a request; returns its correlation."""
        correlation = uuid.uuid4().bytes if correlation is None else correlation
        properties = Properties(PacketTypes.PUBLISH)
        if correlation:
            properties.CorrelationData = correlation
        properties.ResponseTopic = response_topic or f"nc/v1/local/{self.name}/down/reply/test"
        if content_type:
            properties.ContentType = content_type
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        if user:
            properties.UserProperty = [(name.replace("_", "-"), value) for name, value in user.items()]
        self.client.publish(f"nc/v1/local/{self.name}/up/infer/{model}", payload, 1, properties=properties)
        return correlation

    def reply(self, timeout_s: float = WAIT_S) -> paho.MQTTMessage:
        """The next message for this device."""
        return self.replies.get(timeout=timeout_s)

    async def answer(self, timeout_s: float = WAIT_S) -> paho.MQTTMessage:
        """The same, without blocking the loop that the worker runs on."""
        return await asyncio.to_thread(self.reply, timeout_s)


def user_of(message: paho.MQTTMessage) -> dict[str, str]:
    """User properties of a message."""
    return dict(getattr(message.properties, "UserProperty", []))


@asynccontextmanager
async def serving(
    port: int,
    folder: Path,
    handler: Doubler,
    *,
    limits: MqttLimits = FAST,
    connected: bool = True,
    drain_s: float = 2.0,
    **fields: Any,
) -> AsyncIterator[MqttWorker]:
    """One life of a node, whose ledger lies in `folder`."""
    inbox = folder / "inbox.sqlite"
    worker = MqttWorker(handler, handler, node="n1", host="127.0.0.1", port=port, inbox=inbox, limits=limits, **fields)
    await worker.start()
    try:
        if connected:
            async with asyncio.timeout(WAIT_S):
                await worker.wait_connected()
        yield worker
    finally:
        await worker.drain(drain_s)


async def until(condition, timeout_s: float = WAIT_S) -> None:
    """Wait for a condition, at most `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


async def main(port: int, inbox: Path, delay_s: float, durability: str = "full") -> None:
    """A worker that never ends by itself. `<inbox>.journal` gets a line for each execution."""
    handler = Doubler(delay_s=delay_s, journal=inbox.with_suffix(".journal"))
    worker = MqttWorker(handler, handler, node="n1", host="127.0.0.1", port=port, inbox=inbox, durability=durability)
    await worker.start()
    await worker.wait_connected()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
