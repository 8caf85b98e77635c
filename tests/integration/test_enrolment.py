"""How nodes join a mesh: invitations, certificates and names at a real sync process."""

from __future__ import annotations

import http.client
import json
import shutil
import ssl
import threading
import time
from pathlib import Path

import pytest

from model_sync.controller.enrolment import certificate_sha256
from model_sync.publisher.control_client import ControlClient
from nearcast.errors import Code, MeshError
from nearcast.identity import JoinToken, join, renew
from tests.integration.sync_parts import READY_S, Sync, enrol, refused


def test_join_announce_renew_and_remove(sync: Sync, tmp_path: Path) -> None:
    folder = tmp_path / "edge-a"
    identity = join(sync.invite("edge-a"), folder)
    assert identity.uri == "spiffe://nearcast/edge/edge-a"
    assert (folder / "root.json").read_bytes() == (sync.operator / "root.json").read_bytes()
    with ControlClient(sync.url, folder) as node, sync.connect() as operator:
        addresses = {"grpc": "127.0.0.1:8001", "mesh": "127.0.0.1:9001"}
        assert node.call("POST", "/v1/nodes/self", {"addresses": addresses, "models": {"m": {"stable": 1}}})
        (row,) = [row for row in node.call("GET", "/v1/nodes")["nodes"] if row["name"] == "edge-a"]
        assert (row["role"], row["addresses"], row["models"]) == ("edge", addresses, {"m": {"stable": 1}})
        assert 0 <= row["seen_s_ago"] < READY_S
        for method, path in (("POST", "/v1/invites"), ("POST", "/v1/rollouts"), ("DELETE", "/v1/nodes/edge-a")):
            with pytest.raises(MeshError) as caught:
                node.call(method, path, {"name": "x"} if method == "POST" else None)
            assert caught.value.code is Code.FORBIDDEN
        with pytest.raises(MeshError) as caught:
            operator.call("POST", "/v1/nodes/self", {"addresses": {}})
        assert caught.value.code is Code.FORBIDDEN
        before = certificate_sha256((folder / "node.pem").read_bytes())
        renew(folder)
        assert certificate_sha256((folder / "node.pem").read_bytes()) != before
        assert refused(sync, "POST", "/v1/invites", {"name": "edge-a", "role": "edge"}).code is Code.CONFLICT
        operator.call("DELETE", "/v1/nodes/edge-a")
        with pytest.raises(MeshError, match="not enrolled") as caught:
            node.call("GET", "/v1/nodes")
        assert caught.value.code is Code.FORBIDDEN
    # The name is free again, but the old certificate stays out even though it is of the same name and role.
    shutil.copytree(folder, tmp_path / "old")
    shutil.rmtree(folder)
    join(sync.invite("edge-a"), folder)
    with ControlClient(sync.url, folder) as node:
        node.call("GET", "/v1/nodes")
    with ControlClient(sync.url, tmp_path / "old") as node, pytest.raises(MeshError, match="not enrolled"):
        node.call("GET", "/v1/nodes")


def test_a_token_works_once(sync: Sync) -> None:
    token = JoinToken.decode(sync.invite("once"))
    assert enrol(sync, token.secret) is None
    error = enrol(sync, token.secret)
    assert error is not None
    assert error.code is Code.FORBIDDEN
    assert "used already" in error.message


def test_an_expired_token_is_refused(sync: Sync) -> None:
    token = JoinToken.decode(sync.invite("late", ttl_s=0.05))
    time.sleep(max(0.0, token.expires_at - time.time()) + 0.01)
    error = enrol(sync, token.secret)
    assert error is not None
    assert error.code is Code.FORBIDDEN
    assert "expired" in error.message


def test_an_unknown_secret_is_refused(sync: Sync) -> None:
    error = enrol(sync, "x" * 43)
    assert error is not None
    assert error.code is Code.UNAUTHENTICATED


def test_racing_for_one_token_has_one_winner(sync: Sync) -> None:
    token = JoinToken.decode(sync.invite("raced"))
    results: list[MeshError | None] = []
    threads = [threading.Thread(target=lambda: results.append(enrol(sync, token.secret))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(READY_S)
    assert len(results) == 8
    assert results.count(None) == 1


def test_names_and_roles_are_checked(sync: Sync) -> None:
    sync.invite("twice")
    assert refused(sync, "POST", "/v1/invites", {"name": "twice"}).code is Code.CONFLICT
    for body in (
        {"name": "Bad Name"},
        {"name": "ok", "role": "sync"},
        {"name": "ok", "role": "king"},
        {"name": "ok", "x": 1},
    ):
        assert refused(sync, "POST", "/v1/invites", body).code is Code.INVALID_REQUEST
    assert refused(sync, "POST", "/v1/invites", {"name": "ok", "ttl_s": 1e9}).code is Code.INVALID_REQUEST
    assert refused(sync, "DELETE", "/v1/nodes/nobody").code is Code.MODEL_NOT_FOUND
    assert refused(sync, "DELETE", "/v1/nodes/operator").code is Code.CONFLICT


def test_secrets_are_not_stored(sync: Sync) -> None:
    token = JoinToken.decode(sync.invite("hashed"))
    for path in (sync.home / "sync").glob("control.db*"):
        assert token.secret.encode() not in path.read_bytes()


def anonymous(sync: Sync, method: str, path: str) -> tuple[int, bytes]:
    context = ssl.create_default_context(cafile=str(sync.operator / "identity" / "ca.pem"))
    context.check_hostname = False
    host, _, port = sync.url.removeprefix("https://").rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=READY_S)
    try:
        connection.request(method, path, b"{}" if method != "GET" else None)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_what_needs_an_identity_and_what_does_not(sync: Sync) -> None:
    for method, path in (
        ("GET", "/v1/nodes"), ("POST", "/v1/nodes/self"), ("POST", "/v1/renew"), ("POST", "/v1/invites"),
        ("POST", "/v1/releases"), ("POST", "/v1/rollouts"), ("PUT", f"/v1/blobs/{'0' * 64}"), ("DELETE", "/v1/nodes/x"),
    ):  # fmt: skip
        status, body = anonymous(sync, method, path)
        assert (status, json.loads(body)["code"]) == (401, "UNAUTHENTICATED"), path
    assert anonymous(sync, "GET", "/repository/metadata/timestamp.json")[0] == 200
    assert anonymous(sync, "GET", "/v1/ca") == (200, (sync.operator / "identity" / "ca.pem").read_bytes())
    assert anonymous(sync, "GET", "/v1/ca?kind=device")[1] == (sync.home / "sync" / "device-ca" / "ca.pem").read_bytes()
