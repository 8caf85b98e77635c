"""Blobs, chunk by chunk: each 256 KiB is hashed before it is written, so a cut costs at most one chunk.

A file on disk is trusted only as far as its chunks hash right; what a power cut tore is fetched again.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from model_sync.agent.http_source import HttpSource
from model_sync.repository.layout import blob_path
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import CHUNK_SIZE_BYTES, File

READ_SIZE_BYTES = 1024 * 1024


def fetch_blob(source: HttpSource, entry: File, path: Path, *, chunk_timeout_s: float, stop: threading.Event) -> int:
    """Complete `path` to the signed content of `entry`; returns the bytes that came over the network.

    Raises:
        MeshError: UNTRUSTED for a chunk that is not the signed one, UNAVAILABLE for a broken or slow connection,
            CANCELLED once `stop` is set. Whole chunks stay on disk in each case.
        OSError: if the disk is full.
    """
    done = verified_prefix(entry, path)
    received = 0
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(done)
        file.seek(done)
        if done == entry.size_bytes:
            return 0
        offset, pieces = source.get(blob_path(entry.sha256), start=done, timeout_s=chunk_timeout_s)
        try:
            for index, chunk in _chunks(entry, pieces, offset, chunk_timeout_s, stop):
                received += len(chunk)
                if index * CHUNK_SIZE_BYTES < done:
                    continue  # the server ignores ranges
                if hashlib.sha256(chunk).hexdigest() != entry.chunks[index]:
                    raise MeshError(
                        Code.UNTRUSTED,
                        f"Refused chunk {index} of {entry.path} from {source.url}: it is not the signed one. "
                        "The source is damaged or hostile; the node serves on and tries again.",
                    )
                file.write(chunk)
                file.flush()
        except BaseException:
            source.close()
            raise
    return received


def _chunks(
    entry: File, pieces: Iterator[bytes], offset: int, chunk_timeout_s: float, stop: threading.Event
) -> Iterator[tuple[int, bytes]]:
    """Cut the stream into (index, chunk); each chunk must be complete within `chunk_timeout_s`."""
    buffer = bytearray()
    position = offset
    deadline = time.monotonic() + chunk_timeout_s
    for piece in pieces:
        if stop.is_set():
            raise MeshError(Code.CANCELLED, "The download was stopped.")
        if time.monotonic() > deadline:
            raise MeshError(Code.UNAVAILABLE, f"A chunk of {entry.path} took longer than {chunk_timeout_s:g} s.")
        buffer += piece
        if position + len(buffer) > entry.size_bytes:
            raise MeshError(Code.UNTRUSTED, f"Refused {entry.path}: the source sends more than the signed size.")
        while buffer:
            size = min(CHUNK_SIZE_BYTES, entry.size_bytes - position)
            if len(buffer) < size:
                break
            yield position // CHUNK_SIZE_BYTES, bytes(buffer[:size])
            del buffer[:size]
            position += size
            deadline = time.monotonic() + chunk_timeout_s
    if position != entry.size_bytes:
        raise MeshError(Code.UNAVAILABLE, f"The connection ended {entry.size_bytes - position} bytes before the end.")


def verified_prefix(entry: File, path: Path) -> int:
    """Bytes at the beginning of `path` that are signed content, in whole chunks; 0 if there is no file."""
    done = 0
    try:
        with path.open("rb") as file:
            for sha256 in entry.chunks:
                size = min(CHUNK_SIZE_BYTES, entry.size_bytes - done)
                chunk = file.read(size)
                if len(chunk) != size or hashlib.sha256(chunk).hexdigest() != sha256:
                    break
                done += size
    except FileNotFoundError:
        return 0
    return done


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
