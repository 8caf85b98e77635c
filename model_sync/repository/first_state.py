"""The first, empty state of a repository."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from model_sync.repository.layout import encode_metadata
from model_sync.repository.repository import Lifetimes
from nearcast.durable import write_file


def create_repository(
    folder: Path, root: Metadata[Root], targets: Metadata[Targets], roles: Mapping[str, Metadata[Targets]],
    signer: CryptoSigner, *, lifetimes: Lifetimes | None = None,
) -> None:  # fmt: skip
    """Write the first state of a repository from signed offline roles; signs the online ones.

    Args:
        folder: an empty or missing folder.
        root: signed root, version 1.
        targets: signed targets role that delegates to `roles` and to `rollout`.
        roles: signed, empty models roles by name.
        signer: the online key.
        lifetimes: of the online roles.
    """
    lifetimes = lifetimes or Lifetimes()
    now = datetime.now(UTC).replace(microsecond=0)
    rollout = Metadata(Targets(expires=now + lifetimes.rollout))
    rollout.sign(signer)
    metas: dict[str, MetaFile] = {}
    for name, role in {"targets": targets, **roles, "rollout": rollout}.items():
        data = encode_metadata(role)
        write_file(folder / "metadata" / f"{role.signed.version}.{name}.json", data)
        metas[f"{name}.json"] = MetaFile.from_data(role.signed.version, data, ["sha256"])
    write_file(folder / "metadata" / f"{root.signed.version}.root.json", encode_metadata(root))
    snapshot = Metadata(Snapshot(expires=now + lifetimes.snapshot, meta=metas))
    snapshot.sign(signer)
    data = encode_metadata(snapshot)
    write_file(folder / "metadata" / "1.snapshot.json", data)
    timestamp = Metadata(
        Timestamp(expires=now + lifetimes.timestamp, snapshot_meta=MetaFile.from_data(1, data, ["sha256"]))
    )
    timestamp.sign(signer)
    write_file(folder / "metadata" / "timestamp.json", encode_metadata(timestamp))
