"""The sync process as its users meet it: a real process, real TLS, a real TUF client, the real commands."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import select
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper
from securesystemslib.signer import CryptoSigner
from tuf.ngclient import Updater, UpdaterConfig

from model_sync.controller.api import answer_errors
from model_sync.controller.enrolment import certificate_sha256
from model_sync.publisher.bundle import BundleSpec, create_bundle, describe_file, read_bundle
from model_sync.publisher.control_client import ControlClient, connect
from model_sync.publisher.keys import init_keys
from model_sync.publisher.push import ControlFetcher, push
from model_sync.publisher.rotation import renew_roles
from model_sync.publisher.sbom import SBOM_FILE, write_sbom
from model_sync.repository.layout import models_path
from model_sync.repository.signing_key import write_key
from nearcast.errors import Code, MeshError
from nearcast.identity import JoinToken, join, make_csr, renew
from nearcast.store.manifest import Tensor

READY_S = 20.0
TENSORS = {
    "inputs": (Tensor(name="x", datatype="FP32", shape=(-1, 2), batch_axis=0),),
    "outputs": (Tensor(name="y", datatype="FP32", shape=(-1, 2), batch_axis=0),),
}


class Sync:
    """A mesh's home and its sync process."""

    def __init__(self, home: Path) -> None:
        self.home = home
        init_keys(home)
        self.start()

    def start(self, *settings: str) -> None:
        command = [
            sys.executable,
            "-m",
            "nearcast",
            "sync",
            "--home",
            str(self.home / "sync"),
            "--set=telemetry.level=error",
        ]
        self.process = subprocess.Popen(
            [*command, *(f"--set={setting}" for setting in settings)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], READY_S)[0], "the sync process did not get ready"
        ready = json.loads(self.process.stdout.readline())
        assert ready["ready"] == "sync"
        self.url = ready["control"]

    def stop(self, *, kill: bool = False) -> int:
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        code = self.process.wait(READY_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    @property
    def operator(self) -> Path:
        return self.home / "operator"

    def connect(self) -> ControlClient:
        return connect(self.home)

    def invite(self, name: str, role: str = "edge", ttl_s: float = 60.0) -> str:
        with self.connect() as client:
            return str(client.call("POST", "/v1/invites", {"name": name, "role": role, "ttl_s": ttl_s})["token"])


@pytest.fixture(scope="module")
def sync(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sync]:
    """One process for all tests that do not stop it; they use names of their own."""
    running = Sync(tmp_path_factory.mktemp("mesh"))
    yield running
    assert running.stop() == 0


def make_bundle(folder: Path, release: int, *, name: str = "affine") -> Path:
    """A real model that adds its release number."""
    source = folder / f"source-{name}-{release}"
    source.mkdir()
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "b"], ["y"])],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.full(2, release, np.float32), "b")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source / "model.onnx"
    )
    np.savez(source / "one.npz", in_x=np.array([[1, 2]], np.float32))
    spec = BundleSpec(
        name=name, release=release, semver=f"{release}.0.0", engine="onnxruntime", model_file="model.onnx",
        licence="Apache-2.0", golden=("one.npz",), **TENSORS,
    )  # fmt: skip
    bundle = folder / f"bundle-{name}-{release}"
    create_bundle(spec, source, bundle)
    return bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {release: make_bundle(folder, release) for release in (1, 2, 3)}


def read(sync: Sync, cache: Path, *paths: str) -> list[bytes | None]:
    """What a node's TUF client finds over HTTPS, from the pinned root on."""
    for folder in (cache / "metadata", cache / "targets"):
        folder.mkdir(parents=True, exist_ok=True)
    with sync.connect() as client:
        updater = Updater(
            str(cache / "metadata"), f"{sync.url}/repository/metadata/", str(cache / "targets"),
            f"{sync.url}/repository/targets/", fetcher=ControlFetcher(client),
            config=UpdaterConfig(prefix_targets_with_hash=True), bootstrap=(sync.operator / "root.json").read_bytes(),
        )  # fmt: skip
        updater.refresh()
        found: list[bytes | None] = []
        for path in paths:
            target = updater.get_targetinfo(path)
            found.append(None if target is None else Path(updater.download_target(target)).read_bytes())
        return found


