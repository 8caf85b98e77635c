"""A hostile repository, and what must still hold after an agent has looked at it."""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Role

from model_sync.agent.app import Agent
from model_sync.agent.config import AgentConfig
from model_sync.agent.install.fetch import verify_file
from model_sync.agent.status import AgentStatus, read_status
from model_sync.repository.layout import encode_metadata, make_target, target_file_path
from model_sync.repository.repository import Repository
from model_sync.repository.signing_key import load_key
from nearcast.store import Store
from tests.integration.agent_parts import MODEL, Origin, Publisher, make_config, running, serving, settled

STRANGER = CryptoSigner.generate_ed25519()
"""A key that nobody trusts."""


class Template:
    """A publisher with release 1 as stable and a node that has installed it, to be copied for each test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.publisher = Publisher(folder / "home")
        self.publisher.push(1)
        self.publisher.roll(1)
        asyncio.run(self._install())

    async def _install(self) -> None:
        with serving(self.publisher) as origin:
            config = make_config(self.folder, self.publisher, origin)
            async with running(config) as agent:
                await settled(agent, stable=1)

    def copy(self, folder: Path) -> Publisher:
        """A publisher in `folder/home`, for a node in `folder/store`."""
        for name in ("home", "store"):
            shutil.copytree(self.folder / name, folder / name, symlinks=True)
        made = copy.copy(self.publisher)
        made.folder = folder / "home"
        made.repository = Repository(made.folder / "sync" / "repository", load_key(made.folder / "sync" / "online.pem"))
        made.picks = dict(made.picks)
        return made


class Hostile:
    """A copy of a repository that an attacker may write, with the keys that the test says were stolen.

    It has what `Origin` asks of a publisher.
    """

    def __init__(self, publisher: Publisher, folder: Path) -> None:
        self.repository = self  # `Origin` looks for `.repository.folder` and `.repository.serial`
        self.folder = folder
        self.online = load_key(publisher.folder / "sync" / "online.pem")
        self.models = publisher.key
        self.root_key = load_key(publisher.folder / "operator" / "root.pem")
        self.targets_key = load_key(publisher.folder / "operator" / "targets.pem")
        shutil.copytree(publisher.repository.folder, folder)

    @property
    def serial(self) -> int:
        return int(self.role("timestamp").signed.version)

    def path(self, name: str, version: int | None = None) -> Path:
        """The file of a role: its newest version, or that one."""
        folder = self.folder / "metadata"
        if name == "timestamp":
            return folder / "timestamp.json"
        if version is None:
            version = max(int(path.name.partition(".")[0]) for path in folder.glob(f"*.{name}.json"))
        return folder / f"{version}.{name}.json"

    def role(self, name: str, version: int | None = None) -> Metadata[Any]:
        return Metadata.from_file(str(self.path(name, version)))

    def sign(self, name: str, role: Metadata[Any], *signers: CryptoSigner) -> bytes:
        """Write a role as the version that it says it is, signed by these alone."""
        role.signatures.clear()
        for signer in signers:
            role.sign(signer, append=True)
        data = encode_metadata(role)
        self.path(name, role.signed.version).write_bytes(data)
        return data

    def change(self, name: str, *signers: CryptoSigner, by: Callable[[Any], None], step: int = 1) -> bytes:
        """Write the next version of a role after `by` changed it."""
        role = self.role(name)
        role.signed.version += step
        by(role.signed)
        return self.sign(name, role, *signers)

    def publish(self, **roles: bytes) -> None:
        """Name these roles in a new snapshot and a new timestamp; needs the online key, which counts as stolen."""
        snapshot = self.role("snapshot")
        for name, data in roles.items():
            name = name.replace("_", "-")
            version = Metadata.from_bytes(data).signed.version
            snapshot.signed.meta[f"{name}.json"] = MetaFile.from_data(version, data, ["sha256"])
        snapshot.signed.version += 1
        self.sign("snapshot", snapshot, self.online)
        self.stamp()

    def stamp(self, *signers: CryptoSigner) -> None:
        """A new timestamp for the newest snapshot."""
        snapshot = self.path("snapshot").read_bytes()
        version = Metadata.from_bytes(snapshot).signed.version

        def name_snapshot(signed: Any) -> None:
            signed.snapshot_meta = MetaFile.from_data(version, snapshot, ["sha256"])

        self.change("timestamp", *(signers or (self.online,)), by=name_snapshot)

    def add_target(self, role: str, path: str, data: bytes, *signers: CryptoSigner) -> None:
        """Let a role name a target, and publish it."""
        target = make_target(path, data)
        place = self.folder / target_file_path(path, target.hashes["sha256"])
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        self.publish(**{role: self.change(role, *signers, by=lambda signed: signed.targets.update({path: target}))})

    def raise_threshold(self, keys: Sequence[CryptoSigner], threshold: int) -> None:
        """A genuine root 2 that asks for more signatures on the targets role."""

        def ask_more(signed: Any) -> None:
            for signer in keys:
                signed.add_key(signer.public_key, "targets")
            old = signed.roles["targets"]
            signed.roles["targets"] = Role(old.keyids, threshold)

        self.change("root", self.root_key, by=ask_more)


def trusted_files(config: AgentConfig) -> dict[str, bytes]:
    """All metadata that the agent keeps, by its name."""
    folder = Path(config.store) / ".agent" / "metadata"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}


def versions(files: dict[str, bytes]) -> dict[str, int]:
    return {name: Metadata.from_bytes(data).signed.version for name, data in files.items()}


def genuine(publisher: Publisher) -> set[bytes]:
    """Everything that the owners of the keys have published."""
    return {path.read_bytes() for path in (publisher.repository.folder / "metadata").glob("*.json")}


def told(config: AgentConfig) -> AgentStatus:
    """What the agent's status file says to everybody."""
    status = read_status(Path(config.store))
    assert status is not None
    return status


