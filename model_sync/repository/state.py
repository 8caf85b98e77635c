"""All metadata of one moment of the repository, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.api.serialization import DeserializationError

from nearcast.durable import move_file
from nearcast.errors import Code, MeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryState:
    """All metadata of one moment, as the timestamp of that moment names it."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]
    roles: Mapping[str, Metadata[Targets]] = field(default_factory=dict)


def online_keyids(root: Root, targets: Targets) -> frozenset[str]:
    """Keys that sign alone for timestamp, snapshot and rollout; the controller's own must be among them."""
    delegated = (targets.delegations.roles or {}) if targets.delegations else {}
    roles = [root.roles["timestamp"], root.roles["snapshot"], delegated.get("rollout")]
    if any(role is None or role.threshold != 1 for role in roles):
        return frozenset()
    return frozenset.intersection(*(frozenset(role.keyids) for role in roles if role is not None))


def pending_timestamp(folder: Path, root_version: int) -> Path:
    """The timestamp that counts once that root is there. It lies beside `metadata/`, where no client looks."""
    return folder / f"timestamp-for-root-{root_version}.json"


def finish_root(folder: Path) -> None:
    """End a change of the root that a crash cut short: with its root in place the waiting timestamp counts."""
    versions = [int(path.name.partition(".")[0]) for path in (folder / "metadata").glob("*.root.json")]
    for path in folder.glob("timestamp-for-root-*.json"):
        if path == pending_timestamp(folder, max(versions, default=0)):
            move_file(path, folder / "metadata" / "timestamp.json")
        else:
            path.unlink()


def read_state(folder: Path) -> RepositoryState:
    """The state that `timestamp.json` names; what a crash left beyond it is ignored and later overwritten.

    Raises:
        MeshError: UNAVAILABLE if it is missing or damaged, UNTRUSTED if a signature does not hold.
    """
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
    _verify_state(state)
    return state


def _verify_state(state: RepositoryState) -> None:
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
