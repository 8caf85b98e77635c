"""Names and delegations that lead elsewhere: what a stolen offline key, or another team's key, must not reach."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Targets

from model_sync.repository.layout import encode_metadata, make_target, models_path
from model_sync.rollout.document import ChannelDocument, Pick, Rollout
from tests.integration.agent_parts import MODEL, Origin, Publisher, make_config, running, serving, settled, status_of
from tests.integration.attack_parts import STRANGER, Hostile, Template, attacked, refuse, told

ONLINE = ("timestamp", "snapshot")
DIGEST = "0" * 64
LATER = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=30)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def publisher(template: Template, tmp_path: Path) -> Publisher:
    return template.copy(tmp_path)


@pytest.fixture
def origin(publisher: Publisher) -> Iterator[Origin]:
    with serving(publisher) as running_origin:
        yield running_origin


@pytest.fixture
def hostile(publisher: Publisher, tmp_path: Path) -> Hostile:
    return Hostile(publisher, tmp_path / "hostile")


def delegate(hostile: Hostile, role: DelegatedRole, signer: CryptoSigner, content: Targets) -> bytes:
    """Let the targets role ask `role` before all others; returns the signed content of it, published."""

    def put_first(signed: Any) -> None:
        keys = {**signed.delegations.keys, signer.public_key.keyid: signer.public_key}
        signed.delegations = Delegations(keys, {role.name: role, **signed.delegations.roles})

    targets = hostile.change("targets", hostile.targets_key, by=put_first)
    made = Metadata(content)
    made.sign(signer)
    data = encode_metadata(made)
    place = hostile.folder / "metadata" / f"{content.version}.{quote(role.name, safe='')}.json"
    if len(place.name) < 255:
        place.write_bytes(data)
    snapshot = hostile.role("snapshot")
    snapshot.signed.meta[f"{role.name}.json"] = MetaFile.from_data(content.version, data, ["sha256"])
    hostile.sign("snapshot", snapshot, hostile.online)
    hostile.publish(targets=targets)
    return data


def delegated(name: str, signer: CryptoSigner, *paths: str, terminating: bool = False) -> DelegatedRole:
    return DelegatedRole(name, [signer.public_key.keyid], 1, terminating, paths=list(paths))


def say(hostile: Hostile, *rollouts: Rollout) -> None:
    """The stolen rollout key signs the next document of the channel."""
    document = ChannelDocument(channel="stable", intent=hostile.serial + 100, rollouts=rollouts)
    hostile.add_target("rollout", "channels/stable.json", msgspec.json.encode(document), hostile.online)


def add_release(hostile: Hostile, publisher: Publisher, release: int, role: Targets) -> Pick:
    """A manifest that only `role` names."""
    manifest = msgspec.structs.replace(publisher.repository.find(MODEL, 1).manifest, release=release)
    data, path = manifest.encode(), models_path(MODEL, release)
    target = make_target(path, data)
    role.targets[path] = target
    sha256 = target.hashes["sha256"]
    place = hostile.folder / "targets" / "models" / MODEL / f"{sha256}.{release}.json"
    place.write_bytes(data)
    return Pick(release=release, manifest_sha256=sha256)


ROLE_NAMES = [
    *("../../evil", "/tmp/evil", "..", ".", "a/b", "a\\b", "%2e%2e%2fevil", "root_history/9.root", "x\0y", "évil ?#"),
    "x" * 300,
]


@pytest.mark.parametrize("name", ROLE_NAMES, ids=[str(index) for index in range(len(ROLE_NAMES))])
async def test_a_role_name_never_becomes_a_path(
    tmp_path: Path, publisher: Publisher, origin: Origin, hostile: Hostile, name: str
) -> None:
    config = make_config(tmp_path, publisher, origin)
    evil = delegate(hostile, delegated(name, STRANGER, "models/*/*"), STRANGER, Targets(expires=LATER))
    folder = Path(config.store) / ".agent" / "metadata"
    async with running(config) as agent:
        await settled(agent, stable=1)
        (tmp_path / "hostile-evil").write_bytes(evil)
        with attacked(config, publisher, origin, hostile, well_signed=("targets", *ONLINE), also=[evil]):
            await agent.check()
        assert {path.parent for path in folder.rglob("*.json")} == {folder, folder / "root_history"}
        assert sorted(path.name for path in (folder / "root_history").iterdir()) == ["1.root.json"]
        assert status_of(agent).stable == 1


@pytest.mark.parametrize("name", ["root", "timestamp", "snapshot", "targets", ""])
async def test_a_delegated_role_may_not_take_the_name_of_another(
    tmp_path: Path, publisher: Publisher, origin: Origin, hostile: Hostile, name: str
) -> None:
    config = make_config(tmp_path, publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        harmless = delegate(
            hostile, delegated("harmless-name", STRANGER, "models/*/*"), STRANGER, Targets(expires=LATER)
        )
        data = hostile.path("targets").read_bytes().replace(b"harmless-name", name.encode())
        document = msgspec.json.decode(data)
        signature = hostile.targets_key.sign(encode_canonical(document["signed"]).encode())
        document["signatures"] = [signature.to_dict()]
        data = msgspec.json.encode(document)
        hostile.path("targets").write_bytes(data)
        snapshot = hostile.role("snapshot")
        snapshot.signed.meta["targets.json"] = MetaFile.from_data(document["signed"]["version"], data, ["sha256"])
        snapshot.signed.version += 1
        hostile.sign("snapshot", snapshot, hostile.online)
        hostile.stamp()
        with attacked(config, publisher, origin, hostile, well_signed=ONLINE, also=[harmless]):
            await refuse(agent, config, "it is malformed")


async def test_a_role_that_names_targets_outside_its_paths(
    tmp_path: Path, publisher: Publisher, origin: Origin, hostile: Hostile
) -> None:
    """The models key tries to write the channel's document, the rollout key to vouch for a model."""
    config = make_config(tmp_path, publisher, origin)
    document = msgspec.json.encode(ChannelDocument(channel="stable", intent=99))
    async with running(config) as agent:
        await settled(agent, stable=1)
        hostile.add_target("models-core", "channels/stable.json", document, hostile.models)
        with attacked(config, publisher, origin, hostile, well_signed=("models-core", *ONLINE)):
            assert await agent.check()
        assert status_of(agent).intent == 1
        role = hostile.role("rollout")
        pick = add_release(hostile, publisher, 7, role.signed)
        role.signed.version += 1
        hostile.publish(rollout=hostile.sign("rollout", role, hostile.online))
        say(hostile, Rollout(model=MODEL, stable=pick))
        with attacked(config, publisher, origin, hostile, well_signed=("models-core", "rollout", *ONLINE)):
            assert await agent.check()
        assert told(config).models[MODEL].error == (
            f"Refused {MODEL} release 7: no models role vouches for it; push it first."
        )


