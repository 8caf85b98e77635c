"""Where things lie in the repository, and the TUF entries that name them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, TargetFile, Targets  # type: ignore[attr-defined]
from tuf.api.serialization.json import JSONSerializer

from nearcast.errors import Code, MeshError
from nearcast.store.manifest import is_model_name

METADATA_SIZE_BYTES_MAX = 5_000_000
"""The largest role that a node of the reference client reads."""
READ_SIZE_BYTES = 1024 * 1024


def models_path(model: str, release: int) -> str:
    """TUF target path of a manifest."""
    return f"models/{model}/{release}.json"


def parse_models_path(path: str) -> tuple[str, int]:
    """Model and release of a manifest's target path.

    Raises:
        MeshError: UNTRUSTED if it is no such path.
    """
    parts = path.split("/")
    stem = parts[-1].removesuffix(".json")
    if len(parts) != 3 or parts[0] != "models" or not is_model_name(parts[1]) or not stem.isdecimal():
        raise MeshError(Code.UNTRUSTED, f"{path!r} is no path of a manifest: models/<model>/<release>.json.")
    if models_path(parts[1], int(stem)) != path:
        raise MeshError(Code.UNTRUSTED, f"{path!r} is not the canonical path of that release.")
    return parts[1], int(stem)


def blob_path(sha256: str) -> str:
    """Path of a blob inside the repository."""
    return f"blobs/{sha256[:2]}/{sha256}"


def delta_path(result: str, name: str) -> str:
    """Path of the delta index of a blob (`index.json`) or of one of its payloads (`Way.name`)."""
    return f"deltas/{result}/{name}"


def target_file_path(path: str, sha256: str) -> str:
    """Path of a target's file inside the repository: the digest goes before the name."""
    folder, _, name = path.rpartition("/")
    return f"targets/{folder}/{sha256}.{name}"


def make_target(path: str, data: bytes, custom: dict[str, Any] | None = None) -> TargetFile:
    """The TUF entry of a small target."""
    unrecognised = {"custom": custom} if custom else None
    return TargetFile(len(data), {"sha256": hashlib.sha256(data).hexdigest()}, path, unrecognised)


def custom_rollback_ok(target: TargetFile) -> frozenset[int]:
    """Releases to which a rollback from this one may go, as the models role says; anything malformed allows nothing."""
    custom = target.custom
    listed = custom.get("rollback_ok") if isinstance(custom, dict) else None
    if not isinstance(listed, list):
        return frozenset()
    return frozenset(entry for entry in listed if type(entry) is int and entry >= 1)


def withdrawn_paths(role: Targets) -> frozenset[str]:
    """Releases that a models role vouches for no longer; anything malformed withdraws nothing. It only ever grows."""
    listed = role.unrecognized_fields.get("withdrawn")
    return frozenset(path for path in listed if isinstance(path, str)) if isinstance(listed, list) else frozenset()


def encode_metadata(metadata: Metadata[Any]) -> bytes:
    """The bytes of one role's file."""
    return metadata.to_bytes(JSONSerializer(compact=True))


def file_sha256(path: Path) -> str:
    """Digest of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_SIZE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
