"""The window of acknowledgements moves on, whatever comes: a message that is never acknowledged would stop it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from edge_node.mqtt.worker import MqttWorker, _Epoch
from tests.integration.mqtt_parts import Device, Doubler, serving, until, user_of


async def test_what_is_refused_while_the_node_connects_is_answered_and_acknowledged(broker, tmp_path):
    async with serving(broker.port, tmp_path, Doubler()):
        pass  # the broker has a session for the node now
    with Device(broker.port, "d1") as device:
        device.ask(b"x", content_type="text/plain")
        await asyncio.sleep(0.1)
        async with serving(broker.port, tmp_path, Doubler()) as worker:
            assert user_of(await device.answer())["status"] == "415"
            await until(lambda: len(worker._epoch.window) == 0)


async def test_a_message_that_breaks_the_node_s_code_does_not_come_again(broker, tmp_path, monkeypatch):
    async with serving(broker.port, tmp_path, Doubler()) as worker:
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
