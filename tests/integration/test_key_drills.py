"""The drills of docs/keys.md: its own commands, a real controller, and real agents that start from the first root."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import MetaFile

from model_sync.agent.app import Agent
from model_sync.publisher.control_client import connect
from model_sync.repository.layout import encode_metadata, make_target, models_path, target_file_path, withdrawn_paths
from model_sync.repository.repository import Repository
from model_sync.repository.signing_key import load_key
from model_sync.rollout.document import ChannelDocument, Pick, first_intent, last_intent
from nearcast.errors import Code, MeshError
from tests.integration.agent_parts import MODEL, running, settled, status_of
from tests.integration.key_parts import (
    Controller,
    Node,
    newest,
    page_commands,
    run_command,
    run_page,
    titles_with_commands,
)

NOT_NOW = 75


class Mesh(Controller):
    """One operator's mesh that lives through all drills in turn, and a node that joined at its beginning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first, *rest = page_commands("One operator")
        assert run_command(first)[0] == 0
        super().__init__(folder / "mesh")
        self.root = (self.operator / "root.json").read_bytes()
        self.stable = 1
        self.push(1)
        self.node = Node(folder / "node", self.repository, self.root)
        asyncio.run(self._install())
        for line in rest:
            code, output = run_command(line)
            assert code == 0, output

    async def _install(self) -> None:
        async with running(self.node.config) as agent:
            await settled(agent, stable=1)

    def next_release(self) -> int:
        """Push one more release and make it stable."""
        self.stable = max(Repository(self.repository).releases(MODEL)) + 1
        self.push(self.stable)
        return self.stable

    def mirror(self, folder: Path) -> Path:
        """A copy of the repository that a thief may write."""
        shutil.copytree(self.repository, folder)
        return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drills")


@pytest.fixture(scope="module")
def mesh(folder: Path) -> Iterator[Mesh]:
    with contextlib.chdir(folder):
        made = Mesh(folder)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page speaks of `mesh`, `backup`, `draft`: folders where the operator stands."""
    monkeypatch.chdir(folder)


def forge(
    mirror: Path, key: CryptoSigner, *, intent: int | None = None, models: CryptoSigner | None = None, jump: int = 1000
) -> None:
    """What a thief of the online key makes of a mirror: a channel, perhaps a team's list, snapshot and timestamp."""
    changed = {"rollout": newest(mirror, "rollout")}
    path = "channels/stable.json"
    target = changed["rollout"].signed.targets[path]
    data = (mirror / target_file_path(path, target.hashes["sha256"])).read_bytes()
    document = msgspec.json.decode(data, type=ChannelDocument)
    document = msgspec.structs.replace(document, intent=intent or document.intent + 1)
    if models is not None:
        changed["models-core"] = newest(mirror, "models-core")
    data = msgspec.json.encode(document)
    target = make_target(path, data)
    (mirror / target_file_path(path, target.hashes["sha256"])).write_bytes(data)
    changed["rollout"].signed.targets[path] = target
    snapshot, timestamp = newest(mirror, "snapshot"), newest(mirror, "timestamp")
    for name, role in changed.items():
        role.signed.version += jump
        role.sign(models if name == "models-core" and models else key)
        (mirror / "metadata" / f"{role.signed.version}.{name}.json").write_bytes(encode_metadata(role))
        snapshot.signed.meta[f"{name}.json"] = MetaFile.from_data(
            role.signed.version, encode_metadata(role), ["sha256"]
        )
    snapshot.signed.version += jump
    snapshot.sign(key)
    (mirror / "metadata" / f"{snapshot.signed.version}.snapshot.json").write_bytes(encode_metadata(snapshot))
    timestamp.signed.version += jump
    timestamp.signed.snapshot_meta = MetaFile.from_data(snapshot.signed.version, encode_metadata(snapshot), ["sha256"])
    timestamp.sign(key)
    (mirror / "metadata" / "timestamp.json").write_bytes(encode_metadata(timestamp))


def error_of(agent: Agent) -> str:
    return json.loads(agent.status_path.read_text())["error"] if agent.status_path.exists() else ""


