"""The operator's side of a push: gate, sign with the team's key, upload what is missing, publish, point the channel.

Nothing the controller says is believed: the present roles are read through a TUF client that starts from the root made
by `nearcast keys init` and remembers what it saw last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api.exceptions import DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, TargetFile, Targets  # type: ignore[attr-defined]
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]

from model_sync.publisher.bundle import check_sbom, pass_gate, read_bundle, verify_bundle
from model_sync.publisher.control_client import ControlClient
from model_sync.publisher.deltas import BUDGET_S, PublishedWay, upload_deltas
from model_sync.publisher.licence import read_policy, require_licence
from model_sync.publisher.meter import Meter, SilentMeter
from model_sync.publisher.release_signing import find_team, forget_draft, sign_release
from model_sync.repository.layout import METADATA_SIZE_BYTES_MAX, blob_path, make_target, models_path
from model_sync.repository.layout import parse_models_path as parse_path
from model_sync.repository.repository import Lifetimes
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import Manifest
from nearcast.store.sealing import TenantKeys

ROLLBACKS_LISTED = 2
"""How many earlier releases a push lists as places to return to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did. `is_published` is false if the very same release was published before."""

    model: str
    release: int
    channel: str
    action: str
    intent: int
    serial: int
    is_published: bool
    uploaded_bytes: int
    rollback_ok: tuple[int, ...]
    deltas: tuple[PublishedWay, ...] = ()


class ControlFetcher(FetcherInterface):
    """Carries metadata for the TUF client over the operator's own connection."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def _fetch(self, url: str) -> Iterator[bytes]:
        status, data = self._client.get_bytes(url.removeprefix(self._client.control))
        if status != 200:
            raise DownloadHTTPError(f"status {status}", status)
        return iter((data,))


def push(
    bundle: Path,
    client: ControlClient,
    operator: Path,
    *,
    channel: str,
    team: str = "",
    share: float | None = None,
    wave: float = 1.0,
    rollback_ok: Sequence[int] = (),
    reason: str = "",
    meter: Meter | None = None,
    tenant_keys: Path | None = None,
    delta_budget_s: float = BUDGET_S,
    draft: Path | None = None,
) -> Pushed:
    """Publish a bundle and make it the stable release or, with `share`, the candidate of a channel.

    Args:
        bundle: the bundle's folder.
        client: an operator's connection.
        operator: folder with root.json and the team's key.
        channel: where to point to the release.
        team: whose key signs; "" = the only one in `operator`.
        share: share of the requests, in (0, 1], that a candidate answers; None = make it stable. The first release of a
            model in a channel is made stable in any case.
        wave: share of the nodes that install a candidate.
        rollback_ok: releases to allow a rollback to, beside the last two.
        reason: goes into the channel document.
        meter: shows the upload.
        tenant_keys: folder with the keys that open sealed versions: for the gate, and for deltas.
        delta_budget_s: how long the search for deltas may take; 0 = none.
        draft: folder that collects signatures if the team needs more than are in reach; None = `draft` beside
            `operator`.

    Raises:
        MeshError: UNTRUSTED if the bundle or the controller's metadata cannot be trusted, CONFLICT if the release is
            not newer than what is published or other holders have to sign first, FORBIDDEN without the team's key or
            with a licence that is not allowed, UNAUTHENTICATED without the key of a sealed bundle.
    """
    manifest, keys = _check_bundle(bundle, operator, tenant_keys)
    roles = fetch_models_roles(client, operator, manifest.name)
    team = team or find_team(operator)
    name = f"models-{team}"
    if name not in roles:
        raise MeshError(Code.UNTRUSTED, f"The mesh delegates nothing to the team {team!r}; known: {_teams(roles)}.")
    path = models_path(manifest.name, manifest.release)
    data = read_bundle(bundle)[1]
    listed = listed_rollbacks(roles, manifest.name, manifest.release, rollback_ok)
    target = make_target(path, data, {"rollback_ok": list(listed)})
    is_published = not is_already_published(roles, path, target, manifest)
    uploaded_bytes = 0
    deltas: tuple[PublishedWay, ...] = ()
    meter = meter or SilentMeter()
    if is_published:
        role = deepcopy(roles[name])
        role.signed.targets[path] = target
        role.signed.version += 1
        role.signed.expires = datetime.now(UTC).replace(microsecond=0) + Lifetimes().models
        role.signatures.clear()
        role = sign_release(name, role, roles, operator, draft)
        uploaded_bytes = upload_blobs(client, bundle, manifest, meter)
        deltas = upload_deltas(
            client, bundle, manifest, roles, operator, meter=meter, keys=keys, budget_s=delta_budget_s
        )
        metadata = role.to_dict()
        client.call("POST", "/v1/releases", {"team": team, "metadata": metadata, "manifests": {path: data.decode()}})
        forget_draft(name, operator, draft)
    action, answer = _point_channel(client, channel, manifest, share=share, wave=wave, reason=reason)
    return Pushed(
        model=manifest.name,
        release=manifest.release,
        channel=channel,
        action=action,
        intent=int(answer["intent"]),
        serial=int(answer["serial"]),
        is_published=is_published,
        uploaded_bytes=uploaded_bytes,
        rollback_ok=listed,
        deltas=deltas,
    )


