"""The repository as its publisher keeps it and as a real TUF client reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

import model_sync.repository.repository as repository_module
from model_sync.publisher.keys import init_keys
from model_sync.repository.layout import blob_path, encode_metadata, make_target, models_path
from model_sync.repository.repository import VERSIONS_KEPT, Lifetimes, Repository
from model_sync.repository.signing_key import load_key
from model_sync.rollout.document import ChannelDocument, Pick
from model_sync.rollout.transitions import Command, apply
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import File, Manifest, Tensor

TENSOR = Tensor(name="x", datatype="FP32", shape=(1,))


class FolderFetcher(FetcherInterface):
    """Reads a repository from its folder; the "URL" is a path."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = Path(url)
        if not path.is_file():
            raise DownloadHTTPError("absent", 404)
        return iter((path.read_bytes(),))


class Mesh:
    """Keys and repository of one test, and how an operator signs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        init_keys(folder)
        self.open()

    def open(self, lifetimes: Lifetimes | None = None) -> Repository:
        self.repository = Repository(
            self.folder / "sync" / "repository", load_key(self.folder / "sync" / "online.pem"), lifetimes=lifetimes
        )
        return self.repository

    @property
    def key(self) -> CryptoSigner:
        return load_key(self.folder / "operator" / "models-core.pem")

    def blob(self, data: bytes) -> File:
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.repository.folder / blob_path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return File(path="m.onnx", size_bytes=len(data), sha256=sha256, chunks=(sha256,))

    def manifest(self, release: int, name: str = "digits") -> Manifest:
        return Manifest(
            name=name, release=release, semver=f"{release}.0.0", engine="onnxruntime", model_file="m.onnx",
            files=(self.blob(f"{name} {release}".encode()),), inputs=(TENSOR,), outputs=(TENSOR,), licence="Apache-2.0",
        )  # fmt: skip

    def role(self) -> Metadata[Targets]:
        folder = self.repository.folder / "metadata"
        newest = max(int(path.name.partition(".")[0]) for path in folder.glob("*.models-core.json"))
        # What a crash left beyond the snapshot is no state; walk down to what is published.
        for version in range(newest, 0, -1):
            role = Metadata[Targets].from_file(str(folder / f"{version}.models-core.json"))
            if role.signed.version == self.repository._state.roles["models-core"].signed.version:
                return role
        raise AssertionError

    def sign(
        self,
        *manifests: Manifest,
        change: Callable[[Metadata[Targets]], None] | None = None,
        key: CryptoSigner | None = None,
    ) -> tuple[bytes, dict[str, bytes]]:
        role = deepcopy(self.role())
        files = {}
        for manifest in manifests:
            path = models_path(manifest.name, manifest.release)
            files[path] = manifest.encode()
            role.signed.targets[path] = make_target(path, files[path], {"rollback_ok": [1]})
        role.signed.version += 1
        if change:
            change(role)
        role.sign(key or self.key)
        return encode_metadata(role), files

    def publish(self, *manifests: Manifest) -> int:
        metadata, files = self.sign(*manifests)
        return self.repository.publish_models("core", metadata, files)

    def document(self, action: str, release: int | None = None) -> ChannelDocument:
        pick = None
        if release:
            published = self.repository.find("digits", release)
            pick = Pick(release=release, manifest_sha256=published.manifest_sha256)
        command = Command(channel="main", model="digits", action=action, pick=pick, share=0.5, salt="s", newest=9)  # type: ignore[arg-type]
        return apply(self.repository.channel("main"), command)

    def read(self, cache: Path, *paths: str) -> list[bytes | None]:
        """What a new, or returning, client finds."""
        for folder in (cache / "metadata", cache / "targets"):
            folder.mkdir(parents=True, exist_ok=True)
        root = self.repository.folder
        updater = Updater(
            str(cache / "metadata"), f"{root}/metadata/", str(cache / "targets"), f"{root}/targets/",
            fetcher=FolderFetcher(), config=UpdaterConfig(prefix_targets_with_hash=True),
            bootstrap=(self.folder / "operator" / "root.json").read_bytes(),
        )  # fmt: skip
        updater.refresh()
        found = []
        for path in paths:
            target = updater.get_targetinfo(path)
            found.append(None if target is None else Path(updater.download_target(target)).read_bytes())
        return found


@pytest.fixture
def mesh(tmp_path: Path) -> Mesh:
    return Mesh(tmp_path / "home")


def test_keys_are_apart_and_never_overwritten(mesh: Mesh) -> None:
    home = mesh.folder
    assert {path.name for path in (home / "operator").glob("*.pem")} == {"root.pem", "targets.pem", "models-core.pem"}
    assert {path.name for path in (home / "backup").iterdir()} == {"root.pem"}
    assert {path.name for path in (home / "sync").glob("*.pem")} == {"online.pem"}
    for path in [*home.rglob("*.key"), *(home / "operator").glob("*.pem"), home / "sync" / "online.pem"]:
        assert path.stat().st_mode & 0o777 == 0o600, path
    offline = [(home / "operator" / name).read_bytes() for name in ("root.pem", "targets.pem", "models-core.pem")]
    everything = b"".join(path.read_bytes() for path in (home / "sync").rglob("*") if path.is_file())
    assert not any(key.strip() in everything for key in offline)
    before = {path: path.read_bytes() for path in home.rglob("*.pem")}
    with pytest.raises(MeshError) as caught:
        init_keys(home)
    assert caught.value.code is Code.CONFLICT
    assert before == {path: path.read_bytes() for path in home.rglob("*.pem")}


def test_a_client_reads_what_was_published(mesh: Mesh, tmp_path: Path) -> None:
    first, second = mesh.manifest(1), mesh.manifest(2)
    mesh.publish(first, second)
    mesh.repository.publish_channel(mesh.document("stable", 1))
    document = mesh.document("candidate", 2)
    mesh.repository.publish_channel(document)
    found = mesh.read(tmp_path / "client", models_path("digits", 2), "channels/main.json", models_path("digits", 3))
    assert found[0] == second.encode()
    assert b'"candidate"' in (found[1] or b"")
    assert found[2] is None
    assert mesh.repository.channel("main") == document
    assert mesh.repository.serial == 4
    assert mesh.repository.find("digits", 2).rollback_ok == {1}


def test_reopening_keeps_everything(mesh: Mesh) -> None:
    mesh.publish(mesh.manifest(1))
    mesh.repository.publish_channel(mesh.document("stable", 1))
    before = (mesh.repository.serial, mesh.repository.channel("main"), mesh.repository.releases("digits"))
    repository = mesh.open()
    assert (repository.serial, repository.channel("main"), repository.releases("digits")) == before
    mesh.publish(mesh.manifest(2))
    assert mesh.repository.releases("digits") == [1, 2]


def refused(mesh: Mesh, metadata: bytes, manifests: dict[str, bytes], team: str = "core") -> MeshError:
    serial = mesh.repository.serial
    with pytest.raises(MeshError) as caught:
        mesh.repository.publish_models(team, metadata, manifests)
    assert mesh.repository.serial == serial
    return caught.value


def test_an_unknown_key_is_refused(mesh: Mesh) -> None:
    stranger = CryptoSigner.generate_ed25519()
    assert refused(mesh, *mesh.sign(mesh.manifest(1), key=stranger)).code is Code.UNTRUSTED
    online = load_key(mesh.folder / "sync" / "online.pem")
    assert refused(mesh, *mesh.sign(mesh.manifest(1), key=online)).code is Code.UNTRUSTED
    assert refused(mesh, *mesh.sign(mesh.manifest(1)), team="other").code is Code.UNTRUSTED
    assert refused(mesh, *mesh.sign(mesh.manifest(1)), team="rollout").code is Code.UNTRUSTED


def test_a_changed_byte_is_refused(mesh: Mesh) -> None:
    metadata, manifests = mesh.sign(mesh.manifest(1))
    assert refused(mesh, metadata.replace(b"digits/1", b"digits/2"), manifests).code is Code.UNTRUSTED
    path = models_path("digits", 1)
    assert refused(mesh, metadata, {path: manifests[path].replace(b"1.0.0", b"1.0.1")}).code is Code.UNTRUSTED
    assert refused(mesh, b"{", manifests).code is Code.UNTRUSTED


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_a_release_without_its_whole_blob_is_refused(mesh: Mesh, damage: str) -> None:
    manifest = mesh.manifest(1)
    blob = mesh.repository.folder / blob_path(manifest.files[0].sha256)
    if damage == "missing":
        blob.unlink()
    else:
        data = blob.read_bytes()
        blob.write_bytes(data[:-1] if damage == "short" else data[:-1] + b"?")
    error = refused(mesh, *mesh.sign(manifest))
    assert error.code is Code.INVALID_REQUEST
    assert "m.onnx" in error.message


def test_a_manifest_that_was_not_sent_is_refused(mesh: Mesh) -> None:
    metadata, _ = mesh.sign(mesh.manifest(1))
    assert refused(mesh, metadata, {}).code is Code.INVALID_REQUEST


def test_older_equal_and_rewritten_releases_are_refused(mesh: Mesh) -> None:
    mesh.publish(mesh.manifest(5))
    error = refused(mesh, *mesh.sign(mesh.manifest(4)))
    assert error.code is Code.CONFLICT
    assert "not newer" in error.message

    def rewrite(role: Metadata[Targets]) -> None:
        path = models_path("digits", 5)
        role.signed.targets[path] = make_target(path, b"other")

    assert refused(mesh, *mesh.sign(change=rewrite)).code is Code.UNTRUSTED

    def drop(role: Metadata[Targets]) -> None:
        role.signed.targets.clear()

    assert refused(mesh, *mesh.sign(change=drop)).code is Code.UNTRUSTED


@pytest.mark.parametrize(
    "path",
    ["channels/main.json", "models/digits/01.json", "models/digits/x.json", "models/a/b/1.json", "models/../1.json"],
)
def test_other_paths_are_refused(mesh: Mesh, path: str) -> None:
    def add(role: Metadata[Targets]) -> None:
        role.signed.targets[path] = make_target(path, b"{}")

    metadata, _ = mesh.sign(change=add)
    error = refused(mesh, metadata, {path: b"{}"})
    assert error.code is Code.UNTRUSTED
    assert "path" in error.message


def test_wrong_versions_and_expired_roles_are_refused(mesh: Mesh) -> None:
    def skip(role: Metadata[Targets]) -> None:
        role.signed.version += 1

    def expire(role: Metadata[Targets]) -> None:
        role.signed.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=1)

    assert refused(mesh, *mesh.sign(mesh.manifest(1), change=skip)).code is Code.CONFLICT
    assert refused(mesh, *mesh.sign(mesh.manifest(1), change=expire)).code is Code.UNTRUSTED


class Cut(Exception):
    """The power goes."""


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("kind", ["models", "channel"])
def test_a_cut_between_any_two_writes_leaves_the_old_view(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, kind: str
) -> None:
    mesh.publish(mesh.manifest(1))
    mesh.repository.publish_channel(mesh.document("stable", 1))
    old = mesh.read(tmp_path / "client", models_path("digits", 1), "channels/main.json")
    serial = mesh.repository.serial
    written: list[str] = []
    write_file = repository_module.write_file

    def cut(path: Path, data: bytes) -> None:
        if len(written) == step:
            path.with_name(f".{path.name}.0.tmp").write_bytes(data[: len(data) // 2])
            raise Cut
        written.append(path.name)
        write_file(path, data)

    if kind == "models":
        metadata, manifests = mesh.sign(mesh.manifest(2))

        def change() -> None:
            mesh.repository.publish_models("core", metadata, manifests)
    else:
        mesh.publish(mesh.manifest(2))
        serial = mesh.repository.serial
        following = mesh.document("stable", 2)

        def change() -> None:
            mesh.repository.publish_channel(following)

    with monkeypatch.context() as patch:
        patch.setattr(repository_module, "write_file", cut)
        with pytest.raises(Cut):
            change()
    # Target file, role, snapshot, timestamp: the last write is the timestamp's, and only it makes the change visible.
    assert "timestamp.json" not in written
    assert len(written) == step
    for cache in ("client", "new-client"):
        found = mesh.read(tmp_path / cache, models_path("digits", 1), "channels/main.json", models_path("digits", 2))
        assert found[:2] == old
        assert (found[2] is None) == (kind == "models")
    mesh.open()
    assert mesh.repository.serial == serial
    assert not list(mesh.repository.folder.rglob(".*.tmp"))
    change()
    assert mesh.repository.serial == serial + 1
    for cache in ("client", "new-client"):
        found = mesh.read(tmp_path / cache, models_path("digits", 2), "channels/main.json")
        assert found[0] is not None
        assert (found[1] != old[1]) == (kind == "channel")


def test_online_roles_are_signed_again_at_half_life(mesh: Mesh, tmp_path: Path) -> None:
    mesh.publish(mesh.manifest(1))
    serial = mesh.repository.serial
    assert not mesh.repository.refresh()
    assert mesh.repository.serial == serial
    # The same state, seen by a publisher for whom half of the timestamp's life is over, then of all online roles.
    longer = mesh.open(Lifetimes(timestamp=timedelta(days=3)))
    assert longer.refresh()
    assert not longer.refresh()
    assert longer.serial == serial + 1
    longest = mesh.open(
        Lifetimes(timestamp=timedelta(days=90), snapshot=timedelta(days=90), rollout=timedelta(days=90))
    )
    assert longest.refresh()
    assert not longest.refresh()
    assert mesh.read(tmp_path / "client", models_path("digits", 1)) == [mesh.manifest(1).encode()]


def resign(role: Metadata, key: Path, change: Callable[[Metadata], None] = lambda _: None) -> bytes:
    role = deepcopy(role)
    role.signed.version += 1
    role.signed.expires += timedelta(days=1)
    change(role)
    role.sign(load_key(key))
    return encode_metadata(role)


def test_offline_roles_get_another_term_from_their_own_keys_only(mesh: Mesh, tmp_path: Path) -> None:
    mesh.publish(mesh.manifest(1))
    mesh.read(tmp_path / "client", models_path("digits", 1))
    operator, version = mesh.folder / "operator", mesh.repository._state

    def drop(role: Metadata) -> None:
        role.signed.delegations = None

    def swap(role: Metadata) -> None:
        role.signed.roles["timestamp"].keyids = role.signed.roles["targets"].keyids

    def skip(role: Metadata) -> None:
        role.signed.version += 1

    root, targets = operator / "root.pem", operator / "targets.pem"
    for attempt in (
        (None, resign(version.targets, operator / "models-core.pem")),
        (None, resign(version.targets, targets, drop)),
        (None, resign(version.targets, targets, skip)),
        (resign(version.root, targets), None),
        (resign(version.root, root, swap), None),
        (resign(version.root, root, skip), None),
        (b"{", None),
    ):
        with pytest.raises(MeshError) as caught:
            mesh.repository.publish_offline(*attempt)
        assert caught.value.code in (Code.UNTRUSTED, Code.CONFLICT)
        assert mesh.repository._state is version
    mesh.repository.publish_offline(resign(version.root, root), resign(version.targets, targets))
    assert mesh.repository.root_version == 2
    for cache in ("client", "new-client"):
        assert mesh.read(tmp_path / cache, models_path("digits", 1)) == [mesh.manifest(1).encode()]
    expiries = mesh.open().offline_expiries()
    assert expiries["targets"] == version.targets.signed.expires + timedelta(days=1)
    assert expiries["root"] == version.root.signed.expires + timedelta(days=1)


def test_superseded_versions_are_forgotten_in_the_end(mesh: Mesh, tmp_path: Path) -> None:
    mesh.publish(mesh.manifest(1), mesh.manifest(2))
    mesh.repository.publish_channel(mesh.document("stable", 1))
    for _ in range(2 * VERSIONS_KEPT):
        mesh.repository.publish_channel(mesh.document("candidate", 2))
        mesh.repository.publish_channel(mesh.document("stop"))
    folder = mesh.repository.folder
    for pattern in ("metadata/*.snapshot.json", "metadata/*.rollout.json", "targets/channels/*.main.json"):
        assert len(list(folder.glob(pattern))) <= VERSIONS_KEPT + 1
    assert (folder / "metadata" / "1.root.json").exists()
    assert mesh.read(tmp_path / "client", models_path("digits", 1), "channels/main.json")[1] is not None
    mesh.open()


def test_with_another_online_key_nothing_is_signed(mesh: Mesh) -> None:
    mesh.publish(mesh.manifest(1))
    before = (mesh.repository.folder / "metadata" / "timestamp.json").read_bytes()
    mesh.repository = Repository(mesh.repository.folder, CryptoSigner.generate_ed25519())
    assert mesh.repository.online_keyid == ""
    for attempt in (
        lambda: mesh.repository.refresh(force=True),
        lambda: mesh.repository.publish_channel(mesh.document("stable", 1)),
        lambda: mesh.publish(mesh.manifest(2)),
    ):
        with pytest.raises(MeshError, match="online key") as caught:
            attempt()
        assert caught.value.code is Code.UNAVAILABLE
    assert (mesh.repository.folder / "metadata" / "timestamp.json").read_bytes() == before


def test_a_damaged_repository_says_so(mesh: Mesh) -> None:
    (mesh.repository.folder / "metadata" / "timestamp.json").write_bytes(b"{")
    with pytest.raises(MeshError) as caught:
        mesh.open()
    assert caught.value.code is Code.UNAVAILABLE