async def refusal(node: Node) -> str:
    """What an agent says to what it finds, which must change nothing about what it serves."""
    async with running(node.config) as agent:
        await settled(agent, stable=stable_of(node))
        await agent.check()
        await settled(agent, stable=stable_of(node))
        return agent._status.error or status_of(agent).error


def stable_of(node: Node) -> int:
    return int(json.loads((node.folder / "store" / MODEL / "serving.json").read_text())["stable"])


async def follows(node: Node, stable: int) -> None:
    """An agent checks without complaint, and comes to serve this release."""
    async with running(node.config) as agent:
        assert await agent.check(), agent._status.error
        await settled(agent, stable=stable)


def test_no_command_of_the_page_is_left_out() -> None:
    """A section with commands that nobody runs would rot; name it here once a test above or below runs it."""
    assert titles_with_commands() == {
        "One operator",
        "A company",
        "The online key is lost or stolen",
        "A team's key is lost",
        "A team's key is stolen, and a release of the thief is published",
        "The targets key is lost or stolen",
        "The laptop with the operator's root key is lost",
        "One of three root keys is lost",
        "A key more, a key less, a new team",
        "So many root keys are lost that the threshold cannot be met",
    }


async def test_a_stolen_online_key_is_replaced(mesh: Mesh, tmp_path: Path) -> None:
    node = mesh.node.copy(tmp_path / "node")
    old = load_key(mesh.home / "sync" / "online.pem")
    version = newest(mesh.repository, "timestamp").signed.version
    # The thief takes the node as far ahead as the key allows: huge versions, and the last intent there is.
    forge(mesh.mirror(tmp_path / "mirror"), old, intent=last_intent(newest(mesh.repository, "root").signed.version))
    await follows(node.copy(tmp_path / "deceived", tmp_path / "mirror"), stable=1)
    deceived = Node(tmp_path / "deceived", mesh.repository, mesh.root)
    assert "older than what is known" in await refusal(deceived)

    await asyncio.to_thread(run_page, "The online key is lost or stolen")
    new = load_key(mesh.home / "sync" / "online.pem")
    assert new.public_key.keyid != old.public_key.keyid
    assert not (mesh.home / "sync" / "online-next.pem").exists()
    root = newest(mesh.repository, "root").signed
    assert newest(mesh.repository, "timestamp").signed.version < version + 1000, "versions need not outrun the thief's"
    # Old timestamp and snapshot are dropped, the channel is newer than any intent of before: the node follows again.
    await follows(deceived, stable=1)
    document = Repository(mesh.repository).channel("stable")
    assert document is not None
    assert document.intent == first_intent(root.version)
    release = await asyncio.to_thread(mesh.next_release)
    await follows(deceived, stable=release)

    # What the old key signs is refused by the node and by the controller; so is an intent beyond this root's range.
    forge(mesh.mirror(tmp_path / "old-key"), old)
    assert "not signed by the keys" in await refusal(deceived.copy(tmp_path / "a", tmp_path / "old-key"))
    with pytest.raises(MeshError, match="valid signature") as caught:
        Repository(tmp_path / "old-key", new)
    assert caught.value.code is Code.UNTRUSTED
    forge(mesh.mirror(tmp_path / "beyond"), new, intent=last_intent(root.version) + 1)
    assert "beyond what root" in await refusal(deceived.copy(tmp_path / "b", tmp_path / "beyond"))


async def test_a_lost_online_key_is_replaced(mesh: Mesh, tmp_path: Path) -> None:
    node = mesh.node.copy(tmp_path / "node")
    mesh.stop()
    (mesh.home / "sync" / "online.pem").unlink()
    mesh.start()
    await follows(node, stable=mesh.stable)
    with pytest.raises(MeshError, match="online key") as caught:
        mesh.push(mesh.stable + 1)
    assert caught.value.code is Code.UNAVAILABLE
    await follows(node, stable=mesh.stable)
    await asyncio.to_thread(run_page, "The online key is lost or stolen")
    await asyncio.to_thread(mesh.next_release)
    await follows(node, stable=mesh.stable)
    assert [load_key(mesh.home / "sync" / "online.pem").public_key.keyid] == mesh.keyids("online")


