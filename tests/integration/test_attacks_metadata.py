"""Attacks with metadata, by who controls the bytes and by who stole a key, against the real agent."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner

from model_sync.repository.layout import target_file_path
from nearcast.clock import ManualClock
from tests.integration.agent_parts import MODEL, Origin, Publisher, make_config, running, serving, settled, status_of
from tests.integration.attack_parts import (
    STRANGER,
    Hostile,
    Template,
    attacked,
    overtake,
    refuse,
    sign_targets,
    told,
    trusted_files,
)

DAY_S = 86_400.0
Attack = Callable[[Hostile, Publisher], None]


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


def mix_snapshot(hostile: Hostile, _: Publisher) -> None:
    """The newest timestamp beside the snapshot before it."""
    newest = hostile.path("snapshot")
    version = int(newest.name.partition(".")[0])
    newest.write_bytes(hostile.path("snapshot", version - 1).read_bytes())


def mix_role(hostile: Hostile, _: Publisher) -> None:
    """The newest snapshot beside an older rollout role under the new name."""
    newest = hostile.path("rollout")
    version = int(newest.name.partition(".")[0])
    newest.write_bytes(hostile.path("rollout", version - 1).read_bytes())


def mix_document(hostile: Hostile, publisher: Publisher) -> None:
    """The newest metadata beside the channel document of before."""
    newest = hostile.role("rollout").signed.version
    present, earlier = (document_path(hostile, version) for version in (newest, newest - 1))
    present.write_bytes(earlier.read_bytes().ljust(present.stat().st_size)[: present.stat().st_size])


def document_path(hostile: Hostile, version: int) -> Path:
    path = "channels/stable.json"
    target = hostile.role("rollout", version).signed.targets[path]
    return hostile.folder / target_file_path(path, target.hashes["sha256"])


def stranger_signs(name: str) -> Attack:
    """A role of the next version, and all above it, signed by a key that nobody trusts."""

    def attack(hostile: Hostile, _: Publisher) -> None:
        data = hostile.change(name, STRANGER, by=lambda _: None)
        if name == "snapshot":
            hostile.stamp()
        elif name not in ("timestamp", "root"):
            hostile.publish(**{name: data})

    return attack


def lower(name: str) -> Attack:
    """The owner of the stolen online key lowers one role's version; everything above it is newer and well signed."""

    def attack(hostile: Hostile, _: Publisher) -> None:
        if name == "timestamp":
            role = hostile.role("timestamp")
            role.signed.version -= 1
            hostile.sign("timestamp", role, hostile.online)
        elif name == "snapshot":
            newest = hostile.role("snapshot")
            newest.signed.version -= 1
            data = hostile.sign("snapshot", newest, hostile.online)

            def name_older(signed: Any) -> None:
                signed.snapshot_meta.version -= 1
                signed.snapshot_meta.hashes = None
                signed.snapshot_meta.length = len(data)

            hostile.change("timestamp", hostile.online, by=name_older)
        else:
            older = hostile.role(name).signed.version - 1
            hostile.publish(**{name: hostile.path(name, older).read_bytes()})

    return attack


def forget_role(hostile: Hostile, _: Publisher) -> None:
    """A snapshot in which the models role is no longer listed."""
    hostile.change("snapshot", hostile.online, by=lambda signed: signed.meta.pop("models-core.json"))
    hostile.stamp()


def expire(name: str) -> Attack:
    """A role that is well signed, newer, and has expired."""

    def attack(hostile: Hostile, _: Publisher) -> None:
        def age(signed: Any) -> None:
            signed.expires = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(days=1)

        keys = {"root": hostile.root_key, "targets": hostile.targets_key}
        data = hostile.change(name, keys.get(name, hostile.online), by=age)
        if name == "snapshot":
            hostile.stamp()
        elif name not in ("timestamp", "root"):
            hostile.publish(**{name: data})

    return attack


def sign_twice(hostile: Hostile, _: Publisher) -> None:
    """One signature, listed twice, where two are needed."""
    hostile.raise_threshold([CryptoSigner.generate_ed25519()], 2)
    data = json.loads(hostile.change("targets", hostile.targets_key, by=lambda _: None))
    data["signatures"] *= 2
    write_raw(hostile, "targets", data)


def sign_twice_by_one_key(hostile: Hostile, _: Publisher) -> None:
    """One key under two names, where two keys are needed: a root that lists it so is refused, or counts it once."""
    hostile.raise_threshold([CryptoSigner.generate_ed25519()], 2)
    data = json.loads(hostile.change("targets", hostile.targets_key, by=lambda _: None))
    second = hostile.role("root").signed.roles["targets"].keyids[1]
    data["signatures"].append({"keyid": second, "sig": data["signatures"][0]["sig"]})
    write_raw(hostile, "targets", data)


