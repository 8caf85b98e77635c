"""The TUF repository as its publisher sees it: static files, immutable but for `timestamp.json`.

Order of every change: blobs and target files, role metadata, snapshot, and last of all `timestamp.json` by rename. A
reader, and this class after a crash, sees either the state before or the state after. Root, targets and models roles
are signed elsewhere; only snapshot, timestamp and rollout are signed here, with the online key.
"""

from __future__ import annotations

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
    Root,
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
from model_sync.repository.releases import added_releases, require_whole, require_withdrawn
from model_sync.repository.state import RepositoryState, finish_root, online_keyids, pending_timestamp, read_state
from model_sync.repository.succession import (
    MODELS_PREFIX,
    check_models,
    check_succession,
    delegated_roles,
    require_same_releases,
)
from model_sync.rollout.document import ChannelDocument, first_intent
from nearcast.durable import move_file, remove_leftovers, write_file
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import Manifest, decode_manifest

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

    def __init__(self, folder: Path, *signers: CryptoSigner, lifetimes: Lifetimes | None = None) -> None:
        """Open a repository; of `signers`, the online keys at hand, the one is used that its roles trust.

        With none of them it can be read, and can be given roles that trust another key; nothing else can be signed.

        Raises:
            MeshError: UNAVAILABLE if the repository is missing or damaged, UNTRUSTED if a signature does not hold.
        """
        self.folder = folder
        self._signers = list(signers)
        self._lifetimes = lifetimes or Lifetimes()
        remove_leftovers(folder)
        finish_root(folder)
        self._state = read_state(folder)
        self._signer_or_none = self._find_signer(self._state.root.signed, self._state.targets.signed)

    # -- what is published ------------------------------------------------------------------------------------------

    @property
    def serial(self) -> int:
        """Version of `timestamp.json`: grows with every change."""
        return self._state.timestamp.signed.version

    @property
    def root_version(self) -> int:
        """Version of the newest root."""
        return self._state.root.signed.version

    @property
    def online_keyid(self) -> str:
        """Id of the key that signs here; "" if it is not at hand."""
        return str(self._signer_or_none.public_key.keyid) if self._signer_or_none else ""

    def offer_signer(self, signer: CryptoSigner) -> None:
        """Hold another online key ready, in place of one offered before; it is used once root and targets trust it."""
        self._signers = [*([self._signer_or_none] if self._signer_or_none else []), signer]

    @property
    def _signer(self) -> CryptoSigner:
        if self._signer_or_none is None:
            raise MeshError(
                Code.UNAVAILABLE,
                "The online key that this repository trusts is not here, so nothing can be signed; bring online.pem "
                "back, or replace it: nearcast keys rotate online.",
            )
        return self._signer_or_none

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
        if current is None:
            raise MeshError(Code.UNTRUSTED, f"The targets role delegates nothing to the team {team!r}.")
        role = check_models(metadata, name, self._state, self._state.targets.signed)
        require_withdrawn(role.signed, current.signed, self._channels())
        added = added_releases(
            name, role.signed, current.signed, targets=self._state.targets.signed, published=self.releases
        )
        for path, target in added.items():
            require_whole(path, target, manifests, self.has_blob)
        for path, target in added.items():
            self._write_target(path, target, manifests[path])
        return self._commit({name: role})

    def publish_offline(
        self, root: bytes | None, targets: bytes | None, models: Mapping[str, bytes] | None = None
    ) -> int:
        """Take over offline roles: another term, other keys, a new team; answers the new serial.

        All are checked before any is written, and all become valid at once with the timestamp. If they trust another
        online key, one that is held here, then rollout, snapshot and timestamp are signed with that key.

        Args:
            root: the next root as JSON; None = as before.
            targets: the next targets role; None = as before.
            models: next models roles by name, with the same releases, or with some withdrawn.

        Raises:
            MeshError: UNTRUSTED if signatures or delegations do not fit, CONFLICT for a wrong version.
        """
        succession = check_succession(self._state, root=root, targets=targets, models=models or {})
        changed = dict(succession.changed)
        for name in models or {}:
            present = self._state.roles.get(name)
            require_same_releases(name, changed[name].signed, present.signed if present else None)
            if present:
                require_withdrawn(changed[name].signed, present.signed, self._channels())
        next_root = succession.root or self._state.root
        signer = self._find_signer(next_root.signed, changed.get("targets", self._state.targets).signed)
        if signer is None:
            raise MeshError(
                Code.UNTRUSTED,
                "Timestamp, snapshot and rollout must trust one online key, alone, that this controller holds; "
                "make it with `nearcast keys rotate online`.",
            )
        if signer is not self._signer_or_none:
            changed["rollout"] = self._sign_channels_again(next_root.signed.version, signer)
        serial = self._commit(changed, root=succession.root, signer=signer)
        self._signer_or_none, self._signers = signer, [signer]
        return serial

    def publish_channel(self, document: ChannelDocument) -> int:
        """Sign a channel's next document with the rollout role; answers the new serial.

        Raises:
            MeshError: CONFLICT if `intent` does not follow the present one.
        """
        present = self.channel(document.channel)
        if document.intent != (present.intent if present else 0) + 1:
            raise MeshError(Code.CONFLICT, "The channel has changed meanwhile; read it and try again.")
        if present is None:
            document = msgspec.structs.replace(document, intent=first_intent(self.root_version))
        role = deepcopy(self._state.roles["rollout"])
        self._put_channel(role.signed, document)
        self._advance(role, self._lifetimes.rollout, self._signer)
        return self._commit({"rollout": role})

    def _put_channel(self, role: Targets, document: ChannelDocument) -> None:
        data = msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
        path = f"channels/{document.channel}.json"
        role.targets[path] = make_target(path, data)
        self._write_target(path, role.targets[path], data)

    def _sign_channels_again(self, root_version: int, signer: CryptoSigner) -> Metadata[Targets]:
        """Every channel as it is, under another key, with an intent that no thief of the old key can have used up."""
        role = deepcopy(self._state.roles["rollout"])
        for document in self._channels():
            intent = max(document.intent + 1, first_intent(root_version))
            self._put_channel(role.signed, msgspec.structs.replace(document, intent=intent))
        self._advance(role, self._lifetimes.rollout, signer)
        return role

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
            self._advance(changed["rollout"], self._lifetimes.rollout, self._signer)
        if changed or due(state.snapshot, self._lifetimes.snapshot):
            self._commit(changed)
            return True
        if due(state.timestamp, self._lifetimes.timestamp):
            self._write_timestamp(state)
            return True
        return False

    def _find_signer(self, root: Root, targets: Targets) -> CryptoSigner | None:
        trusted = online_keyids(root, targets)
        return next((signer for signer in self._signers if signer.public_key.keyid in trusted), None)

    # -- files ------------------------------------------------------------------------------------------------------

    def _commit(
        self,
        changed: Mapping[str, Metadata[Targets]],
        *,
        root: Metadata[Root] | None = None,
        signer: CryptoSigner | None = None,
    ) -> int:
        """Write changed roles, then a snapshot that names them, then the timestamp that makes it all visible."""
        signer = signer or self._signer
        targets = changed.get("targets", self._state.targets)
        known = {**self._state.roles, **changed}
        roles = {name: known[name] for name in delegated_roles(targets.signed)}
        snapshot = deepcopy(self._state.snapshot)
        for name, role in changed.items():
            data = encode_metadata(role)
            if len(data) > METADATA_SIZE_BYTES_MAX:
                raise MeshError(Code.TOO_LARGE, f"The role {name} would grow beyond {METADATA_SIZE_BYTES_MAX} bytes.")
            write_file(self._metadata_path(f"{role.signed.version}.{name}"), data)
            snapshot.signed.meta[f"{name}.json"] = MetaFile.from_data(role.signed.version, data, ["sha256"])
        self._advance(snapshot, self._lifetimes.snapshot, signer)
        write_file(self._metadata_path(f"{snapshot.signed.version}.snapshot"), encode_metadata(snapshot))
        state = replace(self._state, root=root or self._state.root, snapshot=snapshot, targets=targets, roles=roles)
        self._write_timestamp(state, root=root, signer=signer)
        self._prune(["snapshot", *changed])
        return self.serial

    def _write_timestamp(
        self, state: RepositoryState, *, root: Metadata[Root] | None = None, signer: CryptoSigner | None = None
    ) -> None:
        timestamp = deepcopy(state.timestamp)
        snapshot = state.snapshot
        timestamp.signed.snapshot_meta = MetaFile.from_data(
            snapshot.signed.version, encode_metadata(snapshot), ["sha256"]
        )
        self._advance(timestamp, self._lifetimes.timestamp, signer or self._signer)
        place = self._metadata_path("timestamp")
        if root is None:
            write_file(place, encode_metadata(timestamp))
        else:
            # Neither may count without the other; a crash between the two is ended by `finish_root`.
            pending = pending_timestamp(self.folder, root.signed.version)
            write_file(pending, encode_metadata(timestamp))
            write_file(self._metadata_path(f"{root.signed.version}.root"), encode_metadata(root))
            move_file(pending, place)
        self._state = replace(state, timestamp=timestamp)

    def _advance(self, role: Metadata[Any], lifetime: timedelta, signer: CryptoSigner) -> None:
        role.signed.version += 1
        role.signed.expires = (datetime.now(UTC) + lifetime).replace(microsecond=0)
        role.sign(signer)

    def _write_target(self, path: str, target: TargetFile, data: bytes) -> None:
        write_file(self.folder / target_file_path(path, target.hashes["sha256"]), data)

    def _read_target(self, path: str, target: TargetFile) -> bytes:
        data = (self.folder / target_file_path(path, target.hashes["sha256"])).read_bytes()
        target.verify_length_and_hashes(data)
        return data

    def _metadata_path(self, name: str) -> Path:
        return self.folder / "metadata" / f"{name}.json"

    def _channels(self) -> list[ChannelDocument]:
        paths = self._state.roles["rollout"].signed.targets
        documents = [self.channel(path.removeprefix("channels/").removesuffix(".json")) for path in paths]
        return [document for document in documents if document is not None]

    def _models_roles(self) -> dict[str, Metadata[Targets]]:
        return {name: role for name, role in self._state.roles.items() if name.startswith(MODELS_PREFIX)}

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
