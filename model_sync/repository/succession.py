"""What the next offline roles have to fulfil: signed by a threshold of the right keys, and nothing lost on the way.

The root walks in steps of one, each signed by the root before it and by itself. The targets role delegates: to teams
(`models-<team>`) and to the controller (`rollout`); it may change its mind about their keys, but what is delegated must
be validly signed at every moment. The publisher asks the same questions before it sends anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Key, Metadata, Role, Root, Targets  # type: ignore[attr-defined]
from tuf.api.serialization import DeserializationError

from model_sync.repository.layout import METADATA_SIZE_BYTES_MAX, withdrawn_paths
from model_sync.repository.state import RepositoryState
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import is_model_name

ROOT_SIZE_BYTES_MAX = 512_000
"""The largest root that a node of the reference client reads."""
MODELS_PREFIX = "models-"
CHANNEL_PATHS = ["channels/*"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Succession:
    """Offline roles that may follow those of now: the root, the targets role and the models roles that change."""

    root: Metadata[Root] | None
    changed: Mapping[str, Metadata[Targets]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """How far the signatures of one role are: by `judge`, `signed` of `threshold`, and who else could sign."""

    judge: str
    signed: int
    threshold: int
    waiting: tuple[Key, ...]


def missing_signatures(
    name: str, role: Metadata[Any], *, present: Root, root: Root, targets: Targets | None
) -> list[Missing]:
    """Which signatures a role still lacks; empty once it has enough.

    Args:
        name: of the role.
        role: the role in question.
        present: root of now.
        root: root that will hold with the role, which may be `present`.
        targets: targets role that will hold with it.
    """
    if name == "root":
        judges: list[tuple[str, Root | Targets]] = [("the present root", present), ("the new root", root)]
    elif name == "targets":
        judges = [("root", root)]
    else:
        judges = [("targets", targets)] if targets is not None else []
    found = []
    for judge, signed in judges:
        result = signed.get_verification_result(name, role.signed_bytes, role.signatures)
        if not result.verified:
            waiting = tuple(result.unsigned.values())
            found.append(Missing(judge=judge, signed=len(result.signed), threshold=result.threshold, waiting=waiting))
    return found


def check_succession(
    state: RepositoryState, *, root: bytes | None, targets: bytes | None, models: Mapping[str, bytes]
) -> Succession:
    """Whether these roles, as JSON, may follow those of `state`, all together.

    Raises:
        MeshError: UNTRUSTED, CONFLICT for a wrong version, TOO_LARGE.
    """
    next_root = check_root(root, state) if root is not None else None
    judge = (next_root or state.root).signed
    changed: dict[str, Metadata[Targets]] = {}
    if targets is not None:
        changed["targets"] = check_targets(targets, state, judge)
    else:
        _require_still_signed("targets", state.targets, root=judge, targets=None)
    delegator = changed.get("targets", state.targets).signed
    for name in delegated_roles(delegator):
        if not name.startswith(MODELS_PREFIX):
            continue
        if name in models:
            changed[name] = check_models(models[name], name, state, delegator)
        elif name in state.roles:
            _require_still_signed(name, state.roles[name], root=judge, targets=delegator)
        else:
            raise MeshError(Code.UNTRUSTED, f"The new role {name} needs its first, signed document along.")
    if unknown := sorted(set(models) - set(changed)):
        raise MeshError(Code.UNTRUSTED, f"The targets role delegates nothing to {unknown[0]}.")
    return Succession(root=next_root, changed=changed)


def check_root(data: bytes, state: RepositoryState) -> Metadata[Root]:
    """The next root, if thresholds of the present one and of itself sign it.

    Raises:
        MeshError: UNTRUSTED, TOO_LARGE, or CONFLICT for a wrong version.
    """
    present = state.root.signed
    if len(data) > ROOT_SIZE_BYTES_MAX:
        raise MeshError(Code.TOO_LARGE, f"The root role is larger than {ROOT_SIZE_BYTES_MAX} bytes.")
    try:
        root = Metadata[Root].from_bytes(data)
        _require_signed("root", root, present=present, root=root.signed, targets=None)
        for name, role in root.signed.roles.items():
            _require_sound(name, role, root.signed.keys)
    except (RepositoryError, DeserializationError, ValueError, KeyError, AttributeError) as error:
        raise MeshError(Code.UNTRUSTED, "The root role is malformed; nothing was changed.") from error
    if not root.signed.consistent_snapshot:
        raise MeshError(Code.UNTRUSTED, "The root role must keep consistent snapshots: files never change their name.")
    _require_next("root", root, present.version)
    return root


def check_targets(data: bytes, state: RepositoryState, root: Root) -> Metadata[Targets]:
    """The next targets role, if `root` vouches for its keys and it delegates soundly.

    Raises:
        MeshError: UNTRUSTED, TOO_LARGE, or CONFLICT for a wrong version.
    """
    targets = _read_targets("targets", data)
    _require_signed("targets", targets, present=state.root.signed, root=root, targets=None)
    present, roles = delegated_roles(state.targets.signed), delegated_roles(targets.signed)
    if targets.signed.targets or targets.signed.delegations is None or targets.signed.delegations.succinct_roles:
        raise MeshError(Code.UNTRUSTED, "The targets role must delegate to named roles and name no targets itself.")
    if lost := sorted(set(present) - set(roles)):
        raise MeshError(Code.UNTRUSTED, f"The role {lost[0]} must stay delegated; withdraw its releases instead.")
    for name, role in roles.items():
        _require_sound(name, role, targets.signed.delegations.keys)
        if not _is_own_ground(role):
            raise MeshError(
                Code.UNTRUSTED,
                f"The role {name} must be rollout, for channels/*, or models-<team>, for models/.",
            )
    _require_next("targets", targets, state.targets.signed.version)
    return targets


def check_models(data: bytes, name: str, state: RepositoryState, targets: Targets) -> Metadata[Targets]:
    """The next models role of that name, if `targets` vouches for its keys.

    Raises:
        MeshError: UNTRUSTED, TOO_LARGE, or CONFLICT for a wrong version.
    """
    role = _read_targets(name, data)
    _require_signed(name, role, present=state.root.signed, root=state.root.signed, targets=targets)
    if role.signed.delegations is not None:
        raise MeshError(Code.UNTRUSTED, f"The role {name} must be a targets role without delegations.")
    present = state.roles.get(name)
    _require_next(name, role, present.signed.version if present else 0)
    return role


def require_same_releases(name: str, role: Targets, present: Targets | None) -> None:
    """Refuse a models role that, beside new signatures, publishes or changes a release.

    Raises:
        MeshError: UNTRUSTED.
    """
    before = present.targets if present else {}
    kept = {path: target for path, target in before.items() if path not in withdrawn_paths(role)}
    if role.targets != kept:
        raise MeshError(
            Code.UNTRUSTED, f"The role {name} may be signed again here, and may withdraw releases, but publish none."
        )


def delegated_roles(targets: Targets) -> Mapping[str, DelegatedRole]:
    """The roles to which a targets role delegates, by name."""
    return (targets.delegations.roles or {}) if targets.delegations else {}


def _read_targets(name: str, data: bytes) -> Metadata[Targets]:
    if len(data) > METADATA_SIZE_BYTES_MAX:
        raise MeshError(Code.TOO_LARGE, f"The role {name} is larger than {METADATA_SIZE_BYTES_MAX} bytes.")
    try:
        role = Metadata[Targets].from_bytes(data)
    except (RepositoryError, DeserializationError, ValueError) as error:
        raise MeshError(Code.UNTRUSTED, f"The role {name} is malformed.") from error
    if not isinstance(role.signed, Targets):
        raise MeshError(Code.UNTRUSTED, f"The role {name} must be a targets role.")
    return role


def _require_signed(name: str, role: Metadata[Any], *, present: Root, root: Root, targets: Targets | None) -> None:
    for missing in missing_signatures(name, role, present=present, root=root, targets=targets):
        if name.startswith(MODELS_PREFIX) and not missing.signed:
            raise MeshError(
                Code.UNTRUSTED,
                f"The role {name} is not signed by a key that the targets role delegates to; use that team's key.",
            )
        raise MeshError(
            Code.UNTRUSTED,
            f"The role {name} has {missing.signed} of the {missing.threshold} signatures that {missing.judge} wants.",
        )


def _require_still_signed(name: str, role: Metadata[Any], *, root: Root, targets: Targets | None) -> None:
    if missing_signatures(name, role, present=root, root=root, targets=targets):
        raise MeshError(Code.UNTRUSTED, f"The keys of {name} change; sign the role {name} with them and send it along.")


def _require_sound(name: str, role: Role, keys: Mapping[str, Key]) -> None:
    # One key under two names would count twice.
    distinct = {str(keys[keyid].keyval["public"]) for keyid in role.keyids if keyid in keys}
    if len(distinct) != len(role.keyids):
        raise MeshError(Code.UNTRUSTED, f"The role {name} lists a key twice, or one that is not there.")
    if role.threshold > len(distinct):
        raise MeshError(Code.UNTRUSTED, f"The role {name} would need {role.threshold} of only {len(distinct)} keys.")


def _is_own_ground(role: DelegatedRole) -> bool:
    paths = role.paths or []
    if role.name == "rollout":
        return paths == CHANNEL_PATHS and role.terminating
    is_team = role.name.startswith(MODELS_PREFIX) and is_model_name(role.name.removeprefix(MODELS_PREFIX))
    return is_team and bool(paths) and all(path.startswith("models/") for path in paths)


def _require_next(name: str, role: Metadata[Any], version: int) -> None:
    if role.signed.version != version + 1:
        raise MeshError(
            Code.CONFLICT, f"The role {name} is at version {version}; sign {version + 1}, not {role.signed.version}."
        )
    if role.signed.is_expired():
        raise MeshError(Code.UNTRUSTED, f"The role {name} has expired already; sign it again.")
