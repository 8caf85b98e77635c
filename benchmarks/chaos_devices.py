"""Devices that ask, ask again, repeat themselves, and write down what they see."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field

import msgspec

from benchmarks.chaos_history import BODY_BYTES, Event, History, body_of, digest_of
from benchmarks.chaos_judge import COME_AGAIN, PATIENT_S
from benchmarks.chaos_node import MODEL
from nearcast.errors import MeshError
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

TENANT = "local"
TTL_S = 3 * PATIENT_S
HASTY_TTL_S = (0.1, 1.0)
RESEND_S = 1.0
PATIENT_SHARE = 0.6
DUPLICATE_SHARE = 0.1
DUPLICATE_AFTER_S = (0.0, 0.0, 0.05, 0.4)
"""A repetition comes at once, while the request runs, or after its answer; one in five waits for a restart instead."""
RECONNECT_S = (0.02, 0.3)
SIZES_BYTES = (BODY_BYTES, 64, 1024)


@dataclass(slots=True)
class Asked:
    """A request without an answer."""

    message: Message
    deadline: float
    sent: float = 0.0


@dataclass(slots=True)
class Device:
    """One device. Two of three keep a request until it is answered (`patient`), some have a session at the broker.

    Attributes:
        restarted: set and cleared by the run at each restart of the node.
    """

    name: str
    port: int
    history: History
    draw: random.Random
    rate_hz: float
    restarted: asyncio.Event
    session_expiry_s: int = 0
    pending: dict[str, Asked] = field(default_factory=dict)
    is_asking: bool = True
    _connection: Connection | None = None
    _lost: asyncio.Event = field(default_factory=asyncio.Event)
    _running: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Live until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._stay_connected())
                group.create_task(self._ask_on())
                group.create_task(self._resend_on())
        finally:
            for task in self._running:
                task.cancel()
            if self._connection is not None:
                await self._connection.close(flush_timeout_s=0.0)

    async def _stay_connected(self) -> None:
        while True:
            self._lost = asyncio.Event()
            settings = ConnectionSettings(
                host="127.0.0.1",
                port=self.port,
                client_id=f"device-{self.name}",
                session_expiry_s=self.session_expiry_s,
                connect_timeout_s=1.0,
            )
            connection = Connection(settings, on_message=self._answered, on_lost=lambda _reason: self._lost.set())
            try:
                await connection.open()
                self._connection = connection
                await connection.subscribe(f"nc/v1/{TENANT}/{self.name}/down/#")
                self._resend(0.0)
                await self._lost.wait()
            except (MeshError, TimeoutError):
                await connection.close(flush_timeout_s=0.0)
            self._connection = None
            await asyncio.sleep(self.draw.uniform(*RECONNECT_S))

    async def _ask_on(self) -> None:
        while True:
            await asyncio.sleep(self.draw.expovariate(self.rate_hz))
            if self.is_asking:
                self._ask()

    async def _resend_on(self) -> None:
        while True:
            await asyncio.sleep(RESEND_S / 4)
            self._resend(RESEND_S)

    @property
    def is_connected(self) -> bool:
        """Whether what it sends now leaves it."""
        return self._connection is not None

    def _ask(self) -> None:
        chance = self.draw.random()
        if not self.is_connected and chance >= PATIENT_SHARE:
            return  # it would leave without having been heard
        ttl_s = TTL_S if chance < 0.9 else self.draw.uniform(*HASTY_TTL_S)
        message = self.request(ttl_s)
        sent = self.ask(message, ttl_s, is_patient=chance < PATIENT_SHARE)
        if sent and self.draw.random() < DUPLICATE_SHARE:
            self._spawn(self._repeat(message))

    def ask(self, message: Message, ttl_s: float = TTL_S, *, is_patient: bool = True) -> bool:
        """Send a request for the first time; whether it left."""
        key, now = message.correlation.hex(), time.monotonic()
        self.history.note("asked", device=self.name, key=key, deadline=now + ttl_s, once=not is_patient)
        if is_patient:
            self.pending[key] = Asked(message, now + ttl_s, now)
        return self._send(message)

    def again(self, message: Message) -> None:
        """Send a request once more, as a device does that does not know whether it was heard."""
        if self._send(message):
            self.history.note("again", device=self.name, key=message.correlation.hex())

    def request(self, ttl_s: float = TTL_S, *, body: bytes = b"") -> Message:
        """A new request, with the body that shows whose it is, or another."""
        correlation = uuid.UUID(int=self.draw.getrandbits(128), version=4).bytes
        body = body or body_of(self.name, correlation.hex()).ljust(self.draw.choice(SIZES_BYTES), b"\0")
        return Message(
            topic=f"nc/v1/{TENANT}/{self.name}/up/infer/{MODEL}",
            payload=body,
            content_type="application/octet-stream",
            correlation=correlation,
            response_topic=f"nc/v1/{TENANT}/{self.name}/down/reply/chaos",
            user={"ttl-ms": str(round(1000 * ttl_s))},
        )

    async def _repeat(self, message: Message) -> None:
        if self.draw.random() < 0.2:
            await self.restarted.wait()
        await asyncio.sleep(self.draw.choice(DUPLICATE_AFTER_S))
        self.again(message)

    def _resend(self, older_s: float) -> None:
        """Ask again what has no answer, with what is left of its time."""
        now = time.monotonic()
        for key, asked in list(self.pending.items()):
            if now >= asked.deadline:
                del self.pending[key]
            elif now - asked.sent >= older_s:
                left_ms = str(round(1000 * (asked.deadline - now)))
                self.again(msgspec.structs.replace(asked.message, user={"ttl-ms": left_ms}))
                asked.sent = now

    def _send(self, message: Message) -> bool:
        if self._connection is None:
            return False
        with contextlib.suppress(MeshError):
            self._connection.publish(message)
            return True
        return False

    def _answered(self, message: Message) -> None:
        event = answer_of(self.name, message)
        self.history.add(event)
        if event.status not in COME_AGAIN:
            self.pending.pop(event.key, None)
        if self._connection is not None:
            self._connection.acknowledge(message)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)


def answer_of(device: str, message: Message) -> Event:
    """The event that an answer is for the device that gets it now."""
    return Event(
        at=time.monotonic(),
        kind="answered",
        device=device,
        key=message.correlation.hex(),
        status=int(message.user.get("status", "0")),
        digest=digest_of(message.payload, message.content_type, message.user.items()),
        body=message.payload[:BODY_BYTES].hex(),
        marked=message.user.get("dedup") == "1",
    )
