"""What nodes refuse, whatever the repository holds: wrong bytes, unknown keys, yesterday's metadata. They serve on."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from model_sync.publisher.keys import init_keys
from model_sync.repository.signing_key import load_key
from nearcast.errors import Code, MeshError
from tests.e2e.fleet import EDGES, Traffic, ask_http, image_json, nearcast
from tests.e2e.ways import open_way

RATE_PER_S = 50.0
TIMESTAMP = "metadata/timestamp.json"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The keys of another mesh."""
    home = tmp_path_factory.mktemp("stranger")
    init_keys(home)
    return home


async def test_a_flipped_byte_in_a_published_file(fleet, figure):
    bundle, release = await asyncio.to_thread(fleet.make_release)
    await asyncio.to_thread(fleet.push, bundle, channel="shelf")  # published, and followed by nobody yet
    blob = blob_of(fleet, bundle)
    async with open_way("router", fleet) as way, Traffic("router", way.ask, rate_per_s=RATE_PER_S) as traffic:
        with flipped(blob, *payloads_of(fleet, blob.name)):
            await asyncio.to_thread(fleet.push, bundle, channel="stable", share=0.5)
            await asyncio.to_thread(fleet.until_candidate, release, "router-1")
            for node in EDGES:
                await asyncio.to_thread(fleet.until, lambda node=node: refusal(fleet, node), f"a refusal by {node}")
                assert "it is not the signed one" in refusal(fleet, node)
            await asyncio.sleep(1.0)  # the router splits already, and no node holds the candidate
            assert {fleet.candidate(node) for node in EDGES} == {None}
            await asyncio.to_thread(fleet.roll_back)
            await asyncio.to_thread(fleet.until_candidate, None)
    figure(f"{len(traffic.failures)} of {len(traffic.samples)} requests failed meanwhile")
    assert [s.error for s in traffic.failures] == []
    assert set(traffic.versions()) == {"1"}
    for node in EDGES:
        assert not (fleet.mesh.data_dir / node / "models" / "digits" / str(release)).exists()


def test_a_push_with_an_unknown_key(fleet, stranger, tmp_path):
    thief = tmp_path / "thief"
    shutil.copytree(fleet.operator / "operator", thief / "operator")
    shutil.copyfile(stranger / "operator" / "models-core.pem", thief / "operator" / "models-core.pem")
    bundle, _ = fleet.make_release()
    before = (fleet.repository / TIMESTAMP).read_bytes()
    run = nearcast("push", str(bundle), "--channel", "stable", home=thief)
    assert run.returncode == 65, run.stderr
    assert "key" in run.stderr
    assert (fleet.repository / TIMESTAMP).read_bytes() == before, "nothing was published"
    assert serves(fleet, "edge-1")


def test_metadata_signed_by_an_unknown_key(fleet, stranger):
    """Somebody owns the mirror: a fresh timestamp, with every field right, and a signature that nobody vouches for."""
    path = fleet.repository / TIMESTAMP
    forged = Metadata.from_file(str(path))
    forged.signed.version += 1
    forged.sign(load_key(stranger / "sync" / "online.pem"))
    with replaced(path, forged.to_bytes()):
        fleet.new_agent("edge-2")
        fleet.until(lambda: "not signed by the keys" in fleet.agent("edge-2").error, "a refusal")
        assert serves(fleet, "edge-2")
    fleet.until(lambda: fleet.agent("edge-2").error == "", "a check that holds again")


def test_metadata_of_yesterday(fleet):
    """The same thief plays what the mesh said before the last change."""
    path = fleet.repository / TIMESTAMP
    yesterday = path.read_bytes()
    bundle, release = fleet.make_release()
    fleet.push(bundle, channel="stable", share=0.5)
    fleet.until_candidate(release)
    fleet.roll_back()
    fleet.until_candidate(None)
    with replaced(path, yesterday):
        fleet.new_agent("edge-1")
        fleet.until(lambda: "older than what is known" in fleet.agent("edge-1").error, "a refusal")
        assert serves(fleet, "edge-1")
    fleet.until(lambda: fleet.agent("edge-1").error == "", "a check that holds again")
    assert fleet.agent("edge-1").models["digits"].stable == 1


def test_a_push_of_an_older_release(fleet):
    older, number = fleet.make_release()
    newer, _ = fleet.make_release()
    fleet.push(newer, channel="shelf")
    run = nearcast("push", str(older), "--channel", "stable", home=fleet.operator)
    assert run.returncode == 75, run.stderr
    assert f"Release {number} of digits is not newer than the published {number + 1}" in run.stderr
    with pytest.raises(MeshError) as refused:
        fleet.roll_back(release=number)
    assert refused.value.code in (Code.CONFLICT, Code.MODEL_NOT_FOUND, Code.INVALID_REQUEST)
    assert serves(fleet, "edge-1")


def serves(fleet, node):
    """Whether the node itself reads a seven with the first release."""
    url = f"http://{fleet.address(node, 'http')}/v2/models/digits/infer"
    said = ask_http(url, json.dumps(image_json(7)).encode())
    return (said.status, said.headers.get("nc-model-version")) == (200, "1")


def refusal(fleet, node):
    """What the agent of a node has against the release it is told to try."""
    models = fleet.agent(node).models
    return models["digits"].error if "digits" in models else ""


def blob_of(fleet, bundle: Path) -> Path:
    """The model file of a bundle as it lies in the repository."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    (sha256,) = (entry["sha256"] for entry in manifest["files"] if entry["path"] == manifest["model_file"])
    return fleet.repository / "blobs" / sha256[:2] / sha256


def payloads_of(fleet, sha256: str) -> list[Path]:
    """Every shorter way to that file."""
    payloads = [path for path in (fleet.repository / "deltas" / sha256).iterdir() if path.name != "index.json"]
    assert payloads
    return payloads


@contextmanager
def flipped(*paths: Path):
    with ExitStack() as stack:
        for path in paths:
            data = path.read_bytes()
            middle = len(data) // 2
            stack.enter_context(replaced(path, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]))
        yield


@contextmanager
def replaced(path: Path, data: bytes):
    before = path.read_bytes()
    put(path, data)
    try:
        yield
    finally:
        put(path, before)


def put(path: Path, data: bytes) -> None:
    """At once, as a server may be reading it."""
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)
