"""The shell around connection, inbox, executor and publisher. One per node, alone on its broker's requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry

from edge_node.mqtt.ack_window import AckWindow, Ticket
from edge_node.mqtt.executor import Executor
from edge_node.mqtt.ledger.ledger import Ledger, boot_identity
from edge_node.mqtt.ledger.records import Committed
from edge_node.mqtt.limits import MqttLimits
from edge_node.mqtt.management import Management
from edge_node.mqtt.metrics import MqttMetrics
from edge_node.mqtt.publisher import Publisher
from edge_node.mqtt.requests import RequestService
from edge_node.mqtt.streams.definition import StreamDefinition, by_name
from edge_node.mqtt.streams.discovery import Discovery
from edge_node.mqtt.streams.metrics import StreamMetrics
from edge_node.mqtt.streams.service import StreamService
from edge_node.mqtt.streams.volatile import VolatileInputs
from edge_node.mqtt.uplink import Uplink
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import MeshError
from nearcast.handler import InferenceHandler, ModelDirectory
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.reconnect import stay_connected
from nearcast.transport.mqtt.tls import TlsFiles

TEND_INTERVAL_S = 5.0
WATCH_INTERVAL_S = 1.0
HEAD_BYTES_MAX = 256 * 1024
"""Topic and properties, beside the payload, of a packet that is read at all; what is refused needs room as well."""
STATUS_DENIED = 403
STATUS_FAILED = 500
Durability: TypeAlias = Literal["full", "none"]
_FILTERS = (topics.request_filter, topics.suffixed_filter, topics.data_filter)
_log = get_logger("nearcast.mqtt")


@dataclass(slots=True, eq=False)
class _Epoch:
    """One connection and what it has delivered."""

    window: AckWindow = field(default_factory=AckWindow)
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    connection: Connection | None = None


class MqttWorker:
    """Answers the requests that devices send through one broker.

    Args:
        handler: the router, or a model host.
        directory: tells models' tensors.
        node: this node's name; also makes the client id, which must be stable for the session to survive.
        host, port: the broker. It may be absent at the start and go away at any time.
        inbox: path of the SQLite file.
        tenants: whose requests are read. Anonymous loopback is for `local` only.
        boot: identity of the machine's boot; a test may pretend a reboot.
        management: the node's own topics on this broker; None = presence alone.
        streams: what the messages of streams mean.
        discovery_prefix: first level of the topics where Home Assistant is told of them; "" = nowhere.
        durability: `full` = accepted requests are on disk before the broker may forget them; `none` = only the broker
            keeps them, until their answer is on its way. Requests with QoS 0 are never on disk.
        tls: for a broker behind TLS.
        sees_mesh: whether it is known now what other nodes hold.
        upstream: a second broker, which gets the events of streams and the dead letters too.
    """

    def __init__(
        self,
        handler: InferenceHandler,
        directory: ModelDirectory,
        *,
        node: str,
        host: str,
        port: int,
        inbox: Path,
        tenants: tuple[str, ...] = ("local",),
        limits: MqttLimits | None = None,
        clock: Clock = SYSTEM_CLOCK,
        registry: CollectorRegistry | None = None,
        boot: str | None = None,
        management: Management | None = None,
        streams: Sequence[StreamDefinition] = (),
        discovery_prefix: str = "",
        durability: Durability = "full",
        tls: TlsFiles | None = None,
        sees_mesh: Callable[[], bool] = lambda: True,
        upstream: ConnectionSettings | None = None,
    ) -> None:
        self._node = node
        self._host = host
        self._tls = tls
        self._port = port
        self._limits = limits or MqttLimits()
        self._clock = clock
        self._filters = tuple(make(tenant) for tenant in tenants for make in _FILTERS)
        self._boot = boot or boot_identity()
        self._management = management or Management(node, tenants[0], boot=self._boot)
        self.metrics = MqttMetrics(registry)
        self._inbox = Ledger(
            inbox,
            node=node,
            tenant=tenants[0],
            boot=self._boot,
            limits=self._limits.ledger,
            links=("device",) if upstream is None else ("device", "upstream"),
            clock=clock,
        )
        self._inbox.on_commit(self._count_drops)
        self.metrics.watch_outbox(lambda: self._inbox.event_bytes)
        self._uplink = None if upstream is None else self._make_uplink(upstream)
        self._publisher = Publisher(self._inbox, self._limits.publish, clock, on_drop=self.metrics.dropped)
        self._durable = durability == "full"
        self._suspects = asyncio.Lock()  # one for all kinds: a crash must have one culprit
        self._requests = RequestService(
            self._inbox,
            Executor(handler, directory, limits=self._limits.requests, clock=clock, sees_mesh=sees_mesh),
            self._publisher,
            limits=self._limits.requests,
            messages=self._limits.messages,
            clock=clock,
            metrics=self.metrics,
            durable=self._durable,
            suspects=self._suspects,
        )
        self._discovery: Discovery | None = None
        if discovery_prefix:
            notify, streams_max = self._publisher.notify, self._limits.streams.streams_max
            self._discovery = Discovery(discovery_prefix, node, notify, clock, streams_max)
        self.streams = self._make_streams(handler, directory, streams)
        self.metrics.watch_behind("device", lambda: self._publisher.topics_behind)
        self.metrics.watch_behind("streams", lambda: self.streams.streams_behind)
        self._draining = False
        self._denied: frozenset[str] = frozenset()
        self._online = asyncio.Event()
        self._epoch: _Epoch | None = None
        self._services: list[asyncio.Task[None]] = []

    @property
    def connected(self) -> bool:
        """Whether requests arrive now."""
        return self._online.is_set()

    async def start(self) -> None:
        """Open the inbox, finish what a former life left, and begin to connect. Does not wait for the broker.

        Raises:
            MeshError: UNAVAILABLE if the inbox cannot be opened.
        """
        recovered = await self._inbox.open(self._clock.monotonic())
        self._publisher.recover(recovered.outbox["device"])
        if self._uplink is not None:
            self._uplink.publisher.recover(recovered.outbox["upstream"])
        self._requests.recover(recovered.requests, crashed=recovered.crashed)
        if self._durable:
            self.streams.recover(recovered.inputs, crashed=recovered.crashed)
        if recovered.requests or recovered.outbox["device"]:
            _log.info("recovered", requests=len(recovered.requests), topics=len(recovered.outbox["device"]))
        create = asyncio.get_running_loop().create_task
        staying = stay_connected(self._live, name=f"{self._host}:{self._port}", limits=self._limits.session.reconnect)
        self._services = [create(staying), create(self._tend()), create(self._management.watch())]
        self._services.append(create(self._watch_window()))
        if self._uplink is not None:
            self._services.append(create(self._uplink.run()))

    def deny(self, devices: frozenset[str]) -> None:
        """Take nothing from these devices any more and answer them nothing: none of their certificates holds."""
        self._denied = devices
        self._publisher.deny(devices)

    async def wait_connected(self) -> None:
        """Return once requests arrive."""
        await self._online.wait()

    async def drain(self, timeout_s: float) -> None:
        """Answer what was accepted, as far as the time allows, say goodbye and close.

        What arrives meanwhile is not acknowledged: the broker keeps it for the next start. What stays unanswered is in
        the inbox and runs then.
        """
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._settle()
        epoch = self._epoch
        for task in self._services:
            task.cancel()
        await asyncio.gather(*self._services, return_exceptions=True)
        await self._requests.cancel()
        await self.streams.cancel()
        if epoch is not None and epoch.connection is not None:
            with contextlib.suppress(MeshError):
                epoch.connection.publish(self._management.presence("offline"))
            await epoch.connection.close()
        self._publisher.close()
        await self._inbox.close()

    async def _settle(self) -> None:
        await self.streams.close()
        await self._requests.settled()
        if self._online.is_set():
            await self._publisher.settled()

    def _make_streams(
        self, handler: InferenceHandler, directory: ModelDirectory, streams: Sequence[StreamDefinition]
    ) -> StreamService:
        volatile = None if self._durable else VolatileInputs(self._publisher.send, self._limits.streams)
        return StreamService(
            handler,
            directory,
            volatile or self._inbox,
            by_name(streams),
            limits=self._limits.streams,
            messages=self._limits.messages,
            clock=self._clock,
            metrics=StreamMetrics(self.metrics.registry),
            hold=None if volatile is None else volatile.hold,
            tell=None if self._discovery is None else self._discovery.tell,
            suspects=self._suspects,
        )

    def _make_uplink(self, upstream: ConnectionSettings) -> Uplink:
        limits, clock, metrics = self._limits, self._clock, self.metrics
        publisher = Publisher(self._inbox, limits.publish, clock, on_drop=metrics.dropped, link="upstream")
        metrics.watch_behind("upstream", lambda: publisher.topics_behind)
        return Uplink(upstream, publisher, limits=limits.session.reconnect, metrics=metrics)

    def _count_drops(self, committed: Committed) -> None:
        for reason, count in committed.reasons.items():
            self.metrics.dropped(reason, count)

    # -- the connection -----------------------------------------------------------------------------------------------

    async def _live(self, up: Callable[[], None]) -> None:
        """One epoch: from the CONNECT to the loss."""
        epoch = _Epoch()
        try:
            await self._connect(epoch)
            up()
            await epoch.lost.wait()
        finally:
            self._online.clear()
            self.metrics.connected(up=False)
            self._publisher.detach()
            self._management.detach()

    async def _connect(self, epoch: _Epoch) -> None:
        def lost(reason: str) -> None:
            _log.warning("broker lost", reason=reason)
            epoch.lost.set()

        epoch.connection = connection = Connection(
            self._settings(),
            on_message=lambda message: self._receive(epoch, message),
            on_published=lambda mid, taken: self._publisher.confirmed(mid, taken=taken),
            on_lost=lost,
            on_unreadable=lambda mid: self._drop_unreadable(epoch, mid),
        )
        self._epoch = epoch
        await connection.open()
        try:
            await connection.subscribe(*self._filters)
            await connection.subscribe(self._management.wishes, retained=True)
            self._management.attach(connection)
        except BaseException:
            if not self._draining:
                await connection.close(flush_timeout_s=0.0)
            raise
        if self._discovery is not None:
            self._discovery.forget()
        self._publisher.attach(connection)
        self._online.set()
        self.metrics.connected(up=True)
        _log.info("broker connected", host=self._host, port=self._port)

    def _settings(self) -> ConnectionSettings:
        limits = self._limits.session
        return ConnectionSettings(
            host=self._host,
            port=self._port,
            client_id=f"nearcast-{self._node}",
            session_expiry_s=limits.session_expiry_s,
            receive_max=limits.unacknowledged_max,
            packet_bytes_max=2 * self._limits.messages.payload_bytes_max + HEAD_BYTES_MAX,
            keepalive_s=limits.keepalive_s,
            connect_timeout_s=limits.connect_timeout_s,
            will=self._management.presence("offline"),
            will_delay_s=limits.will_delay_s,
            stall_s=limits.stall_s,
            tls=self._tls,
        )

    async def _tend(self) -> None:
        """Try again what an operator has marked for it, and forget what is old."""
        ttl_s = self._limits.messages.ttl_default_ms / 1e3
        while True:
            await asyncio.sleep(TEND_INTERVAL_S)
            with contextlib.suppress(MeshError):
                while await self._inbox.prune(self._clock.monotonic()):
                    pass
                await self._inbox.tell_drops(self._clock.monotonic())
                revived = await self._inbox.revive(self._clock.monotonic(), ttl_s)
                self._requests.recover(revived.requests, crashed=False)
                for stored in revived.inputs if self._durable else ():  # else they wait for a node that reads its disk
                    self.streams.resume(stored)

    # -- one message --------------------------------------------------------------------------------------------------

    def _receive(self, epoch: _Epoch, message: Message) -> None:
        if self._draining:
            return  # not acknowledged, so it comes again after the restart
        ticket = epoch.window.open(message.mid, self._clock.monotonic(), len(message.payload))
        if self._durable and self._is_crowded(epoch.window) and epoch.connection is not None:
            epoch.connection.pause()  # without durability what the window waits for arrives by reading
        acknowledge = partial(self._acknowledge, epoch, ticket)
        try:
            self._dispatch(message, acknowledge)
        except Exception:  # noqa: BLE001  # it would end the connection, come again with the next, and end that too
            _log.exception("a message could not be taken in", topic=message.topic[:200])
            self.metrics.refused(STATUS_FAILED)
            acknowledge()

    def _dispatch(self, message: Message, acknowledge: Callable[[], None]) -> None:
        if message.topic == self._management.wishes:
            self._management.receive(message)
            acknowledge()
        elif self._denied and topics.device_level(message.topic) in self._denied:
            self.metrics.refused(STATUS_DENIED)  # whom an answer would reach is not who asked
            acknowledge()
        elif topics.is_data(message.topic):
            self.streams.receive(message, acknowledge)
        else:
            self._requests.receive(message, acknowledge)

    def _drop_unreadable(self, epoch: _Epoch, mid: int) -> None:
        """Acknowledge in its turn what makes no sense: it would come for ever."""
        if not self._draining:
            self.metrics.unreadable()
            self._acknowledge(epoch, epoch.window.open(mid, self._clock.monotonic(), 0))

    def _acknowledge(self, epoch: _Epoch, ticket: Ticket) -> None:
        """PUBACK over the connection that brought the message, and over no other."""
        connection = epoch.connection
        if connection is None:
            return
        for mid in epoch.window.complete(ticket):
            connection.confirm(mid)
        if not self._is_crowded(epoch.window):
            connection.resume()

    def _is_crowded(self, window: AckWindow) -> bool:
        """Whether more waits than agreed: some brokers ignore our Receive Maximum, and none knows of bytes."""
        limits = self._limits.session
        return len(window) > limits.unacknowledged_max or window.size_bytes > limits.unacknowledged_bytes_max

    async def _watch_window(self) -> None:
        """See to it that the window moves on."""
        age_max_s = self._limits.session.unacknowledged_age_max_s
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            epoch = self._epoch
            if epoch is None or epoch.connection is None:
                continue
            epoch.connection.resume()  # what a refusal waits for may be a PUBACK that we do not read
            if not self._durable:
                # A PUBACK waits for an answer, and all behind it wait with it; but not for ever.
                mids, late = epoch.window.complete_older(self._clock.monotonic() - age_max_s)
                self.metrics.acknowledged_early(late)
                for mid in mids:
                    epoch.connection.confirm(mid)
