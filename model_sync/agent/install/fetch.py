"""Downloads, chunk by chunk: each 256 KiB is hashed before it is written, and any source may give any chunk.

A cut costs at most the chunk that was under way, a power cut too, as each chunk reaches the disk before the next is
begun. A file on disk is trusted only as far as its chunks hash right; what a power cut tore is fetched again.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model_sync.agent.sources.source import RetryLaterError, Source
from nearcast.durable import sync_folder
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import CHUNK_SIZE_BYTES, File

READ_SIZE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Bytes to fetch: where they lie in the repository, and what they must hash to, whole and per 256 KiB chunk."""

    path: str
    size_bytes: int
    sha256: str
    chunks: tuple[str, ...]

    def span(self, chunks: range) -> tuple[int, int]:
        """First byte of a run of chunks, and the one after its last."""
        return chunks.start * CHUNK_SIZE_BYTES, min(chunks.stop * CHUNK_SIZE_BYTES, self.size_bytes)


class Supply(Protocol):
    """Whom to ask for which chunks next. Mirrors are one, neighbours in front of mirrors another."""

    def begin(self, remote: Remote) -> None:
        """A download begins: nobody has refused anything of it yet."""

    def next(self, remote: Remote, missing: tuple[range, ...]) -> tuple[Source, range] | None:
        """A source and a run of chunks, part of one of `missing`, to ask it for; None = nobody is left to ask."""

    def served(self, source: Source, remote: Remote) -> None:
        """The source gave the whole run, and it was right."""

    def failed(self, source: Source, remote: Remote, error: MeshError, *, progress: bool) -> None:
        """The source gave it up, or sent something wrong; `progress`: right chunks came before."""

    def is_last(self, source: Source) -> bool:
        """Whether nobody else could be asked, so that a slow source is better than none."""


class Pace(Protocol):
    """What bounds the downloads of the whole agent."""

    def take(self, size_bytes: int, stop: threading.Event) -> float:
        """Account for a piece, and wait as long as the rate asks for; returns the seconds waited.

        Raises:
            MeshError: UNAVAILABLE if no more may be downloaded today.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a chunk may take: `chunk_timeout_s` in any case, or less if it comes slower than `rate_bytes_per_s_min`
    while another source could be asked.
    """

    chunk_timeout_s: float
    rate_bytes_per_s_min: float = 0.0

    def chunk_s(self, *, last: bool) -> float:
        """Seconds that one chunk may take."""
        if last or self.rate_bytes_per_s_min <= 0.0:
            return self.chunk_timeout_s
        return min(self.chunk_timeout_s, CHUNK_SIZE_BYTES / self.rate_bytes_per_s_min)


