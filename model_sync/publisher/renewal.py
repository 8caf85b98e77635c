"""Offline roles for another term: root, targets and the models roles whose keys lie in the operator's folder.

This must work when a role has expired already, which a TUF client refuses; so signatures are checked here against the
operator's own root, and versions against what that operator saw last, but not expiries.
"""

from __future__ import annotations

from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.api.serialization import DeserializationError

from model_sync.publisher.control_client import ControlClient
from model_sync.repository.layout import encode_metadata
from model_sync.repository.repository import Lifetimes
from model_sync.repository.signing_key import load_key
from nearcast.durable import write_file
from nearcast.errors import Code, MeshError


def renew_roles(client: ControlClient, operator: Path) -> dict[str, datetime]:
    """Sign every role again whose key is in `operator`, and publish them; answers when each expires now.

    Raises:
        MeshError: UNTRUSTED if the controller shows roles that this operator's keys have not signed, or older ones.
    """
    lifetimes = Lifetimes()
    expiries: dict[str, datetime] = {}
    try:
        root, targets, models = _read_roles(client, operator)
    except (RepositoryError, DeserializationError, ValueError, KeyError, AttributeError) as error:
        raise MeshError(
            Code.UNTRUSTED, "The controller shows roles that the operator's root does not vouch for; sign nothing."
        ) from error
    offline: dict[str, Any] = {}
    for name, role, lifetime in (("root", root, lifetimes.root), ("targets", targets, lifetimes.targets)):
        if (operator / f"{name}.pem").exists():
            _extend(role, operator / f"{name}.pem", lifetime)
            offline[name] = role.to_dict()
            expiries[name] = role.signed.expires
    if offline:
        client.call("POST", "/v1/roles", offline)
    if "root" in offline:
        write_file(operator / "root.json", encode_metadata(root))
    for name, role in models.items():
        key = operator / f"{name}.pem"
        if key.exists():
            _extend(role, key, lifetimes.models)
            team = name.removeprefix("models-")
            client.call("POST", "/v1/releases", {"team": team, "metadata": role.to_dict(), "manifests": {}})
            expiries[name] = role.signed.expires
    if not expiries:
        raise MeshError(Code.FORBIDDEN, f"{operator} holds no key of an offline role; nothing was signed.")
    return expiries


def _extend(role: Metadata[Any], key: Path, lifetime: timedelta) -> None:
    role.signed.version += 1
    role.signed.expires = datetime.now(UTC).replace(microsecond=0) + lifetime
    role.sign(load_key(key))


def _read_roles(
    client: ControlClient, operator: Path
) -> tuple[Metadata[Root], Metadata[Targets], dict[str, Metadata[Targets]]]:
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
    models: dict[str, Metadata[Targets]] = {}
    for name in (targets.signed.delegations.roles or {}) if targets.signed.delegations else {}:
        if name.startswith("models-"):
            role = Metadata[Targets].from_bytes(_require(client, f"{meta[f'{name}.json'].version}.{name}"))
            targets.signed.verify_delegate(name, role.signed_bytes, role.signatures)
            _require_not_older(name, role, operator)
            models[name] = role
    return deepcopy(root), targets, models


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
