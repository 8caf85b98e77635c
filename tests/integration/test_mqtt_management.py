"""A node's own topics over a real broker: what it says, what it keeps to itself, and what it lets itself be told."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager

import numpy as np
import pytest
from click.testing import CliRunner
from paho.mqtt import client as paho
from prometheus_client import CollectorRegistry

from edge_node.mqtt import worker as worker_module
from edge_node.mqtt.admission import Request
from edge_node.mqtt.ledger.ledger import Ledger, boot_identity
from edge_node.mqtt.ledger.letters import list_letters
from edge_node.mqtt.ledger.records import Reply
from edge_node.mqtt.limits import LedgerLimits
from edge_node.mqtt.management import PRESENCE_EXPIRY_S, Management
from edge_node.mqtt.worker import MqttWorker
from nearcast.cli import main
from nearcast.clock import ManualClock
from nearcast.clock_store import ClockFloor
from nearcast.load import VersionReport
from tests.integration.mqtt_parts import FAST, WAIT_S, Device, Doubler, serving, user_of

OCTETS = "application/octet-stream"


def _said(message):
    """The payload, and how long it is to be believed."""
    return {**json.loads(message.payload), "expiry_s": getattr(message.properties, "MessageExpiryInterval", None)}


class Watcher:
    """Hears everything about the nodes of the tenant, and wishes."""

    def __init__(self, port):
        self._heard = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_message = lambda _c, _u, message: self._loop.call_soon_threadsafe(
            self._heard.put_nowait, (message.topic.rpartition("/")[2], _said(message))
        )
        self._client.on_connect = lambda client, _u, _f, _r, _p: client.subscribe("nc/v1/local/node/n1/#", 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    async def hears(self, leaf, wanted=lambda _said: True):
        async with asyncio.timeout(WAIT_S):
            while True:
                found, said = await self._heard.get()
                if found == leaf and wanted(said):
                    return said

    async def silent(self, leaf, seconds):
        """Whether nothing comes on a topic for so long."""
        try:
            async with asyncio.timeout(seconds):
                while (await self._heard.get())[0] != leaf:
                    pass
        except TimeoutError:
            return True
        return False

    def wish(self, version, **desired):
        text = json.dumps({"version": version, "desired": desired})
        self._client.publish("nc/v1/local/node/n1/desired", text, 1, retain=True)

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
async def watcher(broker):
    made = Watcher(broker.port)
    yield made
    made.close()


@asynccontextmanager
async def managed(broker, folder, **options):
    management = Management("n1", "local", boot="b", shadow=folder / "shadow.json", watch_interval_s=0.05, **options)
    handler = Doubler()
    worker = MqttWorker(
        handler, handler, node="n1", host=broker.host, port=broker.port, inbox=folder / "i.sqlite", limits=FAST,
        management=management, registry=options.get("registry"),
    )  # fmt: skip
    await worker.start()
    try:
        yield management, worker
    finally:
        await worker.drain(1.0)


async def test_a_node_says_how_it_is_and_says_it_again_to_an_empty_broker(broker, watcher, tmp_path):
    clock = ManualClock(wall=1_000.0)
    held = [VersionReport(model="digits", version="3"), VersionReport(model="audio", version="1", residency="cold")]
    floor = ClockFloor(tmp_path / "clock.json", clock, build_time=0)
    async with managed(broker, tmp_path, clock=floor, inventory=lambda: held) as (_, worker):
        state = await watcher.hears("state")
        assert (state["state"], state["boot_id"], state["clock_ok"]) == ("online", "b", False)
        assert 0 < state["expiry_s"] <= PRESENCE_EXPIRY_S, "who is gone for good is not called online for ever"
        models = (await watcher.hears("models"))["models"]
        assert [(each["model"], each["residency"]) for each in models] == [("audio", "cold"), ("digits", "hot")]
        clock.advance(1_900_000_000.0)
        del held[1]
        assert (await watcher.hears("state"))["clock_ok"], "the clock was set, and everybody hears of it"
        assert len((await watcher.hears("models"))["models"]) == 1
        worker._epoch.connection._transport.abort()
        assert (await watcher.hears("state"))["state"] == "offline", "the will speaks for whom it lost"
        assert (await watcher.hears("state"))["state"] == "online"
        await broker.kill()
        for path in (tmp_path / "broker" / "store").iterdir():
            path.unlink()
        await broker.launch()
        assert (await watcher.hears("state"))["state"] == "online"
        assert len((await watcher.hears("models"))["models"]) == 1
    state = await watcher.hears("state")
    assert (state["state"], state["expiry_s"]) == ("offline", None)
    assert ClockFloor(tmp_path / "clock.json", ManualClock(wall=1_000.0), build_time=0).is_behind


async def test_wishes_hold_across_a_restart_and_metrics_are_sent_only_where_one_asks(broker, watcher, tmp_path):
    wishes = []
    registry = CollectorRegistry()
    async with managed(broker, tmp_path, registry=registry) as (management, worker):
        management.on_wish = wishes.append
        await worker.wait_connected()
        assert await watcher.silent("metrics", 0.3), "a bus belongs to its devices"
        watcher.wish(2, metrics_interval_s=0.1)
        reported = await watcher.hears("reported")
        assert (reported["version"], reported["reported"]) == (2, {"metrics_interval_s": 0.1})
        assert (await watcher.hears("metrics"))["metrics"]["nc_mqtt_connected"] == 1
        watcher.wish(1, metrics_interval_s=0)
        watcher.wish(3, log_level="loud")
        reported = await watcher.hears("reported")
        assert (reported["version"], reported["reported"]) == (3, {"metrics_interval_s": 0.1})
        assert "log_level" in reported["problem"]
        assert len(wishes) == 1
    async with managed(broker, tmp_path, registry=CollectorRegistry()) as (management, _):
        assert management.settings.metrics_interval_s == 0.1
        assert (await watcher.hears("reported"))["version"] == 3
        await watcher.hears("metrics")


async def test_a_dead_letter_is_tried_again_when_an_operator_asks(broker, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "TEND_INTERVAL_S", 0.05)
    ledger = Ledger(tmp_path / "inbox.sqlite", boot=boot_identity(), limits=LedgerLimits())
    await ledger.open(time.monotonic())
    now = time.monotonic()
    reply_topic = "nc/v1/local/d1/down/reply/double"
    request = Request(
        tenant="local", device="d1", model="double", correlation=b"c", reply_topic=reply_topic, arrived=now,
        content_type=OCTETS, accept=OCTETS, deadline=now + 9.0, digest=b"d", user={"shape": "1,2"},
    )  # fmt: skip
    row = (await ledger.accept(request, np.ones((1, 2), np.float32).tobytes())).id
    refusal = Reply(topic=reply_topic, user={"status": "500"}, expires=now)
    await ledger.finish(row, refusal, now, buried="it crashed")
    await ledger.close()
    handler = Doubler()
    async with serving(broker.port, tmp_path, handler):
        with Device(broker.port, "d1") as device:
            ask = ["dlq", "replay", "1", "--set", f"data_dir={tmp_path}"]
            result = await asyncio.to_thread(CliRunner().invoke, main, ask)
            assert result.exit_code == 0, result.output
            answer = await device.answer()
    assert np.frombuffer(answer.payload, np.float32).tolist() == [2.0, 2.0]
    assert user_of(answer)["status"] == "200"
    assert list_letters(tmp_path / "inbox.sqlite") == []
