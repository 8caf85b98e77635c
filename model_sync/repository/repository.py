"""The TUF repository as its publisher sees it: static files, immutable but for `timestamp.json`.

Order of every change: blobs and target files, role metadata, snapshot, and last of all `timestamp.json` by rename. A
reader, and this class after a crash, sees either the state before or the state after. Root, targets and models roles
are signed elsewhere; only snapshot, timestamp and rollout are signed here, with the online key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    TargetFile,
    Targets,
)

from model_sync.repository.layout import (
    METADATA_SIZE_BYTES_MAX,
    blob_path,
    custom_rollback_ok,
    encode_metadata,
    file_sha256,
    make_target,
    models_path,
    parse_models_path,
    target_file_path,
)
from model_sync.repository.state import RepositoryState, check_models, check_root, check_targets, read_state
from model_sync.rollout.document import ChannelDocument
from nearcast.durable import remove_leftovers, write_file
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import MANIFEST_SIZE_BYTES_MAX, Manifest, decode_manifest

VERSIONS_KEPT = 16
"""Superseded versions of a role kept for readers that are in the middle of an update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long each role's signature holds. Online roles are signed again at half of it."""

    root: timedelta = timedelta(days=365)
    targets: timedelta = timedelta(days=90)
    models: timedelta = timedelta(days=90)
    snapshot: timedelta = timedelta(days=7)
    rollout: timedelta = timedelta(days=7)
    timestamp: timedelta = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One release that a models role vouches for. `rollback_ok` joins the manifest's word and the role's."""

    team: str
    manifest: Manifest
    manifest_sha256: str
    rollback_ok: frozenset[int]


class Repository:
    """One repository folder. Not safe for use from several threads at once; the controller serialises."""

    def __init__(self, folder: Path, signer: CryptoSigner, *, lifetimes: Lifetimes | None = None) -> None:
        self.folder = folder
        self._signer = signer
        self._lifetimes = lifetimes or Lifetimes()
        remove_leftovers(folder)
        self._state = read_state(folder, signer.public_key.keyid)

    # -- what is published ------------------------------------------------------------------------------------------

    @property
    def serial(self) -> int:
        """Version of `timestamp.json`: grows with every change."""
        return self._state.timestamp.signed.version

    @property
    def root_version(self) -> int:
        """Version of the newest root."""
        return self._state.root.signed.version

    def root_bytes(self, version: int | None = None) -> bytes:
        """One version of the root role, the newest by default."""
        return (self.folder / "metadata" / f"{version or self.root_version}.root.json").read_bytes()

    def offline_expiries(self) -> dict[str, datetime]:
        """When the roles expire that only an operator can sign."""
        expiries = {"root": self._state.root.signed.expires, "targets": self._state.targets.signed.expires}
        for name, role in self._state.roles.items():
            if name != "rollout":
                expiries[name] = role.signed.expires
        return expiries

    def releases(self, model: str) -> list[int]:
        """Published releases of a model, oldest first."""
        found = [parse_models_path(path) for role in self._models_roles().values() for path in role.signed.targets]
        return sorted(release for name, release in found if name == model)

    def find(self, model: str, release: int) -> Published:
        """What is published as one release.

        Raises:
            MeshError: MODEL_NOT_FOUND, naming the releases that exist.
        """
        path = models_path(model, release)
        for name, role in self._models_roles().items():
            target = role.signed.targets.get(path)
            if target is None:
                continue
            sha256 = target.hashes["sha256"]
            manifest = decode_manifest(self._read_target(path, target))
            return Published(
                team=name.removeprefix("models-"),
                manifest=manifest,
                manifest_sha256=sha256,
                rollback_ok=custom_rollback_ok(target) | frozenset(manifest.rollback_ok),
            )
        known = ", ".join(map(str, self.releases(model))) or "none"
        raise MeshError(
            Code.MODEL_NOT_FOUND, f"Release {release} of {model} is not published; published releases: {known}."
        )

    def channel(self, name: str) -> ChannelDocument | None:
        """The present document of a channel; None if it has none."""
        path = f"channels/{name}.json"
        target = self._state.roles["rollout"].signed.targets.get(path)
        if target is None:
            return None
        return msgspec.json.decode(self._read_target(path, target), type=ChannelDocument)

    def has_blob(self, sha256: str, size_bytes: int) -> bool:
        """Whether a blob is present, readable, and really what its name says."""
        path = self.folder / blob_path(sha256)
        try:
            return path.stat().st_size == size_bytes and file_sha256(path) == sha256
        except OSError:
            return False

    # -- changes ----------------------------------------------------------------------------------------------------

    def publish_models(self, team: str, metadata: bytes, manifests: Mapping[str, bytes]) -> int:
        """Take over a models role that an operator has signed; answers the new serial.

        Args:
            team: whose role.
            metadata: the signed role as JSON.
            manifests: bytes of each added manifest by target path.

        Raises:
            MeshError: UNTRUSTED if signature, version or content do not fit the delegation; CONFLICT if the role was
                made from an older state; INVALID_REQUEST if a manifest or a blob is missing.
        """
        name = f"models-{team}"
        current = self._state.roles.get(name)
        if current is None or name == "rollout":
            raise MeshError(Code.UNTRUSTED, f"The targets role delegates nothing to the team {team!r}.")
        role = check_models(metadata, name, self._state)
        added = self._added_targets(role.signed, current.signed)
        for path, target in added.items():
            self._check_release(path, target, manifests)
        for path, target in added.items():
            self._write_target(path, target, manifests[path])
        return self._commit({name: role})

    def publish_offline(self, root: bytes | None, targets: bytes | None) -> int:
        """Take over root and targets roles that were signed again for another term; answers the serial.

        Raises:
            MeshError: UNTRUSTED if signature, keys or delegations are not those of now, CONFLICT for a wrong version.
        """
        # Both are checked before either is written: a refused pair leaves nothing behind.
        next_root = None if root is None else check_root(root, self._state)
        next_targets = None if targets is None else check_targets(targets, self._state)
        if next_root is not None:
            write_file(self._metadata_path(f"{next_root.signed.version}.root"), encode_metadata(next_root))
            self._state = replace(self._state, root=next_root)
        return self.serial if next_targets is None else self._commit({"targets": next_targets})

    def publish_channel(self, document: ChannelDocument) -> int:
        """Sign a channel's next document with the rollout role; answers the new serial.

        Raises:
            MeshError: CONFLICT if `intent` does not follow the present one.
        """
        present = self.channel(document.channel)
        if document.intent != (present.intent if present else 0) + 1:
            raise MeshError(Code.CONFLICT, "The channel has changed meanwhile; read it and try again.")
        data = msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
        path = f"channels/{document.channel}.json"
        target = make_target(path, data)
        role = deepcopy(self._state.roles["rollout"])
        role.signed.targets[path] = target
        self._advance(role, self._lifetimes.rollout)
        self._write_target(path, target, data)
        return self._commit({"rollout": role})

    def refresh(self, *, force: bool = False) -> bool:
        """Sign the online roles again once half of their life is over; answers whether anything was signed."""
        now = datetime.now(UTC)
        state = self._state

        def due(role: Metadata[Any], lifetime: timedelta) -> bool:
            return force or role.signed.expires - now < lifetime / 2

        changed: dict[str, Metadata[Targets]] = {}
        rollout = state.roles["rollout"]
        if due(rollout, self._lifetimes.rollout):
            changed["rollout"] = deepcopy(rollout)
            self._advance(changed["rollout"], self._lifetimes.rollout)
        if changed or due(state.snapshot, self._lifetimes.snapshot):
            self._commit(changed)
            return True
        if due(state.timestamp, self._lifetimes.timestamp):
            self._write_timestamp(state)
            return True
        return False

    # -- checks of an operator's role -------------------------------------------------------------------------------

    def _added_targets(self, role: Targets, current: Targets) -> dict[str, TargetFile]:
        for path, target in current.targets.items():
            if role.targets.get(path) != target:
                raise MeshError(Code.UNTRUSTED, f"{path} was published already and must stay as it is.")
        added = {path: target for path, target in role.targets.items() if path not in current.targets}
        delegations = self._state.targets.signed.delegations
        for path in added:
            model, release = parse_models_path(path)
            first = next(iter(delegations.get_roles_for_target(path)), None) if delegations else None
            if first is None:
                raise MeshError(Code.UNTRUSTED, f"No team may publish {path}.")
            published = self.releases(model)
            if published and release <= published[-1]:
                raise MeshError(
                    Code.CONFLICT, f"Release {release} of {model} is not newer than the published {published[-1]}."
                )
            if published and models_path(model, published[-1]) not in current.targets:
                raise MeshError(Code.FORBIDDEN, f"The model {model} belongs to another team; choose another name.")
        return added

    def _check_release(self, path: str, target: TargetFile, manifests: Mapping[str, bytes]) -> None:
        data = manifests.get(path)
        if data is None or len(data) > MANIFEST_SIZE_BYTES_MAX:
            raise MeshError(Code.INVALID_REQUEST, f"The manifest of {path} is missing or too large.")
        if target.length != len(data) or target.hashes != {"sha256": hashlib.sha256(data).hexdigest()}:
            raise MeshError(Code.UNTRUSTED, f"The manifest of {path} is not the one that was signed.")
        manifest = decode_manifest(data)
        if models_path(manifest.name, manifest.release) != path:
            raise MeshError(Code.UNTRUSTED, f"The manifest of {path} describes {manifest.name} {manifest.release}.")
        for entry in manifest.files:
            if not self.has_blob(entry.sha256, entry.size_bytes):
                raise MeshError(
                    Code.INVALID_REQUEST,
                    f"The file {entry.path} of {manifest.name} {manifest.release} is not in the repository, "
                    "or not whole; upload its blob first.",
                )

    # -- files ------------------------------------------------------------------------------------------------------

    def _commit(self, changed: Mapping[str, Metadata[Targets]]) -> int:
        """Write changed roles, then a snapshot that names them, then the timestamp that makes it all visible."""
        targets = changed.get("targets", self._state.targets)
        roles = {name: changed.get(name, role) for name, role in self._state.roles.items()}
        snapshot = deepcopy(self._state.snapshot)
        for name, role in changed.items():
            data = encode_metadata(role)
            if len(data) > METADATA_SIZE_BYTES_MAX:
                raise MeshError(Code.TOO_LARGE, f"The role {name} would grow beyond {METADATA_SIZE_BYTES_MAX} bytes.")
            write_file(self._metadata_path(f"{role.signed.version}.{name}"), data)
            snapshot.signed.meta[f"{name}.json"] = MetaFile.from_data(role.signed.version, data, ["sha256"])
        self._advance(snapshot, self._lifetimes.snapshot)
        write_file(self._metadata_path(f"{snapshot.signed.version}.snapshot"), encode_metadata(snapshot))
        self._write_timestamp(replace(self._state, snapshot=snapshot, targets=targets, roles=roles))
        self._prune(["snapshot", *changed])
        return self.serial

    def _write_timestamp(self, state: RepositoryState) -> None:
        timestamp = deepcopy(state.timestamp)
        snapshot = state.snapshot
        timestamp.signed.snapshot_meta = MetaFile.from_data(
            snapshot.signed.version, encode_metadata(snapshot), ["sha256"]
        )
        self._advance(timestamp, self._lifetimes.timestamp)
        write_file(self._metadata_path("timestamp"), encode_metadata(timestamp))
        self._state = replace(state, timestamp=timestamp)

    def _advance(self, role: Metadata[Any], lifetime: timedelta) -> None:
        role.signed.version += 1
        role.signed.expires = (datetime.now(UTC) + lifetime).replace(microsecond=0)
        role.sign(self._signer)

    def _write_target(self, path: str, target: TargetFile, data: bytes) -> None:
        write_file(self.folder / target_file_path(path, target.hashes["sha256"]), data)

    def _read_target(self, path: str, target: TargetFile) -> bytes:
        data = (self.folder / target_file_path(path, target.hashes["sha256"])).read_bytes()
        target.verify_length_and_hashes(data)
        return data

    def _metadata_path(self, name: str) -> Path:
        return self.folder / "metadata" / f"{name}.json"

    def _models_roles(self) -> dict[str, Metadata[Targets]]:
        return {name: role for name, role in self._state.roles.items() if name.startswith("models-")}

    def _prune(self, names: Sequence[str]) -> None:
        """Forget versions of a role that no reader can still be about to ask for, and channel documents likewise."""
        for name in names:
            files = {int(path.name.partition(".")[0]): path for path in self._glob("metadata", f"*.{name}.json")}
            for version in sorted(files)[:-VERSIONS_KEPT]:
                files[version].unlink(missing_ok=True)
        if "rollout" not in names:
            return
        for path, target in self._state.roles["rollout"].signed.targets.items():
            present = self.folder / target_file_path(path, target.hashes["sha256"])
            documents = [
                file for file in self._glob("targets/channels", f"*.{path.rpartition('/')[2]}") if file != present
            ]
            documents.sort(key=lambda file: file.stat().st_mtime_ns)
            for file in documents[:-VERSIONS_KEPT]:
                file.unlink(missing_ok=True)

    def _glob(self, folder: str, pattern: str) -> list[Path]:
        return list((self.folder / folder).glob(pattern))
