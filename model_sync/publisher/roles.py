"""The offline roles of a mesh, read from the controller but believed only as the operator's own root vouches for them,
and the next roles that a change of keys needs.

Reading must work when a role has expired already, which a TUF client refuses; so signatures are checked here, and
versions against what this operator saw last, but not expiries.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    Role,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError

from model_sync.publisher.control_client import ControlClient
from model_sync.repository.layout import encode_metadata, withdrawn_paths
from model_sync.repository.repository import Lifetimes
from model_sync.repository.succession import CHANNEL_PATHS, MODELS_PREFIX, delegated_roles, missing_signatures
from nearcast.durable import write_file
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import is_model_name

ONLINE = "online"
"""What commands call timestamp, snapshot and rollout together: they have one key."""
MODELS_PATHS = ["models/*/*"]
R = TypeVar("R", Root, Targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The offline roles of one moment; `models` by role name. Expiry of the online roles by name in `online`."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    models: Mapping[str, Metadata[Targets]]
    online: Mapping[str, datetime]

    def present(self) -> dict[str, Metadata[Any]]:
        """All of them by name."""
        return {"root": self.root, "targets": self.targets, **self.models}

    def role(self, name: str) -> Role:
        """Keys and threshold of a role.

        Raises:
            MeshError: INVALID_REQUEST if there is no such role.
        """
        found: Role | None = delegated_roles(self.targets.signed).get(name)
        if name == ONLINE:
            found = self.root.signed.roles["timestamp"]
        elif name in ("root", "targets"):
            found = self.root.signed.roles[name]
        if found is None or name == "rollout":
            known = ", ".join(["root", "targets", *self.models, ONLINE])
            raise MeshError(Code.INVALID_REQUEST, f"There is no role {name}; there are: {known}.")
        return found

    def keys(self, name: str) -> list[Key]:
        """The keys of a role."""
        delegator: Root | Targets = self.targets.signed if name.startswith(MODELS_PREFIX) else self.root.signed
        return [delegator.get_key(keyid) for keyid in self.role(name).keyids]


Change = dict[str, Metadata[Any]]
"""The next offline roles by name, those only that change."""


def now() -> datetime:
    """The present second."""
    return datetime.now(UTC).replace(microsecond=0)


def set_keys(
    roles: Roles, name: str, keys: Sequence[Key], *, threshold: int, paths: Sequence[str] = (), at: datetime
) -> Change:
    """The next roles, unsigned, in which `name` has these keys; a new team if there is none of that name yet.

    Args:
        roles: those of now.
        name: root, targets, models-<team> or `ONLINE`.
        keys: all keys of the role from now on.
        threshold: how many of them must sign.
        paths: target paths of a new team; () = any model.
        at: the present time.

    Raises:
        MeshError: INVALID_REQUEST if the threshold cannot be met, or the role has no such name.
    """
    if not 1 <= threshold <= len({key.keyid for key in keys}):
        raise MeshError(
            Code.INVALID_REQUEST, f"{name} would need {threshold} of {len(keys)} keys; choose another --threshold."
        )
    change: Change = {}
    if name in ("root", "targets", ONLINE):
        change["root"] = _next_of(roles.root, Lifetimes().root, at)
        for role in (name,) if name != ONLINE else ("snapshot", "timestamp"):
            _replace_keys(change["root"].signed, role, keys, threshold)
    if name.startswith(MODELS_PREFIX) or name == ONLINE:
        change["targets"] = _next_of(roles.targets, Lifetimes().targets, at)
        delegated = "rollout" if name == ONLINE else name
        if delegated not in delegated_roles(roles.targets.signed):
            _delegate(change["targets"].signed, delegated, list(paths) or MODELS_PATHS)
        _replace_keys(change["targets"].signed, delegated, keys, threshold)
    elif not change:
        raise MeshError(Code.INVALID_REQUEST, f"There is no role {name}: root, targets, models-<team> or {ONLINE}.")
    return change | _sign_again(roles, change, at)


def withdraw(change: Change, roles: Roles, name: str, paths: Collection[str], at: datetime) -> Change:
    """The change, in which the models role `name` vouches for these target paths no longer.

    Raises:
        MeshError: INVALID_REQUEST if one is not published by that role.
    """
    role = change.get(name) or _next_of(roles.models[name], Lifetimes().models, at)
    for path in paths:
        if role.signed.targets.pop(path, None) is None:
            raise MeshError(Code.INVALID_REQUEST, f"{name} does not publish {path}; nothing was withdrawn.")
    role.signed.unrecognized_fields["withdrawn"] = sorted({*withdrawn_paths(role.signed), *paths})
    return {**change, name: role}


def extend(roles: Roles, names: Collection[str], at: datetime) -> Change:
    """The next roles of these names, unsigned, as they are for another term."""
    lifetimes = Lifetimes()
    terms = {"root": lifetimes.root, "targets": lifetimes.targets}
    return {
        name: _next_of(role, terms.get(name, lifetimes.models), at)
        for name, role in roles.present().items()
        if name in names
    }


def _sign_again(roles: Roles, change: Change, at: datetime) -> Change:
    """What must be signed again because its present signatures would hold no more under the change."""
    found = dict(change)
    root = (change.get("root") or roles.root).signed
    judge = {"present": roles.root.signed, "root": root}
    if "targets" not in found and missing_signatures("targets", roles.targets, **judge, targets=None):
        found["targets"] = _next_of(roles.targets, Lifetimes().targets, at)
    targets = (found.get("targets") or roles.targets).signed
    for name in delegated_roles(targets):
        if not name.startswith(MODELS_PREFIX):
            continue
        present = roles.models.get(name)
        if present is None:
            found[name] = Metadata(Targets(expires=at + Lifetimes().models))
        elif missing_signatures(name, present, **judge, targets=targets):
            found[name] = _next_of(present, Lifetimes().models, at)
    return found


def _next_of(role: Metadata[R], lifetime: timedelta, at: datetime) -> Metadata[R]:
    following = deepcopy(role)
    following.signatures.clear()
    following.signed.version += 1
    following.signed.expires = at + lifetime
    return following


def _replace_keys(signed: Root | Targets, role: str, keys: Sequence[Key], threshold: int) -> None:
    entry = signed.get_delegated_role(role)
    for keyid in set(entry.keyids) - {key.keyid for key in keys}:
        signed.revoke_key(keyid, role)
    for key in keys:
        signed.add_key(key, role)
    entry.threshold = threshold


def _delegate(signed: Targets, name: str, paths: list[str]) -> None:
    if not is_model_name(name.removeprefix(MODELS_PREFIX)) or not all(path.startswith("models/") for path in paths):
        raise MeshError(Code.INVALID_REQUEST, "A team has lower case letters, digits, _ and -, at most 64.")
    if signed.delegations is None:
        signed.delegations = Delegations({}, {})
    terminating = paths == CHANNEL_PATHS
    roles = signed.delegations.roles
    assert roles is not None
    roles[name] = DelegatedRole(name, [], 1, terminating, paths=paths)


def read_roles(client: ControlClient, operator: Path) -> Roles:
    """The offline roles of now; the root that they were reached by is kept as the operator's own.

    Raises:
        MeshError: UNTRUSTED if the controller shows roles that this operator's root does not vouch for, or older ones.
    """
    try:
        roles = _read_roles(client, operator)
    except (RepositoryError, DeserializationError, ValueError, KeyError, AttributeError) as error:
        raise MeshError(
            Code.UNTRUSTED, "The controller shows roles that the operator's root does not vouch for; sign nothing."
        ) from error
    write_file(operator / "root.json", encode_metadata(roles.root))
    return roles


def _read_roles(client: ControlClient, operator: Path) -> Roles:
    root = Metadata[Root].from_bytes((operator / "root.json").read_bytes())
    while (data := _get(client, f"{root.signed.version + 1}.root", optional=True)) is not None:
        following = Metadata[Root].from_bytes(data)
        for judge in (root.signed, following.signed):
            judge.verify_delegate("root", following.signed_bytes, following.signatures)
        if following.signed.version != root.signed.version + 1:
            raise ValueError("wrong version")
        root = following
    timestamp = Metadata[Timestamp].from_bytes(_require(client, "timestamp"))
    root.signed.verify_delegate("timestamp", timestamp.signed_bytes, timestamp.signatures)
    snapshot = Metadata[Snapshot].from_bytes(_require(client, f"{timestamp.signed.snapshot_meta.version}.snapshot"))
    root.signed.verify_delegate("snapshot", snapshot.signed_bytes, snapshot.signatures)
    meta = snapshot.signed.meta
    targets = Metadata[Targets].from_bytes(_require(client, f"{meta['targets.json'].version}.targets"))
    root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
    _require_not_older("targets", targets, operator)
    delegated: dict[str, Metadata[Targets]] = {}
    for name in delegated_roles(targets.signed):
        role = Metadata[Targets].from_bytes(_require(client, f"{meta[f'{name}.json'].version}.{name}"))
        targets.signed.verify_delegate(name, role.signed_bytes, role.signatures)
        if name.startswith(MODELS_PREFIX):
            _require_not_older(name, role, operator)
        delegated[name] = role
    online = {"timestamp": timestamp.signed.expires, "snapshot": snapshot.signed.expires}
    online["rollout"] = delegated.pop("rollout").signed.expires
    return Roles(root=root, targets=targets, models=delegated, online=online)


def _require_not_older(name: str, role: Metadata[Targets], operator: Path) -> None:
    seen = operator / "tuf" / f"{name}.json"
    if seen.exists() and Metadata[Targets].from_file(str(seen)).signed.version > role.signed.version:
        raise MeshError(
            Code.UNTRUSTED,
            f"The controller shows an older version of {name} than before; sign nothing, and find out why.",
        )


def _require(client: ControlClient, name: str) -> bytes:
    data = _get(client, name)
    assert data is not None
    return data


def _get(client: ControlClient, name: str, *, optional: bool = False) -> bytes | None:
    status, data = client.get_bytes(f"/repository/metadata/{name}.json")
    if status == 200:
        return data
    if optional and status == 404:
        return None
    raise MeshError(Code.UNAVAILABLE, f"The controller has no {name}.json (status {status}).")
