"""`python -m benchmarks.mqtt_node PORT TENANT KIND FOLDER [OPTIONS]`: a node for devices, or its measure.

`echo` sends each message back and does nothing else: the floor of the bus; with durability it writes each down first.
`paho` does the same as `echo` with the most used client library.
`noop` answers with its input behind the whole MQTT side, `slow` too, but `--capacity` times a second, one at a time.
`digits` is a real model in a model host behind the router, as on a node; `dense` one that gains by batches, in a model
host alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from onnx import TensorProto, helper, numpy_helper
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from benchmarks.serving_models import Workload, fill_store
from edge_node.mqtt.limits import MqttLimits, RequestLimits
from edge_node.mqtt.worker import MqttWorker
from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.runtime import announce, keep_pages
from nearcast.serving.host import ModelHost
from nearcast.serving.limits import HostLimits
from nearcast.store.manifest import Tensor
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message
from nearcast.wire.response import TensorResponse
from router.policy import Policy, PolicyConfig
from router.router import Router

NODE = "bench-node"
DIGITS = Path(__file__).parents[1] / "nearcast/cli/demo/models/digits/digits-1.onnx"
DENSE_WIDTHS = (256, 4096, 4096, 10)
"""71 MB of weights, more than a cache holds: one row costs the time to read them, and 64 rows read them once."""


class Noop:
    """Answers with its input, at once or (`capacity` > 0) so many times a second, one after the other."""

    def __init__(self, capacity: float = 0.0) -> None:
        self._pause_s = 1.0 / capacity if capacity else 0.0
        self._turn = asyncio.Lock()
        spec = TensorSpec("x", "FP32", (-1, 256))
        self._metadata = ModelMetadata(name="noop", versions=("1",), platform="none", inputs=(spec,), outputs=(spec,))

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        if self._pause_s:
            async with self._turn:
                await asyncio.sleep(self._pause_s)
        served = Served(node=NODE, tier="local", version="1")
        return TensorResponse(model=request.model, version="1", outputs={"x": request.decode()["x"]}, served=served)

    def stream(self, requests: AsyncIterator[InferRequest], context: RequestContext) -> AsyncIterator[InferResponse]:
        raise MeshError(Code.UNSUPPORTED, "This benchmark answers unary calls only.")

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        return self._metadata

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        return True


def dense_model() -> bytes:
    """Layers of random weights with relu between them, as `x` FP32 [n, 256] -> `y` FP32 [n, 10]."""
    rng, nodes, constants, last = np.random.default_rng(7), [], [], "x"
    for index, (rows, columns) in enumerate(itertools.pairwise(DENSE_WIDTHS)):
        weight = (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes += [helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"])]
        last = f"m{index}"
        if index < len(DENSE_WIDTHS) - 2:
            nodes.append(helper.make_node("Relu", [last], [f"r{index}"]))
            last = f"r{index}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    spec = helper.make_tensor_value_info
    inputs = [spec("x", TensorProto.FLOAT, ["n", DENSE_WIDTHS[0]])]
    outputs = [spec("y", TensorProto.FLOAT, ["n", DENSE_WIDTHS[-1]])]
    graph = helper.make_graph(nodes, "dense", inputs, outputs, constants)
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return model


def workload(kind: str) -> Workload:
    """One of the real models."""
    given, width, made = ("image", 64, "probabilities") if kind == "digits" else ("x", DENSE_WIDTHS[0], "y")
    return Workload(
        name=kind,
        engine_us=0,
        make=DIGITS.read_bytes if kind == "digits" else dense_model,
        inputs=(Tensor(name=given, datatype="FP32", shape=(-1, width), batch_axis=0),),
        outputs=(Tensor(name=made, datatype="FP32", shape=(-1, 10), batch_axis=0),),
    )


async def serve_model(options: argparse.Namespace) -> Router | ModelHost:
    """`digits` behind the router, as on a node; `dense`, whose batches are looked at, in the model host alone."""
    limits = HostLimits(batch_rows_max=options.batch_rows) if options.batch_rows else HostLimits()
    model = workload(options.kind)
    host = ModelHost(fill_store(options.folder, model, model.make()), node=NODE, limits=limits)
    await host.start()
    if options.kind == "dense":
        return host
    router = Router(Policy(PolicyConfig(), seed=1), local=host, node=NODE)
    await router.start()
    return router


async def echo(port: int, tenant: str, journal: Path | None) -> None:
    """The floor: what a message costs on the bus there and back; with a journal, on the disk in between as well."""
    database = sqlite3.connect(journal or ":memory:", isolation_level=None)
    for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "CREATE TABLE seen (key BLOB, body BLOB)"):
        database.execute(statement)

    def receive(message: Message) -> None:
        if journal is not None:
            database.execute("INSERT INTO seen VALUES (?, ?)", (message.correlation, message.payload))
        connection.acknowledge(message)
        connection.publish(
            Message(
                topic=message.response_topic,
                payload=message.payload,
                qos=message.qos,
                content_type=message.content_type,
                correlation=message.correlation,
                user={"status": "200"},
            )
        )

    settings = ConnectionSettings(host="127.0.0.1", port=port, client_id=f"echo-{tenant}")
    connection = Connection(settings, on_message=receive)
    await connection.open()
    await connection.subscribe(topics.request_filter(tenant))


def paho_echo(port: int, tenant: str) -> None:
    """What a message costs there and back with a responder as most people write it, Nagle off."""
    subscribed = threading.Event()

    def receive(client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        asked, properties = message.properties, Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.CorrelationData = getattr(asked, "CorrelationData", b"")
        properties.UserProperty = [("status", "200")]
        client.publish(getattr(asked, "ResponseTopic", ""), message.payload, message.qos, properties=properties)

    def subscribe(client: paho.Client, *_: Any) -> None:
        opened = client.socket()
        assert isinstance(opened, socket.socket)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.subscribe(topics.request_filter(tenant), qos=1)

    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"paho-{tenant}", protocol=paho.MQTTv5)
    client.on_connect = subscribe
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_message = receive
    client.connect("127.0.0.1", port)
    client.loop_start()
    subscribed.wait()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("tenant", help="each process here has its own, or all would answer each")
    parser.add_argument("kind", choices=("echo", "paho", "noop", "slow", "digits", "dense"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--durability", choices=("full", "none"), default="full")
    parser.add_argument("--capacity", type=float, default=0.0)
    parser.add_argument("--pending", type=int, default=RequestLimits().pending_max)
    parser.add_argument("--batch-rows", type=int, default=0, help="1 = requests are never joined; 0 = the default")
    options = parser.parse_args()
    keep_pages()
    if options.kind == "echo":
        journal = options.folder / "floor.sqlite" if options.durability == "full" else None
        await echo(options.port, options.tenant, journal)
    elif options.kind == "paho":
        paho_echo(options.port, options.tenant)
    else:
        handler: Any = Noop(options.capacity)
        if options.kind in ("digits", "dense"):
            handler = await serve_model(options)
        worker = MqttWorker(
            handler,
            handler,
            node=options.tenant,
            host="127.0.0.1",
            port=options.port,
            inbox=options.folder / "inbox.sqlite",
            limits=MqttLimits(requests=RequestLimits(pending_max=options.pending)),
            durability=options.durability,
            tenants=(options.tenant,),
        )
        await worker.start()
        await worker.wait_connected()
    announce("mqtt")
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
