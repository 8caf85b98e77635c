"""The node's own broker, with each of the two programs that can be it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_node.broker import Broker, BrokerLimits, find_broker, keep_alive
from edge_node.broker import process as broker_process
from edge_node.broker.configuration import mosquitto_config
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message
from router.child import ChildLimits

KINDS = [
    pytest.param(
        "mosquitto", marks=pytest.mark.skipif(broker_process.mosquitto_path() is None, reason="not installed")
    ),
    pytest.param("iotcore", marks=pytest.mark.skipif(not importlib.util.find_spec("iotcore"), reason="not installed")),
]


async def connect(broker, name, received):
    settings = ConnectionSettings(host=broker.host, port=broker.port, client_id=name)

    def receive(message):
        connection.acknowledge(message)
        received.put_nowait(message)

    connection = Connection(settings, on_message=receive)
    await connection.open()
    return connection


@pytest.mark.parametrize("kind", KINDS)
async def test_messages_pass_with_their_properties_and_without_nagle(kind, tmp_path):
    broker = await Broker.start(tmp_path, kind=kind)
    try:
        received: asyncio.Queue[Message] = asyncio.Queue()
        one = await connect(broker, "one", received)
        two = await connect(broker, "two", asyncio.Queue())
        await one.subscribe("t/#")
        await asyncio.sleep(0.3)  # iotcore's sockets get their option from a thread that looks ten times a second
        times = []
        for number in range(30):
            started = time.perf_counter()
            two.publish(Message(topic="t/x", payload=b"%d" % number, correlation=b"c", user={"a": "b"}, expiry_s=5))
            async with asyncio.timeout(5):
                message = await received.get()
            times.append(time.perf_counter() - started)
            assert (message.payload, message.correlation, message.user) == (b"%d" % number, b"c", {"a": "b"})
        assert statistics.median(times) < 0.02  # a delayed ACK costs 0.04
        await one.close()
        await two.close()
    finally:
        await broker.stop()
    assert broker.pid == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_it_listens_on_loopback_only(kind, tmp_path):
    broker = await Broker.start(tmp_path, kind=kind)
    try:
        listing = Path("/proc/net/tcp").read_text().splitlines()[1:]
        ours = [
            line.split()[1]
            for line in listing
            if line.split()[1].endswith(f":{broker.port:04X}") and line.split()[3] == "0A"
        ]
        assert ours == [f"0100007F:{broker.port:04X}"]
    finally:
        await broker.stop()
    with pytest.raises(MeshError) as refused:
        await Broker.start(tmp_path, kind=kind, host="0.0.0.0")
    assert refused.value.code is Code.INVALID_REQUEST


def test_the_embedded_broker_itself_refuses_other_addresses():
    run = subprocess.run(
        [sys.executable, "-m", "edge_node.embedded_broker", "0.0.0.0", "1883"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 78
    assert "loopback" in run.stderr


@pytest.mark.parametrize("kind", KINDS)
async def test_a_port_in_use_is_an_error_with_a_reason(kind, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MeshError) as refused:
            await Broker.start(tmp_path, kind=kind, port=port, limits=BrokerLimits(start_timeout_s=3.0))
    assert refused.value.code is Code.UNAVAILABLE


@pytest.mark.parametrize("kind", KINDS)
async def test_it_ends_with_its_parent(kind, tmp_path):
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom edge_node.broker import Broker\n"
        "async def main():\n"
        f"    broker = await Broker.start(Path({str(tmp_path)!r}), kind={kind!r})\n"
        "    print(broker.pid, flush=True)\n    await asyncio.sleep(60)\nasyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(500):
        if not _lives(pid):
            break
        await asyncio.sleep(0.01)
    assert not _lives(pid)


def _lives(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_without_any_broker_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(broker_process, "mosquitto_path", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MeshError) as refused:
        find_broker()
    assert refused.value.code is Code.UNSUPPORTED
    assert "apt-get install mosquitto" in refused.value.message


def test_the_configuration_is_what_the_worker_relies_on(tmp_path):
    text = mosquitto_config("127.0.0.1", 1884, tmp_path, BrokerLimits())
    lines = text.splitlines()
    assert "listener 1884 127.0.0.1" in lines
    assert "set_tcp_nodelay true" in lines
    assert "persistence true" in lines
    assert json.dumps("allow_anonymous true").strip('"') in lines


class Mortal:
    """A broker that ends as soon as it is up: what a damaged store makes of one."""

    launches = 0

    async def wait(self):
        await asyncio.sleep(0)
        return 1

    async def launch(self):
        self.launches += 1
        return "" if self.launches % 2 else "it ended with 1"


async def test_a_broker_that_keeps_ending_is_started_ever_more_seldom():
    broker = Mortal()
    watch = asyncio.create_task(keep_alive(broker, ChildLimits(restart_base_s=0.05, restart_max_s=10.0)))
    await asyncio.sleep(0.5)
    assert not watch.done()
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    assert 1 <= broker.launches < 25  # waits double from 50 ms on; without them there are thousands
