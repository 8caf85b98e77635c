"""What is stored of a request and when, over a real broker: with durability, without it, and for refusals."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_node.mqtt.limits import MqttLimits, RequestLimits, SessionLimits
from nearcast.errors import Code, MeshError
from tests.integration.mqtt_parts import Device, Doubler, serving, until, user_of

PARTS = Path(__file__).with_name("mqtt_parts.py")

X = np.array([[1.0, 2.0]], dtype=np.float32).tobytes()


def holding(hold_ms):
    return MqttLimits(requests=RequestLimits(hold_ms=hold_ms))


def rows(folder):
    """State of each request on disk."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'inbox.sqlite'}?mode=ro", uri=True)) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM inbox ORDER BY id")]


class Busy(Doubler):
    """Refuses the first request of all."""

    async def infer(self, request, context):
        if not self.executed:
            self.executed.append(context.idempotency_key)
            raise MeshError(Code.OVERLOADED, "Later.", retry_after_ms=1)
        return await super().infer(request, context)


@pytest.mark.parametrize("durability", ["full", "none"])
async def test_a_refused_request_may_come_again_and_is_answered_then(broker, tmp_path, durability):
    handler = Busy()
    async with serving(broker.port, tmp_path, handler, durability=durability):
        with Device(broker.port, "d1") as device:
            seen = []
            for _ in range(3):
                device.ask(X, correlation=b"same")
                user = user_of(await device.answer())
                seen.append((user["status"], user.get("dedup")))
            assert seen == [("429", None), ("200", None), ("200", "1")]
            assert len(handler.executed) == 2
            assert rows(tmp_path) == (["done"] if durability == "full" else [])


async def test_a_slow_request_is_accepted_before_its_answer_and_runs_once(broker, tmp_path):
    handler = Doubler(delay_s=0.2)
    async with serving(broker.port, tmp_path, handler, limits=holding(1.0)):
        with Device(broker.port, "d1") as device:
            device.ask(X, correlation=b"slow")
            await until(lambda: rows(tmp_path) == ["pending"])
            assert device.replies.empty()
            device.ask(X, correlation=b"slow")
            assert user_of(await device.answer())["status"] == "200"
            assert handler.executed == [b"slow".hex()]


async def test_a_repetition_within_the_hold_runs_once(broker, tmp_path):
    handler = Doubler(delay_s=0.1)
    async with serving(broker.port, tmp_path, handler, limits=holding(10_000.0)):
        with Device(broker.port, "d1") as device:
            device.ask(X, correlation=b"twice")
            device.ask(X, correlation=b"twice")
            assert user_of(await device.answer())["status"] == "200"
            await asyncio.sleep(0.15)
            assert handler.executed == [b"twice".hex()]
            assert device.replies.empty()


async def test_qos_0_leaves_nothing_on_disk(broker, tmp_path):
    handler = Doubler()
    async with serving(broker.port, tmp_path, handler):
        with Device(broker.port, "d1") as device:
            device.client.publish("nc/v1/local/d1/up/infer/double/bin", X, 0)
            await until(lambda: handler.executed)
            assert (await device.answer()).topic.startswith("nc/v1/local/d1/down/")
            assert rows(tmp_path) == []


async def test_without_durability_the_broker_gives_a_killed_worker_its_requests_again(broker, tmp_path):
    journal = tmp_path / "inbox.journal"
    with Device(broker.port, "d1") as device:
        arguments = (str(broker.port), str(tmp_path / "inbox.sqlite"), "30.0", "none")
        process = await asyncio.create_subprocess_exec(sys.executable, str(PARTS), *arguments, stdout=subprocess.PIPE)
        assert await process.stdout.readline() == b"ready\n"
        asked = {device.ask(X, correlation=b"%d" % number) for number in range(3)}
        await until(lambda: journal.exists() and journal.read_text().count("\n") == 3)
        process.kill()
        await process.wait()
        assert rows(tmp_path) == []
        async with serving(broker.port, tmp_path, Doubler(), durability="none"):
            answers = [await device.answer() for _ in asked]
    assert {answer.properties.CorrelationData for answer in answers} == asked
    assert {user_of(answer)["status"] for answer in answers} == {"200"}


async def test_without_durability_a_slow_model_does_not_hold_the_window_for_ever(broker, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_node.mqtt.worker.WATCH_INTERVAL_S", 0.05)
    handler = Doubler(delay_s=30.0)
    limits = MqttLimits(session=SessionLimits(unacknowledged_age_max_s=0.1))
    async with serving(broker.port, tmp_path, handler, durability="none", drain_s=0.0, limits=limits) as worker:
        with Device(broker.port, "d1") as device:
            device.ask(X, ttl_ms="60000")
            await until(lambda: worker.metrics.registry.get_sample_value("nc_mqtt_acknowledged_early_total") == 1)
            handler.delay_s = 0.0
            device.ask(X)
            assert user_of(await device.answer())["status"] == "200"