async def test_a_terminating_delegation_ends_the_search(
    tmp_path: Path, publisher: Publisher, origin: Origin, hostile: Hostile
) -> None:
    config = make_config(tmp_path, publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        first = delegated("first", STRANGER, "models/*/*", terminating=True)
        empty = delegate(hostile, first, STRANGER, Targets(expires=LATER))
        role = hostile.role("models-core")
        pick = add_release(hostile, publisher, 7, role.signed)
        role.signed.version += 1
        hostile.publish(models_core=hostile.sign("models-core", role, hostile.models))
        say(hostile, Rollout(model=MODEL, stable=pick))
        well_signed = ("targets", "rollout", "models-core", *ONLINE)
        with attacked(config, publisher, origin, hostile, well_signed=well_signed, also=[empty]):
            assert await agent.check()
        assert "no models role vouches for it" in told(config).models[MODEL].error


async def test_a_role_is_verified_anew_for_each_delegator(
    tmp_path: Path, publisher: Publisher, origin: Origin, hostile: Hostile
) -> None:
    """Another team delegates to a role of the same name with its own key; that role must not count for our paths."""
    config = make_config(tmp_path, publisher, origin)
    team = CryptoSigner.generate_ed25519()
    async with running(config) as agent:
        await settled(agent, stable=1)
        fake = Targets(expires=LATER, version=hostile.role("models-core").signed.version + 1)
        pick = add_release(hostile, publisher, 7, fake)
        inner = Delegations(
            {STRANGER.public_key.keyid: STRANGER.public_key},
            {"models-core": delegated("models-core", STRANGER, "models/other/*")},
        )
        other = delegate(
            hostile, delegated("models-b", team, "models/*/*"), team, Targets(expires=LATER, delegations=inner)
        )
        made = Metadata(fake)
        hostile.publish(models_core=hostile.sign("models-core", made, STRANGER))
        say(
            hostile,
            Rollout(model="other", stable=Pick(release=1, manifest_sha256=DIGEST)),
            Rollout(model=MODEL, stable=pick),
        )
        well_signed = ("targets", "rollout", "models-core", *ONLINE)
        with attacked(config, publisher, origin, hostile, well_signed=well_signed, also=[other]):
            assert await agent.check()
        assert "not signed by the keys" in told(config).models[MODEL].error
        assert status_of(agent).stable == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"files": [{"path": "../../evil", "size_bytes": 0, "sha256": DIGEST, "chunks": []}]}, "malformed"),
        ({"files": [{"path": "evil\n", "size_bytes": 0, "sha256": DIGEST, "chunks": []}]}, "malformed"),
        ({"files": [{"path": "/etc/evil", "size_bytes": 0, "sha256": DIGEST, "chunks": []}]}, "malformed"),
        ({"files": [{"path": "x", "size_bytes": 0, "sha256": "../" * 21 + "x", "chunks": []}]}, "malformed"),
        ({"files": [{"path": "x", "size_bytes": -1, "sha256": DIGEST, "chunks": []}]}, "malformed"),
        ({"files": [{"path": "x", "size_bytes": 2**70, "sha256": DIGEST, "chunks": []}]}, "chunk list"),
        ({"files": [{"path": "x", "size_bytes": 2**60, "sha256": DIGEST, "chunks": []}]}, "chunk list"),
        ({"name": "../affine"}, "malformed"),
        ({"name": "affine\n"}, "malformed"),
        ({"name": "other"}, "its manifest describes other"),
        ({"release": 8}, f"its manifest describes {MODEL} release 8"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
async def test_a_manifest_that_leads_elsewhere(
    tmp_path: Path, publisher: Publisher, origin: Origin, hostile: Hostile, change: dict[str, Any], reason: str
) -> None:
    """Both the models key and the online key are stolen: what they sign is still checked."""
    config = make_config(tmp_path, publisher, origin)
    manifest = msgspec.json.decode(publisher.repository.find(MODEL, 1).manifest.encode()) | {"release": 7} | change
    manifest["model_file"] = manifest["files"][0]["path"] if "files" in change else manifest["model_file"]
    manifest["golden"] = [] if "files" in change else manifest["golden"]
    data, path = msgspec.json.encode(manifest), models_path(MODEL, 7)
    async with running(config) as agent:
        await settled(agent, stable=1)
        hostile.add_target("models-core", path, data, hostile.models)
        sha256 = hostile.role("models-core").signed.targets[path].hashes["sha256"]
        say(hostile, Rollout(model=MODEL, stable=Pick(release=7, manifest_sha256=sha256)))
        with attacked(config, publisher, origin, hostile, well_signed=("models-core", "rollout", *ONLINE)):
            assert await agent.check()
        assert reason in told(config).models[MODEL].error


@pytest.mark.parametrize("role", ["rollout", "models-core"])
@pytest.mark.parametrize("digest", ["../" * 21 + "x", "F" * 64, DIGEST[1:] + "\n", "0" * 63, ""])
async def test_a_digest_that_is_a_path(
    tmp_path: Path, publisher: Publisher, origin: Origin, hostile: Hostile, role: str, digest: str
) -> None:
    config = make_config(tmp_path, publisher, origin)
    path = "channels/stable.json" if role == "rollout" else models_path(MODEL, 1)
    keys = {"rollout": hostile.online, "models-core": hostile.models}

    def lead_elsewhere(signed: Any) -> None:
        signed.targets[path].hashes = {"sha256": digest}

    async with running(config) as agent:
        await settled(agent, stable=1)
        hostile.publish(**{role.replace("-", "_"): hostile.change(role, keys[role], by=lead_elsewhere)})
        with attacked(config, publisher, origin, hostile, well_signed=(role, *ONLINE)):
            await agent.check()
        wrong = told(config)
        assert "sha256" in wrong.error + wrong.models[MODEL].error or "vouches for" in wrong.models[MODEL].error


ROLLOUT = b'{"model":"../x","stable":{"release":1,"manifest_sha256":"%s"}}' % DIGEST.encode()


@pytest.mark.parametrize(
    "document",
    [
        *(b"", b"[]", b"{}", b"\xff\xfe", b'{"a":' * 100_000),
        b'{"channel":"../stable","intent":9}',
        b'{"channel":"other","intent":9}',
        b'{"channel":"stable","intent":0}',
        b'{"channel":"stable","intent":9,"rollouts":[' + ROLLOUT + b"]}",
    ],
    ids=range(9),
)
async def test_a_channel_document_that_makes_no_sense(
    tmp_path: Path, publisher: Publisher, origin: Origin, hostile: Hostile, document: bytes
) -> None:
    config = make_config(tmp_path, publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        hostile.add_target("rollout", "channels/stable.json", document, hostile.online)
        with attacked(config, publisher, origin, hostile, well_signed=("rollout", *ONLINE)):
            await refuse(agent, config, "document of channel 'stable'")
