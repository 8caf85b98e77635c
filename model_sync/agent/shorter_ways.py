"""Shorter ways to the files of a release: what an installed release has already, and deltas from it.

Whatever a way yields must hash to the signed digest; so nothing here is believed, and a way that fails is a
`DeltaError`, after which the full file is another matter.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model_sync.agent.fetch import Remote
from model_sync.agent.mirrors import Mirrors
from model_sync.agent.source import StatusError
from model_sync.delta.index import INDEX_FILE, INDEX_SIZE_BYTES_MAX, DeltaIndex, Way, decode_index
from model_sync.delta.limits import ReadRange
from model_sync.delta.sealed import apply_sealed_way
from model_sync.delta.ways import apply_way, choose_way, full_size_bytes
from model_sync.repository.layout import blob_path, delta_path
from nearcast.errors import Code, MeshError
from nearcast.store import Manifest, Store
from nearcast.store.manifest import File
from nearcast.store.sealing import TenantKeys, open_file

SIZE_BYTES_MIN = 4096
"""For a smaller file, to ask for the index costs more than it saves."""
_ABSENT = (403, 404, 410)
"""How repositories say that there is no such file; object stores that do not show their list say 403."""


class DeltaError(MeshError):
    """A shorter way did not lead to the signed file, or cannot be gone on this node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A file of an installed release."""

    manifest: Manifest
    entry: File
    path: Path

    def read(self) -> bytes:
        """Its bytes as they are on the disk.

        Raises:
            MeshError: UNTRUSTED if they are not the signed ones any more.
        """
        handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, "rb") as file:
            data = file.read(self.entry.size_bytes + 1)
        if hashlib.sha256(data).hexdigest() != self.entry.sha256:
            raise MeshError(
                Code.UNTRUSTED, f"{self.entry.path} of release {self.manifest.release} is damaged on this disk."
            )
        return data


class Bases:
    """The files of the installed releases of one model, by digest; newest release first."""

    def __init__(self, store: Store, model: str) -> None:
        self._bases: dict[str, Base] = {}
        for release in reversed(store.releases(model)):
            try:
                manifest = store.manifest(model, release)
            except MeshError:
                continue
            for entry in manifest.files:
                path = store.folder(model, release) / entry.path
                self._bases.setdefault(entry.sha256, Base(manifest=manifest, entry=entry, path=path))

    def __contains__(self, sha256: object) -> bool:
        return sha256 in self._bases

    def __getitem__(self, sha256: str) -> Base:
        return self._bases[sha256]

    def digests(self, *, sealed: bool) -> frozenset[str]:
        """Digests of what a delta may start from: a plain version starts from plain files, and a sealed one from
        sealed ones.
        """
        return frozenset(one for one, base in self._bases.items() if (base.manifest.encryption is not None) is sealed)

    def newest_plain(self) -> bytes:
        """All files of the newest release that is plain, one after the other: what `chunks` looks for pieces in."""
        plain = [base for base in self._bases.values() if base.manifest.encryption is None]
        newest = max((base.manifest.release for base in plain), default=0)
        return b"".join(base.read() for base in plain if base.manifest.release == newest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShorterWay:
    """How one file is had without fetching all of it: a `way` to walk, or None to copy the same file from here."""

    entry: File
    way: Way | None = None
    full_size_bytes: int = 0

    @property
    def remote(self) -> Remote | None:
        """The payload to fetch."""
        way = self.way
        if way is None:
            return None
        path = delta_path(self.entry.sha256, way.name)
        return Remote(path=path, size_bytes=way.size_bytes, sha256=way.sha256, chunks=way.chunks)

    @property
    def payload_name(self) -> str:
        """Where the payload lies beside the staged files; no file of a version begins with a dot."""
        return f".{self.way.sha256}.delta" if self.way is not None else ""


def find_way(
    mirrors: Mirrors, manifest: Manifest, entry: File, bases: Bases, *, missing_bytes: int, timeout_s: float
) -> ShorterWay | None:
    """The cheapest way to one file; None if to fetch the `missing_bytes` of it is best.

    Raises:
        MeshError: if no source says whether there is a delta.
    """
    if missing_bytes and entry.sha256 in bases:
        return ShorterWay(entry=entry)
    if missing_bytes < SIZE_BYTES_MIN:
        return None
    index = read_index(mirrors, entry.sha256, timeout_s=timeout_s)
    if index is None:
        return None
    sealed = manifest.encryption is not None
    unusable = [way.name for way in index.ways if way.codec == "chunks"] if sealed else []
    way = choose_way(
        index, bases.digests(sealed=sealed), sha256=entry.sha256, size_bytes=entry.size_bytes, failed=unusable
    )
    if way is None or way.size_bytes >= missing_bytes:
        return None
    return ShorterWay(entry=entry, way=way, full_size_bytes=full_size_bytes(index))


def read_index(mirrors: Mirrors, sha256: str, *, timeout_s: float) -> DeltaIndex | None:
    """The index of the ways to a blob, of the first source that gives one; None if there is none.

    Raises:
        MeshError: the last refusal if no source answers, or none with an index.
    """
    refusal: MeshError | None = None
    for source in mirrors.attempts():
        try:
            data = source.read(delta_path(sha256, INDEX_FILE), size_bytes_max=INDEX_SIZE_BYTES_MAX, timeout_s=timeout_s)
            return decode_index(data)
        except StatusError as error:
            if error.status in _ABSENT:
                return None
            refusal = error
        except MeshError as error:
            if error.code is Code.CANCELLED:
                raise
            refusal = error
        mirrors.failed(source, None, refusal)
    raise refusal or MeshError(Code.UNAVAILABLE, "No repository can be asked for a delta.")


def walk(
    shorter: ShorterWay, payload: bytes, manifest: Manifest, bases: Bases, keys: TenantKeys, read_range: ReadRange
) -> bytes:
    """The signed bytes of one file, sealed if the version is; plain bytes of a sealed one stay in memory.

    Raises:
        DeltaError: if the way does not lead there.
        MeshError: as `read_range`.
    """
    entry, way = shorter.entry, shorter.way
    try:
        if way is None:
            return bases[entry.sha256].read()
        if manifest.encryption is not None:
            base = bases[way.base] if way.base is not None else None
            plain = b"" if base is None else open_file(base.manifest, base.entry.path, base.read(), keys)
            data_key = keys.unwrap(manifest.encryption)
            return apply_sealed_way(way, payload, plain, manifest=manifest, path=entry.path, data_key=data_key)
        return apply_way(
            way,
            payload,
            _base_of(way, bases),
            size_bytes=entry.size_bytes,
            sha256=entry.sha256,
            read_range=read_range,
            range_size_bytes_max=shorter.full_size_bytes,
        )
    except (OSError, KeyError, MemoryError) as error:
        raise DeltaError(Code.UNTRUSTED, f"The delta to {entry.path} cannot be applied here: {error!r}.") from error
    except MeshError as error:
        if error.code in (Code.UNTRUSTED, Code.UNSUPPORTED, Code.UNAUTHENTICATED, Code.TOO_LARGE):
            raise DeltaError(error.code, error.message) from error
        raise


def _base_of(way: Way, bases: Bases) -> bytes:
    if way.codec == "chunks":
        return bases.newest_plain()
    return bases[way.base].read() if way.base is not None else b""


def range_reader(mirrors: Mirrors, entry: File, *, timeout_s: float) -> ReadRange:
    """Reads parts of a blob, each from the first source that gives it whole; checked only as part of the result."""

    def read(start: int, size_bytes: int) -> bytes:
        refusal: MeshError | None = None
        for source in mirrors.attempts():
            try:
                offset, pieces = source.get(
                    blob_path(entry.sha256), start=start, end=start + size_bytes, timeout_s=timeout_s
                )
                return _exactly(pieces, start - offset, size_bytes, deadline=time.monotonic() + timeout_s)
            except MeshError as error:
                source.close()
                if error.code is Code.CANCELLED:
                    raise
                refusal = error
                mirrors.failed(source, None, error)
        raise refusal or MeshError(Code.UNAVAILABLE, f"Nobody gives parts of {entry.path}.")

    return read


def _exactly(pieces: Iterator[bytes], skip: int, size_bytes: int, *, deadline: float) -> bytes:
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > skip + size_bytes or time.monotonic() > deadline:
            break
    if len(data) < skip + size_bytes:
        raise MeshError(Code.UNAVAILABLE, "A part of a file was not given whole, or not in time.")
    return bytes(data[skip : skip + size_bytes])
