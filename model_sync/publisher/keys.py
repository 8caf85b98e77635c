"""The keys of a mesh: made once, kept apart, never protected by a password that someone could guess from the source.

```
<home>/operator/   root.pem  targets.pem  models-<team>.pem  root.json  control  identity/     offline: a laptop, a safe
<home>/sync/       online.pem  ca/  device-ca/  identity/  repository/  control.db             the sync process
```
The online key signs timestamp, snapshot and rollout. It can pick among what the models roles vouch for, nothing more.
"""

from __future__ import annotations

import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    Root,
    Targets,
)

from model_sync.controller.enrolment import EnrolmentAuthority
from model_sync.controller.home import ENROLMENT_FILE, ONLINE_KEY, SYNC_NAME, write_identity
from model_sync.repository.first_state import create_repository
from model_sync.repository.layout import encode_metadata
from model_sync.repository.repository import Lifetimes
from model_sync.repository.signing_key import write_key
from nearcast.durable import sync_folder, write_file
from nearcast.errors import Code, MeshError
from nearcast.identity import CERTIFICATE_LIFETIME_S, CertificateAuthority, Identity, load_identity
from nearcast.store.manifest import is_model_name

OPERATOR_NAME = "operator"


def init_keys(home: Path, team: str = "core") -> None:
    """Make all keys of a new mesh and the first, empty state of its repository.

    Everything is made beside its place and moved there at the end, so that an interrupted run leaves nothing behind
    that looks finished.

    Raises:
        MeshError: CONFLICT if there are keys already; they are never overwritten.
    """
    if not is_model_name(team):
        raise MeshError(Code.INVALID_REQUEST, "A team has lower case letters, digits, _ and -, at most 64.")
    for name in ("operator", "sync"):
        if (home / name).exists():
            raise MeshError(
                Code.CONFLICT,
                f"{home / name} exists; keys are never overwritten. Choose another --home or move it away.",
            )
    home.mkdir(parents=True, exist_ok=True)
    draft = home / f".keys-{secrets.token_hex(6)}"
    draft.mkdir(mode=0o700)
    try:
        _write_draft(draft, team)
        for name in ("operator", "sync"):
            (draft / name).rename(home / name)
        sync_folder(home)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_draft(draft: Path, team: str) -> None:
    operator, sync = draft / "operator", draft / "sync"
    for folder in (operator, sync):
        folder.mkdir(mode=0o700)
    root, targets, models, online = (CryptoSigner.generate_ed25519() for _ in range(4))
    write_key(operator / "root.pem", root)
    write_key(operator / "targets.pem", targets)
    write_key(operator / f"models-{team}.pem", models)
    write_key(sync / ONLINE_KEY, online)
    lifetimes = Lifetimes()
    root_role = _make_root(root, targets, online, lifetimes)
    models_name = f"models-{team}"
    targets_role = _make_targets(targets, {models_name: models}, online, lifetimes)
    empty = Metadata(Targets(expires=_now() + lifetimes.models))
    empty.sign(models)
    create_repository(sync / "repository", root_role, targets_role, {models_name: empty}, online, lifetimes=lifetimes)
    write_file(operator / "root.json", encode_metadata(root_role))

    authority = CertificateAuthority.create(sync / "ca")
    CertificateAuthority.create(sync / "device-ca", common_name="nearcast device CA")
    write_identity(sync / "identity", authority, SYNC_NAME, "sync")
    certificate = write_identity(operator / "identity", authority, OPERATOR_NAME, "operator")
    # One place says where the controller is; what renews an identity looks for it beside the certificate.
    (operator / "identity" / "control").symlink_to(Path("..") / "control")
    _admit_operator(sync, certificate)


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


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _make_root(root: CryptoSigner, targets: CryptoSigner, online: CryptoSigner, lifetimes: Lifetimes) -> Metadata[Root]:
    signed = Root(expires=_now() + lifetimes.root, consistent_snapshot=True)
    signed.add_key(root.public_key, "root")
    signed.add_key(targets.public_key, "targets")
    signed.add_key(online.public_key, "snapshot")
    signed.add_key(online.public_key, "timestamp")
    role = Metadata(signed)
    role.sign(root)
    return role


def _make_targets(
    targets: CryptoSigner, models: dict[str, CryptoSigner], online: CryptoSigner, lifetimes: Lifetimes
) -> Metadata[Targets]:
    keys: dict[str, Key] = {signer.public_key.keyid: signer.public_key for signer in (*models.values(), online)}
    roles = {
        name: DelegatedRole(name, [signer.public_key.keyid], 1, False, paths=["models/*/*"])  # noqa: FBT003 (their order)
        for name, signer in models.items()
    }
    roles["rollout"] = DelegatedRole("rollout", [online.public_key.keyid], 1, True, paths=["channels/*"])  # noqa: FBT003
    role = Metadata(Targets(expires=_now() + lifetimes.targets, delegations=Delegations(keys, roles)))
    role.sign(targets)
    return role
