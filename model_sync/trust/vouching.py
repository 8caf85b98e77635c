"""Two roles must agree: rollout picks a release, models vouches for its manifest; both by the same digest.

Whoever steals the rollout key can pick among genuine releases, nothing more.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from model_sync.rollout.document import Pick
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What the models role signed about one manifest: its digest, its size in bytes, and its `custom.rollback_ok`."""

    sha256: str
    size_bytes: int
    rollback_ok: tuple[int, ...] = ()


def vouched(model: str, pick: Pick, target: TargetFacts | None, manifest: Manifest | None = None) -> None:
    """Refuse a pick that the models role does not vouch for.

    `manifest` is the content of that target, if it is at hand; its bytes have the digest of `target`.

    Raises:
        MeshError: UNTRUSTED, naming the release and what disagrees.
    """
    what = f"{model} release {pick.release}"
    if target is None:
        raise MeshError(Code.UNTRUSTED, f"Refused {what}: no models role vouches for it; push it first.")
    if target.sha256 != pick.manifest_sha256:
        raise MeshError(
            Code.UNTRUSTED,
            f"Refused {what}: the rollout picks manifest {pick.manifest_sha256[:12]}, but the models role vouches for "
            f"{target.sha256[:12]}; start the rollout again with the published release.",
        )
    if manifest is None:
        return
    if manifest.name != model or manifest.release != pick.release:
        raise MeshError(
            Code.UNTRUSTED,
            f"Refused {what}: its manifest describes {manifest.name} release {manifest.release}; publish it again.",
        )


def require_digest(what: str, data: bytes, sha256: str) -> None:
    """Refuse bytes that are not the signed ones.

    Raises:
        MeshError: UNTRUSTED if the sha256 of `data` is another.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise MeshError(
            Code.UNTRUSTED, f"Refused {what}: its sha256 is {found[:12]}… instead of the signed {sha256[:12]}…."
        )
