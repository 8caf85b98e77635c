"""The edge node as one process: what it consists of, in the order in which it comes up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from edge_node.broker import Broker, keep_alive
from edge_node.config import EdgeConfig
from nearcast import telemetry
from nearcast.errors import Code, MeshError
from nearcast.runtime import ExitCode, Shutdown
from nearcast.runtime import run as run_process
from router.serving_node import ServingNode, load_or_join


def run(config: EdgeConfig, *, token: str = "") -> int:
    """Run an edge node to its end; returns the exit code."""
    return run_process(lambda shutdown: serve(config, shutdown, token=token), drain_s=2 * config.drain_s + 1.0)


async def serve(config: EdgeConfig, shutdown: Shutdown, *, token: str = "") -> int:
    """Serve until the shutdown is requested.

    Raises:
        MeshError: if the node cannot come up: an address, the token, the store.
    """
    require_tenants(config)
    identity = await load_or_join(Path(config.data_dir) / "identity", token, "edge")
    observed = telemetry.start(config.name if identity is None else identity.name, config.telemetry)
    node = ServingNode(config, observed, role="edge", tier="local", identity=identity, find_targets=True)
    try:
        await node.start()
        async with broker_of(config, node.data_dir) as broker, devices(config, node, broker, observed):
            await node.serve(shutdown, **({"mqtt": broker.removeprefix("mqtt://")} if broker else {}))
    finally:
        await node.drain()
    return ExitCode.OK


def require_tenants(config: EdgeConfig) -> None:
    """Refuse tenants whose devices nobody authenticates.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    if config.mqtt.broker == "spawn" and set(config.mqtt.tenants) - {"local"}:
        raise MeshError(
            Code.INVALID_REQUEST,
            "The node's own broker takes devices without a password, so it is for the tenant `local` only.",
        )


@asynccontextmanager
async def broker_of(config: EdgeConfig, data_dir: Path) -> AsyncIterator[str]:
    """The URL of the broker that this node belongs to; "" = none. One of its own is kept alive meanwhile."""
    if config.mqtt.broker != "spawn":
        yield config.mqtt.broker
        return
    broker = await Broker.start(data_dir / "broker", port=config.mqtt.port)
    watch = asyncio.get_running_loop().create_task(keep_alive(broker))
    try:
        yield broker.url
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await broker.stop()


@asynccontextmanager
async def devices(
    config: EdgeConfig, node: ServingNode, broker: str, observed: telemetry.Telemetry
) -> AsyncIterator[None]:
    """Answer devices over MQTT meanwhile. The broker may be absent: the worker waits for it."""
    if not broker:
        yield
        return
    from edge_node.mqtt.limits import MqttLimits
    from edge_node.mqtt.worker import MqttWorker
    from nearcast.transport.mqtt.connection import parse_url

    host, port, _ = parse_url(broker)
    worker = MqttWorker(
        node.router,
        node.router,
        node=node.name,
        host=host,
        port=port,
        inbox=node.data_dir / "inbox.sqlite",
        tenants=config.mqtt.tenants,
        limits=MqttLimits(pending_max=config.mqtt.pending_max, in_flight_max=config.mqtt.in_flight_max),
        registry=observed.registry,
        durability=config.mqtt.durability,
    )
    await worker.start()
    try:
        yield
    finally:
        await worker.drain(config.drain_s)
