"""Processes that are told nonsense, or find their surroundings wrong, say so at once; whoever runs already, runs on."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_node.broker import Broker
from model_sync.publisher.control_client import connect
from nearcast.identity import JoinToken, join
from nearcast.store import Pointer, Store
from nearcast.wire.tensors import to_raw
from tests.e2e.fleet import ask_http, image, image_json, nearcast
from tests.integration.mqtt_parts import Device, user_of

WAIT_S = 60.0


@pytest.mark.parametrize(
    ("arguments", "environ", "told"),
    [
        (["--set", "listen.grcp=127.0.0.1:0"], {}, ("listen.grcp", "listen.grpc")),
        (["--config", "FILE"], {}, ("mqtt.brokr", "mqtt.broker", "edge.toml")),
        ([], {"NEARCAST_POLICY__RETRY_SHRE": "1"}, ("retry_shre", "retry_share")),
        (["--set", "mqtt.broker=localhost"], {}, ("'localhost' is no broker", "mqtt://host:port", "spawn")),
        (["--set", "mqtt.durability=half"], {}, ("'half'", "full, none")),
        (["--set", "data_dir=/proc/none", "--set", "listen.grpc=127.0.0.1:0"], {}, ("/proc/none cannot be made",)),
    ],
    ids=["option", "file", "environment", "broker", "word", "folder"],
)
def test_a_setting_that_is_wrong(tmp_path, monkeypatch, arguments, environ, told):
    path = tmp_path / "edge.toml"
    path.write_text('[mqtt]\nbrokr = "spawn"\n')
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    run = nearcast("edge", *(str(path) if part == "FILE" else part for part in arguments))
    assert run.returncode == 78
    require_one_line(run.stderr, *told)


@pytest.mark.parametrize(("process", "kind"), [("edge", "grpc"), ("edge", "http"), ("router", "metrics")])
def test_a_port_in_use(fleet, tmp_path, process, kind):
    taken = fleet.address("edge-1", kind)
    free = [f"listen.{other}=127.0.0.1:0" for other in ("grpc", "http", "metrics", "mesh") if other != kind]
    settings = [f"data_dir={tmp_path / 'node'}", *free, f"listen.{kind}={taken}"]
    run = nearcast(process, *(part for pair in settings for part in ("--set", pair)))
    assert run.returncode == 69, run.stderr
    require_one_line(run.stderr, taken, "another process", "choose another port")
    assert ask_http(f"http://{fleet.address('edge-1', 'http')}/v2/health/ready").status == 200


def test_an_expired_token(fleet, tmp_path):
    token = invite(fleet, "edge-late", ttl_s=0.05)
    invited = JoinToken.decode(token)
    time.sleep(max(0.0, invited.expires_at - time.time()) + 0.01)
    run = start_joining(tmp_path / "late", token)
    assert run.returncode == 77
    require_one_line(run.stderr, "expired", "nearcast nodes invite")
    # A node whose clock is behind asks the controller, which knows better.
    believed = msgspec.structs.replace(invited, expires_at=time.time() + 600).encode()
    run = start_joining(tmp_path / "late", believed)
    assert run.returncode == 77
    require_one_line(run.stderr, "expired", "nearcast nodes invite")
    assert join(invite(fleet, "edge-late"), tmp_path / "late" / "identity").name == "edge-late", "it is welcome later"


def test_a_token_that_was_used(fleet, tmp_path):
    token = invite(fleet, "edge-first")
    assert join(token, tmp_path / "first").name == "edge-first"
    run = start_joining(tmp_path / "second", token)
    assert run.returncode == 77
    require_one_line(run.stderr, "used already", "nearcast nodes invite")
    assert not (tmp_path / "second" / "identity" / "node.pem").exists()
    assert join(invite(fleet, "edge-second"), tmp_path / "second" / "identity").name == "edge-second"


async def test_a_broker_that_comes_later(fleet, tmp_path, free_port):
    store = Store(tmp_path / "node" / "models")
    shutil.copytree(fleet.bundles / "digits-1", store.stage_folder("digits", 1), dirs_exist_ok=True)
    store.commit("digits", 1, store.stage_folder("digits", 1))
    store.write_pointer("digits", Pointer(stable=1))
    settings = [f"listen.{kind}=127.0.0.1:0" for kind in ("grpc", "http", "metrics")]
    settings += [f"data_dir={tmp_path / 'node'}", f"mqtt.broker=mqtt://127.0.0.1:{free_port}"]
    command = [sys.executable, "-m", "nearcast", "edge", *(part for pair in settings for part in ("--set", pair))]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as node:
        broker = None
        try:
            addresses = json.loads(await asyncio.to_thread(node.stdout.readline))
            url = f"http://{addresses['http']}/v2/models/digits/infer"
            body = json.dumps(image_json(3)).encode()
            assert (await asyncio.to_thread(ask_http, url, body)).status == 200, "it serves without a broker"
            await asyncio.to_thread(
                fleet.until, lambda: f"127.0.0.1:{free_port}" in complaint(tmp_path / "log"), "a word about the broker"
            )
            broker = await Broker.start(tmp_path / "broker", port=free_port)
            reply = await asyncio.to_thread(ask_until_answered, free_port)
            assert int(np.frombuffer(reply, "<f4").argmax()) == 5
        finally:
            node.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(node.wait, WAIT_S)
            if broker is not None:
                await broker.stop()
    assert code == 0
    assert (tmp_path / "log").read_text().count(f"127.0.0.1:{free_port}") <= 10, "it says it, it does not chant it"


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def complaint(log: Path) -> str:
    """What the node says about its broker."""
    return "\n".join(line for line in log.read_text().splitlines() if "broker" in line.lower())


def ask_until_answered(port: int) -> bytes:
    """A device that repeats its request under one correlation until the node is there."""
    with Device(port, "patient") as device:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            device.ask(to_raw(image(5)), model="digits", correlation=b"one", ttl_ms="10000")
            try:
                reply = device.reply(timeout_s=0.3)
            except Exception:
                continue
            assert user_of(reply)["status"] == "200"
            return reply.payload
    raise AssertionError("no answer over MQTT after the broker came")


def invite(fleet, name: str, ttl_s: float = 60.0) -> str:
    with connect(fleet.operator) as client:
        return client.call("POST", "/v1/invites", {"name": name, "role": "edge", "ttl_s": ttl_s})["token"]


def start_joining(folder: Path, token: str) -> subprocess.CompletedProcess[str]:
    settings = [f"data_dir={folder}", *(f"listen.{kind}=127.0.0.1:0" for kind in ("grpc", "http", "metrics"))]
    return nearcast("edge", "--join", token, *(part for pair in settings for part in ("--set", pair)))


def require_one_line(text: str, *told: str) -> None:
    """One sentence for a person, no traceback."""
    lines = [line for line in text.strip().splitlines() if not line.startswith("{")]
    assert len(lines) == 1, text
    assert lines[0].startswith("nearcast: ")
    assert all(word in lines[0] for word in told), lines[0]
