"""Shorter ways to the files of a release: what an installed release has already, and deltas from it.

Whatever a way yields must hash to the signed digest; so nothing here is believed, and a way that fails is a
`DeltaError`, after which the full file is another matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from model_sync.agent.install.bases import Bases
from model_sync.agent.install.fetch import Remote
from model_sync.agent.sources.mirrors import Mirrors
from model_sync.agent.sources.source import StatusError
from model_sync.delta.index import (
    FILE_SIZE_BYTES_MIN,
    INDEX_FILE,
    INDEX_SIZE_BYTES_MAX,
    DeltaIndex,
    Way,
    decode_index,
)
from model_sync.delta.limits import ReadRange
from model_sync.delta.ways import choose_way, full_size_bytes
from model_sync.repository.layout import blob_path, delta_path
from nearcast.errors import Code, MeshError
from nearcast.store import Manifest
from nearcast.store.manifest import File

CHUNKS_PAYLOAD_SIZE_BYTES_MAX = 2 * 1024 * 1024
"""Of a payload that is fetched while it is still open whether it will be used; enough for files of some 1 GB."""
_ABSENT = (403, 404, 410)
"""How repositories say that there is no such file; object stores that do not show their list say 403."""


class DeltaError(MeshError):
    """A shorter way did not lead to the signed file, or cannot be gone on this node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShorterWay:
    """How one file is had without fetching all of it: a `way` to walk, or None to copy the same file from here.

    `lacking` are the parts (start, size in bytes) that a way of codec `chunks` needs beside its payload.
    """

    entry: File
    way: Way | None = None
    lacking: tuple[tuple[int, int], ...] = ()

    @property
    def size_bytes(self) -> int:
        """What is to be fetched."""
        payload = self.way.size_bytes if self.way is not None else 0
        return payload + sum(size_bytes for _, size_bytes in self.lacking)

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

    @property
    def parts_name(self) -> str:
        """Where `lacking` lies beside it, one part after the other."""
        return f"{self.payload_name}.parts"


Measure: TypeAlias = Callable[[ShorterWay], tuple[tuple[int, int], ...] | None]
"""What is lacking; None if nobody can tell, or too much."""


def find_way(
    manifest: Manifest,
    entry: File,
    bases: Bases,
    *,
    missing_bytes: int,
    ask: Callable[[str], DeltaIndex | None],
    measure: Measure,
) -> ShorterWay | None:
    """The cheapest way to one file; None if to fetch the `missing_bytes` of it is best.

    Args:
        manifest: of the new version.
        entry: which of its files.
        bases: what is installed.
        missing_bytes: of the file, what is not staged yet.
        ask: for the index of the ways to a digest; None = there is none.
        measure: says what a way of codec `chunks` lacks, which is known only once its payload is here.

    Raises:
        MeshError: as `ask` and `measure`.
    """
    if missing_bytes and entry.sha256 in bases:
        return ShorterWay(entry=entry)
    if missing_bytes < FILE_SIZE_BYTES_MIN:
        return None
    index = ask(entry.sha256)
    if index is None:
        return None
    sealed = manifest.encryption is not None
    unusable = [
        way.name
        for way in index.ways
        if way.codec == "chunks" and (sealed or way.size_bytes > CHUNKS_PAYLOAD_SIZE_BYTES_MAX)
    ]
    at_hand, full_bytes = bases.digests(sealed=sealed), min(full_size_bytes(index), missing_bytes)
    while True:
        way = choose_way(index, at_hand, sha256=entry.sha256, size_bytes=entry.size_bytes, failed=unusable)
        if way is None or way.size_bytes >= missing_bytes:
            return None
        shorter = ShorterWay(entry=entry, way=way)
        if way.codec != "chunks":
            return shorter
        lacking = measure(shorter)
        if lacking is not None and sum(size_bytes for _, size_bytes in lacking) < full_bytes:
            return replace(shorter, lacking=lacking)
        unusable.append(way.name)


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