def write_raw(hostile: Hostile, name: str, document: dict[str, Any]) -> None:
    """Replace the newest file of a role by bytes that the library would not make, and name them in the snapshot."""
    data = json.dumps(document).encode()
    hostile.path(name).write_bytes(data)
    version = document["signed"]["version"]

    def name_it(signed: Any) -> None:
        meta = signed.meta[f"{name}.json"]
        meta.version, meta.length, meta.hashes = version, len(data), None

    hostile.change("snapshot", hostile.online, by=name_it)
    hostile.stamp()


def skip_root(hostile: Hostile, _: Publisher) -> None:
    """Root 2 is root 3 in truth."""
    hostile.path("root", 2).write_bytes(hostile.change("root", hostile.root_key, by=lambda _: None, step=2))


def new_root_signs_itself(hostile: Hostile, _: Publisher) -> None:
    """Root 2 with another root key, signed by that key alone."""

    def take_over(signed: Any) -> None:
        signed.revoke_key(hostile.root_key.public_key.keyid, "root")
        signed.add_key(STRANGER.public_key, "root")

    hostile.change("root", STRANGER, by=take_over)


def old_root_signs_alone(hostile: Hostile, _: Publisher) -> None:
    """Root 2 with another root key, signed by the old one alone."""

    def take_over(signed: Any) -> None:
        signed.revoke_key(hostile.root_key.public_key.keyid, "root")
        signed.add_key(STRANGER.public_key, "root")

    hostile.change("root", hostile.root_key, by=take_over)


ONLINE = ("timestamp", "snapshot")
WITHOUT_A_KEY: list[tuple[Attack, str]] = [
    (mix_snapshot, "not the signed ones"),
    (mix_role, "not the signed ones"),
    (mix_document, "not the signed ones"),
    (stranger_signs("timestamp"), "not signed by the keys"),
    (stranger_signs("root"), "not signed by the keys"),
    (new_root_signs_itself, "not signed by the keys"),
]
WITH_A_STOLEN_KEY: list[tuple[Attack, str, tuple[str, ...]]] = [
    (stranger_signs("snapshot"), "not signed by the keys", ONLINE[:1]),
    (stranger_signs("targets"), "not signed by the keys", ONLINE),
    (stranger_signs("rollout"), "not signed by the keys", ONLINE),
    (lower("timestamp"), "older than what is known", ()),
    (lower("snapshot"), "older than what is known", ()),
    (lower("targets"), "older than what is known", ONLINE[:1]),
    (lower("rollout"), "older than what is known", ONLINE[:1]),
    (forget_role, "missing info for", ONLINE[:1]),
    (expire("timestamp"), "has expired", ()),
    (expire("snapshot"), "has expired", ONLINE[:1]),
    (expire("targets"), "has expired", ONLINE),
    (expire("rollout"), "has expired", ONLINE),
]
WITH_THE_ROOT_KEY: list[tuple[Attack, str, tuple[str, ...]]] = [
    (expire("root"), "has expired", ("root",)),
    (sign_twice, "Multiple signatures", ("root", *ONLINE)),
    (sign_twice_by_one_key, "not signed by the keys", ("root", *ONLINE)),
    (skip_root, "older than what is known", ()),
    (old_root_signs_alone, "not signed by the keys", ()),
]


def named(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0].__qualname__.partition('.')[0]}-{i}") for i, case in enumerate(cases)]