def refused(sync: Sync, method: str, path: str, body: object = None) -> MeshError:
    with sync.connect() as client, pytest.raises(MeshError) as caught:
        client.call(method, path, body)  # type: ignore[arg-type]
    return caught.value


# -- push, canary, rollback ------------------------------------------------------------


def test_push_canary_promote_and_roll_back(sync: Sync, bundles: dict[int, Path], tmp_path: Path) -> None:
    with sync.connect() as client:
        first = push(bundles[1], client, sync.operator, channel="main", share=0.2)
        assert (first.action, first.intent, first.is_published) == ("stable", 1, True)
        assert first.uploaded_bytes > 0
        second = push(bundles[2], client, sync.operator, channel="main", share=0.2)
        assert (second.action, second.rollback_ok) == ("candidate", (1,))
        document = client.call("GET", "/v1/channels/main")
        (rollout,) = document["rollouts"]
        assert (rollout["stable"]["release"], rollout["candidate"]["release"], rollout["share"]) == (1, 2, 0.2)
        client.call("POST", "/v1/rollouts", {"channel": "main", "model": "affine", "action": "promote"})
        again = push(bundles[2], client, sync.operator, channel="beta")
        assert (again.action, again.is_published, again.uploaded_bytes) == ("stable", False, 0)
        answer = client.call(
            "POST", "/v1/rollouts", {"channel": "main", "model": "affine", "action": "rollback", "release": 1}
        )
        assert answer["intent"] == 4
        (rollout,) = client.call("GET", "/v1/channels/main")["rollouts"]
        assert (rollout["stable"]["release"], rollout["rollback"]) == (1, True)
    manifest = (bundles[2] / "manifest.json").read_bytes()
    found = read(sync, tmp_path, models_path("affine", 2), "channels/main.json")
    assert found[0] == manifest
    assert json.loads(found[1] or b"{}")["intent"] == 4
    entry = json.loads(manifest)["files"][0]
    with sync.connect() as client:
        status, blob = client.get_bytes(f"/repository/blobs/{entry['sha256'][:2]}/{entry['sha256']}")
    assert status == 200
    assert hashlib.sha256(blob).hexdigest() == entry["sha256"]
    error = refused(
        sync,
        "POST",
        "/v1/rollouts",
        {"channel": "beta", "model": "affine", "action": "candidate", "release": 7, "share": 1},
    )
    assert error.code is Code.MODEL_NOT_FOUND


def test_an_older_or_changed_release_is_refused(sync: Sync, tmp_path: Path) -> None:
    newer, older = make_bundle(tmp_path, 5, name="aged"), make_bundle(tmp_path, 4, name="aged")
    with sync.connect() as client:
        push(newer, client, sync.operator, channel="aged")
        with pytest.raises(MeshError, match="not newer than the published 5") as caught:
            push(older, client, sync.operator, channel="aged")
        assert caught.value.code is Code.CONFLICT
        manifest = newer / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"semver": "5.0.0"', '"semver": "5.0.1"'))
        with pytest.raises(MeshError, match="other content"):
            push(newer, client, sync.operator, channel="aged")


def test_a_flipped_byte_is_refused(sync: Sync, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, 1, name="flipped")
    model = bundle / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with sync.connect() as client, pytest.raises(MeshError, match=r"model\.onnx") as caught:
        push(bundle, client, sync.operator, channel="flipped")
    assert caught.value.code is Code.UNTRUSTED


