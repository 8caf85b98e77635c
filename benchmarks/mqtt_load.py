"""`python -m benchmarks.mqtt_load PORT TENANT MODEL OPTIONS`: devices that ask, each over its own connection.

Closed loop: each device has `--window` requests under way until `--requests` are answered. Open loop: `--rate` requests
a second for `--seconds`, whatever the answers say. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import Counter
from typing import Any

import uvloop

from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

ANSWER_TIMEOUT_S = 60.0
TURN_S = 0.002
"""An open loop sends what is due this often."""


class Load:
    """All devices together."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._payload = bytes(options.bytes)
        self._user = {"ttl-ms": str(options.ttl_ms)} | ({"shape": options.shape} if options.shape else {})
        self._sent_at: dict[bytes, float] = {}
        self._next = 0
        self._run = os.urandom(8)  # or a later run would be answered with what an earlier one was told
        self._devices: list[tuple[str, str, Connection]] = []
        self._open_loop = bool(options.rate)
        self.latencies_ms: dict[str, list[float]] = {}
        self.done = asyncio.Event()
        self.answered = 0
        self.lost = 0

    async def connect(self) -> None:
        """Each device subscribes before it asks."""
        for number in range(self._options.devices):
            await self._connect(f"d{number}")

    async def _connect(self, name: str) -> None:
        def receive(message: Message) -> None:
            connection.acknowledge(message)
            self._answered(message, device)

        settings = ConnectionSettings(
            host="127.0.0.1", port=self._options.port, client_id=f"load-{self._options.tenant}-{name}"
        )
        connection = Connection(settings, on_message=receive, on_lost=lambda _reason: self._lose())
        await connection.open()
        reply_topic = topics.reply_topic(self._options.tenant, name, "load")
        await connection.subscribe(reply_topic)
        device = (topics.request_topic(self._options.tenant, name, self._options.model), reply_topic, connection)
        self._devices.append(device)

    async def run(self) -> dict[str, Any]:
        """Ask; returns what was seen."""
        began = time.perf_counter()
        if self._open_loop:
            await self._keep_rate()
        else:
            for device in self._devices:
                for _ in range(self._options.window):
                    self._ask(device)
            async with asyncio.timeout(ANSWER_TIMEOUT_S + self._options.requests / 100):
                await self.done.wait()
        seconds = time.perf_counter() - began
        for _topic, _reply, connection in self._devices:
            await connection.close()
        return {
            "seconds": seconds,
            "sent": self._next,
            "lost_connections": self.lost,
            "unanswered": len(self._sent_at),
            "statuses": Counter({status: len(values) for status, values in self.latencies_ms.items()}),
            "latency_ms": {status: summary(values) for status, values in self.latencies_ms.items()},
        }

    async def _keep_rate(self) -> None:
        options, began = self._options, time.perf_counter()
        total = int(options.rate * options.seconds)
        while self._next < total:
            due = min(total, int((time.perf_counter() - began) * options.rate) + 1)
            while self._next < due:
                self._ask(self._devices[self._next % len(self._devices)])
            await asyncio.sleep(TURN_S)
        # What was accepted late is answered within its time to live.
        until = time.perf_counter() + options.ttl_ms / 1e3 + 1.0
        while self._sent_at and time.perf_counter() < until:
            await asyncio.sleep(0.01)

    def _ask(self, device: tuple[str, str, Connection]) -> None:
        topic, reply_topic, connection = device
        self._next += 1
        correlation = self._run + self._next.to_bytes(8, "big")
        self._sent_at[correlation] = time.perf_counter()
        message = Message(
            topic=topic,
            payload=self._payload,
            qos=self._options.qos,
            content_type="application/octet-stream",
            correlation=correlation,
            response_topic=reply_topic,
            user=self._user,
        )
        connection.publish(message)

    def _answered(self, message: Message, device: tuple[str, str, Connection]) -> None:
        sent_at = self._sent_at.pop(message.correlation, None)
        if sent_at is None:  # a repetition
            return
        latency_ms = (time.perf_counter() - sent_at) * 1e3
        self.latencies_ms.setdefault(message.user.get("status", "none"), []).append(latency_ms)
        self.answered += 1
        if self._open_loop:
            return
        if self._next < self._options.requests:
            self._ask(device)
        elif not self._sent_at:
            self.done.set()

    def _lose(self) -> None:
        self.lost += 1
        self.done.set()


def summary(values: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {name: ordered[int(last * share)] for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("tenant")
    parser.add_argument("model")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--bytes", type=int, default=1024)
    parser.add_argument("--shape", default="")
    parser.add_argument("--qos", type=int, default=1)
    parser.add_argument("--ttl-ms", type=int, default=30_000)
    load = Load(parser.parse_args())
    await load.connect()
    print(json.dumps(await load.run()), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
