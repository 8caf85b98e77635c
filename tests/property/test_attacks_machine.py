"""Whoever controls every byte on the wire, at every moment, can delay the node's view of the mesh and nothing else."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata
from tuf.api.serialization import DeserializationError

from model_sync.agent.metadata import MetadataSource
from model_sync.agent.sources.source import Source, StatusError
from model_sync.repository.layout import encode_metadata
from model_sync.repository.repository import Repository
from model_sync.repository.signing_key import load_key
from nearcast.errors import Code, MeshError
from tests.integration.agent_parts import MODEL, Publisher

STRANGER = CryptoSigner.generate_ed25519()
RELEASES = 3


class Wire(Source):
    """Serves what the attacker chose for each path."""

    url = "memory:"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def get(
        self, path: str, *, start: int = 0, end: int | None = None, timeout_s: float
    ) -> tuple[int, Iterator[bytes]]:
        data = self.files.get(path.lstrip("/"))
        if data is None:
            raise StatusError(path, 404)
        return 0, iter([data])

    def abort(self) -> None: ...

    def close(self) -> None: ...


@functools.cache
def template() -> Publisher:
    """A publisher with all its releases pushed and the first one stable; copied for each run."""
    folder = Path(tempfile.mkdtemp(prefix="attacks-"))
    atexit.register(shutil.rmtree, folder)
    publisher = Publisher(folder / "home")
    for release in range(1, RELEASES + 1):
        publisher.push(release)
    publisher.roll(1)
    return publisher


class Attacks(RuleBasedStateMachine):
    """The owner publishes, the attacker rewrites, the node checks and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="attacks-"))
        self.owner = copy.copy(template())
        shutil.copytree(self.owner.folder / "sync" / "repository", self.folder / "repository")
        key = load_key(self.owner.folder / "sync" / "online.pem")
        self.owner.repository = Repository(self.folder / "repository", key)
        self.wire = Wire()
        self.history: dict[str, list[bytes]] = {}
        self.genuine: set[bytes] = set()
        self.versions: dict[str, int] = {}
        self.serial = self.intent = 0
        self.attacked = False
        self.remember()
        self.serve()
        self.restart()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def remember(self) -> None:
        root = self.owner.repository.folder
        for path in (one for place in ("metadata", "targets") for one in (root / place).rglob("*.json")):
            versions = self.history.setdefault(str(path.relative_to(root)), [])
            data = path.read_bytes()
            if data not in versions:
                versions.append(data)
                self.genuine.add(data)

    # The owner.

    @rule(release=st.integers(1, RELEASES))
    def roll(self, release: int) -> None:
        self.owner.roll(release)
        self.remember()

    @rule()
    def refresh(self) -> None:
        self.owner.repository.refresh(force=True)
        self.remember()

    # The attacker.

    @rule()
    def serve(self) -> None:
        """Leave everything as it is."""
        self.wire.files = {path: versions[-1] for path, versions in self.history.items()}
        self.attacked = False

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(["metadata/timestamp.json", *sorted(self.history)]))
        self.put(path, data.draw(st.sampled_from(self.history[path])))

    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        path, other = (data.draw(st.sampled_from(sorted(self.history))) for _ in range(2))
        self.put(path, self.history[other][-1])

    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "extend", "empty"]), share=st.floats(0, 1))
    def damage(self, data: st.DataObject, how: str, share: float) -> None:
        path = data.draw(st.sampled_from(["metadata/timestamp.json", *sorted(self.history)]))
        found = bytearray(self.history[path][-1])
        place = int(share * (len(found) - 1))
        if how == "flip":
            found[place] ^= 1
        self.put(path, {"cut": found[:place], "extend": found + found[:place], "empty": b""}.get(how, found))

    @rule(data=st.data(), step=st.sampled_from([-1, 1, 1000]))
    def forge(self, data: st.DataObject, step: int) -> None:
        """A role of another version, signed by a stranger, under a name that the node will ask for."""
        path = data.draw(st.sampled_from(["metadata/timestamp.json", *self.newest_roles()]))
        role = Metadata.from_bytes(self.history[path][-1])
        role.signed.version = max(1, role.signed.version + step)
        role.signatures.clear()
        role.sign(STRANGER)
        self.put(path.replace("1.root", "2.root"), encode_metadata(role))

    @rule(data=st.data())
    def hide(self, data: st.DataObject) -> None:
        self.wire.files.pop(data.draw(st.sampled_from(sorted(self.history))), None)
        self.attacked = True
        self.check()

    def put(self, path: str, data: bytes | bytearray) -> None:
        self.wire.files[path] = bytes(data)
        self.attacked = True
        self.check()

    def newest_roles(self) -> list[str]:
        """The files that the node asks for after the timestamp."""
        found: dict[str, int] = {}
        for path in self.history:
            folder, _, name = path.partition("/")
            version, _, role = name.partition(".")
            if folder == "metadata" and version.isdecimal():
                found[role] = max(found.get(role, 0), int(version))
        return [f"metadata/{version}.{role}" for role, version in sorted(found.items())]

    # The node.

    @rule()
    def restart(self) -> None:
        self.node = MetadataSource(
            self.folder / "node", self.wire, self.owner.root, channel="stable", timeout_s=5.0, models_max=16
        )

    @rule()
    def check(self) -> None:
        try:
            checked = self.node.check(time.time())
        except MeshError as error:
            assert error.code in (Code.UNTRUSTED, Code.UNAVAILABLE)
            assert self.attacked, error.message
            assert len(error.message) < 1000
            return
        assert checked.serial >= self.serial
        assert checked.intent >= self.intent
        self.serial, self.intent = checked.serial, checked.intent
        goal = checked.wants[MODEL].stable
        assert goal is not None
        assert goal.sha256 == self.owner.picks[goal.release].manifest_sha256
        if not goal.refusal:
            assert self.node.manifest(goal.sha256) in self.genuine

    @precondition(lambda self: self.attacked)
    @rule()
    def recover(self) -> None:
        """The attack ends: the next check believes the owner again."""
        self.serve()
        self.check()

    @invariant()
    def only_what_the_owner_signed_is_kept(self) -> None:
        folder = self.folder / "node"
        for path in folder.rglob("*.json"):
            data = path.read_bytes()
            assert data in self.genuine, path.name
            if path.parent.name == "targets":
                continue
            try:
                version = Metadata.from_bytes(data).signed.version
            except DeserializationError:
                raise AssertionError(f"{path.name} is no metadata") from None
            assert version >= self.versions.get(path.name, 0), path.name
            self.versions[path.name] = version


TestAttacks = Attacks.TestCase
TestAttacks.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
