"""The part of an edge node that serves devices: its brokers, and a worker for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from edge_node.broker import Broker, keep_alive
from edge_node.broker.provisioning import ProvisioningLimits
from edge_node.clock import open_clock
from edge_node.config import EdgeConfig
from edge_node.mqtt.ledger.ledger import boot_identity
from edge_node.mqtt.limits import LedgerLimits, MqttLimits, RequestLimits
from edge_node.mqtt.management import Management
from edge_node.mqtt.shadow import NodeSettings
from edge_node.mqtt.streams.definition import by_name
from edge_node.mqtt.worker import MqttWorker
from edge_node.tenant_metrics import TenantMetrics
from nearcast import telemetry
from nearcast.clock import SYSTEM_CLOCK
from nearcast.transport.mqtt.connection import ConnectionSettings, parse_url
from nearcast.transport.mqtt.tls import TlsFiles
from router.serving_node import ServingNode

if TYPE_CHECKING:
    from edge_node.broker.tenant_broker import TenantBroker

DAY_S = 86_400.0


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
async def answer_devices(
    config: EdgeConfig, node: ServingNode, broker: str, observed: telemetry.Telemetry
) -> AsyncIterator[None]:
    """Answer devices over MQTT meanwhile: a worker for each broker, which may be absent: the worker waits for it."""
    async with AsyncExitStack() as stack:
        if broker:
            await stack.enter_async_context(answering(config, node, broker, config.mqtt.tenants, observed.registry))
        if config.mqtt.tenant_brokers:
            await serve_tenants(config, node, observed, stack)
        yield


async def serve_tenants(
    config: EdgeConfig, node: ServingNode, observed: telemetry.Telemetry, stack: AsyncExitStack
) -> None:
    """A broker and its worker for each tenant whose devices have certificates, until `stack` is closed."""
    # Here, because cryptography is 10 MB that other nodes need not hold.
    from edge_node.broker.tenant import tenant_folder
    from edge_node.broker.tenant_broker import TenantBroker

    metrics = TenantMetrics(observed.registry)
    for each in config.mqtt.tenant_brokers:
        own = await TenantBroker.start(
            tenant_folder(node.data_dir, each.tenant),
            tenant=each.tenant,
            host=each.host,
            port=each.port,
            names=each.names,
            limits=ProvisioningLimits(certificate_life_s=each.certificate_days * DAY_S),
        )
        stack.push_async_callback(own.stop)
        registry = metrics.registry(each.tenant)
        await stack.enter_async_context(answering(config, node, own.url, (each.tenant,), registry, own))


def upstream_of(config: EdgeConfig, node: str, tenant: str) -> ConnectionSettings | None:
    """The upstream broker, if the tenant's messages go there: a connection of its own for each tenant."""
    upstream = config.mqtt.upstream
    if not upstream.url or tenant not in upstream.tenants:
        return None
    host, port, _ = parse_url(upstream.url)
    tls = None
    if upstream.url.startswith("mqtts://"):
        ca, certificate, key = (
            Path(name) if name else None for name in (upstream.ca, upstream.certificate, upstream.key)
        )
        tls = TlsFiles(ca, certificate, key)
    return ConnectionSettings(host=host, port=port, client_id=f"nearcast-{node}-{tenant}-up", tls=tls)


def management_of(config: EdgeConfig, node: ServingNode, tenant: str, registry: CollectorRegistry) -> Management:
    """What the node says about itself on the broker of a tenant."""
    return Management(
        node.name,
        tenant,
        boot=boot_identity(),
        clock=open_clock(node.data_dir, SYSTEM_CLOCK),
        inventory=lambda: node.host.report().versions,
        registry=registry,
        metrics_interval_s=config.mqtt.metrics_interval_s,
        shadow=config.ledger_path(tenant).with_name("shadow.json"),
    )


@asynccontextmanager
async def answering(
    config: EdgeConfig,
    node: ServingNode,
    broker: str,
    tenants: tuple[str, ...],
    registry: CollectorRegistry,
    own: TenantBroker | None = None,
) -> AsyncIterator[None]:
    """Answer the devices of one broker meanwhile; `own` says who we are to it, and who has no rights any more."""
    host, port, _ = parse_url(broker)
    management = management_of(config, node, tenants[0], registry)
    worker = MqttWorker(
        node.handler,
        node.router,
        node=node.name,
        host=host,
        port=port,
        inbox=config.ledger_path(tenants[0]),
        tenants=tenants,
        limits=MqttLimits(
            requests=RequestLimits(pending_max=config.mqtt.pending_max, in_flight_max=config.mqtt.in_flight_max),
            ledger=LedgerLimits(
                outbox_bytes_max=config.mqtt.outbox_bytes_max,
                inputs_bytes_max=config.mqtt.inputs_bytes_max,
                when_full=config.mqtt.when_full,
            ),
        ),
        upstream=upstream_of(config, node.name, tenants[0]),
        registry=registry,
        durability=config.mqtt.durability,
        streams=config.streams,
        # A broker of a tenant grants nobody a topic outside `nc/v1`.
        discovery_prefix=config.mqtt.discovery_prefix if own is None else "",
        tls=None if own is None else own.tls,
        management=management,
        sees_mesh=lambda: node.sees_mesh,
    )

    def fulfil(wish: NodeSettings) -> None:
        worker.streams.redefine(by_name(config.streams if wish.streams is None else wish.streams))
        if own is None:
            telemetry.set_level(wish.log_level or config.telemetry.level)

    fulfil(management.settings)
    management.on_wish = fulfil
    if own is not None:
        own.on_denied(worker.deny)
    await worker.start()
    try:
        yield
    finally:
        await worker.drain(config.drain_s)
