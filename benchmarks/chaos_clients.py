"""Devices that use our own client: they ask and stream through every outage, and leave the patience to it."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from dataclasses import dataclass, field

import numpy as np

from benchmarks.chaos_devices import TENANT, TTL_S, answer_of
from benchmarks.chaos_history import History, body_of
from benchmarks.chaos_node import MODEL, STREAM, TALLY_WIDTH
from nearcast.backoff import ReconnectLimits
from nearcast.client.mqtt import MqttDevice
from nearcast.client.mqtt_limits import DeviceLimits
from nearcast.errors import MeshError
from nearcast.transport.mqtt.content_types import OCTETS

LIMITS = DeviceLimits(reconnect=ReconnectLimits(max_s=0.5), silence_s=1.0, silence_s_max=2.0)
SAMPLES_AT_ONCE_MAX = 20


@dataclass(slots=True)
class Client:
    """One device: requests and the stream `STREAM`, each `rate_hz` times a second.

    Attributes:
        pending: what its client has not finished yet.
    """

    name: str
    port: int
    history: History
    draw: random.Random
    rate_hz: float
    pending: set[asyncio.Task[None]] = field(default_factory=set)
    is_asking: bool = True
    _sent: int = 0

    async def run(self) -> None:
        """Live until cancelled."""
        url = f"mqtt://127.0.0.1:{self.port}/{TENANT}/{self.name}"
        async with MqttDevice(url, limits=LIMITS) as device, asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self.draw.expovariate(self.rate_hz))
                if self.is_asking and len(self.pending) < SAMPLES_AT_ONCE_MAX:
                    for work in (self._ask(device), self._send(device)):
                        task = group.create_task(work)
                        self.pending.add(task)
                        task.add_done_callback(self.pending.discard)

    async def _ask(self, device: MqttDevice) -> None:
        correlation = uuid.UUID(int=self.draw.getrandbits(128), version=4).bytes
        key = correlation.hex()
        self.history.note("asked", device=self.name, key=key, deadline=time.monotonic() + TTL_S)
        try:
            reply = await device.ask(MODEL, body_of(self.name, key), OCTETS, deadline_ms=1e3 * TTL_S, key=correlation)
        except MeshError:
            return  # no answer: the history shows it
        self.history.add(answer_of(self.name, reply))

    async def _send(self, device: MqttDevice) -> None:
        sample = sample_of(0.0)
        self._sent += 1  # as the client counts, which numbers a sample before it waits for anything
        key = f"{STREAM}/{device._boot_id}/{self._sent}"
        self.history.note("sent", device=self.name, key=key)
        await device.send(STREAM, sample)
        self.history.note("kept", device=self.name, key=key)


def sample_of(value: float) -> bytes:
    """One message of the stream `STREAM`."""
    return np.full(TALLY_WIDTH, value, np.float32).tobytes()
