"""Requests over MQTT beside the floor of the bus: what a node adds, costs, batches and refuses.

The floor is a process that sends each message back and does nothing else, behind the same broker in the same minute;
the disk floor commits each message to SQLite first, and the paho floor is written with paho-mqtt, as most responders
are. A node has one core; the broker and the devices share another. All ask with QoS 1 and 1 KiB. `durable` = accepted
requests are on disk before the broker may forget them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from benchmarks.processes import LOAD_CPU, cpu_s, serve
from benchmarks.rows import Row
from edge_node.broker import Broker
from edge_node.broker.process import mosquitto_path

PATHS = {
    "noop_volatile": ("noop", "none"),
    "noop_durable": ("noop", "full"),
    "digits_volatile": ("digits", "none"),
    "digits_durable": ("digits", "full"),
}
FLOORS = ("floor", "disk_floor", "paho_floor")
DEVICES, WINDOW = 64, 1
CAPACITY_RPS, OVERLOAD = 200, 5
PENDING = 256
LOAD_TIMEOUT_S = 300.0


def run(*, quick: bool) -> list[Row]:
    """Latency and cost of four ways through a node, batching across devices, and overload."""
    if mosquitto_path() is None:
        return [Row("mqtt.skipped_no_mosquitto", 1, "", "install mosquitto to measure")]
    with tempfile.TemporaryDirectory() as name, broker(Path(name)) as port:
        parts = (ways, batching, overload)
        return [row for part in parts for row in part(port, Path(name), quick=quick)]


@contextlib.contextmanager
def broker(folder: Path) -> Iterator[int]:
    """A Mosquitto of our own; yields its port."""
    with asyncio.Runner() as runner:
        running = runner.run(Broker.start(folder / "broker", kind="mosquitto"))
        try:
            yield running.port
        finally:
            runner.run(running.stop())


@contextlib.contextmanager
def node(port: int, folder: Path, tenant: str, kind: str, *options: str) -> Iterator[int]:
    """A node of its own tenant on a core of its own; yields its process id."""
    place = folder / tenant
    place.mkdir()
    with serve("benchmarks.mqtt_node", str(port), tenant, kind, str(place), *options) as ready:
        yield ready["pid"]


def load(port: int, tenant: str, model: str, **options: float | str) -> dict[str, Any]:
    """Let devices ask; returns what they saw.

    Raises:
        RuntimeError: if the load did not come to its end.
    """
    told = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    shape = ["--shape", "4,64"] if model == "digits" else []
    command = ["taskset", "-c", str(LOAD_CPU), sys.executable, "-m", "benchmarks.mqtt_load", str(port), tenant, model]
    done = subprocess.run(
        [*command, *shape, *told], capture_output=True, text=True, check=False, timeout=LOAD_TIMEOUT_S
    )
    if done.returncode:
        raise RuntimeError(f"the load on {tenant} failed: {done.stderr[-2000:]}")
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def answers(seen: dict[str, Any]) -> int:
    """How many predictions came. A few refusals are the router's right; a load that is mostly refused is not a row."""
    count: int = seen["statuses"].get("200", 0)
    if count < 0.9 * seen["sent"]:
        raise RuntimeError(f"of {seen['sent']} requests these were answered: {seen['statuses']}")
    return count


# -- latency and cost -----------------------------------------------------------------------------------------------


def ways(port: int, folder: Path, *, quick: bool) -> list[Row]:
    """Each way beside the floor, in turn, one request at a time; then as many as a core serves."""
    rounds, single, many = (3, 300, 1_500) if quick else (9, 2_000, 12_000)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in (*FLOORS, *PATHS)}
    per_core: dict[str, list[float]] = {name: [] for name in PATHS}
    with contextlib.ExitStack() as stack:
        pids = {
            name: stack.enter_context(node(port, folder, name, kind, "--durability", durability))
            for name, (kind, durability) in PATHS.items()
        }
        stack.enter_context(node(port, folder, "floor", "echo", "--durability", "none"))
        stack.enter_context(node(port, folder, "disk_floor", "echo"))
        stack.enter_context(node(port, folder, "paho_floor", "paho"))
        for name, (model, _) in PATHS.items():
            load(port, name, model, requests=500 if quick else 2_000)
        for _ in range(rounds):
            for name, values in seen.items():
                result = load(port, name, PATHS.get(name, ("echo",))[0], requests=single)
                answers(result)
                values.append(result["latency_ms"]["200"])
        for _ in range(2 if quick else 5):
            for name, (model, _) in PATHS.items():
                before_s = cpu_s(pids[name])
                result = load(port, name, model, devices=DEVICES, window=WINDOW, requests=many)
                per_core[name].append(answers(result) / (cpu_s(pids[name]) - before_s))
    rows = []
    for name, values in seen.items():
        for quantile in ("p50", "p99"):
            rows.append(Row(f"mqtt.{name}_{quantile}_ms", statistics.median(each[quantile] for each in values), "ms"))
            if name in PATHS:
                rows.append(Row(f"mqtt.{name}_{quantile}_over_floor", ratio(values, seen["floor"], quantile), "x"))
                value = ratio(values, seen["paho_floor"], quantile)
                rows.append(Row(f"mqtt.{name}_{quantile}_over_paho_floor", value, "x", "an echo with paho-mqtt"))
            if name.endswith("_durable"):
                value = ratio(values, seen["disk_floor"], quantile)
                rows.append(Row(f"mqtt.{name}_{quantile}_over_disk_floor", value, "x", "an echo with one commit"))
    note = f"the node's processor time, {DEVICES} devices with {WINDOW} under way"
    return rows + [
        Row(f"mqtt.{name}_rps_per_core", statistics.median(rates), "1/s", note) for name, rates in per_core.items()
    ]


