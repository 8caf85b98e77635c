"""The shell around connection, inbox, executor and publisher. One per node, alone on its broker's requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from edge_node.mqtt.ack_window import AckWindow, Ticket
from edge_node.mqtt.admission import Refusal, Request, admit
from edge_node.mqtt.envelope import refusal_message, refusal_of
from edge_node.mqtt.executor import Executor
from edge_node.mqtt.ledger.ledger import Ledger, boot_identity
from edge_node.mqtt.ledger.records import Reply, Unanswered
from edge_node.mqtt.limits import MqttLimits
from edge_node.mqtt.management import Management
from edge_node.mqtt.metrics import MqttMetrics
from edge_node.mqtt.publisher import Publisher
from nearcast.backoff import full_jitter_s
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.handler import InferenceHandler, ModelDirectory
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

PRUNE_INTERVAL_S = 5.0
STABLE_AFTER_S = 5.0
"""A connection that lived this long was no flap: the next reconnect starts with the shortest wait again."""
FINISH_ATTEMPTS_MAX = 5
FINISH_RETRY_S = 0.2
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
    ) -> None:
        self._node = node
        self._host = host
        self._port = port
        self._limits = limits or MqttLimits()
        self._clock = clock
        self._filters = tuple(topics.request_filter(tenant) for tenant in tenants)
        self._boot = boot or boot_identity()
        self._management = management or Management(node, tenants[0], boot=self._boot)
        self.metrics = MqttMetrics(registry)
        self._inbox = Ledger(inbox, node=node, boot=self._boot, limits=self._limits)
        self._executor = Executor(handler, directory, limits=self._limits, clock=clock)
        self._publisher = Publisher(self._inbox, self._limits, clock, on_drop=self.metrics.dropped)
        self._pending = 0
        self._pending_bytes = 0
        self._draining = False
        self._suspects = asyncio.Lock()
        self._online = asyncio.Event()
        self._epoch: _Epoch | None = None
        self._running: set[asyncio.Task[None]] = set()
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
        await self._publisher.recover(recovered.outbox["device"])
        for unanswered in recovered.requests:
            self._reserve(len(unanswered.payload))
            self._spawn(self._resume(unanswered))
        if recovered.requests or recovered.outbox["device"]:
            _log.info("recovered", requests=len(recovered.requests), topics=len(recovered.outbox["device"]))
        create = asyncio.get_running_loop().create_task
        self._services = [create(self._stay_connected()), create(self._prune()), create(self._management.watch())]

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
        for task in [*self._services, *self._running]:
            task.cancel()
        await asyncio.gather(*self._services, *self._running, return_exceptions=True)
        if epoch is not None and epoch.connection is not None:
            with contextlib.suppress(MeshError):
                epoch.connection.publish(self._management.presence("offline"))
            await epoch.connection.close()
        await self._inbox.close()

    async def _settle(self) -> None:
        while self._running:
            await asyncio.wait(set(self._running))
        if self._online.is_set():
            await self._publisher.settled()

    # -- the connection -----------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        attempt = 0
        generator = random.Random()
        while True:
            since = self._clock.monotonic()
            try:
                await self._live()
            except (MeshError, TimeoutError) as error:
                level = _log.warning if attempt == 0 else _log.debug
                level("no broker", host=self._host, port=self._port, error=str(error))
            finally:
                self._online.clear()
                self.metrics.connected(up=False)
                self._publisher.detach()
                self._management.detach()
            attempt = 0 if self._clock.monotonic() - since > STABLE_AFTER_S else attempt + 1
            limits = self._limits
            base_s, max_s = limits.reconnect_base_s, limits.reconnect_max_s
            await asyncio.sleep(full_jitter_s(attempt, generator, base_s=base_s, max_s=max_s))

    async def _live(self) -> None:
        """One epoch: from the CONNECT to the loss."""
        epoch = _Epoch()

        def lost(reason: str) -> None:
            _log.warning("broker lost", reason=reason)
            epoch.lost.set()

        epoch.connection = connection = Connection(
            self._settings(),
            on_message=lambda message: self._receive(epoch, message),
            on_published=lambda mid, taken: self._publisher.confirmed(mid, taken=taken),
            on_lost=lost,
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
        self._publisher.attach(connection)
        self._online.set()
        self.metrics.connected(up=True)
        _log.info("broker connected", host=self._host, port=self._port)
        await epoch.lost.wait()

    def _settings(self) -> ConnectionSettings:
        limits = self._limits
        return ConnectionSettings(
            host=self._host,
            port=self._port,
            client_id=f"nearcast-{self._node}",
            session_expiry_s=limits.session_expiry_s,
            receive_max=limits.unacknowledged_max,
            packet_bytes_max=2 * limits.payload_bytes_max,
            keepalive_s=limits.keepalive_s,
            connect_timeout_s=limits.connect_timeout_s,
            will=self._management.presence("offline"),
            will_delay_s=limits.will_delay_s,
        )

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(PRUNE_INTERVAL_S)
            with contextlib.suppress(MeshError):
                while await self._inbox.prune(self._clock.monotonic()):
                    pass

    # -- one message --------------------------------------------------------------------------------------------------

    def _receive(self, epoch: _Epoch, message: Message) -> None:
        if self._draining:
            return  # not acknowledged, so it comes again after the restart
        ticket = epoch.window.open(message)
        if message.topic == self._management.wishes:
            self._management.receive(message)
            self._acknowledge(epoch, ticket)
            return
        if len(epoch.window) >= self._limits.unacknowledged_max and epoch.connection is not None:
            epoch.connection.pause()  # some brokers ignore our Receive Maximum
        verdict = admit(message, self._clock.monotonic(), self._limits, nonce=os.urandom(16))
        if isinstance(verdict, Refusal):
            self._refuse(verdict)
            self._acknowledge(epoch, ticket)
        else:
            self._spawn(self._serve(epoch, ticket, verdict, message.payload))

    async def _serve(self, epoch: _Epoch, ticket: Ticket, request: Request, payload: bytes) -> None:
        has_room = self._has_room(len(payload))
        self._reserve(len(payload))
        row = 0
        try:
            row = await self._admit(epoch, ticket, request, payload, has_room=has_room)
            if row:
                await self._answer(row, request, payload)
        finally:
            self._release(len(payload))

    async def _admit(self, epoch: _Epoch, ticket: Ticket, request: Request, payload: bytes, *, has_room: bool) -> int:
        """Store a request, then acknowledge it; returns its row, or 0 if there is nothing to execute."""
        try:
            admission = await self._inbox.accept(request, payload, has_room=has_room)
        except MeshError as error:
            self._refuse(self._refusal(request, error.code, error.message))
            self._acknowledge(epoch, ticket)
            return 0
        self._acknowledge(epoch, ticket)
        match admission.verdict:
            case "accept":
                return admission.id
            case "replay" if admission.replay is not None:
                self.metrics.replayed()
                self._publisher.send(admission.replay)
            case "conflict":
                reason = "This correlation belongs to a different request; use a new one for each request."
                self._refuse(self._refusal(request, Code.CONFLICT, reason))
            case "full":
                reason = "The node's queue is full; send the same request again later."
                self._refuse(self._refusal(request, Code.OVERLOADED, reason))
            case _:
                self.metrics.replayed()
        return 0

    def _acknowledge(self, epoch: _Epoch, ticket: Ticket) -> None:
        """PUBACK over the connection that brought the message, and over no other."""
        connection = epoch.connection
        for message in epoch.window.complete(ticket):
            if connection is not None:
                connection.acknowledge(message)
        if connection is not None and len(epoch.window) <= self._limits.unacknowledged_max // 2:
            connection.resume()

    async def _answer(self, row: int, request: Request, payload: bytes) -> None:
        reply = await self._executor.answer(request, payload)
        await self._finish(row, request, reply)

    async def _finish(self, row: int, request: Request, reply: Reply, *, buried: str = "") -> None:
        for _ in range(FINISH_ATTEMPTS_MAX):
            try:
                outgoing = await self._inbox.finish(row, reply, self._clock.monotonic(), buried=buried)
            except MeshError:
                await asyncio.sleep(FINISH_RETRY_S)
                continue
            self.metrics.answered(reply.user["status"], self._clock.monotonic() - request.arrived)
            for each in outgoing:
                self._publisher.send(each)
            return
        _log.error("an answer could not be stored; the request runs again after a restart", model=request.model)

    async def _resume(self, unanswered: Unanswered) -> None:
        """Finish a request that a former life had accepted."""
        request = unanswered.request
        try:
            if not unanswered.same_boot:
                now = self._clock.monotonic()
                request = msgspec.structs.replace(request, arrived=now, deadline=now)
            if unanswered.attempts >= self._limits.attempts_max:
                reason = f"The node crashed {unanswered.attempts} times while it ran this request."
                await self._finish(unanswered.id, request, self._executor.quarantined(request), buried=reason)
            elif unanswered.attempts:
                async with self._suspects:  # one at a time, so that a crash has one culprit
                    await self._inbox.begin(unanswered.id)
                    await self._answer(unanswered.id, request, unanswered.payload)
            else:
                await self._answer(unanswered.id, request, unanswered.payload)
        finally:
            self._release(len(unanswered.payload))

    # -- bounds -------------------------------------------------------------------------------------------------------

    def _has_room(self, size_bytes: int) -> bool:
        limits = self._limits
        return self._pending < limits.pending_max and self._pending_bytes + size_bytes <= limits.pending_bytes_max

    def _reserve(self, size_bytes: int) -> None:
        self._pending += 1
        self._pending_bytes += size_bytes
        self.metrics.pending(self._pending)

    def _release(self, size_bytes: int) -> None:
        self._pending -= 1
        self._pending_bytes -= size_bytes
        self.metrics.pending(self._pending)

    def _refusal(self, request: Request, code: Code, reason: str) -> Refusal:
        later = self._limits.retry_after_ms if code in (Code.OVERLOADED, Code.UNAVAILABLE) else None
        return refusal_of(request, CATALOGUE[code].http, code, reason, retry_after_ms=later)

    def _refuse(self, refusal: Refusal) -> None:
        self.metrics.refused(refusal.status)
        if not refusal.topic:
            _log.warning("a message on an unknown topic was dropped", reason=refusal.reason)
            return
        expires = self._clock.monotonic() + self._limits.expired_notice_s
        self._publisher.notify(refusal_message(refusal), expires)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
