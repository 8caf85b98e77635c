"""The device client against a real Mosquitto and a real worker: absent brokers, killed brokers, wishes, presence."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_node.broker import Broker
from edge_node.broker.tenant_broker import TenantBroker
from edge_node.mqtt.worker import MqttWorker
from nearcast.cli import main as cli
from nearcast.client.mqtt import MqttDevice
from nearcast.client.mqtt_limits import DeviceLimits
from nearcast.client.provisioning import device_url, identity_tls, join
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message
from tests.integration.mqtt_parts import FAST, QUICK, Doubler, serving, until

LIMITS = DeviceLimits(reconnect=QUICK, silence_s=0.2, silence_s_max=0.4, will_delay_s=0)
X = np.array([[1.0, 2.0]], dtype=np.float32)

pytestmark = pytest.mark.skipif(
    shutil.which("mosquitto") is None and not Path("/usr/sbin/mosquitto").exists(), reason="mosquitto is not installed"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@asynccontextmanager
async def listening(port: int, *filters: str):
    """A third party that hears what is said, what the topics hold included."""
    heard: list[Message] = []

    def receive(message: Message) -> None:
        heard.append(message)
        connection.acknowledge(message)

    connection = Connection(ConnectionSettings(host="127.0.0.1", port=port, client_id="third"), on_message=receive)
    await connection.open()
    await connection.subscribe(*filters, retained=True)
    try:
        yield connection, heard
    finally:
        await connection.close()


async def test_a_request_outlives_an_absent_broker_and_a_killed_one_that_forgets_and_runs_once(tmp_path):
    port, handler = free_port(), Doubler(delay_s=0.2)
    async with (
        serving(port, tmp_path, handler, connected=False) as worker,
        MqttDevice(f"mqtt://127.0.0.1:{port}/local/d1", limits=LIMITS) as device,
    ):
        with pytest.raises(MeshError) as nobody:
            await device.link.wait_up(attempts_max=1)
        assert nobody.value.code is Code.UNAVAILABLE
        first = asyncio.create_task(device.infer("double", {"x": X}, deadline_ms=9000, key=b"one"))
        await asyncio.sleep(0)
        broker = await Broker.start(tmp_path / "b1", port=port)
        await until(lambda: handler.executed)  # it is under way
        await broker.kill()
        broker = await Broker.start(tmp_path / "b2", port=port)  # a new folder: it knows nobody and nothing
        try:
            answer = await first
            handler.delay_s = 0.0
            assert answer.outputs["y"].tolist() == [[2.0, 4.0]]
            assert (answer.version, answer.served_by) == ("7", "n1")
            assert handler.executed == [b"one".hex()]
            await worker.wait_connected()
            again = await device.infer("double", {"x": X}, deadline_ms=9000, key=b"one")
            assert again.outputs["y"].tolist() == [[2.0, 4.0]]
            assert handler.executed == [b"one".hex()], "the same key is the same request"
            for content_type in ("application/octet-stream", "application/json", "application/cbor"):
                other = await device.infer("double", {"x": X}, content_type=content_type)
                assert other.outputs["y"].tolist() == [[2.0, 4.0]]
            with pytest.raises(MeshError) as unknown:
                await device.infer("triple", {"x": X})
            assert unknown.value.code is Code.MODEL_NOT_FOUND
        finally:
            await broker.stop()


async def test_samples_keep_order_and_numbers_through_a_killed_broker(tmp_path):
    broker = await Broker.start(tmp_path / "b1")
    port = broker.port
    async with MqttDevice(f"{broker.url}/local/d1", limits=LIMITS) as device:
        async with listening(port, "nc/v1/local/+/up/data/+") as (_, heard):
            await device.link.wait_up()
            await asyncio.gather(*(device.send("vibration", b"%d" % index) for index in range(1, 6)))
            await until(lambda: len(heard) == 5)
        await broker.kill()
        left = [asyncio.create_task(device.send("vibration", b"%d" % index)) for index in range(6, 106)]
        expired = asyncio.create_task(device.send("noise", b"x", expiry_ms=1.0))
        await until(expired.done)
        assert expired.exception().code is Code.UNAVAILABLE
        ready = []  # nothing is sent before the listener is back, too: this broker keeps nothing for it
        device.link._on_up = ready.append
        broker = await Broker.start(tmp_path / "b2", port=port)
        try:
            async with listening(port, "nc/v1/local/+/up/data/+") as (_, again):
                await until(lambda: ready)
                device._go_on(ready[-1])
                await asyncio.gather(*left)
                await until(lambda: len(again) == 100)
        finally:
            await broker.stop()
    everything = heard + again
    assert [int(message.payload) for message in everything] == list(range(1, 106))
    assert [message.user["seq"] for message in everything] == [str(index) for index in range(1, 106)]
    assert len({message.user["boot-id"] for message in everything}) == 1


async def test_others_see_whether_a_device_is_there_and_wish_settings_of_it(tmp_path):
    broker = await Broker.start(tmp_path / "broker")

    def apply(desired):
        if desired.get("rate_hz", 0) > 100:
            raise MeshError(Code.INVALID_REQUEST, "At most 100 Hz.")
        return desired | {"firmware": "1.2"}

    def said(heard, leaf):
        return [json.loads(message.payload) for message in heard if message.topic.endswith(leaf)]

    try:
        async with listening(broker.port, "nc/v1/local/d1/state", "nc/v1/local/d1/up/reported") as (operator, heard):
            wishes = "nc/v1/local/d1/down/desired"
            operator.publish(Message(topic=wishes, payload=b'{"version": 3, "desired": {"rate_hz": 50}}', retain=True))
            async with MqttDevice(f"{broker.url}/local/d1", apply=apply, limits=LIMITS) as device:
                await until(lambda: said(heard, "reported"))
                for wish in (
                    b'{"version": 2, "desired": {}}',
                    b"nonsense",
                    b'{"version": 4, "desired": {"rate_hz": 500}}',
                ):
                    operator.publish(Message(topic=wishes, payload=wish))
                await until(lambda: len(said(heard, "reported")) == 2)
            await until(lambda: len(said(heard, "state")) == 2)
            lost = MqttDevice(f"{broker.url}/local/d1", limits=LIMITS)
            async with lost:
                await until(lambda: len(said(heard, "state")) == 3)
                lost._connection._transport.abort()  # as if the power had gone
                await until(lambda: len(said(heard, "state")) == 5)
        now = {"rate_hz": 50, "firmware": "1.2"}
        assert said(heard, "reported") == [
            {"version": 3, "reported": now},
            {"version": 4, "reported": now, "problem": "At most 100 Hz."},
        ]
        states = said(heard, "state")
        assert [each["state"] for each in states[:3]] == ["online", "offline", "online"]
        assert sorted(each["state"] for each in states[3:5]) == ["offline", "online"]
        assert device._boot_id == states[0]["boot_id"] != states[2]["boot_id"]
    finally:
        await broker.stop()


async def test_a_certificate_says_who_asks_also_on_the_command_line(tmp_path):
    handler = Doubler()
    broker = await TenantBroker.start(tmp_path / "acme", tenant="acme")
    worker = MqttWorker(
        handler,
        handler,
        node="n1",
        host=broker.host,
        port=broker.port,
        inbox=tmp_path / "inbox.sqlite",
        tenants=("acme",),
        limits=FAST,
        tls=broker.tls,
    )
    await worker.start()
    try:
        async with asyncio.timeout(10):
            await broker.registrar.listening.wait()
        broker.authority.invite(tmp_path / "claim", name="camera-1", kind="device", uses=1, life_s=60.0)
        identity = await join(tmp_path / "claim", tmp_path / "identity")
        async with MqttDevice(device_url(identity), tls=identity_tls(identity), limits=LIMITS) as device:
            answer = await device.infer("double", {"x": X}, deadline_ms=9000)
        assert answer.outputs["y"].tolist() == [[2.0, 4.0]]
        np.save(tmp_path / "x.npy", X)
        arguments = ["infer", "double", f"x=@{tmp_path / 'x.npy'}", "--identity", str(tmp_path / "identity"), "--json"]
        said = await asyncio.to_thread(CliRunner().invoke, cli, arguments)
        assert said.exit_code == 0, said.output
        assert json.loads(said.output)["outputs"][0]["data"] == [2.0, 4.0]
        assert {context.principal for context in handler.contexts} == {"device:acme/camera-1"}
    finally:
        await worker.drain(2.0)
        await broker.stop()
