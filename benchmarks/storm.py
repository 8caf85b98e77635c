"""500 devices whose broker is killed and comes back empty: how soon all are back, how spread, and what is missing.

Real parts: Mosquitto, a node with its ledger, 500 device clients (in one process, each with its own connection). Every
device asks a question while the broker is down; it is *back* when it is connected and subscribed again, and *answered*
when that question is. Subscriptions are judged by delivery: the answer came over the reply topic, and a wish that is
published afterwards reaches the other topic of each device. The full run repeats it with a certificate for each device;
there it measures only how soon all are back, after 500 handshakes in both directions.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.processes import cpu_s, serve
from benchmarks.rows import Row
from edge_node.broker import Broker
from edge_node.broker.configuration import TlsListener
from edge_node.broker.tenant import ACCESS_FILE, REVOKED_FILE
from edge_node.broker.tenant_broker import TenantBroker
from nearcast.identity import CertificateAuthority
from nearcast.identity.authority import make_plain_csr
from nearcast.identity.device import DeviceIdentity, Place
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

DEVICES = 500
WINDOW_S = 0.1
REPLY_TIMEOUT_S = 90.0
WISH_TIMEOUT_S = 5.0
OUTAGE_S, OUTAGE_S_QUICK = 20.0, 3.0
LINE_BYTES_MAX = 1 << 20
TENANT = "storm"
LIFE_S = 86_400.0


class Crowd:
    """The process with the devices."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, port: int, *options: str) -> Crowd:
        """Returns once all devices are connected."""
        arguments = ["-m", "benchmarks.storm_devices", str(port), str(DEVICES), *options]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, limit=LINE_BYTES_MAX
        )
        crowd = cls(process)
        await crowd.hear()
        return crowd

    def say(self, **said: float) -> None:
        """Tell the devices something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(said).encode() + b"\n")

    async def hear(self) -> dict[str, Any]:
        """What they say."""
        assert self._process.stdout is not None
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            heard: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return heard

    async def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        await self._process.wait()


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    return asyncio.run(_run(OUTAGE_S_QUICK if quick else OUTAGE_S, quick=quick))


async def _run(outage_s: float, *, quick: bool) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        spread = await _storm(Path(folder) / "spread", outage_s, together=False)
        together = await _storm(Path(folder) / "together", outage_s, together=True)
        if not quick:
            secured_s = await _secured_storm(Path(folder) / "secured", outage_s)
            rows = [Row("storm.tls_back_s", secured_s, "s", "the same with a certificate for each device")]
    note = f"{DEVICES} devices, broker down for {outage_s:g} s, back empty"
    return [
        Row("storm.back_s", spread["back_s"], "s", note),
        Row("storm.answered_s", spread["answered_s"], "s", "each device's question from the time of the outage"),
        Row("storm.missing_subscriptions", spread["missing"], "", "by delivery, on both topics of each device"),
        Row("storm.failed_requests", spread["failed"], "", "; ".join(spread["problems"])),
        Row("storm.cpu_cores", spread["cpu_cores"], "cores", "broker and node, from the start to the last answer"),
        Row("storm.peak", spread["peak"], "devices", f"back within the same {WINDOW_S * 1e3:g} ms"),
        Row("storm.peak_without_jitter", together["peak"], "devices", "the same devices, always with the longest wait"),
        Row("storm.peak_over_jitterless", spread["peak"] / together["peak"], "x"),
        *rows,
    ]


async def _storm(folder: Path, outage_s: float, *, together: bool) -> dict[str, Any]:
    broker = await Broker.start(folder / "broker")
    (folder / "node").mkdir()
    try:
        arguments = (str(broker.port), "local", "noop", str(folder / "node"))
        with serve("benchmarks.mqtt_node", *arguments, cpu=None) as node:
            crowd = await Crowd.start(broker.port, *(["--together"] if together else []))
            try:
                await broker.kill()
                crowd.say(outage_s=outage_s)
                await asyncio.sleep(outage_s)
                node_cpu_s, began = cpu_s(node["pid"]), time.monotonic()
                broker = await Broker.start(folder / "empty", port=broker.port)
                heard = await crowd.hear()
                used_s = cpu_s(node["pid"]) - node_cpu_s + cpu_s(broker.pid)
                ended = max(heard["answered_at"])
                return {
                    "back_s": max(heard["up_at"]) - began,
                    "answered_s": ended - began,
                    "failed": len(heard["problems"]),
                    "problems": sorted(set(heard["problems"]))[:3],
                    "cpu_cores": used_s / (ended - began),
                    "peak": _peak(sorted(heard["up_at"])),
                    "missing": DEVICES - await _reached(crowd, broker.port),
                }
            finally:
                await crowd.stop()
    finally:
        await broker.stop()


async def _secured_storm(folder: Path, outage_s: float) -> float:
    """Seconds until all devices are back at a broker that asks for certificates."""
    made = await TenantBroker.start(folder, tenant=TENANT)
    await made.stop()
    place = Place(url=made.authority.place.url, tenant=TENANT, name="")
    await asyncio.to_thread(_write_identities, folder, place)
    tls = TlsListener(
        ca=made.authority.ca,
        certificate=folder / "broker.pem",
        key=folder / "broker.key",
        revoked=folder / REVOKED_FILE,
        access=folder / ACCESS_FILE,
    )
    broker = await Broker.start(folder / "first", port=made.port, kind="mosquitto", tls=tls)
    try:
        crowd = await Crowd.start(broker.port, "--identities", str(folder / "devices"))
        try:
            await broker.kill()
            killed_at = time.monotonic()
            await asyncio.sleep(outage_s)
            began = time.monotonic()
            broker = await Broker.start(folder / "empty", port=broker.port, kind="mosquitto", tls=tls)
            crowd.say(up_after=killed_at)
            heard = await crowd.hear()
            return float(max(heard["up_at"]) - began)
        finally:
            await crowd.stop()
    finally:
        await broker.stop()


def _write_identities(folder: Path, place: Place) -> None:
    authority = CertificateAuthority.load(folder / "ca")
    for number in range(DEVICES):
        key, csr = make_plain_csr()
        name = f"storm-{number}"
        certificate = authority.issue_plain(csr, name=name, lifetime_s=LIFE_S)
        own = msgspec.structs.replace(place, name=name)
        DeviceIdentity.write(
            folder / "devices" / str(number), own, ca=authority.certificate_pem, certificate=certificate, key=key
        )


def _peak(instants: Sequence[float]) -> int:
    """The most of them in any window."""
    return max(bisect_left(instants, at + WINDOW_S) - index for index, at in enumerate(instants))


async def _reached(crowd: Crowd, port: int) -> int:
    """How many devices hear a wish that is published for each."""
    settings = ConnectionSettings(host="127.0.0.1", port=port, client_id="operator")
    connection = Connection(settings, on_message=lambda _message: None)
    await connection.open()
    for number in range(DEVICES):
        topic = topics.device_desired_topic("local", f"storm-{number}")
        connection.publish(Message(topic=topic, payload=b'{"version": 1, "desired": {}}', qos=0))
    deadline, reached = time.monotonic() + WISH_TIMEOUT_S, 0
    while reached < DEVICES and time.monotonic() < deadline:
        await asyncio.sleep(WINDOW_S)
        crowd.say(wishes=0)
        reached = sum(map(bool, (await crowd.hear())["wishes"]))
    await connection.close()
    return reached