def ratio(mine: list[dict[str, float]], floor: list[dict[str, float]], quantile: str) -> float:
    """Of two figures of the same round, the middle one of all rounds."""
    return statistics.median(a[quantile] / b[quantile] for a, b in zip(mine, floor, strict=True))


# -- batching -------------------------------------------------------------------------------------------------------


def batching(port: int, folder: Path, *, quick: bool) -> list[Row]:
    """64 devices ask a model whose weights are read once for a batch, and once for each request without one."""
    rounds, requests = (2, 500) if quick else (5, 4_000)
    rates: dict[str, list[float]] = {"joined": [], "alone": []}
    with (
        node(port, folder, "joined", "dense", "--durability", "none", "--batch-rows", str(DEVICES)),
        node(port, folder, "alone", "dense", "--durability", "none", "--batch-rows", "1"),
    ):
        for number in range(rounds + 1):
            for name, values in rates.items():
                seen = load(port, name, "dense", devices=DEVICES, requests=requests)
                if number:  # the first round warms up
                    values.append(answers(seen) / seen["seconds"])
    gain = statistics.median(a / b for a, b in zip(rates["joined"], rates["alone"], strict=True))
    note = f"{DEVICES} devices, one request each under way; a dense model with 71 MB of weights, batches off and on"
    return [
        Row("mqtt.batching_gain", gain, "x", note),
        Row("mqtt.batching_rps", statistics.median(rates["joined"]), "1/s"),
        Row("mqtt.alone_rps", statistics.median(rates["alone"]), "1/s"),
    ]


# -- overload -------------------------------------------------------------------------------------------------------


def overload(port: int, folder: Path, *, quick: bool) -> list[Row]:
    """Five times what the model can do: who is refused hears it at once, and memory stays where it is."""
    seconds = 4 if quick else 30
    rows = []
    for name, durability in (("durable", "full"), ("volatile", "none")):
        tenant = f"overload_{name}"
        options = ("--durability", durability, "--capacity", str(CAPACITY_RPS), "--pending", str(PENDING))
        with node(port, folder, tenant, "slow", *options) as pid:
            load(port, tenant, "slow", devices=16, rate=CAPACITY_RPS * OVERLOAD, seconds=1)
            with Memory(pid) as memory:
                rate = CAPACITY_RPS * OVERLOAD
                seen = load(port, tenant, "slow", devices=DEVICES, rate=rate, seconds=seconds)
        refused = seen["latency_ms"]["429"]
        note = f"{rate} requests a second at a capacity of {CAPACITY_RPS}; {seen['statuses']}"
        rows += [
            Row(f"mqtt.overload_{name}_429_p99_ms", refused["p99"], "ms", note),
            Row(f"mqtt.overload_{name}_429_max_ms", refused["max"], "ms"),
            Row(f"mqtt.overload_{name}_goodput", seen["statuses"]["200"] / (seconds * CAPACITY_RPS), "x"),
            Row(f"mqtt.overload_{name}_unanswered", seen["unanswered"], "1"),
            Row(f"mqtt.overload_{name}_lost_connections", seen["lost_connections"], "1"),
            Row(f"mqtt.overload_{name}_rss_growth_mb", memory.growth_mb, "MB", "between the first and the last second"),
        ]
    return rows


class Memory:
    """Watches how a process's memory grows while the block lasts."""

    def __init__(self, pid: int) -> None:
        self._statm = Path(f"/proc/{pid}/statm")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._seen_mb: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            with contextlib.suppress(OSError):
                self._seen_mb.append(int(self._statm.read_text().split()[1]) * 4096 / 1e6)

    @property
    def growth_mb(self) -> float:
        """From the first second to the last one."""
        return statistics.median(self._seen_mb[-10:]) - statistics.median(self._seen_mb[:10])
