"""Deltas on their way in: payloads beside a blob that is here, and last the index that names them.

They need no signature. What is checked keeps the repository whole: an index speaks of its own blob, and of payloads
that are here as it describes them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from model_sync.controller.uploads import SHA256, Content, Uploads
from model_sync.delta.index import INDEX_FILE, INDEX_SIZE_BYTES_MAX, Codec, DeltaIndex, decode_index
from model_sync.repository.layout import blob_path, delta_path, file_sha256
from nearcast.errors import Code, MeshError

_PAYLOAD = re.compile(rf"([0-9a-f]{{64}}|full)\.({'|'.join(map(re.escape, get_args(Codec)))})")


class DeltaUploads:
    """Receives deltas into a repository folder."""

    def __init__(self, folder: Path, uploads: Uploads) -> None:
        self._folder = folder
        self._uploads = uploads

    async def receive(self, result: str, name: str, size_bytes: int | None, content: Content) -> None:
        """Take one payload or an index.

        Args:
            result: digest of the blob that it leads to.
            name: `index.json`, or as `Way.name`.
            size_bytes: as announced, if it was.
            content: the body.

        Raises:
            MeshError: INVALID_REQUEST for a name that is none or an unknown blob, CONFLICT once the index is here,
                UNTRUSTED for an index that does not fit what is here, and as `Uploads.store`.
        """
        if not SHA256.fullmatch(result) or (name != INDEX_FILE and not _PAYLOAD.fullmatch(name)):
            raise MeshError(Code.INVALID_REQUEST, f"{name!r} is no delta: name it <base|full>.<codec> or {INDEX_FILE}.")
        blob = self._folder / blob_path(result)
        if not blob.is_file():
            raise MeshError(Code.INVALID_REQUEST, f"The repository has no blob {result}; upload it first.")
        if (self._folder / delta_path(result, INDEX_FILE)).exists():
            raise MeshError(Code.CONFLICT, f"The deltas of {result} are complete: their index is here.")
        target = self._folder / delta_path(result, name)
        blob_size_bytes = blob.stat().st_size

        def check(draft: Path, _: str) -> None:
            if name == INDEX_FILE:
                self._check_index(decode_index(draft.read_bytes()), result, blob_size_bytes)

        bound = INDEX_SIZE_BYTES_MAX if name == INDEX_FILE else blob_size_bytes
        await self._uploads.store(target, size_bytes, content, bound, check)

    def _check_index(self, index: DeltaIndex, result: str, blob_size_bytes: int) -> None:
        if (index.result, index.size_bytes) != (result, blob_size_bytes):
            raise MeshError(Code.UNTRUSTED, "The delta index speaks of another blob.")
        for way in index.ways:
            payload = self._folder / delta_path(result, way.name)
            is_here = payload.is_file() and payload.stat().st_size == way.size_bytes
            if not is_here or file_sha256(payload) != way.sha256:
                raise MeshError(Code.UNTRUSTED, f"The payload {way.name} is not here as the index says; upload it.")
