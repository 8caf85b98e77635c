"""Streams from a device over a real broker through real models to whoever reads their events."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pymicro_wakeword
import pytest

from edge_node.mqtt.streams.definition import StreamDefinition
from edge_node.mqtt.worker import MqttWorker
from nearcast.cli.demo.samples import load_clips
from nearcast.client.mqtt import MqttDevice
from nearcast.serving import ModelHost
from nearcast.store import Store
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from tests.integration.mqtt_parts import FAST
from tests.tiny_models import activate, install, recurrent_model, tensor

STEP = 120
"""Features of 30 ms."""
STREAMS = (
    StreamDefinition(
        name="wake",
        model="wake_word",
        window=STEP,
        labels=("okay nabu",),
        score_scale=1 / 256,
        mean_of=5,
        threshold=0.85,
        emit="change",
    ),
    StreamDefinition(name="meter", model="recurrent", window=3),
)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    wake_word = Path(pymicro_wakeword.__file__).parent / "models" / "okay_nabu.tflite"
    install(
        store,
        wake_word.read_bytes(),
        name="wake_word",
        engine="litert",
        model_file="model.tflite",
        stateful="hidden",
        inputs=(tensor("input_audio", "INT8", (1, 3, 40), None),),
        outputs=(tensor("dense_1", "UINT8", (1, 1), None),),
    )
    activate(store, "wake_word", stable=1)
    install(
        store,
        recurrent_model(),
        name="recurrent",
        stateful="explicit",
        inputs=(tensor("x", "FP32", (-1, 3), 0), tensor("state", "FP32", (2, -1, 3), 1)),
        outputs=(tensor("y", "FP32", (-1, 3), 0), tensor("state_out", "FP32", (2, -1, 3), 1)),
    )
    activate(store, "recurrent", stable=1)
    return store


@asynccontextmanager
async def node(broker, store, folder, **options):
    """One life of a node with a real model host."""
    host = ModelHost(store, node="edge-1")
    await host.start()
    worker = MqttWorker(
        host,
        host,
        node="edge-1",
        host=broker.host,
        port=broker.port,
        inbox=folder / "ledger.sqlite",
        streams=STREAMS,
        limits=FAST,
        **options,
    )
    await worker.start()
    try:
        async with asyncio.timeout(10):
            await worker.wait_connected()
        yield worker
    finally:
        await worker.drain(2.0)
        await host.close()


@asynccontextmanager
async def reader(broker, topic):
    """Somebody else's program that reads from the broker."""
    messages: asyncio.Queue = asyncio.Queue()
    settings = ConnectionSettings(host=broker.host, port=broker.port, client_id="reader")
    connection = Connection(settings, on_message=messages.put_nowait)
    await connection.open()
    await connection.subscribe(topic, qos=0, retained=True)
    try:
        yield messages
    finally:
        await connection.close()


async def test_a_wake_word_is_heard_and_another_phrase_is_not(broker, store, tmp_path):
    clips = load_clips()
    async with node(broker, store, tmp_path) as worker, reader(broker, "nc/v1/local/+/out/wake") as events:
        url = f"mqtt://{broker.host}:{broker.port}/local"
        async with MqttDevice(f"{url}/kitchen") as kitchen, MqttDevice(f"{url}/hall") as hall:
            for at in range(0, 65, 7):  # messages of 210 ms, of both devices by turns
                await kitchen.send("wake", clips["okay_nabu"][at : at + 7].tobytes())
                await hall.send("wake", clips["hey_jarvis"][at : at + 7].tobytes())
            async with asyncio.timeout(10):
                message = await events.get()
            body = json.loads(message.payload)
            assert (body["device"], body["model"]) == ("kitchen", "wake_word")
            assert body["results"][0]["class_name"] == "okay nabu"
            assert body["results"][0]["score"] > 0.85
            assert 5 <= body["seq"] <= 9, "in the middle of the clip, where the phrase ends"
            assert not message.retain
            assert message.content_type == "application/json"
            assert message.expiry_s
            await kitchen.send("wake", clips["hey_jarvis"].tobytes())
            async with asyncio.timeout(10):
                body = json.loads((await events.get()).payload)
                counts = worker.metrics.registry
                while counts.get_sample_value("nc_mqtt_inputs_executed_total", {"outcome": "done"}) < 21:
                    await asyncio.sleep(0.01)
            assert (body["device"], body["results"]) == ("kitchen", []), "the phrase is over, and that is all"
            assert counts.get_sample_value("nc_mqtt_events_total") == 2


async def test_a_models_state_goes_on_through_restarts_of_the_node(broker, store, tmp_path):
    url = f"mqtt://{broker.host}:{broker.port}/local/d1"
    bodies = []
    async with reader(broker, "nc/v1/local/d1/out/meter") as events, MqttDevice(url) as device:
        for _ in range(3):
            async with node(broker, store, tmp_path):
                for _ in range(2):
                    await device.send("meter", np.array([0, 0, 10], np.float32).tobytes())
                async with asyncio.timeout(10):
                    bodies += [json.loads((await events.get()).payload) for _ in range(2)]
    assert [body["seq"] for body in bodies] == [1, 2, 3, 4, 5, 6]
    assert [body["results"][0]["score"] for body in bodies] == [10, 11, 12, 13, 14, 15]
    assert len({body["id"] for body in bodies}) == 6


async def test_what_a_device_sent_while_the_node_was_away_is_executed_in_order(broker, store, tmp_path):
    url = f"mqtt://{broker.host}:{broker.port}/local/d1"
    async with node(broker, store, tmp_path):
        pass  # the broker knows its session now
    async with reader(broker, "nc/v1/local/d1/out/meter") as events, MqttDevice(url) as device:
        for seq in range(20):
            await device.send("meter", np.array([seq, 0, 0], np.float32).tobytes())
        async with node(broker, store, tmp_path) as worker:
            async with asyncio.timeout(10):
                bodies = [json.loads((await events.get()).payload) for _ in range(20)]
            assert worker.metrics.registry.get_sample_value("nc_mqtt_inputs_lost_total") == 0
    assert [body["results"][0]["score"] for body in bodies] == [2.0 * seq for seq in range(20)]


async def test_home_assistant_is_told_of_a_stream_that_has_events(broker, store, tmp_path):
    url = f"mqtt://{broker.host}:{broker.port}/local/d1"
    async with node(broker, store, tmp_path, discovery_prefix="homeassistant"), MqttDevice(url) as device:
        async with reader(broker, "nc/v1/local/d1/out/meter") as events:
            await device.send("meter", np.zeros(3, np.float32).tobytes())
            async with asyncio.timeout(10):
                await events.get()
        async with reader(broker, "homeassistant/#") as told:
            async with asyncio.timeout(10):
                message = await told.get()
    assert message.topic == "homeassistant/sensor/d1/meter/config"
    assert 0 < message.expiry_s <= 172_800
    body = json.loads(message.payload)
    assert body["state_topic"] == "nc/v1/local/d1/out/meter"
    assert body["availability_topic"] == "nc/v1/local/node/edge-1/state"
    assert body["device"]["name"] == "d1"
