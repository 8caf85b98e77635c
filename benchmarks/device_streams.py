"""Streams of devices through a real broker: sound through stateful models while the node is killed, and a backlog.

*voice*: spoken words go in messages of 50 ms to a node with Silero VAD, which is killed with SIGKILL while it listens.
Every score is compared with the model's own, run on the whole recording without our code. *wake*: the phrase in several
loudnesses and noises, and other sounds, to a wake-word model with hidden state. *drain*: a node starts with many
messages of ten devices in its ledger, while another device sends live.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
import time
import wave
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.processes import cpu_s
from benchmarks.rows import Row
from benchmarks.serving_models import workloads
from edge_node.broker import Broker
from edge_node.mqtt.ledger.ledger import Ledger, boot_identity
from edge_node.mqtt.ledger.records import Input
from edge_node.mqtt.limits import LedgerLimits
from nearcast.cli.demo.models.wake_word.record import extract_features
from nearcast.cli.demo.samples import MODELS, load_clips
from nearcast.client.mqtt import MqttDevice
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

MODULE = "benchmarks.device_streams_node"
MESSAGE_SAMPLES = 800
WINDOW, HOP = 576, 512
BACKLOG_DEVICES = 10
AHEAD_MAX = 20
"""Messages of speech on their way."""
LIVE_INTERVAL_S = 0.02
WAIT_S = 60.0


def run(*, quick: bool) -> list[Row]:
    """Voice, wake word, backlog."""
    return asyncio.run(_run(quick))


async def _run(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        broker = await Broker.start(root / "broker", kind="mosquitto")
        try:
            rows = await measure_voice(broker.port, root, plays=8 if quick else 40, kills=2 if quick else 20)
            rows += await measure_wake(broker.port, root, takes=5 if quick else 40)
            return rows + await measure_drain(broker.port, root, count=10_000 if quick else 100_000)
        finally:
            await broker.stop()


class Node:
    """The node as a process that can be killed."""

    def __init__(self, port: int, kind: str, root: Path) -> None:
        self._command = [sys.executable, "-m", MODULE, str(port), kind, str(root)]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Returns once it is connected to the broker."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        if not await self._process.stdout.readline():
            raise RuntimeError(f"{MODULE} ended before it was ready")

    async def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def reading(port: int, topic: str, hear: Callable[[dict[str, Any], float], None]) -> AsyncIterator[None]:
    """Hand each event on `topic` to `hear`, with the instant of its arrival."""

    def receive(message: Message) -> None:
        hear(json.loads(message.payload), time.perf_counter())
        connection.acknowledge(message)

    settings = ConnectionSettings(host="127.0.0.1", port=port, client_id=f"reader-{random.random()}")
    connection = Connection(settings, on_message=receive)
    await connection.open()
    await connection.subscribe(topic)
    try:
        yield
    finally:
        await connection.close()


async def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> bool:
    """Wait for a condition; whether it came true in time."""
    until_s = time.perf_counter() + timeout_s
    while not condition() and time.perf_counter() < until_s:
        await asyncio.sleep(0.01)
    return condition()


# -- voice ------------------------------------------------------------------------------------------------------------


def read_recording() -> npt.NDArray[np.int16]:
    """16 kHz samples of the spoken phrase."""
    with wave.open(str(MODELS / "wake_word" / "okay_nabu.wav")) as file:
        return np.frombuffer(file.readframes(10**7), "<i2")


def score_directly(samples: npt.NDArray[np.int16]) -> list[float]:
    """The probabilities of speech that the model gives for each 32 ms, with no code of ours in between."""
    import onnxruntime

    silero = next(each for each in workloads() if each.name == "silero")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(silero.make(), options, providers=["CPUExecutionProvider"])
    signal = np.concatenate((np.zeros(WINDOW - HOP), samples / 32768)).astype(np.float32)
    state, scores = np.zeros((2, 1, 128), np.float32), []
    for at in range(0, len(signal) - WINDOW + 1, HOP):
        output, state = session.run(["output", "stateN"], {"input": signal[None, at : at + WINDOW], "state": state})
        scores.append(round(float(output[0, 0]), 6))
    return scores


async def measure_voice(port: int, root: Path, *, plays: int, kills: int) -> list[Row]:
    """A device speaks `plays` times without a pause, while the node is killed `kills` times."""
    samples = np.tile(read_recording(), plays)
    messages = [samples[at : at + MESSAGE_SAMPLES] for at in range(0, len(samples), MESSAGE_SAMPLES)]
    heard: dict[int, list[dict[str, Any]]] = defaultdict(list)
    node = Node(port, "audio", root)

    async def speak() -> None:
        async with MqttDevice(f"mqtt://127.0.0.1:{port}/local/microphone") as device:
            for spoken, message in enumerate(messages):
                while spoken > len(heard) + AHEAD_MAX:  # so that every life of the node has something to hear
                    await asyncio.sleep(0.005)
                await device.send("voice", message.tobytes())

    generator = random.Random(1)
    await node.start()
    async with reading(port, "nc/v1/local/microphone/out/voice", lambda body, _: heard[body["seq"]].append(body)):
        speaking = asyncio.create_task(speak())
        for number in range(kills):
            goal = len(messages) * (number + generator.random()) / (kills + 1)
            await until(lambda goal=goal: len(heard) >= goal)  # type: ignore[misc]
            await node.kill()
            await node.start()
        await speaking
        await until(lambda: len(heard) == len(messages))
        await asyncio.sleep(0.5)
    await node.kill()
    scores = [result["score"] for seq in sorted(heard) for result in heard[seq][0]["results"]]
    expected = score_directly(samples)
    differences = sum(a != b for a, b in zip(scores, expected, strict=False)) + abs(len(scores) - len(expected))
    several = sum(len({json.dumps(body) for body in bodies}) > 1 for bodies in heard.values())
    repeats = sum(len(bodies) - 1 for bodies in heard.values())
    length = len(expected) // plays
    missed = sum(max(scores[at : at + length], default=0.0) < 0.5 for at in range(0, length * plays, length))
    return [
        Row(
            "device_streams.voice_messages",
            len(messages),
            "",
            f"of 50 ms; {kills} kills of the node; {repeats} events came twice",
        ),
        Row("device_streams.voice_lost", len(messages) - len(heard), "", "messages without an event"),
        Row(
            "device_streams.voice_differences",
            differences,
            "",
            f"of {len(expected)} scores from those of the model alone",
        ),
        Row("device_streams.voice_different_events", several, "", "for one message"),
        Row("device_streams.voice_phrases_missed", missed, "", f"of {plays}"),
    ]


# -- wake word --------------------------------------------------------------------------------------------------------


def make_takes(count: int) -> tuple[list[npt.NDArray[np.int8]], list[npt.NDArray[np.int8]]]:
    """Features of the phrase in several loudnesses and noises; and of the phrase backwards, noise, another phrase."""
    rng, samples = np.random.default_rng(3), read_recording().astype(np.float64)
    phrases: list[npt.NDArray[np.int8]] = []
    others = [load_clips()["hey_jarvis"]]
    for _ in range(count):
        noise = rng.standard_normal(len(samples)) * rng.uniform(5, 60)
        for clean, takes in ((samples, phrases), (samples[::-1], others), (0 * samples, others)):
            mixed = clean * rng.uniform(0.3, 1.0) + noise
            takes.append(extract_features(mixed.clip(-32768, 32767).astype(np.int16)))
    return phrases, others


async def measure_wake(port: int, root: Path, *, takes: int) -> list[Row]:
    """Every take is a stream of its own."""
    phrases, others = make_takes(takes)
    heard: set[str] = set()

    def hear(body: dict[str, Any], _: float) -> None:
        if body["results"]:
            heard.add(body["device"])

    node = Node(port, "audio", root)
    await node.start()
    async with reading(port, "nc/v1/local/+/out/wake", hear):
        for kind, clips in (("phrase", phrases), ("other", others)):
            for number, clip in enumerate(clips):
                async with MqttDevice(f"mqtt://127.0.0.1:{port}/local/{kind}-{number}") as device:
                    for at in range(0, len(clip), 5):
                        await device.send("wake", clip[at : at + 5].tobytes())
        await until(lambda: sum(name.startswith("phrase") for name in heard) == len(phrases), timeout_s=5.0)
    await node.kill()
    hits = sum(name.startswith("phrase") for name in heard)
    return [
        Row("device_streams.wake_missed", len(phrases) - hits, "", f"of {len(phrases)} takes of the phrase, in noise"),
        Row("device_streams.wake_false", len(heard) - hits, "", f"of {len(others)} takes of other sounds"),
    ]


# -- backlog ----------------------------------------------------------------------------------------------------------


async def fill_ledger(path: Path, count: int) -> None:
    """What ten devices sent while nobody executed it, in turns."""
    ledger = Ledger(path, boot=boot_identity(), limits=LedgerLimits())
    await ledger.open(time.monotonic())
    payload = np.linspace(0, 16, 64, dtype=np.float32).tobytes()
    orders: list[asyncio.Future[Any]] = []
    for number in range(count):
        device, seq = f"late-{number % BACKLOG_DEVICES}", number // BACKLOG_DEVICES + 1
        item = Input(tenant="local", device=device, stream="digit", boot="b", seq=seq, ts="", arrived=time.monotonic())
        orders.append(ledger.take(item, payload))
        if len(orders) == 512:
            await asyncio.gather(*orders)
            orders.clear()
    await asyncio.gather(*orders)
    await ledger.close()


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return math.nan


class Watch:
    """What the reader of all events sees."""

    def __init__(self) -> None:
        self.late: dict[str, list[int]] = defaultdict(list)
        self.count = 0
        self.first = self.last = 0.0
        self.sent: dict[int, float] = {}
        self.latencies_ms: list[tuple[float, float]] = []

    def hear(self, body: dict[str, Any], now: float) -> None:
        """One event."""
        if body["device"] == "live":
            if (sent := self.sent.pop(body["seq"], None)) is not None:
                self.latencies_ms.append((now, (now - sent) * 1e3))
            return
        self.late[body["device"]].append(body["seq"])
        self.count += 1
        self.first, self.last = self.first or now, now

    def p95_ms(self, *, draining: bool) -> float:
        """Of the live messages whose events came while the backlog was drained, or afterwards."""
        found = [each for at, each in self.latencies_ms if (at <= self.last) == draining]
        return statistics.quantiles(found, n=20)[-1] if len(found) > 1 else math.nan


async def measure_drain(port: int, root: Path, *, count: int) -> list[Row]:
    """A node starts with `count` messages to execute, while a device sends 50 live ones a second."""
    path = root / "cheap" / "inbox.sqlite"
    path.parent.mkdir()
    await fill_ledger(path, count)
    watch, node, payload = Watch(), Node(port, "cheap", root), bytes(256)
    ending = asyncio.Event()

    async def send_live() -> None:
        seq = 0
        async with MqttDevice(f"mqtt://127.0.0.1:{port}/local/live") as device:
            while not ending.is_set():
                seq += 1
                watch.sent[seq] = time.perf_counter()
                await device.send("digit", payload)
                await asyncio.sleep(LIVE_INTERVAL_S)

    async with reading(port, "nc/v1/local/+/out/digit", watch.hear):
        await node.start()
        used_s, memory_mb = cpu_s(node.pid), rss_mb(node.pid)
        began, counted = time.perf_counter(), watch.count
        live, peak_mb = asyncio.create_task(send_live()), memory_mb
        while watch.count < count and time.perf_counter() - began < 4 * WAIT_S:
            await asyncio.sleep(0.05)
            peak_mb = max(peak_mb, rss_mb(node.pid))
        used_s = cpu_s(node.pid) - used_s
        took_s = watch.last - began
        await asyncio.sleep(4.0)
        ending.set()
        await live
    await node.kill()
    drained = watch.count - counted
    return [
        Row("device_streams.drain_per_s", drained / took_s, "1/s", f"{drained} messages of {BACKLOG_DEVICES} streams"),
        Row("device_streams.drain_per_core", drained / used_s, "1/s", "per second of the node's processor time"),
        Row("device_streams.drain_lost", count - watch.count, ""),
        Row("device_streams.drain_reordered", sum(seqs != sorted(seqs) for seqs in watch.late.values()), "streams"),
        Row("device_streams.drain_rss_growth_mb", peak_mb - memory_mb, "MB"),
        *live_rows(watch),
    ]


def live_rows(watch: Watch) -> Sequence[Row]:
    """How live messages fared beside the backlog."""
    meanwhile, alone = watch.p95_ms(draining=True), watch.p95_ms(draining=False)
    return [
        Row(
            "device_streams.drain_live_p95_ms",
            meanwhile,
            "ms",
            "from the send to the event, while the backlog is drained",
        ),
        Row("device_streams.drain_live_p95_ratio", meanwhile / alone, "x", f"to {alone:.2f} ms afterwards"),
    ]
