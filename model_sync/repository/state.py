"""All metadata of one moment of the repository, read and checked, and the checks that the next one has to pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.api.serialization import DeserializationError

from model_sync.repository.layout import METADATA_SIZE_BYTES_MAX
from nearcast.errors import Code, MeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryState:
    """All metadata of one moment, as the timestamp of that moment names it."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]
    roles: Mapping[str, Metadata[Targets]] = field(default_factory=dict)


def read_state(folder: Path, online_keyid: str) -> RepositoryState:
    """The state that `timestamp.json` names; what a crash left beyond it is ignored and later overwritten."""
    folder = folder / "metadata"
    try:
        numbers = [int(path.name.partition(".")[0]) for path in folder.glob("*.root.json")]
        root = Metadata[Root].from_file(str(folder / f"{max(numbers)}.root.json"))
        timestamp = Metadata[Timestamp].from_file(str(folder / "timestamp.json"))
        snapshot_version = timestamp.signed.snapshot_meta.version
        snapshot = Metadata[Snapshot].from_file(str(folder / f"{snapshot_version}.snapshot.json"))
        meta = snapshot.signed.meta
        targets = Metadata[Targets].from_file(str(folder / f"{meta['targets.json'].version}.targets.json"))
        names = sorted(targets.signed.delegations.roles or {}) if targets.signed.delegations else []
        roles = {
            name: Metadata[Targets].from_file(str(folder / f"{meta[f'{name}.json'].version}.{name}.json"))
            for name in names
        }
    except (OSError, ValueError, KeyError, RepositoryError, DeserializationError) as error:
        raise MeshError(
            Code.UNAVAILABLE, "The repository is missing or damaged; make one with `nearcast keys init`."
        ) from error
    state = RepositoryState(root=root, timestamp=timestamp, snapshot=snapshot, targets=targets, roles=roles)
    _verify_state(state, online_keyid)
    return state


def _verify_state(state: RepositoryState, online_keyid: str) -> None:
    root, targets = state.root.signed, state.targets.signed
    top: list[tuple[str, Metadata[Any]]] = [
        ("timestamp", state.timestamp),
        ("snapshot", state.snapshot),
        ("targets", state.targets),
    ]
    try:
        for name, role in top:
            root.verify_delegate(name, role.signed_bytes, role.signatures)
        for name, role in state.roles.items():
            targets.verify_delegate(name, role.signed_bytes, role.signatures)
    except (RepositoryError, ValueError) as error:
        raise MeshError(
            Code.UNTRUSTED, "A role of the repository has no valid signature; restore it from a backup."
        ) from error
    delegations = targets.delegations
    rollout = delegations.roles.get("rollout") if delegations and delegations.roles else None
    trusted = [root.roles["timestamp"].keyids, root.roles["snapshot"].keyids, rollout.keyids if rollout else []]
    if any(online_keyid not in keyids for keyids in trusted):
        raise MeshError(Code.UNTRUSTED, "The online key is not the one that this repository trusts.")


def check_root(data: bytes, state: RepositoryState) -> Metadata[Root]:
    """The next root, if the present one and the new one itself sign it and it trusts the same keys.

    Raises:
        MeshError: UNTRUSTED, or CONFLICT for a wrong version.
    """
    present = state.root.signed
    try:
        root = Metadata[Root].from_bytes(data)
        for judge in (present, root.signed):
            judge.verify_delegate("root", root.signed_bytes, root.signatures)
    except (RepositoryError, DeserializationError, ValueError, AttributeError) as error:
        raise MeshError(Code.UNTRUSTED, "The root role is malformed or not signed by the root key.") from error
    if {name: role.to_dict() for name, role in root.signed.roles.items()} != {
        name: role.to_dict() for name, role in present.roles.items()
    }:
        raise MeshError(Code.UNTRUSTED, "The root role must trust the same keys as before.")
    _require_next("root", root, present.version)
    return root


def check_targets(data: bytes, state: RepositoryState) -> Metadata[Targets]:
    """The next targets role, if the root's key signs it and it delegates as before.

    Raises:
        MeshError: UNTRUSTED, or CONFLICT for a wrong version.
    """
    present = state.targets.signed
    try:
        targets = Metadata[Targets].from_bytes(data)
        state.root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
    except (RepositoryError, DeserializationError, ValueError, AttributeError) as error:
        raise MeshError(Code.UNTRUSTED, "The targets role is malformed or not signed by the targets key.") from error
    if targets.signed.delegations != present.delegations or targets.signed.targets:
        raise MeshError(Code.UNTRUSTED, "The targets role must delegate as before and name no targets itself.")
    _require_next("targets", targets, present.version)
    return targets


def check_models(data: bytes, name: str, state: RepositoryState) -> Metadata[Targets]:
    """The next models role of that name, if it is signed by a key that the targets role delegates to.

    Raises:
        MeshError: UNTRUSTED, TOO_LARGE, or CONFLICT for a wrong version.
    """
    if len(data) > METADATA_SIZE_BYTES_MAX:
        raise MeshError(Code.TOO_LARGE, f"The role is larger than {METADATA_SIZE_BYTES_MAX} bytes.")
    try:
        role = Metadata[Targets].from_bytes(data)
        state.targets.signed.verify_delegate(name, role.signed_bytes, role.signatures)
    except UnsignedMetadataError as error:
        raise MeshError(
            Code.UNTRUSTED,
            f"The role {name} is not signed by a key that the targets role delegates to; use that team's key.",
        ) from error
    except (RepositoryError, DeserializationError, ValueError) as error:
        raise MeshError(Code.UNTRUSTED, f"The role {name} is malformed.") from error
    if not isinstance(role.signed, Targets) or role.signed.delegations is not None:
        raise MeshError(Code.UNTRUSTED, f"The role {name} must be a targets role without delegations.")
    _require_next(name, role, state.roles[name].signed.version)
    return role


def _require_next(name: str, role: Metadata[Any], version: int) -> None:
    if role.signed.version != version + 1:
        raise MeshError(
            Code.CONFLICT, f"The role {name} is at version {version}; sign {version + 1}, not {role.signed.version}."
        )
    if role.signed.is_expired():
        raise MeshError(Code.UNTRUSTED, f"The role {name} has expired already; sign it again.")
