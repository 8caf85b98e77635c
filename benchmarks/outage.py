"""48 hours without the upstream broker: 172 800 messages wait on disk, then leave while devices go on asking.

Real parts: two Mosquitto brokers, a node with its ledger, devices that publish windows of a sensor (512 bytes) and one
that asks for answers. The messages of two days are sent as fast as the node takes them, one a second would take two
days; what counts is that all of them wait at once. *Live* is measured with the same load while the backlog is drained,
and, as what is normal, before the outage and behind the drain: requests over the device broker, and events of devices
that have no backlog, from the publish to the reader behind the upstream broker.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.outage_node import DEVICES, INPUT_VALUES, STREAM
from benchmarks.processes import LOAD_CPU, cpu_s, serve
from benchmarks.rows import Row
from edge_node.broker import Broker
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

MESSAGES, MESSAGES_QUICK = 172_800, 12_000
UNDER_WAY = 1024
"""Messages that the node has not executed yet: neither its broker nor its ledger need hold more."""
LIVE_PER_S = 50
LIVE_S, LIVE_S_QUICK = 20.0, 4.0
LIVE_DEVICES = 8
READER_START_S = 2.0
TIMEOUT_S = 300.0
PAYLOAD = bytes(4 * INPUT_VALUES)


@dataclass(slots=True)
class Live:
    """What the live load saw: requests, and events of streams without a backlog."""

    answers_ms: list[float] = field(default_factory=list)
    events_ms: list[float] = field(default_factory=list)


class Devices:
    """All devices, over one connection to the device broker; and who waits upstream for the live ones."""

    def __init__(self, port: int) -> None:
        self._connection = _connect(port, "devices", self._receive)
        self._upstream: Connection | None = None
        self._seq = itertools.count(1)
        self._asked: dict[bytes, float] = {}
        self._sent_at: dict[int, float] = {}
        self._progress = asyncio.Event()
        self._executed = 0
        self.live = Live()

    async def open(self) -> None:
        """Connect and hear answers and events."""
        await self._connection.open()
        await self._connection.subscribe("nc/v1/local/+/out/#", "nc/v1/local/asker/down/#")

    async def open_upstream(self, port: int) -> None:
        """Hear of the live streams behind the upstream broker."""
        self._upstream = _connect(port, "live", self._receive_upstream)
        await self._upstream.open()
        await self._upstream.subscribe(*(f"nc/v1/local/live{number}/out/#" for number in range(LIVE_DEVICES)))

    async def close(self) -> None:
        """Leave."""
        await self._connection.close()

    def _receive(self, message: Message) -> None:
        self._connection.acknowledge(message)
        if message.topic.endswith(f"/out/{STREAM.name}"):
            self._executed += 1
            self._progress.set()
        else:
            self.live.answers_ms.append((time.perf_counter() - self._asked.pop(message.correlation)) * 1e3)

    def _receive_upstream(self, message: Message) -> None:
        assert self._upstream is not None
        self._upstream.acknowledge(message)
        sent_at = self._sent_at.pop(json.loads(message.payload)["seq"], None)
        if sent_at is not None:
            self.live.events_ms.append((time.perf_counter() - sent_at) * 1e3)

    def _push(self, device: str) -> int:
        seq = next(self._seq)
        user = {"boot-id": "b", "seq": str(seq)}
        topic = f"nc/v1/local/{device}/up/data/{STREAM.name}"
        self._connection.publish(Message(topic=topic, payload=PAYLOAD, user=user))
        return seq

    async def push_all(self, count: int) -> tuple[int, int]:
        """Publish from all devices in turn, as fast as the node executes; returns the first and the last number."""
        began = self._executed
        first = last = 0
        for number in range(count):
            while number - (self._executed - began) >= UNDER_WAY:
                await self._wait()
            last = self._push(f"d{number % DEVICES}")
            first = first or last
        while self._executed < began + count:
            await self._wait()
        return first, last

    async def _wait(self) -> None:
        self._progress.clear()
        await asyncio.wait_for(self._progress.wait(), TIMEOUT_S)

    async def keep_live(self, is_over: Callable[[], bool]) -> Live:
        """A request and a window of a device without backlog, `LIVE_PER_S` times a second each."""
        live = self.live = Live()
        due = time.perf_counter()
        for number in itertools.count():
            if is_over():
                break
            correlation = number.to_bytes(8, "big")
            self._asked[correlation] = time.perf_counter()
            self._connection.publish(
                Message(
                    topic=topics.request_topic("local", "asker", STREAM.model),
                    payload=PAYLOAD,
                    correlation=correlation,
                    response_topic=topics.reply_topic("local", "asker", "live"),
                )
            )
            self._sent_at[self._push(f"live{number % LIVE_DEVICES}")] = time.perf_counter()
            due = max(due + 1 / LIVE_PER_S, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
        await _until(lambda: not self._asked and not self._sent_at)
        return live


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_measure(Path(folder), quick=quick))


async def _measure(folder: Path, *, quick: bool) -> list[Row]:
    device_broker = await Broker.start(folder / "devices")
    upstream = await Broker.start(folder / "upstream")
    try:
        (folder / "node").mkdir()
        arguments = (str(device_broker.port), str(upstream.port), str(folder / "node"))
        os.sched_setaffinity(0, {LOAD_CPU})
        with serve("benchmarks.outage_node", *arguments) as node:
            return await _outage(node["pid"], device_broker.port, upstream, folder / "node", quick=quick)
    finally:
        await device_broker.stop()
        await upstream.stop()


async def _outage(pid: int, device_port: int, upstream: Broker, folder: Path, *, quick: bool) -> list[Row]:
    count = MESSAGES_QUICK if quick else MESSAGES
    devices = Devices(device_port)
    await devices.open()
    await devices.open_upstream(upstream.port)
    await devices.push_all(4 * UNDER_WAY)  # warm: what the process takes at first is not the outage's doing
    await devices.keep_live(_after(1.0))
    normal = await devices.keep_live(_after(LIVE_S_QUICK if quick else LIVE_S))
    await _read(upstream.port, 1, 0)  # the reader's session outlives the outage

    await upstream.stop()
    rss_mb, rss_peak_mb = _rss_mb(pid), 0.0
    began, cpu_began = time.perf_counter(), cpu_s(pid)
    filling = asyncio.create_task(devices.push_all(count))
    while not filling.done():
        rss_peak_mb = max(rss_peak_mb, _rss_mb(pid))
        await asyncio.wait([filling], timeout=0.25)
    filled_s, filled_cpu_s = time.perf_counter() - began, cpu_s(pid) - cpu_began
    disk_mb = sum(path.stat().st_size for path in folder.glob("inbox.sqlite*")) / 1e6

    began_reading = asyncio.Event()
    reading = asyncio.create_task(_read(upstream.port, *filling.result(), began=began_reading))
    await asyncio.sleep(READER_START_S)
    if problem := await upstream.launch():
        raise RuntimeError(problem)
    await devices.open_upstream(upstream.port)
    cpu_began = cpu_s(pid)
    await asyncio.wait_for(began_reading.wait(), TIMEOUT_S)
    live = await devices.keep_live(reading.done)
    drained = await reading
    drain_cpu_s = cpu_s(pid) - cpu_began
    rss_peak_mb = max(rss_peak_mb, _rss_mb(pid))
    later = await devices.keep_live(_after(LIVE_S_QUICK if quick else LIVE_S))
    normal.answers_ms += later.answers_ms
    normal.events_ms += later.events_ms
    await devices.close()
    waited = f"{drained['mean_bytes']:.0f} B each; {filled_s:.0f} s to execute and store them"
    return [
        Row("outage.messages", count, "1", waited),
        Row("outage.disk_mb", disk_mb, "MB", "the ledger's files when all of them wait"),
        Row("outage.rss_growth_mb", rss_peak_mb - rss_mb, "MB", f"of the node, from {rss_mb:.0f} MB"),
        Row("outage.drained_per_s", (count - 1) / drained["seconds"], "1/s", f"{drain_cpu_s:.1f} s CPU of the node"),
        Row("outage.repeated", drained["repeated"], "1", "none is missing: the reader waits for each number"),
        Row("outage.out_of_order", drained["out_of_order"], "1", "within a stream"),
        Row("outage.answer_p95_ms", _p95(normal.answers_ms), "ms", "requests, without a backlog"),
        _over("outage.answer_p95_over_normal", live.answers_ms, normal.answers_ms),
        Row("outage.event_p95_ms", _p95(normal.events_ms), "ms", "events of live streams, without a backlog"),
        _over("outage.event_p95_over_normal", live.events_ms, normal.events_ms),
        Row("outage.filled_per_cpu_s", count / filled_cpu_s, "1/s", "executed and stored, by the node's CPU"),
    ]


async def _read(port: int, first: int, last: int, *, began: asyncio.Event | None = None) -> dict[str, Any]:
    """What the reader saw of the numbers `first` to `last`; `began` is set when it sees the first of them."""
    pipe = asyncio.subprocess.PIPE
    arguments = ("-m", "benchmarks.outage_reader", str(port), str(first), str(last))
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=pipe)
    assert process.stdout is not None
    report: dict[str, Any] = {}
    async with asyncio.timeout(TIMEOUT_S):
        async for line in process.stdout:
            report = json.loads(line)
            if began is not None:
                began.set()
        await process.wait()
    return report


def _connect(port: int, name: str, receive: Callable[[Message], None]) -> Connection:
    return Connection(ConnectionSettings(host="127.0.0.1", port=port, client_id=name), on_message=receive)


def _over(name: str, values: list[float], normal: list[float]) -> Row:
    note = f"{len(values)} while the backlog is drained, p95 {_p95(values):.2f} ms"
    return Row(name, _p95(values) / _p95(normal), "x", note)


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def _after(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.01)


def _rss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Rss:")).split()[1]) / 1e3