@contextmanager
def attacked(
    config: AgentConfig,
    publisher: Publisher,
    origin: Origin,
    hostile: Hostile | None = None,
    *,
    well_signed: Collection[str] = (),
    also: Collection[bytes] = (),
) -> Iterator[None]:
    """Whatever happens inside: nothing false is kept, no version falls, no file appears elsewhere, the node serves on.

    `hostile` answers instead of the publisher meanwhile. Files of the roles `well_signed`, whose keys were stolen for
    this attack and which pass every check by themselves, may be kept too; so may `also`.
    """
    store = Store(Path(config.store))
    before, pointer, names = trusted_files(config), store.pointer(MODEL), _names_around(store)
    allowed = genuine(publisher) | set(before.values()) | set(also)
    if hostile is not None:
        allowed |= {hostile.path(name).read_bytes() for name in well_signed}
    if hostile is not None:
        origin.publisher = hostile  # type: ignore[assignment]
    try:
        yield
    finally:
        origin.publisher = publisher
        origin.fault = None
    after = trusted_files(config)
    assert set(after.values()) <= allowed, "forged metadata was kept"
    old, new = versions(before), versions(after)
    assert {name: new.get(name, 0) for name in old if new.get(name, 0) < old[name]} == {}, "a version fell"
    assert _names_around(store) - names <= {"status.json", ".status.json.new"}, "a name became a path"
    served = store.pointer(MODEL)
    assert pointer is not None
    assert served is not None
    assert (served.stable, served.candidate) == (pointer.stable, pointer.candidate)
    if pointer.stable is not None:
        for entry in store.manifest(MODEL, pointer.stable).files:
            verify_file(entry, store.folder(MODEL, pointer.stable) / entry.path)


def sign_targets(publisher: Publisher) -> int:
    """The owner signs the targets role once more; its version."""
    owner = Hostile(publisher, publisher.folder / "hostile" / str(publisher.repository.serial))
    publisher.repository.publish_offline(None, owner.change("targets", owner.targets_key, by=lambda _: None))
    return int(owner.role("targets").signed.version)


def overtake(publisher: Publisher, hostile: Hostile) -> None:
    """The owner notices that a key was stolen, and signs beyond what the thief has signed."""
    while sign_targets(publisher) <= hostile.role("targets").signed.version:
        pass
    for name in ("timestamp", "snapshot"):
        while publisher.repository.serial <= hostile.role(name).signed.version + 1:
            publisher.repository.refresh(force=True)


async def refuse(agent: Agent, config: AgentConfig, *reasons: str) -> None:
    """One check that must fail, and say why."""
    assert not await agent.check()
    for reason in reasons:
        assert reason in told(config).error, told(config).error


def _names_around(store: Store) -> set[str]:
    """Files near the store but for those whose names the agent chooses itself."""
    agent = store.root / ".agent"
    own = (agent / "metadata", agent / "targets", store.root / ".staging", store.root / MODEL)
    return {
        path.name
        for path in store.root.parent.rglob("*")
        if path.is_file() and not any(path.is_relative_to(folder) for folder in own)
        and not path.is_relative_to(store.root.parent / "home") and "hostile" not in path.parts
    }  # fmt: skip
