"""What this node can give to others: chunks of installed releases and of downloads under way, each checked as it goes.

Nothing but repository content leaves here: sealed files as the sealed bytes that they are, keys never.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from model_sync.agent.install.fetch import Remote
from nearcast.errors import MeshError
from nearcast.store import Store
from nearcast.store.manifest import CHUNK_SIZE_BYTES

SCAN_S = 2.0
"""An unknown digest makes us look through the installed releases, at most this often."""
KEPT_BYTES_MAX = 8 * 1024 * 1024
"""Deltas are gone from the disk once they are applied; so many bytes of them stay in memory for others."""
UNDER_WAY_MAX = 64


@dataclass(slots=True)
class _Held:
    """A payload: its chunk digests, which of them are here (bits), and where."""

    size_bytes: int
    chunks: tuple[str, ...]
    held: int
    place: Path | bytes

    def read(self, chunk: int) -> bytes:
        start = chunk * CHUNK_SIZE_BYTES
        size = min(CHUNK_SIZE_BYTES, self.size_bytes - start)
        if isinstance(self.place, bytes):
            return self.place[start : start + size]
        with self.place.open("rb") as file:
            file.seek(start)
            return file.read(size)


class Holdings:
    """Chunks by the digest of the payload that they belong to; safe from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._under_way: dict[str, _Held] = {}
        self._installed: dict[str, _Held] = {}
        self._kept: dict[str, _Held] = {}
        self._scanned_at = -SCAN_S

    def begin(self, remote: Remote, path: Path, held: int) -> None:
        """A download into `path` begins, or goes on, with these chunks."""
        with self._lock:
            self._under_way[remote.sha256] = _Held(remote.size_bytes, remote.chunks, held, path)
            while len(self._under_way) > UNDER_WAY_MAX:
                del self._under_way[next(iter(self._under_way))]

    def add(self, remote: Remote, chunk: int) -> None:
        """One more chunk is on the disk and has the right digest."""
        with self._lock:
            entry = self._under_way.get(remote.sha256)
            if entry is not None:
                entry.held |= 1 << chunk

    def keep(self, remote: Remote, data: bytes) -> None:
        """Hold a whole small payload in memory; older ones make room for it."""
        with self._lock:
            self._kept.pop(remote.sha256, None)
            self._kept[remote.sha256] = _Held(remote.size_bytes, remote.chunks, (1 << len(remote.chunks)) - 1, data)
            while sum(entry.size_bytes for entry in self._kept.values()) > KEPT_BYTES_MAX:
                del self._kept[next(iter(self._kept))]

    def held(self, sha256: str) -> int | None:
        """The chunks of a payload that are here, as bits; None if nothing is known of it."""
        entry = self._find(sha256)
        return None if entry is None else entry.held

    def read(self, sha256: str, chunk: int) -> bytes | None:
        """One chunk, checked against its digest just now; None if it is not here, or damaged."""
        entry = self._find(sha256)
        if entry is None or not entry.held >> chunk & 1:
            return None
        try:
            data = entry.read(chunk)
        except OSError:
            data = b""
        if hashlib.sha256(data).hexdigest() == entry.chunks[chunk]:
            return data
        self._forget(sha256, entry, chunk)
        return None

    def _find(self, sha256: str) -> _Held | None:
        with self._lock:
            entry = self._under_way.get(sha256) or self._installed.get(sha256) or self._kept.get(sha256)
            if entry is None and time.monotonic() - self._scanned_at >= SCAN_S:
                self._scan()
                entry = self._installed.get(sha256)
            return entry

    def _forget(self, sha256: str, entry: _Held, chunk: int) -> None:
        """The file has moved to its final place, was removed, or is damaged."""
        with self._lock:
            if self._under_way.get(sha256) is entry:
                del self._under_way[sha256]
                self._scan()
            else:
                entry.held &= ~(1 << chunk)

    def _scan(self) -> None:
        self._scanned_at = time.monotonic()
        found: dict[str, _Held] = {}
        for model in self._store.models():
            for release in self._store.releases(model):
                try:
                    manifest = self._store.manifest(model, release)
                except MeshError:
                    continue
                folder = self._store.folder(model, release)
                for entry in manifest.files:
                    whole = (1 << len(entry.chunks)) - 1
                    found[entry.sha256] = _Held(entry.size_bytes, entry.chunks, whole, folder / entry.path)
        self._installed = found
