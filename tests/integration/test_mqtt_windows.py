"""The window of acknowledgements moves on, whatever comes: a message that is never acknowledged would stop it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from edge_node.broker import Broker
from edge_node.broker.process import mosquitto_path
from edge_node.mqtt.limits import MqttLimits
from edge_node.mqtt.worker import MqttWorker, _Epoch
from nearcast.backoff import ReconnectLimits
from tests.integration.mqtt_parts import Device, Doubler, until, user_of

FAST = MqttLimits(reconnect=ReconnectLimits(base_s=0.02, max_s=0.05), will_delay_s=0)


@asynccontextmanager
async def serving(broker, folder):
    handler = Doubler()
    worker = MqttWorker(
        handler, handler, node="n1", host=broker.host, port=broker.port, inbox=folder / "inbox.sqlite", limits=FAST
    )
    await worker.start()
    try:
        async with asyncio.timeout(10):
            await worker.wait_connected()
        yield worker
    finally:
        await worker.drain(2.0)


@pytest.fixture
async def broker(tmp_path):
    if mosquitto_path() is None:
        pytest.skip("mosquitto is not installed")
    broker = await Broker.start(tmp_path / "broker", kind="mosquitto")
    yield broker
    await broker.stop()


async def test_what_is_refused_while_the_node_connects_is_answered_and_acknowledged(broker, tmp_path):
    async with serving(broker, tmp_path):
        pass  # the broker has a session for the node now
    with Device(broker.port, "d1") as device:
        device.ask(b"x", content_type="text/plain")
        await asyncio.sleep(0.1)
        async with serving(broker, tmp_path) as worker:
            assert user_of(await device.answer())["status"] == "415"
            await until(lambda: len(worker._epoch.window) == 0)


async def test_a_message_that_breaks_the_node_s_code_does_not_come_again(broker, tmp_path, monkeypatch):
    async with serving(broker, tmp_path) as worker:
        epoch = worker._epoch
        with Device(broker.port, "d1") as device:
            with monkeypatch.context() as patch:
                patch.setattr(worker._requests, "receive", lambda *_: 1 / 0)
                device.ask(b"x")
                refused = "nc_mqtt_refused_total"
                await until(lambda: worker.metrics.registry.get_sample_value(refused, {"status": "500"}) == 1)
            device.ask(b"\0" * 8)
            assert user_of(await device.answer())["status"] == "200"
            await until(lambda: len(epoch.window) == 0)
        assert worker._epoch is epoch, "the connection has held"


async def test_what_makes_no_sense_is_acknowledged_in_its_turn(tmp_path):
    handler = Doubler()
    worker = MqttWorker(handler, handler, node="n1", host="127.0.0.1", port=1, inbox=tmp_path / "inbox.sqlite")
    confirmed = []
    epoch = _Epoch(connection=SimpleNamespace(confirm=confirmed.append, resume=lambda: None))
    ticket = epoch.window.open(1, 0.0, 0)
    worker._drop_unreadable(epoch, 2)
    assert confirmed == []
    worker._acknowledge(epoch, ticket)
    assert confirmed == [1, 2]
