"""The edge node as one process: what it consists of, in the order in which it comes up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

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
        async with devices(config, node, observed) as addresses:
            await node.serve(shutdown, **addresses)
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
async def devices(
    config: EdgeConfig, node: ServingNode, observed: telemetry.Telemetry
) -> AsyncIterator[dict[str, str]]:
    """Answer devices over MQTT meanwhile, if there is a broker; yields its address by name."""
    if not config.mqtt.broker and not config.mqtt.tenant_brokers:
        yield {}
        return
    # Here, because a node without a broker need not load what serves devices.
    from edge_node.devices import answer_devices, broker_of

    async with broker_of(config, node.data_dir) as broker, answer_devices(config, node, broker, observed):
        yield {"mqtt": broker.removeprefix("mqtt://")} if broker else {}