@pytest.mark.parametrize(("attack", "reason"), named(WITHOUT_A_KEY))
async def test_whoever_controls_all_bytes_can_only_delay(
    tmp_path: Path, publisher: Publisher, origin: Origin, attack: Attack, reason: str
) -> None:
    config = make_config(tmp_path, publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        publisher.roll(1)
        hostile = Hostile(publisher, tmp_path / "hostile")
        attack(hostile, publisher)
        with attacked(config, publisher, origin, hostile):
            await refuse(agent, config, reason)
        assert await agent.check(), "what the owner publishes is still believed"
        assert told(config).error == ""


@pytest.mark.parametrize(("attack", "reason", "well_signed"), named(WITH_A_STOLEN_KEY))
async def test_the_stolen_online_key(
    tmp_path: Path, publisher: Publisher, origin: Origin, attack: Attack, reason: str, well_signed: tuple[str, ...]
) -> None:
    config = make_config(tmp_path, publisher, origin)
    sign_targets(publisher)
    async with running(config) as agent:
        await settled(agent, stable=1)
        publisher.roll(1)
        hostile = Hostile(publisher, tmp_path / "hostile")
        assert await agent.check()
        attack(hostile, publisher)
        with attacked(config, publisher, origin, hostile, well_signed=well_signed):
            await refuse(agent, config, reason)
        overtake(publisher, hostile)
        assert await agent.check(), "what the owner publishes is still believed"


@pytest.mark.parametrize(("attack", "reason", "well_signed"), named(WITH_THE_ROOT_KEY))
async def test_roots(
    tmp_path: Path, publisher: Publisher, origin: Origin, attack: Attack, reason: str, well_signed: tuple[str, ...]
) -> None:
    config = make_config(tmp_path, publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        hostile = Hostile(publisher, tmp_path / "hostile")
        attack(hostile, publisher)
        with attacked(config, publisher, origin, hostile, well_signed=well_signed):
            await refuse(agent, config, reason)


async def test_a_whole_state_of_before(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    """Replay: genuine metadata, all of one moment, of which the node knows a later one."""
    config = make_config(tmp_path, publisher, origin)
    hostile = Hostile(publisher, tmp_path / "hostile")
    publisher.push(2)
    publisher.roll(2)
    async with running(config) as agent:
        await settled(agent, stable=2)
        with attacked(config, publisher, origin, hostile):
            await refuse(agent, config, "older than what is known")
        assert await agent.check()


async def test_a_root_that_does_not_follow_is_not_even_read(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    config = make_config(tmp_path, publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        hostile = Hostile(publisher, tmp_path / "hostile")
        hostile.change("root", hostile.root_key, by=lambda _: None, step=2)
        with attacked(config, publisher, origin, hostile):
            assert await agent.check()
        assert "root_history/3.root.json" not in trusted_files(config)


async def test_a_frozen_repository_is_noticed_whatever_the_clock_says(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    """Freeze: genuine metadata, served on after it has expired. Whoever also turns the clock back gains no more."""
    config = make_config(tmp_path, publisher, origin)
    clock = ManualClock(wall=time.time())
    async with running(config, clock=clock) as agent:
        await settled(agent, stable=1)
        clock.advance(0.9 * DAY_S)
        assert await agent.check(), "the floor of the clock follows what was verified"
        clock.advance(0.2 * DAY_S)
        with attacked(config, publisher, origin):
            await refuse(agent, config, "has expired", "The node serves on and installs nothing")
    before = trusted_files(config)
    async with running(config, clock=ManualClock(wall=1000.0)) as agent:
        await agent.check()
        assert told(config).checked_at > time.time() + 0.8 * DAY_S, "1970 is before what this node has seen"
        assert status_of(agent).stable == 1
    assert trusted_files(config) == before


async def test_a_fast_forwarded_timestamp_is_forgotten_with_its_key(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    """Fast-forward: a thief's huge version numbers end with the thief's key."""
    config = make_config(tmp_path, publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        hostile = Hostile(publisher, tmp_path / "hostile")
        hostile.change("snapshot", hostile.online, by=lambda _: None, step=1_000_000)
        hostile.stamp()
        hostile.change("timestamp", hostile.online, by=lambda _: None, step=1_000_000)
        with attacked(config, publisher, origin, hostile, well_signed=ONLINE):
            assert await agent.check()
        await refuse(agent, config, "older than what is known")
        publisher.push(2)
        publisher.roll(2)
        owner = Hostile(publisher, tmp_path / "hostile-owner")
        fresh = CryptoSigner.generate_ed25519()

        def replace_keys(signed: Any) -> None:
            for role in ("timestamp", "snapshot"):
                signed.revoke_key(owner.online.public_key.keyid, role)
                signed.add_key(fresh.public_key, role)

        owner.change("root", owner.root_key, by=replace_keys)
        owner.sign("snapshot", owner.role("snapshot"), fresh)
        owner.stamp(fresh)
        origin.publisher = owner  # type: ignore[assignment]
        assert await agent.check(), told(config).error
        await settled(agent, stable=2)


async def test_an_older_channel_document_under_a_newer_signature(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    """The stolen rollout key signs what the channel said before."""
    config = make_config(tmp_path, publisher, origin)
    publisher.push(2)
    publisher.roll(2)
    async with running(config) as agent:
        await settled(agent, stable=2)
        hostile = Hostile(publisher, tmp_path / "hostile")
        older = document_path(hostile, 2).read_bytes()
        hostile.add_target("rollout", "channels/stable.json", older, hostile.online)
        with attacked(config, publisher, origin, hostile, well_signed=("rollout", *ONLINE)):
            assert await agent.check()
        assert "Refused the channel document of intent 1: intent 2 is obeyed." in told(config).models[MODEL].error
        assert status_of(agent).stable == 2
