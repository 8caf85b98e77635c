"""Releases at the sync process: a real process, real TLS, a real TUF client."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace
from securesystemslib.signer import CryptoSigner

from model_sync.publisher.bundle import describe_file, read_bundle
from model_sync.publisher.push import push
from model_sync.publisher.sbom import SBOM_FILE, write_sbom
from model_sync.repository.layout import models_path
from model_sync.repository.signing_key import write_key
from nearcast.errors import Code, MeshError
from tests.integration.sync_parts import Sync, make_bundle, read, refused


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {release: make_bundle(folder, release) for release in (1, 2, 3)}


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