async def test_a_lost_team_key_is_replaced(mesh: Mesh, tmp_path: Path) -> None:
    node = mesh.node.copy(tmp_path / "node")
    await follows(node, stable=mesh.stable)
    old = load_key(mesh.operator / "models-core.pem")
    (mesh.operator / "models-core.pem").unlink()
    with pytest.raises(MeshError, match="no key of a team"):
        mesh.push(mesh.stable + 1)
    before = newest(mesh.repository, "models-core")
    await asyncio.to_thread(run_page, "A team's key is lost")
    after = newest(mesh.repository, "models-core")
    # What is still wanted was signed again, by the new key alone.
    assert after.signed.targets == before.signed.targets
    assert set(after.signatures) == set(mesh.keyids("models-core"))
    assert old.public_key.keyid not in after.signatures
    await follows(node, stable=mesh.stable)
    release = await asyncio.to_thread(mesh.next_release)
    await follows(node, stable=release)
    # The old key is refused by the controller, and by a node even with the online key's help.
    forged = deepcopy(newest(mesh.repository, "models-core"))
    forged.signed.version += 1
    forged.sign(old)
    body = {"team": "core", "metadata": forged.to_dict(), "manifests": {}}
    with connect(mesh.home) as client, pytest.raises(MeshError, match="not signed by a key") as caught:
        client.call("POST", "/v1/releases", body)
    assert caught.value.code is Code.UNTRUSTED
    forge(mesh.mirror(tmp_path / "mirror"), load_key(mesh.home / "sync" / "online.pem"), models=old)
    assert "not signed by the keys" in await refusal(node.copy(tmp_path / "a", tmp_path / "mirror"))


async def test_a_release_of_a_stolen_team_key_is_withdrawn(mesh: Mesh, tmp_path: Path) -> None:
    node = mesh.node.copy(tmp_path / "node")
    stolen, title = mesh.stable + 1, "A team's key is stolen, and a release of the thief is published"
    mesh.push(stolen, share=0.5)
    [line] = page_commands(title)
    code, output = await asyncio.to_thread(run_command, line, {"STOLEN": str(stolen)})
    assert code == NOT_NOW, output
    assert "points to" in output
    mesh.roll("stop")
    await asyncio.to_thread(run_page, title, {"STOLEN": str(stolen)})
    role = newest(mesh.repository, "models-core").signed
    assert withdrawn_paths(role) == {models_path(MODEL, stolen)}
    assert models_path(MODEL, mesh.stable) in role.targets
    with pytest.raises(MeshError, match="not published"):
        mesh.roll("stable", release=stolen)
    with pytest.raises(MeshError, match="withdrawn") as caught:
        mesh.push(stolen)
    assert caught.value.code is Code.UNTRUSTED
    await follows(node, stable=mesh.stable)
    # With the online key the thief may still point to it: the node refuses that release alone and serves on.
    mirror, key = mesh.mirror(tmp_path / "mirror"), load_key(mesh.home / "sync" / "online.pem")
    repository = Repository(mirror, key)
    document = repository.channel("stable")
    assert document is not None
    pick = Pick(release=stolen, manifest_sha256="0" * 64)
    rollout = msgspec.structs.replace(document.rollouts[0], stable=pick)
    repository.publish_channel(msgspec.structs.replace(document, intent=document.intent + 1, rollouts=(rollout,)))
    assert "vouch" in await refusal(node.copy(tmp_path / "a", mirror))
    mesh.push(stolen + 1)
    mesh.stable = stolen + 1
    await follows(node, stable=mesh.stable)


async def test_a_lost_targets_key_is_replaced(mesh: Mesh, tmp_path: Path) -> None:
    node = mesh.node.copy(tmp_path / "node")
    (mesh.operator / "targets.pem").unlink()
    await asyncio.to_thread(run_page, "The targets key is lost or stolen")
    await follows(node, stable=mesh.stable)
    assert (mesh.operator / "targets.pem").exists()


async def test_a_lost_laptop_key_is_replaced_with_the_backup(mesh: Mesh, tmp_path: Path, folder: Path) -> None:
    node = mesh.node.copy(tmp_path / "node")
    shutil.move(mesh.home / "backup", folder / "backup")
    lost = load_key(mesh.operator / "root.pem").public_key.keyid
    (mesh.operator / "root.pem").unlink()
    before = mesh.keyids("root")
    await asyncio.to_thread(run_page, "The laptop with the operator's root key is lost", {"LOST": lost[:8]})
    after = mesh.keyids("root")
    assert len(after) == 2
    assert set(before) - set(after) == {lost}
    assert load_key(mesh.operator / "root.pem").public_key.keyid in after
    await follows(node, stable=mesh.stable)


