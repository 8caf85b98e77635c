"""The window of acknowledgements moves on, whatever comes: a message that is never acknowledged would stop it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from edge_node.broker import Broker
from edge_node.broker.process import mosquitto_path
from edge_node.mqtt.limits import MqttLimits
from edge_node.mqtt.worker import MqttWorker
from tests.integration.mqtt_parts import Device, Doubler, until, user_of

FAST = MqttLimits(reconnect_base_s=0.02, reconnect_max_s=0.05, will_delay_s=0)


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
