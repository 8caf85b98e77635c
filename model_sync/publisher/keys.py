"""The keys of a mesh: made once, kept apart, never protected by a password that someone could guess from the source.

```
<home>/operator/   root.pem  targets.pem  models-<team>.pem  root.json  keys.json  control  identity/     a laptop
<home>/backup/     root.pem                                         the second root key: put it away, elsewhere
<home>/sync/       online.pem  ca/  device-ca/  identity/  repository/  control.db             the sync process
```
The online key signs timestamp, snapshot and rollout. It can pick among what the models roles vouch for, nothing more.
Keys may also lie in other hands, on PKCS#11 tokens or in a cloud's key service (`signers`).
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from securesystemslib.signer import CryptoSigner, Key, Signer  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Metadata,
    Root,
    Targets,
)

from model_sync.controller.enrolment import EnrolmentAuthority
from model_sync.controller.home import ENROLMENT_FILE, SYNC_NAME, write_identity
from model_sync.controller.online_key import ONLINE_KEY
from model_sync.publisher.key_ring import KeyRing
from model_sync.publisher.roles import MODELS_PATHS, now
from model_sync.publisher.signers import Place, find_key, open_signer
from model_sync.repository.first_state import create_repository
from model_sync.repository.layout import encode_metadata
from model_sync.repository.repository import Lifetimes
from model_sync.repository.signing_key import write_key
from model_sync.repository.succession import CHANNEL_PATHS, MODELS_PREFIX
from nearcast.durable import sync_folder, write_file
from nearcast.errors import Code, MeshError
from nearcast.identity import CERTIFICATE_LIFETIME_S, CertificateAuthority, Identity, load_identity
from nearcast.store.manifest import is_model_name

OPERATOR_NAME = "operator"
FOLDERS = ("operator", "backup", "sync")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleKeys:
    """Keys that a role begins with, as `signers.find_key` reads them, and how many must sign. () = make one here."""

    keys: tuple[str, ...] = ()
    threshold: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A role's keys, and signers for as many of them as must sign."""

    keys: tuple[Key, ...]
    signers: tuple[Signer, ...]

    def sign(self, role: Metadata[Any]) -> None:
        for signer in self.signers:
            role.sign(signer, append=True)


def init_keys(
    home: Path, team: str = "core", roles: Mapping[str, RoleKeys] | None = None, *, root_version: int = 1
) -> None:
    """Make all keys of a new mesh and the first, empty state of its repository.

    Everything is made beside its place and moved there at the end, so that an interrupted run leaves nothing behind
    that looks finished.

    Args:
        home: gets the folders of `FOLDERS`.
        team: the first team.
        roles: keys that exist already, by "root", "targets" and "models". Root without: two keys, of which one signs.
        root_version: of the first root. A mesh that replaces another begins above that one's last: then its intents
            are newer than all that the nodes have obeyed (`rollout.document.first_intent`).

    Raises:
        MeshError: CONFLICT if there are keys already; they are never overwritten. INVALID_REQUEST if a threshold
            cannot be met, FORBIDDEN if fewer private keys than that are in reach.
    """
    if not is_model_name(team):
        raise MeshError(Code.INVALID_REQUEST, "A team has lower case letters, digits, _ and -, at most 64.")
    for name in FOLDERS:
        if (home / name).exists():
            raise MeshError(
                Code.CONFLICT,
                f"{home / name} exists; keys are never overwritten. Choose another --home or move it away.",
            )
    home.mkdir(parents=True, exist_ok=True)
    draft = home / f".keys-{secrets.token_hex(6)}"
    draft.mkdir(mode=0o700)
    try:
        _write_all(draft, team, roles or {}, root_version)
        for name in FOLDERS:
            if (draft / name).exists():
                (draft / name).rename(home / name)
        sync_folder(home)
        if (home / "backup").exists():
            KeyRing(home / "operator").note(find_key(str(home / "backup" / "root.pem")))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def new_key(path: Path) -> Key:
    """Make a private key in a file of its own, and its public half beside it, to be given to others.

    Raises:
        MeshError: CONFLICT if the file exists; keys are never overwritten.
    """
    if path.exists():
        raise MeshError(Code.CONFLICT, f"{path} exists; keys are never overwritten.")
    signer = CryptoSigner.generate_ed25519()
    write_key(path, signer)
    private = load_pem_private_key(signer.private_bytes, password=None)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_file(public_path(path), public)
    return signer.public_key


def public_path(path: Path) -> Path:
    """Where the public half of a key file lies."""
    return path.with_name(f"{path.stem}.pub.pem")


