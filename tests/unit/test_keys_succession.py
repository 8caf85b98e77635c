"""Which next roles a repository takes, which it refuses, and what a crash in the middle leaves."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner, Key
from tuf.api.metadata import Metadata, Targets

import model_sync.repository.repository as repository_module
from model_sync.publisher.roles import ONLINE, Change, Roles, extend, now, set_keys, withdraw
from model_sync.repository.layout import encode_metadata, make_target, models_path, withdrawn_paths
from model_sync.repository.repository import Repository
from model_sync.repository.signing_key import load_key
from model_sync.rollout.document import first_intent, last_intent
from nearcast.errors import Code, MeshError
from tests.unit.test_repository import Mesh

NEW = CryptoSigner.generate_ed25519()
OTHER = CryptoSigner.generate_ed25519()


class Ceremony:
    """A mesh whose keys are all at hand."""

    def __init__(self, folder: Path) -> None:
        self.mesh = Mesh(folder)
        self.mesh.publish(self.mesh.manifest(1))
        self.mesh.repository.publish_channel(self.mesh.document("stable", 1))
        operator = folder / "operator"
        names = ("root", "targets", "models-core")
        self.keys = {name: load_key(operator / f"{name}.pem") for name in names}
        self.keys["online"] = load_key(folder / "sync" / "online.pem")
        self.keys["backup"] = load_key(folder / "backup" / "root.pem")

    @property
    def repository(self) -> Repository:
        return self.mesh.repository

    @property
    def roles(self) -> Roles:
        state = self.repository._state
        models = {name: role for name, role in state.roles.items() if name != "rollout"}
        return Roles(root=state.root, targets=state.targets, models=models, online={})

    def change(self, role: str, *keys: Key, threshold: int = 1, **more: Any) -> Change:
        return set_keys(self.roles, role, keys, threshold=threshold, at=now(), **more)

    def publish(self, change: Change) -> int:
        data = {name: encode_metadata(role) for name, role in change.items()}
        root, targets = data.pop("root", None), data.pop("targets", None)
        return self.repository.publish_offline(root, targets, data)

    def sign(self, change: Change, **signers: tuple[CryptoSigner, ...]) -> Change:
        """With the present keys, or with those given by role."""
        for name, role in change.items():
            for signer in signers.get(name.replace("-", "_"), (self.keys.get(name, OTHER),)):
                role.sign(signer, append=True)
        return change


@pytest.fixture
def ceremony(tmp_path: Path) -> Ceremony:
    return Ceremony(tmp_path / "home")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Ceremony:
    """One for all that is refused."""
    return Ceremony(tmp_path_factory.mktemp("unchanged") / "home")


def root_of_two(one: Ceremony) -> Change:
    return one.change("root", one.keys["root"].public_key, NEW.public_key, threshold=2)


def edit_targets(one: Ceremony, edit: Callable[[Targets], object]) -> Change:
    change = extend(one.roles, ["targets"], now())
    edit(change["targets"].signed)
    return one.sign(change)


def drop_team(targets: Targets) -> None:
    assert targets.delegations is not None
    assert targets.delegations.roles is not None
    del targets.delegations.roles["models-core"]


def widen_team(targets: Targets) -> None:
    assert targets.delegations is not None
    assert targets.delegations.roles is not None
    targets.delegations.roles["models-core"].paths = ["channels/*"]


def list_a_key_twice(targets: Targets) -> None:
    assert targets.delegations is not None
    assert targets.delegations.roles is not None
    role = targets.delegations.roles["models-core"]
    twin = deepcopy(targets.delegations.keys[role.keyids[0]])
    twin.keyid = "f" * 64
    targets.delegations.keys[twin.keyid] = twin
    role.keyids.append(twin.keyid)
    role.threshold = 2


def ask_too_much(targets: Targets) -> None:
    assert targets.delegations is not None
    assert targets.delegations.roles is not None
    targets.delegations.roles["models-core"].threshold = 2


def add_release(one: Ceremony) -> Change:
    change = extend(one.roles, ["models-core"], now())
    path = models_path("digits", 2)
    change["models-core"].signed.targets[path] = make_target(path, b"{}")
    return one.sign(change)


def without(change: Change, *names: str) -> Change:
    return {name: role for name, role in change.items() if name not in names}


def skip_a_version(one: Ceremony) -> Change:
    change = extend(one.roles, ["root"], now())
    change["root"].signed.version += 1
    return one.sign(change)


REFUSED: dict[str, tuple[Callable[[Ceremony], Change], str]] = {
    "a root that only the old key signs": (lambda c: c.sign(root_of_two(c)), "1 of the 2 signatures that the new root"),
    "a root that only new keys sign": (
        lambda c: c.sign(c.change("root", NEW.public_key), root=(NEW,)),
        "0 of the 1 signatures that the present root",
    ),
    "a root two steps ahead": (skip_a_version, "sign 2, not 3"),
    "other targets keys without a targets role": (
        lambda c: without(c.sign(c.change("targets", NEW.public_key), targets=(NEW,)), "targets"),
        "keys of targets change",
    ),
    "other targets keys, signed by the old": (
        lambda c: c.sign(c.change("targets", NEW.public_key)),
        "0 of the 1 signatures that root",
    ),
    "another team key without the team's role": (
        lambda c: without(c.sign(c.change("models-core", NEW.public_key), models_core=(NEW,)), "models-core"),
        "keys of models-core change",
    ),
    "another team key, signed by the old": (
        lambda c: c.sign(c.change("models-core", NEW.public_key)),
        "not signed by a key",
    ),
    "a new team without a role": (
        lambda c: without(c.sign(c.change("models-x", NEW.public_key), models_x=(NEW,)), "models-x"),
        "needs its first",
    ),
    "a role that nobody delegated": (
        lambda c: {"models-x": c.sign(c.change("models-x", NEW.public_key), models_x=(NEW,))["models-x"]},
        "delegates nothing",
    ),
    "an online key of somebody else": (lambda c: c.sign(c.change(ONLINE, NEW.public_key)), "online key"),
    "an online key in root alone": (
        lambda c: without(c.sign(c.change(ONLINE, NEW.public_key)), "targets"),
        "online key",
    ),
    "a lost team": (lambda c: edit_targets(c, drop_team), "must stay delegated"),
    "a team that may speak of channels": (lambda c: edit_targets(c, widen_team), "must be rollout"),
    "a key that counts twice": (lambda c: edit_targets(c, list_a_key_twice), "lists a key twice"),
    "a threshold that nobody can meet": (lambda c: edit_targets(c, ask_too_much), "of only 1"),
    "targets of its own": (
        lambda c: edit_targets(c, lambda t: t.targets.update({"x": make_target("x", b"")})),
        "no targets itself",
    ),
    "a release on the quiet": (add_release, "publish none"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_follow_is_refused_and_changes_nothing(unchanged: Ceremony, what: str) -> None:
    make, sentence = REFUSED[what]
    state, files = unchanged.repository._state, sorted(unchanged.repository.folder.rglob("*"))
    with pytest.raises(MeshError, match=sentence) as caught:
        unchanged.publish(make(unchanged))
    assert caught.value.code in (Code.UNTRUSTED, Code.CONFLICT)
    assert unchanged.repository._state is state
    assert sorted(unchanged.repository.folder.rglob("*")) == files


def test_every_kind_of_change_is_followed_by_clients(ceremony: Ceremony, tmp_path: Path) -> None:
    keys, path = ceremony.keys, models_path("digits", 1)
    expected = ceremony.mesh.read(tmp_path / "old", path)
    changes: list[tuple[Callable[[], Change], dict[str, tuple[CryptoSigner, ...]]]] = [
        (lambda: root_of_two(ceremony), {"root": (keys["root"], NEW)}),
        (lambda: ceremony.change("targets", OTHER.public_key), {"root": (keys["root"], NEW), "targets": (OTHER,)}),
        (
            lambda: ceremony.change("models-core", NEW.public_key, OTHER.public_key, threshold=2),
            {"targets": (OTHER,), "models_core": (NEW, OTHER)},
        ),
        (
            lambda: ceremony.change("models-x", keys["backup"].public_key, paths=["models/x-*/*"]),
            {"targets": (OTHER,), "models_x": (keys["backup"],)},
        ),
        (
            lambda: ceremony.change("root", NEW.public_key, OTHER.public_key, keys["root"].public_key, threshold=3),
            {"root": (keys["root"], NEW, OTHER)},
        ),
    ]
    for number, (make, signers) in enumerate(changes):
        serial = ceremony.repository.serial
        assert ceremony.publish(ceremony.sign(make(), **signers)) > serial
        for cache in ("old", f"new-{number}"):
            assert ceremony.mesh.read(tmp_path / cache, path) == expected
    # A key of a team of two is not enough any more.
    metadata, files = ceremony.mesh.sign(ceremony.mesh.manifest(2), key=NEW)
    with pytest.raises(MeshError, match="1 of the 2 signatures"):
        ceremony.repository.publish_models("core", metadata, files)
    assert "models-x" in ceremony.mesh.open()._state.roles
    # A team with models of its own publishes no others.
    role = extend(ceremony.roles, ["models-x"], now())["models-x"]
    manifest = ceremony.mesh.manifest(1, name="other")
    path = models_path("other", 1)
    role.signed.targets[path] = make_target(path, manifest.encode())
    role.sign(keys["backup"])
    with pytest.raises(MeshError, match="may not publish"):
        ceremony.repository.publish_models("x", encode_metadata(role), {path: manifest.encode()})


def rotate_online(ceremony: Ceremony) -> Change:
    return ceremony.sign(ceremony.change(ONLINE, NEW.public_key))


def test_a_new_online_key_continues_above_all_intents_of_the_old(ceremony: Ceremony, tmp_path: Path) -> None:
    ceremony.mesh.read(tmp_path / "client", "channels/main.json")
    ceremony.repository.offer_signer(OTHER)
    ceremony.repository.offer_signer(NEW)
    ceremony.publish(rotate_online(ceremony))
    document = ceremony.repository.channel("main")
    assert document is not None
    assert document.intent == first_intent(2) == last_intent(1) + 1
    assert ceremony.repository.online_keyid == NEW.public_key.keyid
    assert ceremony.mesh.read(tmp_path / "client", "channels/main.json")[0] is not None
    ceremony.mesh.publish(ceremony.mesh.manifest(2))
    ceremony.repository.publish_channel(ceremony.mesh.document("candidate", 2))
    with pytest.raises(MeshError):
        Repository(ceremony.repository.folder, ceremony.keys["online"]).refresh(force=True)
    assert Repository(ceremony.repository.folder, NEW).refresh(force=True)


def test_after_a_crash_at_any_write_the_repository_is_the_old_or_the_new(
    ceremony: Ceremony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = (models_path("digits", 1), "channels/main.json")
    folder, old = ceremony.repository.folder, ceremony.keys["online"]
    ceremony.mesh.read(tmp_path / "client", *paths)
    outcomes = []
    for writes in range(1, 40):
        ceremony.mesh.repository = Repository(folder, old)
        ceremony.repository.offer_signer(NEW)
        with monkeypatch.context() as patch:
            fail_after(patch, writes)
            try:
                ceremony.publish(rotate_online(ceremony))
                break
            except OSError:
                reopened = Repository(folder, old, NEW)
        outcomes.append(reopened.online_keyid == NEW.public_key.keyid)
        assert (reopened.root_version == 2) is outcomes[-1]
        assert reopened.refresh(force=True)
        for cache in ("client", f"new-{writes}"):
            assert None not in ceremony.mesh.read(tmp_path / cache, *paths)
        if outcomes[-1]:
            break
    assert outcomes == sorted(outcomes), "once the new root is there, there is no way back"
    assert len(outcomes) >= 6
    assert outcomes[-1], "the last crash came between the root and its timestamp"
    assert not list(folder.glob("timestamp-for-root-*"))


def fail_after(patch: pytest.MonkeyPatch, writes: int) -> None:
    """The power goes at the write of that number, whatever it is."""
    left = [writes]

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def run(*words: Any, **options: Any) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError("power cut")
            function(*words, **options)

        return run

    for name in ("write_file", "move_file"):
        patch.setattr(repository_module, name, counted(getattr(repository_module, name)))


def test_a_withdrawn_release_stays_withdrawn(ceremony: Ceremony, tmp_path: Path) -> None:
    ceremony.mesh.publish(ceremony.mesh.manifest(2))
    path = models_path("digits", 2)
    change = ceremony.sign(withdraw({}, ceremony.roles, "models-core", [path], now()))
    ceremony.publish(change)
    assert ceremony.repository.releases("digits") == [1]
    assert ceremony.mesh.read(tmp_path / "client", path, models_path("digits", 1))[0] is None

    def forget(role: Metadata[Targets]) -> None:
        role.signed.unrecognized_fields["withdrawn"] = []

    def invent(role: Metadata[Targets]) -> None:
        role.signed.unrecognized_fields["withdrawn"].append(models_path("other", 7))

    for attempt in (
        ceremony.mesh.sign(ceremony.mesh.manifest(3), change=invent),
        ceremony.mesh.sign(ceremony.mesh.manifest(2)),
        ceremony.mesh.sign(ceremony.mesh.manifest(2), change=forget),
        ceremony.mesh.sign(ceremony.mesh.manifest(3), change=forget),
    ):
        with pytest.raises(MeshError, match="withdrawn"):
            ceremony.repository.publish_models("core", *attempt)
    ceremony.mesh.publish(ceremony.mesh.manifest(3))
    assert withdrawn_paths(ceremony.roles.models["models-core"].signed) == {path}
    with pytest.raises(MeshError, match="points to release 1"):
        ceremony.publish(ceremony.sign(withdraw({}, ceremony.roles, "models-core", [models_path("digits", 1)], now())))
    with pytest.raises(MeshError, match="does not publish"):
        withdraw({}, ceremony.roles, "models-core", [path], now())


def test_a_change_of_keys_names_what_it_cannot_do(ceremony: Ceremony) -> None:
    for role, keys, threshold in (("root", (), 1), ("root", (NEW.public_key,), 2), ("elsewhere", (NEW.public_key,), 1)):
        with pytest.raises(MeshError) as caught:
            ceremony.change(role, *keys, threshold=threshold)
        assert caught.value.code is Code.INVALID_REQUEST
    for name, paths in (("models-X", ()), ("models-x", ("channels/*",))):
        with pytest.raises(MeshError) as caught:
            ceremony.change(name, NEW.public_key, paths=paths)
        assert caught.value.code is Code.INVALID_REQUEST
