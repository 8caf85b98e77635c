"""The agent's journal: one line per transition, each with a checksum, each on the disk before the next step begins.

A line is `<crc32 in hex> <JSON of the model's whole memory>`, so that the last good line of a model is all there is to
know. A torn or damaged line is skipped. Opening, and growing too large, rewrite the file with the last lines alone.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import msgspec

from model_sync.replica.state import Memory
from nearcast.durable import write_file


class Journal:
    """Memories of all models in one file."""

    def __init__(self, path: Path, *, size_bytes_max: int) -> None:
        self._path = path
        self._size_bytes_max = size_bytes_max
        self.memories = read_journal(path)
        self._size_bytes = 0
        self._compact()

    def append(self, memory: Memory) -> None:
        """Store a memory durably.

        Raises:
            OSError: if the disk is full or broken; nothing was stored then, and the caller goes no further.
        """
        line = _encode(memory)
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            written = os.write(handle, line)
            if written != len(line):
                os.ftruncate(handle, self._size_bytes)
                raise OSError(28, "the journal does not fit on the disk")
            os.fsync(handle)
        finally:
            os.close(handle)
        self._size_bytes += len(line)
        self.memories[memory.model] = memory
        if self._size_bytes > self._size_bytes_max:
            self._compact()

    def _compact(self) -> None:
        data = b"".join(_encode(memory) for memory in self.memories.values())
        write_file(self._path, data, mode=0o600)
        self._size_bytes = len(data)


def read_journal(path: Path) -> dict[str, Memory]:
    """The last whole memory of each model; nothing if there is no journal."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    memories = {}
    for line in lines:
        memory = decode_record(line)
        if memory is not None:
            memories[memory.model] = memory
    return memories


def _encode(memory: Memory) -> bytes:
    data = msgspec.json.encode(memory)
    return b"%08x %s\n" % (zlib.crc32(data), data)


def decode_record(line: bytes) -> Memory | None:
    """The memory of one line without its end; None if it is torn or damaged."""
    checksum, _, data = line.partition(b" ")
    if b"%08x" % zlib.crc32(data) != checksum:
        return None
    try:
        return msgspec.json.decode(data, type=Memory)
    except msgspec.DecodeError:
        return None