class Download:
    """One file on its way. `received_bytes` counts what came over the network, chunks that came in vain included.

    Args:
        supply: whom to ask.
        stop: set from another thread to give up within one chunk.
    """

    def __init__(
        self, remote: Remote, path: Path, supply: Supply, *, pace: Pace, patience: Patience, stop: threading.Event
    ) -> None:
        self.received_bytes = 0
        self._remote = remote
        self._path = path
        self._supply = supply
        self._pace = pace
        self._patience = patience
        self._stop = stop

    def run(self) -> None:
        """Complete the file to the content that its chunk list describes.

        Raises:
            MeshError: UNTRUSTED for a chunk that is not the listed one, UNAVAILABLE for a broken or slow connection,
                each once every source was asked; CANCELLED once `stop` is set. Whole chunks stay on disk in each case.
            OSError: if the disk is full.
        """
        with self._path.open("r+b" if self._path.exists() else "w+b") as file:
            sync_folder(self._path.parent)  # an old name too: its maker may have been killed before its fsync
            file.truncate(min(os.fstat(file.fileno()).st_size, self._remote.size_bytes))
            missing = missing_chunks(self._remote.chunks, self._remote.size_bytes, file.fileno())
            self._supply.begin(self._remote)
            refusal: MeshError | None = None
            while missing:
                order = self._supply.next(self._remote, runs(missing))
                if order is None:
                    raise refusal or MeshError(Code.UNAVAILABLE, f"Nobody has {self._remote.path} at the moment.")
                refusal = self._fetch(*order, missing, file.fileno()) or refusal

    def _fetch(self, source: Source, run: range, missing: set[int], handle: int) -> MeshError | None:
        """Ask one source for one run of chunks; returns why it did not give all of it."""
        left = len(missing)
        try:
            for index, chunk in self._receive(source, run):
                if index >= run.stop:
                    break
                if index not in missing:
                    continue  # the source ignores ranges
                self._check(source, index, chunk)
                os.pwrite(handle, chunk, index * CHUNK_SIZE_BYTES)
                os.fdatasync(handle)
                missing.discard(index)
        except MeshError as error:
            source.close()
            if error.code is Code.CANCELLED or isinstance(error, AllowanceError):
                raise
            self._supply.failed(source, self._remote, error, progress=len(missing) < left)
            return error
        except BaseException:
            source.close()
            raise
        self._supply.served(source, self._remote)
        return None

    def _check(self, source: Source, index: int, chunk: bytes) -> None:
        if hashlib.sha256(chunk).hexdigest() != self._remote.chunks[index]:
            raise MeshError(
                Code.UNTRUSTED,
                f"Refused chunk {index} of {self._remote.path} from {source.url}: it is not the signed one. "
                "The source is damaged or hostile; the node serves on and tries again.",
            )

    def _receive(self, source: Source, run: range) -> Iterator[tuple[int, bytes]]:
        """Cut what comes into (index, chunk); each chunk must be complete in time, waits of our own not counted."""
        remote, allowed_s = self._remote, self._patience.chunk_s(last=self._supply.is_last(source))
        start, end = remote.span(run)
        ranged = end if end < remote.size_bytes else None
        position, pieces = source.get(remote.path, start=start, end=ranged, timeout_s=allowed_s)
        buffer = bytearray()
        deadline = time.monotonic() + allowed_s
        for piece in pieces:
            if self._stop.is_set():
                raise MeshError(Code.CANCELLED, "The download was stopped.")
            self.received_bytes += len(piece)
            deadline += self._pace.take(len(piece), self._stop)
            if time.monotonic() > deadline:
                raise MeshError(
                    Code.UNAVAILABLE, f"A chunk of {remote.path} from {source.url} took longer than {allowed_s:g} s."
                )
            buffer += piece
            if position + len(buffer) > remote.size_bytes:
                raise MeshError(Code.UNTRUSTED, f"Refused {remote.path}: {source.url} sends more than the signed size.")
            while buffer and len(buffer) >= (size := min(CHUNK_SIZE_BYTES, remote.size_bytes - position)):
                yield position // CHUNK_SIZE_BYTES, bytes(buffer[:size])
                del buffer[:size]
                position += size
                deadline = time.monotonic() + allowed_s
        if position < end:
            raise MeshError(Code.UNAVAILABLE, f"{source.url} broke off {end - position} bytes before the end.")


class AllowanceError(RetryLaterError):
    """No more may be downloaded for now, whoever the source is."""


def runs(chunks: Collection[int]) -> tuple[range, ...]:
    """Chunk numbers as runs of consecutive ones, ascending."""
    found: list[range] = []
    for index in sorted(chunks):
        if found and found[-1].stop == index:
            found[-1] = range(found[-1].start, index + 1)
        else:
            found.append(range(index, index + 1))
    return tuple(found)


def missing_chunks(chunks: tuple[str, ...], size_bytes: int, handle: int) -> set[int]:
    """Numbers of the chunks that the open file does not hold as listed."""
    missing = set()
    for index, sha256 in enumerate(chunks):
        start = index * CHUNK_SIZE_BYTES
        size = min(CHUNK_SIZE_BYTES, size_bytes - start)
        data = os.pread(handle, size, start)
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            missing.add(index)
    return missing


def verify_file(entry: File, path: Path) -> None:
    """Check size and sha256 of the very file that will be served.

    Raises:
        MeshError: UNTRUSTED if it is not the signed content.
    """
    digest = hashlib.sha256()
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb") as file:
        while piece := file.read(READ_SIZE_BYTES):
            digest.update(piece)
        size = os.fstat(handle).st_size
    if size != entry.size_bytes or digest.hexdigest() != entry.sha256:
        raise MeshError(
            Code.UNTRUSTED, f"Refused {entry.path}: on disk it is not the signed content; it is fetched again."
        )
