"""Two tenants with two devices and a reader each, of the same names, with their brokers and their node."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from benchmarks.isolation_player import Player, files_of
from edge_node.broker.access import Kind
from edge_node.broker.provisioning import ProvisioningLimits
from edge_node.broker.tenant_broker import TenantBroker
from edge_node.mqtt.limits import MqttLimits, SessionLimits
from edge_node.mqtt.worker import MqttWorker
from nearcast.backoff import ReconnectLimits
from nearcast.client.provisioning import join
from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.identity.device import DeviceIdentity
from nearcast.transport.mqtt.message import Message
from nearcast.wire.response import TensorResponse

TENANTS, DEVICES = ("acme", "umbrella"), ("d1", "d2")
PAIRS = tuple(itertools.product(TENANTS, DEVICES))
READER = "dash"
WAIT_S = 10.0
LIMITS = ProvisioningLimits(watch_interval_s=0.02, restart_interval_s=0.0)
FAST = MqttLimits(session=SessionLimits(reconnect=ReconnectLimits(base_s=0.02, max_s=0.1), will_delay_s=0))


class Doubler:
    """The model `double`. `executed` counts its runs."""

    def __init__(self) -> None:
        self.executed = 0
        self.delay_s = 0.0

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        spec = TensorSpec("x", "FP32", (-1, 2))
        return ModelMetadata(name=model, versions=("1",), platform="none", inputs=(spec,), outputs=(spec,))

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        return True

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        self.executed += 1
        await asyncio.sleep(self.delay_s)
        served = Served(node="n1", tier="local", version="1")
        outputs = {"x": 2 * request.decode()["x"]}
        return TensorResponse(model=request.model, version="1", outputs=outputs, id=request.id, served=served)

    def stream(self, requests: AsyncIterator[InferRequest], context: RequestContext) -> AsyncIterator[InferResponse]:
        raise MeshError(Code.UNSUPPORTED, "Only unary calls.")


class House:
    """The tenants' brokers and workers, and the identities of devices and readers. Use as a context."""

    def __init__(self, folder: Path, limits: ProvisioningLimits = LIMITS) -> None:
        self.folder = folder
        self.limits = limits
        self.handler = Doubler()
        self.brokers: dict[str, TenantBroker] = {}
        self.workers: dict[str, MqttWorker] = {}
        self.identities: dict[tuple[str, str], DeviceIdentity] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(self._open(tenant) for tenant in TENANTS))
            await asyncio.gather(*(self.applied(tenant) for tenant in TENANTS))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _open(self, tenant: str) -> None:
        broker = self.brokers[tenant] = await TenantBroker.start(
            self.folder / tenant, tenant=tenant, limits=self.limits
        )
        self._stack.push_async_callback(broker.stop)
        worker = self.workers[tenant] = MqttWorker(
            self.handler,
            self.handler,
            node="n1",
            host=broker.host,
            port=broker.port,
            inbox=self.folder / tenant / "inbox.sqlite",
            tenants=(tenant,),
            limits=FAST,
            tls=broker.tls,
        )
        broker.on_denied(worker.deny)
        await worker.start()
        self._stack.push_async_callback(worker.drain, 1.0)
        await broker.registrar.listening.wait()
        for device in DEVICES:
            self.identities[tenant, device] = await self.invite(tenant, device)
        self.identities[tenant, READER] = await self.invite(tenant, READER, is_reader=True)

    async def invite(self, tenant: str, name: str, *, label: str = "", is_reader: bool = False) -> DeviceIdentity:
        """Invite somebody and have it join."""
        claim = self.folder / f"claim-{tenant}-{label or name}"
        kind: Kind = "reader" if is_reader else "device"
        self.brokers[tenant].authority.invite(claim, name=name, kind=kind, uses=1, life_s=600)
        return await join(claim, self.folder / f"identity-{tenant}-{label or name}")

    async def player(
        self,
        tenant: str,
        name: str,
        *filters: str,
        client_id: str = "",
        is_durable: bool = False,
        will: tuple[str, bytes] | None = None,
    ) -> Player:
        """Connect a device or the reader, and subscribe."""
        files, port = files_of(self.identities[tenant, name]), self.brokers[tenant].port
        session_s = 3600 if is_durable else 0

        def connect() -> Player:
            player = Player(
                files, port, client_id=client_id or name, clean=not is_durable, session_s=session_s, will=will
            )
            if filters and not player.refused:
                player.subscribe(*filters)
            return player

        return await asyncio.to_thread(connect)

    def say(self, tenant: str, device: str, rest: str, payload: bytes, *, retain: bool = False) -> None:
        """Say something about a device as the node's worker."""
        epoch = self.workers[tenant]._epoch
        assert epoch is not None
        assert epoch.connection is not None
        epoch.connection.publish(Message(topic=own(tenant, device, rest), payload=payload, retain=retain))

    async def applied(self, tenant: str) -> None:
        """Return once the broker knows what is in the register and the worker is connected."""
        registry = self.brokers[tenant].authority.registry
        revision = registry.revision()
        await until(lambda: registry.applied() >= revision)
        await until(lambda: self.workers[tenant].connected)


def own(tenant: str, device: str, rest: str) -> str:
    """A topic of a device."""
    return f"nc/v1/{tenant}/{device}/{rest}"


async def until(condition: Callable[[], object]) -> bool:
    """Wait until the condition holds; returns whether it did in time."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True