def _check_bundle(bundle: Path, operator: Path, tenant_keys: Path | None) -> tuple[Manifest, TenantKeys]:
    """Refuse what no node would run, before anything is signed or sent."""
    manifest = verify_bundle(bundle)
    require_licence(manifest.licence, read_policy(operator))
    keys = TenantKeys.load(tenant_keys)
    if manifest.encryption is not None:
        keys.unwrap(manifest.encryption)
    check_sbom(bundle, manifest, tenant_keys)
    pass_gate(bundle, tenant_keys)
    return manifest, keys


def _point_channel(
    client: ControlClient, channel: str, manifest: Manifest, *, share: float | None, wave: float, reason: str
) -> tuple[str, dict[str, Any]]:
    """Ask for the release in a channel; what was asked for, and the controller's answer."""
    action = "stable" if share is None or not has_stable(client, channel, manifest.name) else "candidate"
    wish: dict[str, Any] = {"channel": channel, "model": manifest.name, "action": action, "release": manifest.release}
    if action == "candidate":
        wish |= {"share": share, "wave": wave}
    return action, client.call("POST", "/v1/rollouts", {**wish, "reason": reason})


def fetch_models_roles(client: ControlClient, operator: Path, model: str) -> dict[str, Metadata[Targets]]:
    """The verified models roles, by role name.

    Raises:
        MeshError: UNTRUSTED if anything is not signed as it must be, expired, or older than what was seen before.
    """
    cache = operator / "tuf"
    cache.mkdir(mode=0o700, exist_ok=True)
    config = UpdaterConfig(prefix_targets_with_hash=True, targets_max_length=METADATA_SIZE_BYTES_MAX)
    try:
        updater = Updater(
            str(cache),
            f"{client.control}/repository/metadata/",
            fetcher=ControlFetcher(client),
            config=config,
            bootstrap=(operator / "root.json").read_bytes(),
        )
        updater.refresh()
        # No release is numbered 0, so the search goes through every role that may speak of this model.
        updater.get_targetinfo(models_path(model, 0))
        targets = Metadata[Targets].from_file(str(cache / "targets.json"))
        # A role that may not speak of this model was not asked for, so what the cache has of it is not verified.
        return {
            name: Metadata[Targets].from_file(str(cache / f"{name}.json"))
            for name, role in ((targets.signed.delegations.roles or {}) if targets.signed.delegations else {}).items()
            if name.startswith("models-") and role.is_delegated_path(models_path(model, 0))
        }
    except OSError as error:
        raise MeshError(Code.UNAVAILABLE, f"{operator} cannot be used: {error}.") from error
    except RepositoryError as error:
        raise MeshError(
            Code.UNTRUSTED, f"The controller's metadata is not trusted ({error}); do not push until that is understood."
        ) from error


def published_releases(roles: dict[str, Metadata[Targets]], model: str) -> list[int]:
    """Releases of a model that any team has published, oldest first."""
    found = [parse_path(path) for role in roles.values() for path in role.signed.targets]
    return sorted(release for name, release in found if name == model)


def listed_rollbacks(
    roles: dict[str, Metadata[Targets]], model: str, release: int, wanted: Sequence[int]
) -> tuple[int, ...]:
    """Releases that a push lists as places to return to: the last two before it, and those asked for.

    Raises:
        MeshError: INVALID_REQUEST if one that is asked for is not an earlier published release.
    """
    earlier = [each for each in published_releases(roles, model) if each < release]
    if unknown := sorted(set(wanted) - set(earlier)):
        raise MeshError(Code.INVALID_REQUEST, f"Release {unknown[0]} of {model} is no earlier published release.")
    return tuple(sorted({*earlier[-ROLLBACKS_LISTED:], *wanted}, reverse=True))


def is_already_published(
    roles: dict[str, Metadata[Targets]], path: str, target: TargetFile, manifest: Manifest
) -> bool:
    """Whether this very release is published, so that only the channel has to change.

    Raises:
        MeshError: CONFLICT if another bundle has this number, or a newer release is published.
    """
    for role in roles.values():
        present = role.signed.targets.get(path)
        if present is None:
            continue
        if present.hashes == target.hashes:
            return True
        raise MeshError(
            Code.CONFLICT,
            f"Release {manifest.release} of {manifest.name} was published with other content; raise its number.",
        )
    newest = max(published_releases(roles, manifest.name), default=0)
    if manifest.release <= newest:
        raise MeshError(
            Code.CONFLICT,
            f"Release {manifest.release} of {manifest.name} is not newer than the published {newest}; "
            f"make it {newest + 1} or more.",
        )
    return False


def upload_blobs(client: ControlClient, bundle: Path, manifest: Manifest, meter: Meter) -> int:
    """Upload the files that the repository lacks; answers how many bytes were sent."""
    entries = {entry.sha256: entry for entry in manifest.files}
    missing = [
        entry
        for entry in entries.values()
        if not client.has(f"/repository/{blob_path(entry.sha256)}", entry.size_bytes)
    ]
    size_bytes = sum(entry.size_bytes for entry in missing)
    meter.begin(size_bytes)
    for entry in missing:
        client.put_file(f"/v1/blobs/{entry.sha256}", bundle / entry.path, meter.advance)
    return size_bytes


def has_stable(client: ControlClient, channel: str, model: str) -> bool:
    """Whether a channel serves the model already."""
    try:
        document = client.call("GET", f"/v1/channels/{channel}")
    except MeshError as error:
        if error.code is Code.MODEL_NOT_FOUND:
            return False
        raise
    return any(rollout["model"] == model for rollout in document["rollouts"])


def _teams(roles: dict[str, Metadata[Targets]]) -> str:
    return ", ".join(name.removeprefix("models-") for name in roles) or "none"