async def test_a_team_gets_keys_and_loses_one(mesh: Mesh, tmp_path: Path, folder: Path) -> None:
    node = mesh.node.copy(tmp_path / "node")
    lines = page_commands("A key more, a key less, a new team")
    for line in lines[:-1]:
        code, output = await asyncio.to_thread(run_command, line)
        assert code == 0, output
    third = load_key(folder / "third.pem").public_key.keyid
    assert third in mesh.keyids("models-vision")
    code, output = await asyncio.to_thread(run_command, lines[-1], {"THIRD": third[:8]})
    assert code == 0, output
    assert mesh.keyids("models-vision") == [load_key(mesh.operator / "models-vision.pem").public_key.keyid]
    code, output = await asyncio.to_thread(run_command, "nearcast keys revoke models-core --key '' --home mesh")
    assert code != 0
    [only] = mesh.keyids("models-core")
    code, output = await asyncio.to_thread(run_command, f"nearcast keys revoke models-core --key {only} --home mesh")
    assert "keys rotate models-core" in output
    await follows(node, stable=mesh.stable)


async def test_without_a_root_nodes_join_a_new_mesh(mesh: Mesh, tmp_path: Path, folder: Path) -> None:
    node = mesh.node.copy(tmp_path / "node")  # it has obeyed the first root only
    run_page("So many root keys are lost that the threshold cannot be met")
    successor = Controller(folder / "new-mesh")
    try:
        strange = node.copy(tmp_path / "a", successor.repository)
        successor.push(1)
        assert "signed" in await refusal(strange), "who has not joined believes the old root only"
        joined = Node(node.folder, successor.repository, (successor.operator / "root.json").read_bytes())
        await follows(joined, stable=1)
        successor.push(2)
        await follows(joined, stable=2)
    finally:
        successor.stop()


@pytest.fixture
def company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    monkeypatch.chdir(tmp_path)
    run_page("A company")
    started = Controller(tmp_path / "mesh")
    yield started
    started.stop()


async def test_a_company_signs_with_several_holders(company: Controller, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()

    def leave(name: str) -> None:
        shutil.move(tmp_path / name, away / name)

    def come(name: str) -> None:
        shutil.move(away / name, tmp_path / name)

    root = (company.operator / "root.json").read_bytes()
    node = Node(tmp_path / "node", company.repository, root)
    # Two of the team have to sign a release.
    leave("engineer.pem")
    with pytest.raises(MeshError, match="1 of 2 signatures") as caught:
        company.push(1)
    assert caught.value.code is Code.CONFLICT
    assert Repository(company.repository).releases(MODEL) == []
    come("engineer.pem")
    code, output = run_command("nearcast keys sign mesh/draft --key engineer.pem --home engineer")
    assert code == 0, output
    assert models_path(MODEL, 1) in output
    leave("engineer.pem")
    company.push(1)
    assert not (company.home / "draft").exists()
    await follows(node, stable=1)

    # Carol has lost her root key; Alice and Bob, each for himself, put Dora's in its place.
    lost = load_key(tmp_path / "carol.pem").public_key.keyid
    leave("bob.pem")
    for line in page_commands("One of three root keys is lost"):
        if "keys submit" in line:
            leave("bob.pem")
        if "keys sign" in line:
            code, output = await asyncio.to_thread(run_command, "nearcast keys submit draft --home mesh")
            assert "1 of 2 signatures" in output
            code, output = await asyncio.to_thread(run_command, "nearcast keys sign draft --key ci.pem --home ci")
            assert code != 0, "no root key"
            come("bob.pem")
        code, output = await asyncio.to_thread(run_command, line, {"LOST": lost[:8]})
        assert code == (NOT_NOW if "keys rotate" in line else 0), output
    assert lost not in company.keyids("root")
    assert len(company.keyids("root")) == 3
    await follows(node, stable=1)
