"""Files of earlier releases that deltas start from: fetched once, by signed digest, kept within a bound."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]

from model_sync.publisher.control_client import ControlClient
from model_sync.repository.layout import blob_path, file_sha256, models_path, parse_models_path, target_file_path
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import File, Manifest, decode_manifest

CACHE_SIZE_BYTES_MAX = 2 * 1024**3
RELEASES_MAX = 3
"""How many earlier releases a delta may start from: a node that missed more takes chunks or the full file."""


def earlier_manifests(
    client: ControlClient, roles: Mapping[str, Metadata[Targets]], manifest: Manifest
) -> list[Manifest]:
    """Manifests of the releases before this one, newest first, checked against the verified roles.

    Raises:
        MeshError: UNTRUSTED if one is not what was signed, UNAVAILABLE if it cannot be had.
    """
    found: dict[int, str] = {}
    for role in roles.values():
        for path, target in role.signed.targets.items():
            model, release = parse_models_path(path)
            if model == manifest.name and release < manifest.release:
                found[release] = target.hashes["sha256"]
    newest = sorted(found, reverse=True)[:RELEASES_MAX]
    return [_fetch_manifest(client, manifest.name, release, found[release]) for release in newest]


class BaseCache:
    """A folder of blobs, each named by its digest; the least recently used leave first."""

    def __init__(self, folder: Path, client: ControlClient, *, size_bytes_max: int = CACHE_SIZE_BYTES_MAX) -> None:
        self._folder = folder
        self._client = client
        self._size_bytes_max = size_bytes_max

    def read(self, entry: File) -> bytes:
        """The content of a file that a verified manifest names.

        Raises:
            MeshError: UNTRUSTED if the repository gives other bytes, UNAVAILABLE if it gives none.
        """
        self.keep(entry)
        return (self._folder / entry.sha256).read_bytes()

    def keep(self, entry: File) -> None:
        """Fetch the file unless it is here, whole.

        Raises:
            MeshError: as `read`.
        """
        path = self._folder / entry.sha256
        if not path.is_file() or file_sha256(path) != entry.sha256:
            self._fetch(entry, path)
        os.utime(path)

    def _fetch(self, entry: File, path: Path) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._make_room(entry.size_bytes)
        draft = path.with_suffix(".part")
        try:
            self._client.get_file(f"/repository/{blob_path(entry.sha256)}", draft, entry.size_bytes)
            if file_sha256(draft) != entry.sha256:
                raise MeshError(Code.UNTRUSTED, f"The repository's blob {entry.sha256} has other bytes than its name.")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def _make_room(self, size_bytes: int) -> None:
        kept = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
        used = sum(path.stat().st_size for path in kept)
        while kept and used + size_bytes > self._size_bytes_max:
            oldest = kept.pop(0)
            used -= oldest.stat().st_size
            oldest.unlink()


def _fetch_manifest(client: ControlClient, model: str, release: int, sha256: str) -> Manifest:
    path = target_file_path(models_path(model, release), sha256)
    status, data = client.get_bytes(f"/repository/{path}")
    if status != 200:
        raise MeshError(Code.UNAVAILABLE, f"The repository has no manifest of {model} {release}.")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise MeshError(Code.UNTRUSTED, f"The repository's manifest of {model} {release} is not the signed one.")
    return decode_manifest(data)