def _write_all(draft: Path, team: str, roles: Mapping[str, RoleKeys], root_version: int) -> None:
    operator, sync = draft / "operator", draft / "sync"
    for folder in (operator, sync):
        folder.mkdir(mode=0o700)
    models_name = f"{MODELS_PREFIX}{team}"
    ring = KeyRing(operator)
    root = _hold(roles.get("root"), [operator / "root.pem", draft / "backup" / "root.pem"], ring)
    targets = _hold(roles.get("targets"), [operator / "targets.pem"], ring)
    models = _hold(roles.get("models"), [operator / f"{models_name}.pem"], ring)
    online = CryptoSigner.generate_ed25519()
    write_key(sync / ONLINE_KEY, online)
    lifetimes = Lifetimes()
    thresholds = {name: wanted.threshold for name, wanted in roles.items()}
    root_role = _make_root(root, targets, online.public_key, thresholds, root_version)
    targets_role = _make_targets(targets, models_name, models, online.public_key, thresholds.get("models", 1))
    empty = Metadata(Targets(expires=now() + lifetimes.models))
    models.sign(empty)
    create_repository(sync / "repository", root_role, targets_role, {models_name: empty}, online, lifetimes=lifetimes)
    write_file(operator / "root.json", encode_metadata(root_role))

    authority = CertificateAuthority.create(sync / "ca")
    CertificateAuthority.create(sync / "device-ca", common_name="nearcast device CA")
    write_identity(sync / "identity", authority, SYNC_NAME, "sync")
    certificate = write_identity(operator / "identity", authority, OPERATOR_NAME, "operator")
    # One place says where the controller is; what renews an identity looks for it beside the certificate.
    (operator / "identity" / "control").symlink_to(Path("..") / "control")
    _admit_operator(sync, certificate)


def _hold(wanted: RoleKeys | None, files: list[Path], ring: KeyRing) -> _Held:
    """The keys asked for, or new ones in `files`, of which the first signs."""
    if wanted is None or not wanted.keys:
        if wanted is not None and wanted.threshold != 1:
            raise MeshError(Code.INVALID_REQUEST, f"A threshold of {wanted.threshold} needs as many keys; name them.")
        made = []
        for path in files:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            made.append(CryptoSigner.generate_ed25519())
            write_key(path, made[-1])
        return _Held(keys=tuple(one.public_key for one in made), signers=(made[0],))
    places = {place.key.keyid: place for place in map(find_key, wanted.keys)}
    signers = _open_enough(list(places.values()), wanted.threshold)
    for place in places.values():
        ring.note(place)
    return _Held(keys=tuple(place.key for place in places.values()), signers=tuple(signers))


def _open_enough(places: list[Place], threshold: int) -> list[Signer]:
    if not 1 <= threshold <= len(places):
        raise MeshError(Code.INVALID_REQUEST, f"A threshold of {threshold} cannot be met by {len(places)} keys.")
    private = [place for place in places if place.uri]
    if len(private) < threshold:
        raise MeshError(
            Code.FORBIDDEN,
            f"The first roles need {threshold} signatures, but only {len(private)} of the private keys are here; "
            "bring the holders together, or begin with fewer and add keys later: nearcast keys add.",
        )
    return [open_signer(place) for place in private[:threshold]]


def _admit_operator(sync: Path, certificate: bytes) -> None:
    enrolment = EnrolmentAuthority(sync / ENROLMENT_FILE)
    try:
        enrolment.admit(OPERATOR_NAME, "operator", certificate, CERTIFICATE_LIFETIME_S)
    finally:
        enrolment.close()


def renew_operator(home: Path) -> Identity:
    """Give the first operator a new key and certificate from the mesh's authority, which must be on this machine.

    This is the way back in after the certificate has expired; before that, commands renew it by themselves.

    Raises:
        MeshError: UNAVAILABLE if the authority is not here.
    """
    sync, folder = home / "sync", home / "operator" / "identity"
    authority = CertificateAuthority.load(sync / "ca")
    _admit_operator(sync, write_identity(folder, authority, OPERATOR_NAME, "operator"))
    return load_identity(folder)


def _make_root(root: _Held, targets: _Held, online: Key, thresholds: Mapping[str, int], version: int) -> Metadata[Root]:
    signed = Root(version=version, expires=now() + Lifetimes().root, consistent_snapshot=True)
    for name, held in (("root", root), ("targets", targets)):
        for key in held.keys:
            signed.add_key(key, name)
        signed.roles[name].threshold = thresholds.get(name, 1)
    signed.add_key(online, "snapshot")
    signed.add_key(online, "timestamp")
    role = Metadata(signed)
    root.sign(role)
    return role


def _make_targets(targets: _Held, name: str, models: _Held, online: Key, threshold: int) -> Metadata[Targets]:
    keys = {key.keyid: key for key in (*models.keys, online)}
    keyids = [key.keyid for key in models.keys]
    roles = {
        name: DelegatedRole(name, keyids, threshold, False, paths=MODELS_PATHS),  # noqa: FBT003 (their order)
        "rollout": DelegatedRole("rollout", [online.keyid], 1, True, paths=CHANNEL_PATHS),  # noqa: FBT003
    }
    role = Metadata(Targets(expires=now() + Lifetimes().targets, delegations=Delegations(keys, roles)))
    targets.sign(role)
    return role