def test_a_model_that_fails_its_golden_vectors_is_refused(sync: Sync, tmp_path: Path) -> None:
    bundle, other = make_bundle(tmp_path, 1, name="wrong"), make_bundle(tmp_path, 2, name="wrong")
    # A bundle that is whole, but whose model is not the one that gave the golden answers.
    shutil.copy(other / "model.onnx", bundle / "model.onnx")
    manifest = read_bundle(bundle)[0]
    files = [describe_file(bundle / entry.path) for entry in manifest.files if entry.path != SBOM_FILE]
    write_sbom(replace(manifest, sbom_file=None, files=tuple(files)), bundle)
    manifest = replace(manifest, files=(*files, describe_file(bundle / SBOM_FILE)))
    (bundle / "manifest.json").write_bytes(manifest.encode())
    with sync.connect() as client, pytest.raises(MeshError, match="gate") as caught:
        push(bundle, client, sync.operator, channel="wrong")
    assert caught.value.code is Code.UNTRUSTED


def test_an_unknown_team_key_is_refused_by_the_controller(sync: Sync, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, 1, name="forged")
    forger = tmp_path / "forger"
    shutil.copytree(sync.operator, forger, symlinks=True)
    (forger / "models-core.pem").unlink()
    write_key(forger / "models-core.pem", CryptoSigner.generate_ed25519())
    with sync.connect() as client, pytest.raises(MeshError, match="not signed by a key") as caught:
        push(bundle, client, forger, channel="forged")
    assert caught.value.code is Code.UNTRUSTED
    (forger / "models-core.pem").rename(forger / "models-rest.pem")
    with sync.connect() as client, pytest.raises(MeshError, match="delegates nothing") as caught:
        push(bundle, client, forger, channel="forged")
    assert caught.value.code is Code.UNTRUSTED


def test_a_release_without_its_blob_is_refused(sync: Sync, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path, 1, name="hollow")
    with sync.connect() as client:
        monkeypatch.setattr(client, "put_file", lambda *_: None)
        with pytest.raises(MeshError, match="upload its blob first") as caught:
            push(bundle, client, sync.operator, channel="hollow")
        assert caught.value.code is Code.INVALID_REQUEST
        monkeypatch.undo()
        assert push(bundle, client, sync.operator, channel="hollow").intent == 1


