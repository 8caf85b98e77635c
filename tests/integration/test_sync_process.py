"""The sync process as its users meet it: the hint, a restart, the real commands."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from click.testing import CliRunner, Result

from model_sync.controller.api import answer_errors
from model_sync.publisher.control_client import ControlClient
from model_sync.publisher.push import push
from model_sync.publisher.rotation import renew_roles
from model_sync.repository.layout import models_path
from nearcast.cli import main
from nearcast.errors import Code
from nearcast.identity import JoinToken, join
from tests.integration.sync_parts import READY_S, Sync, enrol, make_bundle, read, refused


def test_the_hint_wakes_on_a_change(sync: Sync, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, 1, name="hinted")
    with sync.connect() as client:
        serial = client.call("GET", "/v1/hint?since=0")["serial"]
        started = time.monotonic()
        assert client.call("GET", f"/v1/hint?since={serial}&wait_s=0.2")["serial"] == serial
        assert 0.2 <= time.monotonic() - started < READY_S
        answers: list[int] = []

        def poll() -> None:
            with sync.connect() as waiting:
                answers.append(waiting.call("GET", f"/v1/hint?since={serial}&wait_s=25")["serial"])

        thread = threading.Thread(target=poll)
        thread.start()
        pushed = push(bundle, client, sync.operator, channel="hinted")
        thread.join(10.0)
        assert not thread.is_alive()
        assert serial < answers[0] <= pushed.serial
    assert refused(sync, "GET", "/v1/hint?since=x").code is Code.INVALID_REQUEST


def renew_roles_of(sync: Sync) -> dict[str, datetime]:
    with sync.connect() as client:
        return renew_roles(client, sync.operator)


def test_a_restart_keeps_state_and_port(tmp_path: Path) -> None:
    sync = Sync(tmp_path / "home")
    try:
        bundle = make_bundle(tmp_path, 1)
        open_token, used_token = sync.invite("waiting"), sync.invite("edge-b")
        join(used_token, tmp_path / "edge-b")
        with sync.connect() as client:
            pushed = push(bundle, client, sync.operator, channel="main")
            document = client.call("GET", "/v1/channels/main")
        url = sync.url
        before = read(sync, tmp_path / "client", models_path("affine", 1), "channels/main.json")
        done = renew_roles_of(sync)
        assert set(done) == {"root", "targets", "models-core"}
        assert read(sync, tmp_path / "client", models_path("affine", 1), "channels/main.json") == before
        assert set(renew_roles_of(sync)) == set(done)
        with sync.connect() as client:
            serial = client.call("GET", "/v1/hint?since=0")["serial"]
            assert serial > pushed.serial
        sync.stop(kill=True)
        sync.start()
        assert sync.url == url
        with sync.connect() as client:
            assert client.call("GET", "/v1/channels/main") == document
            assert client.call("GET", "/v1/hint?since=0")["serial"] == serial
        with ControlClient(sync.url, tmp_path / "edge-b") as node:
            node.call("GET", "/v1/nodes")
        error = enrol(sync, JoinToken.decode(used_token).secret)
        assert error is not None
        assert error.code is Code.FORBIDDEN
        join(open_token, tmp_path / "waiting")
        assert read(sync, tmp_path / "client", models_path("affine", 1), "channels/main.json") == before
        second = subprocess.run(
            [sys.executable, "-m", "nearcast", "sync", "--home", str(sync.home / "sync")],
            capture_output=True, text=True, timeout=READY_S, check=False,
        )  # fmt: skip
        assert second.returncode == 75
        assert "Another sync process" in second.stderr
        assert sync.stop() == 0
    finally:
        if sync.process.poll() is None:
            sync.stop(kill=True)


def test_the_commands(sync: Sync, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NEARCAST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NEARCAST_HOME", str(sync.home))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    first, second = make_bundle(tmp_path, 1, name="said"), make_bundle(tmp_path, 2, name="said")
    done = run("push", str(first), "--channel", "cli")
    assert done.exit_code == 0, done.stderr
    assert "said 1 is stable" in done.stdout
    assert "candidate for 20%" in run("push", str(second), "--channel", "cli", "--share", "0.2").stdout
    shown = json.loads(run("rollout", "status", "--channel", "cli", "--json").stdout)
    assert (shown["channel"], shown["rollouts"][0]["candidate"]) == ("cli", 2)
    assert "candidate 2" in run("rollout", "status", "--channel", "cli").stdout
    (newest, *_) = json.loads(run("rollout", "history", "said", "--json").stdout)
    assert (newest["action"], newest["release"], newest["replaced"], newest["by"]) == ("candidate", 2, 1, "operator")
    assert "instead of" in run("rollout", "history", "said").stdout
    assert "50%" in run("rollout", "start", "said", "--release", "2", "--share", "0.5", "--channel", "cli").stdout
    assert run("rollout", "promote", "said", "--channel", "cli").exit_code == 0
    again = run("rollout", "stop", "said", "--channel", "cli")
    assert again.exit_code == 75
    assert "on trial" in again.stderr
    assert "Traceback" not in again.stderr
    back = run("rollback", "said", "--to", "1", "--channel", "cli", "--json")
    assert json.loads(back.stdout)["intent"] == 5
    assert run("rollout", "start", "said", "--release", "2", "--channel", "cli").exit_code == 0
    assert run("rollback", "said", "--to", "1", "--channel", "cli").exit_code == 0
    (newest, *_) = json.loads(run("rollout", "history", "said", "--json").stdout)
    assert (newest["action"], newest["release"], newest["replaced"]) == ("rollback", 1, 2)
    token = run("nodes", "invite", "cli-node", "--role", "router").stdout.strip()
    assert JoinToken.decode(token).role == "router"
    join(token, tmp_path / "cli-node")
    names = [node["name"] for node in json.loads(run("nodes", "list", "--json").stdout)["nodes"]]
    assert "cli-node" in names
    assert "cli-node" in run("nodes", "list").stdout
    assert run("nodes", "remove", "cli-node").exit_code == 0
    assert run("bundle", "verify", str(first)).exit_code == 0
    assert "model.onnx" in run("bundle", "inspect", str(first)).stdout
    assert "overwritten" in run("keys", "init").stderr
    assert run("push", str(tmp_path)).exit_code == 64


async def test_a_full_disk_is_said_in_so_many_words() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    answer = await answer_errors(make_mocked_request("PUT", "/v1/blobs/00"), handler)
    assert answer.status == 503
    assert json.loads(answer.text) == {
        "error": "The controller's disk is full; make room and try again.",
        "code": "UNAVAILABLE",
    }
