"""Deltas between sealed versions: made of plain bytes, then sealed as a payload of the new version.

Two seals of nearly the same file have nothing in common, so a delta between them would be as large as the file.
"""

from __future__ import annotations

import hashlib

from model_sync.delta.index import Way
from model_sync.delta.limits import refused
from model_sync.delta.ways import apply_codec
from nearcast.store.manifest import Manifest
from nearcast.store.sealing import SEAL_SIZE_BYTES, open_payload, seal_file, seal_payload


def seal_delta(payload: bytes, result: str, name: str, data_key: bytes) -> bytes:
    """A payload as it is published.

    Args:
        payload: leads from plain to plain bytes.
        result: digest of the sealed file that it leads to.
        name: of the way, in whose base the digest of the sealed old file stands.
        data_key: of the new version.
    """
    return seal_payload(_purpose(result, name), payload, data_key)


def apply_sealed_way(way: Way, payload: bytes, base: bytes, *, manifest: Manifest, path: str, data_key: bytes) -> bytes:
    """The sealed file `path` of a version, or an error: no other bytes come out.

    Args:
        way: as chosen; its codec is none that reads ranges.
        payload: what was fetched under its name.
        base: plain content of the sealed file `way.base`, as its seal proved it; b"" for `zstd`.
        manifest: of the new version, verified.
        path: which of its files.
        data_key: of the new version.

    Raises:
        MeshError: UNTRUSTED for a payload that is not genuine or does not lead to the signed file.
    """
    place = [entry.path for entry in manifest.files].index(path)
    entry = manifest.files[place]
    plain = apply_codec(
        way.codec,
        open_payload(_purpose(entry.sha256, way.name), payload, data_key),
        base,
        size_bytes=entry.size_bytes - SEAL_SIZE_BYTES,
    )
    sealed = seal_file(manifest, place, path, plain, data_key)
    if hashlib.sha256(sealed).hexdigest() != entry.sha256:
        raise refused("its result is not the signed file")
    return sealed


def _purpose(result: str, name: str) -> str:
    return f"delta {result} {name}"