def test_uploads_are_checked(sync: Sync, tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(b"some bytes")
    wrong = hashlib.sha256(b"other bytes").hexdigest()
    sent: list[int] = []
    with sync.connect() as client:
        with pytest.raises(MeshError) as caught:
            client.put_file(f"/v1/blobs/{wrong}", file, sent.append)
        assert caught.value.code is Code.UNTRUSTED
        assert not client.has(f"/repository/blobs/{wrong[:2]}/{wrong}", 11)
        with pytest.raises(MeshError) as caught:
            client.put_file("/v1/blobs/..%2F..%2Fonline.pem", file, sent.append)
        assert caught.value.code is Code.INVALID_REQUEST
        right = hashlib.sha256(b"some bytes").hexdigest()
        client.put_file(f"/v1/blobs/{right}", file, sent.append)
        assert client.has(f"/repository/blobs/{right[:2]}/{right}", 10)
        assert not client.has(f"/repository/blobs/{right[:2]}/{right}", 9)
    assert sum(sent) == 30
    assert not list((sync.home / "sync" / "repository").rglob(".*.tmp"))


@pytest.mark.parametrize(
    "path", ["../online.pem", "..%2fonline.pem", "metadata/..%2f..%2fonline.pem", "metadata/", "blobs", ".x.tmp", "a/b"]
)
def test_nothing_else_is_served(sync: Sync, path: str) -> None:
    with sync.connect() as client:
        assert client.get_bytes(f"/repository/{path}")[0] == 404


def test_files_have_etags_and_ranges(sync: Sync) -> None:
    with sync.connect() as client:
        connection = client._connection
        connection.request("GET", "/repository/metadata/1.root.json")
        response = connection.getresponse()
        whole, etag = response.read(), response.getheader("ETag")
        assert "immutable" in (response.getheader("Cache-Control") or "")
        connection.request("GET", "/repository/metadata/1.root.json", headers={"Range": "bytes=10-19"})
        response = connection.getresponse()
        assert (response.status, response.read()) == (206, whole[10:20])
        connection.request("GET", "/repository/metadata/1.root.json", headers={"If-None-Match": etag or ""})
        response = connection.getresponse()
        assert (response.status, response.read()) == (304, b"")


# -- enrolment ------------------------------------------------------------


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


def enrol(sync: Sync, secret: str, name: str = "any") -> MeshError | None:
    """Enrol without the checks that a joining node makes before it asks."""
    _, csr = make_csr(name, "edge")
    with sync.connect() as client:
        try:
            client.call("POST", "/v1/enrol", {"secret": secret, "csr": csr.decode()})
        except MeshError as error:
            return error
    return None


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


# -- hint, restart, commands ------------------------------------------------------------


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


def test_the_commands(sync: Sync, tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("NEARCAST_")}
    environ["NEARCAST_HOME"] = str(sync.home)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from nearcast.cli import main; main()", *arguments],
            capture_output=True, text=True, timeout=READY_S, env=environ, check=False,
        )  # fmt: skip

    first, second = make_bundle(tmp_path, 1, name="said"), make_bundle(tmp_path, 2, name="said")
    done = run("push", str(first), "--channel", "cli")
    assert done.returncode == 0, done.stderr
    assert "said 1 is stable" in done.stdout
    assert "candidate for 20%" in run("push", str(second), "--channel", "cli", "--share", "0.2").stdout
    shown = json.loads(run("rollout", "status", "--channel", "cli", "--json").stdout)
    assert (shown["channel"], shown["rollouts"][0]["candidate"]) == ("cli", 2)
    assert "candidate 2" in run("rollout", "status", "--channel", "cli").stdout
    (newest, *_) = json.loads(run("rollout", "history", "said", "--json").stdout)
    assert (newest["action"], newest["release"], newest["replaced"], newest["by"]) == ("candidate", 2, 1, "operator")
    assert "instead of" in run("rollout", "history", "said").stdout
    assert "50%" in run("rollout", "start", "said", "--release", "2", "--share", "0.5", "--channel", "cli").stdout
    assert run("rollout", "promote", "said", "--channel", "cli").returncode == 0
    again = run("rollout", "stop", "said", "--channel", "cli")
    assert again.returncode == 75
    assert "on trial" in again.stderr
    assert "Traceback" not in again.stderr
    back = run("rollback", "said", "--to", "1", "--channel", "cli", "--json")
    assert json.loads(back.stdout)["intent"] == 5
    assert run("rollout", "start", "said", "--release", "2", "--channel", "cli").returncode == 0
    assert run("rollback", "said", "--to", "1", "--channel", "cli").returncode == 0
    (newest, *_) = json.loads(run("rollout", "history", "said", "--json").stdout)
    assert (newest["action"], newest["release"], newest["replaced"]) == ("rollback", 1, 2)
    token = run("nodes", "invite", "cli-node", "--role", "router").stdout.strip()
    assert JoinToken.decode(token).role == "router"
    join(token, tmp_path / "cli-node")
    names = [node["name"] for node in json.loads(run("nodes", "list", "--json").stdout)["nodes"]]
    assert "cli-node" in names
    assert "cli-node" in run("nodes", "list").stdout
    assert run("nodes", "remove", "cli-node").returncode == 0
    assert run("bundle", "verify", str(first)).returncode == 0
    assert "model.onnx" in run("bundle", "inspect", str(first)).stdout
    assert "overwritten" in run("keys", "init").stderr
    assert run("push", str(tmp_path)).returncode == 64


async def test_a_full_disk_is_said_in_so_many_words() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    answer = await answer_errors(make_mocked_request("PUT", "/v1/blobs/00"), handler)
    assert answer.status == 503
    assert json.loads(answer.text) == {
        "error": "The controller's disk is full; make room and try again.",
        "code": "UNAVAILABLE",
    }
